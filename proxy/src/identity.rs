//! Our certificate: a fresh key and CSR in memory for each, Certify, verified before use, renewed before it ends.
//!
//! The key never leaves this process and is never written. A renewal that fails leaves what is in force; it is logged,
//! counted and tried again. Nothing secret is logged: not the token, not the key.

pub(crate) mod files;

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use linkerd2_proxy_api::identity::identity_client::IdentityClient;
use linkerd2_proxy_api::identity::{CertifyRequest, CertifyResponse};
use mantle_proxy_core::escape::Escaped;
use mantle_proxy_core::renew;
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::sync::watch;
use tonic::Status;

use crate::config::IdentityConfig;
use crate::control::client::{self, ClientTls};
use crate::metrics::{Http, Metrics};
use crate::record;
use crate::socket::Dial;
use crate::tls::clock::Outside;
use crate::tls::{self, BadCertificate, Credentials, Trust};

/// One Certify, connection included.
const CERTIFY: Duration = Duration::from_secs(15);

/// Tokens are a few KiB; anything beyond this is not one.
const MAX_TOKEN: u64 = 64 * 1024;

/// Why there is no new certificate.
#[derive(Debug)]
enum Failed {
    Token(PathBuf, io::Error),
    EmptyToken(PathBuf),
    Key(rcgen::Error),
    Timeout,
    Refused(Status),
    /// The answer is used only if it verifies.
    Bad(BadCertificate),
    AlreadyOver(Outside),
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Token(path, why) => {
                write!(f, "the token {} cannot be read ({why}): is the token volume mounted?", path.display())
            }
            Self::EmptyToken(path) => write!(f, "the token {} is empty or too large", path.display()),
            Self::Key(why) => write!(f, "no key or signing request could be made ({why})"),
            Self::Timeout => write!(f, "the identity service did not answer within {CERTIFY:?}"),
            Self::Refused(status) => write!(f, "the identity service answered {:?}: {}", status.code(), Causes(status)),
            Self::Bad(why) => write!(f, "the identity service's answer is not used: {why}"),
            Self::AlreadyOver(outside) => write!(f, "the identity service's answer {outside}"),
        }
    }
}

/// A status with its root cause, which some messages leave out.
struct Causes<'a>(&'a Status);

impl fmt::Display for Causes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let message = self.0.message();
        write!(f, "{}", Escaped(message.as_bytes()))?;
        let mut root = std::error::Error::source(self.0);
        while let Some(deeper) = root.and_then(std::error::Error::source) {
            root = Some(deeper);
        }
        match root.map(ToString::to_string) {
            Some(root) if !message.contains(&root) => write!(f, ": {}", Escaped(root.as_bytes())),
            Some(_) | None => Ok(()),
        }
    }
}

/// Keeps `credentials` filled for ever. Runs on the control thread.
pub(crate) async fn run(
    config: Arc<crate::config::Config>,
    trust: Trust,
    credentials: watch::Sender<Option<Arc<Credentials>>>,
    metrics: Arc<Metrics>,
) {
    let dial = Dial { mark: config.outbound_mark, timeout: config.outbound_connect_timeout };
    let config = &config.identity;
    if let Some(from) = &config.files {
        return files::run(from, &config.local_name, &trust, credentials, &metrics).await;
    }
    let bounds = renew::Bounds { min: config.min_refresh, max: config.max_refresh };
    let mut trust = trust.with(config.migration.as_ref().and_then(|m| files::accepted(m, SystemTime::now())));
    let (mut epoch, mut failures) = (0, 0);
    loop {
        let current = credentials.borrow().clone();
        let calls = metrics.control(&client::labels(&config.svc));
        let wait = match certify(config, &trust, current.as_deref(), epoch + 1, dial, calls).await {
            Ok(new) => {
                let now = SystemTime::now();
                let wait = renew::after_success(now, new.not_after, bounds, tls::random());
                tracing::info!(name = %new.local.dns, spiffe = new.local.spiffe.as_deref(), epoch = new.epoch, renewal_in = ?wait, "certified");
                metrics.certificate.renewed(now, new.not_after);
                (epoch, failures) = (new.epoch, 0);
                credentials.send_replace(Some(Arc::new(new)));
                wait
            }
            Err(why) => {
                failures += 1;
                metrics.certificate.failed();
                let left = current.map(|c| c.not_after.duration_since(SystemTime::now()).unwrap_or_default());
                match left {
                    // At the start of a mesh the identity service is often just not there yet.
                    None if failures < 3 => tracing::info!(%why, failures, "not certified yet"),
                    None => tracing::warn!(%why, failures, "not certified yet; nothing is served until then"),
                    Some(left) => {
                        tracing::warn!(%why, failures, valid_for = ?left, "the certificate was not renewed; it stays in use")
                    }
                }
                renew::after_failure(failures, tls::random())
            }
        };
        let due = SystemTime::now() + wait;
        loop {
            let also = trust.also().cloned();
            tokio::select! {
                () = sleep_until(due) => break,
                second = files::migration(config.migration.as_ref(), also.as_ref()) => {
                    trust = trust.with(second);
                    epoch = accept_others(&trust, &credentials, epoch);
                }
            }
        }
    }
}

