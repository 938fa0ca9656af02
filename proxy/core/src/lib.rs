//! Mantle's protocol and decision code: bytes and snapshots in, events and values out.
//!
//! Nothing here performs I/O, reads a clock or draws randomness: time, random numbers and bytes are
//! arguments. `clippy.toml` bans what would break that. The rim (`../src`) carries out what is decided here.

pub mod balance;
pub mod client_hello;
pub mod detect;
pub mod escape;
pub mod http1;
pub mod model;
pub mod mux;
pub mod policy;
pub mod reasons;
pub mod renew;
pub mod route;
pub mod tapmatch;
#[cfg(test)]
mod testing;
