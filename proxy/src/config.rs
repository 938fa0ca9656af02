//! The proxy's configuration: the environment parsed once, at the edge, with every mistake reported at once.
//!
//! Each variable is `MANTLE_PROXY_<NAME>`, else `LINKERD2_PROXY_<NAME>`; formats and defaults are those of
//! docs/proxy.md (durations `\d+(ms|s|m|h|d)`, port sets `1,2-5,80`, networks as CIDR lists). The source is injected,
//! so this file reads no environment, no clock and no file. Nothing inside the program re-checks what is parsed here.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mantle_proxy_core::model::Cidr;
use mantle_proxy_core::policy::DefaultPolicy;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, DnsName};
use tracing_subscriber::filter::{LevelFilter, Targets};

/// The exit code of a process whose configuration is wrong (`EX_USAGE`).
pub(crate) const EXIT_BAD_CONFIG: u8 = 64;

#[derive(Debug)]
pub(crate) struct Config {
    pub(crate) identity: IdentityConfig,
    pub(crate) destination: ControlAddr,
    pub(crate) policy: ControlAddr,
    /// `PortSpec.workload` and `TrafficSpec.source_workload`.
    pub(crate) policy_workload: String,
    /// `GetDestination.context_token`.
    pub(crate) destination_context: String,
    /// The mesh's networks: inside them a destination that discovery does not explain is refused. Empty: everywhere.
    pub(crate) profile_networks: Vec<Cidr>,
    /// The networks that `cluster-*` default policies admit.
    pub(crate) cluster_networks: Vec<Cidr>,
    /// This pod's addresses.
    pub(crate) inbound_ips: Vec<IpAddr>,
    /// Ports whose policy is watched from the start and for ever.
    pub(crate) inbound_ports: PortSet,
    /// What a listed port admits until its policy is known.
    pub(crate) default_policy: DefaultPolicy,
    /// Ports whose *default* policy is opaque.
    pub(crate) opaque_ports: PortSet,
    /// Ports that accept clients with an identity only, whatever the default policy says.
    pub(crate) identity_ports: PortSet,
    /// Ports on which inbound tells the application the client's address in `mantle-client-addr`.
    pub(crate) client_addr_ports: PortSet,
    pub(crate) outbound_listen: SocketAddr,
    pub(crate) inbound_listen: SocketAddr,
    pub(crate) control_listen: SocketAddr,
    pub(crate) admin_listen: SocketAddr,
    /// The only identity that may tap and read edges; `None`: port 4190 is not opened.
    pub(crate) tap_svc_name: Option<Arc<str>>,
    pub(crate) inbound_connect_timeout: Duration,
    pub(crate) outbound_connect_timeout: Duration,
    pub(crate) inbound_detect_timeout: Duration,
    pub(crate) outbound_detect_timeout: Duration,
    /// How long a destination's answer is kept after its last use …
    pub(crate) outbound_discovery_idle: Duration,
    /// … and an unlisted port's policy.
    pub(crate) inbound_discovery_idle: Duration,
    /// How long a drain may take after SIGTERM.
    pub(crate) shutdown_grace: Duration,
    /// `POST /shutdown` on the admin port, loopback only.
    pub(crate) shutdown_endpoint: bool,
    /// Data threads.
    pub(crate) cores: usize,
    /// `SO_MARK` of every socket that the proxy itself dials.
    pub(crate) outbound_mark: Option<u32>,
    pub(crate) log: Targets,
    pub(crate) log_format: LogFormat,
}

#[derive(Debug)]
pub(crate) struct IdentityConfig {
    /// At least one root.
    pub(crate) trust_anchors: Vec<CertificateDer<'static>>,
    /// Our identity: a DNS name, also our SNI.
    pub(crate) local_name: Arc<str>,
    /// Read again at each Certify; empty if `files` says where the certificate comes from instead.
    pub(crate) token_file: PathBuf,
    /// The experimental mode: certificate and key come from files, and the proxy fails open.
    pub(crate) files: Option<Files>,
    /// The identities of the experimental mode that a default proxy accepts while they are being migrated.
    pub(crate) migration: Option<Migration>,
    pub(crate) svc: ControlAddr,
    /// A renewal never comes sooner than this after the last one …
    pub(crate) min_refresh: Duration,
    /// … nor later.
    pub(crate) max_refresh: Duration,
}

