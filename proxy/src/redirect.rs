//! `mantle-proxy redirect install|verify|guard|remove`: the rules that bring a pod's TCP connections to its proxy.
//!
//! One table `inet mantle` (so that IPv6 cannot leak), one atomic netlink transaction, no other program needed. It acts on
//! the network namespace it is run in: the pod's, from the init container that injection adds. The same code serves
//! clusters (the proxy is exempt by uid) and one machine without root (exempt by socket mark). It must not know anything
//! else about the mesh. `redirect/nft.rs` speaks to the kernel.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};

mod guard;
mod nft;
mod privilege;
#[cfg(test)]
mod tests;

use nft::{Batch, Chain, Hook, Nft};

const TABLE: &str = "mantle";
const USAGE: &str = "usage: mantle-proxy redirect install|verify|guard|remove [--inbound-port 4143] [--outbound-port 4140] \
    [--proxy-uid UID] [--proxy-mark MARK] [--skip-inbound-ports 4190,4191] [--skip-outbound-ports PORTS] \
    [--skip-subnets NETWORKS]\n\
    PORTS are like 25,587 or 8000-8010, NETWORKS like 10.1.0.0/16,fd00::/8. install, verify and guard need at least one of --proxy-uid and --proxy-mark.";

/// What is redirected where, and who is exempt.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Rules {
    inbound_port: u16,
    outbound_port: u16,
    /// The proxy's uid, as seen from the user namespace that owns the network namespace.
    proxy_uid: Option<u32>,
    /// `SO_MARK` of the proxy's own sockets.
    proxy_mark: Option<u32>,
    skip_inbound: Vec<PortRange>,
    skip_outbound: Vec<PortRange>,
    /// Whole networks that pass the proxy by, as clients and as destinations.
    skip_subnets: Vec<Subnet>,
}

