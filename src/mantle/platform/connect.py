"""Which platform a control-plane program sees: `unix:/PATH` (one machine) or `kubernetes` (the cluster it is a pod of).

The only place that knows both. Imports the half that is used.
"""

from __future__ import annotations

import argparse
import enum
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from mantle.platform.port import ConnectedPlatform

KUBERNETES = "kubernetes"


@dataclass(frozen=True, slots=True)
class OnMachine:
    """The machine's daemon, on this socket."""

    socket: Path

    def __str__(self) -> str:
        return f"unix:{self.socket}"


@dataclass(frozen=True, slots=True)
class OnCluster:
    """The cluster that this program is a pod of."""

    def __str__(self) -> str:
        return KUBERNETES


Where = OnMachine | OnCluster


class View(enum.Enum):
    """What a program needs to see, and so has a right to."""

    IDENTITY = "identity"
    """Tokens, and their pods and service accounts."""
    DISCOVERY = "discovery"
    """Pods, services and what is behind them, namespaces, workloads."""


def where(text: str) -> Where:
    """Reads the value of `--platform`. Raises `argparse.ArgumentTypeError`."""
    if text == KUBERNETES:
        return OnCluster()
    scheme, _, path = text.partition(":")
    if scheme != "unix" or not path.startswith("/"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither unix:/PATH nor {KUBERNETES}")
    return OnMachine(Path(path))


@asynccontextmanager
async def connected(place: Where, view: View, component: str) -> AsyncIterator[ConnectedPlatform]:
    """The platform until the block is left. `component` is who events come from. Raises `RuntimeError` if this is no
    pod of a cluster.
    """
    if isinstance(place, OnMachine):
        from mantle.platform.remote import RemotePlatform

        async with RemotePlatform(place.socket) as machine:
            yield machine
        return
    from mantle.platform.kubernetes.client import BadCluster, in_cluster
    from mantle.platform.kubernetes.world import DISCOVERY, IDENTITY, running

    try:
        client = in_cluster()
    except BadCluster as error:
        raise RuntimeError(str(error)) from error
    kinds = IDENTITY if view is View.IDENTITY else DISCOVERY
    async with client, running(client, kinds, component=component) as cluster:
        yield cluster
