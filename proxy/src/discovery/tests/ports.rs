//! Ports of this pod: the default policy until the first answer, and what is made of the answers.

use super::*;

fn server(name: &str, permit: Option<inbound::authn::Permit>) -> Server {
    let any = |octets: [u8; 4]| linkerd2_proxy_api::net::IpNetwork {
        ip: Some(std::net::IpAddr::from(octets).into()),
        prefix_len: 0,
    };
    let authz = inbound::Authz {
        networks: vec![inbound::Network { net: Some(any([0, 0, 0, 0])), except: Vec::new() }],
        authentication: Some(inbound::Authn { permit }),
        metadata: named(name),
        ..inbound::Authz::default()
    };
    let detect = inbound::proxy_protocol::Detect { timeout: seconds(10), ..inbound::proxy_protocol::Detect::default() };
    Server {
        protocol: Some(inbound::ProxyProtocol { kind: Some(inbound::proxy_protocol::Kind::Detect(detect)) }),
        authorizations: vec![authz],
        labels: HashMap::from([("name".into(), name.into())]),
        ..Server::default()
    }
}

fn anyone() -> Option<inbound::authn::Permit> {
    Some(inbound::authn::Permit::Unauthenticated(inbound::authn::PermitUnauthenticated {}))
}

#[tokio::test(start_paused = true)]
async fn a_port_that_requires_identity_is_strict_before_anyone_answered() {
    let stage = stage(&[
        ("INBOUND_DEFAULT_POLICY", "audit"),
        ("INBOUND_PORTS", "8080,9090"),
        ("INBOUND_PORTS_REQUIRE_IDENTITY", "8080"),
    ]);
    for (port, policy) in [(8080, "all-authenticated"), (9090, "audit")] {
        assert_eq!(stage.discovery.port(port).known().await.expect("a default").name, policy);
    }
}

#[tokio::test(start_paused = true)]
async fn a_listed_port_has_its_default_policy_until_the_first_answer_and_keeps_the_last() {
    let stage = stage(&[("INBOUND_PORTS_DISABLE_PROTOCOL_DETECTION", "8080")]);
    let mut port = stage.discovery.port(8080);
    let began = Instant::now();
    let default = port.known().await.expect("a default");
    assert_eq!(
        (default.name.as_str(), default.protocol, began.elapsed()),
        ("all-authenticated", Protocol::Opaque, Duration::ZERO)
    );
    assert!(matches!(default.authorizations[0].clients, model::Clients::Identities { .. }));

    let call = stage.plane.inbound.next().await;
    assert_eq!((call.request.port, call.request.workload.as_str()), (8080, "web-1"));
    let stream = call.stream();
    stream.send(Ok(server("open", anyone()))).expect("open");
    port.changed(&default).await;
    let open = port.now().expect("answered");
    assert_eq!(open.name, "open");
    // One that cannot be used closes the port.
    stream.send(Ok(server("broken", None))).expect("open");
    port.changed(&open).await;
    let closed = port.now().expect("answered");
    assert_eq!((closed.name.as_str(), closed.authorizations.len()), ("invalid", 0));
    // The same again, then the end: nothing changes, and it is asked again.
    stream.send(Ok(server("open", anyone()))).expect("open");
    port.changed(&closed).await;
    drop(stream);
    let again = stage.plane.inbound.next().await;
    let open = port.now().expect("kept");
    assert_eq!(open.name, "open");
    again.refuse(Code::NotFound);
    stage.plane.inbound.next().await.stream().send(Ok(server("open", anyone()))).expect("open");
    assert!(
        tokio::time::timeout(Duration::from_secs(5), port.changed(&open)).await.is_err(),
        "an equal policy is no change"
    );
}

#[tokio::test(start_paused = true)]
async fn an_unlisted_port_waits_for_its_answer_and_is_refused_without() {
    let stage = stage(&[]);
    stage.plane.inbound.next().await.refuse(Code::InvalidArgument);
    let mut port = stage.discovery.port(9999);
    assert!(port.now().is_none());
    let began = Instant::now();
    assert_eq!(port.known().await.err(), Some(Denied::PolicyUnavailable));
    assert_eq!(began.elapsed(), ANSWER);
    let call = stage.plane.inbound.next().await;
    assert_eq!(call.request.port, 9999);
    let stream = call.stream();
    stream.send(Ok(server("late", anyone()))).expect("open");
    assert_eq!(port.known().await.expect("answered").name, "late");
    assert_eq!(stage.discovery.port(9999).known().await.expect("shared").name, "late");
    // Unused for 90 s it is forgotten; the listed ones never are.
    drop(port);
    tokio::time::sleep(Duration::from_secs(100)).await;
    assert!(stream.is_closed());
    let ports = lock(&stage.discovery.0.ports);
    assert_eq!(ports.keys().collect::<Vec<_>>(), [&8080]);
}

#[tokio::test(start_paused = true)]
async fn a_scan_of_this_pods_ports_opens_a_bounded_number_of_streams() {
    let stage = stage(&[("INBOUND_PORTS", "8080,30001-50000")]);
    assert_eq!(lock(&stage.discovery.0.ports).len(), MAX_EAGER_PORTS);
    let held: Vec<_> = (10_000..10_000 + MAX_OTHER_PORTS as u16).map(|port| stage.discovery.port(port)).collect();
    let began = Instant::now();
    assert_eq!(stage.discovery.port(60_000).known().await.err(), Some(Denied::PolicyUnavailable));
    assert_eq!(began.elapsed(), Duration::ZERO, "refused at once");
    assert!(stage.discovery.port(8080).known().await.is_ok(), "listed ports are not affected");
    assert!(stage.discovery.port(50_000).known().await.is_ok(), "even those that are not watched from the start");
    drop(held);
    assert!(stage.discovery.port(60_000).now().is_none());
    assert_eq!(lock(&stage.discovery.0.ports).len(), MAX_EAGER_PORTS + 1, "the unused made room");
}

#[test]
fn an_inbound_policy_with_a_field_left_out_is_not_used() {
    let whole = || server("x", anyone());
    assert!(convert::server(whole()).is_ok());
    let change = |change: &dyn Fn(&mut Server)| {
        let mut server = whole();
        change(&mut server);
        server
    };
    let table = [
        ("protocol", change(&|s| s.protocol = None)),
        ("labels.name", change(&|s| s.labels.clear())),
        ("authorization.networks", change(&|s| s.authorizations[0].networks.clear())),
        ("authorization.authentication", change(&|s| s.authorizations[0].authentication = None)),
        ("authorization.metadata", change(&|s| s.authorizations[0].metadata = None)),
        (
            "detect.timeout",
            change(&|s| {
                let detect = inbound::proxy_protocol::Detect::default();
                s.protocol = Some(inbound::ProxyProtocol { kind: Some(inbound::proxy_protocol::Kind::Detect(detect)) });
            }),
        ),
    ];
    for (field, server) in table {
        assert_eq!(convert::server(server).err(), Some(convert::Invalid(field)), "{field}");
    }
    let by_label = change(&|s| {
        s.authorizations[0].metadata = None;
        s.authorizations[0].labels.insert("name".into(), "by-label".into());
    });
    assert_eq!(convert::server(by_label).expect("accepted").authorizations[0].name, "by-label");
}
