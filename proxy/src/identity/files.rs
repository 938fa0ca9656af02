//! The experimental mode's certificate: key, certificate and roots from files that the `ca` keeps current.
//!
//! Kubernetes swaps a Secret's files as a whole behind a symbolic link, so they are looked at every other second and
//! taken up when they changed and verify. What cannot be used leaves what is in force, until that ends; then there is
//! nothing, and the proxy speaks plaintext (`fail_open.rs`). The key stays where the cluster has put it: this is why the
//! mode is the weaker one.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mantle_proxy_core::escape::Escaped;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::sync::watch;

use crate::config::{Files, Migration};
use crate::metrics::Metrics;
use crate::tls::second::{Names, Second};
use crate::tls::{self, BadCertificate, Credentials, Trust};

const CERTIFICATE: &str = "tls.crt";
const KEY: &str = "tls.key";
const ROOTS: &str = "ca.crt";
const IDENTITIES: &str = "identities";

/// How often files are looked at.
const LOOK: Duration = Duration::from_secs(2);

/// A Secret holds 1 MiB at most.
const MAX_FILE: u64 = 1 << 20;

/// Why the files are not used.
#[derive(Debug)]
enum Failed {
    Unreadable(PathBuf, io::Error),
    NotPem(PathBuf),
    Bad(BadCertificate),
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable(path, why) => write!(f, "{} cannot be read ({why})", path.display()),
            Self::NotPem(path) => write!(f, "{} is not PEM of the right kind", path.display()),
            Self::Bad(why) => write!(f, "the certificate in the Secret is not used: {why}"),
        }
    }
}

/// The files as they were read; `None`: the Secret is not there (yet).
type Read = Option<[Vec<u8>; 3]>;

/// What there is at the start, so that a pod whose Secret was there first never speaks plaintext.
pub(crate) fn first(files: &Files, local_name: &Arc<str>, trust: &Trust) -> Option<Arc<Credentials>> {
    let found = read(&files.dir).ok()??;
    credentials(&found, files, local_name, trust, 1, SystemTime::now()).ok().map(Arc::new)
}

/// Keeps `credentials` what the files say, for ever. Runs on the control thread.
pub(super) async fn run(
    files: &Files,
    local_name: &Arc<str>,
    trust: &Trust,
    credentials_tx: watch::Sender<Option<Arc<Credentials>>>,
    metrics: &Metrics,
) {
    // Nothing was taken up yet, or `first` did: then it is taken up once more, which changes nothing that can be seen.
    let (mut seen, mut epoch, mut said): (Read, u64, bool) = (None, 1, false);
    let mut ticks = tokio::time::interval(LOOK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let now = SystemTime::now();
        let dir = files.dir.clone();
        let found = tokio::task::spawn_blocking(move || read(&dir)).await;
        let outcome = match found {
            Ok(Ok(None)) => {
                if !std::mem::replace(&mut said, true) && credentials_tx.borrow().is_none() {
                    tracing::warn!(dir = %files.dir.display(), "no TLS material yet: plaintext until the ca has made it");
                }
                continue_over(&credentials_tx, now);
                continue;
            }
            Ok(Ok(Some(found))) if seen.as_ref() == Some(&found) => {
                continue_over(&credentials_tx, now);
                continue;
            }
            Ok(Ok(Some(found))) => {
                let made = credentials(&found, files, local_name, trust, epoch + 1, now);
                seen = Some(found);
                made
            }
            Ok(Err(why)) => Err(why),
            Err(_) => continue, // the runtime is ending
        };
        match outcome {
            Ok(new) => {
                tracing::info!(name = %new.local.dns, epoch = new.epoch, "TLS material read (experimental, optional TLS)");
                metrics.certificate.renewed(now, new.not_after);
                epoch = new.epoch;
                credentials_tx.send_replace(Some(Arc::new(new)));
            }
            Err(why) => {
                metrics.certificate.failed();
                tracing::warn!(%why, "TLS material is not used; what is in force stays until it ends");
                continue_over(&credentials_tx, now);
            }
        }
    }
}

