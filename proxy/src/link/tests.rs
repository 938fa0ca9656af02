//! Links between two proxies over real sockets on loopback, with certificates of a test authority.

use std::cell::Cell;

use mantle_proxy_core::model::{Hint, PeerId};
use mantle_proxy_core::reasons::StreamReset;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio::task::LocalSet;
use tokio_rustls::TlsAcceptor;

use super::*;
use crate::tls::tests::{API, Ca, WEB};

/// A proxy that serves links: what it did is counted; streams are served by their port.
struct Server {
    addr: SocketAddr,
    links: Rc<Cell<usize>>,
    closed: Rc<RefCell<Vec<LinkClosed>>>,
    drain: Rc<Notify>,
    /// How many of the next links are drained as soon as they are made.
    drained_at_once: Rc<Cell<usize>>,
    one_closed: Rc<Notify>,
}

/// Port 7 echoes, 9 swallows nothing and waits, 13 sends a megabyte, 403 is denied.
async fn stream(open: Arc<Open>, mut stream: MuxStream) {
    match open.port {
        7 => {
            let mut buf = vec![0; 5_000];
            loop {
                match stream.read(&mut buf).await {
                    Ok(0) => break,
                    Ok(n) => stream.write_all(&buf[..n]).await.unwrap(),
                    Err(_) => return,
                }
            }
            stream.shutdown().await.unwrap();
        }
        13 => {
            stream.write_all(&vec![42; 1 << 20]).await.unwrap();
            stream.shutdown().await.unwrap();
            // dropping before the other side has finished would reset it
            let _ = stream.read_to_end(&mut Vec::new()).await;
        }
        403 => stream.reset(StreamReset::Denied),
        _ => {
            let _held = stream;
            std::future::pending::<()>().await;
        }
    }
}

async fn server(credentials: Arc<Credentials>) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let (links, closed) = (Rc::new(Cell::new(0)), Rc::new(RefCell::new(Vec::new())));
    let (drain, one_closed) = (Rc::new(Notify::new()), Rc::new(Notify::new()));
    let server = Server { addr, links, closed, drain, one_closed, drained_at_once: Rc::default() };
    let (links, closed, at_once) = (server.links.clone(), server.closed.clone(), server.drained_at_once.clone());
    let (drain, one_closed) = (server.drain.clone(), server.one_closed.clone());
    spawn_local(async move {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            let (links, closed, credentials) = (links.clone(), closed.clone(), credentials.clone());
            let (drain, one_closed) = (drain.clone(), one_closed.clone());
            let now = at_once.get() > 0;
            at_once.set(at_once.get().saturating_sub(1));
            spawn_local(async move {
                let Ok(tls) = TlsAcceptor::from(credentials.server_link.clone()).accept(tcp).await else { return };
                links.set(links.get() + 1);
                let accept = |open, io| drop(spawn_local(stream(open, io)));
                let drained = async {
                    if !now {
                        drain.notified().await
                    }
                };
                let why = serve(tls, &credentials, accept, drained).await;
                closed.borrow_mut().push(why);
                one_closed.notify_one();
            });
        }
    });
    server
}

fn endpoint(server: &Server, identity: &str) -> Endpoint {
    Endpoint {
        addr: SocketAddr::new(server.addr.ip(), 8080),
        tls: Ok(identity.into()),
        opaque_transport: Some(server.addr.port()),
        hint: Hint::Unknown,
        labels: [].into(),
    }
}

/// A play with WEB dialling API.
fn play<F: Future<Output = ()>>(act: impl FnOnce(Links, Server, Arc<Credentials>) -> F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    LocalSet::new().block_on(&runtime, async {
        let ca = Ca::new();
        let server = server(Arc::new(ca.credentials(API))).await;
        let links = Links::new(Dial { mark: None, timeout: Duration::from_secs(5) });
        let acted = act(links, server, Arc::new(ca.credentials(WEB)));
        tokio::time::timeout(Duration::from_secs(60), acted).await.expect("the play hangs");
    });
}

fn up(links: &Links) -> usize {
    links.0.peers.borrow().values().map(|peer| peer.links.len()).sum()
}

/// The reason inside an error of a stream.
fn why(error: &io::Error) -> Option<StreamReset> {
    error.get_ref()?.downcast_ref::<stream::StreamEnded>().map(|ended| ended.0)
}

