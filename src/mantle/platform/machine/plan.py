"""Objects -> what the node runtime is told to run. Pure: every question about the machine is answered by its arguments.

`wanted` decides what a workload's pods are (injected, hashed, their programs found) or what is wrong with it, before
anything starts; `build` makes one pod of it, once it has a name, a uid and an address. Must not know how pods are
compared with those that run (`reconcile.py`) or where files are written (`podfiles.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mantle.core import inject
from mantle.core.inject_containers import PROXY
from mantle.core.proxy_env import Values
from mantle.platform.machine import containers as boxes
from mantle.platform.machine import images as img
from mantle.platform.machine import services as svc
from mantle.platform.machine import volumes as vol
from mantle.platform.machine.manifest import Object, ObjectId, containers, service_account, template
from mantle.platform.machine.spec import PodSpec, Restart
from mantle.platform.machine.yamlpos import Mistake

CLUSTER_DOMAIN = "cluster.local"


@dataclass(frozen=True, slots=True)
class User:
    """A user of the host, as programs of a pod run."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    home: str = "/"


NOBODY = User(65534, 65534)


@dataclass(frozen=True, slots=True)
class Machine:
    """What planning must know about this machine and mesh; the same for every pod of one apply."""

    state_dir: str
    node_name: str
    dns_ip: str
    rootless: bool
    default_user: User
    """Who programs run as without `runAsUser`: the caller of sudo, else nobody."""
    search: tuple[str, ...]
    """Directories where programs are found, best first."""
    proxy_path: str
    """The mantle-proxy binary; only containers that run it keep capabilities."""
    values: Values
    maps: tuple[Mapping[str, img.Image], ...] = ()
    user_of: Callable[[int], User] = field(default=lambda uid: User(uid, uid))
    searches: tuple[str, ...] = ()
    """The host's own DNS search domains, after the mesh's."""
    cpus: int = 1
    memory: int = 1 << 30
    control_namespace: str = "mantle"
    """Its pods, and no others, see the platform's directory (users cannot have objects there)."""
    control_target: str = "/var/run/mantle/control"
    """Where they see it: the sockets of the platform and of viz."""
    control_images: frozenset[str] = frozenset({"mantle/proxy", "mantle/control-plane"})


@dataclass(frozen=True, slots=True)
class Wanted:
    """A workload whose pods can be made: `build` needs nothing else about it."""

    item: Object
    pod: Mapping[str, Any]
    """{metadata, spec} with the sidecar, if any."""
    meshed: bool
    unmeshed_because: str
    programs: Mapping[str, boxes.Found]
    hash: str
    replicas: int


@dataclass(frozen=True, slots=True)
class Planned:
    """One pod, ready to be made: files first, then the runtime."""

    spec: PodSpec
    volumes: tuple[vol.Volume, ...]
    owners: Mapping[str, tuple[tuple[int, int], ...]]
    """volume -> (uid, gid) of everyone who reads it."""
    sub_paths: tuple[tuple[str, str], ...]
    """(volume, subPath) that a mount needs."""


def wanted(item: Object, namespace: Object | None, machine: Machine) -> Wanted | list[Mistake]:
    """What the pods of a workload are, or everything that keeps them from running. `item` is a Deployment, Pod or
    Job.
    """
    pod = template(item)
    assert pod is not None, "only workloads are planned"
    meta = {"labels": dict(pod.labels), "annotations": dict(pod.annotations), "namespace": item.namespace}
    ns_doc = namespace.doc if namespace is not None else {"metadata": {"name": item.namespace}}
    made = inject.inject_pod({"metadata": meta, "spec": pod.spec}, ns_doc, machine.values, (item.kind, item.name))
    found: list[Mistake] = []
    meshed, because = False, ""
    final: Mapping[str, Any] = {"metadata": meta, "spec": pod.spec}
    if isinstance(made, inject.Injected):
        meshed, final = True, made.pod
    elif isinstance(made, inject.Skipped):
        because = ", ".join(reason.message() for reason in made.reasons)
    else:
        for wrong in made.mistakes:
            where = (*pod.path, "metadata", "annotations", wrong.annotation)
            found.append(
                item.wrong(
                    where, f"{wrong.annotation}: found {wrong.value!r}", f"in the {wrong.where}: {wrong.accepted}"
                )
            )
    paths = {box["name"]: path for path, box, _ in containers(pod)}
    programs: dict[str, boxes.Found] = {}
    used: list[Any] = []
    for box in [*(final["spec"].get("initContainers") or []), *(final["spec"].get("containers") or [])]:
        result = boxes.find(box, final["spec"], machine, item.file)
        if isinstance(result, boxes.Problem):
            where = (*paths.get(box["name"], pod.path), *result.path)
            if result.message:
                found.append(item.wrong(where, f"container {box['name']}: {result.message}", result.fix))
        else:
            programs[box["name"]] = result
            used.append([result.path, result.program.argv, result.program.cwd, dict(result.program.env)])
    if meshed:
        found += _proxy_ports(item, pod, final["spec"])
    found += _users(item, pod, machine)
    found += _host_paths(item, pod, machine)
    if found:
        return found
    digest = hashlib.sha256(json.dumps([final, used, machine.default_user.uid], sort_keys=True).encode()).hexdigest()
    return Wanted(item, final, meshed, because, programs, digest[:32], _replicas(item))


