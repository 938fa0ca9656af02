//! Heads: syntax by `httparse`, then the rules that keep two readers from understanding them differently.

use std::mem::MaybeUninit;

use super::{Asked, Body, Head, MAX_HEAD, MAX_HEADERS, Request, Response, Version, is_reserved};
use crate::reasons::BadHttp;

/// Parses the request head at the start of `buf`; `None`: not all of it is there.
///
/// One empty line before it is skipped (RFC 9112 section 2.2).
pub fn request(buf: &[u8]) -> Result<Option<Request<'_>>, BadHttp> {
    let blank = if buf.starts_with(b"\r\n") { 2 } else { 0 };
    let Some(bytes) = whole_head(&buf[blank..])? else { return Ok(None) };
    let mut headers = [const { MaybeUninit::uninit() }; MAX_HEADERS];
    let mut parsed = httparse::Request::new(&mut []);
    match parsed.parse_with_uninit_headers(bytes, &mut headers) {
        Ok(httparse::Status::Complete(n)) if n == bytes.len() => {}
        Ok(_) => return Err(BadHttp::Malformed),
        Err(error) => return Err(syntax(error)),
    }
    let (Some(method), Some(target)) = (parsed.method, parsed.path) else { return Err(BadHttp::Malformed) };
    let version = version(parsed.version)?;
    let lines = Lines::read(parsed.headers, version)?;
    let body = match (lines.chunked, lines.length) {
        (true, _) => Body::Chunked,
        (false, Some(0) | None) => Body::None,
        (false, Some(n)) => Body::Length(n),
    };
    let (own, path) = split_target(method, target)?;
    let authority = match (own, lines.host) {
        (Some(own), Some(host)) if !own.eq_ignore_ascii_case(host) && method != "CONNECT" => {
            return Err(BadHttp::BadHost);
        }
        (Some(own), _) => Some(own),
        (None, Some("")) => None,
        (None, host) => host,
    };
    if version == Version::Http11 && lines.host.is_none() {
        return Err(BadHttp::BadHost);
    }
    let upgrade = lines.upgrade && lines.upgrade_listed && !lines.h2c && version == Version::Http11;
    Ok(Some(Request {
        method,
        target,
        path,
        authority,
        version,
        body,
        keep_alive: lines.keep_alive(version),
        upgrade,
        expects_continue: lines.expects_continue,
        head: lines.head(bytes, blank, upgrade),
    }))
}

/// Parses the response head at the start of `buf`; `None`: not all of it is there.
pub fn response(buf: &[u8], asked: Asked) -> Result<Option<Response<'_>>, BadHttp> {
    let Some(bytes) = whole_head(buf)? else { return Ok(None) };
    let mut headers = [const { MaybeUninit::uninit() }; MAX_HEADERS];
    let mut parsed = httparse::Response::new(&mut []);
    match httparse::ParserConfig::default().parse_response_with_uninit_headers(&mut parsed, bytes, &mut headers) {
        Ok(httparse::Status::Complete(n)) if n == bytes.len() => {}
        Ok(_) => return Err(BadHttp::Malformed),
        Err(error) => return Err(syntax(error)),
    }
    let status = parsed.code.filter(|code| (100..=999).contains(code)).ok_or(BadHttp::Malformed)?;
    let version = version(parsed.version)?;
    let lines = Lines::read(parsed.headers, version)?;
    let switching = status == 101;
    if switching && !asked.upgrade {
        return Err(BadHttp::Malformed);
    }
    let tunnel = switching || (asked.connect && (200..300).contains(&status));
    let never = tunnel || status < 200 || status == 204;
    if never && lines.chunked {
        return Err(BadHttp::BadTransferEncoding);
    }
    let body = match (lines.chunked, lines.length) {
        _ if never || asked.head || status == 304 => Body::None,
        (true, _) => Body::Chunked,
        (false, Some(0)) => Body::None,
        (false, Some(n)) => Body::Length(n),
        (false, None) => Body::UntilClose,
    };
    Ok(Some(Response {
        status,
        version,
        body,
        keep_alive: lines.keep_alive(version) && body != Body::UntilClose && !tunnel,
        tunnel,
        head: lines.head(bytes, 0, switching),
    }))
}

