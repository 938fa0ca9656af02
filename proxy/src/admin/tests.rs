//! The admin port as its clients see it: probes, scrapers in mesh TLS, and people who mean harm.

use std::net::Ipv4Addr;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::watch;
use tokio_rustls::TlsConnector;

use super::*;
use crate::drain;
use crate::tls::tests::{API, Ca, WEB};
use crate::tls::{Credentials, server_name};

struct Stage {
    ca: Ca,
    addr: SocketAddr,
    credentials: watch::Sender<Option<Arc<Credentials>>>,
    drain: Drain,
    shutdown: Shutdown,
    server: tokio::task::JoinHandle<()>,
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// The admin port of a proxy that has no certificate yet.
fn stage(shutdown_endpoint: bool) -> Stage {
    let listener = socket::listen((Ipv4Addr::LOCALHOST, 0).into(), false).expect("listen");
    let listener = TcpListener::from_std(listener).expect("listener");
    let addr = listener.local_addr().expect("address");
    let (credentials, watched) = watch::channel(None);
    let (shutdown, drain) = drain::channel();
    let admin = Admin {
        metrics: Arc::new(Metrics::new()),
        credentials: watched,
        fails_open: false,
        drain: drain.clone(),
        shutdown: shutdown_endpoint.then(|| shutdown.clone()),
    };
    let server = tokio::spawn(serve(listener, Arc::new(admin)));
    Stage { ca: Ca::new(), addr, credentials, drain, shutdown, server }
}

impl Stage {
    fn certify(&self) {
        self.credentials.send_replace(Some(Arc::new(self.ca.credentials(WEB))));
    }

    /// Sends `bytes` and reads to the end.
    async fn say(&self, bytes: &str) -> String {
        talk(TcpStream::connect(self.addr).await.expect("connect"), bytes).await
    }

