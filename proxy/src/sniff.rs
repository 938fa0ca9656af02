//! The first bytes of a connection: read without holding a buffer while nothing comes, then classified by the core.
//!
//! Knows nothing of what is done with the answer.

use std::future::Future;
use std::io;
use std::time::Duration;

use bytes::BytesMut;
use mantle_proxy_core::detect::{self, Detected};
use tokio::io::AsyncRead;

use crate::relay::read_more;

/// What a connection turned out to be, and the stream to the server if one was opened meanwhile.
pub(crate) struct Understood<S> {
    pub(crate) detected: Detected,
    pub(crate) early: Option<S>,
    /// What the server said first; not empty: it is a protocol in which the server begins.
    pub(crate) from_server: BytesMut,
    /// The server closed the early stream without a word: the client is to see the same.
    pub(crate) server_ended: bool,
}

impl<S> Understood<S> {
    /// What policy already says, without a look at the bytes.
    pub(crate) fn known(detected: Detected) -> Self {
        Self { detected, early: None, from_server: BytesMut::new(), server_ended: false }
    }
}

/// Decides what the connection is: whoever speaks first decides, and nobody is waited for alone.
///
/// The client has a head start; then `open` prepares a stream to the server, whose first bytes decide that this is no
/// HTTP, unless they are what HTTP servers say unasked (`Greeting`). The stream is dropped again if the client speaks HTTP
/// or TLS. `limit` as in `first_bytes`.
///
/// # Errors
/// `open`'s error. An error of the client's side counts as its end.
pub(crate) async fn understand<C, S, E>(
    client: &mut C,
    seen: &mut BytesMut,
    head_start: Duration,
    limit: Duration,
    open: impl Future<Output = Result<S, E>>,
) -> Result<Understood<S>, E>
where
    C: AsyncRead + Unpin,
    S: AsyncRead + Unpin,
{
    let mut early = None;
    if tokio::time::timeout(head_start, read_more(client, seen, MOST)).await.is_err() {
        tokio::select! {
            biased;
            _ = read_more(client, seen, MOST) => {}
            opened = open => {
                let mut server = opened?;
                let mut from_server = BytesMut::new();
                tokio::select! {
                    biased;
                    _ = read_more(client, seen, MOST) => early = Some(server),
                    greeting = greeting(&mut server, &mut from_server) => match greeting {
                        Greeting::Opaque | Greeting::Ended => {
                            let (early, server_ended) = (Some(server), greeting == Greeting::Ended);
                            return Ok(Understood { detected: Detected::Opaque, early, from_server, server_ended });
                        }
                        Greeting::Http => {
                            drop(server); // the client's request decides, on a stream of its own
                            let _ = read_more(client, seen, MOST).await; // an error is its end
                        }
                    },
                }
            }
        }
    }
    let detected = match seen.is_empty() {
        true => Detected::Opaque, // it ended without a byte
        false => first_bytes(client, seen, limit).await.unwrap_or(Detected::Opaque),
    };
    if detected != Detected::Opaque {
        early = None;
    }
    Ok(Understood { detected, early, from_server: BytesMut::new(), server_ended: false })
}

/// What a server's first bytes say about its protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Greeting {
    /// What HTTP servers send unasked: HTTP/2 its SETTINGS (RFC 9113 section 3.4 lets it), HTTP/1 a 408 to the idle.
    /// Calling this opaque would let a silent client past the HTTP parser.
    Http,
    Opaque,
    Ended,
}

async fn greeting<S: AsyncRead + Unpin>(server: &mut S, heard: &mut BytesMut) -> Greeting {
    loop {
        if !matches!(read_more(server, heard, MOST).await, Ok(1..)) {
            return if heard.is_empty() { Greeting::Ended } else { Greeting::Opaque };
        }
        if let Some(decided) = greeted(heard) {
            return decided;
        }
    }
}

/// `None`: too few bytes to say.
fn greeted(heard: &[u8]) -> Option<Greeting> {
    let may_be = |start: &[u8]| heard.iter().zip(start).all(|(a, b)| a == b);
    // length (at most 16 KiB, a multiple of 6), type SETTINGS, no flags, stream 0
    let byte = |i: usize, ok: fn(u8) -> bool| heard.get(i).is_none_or(|b| ok(*b));
    let settings = byte(0, |b| b == 0)
        && byte(1, |b| b < 0x40)
        && byte(3, |b| b == 4)
        && byte(4, |b| b == 0)
        && (5..9).all(|i| byte(i, |b| b == 0));
    match (settings, may_be(b"HTTP/")) {
        (true, _) => (heard.len() >= 9).then_some(Greeting::Http),
        (_, true) => (heard.len() >= 5).then_some(Greeting::Http),
        (false, false) => Some(Greeting::Opaque),
    }
}

