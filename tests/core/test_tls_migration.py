"""Moving workloads out of the experimental mode: what moves, what it is told, when it is done."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import Any

import pytest

from mantle.core import tls_migration as migration
from mantle.core.inject import Injected, inject_pod
from mantle.core.names import MeshNames
from mantle.core.optional_names import OptionalNames, Owner
from mantle.core.proxy_env import Values

NAMES = OptionalNames(MeshNames("mantle", "cluster.local"))
WEB, DB, RUN = Owner("shop", "deployment", "web"), Owner("shop", "statefulset", "db"), Owner("ops", "cronjob", "run")
JOB, BARE = Owner("shop", "job", "import"), Owner("shop", "pod", "shell")
UNTIL = datetime(2026, 11, 24, 13, 0, tzinfo=UTC)


def pod(owner: Owner, phase: str = "Running", mode: str = "optional") -> dict[str, Any]:
    return {
        "metadata": {
            "namespace": owner.namespace,
            "labels": {"mantle.dev/tls": mode},
            "annotations": {"mantle.dev/tls-owner": f"{owner.kind}/{owner.name}"},
        },
        "status": {"phase": phase},
    }


def test_owners_are_those_of_live_pods_of_the_mode() -> None:
    pods = [pod(WEB), pod(WEB), pod(DB, "Succeeded"), pod(JOB, mode="required")]
    assert migration.owners_of(pods) == {WEB}


def test_what_can_be_changed_moves_and_the_rest_is_named_with_what_to_do() -> None:
    plan = migration.plan([BARE, RUN, DB, JOB, WEB], NAMES)
    assert plan.move == (RUN, WEB, DB)
    assert set(plan.by_hand) == {BARE, RUN, JOB}
    assert "delete pod shell" in plan.by_hand[BARE]
    assert plan.left
    assert not migration.plan([WEB, RUN], NAMES).left
    assert plan.namespaces == ("ops", "shop")


def test_everything_that_speaks_the_mode_is_accepted_and_nothing_else() -> None:
    plan = migration.plan([WEB, BARE], NAMES)
    assert plan.identities == tuple(sorted(f"{o.name}.{o.kind}.shop{NAMES.suffix}" for o in (WEB, BARE)))
    config = migration.listing("shop", b"ROOTS", plan.identities, "mantle")
    assert config["data"]["ca.crt"] == "ROOTS"
    assert config["data"]["identities"].splitlines() == list(plan.identities)


@pytest.mark.parametrize("owner", [WEB, RUN])
def test_a_patched_template_is_of_the_default_mode_and_accepts_the_list(owner: Owner) -> None:
    """What the patch writes is what injection reads."""
    patch = migration.patch(owner, migration.stated(b"ROOTS", UNTIL))
    spec = patch["spec"]["jobTemplate"]["spec"] if owner.kind == "cronjob" else patch["spec"]
    annotations = {"mantle.dev/inject": "enabled", **spec["template"]["metadata"]["annotations"]}
    template = {"metadata": {"annotations": annotations}, "spec": {"containers": [{"name": "app", "image": "a"}]}}
    # The namespace still says optional: the pod's own word wins.
    namespace = {"metadata": {"name": "shop", "annotations": {"config.mantle.dev/tls": "optional"}}}
    injected = inject_pod(template, namespace, Values("1", "R", (), tls="optional"), ("Deployment", "web"))
    assert isinstance(injected, Injected)
    assert "mantle.dev/tls" not in injected.pod["metadata"]["labels"]
    (sidecar,) = [c for c in injected.pod["spec"]["initContainers"] if c["name"] == "mantle-proxy"]
    env = {e["name"]: e.get("value") for e in sidecar["env"]}
    assert env["MANTLE_PROXY_IDENTITY_MIGRATION_ROOTS"] == hashlib.sha256(b"ROOTS").hexdigest()
    assert env["MANTLE_PROXY_IDENTITY_MIGRATION_UNTIL"] == str(int(UNTIL.timestamp()))
    assert any(v["name"] == "mantle-tls-migration" for v in injected.pod["spec"]["volumes"])


def workload(observed: int = 2, **status: Any) -> dict[str, Any]:
    known = {"observedGeneration": observed, "replicas": 3, "updatedReplicas": 3, "availableReplicas": 3} | status
    return {"metadata": {"generation": 2}, "spec": {"replicas": 3}, "status": known}


@pytest.mark.parametrize(
    ("owner", "found", "why"),
    [
        (WEB, workload(), ""),
        (WEB, workload(observed=1), "its change is not seen yet"),
        (WEB, workload(updatedReplicas=1), "1 of 3 pods are new"),
        (WEB, workload() | {"status": {"observedGeneration": 2, "replicas": 4, "updatedReplicas": 3,
         "availableReplicas": 3}}, "1 old pods are ending"),
        (WEB, workload(availableReplicas=2), "2 of 3 pods are ready"),
        (DB, workload(availableReplicas=0), "0 of 3 pods are ready"),
        (Owner("shop", "daemonset", "d"), {"metadata": {"generation": 1}, "status": {"observedGeneration": 1,
         "desiredNumberScheduled": 2, "updatedNumberScheduled": 1, "numberAvailable": 2}}, "1 of 2 pods are new"),
    ],
)  # fmt: skip
def test_a_rollout_is_over_when_only_new_pods_are_there_and_ready(
    owner: Owner, found: dict[str, Any], why: str
) -> None:
    assert migration.unfinished(owner, found) == why


def test_what_will_never_end_is_said() -> None:
    assert migration.stuck({"spec": {}}) == ""
    assert "OnDelete" in migration.stuck({"spec": {"updateStrategy": {"type": "OnDelete"}}})
    assert "paused" in migration.stuck({"spec": {"paused": True}})
    failed = {"type": "Progressing", "reason": "ProgressDeadlineExceeded", "message": "has timed out progressing"}
    assert migration.stuck({"status": {"conditions": [failed]}}) == "has timed out progressing"
