"""A copy of one kind of object, kept true to the API server for ever: list, then watch, then again after any trouble.

No client library's watch survives an outage or a connection whose other end went silent; this one does. `next_step`
decides what follows the end of a watch or list, `Copy` what changed; both are pure. `Reflector.run` carries it out.
While the server is away the copy stays as it was, and a new list replaces it object by object: what did not change
stays the same object, so nothing behind it moves. One object that cannot be read stops nothing: it is passed over
(`reading`), and its kind says what is kept in its place.

https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import httpx2
import msgspec

from mantle.core.reasons import WatchEnded
from mantle.platform.kubernetes.client import NO_ANSWER
from mantle.platform.kubernetes.reading import PassedOver, Sketch, decode, sketch_of

log = logging.getLogger(__name__)

Raw = TypeVar("Raw")
Name = TypeVar("Name", bound=Hashable)
Value = TypeVar("Value")

PAGE = 500
"""Objects asked for at once."""
BACKOFF = (0.25, 15.0)
"""Seconds: what the wait before another attempt begins at, and the most between two."""
SHORT = 1.0
"""Seconds: a watch that ended sooner, without an event, did not work."""


@dataclass(frozen=True, slots=True)
class Timing:
    """How long a watch may be quiet, in seconds."""

    server: tuple[float, float] = (30.0, 45.0)
    """When the server is asked to end a watch; drawn anew each time, so that watches do not end together."""
    margin: float = 5.0
    """Silence beyond the server's own end that means that nobody is there any more."""


STEADY = Timing()


# ---- what follows ----


@dataclass(frozen=True, slots=True)
class Ended:
    """How a list or a watch ended. `retry_after` is what the server asked for, in seconds."""

    why: WatchEnded
    detail: str = ""
    retry_after: float = 0.0


@dataclass(frozen=True, slots=True)
class Step:
    """What to do next, after `wait` seconds: list anew, or watch on from the version known."""

    relist: bool
    wait: float


def next_step(ended: Ended, failures: int, chance: float) -> Step:
    """What follows. `failures` counts the attempts in a row that brought nothing, this one included; `chance` is drawn
    evenly from 0 to 1 and spreads the clients of a server that comes back.
    """
    if ended.why is WatchEnded.IN_TIME:
        return Step(relist=False, wait=0.0)
    least, most = BACKOFF
    # Between nothing and all of the first step, later between half and all: nobody comes with the others.
    ceiling = min(most, least * 2.0 ** min(failures, 16))
    wait = ceiling * (chance if failures <= 1 else 0.5 + chance / 2)
    if ended.why is WatchEnded.THROTTLED:
        # What was asked for, and up to a fifth more: all clients were told the same.
        wait = max(wait, ended.retry_after * (1.0 + chance / 5))
    return Step(relist=ended.why is not WatchEnded.TOO_SHORT, wait=wait)


# ---- what changed ----


@dataclass(frozen=True, slots=True)
class Change(Generic[Name, Value]):
    """One object before and now; None: it was not, it is not."""

    name: Name
    before: Value | None
    now: Value | None


class Copy(Generic[Name, Value]):
    """The objects known. Equal objects are kept as they are."""

    def __init__(self) -> None:
        self.objects: dict[Name, Value] = {}

    def put(self, name: Name, now: Value | None) -> tuple[Change[Name, Value], ...]:
        """One object as it is now (None: it is gone). What changed: one thing or nothing."""
        before = self.objects.get(name)
        if before == now:
            return ()
        if now is None:
            del self.objects[name]
        else:
            self.objects[name] = now
        return (Change(name, before, now),)

    def replace(self, objects: Mapping[Name, Value]) -> tuple[Change[Name, Value], ...]:
        """All objects as they are now. What changed, those that went while nobody watched among it."""
        gone = [name for name in self.objects if name not in objects]
        changes = [change for name, now in objects.items() for change in self.put(name, now)]
        return (*changes, *(change for name in gone for change in self.put(name, None)))


# ---- carried out ----


@dataclass(frozen=True, slots=True)
class Resource(Generic[Raw, Name, Value]):
    """One kind of object and what is kept of it.

    `raw` is a msgspec type with the fields wanted and no others: the rest is skipped while reading. `convert` gives
    the name and the value kept; a value of None is an object of no interest. It raises ValueError for one that cannot
    be taken; what is kept then `instead` says, from a sketch of it and all that is known.
    """

    path: str
    """Such as `/api/v1/pods`."""
    raw: type[Raw]
    convert: Callable[[Raw], tuple[Name, Value | None]]
    instead: Callable[[Sketch, Mapping[Name, Value]], tuple[Name, Value | None]]
    metadata_only: bool = False
    """Ask for names and owners only (https://kubernetes.io/docs/reference/using-api/api-concepts/#alternate-representations)."""
    params: Mapping[str, str] = field(default_factory=dict)
    """Such as a `fieldSelector`."""


