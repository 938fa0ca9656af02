//! The whole control thread against a control plane on loopback, and its clients' connections.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, SystemTime};

use linkerd2_proxy_api::identity::CertifyResponse;
use linkerd2_proxy_api::identity::identity_client::IdentityClient;
use mantle_proxy_core::reasons::Unroutable;
use rcgen::CertificateSigningRequestParams;
use rustls_pki_types::CertificateSigningRequestDer;
use tokio::net::TcpListener;
use tonic::{Code, Status};

use super::testing::Plane;
use super::*;
use crate::drain::{self, Phase};
use crate::tls::Credentials;
use crate::tls::tests::{API, Ca, Leaf, WEB, pem};

const DIAL: Dial = Dial { mark: None, timeout: Duration::from_secs(30) };

fn config(ca: &Ca, plane: SocketAddr, token: &str) -> Config {
    let (pem, plane) = (pem(&ca.root), plane.to_string());
    let config = Config::load(|name| {
        let value = match name.strip_prefix("MANTLE_PROXY_")? {
            "IDENTITY_TRUST_ANCHORS" => &pem,
            "IDENTITY_LOCAL_NAME" => WEB,
            "IDENTITY_TOKEN_FILE" => token,
            "IDENTITY_SVC_ADDR" | "DESTINATION_SVC_ADDR" | "POLICY_SVC_ADDR" => &plane,
            "POLICY_WORKLOAD" => "web-1",
            "INBOUND_PORTS" => "8080",
            "DESTINATION_PROFILE_NETWORKS" => "10.203.0.0/16",
            "ADMIN_LISTEN_ADDR" | "CONTROL_LISTEN_ADDR" => "127.0.0.1:0",
            "TAP_SVC_NAME" => API,
            _ => return None,
        };
        Some(value.to_owned())
    });
    config.unwrap_or_else(|mistakes| panic!("{mistakes}"))
}

/// A free port below those that the kernel gives to connections: nobody gets it before its program listens.
fn free_port() -> u16 {
    let first = 20_000 + u16::try_from(std::process::id() % 10_000).expect("small");
    (first..32_000).find(|port| std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok()).expect("a port")
}

fn get(port: u16, path: &str) -> String {
    let mut io = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("connect");
    io.set_read_timeout(Some(Duration::from_secs(60))).expect("timeout");
    write!(io, "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").expect("sent");
    let mut answer = String::new();
    io.read_to_string(&mut answer).expect("an answer");
    answer
}

#[tokio::test]
async fn the_control_thread_certifies_answers_and_ends() {
    let (ca, plane) = (Ca::new(), Plane::new());
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("bind");
    let addr = listener.local_addr().expect("address");
    let serving = plane.serve(listener, None);
    let token = std::env::temp_dir().join(format!("mantle-control-test-{}", std::process::id()));
    std::fs::write(&token, "token").expect("token");
    let mut config = config(&ca, addr, &token.display().to_string());
    config.admin_listen.set_port(free_port());
    let admin = config.admin_listen.port();

    let (shutdown, drain) = drain::channel();
    let mut control = start(Arc::new(config), shutdown.clone(), drain).expect("started");
    assert!(get(admin, "/ready").contains("503"), "not certified yet");
    let dst: SocketAddr = "10.203.128.7:80".parse().expect("address");

    let call = plane.certify.next().await;
    let der = CertificateSigningRequestDer::from(call.request.certificate_signing_request.clone());
    let csr = CertificateSigningRequestParams::from_der(&der).expect("a CSR");
    let leaf = ca.issue(&Leaf::named(WEB), &csr.public_key).to_vec();
    call.answer(CertifyResponse { leaf_certificate: leaf, ..CertifyResponse::default() });
    let certified = control.credentials.wait_for(Option::is_some);
    tokio::time::timeout(Duration::from_secs(60), certified).await.expect("in time").expect("running");
    assert!(get(admin, "/ready").contains("200 OK"));
    let metrics = get(admin, "/metrics");
    assert!(metrics.contains("control_identity_cert_refreshes_total{result=\"ok\"} 1\n"));
    let whom = format!("addr=\"{addr}\",tls=\"no_identity\",no_tls_reason=\"loopback\"");
    let answered = format!("{{{whom},status_code=\"200\",classification=\"success\",grpc_status=\"0\"}} 1\n");
    assert!(metrics.contains(&format!("control_request_total{{{whom}}} ")), "{metrics}");
    assert!(metrics.contains(&format!("control_response_total{answered}")), "{metrics}");
    assert!(metrics.contains(&format!("control_response_latency_ms_count{{{whom},status_code=\"200\"}} 1\n")));

    // Asked on this thread, answered through the control thread.
    let play = async {
        plane.outbound.next().await.refuse(Code::NotFound);
        plane.profile.next().await.refuse(Code::InvalidArgument);
    };
    let (target, ()) = tokio::join!(control.discovery.target(dst), play);
    target.expect("a stranger passes");
    assert_eq!(plane.inbound.next().await.request.port, 8080);

    shutdown.advance(Phase::Draining);
    assert!(get(admin, "/ready").contains("draining"), "the port outlives the drain");
    shutdown.advance(Phase::Over);
    let ended = control.credentials.wait_for(Option::is_none);
    assert!(
        tokio::time::timeout(Duration::from_secs(60), ended).await.expect("in time").is_err(),
        "the thread is gone"
    );
    let after = control.discovery.target("10.203.128.8:80".parse().expect("address")).await;
    assert_eq!(after.err(), Some(Unroutable::DiscoveryUnavailable));
    serving.abort();
    let _ = std::fs::remove_file(token);
}

