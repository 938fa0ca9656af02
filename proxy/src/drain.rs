//! Stopping: one phase that every thread watches, and a count of what is still being served on this thread.
//!
//! Serving → Draining (no new inbound connections, idle HTTP connections and links close, the rest finishes) → Over
//! (grace is gone or a second signal came: everything ends). Knows nothing of sockets or protocols.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, watch};

/// How far the process is on its way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    Serving,
    Draining,
    Over,
}

/// A view of the phase; cheap to clone, one per connection.
#[derive(Clone)]
pub(crate) struct Drain(watch::Receiver<Phase>);

/// Moves the phase forward, never back. Cloned for whoever may ask for a shutdown (signals, `POST /shutdown`).
#[derive(Clone)]
pub(crate) struct Shutdown(Arc<watch::Sender<Phase>>);

/// A new phase, at `Serving`.
pub(crate) fn channel() -> (Shutdown, Drain) {
    let (tx, rx) = watch::channel(Phase::Serving);
    (Shutdown(Arc::new(tx)), Drain(rx))
}

impl Shutdown {
    /// Moves on to `phase` unless the process is already that far.
    pub(crate) fn advance(&self, phase: Phase) {
        self.0.send_if_modified(|now| {
            let moved = phase > *now;
            if moved {
                *now = phase;
            }
            moved
        });
    }

    /// Turns SIGTERM and SIGINT into phases: the first drains for at most `grace`, the second ends at once.
    ///
    /// # Errors
    /// The signal handlers could not be installed.
    pub(crate) async fn on_signals(self, grace: Duration) -> std::io::Result<()> {
        let mut term = signal(SignalKind::terminate())?;
        let mut int = signal(SignalKind::interrupt())?;
        let mut drain = Drain(self.0.subscribe());
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
            () = drain.draining() => {} // asked for by the admin port
        }
        self.advance(Phase::Draining);
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
            () = tokio::time::sleep(grace) => {}
        }
        self.advance(Phase::Over);
        Ok(())
    }
}

impl Drain {
    pub(crate) fn is_draining(&self) -> bool {
        *self.0.borrow() >= Phase::Draining
    }

    /// Returns when no new work should be taken.
    pub(crate) async fn draining(&mut self) {
        self.reached(Phase::Draining).await;
    }

    /// Returns when everything must end.
    pub(crate) async fn over(&mut self) {
        self.reached(Phase::Over).await;
    }

    async fn reached(&mut self, phase: Phase) {
        // The sender lives as long as the process; should it vanish, ending is the safe meaning.
        let _ = self.0.wait_for(|now| *now >= phase).await;
    }
}

/// Counts what is being served on one thread, so that a drain knows when it is done.
#[derive(Clone, Default)]
pub(crate) struct Active(Rc<Counted>);

#[derive(Default)]
struct Counted {
    open: Cell<usize>,
    none_left: Notify,
}

/// One connection or link being served; dropping it says that it has ended.
pub(crate) struct Guard(Rc<Counted>);

impl Active {
    pub(crate) fn guard(&self) -> Guard {
        self.0.open.set(self.0.open.get() + 1);
        Guard(self.0.clone())
    }

    pub(crate) fn open(&self) -> usize {
        self.0.open.get()
    }

    /// Returns when nothing is being served.
    pub(crate) async fn idle(&self) {
        while self.0.open.get() > 0 {
            self.0.none_left.notified().await;
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let left = self.0.open.get() - 1;
        self.0.open.set(left);
        if left == 0 {
            self.0.none_left.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn phases_only_move_forward_and_wake_those_who_wait() {
        let (shutdown, drain) = channel();
        assert!(!drain.is_draining());
        shutdown.advance(Phase::Over);
        shutdown.advance(Phase::Draining);
        let mut late = drain.clone();
        late.over().await;
        assert!(drain.is_draining());
    }

    #[tokio::test]
    async fn idle_waits_for_the_last_guard() {
        let active = Active::default();
        let (one, two) = (active.guard(), active.guard());
        drop(one);
        assert_eq!(active.open(), 1);
        let waiting = active.idle();
        tokio::pin!(waiting);
        assert!(tokio::time::timeout(Duration::ZERO, &mut waiting).await.is_err());
        drop(two);
        waiting.await;
    }
}
