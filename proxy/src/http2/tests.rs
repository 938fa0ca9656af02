//! Clients and servers of the `h2` crate with the proxy between them, over real sockets on loopback.

use std::cell::{Cell, RefCell};
use std::future::Future;

use h2::client::{self, SendRequest};
use h2::{Reason, server};
use http::{HeaderMap, Method, Response};
use mantle_proxy_core::http1::is_reserved;
use mantle_proxy_core::reasons::NoTls;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::{LocalSet, spawn_local};

use super::*;
use crate::drain;

/// Status, `grpc-status`, bytes of the response's body, and whether it failed.
type Booked = (u16, Option<u8>, u64, bool);

/// What the records of all requests were told.
#[derive(Default)]
struct Book {
    ends: RefCell<Vec<Booked>>,
    refused: RefCell<Vec<Refusal>>,
    connected: Cell<usize>,
    unreachable: Cell<usize>,
    /// Told, every request under way is revoked.
    revoke: Notify,
    ended: Notify,
    /// Why clients gave up requests that the application never answers.
    given_up: RefCell<Vec<Reason>>,
    /// The names in all responses' trailers.
    trailers: RefCell<Vec<String>>,
    gave_up: Notify,
    /// How often `/refused-once` is still refused.
    refusals: Cell<usize>,
}

struct Ticket {
    book: Rc<Book>,
    seen: Booked,
}

impl Record for Ticket {
    fn response(&mut self, status: u16, headers: VisitHeaders<'_>, _: Duration) {
        self.seen.0 = status;
        headers(&mut |name, _| assert!(!name.is_empty()));
    }
    fn body(&mut self, bytes: u64) {
        self.seen.2 += bytes;
    }
    fn trailers(&mut self, trailers: VisitHeaders<'_>) {
        trailers(&mut |name, _| self.book.trailers.borrow_mut().push(name.to_owned()));
    }
    fn grpc_status(&mut self, code: u8) {
        self.seen.1 = Some(code);
    }
    fn end(mut self, failed: bool) {
        self.seen.3 = failed;
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.book.ends.borrow_mut().push(self.seen);
        self.book.ended.notify_one();
    }
}

const DENIED: Refusal = Refusal { status: 403, reason: "unauthorized" };

/// Requests go to the servers in turn; `/denied` is refused.
struct Turns {
    servers: RefCell<Vec<SocketAddr>>,
    next: Cell<usize>,
    book: Rc<Book>,
}

impl Service for Turns {
    type Io = TcpStream;
    type Place = SocketAddr;
    type Ticket = Ticket;

    async fn pick(&self, request: &mut Parts) -> Result<Picked<SocketAddr>, Refusal> {
        if request.uri.path() == "/denied" {
            return Err(DENIED);
        }
        request.headers.insert("l5d-client-id", "web.shop".parse().unwrap());
        let servers = self.servers.borrow();
        let to = servers[self.next.replace(self.next.get() + 1) % servers.len()];
        Ok(Picked { key: (to, TlsLabel::None(NoTls::Loopback)), place: to, strip_response: true })
    }

    async fn connect(&self, place: &SocketAddr) -> Result<Connected<TcpStream>, Refusal> {
        self.book.connected.set(self.book.connected.get() + 1);
        let refused = Refusal { status: 504, reason: "connect_failed" };
        let io = TcpStream::connect(place).await.map_err(|_| refused)?;
        Ok(Connected { io, link: None })
    }

    fn unreachable(&self, _: SocketAddr) -> bool {
        self.book.unreachable.set(self.book.unreachable.get() + 1);
        true
    }

    fn begin(&self, _: SocketAddr, _: &Parts) -> Ticket {
        Ticket { book: self.book.clone(), seen: (0, None, 0, true) }
    }

    fn revoked(&self, _: &SocketAddr, _: &Parts) -> impl Future<Output = Refusal> + 'static {
        let book = self.book.clone();
        async move {
            book.revoke.notified().await;
            DENIED
        }
    }

    fn refused(&self, refusal: Refusal) -> bool {
        self.book.refused.borrow_mut().push(refusal);
        true
    }
}

/// Serves each path in its own way, as an application would.
async fn application(listener: TcpListener, book: Rc<Book>) {
    loop {
        let (io, _) = listener.accept().await.unwrap();
        let book = book.clone();
        spawn_local(async move {
            let Ok(mut connection) = server::handshake(io).await else { return };
            while let Some(Ok((request, respond))) = connection.accept().await {
                spawn_local(answer(request, respond, book.clone()));
            }
        });
    }
}

