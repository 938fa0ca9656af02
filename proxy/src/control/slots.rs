//! A bounded number of connections on a port, where the idle make room: those who connect and say nothing cannot keep
//! others out.
//!
//! When all slots are taken the connection that did nothing for longest is ended. One that earned it (`keep`) is not
//! ended for others, and still counts.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::task::AbortHandle;

#[derive(Clone)]
pub(crate) struct Slots(Arc<Mutex<Taken>>);

struct Taken {
    max: usize,
    /// Grows with each arrival and each sign of life: a key's age is its connection's.
    clock: u64,
    idle: BTreeMap<u64, AbortHandle>,
    kept: usize,
}

/// A connection's place; dropping it frees the place.
pub(crate) struct Slot {
    slots: Slots,
    at: Place,
}

#[derive(Clone, Copy)]
enum Place {
    Idle(u64),
    Kept,
}

impl Slots {
    pub(crate) fn new(max: usize) -> Self {
        Self(Arc::new(Mutex::new(Taken { max, clock: 0, idle: BTreeMap::new(), kept: 0 })))
    }

    /// Spawns `serve` with a slot of its own, and ends the idlest connection if there are now too many. With nothing
    /// idle the new one is the one that ends.
    pub(crate) fn spawn<F: Future<Output = ()> + Send + 'static>(&self, serve: impl FnOnce(Slot) -> F) {
        let mut taken = self.lock();
        taken.clock += 1;
        let at = taken.clock;
        // Under the lock: the task cannot look for its place before it is there.
        let task = tokio::spawn(serve(Slot { slots: self.clone(), at: Place::Idle(at) }));
        taken.idle.insert(at, task.abort_handle());
        let idlest = if taken.idle.len() + taken.kept > taken.max { taken.idle.pop_first() } else { None };
        drop(taken);
        if let Some((_, idlest)) = idlest {
            idlest.abort();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slot {
    /// The connection did something: others are idler now.
    pub(crate) fn touch(&mut self) {
        let Place::Idle(at) = self.at else { return };
        let mut taken = self.slots.lock();
        taken.clock += 1;
        let now = taken.clock;
        if let Some(task) = taken.idle.remove(&at) {
            taken.idle.insert(now, task);
            drop(taken);
            self.at = Place::Idle(now);
        }
    }

    /// The connection is not ended for others any more.
    pub(crate) fn keep(&mut self) {
        let Place::Idle(at) = self.at else { return };
        let mut taken = self.slots.lock();
        if taken.idle.remove(&at).is_some() {
            taken.kept += 1;
            drop(taken);
            self.at = Place::Kept;
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut taken = self.slots.lock();
        match self.at {
            Place::Idle(at) => {
                taken.idle.remove(&at);
            }
            Place::Kept => taken.kept -= 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::mpsc;

    /// Spawns connections that wait for ever and report their end.
    fn arrive(slots: &Slots, n: u32, how: fn(&mut Slot), ended: &mpsc::UnboundedSender<u32>) {
        struct Report(u32, mpsc::UnboundedSender<u32>);
        impl Drop for Report {
            fn drop(&mut self) {
                let _ = self.1.send(self.0);
            }
        }
        let report = Report(n, ended.clone());
        slots.spawn(move |mut slot| async move {
            let _report = report;
            how(&mut slot);
            std::future::pending::<()>().await;
        });
    }

    #[tokio::test]
    async fn the_idlest_makes_room_and_the_kept_stay() {
        let slots = Slots::new(3);
        let (tx, mut ended) = mpsc::unbounded_channel();
        arrive(&slots, 1, Slot::keep, &tx);
        arrive(&slots, 2, Slot::touch, &tx);
        arrive(&slots, 3, |_| {}, &tx);
        tokio::task::yield_now().await; // 1 is kept; 2 has been touched after 3 arrived
        arrive(&slots, 4, |_| {}, &tx);
        assert_eq!(ended.recv().await, Some(3));
        arrive(&slots, 5, |_| {}, &tx);
        assert_eq!(ended.recv().await, Some(2));
        assert_eq!(slots.lock().idle.len(), 2);
        assert_eq!(slots.lock().kept, 1);
    }

    #[tokio::test]
    async fn with_nothing_idle_the_new_one_ends() {
        let slots = Slots::new(1);
        let (tx, mut ended) = mpsc::unbounded_channel();
        arrive(&slots, 1, Slot::keep, &tx);
        tokio::task::yield_now().await;
        arrive(&slots, 2, |_| {}, &tx);
        assert_eq!(ended.recv().await, Some(2));
        assert!(slots.lock().idle.is_empty());
    }
}