/// Drops a certificate that is over: with it nothing could be proved any more.
fn continue_over(credentials: &watch::Sender<Option<Arc<Credentials>>>, now: SystemTime) {
    let dropped = credentials.send_if_modified(|current| {
        let over = current.as_ref().is_some_and(|current| current.not_after <= now);
        if over {
            *current = None;
        }
        over
    });
    if dropped {
        tracing::warn!("the certificate is over and the ca has made no other: plaintext until it does");
    }
}

fn credentials(
    [certificate, key, roots]: &[Vec<u8>; 3],
    files: &Files,
    local_name: &Arc<str>,
    trust: &Trust,
    epoch: u64,
    now: SystemTime,
) -> Result<Credentials, Failed> {
    let chain = certificates(certificate).ok_or_else(|| Failed::NotPem(files.dir.join(CERTIFICATE)))?;
    let roots = certificates(roots).ok_or_else(|| Failed::NotPem(files.dir.join(ROOTS)))?;
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| Failed::NotPem(files.dir.join(KEY)))?;
    let names = Names { suffix: files.suffix.clone(), listed: None };
    let second = Second::new(&roots, names).map_err(Failed::Bad)?;
    trust.with(Some(second)).credentials(epoch, &chain, key, local_name, now).map_err(Failed::Bad)
}

fn certificates(pem: &[u8]) -> Option<Vec<CertificateDer<'static>>> {
    let parsed: Vec<_> = CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().ok()?;
    (!parsed.is_empty()).then_some(parsed)
}

/// All three files, or `None` if none of them is there.
fn read(dir: &Path) -> Result<Read, Failed> {
    let mut found = [Vec::new(), Vec::new(), Vec::new()];
    let mut missing = 0;
    for (name, into) in [CERTIFICATE, KEY, ROOTS].into_iter().zip(&mut found) {
        match read_file(&dir.join(name)) {
            Ok(bytes) => *into = bytes,
            Err(why) if why.kind() == io::ErrorKind::NotFound => missing += 1,
            Err(why) => return Err(Failed::Unreadable(dir.join(name), why)),
        }
    }
    match missing {
        0 => Ok(Some(found)),
        3 => Ok(None),
        _ => {
            Err(Failed::Unreadable(dir.to_owned(), io::Error::new(io::ErrorKind::NotFound, "the Secret is not whole")))
        }
    }
}

fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    use std::io::Read as _;
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE { Err(io::Error::other("larger than a Secret can be")) } else { Ok(bytes) }
}

// ---- a default proxy, while its peers are being migrated ----

/// Waits until the identities to accept are others than those that `current` accepts; answers what to accept now.
pub(super) async fn migration(migration: Option<&Migration>, current: Option<&Names>) -> Option<Second> {
    let Some(migration) = migration else { return std::future::pending().await };
    let mut ticks = tokio::time::interval(LOOK);
    loop {
        ticks.tick().await;
        let copy = migration.clone();
        let Ok(accepted) = tokio::task::spawn_blocking(move || accepted(&copy, SystemTime::now())).await else {
            return std::future::pending().await;
        };
        if accepted.as_ref().map(|second| &second.names) != current {
            return accepted;
        }
    }
}

/// The identities being migrated; nothing without the list, after the deadline, or with other roots than those that were
/// pinned when this pod was injected.
pub(super) fn accepted(migration: &Migration, now: SystemTime) -> Option<Second> {
    if now >= migration.until {
        return None;
    }
    let roots = read_file(&migration.dir.join(ROOTS)).ok()?;
    let listed = String::from_utf8(read_file(&migration.dir.join(IDENTITIES)).ok()?).ok()?;
    if tls::sha256(&roots) != migration.roots_sha256 {
        tracing::error!(dir = %migration.dir.display(), "the migration's roots are not those this pod was told of: ignored");
        return None;
    }
    let listed: BTreeSet<_> = listed.split_whitespace().map(str::to_owned).collect();
    let names = Names { suffix: migration.suffix.clone(), listed: Some(Arc::new(listed)) };
    match Second::new(&certificates(&roots)?, names) {
        Ok(second) => Some(second),
        Err(why) => {
            tracing::error!(why = %Escaped(why.to_string().as_bytes()), "the migration's roots are not used");
            None
        }
    }
}

#[cfg(test)]
mod tests;
