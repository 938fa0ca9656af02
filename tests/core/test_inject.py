"""Injection as a table of pods: who is meshed, what is added, what is refused."""

import copy
import hashlib
import json

import pytest

from mantle.core.annotations import CONFIG
from mantle.core.inject import Injected, Refused, Skipped, inject_pod, uninject_pod
from mantle.core.pod_facts import Skip
from mantle.core.proxy_env import Values

VALUES = Values("1.2.3", "ROOTS", ("10.203.0.0/16",))
MACHINE = Values("1.2.3", "ROOTS", ("10.203.0.0/16",), inject_by_default=True)
ENABLED = {"mantle.dev/inject": "enabled"}


def pod(annotations: dict | None = None, **spec: object) -> dict:
    app = {"name": "app", "image": "acme/web", "ports": [{"name": "http", "containerPort": 8080}]}
    return {
        "metadata": {"labels": {"app": "web"}, "annotations": dict(annotations or {})},
        "spec": {"serviceAccountName": "web", "containers": [app], **spec},
    }


def namespace(annotations: dict | None = None) -> dict:
    return {"metadata": {"name": "shop", "annotations": annotations or {}}}


def meshed(annotations: dict | None = None, ns: dict | None = None, values: Values = MACHINE, **spec: object) -> dict:
    result = inject_pod(pod(annotations, **spec), namespace(ns), values, ("Deployment", "web"))
    assert isinstance(result, Injected), result
    return result.pod


def container(injected: dict, name: str) -> dict:
    spec = injected["spec"]
    (found,) = [c for c in spec.get("initContainers", []) + spec["containers"] if c["name"] == name]
    return found


def env(injected: dict) -> dict[str, str]:
    entries = container(injected, "mantle-proxy")["env"]
    return {e["name"].removeprefix("MANTLE_PROXY_"): e.get("value", str(e.get("valueFrom"))) for e in entries}


@pytest.mark.parametrize(
    ("own", "ns", "on_cluster", "on_machine"),
    [
        (None, None, Skip.NOT_ENABLED, None),
        ("enabled", None, None, None),
        ("ingress", None, None, None),
        ("disabled", None, Skip.DISABLED, Skip.DISABLED),
        (None, "enabled", None, None),
        (None, "disabled", Skip.DISABLED, Skip.DISABLED),
        ("enabled", "disabled", None, None),
        ("disabled", "enabled", Skip.DISABLED, Skip.DISABLED),
    ],
)
def test_the_pod_decides_then_its_namespace_then_the_platform(own, ns, on_cluster, on_machine):
    for values, expected in ((VALUES, on_cluster), (MACHINE, on_machine)):
        annotations = {"mantle.dev/inject": own} if own else {}
        ns_annotations = {"mantle.dev/inject": ns} if ns else {}
        result = inject_pod(pod(annotations), namespace(ns_annotations), values)
        if expected is None:
            assert isinstance(result, Injected)
        else:
            assert result == Skipped((expected,))
            assert expected.message()


@pytest.mark.parametrize("where", ["pod", "namespace"])
def test_a_typo_in_the_inject_annotation_refuses_instead_of_running_in_plaintext(where):
    typo = {"mantle.dev/inject": "enable"}
    result = inject_pod(pod(typo if where == "pod" else {}), namespace(typo if where == "namespace" else {}), MACHINE)
    assert isinstance(result, Refused)
    assert [str(m) for m in result.mistakes] == [
        f"{where} annotation mantle.dev/inject: 'enable' is not accepted; use enabled or disabled or ingress"
    ]


