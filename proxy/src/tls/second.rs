//! A second set of roots, good for names of one form only: what the experimental mode `--tls=optional` adds to a proxy.
//!
//! A peer is first verified against the mesh's own roots, as ever. Only if that fails, and only if its names are of the
//! second roots' own form, are those asked. So a key under the second roots can never pass for an identity of the mesh.
//! A proxy of the default mode has no second roots, but for the identities being migrated while a migration runs.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, Error, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::{BadCertificate, peer};

/// Other roots, and the names that they may vouch for.
#[derive(Clone)]
pub(crate) struct Second {
    roots: Arc<RootCertStore>,
    pub(crate) names: Names,
}

/// Names of the experimental mode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Names {
    /// What every such DNS name ends in, with its leading dot; without it, the SPIFFE trust domain.
    pub(crate) suffix: Arc<str>,
    /// Only these, if there is a list.
    pub(crate) listed: Option<Arc<BTreeSet<String>>>,
}

impl Names {
    /// Whether `name` may be proved under the second roots.
    pub(crate) fn admit(&self, name: &str) -> bool {
        name.ends_with(&*self.suffix) && self.listed.as_ref().is_none_or(|listed| listed.contains(name))
    }

    /// Whether everything that a certificate calls itself is admitted.
    fn admit_leaf(&self, leaf: &CertificateDer<'_>) -> bool {
        peer(leaf).is_some_and(|peer| {
            let domain = self.suffix.trim_start_matches('.');
            let spiffe = peer.id.spiffe.as_deref().is_none_or(|uri| {
                uri.strip_prefix("spiffe://")
                    .and_then(|rest| rest.strip_prefix(domain))
                    .is_some_and(|p| p.starts_with('/'))
            });
            spiffe && self.admit(&peer.id.dns)
        })
    }
}

impl Second {
    /// # Errors
    /// `BadRoot`.
    pub(crate) fn new(anchors: &[CertificateDer<'static>], names: Names) -> Result<Self, BadCertificate> {
        let mut roots = RootCertStore::empty();
        for anchor in anchors {
            roots.add(anchor.clone()).map_err(|_| BadCertificate::BadRoot)?;
        }
        Ok(Self { roots: Arc::new(roots), names })
    }
}

impl fmt::Debug for Second {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Second").field("roots", &self.roots.len()).field("names", &self.names).finish()
    }
}

/// Of servers, and of clients that show a certificate.
pub(super) type Verifiers = (Arc<dyn ServerCertVerifier>, Arc<dyn ClientCertVerifier>);

/// Verifies servers, and clients that show a certificate, against `roots`, then against `second`.
///
/// # Errors
/// `BadRoot`.
pub(super) fn verifiers(
    roots: &Arc<RootCertStore>,
    second: Option<&Second>,
    provider: &Arc<CryptoProvider>,
) -> Result<Verifiers, BadCertificate> {
    let server = |roots: &Arc<RootCertStore>| {
        WebPkiServerVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(|_| BadCertificate::BadRoot)
    };
    let client = |roots: &Arc<RootCertStore>| {
        WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            .allow_unauthenticated()
            .build()
            .map_err(|_| BadCertificate::BadRoot)
    };
    let Some(second) = second else { return Ok((server(roots)?, client(roots)?)) };
    let names = second.names.clone();
    let servers = EitherServer { first: server(roots)?, second: server(&second.roots)?, names: names.clone() };
    let clients = EitherClient { first: client(roots)?, second: client(&second.roots)?, names };
    Ok((Arc::new(servers), Arc::new(clients)))
}

#[derive(Debug)]
struct EitherServer {
    first: Arc<WebPkiServerVerifier>,
    second: Arc<WebPkiServerVerifier>,
    names: Names,
}

impl ServerCertVerifier for EitherServer {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.first.verify_server_cert(leaf, intermediates, name, ocsp, now).or_else(|why| {
            if !self.names.admit(&name.to_str()) || !self.names.admit_leaf(leaf) {
                return Err(why);
            }
            self.second.verify_server_cert(leaf, intermediates, name, ocsp, now)
        })
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.first.verify_tls12_signature(message, leaf, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.first.verify_tls13_signature(message, leaf, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.first.supported_verify_schemes()
    }
}

#[derive(Debug)]
struct EitherClient {
    first: Arc<dyn ClientCertVerifier>,
    second: Arc<dyn ClientCertVerifier>,
    names: Names,
}

impl ClientCertVerifier for EitherClient {
    fn client_auth_mandatory(&self) -> bool {
        self.first.client_auth_mandatory()
    }

    /// No hints: a client has one certificate, and shows it.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.first.verify_client_cert(leaf, intermediates, now).or_else(|why| {
            if !self.names.admit_leaf(leaf) {
                return Err(why);
            }
            self.second.verify_client_cert(leaf, intermediates, now)
        })
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.first.verify_tls12_signature(message, leaf, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.first.verify_tls13_signature(message, leaf, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.first.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests;
