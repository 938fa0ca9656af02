//! Handshakes in memory between the two modes: nothing but a listed name of the other form ever passes.

use super::super::tests::{API, Ca, Leaf, WEB, handshake, private};
use super::super::{Credentials, Trust};
use super::*;
use rcgen::KeyPair;
use std::time::SystemTime;

const SUFFIX: &str = ".optional.mantle.cluster.local";
const OPTIONAL_WEB: &str = "web.deployment.shop.optional.mantle.cluster.local";
const OPTIONAL_API: &str = "api.deployment.shop.optional.mantle.cluster.local";
const SPIFFE: &str = "spiffe://optional.mantle.cluster.local/ns/shop/deployment/x";

fn second(ca: &Ca, listed: Option<&[&str]>) -> Second {
    let listed = listed.map(|names| Arc::new(names.iter().map(|name| (*name).to_owned()).collect()));
    Second::new(std::slice::from_ref(&ca.root), Names { suffix: SUFFIX.into(), listed }).expect("second")
}

/// A certificate under `signer`, configured with what `trust` trusts.
fn made(signer: &Ca, trust: &Trust, name: &str, spiffe: &str) -> Result<Credentials, BadCertificate> {
    let key = KeyPair::generate().expect("key");
    let leaf = signer.issue(&Leaf { spiffe, ..Leaf::named(name) }, &key);
    trust.credentials(1, &[leaf], private(&key), &Arc::from(name), SystemTime::now())
}

#[test]
fn proxies_of_the_experimental_mode_prove_themselves_to_each_other() {
    let (mesh, other) = (Ca::new(), Ca::new());
    let trust = mesh.trust().with(Some(second(&other, None)));
    let web = made(&other, &trust, OPTIONAL_WEB, SPIFFE).expect("web");
    let api = made(&other, &trust, OPTIONAL_API, SPIFFE).expect("api");
    handshake(web.client_link.clone(), api.server_link.clone(), OPTIONAL_API).expect("both under the second root");
    handshake(web.client_link, api.server_link, OPTIONAL_WEB).expect_err("api is not web");
}

#[test]
fn a_default_proxy_trusts_none_of_it() {
    let (mesh, other) = (Ca::new(), Ca::new());
    let trust = mesh.trust().with(Some(second(&other, None)));
    let optional = made(&other, &trust, OPTIONAL_WEB, SPIFFE).expect("web");
    let api = mesh.credentials(API);
    handshake(optional.client_link.clone(), api.server_link.clone(), API).expect_err("a client of the second root");
    handshake(api.client_link, optional.server_link, OPTIONAL_WEB).expect_err("a server of the second root");
}

#[test]
fn during_a_migration_a_default_proxy_accepts_the_listed_identities_and_then_none() {
    let (mesh, other) = (Ca::new(), Ca::new());
    let trust = mesh.trust().with(Some(second(&other, None)));
    let web = made(&other, &trust, OPTIONAL_WEB, SPIFFE).expect("web");
    let stranger = made(&other, &trust, OPTIONAL_API, SPIFFE).expect("api");
    let migrating = mesh.trust().with(Some(second(&other, Some(&[OPTIONAL_WEB]))));
    let api = made(&mesh, &migrating, API, "spiffe://cluster.local/ns/shop/sa/x").expect("api");
    handshake(web.client_link.clone(), api.server_link.clone(), API).expect("a listed client");
    handshake(api.client_link.clone(), web.server_link.clone(), OPTIONAL_WEB).expect("a listed server");
    handshake(stranger.client_link, api.server_link.clone(), API).expect_err("a client that is not listed");
    handshake(api.client_link.clone(), stranger.server_link, OPTIONAL_API).expect_err("a server that is not listed");
    let over = mesh.trust().again(2, &api).expect("again");
    assert_eq!((over.epoch, over.also.is_none(), &over.local), (2, true, &api.local));
    handshake(web.client_link, over.server_link, API).expect_err("the migration is over");
}

#[test]
fn the_second_root_cannot_vouch_for_the_mesh() {
    let (mesh, other) = (Ca::new(), Ca::new());
    let both = mesh.trust().with(Some(second(&other, None)));
    assert!(matches!(made(&other, &both, WEB, SPIFFE), Err(BadCertificate::Untrusted(_))), "a name of the mesh");
    let mesh_id = "spiffe://cluster.local/ns/shop/sa/web";
    assert!(matches!(made(&other, &both, OPTIONAL_WEB, mesh_id), Err(BadCertificate::Untrusted(_))), "its SPIFFE ID");
    let near = "spiffe://optional.mantle.cluster.local.evil/ns/shop/sa/web";
    assert!(matches!(made(&other, &both, OPTIONAL_WEB, near), Err(BadCertificate::Untrusted(_))), "a longer domain");
}
