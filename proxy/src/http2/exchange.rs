//! One request and its response: both bodies at once, trailers, resets.
//!
//! Each direction is a loop that holds one chunk at a time and gives the sender credit only when the receiver has taken
//! it. A direction that fails resets the other side with the same reason.

use std::future::{Future, poll_fn};
use std::io::ErrorKind;
use std::pin::{Pin, pin};
use std::task::Poll;

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::request::Parts;
use http::{HeaderMap, Request, Response, Version};
use mantle_proxy_core::reasons::{BadHttp, Unserved};
use tokio::time::Instant;

use super::head::{clean, grpc_status, is_grpc, strip_reserved};
use super::pool::sender;
use super::{Picked, Record, Refusal, Service, Serving};

/// Sends a request to the server that the service picks and its response to the client.
///
/// # Errors
/// The refusal to give to the client, with the means to do so: nothing was answered yet.
pub(super) async fn run<S: Service>(
    serving: &Serving<S>,
    mut parts: Parts,
    body: RecvStream,
    mut respond: SendResponse<Bytes>,
) -> Result<(), (Refusal, SendResponse<Bytes>)> {
    let bodiless = body.is_end_stream();
    let (mut body, mut attempt) = (Some(body), 1);
    loop {
        let placed = tokio::select! {
            placed = place(serving, &mut parts) => placed,
            _ = gone(&mut respond) => return Ok(()),
        };
        let (Picked { place, strip_response, .. }, mut send) = match placed {
            Ok(placed) => placed,
            Err(refusal) => return Err((refusal, respond)),
        };
        // A request that is only a head can be sent again. Boxed: it would weigh on every request under way.
        let spare = (bodiless && attempt < ATTEMPTS).then(|| Box::new(parts.clone()));
        if parts.uri.authority().is_none() {
            parts.version = Version::HTTP_11; // how `h2` is told that the target has a path alone
        }
        let revoked = serving.service.revoked(&place, &parts);
        let mut ticket = serving.service.begin(place, &parts);
        let sent = Instant::now();
        let mut answered = false;
        let outcome = match send.send_request(Request::from_parts(parts, ()), bodiless) {
            Ok((response, upstream)) => {
                drop(send);
                // Both directions at once: a server may answer before it has read, a client may speak after it has heard.
                let upload = upload(body.take(), upstream);
                let download = download(response, &mut respond, &mut ticket, &mut answered, strip_response, sent);
                tokio::select! {
                    outcome = both(upload, download) => outcome,
                    refusal = revoked => Err(Failed::Refused(refusal)),
                }
            }
            Err(error) if !error.is_io() && error.reason().is_none() => Err(Failed::Refused(BAD_REQUEST)),
            Err(error) => Err(no_answer(&error)),
        };
        ticket.end(outcome.is_err());
        match (outcome, spare) {
            (Ok(()) | Err(Failed::ReceiverGone | Failed::Passed), _) => return Ok(()),
            // The server has done nothing of it (RFC 9113 8.7). Without a spare, its client may still send it again.
            (Err(Failed::Reset(Reason::REFUSED_STREAM)), Some(spare)) => parts = *spare,
            (Err(Failed::Reset(reason)), _) => {
                respond.send_reset(reason);
                return Ok(());
            }
            (Err(Failed::Refused(_)), _) if answered => {
                respond.send_reset(Reason::CANCEL); // revoked in the middle
                return Ok(());
            }
            (Err(Failed::Refused(refusal)), _) => return Err((refusal, respond)),
        }
        attempt += 1;
    }
}

/// A place and leave to send there; other places are tried while connecting fails.
async fn place<S: Service>(
    serving: &Serving<S>,
    parts: &mut Parts,
) -> Result<(Picked<S::Place>, SendRequest<Bytes>), Refusal> {
    let mut attempt = 1;
    loop {
        let picked = serving.service.pick(parts).await?;
        match sender(serving, &picked.key, &picked.place).await {
            Ok(send) => return Ok((picked, send)),
            Err(refusal) => {
                let again = serving.service.unreachable(picked.place);
                if !again || attempt == ATTEMPTS {
                    return Err(refusal);
                }
            }
        }
        attempt += 1;
    }
}

