"""Every example of docs/observe.md and docs/check.md is run, and prints exactly what the page shows."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mantle.cli import check, checks, identity, machine_client
from mantle.cli.checks import Validity
from mantle.cli.live_certificate import LiveCertificate
from mantle.cli.main import cli

DOCS = Path(__file__).parents[2] / "docs"
NOW = datetime(2026, 11, 24, 8, 30, 20, tzinfo=UTC)
DAY = timedelta(days=1)
SUFFIX = ".serviceaccount.identity.mantle.cluster.local"
EMOJIVOTO, MANTLE = "emojivoto", "mantle"


def examples(page: str) -> list[tuple[str, str]]:
    """(command line, output) of each example of a page."""
    blocks = re.findall(r"```text\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    return [
        (match[1], match[2]) for block in blocks for match in re.finditer(r"\$ mantle (.*)\n((?:(?!\$ ).*\n)*)", block)
    ]


def edge(src: str, dst: str, ids: str, requests: int, namespace: str = EMOJIVOTO, reason: str = "") -> dict[str, Any]:
    client, _, server = ids.partition(" ")
    return {
        "src": src,
        "src_namespace": namespace,
        "dst": dst,
        "dst_namespace": EMOJIVOTO,
        "client_id": client and client + SUFFIX,
        "server_id": server and server + SUFFIX,
        "no_tls_reason": reason,
        "protocol": "tcp" if reason else "http",
        "counts": {reason or "secured": requests},
        "open": 0 if reason else 1,
        "control": False,
    }


EDGES = [
    edge("pod/curl", "web", "", 2, "default", "not_provided_by_remote"),
    edge("vote-bot", "web", "default.emojivoto web.emojivoto", 120),
    edge("web", "emoji", "web.emojivoto emoji.emojivoto", 180),
    edge("web", "voting", "web.emojivoto voting.emojivoto", 60),
    edge("mantle-viz", "web", "mantle-viz.mantle web.emojivoto", 30, MANTLE),
]


def row(
    name: str, kind: str, success: float | None, rps: float | None, latency: str, tls: float | None
) -> dict[str, Any]:
    p50, p95, p99 = (int(word) if latency else None for word in (latency or "0 0 0").split())
    return {
        "namespace": EMOJIVOTO,
        "kind": kind,
        "name": name,
        "meshed": None if kind == "authority" else "1/1",
        "status": None,
        "success": success,
        "rps": rps,
        "latency_ms_p50": p50,
        "latency_ms_p95": p95,
        "latency_ms_p99": p99,
        "tls": tls,
    }


ROWS = {
    "authority": [
        row("emoji-svc.emojivoto:8080", "authority", 1.0, 2.0, "1 2 2", 1.0),
        row("voting-svc.emojivoto:8080", "authority", 0.8415, 1.0, "1 2 3", 1.0),
        row("web-svc.emojivoto:80", "authority", 0.9208, 2.0, "2 5 9", 1.0),
    ],
    "deployment": [
        row("emoji", "deployment", 1.0, 2.0, "1 2 2", 1.0),
        row("vote-bot", "deployment", None, None, "", None),
        row("voting", "deployment", 0.8415, 1.0, "1 2 3", 1.0),
        row("web", "deployment", 0.9208, 2.0, "2 5 9", 0.984),
    ],
}


def tap_events() -> list[dict[str, Any]]:
    def end(ip: str, port: int, **metadata: str) -> dict[str, Any]:
        return {"ip": ip, "port": port, "metadata": metadata}

    def flow(direction: str, port: int) -> dict[str, Any]:
        ends = {"source": end("10.203.0.5", port, tls="true"), "destination": end("10.203.0.4", 8080, tls="true")}
        return {**ends, "routeMeta": None, "proxyDirection": direction}

    one = {"id": {"base": 0, "stream": 1}}
    request = one | {"method": "GET", "authority": "web-svc.emojivoto:80", "path": "/api/list"}
    done = one | {
        "sinceRequestInit": {"nanos": 2_225_000},
        "sinceResponseInit": {"nanos": 121_000},
        "responseBytes": 4558,
        "grpcStatusCode": None,
    }
    return [
        flow("OUTBOUND", 33500) | {"requestInitEvent": request},
        flow("INBOUND", 45960) | {"requestInitEvent": request},
        flow("INBOUND", 45960)
        | {"responseInitEvent": one | {"sinceRequestInit": {"nanos": 2_104_000}, "httpStatus": 200}},
        flow("INBOUND", 45960) | {"responseEndEvent": done},
    ]


POD = {
    "namespace": EMOJIVOTO,
    "name": "web-5d4f8-abcde",
    "uid": "1",
    "owner": {"kind": "Deployment", "name": "web"},
    "phase": "Running",
    "ready": True,
    "meshed": True,
    "containers": [{"name": "mantle-proxy", "ready": True, "state": "running", "reason": ""}],
}
CONTROL = [
    {**POD, "namespace": MANTLE, "name": f"{part}-1", "owner": {"kind": "Deployment", "name": part}}
    for part in checks.CONTROL_PLANE
]
EMOJI = {**POD, "name": "emoji-1", "owner": {"kind": "Deployment", "name": "emoji"}}
STATUS = {"mesh": "default", "version": "0.1.0", "node_pid": 7, "pods": [*CONTROL, POD, EMOJI]}


class FakeClient:
    """A mesh with emojivoto in it."""

    def __init__(self, mesh: str | None = None) -> None:
        self.socket_path = Path("/nowhere/api.sock")
        self.mesh = mesh or "default"

    def get(self, path: str, **query: Any) -> Any:
        if path == "/v1/status":
            return STATUS
        return {"edges": EDGES} if path == "/v1/viz/edges" else {"rows": ROWS[query["resource"]]}

    def stream(self, path: str, body: Any) -> list[dict[str, Any]]:
        return tap_events()


LIVE = LiveCertificate(
    pem="",
    subject=f"CN=web.emojivoto{SUFFIX}",
    issuer="CN=identity.mantle.cluster.local",
    serial=0x0ABC12,
    not_before=datetime(2026, 11, 24, 7, 59, 40, tzinfo=UTC),
    not_after=datetime(2026, 11, 25, 8, 0, 20, tzinfo=UTC),
    dns_names=(f"web.emojivoto{SUFFIX}",),
    uris=("spiffe://cluster.local/ns/emojivoto/sa/web",),
    key="EC secp256r1",
    signature="ecdsa-with-SHA256",
    usages=("serverAuth", "clientAuth"),
)


def healthy_but_for_two(_: Any) -> list[check.Category]:
    """A mesh whose issuer ends soon and that has one edge in plaintext."""
    expiry = datetime(2027, 1, 2, 8, 0, tzinfo=UTC)
    mesh = checks.mesh(
        STATUS,
        client_version="0.1.0",
        node_alive=True,
        roots=[Validity("trust root CN=root.mantle.cluster.local", NOW - DAY, NOW + 365 * DAY)],
        issuer=Validity("issuer CN=identity.mantle.cluster.local", NOW - DAY, expiry),
        issuer_signed=True,
        now=NOW,
    )
    plain = [edge("web", "emoji", "", 1, reason="not_provided_by_service_discovery")]
    summary = {"edges": plain, "failing": {}, "scrape_age_seconds": 1.0}
    certificates: dict[str, Validity | str] = {"emojivoto/web-1": Validity("", LIVE.not_before, LIVE.not_after)}
    return [
        ("mesh", mesh),
        ("data plane", checks.data_plane(STATUS, certificates=certificates, summary=summary, now=NOW)),
    ]


class FixedClock(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
        return NOW


EXAMPLES = [(page, line, output) for page in ("observe.md", "check.md") for line, output in examples(page)]


@pytest.mark.parametrize(("page", "line", "output"), EXAMPLES, ids=[f"{page}: {line}" for page, line, _ in EXAMPLES])
def test_an_example_prints_what_the_page_shows(
    page: str, line: str, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_client, "MachineClient", FakeClient)
    monkeypatch.setattr(machine_client, "running_meshes", lambda _root: ["default"])
    monkeypatch.setattr(identity, "fetch", lambda *_: LIVE)
    monkeypatch.setattr(identity, "datetime", FixedClock)
    machine = checks.machine([], proxy="", rootless=False, outside=True)
    monkeypatch.setattr(check, "_machine", lambda: machine)
    monkeypatch.setattr(check, "_mesh", healthy_but_for_two)
    ended = CliRunner().invoke(cli, line.split(), prog_name="mantle", catch_exceptions=False)
    assert ended.stdout == output


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 9
