"""What `mantle check` concludes: facts in, findings out. Pure; `check.py` gathers the facts and prints the findings.

A finding is good, a warning (something to know or do soon) or an error (something is broken, exit code 1). Each has the
reason found and the exact fix.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

SOON = timedelta(days=60)
STALE_SECONDS = 15.0
CONTROL_PLANE = ("mantle-identity", "mantle-destination", "mantle-viz")
PROXY_CONTAINER = "mantle-proxy"
HARMLESS = frozenset({"loopback"})
"""Reasons of traffic that never leaves a pod."""


class Result(enum.StrEnum):
    GOOD = "success"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of `check`: what was asked, and if it is not so, why and what to do."""

    description: str
    result: Result = Result.GOOD
    reason: str = ""
    fix: str = ""
    id: str = ""
    """The anchor of its paragraph in docs/check.md."""


@dataclass(frozen=True, slots=True)
class Validity:
    """A certificate's names and times. `name` is for people."""

    name: str
    not_before: datetime
    not_after: datetime


def good_unless(
    description: str, reasons: Sequence[str], fix: str, result: Result = Result.ERROR, id: str = ""
) -> Finding:
    """Good if there are no reasons against it."""
    return Finding(description, result, "; ".join(reasons), fix, id) if reasons else Finding(description, id=id)


def machine(
    blocked: Iterable[tuple[str, str, bool]],
    *,
    proxy: str,
    rootless: bool,
    outside: bool,
    firewall: Sequence[str] = (),
) -> list[Finding]:
    """Can a mesh run here? `blocked`: (message, fix, fatal) of obstacles; `proxy`: why there is no mantle-proxy, if so;
    `outside`: pasta or slirp4netns is there; `firewall`: the host's chains that drop what it forwards.
    """
    allows = "this machine allows namespaces and nf_tables"
    obstacles = [
        Finding(allows, Result.ERROR if fatal else Result.WARNING, message, fix, "machine-namespaces")
        for message, fix, fatal in blocked
    ]
    findings = obstacles or [Finding(allows, id="machine-namespaces")]
    findings.append(
        good_unless(
            "mantle-proxy is installed",
            [proxy] if proxy else [],
            "pip install mantle-proxy (in a checkout: make install), or correct MANTLE_PROXY_PATH",
            id="machine-proxy",
        )
    )
    if rootless:
        findings.append(
            good_unless(
                "pods can reach the outside world without root",
                [] if outside else ["neither pasta nor slirp4netns is installed"],
                "install passt (or slirp4netns), or run mantle with sudo; the mesh itself works without",
                Result.WARNING,
                "machine-outside",
            )
        )
    else:
        findings.append(
            good_unless(
                "the host's firewall lets pods reach the outside world",
                [f"{chain} drops what it is not told to accept" for chain in firewall],
                "`iptables -I FORWARD -i mantle+ -j ACCEPT` and `iptables -I FORWARD -o mantle+ -m conntrack --ctstate "
                "RELATED,ESTABLISHED -j ACCEPT`, or the same in your firewall; the mesh itself works without",
                Result.WARNING,
                "machine-firewall",
            )
        )
    return findings


def mesh(
    status: Mapping[str, Any],
    *,
    client_version: str,
    node_alive: bool,
    roots: Sequence[Validity],
    issuer: Validity | None,
    issuer_signed: bool,
    now: datetime,
) -> list[Finding]:
    """Is the mesh itself healthy?"""
    name = status["mesh"]
    again = f"`mantle down --mesh {name}`, then start it again"
    version = status["version"]
    pods = {pod["owner"]["name"]: pod for pod in status["pods"] if pod["namespace"] == "mantle"}
    not_ready = [
        f"{part} is {_state(pods.get(part))}" for part in CONTROL_PLANE if not (pods.get(part) or {}).get("ready")
    ]
    findings = [
        Finding(f"the daemon of mesh {name} answers", id="mesh-daemon"),
        good_unless(
            "the node process runs",
            [] if node_alive else [f"process {status['node_pid']} is gone"],
            again,
            id="mesh-node",
        ),
        good_unless(
            "mesh and command are of one version",
            [] if version == client_version else [f"the mesh is {version}, the command {client_version}"],
            again,
            Result.WARNING,
            "mesh-version",
        ),
        good_unless(
            "the control plane is ready",
            not_ready,
            "`mantle ps -n mantle` and `mantle logs -n mantle POD`",
            id="mesh-control-plane",
        ),
    ]
    if issuer is None or not roots:
        findings.append(
            Finding(
                "certificates of the mesh can be read",
                Result.ERROR,
                "issuer or trust roots are missing",
                again,
                "mesh-certificates",
            )
        )
        return findings
    known = [*roots, issuer]
    findings += [
        good_unless(
            "the clock is not behind the certificates",
            [f"{v.name} is valid from {_time(v.not_before)}, now is {_time(now)}" for v in known if now < v.not_before],
            "set the clock; a clock that went back makes certificates invalid",
            id="mesh-clock",
        ),
        good_unless(
            "trust roots and issuer are valid",
            [f"{v.name} expired on {_time(v.not_after)}" for v in known if now >= v.not_after],
            again,
            id="mesh-trust-valid",
        ),
        good_unless(
            "trust roots and issuer are valid for at least 60 days",
            [f"{v.name} will expire on {_time(v.not_after)}" for v in known if now < v.not_after <= now + SOON],
            f"{again} before that day: it makes new ones",
            Result.WARNING,
            "mesh-trust-soon",
        ),
        good_unless(
            "the issuer is signed by a trust root",
            [] if issuer_signed else [f"no trust root signed {issuer.name}"],
            again,
            id="mesh-issuer-chain",
        ),
    ]
    return findings


