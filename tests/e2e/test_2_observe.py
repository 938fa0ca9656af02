"""emojivoto on the cluster, seen with the commands and in the formats of the documentation that Mantle follows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

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


WINDOW = 330.0
"""Seconds: what was seen longer ago than `edges` looks back is no edge any more."""


def tapped(cluster: Cluster, *arguments: str, enough: Callable[[list[re.Match[str]]], bool]) -> list[re.Match[str]]:
    """The lines of a tap until there are enough, each of which must have the seeds' form to the byte."""

    def seen(lines: list[str]) -> bool:
        return enough([match for line in lines if (match := LINE.fullmatch(line))])

    said = cluster.watched("mantle", *arguments, enough=seen)
    lines = [LINE.fullmatch(line) for line in said]
    wrong = [line for line, match in zip(said, lines, strict=True) if not match]
    assert not wrong, f"not a line of tap: {wrong[:3]}"
    found = [line for line in lines if line]
    odd = [line[0] for line in found if not REST[line["kind"]].fullmatch(line["rest"])]
    assert not odd, f"not a line of tap: {odd[:3]}"
    return found


def test_tap_shows_the_requests_of_emojivoto_from_both_sides_all_encrypted(emojivoto: Cluster) -> None:
    def both_sides(lines: list[re.Match[str]]) -> bool:
        requests = {(line["side"], *line["rest"].split()) for line in lines if line["kind"] == "req"}
        return all({r[1:] for r in requests if r[0] == side} >= ROUTES for side in ("in ", "out"))

    lines = tapped(emojivoto, "tap", "deploy", "-n", "emojivoto", enough=both_sides)
    assert {line["tls"] for line in lines} <= {"true", "not_provided_by_remote"}
    plain = [line[0] for line in lines if line["tls"] != "true" and line["side"] == "out"]
    assert not plain, f"emojivoto sends nothing outside the mesh: {plain[:3]}"


def test_tap_of_the_control_plane_tells_probes_from_the_mesh(cluster: Cluster) -> None:
    def both_kinds(lines: list[re.Match[str]]) -> bool:
        probes = [line for line in lines if line["tls"] == "not_provided_by_remote" and line["kind"] == "req"]
        ready = [line for line in probes if ":path=/ready" in line["rest"]]
        return bool(ready) and any(line["tls"] == "true" for line in lines)

    lines = tapped(cluster, "-n", "mantle", "tap", "deploy", enough=both_kinds)
    outside = {line["side"] for line in lines if line["tls"] == "not_provided_by_remote"}
    assert outside == {"in "}, "a probe comes from outside"


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

    until(seen, "the three edges", WINDOW)


def test_edges_of_the_control_plane_are_encrypted(cluster: Cluster) -> None:
    def seen() -> bool:
        found = rows(cluster.mantle("-n", "mantle", "edges", "deployment"), "SRC", "DST", "CLIENT", "SERVER", "MSG")
        meshed = {row for row in found if row[0].startswith("mantle-")}
        plain = sorted(row for row in meshed if row[-1] != "-")
        assert not plain, f"not encrypted: {plain}"
        return ("mantle-viz", "mantle-destination", "mantle-viz.mantle", "mantle-destination.mantle", "-") in found

    until(seen, "viz asks destination over mTLS", WINDOW)


def test_stat_by_authority_has_the_columns_of_the_seed_and_everything_is_tls(emojivoto: Cluster) -> None:
    columns = ("NAME", "MESHED", "SUCCESS", "RPS", "LATENCY_P50", "LATENCY_P95", "LATENCY_P99", "TLS")

    def seen() -> bool:
        found = {row[0]: row for row in rows(emojivoto.mantle("stat", "authority", "-n", "emojivoto"), *columns)}
        names = {"emoji-svc.emojivoto:8080", "voting-svc.emojivoto:8080", "web-svc.emojivoto:80"}
        if not names <= set(found):
            return False
        shown = {name: (found[name][1], found[name][-1]) for name in names}
        assert set(shown.values()) == {("-", "100%")}, f"MESHED and TLS: {shown}"
        return all(re.fullmatch(r"\d+\.\d\drps|\d+\.\drps", found[name][3]) for name in names)

    until(seen, "three authorities")


def test_stat_counts_meshed_pods(emojivoto: Cluster) -> None:
    def seen() -> bool:
        rows = json.loads(emojivoto.mantle("stat", "deploy", "-n", "emojivoto", "-o", "json"))
        return {row["name"]: row["meshed"] for row in rows} == dict.fromkeys(
            ("emoji", "voting", "web", "vote-bot"), "1/1"
        )

    until(seen, "one pod of each, in the mesh")


def test_identity_shows_the_certificate_that_a_pod_serves(emojivoto: Cluster) -> None:
    identity = "web.emojivoto.serviceaccount.identity.mantle.cluster.local"
    pod = emojivoto.pod("emojivoto", "web-")
    until(lambda: identity in emojivoto.mantle("identity", "-n", "emojivoto", pod), "its identity")


def test_check_finds_nothing_wrong(emojivoto: Cluster) -> None:
    until(lambda: emojivoto.mantle("check"), "check finds nothing wrong", WINDOW)
    until(lambda: emojivoto.mantle("check", "--proxy"), "check --proxy finds nothing wrong", WINDOW)
