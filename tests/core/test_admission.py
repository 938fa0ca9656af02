"""Admission as plays: a review and a namespace in, the answer, the patched pod and what people are told out."""

import base64
import copy
import json

import pytest

from mantle.core.admission import (
    Decision,
    NotAReview,
    Outcome,
    Owner,
    bears_out,
    decide,
    decide_service,
    json_patch,
    pod_of,
)
from mantle.core.inject import inject_pod
from mantle.core.pod_facts import Skip
from mantle.core.proxy_env import Values

VALUES = Values("1.2.3", "ROOTS", ("10.203.0.0/16",), created_by="mantle/injector 1.2.3")
REPLICA_SET = {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-5d9", "uid": "u1", "controller": True}
DEPLOYMENT = Owner("apps/v1", "Deployment", "web", "u0")
ENABLED = {"mantle.dev/inject": "enabled"}


def pod(annotations: dict | None = None, **spec: object) -> dict:
    app = {"name": "app", "image": "acme/web", "ports": [{"containerPort": 8080}]}
    meta = {"generateName": "web-5d9-", "ownerReferences": [REPLICA_SET], "labels": {"app": "web"}}
    if annotations is not None:
        meta["annotations"] = annotations
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": meta,
        "spec": {"serviceAccountName": "web", "containers": [app], **spec},
    }


def review(obj: dict, operation: str = "CREATE", **more: object) -> dict:
    request = {"uid": "r1", "operation": operation, "namespace": "shop", "object": obj, **more}
    return {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request}


def namespace(annotations: dict | None = None, labels: dict | None = None) -> dict:
    return {"metadata": {"name": "shop", "annotations": annotations or {}, "labels": labels or {}}}


def decided(obj: dict, ns: dict | None = None, **more: object) -> Decision:
    return decide(review(obj, **more), namespace() if ns is None else ns, VALUES, DEPLOYMENT)


def applied(decision: Decision, obj: dict) -> dict:
    """What the API server makes of the answer (RFC 6902: add, replace, remove)."""
    result = copy.deepcopy(obj)
    response = decision.review["response"]
    assert response["uid"] == "r1" and response["allowed"] is True
    for step in json.loads(base64.b64decode(response["patch"])) if "patch" in response else []:
        *parents, last = [p.replace("~1", "/").replace("~0", "~") for p in step["path"].split("/")[1:]]
        at = result
        for parent in parents:
            at = at[parent]
        assert (last in at) == (step["op"] != "add")
        if step["op"] == "remove":
            del at[last]
        else:
            at[last] = step["value"]
    return result


@pytest.mark.parametrize(("own", "ns"), [(ENABLED, None), (None, ENABLED), ({"mantle.dev/inject": "ingress"}, None)])
def test_the_patch_makes_exactly_the_pod_that_mantle_inject_makes(own, ns):
    obj = pod(own)
    decision = decided(obj, namespace(ns))
    expected = inject_pod(obj, namespace(ns), VALUES, ("Deployment", "web"))
    assert applied(decision, obj) == expected.pod
    assert decision.outcome is Outcome.INJECTED
    assert decision.asked_at == ("workload" if own else "namespace")
    assert (decision.note.reason, decision.note.warning) == ("Injected", False)
    assert "warnings" not in decision.review["response"]


def test_asked_again_with_its_own_result_nothing_changes():
    obj = pod(ENABLED | {"config.mantle.dev/close-wait-timeout": "60"})
    obj["spec"]["containers"][0]["ports"].append({"containerPort": 3306})
    ns = namespace({"config.mantle.dev/proxy-log-level": "debug"})
    once = applied(decided(obj, ns), obj)
    again = decided(once, ns)
    assert applied(again, once) == once
    assert again.note is None, "it was said the first time"


def test_what_mantle_inject_rendered_is_made_anew_and_that_is_said():
    by_hand = inject_pod(pod(ENABLED), {}, Values("1.0.0", "OLD ROOTS", ()), ("Deployment", "web")).pod
    decision = decided(by_hand)
    assert applied(decision, by_hand) == applied(decided(pod(ENABLED)), pod(ENABLED))
    assert "made anew" in decision.note.message


