//! Who connected to this pod: a bounded table that outlives the connections, served as `mantle.v1.Edges` beside tap.
//!
//! Outbound metrics name both ends of an edge; a client outside the mesh has no outbound metrics, so its server's
//! inbound proxy remembers it here. Rows hold the peer's own words (SNI): whoever prints them escapes them.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::metrics::TlsLabel;

/// Rows kept. Beyond it the longest-unseen row without an open connection makes room.
pub(crate) const MAX_ROWS: usize = 1024;

#[derive(Debug, Default)]
pub(crate) struct Edges {
    rows: Mutex<HashMap<Key, Arc<Row>>>,
    overflowed: AtomicU64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    client: IpAddr,
    port: u16,
    tls: TlsLabel,
}

#[derive(Debug, Default)]
struct Row {
    open: AtomicU64,
    total: AtomicU64,
    last_seen_ms: AtomicU64,
}

/// A row as a value, for `mantle.v1.Edges`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EdgeRow {
    pub(crate) client: IpAddr,
    pub(crate) port: u16,
    pub(crate) tls: TlsLabel,
    pub(crate) open: u64,
    pub(crate) total: u64,
    pub(crate) last_seen_ms: u64,
}

/// One open connection; dropping it says that it closed.
#[derive(Debug)]
pub(crate) struct EdgeGuard(Option<Arc<Row>>);

impl Edges {
    /// Counts a connection from `client` to this pod's `port`.
    pub(crate) fn opened(&self, client: IpAddr, port: u16, tls: &TlsLabel) -> EdgeGuard {
        let key = Key { client: client.to_canonical(), port, tls: tls.clone() };
        let mut rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        let row = match rows.get(&key) {
            Some(row) => row.clone(),
            None => {
                if rows.len() >= MAX_ROWS && !forget_one(&mut rows) {
                    self.overflowed.fetch_add(1, Relaxed);
                    return EdgeGuard(None);
                }
                rows.entry(key).or_default().clone()
            }
        };
        row.open.fetch_add(1, Relaxed);
        row.total.fetch_add(1, Relaxed);
        row.last_seen_ms.store(unix_ms(), Relaxed);
        EdgeGuard(Some(row))
    }

    /// Every row, in no order, and how many connections found the table full.
    pub(crate) fn snapshot(&self) -> (Vec<EdgeRow>, u64) {
        let rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        let rows = rows.iter().map(|(key, row)| EdgeRow {
            client: key.client,
            port: key.port,
            tls: key.tls.clone(),
            open: row.open.load(Relaxed),
            total: row.total.load(Relaxed),
            last_seen_ms: row.last_seen_ms.load(Relaxed),
        });
        (rows.collect(), self.overflowed.load(Relaxed))
    }
}

impl Drop for EdgeGuard {
    fn drop(&mut self) {
        if let Some(row) = &self.0 {
            row.open.fetch_sub(1, Relaxed);
            row.last_seen_ms.store(unix_ms(), Relaxed);
        }
    }
}

/// Drops the longest-unseen row that has nothing open; `false` if every row is in use.
fn forget_one(rows: &mut HashMap<Key, Arc<Row>>) -> bool {
    let idle = rows.iter().filter(|(_, row)| row.open.load(Relaxed) == 0);
    let oldest = idle.min_by_key(|(_, row)| row.last_seen_ms.load(Relaxed)).map(|(key, _)| key.clone());
    oldest.is_some_and(|key| rows.remove(&key).is_some())
}

fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use mantle_proxy_core::reasons::NoTls;

    use super::*;

    fn client(n: u32) -> IpAddr {
        Ipv4Addr::from(0x0a00_0000 + n).into()
    }

    const PLAIN: TlsLabel = TlsLabel::None(NoTls::NotProvidedByRemote);

    #[test]
    fn a_row_counts_what_is_open_and_what_was() {
        let edges = Edges::default();
        let first = edges.opened(client(1), 80, &PLAIN);
        let second = edges.opened("::ffff:10.0.0.1".parse().expect("ip"), 80, &PLAIN);
        let _tls = edges.opened(client(1), 80, &TlsLabel::Mutual(Arc::from("web")));
        drop(first);
        let (rows, overflowed) = edges.snapshot();
        assert_eq!((rows.len(), overflowed), (2, 0));
        let row = rows.iter().find(|row| row.tls == PLAIN).expect("plain row");
        assert_eq!((row.client, row.port, row.open, row.total), (client(1), 80, 1, 2));
        assert!(row.last_seen_ms > 0);
        drop(second);
        assert!(edges.snapshot().0.iter().any(|row| row.tls == PLAIN && row.open == 0));
    }

    #[test]
    fn a_full_table_forgets_the_idle_and_counts_what_it_cannot_hold() {
        let edges = Edges::default();
        let mut held: Vec<_> = (0..MAX_ROWS as u32).map(|n| edges.opened(client(n), 80, &PLAIN)).collect();
        let refused = edges.opened(client(5000), 80, &PLAIN);
        assert!(refused.0.is_none());
        assert_eq!(edges.snapshot().1, 1);
        held.remove(7);
        let kept = edges.opened(client(5001), 80, &PLAIN);
        assert!(kept.0.is_some());
        let (rows, overflowed) = edges.snapshot();
        assert_eq!((rows.len(), overflowed), (MAX_ROWS, 1));
        assert!(rows.iter().all(|row| row.client != client(7)));
    }
}
