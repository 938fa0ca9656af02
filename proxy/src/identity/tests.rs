//! Renewals as plays: a real identity service over real TLS on loopback, answered call by call.

use std::io::Write as _;
use std::net::Ipv4Addr;

use rcgen::CertificateSigningRequestParams;
use rustls_pki_types::CertificateSigningRequestDer;
use tokio::net::TcpListener;
use tonic::Code;

use super::*;
use crate::config::{Config, ControlAddr};
use crate::control::testing::{Call, Plane};
use crate::tls::tests::{API, Ca, Leaf, WEB};

/// A proxy named `WEB` whose identity service is named `API`.
struct Stage {
    ca: Ca,
    plane: Plane,
    token: PathBuf,
    credentials: watch::Receiver<Option<Arc<Credentials>>>,
    metrics: Arc<Metrics>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.tasks.iter().for_each(tokio::task::JoinHandle::abort);
        let _ = std::fs::remove_file(&self.token);
    }
}

async fn stage(name: &str) -> Stage {
    let ca = Ca::new();
    let plane = Plane::new();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("bind");
    let port = listener.local_addr().expect("address").port();
    let server = plane.serve(listener, Some(ca.credentials(API).server_plain));
    let token = std::env::temp_dir().join(format!("mantle-identity-test-{}-{name}", std::process::id()));
    write(&token, "token-1");
    let mut config = config(&ca, &token);
    config.identity.svc = ControlAddr { host: "127.0.0.1".into(), port, name: Some(API.into()) };
    let (tx, credentials) = watch::channel(None);
    let metrics = Arc::new(Metrics::new());
    let client = tokio::spawn(run(Arc::new(config), ca.trust(), tx, metrics.clone()));
    Stage { ca, plane, token, credentials, metrics, tasks: vec![server, client] }
}

fn config(ca: &Ca, token: &std::path::Path) -> Config {
    let pem = crate::tls::tests::pem(&ca.root);
    let token = token.display().to_string();
    let config = Config::load(|name| {
        let value = match name.strip_prefix("MANTLE_PROXY_")? {
            "IDENTITY_TRUST_ANCHORS" => &pem,
            "IDENTITY_LOCAL_NAME" => WEB,
            "IDENTITY_TOKEN_FILE" => &token,
            "IDENTITY_SVC_ADDR" | "DESTINATION_SVC_ADDR" | "POLICY_SVC_ADDR" => "127.0.0.1:1",
            "POLICY_WORKLOAD" => "{}",
            "IDENTITY_MIN_REFRESH" => "1ms",
            _ => return None,
        };
        Some(value.to_owned())
    });
    config.unwrap_or_else(|mistakes| panic!("{mistakes}"))
}

fn write(path: &std::path::Path, text: &str) {
    std::fs::File::create(path).and_then(|mut file| file.write_all(text.as_bytes())).expect("token");
}

impl Stage {
    /// Signs what `call` asks for, for `lifetime`; returns the key it asked with.
    fn sign(&self, call: Call<CertifyRequest, CertifyResponse>, lifetime: Duration) -> Vec<u8> {
        let der = CertificateSigningRequestDer::from(call.request.certificate_signing_request.clone());
        let csr = CertificateSigningRequestParams::from_der(&der).expect("a valid CSR");
        let leaf = self.ca.issue(&Leaf { lifetime, ..Leaf::named(WEB) }, &csr.public_key);
        let valid_until = prost_types::Timestamp::from(SystemTime::now() + lifetime);
        call.answer(CertifyResponse {
            leaf_certificate: leaf.to_vec(),
            intermediate_certificates: Vec::new(),
            valid_until: Some(valid_until),
        });
        rcgen::PublicKeyData::der_bytes(&csr.public_key).to_vec()
    }

    async fn epoch(&mut self, epoch: u64) -> Arc<Credentials> {
        let reached = self.credentials.wait_for(|now| now.as_ref().is_some_and(|c| c.epoch == epoch));
        let now = tokio::time::timeout(Duration::from_secs(60), reached).await.expect("in time").expect("running");
        now.clone().expect("waited for")
    }
}

#[tokio::test]
async fn every_renewal_has_a_new_key_the_token_of_the_moment_and_our_certificate() {
    let mut stage = stage("renewal").await;
    let lifetime = Duration::from_secs(12); // on a busy machine the renewal may be seconds late

    let first = stage.plane.certify.next().await;
    assert_eq!((first.request.identity.as_str(), first.client.as_str()), (WEB, ""), "nothing to show yet");
    assert_eq!(first.request.token, b"token-1");
    let first_key = stage.sign(first, lifetime);
    let first_at = SystemTime::now();
    assert_eq!(&*stage.epoch(1).await.local.dns, WEB);

    write(&stage.token, "token-2");
    let second = stage.plane.certify.next().await;
    let waited = first_at.elapsed().expect("forward");
    assert!(waited > lifetime.mul_f64(0.6) && waited < lifetime, "{waited:?}");
    assert_eq!(second.client, WEB, "the certificate in force is shown");
    assert_eq!(second.request.token, b"token-2");
    let second_key = stage.sign(second, Duration::from_secs(3600));
    assert_ne!(first_key, second_key);
    stage.epoch(2).await;

    let text = stage.metrics.text(std::time::Instant::now());
    assert!(text.contains("control_identity_cert_refreshes_total{result=\"ok\"} 2\n"), "{text}");
    assert!(text.contains("control_identity_cert_refreshes_total{result=\"error\"} 0\n"), "{text}");
}