/// The bytes up to and including the empty line, if they are there; refuses line ends that readers disagree about.
fn whole_head(buf: &[u8]) -> Result<Option<&[u8]>, BadHttp> {
    let mut at = 0;
    while let Some(lf) = buf[at..].iter().position(|b| *b == b'\n') {
        let lf = at + lf;
        if lf == 0 || buf[lf - 1] != b'\r' {
            return Err(BadHttp::BareLineFeed);
        }
        if lf + 1 > MAX_HEAD {
            return Err(BadHttp::HeadTooLarge);
        }
        if lf == at + 1 {
            return if at == 0 { Err(BadHttp::Malformed) } else { Ok(Some(&buf[..=lf])) };
        }
        if at > 0 && matches!(buf[at], b' ' | b'\t') {
            return Err(BadHttp::ObsoleteFold);
        }
        at = lf + 1;
    }
    if buf.len() > MAX_HEAD { Err(BadHttp::HeadTooLarge) } else { Ok(None) }
}

fn syntax(error: httparse::Error) -> BadHttp {
    match error {
        httparse::Error::TooManyHeaders => BadHttp::HeadTooLarge,
        httparse::Error::Version => BadHttp::UnsupportedVersion,
        httparse::Error::HeaderName
        | httparse::Error::HeaderValue
        | httparse::Error::NewLine
        | httparse::Error::Status
        | httparse::Error::Token => BadHttp::Malformed,
    }
}

fn version(minor: Option<u8>) -> Result<Version, BadHttp> {
    match minor {
        Some(0) => Ok(Version::Http10),
        Some(1) => Ok(Version::Http11),
        Some(_) | None => Err(BadHttp::UnsupportedVersion),
    }
}

/// The target's own authority and its path (RFC 9112 section 3.2).
fn split_target<'a>(method: &str, target: &'a str) -> Result<(Option<&'a str>, &'a str), BadHttp> {
    if target.contains('#') {
        return Err(BadHttp::Malformed);
    }
    if method == "CONNECT" {
        let port = target.rsplit_once(':').map(|(_, port)| port.parse::<u16>());
        return if matches!(port, Some(Ok(1..))) && is_host(target) {
            Ok((Some(target), ""))
        } else {
            Err(BadHttp::BadHost)
        };
    }
    let path_of = |rest: &'a str| rest.split('?').next().unwrap_or_default();
    if target.starts_with('/') {
        return Ok((None, path_of(target)));
    }
    if target == "*" {
        return if method == "OPTIONS" { Ok((None, "")) } else { Err(BadHttp::Malformed) };
    }
    let scheme_end = target.find("://").ok_or(BadHttp::Malformed)?;
    let (scheme, rest) = (&target[..scheme_end], &target[scheme_end + 3..]);
    if !scheme.eq_ignore_ascii_case("http") && !scheme.eq_ignore_ascii_case("https") {
        return Err(BadHttp::Malformed);
    }
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, after) = rest.split_at(end);
    if authority.is_empty() || !is_host(authority) {
        return Err(BadHttp::BadHost);
    }
    Ok((Some(authority), if after.starts_with('/') { path_of(after) } else { "/" }))
}

/// Characters that can stand in `host [":" port]`; no user info, nothing that ends a URL's authority.
fn is_host(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._~%!$&'()*+;=:[]".contains(&b))
}

/// What the header lines of a head say, line by line.
#[derive(Default)]
struct Lines<'a> {
    host: Option<&'a str>,
    length: Option<u64>,
    chunked: bool,
    close: bool,
    keep: bool,
    upgrade: bool,
    upgrade_listed: bool,
    h2c: bool,
    expects_continue: bool,
    hop: u128,
    /// The `Upgrade` lines: end here unless the upgrade is forwarded.
    upgrades: u128,
    reserved: u128,
}

