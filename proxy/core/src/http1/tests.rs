//! Heads and bodies as tables: what is understood how, what is refused and why, and what leaves.

use super::*;
use crate::reasons::BadHttp;
use crate::testing::Random;

const PLAIN: Edit<'_> = Edit { strip_reserved: true, connection: Connection::Default, add: &[] };

/// `lines` become a head: each gets its CRLF, and an empty line follows.
fn head(lines: &[&str]) -> Vec<u8> {
    lines.iter().flat_map(|line| [line, "\r\n"]).chain(["\r\n"]).collect::<String>().into_bytes()
}

fn forwarded(lines: &[&str], edit: &Edit<'_>) -> Vec<String> {
    let bytes = head(lines);
    let mut out = Vec::new();
    request(&bytes).unwrap().unwrap().head.forward(&mut out, edit);
    let text = String::from_utf8(out).unwrap();
    text.strip_suffix("\r\n\r\n").unwrap().split("\r\n").map(Into::into).collect()
}

#[test]
fn a_request_is_understood_in_place() {
    let bytes = head(&["POST /api/vote?choice=:x: HTTP/1.1", "Host: web-svc.emojivoto:80", "Content-Length: 5"]);
    let with_body = [&bytes[..], b"hello"].concat();
    let r = request(&with_body).unwrap().unwrap();
    assert_eq!((r.method, r.target, r.path), ("POST", "/api/vote?choice=:x:", "/api/vote"));
    assert_eq!((r.authority, r.version, r.body), (Some("web-svc.emojivoto:80"), Version::Http11, Body::Length(5)));
    assert_eq!((r.keep_alive, r.upgrade, r.head.size()), (true, false, bytes.len()));
    assert_eq!(r.head.header("content-LENGTH"), Some(&b"5"[..]));
    assert_eq!(r.head.headers().count(), 2);
    for cut in 0..bytes.len() {
        assert!(request(&bytes[..cut]).unwrap().is_none(), "cut at {cut}");
    }
    let blank = [b"\r\n", &bytes[..]].concat();
    assert_eq!(request(&blank).unwrap().unwrap().head.size(), blank.len());
}

