//! What arrives on a link: frames in pieces of any size, checked one by one; each broken rule has its reason.

use std::sync::Arc;
use std::time::Duration;

use super::frame::{
    ACK, FIN, HEADER, Header, MAX_CONTROL, MAX_LINK_WINDOW, MAX_TABLE, MAX_WINDOW, OPENS, REMEMBER, Settings, Type,
    reset_reason,
};
use super::session::{LAST_ID, Session, Stream};
use super::{Event, Open, Role, StreamId};
use crate::reasons::{LinkClosed, StreamReset};

/// Where in a frame the input stands.
#[derive(Debug, Default)]
pub(super) struct Parser {
    head: [u8; HEADER + 2],
    have: usize,
    /// The payload of SETTINGS, OPEN or PING so far.
    payload: Vec<u8>,
    data: Option<DataFrame>,
}

#[derive(Clone, Copy, Debug)]
struct DataFrame {
    id: StreamId,
    left: usize,
    fin: bool,
}

impl Session {
    /// Takes bytes from the front of `input` until something happened; `None`: all input is used up.
    ///
    /// Errors close the link: nothing may be fed or sent afterwards.
    pub fn receive<'a>(&mut self, now: Duration, input: &mut &'a [u8]) -> Result<Option<Event<'a>>, LinkClosed> {
        loop {
            if let Some(id) = self.orphans.pop() {
                return Ok(Some(Event::Reset { id, reason: StreamReset::Refused }));
            }
            if let Some(frame) = self.parser.data {
                match self.data(frame, input) {
                    Some(event) => return Ok(Some(event)),
                    None if self.parser.data.is_some() => return Ok(None), // needs more input
                    None => continue,                                      // the stream is gone: bytes discarded
                }
            }
            let Some(header) = self.parser.header(input)? else { return Ok(None) };
            if self.peer.is_none() && header.kind != Type::Settings {
                return Err(LinkClosed::BadSettings);
            }
            let has_payload = matches!(header.kind, Type::Settings | Type::Open | Type::Ping);
            if has_payload && !self.parser.payload(header.length, input)? {
                return Ok(None);
            }
            let index = u16::from_be_bytes([self.parser.head[HEADER], self.parser.head[HEADER + 1]]);
            self.parser.have = 0;
            let payload = std::mem::take(&mut self.parser.payload);
            let event = match header.kind {
                Type::Data => self.data_header(now, header, index)?,
                Type::Window => self.window(now, header)?,
                Type::Rst => self.rst(now, header)?,
                Type::Open => self.open_frame(now, header, &payload)?,
                Type::Ping => self.ping_frame(now, header, &payload)?,
                Type::GoAway => self.goaway_frame(now, header)?,
                Type::Settings => self.settings(header, &payload)?,
            };
            if event.is_some() {
                return Ok(event);
            }
        }
    }

    fn settings(&mut self, header: Header, payload: &[u8]) -> Result<Option<Event<'static>>, LinkClosed> {
        if self.peer.is_some() || header.id != 0 {
            return Err(LinkClosed::BadSettings);
        }
        let settings = Settings::parse(payload)?;
        self.sender.link_window = i64::from(settings.link_window);
        self.peer = Some(settings);
        Ok(None)
    }

    fn open_frame(
        &mut self,
        now: Duration,
        header: Header,
        fields: &[u8],
    ) -> Result<Option<Event<'static>>, LinkClosed> {
        let open = Arc::new(Open::parse(fields)?);
        if header.flags & REMEMBER != 0 {
            if self.table.len() == MAX_TABLE {
                return Err(LinkClosed::BadFrame);
            }
            self.table.push(Arc::clone(&open));
        }
        self.accept(now, header.id, open)
    }

    fn accept(&mut self, now: Duration, id: StreamId, open: Arc<Open>) -> Result<Option<Event<'static>>, LinkClosed> {
        if self.role == Role::Dialler || id <= self.high || id > LAST_ID {
            return Err(LinkClosed::BadStream);
        }
        if !self.opens.allow(now) {
            return Err(LinkClosed::OpenRate);
        }
        self.high = id;
        if self.streams.len() >= self.limits.max_streams as usize {
            return Err(LinkClosed::TooManyStreams);
        }
        let window = self.peer.map_or(0, |peer| peer.window);
        let mut stream = Stream::new(now, &self.limits, window);
        stream.sending.announced = true;
        self.streams.insert(id, stream);
        Ok(Some(Event::Open { id, open }))
    }

    fn data_header(&mut self, now: Duration, header: Header, index: u16) -> Result<Option<Event<'static>>, LinkClosed> {
        let opens = header.flags & OPENS != 0;
        let fin = header.flags & FIN != 0;
        let overhead = if opens { 2 } else { 0 };
        let left = usize::from(header.length).checked_sub(overhead).ok_or(LinkClosed::BadFrame)?;
        if left == 0 && !fin && !opens {
            return Err(LinkClosed::BadFrame);
        }
        let event = if opens {
            let open = self.table.get(usize::from(index)).map(Arc::clone).ok_or(LinkClosed::BadFrame)?;
            self.accept(now, header.id, open)?
        } else {
            None
        };
        if header.id == 0 || header.id > self.high {
            return Err(LinkClosed::BadStream);
        }
        self.link_left -= left as i64;
        if self.link_left < 0 {
            return Err(LinkClosed::WindowExceeded);
        }
        if let Some(stream) = self.streams.get_mut(&header.id) {
            stream.left -= left as i64;
            if stream.fin_received {
                return Err(LinkClosed::BadStream);
            }
            if stream.left < 0 {
                return Err(LinkClosed::WindowExceeded);
            }
        }
        if left > 0 || fin {
            self.parser.data = Some(DataFrame { id: header.id, left, fin });
        }
        Ok(event)
    }

    /// Hands out what is there of a DATA frame. `None`: nothing is there, or it was discarded.
    fn data<'a>(&mut self, frame: DataFrame, input: &mut &'a [u8]) -> Option<Event<'a>> {
        if frame.left > 0 && input.is_empty() {
            return None;
        }
        let (bytes, rest) = input.split_at(frame.left.min(input.len()));
        *input = rest;
        let left = frame.left - bytes.len();
        self.parser.data = (left > 0).then_some(DataFrame { left, ..frame });
        let fin = frame.fin && left == 0;
        let Some(stream) = self.streams.get_mut(&frame.id) else {
            // It crossed our RST or its end: the bytes count for the link only.
            self.link_owed = self.link_owed.saturating_add(bytes.len() as u32);
            return None;
        };
        stream.unread += bytes.len() as u32;
        stream.fin_received = fin;
        if fin && stream.sending.fin_sent {
            self.forget(frame.id);
        }
        Some(Event::Data { id: frame.id, bytes, fin })
    }

    fn window(&mut self, now: Duration, header: Header) -> Result<Option<Event<'static>>, LinkClosed> {
        let credit = i64::from(header.length) << 10;
        if credit == 0 {
            return Err(LinkClosed::BadFrame);
        }
        if header.id == 0 {
            self.sender.link_window += credit;
            let ok = self.sender.link_window <= MAX_LINK_WINDOW;
            return if ok { Ok(None) } else { Err(LinkClosed::WindowExceeded) };
        }
        let Some(stream) = self.streams.get_mut(&header.id) else { return self.gone(now, header.id) };
        stream.sending.window += credit;
        if stream.sending.window > MAX_WINDOW {
            return Err(LinkClosed::WindowExceeded);
        }
        self.sender.look_again(header.id, &mut stream.sending);
        Ok(None)
    }

    fn rst(&mut self, now: Duration, header: Header) -> Result<Option<Event<'static>>, LinkClosed> {
        if !self.streams.contains_key(&header.id) {
            return self.gone(now, header.id);
        }
        if !self.resets.allow(now) {
            return Err(LinkClosed::ResetRate);
        }
        self.forget(header.id);
        Ok(Some(Event::Reset { id: header.id, reason: reset_reason(header.length) }))
    }

    /// A frame for a stream that is gone: normal when it crossed our own end of it, a violation if it never was.
    fn gone(&mut self, now: Duration, id: StreamId) -> Result<Option<Event<'static>>, LinkClosed> {
        match id {
            0 => Err(LinkClosed::BadStream),
            id if id > self.high => Err(LinkClosed::BadStream),
            _ if !self.controls.allow(now) => Err(LinkClosed::ControlRate),
            _ => Ok(None),
        }
    }

    fn ping_frame(
        &mut self,
        now: Duration,
        header: Header,
        payload: &[u8],
    ) -> Result<Option<Event<'static>>, LinkClosed> {
        let number: [u8; 8] = payload.try_into().map_err(|_| LinkClosed::BadFrame)?;
        if header.id != 0 {
            return Err(LinkClosed::BadFrame);
        }
        if !self.controls.allow(now) || self.sender.ready.len() > MAX_CONTROL_WAITING {
            return Err(LinkClosed::ControlRate);
        }
        if header.flags & ACK != 0 {
            return Ok(Some(Event::Pong(u64::from_be_bytes(number))));
        }
        Header { flags: ACK, ..header }.write(&mut self.sender.ready);
        self.sender.ready.extend_from_slice(&number);
        Ok(None)
    }

    fn goaway_frame(&mut self, now: Duration, header: Header) -> Result<Option<Event<'static>>, LinkClosed> {
        if header.length != 0 {
            return Err(LinkClosed::BadFrame);
        }
        if !self.controls.allow(now) {
            return Err(LinkClosed::ControlRate);
        }
        self.peer_left = true;
        if self.role == Role::Dialler {
            let orphans = self.streams.range(header.id.saturating_add(1)..).map(|(id, _)| *id).collect::<Vec<_>>();
            for id in &orphans {
                self.forget(*id);
            }
            self.orphans.extend(orphans);
        }
        Ok(Some(Event::GoAway))
    }
}

