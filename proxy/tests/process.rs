//! The program as an operator meets it: exit codes, what it says of mistakes, and that a signal ends it.

use std::io::Read as _;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// A root made for these tests alone; nothing is signed with its key, which is gone.
const ROOT: &str = "-----BEGIN CERTIFICATE-----
MIIBPTCB5KADAgECAgEBMAoGCCqGSM49BAMCMB0xGzAZBgNVBAMMEnJvb3QuY2x1
c3Rlci5sb2NhbDAgFw0yNjAxMDEwMDAwMDBaGA8yMTI2MDEwMTAwMDAwMFowHTEb
MBkGA1UEAwwScm9vdC5jbHVzdGVyLmxvY2FsMFkwEwYHKoZIzj0CAQYIKoZIzj0D
AQcDQgAE+tW2PXfh7R6gmiqCFFYf2ryRNxECNw9e3YUu8lPYKDkvXS5+6hRb5sQt
rgybj5uYe1wwXinsJOFRhDpb18x4+aMTMBEwDwYDVR0TAQH/BAUwAwEB/zAKBggq
hkjOPQQDAgNIADBFAiEAsUNsxF2bbJ5wNzaFkPKQxrcg87qqyJzfp7nyrwysSLwC
IF6tfKWjGyBvQC5pzsLUbTwX2/KnIOEuDMQdOSNKx06g
-----END CERTIFICATE-----
";

fn proxy(vars: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mantle-proxy"));
    command.env_clear().stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    for (name, value) in vars {
        command.env(format!("MANTLE_PROXY_{name}"), value);
    }
    command
}

/// An environment with which it starts: nothing answers on the control plane's port.
fn whole<'a>(admin: &'a str, extra: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    let base = [
        ("IDENTITY_TRUST_ANCHORS", ROOT),
        ("IDENTITY_LOCAL_NAME", "web.shop.serviceaccount.identity.mantle.cluster.local"),
        ("IDENTITY_TOKEN_FILE", "/dev/null"),
        ("IDENTITY_SVC_ADDR", "127.0.0.1:1"),
        ("DESTINATION_SVC_ADDR", "127.0.0.1:1"),
        ("POLICY_SVC_ADDR", "127.0.0.1:1"),
        ("POLICY_WORKLOAD", "{}"),
        ("OUTBOUND_LISTEN_ADDR", "127.0.0.1:0"),
        ("INBOUND_LISTEN_ADDR", "127.0.0.1:0"),
        ("ADMIN_LISTEN_ADDR", admin),
    ];
    base.into_iter().chain(extra.iter().copied()).collect()
}

/// Ends the process, whatever the test does.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    /// The exit status and all of standard error; the process must end by itself.
    fn end(&mut self) -> (ExitStatus, String) {
        let mut text = String::new();
        // Reads until the process closes its standard error, which is when it ends.
        self.0.stderr.take().expect("piped").read_to_string(&mut text).expect("text");
        (self.0.wait().expect("a status"), text)
    }
}

fn start(vars: &[(&str, &str)]) -> Running {
    Running(proxy(vars).spawn().expect("the proxy is built"))
}

/// A free port below those that the kernel gives to connections: nobody gets it before its program listens.
fn free_port() -> String {
    let first = 20_000 + u16::try_from(std::process::id() % 10_000).expect("small");
    let port = (first..32_000).find(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok()).expect("a port");
    format!("127.0.0.1:{port}")
}

#[test]
fn every_mistake_is_named_and_the_exit_code_is_64() {
    let (status, text) = start(&[("CORES", "many"), ("INBOUND_PORTS", "http")]).end();
    assert_eq!(status.code(), Some(64), "{text}");
    for name in ["IDENTITY_TRUST_ANCHORS", "DESTINATION_SVC_ADDR", "POLICY_WORKLOAD", "CORES", "INBOUND_PORTS"] {
        assert_eq!(text.matches(&format!("MANTLE_PROXY_{name} ")).count(), 1, "{name}: {text}");
    }
}

#[test]
fn a_taken_port_is_named_and_the_exit_code_is_1() {
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let addr = taken.local_addr().expect("address").to_string();
    let (status, text) = start(&whole(&addr, &[])).end();
    assert_eq!(status.code(), Some(1), "{text}");
    assert!(text.contains(&format!("admin port {addr}")), "{text}");
}

#[test]
fn before_its_first_certificate_it_is_not_ready_and_a_signal_ends_it() {
    let admin = free_port();
    let mut running = start(&whole(&admin, &[("LOG_FORMAT", "json")]));
    let began = Instant::now();
    let answer = loop {
        if let Ok(mut io) = TcpStream::connect(&admin) {
            use std::io::Write as _;
            io.write_all(b"GET /ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").expect("sent");
            let mut answer = String::new();
            io.read_to_string(&mut answer).expect("an answer");
            break answer;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "it does not listen");
        std::thread::yield_now();
    };
    assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("no certificate yet"), "{answer}");
    let pid = running.0.id().to_string();
    // The admin port may answer before the data thread listens to signals: the kernel knows when it does.
    while !catches_sigterm(&pid) {
        assert!(began.elapsed() < Duration::from_secs(60), "it does not listen to SIGTERM");
        std::thread::yield_now();
    }
    let killed = Command::new("kill").args(["-TERM", &pid]).status().expect("kill");
    assert!(killed.success());
    let (status, text) = running.end();
    assert_eq!(status.code(), Some(0), "{text}");
    assert!(text.lines().all(|line| line.starts_with('{') && line.ends_with('}')), "JSON lines: {text}");
    assert!(text.contains("the token /dev/null is empty"), "{text}");
}

/// Whether the process has a handler for SIGTERM (proc(5), `SigCgt`: signal n is bit n - 1).
fn catches_sigterm(pid: &str) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).expect("SigCgt");
    u64::from_str_radix(mask.trim(), 16).expect("a mask") & (1 << 14) != 0
}
