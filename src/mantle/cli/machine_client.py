"""The CLI's client of a mesh's daemon: HTTP and JSON over the Unix socket `api.sock`, standard library only.

Which mesh: the one named, else the only one that runs; where several run, an error lists them. Every failure is a
`Failure` with its fix: no socket error reaches the user. Importing grpc or aiohttp here would slow all commands.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from mantle.cli.output import Failure, Problem
from mantle.platform.machine.places import state_root as state_root


def running_meshes(root: Path) -> list[str]:
    """Names of the meshes under `root` whose pods run, sorted; their daemon may have died (`MachineClient` revives
    it).
    """
    try:
        candidates = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    except OSError:
        return []
    return [name for name in candidates if _answers(root / name / "api.sock") or node_lives(root / name)]


def node_lives(directory: Path) -> bool:
    """Does the node of the mesh in this directory run, whatever became of its daemon?"""
    written = directory / "mesh.json"
    try:
        if written.lstat().st_uid != os.geteuid():
            return False  # a process that somebody else names is not to be ended or taken over
        known = json.loads(written.read_text())
        fields = Path(f"/proc/{known['node_pid']}/stat").read_text().rpartition(")")[2].split()
        return fields[0] not in "ZX" and int(fields[19]) == int(known["node_start"])
    except (OSError, ValueError, KeyError, IndexError):
        return False


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
            return _is_ours(probe)
        except OSError:
            return False


class MachineClient:
    """Requests to one mesh's daemon. `mesh` None: the only one running."""

    def __init__(self, mesh: str | None = None, root: Path | None = None) -> None:
        self.root = root or state_root()
        self.mesh = mesh or self._only_one()
        self.socket_path = self.root / self.mesh / "api.sock"
        self._revived = False

    def _only_one(self) -> str:
        meshes = running_meshes(self.root)
        if not meshes:
            raise Failure("no mesh is running", fix="start one with `mantle demo` or `mantle up FILE`")
        if len(meshes) > 1:
            raise Failure(f"several meshes are running: {', '.join(meshes)}", fix="say which one with --mesh NAME")
        return meshes[0]

    def get(self, path: str, **query: str | int) -> Any:
        """The decoded JSON answer of `GET path`."""
        return self._json("GET", _with_query(path, query), None)

    def post(self, path: str, body: Any = None) -> Any:
        """The decoded JSON answer of `POST path` with a JSON body."""
        return self._json("POST", path, body)

    def stream(self, path: str, body: Any = None) -> Iterator[dict[str, Any]]:
        """The objects of an NDJSON answer to `POST path`, each as it comes; closing the iterator ends the request."""
        with self._answer("POST", path, body, timeout=None) as response:
            try:
                for line in response:
                    if line.strip():
                        yield json.loads(line)
            except (OSError, HTTPException, ValueError) as error:
                raise Failure(f"the stream from mesh {self.mesh} broke off: {error}") from error

    def _json(self, method: str, path: str, body: Any) -> Any:
        with self._answer(method, path, body, timeout=60) as response:
            try:
                data = response.read()
                return json.loads(data) if data else None
            except (OSError, HTTPException, ValueError) as error:
                raise Failure(f"mesh {self.mesh} gave an answer that cannot be read: {error}") from error

    @contextmanager
    def _answer(self, method: str, path: str, body: Any, timeout: float | None) -> Iterator[HTTPResponse]:
        """An answer with a good status, closed afterwards."""
        with closing(_UnixConnection(str(self.socket_path), timeout)) as connection:
            payload = None if body is None else json.dumps(body).encode()
            try:
                try:
                    connection.connect()
                except (FileNotFoundError, ConnectionRefusedError):
                    if not self._revive():
                        raise
                    connection.connect()
                connection.request(method, path, payload, {"Content-Type": "application/json"} if payload else {})
                response = connection.getresponse()
            except (FileNotFoundError, ConnectionRefusedError) as error:
                from mantle.cli.launch import refuse_foreign

                refuse_foreign(self.mesh)
                others = running_meshes(self.root)
                hint = f"running: {', '.join(others)}" if others else "start one with `mantle demo` or `mantle up FILE`"
                raise Failure(f"mesh {self.mesh} is not running", fix=hint) from error
            except PermissionError as error:
                fix = "run the command as the user who started it"
                raise Failure(f"mesh {self.mesh} belongs to another user", fix=fix) from error
            except (OSError, HTTPException) as error:
                raise Failure(f"no answer from the daemon of mesh {self.mesh}: {error}") from error
            with response:
                if response.status >= 400:
                    raise self._refused(response.status, response.read())
                yield response

    def _revive(self) -> bool:
        """Starts the daemon of a mesh whose pods run without one; once, so that one that cannot start ends in an
        error.
        """
        directory = self.root / self.mesh
        if self._revived or self.root != state_root() or not node_lives(directory):
            return False
        from mantle.cli.launch import Launch, start

        self._revived = True
        start(self.mesh, Launch())
        return True

    def _refused(self, status: int, data: bytes) -> Failure:
        try:
            problems = [
                Problem(e["message"], e.get("fix"), e.get("file"), e.get("line")) for e in json.loads(data)["errors"]
            ]
        except (ValueError, KeyError, TypeError):
            problems = []
        return Failure.of(problems or [Problem(f"the daemon of mesh {self.mesh} answered {status}")])


class _UnixConnection(HTTPConnection):
    def __init__(self, path: str, timeout: float | None) -> None:
        super().__init__("mantle", timeout=5)
        self._path, self._read_timeout = path, timeout

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(5)
        self.sock.connect(self._path)
        if not _is_ours(self.sock):
            self.sock.close()
            raise PermissionError(f"{self._path} is another user's")
        self.sock.settimeout(self._read_timeout)


def _is_ours(connected: socket.socket) -> bool:
    """Does our own user listen there? The directory of meshes may lie where everybody may write (/dev/shm), and what a
    command sends (Secrets of manifests) is for nobody else.
    """
    _, uid, _ = struct.unpack("iII", connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return bool(uid == os.geteuid())


def _with_query(path: str, query: dict[str, str | int]) -> str:
    return f"{path}?{urlencode(query)}" if query else path
