//! May this client use this port, or this route of it? The only maker of `Permit`s.
//!
//! Semantics of Linkerd's server policies: any matching authorization admits; a request is judged by the union of its
//! route's and its server's authorizations; loopback clients and probe routes are always admitted. Pure: the policy is a
//! snapshot, and whoever holds a connection asks again when the snapshot changes.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::model::{Authorization, Cidr, Clients, InboundRoute, Network, PathMatch, PeerId, Protocol, ServerPolicy};
use crate::reasons::Denied;

/// What TLS proved about the client.
#[derive(Clone, Copy, Debug)]
pub enum ClientTls<'a> {
    /// Plaintext, or TLS that was passed through.
    None,
    /// Mesh TLS without a client certificate.
    Anonymous,
    Identity(&'a PeerId),
}

/// Proof that a client was admitted, with the names that metrics show. Made by `authorize*` alone.
#[derive(Clone, Debug)]
pub struct Permit {
    policy: Arc<ServerPolicy>,
    route: Option<usize>,
    by: By,
}

/// `group`, `kind`, `name` as in the labels `srv_*`, `route_*` and `authz_*`.
pub type Names<'a> = [&'a str; 3];

/// Judges a connection (opaque TCP) by the server's own authorizations.
pub fn authorize(policy: &Arc<ServerPolicy>, client: IpAddr, tls: ClientTls<'_>) -> Result<Permit, Denied> {
    let by = admitted(&policy.authorizations, client, tls).map(By::Server).or(local(client));
    by.map(|by| Permit { policy: Arc::clone(policy), route: None, by }).ok_or(Denied::Unauthorized)
}

/// Judges a request. `path` is the path of the target without its query.
///
/// No route matches: `RouteNotFound` (404); no authorization of route or server matches: `Unauthorized` (403).
pub fn authorize_request(
    policy: &Arc<ServerPolicy>,
    client: IpAddr,
    tls: ClientTls<'_>,
    method: &str,
    path: &str,
) -> Result<Permit, Denied> {
    if policy.routes.is_empty() {
        return authorize(policy, client, tls);
    }
    let route = best_route(&policy.routes, method, path).ok_or(Denied::RouteNotFound)?;
    let by = admitted(&policy.routes[route].authorizations, client, tls)
        .map(By::Route)
        .or_else(|| admitted(&policy.authorizations, client, tls).map(By::Server))
        .or(local(client));
    by.map(|by| Permit { policy: Arc::clone(policy), route: Some(route), by }).ok_or(Denied::Unauthorized)
}

impl Permit {
    pub fn policy(&self) -> &Arc<ServerPolicy> {
        &self.policy
    }
    pub fn server(&self) -> Names<'_> {
        [&self.policy.group, &self.policy.kind, &self.policy.name]
    }
    /// The matched route; the default route's name if the policy has none.
    pub fn route(&self) -> Names<'_> {
        match self.route {
            Some(i) => {
                let route = &self.policy.routes[i];
                [&route.group, &route.kind, &route.name]
            }
            None => ["", "default", "default"],
        }
    }
    pub fn authorization(&self) -> Names<'_> {
        let list = match self.by {
            By::Loopback => return ["", "default", "localhost"],
            By::Server(_) => &self.policy.authorizations,
            By::Route(_) => &self.policy.routes[self.route.unwrap_or_default()].authorizations,
        };
        let (By::Server(i) | By::Route(i)) = self.by else { return ["", "default", "localhost"] };
        [&list[i].group, &list[i].kind, &list[i].name]
    }
}

/// The policies that a word stands for: what a port accepts until the control plane has answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DefaultPolicy {
    AllUnauthenticated,
    AllAuthenticated,
    AllTlsUnauthenticated,
    ClusterUnauthenticated,
    ClusterAuthenticated,
    ClusterTlsUnauthenticated,
    /// Admits everyone, under a name that tells that nobody has decided so.
    Audit,
    Deny,
}

impl DefaultPolicy {
    pub const ALL: [Self; 8] = [
        Self::AllUnauthenticated,
        Self::AllAuthenticated,
        Self::AllTlsUnauthenticated,
        Self::ClusterUnauthenticated,
        Self::ClusterAuthenticated,
        Self::ClusterTlsUnauthenticated,
        Self::Audit,
        Self::Deny,
    ];

