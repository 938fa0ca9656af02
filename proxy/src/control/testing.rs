//! A control plane for tests: each call is handed to the test, which answers it as it likes.
//!
//! In memory (`Plane::channels`, for virtual time) or behind a real listener with or without TLS (`serve`).

use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::{Request, Response};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use linkerd2_proxy_api::destination::destination_server::{Destination, DestinationServer};
use linkerd2_proxy_api::destination::{DestinationProfile, GetDestination, Update};
use linkerd2_proxy_api::identity::identity_server::{Identity, IdentityServer};
use linkerd2_proxy_api::identity::{CertifyRequest, CertifyResponse};
use linkerd2_proxy_api::inbound::inbound_server_policies_server::{InboundServerPolicies, InboundServerPoliciesServer};
use linkerd2_proxy_api::inbound::{PortSpec, Server};
use linkerd2_proxy_api::outbound::outbound_policies_server::{OutboundPolicies, OutboundPoliciesServer};
use linkerd2_proxy_api::outbound::{OutboundPolicy, TrafficSpec};
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::{Mutex, mpsc, oneshot};
use tokio_rustls::TlsAcceptor;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::codegen::tokio_stream::Stream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

/// Calls as they arrive. `A` is a message for a unary call, `Answers<T>` for a stream.
pub(crate) struct Calls<Q, A>(Mutex<mpsc::UnboundedReceiver<Call<Q, A>>>);

/// One call, still unanswered.
pub(crate) struct Call<Q, A> {
    pub(crate) request: Q,
    /// The peer's identity as `mantle-test-client` (set by `serve`), empty without TLS or certificate.
    pub(crate) client: String,
    answer: oneshot::Sender<Result<A, Status>>,
}

type Sender<Q, A> = mpsc::UnboundedSender<Call<Q, A>>;

/// A stream's messages.
pub(crate) struct Answers<T>(mpsc::UnboundedReceiver<Result<T, Status>>);

impl<T> Stream for Answers<T> {
    type Item = Result<T, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(cx)
    }
}

impl<Q, A> Calls<Q, A> {
    fn new() -> (Sender<Q, A>, Self) {
        let (tx, rx) = mpsc::unbounded_channel();
        (tx, Self(Mutex::new(rx)))
    }

    /// The next call of this kind.
    pub(crate) async fn next(&self) -> Call<Q, A> {
        self.0.lock().await.recv().await.expect("the plane is there")
    }

    /// The next call, if there is one already.
    pub(crate) async fn ready(&self) -> Option<Call<Q, A>> {
        let mut calls = self.0.lock().await;
        poll_fn(|cx| match calls.poll_recv(cx) {
            Poll::Ready(call) => Poll::Ready(call),
            Poll::Pending => Poll::Ready(None),
        })
        .await
    }
}

impl<Q, A> Call<Q, A> {
    pub(crate) fn answer(self, answer: A) {
        let _ = self.answer.send(Ok(answer));
    }

    pub(crate) fn refuse(self, code: Code) {
        let _ = self.answer.send(Err(Status::new(code, "a test's refusal")));
    }
}

impl<Q, T> Call<Q, Answers<T>> {
    /// Opens the stream; what is sent arrives, dropping the sender ends it.
    pub(crate) fn stream(self) -> mpsc::UnboundedSender<Result<T, Status>> {
        let (tx, rx) = mpsc::unbounded_channel();
        self.answer(Answers(rx));
        tx
    }
}

/// What the tests answer.
pub(crate) struct Plane {
    pub(crate) certify: Calls<CertifyRequest, CertifyResponse>,
    pub(crate) profile: Calls<GetDestination, Answers<DestinationProfile>>,
    pub(crate) get: Calls<GetDestination, Answers<Update>>,
    pub(crate) outbound: Calls<TrafficSpec, Answers<OutboundPolicy>>,
    pub(crate) inbound: Calls<PortSpec, Answers<Server>>,
    services: Services,
}

#[derive(Clone)]
struct Services {
    identity: IdentityServer<Asked>,
    destination: DestinationServer<Asked>,
    outbound: OutboundPoliciesServer<Asked>,
    inbound: InboundServerPoliciesServer<Asked>,
}

#[derive(Clone)]
struct Asked {
    certify: Sender<CertifyRequest, CertifyResponse>,
    profile: Sender<GetDestination, Answers<DestinationProfile>>,
    get: Sender<GetDestination, Answers<Update>>,
    outbound: Sender<TrafficSpec, Answers<OutboundPolicy>>,
    inbound: Sender<PortSpec, Answers<Server>>,
}

impl Plane {
    pub(crate) fn new() -> Self {
        let (certify_tx, certify) = Calls::new();
        let (profile_tx, profile) = Calls::new();
        let (get_tx, get) = Calls::new();
        let (outbound_tx, outbound) = Calls::new();
        let (inbound_tx, inbound) = Calls::new();
        let asked =
            Asked { certify: certify_tx, profile: profile_tx, get: get_tx, outbound: outbound_tx, inbound: inbound_tx };
        let services = Services {
            identity: IdentityServer::new(asked.clone()),
            destination: DestinationServer::new(asked.clone()),
            outbound: OutboundPoliciesServer::new(asked.clone()),
            inbound: InboundServerPoliciesServer::new(asked),
        };
        Self { certify, profile, get, outbound, inbound, services }
    }

