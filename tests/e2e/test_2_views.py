"""The other views of emojivoto on the cluster: top, diagnostics, all namespaces, labels, and who may see what."""

from __future__ import annotations

import json
import re

import pytest
from e2e.stage import Cluster, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


def test_top_counts_the_requests_that_tap_shows(emojivoto: Cluster) -> None:
    def seen() -> bool:
        rows = json.loads(emojivoto.mantle("top", "deploy", "-n", "emojivoto", "--for", "5s", "-o", "json"))
        asked = {(row["method"], row["path"]) for row in rows if int(row["count"])}
        return asked >= {("GET", "/api/list"), ("POST", "/emojivoto.v1.EmojiService/ListAll")}

    until(seen, "the bot's requests", 60)


def test_labels_and_all_namespaces(emojivoto: Cluster) -> None:
    def seen() -> bool:
        table = emojivoto.mantle("stat", "deploy", "-n", "emojivoto", "-l", "app=web-svc")
        assert [line.split()[0] for line in table.splitlines()] == ["NAME", "web"]
        everywhere = emojivoto.mantle("stat", "deploy", "-A").splitlines()
        names = {tuple(line.split()[:2]) for line in everywhere}
        return names >= {("NAMESPACE", "NAME"), ("emojivoto", "web"), ("mantle", "mantle-destination")}

    until(seen, "both namespaces", 60)
    kinds = {row["kind"] for row in json.loads(emojivoto.mantle("stat", "all", "-n", "emojivoto", "-o", "json"))}
    assert kinds >= {"deployment", "pod", "service"}


def test_diagnostics_say_what_proxies_are_told(emojivoto: Cluster) -> None:
    said = emojivoto.mantle("diagnostics", "endpoints", "web-svc.emojivoto:80", "-o", "wide").splitlines()
    assert said[0].split() == ["NAMESPACE", "IP", "PORT", "POD", "SERVICE", "IDENTITY", "TRANSPORT"]
    assert [re.search(r"web\.emojivoto +link to 4143$", line) is not None for line in said[1:]] == [True]
    policy = json.loads(
        emojivoto.mantle("diagnostics", "policy", "-n", "emojivoto", "deploy/web", "8080", "-o", "json")
    )
    (of_pod,) = policy.values()
    assert of_pod["labels"]["name"]
    outbound = emojivoto.mantle("diagnostics", "policy", "-n", "emojivoto", "svc/web-svc", "80")
    assert "web-svc.emojivoto.svc.cluster.local:80" in outbound
    metrics = emojivoto.mantle("diagnostics", "proxy-metrics", "-n", "emojivoto", "deploy/web")
    assert re.match(r"#\n# POD web-\S+ \(1 of 1\)\n#\n", metrics) and 'tls="true"' in metrics


def test_a_user_is_refused_with_the_command_that_grants_it(emojivoto: Cluster) -> None:
    tap = "timeout -s INT 10 mantle tap pods -n emojivoto --as alice 2>&1"
    refused = emojivoto.run("bash", "-c", tap, code=None)
    fix = re.search(r"gives it with: (kubectl create rolebinding .*)", refused)
    assert fix and "user 'alice' may not watch pods/tap" in refused, refused
    emojivoto.run("bash", "-ec", fix[1])
    try:
        until(lambda: "req id=" in emojivoto.run("bash", "-c", tap, code=None), "alice sees requests", 60)
        other = emojivoto.run("bash", "-c", tap.replace("-n emojivoto", "-n mantle"), code=None)
        assert "may not watch pods/tap" in other
    finally:
        emojivoto.kubectl("delete", "rolebinding", "-n", "emojivoto", fix[1].split()[3])
