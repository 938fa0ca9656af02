//! The control thread: identity, discovery, policy, admin and tap on one runtime of their own, beside the data threads.
//!
//! The only wiring of these parts. Everything the data threads get is in `Control`; nothing here touches their traffic.

pub(crate) mod backoff;
pub(crate) mod client;
pub(crate) mod slots;
#[cfg(test)]
pub(crate) mod testing;

use std::io;
use std::sync::Arc;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tracing_subscriber::Layer as _;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::config::{Config, ControlAddr, LogFormat};
use crate::control::client::ClientTls;
use crate::discovery::{Clients, Discovery};
use crate::drain::{Drain, Shutdown};
use crate::edges::Edges;
use crate::metrics::Metrics;
use crate::socket::{self, Dial};
use crate::tap::Taps;
use crate::tls::{CredentialsWatch, Trust};
use crate::{admin, identity, tap};

/// What the data threads get from the control thread.
#[derive(Clone)]
pub(crate) struct Control {
    pub(crate) credentials: CredentialsWatch,
    pub(crate) discovery: Discovery,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) taps: Arc<Taps>,
    pub(crate) edges: Arc<Edges>,
}

/// Binds the admin and tap ports and starts the control thread, which lives until `drain` is over.
///
/// # Errors
/// A port is taken, a trust root is not usable, or the thread could not be made.
pub(crate) fn start(config: Arc<Config>, shutdown: Shutdown, mut drain: Drain) -> io::Result<Control> {
    let trust = Trust::new(&config.identity.trust_anchors).map_err(io::Error::other)?;
    let bind = |addr, what| {
        socket::listen(addr, false).map_err(|why| io::Error::new(why.kind(), format!("{what} port {addr}: {why}")))
    };
    let admin_listener = bind(config.admin_listen, "admin")?;
    let tap_listener = config.tap_svc_name.is_some().then(|| bind(config.control_listen, "tap")).transpose()?;

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(16).build()?;
    let files = config.identity.files.as_ref();
    let at_start = files.and_then(|from| identity::files::first(from, &config.identity.local_name, &trust));
    let (credentials_tx, credentials) = watch::channel(at_start);
    let (metrics, taps, edges) = (Arc::new(Metrics::new()), Arc::new(Taps::default()), Arc::new(Edges::default()));
    let discovery = {
        // The experimental mode's certificate is nothing to the control plane: it is asked without one, and at once.
        let shown = match files {
            Some(_) => ClientTls::Fixed(trust.anonymous_client()),
            None => ClientTls::Identity(credentials.clone()),
        };
        let (own, ready, counted) = (config.clone(), files.is_none().then(|| credentials.clone()), metrics.clone());
        let connect = move || clients(&own, &shown, &counted);
        Discovery::start(config.clone(), runtime.handle().clone(), connect, ready)
    };
    let control = Control { credentials, discovery, metrics, taps, edges };

    let parts = control.clone();
    std::thread::Builder::new().name("control".to_owned()).spawn(move || {
        runtime.block_on(async move {
            tokio::spawn(identity::run(config.clone(), trust, credentials_tx, parts.metrics.clone()));
            if let (Some(listener), Some(name)) = (tap_listener, config.tap_svc_name.clone()) {
                let listener = TcpListener::from_std(listener).expect("a listening, non-blocking socket");
                tokio::spawn(tap::serve(
                    listener,
                    name,
                    parts.credentials.clone(),
                    parts.taps.clone(),
                    parts.edges.clone(),
                ));
            }
            let listener = TcpListener::from_std(admin_listener).expect("a listening, non-blocking socket");
            let admin = admin::Admin {
                metrics: parts.metrics.clone(),
                credentials: parts.credentials.clone(),
                fails_open: config.identity.files.is_some(),
                drain: drain.clone(),
                shutdown: config.shutdown_endpoint.then_some(shutdown),
            };
            tokio::spawn(admin::serve(listener, Arc::new(admin)));
            drain.over().await;
        });
    })?;
    Ok(control)
}

fn clients(config: &Config, shown: &ClientTls, metrics: &Metrics) -> Clients {
    let dial = Dial { mark: config.outbound_mark, timeout: config.outbound_connect_timeout };
    let channel = |addr: &ControlAddr| {
        let channel = client::channel(addr, shown.clone(), dial);
        (channel, metrics.control(&client::labels(addr)))
    };
    Clients::new(channel(&config.destination), channel(&config.policy))
}

/// Installs the log: plain lines or JSON on standard error, with the levels of `MANTLE_PROXY_LOG`. Once per process.
pub(crate) fn init_log(config: &Config) {
    let lines = tracing_subscriber::fmt::layer().with_writer(io::stderr);
    let registry = tracing_subscriber::registry();
    // A second call, as tests make it, leaves the first one's log.
    let _ = match config.log_format {
        LogFormat::Plain => registry.with(lines.with_ansi(false).with_filter(config.log.clone())).try_init(),
        LogFormat::Json => registry.with(lines.json().with_filter(config.log.clone())).try_init(),
    };
}

#[cfg(test)]
mod tests;
