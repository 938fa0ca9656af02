//! The streams behind an answer: opened once there is a certificate, opened again with back-off for ever, and turned
//! into the values that `discovery.rs` shares.
//!
//! A stream's last word stands while it is away. A refusal that says "not mine" is an answer, asked again after a while.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use linkerd2_proxy_api::destination::{self as pb, GetDestination, update::Update};
use linkerd2_proxy_api::inbound::PortSpec;
use linkerd2_proxy_api::outbound::{TrafficSpec, traffic_spec};
use mantle_proxy_core::model::{Backend, Endpoint, Outbound, ServerPolicy};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tonic::codegen::BoxFuture;
use tonic::{Code, Response, Status, Streaming};

use super::convert::{self, PolicyAnswer, ProfileAnswer};
use super::{Answer, Clients, Endpoints};
use crate::control::backoff;
use crate::metrics::Http;
use crate::record;
use crate::tls::CredentialsWatch;

/// Whom to ask, and as whom.
#[derive(Clone)]
pub(super) struct Source {
    pub(super) clients: Arc<Clients>,
    /// Whose first certificate is waited for, if anybody's.
    pub(super) credentials: Option<CredentialsWatch>,
    pub(super) workload: String,
    pub(super) context: String,
    pub(super) with_profile: bool,
}

/// How long a new stream may be silent before it is opened again.
const FIRST_MESSAGE: Duration = Duration::from_secs(10);

/// How long after "not mine" the same question is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(60);

/// Keeps `outbound` and `endpoints` true of `dst` until aborted.
pub(super) async fn target(
    mut source: Source,
    dst: SocketAddr,
    outbound: watch::Sender<Answer>,
    endpoints: watch::Sender<Endpoints>,
) {
    if !certified(source.credentials.as_mut()).await {
        return;
    }
    let (policy_tx, mut policy) = watch::channel(PolicyAnswer::Pending);
    let no_profile = if source.with_profile { ProfileAnswer::Pending } else { ProfileAnswer::None };
    let (profile_tx, mut profile) = watch::channel(no_profile);
    let merge = async {
        let mut following: Option<(Arc<str>, Following)> = None;
        loop {
            let merged = convert::merge(dst, &profile.borrow_and_update(), &policy.borrow_and_update());
            if let Some(answer) = merged {
                let path = answer.as_ref().ok().and_then(|outbound| balanced(outbound));
                if following.as_ref().map(|(path, _)| path) != path.as_ref() {
                    drop(following.take());
                    endpoints.send_if_modified(|now| now.take().is_some());
                    following = path.map(|path| {
                        let task = tokio::spawn(follow_endpoints(source.clone(), path.clone(), endpoints.clone()));
                        (path, Following(task))
                    });
                }
                outbound.send_if_modified(|now| {
                    let changed = *now != answer;
                    *now = answer;
                    changed
                });
            }
            let changed = tokio::select! {
                changed = policy.changed() => changed,
                changed = profile.changed() => changed,
            };
            if changed.is_err() {
                return;
            }
        }
    };
    tokio::join!(follow_policy(&source, dst, policy_tx), follow_profile(&source, dst, profile_tx), merge);
}

/// Keeps `policy` true of this pod's `port` until aborted.
pub(super) async fn port(
    clients: Arc<Clients>,
    mut credentials: Option<CredentialsWatch>,
    workload: String,
    port: u16,
    policy: watch::Sender<Option<Arc<ServerPolicy>>>,
) {
    if !certified(credentials.as_mut()).await {
        return;
    }
    let ask = || {
        let (mut client, request) =
            (clients.inbound.clone(), PortSpec { workload: workload.clone(), port: u32::from(port) });
        asking(async move { client.watch_port(request).await })
    };
    // "Not mine" leaves what stands: the default policy of a listed port, nothing for any other.
    let refused = |status: &Status| matches!(status.code(), Code::InvalidArgument | Code::FailedPrecondition);
    follow(&clients.policy_service, ask, refused, |event| {
        let Event::Message(message) = event else { return };
        let server = convert::server(message).unwrap_or_else(|why| {
            tracing::error!(port, %why, "the control plane sent a policy that cannot be used; the port admits nobody");
            convert::closed_server()
        });
        policy.send_if_modified(|now| {
            let changed = now.as_deref() != Some(&server);
            if changed {
                *now = Some(Arc::new(server));
            }
            changed
        });
    })
    .await;
}