impl<'a> Lines<'a> {
    fn read(headers: &[httparse::Header<'a>], version: Version) -> Result<Self, BadHttp> {
        let mut lines = Self::default();
        let mut listed = false;
        for (i, header) in headers.iter().enumerate() {
            let bit = 1 << i;
            let (name, value) = (header.name, header.value.trim_ascii());
            let is = |wanted: &str| name.eq_ignore_ascii_case(wanted);
            if is("host") {
                let host = str::from_utf8(value).ok().filter(|host| is_host(host)).ok_or(BadHttp::BadHost)?;
                if lines.host.replace(host).is_some() {
                    return Err(BadHttp::BadHost);
                }
            } else if is("content-length") {
                if lines.length.replace(length(value)?).is_some() {
                    return Err(BadHttp::ConflictingLength);
                }
            } else if is("transfer-encoding") {
                if lines.chunked || version == Version::Http10 || !value.eq_ignore_ascii_case(b"chunked") {
                    return Err(BadHttp::BadTransferEncoding);
                }
                lines.chunked = true;
            } else if is("connection") {
                lines.hop |= bit;
                for token in tokens(value) {
                    match token {
                        t if t.eq_ignore_ascii_case(b"close") => lines.close = true,
                        t if t.eq_ignore_ascii_case(b"keep-alive") => lines.keep = true,
                        t if t.eq_ignore_ascii_case(b"upgrade") => lines.upgrade_listed = true,
                        t if FRAMING.iter().any(|name| t.eq_ignore_ascii_case(name)) => return Err(BadHttp::Malformed),
                        _ => listed = true,
                    }
                }
            } else if is("upgrade") {
                lines.upgrades |= bit;
                lines.upgrade = true;
                lines.h2c |= tokens(value).any(|t| t.eq_ignore_ascii_case(b"h2c") || t.eq_ignore_ascii_case(b"h2"));
            } else if is("keep-alive") || is("proxy-connection") || is("http2-settings") {
                lines.hop |= bit;
            } else if is("te") {
                if !value.eq_ignore_ascii_case(b"trailers") {
                    lines.hop |= bit;
                }
            } else if is("expect") {
                lines.expects_continue |= value.eq_ignore_ascii_case(b"100-continue");
            }
            if is_reserved(name.as_bytes()) {
                lines.reserved |= bit;
            }
        }
        if lines.chunked && lines.length.is_some() {
            return Err(BadHttp::ConflictingLength);
        }
        if listed {
            let connections = || headers.iter().filter(|h| h.name.eq_ignore_ascii_case("connection"));
            let ends =
                |name: &str| connections().any(|h| tokens(h.value).any(|t| t.eq_ignore_ascii_case(name.as_bytes())));
            for (i, header) in headers.iter().enumerate() {
                if ends(header.name) {
                    lines.hop |= 1 << i;
                }
            }
        }
        Ok(lines)
    }

    fn keep_alive(&self, version: Version) -> bool {
        match version {
            Version::Http11 => !self.close,
            Version::Http10 => self.keep && !self.close,
        }
    }

    fn head(&self, bytes: &'a [u8], blank: usize, upgrade: bool) -> Head<'a> {
        let hop = if upgrade { self.hop & !self.upgrades } else { self.hop | self.upgrades };
        Head { bytes, blank, hop, reserved: self.reserved, upgrade }
    }
}

/// Headers that no `Connection` line may take away: they say where messages end and for whom they are.
const FRAMING: [&[u8]; 3] = [b"content-length", b"transfer-encoding", b"host"];

/// Digits only: no sign, no list, no overflow.
fn length(value: &[u8]) -> Result<u64, BadHttp> {
    let digits = !value.is_empty() && value.iter().all(u8::is_ascii_digit);
    let number = str::from_utf8(value).ok().and_then(|text| text.parse().ok());
    number.filter(|_| digits).ok_or(BadHttp::ConflictingLength)
}

/// The elements of a comma-separated list.
fn tokens(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|b| *b == b',').map(<[u8]>::trim_ascii).filter(|token| !token.is_empty())
}
