//! `mantle-proxy`: the data plane beside each workload, and the redirect that brings its traffic.
//!
//! Without arguments (or with `run`) it reads its environment and serves; `redirect` installs, verifies or removes the
//! packet rules. Everything else is in the modules; `app.rs` wires them.

use std::process::ExitCode;

mod admin;
mod app;
mod config;
mod control;
mod counted;
mod destination;
mod discovery;
mod drain;
mod edges;
mod fail_open;
mod http1;
mod http2;
mod identity;
mod inbound;
mod link;
mod metrics;
mod outbound;
mod pool;
mod record;
mod redirect;
mod relay;
mod sniff;
mod socket;
mod tap;
mod tls;
mod upstream;
mod wait;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const USAGE: &str =
    "usage: mantle-proxy [run]                        serve, configured by MANTLE_PROXY_* in the environment
       mantle-proxy redirect install|verify|guard|remove  the packet rules that bring a pod's traffic (--help)
       mantle-proxy await                           returns when the proxy beside it is ready
       mantle-proxy --version";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.first().map(String::as_str) {
        None | Some("run") => app::run(|name| std::env::var(name).ok()),
        Some("redirect") => redirect::main(&args[1..]),
        Some("await") => wait::main(&args[1..]),
        Some("--version") => {
            println!("mantle-proxy {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        Some("--help") => {
            println!("{USAGE}");
            ExitCode::SUCCESS
        }
        Some(other) => {
            eprintln!("mantle-proxy: unknown command {other:?}\n{USAGE}");
            ExitCode::from(2)
        }
    }
}
