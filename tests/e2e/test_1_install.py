"""Installing on a real cluster: what is there afterwards, who may read the issuer's key, and doing it again."""

from __future__ import annotations

import json

import pytest
from e2e.stage import COMPONENTS, Cluster, meshed

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


def test_every_component_runs_meshed(cluster: Cluster) -> None:
    deployments = {item["metadata"]["name"] for item in cluster.get("deploy", "-n", "mantle")["items"]}
    assert deployments == set(COMPONENTS)
    meshed(cluster, "mantle")


def test_a_second_install_changes_nothing(cluster: Cluster) -> None:
    """`kubectl diff` is empty: install reads what the cluster has and keeps its trust root."""
    assert cluster.kubectl("diff", "-f", "-", given=cluster.mantle("install")) == ""


def test_only_identity_reads_the_issuer_key(cluster: Cluster) -> None:
    for component in COMPONENTS:
        user = f"--as=system:serviceaccount:mantle:{component}"
        for verb in ("get", "list", "watch"):
            said = cluster.kubectl(
                "auth", "can-i", verb, "secret/mantle-identity-issuer", "-n", "mantle", user, code=None
            )
            assert said.strip() == "no", f"{component} may {verb} the issuer's Secret"
    mounting = [
        pod["metadata"]["name"]
        for pod in cluster.pods("mantle")
        for volume in pod["spec"]["volumes"]
        if volume.get("secret", {}).get("secretName") == "mantle-identity-issuer"
    ]
    assert mounting and all(name.startswith("mantle-identity-") for name in mounting), mounting


def test_no_role_has_a_wildcard(cluster: Cluster) -> None:
    roles = cluster.get("clusterroles,roles", "-A", "-l", "mantle.dev/part-of=mantle")["items"]
    assert roles
    for role in roles:
        assert "*" not in json.dumps(role["rules"]), role["metadata"]["name"]


def test_only_what_keeps_the_redirect_has_a_capability_and_nothing_runs_as_root(cluster: Cluster) -> None:
    for pod in cluster.pods("mantle"):
        for container in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]:
            context, name = container["securityContext"], f"{pod['metadata']['name']} {container['name']}"
            assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"], name
            assert context["capabilities"]["drop"] == ["ALL"], name
            added = context["capabilities"].get("add", [])
            redirects = container["name"] in ("mantle-init", "mantle-guard")
            assert added == (["NET_ADMIN"] if redirects else []), name
            assert pod["spec"]["securityContext"].get("runAsNonRoot") or context["runAsNonRoot"], name


def test_the_redirect_was_seen_to_work_before_the_pod_started(cluster: Cluster) -> None:
    pod = cluster.pod("mantle", "mantle-viz")
    assert "was redirected" in cluster.kubectl("logs", "-n", "mantle", pod, "-c", "mantle-init")