def _replicas(item: Object) -> int:
    if item.kind == "Deployment":
        replicas = item.doc["spec"].get("replicas")
        return 1 if replicas is None else int(replicas)
    if item.kind == "Job":
        spec = item.doc["spec"]
        return min(int(spec.get("parallelism", 1)), int(spec.get("completions") or spec.get("parallelism", 1)))
    return 1


def _proxy_ports(item: Object, pod: Any, final: Mapping[str, Any]) -> Iterable[Mistake]:
    """Ports that the sidecar needs itself: the application could not bind them."""
    sidecar = next(
        (c for c in [*(final.get("initContainers") or []), *final["containers"]] if c["name"] == PROXY), None
    )
    if sidecar is None:
        return
    values = {e["name"].removeprefix("MANTLE_PROXY_"): e.get("value", "") for e in sidecar.get("env") or []}
    taken = {
        values.get(f"{name}_LISTEN_ADDR", "").rpartition(":")[2] for name in ("INBOUND", "OUTBOUND", "CONTROL", "ADMIN")
    }
    for path, box, _ in containers(pod):
        if box["name"] == PROXY:  # rendered by `mantle inject --manual`, and made anew here
            continue
        for index, port in enumerate(box.get("ports") or []):
            if str(port["containerPort"]) in taken:
                yield item.wrong(
                    (*path, "ports", index),
                    f"port {port['containerPort']} is in use inside the pod: the mesh's proxy has it",
                    "give the application another port, or move the proxy with config.mantle.dev/inbound-port, "
                    "outbound-port, control-port or admin-port",
                )


def _users(item: Object, pod: Any, machine: Machine) -> Iterable[Mistake]:
    for path, box, _ in containers(pod):
        context = {**(pod.spec.get("securityContext") or {}), **(box.get("securityContext") or {})}
        uid = context.get("runAsUser", machine.default_user.uid)
        if context.get("runAsNonRoot") and uid == 0:
            yield item.wrong(
                (*path, "securityContext"),
                "runAsNonRoot is set, but the container would run as root",
                "set runAsUser to a number above 0",
            )


def _host_paths(item: Object, pod: Any, machine: Machine) -> Iterable[Mistake]:
    """A hostPath must be there, and never shows what pods are kept from."""
    for index, volume in enumerate(pod.spec.get("volumes") or []):
        if "hostPath" not in volume:
            continue
        where = (*pod.path, "spec", "volumes", index, "hostPath")
        path = Path(volume["hostPath"]["path"]).resolve()
        hidden = Path(machine.state_dir).parent
        if path == hidden or hidden in path.parents or path in hidden.parents:
            yield item.wrong(where, f"{path} would show a mesh's own state to the pod", "name a directory beside it")
        elif not path.exists() and not (volume["hostPath"].get("type") or "").endswith("OrCreate"):
            yield item.wrong(
                where, f"{path} does not exist on this machine", "create it, or write type: DirectoryOrCreate"
            )


