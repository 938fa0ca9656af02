//! Tap: who is watching, which requests match, and the events that leave. Serves `io.linkerd.proxy.tap` on port 4190.
//!
//! The data path asks `Taps::active()` (one relaxed load) per request and builds a `TapRequest` only when someone watches.
//! An observer that reads slowly loses events: nothing here ever waits. The service itself is in `tap/serve.rs`.

mod serve;
pub(crate) use serve::serve;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ::http::request::Parts;
use linkerd2_proxy_api::http_types::{self, Headers};
use linkerd2_proxy_api::tap::tap_event::{self, EndpointMeta, Http, ProxyDirection, http};
use linkerd2_proxy_api::tap::{Eos, TapEvent, eos};
use mantle_proxy_core::http1;
use mantle_proxy_core::tapmatch::{Subject, TapMatch};
use tokio::sync::mpsc;

use crate::metrics::{Direction, Outcome, TlsLabel};

/// A request as tap sees it.
pub(crate) struct TapRequest<'a> {
    pub(crate) direction: Direction,
    pub(crate) src: SocketAddr,
    pub(crate) dst: SocketAddr,
    pub(crate) tls: &'a TlsLabel,
    pub(crate) dst_labels: &'a [(String, String)],
    pub(crate) head: &'a dyn TapHead,
}

/// A request's head, whatever its HTTP version. Strings are the peer's own bytes: whoever prints them escapes them.
pub(crate) trait TapHead {
    fn method(&self) -> &str;
    fn scheme(&self) -> &str;
    fn authority(&self) -> &str;
    fn path(&self) -> &str;
    /// Visits each header; called only if an observer extracts headers.
    fn headers(&self, visit: &mut dyn FnMut(&str, &[u8]));
}

impl TapHead for http1::Request<'_> {
    fn method(&self) -> &str {
        self.method
    }
    fn scheme(&self) -> &str {
        "http"
    }
    fn authority(&self) -> &str {
        self.authority.unwrap_or_default()
    }
    fn path(&self) -> &str {
        self.path
    }
    fn headers(&self, visit: &mut dyn FnMut(&str, &[u8])) {
        self.head.headers().for_each(|(name, value)| visit(name, value));
    }
}

impl TapHead for Parts {
    fn method(&self) -> &str {
        self.method.as_str()
    }
    fn scheme(&self) -> &str {
        self.uri.scheme_str().unwrap_or("http")
    }
    fn authority(&self) -> &str {
        self.uri.authority().map_or("", |authority| authority.as_str())
    }
    fn path(&self) -> &str {
        self.uri.path()
    }
    fn headers(&self, visit: &mut dyn FnMut(&str, &[u8])) {
        self.headers.iter().for_each(|(name, value)| visit(name.as_str(), value.as_bytes()));
    }
}

/// Calls its argument with each header's name and value.
pub(crate) type VisitHeaders<'a> = &'a dyn Fn(&mut dyn FnMut(&str, &[u8]));

/// Everyone who is watching. Shared by all threads.
#[derive(Debug, Default)]
pub(crate) struct Taps {
    active: AtomicUsize,
    next_base: AtomicU32,
    taps: Mutex<Vec<Arc<Tap>>>,
}

/// One observer: a call of `Tap.Observe`.
#[derive(Debug)]
struct Tap {
    base: u32,
    matches: TapMatch,
    extract_headers: bool,
    /// Requests still to be tapped.
    left: AtomicU32,
    next_stream: AtomicU64,
    events: mpsc::Sender<TapEvent>,
}

/// Observers at once.
pub(crate) const MAX_TAPS: usize = 64;

/// Events that wait for one observer; beyond it they are dropped.
pub(crate) const MAX_WAITING: usize = 400;

impl Taps {
    /// Whether anyone watches at all.
    pub(crate) fn active(&self) -> bool {
        self.active.load(Relaxed) > 0
    }

