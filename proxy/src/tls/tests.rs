//! Certificates made by a small authority of the tests, and handshakes in memory.

use std::io::{Read, Write};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    SanType,
};
use rustls::{ClientConnection, HandshakeKind, NamedGroup, ProtocolVersion, ServerConnection};

use super::*;

pub(crate) const WEB: &str = "web.shop.serviceaccount.identity.mantle.cluster.local";
pub(crate) const API: &str = "api.shop.serviceaccount.identity.mantle.cluster.local";

/// A root and its issuer, as the control plane has them.
pub(crate) struct Ca {
    pub(crate) root: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

/// What a test wants of a leaf.
pub(crate) struct Leaf<'a> {
    pub(crate) name: &'a str,
    pub(crate) spiffe: &'a str,
    /// Zero: it is valid now.
    pub(crate) begins_in: Duration,
    pub(crate) lifetime: Duration,
    pub(crate) usages: &'a [ExtendedKeyUsagePurpose],
}

impl<'a> Leaf<'a> {
    pub(crate) fn named(name: &'a str) -> Self {
        Self {
            name,
            spiffe: "spiffe://cluster.local/ns/shop/sa/x",
            begins_in: Duration::ZERO,
            lifetime: Duration::from_secs(3600),
            usages: &[ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
        }
    }
}

impl Ca {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().expect("key");
        let mut params = CertificateParams::new(Vec::new()).expect("params");
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "root.mantle.cluster.local");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = params.self_signed(&key).expect("root").der().clone();
        Self { root, issuer: Issuer::new(params, key) }
    }

    pub(crate) fn trust(&self) -> Trust {
        Trust::new(std::slice::from_ref(&self.root)).expect("trust")
    }

    /// Signs `key` (a `KeyPair` or the public key of a CSR) as `leaf` says.
    pub(crate) fn issue(&self, leaf: &Leaf<'_>, key: &impl rcgen::PublicKeyData) -> CertificateDer<'static> {
        let mut params = CertificateParams::new(vec![leaf.name.to_owned()]).expect("params");
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names.push(SanType::URI(leaf.spiffe.try_into().expect("uri")));
        params.extended_key_usages = leaf.usages.to_vec();
        let now = SystemTime::now() + leaf.begins_in;
        params.not_before = (now - Duration::from_secs(20)).into();
        // Certificates know whole seconds: never less than asked for.
        params.not_after = (now + leaf.lifetime + Duration::from_secs(1)).into();
        params.signed_by(key, &self.issuer).expect("leaf").der().clone()
    }

    pub(crate) fn credentials(&self, name: &str) -> Credentials {
        self.credentials_in(Duration::ZERO, name)
    }

    /// Of a certificate that begins so much later, as whoever has a fast clock makes it.
    pub(crate) fn credentials_in(&self, begins_in: Duration, name: &str) -> Credentials {
        let key = KeyPair::generate().expect("key");
        let leaf = self.issue(&Leaf { begins_in, ..Leaf::named(name) }, &key);
        let then = SystemTime::now() + begins_in;
        self.trust().credentials(1, &[leaf], private(&key), &Arc::from(name), then).expect("credentials")
    }
}

/// PEM of a DER certificate (RFC 7468).
pub(crate) fn pem(der: &CertificateDer<'_>) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::from("-----BEGIN CERTIFICATE-----\n");
    for (n, chunk) in der.chunks(3).enumerate() {
        let bits = u32::from(chunk[0]) << 16
            | u32::from(*chunk.get(1).unwrap_or(&0)) << 8
            | u32::from(*chunk.get(2).unwrap_or(&0));
        for at in 0..4 {
            let six = (bits >> (18 - 6 * at)) as usize & 63;
            text.push(if at <= chunk.len() { ALPHABET[six] as char } else { '=' });
        }
        if n % 16 == 15 {
            text.push('\n');
        }
    }
    text + "\n-----END CERTIFICATE-----\n"
}

pub(crate) fn private(key: &KeyPair) -> PrivateKeyDer<'static> {
    PrivateKeyDer::try_from(key.serialize_der()).expect("PKCS#8")
}

/// Runs both sides in memory until neither has anything to say.
pub(super) fn handshake(
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    name: &str,
) -> Result<(ClientConnection, ServerConnection), rustls::Error> {
    let mut client = ClientConnection::new(client, server_name(name).expect("name"))?;
    let mut server = ServerConnection::new(server)?;
    for _ in 0..10 {
        let mut wire = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut wire).expect("memory");
        }
        let mut wire = wire.as_slice();
        while !wire.is_empty() {
            server.read_tls(&mut wire).expect("memory");
            server.process_new_packets()?;
        }
        let mut wire = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut wire).expect("memory");
        }
        let mut wire = wire.as_slice();
        while !wire.is_empty() {
            client.read_tls(&mut wire).expect("memory");
            client.process_new_packets()?;
        }
    }
    Ok((client, server))
}