/// Where the experimental mode's Secret is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Files {
    pub(crate) dir: PathBuf,
    /// What the mode's identities end in, with a leading dot.
    pub(crate) suffix: Arc<str>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Migration {
    /// Where the list of identities is mounted.
    pub(crate) dir: PathBuf,
    pub(crate) suffix: Arc<str>,
    /// Of the roots' PEM text, in hexadecimal: no others are taken.
    pub(crate) roots_sha256: String,
    /// Nothing is accepted after this, whatever the list says.
    pub(crate) until: SystemTime,
}

/// Where a control-plane service is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ControlAddr {
    /// A DNS name or an IP address, resolved at each connection.
    pub(crate) host: String,
    pub(crate) port: u16,
    /// The identity that must be proved there, also the SNI; `None` only for loopback, where HTTP/2 is plaintext.
    pub(crate) name: Option<Arc<str>>,
}

impl fmt::Display for ControlAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LogFormat {
    Plain,
    Json,
}

/// Ports as sorted, inclusive ranges.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PortSet(Vec<(u16, u16)>);

impl PortSet {
    pub(crate) fn contains(&self, port: u16) -> bool {
        self.0.iter().any(|&(low, high)| low <= port && port <= high)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = u16> + '_ {
        self.0.iter().flat_map(|&(low, high)| low..=high)
    }
}

/// Every mistake found, one a line: the variable, what was found and what is accepted.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ConfigErrors(pub(crate) Vec<String>);

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} mistake(s) in the configuration:", self.0.len())?;
        self.0.iter().try_for_each(|line| writeln!(f, "  {line}"))
    }
}

impl std::error::Error for ConfigErrors {}

impl Config {
    /// Parses the whole environment. `get` answers a variable's value by its full name.
    ///
    /// # Errors
    /// All mistakes together; the program ends with `EXIT_BAD_CONFIG`.
    pub(crate) fn load(get: impl Fn(&str) -> Option<String>) -> Result<Self, ConfigErrors> {
        let mut env = Env { get: &get, mistakes: Vec::new() };
        let config = env.config();
        match (config, env.mistakes.is_empty()) {
            (Some(config), true) => Ok(config),
            (_, _) => Err(ConfigErrors(env.mistakes)),
        }
    }
}

struct Env<'a> {
    get: &'a dyn Fn(&str) -> Option<String>,
    mistakes: Vec<String>,
}

