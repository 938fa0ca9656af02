"""The admission webhook, called by a real API server: pods of people and of controllers, outages, renewals."""

import base64
import json
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from cryptography import x509
from free_ports import free_port
from ruamel.yaml import YAML

from .apiserver import ApiServer
from .injecting import Mesh, deployment, eventually, installed, pod

ENABLED = {"mantle.dev/inject": "enabled"}


@pytest.fixture(scope="module")
def mesh(api_server: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with installed(api_server, tmp_path_factory.mktemp("injector")) as mesh:
        mesh.start()
        mesh.in_effect(mesh.namespace())
        yield mesh


OPAQUE = "config.mantle.dev/opaque-ports"


def names(obj: dict, key: str = "containers") -> list[str]:
    return [container["name"] for container in obj["spec"].get(key, [])]


def pods_of(mesh: Mesh, namespace: str, count: int = 1) -> list[dict]:
    def all_there() -> list[dict]:
        items = json.loads(mesh.api.kubectl("-n", namespace, "get", "pods", "-o", "json"))["items"]
        return items if len(items) == count else []

    return list(eventually(all_there))


def test_annotating_the_namespace_is_enough_and_works_at_once(mesh):
    namespace = mesh.namespace()
    assert names(mesh.create(namespace, pod("before"))) == ["app"]
    mesh.api.kubectl("annotate", "namespace", namespace, "mantle.dev/inject=enabled")
    made = mesh.create(namespace, pod("after"))
    assert names(made, "initContainers") == ["mantle-init", "mantle-guard", "mantle-proxy"]
    assert made["metadata"]["annotations"]["mantle.dev/created-by"].startswith("mantle/injector ")
    event = eventually(lambda: mesh.events(namespace, "Pod", "Injected"))
    assert [e["involvedObject"]["name"] for e in event] == ["after"]
    assert event[0]["involvedObject"]["uid"] == made["metadata"]["uid"]


def test_a_deployments_pods_know_it_and_both_have_the_event(mesh):
    namespace = mesh.namespace(annotations=ENABLED)
    mesh.create(namespace, deployment("web", replicas=3))
    for made in pods_of(mesh, namespace, 3):
        assert made["metadata"]["labels"]["mantle.dev/proxy-deployment"] == "web"
        assert made["metadata"]["labels"]["mantle.dev/workload-ns"] == namespace
    eventually(lambda: len(mesh.events(namespace, "Pod", "Injected")) == 3)
    (event,) = eventually(lambda: mesh.events(namespace, "Deployment", "Injected"))
    assert event["involvedObject"]["name"] == "web"


def test_a_cron_jobs_pods_know_it(mesh):
    namespace = mesh.namespace(annotations=ENABLED)
    template = deployment("x")["spec"]["template"]
    template["spec"]["restartPolicy"] = "Never"
    cron = {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": {"name": "nightly"},
        "spec": {"schedule": "0 0 1 1 *", "suspend": True, "jobTemplate": {"spec": {"template": template}}},
    }
    mesh.create(namespace, cron)
    mesh.api.kubectl("-n", namespace, "create", "job", "now", "--from=cronjob/nightly")
    (made,) = pods_of(mesh, namespace)
    assert made["metadata"]["labels"]["mantle.dev/proxy-cronjob"] == "nightly"


def test_why_a_pod_is_not_in_the_mesh_stands_on_it_and_on_its_workload(mesh):
    namespace = mesh.namespace(annotations=ENABLED)
    mesh.create(namespace, deployment("agent", hostNetwork=True))
    (made,) = pods_of(mesh, namespace)
    assert names(made) == ["app"] and "initContainers" not in made["spec"]
    skipped = made["metadata"]["annotations"]["mantle.dev/injection-skipped"]
    assert skipped == "host_network_enabled: hostNetwork is enabled"
    for kind, name in (("Pod", made["metadata"]["name"]), ("Deployment", "agent")):
        (event,) = eventually(lambda kind=kind: mesh.events(namespace, kind, "InjectionSkipped"))
        assert (event["involvedObject"]["name"], event["type"]) == (name, "Warning")
        assert "hostNetwork is enabled" in event["message"]


def test_every_mistake_is_in_the_refusal_and_in_the_workloads_event(mesh):
    wrong = ENABLED | {"config.mantle.dev/proxy-await": "yes", "config.mantle.dev/admin-port": "0"}
    namespace = mesh.namespace()
    said = mesh.refusal(namespace, pod("web", wrong))
    for part in (
        "open.injector.mantle.dev",
        "'yes' is not accepted; use enabled or disabled",
        "use a port from 1 to 65535",
    ):
        assert part in said
    mesh.create(namespace, deployment("web", wrong))
    event = eventually(lambda: mesh.events(namespace, "Deployment", "InjectionRefused"))[0]
    assert "'yes' is not accepted" in event["message"] and "use a port from 1 to 65535" in event["message"]
    assert json.loads(mesh.api.kubectl("-n", namespace, "get", "pods", "-o", "json"))["items"] == []


def test_a_pod_security_level_that_refuses_the_redirect_is_named_before_it_bites(mesh):
    level = {"pod-security.kubernetes.io/enforce": "baseline"}
    namespace = mesh.namespace(annotations=ENABLED, labels=level)
    mesh.create(namespace, deployment("web"))
    event = eventually(lambda: mesh.events(namespace, "Deployment", "Injected"))[0]
    assert event["type"] == "Warning" and "pod-security.kubernetes.io/enforce=privileged" in event["message"]


def test_a_pod_injected_by_hand_and_by_the_webhook_has_one_proxy(mesh):
    namespace = mesh.namespace(annotations=ENABLED)
    once = mesh.create(namespace, pod("first"))
    again = {key: once[key] for key in ("apiVersion", "kind", "spec")}
    again["metadata"] = {k: once["metadata"][k] for k in ("labels", "annotations")} | {"name": "second"}
    made = mesh.create(namespace, again)
    assert names(made, "initContainers") == ["mantle-init", "mantle-guard", "mantle-proxy"]


def test_names_with_dots_and_a_pod_without_a_token_are_meshed(mesh):
    namespace = mesh.namespace(annotations=ENABLED)
    mesh.api.kubectl("-n", namespace, "create", "serviceaccount", "team.web")
    made = mesh.create(namespace, pod("web", serviceAccountName="team.web", automountServiceAccountToken=False))
    (proxy,) = [c for c in made["spec"]["initContainers"] if c["name"] == "mantle-proxy"]
    assert "mantle-identity-token" in {mount["name"] for mount in proxy["volumeMounts"]}
    event = eventually(lambda: mesh.events(namespace, "Pod", "Injected"))[0]
    assert "automountServiceAccountToken is false, which is fine" in event["message"]


def test_a_dry_run_leaves_no_event(mesh):
    namespace = mesh.namespace(annotations=ENABLED)
    made = mesh.api.kubectl(
        "-n", namespace, "create", "--dry-run=server", "-o", "json", "-f", "-", input=json.dumps(pod("dry"))
    )
    assert "mantle-proxy" in made
    mesh.create(namespace, pod("real"))
    events = eventually(lambda: mesh.events(namespace, "Pod", "Injected"))
    assert [e["involvedObject"]["name"] for e in events] == ["real"]


def test_the_control_namespace_and_kube_system_are_never_asked_about(mesh):
    for namespace in ("mantle", "kube-system"):
        made = mesh.create(namespace, pod("plain", ENABLED))
        assert names(made) == ["app"] and "initContainers" not in made["spec"]
        mesh.api.kubectl("-n", namespace, "delete", "pod", "plain", "--force")


def test_it_counts_what_it_was_asked_and_what_it_said(mesh):
    namespace = mesh.namespace(annotations=ENABLED)
    mesh.create(namespace, pod("web"))
    mesh.create(namespace, pod("host", hostNetwork=True))
    (replica,) = mesh.replicas
    assert replica.metric("proxy_inject_admission_requests_total", namespace=namespace) == 2
    assert replica.metric("proxy_inject_admission_responses_total", namespace=namespace, skip="false") == 1
    skipped = {"namespace": namespace, "skip": "true", "skip_reason": "host_network_enabled"}
    assert replica.metric("proxy_inject_admission_responses_total", annotation_at="namespace", **skipped) == 1


def test_while_it_is_down_each_namespace_has_what_it_chose(mesh):
    opened = mesh.namespace(annotations=ENABLED)
    closed = mesh.namespace(annotations=ENABLED, labels={"mantle.dev/injector-failure": "closed"})
    assert "mantle-proxy" in names(mesh.create(closed, pod("during")), "initContainers")
    (replica,) = mesh.replicas
    mesh.stop(replica)
    assert names(mesh.create(opened, pod("plain"))) == ["app"]
    said = mesh.refusal(closed, pod("refused"))
    assert "closed.injector.mantle.dev" in said
    mesh.start()
    assert "mantle-proxy" in names(mesh.create(closed, pod("after")), "initContainers")


def test_its_certificates_and_authorities_change_under_load_and_no_admission_fails(mesh):
    """Two replicas, a certificate of some seconds, and pods all the while: fail-closed, so that each failure shows."""
    (replica,) = mesh.replicas
    mesh.stop(replica)
    mesh.api.kubectl("-n", "mantle", "delete", "secret", "mantle-injector-tls")
    namespace = mesh.namespace(annotations=ENABLED, labels={"mantle.dev/injector-failure": "closed"})
    # Renewed after 7 s, over 4 s later: a busy machine may stand still for seconds.
    lives = ("--certificate-lifetime=12s", "--authority-lifetime=60s")
    serving, other = mesh.start(*lives), mesh.start(*lives, port=free_port())
    mesh.in_effect(namespace)
    stop, failures, made = threading.Event(), [], []

    def load() -> None:
        while not stop.is_set():
            try:
                result = mesh.api.kubectl(
                    "-n", namespace, "create", "--dry-run=server", "-o", "json", "-f", "-", input=json.dumps(pod("x"))
                )
                made.append("mantle-proxy" in result)
            except AssertionError as error:
                failures.append(str(error))

    worker = threading.Thread(target=load)
    worker.start()
    try:
        # Another authority joins 36 s after the first was made, and signs 3 to 11 s later.
        seen: set[bytes] = set()

        def two_authorities_have_signed() -> bool:
            secret = json.loads(mesh.api.kubectl("-n", "mantle", "get", "secret", "mantle-injector-tls", "-o", "json"))
            leaf = x509.load_pem_x509_certificate(base64.b64decode(secret["data"]["tls.crt"]))
            seen.add(leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier)
            return len(seen) >= 2

        eventually(two_authorities_have_signed, seconds=240)
        count = len(made)
        eventually(lambda: len(made) >= count + 5)
    finally:
        stop.set()
        worker.join(200)
    assert failures == [] and all(made)
    for each in (serving, other):
        assert each.metric("mantle_injector_certificate_reloads_total") >= 4
    writes = sum(each.metric("mantle_injector_certificate_writes_total") for each in (serving, other))
    assert writes <= serving.metric("mantle_injector_certificate_reloads_total") + 4, "each renewal is written once"
    for each in (serving, other):  # those that follow have a certificate that lasts
        mesh.stop(each)
    mesh.api.kubectl("-n", "mantle", "delete", "secret", "mantle-injector-tls")
    mesh.start()
    mesh.in_effect(namespace)


def test_installing_again_does_not_take_the_bundle_away(mesh):
    def bundles() -> list[str]:
        found = json.loads(mesh.api.kubectl("get", "mutatingwebhookconfiguration", "mantle-injector", "-o", "json"))
        return [hook["clientConfig"].get("caBundle", "") for hook in found["webhooks"]]

    assert all(bundles())
    mesh.api.kubectl("apply", "-f", "-", input=json.dumps(mesh.objects()[-1]))
    assert all(bundles())


def test_it_may_read_no_secret_but_its_own(mesh):
    mine = "system:serviceaccount:mantle:mantle-injector"

    def may(*what: str) -> str:
        return mesh.api.kubectl("auth", "can-i", *what, f"--as={mine}", "--quiet=false") if what else ""

    assert may("get", "secret/mantle-injector-tls", "-n", "mantle").strip() == "yes"
    for refused in (
        ("get", "secret/mantle-identity-issuer", "-n", "mantle"),
        ("list", "secrets", "-n", "mantle"),
        ("get", "secrets", "-n", "kube-system"),
        ("patch", "mutatingwebhookconfiguration/other"),
        ("create", "pods", "-n", "default"),
    ):
        with pytest.raises(AssertionError, match="no"):
            may(*refused)


def mantle(mesh, *args: str, given: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mantle", f"--kubeconfig={mesh.api.kubeconfig}", *args]
    return subprocess.run(command, input=given, capture_output=True, text=True, timeout=180)


def test_manual_renders_what_the_webhook_makes_from_the_meshs_own_settings(mesh):
    namespace = mesh.namespace()
    asked = pod("web", ENABLED, serviceAccountName="default")
    by_webhook = mesh.create(namespace, asked)
    done = mantle(mesh, "inject", "--manual", "-", given=json.dumps(pod("web", serviceAccountName="default")))
    assert done.returncode == 0 and 'pod "web" injected' in done.stderr
    by_hand = YAML(typ="safe").load(done.stdout)
    for name in ("mantle-init", "mantle-guard", "mantle-proxy"):
        (left,) = [c for c in by_hand["spec"]["initContainers"] if c["name"] == name]
        (right,) = [c for c in by_webhook["spec"]["initContainers"] if c["name"] == name]
        for key in ("image", "args", "env", "securityContext"):
            assert left.get(key) == right.get(key), (name, key)


def test_manual_without_a_mesh_says_what_is_missing_and_what_to_do(mesh):
    done = mantle(mesh, "inject", "--manual", "--control-namespace=default", "-", given=json.dumps(pod("web")))
    assert done.returncode == 1 and done.stdout == ""
    assert "no ConfigMap mantle-config and no ConfigMap mantle-identity-trust-roots in namespace default" in done.stderr
    assert "mantle install | kubectl apply -f -" in done.stderr and "--trust-anchors" in done.stderr


def answered(mesh: Mesh, namespace: str, service: dict) -> dict:
    """The service as it was made with the injector's answer: where that takes too long, a service does not wait."""
    tries = iter(range(100))

    def made() -> dict | None:
        found = mesh.create(namespace, {**service, "metadata": {"name": f"db-{next(tries)}"}})
        return found if "annotations" in found["metadata"] else None

    return dict(eventually(made))


def test_a_service_shows_the_opaque_ports_of_its_namespace_and_keeps_its_own(mesh):
    ports = {"ports": [{"name": "db", "port": 3306}]}
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "db"}, "spec": ports}
    own = {**service, "metadata": {"name": "own", "annotations": {OPAQUE: "1"}}}
    namespace = mesh.namespace(annotations={OPAQUE: "3306"}, labels={"mantle.dev/injector-failure": "closed"})
    made = answered(mesh, namespace, service)
    assert made["metadata"]["annotations"] == {OPAQUE: "3306", "mantle.dev/inherited-opaque-ports": "3306"}
    assert mesh.create(namespace, own)["metadata"]["annotations"] == {OPAQUE: "1"}
    event = eventually(lambda: mesh.events(namespace, "Service", "Injected"))[-1]
    assert event["involvedObject"]["uid"] == made["metadata"]["uid"]
    assert "3306, as its namespace says" in event["message"]

    wrong = mesh.namespace(annotations={OPAQUE: "80-"})
    assert "mantle.dev/injection-skipped" in answered(mesh, wrong, service)["metadata"]["annotations"]
    event = eventually(lambda: mesh.events(wrong, "Service", "InjectionSkipped"))[0]
    assert event["type"] == "Warning" and "'80-' is not accepted" in event["message"]


def test_no_service_waits_for_an_injector_that_is_down(mesh):
    namespace = mesh.namespace(annotations={OPAQUE: "3306"}, labels={"mantle.dev/injector-failure": "closed"})
    for replica in list(mesh.replicas):
        mesh.stop(replica)
    try:
        spec = {"ports": [{"port": 3306}]}
        service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "db"}, "spec": spec}
        assert "annotations" not in mesh.create(namespace, service)["metadata"]
    finally:
        mesh.start()
        mesh.in_effect(mesh.namespace())
