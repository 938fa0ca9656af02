"""Files on disk -> the daemon's apply request, and its events -> lines. Shared by `up` and `demo`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mantle.cli.output import Failure, Problem, escape

MAP_NAME = "mantle.images.yml"


def request(
    files: Sequence[str], images: Sequence[str], namespace: str | None, timeout: float | None = None, wait: bool = True
) -> dict[str, Any]:
    """The body of `POST /v1/apply`. `-` is standard input. Raises `Failure` with every file that cannot be read."""
    problems: list[Problem] = []
    given = []
    for name in files:
        if name == "-":
            given.append({"name": "-", "path": "-", "text": sys.stdin.read(), "images": _beside(Path.cwd())})
            continue
        path = Path(name)
        if path.is_dir():
            inside = sorted(str(p) for p in path.iterdir() if p.suffix in (".yml", ".yaml") and p.name != MAP_NAME)
            if not inside:
                problems.append(Problem("no .yml or .yaml file in this directory", "name a file", name))
            given += [entry for entry in (_file(p, problems) for p in inside) if entry]
        elif entry := _file(name, problems):
            given.append(entry)
    maps = [entry for entry in (_map(Path(name), problems) for name in images) if entry]
    if problems:
        raise Failure.of(problems)
    options: dict[str, Any] = {"search": os.environ.get("PATH", "").split(":"), "namespace": namespace, "wait": wait}
    if timeout is not None:
        options["timeout"] = timeout
    if user := _sudo_user():
        options["user"] = user
    return {"files": given, "images": maps, "options": options}


def _file(name: str, problems: list[Problem]) -> dict[str, Any] | None:
    text = _read(Path(name), problems)
    path = Path(name).absolute()
    return None if text is None else {"name": name, "path": str(path), "text": text, "images": _beside(path.parent)}


def _beside(directory: Path) -> list[dict[str, str]]:
    found = directory / MAP_NAME
    if not found.is_file():
        return []
    entry = _map(found, [])
    return [entry] if entry else []


def _map(path: Path, problems: list[Problem]) -> dict[str, str] | None:
    text = _read(path, problems)
    shown = os.path.relpath(path)
    return None if text is None else {"name": shown, "text": text, "directory": str(path.absolute().parent)}


def _read(path: Path, problems: list[Problem]) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        problems.append(Problem("this file is not text", "give a YAML file in UTF-8", str(path)))
    except OSError as error:
        fix = "correct the path" if isinstance(error, FileNotFoundError) else "make it readable"
        problems.append(Problem((error.strerror or "cannot be read").lower(), fix, str(path)))
    return None


def _sudo_user() -> dict[str, Any] | None:
    """The caller of sudo: as whom programs run when nothing else is said. The daemon may have been started by
    somebody else.
    """
    uid = os.environ.get("SUDO_UID", "")
    if os.geteuid() != 0 or not uid.isdecimal() or uid == "0":
        return None
    import pwd

    try:
        entry = pwd.getpwuid(int(uid))
    except KeyError:
        return None
    groups = [g for g in os.getgrouplist(entry.pw_name, entry.pw_gid) if g != entry.pw_gid]
    return {"uid": entry.pw_uid, "gid": entry.pw_gid, "groups": groups, "home": entry.pw_dir}


def check_alone(body: Mapping[str, Any], also: Sequence[Problem] = ()) -> None:
    """The same checks that the daemon makes, before there is one: a file that is wrong starts nothing. Raises `Failure`
    with every mistake, and with what else is known to be wrong.
    """
    from mantle.platform.machine.preview import mistakes

    wrong = [Problem(m.message, m.fix or None, m.file or None, m.line or None) for m in mistakes(body)]
    if problems := [*also, *wrong]:
        raise Failure.of(problems)


def lines(events: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, bool]]:
    """(line, is it an error) of each event that people are told, as `kubectl apply` words them."""
    words = {
        "created": "created",
        "updated": "configured",
        "unchanged": "unchanged",
        "removed": "removed",
        "ready": "ready",
    }
    for event in events:
        kind, name, message = event["event"], event["object"], escape(event["message"])
        name = (
            f"{name} (namespace {event['namespace']})" if event.get("namespace") not in ("", "default", None) else name
        )
        if kind == "skipped":
            yield f"note: {message}", False
        elif kind == "error":
            yield f"{name}: {message}", True
        elif kind == "waiting":
            yield f"{name} waiting: {message}", False
        elif kind in words:
            yield f"{name} {words[kind]}" + (f": {message}" if message else ""), False
