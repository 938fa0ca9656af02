//! A Secret's life as the proxy sees it: not there, there, renewed, broken, over.

use rcgen::KeyPair;

use super::*;
use crate::tls::tests::{Ca, Leaf, pem};

const NAME: &str = "web.deployment.shop.optional.mantle.cluster.local";
const SPIFFE: &str = "spiffe://optional.mantle.cluster.local/ns/shop/deployment/web";

struct Stage {
    dir: PathBuf,
    mesh: Ca,
    ca: Ca,
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn stage(name: &str) -> Stage {
    let dir = std::env::temp_dir().join(format!("mantle-files-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("directory");
    Stage { dir, mesh: Ca::new(), ca: Ca::new() }
}

impl Stage {
    fn files(&self) -> Files {
        Files { dir: self.dir.clone(), suffix: ".optional.mantle.cluster.local".into() }
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.dir.join(name), text).expect("file");
    }

    /// What the `ca` would put there.
    fn issue(&self, lifetime: Duration) {
        let key = KeyPair::generate().expect("key");
        let leaf = self.ca.issue(&Leaf { spiffe: SPIFFE, lifetime, ..Leaf::named(NAME) }, &key);
        self.write(CERTIFICATE, &pem(&leaf));
        self.write(KEY, &key.serialize_pem());
        self.write(ROOTS, &pem(&self.ca.root));
    }

    fn first(&self) -> Option<Arc<Credentials>> {
        first(&self.files(), &NAME.into(), &self.mesh.trust())
    }
}

#[test]
fn a_secret_that_is_there_at_the_start_is_used_from_the_start() {
    let stage = stage("start");
    assert!(stage.first().is_none());
    stage.issue(Duration::from_secs(3600));
    let credentials = stage.first().expect("credentials");
    assert_eq!(&*credentials.local.dns, NAME);
    assert!(credentials.also.as_ref().expect("the mode's names").admit(NAME));
    stage.write(KEY, "no key");
    assert!(stage.first().is_none());
    std::fs::remove_file(stage.dir.join(KEY)).expect("file");
    assert!(read(&stage.dir).is_err(), "half a Secret is no Secret");
}

#[tokio::test]
async fn material_is_taken_up_kept_when_what_follows_is_broken_and_dropped_when_over() {
    let stage = stage("life");
    let (tx, mut seen) = watch::channel::<Option<Arc<Credentials>>>(None);
    let (files, trust, metrics) = (stage.files(), stage.mesh.trust(), Metrics::new());
    let name: Arc<str> = NAME.into();
    let life = async {
        stage.issue(Duration::from_secs(6));
        let first = seen.wait_for(Option::is_some).await.expect("alive").clone().expect("some");
        stage.write(CERTIFICATE, "broken");
        seen.wait_for(Option::is_none).await.expect("alive");
        assert!(SystemTime::now() >= first.not_after, "kept to its end");
        stage.issue(Duration::from_secs(3600));
        let next = seen.wait_for(Option::is_some).await.expect("alive").clone().expect("some");
        assert!(next.epoch > first.epoch);
    };
    tokio::select! {
        () = run(&files, &name, &trust, tx, &metrics) => unreachable!("it runs for ever"),
        done = tokio::time::timeout(Duration::from_secs(90), life) => done.expect("in time"),
    }
}

#[test]
fn a_migration_is_a_list_under_the_pinned_roots_until_its_deadline() {
    let stage = stage("migration");
    let now = SystemTime::now();
    let roots = pem(&stage.ca.root);
    let migration = Migration {
        dir: stage.dir.clone(),
        suffix: ".optional.mantle.cluster.local".into(),
        roots_sha256: tls::sha256(roots.as_bytes()),
        until: now + Duration::from_secs(60),
    };
    assert!(accepted(&migration, now).is_none(), "no list, nothing accepted");
    stage.write(ROOTS, &roots);
    stage.write(IDENTITIES, &format!("{NAME}\n"));
    let second = accepted(&migration, now).expect("accepted");
    assert!(second.names.admit(NAME));
    assert!(!second.names.admit("api.deployment.shop.optional.mantle.cluster.local"));
    assert!(accepted(&migration, migration.until).is_none(), "the deadline");
    stage.write(ROOTS, &pem(&Ca::new().root));
    assert!(accepted(&migration, now).is_none(), "other roots than those pinned");
}
