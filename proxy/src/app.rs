//! The wiring: every thread, socket and channel of the process is made here, in reading order, and passed by argument.
//!
//! One control thread (identity, discovery, admin, tap) beside one or more data threads (tokio `current_thread`, their
//! own listeners). Sockets are bound at start; serving begins when the first certificate is there.

use std::cell::Cell;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use mantle_proxy_core::reasons::{Unroutable, Unserved};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{LocalSet, spawn_local};

use crate::config::{Config, EXIT_BAD_CONFIG};
use crate::control::{self, Control};
use crate::drain::{self, Active, Drain, Shutdown};
use crate::fail_open::FailOpen;
use crate::inbound::Inbound;
use crate::link::Links;
use crate::metrics::{Direction, Layer};
use crate::outbound::Outbound;
use crate::socket::{self, Dial};
use crate::tls::Credentials;

/// What one data thread knows; shared by its connections.
pub(crate) struct Thread {
    pub(crate) config: Arc<Config>,
    pub(crate) control: Control,
    pub(crate) links: Links,
    pub(crate) active: Active,
    pub(crate) drain: Drain,
    pub(crate) random: Random,
    pub(crate) fail_open: FailOpen,
    /// Where a redirected connection wanted to go: `socket::original_dst`, or a test's answer.
    pub(crate) original_dst: OriginalDst,
    /// The ports that the proxy itself listens on: never dialled, never a stream's target.
    pub(crate) own_ports: [u16; 4],
}

pub(crate) type OriginalDst = fn(&TcpStream) -> io::Result<SocketAddr>;

/// Runs the proxy until it is told to end. `env` reads one environment variable.
pub(crate) fn run(env: impl Fn(&str) -> Option<String>) -> ExitCode {
    socket::no_huge_pages();
    let config = match Config::load(env) {
        Ok(config) => Arc::new(config),
        Err(errors) => {
            eprint!("{errors}");
            return ExitCode::from(EXIT_BAD_CONFIG);
        }
    };
    control::init_log(&config);
    if let Err(error) = socket::raise_file_limit() {
        tracing::warn!(%error, "the limit of open files could not be raised");
    }
    match serve(config, socket::original_dst) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "the proxy could not start");
            ExitCode::FAILURE
        }
    }
}

/// Binds, starts the threads, and returns when all have ended.
fn serve(config: Arc<Config>, original_dst: OriginalDst) -> io::Result<()> {
    let (shutdown, drain) = drain::channel();
    let listeners = (0..config.cores).map(|_| Listeners::bind(&config)).collect::<io::Result<Vec<_>>>()?;
    let control = control::start(config.clone(), shutdown.clone(), drain.clone())?;
    let mut threads = Vec::new();
    let mut signals = Some(shutdown);
    for (n, listeners) in listeners.into_iter().enumerate() {
        let (config, control, drain, signals) = (config.clone(), control.clone(), drain.clone(), signals.take());
        let run = move || data_thread(config, control, drain, signals, listeners, original_dst);
        threads.push(std::thread::Builder::new().name(format!("data-{n}")).spawn(run)?);
    }
    threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| io::Error::other("a data thread panicked"))?)
}

/// The two redirected ports, listening: what arrives before the first certificate waits in the kernel's queue.
struct Listeners {
    outbound: std::net::TcpListener,
    inbound: std::net::TcpListener,
}

impl Listeners {
    fn bind(config: &Config) -> io::Result<Self> {
        let bind = |addr: SocketAddr, what: &str| {
            let explain = |error: io::Error| io::Error::new(error.kind(), format!("{what} address {addr}: {error}"));
            socket::listen(addr, config.cores > 1).map_err(explain)
        };
        Ok(Self {
            outbound: bind(config.outbound_listen, "outbound")?,
            inbound: bind(config.inbound_listen, "inbound")?,
        })
    }
}

