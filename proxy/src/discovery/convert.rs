//! The wire's messages as `core::model` values: converted once, with the validity rules that linkerd2-proxy applies.
//!
//! Pure. What cannot be used is an `Invalid` with the field to blame, never half a policy.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use linkerd2_proxy_api::destination::{self, DestinationProfile, WeightedAddr, protocol_hint, tls_identity};
use linkerd2_proxy_api::inbound::{self, authn};
use linkerd2_proxy_api::meta::{Metadata, metadata};
use linkerd2_proxy_api::outbound::{self, backend, proxy_protocol as out};
use linkerd2_proxy_api::{grpc_route, http_route, http_types, net};
use mantle_proxy_core::model::{
    Authorization, Backend, Cidr, Clients, Endpoint, Hint, InboundRoute, Network, Outbound, PathMatch, Protocol,
    RouteMatch, ServerPolicy,
};
use mantle_proxy_core::reasons::{NoTls, Unroutable};

/// The field of a message that makes it unusable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Invalid(pub(super) &'static str);

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is missing or wrong", self.0)
    }
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum PolicyAnswer {
    Pending,
    /// The control plane does not know the destination.
    NotFound,
    /// It refused it, or sent what cannot be used.
    Invalid,
    Policy(Policy),
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum ProfileAnswer {
    Pending,
    None,
    Profile(Profile),
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Policy {
    protocol: Protocol,
    backend: Backend,
    failfast: Duration,
    /// The Service's port, if it is one.
    service_port: Option<u16>,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Profile {
    /// `name.namespace.svc.<domain>`.
    name: Option<Arc<str>>,
    opaque: bool,
    endpoint: Option<Endpoint>,
}

/// What linkerd's control plane sends as failfast, for destinations without a policy.
const FAILFAST: Duration = Duration::from_secs(3);

/// A destination that discovery has nothing to say about: plaintext to where it was going anyway.
pub(super) fn passthrough(dst: SocketAddr) -> Outbound {
    let tls = Err(NoTls::NotProvidedByServiceDiscovery);
    let endpoint = Endpoint { addr: dst, tls, opaque_transport: None, hint: Hint::Unknown, labels: Arc::from([]) };
    Outbound { protocol: Protocol::Detect, backend: Backend::Forward(endpoint), authority: None, failfast: FAILFAST }
}

/// Both answers as one. `None`: one of them is not there yet.
pub(super) fn merge(
    dst: SocketAddr,
    profile: &ProfileAnswer,
    policy: &PolicyAnswer,
) -> Option<Result<Arc<Outbound>, Unroutable>> {
    let profile = match profile {
        ProfileAnswer::Pending => return None,
        ProfileAnswer::None => None,
        ProfileAnswer::Profile(profile) => Some(profile),
    };
    let mut outbound = match policy {
        PolicyAnswer::Pending => return None,
        PolicyAnswer::Invalid => return Some(Err(Unroutable::InvalidPolicy)),
        PolicyAnswer::Policy(policy) => Outbound {
            protocol: policy.protocol,
            backend: policy.backend.clone(),
            authority: authority(policy, profile, dst),
            failfast: policy.failfast,
        },
        PolicyAnswer::NotFound => {
            let mut outbound = passthrough(dst);
            if let Some(endpoint) = profile.and_then(|profile| profile.endpoint.clone()) {
                outbound.backend = Backend::Forward(endpoint);
            }
            outbound.authority =
                profile.and_then(|profile| profile.name.as_ref()).map(|name| format!("{name}:{}", dst.port()).into());
            outbound
        }
    };
    if profile.is_some_and(|profile| profile.opaque) {
        outbound.protocol = Protocol::Opaque;
    }
    Some(Ok(Arc::new(outbound)))
}

/// `name.namespace.svc.<domain>:port` of a known Service: the profile's name, else what the balancer resolves.
fn authority(policy: &Policy, profile: Option<&Profile>, dst: SocketAddr) -> Option<Arc<str>> {
    let port = policy.service_port?;
    let port = if port == 0 { dst.port() } else { port };
    match (profile.and_then(|profile| profile.name.as_ref()), &policy.backend) {
        (Some(name), _) => Some(format!("{name}:{port}").into()),
        (None, Backend::Balance { path }) => Some(path.clone()),
        (None, Backend::Forward(_)) => None,
    }
}

pub(super) fn profile(profile: DestinationProfile) -> Profile {
    let name = profile.fully_qualified_name;
    Profile {
        name: (!name.is_empty()).then(|| name.into()),
        opaque: profile.opaque_protocol,
        endpoint: profile.endpoint.and_then(|addr| endpoint(addr, &HashMap::new())),
    }
}

/// The usable endpoints of a set; one without a valid address is left out.
pub(super) fn endpoints(set: destination::WeightedAddrSet) -> Vec<Endpoint> {
    let labels = set.metric_labels;
    set.addrs.into_iter().filter_map(|addr| endpoint(addr, &labels)).collect()
}

fn endpoint(addr: WeightedAddr, set_labels: &HashMap<String, String>) -> Option<Endpoint> {
    let socket = socket_addr(addr.addr.as_ref()?)?;
    let hint = addr.protocol_hint.unwrap_or_default();
    let labels: BTreeMap<_, _> = set_labels.clone().into_iter().chain(addr.metric_labels).collect();
    Some(Endpoint {
        addr: socket,
        tls: addr
            .tls_identity
            .map_or(Err(NoTls::NotProvidedByServiceDiscovery), |identity| Ok(identity_name(socket, identity))),
        opaque_transport: hint.opaque_transport.and_then(|transport| port(transport.inbound_port)),
        hint: match hint.protocol {
            Some(protocol_hint::Protocol::H2(_)) => Hint::H2,
            Some(protocol_hint::Protocol::Opaque(_)) => Hint::Opaque,
            None => Hint::Unknown,
        },
        labels: labels.into_iter().collect(),
    })
}

/// The name to prove. One that no certificate can carry stays as it is: connecting to it is then an `InvalidIdentity`
/// (`core::route`), and never plaintext.
fn identity_name(addr: SocketAddr, identity: destination::TlsIdentity) -> Arc<str> {
    let sni = identity.server_name.map(|name| name.name);
    let name = match identity.strategy {
        Some(tls_identity::Strategy::DnsLikeIdentity(dns)) if sni.as_ref().is_none_or(|sni| *sni == dns.name) => {
            dns.name
        }
        // An SNI other than the identity, and identities that are URIs, are not ours to prove yet.
        Some(tls_identity::Strategy::DnsLikeIdentity(dns)) => format!("{} by another name", dns.name),
        Some(tls_identity::Strategy::UriLikeIdentity(uri)) => uri.uri,
        None => String::new(),
    };
    if !mantle_proxy_core::route::is_identity(&name) {
        tracing::error!(%addr, ?name, "the control plane sent an identity that cannot be proved; the endpoint is not used");
    }
    name.into()
}

fn socket_addr(addr: &net::TcpAddress) -> Option<SocketAddr> {
    let ip = addr.ip.and_then(|ip| std::net::IpAddr::try_from(ip).ok())?;
    Some(SocketAddr::new(ip, port(addr.port)?))
}

/// A port that exists.
fn port(port: u32) -> Option<u16> {
    u16::try_from(port).ok().filter(|port| *port > 0)
}

/// Checks all of an outbound policy as linkerd2-proxy does, and keeps what this proxy uses: how to read the bytes and
/// the backend of the first route.
///
/// # Errors
/// The field to blame.
pub(super) fn policy(policy: outbound::OutboundPolicy) -> Result<Policy, Invalid> {
    let service_port = meta(policy.metadata.as_ref(), true)?;
    let kind = policy.protocol.and_then(|protocol| protocol.kind).ok_or(Invalid("protocol"))?;
    let (protocol, backends) = match kind {
        outbound::proxy_protocol::Kind::Detect(detect) => {
            detect.timeout.ok_or(Invalid("detect.timeout"))?;
            let opaque = opaque_routes(detect.opaque.ok_or(Invalid("detect.opaque"))?)?;
            let http1 = http_routes(detect.http1.ok_or(Invalid("detect.http1"))?.routes)?;
            let http2 = http_routes(detect.http2.ok_or(Invalid("detect.http2"))?.routes)?;
            (Protocol::Detect, [http1, http2, opaque])
        }
        outbound::proxy_protocol::Kind::Opaque(opaque) => (Protocol::Opaque, [opaque_routes(opaque)?, None, None]),
        outbound::proxy_protocol::Kind::Http1(http) => (Protocol::Http1, [http_routes(http.routes)?, None, None]),
        outbound::proxy_protocol::Kind::Http2(http) => (Protocol::Http2, [http_routes(http.routes)?, None, None]),
        outbound::proxy_protocol::Kind::Grpc(grpc) => (Protocol::Http2, [grpc_routes(grpc.routes)?, None, None]),
        outbound::proxy_protocol::Kind::Tls(tls) => (Protocol::Tls, [tls_routes(tls)?, None, None]),
    };
    let (backend, failfast) = backends.into_iter().flatten().next().ok_or(Invalid("routes"))?;
    Ok(Policy { protocol, backend, failfast, service_port })
}

type Chosen = Option<(Backend, Duration)>;

/// The five kinds of outbound route differ in type only.
macro_rules! routes {
    ($routes:expr, $module:ident, $at_most_one_rule:literal) => {{
        let mut chosen: Chosen = None;
        for route in $routes {
            meta(route.metadata.as_ref(), false).map_err(|_| Invalid("route.metadata"))?;
            if $at_most_one_rule && route.rules.len() != 1 {
                return Err(Invalid("route.rules"));
            }
            for rule in route.rules {
                // The filters of connections say no, and no is never dropped; those of requests (redirects, injected
                // failures, headers) are not carried out yet.
                if $at_most_one_rule && !rule.filters.is_empty() {
                    return Err(Invalid("rule.filters"));
                }
                use outbound::$module::distribution::Kind;
                let backends: Vec<_> = match rule.backends.and_then(|b| b.kind).ok_or(Invalid("rule.backends"))? {
                    Kind::Empty(_) => continue,
                    Kind::FirstAvailable(first) => first.backends.into_iter().map(Some).collect(),
                    Kind::RandomAvailable(random) => {
                        random.backends.into_iter().map(|weighted| weighted.backend).collect()
                    }
                };
                if backends.is_empty() {
                    return Err(Invalid("rule.backends"));
                }
                for route_backend in backends {
                    let backend = route_backend.and_then(|b| b.backend).ok_or(Invalid("backend"))?;
                    let converted = one_backend(backend)?;
                    chosen = chosen.or(converted);
                }
            }
        }
        Ok(chosen)
    }};
}

fn http_routes(routes: Vec<outbound::HttpRoute>) -> Result<Chosen, Invalid> {
    routes!(routes, http_route, false)
}

fn grpc_routes(routes: Vec<outbound::GrpcRoute>) -> Result<Chosen, Invalid> {
    routes!(routes, grpc_route, false)
}

fn opaque_routes(opaque: out::Opaque) -> Result<Chosen, Invalid> {
    if opaque.routes.len() > 1 {
        return Err(Invalid("opaque.routes"));
    }
    routes!(opaque.routes, opaque_route, true)
}

fn tls_routes(tls: out::Tls) -> Result<Chosen, Invalid> {
    routes!(tls.routes, tls_route, true)
}

/// `None`: a backend without a kind, which always fails.
fn one_backend(backend: outbound::Backend) -> Result<Chosen, Invalid> {
    meta(backend.metadata.as_ref(), false).map_err(|_| Invalid("backend.metadata"))?;
    let queue = backend.queue.ok_or(Invalid("backend.queue"))?;
    let failfast = queue.failfast_timeout.and_then(duration).ok_or(Invalid("backend.queue.failfast_timeout"))?;
    let converted = match backend.kind {
        None => return Ok(None),
        Some(backend::Kind::Forward(addr)) => {
            Backend::Forward(endpoint(addr, &HashMap::new()).ok_or(Invalid("backend.forward"))?)
        }
        Some(backend::Kind::Balancer(balancer)) => {
            use backend::balance_p2c::Load;
            use backend::endpoint_discovery::Kind;
            match balancer.load.ok_or(Invalid("balancer.load"))? {
                Load::PeakEwma(ewma) if ewma.default_rtt.is_none() => return Err(Invalid("balancer.load.default_rtt")),
                Load::PeakEwma(ewma) if ewma.decay.is_none() => return Err(Invalid("balancer.load.decay")),
                Load::PeakEwma(_) | Load::PenaltyPeakEwma(_) => {}
            }
            let Kind::Dst(dst) = balancer.discovery.and_then(|d| d.kind).ok_or(Invalid("balancer.discovery"))?;
            Backend::Balance {
                path: Some(dst.path).filter(|path| !path.is_empty()).ok_or(Invalid("balancer.discovery.dst"))?.into(),
            }
        }
    };
    Ok(Some((converted, failfast)))
}

/// A Service's port (0: not said) if `metadata` names one. Resources need all their names.
fn meta(metadata: Option<&Metadata>, top: bool) -> Result<Option<u16>, Invalid> {
    match metadata.and_then(|metadata| metadata.kind.as_ref()).ok_or(Invalid("metadata"))? {
        metadata::Kind::Default(_) => Ok(None),
        metadata::Kind::Resource(r) if r.group.is_empty() || r.kind.is_empty() || r.name.is_empty() => {
            Err(Invalid("metadata.resource"))
        }
        metadata::Kind::Resource(r) if top && r.namespace.is_empty() => Err(Invalid("metadata.resource.namespace")),
        metadata::Kind::Resource(r) if r.group == "core" && r.kind == "Service" => {
            u16::try_from(r.port).map(Some).map_err(|_| Invalid("metadata.resource.port"))
        }
        metadata::Kind::Resource(_) => Ok(None),
    }
}

/// A port's policy.
///
/// # Errors
/// The field to blame; the port must then admit nobody.
pub(super) fn server(server: inbound::Server) -> Result<ServerPolicy, Invalid> {
    use inbound::proxy_protocol::Kind;
    let label = |key: &str| server.labels.get(key).cloned().unwrap_or_default();
    let name = Some(label("name")).filter(|name| !name.is_empty()).ok_or(Invalid("labels.name"))?;
    let (group, kind) = (label("group"), label("kind"));
    let kind = if group.is_empty() && kind.is_empty() { "default".to_owned() } else { kind };
    let mut detect_timeout = DETECT;
    let (protocol, routes) = match server.protocol.and_then(|protocol| protocol.kind).ok_or(Invalid("protocol"))? {
        Kind::Detect(detect) => {
            detect_timeout = detect.timeout.and_then(duration).ok_or(Invalid("detect.timeout"))?;
            (Protocol::Detect, inbound_http(detect.http_routes)?)
        }
        Kind::Http1(http) => (Protocol::Http1, inbound_http(http.routes)?),
        Kind::Http2(http) => (Protocol::Http2, inbound_http(http.routes)?),
        Kind::Grpc(grpc) => (Protocol::Http2, inbound_grpc(grpc.routes)?),
        Kind::Opaque(_) => (Protocol::Opaque, Vec::new()),
        Kind::Tls(_) => (Protocol::Tls, Vec::new()),
    };
    let authorizations = authorizations(server.authorizations)?;
    Ok(ServerPolicy { protocol, detect_timeout, group, kind, name, authorizations, routes })
}

/// What stands in for a policy that cannot be used: nobody but this pod itself is admitted.
pub(super) fn closed_server() -> ServerPolicy {
    ServerPolicy {
        protocol: Protocol::Detect,
        detect_timeout: DETECT,
        group: String::new(),
        kind: "default".to_owned(),
        name: "invalid".to_owned(),
        authorizations: Vec::new(),
        routes: Vec::new(),
    }
}

const DETECT: Duration = Duration::from_secs(10);

fn authorizations(all: Vec<inbound::Authz>) -> Result<Vec<Authorization>, Invalid> {
    all.into_iter().map(authorization).collect()
}

fn authorization(authz: inbound::Authz) -> Result<Authorization, Invalid> {
    let label = |key: &str| authz.labels.get(key).cloned().unwrap_or_default();
    let [group, kind, name] = match authz.metadata.as_ref() {
        Some(metadata) => names(metadata, Invalid("authorization.metadata"))?,
        None if label("name").is_empty() => return Err(Invalid("authorization.metadata")),
        None => [label("group"), label("kind"), label("name")],
    };
    if authz.networks.is_empty() {
        return Err(Invalid("authorization.networks"));
    }
    let networks = authz.networks.into_iter().map(|network| {
        let net = network.net.and_then(cidr).ok_or(Invalid("authorization.networks"))?;
        let except: Option<Vec<_>> = network.except.into_iter().map(cidr).collect();
        Ok(Network { net, except: except.ok_or(Invalid("authorization.networks.except"))? })
    });
    let clients =
        match authz.authentication.and_then(|authn| authn.permit).ok_or(Invalid("authorization.authentication"))? {
            authn::Permit::Unauthenticated(_) => Clients::Anyone,
            authn::Permit::MeshTls(mesh) => {
                match mesh.clients.ok_or(Invalid("authorization.authentication.meshTLS"))? {
                    authn::permit_mesh_tls::Clients::Unauthenticated(_) => Clients::AnyTls,
                    authn::permit_mesh_tls::Clients::Identities(ids) => Clients::Identities {
                        names: ids.identities.into_iter().map(|identity| identity.name).collect(),
                        suffixes: ids.suffixes.into_iter().map(|suffix| suffix.parts).collect(),
                    },
                }
            }
        };
    Ok(Authorization { group, kind, name, networks: networks.collect::<Result<_, _>>()?, clients })
}

fn inbound_http(routes: Vec<inbound::HttpRoute>) -> Result<Vec<InboundRoute>, Invalid> {
    let routes = routes.into_iter().map(|route| {
        let [group, kind, name] =
            route.metadata.as_ref().map_or(Err(Invalid("route.metadata")), |m| names(m, Invalid("route.metadata")))?;
        no_hosts(&route.hosts)?;
        let matches =
            route.rules.into_iter().flat_map(|rule| rule.matches).map(http_match).collect::<Result<_, _>>()?;
        Ok(InboundRoute { group, kind, name, matches, authorizations: authorizations(route.authorizations)? })
    });
    routes.collect()
}

fn inbound_grpc(routes: Vec<inbound::GrpcRoute>) -> Result<Vec<InboundRoute>, Invalid> {
    let routes = routes.into_iter().map(|route| {
        let [group, kind, name] =
            route.metadata.as_ref().map_or(Err(Invalid("route.metadata")), |m| names(m, Invalid("route.metadata")))?;
        no_hosts(&route.hosts)?;
        let matches = route.rules.into_iter().flat_map(|rule| rule.matches).map(grpc_match).collect();
        Ok(InboundRoute { group, kind, name, matches, authorizations: authorizations(route.authorizations)? })
    });
    routes.collect()
}

fn no_hosts(hosts: &[http_route::HostMatch]) -> Result<(), Invalid> {
    if hosts.is_empty() { Ok(()) } else { Err(Invalid("route.hosts (not supported)")) }
}

/// What this proxy cannot match on (hosts, headers, queries, expressions) makes the policy unusable: a route that admits more
/// than it says would be worse.
fn http_match(wire: http_route::HttpRouteMatch) -> Result<RouteMatch, Invalid> {
    use http_route::path_match::Kind;
    if !wire.headers.is_empty() || !wire.query_params.is_empty() {
        return Err(Invalid("route.rules.matches.headers (not supported)"));
    }
    let path = match wire.path.and_then(|path| path.kind) {
        None => PathMatch::Any,
        Some(Kind::Exact(path)) => PathMatch::Exact(path),
        Some(Kind::Prefix(path)) => PathMatch::Prefix(path),
        Some(Kind::Regex(_)) => return Err(Invalid("route.rules.matches.path.regex (not supported)")),
    };
    let method = match wire.method.and_then(|method| method.r#type) {
        None => None,
        Some(http_types::http_method::Type::Registered(number)) => {
            let known = http_types::http_method::Registered::try_from(number)
                .map_err(|_| Invalid("route.rules.matches.method"))?;
            Some(known.as_str_name().to_owned())
        }
        Some(http_types::http_method::Type::Unregistered(name)) => Some(name),
    };
    Ok(RouteMatch { path, method })
}

fn grpc_match(wire: grpc_route::GrpcRouteMatch) -> RouteMatch {
    let rpc = wire.rpc.unwrap_or_default();
    let path = match (rpc.service.as_str(), rpc.method.as_str()) {
        ("", _) => PathMatch::Any,
        (service, "") => PathMatch::Prefix(format!("/{service}/")),
        (service, method) => PathMatch::Exact(format!("/{service}/{method}")),
    };
    RouteMatch { path, method: Some("POST".to_owned()) }
}

/// Group, kind and name; a default's group is empty.
fn names(metadata: &Metadata, invalid: Invalid) -> Result<[String; 3], Invalid> {
    match metadata.kind.clone().ok_or(invalid)? {
        metadata::Kind::Default(name) => Ok([String::new(), "default".to_owned(), name]),
        metadata::Kind::Resource(r) => Ok([r.group, r.kind, r.name]),
    }
}

fn cidr(network: net::IpNetwork) -> Option<Cidr> {
    let addr = network.ip.and_then(|ip| std::net::IpAddr::try_from(ip).ok())?;
    let most = if addr.is_ipv4() { 32 } else { 128 };
    u8::try_from(network.prefix_len).ok().filter(|prefix| *prefix <= most).map(|prefix| Cidr { addr, prefix })
}

fn duration(duration: prost_types::Duration) -> Option<Duration> {
    Duration::try_from(duration).ok()
}