#[test]
fn what_readers_could_understand_differently_is_refused() {
    let ok = "Host: x";
    let raw = |text: &str| text.as_bytes().to_vec();
    let cases: Vec<(Vec<u8>, BadHttp)> = vec![
        (head(&["GET / HTTP/1.1", ok, "Content-Length: 1", "Transfer-Encoding: chunked"]), BadHttp::ConflictingLength),
        (head(&["GET / HTTP/1.1", ok, "Content-Length: 1", "Content-Length: 1"]), BadHttp::ConflictingLength),
        (head(&["GET / HTTP/1.1", ok, "Content-Length: 1, 1"]), BadHttp::ConflictingLength),
        (head(&["GET / HTTP/1.1", ok, "Content-Length: +1"]), BadHttp::ConflictingLength),
        (head(&["GET / HTTP/1.1", ok, "Content-Length: "]), BadHttp::ConflictingLength),
        (head(&["GET / HTTP/1.1", ok, "Content-Length: 0x5"]), BadHttp::ConflictingLength),
        (head(&["GET / HTTP/1.1", ok, "Content-Length: 99999999999999999999"]), BadHttp::ConflictingLength),
        (head(&["GET / HTTP/1.1", ok, "Transfer-Encoding: gzip, chunked"]), BadHttp::BadTransferEncoding),
        (head(&["GET / HTTP/1.1", ok, "Transfer-Encoding: xchunked"]), BadHttp::BadTransferEncoding),
        (head(&["GET / HTTP/1.1", ok, "Transfer-Encoding: identity"]), BadHttp::BadTransferEncoding),
        (head(&["GET / HTTP/1.1", ok, "Transfer-Encoding: \x0bchunked"]), BadHttp::Malformed),
        (
            head(&["GET / HTTP/1.1", ok, "Transfer-Encoding: chunked", "Transfer-Encoding: chunked"]),
            BadHttp::BadTransferEncoding,
        ),
        (head(&["GET / HTTP/1.0", "Transfer-Encoding: chunked"]), BadHttp::BadTransferEncoding),
        (head(&["GET / HTTP/1.1", ok, "Transfer-Encoding : chunked"]), BadHttp::Malformed),
        (head(&["GET / HTTP/1.1", ok, "X: a", " b"]), BadHttp::ObsoleteFold),
        (head(&["GET / HTTP/1.1", " X: a", ok]), BadHttp::ObsoleteFold),
        (raw("GET / HTTP/1.1\nHost: x\n\n"), BadHttp::BareLineFeed),
        (raw("GET / HTTP/1.1\r\nHost: x\n\r\n"), BadHttp::BareLineFeed),
        (raw("\nGET / HTTP/1.1\r\n"), BadHttp::BareLineFeed),
        (raw("\r\n\r\nGET / HTTP/1.1\r\n"), BadHttp::Malformed),
        (head(&["GET / HTTP/1.1", ok, "X: a\rb"]), BadHttp::Malformed),
        (head(&["GET / HTTP/1.1", ok, "X: a\0b"]), BadHttp::Malformed),
        (head(&["GET / HTTP/1.1", ok, "no colon"]), BadHttp::Malformed),
        (head(&["GET / HTTP/1.1", ok, ": nameless"]), BadHttp::Malformed),
        (head(&["GET  / HTTP/1.1", ok]), BadHttp::Malformed),
        (head(&["GET / HTTP/1.1 ", ok]), BadHttp::Malformed),
        (head(&["GET /a b HTTP/1.1", ok]), BadHttp::UnsupportedVersion),
        (head(&["GET\t/\tHTTP/1.1", ok]), BadHttp::Malformed),
        (head(&["GET /x#y HTTP/1.1", ok]), BadHttp::Malformed),
        (head(&["GET x HTTP/1.1", ok]), BadHttp::Malformed),
        (head(&["GET * HTTP/1.1", ok]), BadHttp::Malformed),
        (head(&["GET ftp://x/ HTTP/1.1", ok]), BadHttp::Malformed),
        (head(&["GET / HTTP/1.1"]), BadHttp::BadHost),
        (head(&["GET / HTTP/1.1", ok, "host: y"]), BadHttp::BadHost),
        (head(&["GET / HTTP/1.1", "Host: a b"]), BadHttp::BadHost),
        (head(&["GET / HTTP/1.1", "Host: a/b"]), BadHttp::BadHost),
        (head(&["GET / HTTP/1.1", "Host: u@a"]), BadHttp::BadHost),
        (head(&["GET http://y/ HTTP/1.1", ok]), BadHttp::BadHost),
        (head(&["GET http://u@x/ HTTP/1.1", ok]), BadHttp::BadHost),
        (head(&["CONNECT x HTTP/1.1", ok]), BadHttp::BadHost),
        (head(&["CONNECT x:0 HTTP/1.1", ok]), BadHttp::BadHost),
        (head(&["GET / HTTP/1.1", ok, "Connection: close, Content-Length"]), BadHttp::Malformed),
        (head(&["GET / HTTP/1.1", ok, "Connection: host"]), BadHttp::Malformed),
        (head(&["GET / HTTP/2.0", ok]), BadHttp::UnsupportedVersion),
        (head(&["PRI * HTTP/2.0"]), BadHttp::UnsupportedVersion),
        (head(&["GET / HTTP/1.1", &format!("X: {}", "a".repeat(MAX_HEAD))]), BadHttp::HeadTooLarge),
        (raw(&format!("GET /{}", "a".repeat(MAX_HEAD))), BadHttp::HeadTooLarge),
        (head(&[&["GET / HTTP/1.1", ok][..], &["X: 1"; MAX_HEADERS]].concat()), BadHttp::HeadTooLarge),
    ];
    for (bytes, want) in cases {
        let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(90)]).into_owned();
        assert_eq!(request(&bytes).map(|r| r.is_some()), Err(want), "{shown:?}");
    }
}