/// Both directions to their ends; a failed download drops what is left of the upload, which resets it at the server.
async fn both(
    upload: impl Future<Output = ()>,
    download: impl Future<Output = Result<(), Failed>>,
) -> Result<(), Failed> {
    let (mut upload, mut download) = (pin!(upload), pin!(download));
    let mut uploading = true;
    let outcome = loop {
        tokio::select! {
            outcome = &mut download => break outcome,
            () = &mut upload, if uploading => uploading = false,
        }
    };
    if outcome.is_ok() && uploading {
        upload.await;
    }
    outcome
}

/// Why a response did not arrive whole.
enum Failed {
    /// The server reset the request before it answered, or its connection said that it will never look at it
    /// (`REFUSED_STREAM`).
    Reset(Reason),
    /// There is no server, its connection ended before it answered, or policy or trust changed.
    Refused(Refusal),
    /// Whom the bytes are for wants no more of them.
    ReceiverGone,
    /// The bytes broke off, and their receiver was told by a reset.
    Passed,
}

/// The response with its body and trailers.
async fn download(
    response: ResponseFuture,
    respond: &mut SendResponse<Bytes>,
    ticket: &mut impl Record,
    answered: &mut bool,
    strip: bool,
    sent: Instant,
) -> Result<(), Failed> {
    let (mut head, body) = answer(response, respond, strip).await?.into_parts();
    clean(&mut head.headers);
    if strip {
        strip_reserved(&mut head.headers);
    }
    ticket.response(head.status.as_u16(), &|each| visit(&head.headers, each), sent.elapsed());
    let grpc = is_grpc(&head.headers);
    let in_head = grpc_status(&head.headers);
    let over = body.is_end_stream();
    *answered = true;
    let client = respond.send_response(Response::from_parts(head, ()), over).map_err(|_| Failed::ReceiverGone)?;
    let trailers = if over { None } else { pump(body, client, strip, |n| ticket.body(n)).await? };
    if let Some(trailers) = &trailers {
        ticket.trailers(&|each| visit(trailers, each));
    }
    if let Some(code) = trailers.as_ref().and_then(grpc_status).or(in_head).filter(|_| grpc) {
        ticket.grpc_status(code);
    }
    Ok(())
}

fn visit(headers: &HeaderMap, each: &mut dyn FnMut(&str, &[u8])) {
    headers.iter().for_each(|(name, value)| each(name.as_str(), value.as_bytes()));
}

/// The response's head; interim responses (100, 103) go to the client as they come.
async fn answer(
    mut response: ResponseFuture,
    respond: &mut SendResponse<Bytes>,
    strip: bool,
) -> Result<Response<RecvStream>, Failed> {
    loop {
        let next = poll_fn(|cx| {
            if let Poll::Ready(interim) = response.poll_informational(cx)
                && let Some(Ok(interim)) = interim
            {
                return Poll::Ready(Next::Interim(interim));
            }
            if let Poll::Ready(head) = Pin::new(&mut response).poll(cx) {
                return Poll::Ready(Next::Head(head));
            }
            respond.poll_reset(cx).map(|_| Next::ClientGone)
        })
        .await;
        match next {
            Next::Interim(mut interim) => {
                clean(interim.headers_mut());
                if strip {
                    strip_reserved(interim.headers_mut());
                }
                respond.send_informational(interim).map_err(|_| Failed::ReceiverGone)?;
            }
            Next::Head(Ok(head)) => return Ok(head),
            Next::Head(Err(error)) => return Err(no_answer(&error)),
            Next::ClientGone => return Err(Failed::ReceiverGone),
        }
    }
}