/// First and last address of a network, in network byte order: 4 or 16 bytes each.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Subnet {
    first: Vec<u8>,
    last: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct PortRange {
    first: u16,
    last: u16,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Command {
    Install(Rules),
    Verify(Rules),
    Guard(Rules),
    Remove,
}

/// Why a subcommand did not do its work; the text ends with the fix.
#[derive(Debug)]
pub(crate) enum Error {
    /// The kernel refused (what was being done, its errno).
    Kernel { doing: String, error: io::Error },
    /// The rules that are there are not the ones asked for.
    Differs(Vec<String>),
    /// The rules are there but a connection was not redirected.
    NotRedirected(String),
    /// Nothing can leave this network namespace, so nothing was tried.
    NoRoute,
}

/// Runs the subcommand. `args` are those after `redirect`. Exit codes: 0 done, 1 failed, 2 wrong usage.
pub(crate) fn main(args: &[String]) -> ExitCode {
    let command = match parse(args) {
        Ok(command) => command,
        Err(mistakes) => {
            for mistake in mistakes {
                eprintln!("mantle-proxy redirect: {mistake}");
            }
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    if let Err(error) = privilege::take_up_net_admin() {
        eprintln!("mantle-proxy redirect: taking up the capability NET_ADMIN: {error}");
        return ExitCode::FAILURE;
    }
    if let Command::Guard(rules) = command {
        return guard::main(rules);
    }
    match run(&command) {
        Ok(done) => {
            println!("{done}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("mantle-proxy redirect: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: &Command) -> Result<String, Error> {
    match command {
        Command::Install(rules) => {
            install(rules)?;
            let tried = compare(rules).and_then(|()| match try_connection(rules) {
                Err(Error::NoRoute) => Ok("this network namespace has no route yet, so no connection was tried".into()),
                tried => tried,
            });
            let tried = tried.inspect_err(|_| {
                // A redirect that does not work is worse than none: the pod must not start half-configured.
                let _ = remove();
            })?;
            let (outbound, inbound) = (rules.outbound_port, rules.inbound_port);
            Ok(format!("redirect installed: outbound to {outbound}, inbound to {inbound}; {tried}"))
        }
        Command::Verify(rules) => {
            compare(rules)?;
            let tried = try_connection(rules)?;
            Ok(format!("redirect verified: the rules are exactly the ones asked for; {tried}"))
        }
        // Guarding does not end by itself: `main` has taken it.
        Command::Guard(_) | Command::Remove => {
            remove()?;
            Ok("redirect removed".to_owned())
        }
    }
}

fn remove() -> Result<(), Error> {
    Nft::open()?.commit(Batch::new().replace_table(TABLE, false))
}

/// Replaces the whole table in one transaction: at no moment is a connection without rules.
fn install(rules: &Rules) -> Result<(), Error> {
    let mut batch = Batch::new().replace_table(TABLE, true);
    for chain in chains(rules) {
        batch = batch.chain(TABLE, &chain);
    }
    Nft::open()?.commit(batch)
}

/// The table as values: what `install` writes and `verify` expects to read back.
fn chains(rules: &Rules) -> Vec<Chain> {
    let mut output = Vec::new();
    if let Some(uid) = rules.proxy_uid {
        output.push([nft::meta(nft::META_SKUID), nft::equal(&uid.to_ne_bytes()), nft::accept()].concat());
    }
    if let Some(mark) = rules.proxy_mark {
        output.push([nft::meta(nft::META_MARK), nft::equal(&mark.to_ne_bytes()), nft::accept()].concat());
    }
    output.push([nft::meta(nft::META_OIFNAME), nft::equal(&nft::interface("lo")), nft::accept()].concat());
    output.extend(rules.skip_outbound.iter().map(|range| skip(*range)));
    output.extend(rules.skip_subnets.iter().map(|subnet| skip_subnet(subnet, nft::Address::Destination)));
    output.push([nft::tcp(), nft::redirect(rules.outbound_port)].concat());

    let mut input = vec![[nft::meta(nft::META_IIFNAME), nft::equal(&nft::interface("lo")), nft::accept()].concat()];
    input.extend(rules.skip_inbound.iter().map(|range| skip(*range)));
    input.extend(rules.skip_subnets.iter().map(|subnet| skip_subnet(subnet, nft::Address::Source)));
    input.push([nft::tcp(), nft::redirect(rules.inbound_port)].concat());

    vec![
        Chain { name: "outbound", hook: Hook::Output, rules: output },
        Chain { name: "inbound", hook: Hook::Prerouting, rules: input },
    ]
}

fn skip(range: PortRange) -> Vec<u8> {
    let port = if range.first == range.last {
        nft::equal(&range.first.to_be_bytes())
    } else {
        nft::within(&range.first.to_be_bytes(), &range.last.to_be_bytes())
    };
    [nft::tcp(), nft::destination_port(), port, nft::accept()].concat()
}

fn skip_subnet(subnet: &Subnet, which: nft::Address) -> Vec<u8> {
    let (load, of_family) = nft::address(which, subnet.first.len() == 4);
    let inside =
        if subnet.first == subnet.last { nft::equal(&subnet.first) } else { nft::within(&subnet.first, &subnet.last) };
    [of_family, load, inside, nft::accept()].concat()
}

/// Reads the table back and says everything that is not exactly as asked.
fn compare(rules: &Rules) -> Result<(), Error> {
    let wanted = chains(rules);
    let found = Nft::open()?.read(TABLE)?;
    let mut differences = Vec::new();
    for chain in &found {
        if !wanted.iter().any(|w| w.name == chain.name) {
            differences.push(format!("there is a chain `{}` that is not ours", chain.name));
        }
    }
    for chain in &wanted {
        match found.iter().find(|f| f.name == chain.name) {
            None => differences.push(format!("the chain `{}` is missing", chain.name)),
            Some(is) => differences.extend(nft::differences(chain, is)),
        }
    }
    if differences.is_empty() { Ok(()) } else { Err(Error::Differs(differences)) }
}

/// Connects to a documentation address and sees where the connection arrives. The listener stands in for the proxy; if the
/// proxy already listens, its accepting the connection is the proof (the address itself exists nowhere).
fn try_connection(rules: &Rules) -> Result<String, Error> {
    let port = (1024..=u16::MAX)
        .rev()
        .find(|port| !rules.skip_outbound.iter().any(|range| (range.first..=range.last).contains(port)));
    let Some(port) = port else {
        return Ok("every outbound port is skipped, so no connection was tried".to_owned());
    };
    let mut tried = Vec::new();
    // RFC 5737 and RFC 3849: addresses for documentation, which lead nowhere.
    let targets: [(IpAddr, IpAddr); 2] = [
        (Ipv4Addr::new(192, 0, 2, 1).into(), Ipv4Addr::LOCALHOST.into()),
        (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into(), Ipv6Addr::LOCALHOST.into()),
    ];
    for (target, local) in targets {
        let target = SocketAddr::new(target, port);
        match redirected(target, SocketAddr::new(local, rules.outbound_port)) {
            Ok(how) => tried.push(format!("a connection to {target} {how}")),
            // Without a route or address of that family nothing can leave either.
            Err(error) if no_route(&error) => {}
            Err(error) => return Err(Error::NotRedirected(format!("a connection to {target}: {error}"))),
        }
    }
    if tried.is_empty() {
        return Err(Error::NoRoute);
    }
    Ok(tried.join(", "))
}

fn no_route(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EADDRNOTAVAIL | libc::EAFNOSUPPORT)
    )
}

fn redirected(target: SocketAddr, proxy: SocketAddr) -> io::Result<&'static str> {
    const PATIENCE: Duration = Duration::from_secs(2);
    let listener = Socket::new(Domain::for_address(proxy), Type::STREAM, Some(Protocol::TCP))?;
    let listening = match listener.bind(&proxy.into()).and_then(|()| listener.listen(4)) {
        Ok(()) => true,
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => false,
        Err(error) => return Err(error),
    };
    let client = Socket::new(Domain::for_address(target), Type::STREAM, Some(Protocol::TCP))?;
    // Both ends close with a reset: a connection that waits for its time to pass would keep the port from the proxy.
    client.set_linger(Some(Duration::ZERO))?;
    client.connect_timeout(&target.into(), PATIENCE)?;
    if !listening {
        return Ok("reached the running proxy");
    }
    listener.set_read_timeout(Some(PATIENCE))?;
    loop {
        match listener.accept() {
            Ok((accepted, _)) => {
                accepted.set_linger(Some(Duration::ZERO))?;
                let original =
                    if target.is_ipv4() { accepted.original_dst_v4()? } else { accepted.original_dst_v6()? };
                if original.as_socket() == Some(target) {
                    return Ok("was redirected, its original destination known");
                }
                // Somebody else's connection: look at the next.
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "it was accepted elsewhere, not on the proxy's port",
                ));
            }
            Err(error) => return Err(error),
        }
    }
}

/// Flags to values; every mistake is reported.
fn parse(args: &[String]) -> Result<Command, Vec<String>> {
    let mut mistakes = Vec::new();
    let mut rules = Rules {
        inbound_port: 4143,
        outbound_port: 4140,
        proxy_uid: None,
        proxy_mark: None,
        skip_inbound: vec![PortRange { first: 4190, last: 4191 }],
        skip_outbound: Vec::new(),
        skip_subnets: Vec::new(),
    };
    let mut verb = None;
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        if !arg.starts_with("--") {
            if verb.replace(arg.as_str()).is_some() {
                mistakes.push(format!("`{arg}`: one of install, verify, guard, remove is enough"));
            }
            continue;
        }
        let (flag, value) = match arg.split_once('=') {
            Some((flag, value)) => (flag, Some(value)),
            None => (arg.as_str(), rest.next().map(String::as_str)),
        };
        let Some(value) = value else {
            mistakes.push(format!("{flag} needs a value"));
            continue;
        };
        let set = match flag {
            "--inbound-port" => port(value).map(|v| rules.inbound_port = v),
            "--outbound-port" => port(value).map(|v| rules.outbound_port = v),
            "--proxy-uid" => number(value).map(|v| rules.proxy_uid = Some(v)),
            "--proxy-mark" => number(value).and_then(|v| match v {
                0 => Err("0 is the mark of every socket; choose another".to_owned()),
                v => {
                    rules.proxy_mark = Some(v);
                    Ok(())
                }
            }),
            "--skip-inbound-ports" => ports(value).map(|v| rules.skip_inbound = v),
            "--skip-outbound-ports" => ports(value).map(|v| rules.skip_outbound = v),
            "--skip-subnets" => subnets(value).map(|v| rules.skip_subnets = v),
            _ => Err("no such flag".to_owned()),
        };
        if let Err(why) = set {
            mistakes.push(format!("{flag} {value}: {why}"));
        }
    }
    let exempt = rules.proxy_uid.is_some() || rules.proxy_mark.is_some();
    if !exempt && matches!(verb, Some("install" | "verify" | "guard")) {
        mistakes
            .push("without --proxy-uid or --proxy-mark the proxy's own connections would come back to it".to_owned());
    }
    let command = match verb {
        Some("install") => Command::Install(rules),
        Some("verify") => Command::Verify(rules),
        Some("guard") => Command::Guard(rules),
        Some("remove") => Command::Remove,
        Some(other) => {
            return Err([mistakes, vec![format!("`{other}` is none of install, verify, guard, remove")]].concat());
        }
        None => return Err([mistakes, vec!["say what to do: install, verify, guard or remove".to_owned()]].concat()),
    };
    if mistakes.is_empty() { Ok(command) } else { Err(mistakes) }
}

