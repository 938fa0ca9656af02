//! Every "no" of the data plane as a type, with the one label that metrics, logs and tap all show.
//!
//! One enum per question. A label is part of the product's contract (docs/reasons.md): never rename one,
//! never format one elsewhere. Rule for this file: it knows no other module.

use std::fmt;

macro_rules! reasons {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $label:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $name { $($(#[$vdoc])* $variant,)+ }

        impl $name {
            /// Every variant, in declaration order: for documentation and for tests.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// The word that metrics, logs and tap show.
            pub const fn label(self) -> &'static str {
                match self { $(Self::$variant => $label,)+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { f.write_str(self.label()) }
        }
    };
}

reasons! {
    /// Why a connection is not mutual TLS.
    NoTls {
        /// The peer is this pod itself.
        Loopback = "loopback",
        /// Outbound: discovery gave the endpoint no identity (unmeshed, external, unknown).
        NotProvidedByServiceDiscovery = "not_provided_by_service_discovery",
        /// Inbound: the peer sent no mesh ClientHello (probe, unmeshed client).
        NotProvidedByRemote = "not_provided_by_remote",
        /// Inbound: the port's policy says opaque and the connection came straight to the port.
        PortSkipped = "port_skipped",
        /// Outbound, experimental mode `--tls=optional` only: one of the two proxies had nothing that the other accepts.
        FailOpen = "fail_open",
    }
}

reasons! {
    /// Why inbound traffic was refused.
    Denied {
        /// No authorization of the port's policy matches this client.
        Unauthorized = "unauthorized",
        /// A connection to the proxy's own inbound port without mutual TLS and a client identity.
        IdentityRequired = "identity_required",
        /// A stream for a port that this pod's proxy owns, or an address that is not this pod's.
        Loop = "loop",
        /// The port has no policy yet and is not one of the listed ports.
        PolicyUnavailable = "policy_unavailable",
        /// The port's policy has routes and none of them matches the request.
        RouteNotFound = "route_not_found",
    }
}

reasons! {
    /// Why an outbound connection or request could not be carried.
    Unroutable {
        /// Discovery did not answer in time for an address inside the mesh's networks.
        DiscoveryUnavailable = "discovery_unavailable",
        /// The service has no ready endpoint.
        NoEndpoints = "no_endpoints",
        /// The control plane refused the address or sent a policy that cannot be used.
        InvalidPolicy = "invalid_policy",
        /// An endpoint's identity could not be parsed: never plaintext.
        InvalidIdentity = "invalid_identity",
        /// TCP connect failed or timed out.
        ConnectFailed = "connect_failed",
        /// The peer's certificate did not verify or is not for the expected identity.
        IdentityMismatch = "identity_mismatch",
        /// The TLS handshake failed otherwise.
        TlsFailed = "tls_failed",
        /// The peer's proxy is mutually authenticated but speaks no protocol that ours does.
        UnsupportedPeer = "unsupported_peer",
        /// The address is the proxy's own.
        Loop = "loop",
    }
}

reasons! {
    /// Why an HTTP/1 message was refused with 400 instead of forwarded.
    BadHttp {
        /// The head is larger than any real one.
        HeadTooLarge = "head_too_large",
        /// Not HTTP/1 at all.
        Malformed = "malformed",
        /// Several or contradicting lengths: proxies and servers would disagree where the body ends.
        ConflictingLength = "conflicting_length",
        /// A transfer coding other than a final `chunked`.
        BadTransferEncoding = "bad_transfer_encoding",
        /// A header field folded over several lines.
        ObsoleteFold = "obsolete_fold",
        /// A line that ends without a carriage return.
        BareLineFeed = "bare_line_feed",
        /// No host, several, or one that is no authority.
        BadHost = "bad_host",
        /// A chunk's size or end is wrong.
        BadChunk = "bad_chunk",
        /// Neither HTTP/1.0 nor HTTP/1.1.
        UnsupportedVersion = "unsupported_version",
    }
}

reasons! {
    /// Why a request or connection that was welcome was not served.
    Unserved {
        /// The head of a request began and was not whole in time.
        HeadTimeout = "head_timeout",
        /// The server's connection ended before its response began.
        ServerClosed = "server_closed",
        /// The proxy has as many files open as it may.
        FileLimit = "file_limit",
    }
}

reasons! {
    /// Why one stream of a mux link ended before both its directions did.
    StreamReset {
        /// Its user went away.
        Cancelled = "cancelled",
        /// Policy does not admit this client to this port.
        Denied = "denied",
        /// Policy or trust changed while the stream was open.
        Revoked = "revoked",
        /// The application could not be reached.
        ConnectFailed = "connect_failed",
        /// Not looked at: safe to send again elsewhere.
        Refused = "refused",
        /// The peer granted no window for too long.
        Stalled = "stalled",
        /// The bytes of the stream broke its protocol.
        ProtocolError = "protocol_error",
        /// The application's connection broke.
        Broken = "broken",
    }
}

reasons! {
    /// Why a mux link was closed on its peer.
    LinkClosed {
        /// A frame of unknown kind or impossible length.
        BadFrame = "bad_frame",
        /// Settings that are missing, late or out of range.
        BadSettings = "bad_settings",
        /// A frame for a stream that cannot be open.
        BadStream = "bad_stream",
        /// More bytes than the window allowed.
        WindowExceeded = "window_exceeded",
        /// More open streams than allowed.
        TooManyStreams = "too_many_streams",
        /// Streams opened too fast.
        OpenRate = "open_rate",
        /// Streams reset too fast.
        ResetRate = "reset_rate",
        /// Control frames too fast.
        ControlRate = "control_rate",
        /// Nothing could be written for too long.
        Stalled = "stalled",
        /// It was told to end and all its streams have.
        Drained = "drained",
        /// The connection broke.
        PeerGone = "peer_gone",
    }
}
