"""What an `up` asks for, checked whole before anything changes: files and maps in, applied files and workloads out.

Pure but for looking up programs on the host (`images.find_program`). Nothing here starts anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mantle.platform.machine import images as img
from mantle.platform.machine import manifest, together
from mantle.platform.machine.manifest import ObjectId
from mantle.platform.machine.plan import Machine, User, Wanted, wanted
from mantle.platform.machine.reconcile import Change, merge, objects_of
from mantle.platform.machine.state import Applied
from mantle.platform.machine.yamlpos import Mistake

CONTROL_FILE = "(mantle)"
"""The file name of the control plane's own objects."""


@dataclass(frozen=True, slots=True)
class Request:
    """An `up`: each file with the maps that lie beside it, best first."""

    files: Mapping[str, tuple[str, str, tuple[tuple[str, str, str], ...]]]
    """id -> (name for messages, text, maps: (name, text, directory) …)."""
    maps: tuple[tuple[str, str, str], ...] = ()
    """Given with `--images`: they come first for every file."""
    search: tuple[str, ...] = ()
    user: User | None = None
    namespace: str = "default"


def request_of(body: Mapping[str, Any]) -> Request:
    """The request of `POST /v1/apply`. Raises ValueError with what is wrong with it."""
    try:
        options = body.get("options") or {}
        files = {}
        for f in body["files"]:
            maps = tuple((m["name"], m["text"], m["directory"]) for m in f.get("images") or [])
            files[f.get("path") or f["name"]] = (f["name"], f["text"], maps)
        user = options.get("user")
        return Request(
            files,
            tuple((m["name"], m["text"], m["directory"]) for m in body.get("images") or []),
            tuple(options.get("search") or ()),
            User(int(user["uid"]), int(user["gid"]), tuple(user["groups"]), user["home"]) if user else None,
            options.get("namespace") or "default",
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not an apply request: {error!r}") from error


@dataclass(frozen=True, slots=True)
class Prepared:
    """An `up` that can be carried out."""

    files: Mapping[str, Applied]
    """Every file as it is afterwards, those of before included."""
    given: tuple[str, ...]
    changes: tuple[Change, ...]
    wants: Mapping[ObjectId, Wanted]
    notes: tuple[str, ...]


def prepare(
    request: Request, present: Mapping[str, Applied], base: Machine, reserved: frozenset[str]
) -> Prepared | list[Mistake]:
    """Reads, checks and plans; every mistake of every file at once, or what the `up` makes of the mesh."""
    mistakes: list[Mistake] = []
    notes: list[str] = []
    shared, wrong = _maps(request.maps)
    mistakes += wrong
    given: dict[str, Applied] = {}
    complete = True
    unread: list[manifest.Object] = []
    for key, (name, text, maps) in request.files.items():
        parsed = manifest.read(name, text, request.namespace)
        beside, wrong = _maps(maps)
        mistakes += [*parsed.mistakes, *(m for m in wrong if m not in mistakes)]
        notes += [note for note in parsed.notes if note not in notes]
        complete, unread = complete and parsed.complete, [*unread, *parsed.unread]
        user = request.user or base.default_user
        given[key] = Applied(name, parsed.objects, {**beside, **shared}, request.search, user)
    objects = {key: a.objects for key, a in present.items()}
    after, changes = merge(objects, {key: a.objects for key, a in given.items()})
    new = [item for a in given.values() for item in a.objects]
    ours = {item.id for item in new}
    stays = {key: item for key, item in objects_of(after).items() if key not in ours}
    mistakes += together.check(new, stays, reserved, partial=not complete, unread=unread)
    files = {
        key: given[key] if key in given else dataclasses.replace(present[key], objects=held)
        for key, held in after.items()
    }
    wants, wrong = plan_all(files, base)
    mistakes += [m for m in wrong if any(m.file == a.name for a in given.values())]
    if mistakes:
        order = {a.name: index for index, a in enumerate(given.values())}
        unique = list(dict.fromkeys(mistakes))
        return sorted(unique, key=lambda m: (order.get(m.file, -1), m.line))
    return Prepared(files, tuple(given), tuple(changes), wants, tuple(notes))


def plan_all(files: Mapping[str, Applied], base: Machine) -> tuple[dict[ObjectId, Wanted], list[Mistake]]:
    """Every workload that can be planned, and what is wrong with the others."""
    wants: dict[ObjectId, Wanted] = {}
    mistakes: list[Mistake] = []
    namespaces = {item.name: item for a in files.values() for item in a.objects if item.kind == "Namespace"}
    for key, applied in files.items():
        machine = machine_of(base, key, applied)
        for item in applied.objects:
            if item.kind in manifest.WORKLOADS:
                result = wanted(item, namespaces.get(item.namespace), machine)
                if isinstance(result, Wanted):
                    wants[item.id] = result
                else:
                    mistakes += result
    return wants, mistakes


def machine_of(base: Machine, key: str, applied: Applied) -> Machine:
    """The machine as one file sees it: with the maps, the PATH and the user of its last `up`."""
    user = base.default_user if key == CONTROL_FILE else applied.user
    search = tuple(dict.fromkeys((*applied.search, *base.search)))
    return dataclasses.replace(base, maps=(applied.images, *base.maps), search=search, default_user=user)


def _maps(maps: Iterable[tuple[str, str, str]]) -> tuple[dict[str, img.Image], list[Mistake]]:
    """Several maps as one; the first that has an image wins."""
    images: dict[str, img.Image] = {}
    mistakes: list[Mistake] = []
    for name, text, directory in maps:
        found, wrong = img.read_map(name, text, directory)
        images = {**found, **images}
        mistakes += wrong
    return images, mistakes
