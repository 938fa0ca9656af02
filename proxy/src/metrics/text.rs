//! The Prometheus text of `Metrics` (exposition format 0.0.4): family by family, each series' labels made once.
//!
//! The only place that knows metric names and label spelling.

use std::fmt::{self, Write};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use super::{
    BOUNDS_MS, ControlLabels, Counter, Direction, Http, Labels, Layer, Metrics, Outcome, Side, TlsLabel, Transport,
    Verdict, unix_seconds,
};

/// The `Content-Type` of `Metrics::text`.
pub(crate) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

impl Metrics {
    /// Everything, as a scrape sees it at `now`.
    pub(crate) fn text(&self, now: Instant) -> String {
        let mut out = String::with_capacity(16 * 1024);
        http_text(&mut out, "", labelled(self.https.scrape(now, &self.label_sets), http_labels));
        http_text(&mut out, "control_", labelled(self.controls.scrape(now, &self.label_sets), control_labels));
        self.transport_text(&mut out, now);
        self.authz_text(&mut out, now);
        self.error_text(&mut out, now);
        self.process_text(&mut out);
        out.push_str("# EOF\n");
        out
    }

    fn transport_text(&self, out: &mut String, now: Instant) {
        let series =
            labelled(self.transports.scrape(now, &self.label_sets), |(side, labels)| transport_labels(*side, labels));
        let mut simple = |name: &str, kind: &str, help: &str, value: fn(&Transport) -> u64| {
            family(out, name, kind, help, |out| {
                series.iter().for_each(|(labels, t)| line(out, name, labels, value(t)))
            });
        };
        simple("tcp_open_total", "counter", "Connections opened.", |t| t.opened.load(Relaxed));
        simple("tcp_open_connections", "gauge", "Connections open now.", |t| {
            let closed = t.closed.load(Relaxed);
            t.opened.load(Relaxed).saturating_sub(closed)
        });
        simple("tcp_read_bytes_total", "counter", "Bytes read from peers.", |t| t.read.load(Relaxed));
        simple("tcp_write_bytes_total", "counter", "Bytes written to peers.", |t| t.written.load(Relaxed));
        family(out, "tcp_close_total", "counter", "Connections closed.", |out| {
            for (labels, transport) in &series {
                let mut orderly = transport.closed.load(Relaxed);
                for (errno, count) in &transport.errnos {
                    if let Some(errno) = errno.get() {
                        let count = count.load(Relaxed);
                        orderly = orderly.saturating_sub(count);
                        line(out, "tcp_close_total", &format!("{labels},errno=\"{}\"", errno_name(*errno)), count);
                    }
                }
                line(out, "tcp_close_total", &format!("{labels},errno=\"\""), orderly);
            }
        });
    }

    fn authz_text(&self, out: &mut String, now: Instant) {
        let all = self.verdicts.scrape(now, &self.label_sets);
        let overflow = all.iter().find(|(key, _)| key.is_none()).map(|(_, count)| count.get());
        for (verdict, name, help) in VERDICTS {
            family(out, name, "counter", help, |out| {
                for (key, count) in &all {
                    if let Some((v, labels)) = key
                        && v == verdict
                    {
                        line(out, name, &authz_labels(labels), count.get());
                    }
                }
                // One series for all five: a verdict beyond the cap is counted with the denials, where it is noticed.
                if let (Verdict::HttpDenied, Some(count)) = (verdict, overflow) {
                    line(out, name, OVERFLOW, count);
                }
            });
        }
    }

