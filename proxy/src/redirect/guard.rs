//! Keeps the rules in place for as long as the pod lives: whoever flushes them (a firewall's reload, `nft flush ruleset` in
//! the wrong namespace) would leave the application running in plaintext, and nobody would see it.
//!
//! The kernel tells of every change to the namespace's rules, so they are back within a millisecond or so; each repair is a
//! line in the log. It needs `NET_ADMIN`, which is why it is a container of its own and not a part of the proxy. Restarting
//! the pod instead is not ours to do: a container that ends is restarted alone, beside an application that talks on.

use std::io;
use std::process::ExitCode;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};

use super::nft::Nft;
use super::{Error, Rules, compare, install};

/// How long to go without looking, if the kernel says nothing: news can be lost when there is much of it.
pub(super) const LOOK: Duration = Duration::from_secs(30);

/// What `Guard::step` found and did.
#[derive(Debug)]
pub(super) struct Repaired(pub(super) String);

pub(super) struct Guard {
    rules: Rules,
    news: Nft,
}

impl Guard {
    /// Listens first and looks then, so that no change is missed.
    pub(super) fn new(rules: Rules) -> Result<Self, Error> {
        Ok(Self { rules, news: Nft::subscribe(LOOK)? })
    }

    /// Puts the rules in place if they are not exactly those.
    ///
    /// # Errors
    /// They cannot be installed, or are not there afterwards.
    pub(super) fn look(&self) -> Result<Option<Repaired>, Error> {
        let Err(found) = compare(&self.rules) else { return Ok(None) };
        install(&self.rules)?;
        compare(&self.rules)?;
        let found = match found {
            Error::Differs(differences) => differences.join("; "),
            other => other.to_string(),
        };
        Ok(Some(Repaired(found)))
    }

    /// Waits for news, or for `LOOK` to pass.
    ///
    /// # Errors
    /// The kernel ended the subscription.
    pub(super) fn wait(&mut self) -> Result<(), Error> {
        self.news.news()
    }

    fn run(mut self) -> Error {
        loop {
            match self.look() {
                Ok(Some(Repaired(found))) => eprintln!("redirect repaired; found: {found}"),
                Ok(None) => {}
                Err(error) => return error,
            }
            if let Err(error) = self.wait() {
                return error;
            }
        }
    }
}

/// Guards until SIGTERM or SIGINT, which end it well. As PID 1 of its container it would not hear them otherwise.
pub(super) fn main(rules: Rules) -> ExitCode {
    match guard(rules) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mantle-proxy redirect: {error}");
            ExitCode::FAILURE
        }
    }
}

fn guard(rules: Rules) -> Result<(), Error> {
    let kernel = |doing: &str| {
        let doing = doing.to_owned();
        move |error: io::Error| Error::Kernel { doing, error }
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(kernel("starting to wait for signals"))?;
    runtime.block_on(async {
        let (mut term, mut int) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
        let (Ok(term), Ok(int)) = (&mut term, &mut int) else {
            return Err(kernel("waiting for signals")(io::Error::last_os_error()));
        };
        let guard = Guard::new(rules)?;
        let (failed, mut failure) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || failed.send(guard.run()));
        println!("redirect guarded");
        tokio::select! {
            _ = term.recv() => Ok(()),
            _ = int.recv() => Ok(()),
            error = &mut failure => Err(error.unwrap_or_else(|_| Error::NotRedirected("the guard died".to_owned()))),
        }
    })
}
