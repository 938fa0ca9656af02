"""A minute of traffic of one pod, and a proxy that gives one tap event: what viz's API is played with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from mantle.core.model import Key, Owner, Pod
from mantle.gen.io.linkerd.proxy import tap_pb2
from mantle.viz.mesh import subject_of
from mantle.viz.promtext import Series
from mantle.viz.scrape import Health
from mantle.viz.source import Point, Traffic

MESHED = {"mantle.dev/control-plane-ns": "mantle"}
WEB = Pod(Key("emojivoto", "web-1"), "1", "127.0.0.7", "web", Owner("Deployment", "web"), MESHED, proxy_started=True)
LABELS = {"direction": "outbound", "dst_namespace": "emojivoto", "dst_deployment": "emoji"}
SECURE = {"tls": "true", "server_id": "emoji.emojivoto.serviceaccount.identity.mantle.cluster.local"}


def series(family: str, **labels: str) -> Series:
    return Series(family, tuple(sorted(labels.items())))


class FakeSource:
    """A minute of traffic; remembers the windows asked for."""

    def __init__(self) -> None:
        self.windows: list[float] = []

    async def traffic(self, window_seconds: float) -> Traffic:
        self.windows.append(window_seconds)
        subject = subject_of(WEB)
        answered = {"classification": "success", "authority": "emoji-svc.emojivoto:8080"}
        requests = Point(subject, series("request_total", **LABELS, **SECURE), 30)
        responses = Point(subject, series("response_total", **LABELS, **SECURE, **answered), 30)
        return Traffic(60.0, (requests, responses), age_seconds=1.0)

    def health(self) -> Health:
        return Health(1, {}, 1.0)


class FakeProxies:
    """One tap event, then silence; knows whether a watch is open."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()

    async def observe(self, pod: Pod, request: tap_pb2.ObserveRequest) -> AsyncIterator[tap_pb2.TapEvent]:
        init = tap_pb2.TapEvent.Http.RequestInit(authority="a", path="/")
        yield tap_pb2.TapEvent(http=tap_pb2.TapEvent.Http(request_init=init))
        try:
            await asyncio.Event().wait()
        finally:
            self.closed.set()