impl Parser {
    /// Collects a header (with the table index of an opening DATA frame); `None`: needs more input.
    fn header(&mut self, input: &mut &[u8]) -> Result<Option<Header>, LinkClosed> {
        loop {
            let complete = if self.have < HEADER {
                HEADER
            } else {
                let head: [u8; HEADER] = std::array::from_fn(|i| self.head[i]);
                let header = Header::parse(&head)?;
                let indexed = header.kind == Type::Data && header.flags & OPENS != 0;
                if !indexed || self.have == HEADER + 2 {
                    return Ok(Some(header));
                }
                HEADER + 2
            };
            let n = (complete - self.have).min(input.len());
            if n == 0 {
                return Ok(None);
            }
            let (bytes, rest) = input.split_at(n);
            self.head[self.have..self.have + n].copy_from_slice(bytes);
            self.have += n;
            *input = rest;
        }
    }

    /// Collects a control payload; false: needs more input.
    fn payload(&mut self, length: u16, input: &mut &[u8]) -> Result<bool, LinkClosed> {
        let length = usize::from(length);
        if length > MAX_CONTROL {
            return Err(LinkClosed::BadFrame);
        }
        let n = (length - self.payload.len()).min(input.len());
        let (bytes, rest) = input.split_at(n);
        self.payload.extend_from_slice(bytes);
        *input = rest;
        Ok(self.payload.len() == length)
    }
}

/// Answers that a peer provokes and does not read.
const MAX_CONTROL_WAITING: usize = 256 << 10;
