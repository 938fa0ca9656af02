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
}

impl<S> Understood<S> {
    /// What policy already says, without a look at the bytes.
    pub(crate) fn known(detected: Detected) -> Self {
        Self { detected, early: None, from_server: BytesMut::new() }
    }
}

/// Decides what the connection is: whoever speaks first decides, and nobody is waited for alone.
///
/// The client has a head start; then `open` prepares a stream to the server, whose first byte (or end) proves that this
/// is no HTTP. The stream is dropped again if the client speaks HTTP or TLS. `limit` as in `first_bytes`.
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
    let mut from_server = BytesMut::new();
    let mut early = None;
    if tokio::time::timeout(head_start, read_more(client, seen, MOST)).await.is_err() {
        tokio::select! {
            biased;
            _ = read_more(client, seen, MOST) => {}
            opened = open => {
                let server = early.insert(opened?);
                tokio::select! {
                    biased;
                    _ = read_more(client, seen, MOST) => {}
                    _ = read_more(server, &mut from_server, MOST) => {
                        return Ok(Understood { detected: Detected::Opaque, early, from_server });
                    }
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
    Ok(Understood { detected, early, from_server })
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
        // a beginning that stays undecided is left to the strict parser
        assert_eq!(play((0, b"GE"), NEVER).await, (Detected::Http1, false, false, LIMIT));
    }
}
