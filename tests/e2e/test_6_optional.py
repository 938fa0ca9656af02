"""The experimental mode on a real cluster, as its page says it: install, inject, look, and move on without a gap."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from e2e.loaded import PYTHON, loaded, no_request_fails
from e2e.stage import EMOJIVOTO, Cluster, until
from page_blocks import blocks, desk, pages

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]
NAMESPACE = "shop"
(PAGE,) = pages("optional")
INSTALL, MIGRATE, LEAVE = blocks(PAGE, "optional")
WORKLOADS = ("emoji", "voting", "web", "vote-bot")
LOAD = "shop-load"
STEADY = f"""
apiVersion: v1
kind: Service
metadata: {{name: steady, namespace: {NAMESPACE}}}
spec:
  selector: {{app: steady}}
  ports: [{{port: 80, targetPort: 8080}}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: steady, namespace: {NAMESPACE}}}
spec:
  selector: {{matchLabels: {{app: steady}}}}
  template:
    metadata: {{labels: {{app: steady}}}}
    spec:
      terminationGracePeriodSeconds: 15
      containers:
        - name: steady
          image: {PYTHON}
          command: [/usr/bin/python3, -m, http.server, "8080", --directory, /etc]
          readinessProbe: {{httpGet: {{path: /hostname, port: 8080}}, periodSeconds: 1, timeoutSeconds: 10}}
          lifecycle: {{preStop: {{exec: {{command: [/usr/bin/python3, -c, import time; time.sleep(10)]}}}}}}
"""
"""A server that loses nothing in a rolling update: asked only when it answers, and answering while others hear that it
goes. emojivoto has neither a probe nor a pause.
"""


@pytest.fixture(scope="module")
def weak(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A mesh with the mode, and emojivoto in it, by the page's own commands; afterwards neither is there."""
    text = re.sub(
        r"(namespace: |-svc\.|(?<=kind: Namespace\nmetadata:\n  )name: )emojivoto\b", rf"\1{NAMESPACE}", EMOJIVOTO
    )
    try:
        cluster.run(*INSTALL.command, timeout=600, cwd=desk(tmp_path_factory.mktemp("desk"), PAGE, text))
        cluster.rolled_out(NAMESPACE)
        yield cluster
    finally:
        cluster.deleted("namespace", NAMESPACE)
        cluster.apply(cluster.mantle("upgrade", "--tls=required"))
        gone = ["deployment/mantle-ca", "serviceaccount/mantle-ca", "role/mantle-ca", "rolebinding/mantle-ca"]
        cluster.kubectl("-n", "mantle", "delete", "--ignore-not-found", *gone, "secret/mantle-ca")
        cluster.kubectl("-n", "mantle", "delete", "--ignore-not-found", "secret/mantle-viz-deployment-tls-mantle")
        cluster.kubectl("delete", "--ignore-not-found", "clusterrole/mantle-ca", "clusterrolebinding/mantle-ca")
        cluster.rolled_out("mantle")
        cluster.injecting()


def tls_column(cluster: Cluster) -> dict[str, str]:
    """`stat authority`: the last column, by name."""
    lines = cluster.mantle("stat", "authority", "-n", NAMESPACE).splitlines()
    assert lines and lines[0].split()[-1] == "TLS", lines
    return {line.split()[0]: line.split()[-1] for line in lines[1:]}


def test_the_ca_makes_one_secret_an_owner(weak: Cluster) -> None:
    def secrets() -> bool:
        found = weak.get("secrets", "-n", NAMESPACE, "-l", "mantle.dev/tls=optional")["items"]
        return {item["metadata"]["name"] for item in found} == {f"{w}-deployment-tls-mantle" for w in WORKLOADS}

    until(secrets, "a Secret for each owner")
    (web,) = [s for s in weak.get("secrets", "-n", NAMESPACE)["items"] if s["metadata"]["name"].startswith("web-")]
    assert web["metadata"]["ownerReferences"][0]["kind"] == "Deployment"


def test_stat_shows_that_all_of_it_is_tls(weak: Cluster) -> None:
    """The seed's own command. Kubelets bring a Secret that came after its pod within two minutes."""

    def all_tls() -> bool:
        columns = tls_column(weak)
        wanted = {f"{s}.{NAMESPACE}:{p}" for s, p in (("emoji-svc", 8080), ("voting-svc", 8080), ("web-svc", 80))}
        assert wanted <= set(columns) and all(columns[name] == "100%" for name in wanted), columns
        return True

    until(all_tls, "100% TLS for each service", seconds=400)


def test_tap_sees_it(weak: Cluster) -> None:
    def tls(lines: list[str]) -> bool:
        return any(line.startswith("req ") and "tls=true" in line for line in lines)

    weak.watched("mantle", "tap", "deploy/web", "-n", NAMESPACE, enough=tls)


def test_check_says_that_it_is_weaker(weak: Cluster) -> None:
    wanted = {"install-optional": "warning", "optional-pods": "warning", "proxy-ready": "success"}

    def said() -> bool:
        text = weak.run("bash", "-c", "mantle check --proxy -o json 2>&1", code=None)
        assert text.startswith("{"), f"check could not be made: {text}"
        found = {c["id"]: c["result"] for category in json.loads(text)["categories"] for c in category["checks"]}
        assert {id: found.get(id) for id in wanted} == wanted
        return True

    until(said, "a warning, and proxies that are ready")


@pytest.fixture
def asked(weak: Cluster) -> Iterator[Cluster]:
    """`steady` in the experimental mode, and a pod of the default mode that asks it without end."""
    weak.apply(weak.mantle("inject", "--tls=optional", "-", given=STEADY))
    weak.rolled_out(NAMESPACE, "steady")
    with loaded(weak, LOAD, f"http://steady.{NAMESPACE}/hostname"):
        yield weak


def test_one_command_moves_all_of_it_to_the_default_mode(asked: Cluster) -> None:
    """The command itself waits for each rolling update; what it made to bridge the two modes is gone afterwards, and no
    request was lost.
    """
    weak = asked
    with no_request_fails(weak, LOAD):
        said = weak.run(*MIGRATE.command, timeout=800)
    assert "moved: every workload is of the default mode" in said
    made = weak.get("configmaps", "-n", NAMESPACE, "-l", "mantle.dev/tls=migration")["items"]
    assert not made, [config["metadata"]["name"] for config in made]

    def no_old_pods() -> bool:
        """One that has ended speaks no more, but stays listed until its kubelet has taken it away."""
        left = weak.get("pods", "-n", NAMESPACE, "-l", "mantle.dev/tls=optional")["items"]
        assert not left, [pod["metadata"]["name"] for pod in left]
        return True

    until(no_old_pods, "no pod of the experimental mode is left")

    def all_tls() -> bool:
        columns = tls_column(weak)
        assert columns and set(columns.values()) == {"100%"}, columns
        return True

    until(all_tls, "100% TLS in the default mode", seconds=300)


def test_afterwards_the_ca_and_its_secrets_can_go(weak: Cluster) -> None:
    weak.run(*LEAVE.command, timeout=600)
    weak.rolled_out("mantle")

    def gone() -> bool:
        deployments = weak.kubectl("get", "deploy", "-n", "mantle", "-o", "name")
        secrets = weak.get("secrets", "-A", "-l", "mantle.dev/tls=optional")["items"]
        left = [secret["metadata"]["name"] for secret in secrets]
        assert "mantle-ca" not in deployments and not left, (deployments, left)
        return True

    until(gone, "neither the ca nor a Secret of it is left")
