"""The TLS side of the aggregated API: what is shown, and whose certificates are believed. Either may change any time.

One context stays with the listener for ever. Each handshake is moved, at its first message, to the context of that
moment, so that a renewed certificate or another CA counts from the next connection on without a new listener.
"""

from __future__ import annotations

import ssl
from typing import Any

from mantle.platform.kubernetes.serving_cert import load_from_memory
from mantle.viz.front_proxy import FrontProxy


class Tls:
    """`context` is for the listener. Until a certificate and a front proxy are known, handshakes fail."""

    def __init__(self) -> None:
        self.context = _context()
        self.context.sni_callback = self._move
        self.front_proxy: FrontProxy | None = None
        self._certificate: bytes | None = None
        self._current: ssl.SSLContext | None = None

    @property
    def missing(self) -> str:
        """What is not known yet, for people; empty if all is there."""
        parts = [] if self._certificate is not None else ["no certificate of our own yet"]
        parts += [] if self.front_proxy is not None else ["the API server's front proxy is not known yet"]
        return ", ".join(parts)

    def believe(self, proxy: FrontProxy) -> None:
        """Takes a new front proxy. Raises `ssl.SSLError` if its CA cannot be read; then the one before stays."""
        if proxy != self.front_proxy:
            context = _context(proxy, self._certificate)
            self.front_proxy, self._current = proxy, context if self._certificate else None

    def show(self, pem: bytes) -> None:
        """Takes a new certificate: the chain and its key, PEM. Raises `ssl.SSLError`; then the one before stays."""
        if pem != self._certificate:
            context = _context(self.front_proxy, pem)
            self._certificate, self._current = pem, context if self.front_proxy else None

    def is_current(self, connection: ssl.SSLObject) -> bool:
        """Was this connection verified against the front proxy of now? A new certificate of ours changes nothing."""
        verified_for = getattr(connection.context, "front_proxy", None)
        return self.front_proxy is not None and verified_for == self.front_proxy

    def _move(self, connection: ssl.SSLObject, _name: str | None, _context: Any) -> int | None:
        if self._current is None:
            return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
        connection.context = self._current
        return None


class _Context(ssl.SSLContext):
    """Knows which front proxy it verifies against."""

    front_proxy: FrontProxy | None = None


def _context(proxy: FrontProxy | None = None, pem: bytes | None = None) -> ssl.SSLContext:
    context = _Context(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_OPTIONAL  # who shows none is answered 401, with words
    context.options |= ssl.OP_NO_TICKET  # a resumed session would bring a verification of before
    context.num_tickets = 0
    if proxy is not None:
        context.load_verify_locations(cadata=proxy.client_ca)
        context.front_proxy = proxy
    if pem is not None:
        load_from_memory(context, pem)
    return context
