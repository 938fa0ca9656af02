"""What `mantle check` concludes from facts, and how it says so."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from mantle.cli import check, checks
from mantle.cli.checks import Finding, Result, Validity

HEADINGS = frozenset(re.findall(r"(?m)^### ([a-z-]+)$", (Path(__file__).parents[2] / "docs" / "check.md").read_text()))
NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
DAY = timedelta(days=1)
PARTS = ("mantle-identity", "mantle-destination", "mantle-viz")


def pod(
    name: str, namespace: str = "emojivoto", *, meshed: bool = True, ready: bool = True, **more: Any
) -> dict[str, Any]:
    proxy = {"name": "mantle-proxy", "ready": ready, "state": "running" if ready else "waiting", "reason": ""}
    return {
        "namespace": namespace,
        "name": f"{name}-1",
        "owner": {"kind": "Deployment", "name": name},
        "phase": "Running",
        "ready": ready,
        "meshed": meshed,
        "containers": [proxy] if meshed else [],
    } | more


def status(*pods: dict[str, Any], **more: Any) -> dict[str, Any]:
    control = [pod(part, "mantle") for part in PARTS]
    return {"mesh": "default", "version": "0.1.0", "node_pid": 7, "pods": [*control, *pods]} | more


def valid(name: str = "issuer CN=x", start: timedelta = -DAY, end: timedelta = 364 * DAY) -> Validity:
    return Validity(name, NOW + start, NOW + end)


def problems(findings: Sequence[Finding]) -> dict[str, tuple[str, str]]:
    """What is not good, by description: (result, reason). Every finding has its own paragraph, every problem a fix."""
    ids = [finding.id for finding in findings]
    assert set(ids) <= HEADINGS and len(ids) == len(set(ids)), ids
    bad = [finding for finding in findings if finding.result is not Result.GOOD]
    assert all(finding.reason and finding.fix for finding in bad)
    return {finding.description: (str(finding.result), finding.reason) for finding in bad}


def of_mesh(facts: dict[str, Any] | None = None, **more: Any) -> dict[str, tuple[str, str]]:
    known: dict[str, Any] = {"roots": [valid("trust root CN=r")], "issuer": valid(), "issuer_signed": True}
    known |= {"client_version": "0.1.0", "node_alive": True, "now": NOW} | more
    return problems(checks.mesh(facts or status(), **known))


def test_a_healthy_mesh_has_no_problem() -> None:
    assert of_mesh() == {}


@pytest.mark.parametrize(
    ("changes", "description", "result", "reason"),
    [
        ({"node_alive": False}, "the node process runs", "error", "process 7 is gone"),
        ({"client_version": "2"}, "mesh and command are of one version", "warning", "the mesh is 0.1.0, the command 2"),
        (
            {"issuer": valid(end=-DAY)},
            "trust roots and issuer are valid",
            "error",
            "issuer CN=x expired on 2026-11-23T12:00:00Z",
        ),
        (
            {"issuer": valid(end=59 * DAY)},
            "trust roots and issuer are valid for at least 60 days",
            "warning",
            "issuer CN=x will expire on 2027-01-22T12:00:00Z",
        ),
        (
            {"roots": [valid("trust root CN=r", start=DAY)]},
            "the clock is not behind the certificates",
            "error",
            "trust root CN=r is valid from 2026-11-25T12:00:00Z, now is 2026-11-24T12:00:00Z",
        ),
        ({"issuer_signed": False}, "the issuer is signed by a trust root", "error", "no trust root signed issuer CN=x"),
        ({"issuer": None}, "certificates of the mesh can be read", "error", "issuer or trust roots are missing"),
        ({"roots": []}, "certificates of the mesh can be read", "error", "issuer or trust roots are missing"),
    ],
)
def test_problems_of_a_mesh(changes: dict[str, Any], description: str, result: str, reason: str) -> None:
    assert of_mesh(**changes) == {description: (result, reason)}


def test_a_control_plane_that_is_missing_or_not_ready() -> None:
    facts = status()
    facts["pods"] = [pod("mantle-identity", "mantle"), pod("mantle-viz", "mantle", ready=False)]
    assert of_mesh(facts) == {
        "the control plane is ready": ("error", "mantle-destination is missing; mantle-viz is Running and not ready")
    }


def edge(src: str, dst: str, reason: str = "", src_namespace: str = "emojivoto") -> dict[str, Any]:
    ends = {"src": src, "src_namespace": src_namespace, "dst": dst, "dst_namespace": "emojivoto"}
    return ends | {"no_tls_reason": reason, "counts": {"secured": 1} if not reason else {reason: 1}}


def summary(*edges: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"edges": list(edges), "failing": {}, "scrape_age_seconds": 1.0} | more


def of_data_plane(
    *pods: dict[str, Any], seen: dict[str, Any] | None, certificates: dict[str, Validity | str] | None = None
) -> dict[str, tuple[str, str]]:
    facts = status(*pods)
    return problems(checks.data_plane(facts, certificates=certificates or {}, summary=seen, now=NOW))


WEB, EMOJI, BOT = pod("web"), pod("emoji"), pod("bot", meshed=False)


def test_a_data_plane_that_encrypts_has_no_problem() -> None:
    seen = summary(
        edge("web", "emoji"), edge("probe", "web", "not_provided_by_remote", ""), edge("web", "web", "loopback")
    )
    certificates: dict[str, Validity | str] = {"emojivoto/web-1": valid(start=-DAY / 2, end=DAY / 2)}
    assert of_data_plane(WEB, EMOJI, seen=seen, certificates=certificates) == {}


@pytest.mark.parametrize(
    ("seen", "description", "result", "reason"),
    [
        (
            summary(edge("web", "emoji", "not_provided_by_service_discovery")),
            "all traffic between meshed workloads is encrypted",
            "error",
            "web → emoji: not_provided_by_service_discovery",
        ),
        (
            summary(edge("pod/x", "web", "not_provided_by_remote", "default")),
            "no traffic leaves or enters the mesh in plaintext",
            "warning",
            "pod/x → web: not_provided_by_remote",
        ),
        (summary(scrape_age_seconds=None), "every proxy tells viz its metrics", "error", "never asked"),
        (summary(scrape_age_seconds=20.0), "every proxy tells viz its metrics", "error", "asked 20 s ago"),
        (summary(failing={"a/b": "refused"}), "every proxy tells viz its metrics", "error", "a/b: refused"),
        (None, "the traffic is known", "error", "viz does not answer, so nothing is known of the traffic"),
    ],
)
def test_problems_of_traffic(seen: dict[str, Any] | None, description: str, result: str, reason: str) -> None:
    assert of_data_plane(WEB, EMOJI, seen=seen) == {description: (result, reason)}


@pytest.mark.parametrize(
    ("found", "description", "result", "reason"),
    [
        ("no handshake", "every proxy has a certificate", "error", "emojivoto/web-1: no handshake"),
        (
            valid(start=-2 * DAY, end=-DAY),
            "every certificate is valid",
            "error",
            "emojivoto/web-1: valid from 2026-11-22T12:00:00Z to 2026-11-23T12:00:00Z",
        ),
        (
            valid(start=-0.95 * DAY, end=0.05 * DAY),
            "every certificate is renewed in time",
            "warning",
            "emojivoto/web-1: expires at 2026-11-24T13:12:00Z and is not renewed yet",
        ),
    ],
)
def test_problems_of_certificates(found: Validity | str, description: str, result: str, reason: str) -> None:
    problem = of_data_plane(WEB, seen=summary(), certificates={"emojivoto/web-1": found})
    assert problem == {description: (result, reason)}


def test_workloads_outside_the_mesh_and_proxies_that_are_not_ready() -> None:
    ended = pod("job", meshed=False, phase="Succeeded")
    assert of_data_plane(BOT, pod("slow", ready=False), ended, seen=summary()) == {
        "every workload is in the mesh": ("warning", "emojivoto/bot-1"),
        "every proxy is ready": ("error", "emojivoto/slow-1: waiting"),
    }


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"blocked": [], "proxy": "", "rootless": False, "outside": False}, {}),
        (
            {"blocked": [("AppArmor", "sysctl", True)], "proxy": "nowhere", "rootless": True, "outside": False},
            {
                "this machine allows namespaces and nf_tables": "error",
                "mantle-proxy is installed": "error",
                "pods can reach the outside world without root": "warning",
            },
        ),
        (
            {"blocked": [("/proc is masked", "unmask", False)], "proxy": "", "rootless": True, "outside": True},
            {"this machine allows namespaces and nf_tables": "warning"},
        ),
        (
            {"blocked": [], "proxy": "", "rootless": False, "outside": False, "firewall": ["chain x of table ip y"]},
            {"the host's firewall lets pods reach the outside world": "warning"},
        ),
    ],
)
def test_problems_of_a_machine(facts: dict[str, Any], expected: dict[str, str]) -> None:
    assert {name: result for name, (result, _) in problems(checks.machine(**facts)).items()} == expected


FOUND = [
    ("machine", [Finding("good"), Finding("soon", Result.WARNING, "in 3 days; or 4", "wait")]),
    ("mesh", [Finding("fine"), Finding("broken", Result.ERROR, "it \x1b is", "mend it")]),
]

PAGE = """\
machine
-------
√ good
‼ soon
    in 3 days
    or 4
    fix: wait

mesh
----
√ fine
× broken
    it \\x1b is
    fix: mend it

Status check results are ×
"""


def test_the_page() -> None:
    assert check.text(FOUND, short=False, mesh=True) == PAGE
    short = check.text(FOUND, short=True, mesh=True)
    assert short == PAGE.replace("√ good\n", "").replace("√ fine\n", "")
    assert check.text(FOUND[:1], short=True, mesh=False).endswith("Status check results are √\n")
    assert "No mesh is running" in check.text(FOUND[:1], short=False, mesh=False)


def test_the_object() -> None:
    record = check.object_of(FOUND)
    assert record["success"] is False
    assert record["categories"][1] == {
        "categoryName": "mesh",
        "checks": [
            {"description": "fine", "result": "success"},
            {"description": "broken", "result": "error", "error": "it \x1b is", "hint": "mend it"},
        ],
    }
