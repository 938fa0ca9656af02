//! How to reach an endpoint: on the mesh, or in plaintext with a typed reason. The only maker of `Plaintext`.
//!
//! Step "decision" of the outbound path. Order: our own address is never encrypted, an identity means mutual TLS, and
//! plaintext is what remains. There is no way from a failed handshake back to here.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::model::Endpoint;
use crate::reasons::{NoTls, Unroutable};

/// What this pod's proxy calls its own.
#[derive(Clone, Copy, Debug)]
pub struct Own<'a> {
    /// The pod's addresses.
    pub ips: &'a [IpAddr],
    /// The ports the proxy listens on.
    pub ports: &'a [u16],
}

/// How an endpoint is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Mutual TLS; `identity` is the SNI and the name that must be proved.
    Mesh {
        identity: Arc<str>,
        transport: Transport,
    },
    Plain(Plaintext),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// A stream to `port` of the pod, on a link to its proxy at `proxy`.
    Link { proxy: SocketAddr, port: u16 },
    /// A TLS connection of its own to the endpoint's address, no ALPN.
    Direct { addr: SocketAddr },
}

/// The right to send without TLS to one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plaintext {
    addr: SocketAddr,
    reason: NoTls,
}

impl Plaintext {
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }
    pub fn reason(&self) -> NoTls {
        self.reason
    }
}

/// Decides how `endpoint` is reached from the pod that owns `own`.
///
/// Errors: `Loop` for loopback addresses and the proxy's own ports, `InvalidIdentity` for a name no certificate can carry.
pub fn decide(endpoint: &Endpoint, own: Own<'_>) -> Result<Plan, Unroutable> {
    let (ip, port) = (endpoint.addr.ip().to_canonical(), endpoint.addr.port());
    if ip.is_loopback() || ip.is_unspecified() {
        return Err(Unroutable::Loop);
    }
    if own.ips.iter().any(|own| own.to_canonical() == ip) {
        if own.ports.contains(&port) {
            return Err(Unroutable::Loop);
        }
        return Ok(Plan::Plain(Plaintext { addr: endpoint.addr, reason: NoTls::Loopback }));
    }
    match &endpoint.tls {
        Err(reason) => Ok(Plan::Plain(Plaintext { addr: endpoint.addr, reason: *reason })),
        Ok(identity) if !is_identity(identity) => Err(Unroutable::InvalidIdentity),
        Ok(identity) => {
            let transport = match endpoint.opaque_transport {
                Some(inbound) => Transport::Link { proxy: SocketAddr::new(endpoint.addr.ip(), inbound), port },
                None => Transport::Direct { addr: endpoint.addr },
            };
            Ok(Plan::Mesh { identity: Arc::clone(identity), transport })
        }
    }
}

/// True for a DNS name that can be an SNI (RFC 6066 section 3, RFC 5890): labels of letters, digits, `-` and `_`.
pub fn is_identity(name: &str) -> bool {
    let label = |l: &str| {
        (1..=63).contains(&l.len())
            && l.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_')
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    name.len() <= 253 && name.split('.').all(label) && name.parse::<IpAddr>().is_err()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Hint;

    const ID: &str = "web.emojivoto.serviceaccount.identity.mantle.cluster.local";

    fn endpoint(addr: &str, tls: Result<&str, NoTls>, opaque_transport: Option<u16>) -> Endpoint {
        let addr = addr.parse().unwrap();
        Endpoint { addr, tls: tls.map(Into::into), opaque_transport, hint: Hint::Unknown, labels: [].into() }
    }

    #[test]
    fn every_endpoint_has_one_plan_or_one_reason() {
        let own_ips = ["10.203.0.9".parse().unwrap()];
        let own = Own { ips: &own_ips, ports: &[4140, 4143, 4190, 4191] };
        let plain = |addr: &str, reason| Ok(Plan::Plain(Plaintext { addr: addr.parse().unwrap(), reason }));
        let mesh = |transport| Ok(Plan::Mesh { identity: ID.into(), transport });
        let unknown = NoTls::NotProvidedByServiceDiscovery;
        let cases = [
            (
                endpoint("10.203.0.2:8080", Ok(ID), Some(4143)),
                mesh(Transport::Link { proxy: "10.203.0.2:4143".parse().unwrap(), port: 8080 }),
            ),
            (
                endpoint("10.203.0.2:4191", Ok(ID), None),
                mesh(Transport::Direct { addr: "10.203.0.2:4191".parse().unwrap() }),
            ),
            (endpoint("10.203.0.2:8080", Err(unknown), Some(4143)), plain("10.203.0.2:8080", unknown)),
            (endpoint("10.203.0.9:8080", Ok(ID), Some(4143)), plain("10.203.0.9:8080", NoTls::Loopback)),
            (endpoint("[::ffff:10.203.0.9]:80", Ok(ID), None), plain("[::ffff:10.203.0.9]:80", NoTls::Loopback)),
            (endpoint("10.203.0.9:4143", Ok(ID), None), Err(Unroutable::Loop)),
            (endpoint("127.0.0.1:8080", Err(unknown), None), Err(Unroutable::Loop)),
            (endpoint("[::ffff:127.0.0.1]:8080", Err(unknown), None), Err(Unroutable::Loop)),
            (endpoint("0.0.0.0:8080", Err(unknown), None), Err(Unroutable::Loop)),
            (endpoint("10.203.0.2:8080", Ok(""), None), Err(Unroutable::InvalidIdentity)),
            (endpoint("10.203.0.2:8080", Ok("a b"), None), Err(Unroutable::InvalidIdentity)),
            (endpoint("10.203.0.2:8080", Ok("10.0.0.1"), None), Err(Unroutable::InvalidIdentity)),
            (endpoint("10.203.0.2:8080", Ok("a..b"), None), Err(Unroutable::InvalidIdentity)),
        ];
        for (endpoint, want) in cases {
            assert_eq!(decide(&endpoint, own), want, "{endpoint:?}");
        }
    }
}