#[test]
fn every_form_of_target_names_its_path_and_authority() {
    let cases = [
        ("GET /a/b?c HTTP/1.1", "Host: x:80", "/a/b", Some("x:80")),
        ("GET http://X/a?b HTTP/1.1", "Host: x", "/a", Some("X")),
        ("GET http://x?b HTTP/1.1", "Host: x", "/", Some("x")),
        ("OPTIONS * HTTP/1.1", "Host: x", "", Some("x")),
        ("CONNECT db:5432 HTTP/1.1", "Host: proxy", "", Some("db:5432")),
        ("GET / HTTP/1.1", "Host: ", "/", None),
        ("GET / HTTP/1.0", "X: y", "/", None),
        ("GET / HTTP/1.1", "Host: [::1]:80", "/", Some("[::1]:80")),
    ];
    for (line, host, path, authority) in cases {
        let bytes = head(&[line, host]);
        let r = request(&bytes).unwrap().unwrap();
        assert_eq!((r.path, r.authority), (path, authority), "{line}");
    }
    assert_eq!(authority_ip("[::1]:80"), "::1".parse().ok());
    assert_eq!(authority_ip("10.0.0.1:80"), "10.0.0.1".parse().ok());
    assert_eq!((authority_ip("10.0.0.1"), authority_ip("web.x:80")), ("10.0.0.1".parse().ok(), None));
}

#[test]
fn lines_that_end_at_this_hop_do_not_leave() {
    let lines = [
        "GET / HTTP/1.1",
        "Host: x",
        "Connection: close, X-Mine",
        "X-Mine: 1",
        "Keep-Alive: timeout=5",
        "Proxy-Connection: keep-alive",
        "TE: gzip",
        "Upgrade: h2c",
        "HTTP2-Settings: AAMAAABkAAQAAP__",
        "l5d-client-id: forged",
        "L5D_Client_Id: forged",
        "mantle-client-addr: 1.2.3.4",
        "Mantle_X: 1",
        "X-Kept:   spaced  ",
        "Cookie: a=b",
    ];
    assert_eq!(forwarded(&lines, &PLAIN), ["GET / HTTP/1.1", "Host: x", "X-Kept:   spaced  ", "Cookie: a=b"]);
    let edit = Edit { strip_reserved: false, connection: Connection::Close, add: &[("l5d-client-id", "web.ns")] };
    let kept = forwarded(&["GET / HTTP/1.1", "Host: x", "l5d-timeout: 1", "TE: trailers"], &edit);
    assert_eq!(
        kept,
        ["GET / HTTP/1.1", "Host: x", "l5d-timeout: 1", "TE: trailers", "connection: close", "l5d-client-id: web.ns"]
    );
}

#[test]
fn an_upgrade_is_forwarded_unless_it_is_to_http2() {
    let request_with = |connection, upgrade| ["GET / HTTP/1.1", "Host: x", connection, upgrade];
    let ws = request_with("Connection: keep-alive, Upgrade", "Upgrade: websocket");
    assert_eq!(forwarded(&ws, &PLAIN), ["GET / HTTP/1.1", "Host: x", "Upgrade: websocket", "connection: upgrade"]);
    for refused in [
        request_with("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c"),
        request_with("Connection: Upgrade", "Upgrade: websocket, h2c"),
        request_with("Connection: close", "Upgrade: websocket"),
    ] {
        assert_eq!(forwarded(&refused, &PLAIN), ["GET / HTTP/1.1", "Host: x"], "{refused:?}");
    }
    let bytes = head(&ws);
    let asked = request(&bytes).unwrap().unwrap().asked();
    let switching = head(&["HTTP/1.1 101 Switching Protocols", "Upgrade: websocket", "Connection: upgrade"]);
    let answer = response(&switching, asked).unwrap().unwrap();
    assert!(answer.tunnel && !answer.keep_alive && !answer.is_interim());
    let mut out = Vec::new();
    answer.head.forward(&mut out, &PLAIN);
    assert_eq!(out, head(&["HTTP/1.1 101 Switching Protocols", "Upgrade: websocket", "connection: upgrade"]));
    assert_eq!(response(&switching, Asked::default()).err(), Some(BadHttp::Malformed), "nobody asked for it");
}

#[test]
fn persistence_follows_version_and_connection() {
    let cases = [
        ("HTTP/1.1", "X: y", true),
        ("HTTP/1.1", "Connection: Close", false),
        ("HTTP/1.1", "Connection: keep-alive", true),
        ("HTTP/1.0", "X: y", false),
        ("HTTP/1.0", "Connection: Keep-Alive", true),
        ("HTTP/1.0", "Connection: keep-alive, close", false),
    ];
    for (version, line, want) in cases {
        let bytes = head(&[&format!("GET / {version}"), "Host: x", line]);
        assert_eq!(request(&bytes).unwrap().unwrap().keep_alive, want, "{version} {line}");
    }
}

