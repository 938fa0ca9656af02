//! The task of one link: reads and feeds the session, hands bytes to streams, writes what the session has to say.
//!
//! A link ends when its peer does, at a violation, when the certificates end, when it said goodbye and its last stream
//! is over, or after a minute without streams. A peer that is silent while streams wait is asked for a sign of life.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use mantle_proxy_core::model::PeerId;
use mantle_proxy_core::mux::{Event, Limits, Open, Role, Session, StreamId};
use mantle_proxy_core::reasons::{LinkClosed, StreamReset};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at, sleep_until};

use super::stream::{MuxStream, Shared};

/// What a link's task and its streams share.
pub(super) struct Link {
    pub(super) peer: PeerId,
    pub(super) epoch: u64,
    role: Role,
    pub(super) session: RefCell<Session>,
    pub(super) streams: RefCell<BTreeMap<StreamId, Rc<Shared>>>,
    born: Instant,
    /// Somebody has something to send and the task knows it.
    dirty: Cell<bool>,
    task: RefCell<Option<Waker>>,
    ready: Notify,
    closed: Cell<Option<LinkClosed>>,
    idle_since: Cell<Instant>,
}

impl Link {
    pub(super) fn new(role: Role, peer: PeerId, epoch: u64) -> Self {
        let born = Instant::now();
        Self {
            peer,
            epoch,
            role,
            session: RefCell::new(Session::new(role, Limits::default())),
            streams: RefCell::default(),
            born,
            dirty: Cell::new(true),
            task: RefCell::default(),
            ready: Notify::new(),
            closed: Cell::default(),
            idle_since: Cell::new(born),
        }
    }

    pub(super) fn now(&self) -> Duration {
        self.born.elapsed()
    }

    pub(super) fn has_room(&self) -> bool {
        self.closed.get().is_none() && self.session.borrow().has_room()
    }

    /// Opens a stream; `None`: not on this link.
    pub(super) fn open(self: &Rc<Self>, open: Open) -> Option<MuxStream> {
        if self.closed.get().is_some() {
            return None;
        }
        let id = self.session.borrow_mut().open(self.now(), open).ok()?;
        self.dirty();
        Some(self.stream(id))
    }

    pub(super) fn go_away(&self) {
        self.session.borrow_mut().go_away();
        self.dirty();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.get().is_some()
    }

    pub(super) fn is_leaving(&self) -> bool {
        self.closed.get().is_some() || self.session.borrow().is_leaving()
    }

    /// Waits until the peer takes streams.
    pub(super) async fn ready(&self) -> Result<(), LinkClosed> {
        loop {
            if let Some(why) = self.closed.get() {
                return Err(why);
            }
            if self.session.borrow().is_ready() {
                return Ok(());
            }
            self.ready.notified().await;
        }
    }

    /// The task shall look at the session: after the tasks that are ready already.
    pub(super) fn dirty(&self) {
        if !self.dirty.replace(true)
            && let Some(task) = &*self.task.borrow()
        {
            task.wake_by_ref();
        }
    }

    fn stream(self: &Rc<Self>, id: StreamId) -> MuxStream {
        let shared = Rc::new(Shared::default());
        self.streams.borrow_mut().insert(id, shared.clone());
        MuxStream::new(self.clone(), id, shared)
    }

    /// A stream's user is gone.
    pub(super) fn forget(&self, id: StreamId) {
        let mut streams = self.streams.borrow_mut();
        streams.remove(&id);
        if streams.is_empty() {
            self.idle_since.set(Instant::now());
        }
    }

