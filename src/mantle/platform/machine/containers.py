"""One container of a manifest -> one `ContainerSpec`: program, environment, user, mounts, probes. Pure but for the
lookup
of programs on the host (`find`), which happens before anything is decided.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

from mantle.core.policy import GRPC_HEALTH
from mantle.platform.machine import images as img
from mantle.platform.machine import volumes as vol
from mantle.platform.machine.manifest import Object, ObjectId
from mantle.platform.machine.spec import ContainerSpec, MountSpec, ProbeSpec, Role
from mantle.platform.machine.yamlpos import Path

if TYPE_CHECKING:
    from mantle.platform.machine.plan import Machine

CAPABILITIES = frozenset({"NET_ADMIN", "NET_RAW"})
"""What Mantle's own containers may keep; nobody else keeps any."""


@dataclass(frozen=True, slots=True)
class Found:
    """A container's program: `path` is absolute; `argv[0]` of `program` is what was asked for."""

    program: img.Program
    path: str
    own: bool
    """One of Mantle's own images."""
    expose: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """`path` is relative to the container. An empty message: the reason is said elsewhere."""

    path: Path
    message: str
    fix: str


def find(box: Mapping[str, Any], spec: Mapping[str, Any], machine: Machine, file: str) -> Found | Problem:
    """The program that a container runs on this machine, or why there is none."""
    image = img.resolve(box["image"], machine.maps)
    if image is None:
        message, fix = img.unmapped(box["image"], file)
        return Problem(("image",), message, fix)
    if not image.command:
        return Problem(("image",), "", "")
    program = img.join(image, box)
    mounted = [m["mountPath"].rstrip("/") or "/" for m in box.get("volumeMounts") or []]
    inside = any(program.cwd == m or program.cwd.startswith(m + "/") for m in mounted)
    if not inside and not FilePath(program.cwd).is_dir():
        if box.get("workingDir"):
            return Problem(
                ("workingDir",),
                f"the directory {program.cwd} does not exist on this machine",
                "create it, or correct the path",
            )
        return Problem(
            ("image",),
            f"the directory {program.cwd} of image {box['image']} does not exist",
            f"correct `directory` at {image.file}:{image.line}",
        )
    uid, gid, groups, _ = _user(box, spec, machine)
    viewer = img.Viewer(os.geteuid() if machine.rootless else uid, frozenset((*groups, gid)))
    name = img.expand(program.argv[0], program.env)
    where = (name.startswith(m + "/") for m in mounted)
    if name.startswith("/") and any(where):
        return Found(program, name, False, tuple(img.exposures(name, program.cwd, viewer)))
    path = img.find_program(name, program.cwd, machine.search, viewer)
    if isinstance(path, img.NotFound):
        at: Path = ("command",) if box.get("command") else ("image",)
        said = "" if box.get("command") or not image.file else f" (image {box['image']}, {image.file}:{image.line})"
        return Problem(at, path.problem + said, path.fix)
    own = img.untagged(box["image"]) in machine.control_images and image.file == ""
    return Found(program, path, own, tuple(img.exposures(path, program.cwd, viewer, program.env.get("PYTHONPATH", ""))))


