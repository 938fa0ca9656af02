"""emojivoto on the cluster, seen with the commands and in the formats of the documentation that Mantle follows."""

from __future__ import annotations

import json
import re

import pytest
from e2e.stage import Cluster, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

LINE = re.compile(
    r"(?P<kind>req|rsp|end) id=\d+:\d+ proxy=(?P<side>in |out) src=(?P<src>[\d.]+:\d+) dst=(?P<dst>[\d.]+:\d+) "
    r"tls=(?P<tls>\S+) (?P<rest>.+)"
)
REST = {
    "req": re.compile(r":method=[A-Z]+ :authority=\S+ :path=\S+"),
    "rsp": re.compile(r":status=\d{3} latency=\d+µs"),
    "end": re.compile(r"(grpc-status=\w+ )?duration=\d+µs response-length=\d+B"),
}
ROUTES = {
    (":method=GET", ":authority=web-svc.emojivoto:80", ":path=/api/list"),
    (":method=POST", ":authority=emoji-svc.emojivoto:8080", ":path=/emojivoto.v1.EmojiService/ListAll"),
}


def tapped(cluster: Cluster, *arguments: str, seconds: str = "6") -> list[re.Match[str]]:
    """The lines of some seconds of tap, each of which must have the seeds' form to the byte."""
    said = cluster.run("timeout", "-s", "INT", seconds, "mantle", *arguments, code=None)
    lines = [LINE.fullmatch(line) for line in said.splitlines()]
    wrong = [line for line, match in zip(said.splitlines(), lines, strict=True) if not match]
    assert not wrong, f"not a line of tap: {wrong[:3]}"
    found = [line for line in lines if line]
    assert all(REST[line["kind"]].fullmatch(line["rest"]) for line in found), said
    return found


def test_tap_shows_the_requests_of_emojivoto_from_both_sides_all_encrypted(emojivoto: Cluster) -> None:
    def seen() -> bool:
        lines = tapped(emojivoto, "tap", "deploy", "-n", "emojivoto")
        requests = {(line["side"], *line["rest"].split()) for line in lines if line["kind"] == "req"}
        assert {line["tls"] for line in lines} <= {"true", "not_provided_by_remote"}, lines
        plain = [line for line in lines if line["tls"] != "true"]
        assert not [line for line in plain if line["side"] == "out"], "emojivoto sends nothing outside the mesh"
        return all({r[1:] for r in requests if r[0] == side} >= ROUTES for side in ("in ", "out"))

    until(seen, "requests from both sides", 60)


def test_tap_of_the_control_plane_tells_probes_from_the_mesh(cluster: Cluster) -> None:
    def seen() -> bool:
        lines = tapped(cluster, "-n", "mantle", "tap", "deploy")
        probes = [line for line in lines if line["tls"] == "not_provided_by_remote"]
        ready = [line for line in probes if line["kind"] == "req" and ":path=/ready" in line["rest"]]
        assert all(line["side"] == "in " for line in probes), "a probe comes from outside"
        return bool(ready) and any(line["tls"] == "true" for line in lines)

    until(seen, "probes and requests of the mesh", 60)


def rows(table: str, *columns: str) -> set[tuple[str, ...]]:
    head, *lines = table.splitlines()
    assert tuple(head.split()) == columns, head
    return {tuple(line.split()) for line in lines}


def test_edges_of_emojivoto_name_both_identities(emojivoto: Cluster) -> None:
    expected = {
        ("vote-bot", "web", "default.emojivoto", "web.emojivoto", "-"),
        ("web", "emoji", "web.emojivoto", "emoji.emojivoto", "-"),
        ("web", "voting", "web.emojivoto", "voting.emojivoto", "-"),
    }

    def seen() -> bool:
        table = emojivoto.mantle("-n", "emojivoto", "edges", "deployment")
        return rows(table, "SRC", "DST", "CLIENT", "SERVER", "MSG") >= expected

    until(seen, "the three edges", 60)


def test_edges_of_the_control_plane_are_encrypted(cluster: Cluster) -> None:
    def seen() -> bool:
        found = rows(cluster.mantle("-n", "mantle", "edges", "deployment"), "SRC", "DST", "CLIENT", "SERVER", "MSG")
        meshed = {row for row in found if row[0].startswith("mantle-")}
        assert {row[-1] for row in meshed} <= {"-"}, found
        return ("mantle-viz", "mantle-destination", "mantle-viz.mantle", "mantle-destination.mantle", "-") in found

    until(seen, "viz asks destination over mTLS", 60)


def test_stat_by_authority_has_the_columns_of_the_seed_and_everything_is_tls(emojivoto: Cluster) -> None:
    columns = ("NAME", "MESHED", "SUCCESS", "RPS", "LATENCY_P50", "LATENCY_P95", "LATENCY_P99", "TLS")

    def seen() -> bool:
        found = {row[0]: row for row in rows(emojivoto.mantle("stat", "authority", "-n", "emojivoto"), *columns)}
        names = {"emoji-svc.emojivoto:8080", "voting-svc.emojivoto:8080", "web-svc.emojivoto:80"}
        if not names <= set(found):
            return False
        assert {found[name][1] for name in names} == {"-"} and {found[name][-1] for name in names} == {"100%"}, found
        return all(re.fullmatch(r"\d+\.\d\drps|\d+\.\drps", found[name][3]) for name in names)

    until(seen, "three authorities", 90)


def test_stat_counts_meshed_pods(emojivoto: Cluster) -> None:
    def seen() -> bool:
        found = json.loads(emojivoto.mantle("stat", "deploy", "-n", "emojivoto", "-o", "json"))
        return bool(found)

    until(seen, "stat as JSON", 60)


def test_identity_shows_the_certificate_that_a_pod_serves(emojivoto: Cluster) -> None:
    pod = emojivoto.pods("emojivoto", "web-")[0]["metadata"]["name"]
    said = emojivoto.mantle("identity", "-n", "emojivoto", pod)
    assert "web.emojivoto.serviceaccount.identity.mantle.cluster.local" in said


def test_check_finds_nothing_wrong(emojivoto: Cluster) -> None:
    emojivoto.mantle("check")
    emojivoto.mantle("check", "--proxy")