#[test]
fn a_responses_body_depends_on_what_was_asked() {
    let get = Asked::default();
    let (head_, connect) = (Asked { head: true, ..get }, Asked { connect: true, ..get });
    let cases = [
        (200, "Content-Length: 5", get, Body::Length(5), true),
        (200, "Content-Length: 0", get, Body::None, true),
        (200, "Transfer-Encoding: Chunked", get, Body::Chunked, true),
        (200, "X: y", get, Body::UntilClose, false),
        (200, "Content-Length: 5", head_, Body::None, true),
        (200, "Transfer-Encoding: chunked", head_, Body::None, true),
        (304, "Content-Length: 5", get, Body::None, true),
        (204, "X: y", get, Body::None, true),
        (100, "X: y", get, Body::None, true),
        (200, "X: y", connect, Body::None, false),
        (404, "Content-Length: 5", connect, Body::Length(5), true),
        (200, "Connection: close", head_, Body::None, false),
    ];
    for (status, line, asked, body, keep_alive) in cases {
        let bytes = head(&[&format!("HTTP/1.1 {status} Some Reason"), line]);
        let r = response(&bytes, asked).unwrap().unwrap();
        assert_eq!((r.status, r.body, r.keep_alive), (status, body, keep_alive), "{status} {line} {asked:?}");
        assert_eq!((r.is_interim(), r.tunnel), (status == 100, status == 200 && asked.connect));
    }
    let old = head(&["HTTP/1.0 200 OK", "Content-Length: 5"]);
    assert!(!response(&old, get).unwrap().unwrap().keep_alive);
    for (lines, want) in [
        (vec!["HTTP/1.1 200 OK", "Content-Length: 5", "Transfer-Encoding: chunked"], BadHttp::ConflictingLength),
        (vec!["HTTP/1.1 200 OK", "Content-Length: 5", "Content-Length: 6"], BadHttp::ConflictingLength),
        (vec!["HTTP/1.1 204 OK", "Transfer-Encoding: chunked"], BadHttp::BadTransferEncoding),
        (vec!["HTTP/1.1 099 OK"], BadHttp::Malformed),
        (vec!["HTTP/1.1 2x0 OK"], BadHttp::Malformed),
        (vec!["HTTP/3.0 200 OK"], BadHttp::UnsupportedVersion),
        (vec!["SSH-2.0-x"], BadHttp::UnsupportedVersion),
    ] {
        let got = response(&head(&lines), get).map(|r| r.is_some());
        assert!(got == Err(want) || (want == BadHttp::UnsupportedVersion && got.is_err()), "{lines:?}: {got:?}");
    }
}

/// Follows `wire` cut at every place; all cuts must agree.
fn follow(body: Body, wire: &[u8]) -> Result<(usize, bool), BadHttp> {
    let whole = {
        let mut follower = Follower::new(body);
        follower.follow(wire).map(|n| (n, follower.is_done()))
    };
    for cut in 0..=wire.len() {
        let mut follower = Follower::new(body);
        let in_two = follower.follow(&wire[..cut]).and_then(|first| {
            let second = if first == cut { follower.follow(&wire[cut..])? } else { 0 };
            Ok((first + second, follower.is_done()))
        });
        assert_eq!(in_two, whole, "cut at {cut} of {:?}", String::from_utf8_lossy(wire));
    }
    whole
}

#[test]
fn a_body_ends_where_its_framing_says() {
    let next = b"GET /next";
    let chunked = b"5\r\nhello\r\nA;ext=\"1\"\r\n0123456789\r\n0\r\nX-Sum: 1\r\nL5: 2\r\n\r\n";
    assert_eq!(follow(Body::Chunked, &[&chunked[..], next].concat()), Ok((chunked.len(), true)));
    assert_eq!(follow(Body::Chunked, b"0\r\n\r\n"), Ok((5, true)));
    assert_eq!(follow(Body::Chunked, b"00a\r\n0123"), Ok((9, false)));
    assert_eq!(follow(Body::Length(4), b"12345"), Ok((4, true)));
    assert_eq!(follow(Body::Length(4), b"123"), Ok((3, false)));
    assert_eq!(follow(Body::None, b"123"), Ok((0, true)));
    assert_eq!(follow(Body::UntilClose, b"123"), Ok((3, false)));
    assert!(Follower::new(Body::UntilClose).may_end() && !Follower::new(Body::Length(1)).may_end());
}

