//! Who may be sent plaintext: never anybody in the default mode.

use std::path::PathBuf;

use mantle_proxy_core::model::Hint;

use super::*;
use crate::config::{ControlAddr, Files, Migration};
use crate::tls::tests::{API, Ca, WEB};

const OPTIONAL: &str = "api.deployment.shop.optional.mantle.cluster.local";
const SUFFIX: &str = ".optional.mantle.cluster.local";

fn config(files: bool, migration: bool) -> IdentityConfig {
    let dir = PathBuf::from("/nowhere");
    let until = SystemTime::now() + Duration::from_secs(60);
    IdentityConfig {
        trust_anchors: Vec::new(),
        local_name: WEB.into(),
        token_file: PathBuf::new(),
        files: files.then(|| Files { dir: dir.clone(), suffix: SUFFIX.into() }),
        migration: migration.then(|| Migration { dir, suffix: SUFFIX.into(), roots_sha256: String::new(), until }),
        svc: ControlAddr { host: "127.0.0.1".to_owned(), port: 8080, name: None },
        min_refresh: Duration::ZERO,
        max_refresh: Duration::MAX,
    }
}

fn endpoint(identity: &str) -> Endpoint {
    let addr = SocketAddr::from(([10, 0, 0, 1], 8080));
    Endpoint { addr, tls: Ok(identity.into()), opaque_transport: Some(4143), hint: Hint::Unknown, labels: [].into() }
}

#[tokio::test(start_paused = true)]
async fn the_default_mode_never_fails_open() {
    let open = FailOpen::new(&config(false, false));
    assert!(!open.is_possible() && !open.without_certificate());
    for identity in [API, OPTIONAL] {
        assert!(!open.note(&endpoint(identity), Unroutable::TlsFailed));
        assert!(!open.applies(&endpoint(identity), None, SystemTime::now()));
    }
}

#[tokio::test(start_paused = true)]
async fn the_experimental_mode_is_plaintext_without_material_and_for_a_while_after_a_refusal() {
    let open = FailOpen::new(&config(true, false));
    let (api, now) = (endpoint(OPTIONAL), SystemTime::now());
    let own = Ca::new().credentials(WEB);
    assert!(open.applies(&api, None, now), "no material");
    assert!(open.applies(&api, Some(&own), own.not_after), "material that is over");
    assert!(!open.applies(&api, Some(&own), now));
    assert!(!open.note(&api, Unroutable::ConnectFailed), "nothing listens: plaintext would not either");
    assert!(!open.applies(&api, Some(&own), now));
    assert!(open.note(&api, Unroutable::TlsFailed));
    assert!(open.applies(&api, Some(&own), now));
    assert!(!open.applies(&endpoint(API), Some(&own), now), "another peer is another question");
    tokio::time::advance(AGAIN).await;
    assert!(!open.applies(&api, Some(&own), now), "TLS is tried again");
}

#[tokio::test(start_paused = true)]
async fn a_migrating_default_proxy_fails_open_only_with_names_of_the_experimental_mode() {
    let open = FailOpen::new(&config(false, true));
    let own = Ca::new().credentials(WEB);
    let now = SystemTime::now();
    assert!(open.applies(&endpoint(OPTIONAL), Some(&own), now), "it accepts none now: as before the migration");
    assert!(!open.applies(&endpoint(API), Some(&own), now));
    assert!(!open.note(&endpoint(API), Unroutable::TlsFailed), "the default mode stays closed");
    assert!(!open.applies(&endpoint(API), None, now));
}
