//! Moving bytes both ways until both sides have ended.
//!
//! A connection owns no buffer while it is idle: bytes are read into a scratch area of the thread and written on at
//! once; only what the other side refuses is kept, and nothing more is read until that is gone. Flushes when the
//! reader has nothing more. Knows nothing of protocols, policy or metrics.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::socket::Abort;

/// Relays between `client` and `server` until both directions have ended or one side fails.
///
/// `ahead` are bytes already taken from each side and not yet passed on.
///
/// # Errors
/// The first read or write error of either side; both sides are aborted then.
pub(crate) async fn relay<C, S>(client: &mut C, server: &mut S, ahead: Ahead) -> io::Result<()>
where
    C: AsyncRead + AsyncWrite + Abort + Unpin,
    S: AsyncRead + AsyncWrite + Abort + Unpin,
{
    let mut up = Half::new(ahead.from_client);
    let mut down = Half::new(ahead.from_server);
    let end = poll_fn(|cx| {
        let sent = up.poll(cx, client, server)?;
        let received = down.poll(cx, server, client)?;
        if sent.is_ready() && received.is_ready() { Poll::Ready(Ok(())) } else { Poll::Pending }
    })
    .await;
    if end.is_err() {
        client.abort();
        server.abort();
    }
    end
}

/// Reads what has arrived onto the end of `buf`, at most `most` bytes at once; 0 means that the other side has ended.
///
/// `buf` does not grow before bytes are there. Dropping the future loses nothing.
///
/// # Errors
/// The read failed.
pub(crate) async fn read_more<R: AsyncRead + Unpin>(r: &mut R, buf: &mut BytesMut, most: usize) -> io::Result<usize> {
    poll_fn(|cx| {
        SCRATCH.with_borrow_mut(|scratch| {
            let most = most.min(scratch.len());
            let mut read = ReadBuf::new(&mut scratch[..most]);
            ready!(Pin::new(&mut *r).poll_read(cx, &mut read))?;
            buf.extend_from_slice(read.filled());
            Poll::Ready(Ok(read.filled().len()))
        })
    })
    .await
}

/// Lends the thread's scratch area for one poll.
pub(crate) fn with_scratch<T>(work: impl FnOnce(&mut [u8]) -> T) -> T {
    SCRATCH.with_borrow_mut(|scratch| work(scratch))
}

/// Reads what has arrived into `scratch`; no bytes mean that the other side has ended.
///
/// # Errors
/// The read failed.
pub(crate) fn poll_read_into<'a, R: AsyncRead + Unpin>(
    cx: &mut Context<'_>,
    r: &mut R,
    scratch: &'a mut [u8],
) -> Poll<io::Result<&'a [u8]>> {
    let mut buf = ReadBuf::new(scratch);
    ready!(Pin::new(r).poll_read(cx, &mut buf))?;
    let n = buf.filled().len();
    Poll::Ready(Ok(&scratch[..n]))
}

/// Bytes that were read from each side before the relay began.
#[derive(Default)]
pub(crate) struct Ahead {
    pub(crate) from_client: Bytes,
    pub(crate) from_server: Bytes,
}

/// One direction.
pub(crate) struct Half {
    kept: Bytes,
    state: State,
    unflushed: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    ReaderEnded,
    Done,
}

impl Half {
    pub(crate) fn new(kept: Bytes) -> Self {
        Self { kept, state: State::Open, unflushed: false }
    }

    /// Moves what can be moved from `r` to `w`; ready when `r` has ended and `w` was told.
    pub(crate) fn poll<R, W>(&mut self, cx: &mut Context<'_>, r: &mut R, w: &mut W) -> Poll<io::Result<()>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        for _ in 0..TURNS {
            while !self.kept.is_empty() {
                let n = ready!(Pin::new(&mut *w).poll_write(cx, &self.kept))?;
                if n == 0 {
                    return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
                }
                self.kept.advance(n);
                self.unflushed = true;
            }
            match self.state {
                State::Open => {
                    let moved = SCRATCH.with_borrow_mut(|scratch| self.pass_on(cx, r, w, scratch))?;
                    if moved.is_pending() {
                        if self.unflushed {
                            ready!(Pin::new(&mut *w).poll_flush(cx))?;
                            self.unflushed = false;
                        }
                        return Poll::Pending;
                    }
                }
                State::ReaderEnded => {
                    ready!(Pin::new(&mut *w).poll_shutdown(cx))?;
                    self.state = State::Done;
                }
                State::Done => return Poll::Ready(Ok(())),
            }
        }
        // A fast pair must not starve the thread's other connections.
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// One read into `scratch`, then as much of it written as `w` takes; the rest is kept.
    fn pass_on<R, W>(&mut self, cx: &mut Context<'_>, r: &mut R, w: &mut W, scratch: &mut [u8]) -> io::Result<Poll<()>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let mut buf = ReadBuf::new(scratch);
        match Pin::new(r).poll_read(cx, &mut buf) {
            Poll::Pending => return Ok(Poll::Pending),
            Poll::Ready(read) => read?,
        }
        let bytes = buf.filled();
        if bytes.is_empty() {
            self.state = State::ReaderEnded;
            return Ok(Poll::Ready(()));
        }
        match Pin::new(w).poll_write(cx, bytes) {
            Poll::Ready(written) => {
                let n = written?;
                self.unflushed = true;
                if n < bytes.len() {
                    self.kept = Bytes::copy_from_slice(&bytes[n..]);
                }
            }
            Poll::Pending => self.kept = Bytes::copy_from_slice(bytes),
        }
        Ok(Poll::Ready(()))
    }
}

/// Reads of one direction before others get their turn.
const TURNS: usize = 16;

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; 64 * 1024].into_boxed_slice());
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    impl Abort for tokio::io::DuplexStream {
        fn abort(&self) {}
    }

    #[tokio::test]
    async fn each_side_may_end_first_and_the_other_direction_goes_on() {
        let (mut app, mut client) = duplex(64);
        let (mut server, mut far) = duplex(64);
        let ahead = Ahead { from_client: Bytes::from_static(b"first "), ..Ahead::default() };
        let relayed = relay(&mut client, &mut server, ahead);
        let play = async {
            app.write_all(b"then this").await.unwrap();
            app.shutdown().await.unwrap();
            let mut got = String::new();
            far.read_to_string(&mut got).await.unwrap();
            assert_eq!(got, "first then this");
            far.write_all(b"an answer after the end").await.unwrap();
            drop(far);
            got.clear();
            app.read_to_string(&mut got).await.unwrap();
            assert_eq!(got, "an answer after the end");
        };
        let (end, ()) = tokio::join!(relayed, play);
        end.unwrap();
    }

    #[tokio::test]
    async fn a_slow_reader_holds_the_writer_and_loses_nothing() {
        let (mut app, mut client) = duplex(16 * 1024);
        let (mut server, mut far) = duplex(1000);
        let sent: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8).collect();
        let copy = sent.clone();
        let write = async move {
            app.write_all(&copy).await.unwrap();
            app.shutdown().await.unwrap();
            app
        };
        let read = async {
            let mut got = Vec::new();
            far.read_to_end(&mut got).await.unwrap();
            far.shutdown().await.unwrap();
            got
        };
        let (end, _app, got) = tokio::join!(relay(&mut client, &mut server, Ahead::default()), write, read);
        end.unwrap();
        assert_eq!(got, sent);
    }
}