    /// Tells every observer that `request` matches; `None`: none does.
    pub(crate) fn open(&self, request: &TapRequest<'_>) -> Option<TapStream> {
        let head = request.head;
        let subject = Subject {
            src: request.src,
            dst: request.dst,
            scheme: head.scheme(),
            method: head.method(),
            authority: head.authority(),
            path: head.path(),
            dst_labels: request.dst_labels,
            route_labels: &[],
        };
        let mut taps = self.lock();
        let mut parts = Vec::new();
        for tap in taps.iter().filter(|tap| tap.matches.matches(&subject)) {
            // An observer whose limit is used up is on its way out of the list.
            if tap.left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_ok() {
                let stream = tap.next_stream.fetch_add(1, Relaxed);
                parts.push(Part { id: http::StreamId { base: tap.base, stream }, tap: tap.clone() });
            }
        }
        if parts.is_empty() {
            return None;
        }
        taps.retain(|tap| tap.left.load(Relaxed) > 0);
        self.active.store(taps.len(), Relaxed);
        drop(taps);

        let stream = TapStream {
            parts,
            template: template(request),
            opened: Instant::now(),
            responded: None,
            trailers: None,
            ended: false,
        };
        for part in &stream.parts {
            let headers = part.tap.extract_headers.then(|| collect(&|visit| head.headers(visit)));
            part.send(
                &stream.template,
                http::Event::RequestInit(http::RequestInit {
                    id: Some(part.id),
                    method: Some(method(head.method())),
                    scheme: Some(scheme(head.scheme())),
                    authority: head.authority().to_owned(),
                    path: head.path().to_owned(),
                    headers,
                }),
            );
        }
        Some(stream)
    }