def test_a_container_another_webhook_added_is_meshed_on_the_second_call():
    obj = pod(ENABLED)
    once = applied(decided(obj), obj)
    once["spec"]["containers"].append({"name": "extra", "image": "x", "ports": [{"containerPort": 9000}]})
    twice = applied(decided(once), once)
    (proxy,) = [c for c in twice["spec"]["initContainers"] if c["name"] == "mantle-proxy"]
    assert {"name": "MANTLE_PROXY_INBOUND_PORTS", "value": "8080,9000"} in proxy["env"]


def test_who_only_calls_a_container_like_ours_is_refused_not_taken_for_meshed():
    obj = pod(ENABLED)
    obj["spec"]["containers"].append({"name": "mantle-proxy", "image": "evil"})
    decision = decided(obj)
    assert decision.outcome is Outcome.REFUSED
    assert "container: 'mantle-proxy'" in decision.review["response"]["status"]["message"]


@pytest.mark.parametrize(
    ("spec", "reason", "says"),
    [
        ({"hostNetwork": True}, Skip.HOST_NETWORK, "hostNetwork is enabled"),
        (
            {"initContainers": [{"name": "istio-init", "image": "x"}]},
            Skip.FOREIGN_SIDECAR,
            "pod has a sidecar injected already",
        ),
    ],
)
def test_a_pod_that_was_wanted_and_cannot_be_says_so_on_itself(spec, reason, says):
    obj = pod(None, **spec)
    decision = decided(obj, namespace(ENABLED))
    result = applied(decision, obj)
    assert result["metadata"].pop("annotations") == {"mantle.dev/injection-skipped": f"{reason}: {says}"}
    assert result == obj
    assert (decision.outcome, decision.reasons) == (Outcome.SKIPPED, (reason,))
    assert decision.note.warning and says in decision.note.message
    assert decision.review["response"]["warnings"] == [f"mantle: {decision.note.message}"]
    once = applied(decision, obj)
    again = decided(once, namespace(ENABLED))
    assert again.note is None and applied(again, once) == once


def test_a_copy_of_a_skipped_pod_that_can_be_meshed_now_forgets_the_reason():
    obj = pod(ENABLED | {"mantle.dev/injection-skipped": "host_network_enabled: hostNetwork is enabled"})
    decision = decided(obj)
    assert "mantle.dev/injection-skipped" not in applied(decision, obj)["metadata"]["annotations"]
    assert decision.note.reason == "Injected"


def test_a_pod_nobody_asked_about_is_left_alone_without_a_word():
    for obj in (pod(), pod({"mantle.dev/inject": "disabled"}), pod(hostNetwork=True)):
        decision = decided(obj)
        assert applied(decision, obj) == obj
        assert decision.note is None and decision.outcome is Outcome.SKIPPED


def test_a_pod_that_opts_out_of_its_namespace_is_noted_and_not_touched():
    obj = pod({"mantle.dev/inject": "disabled"})
    decision = decided(obj, namespace(ENABLED))
    assert applied(decision, obj) == obj
    assert (decision.note.reason, decision.note.warning) == ("InjectionSkipped", False)


def test_a_mirror_pod_is_not_changed_since_its_kubelet_would_not_follow():
    obj = pod({"kubernetes.io/config.mirror": "hash"})
    decision = decided(obj, namespace(ENABLED))
    assert applied(decision, obj) == obj
    assert decision.reasons == (Skip.STATIC,) and "kubelet" in decision.note.message


def test_every_mistake_of_pod_and_namespace_is_in_one_refusal():
    obj = pod(ENABLED | {"config.mantle.dev/proxy-await": "yes", "config.mantle.dev/opaque-prots": "1"})
    decision = decided(obj, namespace({"config.mantle.dev/default-inbound-policy": "allow"}))
    response = decision.review["response"]
    assert (response["allowed"], response["status"]["code"]) == (False, 400)
    message = response["status"]["message"]
    assert "pod annotation config.mantle.dev/proxy-await: 'yes' is not accepted; use enabled or disabled" in message
    assert "config.mantle.dev/opaque-ports if that was meant" in message
    assert "namespace annotation config.mantle.dev/default-inbound-policy: 'allow'" in message
    assert "all-authenticated" in message
    assert (decision.note.reason, decision.note.warning) == ("InjectionRefused", True)