async fn answer(request: Request<RecvStream>, mut respond: SendResponse<Bytes>, book: Rc<Book>) {
    let (parts, mut body) = request.into_parts();
    let ok = |kind: &str| Response::builder().header("content-type", kind).header("l5d-forged", "1").body(()).unwrap();
    match parts.uri.path() {
        "/headers" => {
            let names: Vec<_> = parts.headers.iter().map(|(n, v)| format!("{n}={}", v.to_str().unwrap())).collect();
            let mut stream = respond.send_response(ok("text/plain"), false).unwrap();
            stream.send_data(names.join("\n").into(), true).unwrap();
        }
        "/echo" => {
            let mut stream = respond.send_response(ok("application/grpc"), false).unwrap();
            while let Some(chunk) = body.data().await {
                let Ok(chunk) = chunk else { return };
                let n = chunk.len();
                send_all(&mut stream, chunk).await;
                body.flow_control().release_capacity(n).unwrap();
            }
            let mut trailers = body.trailers().await.unwrap().unwrap_or_default();
            let reserved = trailers.keys().filter(|name| is_reserved(name.as_str().as_bytes())).count();
            trailers.insert("grpc-status", "5".parse().unwrap());
            trailers.insert("x-reserved-seen", reserved.into());
            trailers.insert("l5d-client-id", "forged".parse().unwrap());
            stream.send_trailers(trailers).unwrap();
        }
        "/hints" => {
            let hints = Response::builder().status(103).header("l5d-client-id", "forged").body(()).unwrap();
            respond.send_informational(hints).unwrap();
            respond.send_response(Response::new(()), true).unwrap();
        }
        "/refused-once" if book.refusals.replace(0) > 0 => respond.send_reset(Reason::REFUSED_STREAM),
        "/refused-once" => drop(respond.send_response(Response::new(()), true)),
        "/reset" => respond.send_reset(Reason::ENHANCE_YOUR_CALM),
        "/half" => {
            let mut stream = respond.send_response(ok("text/plain"), false).unwrap();
            stream.send_data("half".into(), false).unwrap();
            let _ = body.data().await;
            stream.send_reset(Reason::INTERNAL_ERROR);
        }
        _ => {
            let reason = std::future::poll_fn(|cx| respond.poll_reset(cx)).await.unwrap();
            book.given_up.borrow_mut().push(reason);
            book.gave_up.notify_one();
        }
    }
}

async fn send_all(stream: &mut h2::SendStream<Bytes>, mut bytes: Bytes) {
    while !bytes.is_empty() {
        stream.reserve_capacity(bytes.len());
        let room = std::future::poll_fn(|cx| stream.poll_capacity(cx)).await.unwrap().unwrap();
        stream.send_data(bytes.split_to(room.min(bytes.len())), false).unwrap();
    }
}

struct Stage {
    send: SendRequest<Bytes>,
    book: Rc<Book>,
    service: Rc<Turns>,
    shutdown: drain::Shutdown,
    /// How serving ended, once it has.
    end: Rc<RefCell<Option<End>>>,
    over: Rc<Notify>,
}

/// A client, the proxy, and `servers` applications.
fn play<F: Future<Output = ()>>(servers: usize, act: impl FnOnce(Stage) -> F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    LocalSet::new().block_on(&runtime, async {
        let (mut addrs, book) = (Vec::new(), Rc::new(Book::default()));
        for _ in 0..servers {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            addrs.push(listener.local_addr().unwrap());
            spawn_local(application(listener, book.clone()));
        }
        let service = Rc::new(Turns { servers: RefCell::new(addrs), next: Cell::new(0), book: book.clone() });
        let (shutdown, mut drain) = drain::channel();
        let kept = service.clone();
        let (end, over) = (Rc::new(RefCell::new(None)), Rc::new(Notify::new()));
        let proxy = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = proxy.local_addr().unwrap();
        let (told, ended) = (end.clone(), over.clone());
        spawn_local(async move {
            let (io, _) = proxy.accept().await.unwrap();
            *told.borrow_mut() = Some(serve(io, BytesMut::new(), service, &mut drain).await);
            ended.notify_one();
        });
        let (send, connection) = client::handshake(TcpStream::connect(addr).await.unwrap()).await.unwrap();
        spawn_local(connection);
        let acted = act(Stage { send, book, service: kept, shutdown, end, over });
        tokio::time::timeout(Duration::from_secs(60), acted).await.expect("the play hangs");
    });
}

impl Stage {
    async fn start(
        &self,
        request: http::request::Builder,
        end: bool,
    ) -> (client::ResponseFuture, h2::SendStream<Bytes>) {
        let mut send = self.send.clone().ready().await.unwrap();
        send.send_request(request.body(()).unwrap(), end).unwrap()
    }