    fn error_text(&self, out: &mut String, now: Instant) {
        let all = self.errors.scrape(now, &self.label_sets);
        for (direction, layer, name) in [
            (Direction::Inbound, Layer::Http, "inbound_http_errors_total"),
            (Direction::Inbound, Layer::Tcp, "inbound_tcp_errors_total"),
            (Direction::Outbound, Layer::Http, "outbound_http_errors_total"),
            (Direction::Outbound, Layer::Tcp, "outbound_tcp_errors_total"),
        ] {
            family(out, name, "counter", "What could not be carried, by reason.", |out| {
                let mut errors: Vec<(&str, &Counter)> = all
                    .iter()
                    .filter_map(|(key, n)| {
                        key.filter(|(d, l, _)| (*d, *l) == (direction, layer)).map(|(_, _, e)| (e, &**n))
                    })
                    .collect();
                errors.sort_unstable_by_key(|(error, _)| *error);
                for (error, count) in errors {
                    line(out, name, &format!("error=\"{}\"", Escaped(error)), count.get());
                }
            });
        }
    }

    fn process_text(&self, out: &mut String) {
        let cert = &self.certificate;
        let mut one = |name: &str, kind: &str, help: &str, value: u64| {
            family(out, name, kind, help, |out| {
                let _ = writeln!(out, "{name} {value}");
            });
        };
        one(
            "control_identity_cert_expiration_timestamp_seconds",
            "gauge",
            "When our certificate ends.",
            cert.expires.load(Relaxed),
        );
        one(
            "control_identity_cert_refresh_timestamp_seconds",
            "gauge",
            "When our certificate came.",
            cert.refreshed_at.load(Relaxed),
        );
        one("process_start_time_seconds", "gauge", "When this process started.", unix_seconds(self.started));
        if let Some(bytes) = resident_bytes() {
            one("process_resident_memory_bytes", "gauge", "Resident memory.", bytes);
        }
        family(out, "control_identity_cert_refreshes_total", "counter", "Renewals of our certificate.", |out| {
            line(out, "control_identity_cert_refreshes_total", "result=\"ok\"", cert.refreshed.get());
            line(out, "control_identity_cert_refreshes_total", "result=\"error\"", cert.failed.get());
        });
        family(out, "proxy_build_info", "gauge", "What this program is.", |out| {
            let profile = if cfg!(debug_assertions) { "debug" } else { "release" };
            let labels = format!("version=\"{}\",profile=\"{profile}\",vendor=\"mantle\"", env!("CARGO_PKG_VERSION"));
            line(out, "proxy_build_info", &labels, 1);
        });
    }
}

/// The three families of requests, with `prefix` before their names.
fn http_text(out: &mut String, prefix: &str, series: Vec<(String, Arc<Http>)>) {
    let name = format!("{prefix}request_total");
    family(out, &name, "counter", "Requests.", |out| {
        series.iter().for_each(|(labels, http)| line(out, &name, labels, http.requests.load(Relaxed)));
    });
    let name = format!("{prefix}response_total");
    family(out, &name, "counter", "Responses that ended.", |out| {
        for (labels, http) in &series {
            for (outcome, count) in http.responses.iter().filter_map(|slot| slot.get()) {
                line(out, &name, &format!("{labels},{}", OutcomeLabels(outcome)), count.load(Relaxed));
            }
        }
    });
    let name = format!("{prefix}response_latency_ms");
    family(out, &name, "histogram", "Time from a request's first byte to its response's last.", |out| {
        series.iter().for_each(|(labels, http)| latency_text(out, &name, labels, http));
    });
}

const VERDICTS: &[(Verdict, &str, &str)] = &[
    (Verdict::HttpAllowed, "inbound_http_authz_allow_total", "Requests that the port's policy admitted."),
    (Verdict::HttpDenied, "inbound_http_authz_deny_total", "Requests that the port's policy refused."),
    (Verdict::HttpRouteNotFound, "inbound_http_route_not_found_total", "Requests that no route of the policy matches."),
    (Verdict::TcpAllowed, "inbound_tcp_authz_allow_total", "Connections that the port's policy admitted."),
    (Verdict::TcpDenied, "inbound_tcp_authz_deny_total", "Connections that the port's policy refused."),
    (Verdict::TcpTerminated, "inbound_tcp_authz_terminate_total", "Connections that a change of policy ended."),
];

const OVERFLOW: &str = "overflow=\"true\"";

fn family(out: &mut String, name: &str, kind: &str, help: &str, body: impl FnOnce(&mut String)) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
    body(out);
}

