//! A byte stream whose connection is counted: every byte that passes, and its end.
//!
//! Wraps whatever carries bytes (TCP, mesh TLS, a mux stream), so that nothing else on the path has to count.

use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::record::Conn;
use crate::socket::Abort;

pub(crate) struct Counted<Io> {
    io: Io,
    conn: Rc<Conn>,
}

impl<Io> Counted<Io> {
    /// `already` bytes were read from `io` before.
    pub(crate) fn new(io: Io, conn: Rc<Conn>, already: usize) -> Self {
        conn.read(already as u64);
        Self { io, conn }
    }

    pub(crate) fn get(&self) -> &Io {
        &self.io
    }
}

impl<Io: Abort> Abort for Counted<Io> {
    fn abort(&self) {
        self.io.abort();
    }
}

impl<Io: AsyncRead + Unpin> AsyncRead for Counted<Io> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let read = ready!(Pin::new(&mut this.io).poll_read(cx, buf));
        match &read {
            Ok(()) => this.conn.read((buf.filled().len() - before) as u64),
            Err(error) => this.conn.failed(error),
        }
        Poll::Ready(read)
    }
}

impl<Io: AsyncWrite + Unpin> AsyncWrite for Counted<Io> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let wrote = ready!(Pin::new(&mut this.io).poll_write(cx, buf));
        match &wrote {
            Ok(n) => this.conn.wrote(*n as u64),
            Err(error) => this.conn.failed(error),
        }
        Poll::Ready(wrote)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}
