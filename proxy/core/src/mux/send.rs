//! What leaves a link, and in which order: control frames, new streams, then small streams before bulk, each in turn.
//!
//! `Session::transmit` hands out one buffer per flush. While nobody waits, what an application sends becomes frames of
//! the next flush at once. Otherwise it waits in its stream, at most `STREAM_BUFFER` and never more than the peer has
//! granted; the link as a whole stops accepting at `LINK_BUFFER`.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::frame::{FIN, HEADER, Header, MAX_TABLE, OPENS, REMEMBER, Settings, Type};
use super::session::Session;
use super::{Limits, Open, StreamId};

/// The sending half of a link.
#[derive(Debug)]
pub(super) struct Sender {
    /// Encoded frames, in the order of what they tell: the start of the next flush.
    pub(super) ready: Vec<u8>,
    /// The last DATA frame in `ready`: its stream, and where its header is.
    last: Option<(StreamId, usize)>,
    /// Streams to which credit is due.
    pub(super) grants: Vec<StreamId>,
    /// What the peer's link window still takes.
    pub(super) link_window: i64,
    /// The last stream of which something was handed out.
    pub(super) left: StreamId,
    /// Streams that the peer has not heard of, in the order of their ids.
    opening: VecDeque<(StreamId, Open)>,
    table: BTreeMap<Open, u16>,
    /// Streams with something to send. A stream that is gone or has nothing left is skipped.
    small: VecDeque<StreamId>,
    bulk: VecDeque<StreamId>,
    /// Bytes waiting in all streams.
    waiting: usize,
    /// Streams whose `send` took less than offered, and those of them that may go on.
    starved: Vec<StreamId>,
    writable: Vec<StreamId>,
}

/// The sending half of a stream.
#[derive(Debug)]
pub(super) struct Sending {
    pub(super) window: i64,
    pub(super) announced: bool,
    pub(super) fin_sent: bool,
    pub(super) blocked_since: Option<Duration>,
    waiting: VecDeque<u8>,
    fin: bool,
    queued: bool,
    starved: bool,
    /// Bytes sent since the last rest of `REST`: what makes a stream bulk.
    burst: usize,
    sent_at: Duration,
}

impl Session {
    /// Takes bytes of a stream to be sent: how many it took; 0 for a stream that is gone or has no room.
    ///
    /// After a short count `take_writable` names the stream when there is room again.
    pub fn send(&mut self, now: Duration, id: StreamId, bytes: &[u8]) -> usize {
        let Some(stream) = self.streams.get_mut(&id) else { return 0 };
        let sending = &mut stream.sending;
        let room = sending.room();
        let taken = bytes.len().min(if self.sender.waiting >= LINK_BUFFER { 0 } else { room });
        if taken < bytes.len() && !sending.starved {
            sending.starved = true;
            if sending.window <= (sending.waiting.len() + taken) as i64 {
                sending.blocked_since.get_or_insert(now);
            }
            if room > taken {
                self.sender.starved.push(id); // the link is full, not the stream
            }
        }
        if taken > 0 && !self.cut_through(now, id, &bytes[..taken]) {
            self.wait(now, id, &bytes[..taken]);
        }
        taken
    }