def test_what_cannot_be_meshed_is_skipped_with_every_reason():
    linkerd = {"name": "linkerd-proxy", "image": "cr.l5d.io/linkerd/proxy:edge"}
    result = inject_pod(pod(hostNetwork=True, initContainers=[linkerd]), {}, MACHINE)
    assert result == Skipped((Skip.HOST_NETWORK, Skip.FOREIGN_SIDECAR))
    for name in ("istio-validation", "kuma-sidecar", "consul-dataplane"):
        other = pod(initContainers=[{"name": name}])
        assert inject_pod(other, {}, MACHINE) == Skipped((Skip.FOREIGN_SIDECAR,))
    by_image = pod()
    by_image["spec"]["containers"].append({"name": "x", "image": "gcr.io/istio-release/proxyv2:1.2"})
    assert inject_pod(by_image, {}, MACHINE) == Skipped((Skip.FOREIGN_SIDECAR,))


def test_redirect_first_then_the_proxy_then_what_the_pod_had():
    injected = meshed(initContainers=[{"name": "migrate", "image": "acme/migrate"}])
    assert [c["name"] for c in injected["spec"]["initContainers"]] == ["mantle-init", "mantle-proxy", "migrate"]
    assert [c["name"] for c in injected["spec"]["containers"]] == ["app"]
    proxy = container(injected, "mantle-proxy")
    assert proxy["restartPolicy"] == "Always"
    assert proxy["startupProbe"] == {
        "httpGet": {"path": "/ready", "port": 4191},
        "periodSeconds": 1,
        "failureThreshold": 120,
    }
    assert proxy["readinessProbe"]["httpGet"] == {"path": "/ready", "port": 4191}
    assert proxy["livenessProbe"]["httpGet"] == {"path": "/live", "port": 4191}


