//! Who may be spoken to in plaintext though discovery names an identity: the experimental mode `--tls=optional` only.
//!
//! A proxy of that mode fails open: without material of its own, or after a handshake that came to nothing, it sends
//! plaintext with the reason `fail_open`, and tries TLS again after a while. A proxy of the default mode never does, but
//! for identities of that mode when it cannot verify them, which only happens while they are being migrated.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mantle_proxy_core::model::Endpoint;
use mantle_proxy_core::reasons::Unroutable;
use tokio::time::Instant;

use crate::config::IdentityConfig;
use crate::tls::Credentials;

/// How long an endpoint that refused TLS is spoken to in plaintext before TLS is tried again.
const AGAIN: Duration = Duration::from_secs(30);

/// Endpoints remembered; the oldest make room.
const MOST: usize = 4096;

/// One data thread's memory of who refused TLS.
pub(crate) struct FailOpen {
    mode: Mode,
    refused: RefCell<HashMap<(SocketAddr, Arc<str>), Instant>>,
}

enum Mode {
    /// The default: never.
    Closed,
    /// A proxy of the experimental mode: anybody.
    Optional,
    /// A default proxy during a migration: identities that end in this.
    Migrating(Arc<str>),
}

impl FailOpen {
    pub(crate) fn new(config: &IdentityConfig) -> Self {
        let mode = match (&config.files, &config.migration) {
            (Some(_), _) => Mode::Optional,
            (None, Some(migration)) => Mode::Migrating(migration.suffix.clone()),
            (None, None) => Mode::Closed,
        };
        Self { mode, refused: RefCell::default() }
    }

    /// Whether this can matter at all: asked for each request, so it is one comparison in the default mode.
    pub(crate) fn is_possible(&self) -> bool {
        !matches!(self.mode, Mode::Closed)
    }

    /// Whether the proxy serves without a certificate.
    pub(crate) fn without_certificate(&self) -> bool {
        matches!(self.mode, Mode::Optional)
    }

    /// Whether `endpoint` is to be sent plaintext now.
    pub(crate) fn applies(&self, endpoint: &Endpoint, credentials: Option<&Credentials>, now: SystemTime) -> bool {
        let Some(identity) = self.may(endpoint) else { return false };
        let usable = match &self.mode {
            Mode::Closed => return false,
            Mode::Optional => credentials.is_some_and(|own| own.not_after > now),
            Mode::Migrating(_) => {
                credentials.is_some_and(|own| own.also.as_ref().is_some_and(|names| names.admit(identity)))
            }
        };
        !usable || self.has_refused(endpoint.addr, identity)
    }

    /// Takes note that TLS with `endpoint` came to nothing. Returns whether plaintext may be tried instead.
    pub(crate) fn note(&self, endpoint: &Endpoint, why: Unroutable) -> bool {
        let Some(identity) = self.may(endpoint) else { return false };
        match why {
            Unroutable::TlsFailed | Unroutable::IdentityMismatch | Unroutable::UnsupportedPeer => {}
            Unroutable::DiscoveryUnavailable
            | Unroutable::NoEndpoints
            | Unroutable::InvalidPolicy
            | Unroutable::InvalidIdentity
            | Unroutable::ConnectFailed
            | Unroutable::Loop => return false,
        }
        let mut refused = self.refused.borrow_mut();
        if refused.len() >= MOST {
            refused.retain(|_, at| at.elapsed() < AGAIN);
            if refused.len() >= MOST {
                refused.clear();
            }
        }
        tracing::warn!(endpoint = %endpoint.addr, %identity, reason = why.label(), "no TLS with this peer: plaintext for now");
        refused.insert((endpoint.addr, identity.clone()), Instant::now());
        true
    }

    /// The identity of an endpoint with which this proxy may fail open.
    fn may<'a>(&self, endpoint: &'a Endpoint) -> Option<&'a Arc<str>> {
        let identity = endpoint.tls.as_ref().ok()?;
        match &self.mode {
            Mode::Closed => None,
            Mode::Optional => Some(identity),
            Mode::Migrating(suffix) => identity.ends_with(&**suffix).then_some(identity),
        }
    }

    fn has_refused(&self, addr: SocketAddr, identity: &Arc<str>) -> bool {
        self.refused.borrow().get(&(addr, identity.clone())).is_some_and(|at| at.elapsed() < AGAIN)
    }
}

#[cfg(test)]
mod tests;