fn port(text: &str) -> Result<u16, String> {
    text.trim().parse().ok().filter(|port| *port != 0).ok_or_else(|| "a port is a number from 1 to 65535".to_owned())
}

fn number(text: &str) -> Result<u32, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| "expected a number, decimal or 0x… (32 bits)".to_owned())
}

/// A comma-separated list of ports and ranges; the empty text is the empty list.
fn ports(text: &str) -> Result<Vec<PortRange>, String> {
    let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
    parts
        .map(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let range = PortRange { first: port(first)?, last: port(last)? };
            if range.first > range.last { Err(format!("the range {part} is backwards")) } else { Ok(range) }
        })
        .collect()
}

/// A comma-separated list of networks; the empty text is the empty list.
fn subnets(text: &str) -> Result<Vec<Subnet>, String> {
    text.split(',').map(str::trim).filter(|part| !part.is_empty()).map(subnet).collect()
}

fn subnet(text: &str) -> Result<Subnet, String> {
    let wrong = || format!("{text} is not a network such as 10.1.0.0/16 or fd00::/8");
    let (address, length) = text.split_once('/').ok_or_else(wrong)?;
    let first = match address.parse().map_err(|_| wrong())? {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    let length: usize = length.parse().ok().filter(|length| *length <= first.len() * 8).ok_or_else(wrong)?;
    let mut last = first.clone();
    for bit in length..first.len() * 8 {
        let mask = 0x80 >> (bit % 8);
        if first[bit / 8] & mask != 0 {
            return Err(format!("{text} has address bits behind its length"));
        }
        last[bit / 8] |= mask;
    }
    Ok(Subnet { first, last })
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kernel { doing, error } => {
                write!(f, "{doing}: {error}")?;
                match error.raw_os_error() {
                    Some(libc::EPERM | libc::EACCES) => f.write_str(
                        "; run it with the capability NET_ADMIN in the pod's network namespace (injection gives it to the init container)",
                    ),
                    Some(libc::EPROTONOSUPPORT | libc::EOPNOTSUPP | libc::EAFNOSUPPORT) => f.write_str(
                        "; this kernel has no nf_tables: `modprobe nf_tables` on the host, or a kernel with CONFIG_NF_TABLES_INET",
                    ),
                    Some(libc::ENOENT) => f.write_str(
                        "; the redirect is not installed, or a kernel module is missing: `modprobe -a nft_redir nft_chain_nat` on the host (Linux 5.2 or newer)",
                    ),
                    _ => Ok(()),
                }
            }
            Self::Differs(differences) => write!(
                f,
                "the rules in table `inet {TABLE}` are not the ones asked for: {}; run `mantle-proxy redirect install` with the same flags",
                differences.join("; ")
            ),
            Self::NoRoute => f.write_str(
                "the rules are installed but not seen to work: this network namespace has no route that leads out; run it after the pod's network is up",
            ),
            Self::NotRedirected(what) => write!(
                f,
                "the rules are installed but not seen to work: {what}; run it in the pod, after its network is up, as a user other than the proxy's"
            ),
        }
    }
}
