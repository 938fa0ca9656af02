//! HTTP/1 as a proxy must read it: strictly, in place, and forwarded byte for byte but for whole header lines.
//!
//! A head either is unambiguous for every reader behind us or is refused with its `BadHttp` (RFC 9112 sections 5, 6, 11).
//! Nothing is rebuilt: `forward` copies the head without the lines that end at this hop and adds our own lines. Bodies
//! are followed, not decoded: `Follower` says which bytes of a buffer belong to the message.
//!
//! | file | |
//! |---|---|
//! | `http1/head.rs` | heads: syntax, framing, which lines end here |
//! | `http1/body.rs` | where a body ends |

mod body;
mod head;
#[cfg(test)]
mod tests;

pub use body::Follower;
pub use head::{request, response};

use std::net::IpAddr;

/// Whom a client wants to talk to, by identity: read by its own proxy, and not passed on.
pub const REQUIRE_ID: &str = "l5d-require-id";
/// A head longer than this is refused.
pub const MAX_HEAD: usize = 64 << 10;
/// A head with more header lines than this is refused.
pub const MAX_HEADERS: usize = 128;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    Http10,
    Http11,
}

/// How a message's body ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    None,
    Length(u64),
    Chunked,
    /// Responses only: everything until the server closes.
    UntilClose,
}

/// A request's head. Borrows the buffer it was parsed from.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    pub method: &'a str,
    /// As sent: origin, absolute, authority or asterisk form.
    pub target: &'a str,
    /// The target's path without its query; empty for CONNECT and `OPTIONS *`.
    pub path: &'a str,
    /// The target's own authority, else `Host`; `None` if there is neither (HTTP/1.0).
    pub authority: Option<&'a str>,
    pub version: Version,
    pub body: Body,
    /// The client keeps its connection open for more requests.
    pub keep_alive: bool,
    /// `Connection: upgrade` with a protocol other than h2c: the head is forwarded with both lines.
    pub upgrade: bool,
    pub expects_continue: bool,
    pub head: Head<'a>,
}

/// A response's head. Borrows the buffer it was parsed from.
#[derive(Clone, Copy, Debug)]
pub struct Response<'a> {
    pub status: u16,
    pub version: Version,
    pub body: Body,
    /// The server keeps its connection open, and the body's end is known without closing it.
    pub keep_alive: bool,
    /// 101, or 2xx to CONNECT: from here on both directions are opaque.
    pub tunnel: bool,
    pub head: Head<'a>,
}

/// What a response answers: decides whether it has a body.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    pub head: bool,
    pub connect: bool,
    pub upgrade: bool,
}

/// What `forward` changes beyond the lines that end at every hop.
#[derive(Clone, Copy, Debug, Default)]
pub struct Edit<'a> {
    /// Remove `l5d-*` and `mantle-*`, in any spelling that a server could fold into them.
    pub strip_reserved: bool,
    pub connection: Connection,
    /// Lines to add. Values must be free of CR and LF (identities and addresses are).
    pub add: &'a [(&'a str, &'a str)],
}

/// What the next reader is told about the connection. An upgrade always says `upgrade`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Connection {
    /// Nothing: the version's default.
    #[default]
    Default,
    Close,
    /// For HTTP/1.0 readers.
    KeepAlive,
}

/// The bytes of a head with what `forward` needs to know of its lines.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    /// From the start line to the empty line, both included.
    bytes: &'a [u8],
    /// Bytes of empty lines before it, dropped.
    blank: usize,
    /// Bit i: header line i ends at this hop.
    hop: u128,
    /// Bit i: header line i has a reserved name.
    reserved: u128,
    upgrade: bool,
}

impl Request<'_> {
    pub fn asked(&self) -> Asked {
        Asked { head: self.method == "HEAD", connect: self.method == "CONNECT", upgrade: self.upgrade }
    }

    /// May be sent again when a pooled connection turns out to be closed (RFC 9110 section 9.2.2).
    pub fn is_idempotent(&self) -> bool {
        matches!(self.method, "GET" | "HEAD" | "OPTIONS" | "TRACE" | "PUT" | "DELETE")
    }
}