@pytest.mark.parametrize(
    ("own", "ns", "label"),
    [
        ({"mantle.dev/inject": "yes"}, None, "invalid_inject_annotation_at_workload"),
        (None, {"mantle.dev/inject": "yes"}, "invalid_inject_annotation_at_ns"),
        (ENABLED | {"config.mantle.dev/proxy-await": "yes"}, None, "invalid_annotation"),
    ],
)
def test_a_refusals_label_says_where_the_mistake_is(own, ns, label):
    assert decided(pod(own), namespace(ns)).reasons == (label,)


def test_without_a_token_of_its_own_the_pod_is_meshed_and_that_is_said():
    decision = decided(pod(ENABLED, automountServiceAccountToken=False))
    assert decision.outcome is Outcome.INJECTED
    assert "automountServiceAccountToken is false, which is fine" in decision.note.message
    assert not decision.note.warning


def test_a_probe_that_only_meets_the_proxy_is_named():
    def probing(**probe: object) -> list[dict[str, object]]:
        ports = [{"name": "db", "containerPort": 5432}]
        return [{"name": "app", "image": "a", "ports": ports, "readinessProbe": probe}]

    decision = decided(pod(ENABLED, containers=probing(tcpSocket={"port": "db"})))
    assert "its tcpSocket probes (port 5432) are answered by the proxy" in decision.note.message
    assert "use httpGet, grpc or exec" in decision.review["response"]["warnings"][0]
    skipped = ENABLED | {"config.mantle.dev/skip-inbound-ports": "5000-6000"}
    calm = [
        decided(pod(skipped, containers=probing(tcpSocket={"port": 5432}))),
        decided(pod(ENABLED, containers=probing(httpGet={"port": 5432}))),
    ]
    assert not any("tcpSocket" in each.note.message for each in calm)


def test_a_port_that_the_proxy_has_is_named_before_one_of_the_two_cannot_start():
    def listening(*ports: int, protocol: str = "TCP") -> list[dict[str, object]]:
        declared = [{"containerPort": port, "protocol": protocol} for port in ports]
        return [{"name": "app", "image": "a", "ports": declared}]

    decision = decided(pod(ENABLED, containers=listening(4191, 8080)))
    assert "both listen on port 4191" in decision.note.message
    assert "config.mantle.dev/inbound-port" in decision.review["response"]["warnings"][0]
    moved = ENABLED | {"config.mantle.dev/admin-port": "5191"}
    calm = [
        decided(pod(moved, containers=listening(4191))),
        decided(pod(ENABLED, containers=listening(4191, protocol="UDP"))),
        decided(pod(ENABLED, containers=listening(8080))),
    ]
    assert not any("both listen" in each.note.message for each in calm)


@pytest.mark.parametrize("level", ["baseline", "restricted"])
def test_a_namespace_that_will_refuse_the_redirect_is_named_with_the_fix(level):
    decision = decided(pod(ENABLED), namespace(labels={"pod-security.kubernetes.io/enforce": level}))
    assert decision.note.warning
    assert "pod-security.kubernetes.io/enforce=privileged" in decision.note.message
    assert level in decision.review["response"]["warnings"][0]
    calm = decided(pod(ENABLED), namespace(labels={"pod-security.kubernetes.io/enforce": "privileged"}))
    assert not calm.note.warning


def test_a_dry_run_is_answered_and_leaves_no_trace():
    decision = decided(pod(ENABLED), dryRun=True)
    assert decision.outcome is Outcome.INJECTED and "patch" in decision.review["response"]
    assert decision.note is None


def test_other_operations_and_objects_pass_unchanged():
    for posted in (review(pod(ENABLED), "UPDATE"), review({"kind": "Service", "metadata": {}})):
        decision = decide(posted, namespace(ENABLED), VALUES)
        assert decision.outcome is Outcome.UNCHANGED
        assert decision.review["response"] == {"uid": "r1", "allowed": True}


def test_what_is_not_a_review_is_said_and_not_guessed():
    for posted in ({}, {"apiVersion": "admission.k8s.io/v1beta1", "kind": "AdmissionReview", "request": {}}, []):
        with pytest.raises(NotAReview, match=r"wanted admission\.k8s\.io/v1 AdmissionReview"):
            decide(posted, {}, VALUES)


