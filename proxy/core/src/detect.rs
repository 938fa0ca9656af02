//! Which protocol a connection speaks, from the client's first bytes.
//!
//! Two duties pull in opposite directions. Bytes must not be held for ever: what cannot be HTTP is `Opaque` at once.
//! And anything that a *lenient* server could take for HTTP/1 must be called `Http1`, so that it is parsed strictly or
//! refused, and never tunnelled with forged identity headers inside. The rim bounds the wait for `NeedMore` by time.

use crate::client_hello;

/// A request line longer than this is decided with what is known by then.
pub const MAX_LINE: usize = 8 * 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detected {
    /// Undecided: call again with more bytes, or treat as opaque when the detection time is over.
    NeedMore,
    /// Starts like a ClientHello (`client_hello::parse` has the rest).
    Tls,
    /// To be parsed as HTTP/1, or refused.
    Http1,
    /// The whole preface of RFC 9113 section 3.4.
    Http2,
    Opaque,
}

/// Classifies all bytes a client has sent so far. Pure in `prefix`: more bytes never change a decision already made.
pub fn detect(prefix: &[u8]) -> Detected {
    if prefix.first() == Some(&22) {
        return match client_hello::plausible(prefix) {
            true if prefix.len() >= 6 => Detected::Tls,
            true => Detected::NeedMore,
            false => Detected::Opaque,
        };
    }
    let common = prefix.len().min(PREFACE.len());
    if prefix[..common] == PREFACE[..common] {
        return if common == PREFACE.len() { Detected::Http2 } else { Detected::NeedMore };
    }
    let blank = prefix.iter().take_while(|b| is_space(**b)).count();
    if blank > MAX_BLANK {
        return Detected::Http1; // nothing but blank lines: the strict parser refuses it
    }
    request_line(&prefix[blank..])
}

/// Decides over a request line in the making, the way the most lenient of servers would split it.
fn request_line(text: &[u8]) -> Detected {
    let token = text.iter().take_while(|b| is_token(**b)).count();
    let Some(after) = text.get(token) else {
        return if token > MAX_METHOD { Detected::Opaque } else { Detected::NeedMore };
    };
    if token == 0 || token > MAX_METHOD || !is_space(*after) || is_line_end(*after) {
        return Detected::Opaque;
    }
    let known = METHODS.contains(&&text[..token]);
    if known && *after == b' ' && text.get(token + 1) == Some(&b'/') {
        return Detected::Http1; // `GET /`: no need to see more
    }
    let rest = &text[token..];
    let line = rest.iter().position(|b| is_line_end(*b)).map(|end| &rest[..end]);
    let seen = line.unwrap_or(rest);
    if seen.iter().any(|b| (*b < 0x20 && !is_space(*b)) || *b == 0x7f) {
        return Detected::Opaque;
    }
    let mut words = seen.split(|b| is_space(*b)).filter(|word| !word.is_empty());
    let target = words.next().unwrap_or_default();
    let url = target.starts_with(b"/") || target.windows(3).any(|w| w == b"://");
    match line {
        Some(_) => {
            let version = words.next_back().unwrap_or_default();
            let http = version.len() >= 5 && version[..5].eq_ignore_ascii_case(b"HTTP/");
            // Without a version it is HTTP/0.9 (refused) only if it looks like it: memcached's `get key` is not.
            let ancient = version.is_empty() && known && url;
            if http || ancient { Detected::Http1 } else { Detected::Opaque }
        }
        None if text.len() < MAX_LINE => Detected::NeedMore,
        None if url => Detected::Http1,
        None => Detected::Opaque,
    }
}

/// What some server splits a request line at, or skips before it (Python's `str.split` is the widest known).
fn is_space(b: u8) -> bool {
    matches!(b, b'\t'..=b'\r' | 0x1c..=0x1f | b' ' | 0x85 | 0xa0)
}

fn is_line_end(b: u8) -> bool {
    b == b'\r' || b == b'\n'
}

/// `tchar` of RFC 9110 section 5.6.2.
pub(crate) fn is_token(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b)
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The longest registered method has 17 letters; iperf3 opens with 36.
const MAX_METHOD: usize = 24;
const MAX_BLANK: usize = 64;
const METHODS: [&[u8]; 9] = [b"GET", b"POST", b"PUT", b"HEAD", b"DELETE", b"OPTIONS", b"PATCH", b"CONNECT", b"TRACE"];

