//! Full mutual TLS 1.3 handshakes per second and core, in memory: `cargo bench --bench handshake`.
//!
//! P-256 leaves under one CA level, X25519MLKEM768 first, no resumption: what one new link costs. Each side is timed
//! apart, on one thread. Knows nothing of the proxy: it measures the libraries as `src/tls.rs` sets them up.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};

type Error = Box<dyn std::error::Error>;

const NAME: &str = "web.emojivoto.serviceaccount.identity.mantle.cluster.local";
const ROUNDS: u32 = 2_000;

fn main() -> Result<(), Error> {
    let ca_key = KeyPair::generate()?;
    let mut ca = CertificateParams::new(Vec::new())?;
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root = ca.self_signed(&ca_key)?;
    let issuer = Issuer::new(ca, ca_key);
    let mut roots = RootCertStore::empty();
    roots.add(root.der().clone())?;
    let roots = Arc::new(roots);
    let leaf = || -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), Error> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(vec![NAME.to_owned()])?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let der = params.signed_by(&key, &issuer)?.der().clone();
        Ok((vec![der], PrivatePkcs8KeyDer::from(key.serialize_der()).into()))
    };

    let provider = Arc::new(aws_lc_rs::default_provider());
    let ((chain, key), (own_chain, own_key)) = (leaf()?, leaf()?);
    let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone()).build()?;
    let mut server = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)?;
    server.send_tls13_tickets = 0;
    let mut client = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_client_auth_cert(own_chain, own_key)?;
    client.resumption = rustls::client::Resumption::disabled();
    let (client, server) = (Arc::new(client), Arc::new(server));

    let (mut client_time, mut server_time) = (Duration::ZERO, Duration::ZERO);
    for _ in 0..ROUNDS {
        let (c, s) = handshake(&client, &server)?;
        client_time += c;
        server_time += s;
    }
    for (side, time) in [("client", client_time), ("server", server_time)] {
        let each = time / ROUNDS;
        println!("{side}: {each:?} a full mutual handshake, {:.0} a second and core", 1.0 / each.as_secs_f64());
    }
    Ok(())
}

/// One handshake to its end; what each side's work took.
fn handshake(client: &Arc<ClientConfig>, server: &Arc<ServerConfig>) -> Result<(Duration, Duration), Error> {
    let (mut to_server, mut to_client) = (Vec::new(), Vec::new());
    let began = Instant::now();
    let mut client = ClientConnection::new(client.clone(), ServerName::try_from(NAME)?)?;
    let mut client_time = began.elapsed();
    let began = Instant::now();
    let mut server = ServerConnection::new(server.clone())?;
    let mut server_time = began.elapsed();
    while client.is_handshaking() || server.is_handshaking() {
        let began = Instant::now();
        feed(&mut to_client, |bytes| client.read_tls(bytes))?;
        client.process_new_packets()?;
        while client.wants_write() {
            client.write_tls(&mut to_server)?;
        }
        client_time += began.elapsed();
        let began = Instant::now();
        feed(&mut to_server, |bytes| server.read_tls(bytes))?;
        server.process_new_packets()?;
        while server.wants_write() {
            server.write_tls(&mut to_client)?;
        }
        server_time += began.elapsed();
    }
    Ok((client_time, server_time))
}

/// Hands all of `bytes` over; reading nothing is not the end of the connection.
fn feed(bytes: &mut Vec<u8>, mut read: impl FnMut(&mut &[u8]) -> io::Result<usize>) -> io::Result<()> {
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        read(&mut rest)?;
    }
    bytes.clear();
    Ok(())
}
