"""The daemon's API for the CLI: HTTP and JSON on `api.sock`, streams as one JSON object a line.

Only processes of the mesh's owner are answered (file mode 0600, and the peer's credentials are checked). Handlers
parse,
call the controller, and spell the answer; `/v1/viz/…` is passed on to viz as it comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from mantle import __version__
from mantle.core.model import Service
from mantle.platform.machine.applying import Request, request_of
from mantle.platform.machine.controller import Controller
from mantle.platform.machine.pods import PodState
from mantle.platform.machine.progress import pod_events, progress, workloads
from mantle.platform.machine.services import behind, target
from mantle.platform.machine.spec import Role
from mantle.platform.machine.state import MeshConfig, StateDir
from mantle.platform.machine.yamlpos import Mistake, Mistakes

READY_TIMEOUT = 120.0
_MOST_BODY = 64 * 1024 * 1024


class Api:
    def __init__(
        self,
        config: MeshConfig,
        store: StateDir,
        controller: Controller,
        proxy_path: str,
        node_pid: int,
        down: Callable[[], AsyncIterator[dict[str, Any]]],
    ) -> None:
        self._config, self._store, self._controller = config, store, controller
        self._proxy_path, self._node_pid, self._down = proxy_path, node_pid, down

    def application(self) -> web.Application:
        app = web.Application(middlewares=[_errors, _owner_only], client_max_size=_MOST_BODY)
        app.router.add_get("/v1/status", self._status)
        app.router.add_post("/v1/apply", self._apply)
        app.router.add_post("/v1/delete", self._delete)
        app.router.add_post("/v1/events", self._events)
        app.router.add_post("/v1/down", self._go_down)
        app.router.add_route("*", "/v1/viz/{rest:.*}", self._viz)
        return app

    # ---- handlers ----

    async def _status(self, _: web.Request) -> web.Response:
        now = time.time_ns() / 1e9
        pods = sorted(
            self._controller.pods.values(), key=lambda p: (p.spec.namespace != "mantle", p.spec.namespace, p.spec.name)
        )
        services = self._controller.world.snapshot.services
        return web.json_response(
            {
                "mesh": self._config.name,
                "version": __version__,
                "daemon_pid": os.getpid(),
                "node_pid": self._node_pid,
                "rootless": os.geteuid() != 0,
                "pods": [pod_json(p, now) for p in pods],
                "services": [service_json(s, pods) for _, s in sorted(services.items(), key=lambda e: str(e[0]))],
                "state_dir": str(self._store.path),
                "proxy_path": self._proxy_path,
                "dns_ip": self._config.dns_ip,
                "pod_cidr": self._config.pod_cidr,
                "service_cidr": self._config.service_cidr,
                "objects": [
                    [*key, a.name] for a in self._controller.files.values() for key in (o.id for o in a.objects)
                ],
            }
        )

    async def _apply(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        try:
            asked: Request = request_of(body)
        except ValueError as error:
            raise Mistakes([Mistake("", 0, str(error))]) from error
        options = body.get("options") or {}
        prepared = await self._controller.apply(asked)  # Mistakes become a 422 before a stream begins

        async def events() -> AsyncIterator[dict[str, Any]]:
            for note in prepared.notes:
                yield {"event": "skipped", "object": "", "namespace": "", "message": note}
            for change in prepared.changes:
                yield {
                    "event": change.event,
                    "object": str(change.item),
                    "namespace": change.item.namespace,
                    "message": "",
                }
            given = [o.id for key in prepared.given for o in prepared.files[key].objects]
            items = [*workloads(self._controller.objects, "mantle"), *(i for i in given if i in prepared.wants)]
            if options.get("wait", True):
                async for event in progress(self._controller, items, float(options.get("timeout") or READY_TIMEOUT)):
                    yield event
            yield {"event": "done", "object": "", "namespace": "", "message": ""}

        return await _stream(request, events())

    async def _delete(self, request: web.Request) -> web.StreamResponse:
        names = (await request.json()).get("files")
        changes = await self._controller.delete(names)

        async def events() -> AsyncIterator[dict[str, Any]]:
            for change in changes:
                yield {
                    "event": change.event,
                    "object": str(change.item),
                    "namespace": change.item.namespace,
                    "message": "",
                }
            yield {"event": "done", "object": "", "namespace": "", "message": ""}

        return await _stream(request, events())

    async def _events(self, request: web.Request) -> web.StreamResponse:
        """What happens to pods from now on, until the client leaves."""
        return await _stream(request, pod_events(self._controller))

    async def _go_down(self, request: web.Request) -> web.StreamResponse:
        return await _stream(request, self._down())

    async def _viz(self, request: web.Request) -> web.StreamResponse:
        """Relays a request and its answer, byte for byte and as it comes."""
        path = self._store.control / "viz.sock"
        url = f"http://viz/v1/{request.match_info['rest']}" + (
            f"?{request.query_string}" if request.query_string else ""
        )
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
        try:
            async with (
                aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path)), timeout=timeout) as session,
                session.request(
                    request.method, url, data=await request.read(), headers=_content_type(request)
                ) as answer,
            ):
                response = web.StreamResponse(status=answer.status, headers=_content_type(answer))
                await response.prepare(request)
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
                await response.write_eof()
                return response
        except (aiohttp.ClientConnectorError, FileNotFoundError) as error:
            return _error(
                503, "viz does not answer yet", "wait until `mantle ps -n mantle` shows mantle-viz ready", error
            )
        except aiohttp.ClientError as error:
            return _error(
                502, f"viz broke off: {error}", "look at `mantle logs deploy/mantle-viz -n mantle -c viz`", error
            )


def pod_json(state: PodState, now: float) -> dict[str, Any]:
    """A pod in `/v1/status`."""
    spec, meta = state.spec, state.spec.meta
    roles = {c.name: c.role for c in spec.containers}
    serving = [s for s in state.status.containers if roles[s.name] is not Role.INIT]
    return {
        "namespace": spec.namespace,
        "name": spec.name,
        "uid": spec.uid,
        "ip": spec.ip,
        "owner": {"kind": meta["owner"][0], "name": meta["owner"][1]},
        "phase": "Terminating" if state.stopping else str(state.status.phase),
        "ready": state.ready,
        "restarts": sum(s.restarts for s in serving),
        "age_seconds": max(0.0, now - float(meta["created"])),
        "meshed": bool(meta["meshed"]),
        "unmeshed_because": meta["unmeshed_because"],
        "service_account": meta["service_account"],
        "labels": meta["labels"],
        "trouble": state.trouble(),
        "containers": [
            {
                "name": s.name,
                "state": s.state,
                "reason": s.reason,
                "message": s.message,
                "ready": state.container_ready(s),
                "restarts": s.restarts,
                "role": str(roles[s.name]),
                "exit_code": s.exit_code,
            }
            for s in state.status.containers
        ],
    }


def service_json(service: Service, pods: Sequence[PodState]) -> dict[str, Any]:
    """A service in `/v1/status`, with the pods that answer each of its ports now."""
    models = {p.spec.uid: p.model("") for p in pods if not p.gone}
    chosen = behind(service, models.values())
    ports = []
    for port in service.ports:
        ends = [
            {"pod": p.key.name, "uid": p.uid, "port": number} for p in chosen if (number := target(port, p)) is not None
        ]
        ports.append({"name": port.name, "port": port.port, "target_port": port.target_port, "endpoints": ends})
    key = service.key
    return {"namespace": key.namespace, "name": key.name, "cluster_ip": service.cluster_ip, "ports": ports}


# ---- how answers are spelled ----


async def _stream(request: web.Request, events: AsyncIterator[dict[str, Any]]) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):  # the client left: what it asked for goes on
        async for event in events:
            await response.write(json.dumps(event).encode() + b"\n")
        await response.write_eof()
    return response


def _content_type(message: web.Request | aiohttp.ClientResponse) -> Mapping[str, str]:
    kind = message.headers.get("Content-Type")
    return {"Content-Type": kind} if kind else {}


def _error(status: int, message: str, fix: str, _because: BaseException | None = None) -> web.Response:
    return web.json_response({"errors": [{"message": message, "file": None, "line": None, "fix": fix}]}, status=status)


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every mistake at once, in the form that the CLI prints."""
    try:
        return await handler(request)
    except Mistakes as wrong:
        errors = [
            {"message": m.message, "file": m.file or None, "line": m.line or None, "fix": m.fix or None}
            for m in wrong.items
        ]
        return web.json_response({"errors": errors}, status=422)
    except json.JSONDecodeError as error:
        return _error(400, f"the body is not JSON: {error}", "send JSON")
    except web.HTTPException as error:
        return _error(error.status, f"{request.method} {request.path}: {error.reason}", "")


@web.middleware
async def _owner_only(request: web.Request, handler: Handler) -> web.StreamResponse:
    peer = request.transport.get_extra_info("socket") if request.transport else None
    if peer is None:
        return _error(400, "the connection is gone", "")
    uid = struct.unpack("iII", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
    if uid != os.geteuid():
        return _error(403, "this mesh belongs to another user", "run the command as the user who started it")
    return await handler(request)


async def serve(api: Api, path: Path) -> web.AppRunner:
    """Listens on `path`, mode 0600."""
    runner = web.AppRunner(api.application(), handle_signals=False, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    path.unlink(missing_ok=True)  # noqa: ASYNC240 - tmpfs, once
    before = os.umask(0o177)
    try:
        await web.UnixSite(runner, str(path)).start()
    finally:
        os.umask(before)
    return runner


async def closed(runner: web.AppRunner) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(3.0):
            await runner.cleanup()
