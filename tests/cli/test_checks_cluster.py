"""What `mantle check` concludes from a cluster's facts: each fault is found, named, and has a fix and a paragraph."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mantle.cli import check, check_cluster, checks, checks_cluster, checks_networks, checks_pods
from mantle.cli.checks import Finding, Result, Validity
from mantle.cli.checks_cluster import Api, Mesh, Trust, Wish
from mantle.cli.checks_objects import Unread
from mantle.cli.checks_pods import Data
from mantle.cli.main import cli
from mantle.core.inject import Injected, inject_pod
from mantle.core.proxy_env import Values
from mantle.manifests.config import InstallValues
from mantle.manifests.inventory import KINDS
from mantle.manifests.render import TrustMaterial, install_objects

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
PAGE = Path(__file__).resolve().parents[2] / "docs" / "check.md"


def pem(base64: str) -> str:
    return f"-----BEGIN CERTIFICATE-----\n{base64}\n-----END CERTIFICATE-----\n"


VALUES = Values("0.1.0", pem("Uk9P\nVA=="), ("10.0.0.0/8",))
FORBIDDEN = Unread('secrets is forbidden: User "ada" cannot get it')
HEADINGS = frozenset(re.findall(r"(?m)^### ([a-z-]+)$", PAGE.read_text()))


def problems(findings: Sequence[Finding]) -> dict[str, tuple[str, str]]:
    """What is not good, by id: (result, reason). Every finding has its paragraph, every problem a reason and a fix."""
    assert {finding.id for finding in findings} <= HEADINGS
    bad = [finding for finding in findings if finding.result is not Result.GOOD]
    assert all(finding.reason and finding.fix for finding in bad)
    return {finding.id: (str(finding.result), finding.reason) for finding in bad}


# ---- the API ----

API = Api("https://x", "v1.33.2", NOW, NOW)


def lease(node: str, renewed: datetime) -> dict[str, Any]:
    return {"metadata": {"name": node}, "spec": {"renewTime": renewed.isoformat()}}


@pytest.mark.parametrize(
    ("api", "expected"),
    [
        (API, {}),
        (replace(API, version="v1.28.9-eks-1"), {"api-version": ("error", "found v1.28.9-eks-1")}),
        (replace(API, version="v1.29.0+k3s1"), {}),
        (
            replace(API, asked_at=NOW - timedelta(seconds=90)),
            {"clock-here": ("warning", "this machine is 90 s behind the API server; certificates forgive 20 s")},
        ),
        (
            replace(API, asked_at=NOW + timedelta(minutes=6)),
            {"clock-here": ("error", "this machine is 360 s ahead of the API server; certificates forgive 20 s")},
        ),
        (replace(API, leases=[lease("n1", NOW - timedelta(seconds=12))]), {}),
        (
            replace(API, leases=[lease("n1", NOW + timedelta(minutes=5)), lease("n2", NOW - timedelta(minutes=5))]),
            {
                "clock-nodes": (
                    "warning",
                    "node n1 is 300 s ahead; node n2 is 300 s behind, or does not answer",
                )
            },
        ),
        (replace(API, leases=FORBIDDEN), {"clock-nodes": ("warning", f"not known: {FORBIDDEN}")}),
    ],
)
def test_the_api_and_the_clocks(api: Api, expected: dict[str, tuple[str, str]]) -> None:
    assert problems(checks_cluster.kubernetes(api)) == expected


# ---- before an installation ----


def obj(name: str, namespace: str = "", labels: dict[str, str] | None = None, **more: Any) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name, "labels": labels or {}, "annotations": more.pop("annotations", {})}
    return {"metadata": metadata | ({"namespace": namespace} if namespace else {}), **more}


def component(name: str, replicas: int = 1, ready: int = 1) -> dict[str, Any]:
    labels = {"mantle.dev/control-plane-component": name, "mantle.dev/control-plane-ns": "mantle"}
    return obj(f"mantle-{name}", "mantle", labels, spec={"replicas": replicas}, status={"readyReplicas": ready})


def test_an_empty_cluster_can_take_an_installation() -> None:
    assert problems(checks_cluster.before("mantle", [], [], [], [Wish("create namespaces", None)], "")) == {}


def test_everything_that_stands_in_the_way_is_found_at_once() -> None:
    namespace = obj("mantle", labels={"pod-security.kubernetes.io/enforce": "restricted"})
    found = problems(
        checks_cluster.before(
            "mantle",
            [namespace],
            [component("identity"), obj("linkerd-destination", "mantle")],
            [obj("linkerd-proxy-injector-webhook-config")],
            [Wish("create secrets in mantle", "no"), Wish("get secrets in mantle", None)],
            "no requestheader-client-ca-file",
        )
    )
    assert found == {
        "pre-namespace": ("error", "found mantle-identity"),
        "pre-namespace-shared": ("warning", "found other workloads in it: linkerd-destination"),
        "pre-pod-security": ("warning", "its PodSecurity level is restricted"),
        "pre-rights": ("error", "create secrets in mantle: no"),
        "pre-aggregation": ("error", "no requestheader-client-ca-file"),
        "pre-other-mesh": ("warning", "found the webhook linkerd-proxy-injector-webhook-config"),
    }


# ---- the installation ----

PARTS = [component(name) for name in ("identity", "destination", "viz", "injector")]
SERVICE = ("Service", "mantle", "mantle-identity")
MESH = Mesh("mantle", "0.1.0", "", "0.1.0", False, "required", [SERVICE], frozenset({SERVICE}), PARTS, [])


def crashing(component: str) -> dict[str, Any]:
    waiting = {"reason": "CrashLoopBackOff", "message": "back-off 10s"}
    status = {"containerStatuses": [{"name": component, "state": {"waiting": waiting}}]}
    return obj(f"mantle-{component}-1", "mantle", {"mantle.dev/control-plane-component": component}, status=status)


@pytest.mark.parametrize(
    ("mesh", "expected"),
    [
        (MESH, {}),
        (replace(MESH, config=Unread("there is no ConfigMap mantle-config")),
         {"install-config": ("error", "there is no ConfigMap mantle-config")}),
        (replace(MESH, config=replace(FORBIDDEN, forbidden=True)),
         {"install-config": ("error", f"not known: {FORBIDDEN}")}),
        # Who asks about one namespace need not see the mesh's own.
        (replace(MESH, config=replace(FORBIDDEN, forbidden=True), only="shop"),
         {"install-config": ("warning", f"not known: {FORBIDDEN}")}),
        (replace(MESH, present=frozenset()),
         {"install-objects": ("error", "Service mantle/mantle-identity is missing")}),
        (replace(MESH, present=FORBIDDEN), {"install-objects": ("warning", f"not known: {FORBIDDEN}")}),
        (replace(MESH, version="0.0.9"),
         {"install-version": ("warning", "found 0.0.9, the command 0.1.0")}),
        (replace(MESH, deployments=[component("viz", 1, 0)], pods=[crashing("viz")]),
         {"control-ready": ("error", "mantle-viz: 0 of 1 pods ready "
                            "(viz of mantle-viz-1: CrashLoopBackOff back-off 10s)")}),
        (replace(MESH, deployments=[]), {"control-ready": ("error", "there are no Deployments of Mantle")}),
        (replace(MESH, ha=True, deployments=[component("viz", 1), component("identity", 3, 3)]),
         {"install-ha": ("warning", "mantle-viz has 1 pod")}),
        (replace(MESH, tls="optional"),
         {"install-optional": ("warning", "--tls=optional is weaker: its ca makes the keys, and its pods fail open")}),
    ],
)  # fmt: skip
def test_the_installation(mesh: Mesh, expected: dict[str, tuple[str, str]]) -> None:
    assert problems(checks_cluster.installation(mesh)) == expected


def test_check_knows_where_every_kind_of_an_installation_is_listed() -> None:
    everything = install_objects(InstallValues(ha=True, tls="optional"), TrustMaterial("-", "-", "-"))
    assert {obj["kind"] for obj in everything} <= {kind.kind for kind in KINDS}


# ---- certificates ----


def valid(name: str, start: timedelta = timedelta(days=-1), end: timedelta = timedelta(days=364)) -> Validity:
    return Validity(name, NOW + start, NOW + end)


WEBHOOK = obj("mantle-injector", webhooks=[{"name": "open.injector.mantle.dev", "clientConfig": {"caBundle": "Zg=="}}])
AVAILABLE = obj("v1alpha1.tap.mantle.dev", status={"conditions": [{"type": "Available", "status": "True"}]})
TRUST = Trust(
    roots=[valid("trust root CN=r")],
    issuer=valid("issuer"),
    issuer_fault="",
    serving={"injector": valid("injector", end=timedelta(days=29)), "viz": valid("viz", end=timedelta(days=29))},
    bundles={"injector": "", "viz": ""},
    webhooks=[WEBHOOK],
    api_service=AVAILABLE,
    identity={"mantle-identity-1": ""},
    identity_clock=timedelta(seconds=1),
)


@pytest.mark.parametrize(
    ("trust", "expected"),
    [
        (TRUST, {}),
        (replace(TRUST, roots=Unread("there is no ConfigMap mantle-identity-trust-roots")),
         {"trust-roots": ("error", "not known: there is no ConfigMap mantle-identity-trust-roots")}),
        (replace(TRUST, roots=[valid("trust root CN=r", end=timedelta(days=-1))]),
         {"trust-roots-valid": ("error", "trust root CN=r expired on 2026-11-23T12:00:00Z")}),
        (replace(TRUST, roots=[valid("trust root CN=r", timedelta(days=-330), timedelta(days=35))]),
         {"trust-roots-soon": ("warning", "trust root CN=r will expire on 2026-12-29T12:00:00Z")}),
        (replace(TRUST, issuer=FORBIDDEN), {"issuer": ("warning", f"not known: {FORBIDDEN}")}),
        (replace(TRUST, issuer=valid("issuer", timedelta(hours=1))),
         {"issuer-valid": ("error", "issuer is valid from 2026-11-24T13:00:00Z, now is 2026-11-24T12:00:00Z")}),
        # 48 hours, renewed 25 hours ahead, as cert-manager does it: never a warning while it is renewed.
        (replace(TRUST, issuer=valid("issuer", timedelta(hours=-22), timedelta(hours=26))), {}),
        (replace(TRUST, issuer=valid("issuer", timedelta(hours=-40), timedelta(hours=8))),
         {"issuer-soon": ("warning", "issuer will expire on 2026-11-24T20:00:00Z")}),
        (replace(TRUST, issuer_fault="not signed by the roots"),
         {"issuer-chain": ("error", "not signed by the roots")}),
        (replace(TRUST, identity={}), {"identity-ready": ("error", "it has no running pod")}),
        (replace(TRUST, identity={"a": "issuer_expired", "b": ""}),
         {"identity-ready": ("error", "a: issuer_expired")}),
        (replace(TRUST, identity={"a": FORBIDDEN}), {"identity-ready": ("warning", f"a: {FORBIDDEN}")}),
        (replace(TRUST, identity_clock=timedelta(minutes=-5)),
         {"clock-identity": ("error", "identity is 300 s ahead of the API server; certificates forgive 20 s")}),
        (replace(TRUST, serving={"injector": valid("injector", timedelta(days=-40), timedelta(days=-10))}),
         {"injector-certificate": ("error", "it expired on 2026-11-14T12:00:00Z")}),
        (replace(TRUST, serving={"injector": valid("injector", timedelta(days=-28), timedelta(days=2))}),
         {"injector-renewal": ("warning", "it ends on 2026-11-26T12:00:00Z and is not renewed")}),
        (replace(TRUST, bundles={"injector": "", "viz": "no authority signed it"}),
         {"viz-bundle": ("error", "no authority signed it")}),
    ],
)  # fmt: skip
def test_certificates(trust: Trust, expected: dict[str, tuple[str, str]]) -> None:
    assert problems(checks_cluster.certificates(trust, NOW, "mantle")) == expected


@pytest.mark.parametrize(
    ("trust", "expected"),
    [
        (TRUST, {}),
        (replace(TRUST, webhooks=[]),
         {"injector-webhook": ("error", "there is no MutatingWebhookConfiguration mantle-injector")}),
        (replace(TRUST, webhooks=[obj("mantle-injector", webhooks=[{"name": "open", "clientConfig": {}}])]),
         {"injector-webhook": ("error", "open has no CA bundle yet")}),
        (replace(TRUST, api_service=None),
         {"views-api": ("error", "there is no APIService v1alpha1.tap.mantle.dev")}),
        (replace(TRUST, api_service=obj("v1alpha1.tap.mantle.dev")),
         {"views-api": ("error", "it was never reached")}),
        (replace(TRUST, api_service=obj("v1alpha1.tap.mantle.dev", status={"conditions": [
            {"type": "Available", "status": "False", "reason": "FailedDiscoveryCheck", "message": "no route"}]})),
         {"views-api": ("error", "FailedDiscoveryCheck: no route")}),
    ],
)  # fmt: skip
def test_what_the_api_server_calls(trust: Trust, expected: dict[str, tuple[str, str]]) -> None:
    assert problems(checks_cluster.webhook(trust, "mantle")) == expected


# ---- addresses ----


def service(name: str, *ips: str) -> dict[str, Any]:
    return obj(name, "shop", spec={"clusterIP": ips[0], "clusterIPs": list(ips)} if ips else {})


NODE = obj("n1", spec={"podCIDR": "10.244.0.0/24", "podCIDRs": ["10.244.0.0/24", "fd00:10::/64"]})
SERVICES = [service("web", "10.96.0.10"), service("headless", "None"), service("elsewhere")]
AT = obj("web-1", "shop", spec={}, status={"phase": "Running", "podIPs": [{"ip": "10.244.0.9"}, {"ip": "fd00:10::9"}]})


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (([NODE], SERVICES, [AT]), {}),
        (([], [], []), {}),
        (([], [service("api", "34.118.224.1")], []), {"networks": ("error", "service shop/api is 34.118.224.1")}),
        (([obj("n2", spec={"podCIDR": "2600:1::/80"})], [], []),
         {"networks": ("error", "pods of node n2 are given 2600:1::/80")}),
        # Half of it is outside, so it is not inside.
        (([obj("n2", spec={"podCIDRs": ["8.0.0.0/5"]})], [], []),
         {"networks": ("error", "pods of node n2 are given 8.0.0.0/5")}),
        (([], [service(f"s{n}", f"34.118.224.{n}") for n in range(5)], [AT]),
         {"networks": ("error", "service shop/s0 is 34.118.224.0; service shop/s1 is 34.118.224.1; "
                       "service shop/s2 is 34.118.224.2; and 2 more")}),
        (([], [], [obj("p", "shop", spec={}, status={"phase": "Running", "podIP": "1.2.3.4"})]),
         {"networks": ("error", "pod shop/p is 1.2.3.4")}),
        # The node's own address, a pod that is over, and one that has no address yet.
        (([], [], [obj("h", "shop", spec={"hostNetwork": True}, status={"podIP": "1.2.3.4"}),
                   obj("o", "shop", spec={}, status={"phase": "Succeeded", "podIP": "1.2.3.4"}),
                   obj("y", "shop", spec={}, status={"phase": "Pending"})]), {}),
        ((FORBIDDEN, SERVICES, [AT]), {"networks": ("warning", f"not known: {FORBIDDEN}")}),
        ((FORBIDDEN, [service("api", "34.118.224.1")], FORBIDDEN),
         {"networks": ("error", "service shop/api is 34.118.224.1")}),
    ],
)  # fmt: skip
def test_addresses_outside_the_meshs_networks_would_be_plaintext(
    facts: tuple[Any, Any, Any], expected: dict[str, tuple[str, str]]
) -> None:
    found = checks_networks.networks(("10.0.0.0/8", "fd00::/8"), *facts, installing=False)
    assert problems([found]) == expected
    assert found.result is not Result.ERROR or "upgrade --set 'networks={10.0.0.0/8,fd00::/8,NETWORK}'" in found.fix


def test_before_an_installation_they_are_a_warning_as_values_may_still_name_them() -> None:
    found = checks_networks.networks(("10.0.0.0/8",), [], [service("api", "34.118.224.1")], [], installing=True)
    assert problems([found]) == {"networks": ("warning", "service shop/api is 34.118.224.1")}
    assert "mantle install --set 'networks={10.0.0.0/8,NETWORK}'" in found.fix


# ---- pods ----


def pod(name: str, namespace: str = "shop", *, asks: bool = True, meshed: bool = True, **more: Any) -> dict[str, Any]:
    """As the API gives it; meshed by the function that the injector uses."""
    hashed = {"pod-template-hash": "5d9f"}
    controller = {"kind": "ReplicaSet", "name": f"{name}-5d9f", "controller": True}
    plain: dict[str, Any] = {
        "metadata": {"labels": hashed | more.get("labels", {}), "annotations": more.get("annotations", {})},
        "spec": {"serviceAccountName": name, "containers": [{"name": "app", "image": "acme/app"}]},
    }
    if asks:
        plain["metadata"]["annotations"] = {"mantle.dev/inject": "enabled"} | plain["metadata"]["annotations"]
    if meshed:
        values = more.get("values", VALUES)
        outcome = inject_pod(plain, {"metadata": {"name": namespace}}, values, ("Deployment", name))
        assert isinstance(outcome, Injected)
        plain = outcome.pod
    plain["metadata"] |= {"name": f"{name}-1", "namespace": namespace, "ownerReferences": [controller]}
    ready = {"name": "mantle-proxy", "ready": more.get("ready", True), "state": more.get("state", {"running": {}})}
    plain["status"] = {"phase": more.get("phase", "Running"), "initContainerStatuses": [ready] if meshed else []}
    return plain


def edge(src: str, dst: str, reason: str = "") -> dict[str, Any]:
    return {"src": src, "dst": dst, "src_namespace": "shop", "dst_namespace": "shop", "no_tls_reason": reason}


def summary(*edges: dict[str, Any], **more: Any) -> dict[str, Any]:
    at = NOW.timestamp()
    lived = {"refreshed": at - 3600, "expires": at + 82800}
    known = {"shop/web-1": lived, "shop/emoji-1": lived}
    return {"edges": list(edges), "certificates": known, "failing": {}, "scrape_age_seconds": 1.0} | more


SHOP = obj("shop")
DATA = Data([pod("web"), pod("emoji")], [SHOP], VALUES, "0.1.0", summary(edge("web", "emoji")), "mantle")


def about_pods(data: Data) -> dict[str, tuple[str, str]]:
    return problems(checks_pods.pods(data))


def about_proxies(data: Data) -> dict[str, tuple[str, str]]:
    return problems(checks_pods.data_plane(data, NOW))


def test_a_healthy_data_plane_has_no_problem() -> None:
    assert about_pods(DATA) == {}
    assert about_proxies(DATA) == {}


def test_pods_that_began_while_the_injector_was_away_are_found() -> None:
    asked = obj("shop", annotations={"mantle.dev/inject": "enabled"})
    missed = pod("api", asks=False, meshed=False)
    system = pod("dns", "kube-system", meshed=False)
    refusing = pod("off", meshed=False, annotations={"mantle.dev/inject": "disabled"})
    over = pod("job", meshed=False, phase="Succeeded")
    found = about_pods(replace(DATA, pods=[*DATA.pods, missed, system, refusing, over], namespaces=[asked]))
    assert found == {"pods-meshed": ("error", "shop/api-1 (deployment/api)")}


def test_a_setting_that_injection_refuses_is_named() -> None:
    wrong = pod("api", meshed=False, annotations={"config.mantle.dev/inbound-port": "zero"})
    ((id, (result, reason)),) = about_pods(replace(DATA, pods=[wrong])).items()
    assert (id, result) == ("pods-annotations", "error")
    assert "shop/api-1" in reason and "inbound-port" in reason


def test_a_namespace_that_refuses_the_init_container_is_named() -> None:
    strict = obj("shop", labels={"pod-security.kubernetes.io/enforce": "restricted"})
    assert about_pods(replace(DATA, namespaces=[strict])) == {"pods-security": ("error", "shop enforces restricted")}
    assert about_pods(replace(DATA, pods=[], namespaces=[strict])) == {}, "nobody there asks for the mesh"


def test_an_annotation_that_is_a_label_is_named() -> None:
    labelled = obj("shop", labels={"mantle.dev/inject": "enabled"})
    found = about_pods(replace(DATA, namespaces=[labelled]))
    assert found["pods-labels"] == ("warning", "namespace shop has it as a label")
    of_service = replace(DATA, services=[obj("web", "shop", {"mantle.dev/inject": "enabled"})])
    assert about_pods(of_service)["pods-labels"] == ("warning", "service shop/web has it as a label")


def test_what_was_written_since_on_a_meshed_pod_or_its_namespace_is_read_once_more() -> None:
    typo = obj("shop", annotations={"config.mantle.dev/default-inbound-policy": "all-authenticate"})
    result, reason = about_pods(replace(DATA, namespaces=[typo]))["pods-annotations"]
    assert result == "error"
    assert reason.startswith("shop: namespace annotation config.mantle.dev/default-inbound-policy: 'all-authenticate'")
    assert reason.count("is not accepted") == 1, "once, although both pods inherit it"
    wrong = pod("web")
    wrong["metadata"]["annotations"]["config.mantle.dev/opaque-port"] = "1"
    result, reason = about_pods(replace(DATA, pods=[wrong]))["pods-annotations"]
    assert reason.startswith("shop/web-1: pod annotation config.mantle.dev/opaque-port: '1'")


@pytest.mark.parametrize(
    ("annotations", "reason"),
    [
        ({"config.mantle.dev/opaque-ports": "3306", "other": "x"}, None),
        ({"mantle.dev/inject": "enabled"}, "shop/web: mantle.dev/inject is not followed on a service"),
        ({"config.mantle.dev/tls": "required"}, "shop/web: config.mantle.dev/tls is not followed on a service"),
        ({"config.mantle.dev/opaque-ports": "0"}, "shop/web: config.mantle.dev/opaque-ports: '0' is not accepted"),
    ],
)
def test_annotations_of_services_that_nobody_follows(annotations: dict[str, str], reason: str | None) -> None:
    found = about_pods(replace(DATA, services=[obj("web", "shop", annotations=annotations)]))
    if reason is None:
        assert found == {}
    else:
        assert (found.keys(), found["services-annotations"][0]) == ({"services-annotations"}, "warning")
        assert found["services-annotations"][1].startswith(reason)
    assert about_pods(replace(DATA, services=FORBIDDEN)).keys() == {"services-annotations"}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (replace(DATA, pods=[pod("web", ready=False, state={"waiting": {"reason": "ImagePullBackOff"}}), pod("emoji")]),
         {"proxy-ready": ("error", "shop/web-1: waiting ImagePullBackOff")}),
        (replace(DATA, values=replace(VALUES, trust_anchors=pem("T1RIRVI="))),
         {"proxy-roots": ("error", "shop/web-1 has others; shop/emoji-1 has others")}),
        # One root more than the proxies have; and the same one, written otherwise.
        (replace(DATA, values=replace(VALUES, trust_anchors=VALUES.trust_anchors + pem("T1RIRVI="))),
         {"proxy-roots": ("error", "shop/web-1 has others; shop/emoji-1 has others")}),
        (replace(DATA, values=replace(VALUES, trust_anchors="# the root\n" + pem("Uk9PVA==") + "\n")), {}),
        (replace(DATA, version="0.2.0"),
         {"proxy-version": ("warning", "shop/web-1 has 0.1.0; shop/emoji-1 has 0.1.0")}),
        (replace(DATA, summary=Unread("the views do not answer")),
         {"views-answer": ("error", "not known: the views do not answer")}),
        (replace(DATA, summary=summary(certificates={"shop/web-1": {"refreshed": 1.0, "expires": 2.0}})),
         {"leaf-there": ("error", "shop/emoji-1"), "leaf-valid": ("error",
          "shop/web-1: expired on 1970-01-01T00:00:02Z")}),
        (replace(DATA, pods=[pod("web")], summary=summary(certificates={"shop/web-1": {
            "refreshed": NOW.timestamp() - 85_000, "expires": NOW.timestamp() + 1_400}})),
         {"leaf-renewal": ("warning", "shop/web-1: expires at 2026-11-24T12:23:20Z and is not renewed yet")}),
        # Its metrics were read while it took its first certificate.
        (replace(DATA, pods=[pod("web")], summary=summary(certificates={"shop/web-1": {"expires": 2.0}})),
         {"leaf-there": ("error", "shop/web-1")}),
        (replace(DATA, summary=summary(scrape_age_seconds=None)), {"traffic-known": ("error", "never asked")}),
        (replace(DATA, summary=summary(failing={"shop/web-1": "refused"})),
         {"traffic-known": ("error", "shop/web-1: refused")}),
        (replace(DATA, summary=summary(edge("web", "emoji", "not_provided_by_remote"))),
         {"traffic-encrypted": ("error", "web → emoji: not_provided_by_remote")}),
        (replace(DATA, summary=summary(edge("curl", "web", "not_provided_by_remote"), edge("probe", "web", "x"))),
         {"traffic-plaintext": ("warning", "curl → web: not_provided_by_remote")}),
        (replace(DATA, summary=summary(edge("web", "web", "loopback"))), {}),
    ],
)  # fmt: skip
def test_the_data_plane(data: Data, expected: dict[str, tuple[str, str]]) -> None:
    assert about_proxies(data) == expected


def test_pods_of_the_experimental_mode_are_marked_as_weaker() -> None:
    optional = {"config.mantle.dev/tls": "optional"}
    weak = pod("api", annotations=optional, values=replace(VALUES, tls="optional"))
    found = about_proxies(replace(DATA, pods=[weak], values=replace(VALUES, tls="optional")))
    assert found == {
        "optional-pods": ("warning", "shop/api-1 is weaker: its key is in a Secret, and it fails open"),
        "optional-material": ("warning", "shop/api-1 has none"),
    }


def test_what_cannot_be_read_is_never_silence() -> None:
    unknown = replace(DATA, values=FORBIDDEN, version="", namespace="shop")
    said = dict.fromkeys(("proxy-roots", "proxy-version"), ("warning", f"not known: {FORBIDDEN}"))
    assert about_proxies(unknown) == said
    assert about_pods(replace(DATA, pods=FORBIDDEN)) == {"pods-meshed": ("error", f"not known: {FORBIDDEN}")}
    assert about_pods(replace(DATA, values=FORBIDDEN))["pods-meshed"][0] == "warning"


def test_what_an_annotation_says_of_the_roots_counts_for_nothing() -> None:
    old = pod("web", values=replace(VALUES, trust_anchors=pem("T0xE")))
    current = pod("web")["metadata"]["annotations"]["mantle.dev/trust-root-sha256"]
    old["metadata"]["annotations"]["mantle.dev/trust-root-sha256"] = current
    assert about_proxies(replace(DATA, pods=[old, pod("emoji")])) == {"proxy-roots": ("error", "shop/web-1 has others")}
    del old["metadata"]["annotations"]["mantle.dev/trust-root-sha256"]
    assert "proxy-roots" in about_proxies(replace(DATA, pods=[old, pod("emoji")]))


@pytest.mark.parametrize(("age", "missing"), [(5, {}), (60, {"leaf-there": ("error", "shop/new-1")})])
def test_what_viz_did_not_hear_yet_of_a_proxy_that_just_started_is_no_error(age: int, missing: Any) -> None:
    new = pod("new", state={"running": {"startedAt": (NOW - timedelta(seconds=age)).isoformat()}})
    assert about_proxies(replace(DATA, pods=[*DATA.pods, new])) == missing


def test_pods_that_are_ending_are_no_trouble_but_speak_until_they_have() -> None:
    old, plain = pod("old", ready=False, values=replace(VALUES, trust_anchors=pem("T0xE"))), pod("api", meshed=False)
    for ending in (old, plain):
        ending["metadata"]["deletionTimestamp"] = NOW.isoformat()
    data = replace(DATA, pods=[*DATA.pods, old, plain])
    assert (about_pods(data), about_proxies(data)) == ({}, {})
    spoke = replace(data, summary=summary(edge("old", "web", "not_provided_by_remote")))
    assert about_proxies(spoke) == {"traffic-encrypted": ("error", "old → web: not_provided_by_remote")}


def test_one_namespace_is_asked_about_and_its_traffic_has_two_ends() -> None:
    other, lonely = pod("api", "other", ready=False), pod("db", "lonely", asks=False, meshed=False)
    between = edge("web", "api", "not_provided_by_remote") | {"dst_namespace": "other"}
    data = replace(DATA, pods=[*DATA.pods, other, lonely], namespaces=[SHOP, obj("other"), obj("lonely")],
                   summary=summary(between), namespace="shop")  # fmt: skip
    assert about_pods(data) == {}
    assert about_proxies(data) == {"traffic-encrypted": ("error", "web → api: not_provided_by_remote")}
    assert set(about_proxies(replace(data, namespace="other"))) == {"proxy-ready", "traffic-encrypted"}
    empty = about_proxies(replace(data, namespace="lonely", summary=summary()))
    assert empty == {"proxy-namespace": ("error", "no pod of lonely has a proxy")}
    gone = about_proxies(replace(data, namespace="gone", summary=summary()))
    assert gone == {"proxy-namespace": ("error", "there is no namespace gone")}
    strict = obj("other", labels={"pod-security.kubernetes.io/enforce": "restricted", "mantle.dev/inject": "enabled"})
    assert about_pods(replace(data, namespaces=[SHOP, strict])) == {}
    assert set(about_pods(replace(data, namespaces=[SHOP, strict], namespace="other"))) == {
        "pods-security",
        "pods-labels",
    }


# ---- how it is said ----


def test_the_page_has_paragraphs_of_findings_only() -> None:
    source = "".join(
        Path(module.__file__).read_text() for module in (checks, checks_cluster, checks_networks, checks_pods)
    )
    served = {f"{server}-{what}" for server in check_cluster.SERVERS for what in ("certificate", "renewal", "bundle")}
    lifetimes = {f"{what}-{when}" for what in ("trust-roots", "issuer") for when in ("valid", "soon")}
    assert {heading for heading in HEADINGS if f'"{heading}"' not in source} == served | lifetimes


def test_a_finding_says_its_fix_and_where_more_is() -> None:
    found = [("certificates", [Finding("x holds", Result.ERROR, "a; b", "do y", "trust-roots")])]
    said = check.text(found, short=True, mesh=True)
    assert said.splitlines()[2:6] == ["× x holds", "    a", "    b", "    fix: do y"]
    assert "    see docs/check.md#trust-roots" in said
    (only,) = check.object_of(found)["categories"][0]["checks"]
    assert only == {"description": "x holds", "result": "error", "id": "trust-roots", "error": "a; b", "hint": "do y"}


def test_only_what_time_heals_is_waited_for() -> None:
    young = Finding("x", Result.ERROR, "r", "f", "control-ready")
    broken = Finding("x", Result.ERROR, "r", "f", "issuer-chain")
    assert check_cluster.waits([("c", [young])])
    assert not check_cluster.waits([("c", [young, broken])])
    assert not check_cluster.waits([("c", [Finding("x", Result.WARNING, "r", "f", "control-ready")])])


def test_a_cluster_that_nobody_named_and_that_is_gone_does_not_hide_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kubeconfig = {
        "clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:1"}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    (tmp_path / "config").write_text(json.dumps(kubeconfig))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr("mantle.cli.machine_client.running_meshes", lambda _root: [])
    monkeypatch.setattr(check, "_machine", lambda: [Finding("this machine is able")])
    ended = CliRunner().invoke(cli, ["check"], prog_name="mantle")
    assert ended.exit_code == 0, ended.output
    assert "√ this machine is able" in ended.stdout
    assert "checking this machine instead" in ended.stderr
    named = CliRunner().invoke(cli, ["check", "--context", "x"], prog_name="mantle")
    assert named.exit_code == 1
    assert "does not answer" in named.stderr