/// Reads into `seen` until the protocol is decided, at most for `limit`.
///
/// Bytes that are still undecided then, or when the client ends its side, are called HTTP/1: its parser refuses what is
/// not HTTP, whereas passing them on as opaque would let a slow writer smuggle a request past it.
async fn first_bytes<R>(io: &mut R, seen: &mut BytesMut, limit: Duration) -> io::Result<Detected>
where
    R: AsyncRead + Unpin,
{
    let decided = async {
        loop {
            match detect::detect(seen) {
                Detected::NeedMore => {}
                decided => return Ok(decided),
            }
            if read_more(io, seen, MOST).await? == 0 {
                return Ok(Detected::Http1);
            }
        }
    };
    tokio::time::timeout(limit, decided).await.unwrap_or(Ok(Detected::Http1))
}

const MOST: usize = 16 * 1024;

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;
    use tokio::io::{AsyncWriteExt, DuplexStream, duplex};

    const LIMIT: Duration = Duration::from_secs(10);
    const HEAD_START: Duration = Duration::from_millis(2);

    /// Plays one connection: what the client and the server write, and after which time.
    async fn play(client: (u64, &[u8]), server: (u64, &[u8])) -> (Detected, bool, bool, Duration) {
        let (mut app, mut io) = duplex(1024);
        let (near, mut far) = duplex(1024);
        let began = tokio::time::Instant::now();
        let writes = async {
            let client_writes = async {
                tokio::time::sleep(Duration::from_millis(client.0)).await;
                app.write_all(client.1).await.unwrap();
            };
            let server_writes = async {
                tokio::time::sleep(Duration::from_millis(server.0)).await;
                let _ = far.write_all(server.1).await;
            };
            tokio::join!(client_writes, server_writes);
            std::future::pending::<()>().await;
        };
        let mut seen = BytesMut::new();
        let open = async { Ok::<DuplexStream, Infallible>(near) };
        tokio::select! {
            understood = understand(&mut io, &mut seen, HEAD_START, LIMIT, open) => {
                let understood = understood.unwrap();
                let server_first = !understood.from_server.is_empty();
                (understood.detected, understood.early.is_some(), server_first, began.elapsed())
            }
            () = writes => unreachable!("writes never end"),
        }
    }

    #[test]
    fn what_http_servers_say_unasked_is_told_from_other_greetings() {
        for http in [&b"\0\0\0\x04\0\0\0\0\0"[..], b"\0\0\x12\x04\0\0\0\0\0\0", b"HTTP/", b"HTTP/1.1 4"] {
            assert_eq!(greeted(http), Some(Greeting::Http), "{http:?}");
        }
        for short in [&b""[..], b"\0", b"\0\0\x06\x04\0\0\0\0", b"HTTP"] {
            assert_eq!(greeted(short), None, "{short:?}");
        }
        let mysql = b"\x4a\0\0\0\x0a8.0";
        for other in [&b"220 mail"[..], b"\0\0\0\x05\0", mysql, b"\0\0\x06\x04\0\0\0\0\x01", b"HTTQ", b"-ERR"] {
            assert_eq!(greeted(other), Some(Greeting::Opaque), "{other:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_speaks_first_decides() {
        const NEVER: (u64, &[u8]) = (3_600_000, b"x");
        let at = Duration::from_millis;
        let http = b"GET / HTTP/1.1\r\n";
        // client first, at once: no stream to the server was needed
        assert_eq!(play((0, http), NEVER).await, (Detected::Http1, false, false, at(0)));
        // client first, late: the early stream is dropped for HTTP, kept for opaque bytes
        assert_eq!(play((60_000, http), NEVER).await, (Detected::Http1, false, false, at(60_000)));
        assert_eq!(play((50, b"*1\r\n"), NEVER).await, (Detected::Opaque, true, false, at(50)));
        // server first: known as soon as it speaks
        assert_eq!(play(NEVER, (1, b"220 mail")).await, (Detected::Opaque, true, true, at(2)));
        assert_eq!(play(NEVER, (30, b"220 mail")).await, (Detected::Opaque, true, true, at(30)));
        // what HTTP servers say unasked decides nothing: the client is waited for
        let settings = b"\0\0\x06\x04\0\0\0\0\0\0\x03\0\0\0\x64";
        assert_eq!(play((40, http), (5, settings)).await, (Detected::Http1, false, false, at(40)));
        assert_eq!(
            play((40, http), (5, b"HTTP/1.1 408 Request Timeout")).await,
            (Detected::Http1, false, false, at(40))
        );
        // a beginning that stays undecided is left to the strict parser
        assert_eq!(play((0, b"GE"), NEVER).await, (Detected::Http1, false, false, LIMIT));
    }
}
