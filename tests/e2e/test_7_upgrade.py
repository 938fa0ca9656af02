"""Upgrading, with pruning, while requests flow; and who may look."""

from __future__ import annotations

import re

import pytest
from e2e.stage import COMPONENTS, Cluster, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
TRUST = ("secret/mantle-identity-issuer", "configmap/mantle-identity-trust-roots")


def test_an_upgrade_prunes_and_never_touches_the_trust(emojivoto: Cluster) -> None:
    before = [emojivoto.get(name, "-n", "mantle")["metadata"]["uid"] for name in TRUST]
    revisions = [emojivoto.get(name, "-n", "mantle")["metadata"]["resourceVersion"] for name in TRUST]
    stray = "stray-of-an-earlier-version"
    emojivoto.kubectl("create", "configmap", "-n", "mantle", stray)
    emojivoto.kubectl("label", "configmap", "-n", "mantle", stray, "mantle.dev/part-of=mantle")
    # What is pruned must have been applied: the annotation is how kubectl knows.
    last = "kubectl.kubernetes.io/last-applied-configuration={}"
    emojivoto.kubectl("annotate", "configmap", "-n", "mantle", stray, last)
    emojivoto.apply(emojivoto.mantle("upgrade"), "--prune", "-l", "mantle.dev/part-of=mantle")
    emojivoto.rolled_out("mantle", *COMPONENTS)
    emojivoto.injecting()
    assert [emojivoto.get(name, "-n", "mantle")["metadata"]["uid"] for name in TRUST] == before
    assert [emojivoto.get(name, "-n", "mantle")["metadata"]["resourceVersion"] for name in TRUST] == revisions
    there = lambda: emojivoto.kubectl("get", "configmap", "-n", "mantle", "-o", "name")  # noqa: E731
    until(lambda: stray not in there(), "what no version installs any more is gone")
    until(lambda: emojivoto.mantle("check"), "check finds nothing wrong", 330)  # it looks back five minutes


def test_who_may_not_look_is_refused_with_the_command_that_grants_it(emojivoto: Cluster) -> None:
    tap = ("timeout", "-s", "INT", "60", "bash", "-c", "mantle tap deploy -n emojivoto --as somebody 2>&1")

    def refused() -> bool:
        said = emojivoto.run(*tap, code=None)
        assert re.search(r"kubectl create \w*rolebinding", said), said[-500:]
        return True

    until(refused, "the command that grants it")