    /// Nobody waits and the next flush has room: the bytes become frames now. False: they must wait.
    fn cut_through(&mut self, now: Duration, id: StreamId, bytes: &[u8]) -> bool {
        let Some(stream) = self.streams.get(&id) else { return false };
        let sender = &self.sender;
        let alone = sender.small.is_empty() && sender.bulk.is_empty() && stream.sending.waiting.is_empty();
        let fits = sender.ready.len() + bytes.len() <= FLUSH && sender.link_window >= bytes.len() as i64;
        if !alone || !fits {
            return false;
        }
        let mut out = std::mem::take(&mut self.sender.ready);
        let mut index = None;
        while self.streams.get(&id).is_some_and(|stream| !stream.sending.announced) {
            let Some((opening, open)) = self.sender.opening.pop_front() else { break };
            if opening == id {
                index = self.write_opening(id, open, &mut out);
            } else {
                self.write_opening_and_data(now, opening, open, &mut out);
            }
        }
        let mut left = bytes;
        while !left.is_empty() || index.is_some() {
            let (part, rest) = left.split_at(left.len().min(room_in_record(&out, index)));
            self.sender.last = Some((id, out.len()));
            write_header(id, index.take(), part.len(), false, &mut out);
            out.extend_from_slice(part);
            left = rest;
        }
        self.sender.link_window -= bytes.len() as i64;
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.sending.count(now, bytes.len());
            self.sender.wake(id, &mut stream.sending);
        }
        self.sender.ready = out;
        true
    }

    fn wait(&mut self, now: Duration, id: StreamId, bytes: &[u8]) {
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.sending.waiting.extend(bytes);
            self.sender.waiting += bytes.len();
            self.sender.enqueue(now, id, &mut stream.sending);
        }
    }

    /// Ends our direction of the stream after what was taken before.
    pub fn finish(&mut self, now: Duration, id: StreamId) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        stream.sending.fin = true;
        match self.sender.last {
            // Its last bytes have not left yet: they carry the end.
            Some((last, at)) if last == id && stream.sending.waiting.is_empty() && !stream.sending.fin_sent => {
                self.sender.ready[at + 1] |= FIN;
                stream.sending.fin_sent = true;
                if stream.fin_received {
                    self.forget(id);
                }
            }
            _ => self.sender.enqueue(now, id, &mut stream.sending),
        }
    }

    /// True if `transmit` would write something.
    pub fn wants_transmit(&self) -> bool {
        let sender = &self.sender;
        let ready = !sender.small.is_empty() || !sender.bulk.is_empty();
        !sender.ready.is_empty()
            || !sender.grants.is_empty()
            || !sender.opening.is_empty()
            || (ready && sender.link_window > 0)
            || self.link_grant_due()
    }

    /// Bytes of applications that wait to be sent.
    pub fn waiting(&self) -> usize {
        self.sender.waiting
    }

    /// Streams that `send` had turned away and that have room now.
    pub fn take_writable(&mut self) -> Vec<StreamId> {
        if self.sender.waiting < LINK_BUFFER / 2 {
            for id in std::mem::take(&mut self.sender.starved) {
                if let Some(stream) = self.streams.get_mut(&id) {
                    self.sender.wake(id, &mut stream.sending);
                }
            }
        }
        std::mem::take(&mut self.sender.writable)
    }

    /// Appends what is to leave next to `out`, about `budget` bytes of it; call again while `wants_transmit`.
    ///
    /// `out` is what goes into one write: frames are cut so that they end where its TLS records do.
    pub fn transmit(&mut self, now: Duration, out: &mut Vec<u8>, budget: usize) {
        let start = out.len();
        self.sender.last = None;
        match out.is_empty() {
            true => std::mem::swap(out, &mut self.sender.ready),
            false => out.append(&mut self.sender.ready),
        }
        self.write_grants(now, out);
        while out.len() - start < budget {
            if let Some((id, open)) = self.sender.opening.pop_front() {
                self.write_opening_and_data(now, id, open, out);
                continue;
            }
            if self.sender.link_window <= 0 {
                break;
            }
            let Some(id) = self.sender.small.pop_front().or_else(|| self.sender.bulk.pop_front()) else { break };
            self.write_data(now, id, None, out);
        }
        self.sender.left = self.sender.opening.front().map_or(self.high, |(id, _)| id - 1);
    }

    /// Announces a stream; its first data, if it has some, travels with it or follows from a queue.
    fn write_opening_and_data(&mut self, now: Duration, id: StreamId, open: Open, out: &mut Vec<u8>) {
        if let Some(index) = self.write_opening(id, open, out) {
            self.write_data(now, id, Some(index), out);
        }
    }

    /// Writes an OPEN, or says which entry of the table the stream's first DATA frame is to name.
    fn write_opening(&mut self, id: StreamId, open: Open, out: &mut Vec<u8>) -> Option<u16> {
        let stream = self.streams.get_mut(&id)?;
        stream.sending.announced = true;
        if let Some(index) = self.sender.table.get(&open) {
            return Some(*index);
        }
        let at = out.len();
        let next = self.sender.table.len();
        let flags = if next < MAX_TABLE { REMEMBER } else { 0 };
        Header { kind: Type::Open, flags, length: 0, id }.write(out);
        open.write(out);
        let length = (out.len() - at - HEADER) as u16;
        out[at + 2..at + 4].copy_from_slice(&length.to_be_bytes());
        if next < MAX_TABLE {
            self.sender.table.insert(open, next as u16);
        }
        None
    }

    /// Writes one frame of the stream's bytes and queues the stream again if more is left.
    fn write_data(&mut self, now: Duration, id: StreamId, index: Option<u16>, out: &mut Vec<u8>) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let sending = &mut stream.sending;
        sending.queued = false;
        let windows = sending.window.min(self.sender.link_window).max(0) as usize;
        let n = sending.waiting.len().min(room_in_record(out, index)).min(windows);
        let fin = sending.fin && n == sending.waiting.len() && !sending.fin_sent;
        if n == 0 && !fin && index.is_none() {
            return; // the window that it waits for brings it back
        }
        write_header(id, index, n, fin, out);
        let (front, back) = sending.waiting.as_slices();
        let from_front = n.min(front.len());
        out.extend_from_slice(&front[..from_front]);
        out.extend_from_slice(&back[..n - from_front]);
        sending.waiting.drain(..n);
        if sending.waiting.is_empty() {
            sending.waiting = VecDeque::new(); // an idle stream owns no buffer
        }
        sending.fin_sent |= fin;
        sending.count(now, n);
        self.sender.link_window -= n as i64;
        self.sender.waiting -= n;
        self.sender.wake(id, sending);
        if sending.fin_sent && stream.fin_received {
            self.forget(id);
        } else if !stream.sending.waiting.is_empty() || (stream.sending.fin && !stream.sending.fin_sent) {
            self.sender.enqueue(now, id, &mut stream.sending);
        }
    }

    fn write_grants(&mut self, now: Duration, out: &mut Vec<u8>) {
        for id in std::mem::take(&mut self.sender.grants) {
            let Some(stream) = self.streams.get_mut(&id) else { continue };
            if stream.fin_received {
                continue;
            }
            let mut credit = stream.owed & !1023;
            stream.owed -= credit;
            // A reader that keeps up with a busy sender gets twice the window, while the link can afford it.
            let busy = now.saturating_sub(stream.granted_at) < BUSY;
            let affordable = self.grown + stream.window <= self.limits.link_window / 2;
            if busy && stream.unread == 0 && stream.window < self.limits.max_window && affordable {
                let more = stream.window.min(self.limits.max_window - stream.window) & !1023;
                self.grown += more;
                stream.window += more;
                credit += more;
            }
            stream.granted_at = now;
            stream.left += i64::from(credit);
            write_window(id, credit, out);
        }
        if self.link_grant_due() {
            let credit = self.link_owed & !1023;
            self.link_granted(credit);
            write_window(0, credit, out);
        }
    }

    fn link_grant_due(&self) -> bool {
        self.link_owed >= self.limits.link_window / 8 && self.link_owed >= 1024
    }
}