#[test]
fn a_link_is_mutual_tls_1_3_with_the_post_quantum_group_and_the_mux() {
    let ca = Ca::new();
    let (web, api) = (ca.credentials(WEB), ca.credentials(API));
    let (client, server) = handshake(web.client_link, api.server_link, API).expect("handshake");
    assert_eq!(client.protocol_version(), Some(ProtocolVersion::TLSv1_3));
    assert_eq!(client.negotiated_key_exchange_group().map(|g| g.name()), Some(NamedGroup::X25519MLKEM768));
    assert_eq!(client.alpn_protocol(), Some(ALPN_MUX));
    assert_eq!(server.server_name(), Some(API));
    let peer = peer(&server.peer_certificates().expect("client's chain")[0]).expect("readable");
    assert_eq!(&*peer.id.dns, WEB);
    assert_eq!(peer.id.spiffe.as_deref(), Some("spiffe://cluster.local/ns/shop/sa/x"));
    assert!(peer.not_after > SystemTime::now());
}

#[test]
fn the_second_connection_resumes_within_one_certificate_only() {
    let ca = Ca::new();
    let (web, api) = (ca.credentials(WEB), ca.credentials(API));
    let kind = |server: &Arc<ServerConfig>| {
        let (mut client, mut server) = handshake(web.client_link.clone(), server.clone(), API).expect("handshake");
        server.writer().write_all(b"x").expect("memory");
        let mut wire = Vec::new();
        server.write_tls(&mut wire).expect("memory");
        client.read_tls(&mut wire.as_slice()).expect("memory");
        client.process_new_packets().expect("data");
        let mut byte = [0];
        client.reader().read_exact(&mut byte).expect("data");
        (client.handshake_kind().expect("done"), server.peer_certificates().is_some())
    };
    assert_eq!(kind(&api.server_link), (HandshakeKind::Full, true));
    assert_eq!(kind(&api.server_link), (HandshakeKind::Resumed, true));
    let renewed = ca.credentials(API);
    assert_eq!(kind(&renewed.server_link), (HandshakeKind::Full, true));
}

#[test]
fn a_client_without_a_certificate_is_let_in_and_has_no_identity() {
    let ca = Ca::new();
    let api = ca.credentials(API);
    let (client, server) = handshake(ca.trust().anonymous_client(), api.server_plain, API).expect("handshake");
    assert_eq!(client.alpn_protocol(), None);
    assert!(server.peer_certificates().is_none());
}

#[test]
fn another_name_another_root_and_a_foreign_client_are_refused() {
    let (ca, other) = (Ca::new(), Ca::new());
    let (web, api) = (ca.credentials(WEB), ca.credentials(API));
    handshake(web.client_link.clone(), api.server_link.clone(), WEB).expect_err("api is not web");
    let stranger = other.credentials(WEB);
    handshake(stranger.client_link, api.server_link, API).expect_err("api's root is unknown to the stranger");
    let stranger_server = other.credentials(API);
    handshake(web.client_link, stranger_server.server_link, API).expect_err("the stranger's root is unknown to web");
}

#[test]
fn an_issued_certificate_is_checked_before_it_is_used() {
    let ca = Ca::new();
    let (key, other_key) = (KeyPair::generate().expect("key"), KeyPair::generate().expect("key"));
    let build = |leaf: CertificateDer<'static>, now: SystemTime| {
        ca.trust().credentials(1, &[leaf], private(&key), &Arc::from(WEB), now).map(|c| c.epoch)
    };
    let now = SystemTime::now();
    assert_eq!(build(ca.issue(&Leaf::named(WEB), &key), now).expect("good"), 1);
    assert!(matches!(build(ca.issue(&Leaf::named(API), &key), now), Err(BadCertificate::WrongName { .. })));
    assert!(matches!(build(ca.issue(&Leaf::named(WEB), &other_key), now), Err(BadCertificate::WrongKey)));
    assert!(matches!(build(Ca::new().issue(&Leaf::named(WEB), &key), now), Err(BadCertificate::Untrusted(_))));
    let later = now + Duration::from_secs(7200);
    assert!(matches!(build(ca.issue(&Leaf::named(WEB), &key), later), Err(BadCertificate::Untrusted(_))));
    for usage in [ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth] {
        let leaf = ca.issue(&Leaf { usages: &[usage], ..Leaf::named(WEB) }, &key);
        assert!(matches!(build(leaf, now), Err(BadCertificate::Untrusted(_))), "one usage is not enough");
    }
    assert!(matches!(build(CertificateDer::from(vec![1, 2, 3]), now), Err(BadCertificate::Unreadable)));
}
