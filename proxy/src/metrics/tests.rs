//! The text that a scrape gets, whole, and the bounds on what peers can make it grow to.

use super::*;

fn labels(direction: Direction, tls: TlsLabel) -> Labels {
    Labels {
        direction,
        target: "10.203.0.1:8080".parse().expect("address"),
        authority: None,
        tls,
        dst: Arc::from([]),
        policy: None,
    }
}

fn outbound() -> Labels {
    let dst =
        Arc::from([("namespace".to_owned(), "shop".to_owned()), ("zone.x".to_owned(), "a\"b\\c\nd\u{7}".to_owned())]);
    let authority = Some(Arc::from("api.shop:80"));
    Labels { authority, dst, ..labels(Direction::Outbound, TlsLabel::Mutual(Arc::from("api.shop"))) }
}

fn inbound() -> Labels {
    let names = |a: &str, b: &str, c: &str| [Arc::from(a), Arc::from(b), Arc::from(c)];
    let policy = PolicyLabels {
        srv: names("policy.linkerd.io", "server", "web"),
        srv_port: 8080,
        route: Some(names("", "default", "all")),
        authz: Some(names("", "default", "all-unauthenticated")),
    };
    Labels { policy: Some(Arc::new(policy)), ..labels(Direction::Inbound, TlsLabel::None(NoTls::NotProvidedByRemote)) }
}

fn outcome(status: u16) -> Outcome {
    Outcome { status, grpc: None, failed: false }
}

/// The lines of one family, without comments.
fn family(text: &str, name: &str) -> Vec<String> {
    let own = |line: &&str| line.split(['{', ' ']).next().is_some_and(|found| found == name);
    text.lines().filter(own).map(str::to_owned).collect()
}