#[cfg(test)]
mod tests {
    use super::Detected::*;
    use super::*;

    #[test]
    fn first_bytes_decide() {
        let long_known = [b"GET http://x/".as_slice(), &[b'a'; MAX_LINE]].concat();
        let long_word = [b"SET key ".as_slice(), &[b'a'; MAX_LINE]].concat();
        let hello = client_hello::tests::hello(Some("x"), 0, 16_384);
        let cases: &[(&[u8], Detected)] = &[
            (b"", NeedMore),
            (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", Http1),
            (b"GET /", Http1),
            (b"GET ", NeedMore),
            (b"GE", NeedMore),
            (b"BREW /pot HTTP/1.1\r\n", Http1),
            (b"get / http/1.0\n", Http1),
            (b"GET http://a/ HTTP/1.1\r\n", Http1),
            (b"CONNECT a:443 HTTP/1.1\r\n", Http1),
            (b"OPTIONS * HTTP/1.1\r\n", Http1),
            (b"UPDATEREDIRECTREF / HTTP/1.1\r\n", Http1),
            // what a lenient server would read as HTTP/1 is never tunnelled
            (b"\r\nGET / HTTP/1.1\r\n", Http1),
            (b"\r\n\r\n", NeedMore),
            (b" \tGET / HTTP/1.1\r\n", Http1),
            (b"GET\t/\tHTTP/1.1\r\n", Http1),
            (b"X\x85/\xa0HTTP/1.1\r\n", Http1),
            (b"GET  /  HTTP/1.1\n", Http1),
            (b"X / HTTP/1.1\rHost: x\r\r", Http1),
            (b"GET /old\r\n", Http1),
            (&[b'\n'; 65], Http1),
            (&long_known, Http1),
            // HTTP/2 needs its whole preface; a near miss is HTTP/1 and refused there
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Http2),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r", NeedMore),
            (b"PRI * HTTP/2.0\r\nHost: x\r\n", Http1),
            // not HTTP
            (b"0123456789abcdefghijklmnopqrstuvwxyz\0", Opaque), // iperf3
            (b"0123456789abcdefghijklmnopq", Opaque),
            (b"SSH-2.0-OpenSSH_9.6\r\n", Opaque),
            (b"*1\r\n$4\r\nPING\r\n", Opaque),
            (b"PING\r\n", Opaque),
            (b"get key\r\n", Opaque),
            (b"SET key value\r\n", Opaque),
            (b"EHLO example.org\r\n", Opaque),
            (b"CONNECT\nlogin:x\n", Opaque), // STOMP
            (b"OPTIONS rtsp://a/b RTSP/1.0\r\n", Opaque),
            (b"INVITE sip:a@b SIP/2.0\r\n", Opaque),
            (&long_word, Opaque),
            (b"\0\0\0\x17\0\x03\0\0user\0", Opaque), // PostgreSQL
            (b"\x10\x1a\0\x04MQTT", Opaque),
            (b"\xff\xfe", Opaque),
            (b"GETTING \x01x", Opaque),
            // TLS
            (&hello, Tls),
            (&hello[..6], Tls),
            (&hello[..5], NeedMore),
            (&[22, 3, 1, 0, 5, 2], Opaque),
            (&[22, 22], Opaque),
        ];
        for (bytes, want) in cases {
            assert_eq!(detect(bytes), *want, "{:?}", String::from_utf8_lossy(&bytes[..bytes.len().min(40)]));
        }
    }

    #[test]
    fn a_decision_holds_for_every_longer_prefix() {
        let inputs: [&[u8]; 6] = [
            b"\r\n GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0",
            b"OPTIONS rtsp://a/b RTSP/1.0\r\nCSeq: 1\r\n",
            b"X y HTTP/1.1\r\n\r\n",
            b"abcdefghijklmnopqrstuvwxyz / HTTP/1.1\r\n",
            b"get / nothttp\r\nGET / HTTP/1.1\r\n",
        ];
        for input in inputs {
            let mut decided = NeedMore;
            for n in 0..=input.len() {
                let now = detect(&input[..n]);
                assert!(
                    decided == NeedMore || now == decided,
                    "{:?} at {n}: {decided:?} then {now:?}",
                    String::from_utf8_lossy(input)
                );
                decided = now;
            }
            assert_ne!(decided, NeedMore);
        }
    }
}