impl Env<'_> {
    /// `None` only if a required value is missing or wrong, which is then among the mistakes.
    fn config(&mut self) -> Option<Config> {
        let identity = self.identity();
        let destination = self.control_addr("DESTINATION_SVC");
        let policy = self.control_addr("POLICY_SVC");
        let policy_workload =
            self.required("POLICY_WORKLOAD", "the workload, as {\"ns\":\"NAMESPACE\",\"pod\":\"POD\"}");
        let cluster_networks = self.or_default("POLICY_CLUSTER_NETWORKS", Vec::new(), NETWORKS, networks);
        let outbound =
            self.or_default("OUTBOUND_LISTEN_ADDRS", (Ipv4Addr::LOCALHOST, 4140).into(), ADDRESSES, first_address);
        let inbound_ips = self.or_default("INBOUND_IPS", Vec::new(), "a comma-separated list of IP addresses", ips);
        let dual = inbound_ips.iter().any(|ip| ip.is_ipv6() && !ip.is_loopback());
        // Fields are evaluated as written: the early returns come last, so that every mistake is found.
        Some(Config {
            default_policy: self.default_policy(&cluster_networks),
            cluster_networks,
            profile_networks: self.or_default("DESTINATION_PROFILE_NETWORKS", Vec::new(), NETWORKS, networks),
            destination_context: self.value("DESTINATION_CONTEXT").map(|(_, value)| value).unwrap_or_default(),
            inbound_ips,
            inbound_ports: self.or_default("INBOUND_PORTS", PortSet::default(), PORTS, port_set),
            opaque_ports: self.or_default(
                "INBOUND_PORTS_DISABLE_PROTOCOL_DETECTION",
                PortSet::default(),
                PORTS,
                port_set,
            ),
            identity_ports: self.or_default("INBOUND_PORTS_REQUIRE_IDENTITY", PortSet::default(), PORTS, port_set),
            client_addr_ports: self.or_default("INBOUND_CLIENT_ADDR_PORTS", PortSet::default(), PORTS, port_set),
            // The redirect sends IPv6 to `::1`. From outside nobody gets there: that port is redirected as well.
            outbound_listen: match self.or_default("OUTBOUND_LISTEN_ADDR", outbound, ADDRESS, from_str) {
                SocketAddr::V4(v4) if dual => (Ipv6Addr::UNSPECIFIED, v4.port()).into(),
                other => other,
            },
            inbound_listen: self.listen("INBOUND_LISTEN_ADDR", (Ipv4Addr::UNSPECIFIED, 4143), dual),
            control_listen: self.listen("CONTROL_LISTEN_ADDR", (Ipv4Addr::UNSPECIFIED, 4190), dual),
            admin_listen: self.listen("ADMIN_LISTEN_ADDR", (Ipv4Addr::LOCALHOST, 4191), dual),
            tap_svc_name: self.parsed("TAP_SVC_NAME", IDENTITY, dns_name),
            inbound_connect_timeout: self.duration("INBOUND_CONNECT_TIMEOUT", Duration::from_millis(300)),
            outbound_connect_timeout: self.duration("OUTBOUND_CONNECT_TIMEOUT", Duration::from_secs(1)),
            inbound_detect_timeout: self.duration("INBOUND_DETECT_TIMEOUT", Duration::from_secs(10)),
            outbound_detect_timeout: self.duration("OUTBOUND_DETECT_TIMEOUT", Duration::from_secs(10)),
            outbound_discovery_idle: self.duration("OUTBOUND_DISCOVERY_IDLE_TIMEOUT", Duration::from_secs(5)),
            inbound_discovery_idle: self.duration("INBOUND_DISCOVERY_IDLE_TIMEOUT", Duration::from_secs(90)),
            shutdown_grace: self.duration("SHUTDOWN_GRACE_PERIOD", Duration::from_secs(120)),
            shutdown_endpoint: self.or_default("SHUTDOWN_ENDPOINT_ENABLED", false, "true or false", from_str),
            cores: self.or_default("CORES", 1, "a whole number of threads, 1 to 64", |value| {
                from_str(value).filter(|threads| (1..=64).contains(threads))
            }),
            outbound_mark: self.parsed("OUTBOUND_MARK", "a number other than 0, decimal or 0x…", mark),
            log: self.or_default("LOG", default_log(), "levels such as warn,mantle=debug", log_levels),
            log_format: self.or_default("LOG_FORMAT", LogFormat::Plain, "PLAIN or JSON", log_format),
            identity: identity?,
            destination: destination?,
            policy: policy?,
            policy_workload: policy_workload?,
        })
    }

    /// Where to listen. In a pod with an IPv6 address (`dual`), "everywhere" means both families: one socket on `[::]`.
    fn listen(&mut self, name: &str, default: (Ipv4Addr, u16), dual: bool) -> SocketAddr {
        match self.or_default(name, default.into(), ADDRESS, from_str) {
            SocketAddr::V4(v4) if dual && v4.ip().is_unspecified() => (Ipv6Addr::UNSPECIFIED, v4.port()).into(),
            other => other,
        }
    }

    fn identity(&mut self) -> Option<IdentityConfig> {
        let trust_anchors = self.required("IDENTITY_TRUST_ANCHORS", "the mesh's trust roots, as PEM text");
        let trust_anchors = trust_anchors.and_then(|text| {
            let parsed: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
            let roots = parsed
                .ok()
                .filter(|roots| !roots.is_empty() && roots.iter().all(|r| webpki::anchor_from_trusted_cert(r).is_ok()));
            if roots.is_none() {
                // The value is long and public: it is not repeated.
                self.mistake("IDENTITY_TRUST_ANCHORS", "is not usable", "one or more certificates as PEM text");
            }
            roots
        });
        let local_name = self.required_parsed("IDENTITY_LOCAL_NAME", IDENTITY, dns_name);
        let files = self.files();
        let token_file = match &files {
            Some(_) => Some(String::new()),
            None => self.required("IDENTITY_TOKEN_FILE", "the path of the projected service account token"),
        };
        let migration = self.migration();
        let svc = self.control_addr("IDENTITY_SVC");
        let min_refresh = self.duration("IDENTITY_MIN_REFRESH", Duration::from_secs(10));
        let max_refresh = self.duration("IDENTITY_MAX_REFRESH", Duration::from_secs(24 * 3600));
        if min_refresh > max_refresh {
            self.mistake(
                "IDENTITY_MIN_REFRESH",
                "is longer than IDENTITY_MAX_REFRESH",
                "a duration that is not longer",
            );
        }
        Some(IdentityConfig {
            trust_anchors: trust_anchors?,
            local_name: local_name?,
            token_file: token_file?.into(),
            files,
            migration,
            svc: svc?,
            min_refresh,
            max_refresh,
        })
    }

    fn files(&mut self) -> Option<Files> {
        let (_, dir) = self.value("IDENTITY_FILES")?;
        Some(Files { dir: dir.into(), suffix: self.suffix()? })
    }

    fn migration(&mut self) -> Option<Migration> {
        let (_, dir) = self.value("IDENTITY_MIGRATION")?;
        let suffix = self.suffix();
        let roots = self.required("IDENTITY_MIGRATION_ROOTS", "the SHA-256 of the roots, in hexadecimal");
        let until = self.required_parsed("IDENTITY_MIGRATION_UNTIL", "seconds since 1970", from_str::<u32>);
        let until = SystemTime::UNIX_EPOCH + Duration::from_secs(until?.into());
        Some(Migration { dir: dir.into(), suffix: suffix?, roots_sha256: roots?.to_ascii_lowercase(), until })
    }

    fn suffix(&mut self) -> Option<Arc<str>> {
        let accepted = "what identities of the experimental mode end in, such as .optional.mantle.cluster.local";
        self.required_parsed("IDENTITY_FILES_SUFFIX", accepted, |value| {
            dns_name(value.strip_prefix('.')?).map(|domain| Arc::from(format!(".{domain}")))
        })
    }

    fn control_addr(&mut self, base: &str) -> Option<ControlAddr> {
        let (host, port) = self.required_parsed(&format!("{base}_ADDR"), "HOST:PORT or IP:PORT", host_port)?;
        if is_loopback(&host) {
            return Some(ControlAddr { host, port, name: None });
        }
        let accepted = "the service's identity, a DNS name (only a loopback address needs none)";
        let name = self.required_parsed(&format!("{base}_NAME"), accepted, dns_name)?;
        Some(ControlAddr { host, port, name: Some(name) })
    }

    fn default_policy(&mut self, cluster_networks: &[Cidr]) -> DefaultPolicy {
        let accepted = DefaultPolicy::ALL.map(DefaultPolicy::word).join(", ");
        let policy = self.or_default(
            "INBOUND_DEFAULT_POLICY",
            DefaultPolicy::AllUnauthenticated,
            &accepted,
            DefaultPolicy::parse,
        );
        if policy.word().starts_with("cluster-") && cluster_networks.is_empty() {
            let found = format!("is {:?} without POLICY_CLUSTER_NETWORKS", policy.word());
            self.mistake("INBOUND_DEFAULT_POLICY", &found, "POLICY_CLUSTER_NETWORKS as a list of CIDRs beside it");
        }
        policy
    }

    /// The variable's full name as found and its trimmed value; an empty value is an unset one.
    fn value(&self, name: &str) -> Option<(String, String)> {
        ["MANTLE_PROXY_", "LINKERD2_PROXY_"].into_iter().find_map(|prefix| {
            let full = format!("{prefix}{name}");
            let value = (self.get)(&full)?;
            let value = value.trim();
            (!value.is_empty()).then(|| (full, value.to_owned()))
        })
    }

    fn mistake(&mut self, name: &str, found: &str, accepted: &str) {
        self.mistakes.push(format!("MANTLE_PROXY_{name} {found}; accepted: {accepted}"));
    }

    fn required(&mut self, name: &str, accepted: &str) -> Option<String> {
        let value = self.value(name).map(|(_, value)| value);
        if value.is_none() {
            self.mistake(name, "is not set", accepted);
        }
        value
    }

    fn required_parsed<T>(&mut self, name: &str, accepted: &str, parse: impl Fn(&str) -> Option<T>) -> Option<T> {
        self.required(name, accepted)?;
        self.parsed(name, accepted, parse)
    }

    fn or_default<T>(&mut self, name: &str, default: T, accepted: &str, parse: impl Fn(&str) -> Option<T>) -> T {
        self.parsed(name, accepted, parse).unwrap_or(default)
    }

    fn duration(&mut self, name: &str, default: Duration) -> Duration {
        self.or_default(name, default, "a whole number with ms, s, m, h or d, such as 500ms or 10s", duration)
    }

    /// `None`: unset, or wrong and noted.
    fn parsed<T>(&mut self, name: &str, accepted: &str, parse: impl Fn(&str) -> Option<T>) -> Option<T> {
        let (full, value) = self.value(name)?;
        let parsed = parse(&value);
        if parsed.is_none() {
            self.mistakes.push(format!("{full} is {value:?}; accepted: {accepted}"));
        }
        parsed
    }
}

