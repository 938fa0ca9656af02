//! Where a body ends: counts bytes, reads chunk sizes, copies nothing.

use super::{Body, is_reserved};
use crate::detect::is_token;
use crate::reasons::BadHttp;

/// Follows one body through any number of buffers.
#[derive(Clone, Debug)]
pub struct Follower(State);

#[derive(Clone, Debug)]
enum State {
    Done,
    UntilClose,
    Length(u64),
    Chunked(Chunk),
}

/// Where in the chunked coding (RFC 9112 section 7.1) the input stands.
#[derive(Clone, Copy, Debug)]
enum Chunk {
    Size {
        digits: u8,
        value: u64,
    },
    /// In an extension; `seen` bytes of it so far.
    Extension {
        value: u64,
        seen: u16,
    },
    SizeLf {
        value: u64,
    },
    Data {
        left: u64,
    },
    DataCr,
    DataLf,
    /// At the start of a trailer line, or of the empty line that ends all; `seen` bytes of trailers so far.
    TrailerStart {
        seen: u16,
    },
    TrailerName {
        seen: u16,
        name: [u8; 8],
        len: u8,
    },
    TrailerValue {
        seen: u16,
    },
    TrailerLf {
        seen: u16,
    },
    EndLf,
}

impl Follower {
    pub fn new(body: Body) -> Self {
        Self(match body {
            Body::None | Body::Length(0) => State::Done,
            Body::Length(n) => State::Length(n),
            Body::Chunked => State::Chunked(Chunk::Size { digits: 0, value: 0 }),
            Body::UntilClose => State::UntilClose,
        })
    }

    /// True once the last byte of the body has been followed.
    pub fn is_done(&self) -> bool {
        matches!(self.0, State::Done)
    }

    /// True if the message is whole when the connection ends now.
    pub fn may_end(&self) -> bool {
        matches!(self.0, State::Done | State::UntilClose)
    }

    /// How many bytes from the start of `buf` belong to this body. Fewer than `buf.len()` only when it is done.
    pub fn follow(&mut self, buf: &[u8]) -> Result<usize, BadHttp> {
        match &mut self.0 {
            State::Done => Ok(0),
            State::UntilClose => Ok(buf.len()),
            State::Length(left) => {
                let n = buf.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                *left -= n as u64;
                if *left == 0 {
                    self.0 = State::Done;
                }
                Ok(n)
            }
            State::Chunked(chunk) => {
                let mut at = 0;
                while let Some(byte) = buf.get(at) {
                    if let Chunk::Data { left } = chunk {
                        let n = (buf.len() - at).min(usize::try_from(*left).unwrap_or(usize::MAX));
                        *left -= n as u64;
                        at += n;
                        if *left == 0 {
                            *chunk = Chunk::DataCr;
                        }
                        continue;
                    }
                    at += 1;
                    match chunk.step(*byte)? {
                        Some(next) => *chunk = next,
                        None => {
                            self.0 = State::Done;
                            break;
                        }
                    }
                }
                Ok(at)
            }
        }
    }
}

impl Chunk {
    /// The state after `byte`; `None`: the body is over.
    fn step(self, byte: u8) -> Result<Option<Self>, BadHttp> {
        let bad = Err(BadHttp::BadChunk);
        Ok(Some(match (self, byte) {
            (Self::Size { digits, value }, b) if b.is_ascii_hexdigit() && digits < MAX_DIGITS => {
                let digit = char::from(b).to_digit(16).unwrap_or_default();
                Self::Size { digits: digits + 1, value: value << 4 | u64::from(digit) }
            }
            (Self::Size { digits: 1.., value }, b'\r') => Self::SizeLf { value },
            (Self::Size { digits: 1.., value }, b';') => Self::Extension { value, seen: 0 },
            (Self::Size { .. }, _) => return bad,
            (Self::Extension { value, .. }, b'\r') => Self::SizeLf { value },
            (Self::Extension { value, seen }, b) if (b >= b' ' || b == b'\t') && b != 0x7f && seen < MAX_EXTENSION => {
                Self::Extension { value, seen: seen + 1 }
            }
            (Self::Extension { .. }, _) => return bad,
            (Self::SizeLf { value: 0 }, b'\n') => Self::TrailerStart { seen: 0 },
            (Self::SizeLf { value }, b'\n') => Self::Data { left: value },
            (Self::DataCr, b'\r') => Self::DataLf,
            (Self::DataLf, b'\n') => Self::Size { digits: 0, value: 0 },
            (Self::TrailerStart { .. }, b'\r') => Self::EndLf,
            (Self::TrailerStart { seen }, b) if is_token(b) => {
                Self::TrailerName { seen: seen + 1, name: [b, 0, 0, 0, 0, 0, 0, 0], len: 1 }
            }
            (Self::TrailerName { seen, name, len }, b':') if !is_reserved(&name[..usize::from(len)]) => {
                Self::TrailerValue { seen }
            }
            (Self::TrailerName { seen, mut name, len }, b) if is_token(b) && seen < MAX_TRAILERS => {
                let next = len.min(7);
                if len <= 7 {
                    name[usize::from(next)] = b;
                }
                Self::TrailerName { seen: seen + 1, name, len: (len + 1).min(8) }
            }
            (Self::TrailerValue { seen }, b'\r') => Self::TrailerLf { seen },
            (Self::TrailerValue { seen }, b) if (b >= b' ' || b == b'\t') && b != 0x7f && seen < MAX_TRAILERS => {
                Self::TrailerValue { seen: seen + 1 }
            }
            (Self::TrailerLf { seen }, b'\n') => Self::TrailerStart { seen },
            (Self::EndLf, b'\n') => return Ok(None),
            (
                Self::SizeLf { .. }
                | Self::Data { .. }
                | Self::DataCr
                | Self::DataLf
                | Self::TrailerStart { .. }
                | Self::TrailerName { .. }
                | Self::TrailerValue { .. }
                | Self::TrailerLf { .. }
                | Self::EndLf,
                _,
            ) => return bad,
        }))
    }
}

/// 2^60 bytes and more are no chunk.
const MAX_DIGITS: u8 = 15;
const MAX_EXTENSION: u16 = 4 << 10;
const MAX_TRAILERS: u16 = 16 << 10;