#[tokio::test]
async fn a_port_that_is_taken_is_named() {
    let ca = Ca::new();
    let taken = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind");
    let mut config = config(&ca, "127.0.0.1:1".parse().expect("address"), "/none");
    config.admin_listen = taken.local_addr().expect("address");
    let (shutdown, drain) = drain::channel();
    let error = start(Arc::new(config), shutdown, drain).err().expect("taken");
    assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    assert!(error.to_string().starts_with("admin port 127.0.0.1:"), "{error}");
}

/// Calls Certify on `127.0.0.1:port` as the service `name`, over `tls`; whatever answers, the plane's test decides.
async fn call(host: &str, port: u16, name: Option<&str>, tls: ClientTls) -> Status {
    let addr = ControlAddr { host: host.into(), port, name: name.map(Arc::from) };
    let mut client = IdentityClient::new(client::channel(&addr, tls, DIAL));
    let call = client.certify(linkerd2_proxy_api::identity::CertifyRequest::default());
    tokio::time::timeout(Duration::from_secs(60), call).await.expect("an end").expect_err("refused by the test")
}

#[tokio::test]
async fn a_service_must_prove_its_name_and_sees_ours() {
    let (ca, plane) = (Ca::new(), Plane::new());
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("bind");
    let port = listener.local_addr().expect("address").port();
    let serving = plane.serve(listener, Some(ca.credentials(API).server_plain));
    let (tx, credentials) = watch::channel(None);
    let tls = ClientTls::Identity(credentials);

    let status = call("127.0.0.1", port, Some(API), tls.clone()).await;
    assert_eq!(status.code(), Code::Unavailable, "no certificate yet: {status}");
    tx.send_replace(Some(Arc::new(ca.credentials(WEB))));
    // `localhost` has two addresses and only one of them listens.
    let seen = async {
        let call = plane.certify.next().await;
        let client = call.client.clone();
        call.refuse(Code::Aborted);
        client
    };
    let (status, client) = tokio::join!(call("localhost", port, Some(API), tls.clone()), seen);
    assert_eq!((status.code(), client.as_str()), (Code::Aborted, WEB));

    let status = call("127.0.0.1", port, Some(WEB), tls.clone()).await;
    assert_eq!(status.code(), Code::Unavailable, "another name: {status}");
    let stranger = ClientTls::Fixed(Ca::new().trust().anonymous_client());
    let status = call("127.0.0.1", port, Some(API), stranger).await;
    assert_eq!(status.code(), Code::Unavailable, "another root: {status}");
    assert!(plane.certify.ready().await.is_none(), "nothing was said to either");
    serving.abort();
}

#[tokio::test]
async fn a_connection_lives_no_longer_than_the_certificate_shown_on_it() {
    let (ca, plane) = (Ca::new(), Plane::new());
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("bind");
    let addr = listener.local_addr().expect("address");
    let serving = plane.serve(listener, Some(ca.credentials(API).server_plain));
    let short = Credentials { not_after: SystemTime::now() + Duration::from_secs(8), ..ca.credentials(WEB) };
    let (tx, credentials) = watch::channel(Some(Arc::new(short)));
    let service = ControlAddr { host: addr.ip().to_string(), port: addr.port(), name: Some(API.into()) };
    let mut client = IdentityClient::new(client::channel(&service, ClientTls::Identity(credentials), DIAL));
    // Who the service sees; a call that fails on its way is made again.
    let mut seen = async || loop {
        tokio::select! {
            call = plane.certify.next() => break call.client,
            _ = client.certify(linkerd2_proxy_api::identity::CertifyRequest::default()) => {}
        }
    };
    assert_eq!(seen().await, WEB);
    tx.send_replace(Some(Arc::new(ca.credentials(API))));
    assert_eq!(seen().await, WEB, "it is the same connection");
    let renewed = async { while seen().await != API {} };
    tokio::time::timeout(Duration::from_secs(60), renewed).await.expect("a new connection");
    serving.abort();
}

#[tokio::test]
async fn a_lost_connection_is_made_again() {
    let plane = Plane::new();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("bind");
    let addr = listener.local_addr().expect("address");
    let serving = plane.serve(listener, None);
    let service = ControlAddr { host: addr.ip().to_string(), port: addr.port(), name: None };
    let tls = ClientTls::Fixed(Ca::new().trust().anonymous_client());
    let mut client = IdentityClient::new(client::channel(&service, tls, DIAL));
    let mut certify = async || {
        client.certify(linkerd2_proxy_api::identity::CertifyRequest::default()).await.expect_err("refused").code()
    };

    let refuse = async || plane.certify.next().await.refuse(Code::Aborted);
    assert_eq!(tokio::join!(certify(), refuse()).0, Code::Aborted);
    serving.abort();
    let _ = serving.await;
    // The first call may still find the connection that is closing: either way it fails, and nothing hangs.
    let gone = [certify().await, certify().await];
    assert!(matches!(gone[0], Code::Unavailable | Code::Cancelled | Code::Unknown), "{gone:?}");
    assert_eq!(gone[1], Code::Unavailable, "nobody is there");
    let listener = socket::listen(addr, false).and_then(TcpListener::from_std).expect("again");
    let serving = plane.serve(listener, None);
    assert_eq!(tokio::join!(certify(), refuse()).0, Code::Aborted);
    serving.abort();
}