    async fn get(&self, path: &str) -> String {
        self.say(&format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")).await
    }
}

async fn talk(mut io: impl AsyncRead + AsyncWrite + Unpin, bytes: &str) -> String {
    let mut answer = Vec::new();
    let talked = async {
        io.write_all(bytes.as_bytes()).await?;
        // A reset after the answer is an end too.
        let _ = io.read_to_end(&mut answer).await;
        std::io::Result::Ok(())
    };
    tokio::time::timeout(Duration::from_secs(60), talked).await.expect("an end").expect("written");
    String::from_utf8(answer).expect("text")
}

fn status(answer: &str) -> &str {
    answer.split(' ').nth(1).unwrap_or("none")
}

#[tokio::test]
async fn ready_follows_the_certificate_and_the_drain() {
    let stage = stage(false);
    assert_eq!(status(&stage.get("/live").await), "200");
    let waiting = stage.get("/ready").await;
    assert!(status(&waiting) == "503" && waiting.ends_with("not ready: no certificate yet\n"), "{waiting}");
    stage.certify();
    let ready = stage.get("/ready").await;
    assert!(status(&ready) == "200" && ready.ends_with("ready\n"), "{ready}");
    stage.shutdown.advance(Phase::Draining);
    assert_eq!(status(&stage.get("/ready").await), "503");
    assert_eq!(status(&stage.get("/live").await), "200");
}

#[tokio::test]
async fn metrics_are_the_same_in_mesh_tls() {
    let stage = stage(false);
    stage.certify();
    let plain = stage.get("/metrics").await;
    assert!(plain.contains("content-type: text/plain; version=0.0.4"), "{plain}");
    assert!(plain.ends_with("# EOF\n"));
    for config in [stage.ca.credentials(API).client_plain, stage.ca.trust().anonymous_client()] {
        let tcp = TcpStream::connect(stage.addr).await.expect("connect");
        let tls = TlsConnector::from(config).connect(server_name(WEB).expect("name"), tcp).await.expect("TLS");
        let secret = talk(tls, "GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await;
        assert!(secret.contains("proxy_build_info") && secret.ends_with("# EOF\n"));
    }
    let head = stage.say("HEAD /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await;
    assert!(status(&head) == "200" && head.ends_with("\r\n\r\n"), "{head}");
}

#[tokio::test]
async fn the_certificate_in_use_is_shown_as_a_handshake_shows_it() {
    let stage = stage(false);
    assert_eq!(status(&stage.get("/identity").await), "404");
    stage.certify();
    let leaf = stage.credentials.borrow().as_ref().expect("certified").certified.cert[0].to_vec();
    let mut io = TcpStream::connect(stage.addr).await.expect("connect");
    io.write_all(b"GET /identity HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.expect("write");
    let mut answer = Vec::new();
    io.read_to_end(&mut answer).await.expect("read");
    assert!(answer.ends_with(&leaf));
    let head = String::from_utf8_lossy(&answer[..answer.len() - leaf.len()]).into_owned();
    assert!(head.contains("content-type: application/pkix-cert") && head.ends_with("\r\n\r\n"), "{head}");
}

#[tokio::test]
async fn paths_and_methods_that_do_not_exist() {
    let stage = stage(false);
    for (line, want) in [
        ("GET /", "404"),
        ("GET /metrics/", "404"),
        ("POST /metrics", "405"),
        ("POST /identity", "405"),
        ("GET /shutdown", "405"),
        ("POST /shutdown", "404"),
        ("DELETE /ready", "405"),
    ] {
        let answer = stage.say(&format!("{line} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")).await;
        assert_eq!(status(&answer), want, "{line}: {answer}");
    }
    assert!(!stage.drain.is_draining());
}

#[tokio::test]
async fn shutdown_drains_if_it_is_enabled_and_only_for_loopback() {
    let stage = stage(true);
    let answer =
        stage.say("POST /shutdown HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 0\r\n\r\n").await;
    assert_eq!(status(&answer), "200");
    assert!(stage.drain.is_draining());

    let (shutdown, drain) = drain::channel();
    let (_, credentials) = watch::channel(None);
    let admin =
        Admin { metrics: Arc::new(Metrics::new()), credentials, fails_open: false, drain, shutdown: Some(shutdown) };
    let from = |addr: &str| respond(&admin, addr.parse().expect("address"), &Method::POST, "/shutdown").status();
    assert_eq!(from("10.203.0.1:40000"), StatusCode::FORBIDDEN);
    assert!(!admin.drain.is_draining());
    assert_eq!(from("[::ffff:127.0.0.1]:40000"), StatusCode::OK);
    assert!(admin.drain.is_draining());
}

#[tokio::test]
async fn hostile_clients_are_cut_off_and_others_are_served() {
    let stage = stage(false);
    let long = format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "a".repeat(MAX_HEAD * 2));
    for (bytes, want) in
        [(long.as_str(), "431"), ("\0\0\0\0garbage\r\n\r\n", "400"), ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "none")]
    {
        assert_eq!(status(&stage.say(bytes).await), want, "{:?}", &bytes[..16]);
    }
    // Half a TLS handshake without a certificate to answer it, and a client that goes at once.
    assert_eq!(stage.say("\x16\x03\x01").await, "");
    drop(TcpStream::connect(stage.addr).await.expect("connect"));
    assert_eq!(status(&stage.get("/live").await), "200");

    // Many who say nothing, or half a word, keep nobody out.
    let mut idle = Vec::new();
    for n in 0..MAX_CONNECTIONS * 3 {
        let mut io = TcpStream::connect(stage.addr).await.expect("connect");
        if n % 2 == 0 {
            io.write_all(b"G").await.expect("sent");
        }
        idle.push(io);
    }
    assert_eq!(status(&stage.get("/live").await), "200");
}

#[tokio::test(start_paused = true)]
async fn a_head_that_drips_is_not_waited_for() {
    let (mut client, server) = tokio::io::duplex(1024);
    let (_, drain) = drain::channel();
    let (_, credentials) = watch::channel(None);
    let admin = Admin { metrics: Arc::new(Metrics::new()), credentials, fails_open: false, drain, shutdown: None };
    let (done, serving) = tokio::sync::oneshot::channel();
    Slots::new(1).spawn(|slot| async move {
        http1(server, ([127, 0, 0, 1], 1).into(), Arc::new(admin), slot).await;
        let _ = done.send(());
    });
    let began = tokio::time::Instant::now();
    let drip = async {
        for byte in b"GET /metrics HTTP/1.1\r\n".iter().cycle() {
            if client.write_all(&[*byte]).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    };
    tokio::join!(drip, async { serving.await.expect("no panic") });
    assert!(began.elapsed() <= HEAD + Duration::from_secs(2), "{:?}", began.elapsed());
}