#[tokio::test]
async fn a_renewal_that_fails_keeps_the_certificate_and_is_tried_again() {
    let mut stage = stage("failure").await;
    stage.sign(stage.plane.certify.next().await, Duration::from_secs(2));
    let first = stage.epoch(1).await;

    stage.plane.certify.next().await.refuse(Code::Unavailable);
    let call = stage.plane.certify.next().await;
    assert!(Arc::ptr_eq(&first, &stage.credentials.borrow().clone().expect("kept")));
    // A certificate for another key is no better than none.
    let key = KeyPair::generate().expect("key");
    let wrong = stage.ca.issue(&Leaf::named(WEB), &key);
    call.answer(CertifyResponse { leaf_certificate: wrong.to_vec(), ..CertifyResponse::default() });

    let call = stage.plane.certify.next().await;
    assert_eq!(stage.credentials.borrow().as_ref().map(|c| c.epoch), Some(1));
    let text = stage.metrics.text(std::time::Instant::now());
    assert!(text.contains("control_identity_cert_refreshes_total{result=\"error\"} 2\n"), "{text}");
    // By now it is over: a certificate that is over is not shown.
    assert_eq!(call.client, "", "waited {:?}", first.not_after.elapsed());
    stage.sign(call, Duration::from_secs(3600));
    stage.epoch(2).await;
}

#[tokio::test]
async fn no_token_and_no_service_are_waited_for() {
    let mut stage = stage("absent").await;
    std::fs::remove_file(&stage.token).expect("token");
    // The first attempt may have read the token before it went.
    if let Some(call) = stage.plane.certify.ready().await {
        call.refuse(Code::Unavailable);
    }
    let failed = async {
        while !stage.metrics.text(std::time::Instant::now()).contains("{result=\"error\"} 1\n") {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), failed).await.expect("counted");
    write(&stage.token, "late");
    let call = stage.plane.certify.next().await;
    assert_eq!(call.request.token, b"late");
    stage.sign(call, Duration::from_secs(3600));
    stage.epoch(1).await;
}

#[tokio::test]
async fn a_clock_that_is_off_is_told_with_the_times_and_not_as_another_mesh() {
    let (ca, ahead) = (Ca::new(), Duration::from_secs(300));
    let mut config = config(&ca, std::path::Path::new("/none"));
    let dial = Dial { mark: None, timeout: CERTIFY };
    let told = |text: &str, said: &str| {
        assert!(text.contains(said) && text.contains("compare the clock of this node"), "{text}");
        assert!(!text.contains("of this mesh"), "{text}");
    };

    // The identity service's own certificate begins when its clock says so.
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("bind");
    let port = listener.local_addr().expect("address").port();
    let serving = Plane::new().serve(listener, Some(ca.credentials_in(ahead, API).server_plain));
    config.identity.svc = ControlAddr { host: "127.0.0.1".into(), port, name: Some(API.into()) };
    config.identity.token_file = std::env::temp_dir().join(format!("mantle-clock-test-{}", std::process::id()));
    write(&config.identity.token_file, "token");
    let calls = Metrics::new().control(&client::labels(&config.identity.svc));
    let failed = certify(&config.identity, &ca.trust(), None, 1, dial, calls).await;
    serving.abort();
    let _ = std::fs::remove_file(&config.identity.token_file);
    told(&failed.expect_err("not yet").to_string(), "its certificate is not valid before ");

    // So does what it signs, and what it signed may be over already.
    let now = SystemTime::now();
    let accepted = |leaf: &Leaf<'_>, valid_until: Option<SystemTime>, now: SystemTime| {
        let key = KeyPair::generate().expect("key");
        let leaf_certificate = ca.issue(leaf, &key).to_vec();
        let answer =
            CertifyResponse { leaf_certificate, valid_until: valid_until.map(Into::into), ..Default::default() };
        accept(&ca.trust(), answer, key, &Arc::from(WEB), 1, now).expect_err("refused").to_string()
    };
    let named = Leaf::named(WEB);
    told(&accepted(&Leaf { begins_in: ahead, ..Leaf::named(WEB) }, None, now), "the certificate is not valid before ");
    told(&accepted(&named, None, now + Duration::from_secs(7200)), "the certificate was valid until ");
    told(&accepted(&named, Some(now - ahead), now), "answer was valid until ");
}

#[test]
fn a_renewal_that_a_suspended_machine_slept_through_is_done_at_once() {
    let (now, hour) = (SystemTime::now(), Duration::from_secs(3600));
    assert_eq!(nap(now, now + hour), Some(LOOK_AT_CLOCK));
    assert_eq!(nap(now, now + Duration::from_secs(3)), Some(Duration::from_secs(3)));
    assert_eq!(nap(now + hour * 8, now + hour), None);
    assert_eq!(nap(now, now), None);
}

#[test]
fn a_signing_request_names_us_once_and_proves_the_key() {
    let key = KeyPair::generate().expect("key");
    let der = signing_request(&key, WEB).expect("csr");
    let csr = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(der)).expect("valid");
    assert_eq!(csr.params.subject_alt_names, [rcgen::SanType::DnsName(WEB.try_into().expect("name"))]);
    let name = csr.params.distinguished_name.get(&DnType::CommonName).expect("CN");
    assert_eq!(*name, rcgen::DnValue::Utf8String(WEB.into()));
}

#[test]
fn secrets_are_not_in_what_is_said_of_a_failure() {
    let bad = Failed::Bad(BadCertificate::WrongKey).to_string();
    assert_eq!(
        bad,
        "the identity service's answer is not used: the certificate is for another key than the one asked for"
    );
    let refused = Failed::Refused(Status::permission_denied("no\nway")).to_string();
    assert_eq!(refused, r"the identity service answered PermissionDenied: no\nway");
}