const ADDRESS: &str = "IP:PORT";
const ADDRESSES: &str = "IP:PORT, or two of them with a comma";
const IDENTITY: &str = "a DNS name such as SA.NAMESPACE.serviceaccount.identity.mantle.cluster.local";
const NETWORKS: &str = "a comma-separated list of networks such as 10.203.0.0/16";
const PORTS: &str = "ports and ranges such as 80,8000-8010";

fn from_str<T: FromStr>(value: &str) -> Option<T> {
    value.parse().ok()
}

fn duration(value: &str) -> Option<Duration> {
    let split = value.find(|c: char| !c.is_ascii_digit()).unwrap_or(value.len());
    let number: u64 = value[..split].parse().ok()?;
    match value[split..].trim() {
        "ms" => Some(Duration::from_millis(number)),
        "s" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_secs(number.checked_mul(60)?)),
        "h" => Some(Duration::from_secs(number.checked_mul(3600)?)),
        "d" => Some(Duration::from_secs(number.checked_mul(86400)?)),
        "" if number == 0 => Some(Duration::ZERO),
        _ => None,
    }
}

fn list<T>(value: &str, parse: impl Fn(&str) -> Option<T>) -> Option<Vec<T>> {
    value.split(',').map(str::trim).filter(|item| !item.is_empty()).map(parse).collect()
}

