//! What an original destination means, and what a port of this pod accepts: the control plane's answers as watches.
//!
//! Lives on the control thread. The data threads hold a `Discovery` handle, ask once per new destination and keep the
//! watch; the wire's messages become `core::model` values here and nowhere else.

use std::sync::Arc;

use mantle_proxy_core::model::{Endpoint, Outbound, ServerPolicy};
use mantle_proxy_core::reasons::Unroutable;
use tokio::sync::watch;

/// A destination's meaning, live. Dropping the last clone ends the streams behind it after the idle time.
#[derive(Clone)]
pub(crate) struct Target {
    pub(crate) outbound: watch::Receiver<Result<Arc<Outbound>, Unroutable>>,
    /// The endpoints when `outbound` says `Balance`: `None` until the first answer.
    pub(crate) endpoints: watch::Receiver<Option<Arc<[Arc<Endpoint>]>>>,
}

/// A port's policy, live: never empty, the default policy stands until the first answer.
pub(crate) type PortPolicy = watch::Receiver<Arc<ServerPolicy>>;
