//! Which requests an observer wants to see: the match tree of `io.linkerd.proxy.tap` as values.
//!
//! `src/tap.rs` builds the tree from the wire, once, and asks it per request; nothing here allocates.

use std::net::SocketAddr;

use crate::model::Cidr;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TapMatch {
    /// True of every request if empty.
    All(Vec<Self>),
    /// True of no request if empty.
    Any(Vec<Self>),
    Not(Box<Self>),
    Source(Tcp),
    Destination(Tcp),
    Scheme(String),
    Method(String),
    Authority(Text),
    Path(Text),
    DestinationLabel(String, String),
    RouteLabel(String, String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tcp {
    Net(Cidr),
    /// Both ends included.
    Ports(u16, u16),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Text {
    Exact(String),
    Prefix(String),
}

/// What a request shows to the tree.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    pub src: SocketAddr,
    pub dst: SocketAddr,
    pub scheme: &'a str,
    pub method: &'a str,
    pub authority: &'a str,
    pub path: &'a str,
    pub dst_labels: &'a [(String, String)],
    pub route_labels: &'a [(&'a str, &'a str)],
}

impl TapMatch {
    pub fn matches(&self, request: &Subject<'_>) -> bool {
        match self {
            Self::All(all) => all.iter().all(|m| m.matches(request)),
            Self::Any(any) => any.iter().any(|m| m.matches(request)),
            Self::Not(not) => !not.matches(request),
            Self::Source(tcp) => tcp.matches(request.src),
            Self::Destination(tcp) => tcp.matches(request.dst),
            Self::Scheme(scheme) => scheme.eq_ignore_ascii_case(request.scheme),
            Self::Method(method) => method == request.method,
            Self::Authority(text) => text.matches(request.authority),
            Self::Path(text) => text.matches(request.path),
            Self::DestinationLabel(key, value) => request.dst_labels.iter().any(|(k, v)| k == key && v == value),
            Self::RouteLabel(key, value) => request.route_labels.iter().any(|(k, v)| k == key && v == value),
        }
    }
}

impl Tcp {
    fn matches(&self, addr: SocketAddr) -> bool {
        match self {
            Self::Net(net) => net.contains(addr.ip()),
            Self::Ports(min, max) => (*min..=*max).contains(&addr.port()),
        }
    }
}

impl Text {
    fn matches(&self, text: &str) -> bool {
        match self {
            Self::Exact(exact) => exact == text,
            Self::Prefix(prefix) => text.starts_with(prefix.as_str()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::TapMatch::*;
    use super::*;

    #[test]
    fn a_request_is_matched_by_every_kind_of_leaf_and_branch() {
        let labels = [("deployment".to_owned(), "web".to_owned())];
        let request = Subject {
            src: "10.203.0.7:40000".parse().unwrap(),
            dst: "10.203.0.8:8080".parse().unwrap(),
            scheme: "http",
            method: "GET",
            authority: "web-svc.emojivoto:80",
            path: "/api/vote?choice=:doughnut:",
            dst_labels: &labels,
            route_labels: &[("route", "vote")],
        };
        let net = |prefix| Tcp::Net(Cidr { addr: "10.203.0.8".parse().unwrap(), prefix });
        let exact = |t: &str| Text::Exact(t.into());
        let prefix = |t: &str| Text::Prefix(t.into());
        let label = |k: &str, v: &str| DestinationLabel(k.into(), v.into());
        let cases = [
            (All(vec![]), true),
            (Any(vec![]), false),
            (Not(Box::new(Any(vec![]))), true),
            (Source(net(32)), false),
            (Source(net(24)), true),
            (Destination(net(32)), true),
            (Destination(Tcp::Ports(80, 8079)), false),
            (Destination(Tcp::Ports(8080, 8080)), true),
            (Scheme("HTTP".into()), true),
            (Scheme("https".into()), false),
            (Method("GET".into()), true),
            (Method("get".into()), false),
            (Authority(exact("web-svc.emojivoto:80")), true),
            (Authority(exact("web-svc")), false),
            (Authority(prefix("web-svc")), true),
            (Path(prefix("/api/")), true),
            (Path(exact("/api/")), false),
            (label("deployment", "web"), true),
            (label("deployment", "we"), false),
            (RouteLabel("route".into(), "vote".into()), true),
            (RouteLabel("route".into(), "list".into()), false),
            (All(vec![Method("GET".into()), label("deployment", "emoji")]), false),
            (Any(vec![Method("PUT".into()), label("deployment", "web")]), true),
        ];
        for (tree, want) in cases {
            assert_eq!(tree.matches(&request), want, "{tree:?}");
        }
    }
}