async fn echo(links: &Links, endpoint: &Endpoint, credentials: &Arc<Credentials>, text: &[u8]) {
    let stream = links.open(endpoint, credentials, 7, LinkHint::Opaque).await.unwrap();
    let (mut reader, mut writer) = tokio::io::split(stream);
    let mut got = Vec::new();
    let writing = async {
        writer.write_all(text).await?;
        writer.shutdown().await
    };
    let (read, wrote) = tokio::join!(reader.read_to_end(&mut got), writing);
    read.and(wrote.map(|()| 0)).unwrap();
    assert!(got == text, "{} bytes of {}", got.len(), text.len());
}

#[test]
fn many_streams_share_one_link() {
    play(|links, server, web| async move {
        let api = endpoint(&server, API);
        let echoes = (0..50).map(|i| {
            let (links, api, web) = (links.clone(), api.clone(), web.clone());
            spawn_local(async move { echo(&links, &api, &web, format!("stream {i}").as_bytes()).await })
        });
        for echo in echoes.collect::<Vec<_>>() {
            echo.await.unwrap();
        }
        assert_eq!((server.links.get(), up(&links)), (1, 1));
    });
}

#[test]
fn bulk_flows_both_ways_beside_small_streams() {
    play(|links, server, web| async move {
        let api = endpoint(&server, API);
        let mut bulk = links.open(&api, &web, 13, LinkHint::Opaque).await.unwrap();
        let big: Vec<u8> = (0..3_000_000_u32).map(|i| (i % 251) as u8).collect();
        let reading = async {
            let mut got = Vec::new();
            bulk.read_to_end(&mut got).await.unwrap();
            got.len()
        };
        let (got, (), ()) = tokio::join!(reading, echo(&links, &api, &web, &big), echo(&links, &api, &web, b"small"));
        assert_eq!(got, 1 << 20);
    });
}

#[test]
fn a_stream_whose_reader_sleeps_holds_no_other() {
    play(|links, server, web| async move {
        let api = endpoint(&server, API);
        let asleep = links.open(&api, &web, 13, LinkHint::Opaque).await.unwrap();
        let mut deaf = links.open(&api, &web, 9, LinkHint::Opaque).await.unwrap();
        let flood = async {
            loop {
                deaf.write_all(&[0; 10_000]).await.unwrap();
            }
        };
        let fair = async {
            for _ in 0..100 {
                echo(&links, &api, &web, &[1; 2_000]).await;
            }
        };
        tokio::select! {
            () = fair => {}
            () = flood => {}
        }
        drop(asleep);
    });
}

#[test]
fn a_reset_reaches_reader_and_writer_with_its_reason() {
    play(|links, server, web| async move {
        let mut denied = links.open(&endpoint(&server, API), &web, 403, LinkHint::Opaque).await.unwrap();
        denied.write_all(b"x").await.unwrap();
        let error = denied.read(&mut [0; 10]).await.unwrap_err();
        assert_eq!(why(&error), Some(StreamReset::Denied));
        let error = denied.write(b"y").await.unwrap_err();
        assert_eq!(why(&error), Some(StreamReset::Denied));
    });
}

#[test]
fn a_peer_that_is_not_who_it_should_be_is_refused_and_nobody_waits() {
    play(|links, server, web| async move {
        let wrong = endpoint(&server, "other.shop.serviceaccount.identity.mantle.cluster.local");
        for _ in 0..2 {
            let refused = links.open(&wrong, &web, 7, LinkHint::Opaque).await.unwrap_err();
            assert_eq!(refused, Unroutable::IdentityMismatch);
        }
        let stranger = Arc::new(Ca::new().credentials(WEB));
        let refused = links.open(&endpoint(&server, API), &stranger, 7, LinkHint::Opaque).await.unwrap_err();
        assert_eq!(refused, Unroutable::IdentityMismatch);
        assert_eq!(up(&links), 0);
    });
}