def build(
    want: Wanted,
    machine: Machine,
    objects: Mapping[ObjectId, Object],
    *,
    name: str,
    uid: str,
    ip: str,
    created: float,
    service_ips: Mapping[str, str],
) -> Planned:
    """One pod of a workload. `created` is Unix time in seconds, kept for the pod's age; `service_ips` by
    `namespace/name`.
    """
    meta, spec = want.pod["metadata"], want.pod["spec"]
    pod = template(want.item)
    assert pod is not None
    account = service_account(pod)
    namespace = want.item.namespace
    me = vol.Identity(
        name=name,
        namespace=namespace,
        uid=uid,
        ip=ip,
        service_account=account,
        labels=meta.get("labels") or {},
        annotations=meta.get("annotations") or {},
        node=machine.node_name,
        host_ip=machine.dns_ip,
        cpus=machine.cpus,
        memory=machine.memory,
    )
    hostname = (spec.get("hostname") or name)[:63].rstrip("-.")
    links = {} if spec.get("enableServiceLinks") is False else svc.links(objects.values(), namespace, service_ips)
    volume_root = f"{machine.state_dir}/pods/{uid}/volumes"
    built = boxes.build(spec, want.programs, me, objects, machine, hostname, volume_root, links)
    ports = [
        [p.get("name", ""), p["containerPort"], p.get("protocol", "TCP")]
        for b in boxes.all_of(spec)
        for p in b.get("ports") or []
    ]
    policy = spec.get("restartPolicy") or "Always"
    grace = spec.get("terminationGracePeriodSeconds")
    pod_spec = PodSpec(
        uid=uid,
        namespace=namespace,
        name=name,
        ip=ip,
        restart=Restart(policy),
        containers=built.containers,
        hostname=hostname,
        resolv_conf=resolv_conf(spec, namespace, machine),
        hosts=hosts(spec, hostname, namespace, ip),
        grace=30.0 if grace is None else float(grace),
        expose=tuple(sorted(built.expose)),
        spec_hash=want.hash,
        meta={
            "object": list(want.item.id),
            "owner": [want.item.kind, want.item.name],
            "service_account": account,
            "labels": dict(me.labels),
            "annotations": dict(me.annotations),
            "ports": ports,
            "meshed": want.meshed,
            "unmeshed_because": want.unmeshed_because,
            "created": created,
            "probe_paths": boxes.probe_paths(spec),
            "subdomain": spec.get("subdomain", ""),
            "pod_hostname": spec.get("hostname", ""),
            "proxy": PROXY if want.meshed else "",
            "volumes": {
                v.name: {
                    "tokens": [[t.path, t.audience, t.seconds] for t in v.tokens],
                    "owners": built.owners.get(v.name, ()),
                }
                for v in built.volumes
                if v.tokens
            },
            "backoff_limit": want.item.doc["spec"].get("backoffLimit", 6) if want.item.kind == "Job" else 0,
        },
    )
    return Planned(pod_spec, tuple(built.volumes), built.owners, tuple(built.sub_paths))


def resolv_conf(spec: Mapping[str, Any], namespace: str, machine: Machine) -> str:
    """The pod's resolver, by `dnsPolicy` and `dnsConfig` (Kubernetes: "DNS for Services and Pods")."""
    policy, config = spec.get("dnsPolicy") or "ClusterFirst", spec.get("dnsConfig") or {}
    servers: list[str] = [] if policy == "None" else [machine.dns_ip]
    searches: list[str] = []
    options: dict[str, str] = {}
    if policy.startswith("ClusterFirst"):
        searches = [f"{namespace}.svc.{CLUSTER_DOMAIN}", f"svc.{CLUSTER_DOMAIN}", CLUSTER_DOMAIN, *machine.searches]
        options["ndots"] = "5"
    servers += [s for s in config.get("nameservers") or [] if s not in servers]
    searches += [s for s in config.get("searches") or [] if s not in searches]
    options.update({o["name"]: o.get("value", "") for o in config.get("options") or []})
    lines = [f"nameserver {s}" for s in servers[:3]]
    lines += [f"search {' '.join(searches[:32])}"] if searches else []
    lines += ["options " + " ".join(f"{k}:{v}" if v else k for k, v in options.items())] if options else []
    return "\n".join(lines) + "\n"


def hosts(spec: Mapping[str, Any], hostname: str, namespace: str, ip: str) -> str:
    lines = ["# made by mantle", "127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback"]
    full = f"{hostname}.{spec['subdomain']}.{namespace}.svc.{CLUSTER_DOMAIN}\t" if spec.get("subdomain") else ""
    lines.append(f"{ip}\t{full}{hostname}")
    lines += [f"{a['ip']}\t{' '.join(a.get('hostnames') or [])}" for a in spec.get("hostAliases") or []]
    return "\n".join(lines) + "\n"