/// Why a request that was to be sent has no answer.
fn no_answer(error: &h2::Error) -> Failed {
    match error.reason() {
        Some(reason) if error.is_reset() => Failed::Reset(reason),
        // Only streams beyond the last one that a GOAWAY names end with it: they are never processed (RFC 9113 6.8).
        Some(_) if error.is_go_away() && error.is_remote() => Failed::Reset(Reason::REFUSED_STREAM),
        // The link vouches that nothing of this connection left.
        None if error.get_io().is_some_and(|io| io.kind() == ErrorKind::ConnectionRefused) => {
            Failed::Reset(Reason::REFUSED_STREAM)
        }
        Some(_) | None => Failed::Refused(NO_RESPONSE),
    }
}

enum Next {
    Interim(Response<()>),
    Head(Result<Response<RecvStream>, h2::Error>),
    ClientGone,
}

/// The request's body and trailers, to their end or until one side gives up.
async fn upload(body: Option<RecvStream>, server: SendStream<Bytes>) {
    if let Some(body) = body.filter(|body| !body.is_end_stream()) {
        // A client's trailers are its own word, as its headers are: some servers make one of both.
        let _ = pump(body, server, true, |_| {}).await; // what failed was told to both sides
    }
}

/// Moves a body with its trailers from one connection to the other; returns the trailers. `strip`: reserved names in them
/// are not the sender's to set.
async fn pump(
    mut from: RecvStream,
    mut to: SendStream<Bytes>,
    strip: bool,
    mut meter: impl FnMut(u64),
) -> Result<Option<HeaderMap>, Failed> {
    loop {
        let chunk = poll_fn(|cx| {
            if let Poll::Ready(reset) = to.poll_reset(cx) {
                return Poll::Ready(Err(reset.ok()));
            }
            from.poll_data(cx).map(Ok)
        })
        .await;
        match chunk {
            // The receiver wants no more: dropping `from` tells the sender.
            Err(_) => return Err(Failed::ReceiverGone),
            Ok(Some(Ok(mut bytes))) => {
                let taken = bytes.len();
                while !bytes.is_empty() {
                    let room = room(&mut to, bytes.len()).await.ok_or(Failed::ReceiverGone)?;
                    let part = bytes.split_to(room.min(bytes.len()));
                    meter(part.len() as u64);
                    to.send_data(part, false).map_err(|_| Failed::ReceiverGone)?;
                }
                // Only what was taken is credited: a slow receiver slows its sender.
                let _ = from.flow_control().release_capacity(taken);
            }
            Ok(Some(Err(error))) => {
                to.send_reset(error.reason().unwrap_or(Reason::INTERNAL_ERROR));
                return Err(Failed::Passed);
            }
            Ok(None) => break,
        }
    }
    match from.trailers().await {
        Ok(Some(mut trailers)) => {
            clean(&mut trailers);
            if strip {
                strip_reserved(&mut trailers);
            }
            to.send_trailers(trailers.clone()).map_err(|_| Failed::ReceiverGone)?;
            Ok(Some(trailers))
        }
        Ok(None) => {
            to.send_data(Bytes::new(), true).map_err(|_| Failed::ReceiverGone)?;
            Ok(None)
        }
        Err(error) => {
            to.send_reset(error.reason().unwrap_or(Reason::INTERNAL_ERROR));
            Err(Failed::Passed)
        }
    }
}

/// Waits until the receiver takes some of `wanted` bytes; `None`: it takes no more.
async fn room(to: &mut SendStream<Bytes>, wanted: usize) -> Option<usize> {
    to.reserve_capacity(wanted);
    loop {
        let granted = poll_fn(|cx| {
            if to.poll_reset(cx).is_ready() {
                return Poll::Ready(None);
            }
            to.poll_capacity(cx).map(|capacity| capacity?.ok())
        })
        .await?;
        if granted > 0 {
            return Some(granted);
        }
    }
}

/// Resolves when the client has reset its request.
async fn gone(respond: &mut SendResponse<Bytes>) {
    let _ = poll_fn(|cx| respond.poll_reset(cx)).await;
}

/// Servers tried for one request.
const ATTEMPTS: usize = 3;
const BAD_REQUEST: Refusal = Refusal { status: 400, reason: BadHttp::Malformed.label() };
const NO_RESPONSE: Refusal = Refusal { status: 502, reason: Unserved::ServerClosed.label() };