#[test]
fn ports_without_a_link_say_why() {
    play(|links, server, web| async move {
        let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let nobody = Endpoint { opaque_transport: Some(closed.port()), ..endpoint(&server, API) };
        let refused = links.open(&nobody, &web, 7, LinkHint::Opaque).await.unwrap_err();
        assert_eq!(refused, Unroutable::ConnectFailed);
    });
    // A server that proves its identity and selects no ALPN.
    play(|links, _, _| async move {
        let ca = Ca::new();
        let (web, api) = (Arc::new(ca.credentials(WEB)), ca.credentials(API));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        spawn_local(async move {
            let (tcp, _) = listener.accept().await.unwrap();
            let mut tls = TlsAcceptor::from(api.server_plain.clone()).accept(tcp).await.unwrap();
            let _ = tls.read(&mut [0; 1]).await;
        });
        let plain = Endpoint {
            addr,
            tls: Ok(API.into()),
            opaque_transport: Some(addr.port()),
            hint: Hint::Unknown,
            labels: [].into(),
        };
        let refused = links.open(&plain, &web, 7, LinkHint::Opaque).await.unwrap_err();
        assert_eq!(refused, Unroutable::UnsupportedPeer);
    });
}

#[test]
fn a_draining_peer_finishes_what_is_open_and_gets_no_more() {
    play(|links, server, web| async move {
        let api = endpoint(&server, API);
        let mut kept = links.open(&api, &web, 7, LinkHint::Opaque).await.unwrap();
        kept.write_all(b"a").await.unwrap();
        kept.read_exact(&mut [0; 1]).await.unwrap();
        server.drain.notify_waiters();
        kept.write_all(b"b").await.unwrap();
        kept.read_exact(&mut [0; 1]).await.unwrap();
        echo(&links, &api, &web, b"on a new link").await;
        assert_eq!(server.links.get(), 2);
        drop(kept);
        server.one_closed.notified().await;
        assert_eq!(*server.closed.borrow(), [LinkClosed::Drained]);
    });
}

#[test]
fn a_link_that_the_peer_drains_as_soon_as_it_is_made_is_dialled_again() {
    play(|links, server, web| async move {
        server.drained_at_once.set(3);
        echo(&links, &endpoint(&server, API), &web, b"renewed meanwhile").await;
        assert_eq!((server.links.get(), up(&links)), (4, 1), "the last dial counts, too");
    });
}

/// One side of a link by hand, over memory, on virtual time.
struct Hand {
    session: mantle_proxy_core::mux::Session,
    io: DuplexStream,
}

impl Hand {
    fn new(role: Role) -> (Self, DuplexStream) {
        let (io, far) = duplex(64 << 10);
        (Self { session: mantle_proxy_core::mux::Session::new(role, Default::default()), io }, far)
    }

    async fn say(&mut self) {
        let mut out = Vec::new();
        self.session.transmit(Duration::ZERO, &mut out, 64 << 10);
        self.io.write_all(&out).await.unwrap();
    }

    /// Hands over our SETTINGS and takes theirs.
    async fn greet(&mut self) {
        self.say().await;
        while !self.session.is_ready() {
            let mut bytes = [0; 64];
            let n = self.io.read(&mut bytes).await.unwrap();
            assert_eq!(self.session.receive(Duration::ZERO, &mut &bytes[..n]).unwrap(), None);
        }
    }