    /// Runs the link until it is closed; streams that are open then are told.
    pub(super) async fn run<Io>(
        self: &Rc<Self>,
        mut io: Io,
        until: Instant,
        mut accept: impl FnMut(Arc<Open>, MuxStream),
        drain: impl Future<Output = ()>,
    ) -> LinkClosed
    where
        Io: AsyncRead + AsyncWrite + Unpin,
    {
        let mut wire = Wire { out: Vec::new(), sent: 0, unflushed: false };
        let mut ticks = interval_at(Instant::now() + TICK, TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut life = Life { heard: Instant::now(), asked: false, was_over: false };
        let (mut drain, mut end) = (pin!(drain), pin!(sleep_until(until)));
        let mut draining = false;
        let closed = poll_fn(|cx| {
            self.register(cx);
            if !draining && drain.as_mut().poll(cx).is_ready() {
                draining = true;
                self.session.borrow_mut().go_away();
            }
            if end.as_mut().poll(cx).is_ready() {
                return Poll::Ready(LinkClosed::Drained);
            }
            if let Err(why) = self.read(cx, &mut io, &mut accept, &mut life) {
                return Poll::Ready(why);
            }
            if let Err(why) = self.tick(cx, &mut ticks, &mut life) {
                return Poll::Ready(why);
            }
            match wire.write(self, cx, &mut io) {
                Err(_) => Poll::Ready(LinkClosed::PeerGone),
                // The accepting side waits for the other's close: an OPEN may be on its way to be refused.
                Ok(true) if self.role == Role::Dialler && self.is_over() => Poll::Ready(LinkClosed::Drained),
                Ok(_) => Poll::Pending,
            }
        })
        .await;
        self.close(closed);
        // close_notify, if the peer still takes it: it must not hold us.
        let _ = tokio::time::timeout(FAREWELL, poll_fn(|cx| Pin::new(&mut io).poll_shutdown(cx))).await;
        closed
    }

    fn register(&self, cx: &Context<'_>) {
        self.dirty.set(false);
        let mut task = self.task.borrow_mut();
        match &*task {
            Some(known) if known.will_wake(cx.waker()) => {}
            _ => *task = Some(cx.waker().clone()),
        }
    }

    /// Reads what is there, within a turn's share.
    fn read<Io: AsyncRead + Unpin>(
        self: &Rc<Self>,
        cx: &mut Context<'_>,
        io: &mut Io,
        accept: &mut impl FnMut(Arc<Open>, MuxStream),
        life: &mut Life,
    ) -> Result<(), LinkClosed> {
        let mut scratch = SCRATCH.take();
        scratch.resize(READ, 0);
        let mut outcome = Ok(());
        for turn in 0..READS {
            let mut buf = ReadBuf::new(&mut scratch);
            match Pin::new(&mut *io).poll_read(cx, &mut buf) {
                Poll::Pending => break,
                Poll::Ready(Ok(())) if !buf.filled().is_empty() => {
                    life.heard = Instant::now();
                    outcome = self.receive(buf.filled(), accept);
                    if outcome.is_err() {
                        break;
                    }
                    if turn == READS - 1 {
                        cx.waker().wake_by_ref(); // others first
                    }
                }
                Poll::Ready(Ok(()) | Err(_)) => {
                    outcome = Err(if self.is_finished() { LinkClosed::Drained } else { LinkClosed::PeerGone });
                    break;
                }
            }
        }
        SCRATCH.set(scratch);
        outcome
    }

    fn receive(
        self: &Rc<Self>,
        mut bytes: &[u8],
        accept: &mut impl FnMut(Arc<Open>, MuxStream),
    ) -> Result<(), LinkClosed> {
        let now = self.now();
        let was_ready = self.session.borrow().is_ready();
        loop {
            let event = self.session.borrow_mut().receive(now, &mut bytes)?;
            let Some(event) = event else { break };
            match event {
                Event::Open { id, open } => accept(open, self.stream(id)),
                Event::Data { id, bytes, fin } => match self.streams.borrow().get(&id) {
                    Some(stream) => stream.received(bytes, fin),
                    None => self.session.borrow_mut().consume(id, bytes.len()),
                },
                Event::Reset { id, reason } => {
                    if let Some(stream) = self.streams.borrow().get(&id) {
                        stream.ended(reason);
                    }
                }
                Event::GoAway | Event::Pong(_) => {}
            }
        }
        if !was_ready {
            self.ready.notify_waiters();
        }
        Ok(())
    }

    /// What time alone makes happen.
    fn tick(&self, cx: &mut Context<'_>, ticks: &mut Interval, life: &mut Life) -> Result<(), LinkClosed> {
        while ticks.poll_tick(cx).is_ready() {
            let silent = life.heard.elapsed();
            let mut session = self.session.borrow_mut();
            for id in session.reset_stalled(self.now()) {
                if let Some(stream) = self.streams.borrow().get(&id) {
                    stream.ended(StreamReset::Stalled);
                }
            }
            if silent < SILENCE {
                life.asked = false;
            } else if session.open_streams() > 0 && silent >= 2 * SILENCE && life.asked {
                return Err(LinkClosed::PeerGone);
            } else if session.open_streams() > 0 && !life.asked {
                session.ping(0);
                life.asked = true;
            }
            let unused =
                if self.streams.borrow().is_empty() { self.idle_since.get().elapsed() } else { Duration::ZERO };
            let patience = if self.role == Role::Dialler { IDLE } else { 2 * IDLE };
            if unused >= patience {
                session.go_away();
            }
            drop(session);
            // Not at once: what the peer opened before it heard our goodbye may be on its way still.
            let over = unused >= TICK && self.is_over();
            if over && life.was_over {
                return Err(LinkClosed::Drained);
            }
            life.was_over = over;
        }
        Ok(())
    }

    /// True when someone said goodbye and the last stream is over on the wire.
    fn is_finished(&self) -> bool {
        let session = self.session.borrow();
        session.is_leaving() && session.open_streams() == 0
    }

    /// … and the users of the streams have taken what came.
    fn is_over(&self) -> bool {
        self.is_finished() && self.streams.borrow().is_empty()
    }

    fn close(&self, why: LinkClosed) {
        self.closed.set(Some(why));
        let session = self.session.borrow();
        for (id, stream) in &*self.streams.borrow() {
            // Of what has not left the peer knows nothing: its user may try again.
            stream.ended(if session.has_left(*id) { StreamReset::Broken } else { StreamReset::Refused });
        }
        self.ready.notify_waiters();
    }
}

/// What is on its way to the socket.
struct Wire {
    out: Vec<u8>,
    sent: usize,
    unflushed: bool,
}

impl Wire {
    /// Writes until the session has nothing more or the socket takes no more; true: all is out.
    fn write<Io: AsyncWrite + Unpin>(&mut self, link: &Link, cx: &mut Context<'_>, io: &mut Io) -> io::Result<bool> {
        let mut io = Pin::new(io);
        loop {
            if self.sent == self.out.len() {
                self.out.clear();
                self.sent = 0;
                let mut session = link.session.borrow_mut();
                if session.wants_transmit() {
                    session.transmit(link.now(), &mut self.out, RECORDS);
                }
                for id in session.take_writable() {
                    if let Some(stream) = link.streams.borrow().get(&id) {
                        stream.writable();
                    }
                }
                if self.out.is_empty() {
                    break;
                }
            }
            match io.as_mut().poll_write(cx, &self.out[self.sent..]) {
                Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(Ok(n)) => {
                    self.sent += n;
                    self.unflushed = true;
                }
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => return Ok(false),
            }
        }
        if self.unflushed {
            match io.as_mut().poll_flush(cx) {
                Poll::Ready(flushed) => flushed?,
                Poll::Pending => return Ok(false),
            }
            self.unflushed = false;
        }
        if self.out.capacity() > KEEP {
            self.out = Vec::new();
        }
        Ok(true)
    }
}

/// Whether the peer is there.
struct Life {
    heard: Instant,
    /// It was asked since it was last heard.
    asked: bool,
    /// At the last tick somebody had said goodbye and nothing was open.
    was_over: bool,
}

thread_local! {
    /// Bytes pass through here from any link of the thread; taken and put back within one poll.
    static SCRATCH: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

const READ: usize = 64 << 10;
const READS: usize = 8;
/// Plaintext per write: a few full TLS records.
const RECORDS: usize = 64 << 10;
const KEEP: usize = 64 << 10;
const TICK: Duration = Duration::from_secs(5);
const SILENCE: Duration = Duration::from_secs(10);
const IDLE: Duration = Duration::from_secs(60);
const FAREWELL: Duration = Duration::from_secs(1);