fn line(out: &mut String, name: &str, labels: &str, value: u64) {
    let _ = writeln!(out, "{name}{{{labels}}} {value}");
}

/// Series with their label text, in a stable order.
fn labelled<K, V>(series: Vec<(Option<K>, Arc<V>)>, labels: impl Fn(&K) -> String) -> Vec<(String, Arc<V>)> {
    let mut all: Vec<_> = series
        .into_iter()
        .map(|(key, value)| (key.as_ref().map_or_else(|| OVERFLOW.to_owned(), &labels), value))
        .collect();
    all.sort_unstable_by(|a, b| a.0.cmp(&b.0));
    all
}

fn latency_text(out: &mut String, name: &str, labels: &str, http: &Http) {
    for series in http.latencies.iter().filter_map(|slot| slot.get()) {
        let status = StatusCode(series.status);
        let mut cumulative = 0;
        for (at, bucket) in series.buckets.iter().enumerate() {
            cumulative += bucket.load(Relaxed);
            let bound = BOUNDS_MS.get(at).map_or_else(|| "+Inf".to_owned(), ToString::to_string);
            line(out, &format!("{name}_bucket"), &format!("{labels},{status},le=\"{bound}\""), cumulative);
        }
        line(out, &format!("{name}_count"), &format!("{labels},{status}"), cumulative);
        let sum = series.sum_us.load(Relaxed);
        let _ = writeln!(out, "{name}_sum{{{labels},{status}}} {}.{:03}", sum / 1000, sum % 1000);
    }
}

fn http_labels(labels: &Labels) -> String {
    let mut out = direction(labels).to_owned();
    authority(&mut out, labels);
    target(&mut out, labels);
    tls(&mut out, &labels.tls, labels.direction);
    endpoint(&mut out, labels);
    policy(&mut out, labels, true);
    out
}

fn control_labels(labels: &ControlLabels) -> String {
    let mut out = format!("addr=\"{}\"", Escaped(&labels.addr));
    tls(&mut out, &labels.tls, Direction::Outbound);
    out
}

fn transport_labels(side: Side, labels: &Labels) -> String {
    let mut out = direction(labels).to_owned();
    out.push_str(match side {
        Side::Src => ",peer=\"src\"",
        Side::Dst => ",peer=\"dst\"",
    });
    match (labels.direction, side) {
        // Towards the application of this pod there is nothing to tell apart.
        (Direction::Inbound, Side::Dst) => out.push_str(",tls=\"no_identity\",no_tls_reason=\"loopback\""),
        (Direction::Inbound, Side::Src) => {
            target(&mut out, labels);
            tls(&mut out, &labels.tls, labels.direction);
            policy(&mut out, labels, false);
        }
        (Direction::Outbound, Side::Src) => {
            target(&mut out, labels);
            tls(&mut out, &labels.tls, labels.direction);
        }
        (Direction::Outbound, Side::Dst) => {
            authority(&mut out, labels);
            target(&mut out, labels);
            tls(&mut out, &labels.tls, labels.direction);
            endpoint(&mut out, labels);
        }
    }
    out
}

fn authz_labels(labels: &Labels) -> String {
    let mut out = format!(
        "target_addr=\"{}\",target_ip=\"{}\",target_port=\"{}\"",
        labels.target,
        labels.target.ip(),
        labels.target.port()
    );
    policy(&mut out, labels, true);
    tls(&mut out, &labels.tls, labels.direction);
    out
}

fn direction(labels: &Labels) -> &'static str {
    match labels.direction {
        Direction::Inbound => "direction=\"inbound\"",
        Direction::Outbound => "direction=\"outbound\"",
    }
}

fn authority(out: &mut String, labels: &Labels) {
    if let Some(authority) = &labels.authority {
        let _ = write!(out, ",authority=\"{}\"", Escaped(authority));
    }
}

