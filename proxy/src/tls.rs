//! TLS of the mesh: rustls configurations built once per certificate, and identities read from peers.
//!
//! Knows nothing of sockets or streams. `identity.rs` writes; the data threads read through a `watch`. TLS 1.3 only,
//! post-quantum key exchange first, no 0-RTT. Sessions are resumed only within one `Credentials` (the caches belong to
//! its configurations and are bounded), so a renewal or a new bundle ends resumption with what it replaces.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mantle_proxy_core::model::PeerId;
use mantle_proxy_core::route::is_identity;
use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::server::ServerSessionMemoryCache;
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

pub(crate) mod clock;
pub(crate) mod second;

use clock::Outside;
use second::{Names, Second};

/// The ALPN of the mux link between Mantle proxies.
pub(crate) const ALPN_MUX: &[u8] = b"mantle-mux/1";

/// Sessions kept for resumption, per configuration.
const SESSIONS: usize = 256;

/// All that one certificate gives: immutable, replaced as a whole at renewal.
#[derive(Debug)]
pub(crate) struct Credentials {
    /// Grows by one with each certificate or bundle: links remember it and drain when it moves on.
    pub(crate) epoch: u64,
    pub(crate) local: PeerId,
    pub(crate) not_after: SystemTime,
    /// Names of the experimental mode that these configurations accept besides the mesh's own.
    pub(crate) also: Option<Names>,
    /// What is shown, and proved.
    pub(crate) certified: Arc<CertifiedKey>,
    /// Client side: TLS 1.3, our certificate, ALPN `mantle-mux/1`. rustls checks chain and name (SNI = identity).
    pub(crate) client_link: Arc<ClientConfig>,
    /// Client side without ALPN: endpoints that have no `opaque_transport` (4190, 4191, transparent transport).
    pub(crate) client_plain: Arc<ClientConfig>,
    /// Server side on port 4143: client certificate asked for, ALPN `mantle-mux/1` if the client offers it.
    pub(crate) server_link: Arc<ServerConfig>,
    /// Server side on the pod's own ports, 4191 and the application's: client certificate optional, no ALPN.
    pub(crate) server_plain: Arc<ServerConfig>,
    /// The same on 4190, which speaks HTTP/2 only, with its ALPN for clients that insist on one (gRPC libraries do).
    pub(crate) server_http2: Arc<ServerConfig>,
}

/// `None` until the first certificate.
pub(crate) type CredentialsWatch = tokio::sync::watch::Receiver<Option<Arc<Credentials>>>;

/// The mesh's trust roots, and what can be built from them alone.
#[derive(Clone)]
pub(crate) struct Trust {
    roots: Arc<RootCertStore>,
    second: Option<Second>,
    provider: Arc<CryptoProvider>,
}

/// Why an issued certificate is not used.
#[derive(Debug)]
pub(crate) enum BadCertificate {
    /// It does not lead to a trust root, is not valid now, or not for client and server both.
    Untrusted(rustls::Error),
    /// Its names do not include our own.
    WrongName { wanted: Arc<str> },
    /// Its public key is not the one asked for.
    WrongKey,
    /// It cannot be read.
    Unreadable,
    /// A root that cannot be a trust anchor.
    BadRoot,
}

impl fmt::Display for BadCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Untrusted(why) => match Outside::of(why) {
                Some(outside) => write!(f, "the certificate {outside}"),
                None => write!(
                    f,
                    "the certificate does not verify against the trust roots ({why}): is the identity service of this mesh?"
                ),
            },
            Self::WrongName { wanted } => {
                write!(f, "the certificate is not for {wanted}: compare the service account with IDENTITY_LOCAL_NAME")
            }
            Self::WrongKey => f.write_str("the certificate is for another key than the one asked for"),
            Self::Unreadable => f.write_str("the certificate cannot be read"),
            Self::BadRoot => f.write_str("a trust root cannot be used as a trust anchor"),
        }
    }
}

impl std::error::Error for BadCertificate {}

