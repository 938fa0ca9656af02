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

    until(seen, "the bot's requests")


def test_labels_and_all_namespaces(emojivoto: Cluster) -> None:
    def seen() -> bool:
        table = emojivoto.mantle("stat", "deploy", "-n", "emojivoto", "-l", "app=web-svc")
        assert [line.split()[0] for line in table.splitlines()] == ["NAME", "web"]
        everywhere = emojivoto.mantle("stat", "deploy", "-A").splitlines()
        names = {tuple(line.split()[:2]) for line in everywhere}
        return names >= {("NAMESPACE", "NAME"), ("emojivoto", "web"), ("mantle", "mantle-destination")}

    until(seen, "both namespaces")

    def kinds() -> bool:
        rows = json.loads(emojivoto.mantle("stat", "all", "-n", "emojivoto", "-o", "json"))
        return {row["kind"] for row in rows} >= {"deployment", "pod", "service"}

    until(kinds, "rows of each kind")


def test_diagnostics_say_what_proxies_are_told(emojivoto: Cluster) -> None:
    def endpoints() -> bool:
        said = emojivoto.mantle("diagnostics", "endpoints", "web-svc.emojivoto:80", "-o", "wide").splitlines()
        assert said[0].split() == ["NAMESPACE", "IP", "PORT", "POD", "SERVICE", "IDENTITY", "TRANSPORT"]
        assert [re.search(r"web\.emojivoto +link to 4143$", line) is not None for line in said[1:]] == [True], said
        return True

    until(endpoints, "one endpoint, in the mesh")
    policy = json.loads(
        emojivoto.mantle("diagnostics", "policy", "-n", "emojivoto", "deploy/web", "8080", "-o", "json")
    )
    (of_pod,) = policy.values()
    assert of_pod["labels"]["name"]
    outbound = emojivoto.mantle("diagnostics", "policy", "-n", "emojivoto", "svc/web-svc", "80")
    assert "web-svc.emojivoto.svc.cluster.local:80" in outbound

    def metrics() -> bool:
        said = emojivoto.mantle("diagnostics", "proxy-metrics", "-n", "emojivoto", "deploy/web")
        assert re.match(r"#\n# POD web-\S+ \(1 of 1\)\n#\n", said), said[:200]
        return 'tls="true"' in said

    until(metrics, "the metrics of one pod")

    def of_the_control_plane() -> bool:
        said = emojivoto.mantle("diagnostics", "controller-metrics")
        found = re.findall(r"#\n# POD mantle-(\w+)-\S+ \(\d+ of \d+\)\n# CONTAINER (\w+)\n#\n", said)
        assert {pod for pod, _ in found} == {container for _, container in found}, found
        assert {"identity", "destination", "viz", "injector"} <= {container for _, container in found}, found
        families = ("mantle_identity_certify_total", "proxy_inject_admission_requests_total")
        assert [family for family in families if f"# TYPE {family} counter\n" not in said] == []
        return True

    until(of_the_control_plane, "the metrics of every component")


def test_a_user_is_refused_with_the_command_that_grants_it(emojivoto: Cluster) -> None:
    tap = "mantle tap pods -n emojivoto --as alice 2>&1"

    def refused(line: str) -> re.Match[str] | None:
        said = emojivoto.run("timeout", "-s", "INT", "60", "bash", "-c", line, code=None)
        assert "user 'alice' may not watch pods/tap" in said, said[-500:]
        return re.search(r"gives it with: (kubectl create rolebinding .*)", said)

    fix = until(lambda: refused(tap), "alice is refused")
    assert fix
    emojivoto.run("bash", "-ec", fix[1])
    try:
        sees = lambda lines: any("req id=" in line for line in lines)  # noqa: E731
        until(lambda: emojivoto.watched("bash", "-c", f"exec {tap}", enough=sees, seconds=60), "alice sees requests")
        assert refused(tap.replace("-n emojivoto", "-n mantle"))
    finally:
        emojivoto.kubectl("delete", "rolebinding", "-n", "emojivoto", fix[1].split()[3])
