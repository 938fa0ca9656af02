//! One stream of a link as a pair of byte streams. Dropping it unfinished resets it; the peer never sees a short end.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use bytes::{Buf, BytesMut};
use mantle_proxy_core::mux::StreamId;
use mantle_proxy_core::reasons::StreamReset;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::run::Link;

/// A stream to or from a mesh peer. Writes are taken at once and leave with the link's next write: flushing is not needed.
pub(crate) struct MuxStream {
    link: Rc<Link>,
    id: StreamId,
    shared: Rc<Shared>,
    finished: bool,
}

/// The link of a stream that somebody else uses.
#[derive(Clone)]
pub(crate) struct LinkHandle(Rc<Link>);

impl LinkHandle {
    /// True when the link takes no new work: what lives long on it should move before its certificates end.
    pub(crate) fn is_leaving(&self) -> bool {
        self.0.is_leaving()
    }
}

/// What the link's task tells the stream.
#[derive(Default)]
pub(super) struct Shared {
    buffer: RefCell<BytesMut>,
    fin: Cell<bool>,
    ended: Cell<Option<StreamReset>>,
    reader: Cell<Option<Waker>>,
    writer: Cell<Option<Waker>>,
}

/// Why reading or writing failed: found inside the `io::Error`. Its kind is `ConnectionRefused` if the peer never saw
/// anything of the stream (so that it can be tried again), else `ConnectionReset`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StreamEnded(pub(super) StreamReset);

impl MuxStream {
    pub(super) fn new(link: Rc<Link>, id: StreamId, shared: Rc<Shared>) -> Self {
        Self { link, id, shared, finished: false }
    }

    pub(crate) fn link(&self) -> LinkHandle {
        LinkHandle(self.link.clone())
    }

    /// Gives the stream up and says why.
    pub(crate) fn reset(self, reason: StreamReset) {
        self.link.session.borrow_mut().reset(self.id, reason);
        self.link.dirty();
    }
}

impl Drop for MuxStream {
    fn drop(&mut self) {
        let unread = self.shared.buffer.borrow().len();
        let mut session = self.link.session.borrow_mut();
        session.consume(self.id, unread);
        if !(self.finished && self.shared.fin.get()) {
            session.reset(self.id, StreamReset::Cancelled); // no effect on a stream that is over
        }
        drop(session);
        self.link.forget(self.id);
        self.link.dirty();
    }
}

impl AsyncRead for MuxStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut buffer = self.shared.buffer.borrow_mut();
        let n = buffer.len().min(buf.remaining());
        if n > 0 {
            buf.put_slice(&buffer[..n]);
            buffer.advance(n);
            if buffer.is_empty() {
                *buffer = BytesMut::new(); // an idle stream owns no buffer
            }
            let mut session = self.link.session.borrow_mut();
            session.consume(self.id, n);
            if session.wants_transmit() {
                self.link.dirty();
            }
            return Poll::Ready(Ok(()));
        }
        if buf.remaining() == 0 || self.shared.fin.get() {
            return Poll::Ready(Ok(()));
        }
        if let Some(reason) = self.shared.ended.get() {
            return Poll::Ready(Err(StreamEnded(reason).into()));
        }
        self.shared.reader.set(Some(cx.waker().clone()));
        Poll::Pending
    }
}

impl AsyncWrite for MuxStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if let Some(reason) = self.shared.ended.get() {
            return Poll::Ready(Err(StreamEnded(reason).into()));
        }
        if self.finished {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let n = self.link.session.borrow_mut().send(self.link.now(), self.id, buf);
        if n > 0 {
            self.link.dirty();
        } else if !buf.is_empty() {
            self.shared.writer.set(Some(cx.waker().clone()));
            return Poll::Pending;
        }
        Poll::Ready(Ok(n))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(reason) = self.shared.ended.get() {
            return Poll::Ready(Err(StreamEnded(reason).into()));
        }
        if !self.finished {
            self.finished = true;
            self.link.session.borrow_mut().finish(self.link.now(), self.id);
            self.link.dirty();
        }
        Poll::Ready(Ok(()))
    }
}

impl Shared {
    pub(super) fn received(&self, bytes: &[u8], fin: bool) {
        self.buffer.borrow_mut().extend_from_slice(bytes);
        self.fin.set(self.fin.get() || fin);
        wake(&self.reader);
    }

    pub(super) fn writable(&self) {
        wake(&self.writer);
    }

    /// The stream is over before its time.
    pub(super) fn ended(&self, reason: StreamReset) {
        if self.ended.get().is_none() {
            self.ended.set(Some(reason));
        }
        wake(&self.reader);
        wake(&self.writer);
    }
}

fn wake(waker: &Cell<Option<Waker>>) {
    if let Some(waker) = waker.take() {
        waker.wake();
    }
}

impl fmt::Debug for MuxStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MuxStream({})", self.id)
    }
}

impl fmt::Display for StreamEnded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the stream ended: {}", self.0)
    }
}

impl std::error::Error for StreamEnded {}

impl From<StreamEnded> for io::Error {
    fn from(ended: StreamEnded) -> Self {
        let kind = match ended.0 {
            StreamReset::Refused => io::ErrorKind::ConnectionRefused,
            _ => io::ErrorKind::ConnectionReset,
        };
        Self::new(kind, ended)
    }
}