    /// A new observer of `limit` requests; `None`: there are too many.
    fn add(
        self: &Arc<Self>,
        matches: TapMatch,
        extract_headers: bool,
        limit: u32,
    ) -> Option<(mpsc::Receiver<TapEvent>, Registration)> {
        let mut taps = self.lock();
        if taps.len() >= MAX_TAPS {
            return None;
        }
        let (events, receiver) = mpsc::channel(MAX_WAITING);
        let base = self.next_base.fetch_add(1, Relaxed);
        let (left, next_stream) = (AtomicU32::new(limit), AtomicU64::new(1));
        taps.push(Arc::new(Tap { base, matches, extract_headers, left, next_stream, events }));
        self.active.store(taps.len(), Relaxed);
        Some((receiver, Registration { taps: self.clone(), base }))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Tap>>> {
        self.taps.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An observer's place in the list; dropping it (the call ended) removes it.
#[derive(Debug)]
struct Registration {
    taps: Arc<Taps>,
    base: u32,
}

impl Drop for Registration {
    fn drop(&mut self) {
        let mut taps = self.taps.lock();
        taps.retain(|tap| tap.base != self.base);
        self.taps.active.store(taps.len(), Relaxed);
    }
}

/// The rest of a tapped request: one value carried by the request until its end. Dropping it unfinished sends a reset end.
#[derive(Debug)]
pub(crate) struct TapStream {
    parts: Vec<Part>,
    /// What all events of the request share.
    template: TapEvent,
    opened: Instant,
    responded: Option<Instant>,
    /// For the end, if an observer extracts headers.
    trailers: Option<Headers>,
    ended: bool,
}

#[derive(Debug)]
struct Part {
    tap: Arc<Tap>,
    id: http::StreamId,
}

impl TapStream {
    pub(crate) fn response(&mut self, status: u16, headers: VisitHeaders<'_>, since_request: Duration) {
        self.responded = Some(Instant::now());
        for part in &self.parts {
            part.send(
                &self.template,
                http::Event::ResponseInit(http::ResponseInit {
                    id: Some(part.id),
                    since_request_init: wire(since_request),
                    http_status: u32::from(status),
                    headers: part.tap.extract_headers.then(|| collect(headers)),
                }),
            );
        }
    }

    pub(crate) fn trailers(&mut self, trailers: VisitHeaders<'_>) {
        let wanted = self.parts.iter().any(|part| part.tap.extract_headers);
        self.trailers = wanted.then(|| collect(trailers));
    }

    /// `bytes`: of the response's body. `since_response`: since its head.
    pub(crate) fn end(mut self, outcome: Outcome, bytes: u64, since_request: Duration, since_response: Duration) {
        let eos = match outcome {
            Outcome { failed: true, .. } => Some(eos::End::ResetErrorCode(u32::from(h2::Reason::CANCEL))),
            Outcome { grpc: Some(code), .. } => Some(eos::End::GrpcStatusCode(u32::from(code))),
            Outcome { grpc: None, .. } => None,
        };
        self.send_end(eos, bytes, since_request, since_response);
    }

    fn send_end(&mut self, end: Option<eos::End>, bytes: u64, since_request: Duration, since_response: Duration) {
        self.ended = true;
        for part in &self.parts {
            part.send(
                &self.template,
                http::Event::ResponseEnd(http::ResponseEnd {
                    id: Some(part.id),
                    since_request_init: wire(since_request),
                    since_response_init: wire(since_response),
                    response_bytes: bytes,
                    eos: end.map(|end| Eos { end: Some(end) }),
                    trailers: self.trailers.clone().filter(|_| part.tap.extract_headers),
                }),
            );
        }
    }
}

impl Drop for TapStream {
    fn drop(&mut self) {
        if !self.ended {
            let reset = eos::End::ResetErrorCode(u32::from(h2::Reason::CANCEL));
            let since_response = self.responded.map(|at| at.elapsed()).unwrap_or_default();
            self.send_end(Some(reset), 0, self.opened.elapsed(), since_response);
        }
    }
}

impl Part {
    fn send(&self, template: &TapEvent, event: http::Event) {
        let event = TapEvent { event: Some(tap_event::Event::Http(Http { event: Some(event) })), ..template.clone() };
        // Full: the observer is slow. Closed: it is gone. Either way the request goes on.
        let _ = self.tap.events.try_send(event);
    }
}

fn template(request: &TapRequest<'_>) -> TapEvent {
    let mut source = HashMap::new();
    let mut destination: HashMap<_, _> = request.dst_labels.iter().cloned().collect();
    // TLS is the client's on the way in and the server's on the way out.
    let (labels, peer, direction) = match request.direction {
        Direction::Inbound => (&mut source, "client_id", ProxyDirection::Inbound),
        Direction::Outbound => (&mut destination, "server_id", ProxyDirection::Outbound),
    };
    let tls = match request.tls {
        TlsLabel::Mutual(id) => {
            labels.insert(peer.to_owned(), id.to_string());
            "true"
        }
        TlsLabel::Passthru(sni) => {
            labels.insert("sni".to_owned(), sni.to_string());
            "passthru"
        }
        TlsLabel::None(reason) => reason.label(),
    };
    labels.insert("tls".to_owned(), tls.to_owned());
    TapEvent {
        source: Some(request.src.into()),
        source_meta: Some(EndpointMeta { labels: source }),
        route_meta: None,
        destination: Some(request.dst.into()),
        destination_meta: Some(EndpointMeta { labels: destination }),
        proxy_direction: direction.into(),
        event: None,
    }
}

fn collect(headers: VisitHeaders<'_>) -> Headers {
    let mut all = Vec::new();
    headers(&mut |name, value| all.push(http_types::headers::Header { name: name.to_owned(), value: value.to_vec() }));
    Headers { headers: all }
}

fn method(name: &str) -> http_types::HttpMethod {
    use http_types::http_method::{Registered, Type};
    let kind = Registered::from_str_name(name)
        .map_or_else(|| Type::Unregistered(name.to_owned()), |known| Type::Registered(known.into()));
    http_types::HttpMethod { r#type: Some(kind) }
}

fn scheme(name: &str) -> http_types::Scheme {
    use http_types::scheme::{Registered, Type};
    let kind = match name {
        "http" => Type::Registered(Registered::Http.into()),
        "https" => Type::Registered(Registered::Https.into()),
        other => Type::Unregistered(other.to_owned()),
    };
    http_types::Scheme { r#type: Some(kind) }
}

fn wire(duration: Duration) -> Option<prost_types::Duration> {
    prost_types::Duration::try_from(duration).ok()
}

#[cfg(test)]
mod tests;
