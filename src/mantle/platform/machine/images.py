"""What `image:` means on one machine: a program of this machine, found by a map that the user writes.

    images:
      ghcr.io/acme/web:1.4:          # exact, or without a tag for every tag
        command: [python3, -m, web]  # the image's entrypoint; found on the PATH
        args: [--verbose]            # its default arguments
        directory: ./web             # working directory, relative to this file
        env: {PORT: "8080"}

For: reading such maps, and joining an image with a container as a container runtime does (`command` replaces the
entrypoint and drops the default arguments, `args` replaces only these). Pure, but for `find_program`, the rim.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mantle.platform.machine.schema import ENV, TEXT, Map, Obj, Scalar, Seq, Wrong, walk
from mantle.platform.machine.yamlpos import Document, Mistake
from mantle.platform.machine.yamlpos import read as read_yaml

MAP_NAME = "mantle.images.yml"


@dataclass(frozen=True, slots=True)
class Image:
    """One entry of a map. `file` and `line` are what an error points at."""

    command: tuple[str, ...]
    """Empty: the entry is wrong, and that is said where it stands."""
    args: tuple[str, ...] = ()
    directory: str = "/"
    env: Mapping[str, str] = field(default_factory=dict)
    file: str = ""
    line: int = 0


@dataclass(frozen=True, slots=True)
class Program:
    """What a container runs, before variables are expanded and the program is looked up."""

    argv: tuple[str, ...]
    cwd: str
    env: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class NotFound:
    """A program that cannot be run, and why."""

    problem: str
    fix: str


_IMAGE = Obj(
    {
        "command": Seq(TEXT),
        "args": Seq(TEXT),
        "directory": Scalar("a directory", (str,)),
        "env": Map(Scalar("text", (str,))),
    },
    ("command",),
)


def read_map(file: str, text: str, directory: str) -> tuple[dict[str, Image], list[Mistake]]:
    """The images of one map. `directory` is where the file lies (absolute): what its relative directories start
    from.
    """
    documents, mistakes = read_yaml(file, text)
    images: dict[str, Image] = {}
    for document in documents:
        value = document.value
        if not isinstance(value, dict) or not isinstance(value.get("images"), dict):
            mistakes.append(
                Mistake(
                    file,
                    document.line(()),
                    "a map of images begins with `images:`",
                    "write `images:` and, indented, one entry an image",
                )
            )
            continue
        mistakes += [
            Mistake(file, document.line((key,)), f"unknown field {key}", "only `images:` belongs here")
            for key in value
            if key != "images"
        ]
        for name, entry in value["images"].items():
            _entry(file, directory, document, name, entry, images, mistakes)
    return images, mistakes


def _entry(
    file: str,
    directory: str,
    document: Document,
    name: str,
    entry: Any,
    images: dict[str, Image],
    mistakes: list[Mistake],
) -> None:
    at = ("images", name)
    wrong = [w for w in walk(_IMAGE, entry if entry is not None else {}) if isinstance(w, Wrong)]
    for w in wrong:
        fix = w.fix
        if w.path == ("command",) and isinstance(entry.get("command"), str):
            fix = f"write a list: command: [{', '.join(entry['command'].split())}]"
        mistakes.append(Mistake(file, document.line((*at, *w.path)), f"image {name}: {w.message}", fix))
    if wrong:
        images[name] = Image((), file=file, line=document.line(at))  # it is mapped, though nobody knows to what
        return
    for variable in entry.get("env") or {}:
        if problem := ENV.check(variable):
            mistakes.append(Mistake(file, document.line((*at, "env", variable)), f"image {name}: {problem}"))
    if not entry["command"]:
        mistakes.append(
            Mistake(file, document.line((*at, "command")), f"image {name}: the command is empty", "name a program")
        )
        images[name] = Image((), file=file, line=document.line(at))
        return
    cwd = os.path.normpath(Path(directory) / entry["directory"]) if entry.get("directory") else "/"
    images[name] = Image(
        tuple(entry["command"]),
        tuple(entry.get("args") or ()),
        cwd,
        dict(entry.get("env") or {}),
        file,
        document.line(at),
    )


def untagged(image: str) -> str:
    """`registry:5000/acme/web:1.4@sha256:…` -> `registry:5000/acme/web`"""
    image = image.split("@", 1)[0]
    head, _, last = image.rpartition("/")
    return f"{head}/{last.split(':', 1)[0]}" if head else last.split(":", 1)[0]


def resolve(image: str, maps: Iterable[Mapping[str, Image]]) -> Image | None:
    """The entry of the first map that has the image exactly, or for every tag. None: nobody mapped it (`unmapped`
    says so).
    """
    for images in maps:
        found = images.get(image) or images.get(untagged(image))
        if found is not None:
            return found
    return None


def unmapped(image: str, beside: str) -> tuple[str, str]:
    """(message, fix) for an image that nobody mapped. `beside`: the manifest's file name."""
    guess = untagged(image).rsplit("/", 1)[-1]
    lines = (
        "images:",
        f"  {image}:",
        f"    command: [{guess}]   # the program that this image runs, as found on your PATH",
        "    directory: .         # where it runs, relative to that file",
    )
    return (
        f"the image {image} is not mapped to a program of this machine",
        f"add to {Path(beside).parent / MAP_NAME} (or to a file given with --images):\n"
        + "\n".join(" " * 8 + line for line in lines),
    )


