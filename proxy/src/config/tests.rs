//! The environment as a table: what a minimal one means, and that every mistake is named at once.

use super::*;

fn anchors() -> String {
    let mut params = rcgen::CertificateParams::new(Vec::new()).expect("params");
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.self_signed(&rcgen::KeyPair::generate().expect("key")).expect("root").pem()
}

fn minimal() -> Vec<(&'static str, String)> {
    vec![
        ("MANTLE_PROXY_IDENTITY_TRUST_ANCHORS", anchors()),
        ("MANTLE_PROXY_IDENTITY_LOCAL_NAME", "web.shop.serviceaccount.identity.mantle.cluster.local".into()),
        ("MANTLE_PROXY_IDENTITY_TOKEN_FILE", "/run/token".into()),
        ("MANTLE_PROXY_IDENTITY_SVC_ADDR", "127.0.0.1:8080".into()),
        ("MANTLE_PROXY_DESTINATION_SVC_ADDR", "localhost:8086".into()),
        ("MANTLE_PROXY_POLICY_SVC_ADDR", "mantle-destination.mantle.svc.cluster.local:8090".into()),
        (
            "MANTLE_PROXY_POLICY_SVC_NAME",
            "mantle-destination.mantle.serviceaccount.identity.mantle.cluster.local".into(),
        ),
        ("MANTLE_PROXY_POLICY_WORKLOAD", r#"{"ns":"shop","pod":"web-1"}"#.into()),
    ]
}

fn load(extra: &[(&'static str, &str)]) -> Result<Config, ConfigErrors> {
    let mut vars = minimal();
    vars.extend(extra.iter().map(|(k, v)| (*k, (*v).to_owned())));
    Config::load(|name| vars.iter().rev().find(|(k, _)| *k == name).map(|(_, v)| v.clone()))
}

fn ok(extra: &[(&'static str, &str)]) -> Config {
    load(extra).unwrap_or_else(|mistakes| panic!("{mistakes}"))
}

#[test]
fn a_minimal_environment_has_the_documented_defaults() {
    let config = ok(&[]);
    assert_eq!(config.outbound_listen, "127.0.0.1:4140".parse().expect("addr"));
    assert_eq!(config.inbound_listen, "0.0.0.0:4143".parse().expect("addr"));
    assert_eq!(config.control_listen, "0.0.0.0:4190".parse().expect("addr"));
    assert_eq!(config.admin_listen, "127.0.0.1:4191".parse().expect("addr"));
    assert_eq!(config.default_policy, DefaultPolicy::AllUnauthenticated);
    assert_eq!(config.inbound_connect_timeout, Duration::from_millis(300));
    assert_eq!(config.outbound_connect_timeout, Duration::from_secs(1));
    assert_eq!(config.identity.min_refresh, Duration::from_secs(10));
    assert_eq!(config.cores, 1);
    assert_eq!((config.log.to_string().as_str(), config.log_format), ("mantle=info,warn", LogFormat::Plain));
    assert_eq!(config.identity.svc, ControlAddr { host: "127.0.0.1".into(), port: 8080, name: None });
    assert_eq!(config.destination.name, None);
    assert_eq!(config.policy.to_string(), "mantle-destination.mantle.svc.cluster.local:8090");
    assert!(config.policy.name.is_some());
    assert!(config.tap_svc_name.is_none() && config.outbound_mark.is_none() && !config.shutdown_endpoint);
}

#[test]
fn linkerds_names_are_read_and_ours_win() {
    let config = ok(&[
        ("LINKERD2_PROXY_INBOUND_PORTS", "80,8000-8002"),
        ("LINKERD2_PROXY_CORES", "3"),
        ("MANTLE_PROXY_CORES", "2"),
        ("LINKERD2_PROXY_OUTBOUND_LISTEN_ADDRS", "127.0.0.1:5140,[::1]:5140"),
    ]);
    assert_eq!(config.inbound_ports.iter().collect::<Vec<_>>(), [80, 8000, 8001, 8002]);
    assert_eq!(config.cores, 2);
    assert_eq!(config.outbound_listen.port(), 5140);
}

#[test]
fn a_pod_with_an_ipv6_address_is_listened_to_on_both_families() {
    let config = ok(&[
        ("MANTLE_PROXY_INBOUND_IPS", "10.203.0.5,fd00::5"),
        ("MANTLE_PROXY_OUTBOUND_LISTEN_ADDR", "127.0.0.1:4140"),
        ("MANTLE_PROXY_CONTROL_LISTEN_ADDR", "127.0.0.1:4190"),
    ]);
    assert_eq!(config.outbound_listen, "[::]:4140".parse().expect("addr"));
    assert_eq!(config.inbound_listen, "[::]:4143".parse().expect("addr"));
    assert_eq!(config.control_listen, "127.0.0.1:4190".parse().expect("addr"), "said by name");
    let only_v4 = ok(&[("MANTLE_PROXY_INBOUND_IPS", "10.203.0.5,::1")]);
    assert_eq!(only_v4.inbound_listen, "0.0.0.0:4143".parse().expect("addr"));
}

#[test]
fn every_value_format_is_accepted() {
    let config = ok(&[
        ("MANTLE_PROXY_INBOUND_PORTS", "443, 80,1-5,4-9"),
        ("MANTLE_PROXY_DESTINATION_PROFILE_NETWORKS", "10.203.0.0/16, fd00::/8"),
        ("MANTLE_PROXY_POLICY_CLUSTER_NETWORKS", "10.203.0.0/16"),
        ("MANTLE_PROXY_INBOUND_DEFAULT_POLICY", "cluster-authenticated"),
        ("MANTLE_PROXY_INBOUND_IPS", "10.203.0.5,::1"),
        ("MANTLE_PROXY_OUTBOUND_MARK", "0x6d"),
        ("MANTLE_PROXY_SHUTDOWN_GRACE_PERIOD", " 3m "),
        ("MANTLE_PROXY_INBOUND_DETECT_TIMEOUT", "0"),
        ("MANTLE_PROXY_LOG_FORMAT", "json"),
        ("MANTLE_PROXY_LOG", "error,mantle=trace,[{headers}]=off"),
        ("MANTLE_PROXY_SHUTDOWN_ENDPOINT_ENABLED", "true"),
        ("MANTLE_PROXY_TAP_SVC_NAME", "mantle-viz.mantle.serviceaccount.identity.mantle.cluster.local"),
    ]);
    assert_eq!(config.inbound_ports.iter().count(), 11);
    assert!(config.inbound_ports.contains(9) && !config.inbound_ports.contains(10));
    assert_eq!(config.profile_networks.len(), 2);
    assert_eq!(config.default_policy.word(), "cluster-authenticated");
    assert_eq!(config.log.to_string(), "mantle=trace,error");
    assert_eq!(config.outbound_mark, Some(0x6d));
    assert_eq!(config.shutdown_grace, Duration::from_secs(180));
    assert_eq!(config.inbound_detect_timeout, Duration::ZERO);
}

#[test]
fn every_mistake_is_reported_at_once() {
    let wrong = [
        ("MANTLE_PROXY_IDENTITY_TRUST_ANCHORS", "not pem"),
        ("MANTLE_PROXY_IDENTITY_LOCAL_NAME", "10.0.0.1"),
        ("MANTLE_PROXY_IDENTITY_TOKEN_FILE", " "),
        ("MANTLE_PROXY_DESTINATION_SVC_ADDR", "destination.mantle:8086"),
        ("MANTLE_PROXY_POLICY_SVC_ADDR", "no-port"),
        ("MANTLE_PROXY_INBOUND_PORTS", "8000-80"),
        ("MANTLE_PROXY_DESTINATION_PROFILE_NETWORKS", "10.0.0.0/33"),
        ("MANTLE_PROXY_OUTBOUND_CONNECT_TIMEOUT", "10"),
        ("MANTLE_PROXY_INBOUND_DEFAULT_POLICY", "cluster-unauthenticated"),
        ("MANTLE_PROXY_INBOUND_LISTEN_ADDR", "localhost:4143"),
        ("MANTLE_PROXY_CORES", "0"),
        ("LINKERD2_PROXY_LOG_FORMAT", "xml"),
        ("MANTLE_PROXY_LOG", "mantle=loud"),
        ("MANTLE_PROXY_IDENTITY_MIN_REFRESH", "25h"),
    ];
    let ConfigErrors(lines) = load(&wrong).expect_err("all of them are wrong");
    for (name, _) in wrong {
        // A control address without a name is reported under the name that is missing.
        let name = if name.ends_with("DESTINATION_SVC_ADDR") { "MANTLE_PROXY_DESTINATION_SVC_NAME" } else { name };
        assert_eq!(
            lines.iter().filter(|line| line.starts_with(&format!("{name} "))).count(),
            1,
            "{name} in {lines:#?}"
        );
    }
    assert_eq!(lines.len(), wrong.len(), "{lines:#?}");
    assert!(lines.iter().all(|line| line.contains("; accepted: ")), "{lines:#?}");
    let duration = lines.iter().find(|line| line.contains("CONNECT_TIMEOUT")).expect("named");
    assert_eq!(
        duration,
        "MANTLE_PROXY_OUTBOUND_CONNECT_TIMEOUT is \"10\"; accepted: a whole number with ms, s, m, h or d, such as 500ms or 10s"
    );
}

#[test]
fn an_empty_environment_names_all_that_is_required() {
    let ConfigErrors(lines) = Config::load(|_| None).expect_err("nothing is set");
    assert_eq!(lines.len(), 7, "{lines:#?}");
    assert!(lines.iter().all(|line| line.contains("is not set")), "{lines:#?}");
}

#[test]
fn durations() {
    for (text, want) in [
        ("500ms", 500),
        ("10s", 10_000),
        ("2m", 120_000),
        ("1h", 3_600_000),
        ("1d", 86_400_000),
        ("0", 0),
        ("5 s", 5_000),
    ] {
        assert_eq!(duration(text), Some(Duration::from_millis(want)), "{text}");
    }
    for text in ["10", "s", "-1s", "1.5s", "10us", "99999999999999999999s", "18446744073709551615d"] {
        assert_eq!(duration(text), None, "{text}");
    }
}

#[test]
fn every_variable_is_on_its_page_and_the_page_names_no_other() {
    let asked = std::cell::RefCell::new(std::collections::BTreeSet::new());
    let vars = minimal();
    let config = Config::load(|name| {
        asked.borrow_mut().insert(name.split_once("_PROXY_").expect("a prefix").1.to_owned());
        vars.iter().find(|(k, _)| *k == name).map(|(_, v)| v.clone())
    });
    assert!(config.is_ok());
    let mut asked = asked.into_inner();
    // Loopback services need no name, so the minimal environment does not ask for these.
    asked.extend(["IDENTITY_SVC_NAME".to_owned(), "DESTINATION_SVC_NAME".to_owned()]);
    let page = include_str!("../../../docs/proxy.md");
    let code = page.split('`').skip(1).step_by(2);
    let is_variable = |word: &&str| word.bytes().all(|b| b.is_ascii_uppercase() || b == b'_') && word.len() > 2;
    let others = ["MANTLE_PROXY_", "LINKERD2_PROXY_", "JSON", "PLAIN"];
    let named: std::collections::BTreeSet<_> =
        code.filter(is_variable).filter(|word| !others.contains(word)).map(str::to_owned).collect();
    assert_eq!(named, asked);
}