def data_plane(
    status: Mapping[str, Any],
    *,
    certificates: Mapping[str, Validity | str],
    summary: Mapping[str, Any] | None,
    now: datetime,
) -> list[Finding]:
    """Is every workload in the mesh, certified and encrypting?

    `certificates`: by `namespace/pod`, what its proxy shows, or why that is not known. `summary`: viz's answer, None if
    it gave none.
    """
    pods = [pod for pod in status["pods"] if pod["phase"] not in ("Succeeded", "Failed")]
    outside = [_name(pod) for pod in pods if not pod["meshed"]]
    inside = [pod for pod in pods if pod["meshed"]]
    unready = [
        f"{_name(pod)}: {container['reason'] or container['state']}"
        for pod in inside
        for container in pod["containers"]
        if container["name"] == PROXY_CONTAINER and not container["ready"]
    ]
    expired, unknown, late = [], [], []
    for name, found in certificates.items():
        if isinstance(found, str):
            unknown.append(f"{name}: {found}")
        elif not found.not_before <= now < found.not_after:
            expired.append(f"{name}: valid from {_time(found.not_before)} to {_time(found.not_after)}")
        elif now > found.not_before + (found.not_after - found.not_before) * 0.9:
            late.append(f"{name}: expires at {_time(found.not_after)} and is not renewed yet")
    logs = "`mantle logs -c mantle-proxy POD` says why"
    return [
        good_unless(
            "every workload is in the mesh",
            outside,
            "remove `mantle.dev/inject: disabled` and apply again, if that is not meant",
            Result.WARNING,
            "workloads-meshed",
        ),
        good_unless("every proxy is ready", unready, logs, id="proxy-ready"),
        good_unless("every proxy has a certificate", unknown, logs, id="leaf-there"),
        good_unless("every certificate is valid", expired, logs, id="leaf-valid"),
        good_unless("every certificate is renewed in time", late, logs, Result.WARNING, "leaf-renewal"),
        *_traffic(pods, summary),
    ]


def _traffic(pods: Sequence[Mapping[str, Any]], summary: Mapping[str, Any] | None) -> list[Finding]:
    """Is what should be encrypted encrypted?"""
    if summary is None:
        return [
            Finding(
                "the traffic is known",
                Result.ERROR,
                "viz does not answer, so nothing is known of the traffic",
                "`mantle logs -n mantle deploy/mantle-viz`",
                "traffic-known",
            )
        ]
    age = summary["scrape_age_seconds"]
    stale = (
        [] if age is not None and age < STALE_SECONDS else ["never asked" if age is None else f"asked {age:.0f} s ago"]
    )
    failing = [f"{pod}: {reason}" for pod, reason in sorted(summary["failing"].items())]
    members = {(pod["namespace"], end) for pod in pods if pod["meshed"] for end in _ends(pod)}
    broken: list[str] = []
    plain: list[str] = []
    for edge in summary["edges"]:
        reasons = [reason for reason in edge["no_tls_reason"].split(",") if reason and reason not in HARMLESS]
        if not reasons or edge["src"] == "probe":
            continue
        ends = ((edge["src_namespace"], edge["src"]), (edge["dst_namespace"], edge["dst"]))
        (broken if all(end in members for end in ends) else plain).append(
            f"{edge['src']} → {edge['dst']}: {', '.join(reasons)}"
        )
    return [
        good_unless(
            "every proxy tells viz its metrics",
            [*stale, *failing],
            "`mantle logs -n mantle deploy/mantle-viz`",
            id="traffic-known",
        ),
        good_unless(
            "all traffic between meshed workloads is encrypted",
            broken,
            "`mantle edges deploy -A -o wide` shows each; `mantle logs -c mantle-proxy POD` of the client says more",
            id="traffic-encrypted",
        ),
        good_unless(
            "no traffic leaves or enters the mesh in plaintext",
            plain,
            "put the other end into the mesh, if it should be",
            Result.WARNING,
            "traffic-plaintext",
        ),
    ]


def _ends(pod: Mapping[str, Any]) -> tuple[str, str]:
    """How `edges deployment` names this pod's workload."""
    owner = pod["owner"]
    return owner["name"], f"{owner['kind'].lower()}/{owner['name']}"


def _name(pod: Mapping[str, Any]) -> str:
    return f"{pod['namespace']}/{pod['name']}"


def _state(pod: Mapping[str, Any] | None) -> str:
    return "missing" if pod is None else f"{pod['phase']} and not ready"


def _time(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")