fn ips(value: &str) -> Option<Vec<IpAddr>> {
    list(value, from_str)
}

fn networks(value: &str) -> Option<Vec<Cidr>> {
    list(value, |item| {
        let (addr, prefix) = item.split_once('/')?;
        let (addr, prefix): (IpAddr, u8) = (addr.parse().ok()?, prefix.parse().ok()?);
        let most = if addr.is_ipv4() { 32 } else { 128 };
        (prefix <= most).then_some(Cidr { addr, prefix })
    })
}

fn port_set(value: &str) -> Option<PortSet> {
    let mut ranges = list(value, |item| {
        let (low, high) = item.split_once('-').unwrap_or((item, item));
        let (low, high): (u16, u16) = (low.trim().parse().ok()?, high.trim().parse().ok()?);
        (low > 0 && low <= high).then_some((low, high))
    })?;
    ranges.sort_unstable();
    let mut merged: Vec<(u16, u16)> = Vec::with_capacity(ranges.len());
    for (low, high) in ranges {
        match merged.last_mut() {
            Some(last) if low <= last.1 => last.1 = last.1.max(high),
            Some(_) | None => merged.push((low, high)),
        }
    }
    Some(PortSet(merged))
}

fn first_address(value: &str) -> Option<SocketAddr> {
    let addresses = list(value, from_str::<SocketAddr>)?;
    (addresses.len() <= 2).then(|| addresses.first().copied())?
}

fn host_port(value: &str) -> Option<(String, u16)> {
    if let Ok(addr) = value.parse::<SocketAddr>() {
        return (addr.port() > 0).then(|| (addr.ip().to_string(), addr.port()));
    }
    let (host, port) = value.rsplit_once(':')?;
    let port: u16 = port.parse().ok().filter(|port| *port > 0)?;
    DnsName::try_from(host.trim_end_matches('.')).ok()?;
    Some((host.to_owned(), port))
}

fn is_loopback(host: &str) -> bool {
    host.parse::<IpAddr>()
        .map_or_else(|_| host.trim_end_matches('.').eq_ignore_ascii_case("localhost"), |ip| ip.is_loopback())
}

fn dns_name(value: &str) -> Option<Arc<str>> {
    // An address is not an identity, though some parsers take it for a name.
    let name = DnsName::try_from(value).ok().filter(|_| value.parse::<IpAddr>().is_err())?;
    Some(Arc::from(name.as_ref().to_ascii_lowercase()))
}

fn mark(value: &str) -> Option<u32> {
    let number = match value.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16).ok(),
        None => value.parse().ok(),
    };
    number.filter(|mark| *mark != 0)
}

/// `level` and `target=level` with commas. What linkerd2-proxy takes beyond that, filters of spans and fields in
/// brackets, is left out: this proxy has no spans.
fn log_levels(value: &str) -> Option<Targets> {
    let levels: Vec<_> = value.split(',').filter(|directive| !directive.contains('[')).collect();
    levels.join(",").parse().ok()
}

fn default_log() -> Targets {
    Targets::new().with_default(LevelFilter::WARN).with_target("mantle", LevelFilter::INFO)
}

fn log_format(value: &str) -> Option<LogFormat> {
    match value.to_ascii_lowercase().as_str() {
        "plain" => Some(LogFormat::Plain),
        "json" => Some(LogFormat::Json),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
