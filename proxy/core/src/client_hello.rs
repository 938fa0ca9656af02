//! Reads the server name out of the first bytes of a TLS connection, without taking part in it.
//!
//! The inbound side peeks: our SNI means mesh TLS, another SNI is the application's own TLS and passes through.
//! Source: RFC 8446 sections 4.1.2 and 5.1, RFC 6066 section 3. A hello may be spread over several records
//! (post-quantum key shares make it 1.5 KiB and more); how much is looked at is bounded.

/// How many bytes of a connection are looked at before it is called "not TLS".
pub const MAX_PREFIX: usize = 16 * 1024 + 64;

/// What the first bytes of a connection say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientHello {
    /// So far it is a ClientHello, but not a whole one.
    NeedMore,
    /// Not a ClientHello, or one that is malformed or larger than `MAX_PREFIX`.
    NotTls,
    /// A whole ClientHello; `sni` is its host name in lower case, if it has a well-formed one.
    Hello { sni: Option<String> },
}

/// Parses the first bytes of a connection. Call again with more bytes after `NeedMore`.
pub fn parse(prefix: &[u8]) -> ClientHello {
    match assemble(prefix) {
        Assembled::Whole(body) => match server_name(&body) {
            Some(sni) => ClientHello::Hello { sni },
            None => ClientHello::NotTls,
        },
        Assembled::Partial if prefix.len() < MAX_PREFIX => ClientHello::NeedMore,
        Assembled::Partial | Assembled::Other => ClientHello::NotTls,
    }
}

/// True while `prefix` can still become a ClientHello: the cheap test of the first six bytes.
pub fn plausible(prefix: &[u8]) -> bool {
    let at = |i: usize, ok: fn(u8) -> bool| prefix.get(i).is_none_or(|b| ok(*b));
    let length_ok = match (prefix.get(3), prefix.get(4)) {
        (Some(hi), Some(lo)) => (1..=MAX_RECORD).contains(&usize::from(u16::from_be_bytes([*hi, *lo]))),
        (Some(hi), None) => usize::from(*hi) << 8 <= MAX_RECORD,
        (None, _) => true,
    };
    at(0, |b| b == HANDSHAKE) && at(1, |b| b == 3) && at(2, |b| b <= 4) && length_ok && at(5, |b| b == CLIENT_HELLO)
}

enum Assembled {
    Whole(Vec<u8>),
    Partial,
    Other,
}

/// Joins the handshake bytes of consecutive records until the ClientHello's body is complete.
fn assemble(prefix: &[u8]) -> Assembled {
    if !plausible(prefix) {
        return Assembled::Other;
    }
    let mut body = Vec::new();
    let mut rest = prefix;
    loop {
        let Some((header, after)) = rest.split_at_checked(5) else { return Assembled::Partial };
        let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
        if header[0] != HANDSHAKE || header[1] != 3 || !(1..=MAX_RECORD).contains(&length) {
            return Assembled::Other;
        }
        let available = length.min(after.len());
        body.extend_from_slice(&after[..available]);
        if body.len() >= 4 {
            let wanted = 4 + (usize::from(body[1]) << 16 | usize::from(body[2]) << 8 | usize::from(body[3]));
            if wanted > MAX_PREFIX {
                return Assembled::Other;
            }
            if body.len() >= wanted {
                body.truncate(wanted);
                body.drain(..4);
                return Assembled::Whole(body);
            }
        }
        if available < length {
            return Assembled::Partial;
        }
        rest = &after[length..];
    }
}

/// `None`: malformed. `Some(None)`: no (usable) server name.
fn server_name(body: &[u8]) -> Option<Option<String>> {
    let mut hello = Reader(body);
    hello.take(2 + 32)?; // legacy_version, random
    hello.vector8()?; // legacy_session_id
    hello.vector16()?; // cipher_suites
    hello.vector8()?; // legacy_compression_methods
    if hello.0.is_empty() {
        return Some(None);
    }
    let mut extensions = Reader(hello.vector16()?);
    while !extensions.0.is_empty() {
        let kind = extensions.u16()?;
        let data = extensions.vector16()?;
        if kind == SERVER_NAME {
            let mut list = Reader(Reader(data).vector16()?);
            while !list.0.is_empty() {
                let name_kind = list.take(1)?[0];
                let name = list.vector16()?;
                if name_kind == 0 {
                    let usable = !name.is_empty() && name.len() <= 253 && name.iter().all(u8::is_ascii_graphic);
                    return Some(usable.then(|| String::from_utf8_lossy(name).to_ascii_lowercase()));
                }
            }
        }
    }
    Some(None)
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(n)?;
        self.0 = tail;
        Some(head)
    }
    fn u16(&mut self) -> Option<u16> {
        self.take(2).map(|b| u16::from_be_bytes([b[0], b[1]]))
    }
    fn vector8(&mut self) -> Option<&'a [u8]> {
        let n = self.take(1)?[0];
        self.take(usize::from(n))
    }
    fn vector16(&mut self) -> Option<&'a [u8]> {
        let n = self.u16()?;
        self.take(usize::from(n))
    }
}

const HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;
const SERVER_NAME: u16 = 0;
const MAX_RECORD: usize = 16 * 1024;

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A ClientHello with `name` as SNI and `padding` bytes in another extension, cut into records of `record` bytes.
    pub(crate) fn hello(name: Option<&str>, padding: usize, record: usize) -> Vec<u8> {
        let vector16 = |bytes: &[u8]| [&(bytes.len() as u16).to_be_bytes()[..], bytes].concat();
        let mut extensions = Vec::new();
        if padding > 0 {
            extensions.extend([0, 21]);
            extensions.extend(vector16(&vec![0; padding]));
        }
        if let Some(name) = name {
            extensions.extend([0, 0]);
            extensions.extend(vector16(&vector16(&[&[0][..], &vector16(name.as_bytes())].concat())));
        }
        let mut body = vec![3, 3];
        body.extend([7; 32]);
        body.extend([0]); // session id
        body.extend([0, 2, 0x13, 1]);
        body.extend([1, 0]);
        body.extend(vector16(&extensions));
        let mut handshake = vec![1, 0];
        handshake.extend(vector16(&body));
        let mut wire = Vec::new();
        for part in handshake.chunks(record) {
            wire.extend([22, 3, 1]);
            wire.extend(vector16(part));
        }
        wire
    }

    #[test]
    fn the_name_is_found_however_the_hello_is_cut() {
        for (padding, record) in [(0, 16_384), (1_400, 16_384), (1_400, 100), (300, 1)] {
            let wire = hello(Some("Web.emojivoto.example"), padding, record);
            for cut in 0..wire.len() {
                assert_eq!(
                    parse(&wire[..cut]),
                    ClientHello::NeedMore,
                    "{cut} of {} bytes, record {record}",
                    wire.len()
                );
            }
            let found = ClientHello::Hello { sni: Some("web.emojivoto.example".into()) };
            assert_eq!(parse(&wire), found);
            assert_eq!(parse(&[&wire[..], b"early data"].concat()), found);
        }
    }

    #[test]
    fn a_hello_without_a_usable_name_is_still_a_hello() {
        assert_eq!(parse(&hello(None, 10, 16_384)), ClientHello::Hello { sni: None });
        assert_eq!(parse(&hello(Some("a\nb"), 0, 16_384)), ClientHello::Hello { sni: None });
        assert_eq!(parse(&hello(Some(""), 0, 16_384)), ClientHello::Hello { sni: None });
    }

    #[test]
    fn other_bytes_are_not_tls() {
        let mut bad_length = hello(Some("x"), 0, 16_384);
        bad_length[43] = 255; // session id longer than the hello
        let huge = [&[22, 3, 1, 0x40, 0, 1, 0xff, 0xff, 0xff][..], &[0; 16_000]].concat();
        let cases: [&[u8]; 8] = [
            b"GET / HTTP/1.1\r\n",
            &[22, 2, 0],
            &[22, 3, 9],
            &[22, 3, 1, 0, 0],
            &[22, 3, 1, 0xff, 0xff],
            &[22, 3, 1, 0, 50, 2],
            &bad_length,
            &huge,
        ];
        for bytes in cases {
            assert_eq!(parse(bytes), ClientHello::NotTls, "{:?}", &bytes[..bytes.len().min(20)]);
        }
    }

    #[test]
    fn an_endless_hello_ends() {
        let endless: Vec<u8> = [22, 3, 1, 0, 1, 1].into_iter().chain([22, 3, 1, 0, 1, 0].repeat(4_000)).collect();
        assert_eq!(parse(&endless[..MAX_PREFIX]), ClientHello::NotTls);
    }
}
