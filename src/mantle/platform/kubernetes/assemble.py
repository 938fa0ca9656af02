"""Snapshots from the copies of many kinds: one writer, changes in, immutable snapshots out.

A change costs what it touches: objects are put into place one by one, and a snapshot copies only the mappings that
changed. Each says what is new in it (`Snapshot.changes`), also to a reader that skipped some. Pure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from mantle.core.model import Changes, EndpointSlice, Key, Namespace, Owner, Pod, Service, Snapshot
from mantle.platform.kubernetes.convert import Between, SeenPod, owned
from mantle.platform.kubernetes.reflector import Change

Name = TypeVar("Name", bound=Hashable)
Value = TypeVar("Value")

REMEMBERED = 64
"""Snapshots whose changes are remembered: a reader that is further behind looks for itself."""


@dataclass
class _New:
    """What was put since the last snapshot."""

    pods: set[Key] = field(default_factory=set)
    services: set[Key] = field(default_factory=set)
    namespaces: set[str] = field(default_factory=set)
    slices: set[Key] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.pods or self.services or self.namespaces or self.slices)


class Assembly:
    """The working state of the one writer."""

    def __init__(self, with_slices: bool) -> None:
        self.seen: dict[Key, SeenPod] = {}
        """Pods as the API server has them."""
        self.accounts: dict[Key, str] = {}
        """The uid of each service account."""
        self._owners: dict[Between, Owner] = {}
        self._owned_by: dict[Between, set[Key]] = {}
        self._pods: dict[Key, Pod] = {}
        self._services: dict[Key, Service] = {}
        self._namespaces: dict[str, Namespace] = {}
        self._slices: dict[Key, EndpointSlice] = {}
        self._new = _New()
        self._snapshot = Snapshot(slices={} if with_slices else None)
        self._log: deque[Changes] = deque(maxlen=REMEMBERED)

    def pods(self, changes: Iterable[Change[Key, SeenPod]]) -> None:
        for change in changes:
            for between, here in ((_between(change.before), False), (_between(change.now), True)):
                if between is not None:
                    self._own(between, change.name, here)
            if change.now is None:
                del self.seen[change.name]
                self._put_pod(change.name, None)
            else:
                self.seen[change.name] = change.now
                self._put_pod(change.name, self._with_owner(change.now))

    def owners(self, changes: Iterable[Change[Between, Owner]]) -> None:
        """What owns ReplicaSets and Jobs: their pods are of that workload."""
        for change in changes:
            if change.now is None:
                del self._owners[change.name]  # its pods go by themselves, under the name they had
                continue
            self._owners[change.name] = change.now
            for key in self._owned_by.get(change.name, ()):
                self._put_pod(key, self._with_owner(self.seen[key]))

    def services(self, changes: Iterable[Change[Key, Service]]) -> None:
        for change in changes:
            _put(self._services, change)
            self._new.services.add(change.name)

    def slices(self, changes: Iterable[Change[Key, EndpointSlice]]) -> None:
        for change in changes:
            _put(self._slices, change)
            self._new.slices.add(change.name)

    def namespaces(self, changes: Iterable[Change[str, Namespace]]) -> None:
        for change in changes:
            _put(self._namespaces, change)
            self._new.namespaces.add(change.name)

    def service_accounts(self, changes: Iterable[Change[Key, str]]) -> None:
        for change in changes:
            _put(self.accounts, change)

    def snapshot(self) -> Snapshot:
        """What is known now; the same object as long as nothing changed."""
        new, before = self._new, self._snapshot
        if new:
            self._new = _New()
            changes = Changes(
                before.version,
                frozenset(new.pods),
                frozenset(new.services),
                frozenset(new.namespaces),
                frozenset(new.slices),
            )
            self._log.append(changes)
            self._snapshot = Snapshot(
                before.version + 1,
                dict(self._pods) if new.pods else before.pods,
                dict(self._services) if new.services else before.services,
                dict(self._namespaces) if new.namespaces else before.namespaces,
                before.slices if before.slices is None or not new.slices else dict(self._slices),
                changes,
            )
        return self._snapshot

    def since(self, version: int) -> Snapshot:
        """The same, saying what is new to a reader of `version`."""
        now = self.snapshot()
        missed = [changes for changes in self._log if changes.since >= version]
        if not missed or missed[0].since != version:
            return replace(now, changes=None)
        return now if len(missed) == 1 else replace(now, changes=_together(version, missed))

    def _put_pod(self, key: Key, pod: Pod | None) -> None:
        if pod is None:
            del self._pods[key]
        elif self._pods.get(key) == pod:
            return
        else:
            self._pods[key] = pod
        self._new.pods.add(key)

    def _with_owner(self, seen: SeenPod) -> Pod:
        return owned(seen, self._owners.get(seen.between) if seen.between is not None else None)

    def _own(self, between: Between, pod: Key, here: bool) -> None:
        pods = self._owned_by.setdefault(between, set())
        if here:
            pods.add(pod)
        else:
            pods.discard(pod)
        if not pods:
            del self._owned_by[between]


def _between(seen: SeenPod | None) -> Between | None:
    return seen.between if seen is not None else None


def _put(objects: dict[Name, Value], change: Change[Name, Value]) -> None:
    if change.now is None:
        del objects[change.name]
    else:
        objects[change.name] = change.now


def _together(version: int, missed: list[Changes]) -> Changes:
    return Changes(
        version,
        frozenset().union(*(changes.pods for changes in missed)),
        frozenset().union(*(changes.services for changes in missed)),
        frozenset().union(*(changes.namespaces for changes in missed)),
        frozenset().union(*(changes.slices for changes in missed)),
    )