/// Waits for the first certificate, where there is one to wait for; false if there never will be one.
async fn certified(credentials: Option<&mut CredentialsWatch>) -> bool {
    match credentials {
        Some(credentials) => credentials.wait_for(Option::is_some).await.is_ok(),
        None => true,
    }
}

async fn follow_policy(source: &Source, dst: SocketAddr, answer: watch::Sender<PolicyAnswer>) {
    let ask = || {
        let target = Some(traffic_spec::Target::Addr(dst.into()));
        let request = TrafficSpec { source_workload: source.workload.clone(), target };
        let mut client = source.clients.outbound.clone();
        asking(async move { client.watch(request).await })
    };
    let refused = |status: &Status| match status.code() {
        Code::NotFound | Code::Unimplemented => {
            answer.send_replace(PolicyAnswer::NotFound);
            true
        }
        Code::InvalidArgument | Code::FailedPrecondition => {
            tracing::warn!(%dst, status = status.message(), "the control plane refuses the destination");
            answer.send_replace(PolicyAnswer::Invalid);
            true
        }
        _ => false,
    };
    follow(&source.clients.policy_service, ask, refused, |event| {
        let Event::Message(message) = event else { return };
        answer.send_replace(match convert::policy(message) {
            Ok(policy) => PolicyAnswer::Policy(policy),
            Err(why) => {
                tracing::error!(%dst, %why, "the control plane sent a policy that cannot be used");
                PolicyAnswer::Invalid
            }
        });
    })
    .await;
}

async fn follow_profile(source: &Source, dst: SocketAddr, answer: watch::Sender<ProfileAnswer>) {
    if !source.with_profile {
        // `answer` stays as it is: dropping it would say that the question is over.
        return std::future::pending().await;
    }
    let ask = || {
        let request = get(dst.to_string(), source);
        let mut client = source.clients.destination.clone();
        asking(async move { client.get_profile(request).await })
    };
    let refused = |status: &Status| {
        let none = matches!(
            status.code(),
            Code::InvalidArgument | Code::FailedPrecondition | Code::NotFound | Code::Unimplemented
        );
        if none {
            answer.send_replace(ProfileAnswer::None);
        }
        none
    };
    follow(&source.clients.destination_service, ask, refused, |event| {
        if let Event::Message(message) = event {
            answer.send_replace(ProfileAnswer::Profile(convert::profile(message)));
        }
    })
    .await;
}

/// Keeps `endpoints` true of `path` until aborted. The first set of a stream replaces all, later ones are deltas.
async fn follow_endpoints(source: Source, path: Arc<str>, endpoints: watch::Sender<Endpoints>) {
    let ask = || {
        let request = get(path.to_string(), &source);
        let mut client = source.clients.destination.clone();
        asking(async move { client.get(request).await })
    };
    let refused = |status: &Status| {
        let refused = matches!(status.code(), Code::InvalidArgument | Code::FailedPrecondition);
        if refused {
            tracing::warn!(%path, status = status.message(), "the control plane refuses the service");
            endpoints.send_if_modified(|now| now.is_none() && now.replace(Arc::from([])).is_none());
        }
        refused
    };
    let mut known: BTreeMap<SocketAddr, Arc<Endpoint>> = BTreeMap::new();
    let mut fresh = true;
    follow(&source.clients.destination_service, ask, refused, |event| {
        match event {
            Event::Opened => {
                fresh = true;
                return;
            }
            Event::Message(pb::Update { update: Some(update) }) => {
                if !apply(&mut known, &mut fresh, update) {
                    return;
                }
            }
            Event::Message(pb::Update { update: None }) => return,
        }
        let all: Arc<[Arc<Endpoint>]> = known.values().cloned().collect();
        endpoints.send_if_modified(|now| {
            let changed = now.as_ref() != Some(&all);
            *now = Some(all);
            changed
        });
    })
    .await;
}

fn get(path: String, source: &Source) -> GetDestination {
    GetDestination { scheme: "k8s".to_owned(), path, context_token: source.context.clone() }
}

/// One update of `Destination.Get`; `false`: it says nothing.
fn apply(known: &mut BTreeMap<SocketAddr, Arc<Endpoint>>, fresh: &mut bool, update: Update) -> bool {
    match update {
        Update::Add(set) => {
            if std::mem::take(fresh) {
                known.clear();
            }
            for endpoint in convert::endpoints(set) {
                known.insert(endpoint.addr, Arc::new(endpoint));
            }
            true
        }
        Update::Remove(_) if *fresh => false,
        Update::Remove(set) => {
            for addr in set.addrs.into_iter().filter_map(|addr| SocketAddr::try_from(addr).ok()) {
                known.remove(&addr);
            }
            true
        }
        Update::NoEndpoints(_) => {
            *fresh = false;
            known.clear();
            true
        }
    }
}