/// Puts a change of what is accepted into force, with the certificate that there is. Returns the epoch in force.
fn accept_others(trust: &Trust, credentials: &watch::Sender<Option<Arc<Credentials>>>, epoch: u64) -> u64 {
    let Some(current) = credentials.borrow().clone() else { return epoch };
    match trust.again(epoch + 1, &current) {
        Ok(new) => {
            tracing::info!(accepts = ?new.also, "identities of the experimental mode are accepted, or no more");
            credentials.send_replace(Some(Arc::new(new)));
            epoch + 1
        }
        Err(why) => {
            tracing::error!(%why, "what is accepted could not be changed");
            epoch
        }
    }
}

/// Waits until the wall clock says `due`. A certificate ends by that clock, and a timer does not count the time that a
/// machine was suspended: so the clock is looked at now and then.
async fn sleep_until(due: SystemTime) {
    while let Some(nap) = nap(SystemTime::now(), due) {
        tokio::time::sleep(nap).await;
    }
}

/// How long to sleep before looking at the clock again; `None`: it is time.
fn nap(now: SystemTime, due: SystemTime) -> Option<Duration> {
    let left = due.duration_since(now).ok().filter(|left| !left.is_zero())?;
    Some(left.min(LOOK_AT_CLOCK))
}

const LOOK_AT_CLOCK: Duration = Duration::from_secs(15);

async fn certify(
    config: &IdentityConfig,
    trust: &Trust,
    current: Option<&Credentials>,
    epoch: u64,
    dial: Dial,
    calls: Arc<Http>,
) -> Result<Credentials, Failed> {
    let token = read_token(config).await?;
    let key = KeyPair::generate().map_err(Failed::Key)?;
    let csr = signing_request(&key, &config.local_name).map_err(Failed::Key)?;
    // A certificate that is over would be refused in the handshake: then we are a stranger again.
    let valid = current.filter(|current| current.not_after > SystemTime::now());
    let tls = ClientTls::Fixed(valid.map_or_else(|| trust.anonymous_client(), |current| current.client_plain.clone()));
    let mut client = IdentityClient::new(client::channel(&config.svc, tls, dial));
    let request = CertifyRequest { identity: config.local_name.to_string(), token, certificate_signing_request: csr };
    let mut call = record::Request::begin(calls, None);
    let answer = match tokio::time::timeout(CERTIFY, client.certify(request)).await {
        Ok(answer) => answer,
        Err(_) => return Err(Failed::Timeout),
    };
    call.response(200, &|_| {});
    call.grpc_status(answer.as_ref().map_or_else(|status| status.code() as u8, |_| 0));
    call.end(false);
    let answer = answer.map_err(Failed::Refused)?.into_inner();
    accept(trust, answer, key, &config.local_name, epoch, SystemTime::now())
}

/// Verifies the answer and builds what is in force from it.
fn accept(
    trust: &Trust,
    answer: CertifyResponse,
    key: KeyPair,
    local_name: &Arc<str>,
    epoch: u64,
    now: SystemTime,
) -> Result<Credentials, Failed> {
    let chain: Vec<_> = [answer.leaf_certificate]
        .into_iter()
        .chain(answer.intermediate_certificates)
        .map(CertificateDer::from)
        .collect();
    let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(|_| Failed::Bad(BadCertificate::WrongKey))?;
    let mut new = trust.credentials(epoch, &chain, key, local_name, now).map_err(Failed::Bad)?;
    // The service may want it renewed sooner than its certificate says, never later.
    if let Some(valid_until) = answer.valid_until.and_then(|until| SystemTime::try_from(until).ok()) {
        new.not_after = new.not_after.min(valid_until);
    }
    if new.not_after <= now {
        return Err(Failed::AlreadyOver(Outside::too_late(new.not_after, now)));
    }
    Ok(new)
}

async fn read_token(config: &IdentityConfig) -> Result<Vec<u8>, Failed> {
    let path = config.token_file.clone();
    let failed = |why| Failed::Token(config.token_file.clone(), why);
    let read = tokio::task::spawn_blocking(move || {
        use std::io::Read as _;
        let mut token = Vec::new();
        std::fs::File::open(path)?.take(MAX_TOKEN + 1).read_to_end(&mut token)?;
        Ok(token)
    });
    let token: Vec<u8> = read.await.map_err(|why| failed(io::Error::other(why)))?.map_err(failed)?;
    if token.is_empty() || token.len() as u64 > MAX_TOKEN {
        return Err(Failed::EmptyToken(config.token_file.clone()));
    }
    Ok(token)
}

/// A PKCS#10 request in DER: common name and the one DNS name are our identity.
fn signing_request(key: &KeyPair, local_name: &str) -> Result<Vec<u8>, rcgen::Error> {
    let mut params = CertificateParams::new(vec![local_name.to_owned()])?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, local_name);
    Ok(params.serialize_request(key)?.der().to_vec())
}

#[cfg(test)]
mod tests;