impl Sender {
    /// SETTINGS are the first thing that leaves.
    pub(super) fn new(limits: &Limits) -> Self {
        let mut ready = Vec::new();
        Settings::write(limits, &mut ready);
        Self {
            ready,
            last: None,
            grants: Vec::new(),
            link_window: 0,
            left: 0,
            opening: VecDeque::new(),
            table: BTreeMap::new(),
            small: VecDeque::new(),
            bulk: VecDeque::new(),
            waiting: 0,
            starved: Vec::new(),
            writable: Vec::new(),
        }
    }

    pub(super) fn announce(&mut self, id: StreamId, open: Open) {
        self.opening.push_back((id, open));
    }

    /// The stream's window changed.
    pub(super) fn look_again(&mut self, id: StreamId, sending: &mut Sending) {
        if !sending.waiting.is_empty() || (sending.fin && !sending.fin_sent) {
            self.enqueue(sending.sent_at, id, sending);
        }
        if sending.window > sending.waiting.len() as i64 {
            sending.blocked_since = None;
        }
        self.wake(id, sending);
    }

    /// Tells the stream's user to go on, once there is room worth it.
    fn wake(&mut self, id: StreamId, sending: &mut Sending) {
        if sending.starved && !sending.fin && sending.room() > 0 && sending.room() * 2 >= sending.capacity() {
            sending.starved = false;
            self.writable.push(id);
        }
    }

