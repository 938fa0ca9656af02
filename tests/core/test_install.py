"""What `mantle install` renders, without a cluster: complete, least privileged, two tiers, all values accounted for."""

import json

import pytest

from mantle.core.annotations import CONFIG
from mantle.core.inject import Injected, inject_pod
from mantle.manifests.config import (
    BY_PATH,
    PROXY,
    VALUES,
    BadValues,
    InstallValues,
    dump,
    injection_values,
    load,
    merge,
)
from mantle.manifests.render import PART_OF, Object, TrustMaterial, identify, install_objects, yaml_text

TRUST = TrustMaterial("ROOTS\nof two lines\n", "CERT\n", "KEY\n")
COMPONENTS = ("identity", "destination", "viz", "injector")


def rendered(trust: TrustMaterial = TRUST, **values: object) -> list[Object]:
    return install_objects(InstallValues(**values), trust)  # type: ignore[arg-type]


OBJECTS = rendered()


def find(objects: list[Object], kind: str, name: str) -> Object:
    (found,) = [o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name]
    return found


def pod(objects: list[Object], component: str) -> Object:
    return find(objects, "Deployment", f"mantle-{component}")["spec"]["template"]


def containers(template: Object) -> dict[str, Object]:
    spec = template["spec"]
    return {c["name"]: c for c in spec.get("initContainers", []) + spec["containers"]}


CLUSTER_SCOPED = ("Namespace", "ClusterRole", "ClusterRoleBinding", "MutatingWebhookConfiguration", "APIService")
NARROWING = ("ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding")


# ---- complete ----


def test_every_object_is_filled_named_once_and_in_its_namespace():
    assert "${" not in json.dumps(OBJECTS)
    names = [identify(o) for o in OBJECTS]
    assert len(set(names)) == len(names)
    for kind, namespace, name in names:
        expected = "" if kind in CLUSTER_SCOPED else "kube-system" if name == "mantle-viz-auth-reader" else "mantle"
        assert namespace == expected, (kind, name)


def test_each_component_has_its_deployment_account_and_service():
    for component in COMPONENTS:
        template = pod(OBJECTS, component)
        assert template["spec"]["serviceAccountName"] == f"mantle-{component}"
        assert find(OBJECTS, "ServiceAccount", f"mantle-{component}")
        offered = {p["name"] for c in containers(template).values() for p in c.get("ports", [])}
        service = find(OBJECTS, "Service", f"mantle-{component}")
        assert {p["targetPort"] for p in service["spec"]["ports"]} <= offered


def test_the_control_plane_comes_with_its_proxies_and_needs_no_webhook():
    for component in COMPONENTS:
        template = pod(OBJECTS, component)
        assert {"mantle-init", "mantle-guard", "mantle-proxy", component} == set(containers(template))
    for hook in find(OBJECTS, "MutatingWebhookConfiguration", "mantle-injector")["webhooks"]:
        (never,) = [
            e for e in hook["namespaceSelector"]["matchExpressions"] if e["key"] == "kubernetes.io/metadata.name"
        ]
        assert never["operator"] == "NotIn" and {"mantle", "kube-system"} <= set(never["values"])
        assert "objectSelector" not in hook, "a label of the pod's own must not keep it out of the mesh"


def test_the_api_server_is_reached_past_the_proxy_at_its_address_and_nothing_else_is():
    for component in COMPONENTS:
        args = containers(pod(OBJECTS, component))["mantle-init"]["args"]
        assert args[args.index("--skip-subnets") + 1] == "$(KUBERNETES_SERVICE_HOST)/32"
        assert "--skip-outbound-ports" not in args
    app = inject_pod({"spec": {"containers": [{"name": "a"}]}}, {}, injection_values(InstallValues(), "R"))
    assert not isinstance(app, Injected)  # nobody asked for it
    asked = {"metadata": {"annotations": {"mantle.dev/inject": "enabled"}}, "spec": {"containers": [{"name": "a"}]}}
    app = inject_pod(asked, {}, injection_values(InstallValues(), "R"))
    assert isinstance(app, Injected)
    assert "--skip-subnets" not in containers(app.pod)["mantle-init"]["args"]


def test_a_mesh_default_that_would_shut_the_control_plane_does_not_reach_it():
    objects = install_objects(load({"proxy": {"defaultInboundPolicy": "deny"}}), TRUST)
    proxy = containers(pod(objects, "identity"))["mantle-proxy"]
    (policy,) = [e["value"] for e in proxy["env"] if e["name"] == "MANTLE_PROXY_INBOUND_DEFAULT_POLICY"]
    assert policy == "all-unauthenticated"
    assert "--default-inbound-policy=deny" in containers(pod(objects, "destination"))["destination"]["args"]


