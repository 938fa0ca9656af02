"""`mantle demo --context`: the application, its traffic encrypted, nothing left. Before anybody makes emojivoto."""

from __future__ import annotations

import json

import pytest
from e2e.stage import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


def test_the_demo_shows_encrypted_traffic_and_leaves_nothing(cluster: Cluster) -> None:
    if "emojivoto" in cluster.kubectl("get", "ns", "-o", "name"):  # of a run before that kept its cluster
        cluster.deleted("namespace", "emojivoto")
    context = cluster.kubectl("config", "current-context").strip()
    said = json.loads(cluster.mantle("demo", "--context", context, "--for", "15s", "-o", "json", timeout=800))
    assert (said["ok"], said["wrong"]) == (True, [])
    edges = {(edge["src"], edge["dst"]) for edge in said["edges"]}
    assert edges >= {("vote-bot", "web"), ("web", "emoji"), ("web", "voting")}
    requests = [event for event in said["tap"] if "requestInitEvent" in event]
    sides = {"INBOUND": "source", "OUTBOUND": "destination"}
    assert requests and {event[sides[event["proxyDirection"]]]["metadata"]["tls"] for event in requests} == {"true"}
    assert "emojivoto" not in cluster.kubectl("get", "ns", "-o", "name")
