//! Observers over the real port: who may watch, what they see, and that none of them can slow a request.

use std::net::Ipv4Addr;
use std::pin::pin;

use linkerd2_proxy_api::net;
use linkerd2_proxy_api::tap::ObserveRequest;
use linkerd2_proxy_api::tap::observe_request::{self, r#match};
use linkerd2_proxy_api::tap::tap_client::TapClient;
use mantle_proxy_core::reasons::NoTls;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::transport::Channel;
use tonic::{Code, Streaming};

use super::serve::edges_v1;
use super::*;
use crate::config::ControlAddr;
use crate::control::client::{self, ClientTls};
use crate::edges::Edges;
use crate::socket::{self, Dial};
use crate::tls::tests::{API, Ca, WEB};

const VIZ: &str = "mantle-viz.mantle.serviceaccount.identity.mantle.cluster.local";

struct Stage {
    ca: Ca,
    port: u16,
    taps: Arc<Taps>,
    edges: Arc<Edges>,
    server: tokio::task::JoinHandle<()>,
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// The tap port of a proxy named `WEB`.
fn stage() -> Stage {
    let ca = Ca::new();
    let listener = socket::listen((Ipv4Addr::LOCALHOST, 0).into(), false).expect("listen");
    let listener = TcpListener::from_std(listener).expect("listener");
    let port = listener.local_addr().expect("address").port();
    let (taps, edges) = (Arc::new(Taps::default()), Arc::new(Edges::default()));
    let (_, credentials) = watch::channel(Some(Arc::new(ca.credentials(WEB))));
    let server = tokio::spawn(serve(listener, Arc::from(VIZ), credentials, taps.clone(), edges.clone()));
    Stage { ca, port, taps, edges, server }
}

const DIAL: Dial = Dial { mark: None, timeout: Duration::from_secs(5) };

impl Stage {
    /// A client that shows `identity`'s certificate, or none in TLS, or speaks plaintext.
    fn client(&self, as_whom: As<'_>) -> Channel {
        let name = (!matches!(as_whom, As::Plaintext)).then(|| Arc::from(WEB));
        let addr = ControlAddr { host: "127.0.0.1".into(), port: self.port, name };
        let tls = match as_whom {
            As::Identity(name) => self.ca.credentials(name).client_plain,
            As::Anonymous | As::Plaintext => self.ca.trust().anonymous_client(),
        };
        client::channel(&addr, ClientTls::Fixed(tls), DIAL)
    }

    async fn observe(
        &self,
        limit: u32,
        wanted: observe_request::Match,
        headers: bool,
    ) -> Result<Streaming<TapEvent>, tonic::Status> {
        use observe_request::{Extract, extract};
        let http = extract::Http { extract: Some(extract::http::Extract::Headers(extract::http::Headers {})) };
        let extract = headers.then_some(Extract { extract: Some(extract::Extract::Http(http)) });
        let request = ObserveRequest { limit, r#match: Some(wanted), extract };
        TapClient::new(self.client(As::Identity(VIZ))).observe(request).await.map(tonic::Response::into_inner)
    }
}

#[derive(Clone, Copy)]
enum As<'a> {
    Identity(&'a str),
    Anonymous,
    Plaintext,
}

fn any() -> observe_request::Match {
    observe_request::Match { r#match: Some(r#match::Match::All(r#match::Seq { matches: Vec::new() })) }
}

fn path(prefix: &str) -> observe_request::Match {
    let text = r#match::http::StringMatch { r#match: Some(r#match::http::string_match::Match::Prefix(prefix.into())) };
    observe_request::Match {
        r#match: Some(r#match::Match::Http(r#match::Http { r#match: Some(r#match::http::Match::Path(text)) })),
    }
}

fn request<'a>(
    direction: Direction,
    tls: &'a TlsLabel,
    dst_labels: &'a Arc<[(String, String)]>,
    head: &'a Get<'a>,
) -> TapRequest<'a> {
    TapRequest {
        direction,
        src: "10.203.0.1:40000".parse().expect("address"),
        dst: "10.203.0.2:8080".parse().expect("address"),
        tls,
        dst_labels,
        head,
    }
}

/// A request for a path.
struct Get<'a>(&'a str);

impl TapHead for Get<'_> {
    fn method(&self) -> &str {
        "GET"
    }
    fn scheme(&self) -> &str {
        "http"
    }
    fn authority(&self) -> &str {
        "web-svc.shop:80"
    }
    fn path(&self) -> &str {
        self.0
    }
    fn headers(&self, visit: &mut dyn FnMut(&str, &[u8])) {
        visit("user-agent", b"test\xff");
    }
}