@dataclass(slots=True)
class Built:
    containers: tuple[ContainerSpec, ...] = ()
    volumes: list[vol.Volume] = field(default_factory=list)
    owners: dict[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    """volume -> (uid, gid) of every container that mounts it."""
    sub_paths: list[tuple[str, str]] = field(default_factory=list)
    expose: set[str] = field(default_factory=set)


def all_of(spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [*(spec.get("initContainers") or []), *(spec.get("containers") or [])]


def build(
    spec: Mapping[str, Any],
    programs: Mapping[str, Found],
    me: vol.Identity,
    objects: Mapping[ObjectId, Object],
    machine: Machine,
    hostname: str,
    volume_root: str,
    links: Mapping[str, str],
) -> Built:
    """All containers of a pod, in start order, and what they share. `links`: variables that name the services."""
    built = Built(volumes=vol.volumes(spec, objects, me))
    sources = {v.name: v.source or f"{volume_root}/{v.name}" for v in built.volumes}
    kinds = {v.name: v for v in built.volumes}
    made = []
    for key in ("initContainers", "containers"):
        for box in spec.get(key) or []:
            found = programs[box["name"]]
            built.expose.update(found.expose)
            uid, gid, groups, home = _user(box, spec, machine)
            env = environment(box, found, me, objects, machine, hostname, home, {} if found.own else links)
            mounts = []
            for mount in box.get("volumeMounts") or []:
                if sub := (mount.get("subPath") or "").strip("/"):
                    built.sub_paths.append((mount["name"], sub))
                read_only = bool(mount.get("readOnly")) or not kinds[mount["name"]].writable
                mounts.append(MountSpec(sources[mount["name"]], mount["mountPath"], read_only, sub))
                before = built.owners.get(mount["name"], ())
                built.owners[mount["name"]] = before if (uid, gid) in before else (*before, (uid, gid))
            if found.own and found.path != machine.proxy_path and me.namespace == machine.control_namespace:
                mounts.append(MountSpec(f"{machine.state_dir}/control", machine.control_target))
            capabilities = (box.get("securityContext") or {}).get("capabilities") or {}
            kept = (
                sorted(CAPABILITIES.intersection(capabilities.get("add") or []))
                if found.own and found.path == machine.proxy_path
                else []
            )
            role = (
                Role.APP if key == "containers" else Role.SIDECAR if box.get("restartPolicy") == "Always" else Role.INIT
            )
            argv = [img.expand(part, env) for part in found.program.argv]
            made.append(
                ContainerSpec(
                    name=box["name"],
                    role=role,
                    argv=(found.path, *argv[1:]),
                    env=env,
                    cwd=found.program.cwd,
                    uid=uid,
                    gid=gid,
                    groups=groups,
                    capabilities=tuple(kept),
                    own_user_namespace=not found.own,
                    mounts=tuple(mounts),
                    startup=probe(box, "startupProbe", found.own),
                    readiness=probe(box, "readinessProbe", found.own),
                    liveness=probe(box, "livenessProbe", False),
                )
            )
    built.containers = tuple(made)
    return built


def _user(box: Mapping[str, Any], spec: Mapping[str, Any], machine: Machine) -> tuple[int, int, tuple[int, ...], str]:
    pod, own = spec.get("securityContext") or {}, box.get("securityContext") or {}
    context = {**pod, **own}
    user = machine.default_user if context.get("runAsUser") is None else machine.user_of(context["runAsUser"])
    extra = {*(pod.get("supplementalGroups") or []), *([pod["fsGroup"]] if pod.get("fsGroup") is not None else [])}
    gid = user.gid if context.get("runAsGroup") is None else context["runAsGroup"]
    return user.uid, gid, tuple(sorted({*user.groups, *extra} - {gid})), user.home


def environment(
    box: Mapping[str, Any],
    found: Found,
    me: vol.Identity,
    objects: Mapping[ObjectId, Object],
    machine: Machine,
    hostname: str,
    home: str,
    links: Mapping[str, str],
) -> dict[str, str]:
    """What the process sees: the machine's basics, the image's, the services, then `envFrom` and `env` in order,
    `$(VAR)` expanded.
    """
    env = {"PATH": ":".join(machine.search), "HOSTNAME": hostname, "HOME": home, **found.program.env, **links}
    for source in box.get("envFrom") or []:
        kind, ref = (
            ("ConfigMap", source.get("configMapRef")) if source.get("configMapRef") else ("Secret", source["secretRef"])
        )
        for key, data in vol.data_of(objects.get((kind, me.namespace, ref["name"]))).items():
            env[f"{source.get('prefix') or ''}{key}"] = data.decode("utf-8", "replace")
    for entry in box.get("env") or []:
        value = _value(entry, me, objects)
        if value is not None:
            env[entry["name"]] = img.expand(value, env) if "valueFrom" not in entry else value
    return env


def _value(entry: Mapping[str, Any], me: vol.Identity, objects: Mapping[ObjectId, Object]) -> str | None:
    source = entry.get("valueFrom")
    if not source:
        return str(entry.get("value") or "")
    if ref := source.get("fieldRef"):
        return vol.field(ref["fieldPath"], me)
    if ref := source.get("resourceFieldRef"):
        return vol.resource(ref, me)
    kind, ref = (
        ("ConfigMap", source["configMapKeyRef"])
        if source.get("configMapKeyRef")
        else ("Secret", source["secretKeyRef"])
    )
    data = vol.data_of(objects.get((kind, me.namespace, ref["name"]))).get(ref["key"])
    return None if data is None else data.decode("utf-8", "replace")


def probe(box: Mapping[str, Any], key: str, at_once: bool) -> ProbeSpec | None:
    """One probe with named ports resolved. `at_once`: start without the initial delay (Mantle's own containers say
    when they are ready).
    """
    value = box.get(key)
    if not value:
        return None
    named = {p.get("name"): p["containerPort"] for p in box.get("ports") or []}
    times = {
        "initial_delay": 0.0 if at_once else float(value.get("initialDelaySeconds", 0)),
        "period": float(value.get("periodSeconds", 10)),
        "timeout": float(value.get("timeoutSeconds", 1)),
        "success": int(value.get("successThreshold", 1)),
        "failure": int(value.get("failureThreshold", 3)),
    }
    if http := value.get("httpGet"):
        headers = tuple((h["name"], h.get("value", "")) for h in http.get("httpHeaders") or [])
        target = (
            (http.get("scheme") or "HTTP").lower(),
            int(named.get(http["port"], http["port"])),
            http.get("path") or "/",
        )
        return ProbeSpec(http=target, http_headers=headers, **times)  # type: ignore[arg-type]
    if tcp := value.get("tcpSocket"):
        return ProbeSpec(tcp=int(named.get(tcp["port"], tcp["port"])), **times)  # type: ignore[arg-type]
    if grpc := value.get("grpc"):
        return ProbeSpec(grpc=(grpc["port"], grpc.get("service") or ""), **times)  # type: ignore[arg-type]
    return ProbeSpec(exec=tuple(value["exec"]["command"]), **times)  # type: ignore[arg-type]


def probe_paths(spec: Mapping[str, Any]) -> list[list[Any]]:
    """[port, path] of every httpGet and grpc probe: these are answered although the client has no identity."""
    out: list[list[Any]] = []
    for box in all_of(spec):
        for key in ("startupProbe", "readinessProbe", "livenessProbe"):
            made = probe(box, key, False)
            asked = None
            if made is not None and made.http is not None:
                asked = [made.http[1], made.http[2]]
            elif made is not None and made.grpc is not None:
                asked = [made.grpc[0], GRPC_HEALTH]
            if asked is not None and asked not in out:
                out.append(asked)
    return out
