//! The wire between two Mantle proxies: many streams on one mutual-TLS connection. Sans-IO: bytes in, events and bytes out.
//!
//! ```text
//! 0        1        2                 4                                   8
//! +--------+--------+-----------------+-----------------------------------+
//! | type   | flags  | length u16 BE   | stream id u32 BE                  |  then `length` bytes (not for WINDOW, RST, GOAWAY)
//! +--------+--------+-----------------+-----------------------------------+
//! 0 SETTINGS  first frame each way, once: (key u16, value u32)*; unknown keys are ignored
//! 1 OPEN      TLV <= 1 KiB (`Open`). Flag REMEMBER 0x1: the receiver appends it to the link's table (<= 256 entries)
//! 2 DATA      flags FIN 0x1 (this direction ends), OPEN 0x2 (a u16 table index precedes the data: it opens the stream)
//! 3 WINDOW    length = credit in KiB; stream 0 = the link as a whole
//! 4 RST       length = reason      5 PING  8 bytes, flag ACK 0x1      6 GOAWAY  stream id = last one served
//! ```
//!
//! Rules. SETTINGS come first: until the acceptor's are here, the dialling side sends nothing else. Only it opens streams; ids strictly increase and are never reused. The receiver of an OPEN
//! learns a *port of its own pod*, never an address. Whatever breaks a rule closes the link with its reason. Every byte
//! that an `Event::Data` delivered must be given back through `Session::consume` exactly once, also when its stream is gone.
//!
//! | file | |
//! |---|---|
//! | `mux/frame.rs` | what is on the wire: headers, settings, OPEN's fields |
//! | `mux/session.rs` | the link: what its user may do |
//! | `mux/receive.rs` | what arrives, and which rules it must keep |
//! | `mux/send.rs` | what leaves: order, fairness, windows |
//! | `mux/rate.rs` | how often a peer may do what |

mod frame;
mod rate;
mod receive;
mod send;
mod session;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use crate::model::Protocol;
use crate::reasons::StreamReset;

pub use session::Session;

/// A stream's number on its link; greater means opened later. 0 is no stream.
pub type StreamId = u32;

/// Which side of the link this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Dialled the connection: opens streams.
    Dialler,
    /// Accepted it: answers streams.
    Acceptor,
}

/// What an OPEN asks for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Open {
    /// A port of the receiver's pod, not 0.
    pub port: u16,
    /// What the bytes are, as far as the client's side knows.
    pub protocol: Hinted,
    /// The authority that the client's connection was meant for: the peer's word, for display only. At most 255 bytes.
    pub authority: Option<Arc<str>>,
}

/// `model::Protocol` as the wire numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Hinted {
    Detect = 0,
    Opaque = 1,
    Http1 = 2,
    Http2 = 3,
    Tls = 4,
}

/// What happened on the link. Bytes borrow from the input.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    Open {
        id: StreamId,
        open: Arc<Open>,
    },
    /// `fin`: these were the last bytes of this direction (there may be none).
    Data {
        id: StreamId,
        bytes: &'a [u8],
        fin: bool,
    },
    /// The peer gave the stream up; it is gone.
    Reset {
        id: StreamId,
        reason: StreamReset,
    },
    /// The peer wants no new streams on this link.
    GoAway,
    Pong(u64),
}

/// What one side allows the other. The defaults are the product's values.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of a stream that may be under way unread at first.
    pub window: u32,
    /// … and at most, for a stream whose reader keeps up.
    pub max_window: u32,
    /// Bytes of all streams together.
    pub link_window: u32,
    /// Streams open at a time.
    pub max_streams: u32,
    pub opens_per_second: u32,
    /// Resets by the peer ("rapid reset"); as many as there may be streams are allowed at once, and so below.
    pub resets_per_second: u32,
    /// PINGs, GOAWAYs and frames for streams that are gone.
    pub control_per_second: u32,
    /// A stream whose peer grants no window for so long is reset.
    pub stall: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            window: 64 << 10,
            max_window: 1 << 20,
            link_window: 8 << 20,
            max_streams: 16_384,
            opens_per_second: 200_000,
            resets_per_second: 2_000,
            control_per_second: 5_000,
            stall: Duration::from_secs(600),
        }
    }
}

/// Why a stream cannot be opened on this link now: use another link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoStream {
    /// The peer's SETTINGS are not here yet.
    NotReady,
    /// The peer's limit of concurrent streams is reached.
    Full,
    /// One side said goodbye, or the ids are used up.
    GoingAway,
}

impl From<Protocol> for Hinted {
    fn from(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Detect => Self::Detect,
            Protocol::Opaque => Self::Opaque,
            Protocol::Http1 => Self::Http1,
            Protocol::Http2 => Self::Http2,
            Protocol::Tls => Self::Tls,
        }
    }
}

impl From<Hinted> for Protocol {
    fn from(hinted: Hinted) -> Self {
        match hinted {
            Hinted::Detect => Self::Detect,
            Hinted::Opaque => Self::Opaque,
            Hinted::Http1 => Self::Http1,
            Hinted::Http2 => Self::Http2,
            Hinted::Tls => Self::Tls,
        }
    }
}