    async fn get(&self, path: &str) -> Result<Response<RecvStream>, h2::Error> {
        self.start(get(path), true).await.0.await
    }

    /// Waits until `n` requests are over, and says how they were booked.
    async fn ends(&self, n: usize) -> Vec<Booked> {
        while self.book.ends.borrow().len() < n {
            self.book.ended.notified().await;
        }
        self.book.ends.borrow().clone()
    }
}

fn get(path: &str) -> http::request::Builder {
    Request::builder().uri(format!("http://web-svc.emojivoto:80{path}"))
}

async fn text(body: &mut RecvStream) -> Result<Vec<u8>, h2::Error> {
    let mut all = Vec::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk?;
        body.flow_control().release_capacity(chunk.len())?;
        all.extend(chunk);
    }
    Ok(all)
}

#[test]
fn requests_of_one_connection_spread_over_the_servers() {
    play(3, |stage| async move {
        for _ in 0..9 {
            assert_eq!(stage.get("/headers").await.unwrap().status(), 200);
        }
        assert_eq!(stage.book.connected.get(), 3, "one connection to each server");
        assert!(stage.ends(9).await.iter().all(|end| (end.0, end.3) == (200, false)));
    });
}

#[test]
fn forged_and_hop_by_hop_headers_do_not_pass_and_ours_does() {
    play(1, |stage| async move {
        let request = get("/headers")
            .header("l5d-client-id", "forged")
            .header("L5D_Client_Id", "forged")
            .header("mantle-client-addr", "1.2.3.4")
            .header("te", "trailers")
            .header("grpc-timeout", "5S")
            .header("x-kept", "1");
        let response = stage.start(request, true).await.0.await.unwrap();
        assert!(!response.headers().contains_key("l5d-forged"));
        let seen = String::from_utf8(text(&mut response.into_body()).await.unwrap()).unwrap();
        let mut seen: Vec<_> = seen.lines().collect();
        seen.sort_unstable();
        assert_eq!(seen, ["grpc-timeout=5S", "l5d-client-id=web.shop", "te=trailers", "x-kept=1"]);
    });
}

#[test]
fn bodies_and_trailers_stream_both_ways_at_once() {
    play(1, |stage| async move {
        let (response, mut stream) = stage.start(get("/echo").method(Method::POST), false).await;
        let mut response = response.await.unwrap(); // before a byte of the request's body was sent
        stream.send_data("ping".into(), false).unwrap();
        assert_eq!(response.body_mut().data().await.unwrap().unwrap(), "ping");
        let big = Bytes::from(vec![7; 3 << 20]); // many windows
        let sending = async {
            send_all(&mut stream, big.clone()).await;
            let trailers = [("x-sum", "9"), ("l5d-client-id", "forged"), ("mantle_client_addr", "1.2.3.4")];
            let trailers = trailers.map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()));
            stream.send_trailers(HeaderMap::from_iter(trailers)).unwrap();
        };
        let body = response.body_mut();
        let reading = async {
            body.flow_control().release_capacity(4).unwrap();
            text(body).await.unwrap()
        };
        let ((), got) = tokio::join!(sending, reading);
        assert_eq!(got, big);
        let trailers = response.body_mut().trailers().await.unwrap().unwrap();
        assert!(trailers["x-sum"] == "9" && trailers["grpc-status"] == "5", "{trailers:?}");
        assert!(trailers["x-reserved-seen"] == "0" && !trailers.contains_key("l5d-client-id"), "{trailers:?}");
        assert_eq!(stage.ends(1).await, [(200, Some(5), 4 + (3 << 20), false)]);
        assert_eq!(
            *stage.book.trailers.borrow(),
            ["x-sum", "grpc-status", "x-reserved-seen"],
            "tap hears of them, too"
        );
    });
}

#[test]
fn a_client_that_does_not_read_stops_the_server_not_the_proxy() {
    play(1, |stage| async move {
        let (response, mut stream) = stage.start(get("/echo").method(Method::POST), false).await;
        let response = response.await.unwrap();
        let flood = async {
            for _ in 0..1_000 {
                send_all(&mut stream, Bytes::from(vec![7; 64 << 10])).await;
            }
        };
        let others = async {
            for _ in 0..20 {
                assert_eq!(stage.get("/headers").await.unwrap().status(), 200);
            }
        };
        tokio::select! {
            () = flood => panic!("64 MiB went nowhere"),
            () = others => {}
        }
        drop(response);
    });
}

