//! Destinations and ports as plays on virtual time: the control plane is in memory and answered call by call.

use std::collections::HashMap;

use linkerd2_proxy_api::destination::{
    AddrSet, DestinationProfile, NoEndpoints, ProtocolHint, TlsIdentity, Update, WeightedAddr, WeightedAddrSet,
    protocol_hint, tls_identity, update,
};
use linkerd2_proxy_api::inbound::{self, Server};
use linkerd2_proxy_api::meta::{Metadata, Resource, metadata};
use linkerd2_proxy_api::outbound::{self, OutboundPolicy};
use mantle_proxy_core::model::{self, Backend, Hint};
use mantle_proxy_core::reasons::NoTls;
use tokio::time::Instant;
use tonic::{Code, Status};

use super::*;
use crate::control::testing::Plane;
use crate::tls::Credentials;
use crate::tls::tests::{API, Ca, WEB};

mod ports;

const SERVICE: &str = "10.203.128.7:80";
const PATH: &str = "api.shop.svc.cluster.local:80";

struct Stage {
    plane: Plane,
    discovery: Discovery,
    /// `None` is sent at the start: no certificate yet.
    credentials: watch::Sender<Option<Arc<Credentials>>>,
}

/// A certified proxy in a mesh of 10.203.0.0/16 with the listed port 8080; `vars` add to its environment.
fn stage(vars: &[(&str, &str)]) -> Stage {
    let ca = Ca::new();
    let plane = Plane::new();
    let config = config(vars, &ca);
    let channels = plane.channels();
    let connect = move || crate::discovery::Clients::new((channels(), Arc::default()), (channels(), Arc::default()));
    let (credentials, watched) = watch::channel(Some(Arc::new(ca.credentials(WEB))));
    Stage {
        discovery: Discovery::start(Arc::new(config), Handle::current(), connect, Some(watched)),
        plane,
        credentials,
    }
}

fn config(vars: &[(&str, &str)], ca: &Ca) -> Config {
    let pem = crate::tls::tests::pem(&ca.root);
    let base = [
        ("IDENTITY_TRUST_ANCHORS", pem.as_str()),
        ("IDENTITY_LOCAL_NAME", WEB),
        ("IDENTITY_TOKEN_FILE", "/none"),
        ("IDENTITY_SVC_ADDR", "127.0.0.1:1"),
        ("DESTINATION_SVC_ADDR", "127.0.0.1:1"),
        ("POLICY_SVC_ADDR", "127.0.0.1:1"),
        ("POLICY_WORKLOAD", "web-1"),
        ("DESTINATION_CONTEXT", "from-web"),
        ("DESTINATION_PROFILE_NETWORKS", "10.203.0.0/16"),
        ("INBOUND_PORTS", "8080"),
        ("INBOUND_DEFAULT_POLICY", "all-authenticated"),
    ];
    let get = |name: &str| {
        let name = name.strip_prefix("MANTLE_PROXY_")?;
        base.iter().chain(vars).rev().find(|(k, _)| *k == name).map(|(_, v)| (*v).to_owned())
    };
    Config::load(get).unwrap_or_else(|mistakes| panic!("{mistakes}"))
}

fn service() -> Option<Metadata> {
    let resource = Resource {
        group: "core".into(),
        kind: "Service".into(),
        name: "api".into(),
        namespace: "shop".into(),
        port: 80,
        ..Resource::default()
    };
    Some(Metadata { kind: Some(metadata::Kind::Resource(resource)) })
}

fn named(name: &str) -> Option<Metadata> {
    Some(Metadata { kind: Some(metadata::Kind::Default(name.into())) })
}