#[test]
fn requests_of_a_mutual_tls_endpoint() {
    let metrics = Metrics::new();
    let http = metrics.http(&outbound());
    for (status, micros) in [(200, 900), (200, 1_000), (200, 1_001), (503, 60_000_000)] {
        http.request();
        http.response(outcome(status), Duration::from_micros(micros));
    }
    http.response(Outcome { status: 200, grpc: Some(13), failed: false }, Duration::ZERO);
    http.response(Outcome { status: 200, grpc: Some(0), failed: true }, Duration::ZERO);
    let text = metrics.text(Instant::now());
    let base = concat!(
        r#"direction="outbound",authority="api.shop:80",target_addr="10.203.0.1:8080",target_ip="10.203.0.1",target_port="8080","#,
        r#"tls="true",server_id="api.shop",dst_namespace="shop",dst_zone_x="a\"b\\c\nd?""#
    );
    assert_eq!(family(&text, "request_total"), [format!("request_total{{{base}}} 4")]);
    assert_eq!(
        family(&text, "response_total"),
        [
            format!(r#"response_total{{{base},status_code="200",classification="success"}} 3"#),
            format!(r#"response_total{{{base},status_code="503",classification="failure"}} 1"#),
            format!(r#"response_total{{{base},status_code="200",classification="failure",grpc_status="13"}} 1"#),
            format!(
                r#"response_total{{{base},status_code="200",classification="failure",grpc_status="0",error="unexpected"}} 1"#
            ),
        ]
    );
    let buckets = family(&text, "response_latency_ms_bucket");
    assert_eq!(buckets.len(), 2 * 26);
    assert_eq!(buckets[0], format!(r#"response_latency_ms_bucket{{{base},status_code="200",le="1"}} 4"#));
    assert_eq!(buckets[1], format!(r#"response_latency_ms_bucket{{{base},status_code="200",le="2"}} 5"#));
    assert_eq!(buckets[50], format!(r#"response_latency_ms_bucket{{{base},status_code="503",le="50000"}} 0"#));
    assert_eq!(buckets[51], format!(r#"response_latency_ms_bucket{{{base},status_code="503",le="+Inf"}} 1"#));
    let sums = family(&text, "response_latency_ms_sum");
    assert_eq!(sums[0], format!(r#"response_latency_ms_sum{{{base},status_code="200"}} 2.901"#));
    assert_eq!(
        family(&text, "response_latency_ms_count")[0],
        format!(r#"response_latency_ms_count{{{base},status_code="200"}} 5"#)
    );
}

#[test]
fn connections_of_every_side() {
    let metrics = Metrics::new();
    let sides = [
        (Side::Src, inbound()),
        (Side::Dst, inbound()),
        (Side::Src, labels(Direction::Outbound, TlsLabel::None(NoTls::Loopback))),
        (Side::Dst, outbound()),
        (Side::Src, labels(Direction::Inbound, TlsLabel::Passthru(Arc::from("example.com")))),
        (Side::Src, labels(Direction::Inbound, TlsLabel::Mutual(Arc::from("")))),
    ];
    for (side, labels) in &sides {
        metrics.transport(*side, labels).opened();
    }
    let open = metrics.transport(Side::Src, &inbound());
    open.opened();
    open.read(10);
    open.wrote(20);
    open.closed(Some(libc::ECONNRESET));
    open.closed(None);
    let text = metrics.text(Instant::now());
    let target = r#"target_addr="10.203.0.1:8080",target_ip="10.203.0.1",target_port="8080""#;
    let src = format!(
        r#"direction="inbound",peer="src",{target},tls="no_identity",no_tls_reason="not_provided_by_remote",srv_group="policy.linkerd.io",srv_kind="server",srv_name="web",srv_port="8080",authz_group="",authz_kind="default",authz_name="all-unauthenticated""#
    );
    let dst = format!(
        r#"direction="outbound",peer="dst",authority="api.shop:80",{target},tls="true",server_id="api.shop",dst_namespace="shop",dst_zone_x="a\"b\\c\nd?""#
    );
    let mut want = vec![
        format!("tcp_open_total{{{src}}} 2"),
        r#"tcp_open_total{direction="inbound",peer="dst",tls="no_identity",no_tls_reason="loopback"} 1"#.to_owned(),
        format!(
            r#"tcp_open_total{{direction="outbound",peer="src",{target},tls="no_identity",no_tls_reason="loopback"}} 1"#
        ),
        format!("tcp_open_total{{{dst}}} 1"),
        format!(r#"tcp_open_total{{direction="inbound",peer="src",{target},tls="opaque",sni="example.com"}} 1"#),
        format!(r#"tcp_open_total{{direction="inbound",peer="src",{target},tls="true",client_id=""}} 1"#),
    ];
    want.sort();
    assert_eq!(family(&text, "tcp_open_total"), want);
    assert!(text.contains(&format!("tcp_open_connections{{{src}}} 0\n")));
    assert!(text.contains(&format!("tcp_read_bytes_total{{{src}}} 10\n")));
    assert!(text.contains(&format!("tcp_write_bytes_total{{{src}}} 20\n")));
    assert!(text.contains(&format!("tcp_close_total{{{src},errno=\"ECONNRESET\"}} 1\n")));
    assert!(text.contains(&format!("tcp_close_total{{{src},errno=\"\"}} 1\n")));
}

#[test]
fn verdicts_and_errors() {
    let metrics = Metrics::new();
    metrics.authz(Verdict::HttpAllowed, &inbound()).add(2);
    metrics.authz(Verdict::TcpDenied, &labels(Direction::Inbound, TlsLabel::Mutual(Arc::from("web")))).add(1);
    metrics.error(Direction::Outbound, Layer::Tcp, "no_endpoints");
    metrics.error(Direction::Outbound, Layer::Tcp, "no_endpoints");
    let text = metrics.text(Instant::now());
    let target = r#"target_addr="10.203.0.1:8080",target_ip="10.203.0.1",target_port="8080""#;
    let allowed = family(&text, "inbound_http_authz_allow_total");
    assert_eq!(allowed.len(), 1);
    assert!(allowed[0].starts_with(&format!("inbound_http_authz_allow_total{{{target},srv_group=")), "{allowed:?}");
    assert!(allowed[0].contains(
        r#"route_name="all",authz_group="",authz_kind="default",authz_name="all-unauthenticated",tls="no_identity""#
    ));
    let denied = format!(r#"inbound_tcp_authz_deny_total{{{target},tls="true",client_id="web"}} 1"#);
    assert_eq!(family(&text, "inbound_tcp_authz_deny_total"), [denied]);
    assert_eq!(family(&text, "outbound_tcp_errors_total"), [r#"outbound_tcp_errors_total{error="no_endpoints"} 2"#]);
}

#[test]
fn the_text_is_whole_and_well_formed() {
    let metrics = Metrics::new();
    metrics.http(&outbound()).response(outcome(200), Duration::ZERO);
    metrics.transport(Side::Dst, &outbound()).opened();
    metrics.certificate.renewed(
        SystemTime::UNIX_EPOCH + Duration::from_secs(1000),
        SystemTime::UNIX_EPOCH + Duration::from_secs(2000),
    );
    let text = metrics.text(Instant::now());
    let mut typed = std::collections::HashMap::new();
    for line in text.lines().filter(|line| line.starts_with("# TYPE ")) {
        let mut words = line.split(' ').skip(2);
        let (name, kind) = (words.next().expect("name"), words.next().expect("kind"));
        assert!(typed.insert(name, kind).is_none(), "{name} is there once");
        assert!(["counter", "gauge", "histogram"].contains(&kind));
    }
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (series, value) = line.rsplit_once(' ').expect("a value");
        value.parse::<f64>().expect("a number");
        let name = series.split('{').next().expect("a name");
        let family = ["_bucket", "_sum", "_count"]
            .iter()
            .find_map(|end| name.strip_suffix(end).filter(|n| typed.get(n) == Some(&"histogram")));
        assert!(typed.contains_key(family.unwrap_or(name)), "{name} has a type");
    }
    let page = include_str!("../../../docs/metrics.md");
    let rows: std::collections::HashMap<_, _> = page
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once("` | "))
        .filter_map(|(name, rest)| Some((name, rest.split_once(" |")?.0)))
        .collect();
    assert_eq!(rows, typed, "docs/metrics.md names every family with its type, and no other");
    assert!(text.contains("control_identity_cert_expiration_timestamp_seconds 2000\n"));
    assert!(text.contains("control_identity_cert_refresh_timestamp_seconds 1000\n"));
    assert!(text.contains("proxy_build_info{version="));
    assert!(family(&text, "process_start_time_seconds").len() == 1 && text.ends_with("# EOF\n"));
}

#[test]
fn label_sets_are_capped_and_what_is_beyond_is_counted_together() {
    let metrics = Metrics::new();
    let stranger = |n: u64| labels(Direction::Inbound, TlsLabel::Passthru(Arc::from(format!("{n}.example.com"))));
    let held: Vec<_> = (0..MAX_LABEL_SETS).map(|n| metrics.transport(Side::Src, &stranger(n))).collect();
    metrics.transport(Side::Src, &stranger(MAX_LABEL_SETS)).opened();
    metrics.transport(Side::Src, &stranger(MAX_LABEL_SETS + 1)).opened();
    metrics.http(&outbound()).request();
    let text = metrics.text(Instant::now());
    assert!(text.contains("tcp_open_total{overflow=\"true\"} 2\n"));
    assert!(text.contains("request_total{overflow=\"true\"} 1\n"));
    assert_eq!(family(&text, "tcp_open_total").len() as u64, MAX_LABEL_SETS + 1);
    // One that is known keeps its own series.
    held[0].opened();
    metrics.transport(Side::Src, &stranger(0)).opened();
    assert!(metrics.text(Instant::now()).contains("sni=\"0.example.com\"} 2\n"));
}

#[test]
fn what_nobody_holds_and_nothing_changes_goes_after_ten_minutes() {
    let metrics = Metrics::new();
    let start = Instant::now();
    let held = metrics.transport(Side::Dst, &outbound());
    held.opened();
    metrics.transport(Side::Src, &inbound()).opened();
    assert_eq!(family(&metrics.text(start), "tcp_open_total").len(), 2);
    assert_eq!(family(&metrics.text(start + RETAIN_IDLE - Duration::from_secs(1)), "tcp_open_total").len(), 2);
    metrics.transport(Side::Src, &inbound()).opened();
    assert_eq!(family(&metrics.text(start + RETAIN_IDLE), "tcp_open_total").len(), 2, "it changed");
    assert_eq!(family(&metrics.text(start + RETAIN_IDLE * 2), "tcp_open_total").len(), 1, "the held one stays");
    assert_eq!(metrics.label_sets.load(Relaxed), 1);
}

#[test]
fn a_server_cannot_make_series_without_bound() {
    let metrics = Metrics::new();
    let http = metrics.http(&outbound());
    for status in 100..1000 {
        http.response(outcome(status), Duration::ZERO);
    }
    let text = metrics.text(Instant::now());
    let responses = family(&text, "response_total");
    assert_eq!(responses.len(), OUTCOMES);
    assert!(responses[OUTCOMES - 1].contains("status_code=\"other\""));
    let counted: u64 =
        responses.iter().map(|line| line.rsplit(' ').next().expect("a value").parse::<u64>().expect("a number")).sum();
    assert_eq!(counted, 900);
    let counts = family(&text, "response_latency_ms_count");
    assert_eq!(counts.len(), STATUSES);
    assert!(counts[STATUSES - 1].ends_with(&format!(" {}", 900 - STATUSES + 1)), "{counts:?}");
}
