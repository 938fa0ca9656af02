//! What is on the wire: frame headers, SETTINGS, the fields of OPEN, and the numbers of reset reasons.
//!
//! Only syntax: whether a frame is allowed is decided in `session.rs`.

use std::sync::Arc;

use super::{Hinted, Limits, Open, StreamId};
use crate::reasons::{LinkClosed, StreamReset};

pub(super) const HEADER: usize = 8;
pub(super) const MAX_CONTROL: usize = 1024;
pub(super) const MAX_TABLE: usize = 256;

pub(super) const FIN: u8 = 0x1;
pub(super) const OPENS: u8 = 0x2;
pub(super) const REMEMBER: u8 = 0x1;
pub(super) const ACK: u8 = 0x1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Type {
    Settings = 0,
    Open = 1,
    Data = 2,
    Window = 3,
    Rst = 4,
    Ping = 5,
    GoAway = 6,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    pub(super) kind: Type,
    pub(super) flags: u8,
    pub(super) length: u16,
    pub(super) id: StreamId,
}

impl Header {
    pub(super) fn parse(bytes: &[u8; HEADER]) -> Result<Self, LinkClosed> {
        let [kind, flags, l0, l1, id @ ..] = *bytes;
        let (kind, allowed) = match kind {
            0 => (Type::Settings, 0),
            1 => (Type::Open, REMEMBER),
            2 => (Type::Data, FIN | OPENS),
            3 => (Type::Window, 0),
            4 => (Type::Rst, 0),
            5 => (Type::Ping, ACK),
            6 => (Type::GoAway, 0),
            _ => return Err(LinkClosed::BadFrame),
        };
        if flags & !allowed != 0 {
            return Err(LinkClosed::BadFrame);
        }
        Ok(Self { kind, flags, length: u16::from_be_bytes([l0, l1]), id: u32::from_be_bytes(id) })
    }

    pub(super) fn write(self, out: &mut Vec<u8>) {
        let [l0, l1] = self.length.to_be_bytes();
        let [i0, i1, i2, i3] = self.id.to_be_bytes();
        out.extend_from_slice(&[self.kind as u8, self.flags, l0, l1, i0, i1, i2, i3]);
    }
}

/// What the peer's SETTINGS say.
#[derive(Clone, Copy, Debug)]
pub(super) struct Settings {
    pub(super) window: u32,
    pub(super) link_window: u32,
    pub(super) max_streams: u32,
    /// Streams per second the peer accepts; not enforced here, its own limit closes the link.
    pub(super) opens_per_second: u32,
}

impl Settings {
    pub(super) fn write(limits: &Limits, out: &mut Vec<u8>) {
        let pairs: [(u16, u32); 5] = [
            (VERSION, 1),
            (WINDOW, limits.window),
            (MAX_STREAMS, limits.max_streams),
            (OPEN_RATE, limits.opens_per_second),
            (LINK_WINDOW, limits.link_window),
        ];
        Header { kind: Type::Settings, flags: 0, length: 6 * pairs.len() as u16, id: 0 }.write(out);
        for (key, value) in pairs {
            out.extend_from_slice(&key.to_be_bytes());
            out.extend_from_slice(&value.to_be_bytes());
        }
    }

    pub(super) fn parse(payload: &[u8]) -> Result<Self, LinkClosed> {
        let (pairs, []) = payload.as_chunks::<6>() else { return Err(LinkClosed::BadSettings) };
        let (mut settings, mut version) = (Self { window: 0, link_window: 0, max_streams: 0, opens_per_second: 0 }, 0);
        for [k0, k1, value @ ..] in pairs {
            let value = u32::from_be_bytes(*value);
            match u16::from_be_bytes([*k0, *k1]) {
                VERSION => version = value,
                WINDOW => settings.window = value,
                MAX_STREAMS => settings.max_streams = value,
                OPEN_RATE => settings.opens_per_second = value,
                LINK_WINDOW => settings.link_window = value,
                _ => {} // a newer peer's setting
            }
        }
        let sane =
            version == 1 && settings.window <= MAX_WINDOW as u32 && settings.link_window <= MAX_LINK_WINDOW as u32;
        if sane { Ok(settings) } else { Err(LinkClosed::BadSettings) }
    }
}

/// No window may grow beyond these, whatever is granted.
pub(super) const MAX_WINDOW: i64 = 16 << 20;
pub(super) const MAX_LINK_WINDOW: i64 = 256 << 20;

impl Open {
    pub(super) fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&[PORT, 2]);
        out.extend_from_slice(&self.port.to_be_bytes());
        out.extend_from_slice(&[PROTOCOL, 1, self.protocol as u8]);
        if let Some(authority) = self.authority.as_deref().filter(|text| text.len() <= 255) {
            out.extend_from_slice(&[AUTHORITY, authority.len() as u8]);
            out.extend_from_slice(authority.as_bytes());
        }
    }

    pub(super) fn parse(mut fields: &[u8]) -> Result<Self, LinkClosed> {
        let (mut port, mut protocol, mut authority) = (None, None, None);
        while let [tag, length, rest @ ..] = fields {
            let (value, rest) = rest.split_at_checked(usize::from(*length)).ok_or(LinkClosed::BadFrame)?;
            let twice = match (*tag, value) {
                (PORT, [p0, p1]) => port.replace(u16::from_be_bytes([*p0, *p1])).is_some(),
                (PROTOCOL, [number]) => protocol.replace(hinted(*number)?).is_some(),
                (AUTHORITY, text) => {
                    let text = std::str::from_utf8(text).map_err(|_| LinkClosed::BadFrame)?;
                    authority.replace(Arc::from(text)).is_some()
                }
                (PORT | PROTOCOL, _) => true,
                _ => false, // a newer peer's field
            };
            if twice {
                return Err(LinkClosed::BadFrame);
            }
            fields = rest;
        }
        match (port, protocol, fields) {
            (Some(port @ 1..), Some(protocol), []) => Ok(Self { port, protocol, authority }),
            _ => Err(LinkClosed::BadFrame),
        }
    }
}

fn hinted(number: u8) -> Result<Hinted, LinkClosed> {
    const ALL: [Hinted; 5] = [Hinted::Detect, Hinted::Opaque, Hinted::Http1, Hinted::Http2, Hinted::Tls];
    ALL.into_iter().find(|hint| *hint as u8 == number).ok_or(LinkClosed::BadFrame)
}

/// The numbers of `RST`. A reason this version does not know counts as `Cancelled`.
pub(super) const RESETS: [(u16, StreamReset); 8] = [
    (0, StreamReset::Cancelled),
    (1, StreamReset::Denied),
    (2, StreamReset::Revoked),
    (3, StreamReset::ConnectFailed),
    (4, StreamReset::Refused),
    (5, StreamReset::Stalled),
    (6, StreamReset::ProtocolError),
    (7, StreamReset::Broken),
];

pub(super) fn reset_number(reason: StreamReset) -> u16 {
    RESETS.iter().find(|(_, r)| *r == reason).map_or(0, |(number, _)| *number)
}

pub(super) fn reset_reason(number: u16) -> StreamReset {
    RESETS.iter().find(|(n, _)| *n == number).map_or(StreamReset::Cancelled, |(_, reason)| *reason)
}

const VERSION: u16 = 1;
const WINDOW: u16 = 2;
const MAX_STREAMS: u16 = 3;
const OPEN_RATE: u16 = 4;
const LINK_WINDOW: u16 = 5;

const PORT: u8 = 1;
const PROTOCOL: u8 = 2;
const AUTHORITY: u8 = 3;
