//! Plays of whole exchanges: what a client sends, what a server sees and answers, what the client gets.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use mantle_proxy_core::http1::{Connection, Edit, Request};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

use super::{End, Opened, Refusal, Service, serve};
use crate::drain;
use crate::metrics::Http;
use crate::record;

/// Gives out streams to servers that the test plays.
#[derive(Default)]
struct Servers {
    waiting: RefCell<VecDeque<DuplexStream>>,
    kept: RefCell<Vec<DuplexStream>>,
    stale: bool,
    refused: Cell<Option<Refusal>>,
    revoked: tokio::sync::Notify,
}

impl Servers {
    /// One more server; the test plays its side.
    fn add(&self) -> DuplexStream {
        let (near, far) = duplex(64 * 1024);
        self.waiting.borrow_mut().push_back(near);
        far
    }
}

impl Service for Servers {
    type Io = DuplexStream;
    type Ticket = ();

    async fn open(&self, request: &Request<'_>) -> Result<Opened<DuplexStream, ()>, Refusal> {
        let kept = self.kept.borrow_mut().pop();
        let io = kept.or_else(|| self.waiting.borrow_mut().pop_front());
        let io = io.ok_or(Refusal { status: 504, reason: "no_endpoints" })?;
        let mut head = Vec::new();
        request.head.forward(
            &mut head,
            &Edit { strip_reserved: true, connection: Connection::Default, add: &[("x-via", "us")] },
        );
        let record = record::Request::begin(Arc::new(Http::default()), None);
        let (stale, half_close, strip_response) = (self.stale, false, true);
        Ok(Opened { io, ticket: (), record, head, stale, half_close, strip_response })
    }

    fn responded(&self, (): &(), _: Duration) {}

    async fn revoked(&self, (): &(), _: &Request<'_>) -> Refusal {
        self.revoked.notified().await;
        Refusal { status: 403, reason: "unauthorized" }
    }

    fn reuse(&self, (): (), io: DuplexStream) {
        self.kept.borrow_mut().push(io);
    }

    fn refused(&self, refusal: Refusal) -> bool {
        self.refused.set(Some(refusal));
        true
    }
}

/// Serves one client that sends `says`, then ends its side; returns what it got and how it ended.
async fn client(servers: &Servers, says: &[u8]) -> (String, End) {
    let (mut app, mut io) = duplex(64 * 1024);
    let (_shutdown, mut drain) = drain::channel();
    let play = async {
        app.write_all(says).await.unwrap();
        app.shutdown().await.unwrap();
        let mut got = Vec::new();
        app.read_to_end(&mut got).await.unwrap();
        String::from_utf8(got).unwrap()
    };
    let served = async {
        let end = serve(&mut io, BytesMut::new(), servers, &mut drain).await;
        drop(io);
        end
    };
    tokio::join!(play, served)
}

/// Reads until `ending` was seen.
async fn hear(io: &mut DuplexStream, ending: &str) -> String {
    let mut heard = Vec::new();
    while !heard.ends_with(ending.as_bytes()) {
        let byte = io.read_u8().await.unwrap_or_else(|_| panic!("ended after {:?}", String::from_utf8_lossy(&heard)));
        heard.push(byte);
    }
    String::from_utf8(heard).unwrap()
}