class _ListMeta(msgspec.Struct):
    resourceVersion: str = ""
    continue_: str = msgspec.field(name="continue", default="")


class _List(msgspec.Struct):
    items: list[msgspec.Raw] | None = None
    metadata: _ListMeta = msgspec.field(default_factory=_ListMeta)


class _Event(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _ObjectMeta(msgspec.Struct):
    resourceVersion: str = ""


class _Object(msgspec.Struct):
    metadata: _ObjectMeta = msgspec.field(default_factory=_ObjectMeta)


class _Details(msgspec.Struct):
    retryAfterSeconds: int = 0


class _Status(msgspec.Struct):
    code: int = 0
    message: str = ""
    details: _Details | None = None


_LIST, _EVENT, _OBJECT, _STATUS = (
    msgspec.json.Decoder(_List),
    msgspec.json.Decoder(_Event),
    msgspec.json.Decoder(_Object),
    msgspec.json.Decoder(_Status),
)


class _Stop(Exception):
    """A list or watch is over, and how."""

    def __init__(self, ended: Ended) -> None:
        super().__init__(ended.why)
        self.ended = ended


class Reflector(Generic[Raw, Name, Value]):
    """Keeps `objects` true. `changed` is called with what changed, in order, from the event loop."""

    def __init__(
        self,
        http: httpx2.AsyncClient,
        resource: Resource[Raw, Name, Value],
        changed: Callable[[tuple[Change[Name, Value], ...]], None],
        timing: Timing = STEADY,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._http, self._resource, self._changed, self._chance = http, resource, changed, chance
        self._timing = timing
        self._copy: Copy[Name, Value] = Copy()
        self._decoder = msgspec.json.Decoder(resource.raw)
        self.passed_over: PassedOver[Name] = PassedOver(resource.path)
        self._version = ""
        self._failures = 0
        self._complaint: WatchEnded | None = None
        self.synced = asyncio.Event()
        """Set once everything has been listed. It stays set: old knowledge is better than none."""
        self.lists = 0
        """Complete lists so far."""
        self._followed_until = float("-inf")
        self._following = False

    @property
    def objects(self) -> Mapping[Name, Value]:
        """What is known now."""
        return self._copy.objects

    @property
    def true_at(self) -> float:
        """When the copy was last known to be true, in seconds of the event loop's clock: now, while a watch runs."""
        return asyncio.get_running_loop().time() if self._following else self._followed_until

    @property
    def trouble(self) -> WatchEnded | None:
        """Why what is known may be old; None while the watch works."""
        return self._complaint

    async def run(self) -> None:
        """Never ends by itself; whatever the server does is answered by another attempt."""
        relist = True
        while True:
            try:
                if relist:
                    await self._list()
                ended = await self._watch()
            except _Stop as stop:
                ended = stop.ended
            except NO_ANSWER as error:
                ended = _broken(error)
            if self._following:
                self._following, self._followed_until = False, asyncio.get_running_loop().time()
            if ended.why is WatchEnded.IN_TIME:
                self._failures = 0
            else:
                self._failures += 1
            step = next_step(ended, self._failures, self._chance())
            relist = step.relist or not self.synced.is_set()
            self._complain(ended, step)
            await asyncio.sleep(step.wait)

    async def _list(self) -> None:
        """Reads all pages, then replaces what was known: half a list changes nothing."""
        objects: dict[Name, Value] = {}
        names: set[Name] = set()
        params = {**self._resource.params, "limit": str(PAGE)}
        while True:
            response = await self._http.get(self._resource.path, params=params, headers=self._headers("List"))
            if response.status_code != 200:
                raise _Stop(_refused(response.status_code, response.headers, response.content))
            page = _decode(_LIST, response.content)
            for raw in page.items or ():
                read = self._read(raw)
                if read is None:
                    log.warning("%s: an object without a name is passed over", self._resource.path)
                    continue
                names.add(read[0])
                if read[1] is not None:
                    objects[read[0]] = read[1]
            if not page.metadata.continue_:
                break
            params["continue"] = page.metadata.continue_
        self._version = page.metadata.resourceVersion
        self._followed_until = asyncio.get_running_loop().time()
        self.passed_over.only(names)
        self._tell(self._copy.replace(objects))
        self.lists += 1
        self.synced.set()

    async def _watch(self) -> Ended:
        """Follows changes from the version known until the server ends it in time. Raises `_Stop` or HTTPError for
        every other end.
        """
        loop = asyncio.get_running_loop()
        low, high = self._timing.server
        seconds = round(low + (high - low) * self._chance())
        began, heard = loop.time(), False
        params = {
            **self._resource.params,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": str(seconds),
        }
        timeout = httpx2.Timeout(self._http.timeout.connect, read=seconds + self._timing.margin)
        stream = self._http.stream(
            "GET", self._resource.path, params=params, headers=self._headers(""), timeout=timeout
        )
        async with stream as response:
            if response.status_code != 200:
                raise _Stop(_refused(response.status_code, response.headers, await response.aread()))
            self._works()
            self._following = True
            async for lines in _batches(response):
                changes: list[Change[Name, Value]] = []
                try:
                    for line in lines:
                        changes += self._event(line)
                finally:
                    self._tell(tuple(changes))
                heard, self._failures = True, 0
        if not heard and loop.time() - began < SHORT:
            return Ended(WatchEnded.TOO_SHORT, f"after {loop.time() - began:.1f} s")
        return Ended(WatchEnded.IN_TIME)

    def _event(self, line: bytes) -> tuple[Change[Name, Value], ...]:
        event = _decode(_EVENT, line)
        if event.type == "ERROR":
            status = _decode(_STATUS, bytes(event.object))
            raise _Stop(_refused(status.code, {}, bytes(event.object)))
        self._version = _decode(_OBJECT, bytes(event.object)).metadata.resourceVersion or self._version
        if event.type == "BOOKMARK":
            return ()
        read = self._read(event.object)
        if read is None:
            # It may have been any that we know: only a new list can tell.
            raise _Stop(Ended(WatchEnded.UNREADABLE, "an object without a name"))
        name, value = read
        if event.type == "DELETED":
            self.passed_over.fits(name)
            value = None
        return self._copy.put(name, value)

    def _read(self, raw: msgspec.Raw) -> tuple[Name, Value | None] | None:
        """Name and value of an object; of one that cannot be read, what is kept instead. None: it has no name."""
        try:
            name, value = self._resource.convert(decode(self._decoder, raw))
        except ValueError as error:
            sketch = sketch_of(raw)
            if sketch is None:
                return None
            name, value = self._resource.instead(sketch, self._copy.objects)
            self.passed_over.put(name, f"{sketch.namespace}/{sketch.name}".lstrip("/"), str(error))
            return name, value
        self.passed_over.fits(name)
        return name, value

    def _tell(self, changes: tuple[Change[Name, Value], ...]) -> None:
        if changes:
            self._changed(changes)

    def _headers(self, suffix: str) -> dict[str, str]:
        if not self._resource.metadata_only:
            return {"Accept": "application/json"}
        return {"Accept": f"application/json;as=PartialObjectMetadata{suffix};g=meta.k8s.io;v=v1"}

    def _works(self) -> None:
        if self._complaint is not None:
            log.info("%s: the watch works again", self._resource.path)
        self._complaint = None

    def _complain(self, ended: Ended, step: Step) -> None:
        """Once for each kind of trouble."""
        if ended.why in (WatchEnded.IN_TIME, self._complaint):
            return
        level = logging.INFO if ended.why is WatchEnded.GONE else logging.WARNING
        log.log(
            level,
            "%s: %s (%s): going on with what is known, trying again in %.1f s%s",
            self._resource.path,
            ended.why,
            ended.detail[:300],
            step.wait,
            _FIX.get(ended.why, ""),
        )
        self._complaint = ended.why


_FIX = {
    WatchEnded.FORBIDDEN: "; this service account needs list and watch there: apply `mantle install` again",
    WatchEnded.NOT_FOUND: "; the API server does not serve this kind",
}


async def _batches(response: httpx2.Response) -> AsyncIterator[list[bytes]]:
    """The stream's complete lines, as many at once as came at once."""
    rest = b""
    async for chunk in response.aiter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        if any(lines):
            yield [line for line in lines if line]


def _decode(decoder: msgspec.json.Decoder[Raw], octets: bytes) -> Raw:
    try:
        return decode(decoder, octets)
    except msgspec.MsgspecError as error:
        raise _Stop(Ended(WatchEnded.UNREADABLE, f"{error}")) from error


def _refused(code: int, headers: Mapping[str, str], body: bytes) -> Ended:
    """What a status means. Its text may be a Kubernetes Status or plain."""
    try:
        status = msgspec.json.decode(body, type=_Status)
        text, asked = status.message, float(status.details.retryAfterSeconds if status.details else 0)
    except msgspec.MsgspecError:
        text, asked = body[:300].decode(errors="replace"), 0.0
    given: Any = headers.get("retry-after", "")
    asked = max(asked, float(given) if str(given).isdigit() else 0.0)
    detail = f"{code}: {text}"
    match code:
        case 410:
            return Ended(WatchEnded.GONE, detail)
        case 429:
            return Ended(WatchEnded.THROTTLED, detail, asked)
        case 401 | 403:
            return Ended(WatchEnded.FORBIDDEN, detail)
        case 404:
            return Ended(WatchEnded.NOT_FOUND, detail)
    return Ended(WatchEnded.SERVER_ERROR, detail)


def _broken(error: Exception) -> Ended:
    detail = f"{type(error).__name__} {error}".strip()
    match error:
        case httpx2.ReadTimeout():
            return Ended(WatchEnded.SILENT, detail)
        case httpx2.ConnectError() | httpx2.ConnectTimeout():
            return Ended(WatchEnded.UNREACHABLE, detail)
    return Ended(WatchEnded.CUT, detail)
