"""viz as the observer of the experimental mode: the certificate that lets it tap that mode's pods, and nothing else.

The proxy beside viz is of the default mode and trusts nothing of the other. So here alone viz makes mutual TLS itself,
as `mantle-viz` of that mode, with a key that the `ca` has put into a Secret; its own proxy passes these bytes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc

from mantle.core.model import Pod
from mantle.core.names import BadName, MeshNames
from mantle.core.optional_names import OptionalNames, owner_of


@dataclass(frozen=True, slots=True)
class CannotObserve:
    """Why a pod cannot be observed."""

    why: str

    def __str__(self) -> str:
        return f"{self.why}; it is of the experimental mode: `mantle migrate-tls` moves it to the default one"


class Observer:
    """`directory`: where the Secret is mounted; None: this mesh has no such mode."""

    def __init__(self, names: MeshNames, directory: Path | None) -> None:
        self._names, self._directory = OptionalNames(names), directory

    def stamp(self) -> int:
        """Changes when the Secret does."""
        try:
            return 0 if self._directory is None else (self._directory / "tls.crt").stat().st_mtime_ns
        except OSError:
            return 0

    def credentials(self, pod: Pod) -> tuple[grpc.ChannelCredentials, str] | CannotObserve:
        """What a channel to the pod needs, and the name that must be proved there."""
        owner = owner_of(pod.labels, pod.annotations, pod.key.namespace)
        name = None if owner is None else self._names.identity(owner)
        if name is None or isinstance(name, BadName):
            return CannotObserve("it names no owner")
        if self._directory is None:
            return CannotObserve("this mesh has no ca (`mantle install --tls=optional` adds one)")
        try:
            chain, key, roots = ((self._directory / file).read_bytes() for file in ("tls.crt", "tls.key", "ca.crt"))
        except OSError as error:
            return CannotObserve(f"viz has no certificate of that mode yet ({error})")
        return grpc.ssl_channel_credentials(roots, key, chain), name
