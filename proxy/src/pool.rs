//! Idle server connections, kept for the next request of the same key.
//!
//! The key says who may share: inbound the client's identity (or address) and the port, outbound the endpoint and its
//! identity. A connection comes here only after a complete, framed exchange; it leaves when it is taken, when it has
//! been idle too long, or when anything arrived on it unasked. Knows nothing of protocols or policy.

use std::cell::RefCell;
use std::collections::HashMap;
use std::hash::Hash;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::io::{AsyncRead, ReadBuf};
use tokio::time::Instant;

/// Idle connections by key.
pub(crate) struct Pool<K, Io> {
    shelves: RefCell<HashMap<K, Rc<Shelf<Io>>>>,
}

/// The idle connections of one key, newest last. Whoever uses it often keeps it and is spared the search.
pub(crate) struct Shelf<Io>(RefCell<Vec<(Instant, Io)>>);

impl<K: Eq + Hash, Io: AsyncRead + Unpin> Pool<K, Io> {
    pub(crate) fn new() -> Self {
        Self { shelves: RefCell::new(HashMap::new()) }
    }

    pub(crate) fn shelf(&self, key: K) -> Rc<Shelf<Io>> {
        self.shelves.borrow_mut().entry(key).or_insert_with(|| Rc::new(Shelf(RefCell::default()))).clone()
    }

    /// Drops what has been idle too long or was ended by its server, and shelves that nobody uses. Called every few
    /// seconds.
    pub(crate) fn sweep(&self) {
        self.shelves.borrow_mut().retain(|_, shelf| {
            let mut idle = shelf.0.borrow_mut();
            idle.retain_mut(|(since, io)| since.elapsed() < IDLE && is_quiet(io));
            !idle.is_empty() || Rc::strong_count(shelf) > 1
        });
    }
}

impl<Io: AsyncRead + Unpin> Shelf<Io> {
    /// The most recently used connection that is still quiet; those found dead are dropped.
    pub(crate) fn take(&self) -> Option<Io> {
        let mut idle = self.0.borrow_mut();
        while let Some((since, mut io)) = idle.pop() {
            if since.elapsed() < IDLE && is_quiet(&mut io) {
                return Some(io);
            }
        }
        None
    }

    /// Keeps a connection for later; beyond `PER_KEY` the new one is dropped.
    pub(crate) fn put(&self, io: Io) {
        let mut idle = self.0.borrow_mut();
        if idle.len() < PER_KEY {
            idle.push((Instant::now(), io));
        }
    }
}

/// Whether nothing has arrived on an idle connection: no bytes, end or error. Costs no system call when nothing happened.
fn is_quiet<Io: AsyncRead + Unpin>(io: &mut Io) -> bool {
    let mut byte = [0; 1];
    let mut cx = Context::from_waker(Waker::noop());
    matches!(Pin::new(io).poll_read(&mut cx, &mut ReadBuf::new(&mut byte)), Poll::Pending)
}

const IDLE: Duration = Duration::from_secs(30);
const PER_KEY: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncWriteExt, DuplexStream, duplex};

    #[tokio::test(start_paused = true)]
    async fn only_quiet_and_recent_connections_are_given_out() {
        let pool: Pool<u16, DuplexStream> = Pool::new();
        let (old, _old_far) = duplex(8);
        let shelf = pool.shelf(80);
        shelf.put(old);
        tokio::time::advance(IDLE).await;
        let (ended, ended_far) = duplex(8);
        let (noisy, mut noisy_far) = duplex(8);
        let (good, mut good_far) = duplex(8);
        for io in [good, noisy, ended] {
            shelf.put(io);
        }
        drop(ended_far);
        noisy_far.write_all(b"unasked").await.unwrap();
        assert!(pool.shelf(81).take().is_none());
        let mut taken = shelf.take().expect("the quiet one");
        taken.write_all(b"hi").await.unwrap();
        let mut two = [0; 2];
        tokio::io::AsyncReadExt::read_exact(&mut good_far, &mut two).await.unwrap();
        assert_eq!(&two, b"hi");
        assert!(shelf.take().is_none());
        drop(shelf);
        pool.sweep();
        assert!(pool.shelves.borrow().is_empty());
    }
}