    /// Reads until `seen` is content with what the session heard.
    async fn hear(&mut self, mut seen: impl FnMut(&mantle_proxy_core::mux::Event<'_>) -> bool) {
        let (mut bytes, mut content) = ([0; 4096], false);
        while !content {
            let n = self.io.read(&mut bytes).await.unwrap();
            assert!(n > 0, "the link was closed");
            let mut rest = &bytes[..n];
            while let Some(event) = self.session.receive(Duration::ZERO, &mut rest).unwrap() {
                content |= seen(&event);
            }
        }
    }
}

fn somebody() -> PeerId {
    PeerId { dns: API.into(), spiffe: None }
}

#[tokio::test(start_paused = true)]
async fn what_was_opened_before_the_goodbye_was_heard_is_served_though_the_link_was_idle_for_long() {
    LocalSet::new()
        .run_until(async {
            let (mut dialler, far) = Hand::new(Role::Dialler);
            let link = Rc::new(Link::new(Role::Acceptor, somebody(), 1));
            let drain = Rc::new(Notify::new());
            let drained = drain.clone();
            let served = spawn_local(async move {
                let accept = |open, io| drop(spawn_local(stream(open, io)));
                link.run(far, Instant::now() + Duration::from_secs(3600), accept, pin!(drained.notified())).await
            });
            dialler.greet().await;
            tokio::time::sleep(Duration::from_millis(24_900)).await; // idle, and about to be looked at
            drain.notify_one();
            tokio::time::sleep(Duration::from_millis(200)).await; // the OPEN crosses the goodbye
            let id = dialler.session.open(Duration::ZERO, opened(7)).unwrap();
            dialler.session.send(Duration::ZERO, id, b"late");
            dialler.say().await;
            dialler.hear(|event| matches!(event, mantle_proxy_core::mux::Event::Data { bytes: b"late", .. })).await;
            drop(dialler);
            served.await.unwrap();
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_ends_with_its_link_says_whether_the_peer_can_have_seen_it() {
    LocalSet::new()
        .run_until(async {
            for (leaves_first, kind) in
                [(true, io::ErrorKind::ConnectionReset), (false, io::ErrorKind::ConnectionRefused)]
            {
                let (mut acceptor, far) = Hand::new(Role::Acceptor);
                let link = Rc::new(Link::new(Role::Dialler, somebody(), 1));
                let running = link.clone();
                let until = Instant::now() + Duration::from_secs(3600);
                spawn_local(async move { running.run(far, until, |_, _| {}, std::future::pending()).await });
                acceptor.greet().await;
                link.ready().await.unwrap();
                let mut stream = link.open(opened(7)).unwrap();
                stream.write_all(b"x").await.unwrap();
                if leaves_first {
                    acceptor.hear(|event| matches!(event, mantle_proxy_core::mux::Event::Data { .. })).await;
                }
                drop(acceptor);
                let error = stream.read(&mut [0; 1]).await.unwrap_err();
                assert_eq!(error.kind(), kind);
            }
        })
        .await;
}

fn opened(port: u16) -> Open {
    Open { port, protocol: LinkHint::Opaque, authority: None }
}

#[test]
fn a_new_certificate_means_a_new_link_and_the_old_one_drains() {
    play(|links, _, _| async move {
        let ca = Ca::new();
        let server = self::server(Arc::new(ca.credentials(API))).await;
        let api = endpoint(&server, API);
        let old = Arc::new(ca.credentials(WEB));
        let new = Arc::new(Credentials { epoch: 2, ..ca.credentials(WEB) });
        let mut kept = links.open(&api, &old, 7, LinkHint::Opaque).await.unwrap();
        kept.write_all(b"a").await.unwrap();
        kept.read_exact(&mut [0; 1]).await.unwrap();
        echo(&links, &api, &new, b"on a new link").await;
        kept.write_all(b"b").await.unwrap();
        kept.read_exact(&mut [0; 1]).await.unwrap();
        drop(kept);
        server.one_closed.notified().await;
        assert_eq!((server.links.get(), up(&links)), (2, 1));
        assert_eq!(*server.closed.borrow(), [LinkClosed::Drained]);
    });
}

#[test]
fn a_link_ends_with_its_certificates() {
    play(|links, server, web| async move {
        let short = Credentials { not_after: SystemTime::now() + Duration::from_secs(5), ..take(web) };
        let mut stream = links.open(&endpoint(&server, API), &Arc::new(short), 9, LinkHint::Opaque).await.unwrap();
        let error = stream.read(&mut [0; 1]).await.unwrap_err();
        assert_eq!(why(&error), Some(StreamReset::Broken));
        server.one_closed.notified().await;
        assert_eq!(*server.closed.borrow(), [LinkClosed::PeerGone]);
    });
}

fn take(credentials: Arc<Credentials>) -> Credentials {
    Arc::into_inner(credentials).expect("nobody else has it")
}

#[test]
fn hostile_bytes_close_the_link_with_a_reason_and_hurt_no_other() {
    play(|links, server, web| async move {
        let api = endpoint(&server, API);
        let mut good = links.open(&api, &web, 7, LinkHint::Opaque).await.unwrap();
        let tcp = TcpStream::connect(server.addr).await.unwrap();
        let name = tls::server_name(API).unwrap();
        let mut bad = TlsConnector::from(web.client_link.clone()).connect(name, tcp).await.unwrap();
        bad.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        server.one_closed.notified().await;
        assert_eq!(*server.closed.borrow(), [LinkClosed::BadFrame]);
        good.write_all(b"a").await.unwrap();
        good.read_exact(&mut [0; 1]).await.unwrap();
    });
}
