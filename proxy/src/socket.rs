//! Sockets: what the kernel knows of a connection, and the options that the proxy's own sockets carry.
//!
//! The only `unsafe` beside `redirect.rs`. Knows nothing of TLS, protocols or policy.

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

/// Where a redirected connection wanted to go (`SO_ORIGINAL_DST`, v4-mapped addresses as v4).
///
/// # Errors
/// The kernel has no such record: the connection was not redirected and connection tracking is off.
pub(crate) fn original_dst(io: &TcpStream) -> io::Result<SocketAddr> {
    let sock = SockRef::from(io);
    let addr = match canonical(io.local_addr()?) {
        SocketAddr::V4(_) => sock.original_dst_v4()?,
        SocketAddr::V6(_) => sock.original_dst_v6()?,
    };
    addr.as_socket().map(canonical).ok_or_else(|| io::Error::other("the original destination is not an IP address"))
}

/// The same address with a v4-mapped IPv6 address written as IPv4.
pub(crate) fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

/// The options of the proxy's own connections.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dial {
    /// `SO_MARK`, where the redirect exempts the proxy by mark.
    pub(crate) mark: Option<u32>,
    pub(crate) timeout: Duration,
}

/// Connects to `addr` with the proxy's socket options.
///
/// # Errors
/// The connection was refused, could not be made, or was not there after `dial.timeout` (`TimedOut`).
pub(crate) async fn connect(addr: SocketAddr, dial: Dial) -> io::Result<TcpStream> {
    let socket = if addr.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    if let Some(mark) = dial.mark {
        SockRef::from(&socket).set_mark(mark)?;
    }
    set_options(&socket)?;
    match tokio::time::timeout(dial.timeout, socket.connect(addr)).await {
        Ok(connected) => connected,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// Gives a connection up so that its peer sees it broken, not ended: what was sent so far must not pass for the whole.
pub(crate) trait Abort {
    /// To be dropped at once after this.
    fn abort(&self);
}

impl Abort for TcpStream {
    /// Closing it will reset it.
    fn abort(&self) {
        // A socket that refuses this is gone already.
        let _ = SockRef::from(self).set_linger(Some(Duration::ZERO));
    }
}

impl Abort for tokio_rustls::server::TlsStream<TcpStream> {
    /// TLS that ends without a `close_notify` is truncated for whoever reads it.
    fn abort(&self) {
        self.get_ref().0.abort();
    }
}

impl<T: Abort> Abort for &mut T {
    fn abort(&self) {
        (**self).abort();
    }
}

/// Binds and listens; several threads may share the address (`share`).
///
/// # Errors
/// The address is in use or may not be bound.
pub(crate) fn listen(addr: SocketAddr, share: bool) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(share)?;
    if addr.is_ipv6() {
        socket.set_only_v6(false)?; // whatever the sysctl says: IPv4 comes as mapped addresses
    }
    socket.set_nonblocking(true)?;
    set_options(&socket)?; // accepted sockets inherit them
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

fn set_options(socket: &impl AsFd) -> io::Result<()> {
    let socket = SockRef::from(socket);
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE).with_retries(3))
}

/// Accepts until the caller drops it: hands each connection to `serve` (which must only spawn) and never stops for an error.
///
/// At the file limit connections are accepted on a spare descriptor, one by one, and closed, so that their clients are
/// told at once; `refused` counts each. After some of them the loop pauses briefly: a full table must not keep the
/// thread from those who are served.
pub(crate) async fn accept(
    listener: &TcpListener,
    mut serve: impl FnMut(TcpStream, SocketAddr),
    mut refused: impl FnMut(&io::Error),
) {
    let mut spare = File::open("/dev/null").ok();
    loop {
        let error = match listener.accept().await {
            Ok((io, peer)) => {
                serve(io, canonical(peer));
                continue;
            }
            Err(error) => error,
        };
        if is_exhausted(&error) {
            drop(spare.take());
            for _ in 0..REFUSALS {
                let Ok(Ok(_closed)) = tokio::time::timeout(Duration::ZERO, listener.accept()).await else { break };
                refused(&error);
            }
            spare = File::open("/dev/null").ok();
            tokio::time::sleep(BACK_OFF).await;
        } // else: that one connection failed before it was accepted (ECONNABORTED and the like)
    }
}

fn is_exhausted(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}

/// Raises the soft limit of open files to the hard one; returns the limit in force.
///
/// # Errors
/// The kernel refused to say or to change the limit.
#[allow(unsafe_code)]
pub(crate) fn raise_file_limit() -> io::Result<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls only read or write `limit`, a valid local value that outlives them.
    let failed = unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) != 0 || {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) != 0
        }
    };
    if failed { Err(io::Error::last_os_error()) } else { Ok(limit.rlim_cur) }
}

/// Keeps the kernel from backing this process's small heap with huge pages, where it would do so unasked: an idle proxy
/// would cost several MiB more. A kernel that refuses changes nothing else.
#[allow(unsafe_code)]
pub(crate) fn no_huge_pages() {
    // SAFETY: changes a flag of this process, takes no pointer.
    unsafe {
        libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0);
    }
}

const BACKLOG: i32 = 4096;
const KEEPALIVE: Duration = Duration::from_secs(10);
/// Connections refused between two pauses.
const REFUSALS: usize = 64;
const BACK_OFF: Duration = Duration::from_millis(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn connecting_to_a_closed_port_says_so() {
        let port = listen("127.0.0.1:0".parse().unwrap(), false).unwrap().local_addr().unwrap();
        let error = connect(port, Dial { mark: None, timeout: Duration::from_secs(5) }).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }

    #[test]
    fn mapped_addresses_are_written_as_v4() {
        assert_eq!(canonical("[::ffff:10.0.0.1]:80".parse().unwrap()), "10.0.0.1:80".parse().unwrap());
    }
}