fn target(out: &mut String, labels: &Labels) {
    let _ = write!(
        out,
        ",target_addr=\"{}\",target_ip=\"{}\",target_port=\"{}\"",
        labels.target,
        labels.target.ip(),
        labels.target.port()
    );
}

fn tls(out: &mut String, tls: &TlsLabel, direction: Direction) {
    let _ = match (tls, direction) {
        (TlsLabel::Mutual(id), Direction::Inbound) => write!(out, ",tls=\"true\",client_id=\"{}\"", Escaped(id)),
        (TlsLabel::Mutual(id), Direction::Outbound) => write!(out, ",tls=\"true\",server_id=\"{}\"", Escaped(id)),
        (TlsLabel::Passthru(sni), _) => write!(out, ",tls=\"opaque\",sni=\"{}\"", Escaped(sni)),
        (TlsLabel::None(reason), _) => write!(out, ",tls=\"no_identity\",no_tls_reason=\"{reason}\""),
    };
}

fn endpoint(out: &mut String, labels: &Labels) {
    for (key, value) in labels.dst.iter() {
        let _ = write!(out, ",dst_{}=\"{}\"", LabelName(key), Escaped(value));
    }
}

fn policy(out: &mut String, labels: &Labels, http: bool) {
    let Some(policy) = &labels.policy else { return };
    let [group, kind, name] = &policy.srv;
    let port = policy.srv_port;
    let _ = write!(
        out,
        ",srv_group=\"{}\",srv_kind=\"{}\",srv_name=\"{}\",srv_port=\"{port}\"",
        Escaped(group),
        Escaped(kind),
        Escaped(name)
    );
    let parts = [("route", policy.route.as_ref().filter(|_| http)), ("authz", policy.authz.as_ref())];
    for (prefix, names) in parts {
        if let Some([group, kind, name]) = names {
            let (group, kind, name) = (Escaped(group), Escaped(kind), Escaped(name));
            let _ = write!(out, ",{prefix}_group=\"{group}\",{prefix}_kind=\"{kind}\",{prefix}_name=\"{name}\"");
        }
    }
}

struct OutcomeLabels<'a>(&'a Outcome);

impl fmt::Display for OutcomeLabels<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let classification = if self.0.is_success() { "success" } else { "failure" };
        write!(f, "{},classification=\"{classification}\"", StatusCode(self.0.status))?;
        if let Some(grpc) = self.0.grpc {
            write!(f, ",grpc_status=\"{grpc}\"")?;
        }
        if self.0.failed {
            f.write_str(",error=\"unexpected\"")?;
        }
        Ok(())
    }
}

struct StatusCode(u16);

impl fmt::Display for StatusCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == 0 { f.write_str("status_code=\"other\"") } else { write!(f, "status_code=\"{}\"", self.0) }
    }
}

/// A label value: backslash, quote and line feed as the format wants them, other control characters as `?`.
struct Escaped<'a>(&'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.chars() {
            match c {
                '\\' => f.write_str("\\\\")?,
                '"' => f.write_str("\\\"")?,
                '\n' => f.write_str("\\n")?,
                c if c.is_control() => f.write_char('?')?,
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

/// What the control plane calls a label, with anything that a label name may not hold as `_`.
struct LabelName<'a>(&'a str);

impl fmt::Display for LabelName<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|c| f.write_char(if c.is_ascii_alphanumeric() { c } else { '_' }))
    }
}

fn errno_name(errno: i32) -> String {
    let name = match errno {
        libc::ECONNRESET => "ECONNRESET",
        libc::ECONNREFUSED => "ECONNREFUSED",
        libc::ECONNABORTED => "ECONNABORTED",
        libc::EPIPE => "EPIPE",
        libc::ETIMEDOUT => "ETIMEDOUT",
        libc::EHOSTUNREACH => "EHOSTUNREACH",
        libc::ENETUNREACH => "ENETUNREACH",
        libc::ENOTCONN => "ENOTCONN",
        libc::EMFILE => "EMFILE",
        other => return other.to_string(),
    };
    name.to_owned()
}

/// From `/proc`; `None` where there is none.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}