impl Trust {
    /// # Errors
    /// `BadRoot` if one of `anchors` is not usable.
    pub(crate) fn new(anchors: &[CertificateDer<'static>]) -> Result<Self, BadCertificate> {
        let mut roots = RootCertStore::empty();
        for anchor in anchors {
            roots.add(anchor.clone()).map_err(|_| BadCertificate::BadRoot)?;
        }
        Ok(Self { roots: Arc::new(roots), second: None, provider: Arc::new(provider()) })
    }

    /// The same roots, with `second` beside them or without any.
    pub(crate) fn with(&self, second: Option<Second>) -> Self {
        Self { second, ..self.clone() }
    }

    /// The names that `second` may vouch for.
    pub(crate) fn also(&self) -> Option<&Names> {
        self.second.as_ref().map(|second| &second.names)
    }

    /// One-way TLS: the server is verified, nothing is shown. For the first Certify, and for the
    /// experimental mode, whose certificate proves nothing to the control plane.
    pub(crate) fn anonymous_client(&self) -> Arc<ClientConfig> {
        Arc::new(self.client_builder().with_no_client_auth())
    }

    /// Checks `chain` (leaf first) as both a server's and a client's at `now`, for `local_name` and `key`, and builds
    /// every configuration from it.
    ///
    /// # Errors
    /// `BadCertificate`: the caller keeps what it has.
    pub(crate) fn credentials(
        &self,
        epoch: u64,
        chain: &[CertificateDer<'static>],
        key: PrivateKeyDer<'static>,
        local_name: &Arc<str>,
        now: SystemTime,
    ) -> Result<Credentials, BadCertificate> {
        let (leaf, intermediates) = chain.split_first().ok_or(BadCertificate::Unreadable)?;
        let peer = peer(leaf).ok_or(BadCertificate::Unreadable)?;
        let wrong_name = || BadCertificate::WrongName { wanted: local_name.clone() };
        if peer.id.dns != *local_name {
            return Err(wrong_name());
        }
        let server_name = ServerName::try_from(local_name.to_string()).map_err(|_| wrong_name())?;
        let since_epoch = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let unix = UnixTime::since_unix_epoch(since_epoch);
        let (as_server, as_client) = second::verifiers(&self.roots, self.second.as_ref(), &self.provider)?;
        as_server
            .verify_server_cert(leaf, intermediates, &server_name, &[], unix)
            .map_err(BadCertificate::Untrusted)?;
        as_client.verify_client_cert(leaf, intermediates, unix).map_err(BadCertificate::Untrusted)?;

        let certified = CertifiedKey::from_der(chain.to_vec(), key, &self.provider).map_err(|why| match why {
            rustls::Error::InconsistentKeys(_) => BadCertificate::WrongKey,
            _ => BadCertificate::Unreadable,
        })?;
        self.configured(epoch, peer, Arc::new(certified))
    }

    /// The same certificate, configured anew with what this trusts now.
    ///
    /// # Errors
    /// `BadRoot`.
    pub(crate) fn again(&self, epoch: u64, current: &Credentials) -> Result<Credentials, BadCertificate> {
        let peer = Peer { id: current.local.clone(), not_after: current.not_after };
        self.configured(epoch, peer, current.certified.clone())
    }

    fn configured(&self, epoch: u64, peer: Peer, certified: Arc<CertifiedKey>) -> Result<Credentials, BadCertificate> {
        let (as_server, as_client) = second::verifiers(&self.roots, self.second.as_ref(), &self.provider)?;
        let client = |alpn: &[&[u8]]| {
            let resolver = Arc::new(rustls::sign::SingleCertAndKey::from(certified.clone()));
            let mut config = ClientConfig::builder_with_provider(self.provider.clone())
                .with_protocol_versions(TLS13)
                .expect("the provider has TLS 1.3 suites: see provider()")
                .dangerous() // what it takes to name a verifier: ours asks rustls' own, twice at most
                .with_custom_certificate_verifier(as_server.clone())
                .with_client_cert_resolver(resolver);
            config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
            config.resumption = Resumption::in_memory_sessions(SESSIONS);
            Arc::new(config)
        };
        let server = |alpn: &[&[u8]]| {
            let resolver = Arc::new(rustls::sign::SingleCertAndKey::from(certified.clone()));
            let mut config = ServerConfig::builder_with_provider(self.provider.clone())
                .with_protocol_versions(TLS13)
                .expect("the provider has TLS 1.3 suites: see provider()")
                .with_client_cert_verifier(as_client.clone())
                .with_cert_resolver(resolver);
            config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
            config.session_storage = ServerSessionMemoryCache::new(SESSIONS);
            Arc::new(config)
        };
        Ok(Credentials {
            epoch,
            local: peer.id,
            not_after: peer.not_after,
            also: self.second.as_ref().map(|second| second.names.clone()),
            certified: certified.clone(),
            client_link: client(&[ALPN_MUX]),
            client_plain: client(&[]),
            server_link: server(&[ALPN_MUX]),
            server_plain: server(&[]),
            server_http2: server(&[b"h2"]),
        })
    }

    fn client_builder(&self) -> rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert> {
        ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(TLS13)
            .expect("the provider has TLS 1.3 suites: see provider()")
            .with_root_certificates(self.roots.clone())
    }
}

const TLS13: &[&rustls::SupportedProtocolVersion] = &[&rustls::version::TLS13];

/// aws-lc-rs, with the mesh's order of suites and groups.
fn provider() -> CryptoProvider {
    use aws_lc_rs::{cipher_suite, kx_group};
    CryptoProvider {
        cipher_suites: vec![
            cipher_suite::TLS13_AES_128_GCM_SHA256,
            cipher_suite::TLS13_AES_256_GCM_SHA384,
            cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        kx_groups: vec![kx_group::X25519MLKEM768, kx_group::X25519, kx_group::SECP256R1, kx_group::SECP384R1],
        ..aws_lc_rs::default_provider()
    }
}

/// Who a verified leaf belongs to, and until when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Peer {
    pub(crate) id: PeerId,
    /// The leaf's notAfter: what the connection may outlive by nothing.
    pub(crate) not_after: SystemTime,
}

/// Reads a leaf that rustls has already verified: the first DNS name and the first SPIFFE URI of its subject
/// alternative names. `None` if it cannot be read or has neither.
pub(crate) fn peer(leaf: &CertificateDer<'_>) -> Option<Peer> {
    let (_, cert) = X509Certificate::from_der(leaf).ok()?;
    let names = cert.subject_alternative_name().ok()??;
    let (mut dns, mut spiffe) = (None, None);
    for name in &names.value.general_names {
        match name {
            GeneralName::DNSName(name) => {
                dns = dns.or_else(|| Some(name.to_ascii_lowercase()).filter(|name| is_identity(name)).map(Arc::from))
            }
            GeneralName::URI(uri) if uri.starts_with("spiffe://") => spiffe = spiffe.or_else(|| Some(Arc::from(*uri))),
            _ => {}
        }
    }
    if dns.is_none() && spiffe.is_none() {
        return None;
    }
    let not_after = u64::try_from(cert.validity().not_after.timestamp()).ok()?;
    Some(Peer {
        id: PeerId { dns: dns.unwrap_or_else(|| Arc::from("")), spiffe },
        not_after: SystemTime::UNIX_EPOCH + Duration::from_secs(not_after),
    })
}

/// `peer(leaf)`'s identity alone.
pub(crate) fn peer_id(leaf: &CertificateDer<'_>) -> Option<PeerId> {
    peer(leaf).map(|peer| peer.id)
}

/// The SNI and verified name for an identity that `is_identity`.
pub(crate) fn server_name(identity: &str) -> Option<ServerName<'static>> {
    is_identity(identity).then(|| ServerName::try_from(identity.to_owned()).ok())?
}

/// Random bits from the TLS provider's generator: for jitter and choices, not for keys.
pub(crate) fn random() -> u64 {
    let mut bytes = [0u8; 8];
    // A generator that fails leaves zeros: the caller then has no jitter, which is safe.
    let _ = aws_lc_rs::default_provider().secure_random.fill(&mut bytes);
    u64::from_le_bytes(bytes)
}

/// SHA-256, as lower-case hexadecimal.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    let suite = aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256;
    let hash = suite.tls13().expect("a TLS 1.3 suite").common.hash_provider.hash(bytes);
    hash.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
pub(crate) mod tests;