fn no_headers(_visit: &mut dyn FnMut(&str, &[u8])) {}

const OK: Outcome = Outcome { status: 200, grpc: None, failed: false };

async fn next(events: &mut Streaming<TapEvent>) -> (TapEvent, http::Event) {
    let event = tokio::time::timeout(Duration::from_secs(10), events.message())
        .await
        .expect("in time")
        .expect("open")
        .expect("an event");
    let Some(tap_event::Event::Http(Http { event: Some(http) })) = event.event.clone() else { panic!("{event:?}") };
    (event, http)
}

#[tokio::test]
async fn an_observer_sees_a_request_from_its_head_to_its_end() {
    let stage = stage();
    assert!(!stage.taps.active());
    let mut events = stage.observe(2, path("/api/"), true).await.expect("allowed");
    assert!(stage.taps.active());
    let (tls, labels) = (TlsLabel::Mutual(Arc::from(API)), Arc::from([("deployment".to_owned(), "web".to_owned())]));
    assert!(stage.taps.open(&request(Direction::Outbound, &tls, &labels, &Get("/other"))).is_none());

    let mut stream = stage.taps.open(&request(Direction::Outbound, &tls, &labels, &Get("/api/list"))).expect("matches");
    stream.response(200, &no_headers, Duration::from_micros(1500));
    stream.trailers(&|visit| visit("grpc-status", b"5"));
    stream.end(Outcome { grpc: Some(5), ..OK }, 321, Duration::from_millis(2), Duration::from_micros(500));

    let (event, http) = next(&mut events).await;
    assert_eq!(event.source, Some("10.203.0.1:40000".parse::<SocketAddr>().expect("address").into()));
    assert_eq!(event.destination.map(|dst| dst.port), Some(8080));
    assert_eq!(event.proxy_direction, i32::from(ProxyDirection::Outbound));
    let labels = event.destination_meta.expect("labels").labels;
    assert_eq!(
        (labels["tls"].as_str(), labels["server_id"].as_str(), labels["deployment"].as_str()),
        ("true", API, "web")
    );
    let http::Event::RequestInit(init) = http else { panic!("{http:?}") };
    let id = init.id.expect("an id");
    assert_eq!((id.base, id.stream), (0, 1));
    assert_eq!((init.method, init.scheme), (Some(method("GET")), Some(scheme("http"))));
    assert_eq!((init.authority.as_str(), init.path.as_str()), ("web-svc.shop:80", "/api/list"));
    assert_eq!(init.headers.expect("extracted").headers[0].value, b"test\xff");

    let (_, http) = next(&mut events).await;
    let http::Event::ResponseInit(response) = http else { panic!("{http:?}") };
    assert_eq!((response.id, response.http_status), (Some(id), 200));
    assert_eq!(response.since_request_init, Some(prost_types::Duration { seconds: 0, nanos: 1_500_000 }));
    let (_, http) = next(&mut events).await;
    let http::Event::ResponseEnd(end) = http else { panic!("{http:?}") };
    assert_eq!((end.id, end.response_bytes, end.eos), (Some(id), 321, Some(Eos::from_grpc_status(5))));
    let trailers = end.trailers.expect("extracted").headers;
    assert_eq!((trailers[0].name.as_str(), &trailers[0].value[..]), ("grpc-status", &b"5"[..]));

    // The second is the last: it is dropped unfinished, and the stream ends with it.
    let none = Arc::from([]);
    let tls = TlsLabel::None(NoTls::NotProvidedByRemote);
    let stream = stage.taps.open(&request(Direction::Inbound, &tls, &none, &Get("/api/vote"))).expect("matches");
    assert!(!stage.taps.active(), "the limit is reached");
    assert!(stage.taps.open(&request(Direction::Inbound, &tls, &none, &Get("/api/vote"))).is_none());
    drop(stream);
    let (event, http) = next(&mut events).await;
    assert_eq!(event.source_meta.expect("labels").labels["tls"], "not_provided_by_remote");
    assert!(event.destination_meta.expect("labels").labels.is_empty());
    let http::Event::RequestInit(init) = http else { panic!("{http:?}") };
    assert_eq!(init.id.map(|id| (id.base, id.stream)), Some((0, 2)));
    let (_, http) = next(&mut events).await;
    let http::Event::ResponseEnd(end) = http else { panic!("{http:?}") };
    assert_eq!(end.eos, Some(h2::Reason::CANCEL.into()));
    assert_eq!(events.message().await.expect("an orderly end"), None);
}