fn seconds(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

fn balancer(path: &str) -> outbound::Backend {
    use outbound::backend::{self, balance_p2c, endpoint_discovery};
    let dst = endpoint_discovery::DestinationGet { path: path.into() };
    let ewma = balance_p2c::PeakEwma { default_rtt: seconds(1), decay: seconds(10) };
    outbound::Backend {
        metadata: service(),
        queue: Some(outbound::Queue { capacity: 100, failfast_timeout: seconds(3) }),
        kind: Some(backend::Kind::Balancer(backend::BalanceP2c {
            discovery: Some(backend::EndpointDiscovery { kind: Some(endpoint_discovery::Kind::Dst(dst)) }),
            load: Some(balance_p2c::Load::PeakEwma(ewma)),
        })),
    }
}

fn http_routes(backend: outbound::Backend) -> Vec<outbound::HttpRoute> {
    use outbound::http_route::{Distribution, RouteBackend, Rule, distribution};
    let backends = vec![RouteBackend { backend: Some(backend), ..RouteBackend::default() }];
    let distribution =
        Distribution { kind: Some(distribution::Kind::FirstAvailable(distribution::FirstAvailable { backends })) };
    let rule = Rule { backends: Some(distribution), ..Rule::default() };
    vec![outbound::HttpRoute { metadata: named("http"), rules: vec![rule], ..outbound::HttpRoute::default() }]
}

fn opaque(backend: outbound::Backend) -> outbound::proxy_protocol::Opaque {
    use outbound::opaque_route::{Distribution, RouteBackend, Rule, distribution};
    let backends = vec![RouteBackend { backend: Some(backend), ..RouteBackend::default() }];
    let distribution =
        Distribution { kind: Some(distribution::Kind::FirstAvailable(distribution::FirstAvailable { backends })) };
    let rules = vec![Rule { backends: Some(distribution), ..Rule::default() }];
    outbound::proxy_protocol::Opaque { routes: vec![outbound::OpaqueRoute { metadata: named("opaq"), rules }] }
}

fn forbidden() -> outbound::opaque_route::Filter {
    use linkerd2_proxy_api::opaque_route::Forbidden;
    outbound::opaque_route::Filter { kind: Some(outbound::opaque_route::filter::Kind::Forbidden(Forbidden {})) }
}

fn detect(backend: &outbound::Backend) -> outbound::proxy_protocol::Detect {
    outbound::proxy_protocol::Detect {
        timeout: seconds(10),
        opaque: Some(opaque(backend.clone())),
        http1: Some(outbound::proxy_protocol::Http1 { routes: http_routes(backend.clone()), failure_accrual: None }),
        http2: Some(outbound::proxy_protocol::Http2 { routes: http_routes(backend.clone()), failure_accrual: None }),
    }
}

fn of(kind: outbound::proxy_protocol::Kind) -> OutboundPolicy {
    OutboundPolicy { protocol: Some(outbound::ProxyProtocol { kind: Some(kind) }), metadata: service() }
}

fn policy(path: &str) -> OutboundPolicy {
    of(outbound::proxy_protocol::Kind::Detect(detect(&balancer(path))))
}

fn addr(text: &str, identity: Option<&str>) -> WeightedAddr {
    let dns = |name: &str| tls_identity::DnsLikeIdentity { name: name.into() };
    WeightedAddr {
        addr: Some(text.parse::<SocketAddr>().expect("address").into()),
        weight: 10_000,
        metric_labels: HashMap::from([("pod".into(), text.into())]),
        tls_identity: identity.map(|name| TlsIdentity {
            server_name: Some(dns(name)),
            strategy: Some(tls_identity::Strategy::DnsLikeIdentity(dns(name))),
        }),
        protocol_hint: Some(ProtocolHint {
            opaque_transport: Some(protocol_hint::OpaqueTransport { inbound_port: 4143 }),
            protocol: Some(protocol_hint::Protocol::H2(protocol_hint::H2 {})),
        }),
        ..WeightedAddr::default()
    }
}

fn add(addrs: Vec<WeightedAddr>) -> Result<Update, Status> {
    let metric_labels = HashMap::from([("namespace".into(), "shop".into()), ("pod".into(), "of the set".into())]);
    Ok(Update { update: Some(update::Update::Add(WeightedAddrSet { addrs, metric_labels })) })
}

fn remove(text: &str) -> Result<Update, Status> {
    let addrs = vec![text.parse::<SocketAddr>().expect("address").into()];
    Ok(Update { update: Some(update::Update::Remove(AddrSet { addrs })) })
}

fn none() -> Result<Update, Status> {
    Ok(Update { update: Some(update::Update::NoEndpoints(NoEndpoints { exists: true })) })
}

async fn ask(stage: &Stage, dst: &str) -> Result<Target, Unroutable> {
    stage.discovery.target(dst.parse().expect("address")).await
}

/// Answers the profile with nothing.
async fn no_profile(stage: &Stage) {
    stage.plane.profile.next().await.refuse(Code::InvalidArgument);
}

fn addresses(target: &mut Target) -> Option<Vec<String>> {
    target.endpoints.borrow_and_update().as_ref().map(|all| all.iter().map(|e| e.addr.to_string()).collect())
}

/// The endpoints after they have changed once more.
async fn changed(target: &mut Target) -> Vec<String> {
    target.endpoints.changed().await.expect("followed");
    addresses(target).expect("known")
}

#[tokio::test(start_paused = true)]
async fn a_service_is_followed_through_the_life_of_its_streams() {
    let stage = stage(&[]);
    let play = async {
        let profile = stage.plane.profile.next().await;
        assert_eq!((profile.request.path.as_str(), profile.request.context_token.as_str()), (SERVICE, "from-web"));
        profile.stream().send(Ok(DestinationProfile::default())).expect("open");
        let watch = stage.plane.outbound.next().await;
        assert_eq!(watch.request.source_workload, "web-1");
        let watch = watch.stream();
        watch.send(Ok(policy(PATH))).expect("open");
        watch
    };
    let (target, policy_stream) = tokio::join!(ask(&stage, SERVICE), play);
    let mut target = target.expect("explained");
    let outbound = target.outbound.borrow().clone().expect("a policy");
    assert_eq!(outbound.backend, Backend::Balance { path: PATH.into() });
    assert_eq!(outbound.authority.as_deref(), Some(PATH));
    assert_eq!((outbound.protocol, outbound.failfast), (Protocol::Detect, Duration::from_secs(3)));
    assert_eq!(addresses(&mut target), None, "not answered yet");

    let get = stage.plane.get.next().await;
    assert_eq!(get.request.path, PATH);
    let get = get.stream();
    get.send(remove("10.203.0.9:8080")).expect("open"); // first, so it says nothing
    get.send(add(vec![addr("10.203.0.1:8080", Some(API)), addr("10.203.0.2:8080", None)])).expect("open");
    assert_eq!(changed(&mut target).await, ["10.203.0.1:8080", "10.203.0.2:8080"]);
    let endpoints = target.endpoints.borrow().clone().expect("known");
    assert_eq!(endpoints[0].tls, Ok(API.into()));
    assert_eq!((endpoints[0].opaque_transport, endpoints[0].hint), (Some(4143), Hint::H2));
    assert_eq!(*endpoints[0].labels, [("namespace".into(), "shop".into()), ("pod".into(), "10.203.0.1:8080".into())]);
    assert_eq!(endpoints[1].tls, Err(NoTls::NotProvidedByServiceDiscovery));

    get.send(add(vec![addr("10.203.0.3:8080", Some(API))])).expect("open");
    assert_eq!(changed(&mut target).await.len(), 3, "later sets are deltas");
    get.send(remove("10.203.0.2:8080")).expect("open");
    assert_eq!(changed(&mut target).await, ["10.203.0.1:8080", "10.203.0.3:8080"]);

    // The control plane goes: what it said stands. It comes back: its first set replaces everything.
    drop(get);
    drop(policy_stream);
    let again = stage.plane.get.next().await;
    assert_eq!(addresses(&mut target).map(|all| all.len()), Some(2));
    assert!(target.outbound.borrow().is_ok());
    let again = again.stream();
    again.send(add(vec![addr("10.203.0.4:8080", Some(API))])).expect("open");
    assert_eq!(changed(&mut target).await, ["10.203.0.4:8080"]);
    again.send(none()).expect("open");
    assert_eq!(changed(&mut target).await, [""; 0]);

    // Another service behind the same address.
    let policy_stream = stage.plane.outbound.next().await.stream();
    policy_stream.send(Ok(policy("other.shop.svc.cluster.local:80"))).expect("open");
    let other = stage.plane.get.next().await;
    assert_eq!(other.request.path, "other.shop.svc.cluster.local:80");
    assert_eq!(addresses(&mut target), None, "another question");
}

#[tokio::test(start_paused = true)]
async fn an_answer_is_shared_and_asked_again_only_after_it_was_unused_for_a_while() {
    let stage = stage(&[]);
    let play = async {
        no_profile(&stage).await;
        stage.plane.outbound.next().await.refuse(Code::NotFound);
    };
    let (first, ()) = tokio::join!(ask(&stage, SERVICE), play);
    let first = first.expect("a stranger passes");
    ask(&stage, SERVICE).await.expect("from the cache");
    drop(first);
    tokio::time::sleep(Duration::from_secs(4)).await;
    ask(&stage, SERVICE).await.expect("still from the cache");
    assert!(stage.plane.outbound.ready().await.is_none());
    tokio::time::sleep(Duration::from_secs(7)).await;
    assert!(lock(&stage.discovery.0.targets).is_empty(), "forgotten");
    let (_, second) = tokio::join!(ask(&stage, SERVICE), stage.plane.outbound.next());
    assert!(second.request.target.is_some());
}

#[tokio::test(start_paused = true)]
async fn many_destinations_are_spread_over_connections() {
    let stage = stage(&[]);
    let asked: Vec<_> = (0..PER_CONNECTION as u16)
        .map(|port| stage.discovery.0.subscribe(SocketAddr::from(([10, 203, 5, 5], 1000 + port))).expect("room"))
        .collect();
    // The listed port's stream is on the first connection too.
    assert_eq!(lock(&stage.discovery.0.connections.made).len(), 2);
    drop(asked);
    tokio::time::sleep(Duration::from_secs(8)).await;
    stage.discovery.0.subscribe("10.203.5.5:80".parse().expect("address")).expect("room");
    assert_eq!(lock(&stage.discovery.0.connections.made).len(), 2, "there is room again on the first");
}

#[tokio::test(start_paused = true)]
async fn outside_the_mesh_nobody_is_asked_and_inside_silence_refuses() {
    let stage = stage(&[]);
    let began = Instant::now();
    let outside = ask(&stage, "93.184.216.34:443").await.expect("passes");
    assert_eq!(began.elapsed(), Duration::ZERO);
    let outbound = outside.outbound.borrow().clone().expect("passes");
    let Backend::Forward(endpoint) = &outbound.backend else { panic!("{outbound:?}") };
    assert_eq!(
        (endpoint.addr.to_string().as_str(), &endpoint.tls),
        ("93.184.216.34:443", &Err(NoTls::NotProvidedByServiceDiscovery))
    );
    assert!(stage.plane.outbound.ready().await.is_none());

    assert_eq!(ask(&stage, SERVICE).await.err(), Some(Unroutable::DiscoveryUnavailable));
    assert_eq!(began.elapsed(), ANSWER);
    // The answer that comes late is there for the next connection at once.
    no_profile(&stage).await;
    stage.plane.outbound.next().await.stream().send(Ok(policy(PATH))).expect("open");
    ask(&stage, SERVICE).await.expect("explained");
}

#[tokio::test(start_paused = true)]
async fn without_networks_everything_must_be_explained_by_policy_alone() {
    let stage = stage(&[("DESTINATION_PROFILE_NETWORKS", " ")]);
    let (target, ()) = tokio::join!(ask(&stage, "93.184.216.34:443"), async {
        stage.plane.outbound.next().await.refuse(Code::NotFound);
    });
    target.expect("a stranger passes");
    assert!(stage.plane.profile.ready().await.is_none());
    assert_eq!(ask(&stage, "93.184.216.34:80").await.err(), Some(Unroutable::DiscoveryUnavailable));
}

#[tokio::test(start_paused = true)]
async fn nothing_is_asked_before_there_is_a_certificate() {
    let stage = stage(&[]);
    let certified = stage.credentials.send_replace(None);
    assert_eq!(ask(&stage, SERVICE).await.err(), Some(Unroutable::DiscoveryUnavailable));
    assert!(stage.plane.outbound.ready().await.is_none());
    stage.credentials.send_replace(certified);
    let (target, ()) = tokio::join!(ask(&stage, SERVICE), async {
        no_profile(&stage).await;
        stage.plane.outbound.next().await.refuse(Code::NotFound);
    });
    target.expect("asked now");
}

#[tokio::test(start_paused = true)]
async fn a_pod_is_known_by_its_profile() {
    let stage = stage(&[]);
    let pod = "10.203.0.1:8080";
    let play = async {
        stage.plane.outbound.next().await.refuse(Code::NotFound);
        let profile = stage.plane.profile.next().await.stream();
        let endpoint = Some(addr(pod, Some(API)));
        profile
            .send(Ok(DestinationProfile { endpoint, opaque_protocol: true, ..DestinationProfile::default() }))
            .expect("open");
        profile
    };
    let (target, profile) = tokio::join!(ask(&stage, pod), play);
    let mut target = target.expect("explained");
    let outbound = target.outbound.borrow_and_update().clone().expect("explained");
    let Backend::Forward(endpoint) = &outbound.backend else { panic!("{outbound:?}") };
    assert_eq!((&endpoint.tls, outbound.protocol), (&Ok(API.into()), Protocol::Opaque));
    // It leaves the mesh.
    profile
        .send(Ok(DestinationProfile { endpoint: Some(addr(pod, None)), ..DestinationProfile::default() }))
        .expect("open");
    target.outbound.changed().await.expect("followed");
    let outbound = target.outbound.borrow().clone().expect("explained");
    let Backend::Forward(endpoint) = &outbound.backend else { panic!("{outbound:?}") };
    assert_eq!((&endpoint.tls, outbound.protocol), (&Err(NoTls::NotProvidedByServiceDiscovery), Protocol::Detect));
}

#[tokio::test(start_paused = true)]
async fn refusals_are_reasons_and_failures_are_tried_again() {
    let stage = stage(&[]);
    for (code, want) in [
        (Code::NotFound, None),
        (Code::Unimplemented, None),
        (Code::InvalidArgument, Some(Unroutable::InvalidPolicy)),
        (Code::FailedPrecondition, Some(Unroutable::InvalidPolicy)),
    ] {
        let dst = format!("10.203.1.1:{}", 1000 + code as u16);
        let play = async {
            no_profile(&stage).await;
            stage.plane.outbound.next().await.refuse(Code::Unavailable);
            stage.plane.outbound.next().await.refuse(code);
        };
        let (target, ()) = tokio::join!(ask(&stage, &dst), play);
        assert_eq!(target.err(), want, "{code:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_identity_that_cannot_be_proved_never_becomes_plaintext() {
    let stage = stage(&[]);
    let (target, ()) = tokio::join!(ask(&stage, SERVICE), async {
        no_profile(&stage).await;
        stage.plane.outbound.next().await.stream().send(Ok(policy(PATH))).expect("open");
    });
    let mut target = target.expect("explained");
    let get = stage.plane.get.next().await.stream();
    let mut by_uri = addr("10.203.0.3:80", Some(API));
    let uri = tls_identity::UriLikeIdentity { uri: "spiffe://cluster.local/ns/a/sa/b".into() };
    by_uri.tls_identity =
        Some(TlsIdentity { server_name: None, strategy: Some(tls_identity::Strategy::UriLikeIdentity(uri)) });
    let mut renamed = addr("10.203.0.4:80", Some(API));
    if let Some(identity) = &mut renamed.tls_identity {
        identity.server_name = Some(tls_identity::DnsLikeIdentity { name: WEB.into() });
    }
    let mut without = addr("10.203.0.5:80", Some(API));
    without.tls_identity = Some(TlsIdentity::default());
    get.send(add(vec![
        addr("10.203.0.1:80", Some("")),
        addr("10.203.0.2:80", Some("not a name")),
        by_uri,
        renamed,
        without,
    ]))
    .expect("open");
    assert_eq!(changed(&mut target).await.len(), 5);
    let own = mantle_proxy_core::route::Own { ips: &[], ports: &[] };
    for endpoint in target.endpoints.borrow().as_ref().expect("known").iter() {
        let plan = mantle_proxy_core::route::decide(endpoint, own);
        assert_eq!(plan, Err(Unroutable::InvalidIdentity), "{endpoint:?}");
    }
}

#[test]
fn a_policy_with_a_field_left_out_is_not_used() {
    use outbound::proxy_protocol::Kind;
    let whole = || detect(&balancer(PATH));
    assert!(convert::policy(of(Kind::Detect(whole()))).is_ok());
    let backend = |change: &dyn Fn(&mut outbound::Backend)| {
        let mut backend = balancer(PATH);
        change(&mut backend);
        of(Kind::Detect(detect(&backend)))
    };
    let balanced = |change: &dyn Fn(&mut outbound::backend::BalanceP2c)| {
        backend(&|backend| {
            let Some(outbound::backend::Kind::Balancer(balancer)) = &mut backend.kind else { panic!("a balancer") };
            change(balancer);
        })
    };
    let detect = |change: &dyn Fn(&mut outbound::proxy_protocol::Detect)| {
        let mut detect = whole();
        change(&mut detect);
        of(Kind::Detect(detect))
    };
    let resource = |change: &dyn Fn(&mut Resource)| {
        let mut policy = policy(PATH);
        let Some(Metadata { kind: Some(metadata::Kind::Resource(resource)) }) = &mut policy.metadata else {
            panic!("a resource")
        };
        change(resource);
        policy
    };
    use outbound::backend::balance_p2c::{Load, PeakEwma};
    let table = [
        ("metadata", OutboundPolicy { metadata: None, ..policy(PATH) }),
        ("metadata.resource", resource(&|r| r.group.clear())),
        ("metadata.resource", resource(&|r| r.name.clear())),
        ("metadata.resource.namespace", resource(&|r| r.namespace.clear())),
        ("metadata.resource.port", resource(&|r| r.port = 70_000)),
        ("protocol", OutboundPolicy { protocol: None, ..policy(PATH) }),
        ("detect.timeout", detect(&|d| d.timeout = None)),
        ("detect.opaque", detect(&|d| d.opaque = None)),
        ("detect.http1", detect(&|d| d.http1 = None)),
        ("detect.http2", detect(&|d| d.http2 = None)),
        ("route.metadata", detect(&|d| d.http1.as_mut().expect("http1").routes[0].metadata = None)),
        ("rule.backends", detect(&|d| d.http1.as_mut().expect("http1").routes[0].rules[0].backends = None)),
        ("route.rules", detect(&|d| d.opaque.as_mut().expect("opaque").routes[0].rules.clear())),
        ("rule.filters", detect(&|d| d.opaque.as_mut().expect("opaque").routes[0].rules[0].filters.push(forbidden()))),
        ("backend.metadata", backend(&|b| b.metadata = None)),
        ("backend.queue", backend(&|b| b.queue = None)),
        ("backend.queue.failfast_timeout", backend(&|b| b.queue.as_mut().expect("queue").failfast_timeout = None)),
        ("routes", backend(&|b| b.kind = None)),
        ("balancer.discovery", balanced(&|b| b.discovery = None)),
        ("balancer.load", balanced(&|b| b.load = None)),
        (
            "balancer.load.decay",
            balanced(&|b| b.load = Some(Load::PeakEwma(PeakEwma { default_rtt: seconds(1), decay: None }))),
        ),
        (
            "balancer.load.default_rtt",
            balanced(&|b| b.load = Some(Load::PeakEwma(PeakEwma { default_rtt: None, decay: seconds(1) }))),
        ),
    ];
    for (field, policy) in table {
        assert_eq!(convert::policy(policy).err(), Some(convert::Invalid(field)), "{field}");
    }
    // Accepted: metadata by default name, a port that is not said.
    assert!(convert::policy(OutboundPolicy { metadata: named("x"), ..policy(PATH) }).is_ok());
    assert!(convert::policy(resource(&|r| r.port = 0)).is_ok());
    assert!(convert::policy(of(Kind::Opaque(opaque(balancer(PATH))))).is_ok());
}

#[tokio::test(start_paused = true)]
async fn the_experimental_mode_lets_through_what_is_not_explained_until_it_is() {
    let stage = stage(&[("IDENTITY_FILES", "/none"), ("IDENTITY_FILES_SUFFIX", ".optional.mantle.cluster.local")]);
    let dst: std::net::SocketAddr = SERVICE.parse().expect("address");
    let began = Instant::now();
    let mut target = stage.discovery.target(dst).await.expect("it passes");
    assert_eq!(began.elapsed(), ANSWER);
    let meanwhile = target.outbound.borrow_and_update().clone().expect("it passes");
    assert!(matches!(&meanwhile.backend, Backend::Forward(to) if to.addr == dst && to.tls.is_err()));
    assert!(stage.discovery.port(9999).now().is_some(), "a port that nobody listed is not closed either");
    no_profile(&stage).await;
    stage.plane.outbound.next().await.stream().send(Ok(policy(PATH))).expect("open");
    target.outbound.changed().await.expect("alive");
    let explained = target.outbound.borrow().clone().expect("explained");
    assert!(matches!(&explained.backend, Backend::Balance { .. }));
}
