//! The connections to servers that one client connection has: one per endpoint, made when first needed.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use h2::client::{self, SendRequest};
use mantle_proxy_core::reasons::Unserved;
use tokio::sync::OnceCell;
use tokio::task::spawn_local;
use tokio::time::timeout;

use crate::link::LinkHandle;

use super::{CONNECTION_WINDOW, Connected, Key, MAX_HEADERS, Refusal, SEND_BUFFER, STREAM_WINDOW, Service, Serving};

#[derive(Default)]
pub(super) struct Pool(HashMap<Key, Slot>);

impl Pool {
    fn slot(&mut self, key: &Key) -> Slot {
        if let Some(slot) = self.0.get(key) {
            return slot.clone();
        }
        self.0.entry(key.clone()).or_default().clone()
    }
}

/// A connection, or the making of one: those who come meanwhile wait for it.
type Slot = Rc<OnceCell<Pooled>>;

struct Pooled {
    send: SendRequest<Bytes>,
    link: Option<LinkHandle>,
}

/// Leave to send one request to the server at `key`, on a connection that has room for it.
///
/// # Errors
/// The refusal to give: the server cannot be reached, or its connections close as soon as they are made.
pub(super) async fn sender<S: Service>(
    serving: &Serving<S>,
    key: &Key,
    place: &S::Place,
) -> Result<SendRequest<Bytes>, Refusal> {
    for _ in 0..ATTEMPTS {
        let slot = serving.pool.borrow_mut().slot(key);
        // Boxed because it is rare: each request under way is the smaller for it.
        let pooled = match slot.get_or_try_init(|| Box::pin(connect(serving, place))).await {
            Ok(pooled) => pooled,
            Err(refusal) => {
                forget(&serving.pool, key, &slot);
                return Err(refusal);
            }
        };
        if pooled.link.as_ref().is_some_and(LinkHandle::is_leaving) {
            forget(&serving.pool, key, &slot); // its requests go on; new ones move to a new link
            continue;
        }
        let send = pooled.send.clone();
        match send.ready().await {
            Ok(send) => return Ok(send),
            // It was closed while idle, or said goodbye: nothing was sent, so another may be asked.
            Err(_) => forget(&serving.pool, key, &slot),
        }
    }
    Err(CLOSED)
}

async fn connect<S: Service>(serving: &Serving<S>, place: &S::Place) -> Result<Pooled, Refusal> {
    let Connected { io, link } = serving.service.connect(place).await?;
    let mut builder = client::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(MAX_HEADERS)
        .max_send_buffer_size(SEND_BUFFER)
        .enable_push(false);
    let handshake = timeout(HANDSHAKE, builder.handshake(io)).await;
    let (send, connection) = handshake.map_err(|_| CLOSED)?.map_err(|_| CLOSED)?;
    // Ends when the last sender and the last stream are gone, or when the server closes.
    spawn_local(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "HTTP/2 connection to a server ended");
        }
    });
    Ok(Pooled { send, link })
}

/// Lets go of a connection, unless another has taken its place.
fn forget(pool: &RefCell<Pool>, key: &Key, slot: &Slot) {
    let mut pool = pool.borrow_mut();
    if pool.0.get(key).is_some_and(|current| Rc::ptr_eq(current, slot)) {
        pool.0.remove(key);
    }
}

const ATTEMPTS: usize = 3;
const HANDSHAKE: Duration = Duration::from_secs(5);
const CLOSED: Refusal = Refusal { status: 502, reason: Unserved::ServerClosed.label() };