# ---- least privilege ----


def test_no_rule_has_a_wildcard():
    rules = [rule for o in rendered(tls="optional") if o["kind"] in ("Role", "ClusterRole") for rule in o["rules"]]
    assert rules
    for rule in rules:
        for field in ("apiGroups", "resources", "verbs", "resourceNames", "nonResourceURLs"):
            assert not any("*" in item for item in rule.get(field, [])), rule


def test_each_component_may_follow_what_its_program_follows_and_nothing_more():
    from mantle.platform.kubernetes.world import DISCOVERY, IDENTITY

    for component, kinds in (("identity", IDENTITY), ("destination", DISCOVERY), ("viz", DISCOVERY)):
        watched = {
            f"{resource}.{group}" if group else resource
            for rule in find(OBJECTS, "ClusterRole", f"mantle-{component}")["rules"]
            if {"list", "watch"} <= set(rule["verbs"])
            for group in rule["apiGroups"]
            for resource in rule["resources"]
        }
        assert watched == {kind.value for kind in kinds}


def test_no_rule_reads_the_issuer():
    """The ca of the experimental mode writes Secrets everywhere, and reads its own."""
    for role in (o for o in rendered(tls="optional") if o["kind"] in ("Role", "ClusterRole")):
        for rule in role["rules"]:
            if "secrets" in rule.get("resources", []) and set(rule["verbs"]) & {"get", "list", "watch", "patch"}:
                name = role["metadata"]["name"]
                assert role["kind"] == "Role"
                assert rule["resourceNames"] == ["mantle-ca" if name == "mantle-ca" else f"{name}-tls"]


def test_what_narrows_the_rights_of_the_ca_is_there_before_they_are_and_names_its_account():
    objects = rendered(tls="optional")
    kinds = [o["kind"] for o in objects if o["metadata"]["name"] == "mantle-ca"]
    assert kinds.index("ClusterRoleBinding") > max(kinds.index(kind) for kind in NARROWING)
    policy = find(rendered(tls="optional", control_namespace="mesh"), "ValidatingAdmissionPolicy", "mantle-ca")["spec"]
    assert policy["matchConditions"][0]["expression"].endswith("== 'system:serviceaccount:mesh:mantle-ca'")
    assert "mantle:" not in json.dumps(policy)
    assert find(objects, "ValidatingAdmissionPolicyBinding", "mantle-ca")["spec"]["validationActions"] == ["Deny"]
    values = InstallValues(tls="optional")
    older = install_objects(values, TRUST, admission_policies=False)
    assert older == [o for o in install_objects(values, TRUST) if o["kind"] not in NARROWING]


def test_the_ca_is_there_in_the_experimental_mode_alone_and_restricted_too():
    assert not [o for o in OBJECTS if o["metadata"]["name"] == "mantle-ca"]
    deployment = find(rendered(tls="optional", ha=True), "Deployment", "mantle-ca")["spec"]
    assert (deployment["replicas"], deployment["strategy"]) == (1, {"type": "Recreate"}), "never two, not for a moment"
    template = pod(rendered(tls="optional", ha=True), "ca")
    assert {"mantle-init", "mantle-guard", "mantle-proxy", "ca"} == set(containers(template))
    assert template["spec"]["automountServiceAccountToken"] is False
    context = {**template["spec"]["securityContext"], **containers(template)["ca"]["securityContext"]}
    assert (
        context["readOnlyRootFilesystem"] and context["runAsNonRoot"] and context["capabilities"] == {"drop": ["ALL"]}
    )


def test_the_issuer_is_mounted_by_identity_alone():
    for component in COMPONENTS:
        template = pod(OBJECTS, component)
        holders = [
            name
            for name, c in containers(template).items()
            for mount in c.get("volumeMounts", [])
            for volume in template["spec"]["volumes"]
            if volume["name"] == mount["name"]
            and volume.get("secret", {}).get("secretName") == "mantle-identity-issuer"
        ]
        assert holders == (["identity"] if component == "identity" else [])


def test_tokens_of_the_api_reach_the_components_and_not_their_proxies():
    for component in COMPONENTS:
        template = pod(OBJECTS, component)
        assert template["spec"]["automountServiceAccountToken"] is False
        assert find(OBJECTS, "ServiceAccount", f"mantle-{component}")["automountServiceAccountToken"] is False
        holders = [
            name
            for name, c in containers(template).items()
            if any(m["mountPath"].startswith("/var/run/secrets/kubernetes.io") for m in c.get("volumeMounts", []))
        ]
        assert holders == [component]