#[tokio::test]
async fn only_the_tap_service_may_watch_from_loopback_too() {
    let stage = stage();
    stage.edges.opened(Ipv4Addr::new(10, 0, 0, 9).into(), 80, &TlsLabel::None(NoTls::NotProvidedByRemote));
    for (as_whom, why) in [
        (As::Plaintext, "mutual TLS is required"),
        (As::Anonymous, "a client certificate is required"),
        (As::Identity(API), "this identity may not tap"),
    ] {
        let channel = stage.client(as_whom);
        let request = ObserveRequest { limit: 1, r#match: Some(any()), extract: None };
        let status = TapClient::new(channel.clone()).observe(request).await.expect_err("refused");
        assert_eq!((status.code(), status.message()), (Code::Unauthenticated, why));
        let status = list_edges(channel).await.expect_err("refused");
        assert_eq!((status.code(), status.message()), (Code::Unauthenticated, why));
    }
    assert!(!stage.taps.active());
    assert_eq!(list_edges(stage.client(As::Identity(VIZ))).await.expect("allowed").edges.len(), 1);
}

async fn list_edges(channel: Channel) -> Result<edges_v1::ListResponse, tonic::Status> {
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.map_err(|why| tonic::Status::from_error(why.into()))?;
    let path = ::http::uri::PathAndQuery::from_static("/mantle.v1.Edges/List");
    let request = tonic::Request::new(edges_v1::ListRequest {});
    client.unary(request, path, tonic_prost::ProstCodec::default()).await.map(tonic::Response::into_inner)
}

#[test]
fn edges_have_the_field_numbers_of_the_proto_file() {
    use prost::Message as _;
    let edge = |tls| edges_v1::Edge {
        client_ip: "10.0.0.9".into(),
        port: 80,
        tls: Some(tls),
        open: 1,
        total: 2,
        last_seen_ms: 3,
    };
    let wire = edges_v1::ListResponse {
        edges: vec![
            edge(edges_v1::Tls::ClientId("a".into())),
            edge(edges_v1::Tls::NoTlsReason("b".into())),
            edge(edges_v1::Tls::PassthruSni("c".into())),
        ],
        overflowed: 5,
    }
    .encode_to_vec();
    let row = |field: u8, letter: u8| {
        [&[10, 21, 10, 8][..], b"10.0.0.9", &[16, 80, field, 1, letter, 48, 1, 56, 2, 64, 3]].concat()
    };
    assert_eq!(wire, [row(26, b'a'), row(34, b'b'), row(42, b'c'), vec![16, 5]].concat());
    let text = include_str!("../../../proto/mantle/v1/edges.proto");
    for field in [
        "edges = 1",
        "overflowed = 2",
        "client_ip = 1",
        "port = 2",
        "client_id = 3",
        "no_tls_reason = 4",
        "passthru_sni = 5",
        "open = 6",
        "total = 7",
        "last_seen_ms = 8",
    ] {
        assert!(text.contains(&format!("{field};")), "{field}");
    }
}

#[tokio::test]
async fn strangers_who_stay_keep_no_observer_out_and_push_none_away() {
    let stage = stage();
    let mut events = stage.observe(1, any(), false).await.expect("allowed");
    let mut strangers = Vec::new();
    for _ in 0..300 {
        strangers.push(tokio::net::TcpStream::connect((Ipv4Addr::LOCALHOST, stage.port)).await.expect("connect"));
    }
    let _late = stage.observe(1, any(), false).await.expect("allowed still");
    let (tls, labels) = (TlsLabel::None(NoTls::Loopback), Arc::from([]));
    drop(stage.taps.open(&request(Direction::Inbound, &tls, &labels, &Get("/"))).expect("matches"));
    next(&mut events).await;
}

#[tokio::test]
async fn what_cannot_be_watched_is_refused() {
    let stage = stage();
    let source = |tcp| observe_request::Match { r#match: Some(r#match::Match::Source(r#match::Tcp { r#match: tcp })) };
    let mask = |mask| {
        r#match::tcp::Match::Netmask(r#match::tcp::Netmask {
            ip: Some(net::IpAddress::from(std::net::IpAddr::from([10, 0, 0, 0]))),
            mask,
        })
    };
    let ports = |min, max| r#match::tcp::Match::Ports(r#match::tcp::PortRange { min, max });
    let large =
        observe_request::Match { r#match: Some(r#match::Match::Any(r#match::Seq { matches: vec![any(); 1100] })) };
    for (limit, wanted, why) in [
        (0, any(), "limit must be greater than 0"),
        (1, observe_request::Match { r#match: None }, "a match is empty"),
        (1, source(None), "a tcp match is empty"),
        (1, source(Some(mask(33))), "a netmask is too long"),
        (1, source(Some(ports(90, 80))), "a port range is empty"),
        (1, large, "match is too large"),
    ] {
        let status = stage.observe(limit, wanted, false).await.expect_err("refused");
        assert_eq!((status.code(), status.message()), (Code::InvalidArgument, why));
    }
    assert!(!stage.taps.active());
    stage.observe(1, source(Some(ports(80, 0))), false).await.expect("0 is open-ended");
}

#[tokio::test]
async fn an_observer_that_goes_or_stalls_is_no_burden() {
    let stage = stage();
    let events = stage.observe(u32::MAX, any(), false).await.expect("allowed");
    let (tls, labels) = (TlsLabel::None(NoTls::Loopback), Arc::from([]));
    // Nobody reads: what does not fit is dropped, and nothing waits.
    for _ in 0..MAX_WAITING * 3 {
        let stream = stage.taps.open(&request(Direction::Inbound, &tls, &labels, &Get("/"))).expect("matches");
        stream.end(OK, 0, Duration::ZERO, Duration::ZERO);
    }
    drop(events);
    let gone = pin!(async {
        while stage.taps.active() {
            tokio::task::yield_now().await;
        }
    });
    tokio::time::timeout(Duration::from_secs(10), gone).await.expect("the observer is forgotten");

    let mut held = Vec::new();
    for _ in 0..MAX_TAPS {
        held.push(stage.taps.add(TapMatch::All(Vec::new()), false, 1).expect("room"));
    }
    let status = stage.observe(1, any(), false).await.expect_err("too many");
    assert_eq!(status.code(), Code::ResourceExhausted);
}