def join(image: Image, container: Mapping[str, Any]) -> Program:
    """The image's program with the container's `command`, `args` and `workingDir`, as a container runtime joins
    them.
    """
    command, args = container.get("command"), container.get("args")
    if command:
        argv = [*command, *(args or [])]
    elif args:
        argv = [*image.command, *args]
    else:
        argv = [*image.command, *image.args]
    return Program(tuple(argv), container.get("workingDir") or image.directory, image.env)


_VARIABLE = re.compile(r"\$(\$|\(([-._a-zA-Z][-._a-zA-Z0-9]*)\))")


def expand(text: str, env: Mapping[str, str]) -> str:
    """Kubernetes' `$(VAR)`: unknown ones stay as they are, `$$` is one `$`."""

    def one(match: re.Match[str]) -> str:
        if match[1] == "$":
            return "$"
        return env.get(match[2], match[0])

    return _VARIABLE.sub(one, text)


@dataclass(frozen=True, slots=True)
class Viewer:
    """With whose rights a path is looked at."""

    uid: int
    groups: frozenset[int]


def find_program(name: str, cwd: str, search: Iterable[str], viewer: Viewer) -> str | NotFound:
    """The absolute path of a program: a path is taken from `cwd`, a bare name is looked for in each directory of
    `search`.

    A program that the viewer can reach by itself is preferred to one that would have to be shown to it.
    """
    if not name or "\0" in name:
        return NotFound("the command is empty", "name a program")
    if "/" in name:
        path = Path(os.path.normpath(Path(cwd) / name))
        if path.is_dir():
            return NotFound(f"{path} is a directory, not a program", "name the program inside it")
        if not path.exists():
            return NotFound(f"the program {path} does not exist", "correct the path, or build it first")
        return str(path) if os.access(path, os.X_OK) else NotFound(f"{path} may not be executed", f"chmod +x {path}")
    search = [entry for entry in search if entry]
    found = [
        str(path)
        for path in (Path(entry).absolute() / name for entry in search)
        if path.is_file() and os.access(path, os.X_OK)
    ]
    for path_text in found:
        if can_reach(path_text, viewer):
            return path_text
    if found:
        return found[0]
    shown = ":".join(search[:6]) + ("…" if len(search) > 6 else "")
    return NotFound(f"the program {name} is not on your PATH", f"install it, or write its path (looked in {shown})")


def can_reach(path: str, viewer: Viewer) -> bool:
    """May the viewer enter every directory above `path`?"""
    for parent in Path(path).parents:
        try:
            found = parent.stat()
        except OSError:
            return False
        bit = 0o100 if found.st_uid == viewer.uid else 0o010 if found.st_gid in viewer.groups else 0o001
        if not found.st_mode & bit:
            return False
    return True


def _interpreter(program: Path) -> list[Path]:
    """What runs a script that begins with `#!`; nothing for other programs, and for one that cannot be read."""
    try:
        with program.open("rb") as script:
            first = script.readline(256)
    except OSError:
        return []
    words = first[2:].split() if first.startswith(b"#!") else []
    return [Path(os.fsdecode(words[0]))] if words else []


def exposures(program: str, cwd: str, viewer: Viewer, search: str = "") -> list[str]:
    """Directories that a pod must be shown because the viewer cannot reach them: where the program, its interpreter's
    libraries and its working directory lie. `search`: its PYTHONPATH.
    """
    wanted = [Path(cwd)] if cwd != "/" else []
    wanted += [Path(entry) for entry in search.split(":") if entry.startswith("/")]
    programs = [Path(program), *_interpreter(Path(program))]
    for path in {each for named in programs for each in (named, named.resolve())}:
        prefix = path.parent.parent
        whole = path.parent.name == "bin" and (prefix / "lib").is_dir() and bool(prefix.stat().st_mode & 0o001)
        wanted.append(prefix if whole else path.parent)
        wanted += _linked(prefix) if whole else []
    return sorted({str(path) for path in wanted if path.is_dir() and not can_reach(str(path / "x"), viewer)})


def _linked(prefix: Path) -> list[Path]:
    """What a Python environment only points at: checkouts that were installed to be edited (`*.pth`)."""
    found = []
    for file in prefix.glob("lib/python3*/site-packages/*.pth"):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            found += [Path(line) for line in file.read_text().splitlines() if line.startswith("/")]
    return found
