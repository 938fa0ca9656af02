//! One link: its state, and what its user may do. What arrives is in `receive.rs`, what leaves in `send.rs`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::frame::{Header, Settings, Type, reset_number};
use super::rate::Rate;
use super::receive::Parser;
use super::send::Sender;
use super::{Limits, NoStream, Open, Role, StreamId};
use crate::reasons::StreamReset;

/// The state of one link. Feed it with `receive`, empty it with `transmit`.
#[derive(Debug)]
pub struct Session {
    pub(super) role: Role,
    pub(super) limits: Limits,
    /// `None` until the peer's SETTINGS came.
    pub(super) peer: Option<Settings>,
    pub(super) streams: BTreeMap<StreamId, Stream>,
    /// The highest id that either side has used.
    pub(super) high: StreamId,
    pub(super) sender: Sender,
    /// Who said goodbye: we, the peer.
    left: bool,
    pub(super) peer_left: bool,
    /// Streams that the peer's GOAWAY left behind: reported one by one.
    pub(super) orphans: Vec<StreamId>,
    pub(super) table: Vec<Arc<Open>>,
    pub(super) parser: Parser,
    /// What the peer may still send on the whole link, and what is to be given back to it.
    pub(super) link_left: i64,
    pub(super) link_owed: u32,
    /// Sum of what streams' windows grew beyond their first size.
    pub(super) grown: u32,
    pub(super) opens: Rate,
    pub(super) resets: Rate,
    pub(super) controls: Rate,
}

/// One stream as both directions need it; idle streams own no buffer.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) sending: super::send::Sending,
    /// What the peer may still send before it is granted more.
    pub(super) left: i64,
    /// The size the window has grown to.
    pub(super) window: u32,
    /// Delivered, and not yet consumed.
    pub(super) unread: u32,
    /// Consumed, and not yet granted again.
    pub(super) owed: u32,
    pub(super) granted_at: Duration,
    pub(super) fin_received: bool,
}

impl Session {
    pub fn new(role: Role, limits: Limits) -> Self {
        Self {
            role,
            limits,
            peer: None,
            streams: BTreeMap::new(),
            high: 0,
            sender: Sender::new(&limits),
            left: false,
            peer_left: false,
            orphans: Vec::new(),
            table: Vec::new(),
            parser: Parser::default(),
            link_left: i64::from(limits.link_window),
            link_owed: 0,
            grown: 0,
            opens: Rate::new(limits.opens_per_second, 0),
            // All streams may end at once, when the program behind them is killed: that is nobody's attack.
            resets: Rate::new(limits.resets_per_second, limits.max_streams),
            controls: Rate::new(limits.control_per_second, limits.max_streams),
        }
    }

    /// Opens a stream. Nothing leaves before `transmit`, so the first `send` travels with the OPEN.
    pub fn open(&mut self, now: Duration, open: Open) -> Result<StreamId, NoStream> {
        debug_assert_eq!(self.role, Role::Dialler, "only the dialling side opens streams");
        if self.is_leaving() || self.high >= LAST_ID {
            return Err(NoStream::GoingAway);
        }
        let peer = self.peer.ok_or(NoStream::NotReady)?;
        if self.streams.len() >= peer.max_streams as usize {
            return Err(NoStream::Full);
        }
        self.high += 1;
        let stream = Stream::new(now, &self.limits, peer.window);
        self.streams.insert(self.high, stream);
        self.sender.announce(self.high, open);
        Ok(self.high)
    }

    /// Gives back `n` bytes that `Event::Data` delivered: the peer may send as many more.
    pub fn consume(&mut self, id: StreamId, n: usize) {
        let n = u32::try_from(n).unwrap_or(u32::MAX);
        self.link_owed = self.link_owed.saturating_add(n);
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.unread = stream.unread.saturating_sub(n);
            let before = stream.owed;
            stream.owed = stream.owed.saturating_add(n);
            let due = stream.window / 2;
            if !stream.fin_received && before < due && stream.owed >= due {
                self.sender.grants.push(id);
            }
        }
    }

    /// Gives the stream up in both directions; what was not yet sent is dropped.
    pub fn reset(&mut self, id: StreamId, reason: StreamReset) {
        if self.forget(id) {
            let header = Header { kind: Type::Rst, flags: 0, length: reset_number(reason), id };
            header.write(&mut self.sender.ready);
        }
    }

    /// Says goodbye: the peer shall open no more, and close when its last stream is over.
    ///
    /// What it opened before it heard this is served like the rest, so that no request is lost.
    pub fn go_away(&mut self) {
        if !self.left {
            self.left = true;
            let id = if self.role == Role::Acceptor { LAST_ID } else { 0 };
            Header { kind: Type::GoAway, flags: 0, length: 0, id }.write(&mut self.sender.ready);
        }
    }

    /// Asks the peer for a `Pong` with the same number.
    pub fn ping(&mut self, number: u64) {
        Header { kind: Type::Ping, flags: 0, length: 8, id: 0 }.write(&mut self.sender.ready);
        self.sender.ready.extend_from_slice(&number.to_be_bytes());
    }

    /// True if `open` may succeed on this link for a while: not full, not leaving, not choked by its own streams.
    pub fn has_room(&self) -> bool {
        let full = self.peer.is_none_or(|peer| self.streams.len() >= peer.max_streams as usize);
        let choked = self.link_left < i64::from(self.limits.link_window / 2) || self.sender.link_window <= 0;
        !(full || choked || self.is_leaving() || self.high >= LAST_ID)
    }

    /// True once the peer's SETTINGS came: before that no stream can be opened.
    pub fn is_ready(&self) -> bool {
        self.peer.is_some()
    }

    /// True once either side said goodbye.
    pub fn is_leaving(&self) -> bool {
        self.peer_left || self.left
    }

    /// True if `transmit` has handed out anything of the stream: its peer may know of it. False proves that it does not.
    pub fn has_left(&self, id: StreamId) -> bool {
        id <= self.sender.left
    }

    pub fn open_streams(&self) -> usize {
        self.streams.len()
    }

    /// Streams whose peer granted no window for `limits.stall`, now reset. To be called every few seconds.
    pub fn reset_stalled(&mut self, now: Duration) -> Vec<StreamId> {
        let late =
            |s: &Stream| s.sending.blocked_since.is_some_and(|since| now.saturating_sub(since) >= self.limits.stall);
        let stalled: Vec<_> = self.streams.iter().filter(|(_, s)| late(s)).map(|(id, _)| *id).collect();
        for id in &stalled {
            self.reset(*id, StreamReset::Stalled);
        }
        stalled
    }

    /// Removes a stream; true if the peer has heard of it and still counts it as open.
    pub(super) fn forget(&mut self, id: StreamId) -> bool {
        let Some(stream) = self.streams.remove(&id) else { return false };
        self.grown -= stream.window - self.limits.window;
        self.sender.drop_stream(&stream.sending)
    }

    pub(super) fn link_granted(&mut self, credit: u32) {
        self.link_owed -= credit;
        self.link_left += i64::from(credit);
    }
}

impl Stream {
    pub(super) fn new(now: Duration, limits: &Limits, send_window: u32) -> Self {
        Self {
            sending: super::send::Sending::new(send_window),
            left: i64::from(limits.window),
            window: limits.window,
            unread: 0,
            owed: 0,
            granted_at: now,
            fin_received: false,
        }
    }
}

/// The link is retired before its ids run out.
pub(super) const LAST_ID: StreamId = 1 << 31;