RESTRICTED_VOLUMES = {"configMap", "downwardAPI", "emptyDir", "projected", "secret"}


@pytest.mark.parametrize("native", [True, False])
def test_every_container_but_the_redirect_is_restricted(native):
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted"""
    objects = install_objects(load({"proxy": {"nativeSidecar": native}}), TRUST)
    for component in COMPONENTS:
        template = pod(objects, component)
        spec = template["spec"]
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        for volume in spec["volumes"]:
            assert set(volume) - {"name"} <= RESTRICTED_VOLUMES
        for name, container in containers(template).items():
            context = {**spec["securityContext"], **container["securityContext"]}
            assert context["runAsNonRoot"] is True and context["runAsUser"] > 0
            redirect = name in ("mantle-init", "mantle-guard")
            assert context["seccompProfile"] == {"type": "RuntimeDefault"}
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"]["drop"] == ["ALL"]
            assert context["capabilities"].get("add", []) == (["NET_ADMIN"] if redirect else [])
            assert not any("hostPort" in port for port in container.get("ports", []))
            assert set(container["resources"]["requests"]) == {"cpu", "memory"}


# ---- two tiers ----


def test_only_the_ca_and_the_namespace_are_out_of_prunes_reach():
    unlabelled = [identify(o)[::2] for o in OBJECTS if PART_OF not in o["metadata"]["labels"]]
    assert unlabelled == [
        ("Namespace", "mantle"),
        ("ConfigMap", "mantle-identity-trust-roots"),
        ("Secret", "mantle-identity-issuer"),
    ]


def test_what_exists_of_the_first_tier_is_not_printed_again():
    kept = rendered(TrustMaterial("ROOTS\n", emit_roots=False))
    names = {name for _, _, name in map(identify, kept)}
    assert not {"mantle-identity-trust-roots", "mantle-identity-issuer"} & names
    assert len(OBJECTS) - len(kept) == 2


def test_the_key_is_in_one_secret_and_nowhere_else():
    holders = [o for o in rendered(TrustMaterial("R\n", "C\n", "VERY-SECRET-KEY\n")) if "VERY-SECRET" in json.dumps(o)]
    assert [identify(o) for o in holders] == [("Secret", "mantle", "mantle-identity-issuer")]


def test_an_external_issuer_is_mounted_by_the_names_identity_reads():
    objects = rendered(TrustMaterial("ROOTS\n"), external_issuer=True)
    (volume,) = [v for v in pod(objects, "identity")["spec"]["volumes"] if v["name"] == "issuer"]
    assert volume["secret"]["items"] == [{"key": "tls.crt", "path": "crt.pem"}, {"key": "tls.key", "path": "key.pem"}]
    assert not [o for o in objects if identify(o) == ("Secret", "mantle", "mantle-identity-issuer")]


# ---- values ----


def test_ha_means_three_of_everything_spread_and_not_all_gone_at_once():
    objects = rendered(ha=True)
    for component in COMPONENTS:
        deployment = find(objects, "Deployment", f"mantle-{component}")
        assert deployment["spec"]["replicas"] == 3
        (near, _) = deployment["spec"]["template"]["spec"]["affinity"]["podAntiAffinity"][
            "preferredDuringSchedulingIgnoredDuringExecution"
        ]
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        assert near["podAffinityTerm"]["labelSelector"]["matchLabels"].items() <= labels.items()
        budget = find(objects, "PodDisruptionBudget", f"mantle-{component}")
        assert budget["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert not [o for o in OBJECTS if o["kind"] == "PodDisruptionBudget"]


def failure_of(objects: list[Object], label: str | None) -> list[str]:
    """The failure policies that a pod of a namespace with this label meets."""
    met = []
    for hook in find(objects, "MutatingWebhookConfiguration", "mantle-injector")["webhooks"]:
        if hook["rules"][0]["resources"] != ["pods"]:
            assert hook["failurePolicy"] == "Ignore", "only pods ever wait for the injector"
            continue
        (rule,) = [
            e for e in hook["namespaceSelector"]["matchExpressions"] if e["key"] == "mantle.dev/injector-failure"
        ]
        if (label in rule["values"]) == (rule["operator"] == "In"):
            met.append(hook["failurePolicy"])
    return met


def test_a_namespace_decides_what_an_unanswering_injector_means_for_it():
    ha = rendered(ha=True)
    assert failure_of(OBJECTS, None) == failure_of(OBJECTS, "open") == failure_of(ha, "open") == ["Ignore"]
    assert failure_of(ha, None) == failure_of(ha, "closed") == failure_of(OBJECTS, "closed") == ["Fail"]


def test_identity_is_told_whether_addresses_count():
    def said(**given: object) -> list[str]:
        args = containers(pod(rendered(**given), "identity"))["identity"]["args"]
        return [arg for arg in args if arg.startswith("--check-address")]

    assert said() == ["--check-address=true"]
    assert said(check_address=False) == ["--check-address=false"]


def test_a_registry_stands_before_every_image():
    objects = install_objects(load({"registry": "r.example:5000/team", "proxy": {"enableDebugSidecar": True}}), TRUST)
    images = {c["image"] for component in COMPONENTS for c in containers(pod(objects, component)).values()}
    assert images == {
        f"r.example:5000/team/mantle/{name}:{InstallValues().version}" for name in ("proxy", "control-plane", "debug")
    }


def test_what_the_registry_asks_for_is_shown_by_every_pod():
    objects = install_objects(load({"imagePullSecrets": "a,b"}), TRUST)
    for component in COMPONENTS:
        assert pod(objects, component)["spec"]["imagePullSecrets"] == [{"name": "a"}, {"name": "b"}]


def test_the_mesh_defaults_of_proxies_give_way_to_a_pods_own():
    values = injection_values(load({"proxy": {"logLevel": "debug", "nativeSidecar": False}}), "ROOTS\n")
    annotations = {"mantle.dev/inject": "enabled", "config.mantle.dev/proxy-log-level": "trace"}
    template = {"metadata": {"annotations": annotations}, "spec": {"containers": [{"name": "app", "image": "a"}]}}
    result = inject_pod(template, {}, values)
    assert isinstance(result, Injected)
    assert [c["name"] for c in result.pod["spec"]["initContainers"]] == ["mantle-init"]
    (level,) = [e["value"] for e in containers(result.pod)["mantle-proxy"]["env"] if e["name"] == "MANTLE_PROXY_LOG"]
    assert level == "trace"


def test_every_mistake_is_named_at_once_with_what_is_accepted():
    with pytest.raises(BadValues) as caught:
        load(
            {
                "ha": "yes",
                "networks": ["10.0.0.1/8"],
                "identity": {"issuanceLifetime": "1 day", "unheardOf": 1},
                "proxy": {"logLvel": "x", "adminPort": 70000},
                "registry": None,
            }
        )
    said = {fault.path: fault.accepted for fault in caught.value.faults}
    assert set(said) == {
        "ha",
        "networks",
        "identity.issuanceLifetime",
        "identity.unheardOf",
        "proxy.logLvel",
        "proxy.adminPort",
        "registry",
    }
    assert said["ha"] == "true or false"
    assert said["proxy.logLvel"] == "proxy.logLevel if that was meant"
    assert said["proxy.adminPort"] == CONFIG["admin-port"].accepted


def test_every_annotation_is_a_value_and_no_two_are_the_same():
    assert len(PROXY) == len(CONFIG)
    assert PROXY["proxy.nativeSidecar"].name == "proxy-enable-native-sidecar"
    assert not set(PROXY) & set(BY_PATH)
    assert {value.field for value in VALUES} | {"proxy"} == set(InstallValues.__dataclass_fields__)


def test_what_is_kept_in_the_cluster_reads_back_as_the_same_values():
    given = {"controlNamespace": "mesh", "ha": True, "apiServer": ["10.96.0.1/32"], "proxy": {"opaquePorts": [25, 587]}}
    values = load(given)
    kept = find(install_objects(values, TRUST, given), "ConfigMap", "mantle-config")["data"]
    assert load(json.loads(kept["values"])) == values
    assert json.loads(kept["overrides"]) == given
    assert load(dump(InstallValues())) == InstallValues()


def test_an_empty_section_says_nothing_and_sections_merge():
    assert load({"proxy": None, "identity": {}}) == InstallValues()
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}


# ---- the text ----


def test_the_yaml_reads_back_and_has_no_anchors():
    from ruamel.yaml import YAML

    text = yaml_text(OBJECTS)
    assert list(YAML(typ="safe", pure=True).load_all(text)) == OBJECTS
    assert "&id" not in text and "    ROOTS\n    of two lines\n" in text