    /// Lets go of a stream; true if the peer has heard of it.
    pub(super) fn drop_stream(&mut self, sending: &Sending) -> bool {
        self.waiting -= sending.waiting.len();
        sending.announced
    }

    fn enqueue(&mut self, now: Duration, id: StreamId, sending: &mut Sending) {
        if sending.queued {
            return;
        }
        sending.queued = true;
        if sending.is_bulk(now) { self.bulk.push_back(id) } else { self.small.push_back(id) }
    }
}

impl Sending {
    pub(super) fn new(window: u32) -> Self {
        Self {
            window: i64::from(window),
            announced: false,
            fin_sent: false,
            blocked_since: None,
            waiting: VecDeque::new(),
            fin: false,
            queued: false,
            starved: false,
            burst: 0,
            sent_at: Duration::ZERO,
        }
    }

    fn capacity(&self) -> usize {
        STREAM_BUFFER.min(self.window.max(0) as usize)
    }

    fn room(&self) -> usize {
        if self.fin { 0 } else { self.capacity().saturating_sub(self.waiting.len()) }
    }

    fn is_bulk(&self, now: Duration) -> bool {
        self.burst >= BULK && now.saturating_sub(self.sent_at) < REST
    }

    fn count(&mut self, now: Duration, n: usize) {
        self.window -= n as i64;
        if now.saturating_sub(self.sent_at) >= REST {
            self.burst = 0;
        }
        self.burst = self.burst.saturating_add(n);
        self.sent_at = now;
    }
}

/// How many bytes the next DATA frame may carry: it ends where a TLS record does, unless that is not worth it.
fn room_in_record(out: &[u8], index: Option<u16>) -> usize {
    let left = RECORD - out.len() % RECORD;
    let overhead = HEADER + if index.is_some() { 2 } else { 0 };
    if left < 512 { RECORD } else { left }.saturating_sub(overhead)
}

fn write_header(id: StreamId, index: Option<u16>, n: usize, fin: bool, out: &mut Vec<u8>) {
    let fin = if fin { FIN } else { 0 };
    let (flags, length) = if index.is_some() { (fin | OPENS, n + 2) } else { (fin, n) };
    Header { kind: Type::Data, flags, length: length as u16, id }.write(out);
    out.extend(index.iter().flat_map(|i| i.to_be_bytes()));
}

fn write_window(id: StreamId, credit: u32, out: &mut Vec<u8>) {
    let mut kib = credit >> 10;
    while kib > 0 {
        let part = kib.min(u32::from(u16::MAX));
        Header { kind: Type::Window, flags: 0, length: part as u16, id }.write(out);
        kib -= part;
    }
}

/// Plaintext bytes of a full TLS record.
const RECORD: usize = 16 << 10;
const STREAM_BUFFER: usize = 64 << 10;
const LINK_BUFFER: usize = 192 << 10;
/// Bytes that become frames before they are asked for.
const FLUSH: usize = 64 << 10;
/// A stream that sent this much without a rest goes behind the small ones.
const BULK: usize = 64 << 10;
const REST: Duration = Duration::from_millis(10);
/// Half a window consumed within this time: the window is what limits the sender.
const BUSY: Duration = Duration::from_millis(100);
