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
        HeadTooLarge = "head_too_large",
        Malformed = "malformed",
        ConflictingLength = "conflicting_length",
        BadTransferEncoding = "bad_transfer_encoding",
        ObsoleteFold = "obsolete_fold",
        BareLineFeed = "bare_line_feed",
        BadHost = "bad_host",
        BadChunk = "bad_chunk",
        UnsupportedVersion = "unsupported_version",
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
        BadFrame = "bad_frame",
        BadSettings = "bad_settings",
        BadStream = "bad_stream",
        WindowExceeded = "window_exceeded",
        TooManyStreams = "too_many_streams",
        OpenRate = "open_rate",
        ResetRate = "reset_rate",
        ControlRate = "control_rate",
        Stalled = "stalled",
        Drained = "drained",
        PeerGone = "peer_gone",
    }
}