def test_the_redirect_has_one_capability_and_the_proxy_none():
    injected = meshed()
    init, proxy = container(injected, "mantle-init"), container(injected, "mantle-proxy")
    assert init["image"] == proxy["image"] == "mantle/proxy:1.2.3"
    assert " ".join(init["args"]) == (
        "redirect install --inbound-port 4143 --outbound-port 4140 --proxy-uid 2102 --skip-inbound-ports 4190,4191"
    )
    assert init["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["NET_ADMIN"]}
    context = proxy["securityContext"]
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert (context["runAsUser"], context["runAsNonRoot"]) == (2102, True)
    assert (context["readOnlyRootFilesystem"], context["allowPrivilegeEscalation"]) == (True, False)


CLUSTER = Values("1.2.3", "ROOTS", ("10.203.0.0/16",), inject_by_default=True, guard=True)


def test_on_a_cluster_a_guard_stays_with_the_redirects_own_flags():
    injected = meshed(initContainers=[{"name": "migrate"}], values=CLUSTER)
    order = [c["name"] for c in injected["spec"]["initContainers"]]
    assert order == ["mantle-init", "mantle-guard", "mantle-proxy", "migrate"]
    init, guard = container(injected, "mantle-init"), container(injected, "mantle-guard")
    assert guard["args"] == ["redirect", "guard", *init["args"][2:]]
    assert (guard["restartPolicy"], "restartPolicy" in init) == ("Always", False)
    assert guard["securityContext"] == init["securityContext"]
    assert inject_pod(injected, namespace(), CLUSTER, ("Deployment", "web")).pod == injected
    assert "mantle-guard" not in str(uninject_pod(injected))


def test_a_classic_guard_is_an_ordinary_container_and_can_be_left_out():
    classic = meshed({"config.mantle.dev/proxy-enable-native-sidecar": "false"}, values=CLUSTER)
    assert [c["name"] for c in classic["spec"]["initContainers"]] == ["mantle-init"]
    assert [c["name"] for c in classic["spec"]["containers"]] == ["mantle-proxy", "mantle-guard", "app"]
    hook = {"exec": {"command": ["/usr/bin/mantle-proxy", "await", "--port", "4191"]}}
    assert container(classic, "mantle-proxy")["lifecycle"] == {"postStart": hook}
    without = meshed({"config.mantle.dev/redirect-guard": "disabled"}, values=CLUSTER)
    assert [c["name"] for c in without["spec"]["initContainers"]] == ["mantle-init", "mantle-proxy"]


def test_where_the_proxy_has_bounds_so_has_the_guard_small_ones():
    """A namespace with a quota takes no container without."""
    bounds = {"config.mantle.dev/proxy-cpu-request": "100m", "config.mantle.dev/proxy-memory-limit": "64Mi"}
    injected = meshed(bounds, values=CLUSTER)
    assert container(injected, "mantle-init")["resources"] == container(injected, "mantle-proxy")["resources"]
    guard = container(injected, "mantle-guard")["resources"]
    assert guard == {"requests": {"cpu": "10m"}, "limits": {"memory": "16Mi"}}


def test_the_debug_container_may_capture_whatever_the_pod_says_of_its_users():
    injected = meshed({"config.mantle.dev/enable-debug-sidecar": "true"}, securityContext={"runAsNonRoot": True})
    context = container(injected, "mantle-debug")["securityContext"]
    assert (context["runAsUser"], context["runAsNonRoot"]) == (0, False)
    assert "NET_RAW" in context["capabilities"]["add"]


def test_without_root_the_proxy_is_exempt_by_its_mark():
    injected = meshed(values=Values("1", "ROOTS", (), inject_by_default=True, mark=0x6D))
    args = container(injected, "mantle-init")["args"]
    assert args[args.index("--proxy-mark") + 1] == "0x6d" and "--proxy-uid" not in args
    assert env(injected)["OUTBOUND_MARK"] == "0x6d"
    assert container(injected, "mantle-proxy")["securityContext"]["capabilities"]["add"] == ["NET_ADMIN"]


def test_the_token_is_projected_for_identity_and_nothing_else():
    injected = meshed()
    volumes = {v["name"]: v for v in injected["spec"]["volumes"]}
    assert volumes["mantle-identity-token"]["projected"]["sources"] == [
        {
            "serviceAccountToken": {
                "audience": "identity.mantle.dev",
                "expirationSeconds": 3600,
                "path": "mantle-identity-token",
            }
        }
    ]
    assert volumes["mantle-identity-end-entity"]["emptyDir"]["medium"] == "Memory"
    mounts = {m["name"]: m["mountPath"] for m in container(injected, "mantle-proxy")["volumeMounts"]}
    assert env(injected)["IDENTITY_TOKEN_FILE"] == f"{mounts['mantle-identity-token']}/mantle-identity-token"
    assert "volumeMounts" not in container(injected, "app"), "the application sees neither"


def test_who_the_proxy_is_and_whom_it_asks():
    said = env(meshed())
    suffix = "mantle.serviceaccount.identity.mantle.cluster.local"
    assert said["IDENTITY_LOCAL_NAME"] == "$(_pod_sa).$(_pod_ns).serviceaccount.identity.mantle.cluster.local"
    assert said["IDENTITY_SVC_ADDR"] == "mantle-identity.mantle.svc.cluster.local:8080"
    assert said["IDENTITY_SVC_NAME"] == f"mantle-identity.{suffix}"
    assert said["DESTINATION_SVC_ADDR"] == "mantle-destination.mantle.svc.cluster.local:8086"
    assert said["POLICY_SVC_ADDR"] == "mantle-destination.mantle.svc.cluster.local:8090"
    assert said["POLICY_SVC_NAME"] == said["DESTINATION_SVC_NAME"] == f"mantle-destination.{suffix}"
    assert said["TAP_SVC_NAME"] == f"mantle-viz.{suffix}"
    assert said["IDENTITY_TRUST_ANCHORS"] == "ROOTS"
    assert said["DESTINATION_PROFILE_NETWORKS"] == said["POLICY_CLUSTER_NETWORKS"] == "10.203.0.0/16"
    assert said["INBOUND_DEFAULT_POLICY"] == "all-unauthenticated"
    assert json.loads(said["POLICY_WORKLOAD"]) == {"ns": "$(_pod_ns)", "pod": "$(_pod_name)"}
    assert "status.podIPs" in said["INBOUND_IPS"]
    names = [e["name"] for e in container(meshed(), "mantle-proxy")["env"]]
    assert len(names) == len(set(names))
    assert names.index("_pod_sa") < names.index("MANTLE_PROXY_IDENTITY_LOCAL_NAME"), "$(…) refers backwards"


def test_every_port_the_pod_mentions_is_listed():
    app = {
        "name": "app",
        "ports": [
            {"name": "http", "containerPort": 8080},
            {"containerPort": 53, "protocol": "UDP"},
            {"name": "db", "containerPort": 5432},
        ],
        "startupProbe": {"httpGet": {"path": "/", "port": 9001}},
        "readinessProbe": {"httpGet": {"path": "/", "port": "http"}},
        "livenessProbe": {"grpc": {"port": 9002}},
    }
    other = {"name": "other", "livenessProbe": {"tcpSocket": {"port": 9003}}}
    result = inject_pod(pod(containers=[app, other]), {}, MACHINE)
    assert isinstance(result, Injected) and result.udp_ports
    assert env(result.pod)["INBOUND_PORTS"] == "5432,8080,9001,9002,9003"
    assert result.pod["metadata"]["annotations"]["config.mantle.dev/opaque-ports"] == "5432"
    assert env(meshed({"config.mantle.dev/pod-inbound-ports": "80, 90-92"}))["INBOUND_PORTS"] == "80,90-92"


def test_opaque_ports_may_be_named_and_replace_the_default_list():
    injected = meshed({"config.mantle.dev/opaque-ports": "http,3306"})
    assert env(injected)["INBOUND_PORTS_DISABLE_PROTOCOL_DETECTION"] == "8080,3306"
    assert env(meshed())["INBOUND_PORTS_DISABLE_PROTOCOL_DETECTION"].startswith("25,587,3306")
    assert "config.mantle.dev/opaque-ports" not in meshed()["metadata"]["annotations"]


def test_labels_and_annotations_say_whose_mesh_it_is():
    injected = meshed(ns={"config.mantle.dev/proxy-log-level": "debug"})
    assert injected["metadata"]["labels"] == {
        "app": "web",
        "mantle.dev/control-plane-ns": "mantle",
        "mantle.dev/workload-ns": "shop",
        "mantle.dev/proxy-deployment": "web",
    }
    assert injected["metadata"]["annotations"] == {
        "config.mantle.dev/proxy-log-level": "debug",
        "mantle.dev/added-annotations": "config.mantle.dev/proxy-log-level",
        "mantle.dev/created-by": "mantle 1.2.3",
        "mantle.dev/proxy-version": "1.2.3",
        "mantle.dev/trust-root-sha256": hashlib.sha256(b"ROOTS").hexdigest(),
    }


def test_the_argument_is_not_changed_and_injecting_twice_is_injecting_once():
    original = pod({"config.mantle.dev/skip-outbound-ports": "9999"}, initContainers=[{"name": "migrate"}])
    before = copy.deepcopy(original)
    once = inject_pod(original, namespace(), MACHINE)
    assert original == before
    assert isinstance(once, Injected)
    assert inject_pod(once.pod, namespace(), MACHINE) == once
    assert uninject_pod(once.pod) == before


def test_an_application_with_the_proxys_user_id_is_refused():
    result = inject_pod(pod(securityContext={"runAsUser": 2102}), {}, MACHINE)
    assert isinstance(result, Refused)
    assert "bypasses the mesh" in str(result.mistakes[0])
    marked = Values("1", "ROOTS", (), inject_by_default=True, mark=0x6D)
    assert isinstance(inject_pod(pod(securityContext={"runAsUser": 2102}), {}, marked), Injected)


ANNOTATION_EFFECTS = {
    "proxy-image": ("acme/proxy", lambda p: container(p, "mantle-proxy")["image"] == "acme/proxy:1.2.3"),
    "proxy-version": ("9.9", lambda p: container(p, "mantle-init")["image"] == "mantle/proxy:9.9"),
    "image-pull-policy": ("Always", lambda p: container(p, "mantle-proxy")["imagePullPolicy"] == "Always"),
    "enable-debug-sidecar": ("true", lambda p: container(p, "mantle-debug")["image"] == "mantle/debug:1.2.3"),
    "control-port": ("5190", lambda p: env(p)["CONTROL_LISTEN_ADDR"] == "0.0.0.0:5190"),
    "admin-port": ("5191", lambda p: "4190,5191" in container(p, "mantle-init")["args"]),
    "inbound-port": ("5143", lambda p: env(p)["INBOUND_LISTEN_ADDR"] == "0.0.0.0:5143"),
    "outbound-port": ("5140", lambda p: env(p)["OUTBOUND_LISTEN_ADDR"] == "127.0.0.1:5140"),
    "pod-inbound-ports": ("80", lambda p: env(p)["INBOUND_PORTS"] == "80"),
    "skip-inbound-ports": ("22", lambda p: "4190,4191,22" in container(p, "mantle-init")["args"]),
    "skip-outbound-ports": ("22,30-40", lambda p: container(p, "mantle-init")["args"][-1] == "22,30-40"),
    "skip-subnets": ("10.0.0.0/8", lambda p: container(p, "mantle-init")["args"][-1] == "10.0.0.0/8"),
    "opaque-ports": ("8080", lambda p: env(p)["INBOUND_PORTS_DISABLE_PROTOCOL_DETECTION"] == "8080"),
    "proxy-cpu-request": ("10m", lambda p: container(p, "mantle-proxy")["resources"] == {"requests": {"cpu": "10m"}}),
    "proxy-cpu-limit": ("1", lambda p: container(p, "mantle-proxy")["resources"] == {"limits": {"cpu": "1"}}),
    "proxy-cpu-ratio-limit": ("0.5", lambda p: env(p)["CORES_MAX_RATIO"] == "0.5"),
    "proxy-memory-request": ("9Mi", lambda p: container(p, "mantle-proxy")["resources"]["requests"]["memory"] == "9Mi"),
    "proxy-memory-limit": ("9Mi", lambda p: container(p, "mantle-proxy")["resources"]["limits"]["memory"] == "9Mi"),
    "proxy-ephemeral-storage-request": (
        "1Mi",
        lambda p: container(p, "mantle-proxy")["resources"]["requests"]["ephemeral-storage"] == "1Mi",
    ),
    "proxy-ephemeral-storage-limit": (
        "1Mi",
        lambda p: container(p, "mantle-proxy")["resources"]["limits"]["ephemeral-storage"] == "1Mi",
    ),
    "proxy-uid": ("3000", lambda p: container(p, "mantle-proxy")["securityContext"]["runAsUser"] == 3000),
    "proxy-gid": ("3000", lambda p: container(p, "mantle-proxy")["securityContext"]["runAsGroup"] == 3000),
    "proxy-admin-shutdown": ("enabled", lambda p: env(p)["SHUTDOWN_ENDPOINT_ENABLED"] == "true"),
    "proxy-log-level": ("debug", lambda p: env(p)["LOG"] == "debug"),
    "proxy-log-format": ("json", lambda p: env(p)["LOG_FORMAT"] == "json"),
    "proxy-log-http-headers": ("insecure", lambda p: env(p)["LOG"] == "warn,mantle=info"),
    "enable-external-profiles": ("true", lambda p: env(p)["DESTINATION_PROFILE_SUFFIXES"] == "."),
    "proxy-require-identity-inbound-ports": ("8080", lambda p: env(p)["INBOUND_PORTS_REQUIRE_IDENTITY"] == "8080"),
    "default-inbound-policy": ("deny", lambda p: env(p)["INBOUND_DEFAULT_POLICY"] == "deny"),
    "proxy-metrics-hostname-labels": ("true", lambda p: env(p)["OUTBOUND_METRICS_HOSTNAME_LABELS"] == "true"),
    "proxy-outbound-connect-timeout": ("5s", lambda p: env(p)["OUTBOUND_CONNECT_TIMEOUT"] == "5s"),
    "proxy-inbound-connect-timeout": ("5s", lambda p: env(p)["INBOUND_CONNECT_TIMEOUT"] == "5s"),
    "proxy-outbound-discovery-cache-unused-timeout": (
        "9s",
        lambda p: env(p)["OUTBOUND_DISCOVERY_IDLE_TIMEOUT"] == "9s",
    ),
    "proxy-inbound-discovery-cache-unused-timeout": ("9s", lambda p: env(p)["INBOUND_DISCOVERY_IDLE_TIMEOUT"] == "9s"),
    "proxy-disable-outbound-protocol-detect-timeout": ("true", lambda p: env(p)["OUTBOUND_DETECT_TIMEOUT"] == "365d"),
    "proxy-disable-inbound-protocol-detect-timeout": ("true", lambda p: env(p)["INBOUND_DETECT_TIMEOUT"] == "365d"),
    "enable-gateway": ("true", lambda p: env(p)["INBOUND_GATEWAY_SUFFIXES"] == "svc.cluster.local."),
    "close-wait-timeout": ("60", lambda p: p["spec"]["securityContext"]["sysctls"][0]["value"] == "60"),
    "proxy-await": ("disabled", lambda p: "startupProbe" not in container(p, "mantle-proxy")),
    "access-log": ("apache", lambda p: env(p)["ACCESS_LOG"] == "apache"),
    "shutdown-grace-period": ("9s", lambda p: env(p)["SHUTDOWN_GRACE_PERIOD"] == "9s"),
    "proxy-enable-native-sidecar": ("false", lambda p: p["spec"]["containers"][0]["name"] == "mantle-proxy"),
    "proxy-wait-before-exit-seconds": (
        "5",
        lambda p: container(p, "mantle-proxy")["lifecycle"] == {"preStop": {"sleep": {"seconds": 5}}},
    ),
    "proxy-additional-env": ('[{"name": "A", "value": "b"}]', lambda p: env(p)["A"] == "b"),
}
DEBUG_IMAGE = {"debug-image", "debug-image-version", "debug-image-pull-policy"}


def test_every_annotation_has_its_effect_written_down_here():
    # tests/core/test_optional_tls.py: the mesh must be installed for it; test_endpoints.py: it concerns clients; and
    # above, as it is for clusters only
    elsewhere = {"tls", "transport-mode", "redirect-guard"}
    assert set(ANNOTATION_EFFECTS) | DEBUG_IMAGE | elsewhere == set(CONFIG)


@pytest.mark.parametrize("name", sorted(ANNOTATION_EFFECTS))
def test_an_annotation_has_its_effect(name):
    value, holds = ANNOTATION_EFFECTS[name]
    assert holds(meshed({f"config.mantle.dev/{name}": value}))
    from_namespace = meshed(ns={f"config.mantle.dev/{name}": value})
    assert not CONFIG[name].inherited or holds(from_namespace)


def test_the_debug_containers_image_is_the_pods_word():
    prefix = "config.mantle.dev/"
    wanted = {"enable-debug-sidecar": "true", "debug-image": "acme/debug", "debug-image-version": "7"}
    debug = container(meshed({prefix + k: v for k, v in wanted.items()}), "mantle-debug")
    assert debug["image"] == "acme/debug:7"
    policy = {prefix + "enable-debug-sidecar": "true", prefix + "debug-image-pull-policy": "Never"}
    assert container(meshed(policy), "mantle-debug")["imagePullPolicy"] == "Never"


def test_ingress_mode_and_tap_switch():
    assert env(meshed({"mantle.dev/inject": "ingress"}))["INGRESS_MODE"] == "true"
    assert "TAP_SVC_NAME" not in env(meshed({"viz.mantle.dev/disable-tap": "true"}))


def test_the_pods_word_wins_over_the_namespaces_and_environment_is_merged_by_name():
    key = "config.mantle.dev/proxy-additional-env"
    injected = meshed(
        {key: '[{"name":"A","value":"pod"}]'}, ns={key: '[{"name":"A","value":"ns"},{"name":"B","value":"ns"}]'}
    )
    assert (env(injected)["A"], env(injected)["B"]) == ("pod", "ns")
    level = "config.mantle.dev/proxy-log-level"
    assert env(meshed({level: "info"}, ns={level: "debug"}))["LOG"] == "info"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("inbound-port", "0"),
        ("inbound-port", "70000"),
        ("skip-inbound-ports", "80-70"),
        ("skip-inbound-ports", "http"),
        ("opaque-ports", "80;90"),
        ("default-inbound-policy", "all-authenticate"),
        ("proxy-uid", "0"),
        ("proxy-cpu-ratio-limit", "1.0"),
        ("proxy-inbound-connect-timeout", "5"),
        ("skip-subnets", "10.0.0.1/8"),
        ("proxy-additional-env", "{"),
        ("proxy-memory-limit", "lots"),
        ("proxy-admin-shutdown", "true"),
        ("access-log", "xml"),
    ],
)
def test_a_value_that_is_not_understood_refuses_the_pod(name, value):
    result = inject_pod(pod({f"config.mantle.dev/{name}": value}), {}, MACHINE)
    assert isinstance(result, Refused)
    (mistake,) = result.mistakes
    assert mistake.value == value and mistake.accepted == CONFIG[name].accepted