#[test]
fn interim_responses_pass() {
    play(1, |stage| async move {
        let (mut response, _) = stage.start(get("/hints"), true).await;
        let interim = std::future::poll_fn(|cx| response.poll_informational(cx)).await.unwrap().unwrap();
        assert_eq!(interim.status(), 103);
        assert!(!interim.headers().contains_key("l5d-client-id"));
        assert_eq!(response.await.unwrap().status(), 200);
    });
}

#[test]
fn resets_keep_their_reason_in_both_directions() {
    play(1, |stage| async move {
        assert_eq!(stage.get("/reset").await.unwrap_err().reason(), Some(Reason::ENHANCE_YOUR_CALM));
        let (response, mut stream) = stage.start(get("/half").method(Method::POST), false).await;
        let mut response = response.await.unwrap();
        assert_eq!(response.body_mut().data().await.unwrap().unwrap(), "half");
        stream.send_data("go".into(), false).unwrap();
        let broken = response.body_mut().data().await.unwrap().unwrap_err();
        assert_eq!(broken.reason(), Some(Reason::INTERNAL_ERROR));
        // The client gives up while the server thinks.
        let (response, mut stream) = stage.start(get("/never").method(Method::POST), false).await;
        assert_eq!(stage.get("/headers").await.unwrap().status(), 200);
        stream.send_reset(Reason::CANCEL);
        drop(response);
        let ends = stage.ends(4).await;
        let failed: Vec<_> = ends.iter().map(|end| (end.0, end.3)).collect();
        assert_eq!(failed, [(0, true), (200, true), (200, false), (0, true)]);
        stage.book.gave_up.notified().await;
        assert_eq!(*stage.book.given_up.borrow(), [Reason::CANCEL]);
    });
}

#[test]
fn a_request_that_the_server_never_looked_at_is_sent_again_by_whoever_still_has_it() {
    play(1, |stage| async move {
        stage.book.refusals.set(1);
        assert_eq!(stage.get("/refused-once").await.unwrap().status(), 200, "we had all of it");
        stage.book.refusals.set(1);
        let (response, _stream) = stage.start(get("/refused-once").method(Method::POST), false).await;
        let refused = response.await.unwrap_err();
        assert_eq!(refused.reason(), Some(Reason::REFUSED_STREAM), "only the client has the body");
    });
}

/// A server that says goodbye when the third request has arrived, and names the second as the last that it looked at.
async fn leaving(listener: TcpListener, before_goodbye: impl FnOnce()) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let frame = |kind: u8, flags: u8, id: u32, body: &[u8]| {
        let mut frame = vec![0, 0, body.len() as u8, kind, flags];
        frame.extend(id.to_be_bytes());
        frame.extend(body);
        frame
    };
    let (mut io, _) = listener.accept().await.unwrap();
    io.write_all(&frame(4, 0, 0, &[])).await.unwrap();
    let mut seen = Vec::new();
    let heads = |seen: &[u8]| {
        let mut rest = seen.get(24..).unwrap_or_default();
        let mut heads = 0;
        while let [_, high, low, kind, ..] = *rest {
            heads += usize::from(kind == 1);
            rest = rest.get(9 + usize::from(high) * 256 + usize::from(low)..).unwrap_or_default();
        }
        heads
    };
    while heads(&seen) < 3 {
        io.read_buf(&mut seen).await.unwrap();
    }
    before_goodbye();
    io.write_all(&frame(7, 0, 0, &[0, 0, 0, 3, 0, 0, 0, 0])).await.unwrap();
    for id in [1, 3] {
        io.write_all(&frame(1, 0x5, id, &[0x88])).await.unwrap(); // :status 200, the end
    }
    let _ = io.read_to_end(&mut seen).await;
}

#[test]
fn a_goodbye_that_crosses_a_request_costs_no_request() {
    play(1, |stage| async move {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        stage.service.servers.borrow_mut().insert(0, listener.local_addr().unwrap());
        stage.service.servers.borrow_mut().truncate(1);
        let next = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (service, addr) = (stage.service.clone(), next.local_addr().unwrap());
        spawn_local(application(next, stage.book.clone()));
        spawn_local(leaving(listener, move || *service.servers.borrow_mut() = vec![addr]));
        let first = stage.start(get("/headers"), true).await.0;
        let second = stage.start(get("/headers"), true).await.0;
        let third = stage.start(get("/headers"), true).await.0;
        for answer in [first, second, third] {
            assert_eq!(answer.await.unwrap().status(), 200);
        }
        assert_eq!(stage.book.connected.get(), 2, "the refused one went to the next server");
    });
}