impl Response<'_> {
    /// 1xx other than 101: another head follows.
    pub fn is_interim(&self) -> bool {
        (100..200).contains(&self.status) && self.status != 101
    }
}

impl<'a> Head<'a> {
    /// Bytes of the buffer that it takes.
    pub fn size(&self) -> usize {
        self.blank + self.bytes.len()
    }

    /// The header lines with their ends, without start line and empty line.
    fn lines(&self) -> impl Iterator<Item = &'a [u8]> {
        let lines = self.bytes.split_inclusive(|b| *b == b'\n');
        lines.skip(1).take_while(|line| line.len() > 2)
    }

    /// Name and value of each header, as sent.
    pub fn headers(&self) -> impl Iterator<Item = (&'a str, &'a [u8])> {
        self.lines().filter_map(|line| {
            let colon = line.iter().position(|b| *b == b':')?;
            Some((str::from_utf8(&line[..colon]).ok()?, line[colon + 1..].trim_ascii()))
        })
    }

    /// The first value of a header; names compare without case.
    pub fn header(&self, name: &str) -> Option<&'a [u8]> {
        self.headers().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }

    /// The identities that the client wants its server to have; a request goes to no other (`REQUIRE_ID`).
    pub fn required_ids(&self) -> impl Iterator<Item = &'a [u8]> {
        let any = self.reserved != 0; // most have none, and need no search
        let required = self.headers().filter(|(name, _)| name.eq_ignore_ascii_case(REQUIRE_ID));
        required.map(|(_, value)| value).take_while(move |_| any)
    }

    /// Appends the head as the next hop gets it.
    pub fn forward(&self, out: &mut Vec<u8>, edit: &Edit<'_>) {
        let gone = self.hop | if edit.strip_reserved { self.reserved } else { 0 };
        if gone == 0 {
            out.extend_from_slice(&self.bytes[..self.bytes.len() - 2]);
        } else {
            let start_line = self.bytes.iter().position(|b| *b == b'\n').map_or(0, |lf| lf + 1);
            out.extend_from_slice(&self.bytes[..start_line]);
            for (i, line) in self.lines().enumerate() {
                if gone >> i & 1 == 0 {
                    out.extend_from_slice(line);
                }
            }
        }
        let connection = match edit.connection {
            _ if self.upgrade => "connection: upgrade\r\n",
            Connection::Default => "",
            Connection::Close => "connection: close\r\n",
            Connection::KeepAlive => "connection: keep-alive\r\n",
        };
        out.extend_from_slice(connection.as_bytes());
        for (name, value) in edit.add {
            debug_assert!(!value.bytes().any(|b| b == b'\r' || b == b'\n'), "values of ours are one line");
            for part in [name, ": ", value, "\r\n"] {
                out.extend_from_slice(part.as_bytes());
            }
        }
        out.extend_from_slice(b"\r\n");
    }
}

/// True for header names that only proxies may set. `_` counts as `-`: CGI-like servers cannot tell them apart.
pub fn is_reserved(name: &[u8]) -> bool {
    let starts = |prefix: &[u8]| {
        name.len() >= prefix.len()
            && name.iter().zip(prefix).all(|(b, p)| b.eq_ignore_ascii_case(p) || (*p == b'-' && *b == b'_'))
    };
    starts(b"l5d-") || starts(b"mantle-")
}

/// The host of an authority as an address, if it is one.
pub fn authority_ip(authority: &str) -> Option<IpAddr> {
    let host = match authority.strip_prefix('[') {
        Some(v6) => v6.split(']').next().unwrap_or_default(),
        None => authority.rsplit_once(':').map_or(authority, |(host, _)| host),
    };
    host.parse().ok()
}
