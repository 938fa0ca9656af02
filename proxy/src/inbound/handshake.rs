//! Mesh TLS of accepted connections: its first bytes, its ClientHello, its end here.

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use mantle_proxy_core::client_hello::{self, ClientHello};
use mantle_proxy_core::reasons::Denied;
use rustls::ServerConfig;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::relay::read_more;

/// Waits for the first bytes without holding anything for them: a crowd of silent connections costs little.
///
/// # Errors
/// `IdentityRequired`: nothing came in time.
pub(super) async fn first_bytes(io: &mut TcpStream) -> Result<BytesMut, Denied> {
    let mut seen = BytesMut::new();
    match tokio::time::timeout(HANDSHAKE, read_more(io, &mut seen, client_hello::MAX_PREFIX)).await {
        Ok(Ok(1..)) => Ok(seen),
        Ok(Ok(_) | Err(_)) | Err(_) => Err(Denied::IdentityRequired),
    }
}

/// Reads until the ClientHello is whole or proves to be none.
pub(super) async fn client_hello(io: &mut TcpStream, seen: &mut BytesMut, limit: Duration) -> ClientHello {
    let whole = async {
        loop {
            match client_hello::parse(seen) {
                ClientHello::NeedMore => {}
                decided => return decided,
            }
            if !matches!(read_more(io, seen, client_hello::MAX_PREFIX).await, Ok(1..)) {
                return ClientHello::NotTls;
            }
        }
    };
    tokio::time::timeout(limit, whole).await.unwrap_or(ClientHello::NotTls)
}

/// Ends mesh TLS here. `seen` is what was read of it already.
pub(super) async fn terminate(
    io: TcpStream,
    seen: &[u8],
    config: Arc<ServerConfig>,
) -> Result<TlsStream<TcpStream>, Denied> {
    let (mut ahead, mut hopeless) = (seen, false);
    let handshake = TlsAcceptor::from(config).accept_with(io, |session| {
        while !ahead.is_empty() && session.read_tls(&mut ahead).is_ok_and(|n| n > 0) {
            hopeless |= session.process_new_packets().is_err();
        }
    });
    // What is wrong already gets its alert, and nothing more is waited for.
    let limit = if hopeless { Duration::ZERO } else { HANDSHAKE };
    match tokio::time::timeout(limit, handshake).await {
        Ok(Ok(tls)) => Ok(tls),
        Ok(Err(_)) | Err(_) => Err(Denied::IdentityRequired),
    }
}
const HANDSHAKE: Duration = Duration::from_secs(10);