#[test]
fn refusals_speak_the_clients_language() {
    play(1, |stage| async move {
        let refused = stage.get("/denied").await.unwrap();
        assert_eq!(
            (refused.status(), refused.headers()["l5d-proxy-error"].to_str().unwrap()),
            (403.try_into().unwrap(), "unauthorized")
        );
        let grpc = get("/denied").method(Method::POST).header("content-type", "application/grpc+proto");
        let refused = stage.start(grpc, true).await.0.await.unwrap();
        assert_eq!((refused.status().as_u16(), refused.headers()["grpc-status"].to_str().unwrap()), (200, "7"));
        assert!(refused.body().is_end_stream());
        assert_eq!(stage.book.refused.borrow().len(), 2);
    });
    play(0, |stage| async move {
        // Nobody listens there.
        let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        drop(stage);
        let book = Rc::new(Book::default());
        let service = Rc::new(Turns { servers: RefCell::new(vec![closed]), next: Cell::new(0), book: book.clone() });
        let (near, far) = tokio::io::duplex(64 << 10);
        let (_keep, mut drain) = drain::channel();
        spawn_local(async move { serve(far, BytesMut::new(), service, &mut drain).await });
        let (send, connection) = client::handshake(near).await.unwrap();
        spawn_local(connection);
        let mut send = send.ready().await.unwrap();
        let response = send.send_request(get("/x").body(()).unwrap(), true).unwrap().0.await.unwrap();
        assert_eq!(response.status(), 504);
        assert_eq!((book.unreachable.get(), book.ends.borrow().len()), (3, 0), "three tries, nothing sent");
    });
}

#[test]
fn a_server_that_is_down_is_passed_over() {
    play(1, |stage| async move {
        let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        stage.service.servers.borrow_mut().insert(0, closed);
        for _ in 0..4 {
            assert_eq!(stage.get("/headers").await.unwrap().status(), 200);
        }
        assert!(stage.book.unreachable.get() > 0);
    });
}

#[test]
fn a_revoked_request_ends_answered_or_not() {
    play(1, |stage| async move {
        let (response, _stream) = stage.start(get("/never").method(Method::POST), false).await;
        let (open, mut stream) = stage.start(get("/echo").method(Method::POST), false).await;
        let mut open = open.await.unwrap();
        stage.book.revoke.notify_waiters();
        assert_eq!(response.await.unwrap().status(), 403);
        assert_eq!(open.body_mut().data().await.unwrap().unwrap_err().reason(), Some(Reason::CANCEL));
        assert!(std::future::poll_fn(|cx| stream.poll_reset(cx)).await.is_ok());
        assert!(stage.ends(2).await.iter().all(|end| end.3));
    });
}

#[test]
fn draining_finishes_what_is_open_and_takes_no_more() {
    play(1, |stage| async move {
        let (response, mut stream) = stage.start(get("/echo").method(Method::POST), false).await;
        let mut response = response.await.unwrap();
        stage.shutdown.advance(drain::Phase::Draining);
        stream.send_data("late".into(), true).unwrap();
        assert_eq!(text(response.body_mut()).await.unwrap(), b"late");
        drop((response, stream));
        stage.over.notified().await;
        assert_eq!(*stage.end.borrow(), Some(End::Closed));
        assert!(stage.send.clone().ready().await.is_err());
    });
}

#[test]
fn bytes_that_are_not_http2_end_the_connection() {
    play(0, |stage| async move {
        drop(stage);
        let (mut near, far) = tokio::io::duplex(64 << 10);
        let book = Rc::new(Book::default());
        let service = Rc::new(Turns { servers: RefCell::default(), next: Cell::new(0), book });
        let (_keep, mut drain) = drain::channel();
        let seen = BytesMut::from(&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..]);
        let served = spawn_local(async move { serve(far, seen, service, &mut drain).await });
        tokio::io::AsyncWriteExt::write_all(&mut near, &[0xff; 64]).await.unwrap();
        assert!(matches!(served.await.unwrap(), End::Bad(_)), "typed");
    });
}

#[test]
fn a_request_under_way_is_small() {
    play(1, |stage| async move {
        let serving = Rc::new(Serving { service: stage.service.clone(), pool: RefCell::default() });
        let (near, far) = tokio::io::duplex(64 << 10);
        let (client, connection) = client::handshake(near).await.unwrap();
        spawn_local(connection);
        spawn_local(async move {
            let mut client = client.ready().await.unwrap();
            let _ = client.send_request(get("/x").body(()).unwrap(), true).unwrap().0.await;
        });
        let mut server = server::handshake(far).await.unwrap();
        let (request, respond) = server.accept().await.unwrap().unwrap();
        let size = size_of_val(&serving.request(request, respond));
        assert!(size <= 3 << 10, "{size} bytes");
    });
}