    /// Makes channels to this plane that live in memory.
    pub(crate) fn channels(&self) -> impl Fn() -> Channel + Send + Sync + 'static {
        let services = self.services.clone();
        move || {
            let services = services.clone();
            Endpoint::from_static("http://plane").connect_with_connector_lazy(tower::service_fn(move |_| {
                let (ours, theirs) = tokio::io::duplex(64 * 1024);
                tokio::spawn(http2(theirs, services.clone(), String::new()));
                async move { Ok::<_, io::Error>(TokioIo::new(ours)) }
            }))
        }
    }

    /// Serves on `listener` until the task is aborted, which ends every connection too.
    pub(crate) fn serve(&self, listener: TcpListener, tls: Option<Arc<ServerConfig>>) -> tokio::task::JoinHandle<()> {
        let services = self.services.clone();
        tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let (io, _) = listener.accept().await.expect("accept");
                let (services, tls) = (services.clone(), tls.clone());
                connections.spawn(async move {
                    let Some(tls) = tls else { return http2(io, services, String::new()).await };
                    let Ok(io) = TlsAcceptor::from(tls).accept(io).await else { return };
                    let leaf = io.get_ref().1.peer_certificates().and_then(|chain| crate::tls::peer_id(&chain[0]));
                    let client = leaf.map(|id| id.dns.to_string()).unwrap_or_default();
                    http2(io, services, client).await;
                });
            }
        })
    }
}

async fn http2(io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, services: Services, client: String) {
    let serve = hyper::service::service_fn(move |mut request: Request<Incoming>| {
        request.headers_mut().insert("mantle-test-client", client.parse().expect("a header"));
        let mut services = services.clone();
        async move { Ok::<_, Infallible>(services.call(request).await) }
    });
    let _ =
        hyper::server::conn::http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(io), serve).await;
}

impl Services {
    async fn call(&mut self, request: Request<Incoming>) -> Response<Body> {
        let path = request.uri().path();
        let response = if path.starts_with("/io.linkerd.proxy.identity.") {
            self.identity.call(request).await
        } else if path.starts_with("/io.linkerd.proxy.destination.") {
            self.destination.call(request).await
        } else if path.starts_with("/io.linkerd.proxy.outbound.") {
            self.outbound.call(request).await
        } else {
            self.inbound.call(request).await
        };
        response.unwrap_or_else(|never| match never {})
    }
}

async fn ask<Q, A>(calls: &Sender<Q, A>, request: tonic::Request<Q>) -> Result<tonic::Response<A>, Status> {
    let (answer, answered) = oneshot::channel();
    let client =
        request.metadata().get("mantle-test-client").and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
    let _ = calls.send(Call { request: request.into_inner(), client, answer });
    answered.await.unwrap_or_else(|_| Err(Status::unavailable("the test dropped the call"))).map(tonic::Response::new)
}

#[tonic::async_trait]
impl Identity for Asked {
    async fn certify(
        &self,
        request: tonic::Request<CertifyRequest>,
    ) -> Result<tonic::Response<CertifyResponse>, Status> {
        ask(&self.certify, request).await
    }
}

#[tonic::async_trait]
impl Destination for Asked {
    type GetStream = Answers<Update>;
    type GetProfileStream = Answers<DestinationProfile>;

    async fn get(&self, request: tonic::Request<GetDestination>) -> Result<tonic::Response<Answers<Update>>, Status> {
        ask(&self.get, request).await
    }

    async fn get_profile(
        &self,
        request: tonic::Request<GetDestination>,
    ) -> Result<tonic::Response<Answers<DestinationProfile>>, Status> {
        ask(&self.profile, request).await
    }
}

#[tonic::async_trait]
impl OutboundPolicies for Asked {
    type WatchStream = Answers<OutboundPolicy>;

    async fn get(&self, _: tonic::Request<TrafficSpec>) -> Result<tonic::Response<OutboundPolicy>, Status> {
        Err(Status::unimplemented("proxies watch"))
    }

    async fn watch(
        &self,
        request: tonic::Request<TrafficSpec>,
    ) -> Result<tonic::Response<Answers<OutboundPolicy>>, Status> {
        ask(&self.outbound, request).await
    }
}

#[tonic::async_trait]
impl InboundServerPolicies for Asked {
    type WatchPortStream = Answers<Server>;

    async fn get_port(&self, _: tonic::Request<PortSpec>) -> Result<tonic::Response<Server>, Status> {
        Err(Status::unimplemented("proxies watch"))
    }

    async fn watch_port(&self, request: tonic::Request<PortSpec>) -> Result<tonic::Response<Answers<Server>>, Status> {
        ask(&self.inbound, request).await
    }
}