    /// The word used in `INBOUND_DEFAULT_POLICY` and in the annotation `config.mantle.dev/default-inbound-policy`.
    pub const fn word(self) -> &'static str {
        match self {
            Self::AllUnauthenticated => "all-unauthenticated",
            Self::AllAuthenticated => "all-authenticated",
            Self::AllTlsUnauthenticated => "all-tls-unauthenticated",
            Self::ClusterUnauthenticated => "cluster-unauthenticated",
            Self::ClusterAuthenticated => "cluster-authenticated",
            Self::ClusterTlsUnauthenticated => "cluster-tls-unauthenticated",
            Self::Audit => "audit",
            Self::Deny => "deny",
        }
    }

    /// The policy of `word`; `None`: no such word.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|policy| policy.word() == word)
    }

    /// The same policy for a port that accepts meshed clients only (`proxy-require-identity-inbound-ports`).
    #[must_use]
    pub const fn authenticated(self) -> Self {
        match self {
            Self::AllUnauthenticated | Self::AllTlsUnauthenticated | Self::AllAuthenticated | Self::Audit => {
                Self::AllAuthenticated
            }
            Self::ClusterUnauthenticated | Self::ClusterTlsUnauthenticated | Self::ClusterAuthenticated => {
                Self::ClusterAuthenticated
            }
            Self::Deny => Self::Deny,
        }
    }

    /// Writes the policy out. `cluster` are the networks that count as the cluster's own.
    pub fn server_policy(self, cluster: &[Cidr], protocol: Protocol, detect_timeout: Duration) -> ServerPolicy {
        let clients = match self {
            Self::AllUnauthenticated | Self::ClusterUnauthenticated | Self::Audit => Some(Clients::Anyone),
            Self::AllTlsUnauthenticated | Self::ClusterTlsUnauthenticated => Some(Clients::AnyTls),
            Self::AllAuthenticated | Self::ClusterAuthenticated => {
                Some(Clients::Identities { names: Vec::new(), suffixes: vec![Vec::new()] })
            }
            Self::Deny => None,
        };
        let everywhere = [Cidr::ANY_V4, Cidr::ANY_V6];
        let networks = match self {
            Self::AllUnauthenticated
            | Self::AllAuthenticated
            | Self::AllTlsUnauthenticated
            | Self::Audit
            | Self::Deny => &everywhere,
            Self::ClusterUnauthenticated | Self::ClusterAuthenticated | Self::ClusterTlsUnauthenticated => cluster,
        };
        let authorization = clients.map(|clients| Authorization {
            group: String::new(),
            kind: "default".into(),
            name: self.word().into(),
            networks: networks.iter().map(|net| Network { net: *net, except: Vec::new() }).collect(),
            clients,
        });
        ServerPolicy {
            protocol,
            detect_timeout,
            group: String::new(),
            kind: "default".into(),
            name: self.word().into(),
            authorizations: authorization.into_iter().collect(),
            routes: Vec::new(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Loopback,
    Server(usize),
    Route(usize),
}

fn local(client: IpAddr) -> Option<By> {
    client.to_canonical().is_loopback().then_some(By::Loopback)
}

/// The index of the first authorization that admits the client.
fn admitted(list: &[Authorization], client: IpAddr, tls: ClientTls<'_>) -> Option<usize> {
    list.iter().position(|authorization| {
        authorization.networks.iter().any(|network| network.admits(client)) && authorization.clients.admit(tls)
    })
}

/// The most specific route: exact path, then longest prefix, then a named method, then order (Gateway API precedence).
fn best_route(routes: &[InboundRoute], method: &str, path: &str) -> Option<usize> {
    let mut best: Option<((u8, usize, bool), usize)> = None;
    for (i, route) in routes.iter().enumerate() {
        let any = [(0, 0, false)]; // a route without matches takes every request
        let ranks = route.matches.iter().filter_map(|m| {
            let named = m.method.is_some();
            let method_ok = m.method.as_deref().is_none_or(|wanted| wanted == method);
            let rank = match &m.path {
                PathMatch::Any => Some((0, 0, named)),
                PathMatch::Exact(exact) => (exact == path).then_some((2, exact.len(), named)),
                PathMatch::Prefix(prefix) => prefix_matches(prefix, path).then_some((1, prefix.len(), named)),
            };
            rank.filter(|_| method_ok)
        });
        let rank = if route.matches.is_empty() { any.into_iter().max() } else { ranks.max() };
        if let Some(rank) = rank
            && best.is_none_or(|(top, _)| rank > top)
        {
            best = Some((rank, i));
        }
    }
    best.map(|(_, i)| i)
}

/// Prefixes match whole path segments: `/a` is a prefix of `/a` and `/a/b`, not of `/ab`.
fn prefix_matches(prefix: &str, path: &str) -> bool {
    let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
    path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

impl Clients {
    fn admit(&self, tls: ClientTls<'_>) -> bool {
        match (self, tls) {
            (Self::Anyone, _) | (Self::AnyTls, ClientTls::Anonymous | ClientTls::Identity(_)) => true,
            (Self::AnyTls, ClientTls::None) => false,
            (Self::Identities { .. }, ClientTls::None | ClientTls::Anonymous) => false,
            (Self::Identities { names, suffixes }, ClientTls::Identity(peer)) => {
                let spiffe = peer.spiffe.as_deref();
                names.iter().any(|name| (!name.is_empty() && **name == *peer.dns) || spiffe == Some(name))
                    || suffixes.iter().any(|suffix| has_suffix(&peer.dns, suffix))
            }
        }
    }
}

/// Suffixes match whole labels; no labels match every identity.
fn has_suffix(name: &str, suffix: &[String]) -> bool {
    let mut labels = name.rsplit('.');
    suffix.iter().rev().all(|wanted| labels.next().is_some_and(|label| label == wanted))
}

impl Network {
    /// True if `ip` is in the network and in none of its exceptions.
    pub fn admits(&self, ip: IpAddr) -> bool {
        self.net.contains(ip) && !self.except.iter().any(|except| except.contains(ip))
    }
}

impl Cidr {
    pub const ANY_V4: Self = Self { addr: IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), prefix: 0 };
    pub const ANY_V6: Self = Self { addr: IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED), prefix: 0 };

    /// True if `ip` lies in this network. IPv4-mapped IPv6 addresses count as IPv4.
    pub fn contains(&self, ip: IpAddr) -> bool {
        match (self.addr, ip.to_canonical()) {
            (IpAddr::V4(net), IpAddr::V4(ip)) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.prefix.min(32))).unwrap_or(0);
                (net.to_bits() ^ ip.to_bits()) & mask == 0
            }
            (IpAddr::V6(net), IpAddr::V6(ip)) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.prefix.min(128))).unwrap_or(0);
                (net.to_bits() ^ ip.to_bits()) & mask == 0
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::RouteMatch;

    const CLUSTER: Cidr = Cidr { addr: IpAddr::V4(std::net::Ipv4Addr::new(10, 203, 0, 0)), prefix: 16 };

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn peer() -> PeerId {
        PeerId {
            dns: "web.emojivoto.serviceaccount.identity.mantle.cluster.local".into(),
            spiffe: Some("spiffe://cluster.local/ns/emojivoto/sa/web".into()),
        }
    }

    fn authorization(name: &str, clients: Clients) -> Authorization {
        Authorization {
            group: "policy.linkerd.io".into(),
            kind: "authorizationpolicy".into(),
            name: name.into(),
            networks: vec![Network { net: Cidr::ANY_V4, except: Vec::new() }],
            clients,
        }
    }

    fn route(name: &str, matches: Vec<(Option<&str>, PathMatch)>, authorizations: Vec<Authorization>) -> InboundRoute {
        let matches =
            matches.into_iter().map(|(method, path)| RouteMatch { path, method: method.map(Into::into) }).collect();
        InboundRoute { group: "g".into(), kind: "httproute".into(), name: name.into(), matches, authorizations }
    }

    fn server(authorizations: Vec<Authorization>, routes: Vec<InboundRoute>) -> Arc<ServerPolicy> {
        let mut policy = DefaultPolicy::Deny.server_policy(&[], Protocol::Detect, Duration::from_secs(10));
        (policy.authorizations, policy.routes) = (authorizations, routes);
        Arc::new(policy)
    }

    #[test]
    fn the_default_policies_admit_whom_their_word_says() {
        let peer = peer();
        let (none, anonymous, id) = (ClientTls::None, ClientTls::Anonymous, ClientTls::Identity(&peer));
        // word, then admitted: (plain, TLS, identity) from the cluster, (plain, TLS, identity) from elsewhere
        let table = [
            ("all-unauthenticated", [true, true, true], [true, true, true]),
            ("all-tls-unauthenticated", [false, true, true], [false, true, true]),
            ("all-authenticated", [false, false, true], [false, false, true]),
            ("cluster-unauthenticated", [true, true, true], [false, false, false]),
            ("cluster-tls-unauthenticated", [false, true, true], [false, false, false]),
            ("cluster-authenticated", [false, false, true], [false, false, false]),
            ("audit", [true, true, true], [true, true, true]),
            ("deny", [false, false, false], [false, false, false]),
        ];
        for (word, inside, outside) in table {
            let policy =
                DefaultPolicy::parse(word).unwrap().server_policy(&[CLUSTER], Protocol::Detect, Duration::ZERO);
            let policy = Arc::new(policy);
            for (from, want) in [("10.203.1.2", inside), ("192.0.2.1", outside)] {
                let got = [none, anonymous, id].map(|tls| authorize(&policy, ip(from), tls).is_ok());
                assert_eq!(got, want, "{word} from {from}");
            }
            let permit = authorize(&policy, ip("::ffff:127.0.0.1"), none).unwrap();
            assert!(
                ["all-unauthenticated", "audit"].contains(&word)
                    || permit.authorization() == ["", "default", "localhost"],
                "{word}"
            );
            assert_eq!(permit.server(), ["", "default", word]);
        }
        assert_eq!(DefaultPolicy::parse("all"), None);
    }

    #[test]
    fn identities_match_by_name_uri_or_whole_label_suffix() {
        let peer = peer();
        let suffix = |text: &str| text.split('.').map(Into::into).collect::<Vec<String>>();
        let cases = [
            (vec![peer.dns.to_string()], vec![], true),
            (vec!["spiffe://cluster.local/ns/emojivoto/sa/web".into()], vec![], true),
            (vec!["spiffe://cluster.local/ns/emojivoto/sa/we".into(), String::new()], vec![], false),
            (vec![], vec![suffix("identity.mantle.cluster.local")], true),
            (vec![], vec![suffix("entity.mantle.cluster.local")], false),
            (vec![], vec![vec![]], true),
            (vec![], vec![], false),
        ];
        for (names, suffixes, want) in cases {
            let clients = Clients::Identities { names, suffixes };
            assert_eq!(clients.admit(ClientTls::Identity(&peer)), want, "{clients:?}");
            assert!(!clients.admit(ClientTls::Anonymous));
        }
        let uri_only = PeerId { dns: "".into(), spiffe: None };
        let named = Clients::Identities { names: vec![String::new()], suffixes: vec![] };
        assert!(!named.admit(ClientTls::Identity(&uri_only)), "an empty name is nobody's");
    }

    #[test]
    fn exceptions_are_cut_out_of_networks() {
        let network = Network { net: CLUSTER, except: vec![Cidr { addr: ip("10.203.7.0"), prefix: 24 }] };
        let cases = [("10.203.6.255", true), ("10.203.7.1", false), ("10.204.0.0", false), ("::ffff:10.203.1.1", true)];
        for (address, want) in cases {
            assert_eq!(network.admits(ip(address)), want, "{address}");
        }
        let v6 = Cidr { addr: ip("fd00::"), prefix: 8 };
        assert!(v6.contains(ip("fdff::1")) && !v6.contains(ip("fc00::1")) && !v6.contains(ip("10.0.0.1")));
        assert!(Cidr::ANY_V6.contains(ip("::1")) && !Cidr::ANY_V4.contains(ip("::1")));
    }

    #[test]
    fn a_request_is_judged_by_the_union_of_route_and_server() {
        let anyone = || vec![authorization("open", Clients::Anyone)];
        let prefix = |p: &str| vec![(None, PathMatch::Prefix(p.into()))];
        let (none, from) = (ClientTls::None, ip("192.0.2.1"));
        let judge = |policy: &Arc<ServerPolicy>, method: &str, path: &str| {
            authorize_request(policy, from, none, method, path).map(|p| p.route()[2].to_owned())
        };
        // Server open: every route is open. Server closed: only the probe route is.
        let open = server(anyone(), vec![route("all", vec![], vec![])]);
        assert_eq!(judge(&open, "GET", "/x"), Ok("all".into()));
        let probe = route("probe", vec![(Some("GET"), PathMatch::Exact("/ready".into()))], anyone());
        let closed = server(vec![], vec![route("all", prefix("/"), vec![]), probe]);
        assert_eq!(judge(&closed, "GET", "/ready"), Ok("probe".into()));
        assert_eq!(judge(&closed, "POST", "/ready"), Err(Denied::Unauthorized));
        assert_eq!(judge(&closed, "GET", "/readyz"), Err(Denied::Unauthorized));
        assert!(authorize(&closed, from, none).is_err(), "a probe route does not open the port for TCP");
        let narrow = server(anyone(), vec![route("a", prefix("/a"), vec![]), route("ab", prefix("/a/b/"), vec![])]);
        assert_eq!(judge(&narrow, "GET", "/a/b/c"), Ok("ab".into()));
        assert_eq!(judge(&narrow, "GET", "/ab"), Err(Denied::RouteNotFound));
        let permit = authorize_request(&closed, from, none, "GET", "/ready").unwrap();
        assert_eq!(permit.authorization(), ["policy.linkerd.io", "authorizationpolicy", "open"]);
        let no_routes = server(anyone(), vec![]);
        assert_eq!(judge(&no_routes, "GET", "/"), Ok("default".into()));
    }
}