/// One data thread, from its runtime to its last connection.
fn data_thread(
    config: Arc<Config>,
    control: Control,
    mut drain: Drain,
    signals: Option<Shutdown>,
    listeners: Listeners,
    original_dst: OriginalDst,
) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
    LocalSet::new().block_on(&runtime, async move {
        if let Some(shutdown) = signals {
            spawn_local(shutdown.on_signals(config.shutdown_grace));
        }
        let outbound_listener = TcpListener::from_std(listeners.outbound)?;
        let inbound_listener = TcpListener::from_std(listeners.inbound)?;
        let cx = Rc::new(Thread::new(config, control, drain.clone(), original_dst));
        let certified = cx.control.credentials.clone();
        if !cx.fail_open.without_certificate() {
            tokio::select! {
                () = first_certificate(certified) => {}
                () = drain.draining() => return Ok(()),
            }
        }

        let outbound = Rc::new(Outbound::new(cx.clone()));
        let inbound = Rc::new(Inbound::new(cx.clone()));
        spawn_local(sweep(outbound.clone(), inbound.clone()));
        spawn_local(cx.links.clone().follow(cx.control.credentials.clone()));
        let (thread, out) = (cx.clone(), outbound);
        spawn_local(async move {
            let serve = |io, peer| {
                let (out, guard) = (out.clone(), thread.active.guard());
                spawn_local(async move {
                    out.serve(io, peer).await;
                    drop(guard);
                });
            };
            socket::accept(&outbound_listener, serve, |_| thread.refuse(Direction::Outbound)).await;
        });
        let serve = |io, peer| {
            let (inbound, guard) = (inbound.clone(), cx.active.guard());
            spawn_local(async move {
                inbound.serve(io, peer).await;
                drop(guard);
            });
        };
        tokio::select! {
            () = socket::accept(&inbound_listener, serve, |_| cx.refuse(Direction::Inbound)) => {}
            () = drain.draining() => drop(inbound_listener),
        }
        // The application may need its outbound side to finish what it was asked: that one serves to the end.
        tracing::info!(open = cx.active.open(), "draining");
        tokio::select! {
            () = cx.active.idle() => {}
            () = drain.over() => {}
        }
        Ok(())
    })
}

async fn first_certificate(mut credentials: crate::tls::CredentialsWatch) {
    if credentials.wait_for(Option::is_some).await.is_err() {
        std::future::pending::<()>().await; // the control thread is gone: nothing may be served
    }
}

/// Lets go of what nothing has used for a while.
async fn sweep(outbound: Rc<Outbound>, inbound: Rc<Inbound>) {
    let mut ticks = tokio::time::interval(SWEEP);
    loop {
        ticks.tick().await;
        outbound.sweep();
        inbound.sweep();
    }
}

impl Thread {
    fn new(config: Arc<Config>, control: Control, drain: Drain, original_dst: OriginalDst) -> Self {
        let listen = [config.outbound_listen, config.inbound_listen, config.control_listen, config.admin_listen];
        let own_ports = listen.map(|addr| addr.port());
        let dial = Dial { mark: config.outbound_mark, timeout: config.outbound_connect_timeout };
        let (links, active, random) = (Links::new(dial), Active::default(), Random::new());
        let fail_open = FailOpen::new(&config.identity);
        Self { config, control, links, active, drain, random, fail_open, original_dst, own_ports }
    }

    /// The certificate in force.
    ///
    /// # Errors
    /// `TlsFailed`: there is none, so nothing can be proved.
    pub(crate) fn credentials(&self) -> Result<Arc<Credentials>, Unroutable> {
        self.control.credentials.borrow().clone().ok_or(Unroutable::TlsFailed)
    }

    /// Socket options of outbound connections.
    pub(crate) fn dial(&self) -> Dial {
        Dial { mark: self.config.outbound_mark, timeout: self.config.outbound_connect_timeout }
    }

    /// Whether `ip` is one of the pod's own addresses.
    pub(crate) fn is_own(&self, ip: IpAddr) -> bool {
        self.config.inbound_ips.contains(&ip)
    }

    fn refuse(&self, direction: Direction) {
        self.control.metrics.error(direction, Layer::Tcp, Unserved::FileLimit.label());
    }
}

/// Random numbers for load balancing (xorshift64*, with a seed of its own per thread): not for secrets.
pub(crate) struct Random(Cell<u64>);

impl Random {
    fn new() -> Self {
        // `RandomState` is seeded from the operating system, differently each time.
        let seed = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), 0);
        Self(Cell::new(seed | 1))
    }

    pub(crate) fn next(&self) -> u64 {
        let mut x = self.0.get();
        x ^= x >> 12;
        x ^= x << 25;
        x ^= x >> 27;
        self.0.set(x);
        x.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

const SWEEP: Duration = Duration::from_secs(10);
