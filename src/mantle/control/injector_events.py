"""Events about admissions: on the workload at once, on the pod or service as soon as it exists.

At admission most pods have neither name nor uid. So what is to be said is kept, by workload, and pods are listed in
waves (one list a workload, by the pod's own labels) until each has its event or is known not to have come. The name of
an event follows from whom and what it is about: a second replica, or a second wave, finds it written.

Reviews may come from anybody on the pods' network (`core.admission.NotAReview`): what they say is bounded and made
harmless here, pods are told only what they bear out, and nothing in a review ends this program.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from prometheus_client import CollectorRegistry, Counter

from mantle.control.injector_api import Api
from mantle.core.admission import Note, Owner, Subject, bears_out, can_exist
from mantle.platform.kubernetes.calls import CONFLICT, Refused, Unreachable

log = logging.getLogger(__name__)

WAVE = 1.0
"""Seconds between two waves, so the most a pod's event is late."""
PATIENCE = 30.0
"""Seconds after which a pod that was admitted and never came is given up: something later refused it."""
MOST_WAITING = 1000
"""Workloads waited for at once, and workloads that wait to be told about."""
MOST_TEXT = 1024
"""Characters of a message, as the API server takes them."""
CLOCKS = timedelta(minutes=10)
"""Pods older than this are of an earlier wave. Far more than two clocks differ, far less than events are kept (1 h)."""


@dataclass(slots=True)
class _Group:
    """Pods of one workload that were told the same."""

    subject: Subject
    labels: Mapping[str, str]
    note: Note
    until: float
    expected: int = 1
    done: set[str] = field(default_factory=set)


class Events:
    """`tell` never waits and never fails an admission; `run` writes."""

    def __init__(
        self,
        api: Api,
        reporter: str,
        registry: CollectorRegistry,
        now: Callable[[], datetime],
        ticks: Callable[[], float],
    ) -> None:
        self._api, self._reporter, self._now, self._ticks = api, reporter, now, ticks
        self._owners: dict[tuple[str, Owner, Note], int] = {}
        self._counts: dict[str, int] = {}
        self._groups: dict[tuple[Any, ...], _Group] = {}
        self._work = asyncio.Event()
        self._written = Counter("mantle_injector_events", "written", ["about"], registry=registry)
        self._dropped = Counter("mantle_injector_events_dropped", "never written", ["why"], registry=registry)

    def tell(
        self, subject: Subject, labels: Mapping[str, str], note: Note, owner: Owner | None, admitted: bool
    ) -> None:
        """Says `note` about a pod or service that was admitted or refused, and about a pod's workload."""
        text = note.message[:MOST_TEXT]
        note = replace(note, message="".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)[:MOST_TEXT])
        if owner is not None and self._has_room(self._owners, about_owner := (subject.namespace, owner, note)):
            self._owners[about_owner] = self._owners.get(about_owner, 0) + 1
        if admitted and can_exist(subject, labels) and (subject.name or subject.kind == "Pod"):
            whose = subject.name or (subject.owner.uid if subject.owner else subject.generate_name)
            key = (subject.kind, subject.namespace, whose, note, tuple(sorted(labels.items())))
            group = self._groups.get(key)
            if group is not None:
                group.expected += 1
                group.until = self._ticks() + PATIENCE
            elif self._has_room(self._groups, key):
                self._groups[key] = _Group(subject, labels, note, self._ticks() + PATIENCE)
        self._work.set()

    def _has_room(self, waiting: Mapping[Any, Any], key: Any) -> bool:
        if key in waiting or len(waiting) < MOST_WAITING:
            return True
        self._dropped.labels("too many at once").inc()
        return False

    async def run(self) -> None:
        while True:
            await self._work.wait()
            await asyncio.sleep(WAVE)  # the pods of this wave come into being; more are collected
            try:
                await self.wave()
            except Unreachable as error:
                log.warning("events wait: %s", error)
            if not self._groups and not self._owners:
                self._work.clear()

    async def wave(self) -> None:
        """Writes what can be written now. Raises `Unreachable`, after which it can be called again."""
        while self._owners:
            (namespace, owner, note), times = next(iter(self._owners.items()))
            about = {"apiVersion": owner.api_version, "kind": owner.kind, "name": owner.name, "uid": owner.uid}
            await self._write({**about, "namespace": namespace}, note, times, "workload")
            del self._owners[(namespace, owner, note)]
        for key, group in list(self._groups.items()):
            await self._find(group)
            late, kind = self._ticks() > group.until, group.subject.kind.lower()
            if late or len(group.done) >= group.expected:
                del self._groups[key]
            if late and len(group.done) < group.expected:
                self._dropped.labels(f"the {kind} did not come").inc(group.expected - len(group.done))

    async def _find(self, group: _Group) -> None:
        """Looks for the group's pods, or its service, and writes the events of those that are there."""
        subject = group.subject
        try:
            if subject.kind == "Service":
                found = await self._api.service(subject.namespace, subject.name)
            else:
                found = await self._api.pods(subject.namespace, group.labels)
        except Refused as error:
            log.warning("no events: %s", error)
            return
        youngest = self._now() - CLOCKS
        for one in found:
            meta = one["metadata"]
            named = meta["name"] == subject.name if subject.name else meta["name"].startswith(subject.generate_name)
            created = datetime.fromisoformat(str(meta["creationTimestamp"]))
            ours = bears_out(meta.get("annotations") or {}, group.note)
            if named and ours and created >= youngest and meta["uid"] not in group.done:
                about = {"apiVersion": "v1", "kind": subject.kind, "name": meta["name"], "uid": meta["uid"]}
                await self._write({**about, "namespace": subject.namespace}, group.note, 1, subject.kind.lower())
                group.done.add(meta["uid"])

    async def _write(self, about: dict[str, Any], note: Note, times: int, kind: str) -> None:
        digest = hashlib.sha256(f"{about['uid']} {note.reason} {note.message}".encode()).hexdigest()[:16]
        name = f"{about['name'][:200]}.{digest}"
        at = f"{self._now():%Y-%m-%dT%H:%M:%SZ}"
        try:
            try:
                await self._api.create_event(
                    name, about, note.reason, note.message, "Warning" if note.warning else "Normal", at, self._reporter
                )
                self._counts[name] = times
                self._written.labels(kind).inc()
            except Refused as error:
                if error.code != CONFLICT:
                    raise
                if kind == "workload":
                    self._counts[name] = self._counts.get(name, 1) + times
                    await self._api.repeat_event(about["namespace"], name, self._counts[name], at)
        except Refused as error:
            log.warning("%s", error)
            self._dropped.labels("refused").inc()
        except Unreachable:
            raise
        except Exception as error:  # what cannot even be asked for, whatever that is: the next one can
            log.warning("an event about %s is left out: %s: %s", kind, type(error).__name__, error)
            self._dropped.labels("unwritable").inc()
        if len(self._counts) > 10 * MOST_WAITING:
            self._counts.clear()