def test_all_mistakes_are_said_at_once_with_the_name_that_was_meant():
    result = inject_pod(
        pod({"config.mantle.dev/default-inbound-polcy": "deny", "config.mantle.dev/admin-port": "x"}),
        namespace({"config.mantle.dev/proxy-uid": "root"}),
        MACHINE,
    )
    assert isinstance(result, Refused)
    assert [str(m) for m in result.mistakes] == [
        "namespace annotation config.mantle.dev/proxy-uid: 'root' is not accepted; use a user id other than 0",
        "pod annotation config.mantle.dev/admin-port: 'x' is not accepted; use a port from 1 to 65535",
        "pod annotation config.mantle.dev/default-inbound-polcy: 'deny' is not accepted; "
        "use config.mantle.dev/default-inbound-policy if that was meant",
    ]


def test_linkerd2_proxy_gets_its_own_variable_names():
    injected = meshed(values=Values("1", "ROOTS", (), inject_by_default=True, interop=True))
    names = [e["name"] for e in container(injected, "mantle-proxy")["env"]]
    assert "LINKERD2_PROXY_IDENTITY_DIR" in names and not [n for n in names if n.startswith("MANTLE_")]


def test_the_meshs_own_environment_is_added_for_every_proxy():
    values = Values("1", "ROOTS", (), inject_by_default=True, proxy_env={"IDENTITY_MIN_REFRESH": "1s"})
    assert env(meshed(values=values))["IDENTITY_MIN_REFRESH"] == "1s"


@pytest.mark.parametrize(("where", "own_pod_only"), [("shop", True), ("mantle", False)])
def test_only_the_control_namespace_has_components(where: str, own_pod_only: bool) -> None:
    """A label anybody can write must not make a pod pass the API server by, or ask itself for identities."""
    obj = pod()
    obj["metadata"] |= {"namespace": where, "labels": {"mantle.dev/control-plane-component": "destination"}}
    values = Values("1", "ROOTS", (), inject_by_default=True, api_server="10.1.2.3/32")
    made = inject_pod(obj, {}, values)
    assert isinstance(made, Injected)
    assert ("10.1.2.3/32" in container(made.pod, "mantle-init")["args"]) is not own_pod_only
    asked = env(made.pod)["DESTINATION_SVC_ADDR"]
    assert asked == ("mantle-destination.mantle.svc.cluster.local:8086" if own_pod_only else "127.0.0.1:8086")