fn balanced(outbound: &Outbound) -> Option<Arc<str>> {
    match &outbound.backend {
        Backend::Balance { path } => Some(path.clone()),
        Backend::Forward(_) => None,
    }
}

type Asking<T> = BoxFuture<Streaming<T>, Status>;

fn asking<T: 'static>(
    call: impl Future<Output = Result<Response<Streaming<T>>, Status>> + Send + 'static,
) -> Asking<T> {
    Box::pin(async move { call.await.map(Response::into_inner) })
}

enum Event<T> {
    /// A new stream: the next message is the first of it.
    Opened,
    Message(T),
}

/// A service that does not answer, told once for all its streams: after `PATIENCE`, and when it is back.
pub(super) struct Service {
    name: &'static str,
    /// Counts our calls to it.
    calls: Arc<Http>,
    /// Since when nobody got an answer, and whether that was said.
    silent: Mutex<Option<(Instant, bool)>>,
}

/// How long a service may be away before it is worth a warning: at a mesh's start everything is, for a moment.
const PATIENCE: Duration = Duration::from_secs(5);

impl Service {
    pub(super) fn new(name: &'static str, calls: Arc<Http>) -> Self {
        Self { name, calls, silent: Mutex::new(None) }
    }

    fn answered(&self) {
        if let Some((since, true)) = super::lock(&self.silent).take() {
            tracing::info!(service = self.name, after = ?since.elapsed(), "the control plane answers again");
        }
    }

    fn failed(&self, status: &Status) {
        let mut silent = super::lock(&self.silent);
        let (since, said) = silent.get_or_insert_with(|| (Instant::now(), false));
        if !*said && since.elapsed() >= PATIENCE {
            *said = true;
            let (code, status) = (status.code(), status.message());
            tracing::warn!(
                service = self.name,
                ?code,
                status,
                "the control plane does not answer; what it said last stands"
            );
        }
    }
}

/// Opens a stream with `ask`, hands on what it says, and does so again for ever. `refused` says whether a status is an
/// answer in itself, which is asked for again only after `ASK_AGAIN`.
async fn follow<T>(
    service: &Service,
    ask: impl Fn() -> Asking<T>,
    refused: impl Fn(&Status) -> bool,
    mut each: impl FnMut(Event<T>),
) {
    let mut failures = 0;
    loop {
        let mut heard = false;
        let mut call = record::Request::begin(service.calls.clone(), None);
        let status = read(&ask, |event| {
            if matches!(event, Event::Opened) {
                call.response(200, &|_| {});
            }
            if matches!(event, Event::Message(_)) {
                heard = true;
                service.answered();
            }
            each(event);
        })
        .await;
        call.grpc_status(status.as_ref().map_or_else(|status| status.code() as u8, |()| 0));
        call.end(false);
        if heard {
            failures = 0;
        }
        let wait = match status {
            Err(status) if refused(&status) => {
                service.answered();
                ASK_AGAIN.mul_f64(0.8 + 0.4 * backoff::unit())
            }
            // An orderly end is how a control plane sheds load: come again, not at once.
            Ok(()) => {
                failures += 1;
                backoff::wait(failures)
            }
            Err(status) => {
                // "Not found" is no silence: a port's policy may be asked for before the control plane knows the pod.
                if status.code() != Code::NotFound {
                    service.failed(&status);
                }
                failures += 1;
                backoff::wait(failures)
            }
        };
        tokio::time::sleep(wait).await;
    }
}

/// One stream, from its opening to its end.
async fn read<T>(ask: &impl Fn() -> Asking<T>, mut each: impl FnMut(Event<T>)) -> Result<(), Status> {
    let first = async {
        let mut stream = ask().await?;
        each(Event::Opened);
        let first = stream.message().await?;
        Ok::<_, Status>((stream, first))
    };
    let (mut stream, mut message) = match tokio::time::timeout(FIRST_MESSAGE, first).await {
        Ok(opened) => opened?,
        Err(_) => return Err(Status::deadline_exceeded("no first message")),
    };
    while let Some(value) = message {
        each(Event::Message(value));
        message = stream.message().await?;
    }
    Ok(())
}

/// A task that ends when this is dropped.
struct Following(JoinHandle<()>);

impl Drop for Following {
    fn drop(&mut self) {
        self.0.abort();
    }
}