def test_the_subject_is_what_is_known_before_the_pod_exists():
    subject = pod_of(review(pod()))
    assert (subject.namespace, subject.name, subject.generate_name) == ("shop", "", "web-5d9-")
    assert subject.owner == Owner("apps/v1", "ReplicaSet", "web-5d9", "u1")


def test_a_patch_escapes_names_and_replaces_only_what_differs():
    before = {"a": {"x/y": 1, "m~n": 2, "same": [1]}, "gone": 1}
    after = {"a": {"x/y": 3, "m~n": 2, "same": [1], "new": {}}}
    assert json_patch(before, after) == [
        {"op": "remove", "path": "/gone"},
        {"op": "replace", "path": "/a/x~1y", "value": 3},
        {"op": "add", "path": "/a/new", "value": {}},
    ]
    assert json_patch(after, after) == []


# ---- services ----

OPAQUE = "config.mantle.dev/opaque-ports"
INHERITED = "mantle.dev/inherited-opaque-ports"


def a_service(annotations: dict | None = None) -> dict:
    meta = {"name": "db", **({} if annotations is None else {"annotations": annotations})}
    return {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": {"ports": [{"port": 3306}]}}


def test_a_service_without_opaque_ports_gets_its_namespaces_marked_as_a_copy():
    for own in (None, {}, {"other": "x"}):
        obj = a_service(own)
        decision = decide_service(review(obj), namespace({OPAQUE: "3306,9000-9010"}))
        made = applied(decision, obj)
        copied = {OPAQUE: "3306,9000-9010", INHERITED: "3306,9000-9010"}
        assert made["metadata"]["annotations"] == {**(own or {}), **copied}
        assert {key: value for key, value in made.items() if key != "metadata"} == {
            key: value for key, value in obj.items() if key != "metadata"
        }
        assert (decision.outcome, decision.asked_at) == (Outcome.INJECTED, "namespace")
        assert (decision.subject.kind, decision.subject.name) == ("Service", "db")
        assert decision.note.reason == "Injected" and not decision.note.warning
        assert bears_out(made["metadata"]["annotations"], decision.note)
        assert not bears_out(own or {}, decision.note)
        again = decide_service(review(made), namespace({OPAQUE: "3306,9000-9010"}))
        assert (again.outcome, again.note) == (Outcome.UNCHANGED, None)


@pytest.mark.parametrize(
    ("own", "ns"),
    [
        ({OPAQUE: "1"}, {OPAQUE: "2"}),
        ({OPAQUE: ""}, {OPAQUE: "2"}),
        ({OPAQUE: "8x"}, {OPAQUE: "2"}),
        ({}, {}),
        ({}, ENABLED),
    ],
    ids=["its own", "its own: none", "its own, wrong: check says so", "nobody says any", "meshed"],
)
def test_what_a_service_says_itself_stays(own, ns):
    decision = decide_service(review(a_service(own)), namespace(ns))
    assert (decision.outcome, decision.note) == (Outcome.UNCHANGED, None)
    assert "patch" not in decision.review["response"]


def test_a_copied_service_takes_over_what_its_new_namespace_says():
    obj = a_service({OPAQUE: "1", INHERITED: "1"})
    made = applied(decide_service(review(obj), namespace({OPAQUE: "2"})), obj)
    assert made["metadata"]["annotations"] == {OPAQUE: "2", INHERITED: "2"}


def test_a_mistake_of_the_namespace_stands_on_the_service_and_refuses_nothing():
    obj = a_service()
    decision = decide_service(review(obj), namespace({OPAQUE: "8x,-"}))
    made = applied(decision, obj)
    assert decision.outcome is Outcome.SKIPPED and decision.reasons == ("invalid_annotation",)
    assert "'8x,-' is not accepted" in made["metadata"]["annotations"]["mantle.dev/injection-skipped"]
    assert decision.note.warning and decision.note.message in decision.review["response"]["warnings"][0]
    again = decide_service(review(made), namespace({OPAQUE: "8x,-"}))
    assert again.note is None and again.again


def test_a_dry_run_of_a_service_leaves_no_trace_and_an_update_is_left_alone():
    ns = namespace({OPAQUE: "2"})
    assert decide_service(review(a_service(), dryRun=True), ns).note is None
    assert decide_service(review(a_service(), "UPDATE"), ns).outcome is Outcome.UNCHANGED
    assert decide_service(review(pod()), ns).outcome is Outcome.UNCHANGED