async fn say(io: &mut DuplexStream, text: &str) {
    io.write_all(text.as_bytes()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn requests_that_follow_each_other_share_a_connection_and_lose_what_ends_at_each_hop() {
    let servers = Servers::default();
    let mut server = servers.add();
    let says =
        b"GET /a HTTP/1.1\r\nHost: x\r\nConnection: keep-alive, x-secret\r\nX-Secret: 1\r\nl5d-client-id: me\r\n\r\n\
        POST /b HTTP/1.1\r\nhost: x\r\nContent-Length: 4\r\n\r\nbody";
    let play = async {
        assert_eq!(hear(&mut server, "\r\n\r\n").await, "GET /a HTTP/1.1\r\nHost: x\r\nx-via: us\r\n\r\n");
        say(
            &mut server,
            "HTTP/1.1 200 OK\r\nl5d-client-id: you\r\nContent-Length: 2\r\nConnection: keep-alive\r\n\r\nok",
        )
        .await;
        assert!(hear(&mut server, "body").await.starts_with("POST /b HTTP/1.1\r\n"));
        say(&mut server, "HTTP/1.1 204 No Content\r\n\r\n").await;
        server
    };
    let ((got, end), _server) = tokio::join!(client(&servers, says), play);
    assert_eq!(got, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 204 No Content\r\n\r\n");
    assert_eq!(end, End::Closed);
    assert_eq!(servers.kept.borrow().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn bodies_of_every_framing_pass() {
    let cases: [(&str, &str, &str, bool); 6] = [
        (
            "GET / HTTP/1.1\r\nhost: x\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-T: 1\r\n\r\n",
            "\r\n\r\n",
            true,
        ),
        (
            "POST / HTTP/1.1\r\nhost: x\r\nTransfer-Encoding: chunked\r\n\r\n2;e=1\r\nhi\r\n0\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
            "0\r\n\r\n",
            true,
        ),
        ("HEAD / HTTP/1.1\r\nhost: x\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n", "\r\n\r\n", true),
        (
            "GET / HTTP/1.1\r\nhost: x\r\n\r\n",
            "HTTP/1.1 304 Not Modified\r\nContent-Length: 99\r\n\r\n",
            "\r\n\r\n",
            true,
        ),
        (
            "GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n1",
            "\r\n\r\n",
            true,
        ),
        (
            "GET / HTTP/1.1\r\nhost: x\r\n\r\n",
            "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nuntil the end",
            "\r\n\r\n",
            false,
        ),
    ];
    for (says, answer, ending, kept) in cases {
        let servers = Servers::default();
        let mut server = servers.add();
        let play = async {
            hear(&mut server, ending).await;
            say(&mut server, answer).await;
            if !kept {
                drop(server);
                return None;
            }
            Some(server)
        };
        let ((got, _), _server) = tokio::join!(client(&servers, says.as_bytes()), play);
        let body = |text: &str| text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned());
        assert_eq!(body(&got), body(answer), "{says:?}");
        // A server asked in HTTP/1.0 closes without saying so: it is never asked again.
        let asked_again = kept && !says.contains("HTTP/1.0");
        assert_eq!(servers.kept.borrow().len(), usize::from(asked_again), "{says:?}");
        assert_eq!(got.contains("connection: close"), !kept, "{says:?}: {got}");
        assert_eq!(got.contains("connection: keep-alive"), says.contains("HTTP/1.0"), "{says:?}: {got}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_expects_100_continue_gets_it_before_it_sends_its_body() {
    let servers = Servers::default();
    let mut server = servers.add();
    let (mut app, mut io) = duplex(1024);
    let (_shutdown, mut drain) = drain::channel();
    let play = async {
        say(&mut app, "PUT / HTTP/1.1\r\nhost: x\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n").await;
        assert!(hear(&mut server, "\r\n\r\n").await.contains("Expect: 100-continue"));
        say(&mut server, "HTTP/1.1 100 Continue\r\n\r\n").await;
        assert_eq!(hear(&mut app, "\r\n\r\n").await, "HTTP/1.1 100 Continue\r\n\r\n");
        say(&mut app, "abc").await;
        assert_eq!(hear(&mut server, "abc").await, "abc");
        say(&mut server, "HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n").await;
        assert!(hear(&mut app, "\r\n\r\n").await.starts_with("HTTP/1.1 201 Created"));
        drop(app);
    };
    let (end, ()) = tokio::join!(serve(&mut io, BytesMut::new(), &servers, &mut drain), play);
    assert_eq!(end, End::Closed);
}

#[tokio::test(start_paused = true)]
async fn an_upgraded_connection_is_a_tunnel_in_both_directions() {
    let servers = Servers::default();
    let mut server = servers.add();
    let says = b"GET /chat HTTP/1.1\r\nhost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nfrom the client";
    let play = async {
        let head = hear(&mut server, "\r\n\r\n").await;
        assert!(head.contains("Upgrade: websocket") && head.contains("connection: upgrade"), "{head}");
        say(
            &mut server,
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nfrom the server",
        )
        .await;
        assert_eq!(hear(&mut server, "client").await, "from the client");
        drop(server);
    };
    let ((got, end), ()) = tokio::join!(client(&servers, says), play);
    assert!(got.starts_with("HTTP/1.1 101") && got.ends_with("from the server"), "{got}");
    assert_eq!(end, End::Closed);
    assert!(servers.kept.borrow().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_whose_client_is_no_longer_admitted_is_cut() {
    let servers = Servers::default();
    let mut server = servers.add();
    let (mut app, mut io) = duplex(1024);
    let (_shutdown, mut drain) = drain::channel();
    let play = async {
        say(&mut app, "GET /chat HTTP/1.1\r\nhost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n").await;
        hear(&mut server, "\r\n\r\n").await;
        say(&mut server, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nhi")
            .await;
        hear(&mut app, "hi").await;
        servers.revoked.notify_one();
    };
    let (end, ()) = tokio::join!(serve(&mut io, BytesMut::new(), &servers, &mut drain), play);
    assert_eq!(end, End::Broken);
}

#[tokio::test(start_paused = true)]
async fn a_request_whose_client_is_no_longer_admitted_is_refused_or_broken_off() {
    for answer in ["", "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf"] {
        let servers = Servers::default();
        let mut server = servers.add();
        let (mut app, mut io) = duplex(1024);
        let (_shutdown, mut drain) = drain::channel();
        let play = async {
            say(&mut app, "GET /long HTTP/1.1\r\nhost: x\r\n\r\n").await;
            hear(&mut server, "\r\n\r\n").await;
            say(&mut server, answer).await;
            hear(&mut app, answer).await;
            servers.revoked.notify_one();
            app.shutdown().await.unwrap();
            let mut rest = String::new();
            app.read_to_string(&mut rest).await.unwrap();
            rest
        };
        let served = async {
            let end = serve(&mut io, BytesMut::new(), &servers, &mut drain).await;
            drop(io);
            end
        };
        let (end, rest) = tokio::join!(served, play);
        match answer {
            "" => assert!(end == End::Closed && rest.starts_with("HTTP/1.1 403 "), "{end:?} {rest}"),
            _ => assert!(end == End::Broken && rest.is_empty(), "{end:?} {rest}"),
        }
        assert!(server.read_u8().await.is_err(), "the server's side is gone, too");
    }
}

#[test]
fn a_connection_costs_little_memory() {
    let servers = Servers::default();
    let (_app, mut io) = duplex(1);
    let (_shutdown, mut drain) = drain::channel();
    let size = size_of_val(&serve(&mut io, BytesMut::new(), &servers, &mut drain));
    assert!(size <= 2048, "{size} bytes for a connection's HTTP/1");
}

#[tokio::test(start_paused = true)]
async fn an_early_answer_is_delivered_though_the_body_never_ends() {
    let servers = Servers::default();
    let mut server = servers.add();
    let (mut app, mut io) = duplex(1024);
    let (_shutdown, mut drain) = drain::channel();
    let play = async {
        say(&mut app, "POST / HTTP/1.1\r\nhost: x\r\nContent-Length: 1000000\r\n\r\nthe beginning").await;
        hear(&mut server, "beginning").await;
        say(&mut server, "HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n").await;
        let mut got = String::new();
        app.read_to_string(&mut got).await.unwrap();
        assert!(got.starts_with("HTTP/1.1 413"), "{got}");
    };
    let (end, ()) = tokio::join!(serve(&mut io, BytesMut::new(), &servers, &mut drain), play);
    assert_eq!(end, End::Closed);
    assert!(servers.kept.borrow().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_request_that_met_a_closed_connection_is_sent_once_more_if_that_is_safe() {
    let post = "POST / HTTP/1.1\r\nhost: x\r\nContent-Length: 1\r\n\r\n1";
    let cases = [
        ("GET / HTTP/1.1\r\nhost: x\r\n\r\n", true, true),
        ("GET / HTTP/1.1\r\nhost: x\r\n\r\n", false, false), // a fresh connection: the server did this on purpose
        (post, true, false),
    ];
    for (says, stale, answered) in cases {
        let servers = Servers { stale, ..Servers::default() };
        let (mut first, mut second) = (servers.add(), servers.add());
        let play = async {
            hear(&mut first, if says == post { "1" } else { "\r\n\r\n" }).await;
            drop(first);
            if answered {
                hear(&mut second, "\r\n\r\n").await;
                say(&mut second, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
            }
            second
        };
        let ((got, _), _second) = tokio::join!(client(&servers, says.as_bytes()), play);
        assert_eq!(got.starts_with("HTTP/1.1 200"), answered, "{says:?}: {got}");
        assert_eq!(got.starts_with("HTTP/1.1 502"), !answered, "{says:?}: {got}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_response_that_breaks_off_is_never_a_short_body() {
    for answer in [
        "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
    ] {
        let servers = Servers::default();
        let mut server = servers.add();
        let play = async {
            hear(&mut server, "\r\n\r\n").await;
            say(&mut server, answer).await;
            drop(server);
        };
        let ((_, end), ()) = tokio::join!(client(&servers, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"), play);
        assert_eq!(end, End::Broken);
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_ambiguous_is_refused_and_nothing_of_it_forwarded() {
    let long = format!("GET / HTTP/1.1\r\nhost: x\r\nx: {}\r\n\r\n", "a".repeat(70_000));
    let cases = [
        ("POST / HTTP/1.1\r\nhost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", "conflicting_length"),
        ("POST / HTTP/1.1\r\nhost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "bad_chunk"),
        ("GET / HTTP/1.1\nhost: x\n\n", "bare_line_feed"),
        ("GET / HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n", "bad_host"),
        (&long, "head_too_large"),
    ];
    for (says, reason) in cases {
        let servers = Servers::default();
        let mut server = servers.add();
        let (got, end) = client(&servers, says.as_bytes()).await;
        assert!(got.starts_with("HTTP/1.1 400 "), "{reason}: {got}");
        assert!(got.contains(&format!("l5d-proxy-error: {reason}\r\n")), "{reason}: {got}");
        assert!(matches!(end, End::Bad(_)), "{reason}: {end:?}");
        drop(servers);
        let mut seen = String::new();
        server.read_to_string(&mut seen).await.unwrap();
        assert!(!seen.contains("\r\n\r\n") || reason == "bad_chunk", "{reason}: {seen}");
    }
}

#[tokio::test(start_paused = true)]
async fn idle_is_fine_for_ever_but_a_dribbled_head_is_not() {
    let servers = Servers::default();
    let mut server = servers.add();
    let (mut app, mut io) = duplex(1024);
    let (_shutdown, mut drain) = drain::channel();
    let play = async {
        tokio::time::sleep(Duration::from_secs(86_400)).await;
        say(&mut app, "GET / HTTP/1.1\r\nhost: x\r\n\r\n").await;
        hear(&mut server, "\r\n\r\n").await;
        say(&mut server, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
        hear(&mut app, "\r\n\r\n").await;
        let began = tokio::time::Instant::now();
        let mut got = String::new();
        say(&mut app, "GET / HT").await;
        app.read_to_string(&mut got).await.unwrap();
        assert!(got.starts_with("HTTP/1.1 408 "), "{got}");
        assert_eq!(began.elapsed(), Duration::from_secs(10));
    };
    let (end, ()) = tokio::join!(serve(&mut io, BytesMut::new(), &servers, &mut drain), play);
    assert_eq!(end, End::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_drain_ends_idle_connections_at_once_and_busy_ones_after_their_response() {
    let servers = Servers::default();
    let mut server = servers.add();
    let (mut app, mut io) = duplex(1024);
    let (mut idle_app, mut idle_io) = duplex(1024);
    let (shutdown, drain) = drain::channel();
    let play = async {
        say(&mut app, "GET / HTTP/1.1\r\nhost: x\r\n\r\n").await;
        hear(&mut server, "\r\n\r\n").await;
        shutdown.advance(drain::Phase::Draining);
        let mut nothing = String::new();
        idle_app.read_to_string(&mut nothing).await.unwrap();
        assert_eq!(nothing, "");
        say(&mut server, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
        let mut got = String::new();
        app.read_to_string(&mut got).await.unwrap();
        assert!(got.ends_with("ok"), "{got}");
    };
    let busy = async {
        let mut drain = drain.clone();
        let end = serve(&mut io, BytesMut::new(), &servers, &mut drain).await;
        drop(io);
        end
    };
    let idle = async {
        let mut drain = drain.clone();
        let end = serve(&mut idle_io, BytesMut::new(), &servers, &mut drain).await;
        drop(idle_io);
        end
    };
    let (busy, idle, ()) = tokio::join!(busy, idle, play);
    assert_eq!((busy, idle), (End::Closed, End::Closed));
}

#[tokio::test(start_paused = true)]
async fn a_request_without_a_server_is_answered_with_the_reason() {
    let servers = Servers::default();
    let (got, end) = client(&servers, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await;
    assert_eq!(
        got,
        "HTTP/1.1 504 Gateway Timeout\r\nl5d-proxy-error: no_endpoints\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
    );
    assert_eq!(end, End::Closed);
    assert_eq!(servers.refused.get().map(|refusal| refusal.reason), Some("no_endpoints"));
}