#[test]
fn chunks_that_readers_disagree_about_are_refused() {
    let long_extension = format!("5;{}", "a".repeat(5_000));
    let long_trailer = format!("0\r\nX: {}", "a".repeat(17_000));
    let many_trailers = format!("0\r\n{}", "X: a\r\n".repeat(6_000));
    let cases = [
        "\r\n",
        "g\r\n",
        "-1\r\n",
        "0x5\r\n",
        " 5\r\n",
        "5 \r\n",
        "5\n",
        "5\r5",
        ";\r\n",
        "5\r\nhello5",
        "5\r\nhello\n",
        "1000000000000000\r\n",
        "5;a\nb",
        "5;\0\r\n",
        "0\r\n X: y\r\n",
        "0\r\nX y\r\n",
        "0\r\nX: y\n",
        "0\r\n\rx",
        "0\r\nl5d-client-id: forged\r\n\r\n",
        "0\r\nL5D_x: 1\r\n\r\n",
        "0\r\nmantle-client-addr: 1\r\n\r\n",
        "0\r\n: y\r\n",
        &long_extension,
        &long_trailer,
        &many_trailers,
    ];
    for wire in cases {
        let got = match wire.len() {
            ..100 => follow(Body::Chunked, wire.as_bytes()).err(),
            _ => Follower::new(Body::Chunked).follow(wire.as_bytes()).err(),
        };
        assert_eq!(got, Some(BadHttp::BadChunk), "{:?}", &wire[..wire.len().min(40)]);
    }
}

/// Random damage to good heads: never a panic, and what is accepted reads the same after it was forwarded.
#[test]
fn what_is_forwarded_is_understood_the_same_by_the_next_reader() {
    let seeds: [&[&str]; 4] = [
        &["POST /a?b HTTP/1.1", "Host: x", "Content-Length: 10", "Connection: close, X-A", "X-A: 1", "l5d-x: 1"],
        &["PUT http://x/ HTTP/1.1", "Host: x", "Transfer-Encoding: chunked", "TE: trailers", "Expect: 100-continue"],
        &["GET / HTTP/1.1", "Host: x", "Connection: Upgrade", "Upgrade: websocket"],
        &["GET / HTTP/1.0", "Connection: keep-alive", "Mantle-A: b"],
    ];
    let alphabet = b"\r\n\t :,;=0159aAxX-_/?#*\0\x0b\x7f\x80\xffchunkedlengthhost";
    let mut accepted = 0;
    for seed in 1..=30_000 {
        let mut random = Random(seed);
        let mut bytes = head(seeds[random.below(4)]);
        for _ in 0..random.below(4) {
            let at = random.below(bytes.len());
            let byte = alphabet[random.below(alphabet.len())];
            match random.below(3) {
                0 => bytes[at] = byte,
                1 => bytes.insert(at, byte),
                _ => drop(bytes.remove(at)),
            }
        }
        let Ok(Some(first)) = request(&bytes) else { continue };
        accepted += 1;
        let mut out = Vec::new();
        first.head.forward(&mut out, &PLAIN);
        let second = request(&out).unwrap().unwrap();
        assert_eq!((second.method, second.target, second.body), (first.method, first.target, first.body));
        assert_eq!((second.authority, second.upgrade, second.head.size()), (first.authority, first.upgrade, out.len()));
        assert!(second.head.headers().all(|(name, _)| !is_reserved(name.as_bytes())));
        let mut again = Vec::new();
        second.head.forward(&mut again, &PLAIN);
        assert_eq!(again, out);
    }
    assert!(accepted > 5_000, "{accepted}");
}

/// Random bytes as a chunked body: never a panic, never more than there is, and cuts do not matter.
#[test]
fn random_chunks_are_followed_the_same_however_cut() {
    let alphabet = b"0123aF;\r\n\r\n\r\nX: ";
    for seed in 1..=20_000 {
        let mut random = Random(seed);
        let wire: Vec<u8> = (0..random.below(24)).map(|_| alphabet[random.below(alphabet.len())]).collect();
        if let Ok((n, done)) = follow(Body::Chunked, &wire) {
            assert!(n == wire.len() || (done && n < wire.len()));
        }
    }
}
