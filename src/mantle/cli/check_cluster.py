"""`mantle check` on a cluster: gathers the facts, one question after another, and hands them to the checks.

Every question that is refused, or finds nothing, becomes a fact (`Unread`, None); only an API server that cannot be
reached at all ends the command. Nothing is concluded here.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

import mantle
from mantle.cli import checks_cluster, checks_networks, checks_pods
from mantle.cli.checks import Finding, Result, Validity
from mantle.cli.checks_cluster import Api, Mesh, Trust, Wish
from mantle.cli.checks_objects import Listed, Object, Unread, labels_of, name_of
from mantle.cli.checks_pods import Data
from mantle.cli.controller_metrics import ADMIN_PORTS
from mantle.cli.kube_client import ANSWER_SECONDS, KubeClient, Refused
from mantle.cli.output import Failure
from mantle.cli.target import Cluster
from mantle.core.annotations import LABEL_COMPONENT

if TYPE_CHECKING:
    from cryptography import x509

    from mantle.core.proxy_env import Values
    from mantle.manifests.config import InstallValues

Category = tuple[str, Sequence[Finding]]

WEBHOOKS = "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations"
API_SERVICES = "/apis/apiregistration.k8s.io/v1/apiservices"
RIGHTS = (
    ("create", "", "namespaces", ""),
    ("create", "rbac.authorization.k8s.io", "clusterroles", ""),
    ("create", "rbac.authorization.k8s.io", "clusterrolebindings", ""),
    ("create", "admissionregistration.k8s.io", "mutatingwebhookconfigurations", ""),
    ("create", "apiregistration.k8s.io", "apiservices", ""),
    ("create", "rbac.authorization.k8s.io", "rolebindings", "kube-system"),
    ("get", "", "configmaps", "kube-system"),
    ("create", "apps", "deployments", None),
    ("create", "policy", "poddisruptionbudgets", None),
    ("create", "rbac.authorization.k8s.io", "rolebindings", None),
    ("create", "rbac.authorization.k8s.io", "roles", None),
    ("create", "", "configmaps", None),
    ("create", "", "secrets", None),
    ("get", "", "secrets", None),
    ("create", "", "serviceaccounts", None),
    ("create", "", "services", None),
)
"""(verb, group, resource, namespace; None: the control plane's) of what an installation does."""
REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
SERVERS = ("injector", "viz")
API_SERVICE = "v1alpha1.tap.mantle.dev"
IDENTITY_ADMIN = ADMIN_PORTS["identity"]
WAITED_FOR = frozenset(
    {"control-ready", "identity-ready", "injector-webhook", "injector-bundle", "injector-certificate", "views-api",
     "viz-bundle", "viz-certificate", "views-answer", "proxy-ready", "leaf-there", "traffic-known"}
)  # fmt: skip
"""Findings that a fresh installation makes good by itself."""


def pre(cluster: Cluster, namespace: str) -> list[Category]:
    """Before an installation."""
    from mantle.manifests.config import InstallValues

    ask = _Ask(cluster.client)
    api = ask.api()
    deployments = ask.list(f"/apis/apps/v1/namespaces/{namespace}/deployments")
    wishes = [_wish(cluster.client, namespace, *right) for right in RIGHTS]
    found = checks_cluster.before(
        namespace,
        ask.list("/api/v1/namespaces"),
        deployments,
        ask.list(WEBHOOKS),
        wishes,
        _aggregation(ask),
    )
    everything = (ask.list(f"/api/v1/{kind}") for kind in ("nodes", "services", "pods"))
    found.append(checks_networks.networks(InstallValues().networks, *everything, installing=True))
    return [("kubernetes", checks_cluster.kubernetes(api)), ("before installation", found)]


def installed(cluster: Cluster, home: str | None, only: str | None, *, proxies: bool) -> list[Category]:
    """What is installed, and with `proxies` every proxy too, or those of the namespace `only`. `home`: the control
    plane's namespace; None: the one that is found.
    """
    ask = _Ask(cluster.client)
    api = ask.api()
    namespace = home or _home(ask)
    first: Category = ("kubernetes", checks_cluster.kubernetes(api))
    config = ask.get(f"/api/v1/namespaces/{namespace}/configmaps/mantle-config")
    roots = ask.get(f"/api/v1/namespaces/{namespace}/configmaps/mantle-identity-trust-roots")
    values = _values(config)
    roots_pem = _text(roots, "ca-bundle.crt")
    mesh = _mesh(ask, api, namespace, values, roots_pem, only)
    categories: list[Category] = [first, ("installation", checks_cluster.installation(mesh))]
    now = datetime.now(UTC)
    if isinstance(values, Unread):
        if values.forbidden and only is not None:  # an application's own people: their namespace they may look into
            data = _data(ask, cluster, namespace, only, values, roots_pem, proxies)
            categories += [("pods", checks_pods.pods(data)), ("data plane", checks_pods.data_plane(data, now))]
        return categories
    trust = _trust(ask, cluster.client, namespace, roots_pem, mesh.pods, api)
    categories.append(("certificates", checks_cluster.certificates(trust, now, namespace)))
    categories.append(("injector and views", checks_cluster.webhook(trust, namespace)))
    data = _data(ask, cluster, namespace, only, values, roots_pem, proxies)
    networks = checks_networks.networks(
        values.networks, ask.list("/api/v1/nodes"), data.services, data.pods, installing=False
    )
    categories.append(("pods", [*checks_pods.pods(data), networks]))
    if proxies:
        categories.append(("data plane", checks_pods.data_plane(data, now)))
    return categories


def waits(found: Sequence[Category]) -> bool:
    """Whether time alone may make the errors good."""
    errors = [f for _, findings in found for f in findings if f.result is Result.ERROR]
    return bool(errors) and all(finding.id in WAITED_FOR for finding in errors)


# ---- questions ----


def _unread(refused: Refused) -> Unread:
    return Unread(refused.answer.message, forbidden=refused.answer.status == 403)


class _Ask:
    """Questions whose refusal is an answer."""

    def __init__(self, client: KubeClient) -> None:
        self.client = client

    def get(self, path: str) -> Object | Unread | None:
        """One object; None if there is none."""
        try:
            found: Object = self.client.get(path)
        except Refused as refused:
            return None if refused.answer.status == 404 else _unread(refused)
        return found

    def list(self, path: str, selector: str = "") -> Listed:
        """All objects of a path, in pages."""
        query: dict[str, str | int] = {"limit": 500, **({"labelSelector": selector} if selector else {})}
        found: list[Object] = []
        while True:
            try:
                page = self.client.get(path, query)
            except Refused as refused:
                return _unread(refused)
            found += page.get("items") or []
            more = (page.get("metadata") or {}).get("continue")
            if not more:
                return found
            query["continue"] = more

    def of(self, kind: str, namespace: str | None) -> Listed:
        """Pods or services of all namespaces; of that one, to whoever may see no more."""
        found = self.list(f"/api/v1/{kind}")
        if namespace is not None and isinstance(found, Unread) and found.forbidden:
            return self.list(f"/api/v1/namespaces/{namespace}/{kind}")
        return found

    def namespaces(self, namespace: str | None) -> Listed:
        """As `of`. One that may be read but is not there is an empty list."""
        found = self.list("/api/v1/namespaces")
        if namespace is not None and isinstance(found, Unread) and found.forbidden:
            one = self.get(f"/api/v1/namespaces/{namespace}")
            return one if isinstance(one, Unread) else [] if one is None else [one]
        return found

    def api(self) -> Api:
        """Raises `Failure` if there is no API server, or it does not let this user in."""
        before = datetime.now(UTC)
        try:
            with self.client.answer("GET", "/version", None, None, ANSWER_SECONDS) as response:
                date, body = response.headers.get("Date"), response.read()
        except Refused as refused:
            raise Failure(
                f"the API server refuses this user: {refused.answer.message}", fix="log in again"
            ) from refused
        after = datetime.now(UTC)
        return Api(
            server=self.client.access.server,
            version=str(json.loads(body).get("gitVersion", "")),
            answered_at=_date(date),
            asked_at=before + (after - before) / 2,
            leases=self.list("/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"),
        )


def _wish(client: KubeClient, control_namespace: str, verb: str, group: str, resource: str, where: str | None) -> Wish:
    namespace = control_namespace if where is None else where
    right = f"{verb} {resource}{f'.{group}' if group else ''}{f' in {namespace}' if namespace else ''}"
    attributes = {"verb": verb, "group": group, "resource": resource, "namespace": namespace}
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": attributes},
    }
    try:
        status = client.request("POST", REVIEWS, None, review)["status"]
    except Refused as refused:
        return Wish(right, refused.answer.message)
    return Wish(right, None if status.get("allowed") else status.get("reason") or "not allowed")


def _aggregation(ask: _Ask) -> str:
    found = ask.get("/api/v1/namespaces/kube-system/configmaps/extension-apiserver-authentication")
    if isinstance(found, Unread):
        return ""  # said already, as a missing right
    there = found is not None and (found.get("data") or {}).get("requestheader-client-ca-file")
    return "" if there else "kube-system/extension-apiserver-authentication names no requestheader-client-ca-file"


# ---- facts ----


def _home(ask: _Ask) -> str:
    """The namespace that says it holds a control plane; the usual one if none does, or may not be read."""
    found = ask.list("/api/v1/namespaces", "mantle.dev/is-control-plane=true")
    return "mantle" if isinstance(found, Unread) or not found else name_of(found[0])


def _values(config: Object | Unread | None) -> InstallValues | Unread:
    from mantle.manifests.config import VALUES_KEY, BadValues, load

    if config is None:
        return Unread("there is no ConfigMap mantle-config")
    if isinstance(config, Unread):
        return config
    try:
        return load(_yaml((config.get("data") or {}).get(VALUES_KEY, "")))
    except (BadValues, ValueError) as error:
        return Unread(f"ConfigMap mantle-config cannot be understood: {error}")


def _yaml(text: str) -> Mapping[str, Any]:
    parsed = json.loads(text)  # `install` writes it so
    if not isinstance(parsed, dict):
        raise ValueError("it is no mapping")
    return parsed


def _mesh(
    ask: _Ask, api: Api, namespace: str, values: InstallValues | Unread, roots: str | Unread, only: str | None
) -> Mesh:
    from mantle.manifests.facts import ADMISSION_POLICIES
    from mantle.manifests.render import PART_OF, PART_OF_VALUE, TrustMaterial, identify, install_objects

    if isinstance(values, Unread):
        return Mesh(namespace, mantle.__version__, values, "", False, "", (), frozenset(), (), (), only)
    trust = TrustMaterial("" if isinstance(roots, Unread) else roots, emit_roots=False)
    made = install_objects(values, trust, admission_policies=api.number >= ADMISSION_POLICIES)
    expected = [identify(obj) for obj in made if PART_OF in obj["metadata"]["labels"]]
    return Mesh(
        namespace=namespace,
        client_version=mantle.__version__,
        config="",
        version=values.version,
        ha=values.ha,
        tls=values.tls,
        expected=expected,
        present=_present(ask, f"{PART_OF}={PART_OF_VALUE}", sorted({kind for kind, _, _ in expected})),
        deployments=ask.list(f"/apis/apps/v1/namespaces/{namespace}/deployments"),
        pods=ask.list(f"/api/v1/namespaces/{namespace}/pods"),
    )


def _present(ask: _Ask, selector: str, kinds: Sequence[str]) -> frozenset[tuple[str, str, str]] | Unread:
    from mantle.manifests.inventory import KINDS

    paths = {kind.kind: kind.path for kind in KINDS}
    found = set()
    for kind in kinds:
        listed = ask.list(paths[kind], selector)
        if isinstance(listed, Unread):
            return listed
        found |= {(kind, obj["metadata"].get("namespace", ""), name_of(obj)) for obj in listed}
    return frozenset(found)


def _trust(ask: _Ask, client: KubeClient, namespace: str, roots: str | Unread, pods: Listed, api: Api) -> Trust:
    issuer, fault = _issuer(ask, namespace, roots)
    webhooks = ask.list(WEBHOOKS)
    service = ask.get(f"{API_SERVICES}/{API_SERVICE}")
    serving: dict[str, Validity | Unread] = {}
    bundles: dict[str, str | Unread] = {}
    for server in SERVERS:
        secret = ask.get(f"/api/v1/namespaces/{namespace}/secrets/mantle-{server}-tls")
        shown = _certificate(secret, f"mantle-{server}-tls", "tls.crt")
        serving[server] = shown if isinstance(shown, Unread) else _validity(server, shown)
        used = list(_bundles(webhooks) if server == "injector" else _bundle_of(service))
        bundles[server] = shown if isinstance(shown, Unread) else _fits(shown, used)
    ready: dict[str, str | Unread] = {}
    clock: timedelta | None = None
    for pod in () if isinstance(pods, Unread) else pods:
        if labels_of(pod).get(LABEL_COMPONENT) == "identity" and pod.get("status", {}).get("phase") == "Running":
            ready[name_of(pod)], date = _ready(client, namespace, name_of(pod))
            if date is not None and api.answered_at is not None:
                # Both were told at about this moment: what passed between the two questions is taken out.
                found = (date - datetime.now(UTC)) - (api.answered_at - api.asked_at)
                clock = (
                    found if clock is None else max(clock, found, key=abs)
                )  # of several, the one that is furthest off
    return Trust(
        roots=_roots(roots),
        issuer=issuer,
        issuer_fault=fault,
        serving=serving,
        bundles=bundles,
        webhooks=webhooks,
        api_service=service,
        identity=ready,
        identity_clock=None if clock is None else -clock,
    )


def _issuer(ask: _Ask, namespace: str, roots: str | Unread) -> tuple[Validity | Unread, str]:
    from mantle.core import ca

    secret = ask.get(f"/api/v1/namespaces/{namespace}/secrets/mantle-identity-issuer")
    if secret is None:
        return Unread("there is no Secret mantle-identity-issuer"), ""
    if isinstance(secret, Unread):
        return secret, ""
    names = ("tls.crt", "tls.key") if secret.get("type") == "kubernetes.io/tls" else ("crt.pem", "key.pem")
    certificate = _certificate(secret, "mantle-identity-issuer", names[0])
    if isinstance(certificate, Unread) or isinstance(roots, Unread):
        return (certificate if isinstance(certificate, Unread) else _validity("issuer", certificate)), ""
    data = {key: base64.b64decode(value) for key, value in (secret.get("data") or {}).items()}
    loaded = ca.load_issuer(data[names[0]], data.get(names[1], b""), roots.encode())
    return _validity("issuer", certificate), str(loaded) if isinstance(loaded, ca.Refusal) else ""


def _roots(roots: str | Unread) -> Sequence[Validity] | Unread:
    from cryptography import x509

    if isinstance(roots, Unread):
        return roots
    try:
        found = x509.load_pem_x509_certificates(roots.encode())
    except ValueError as error:
        return Unread(f"ConfigMap mantle-identity-trust-roots holds no certificates ({error})")
    return [_validity(f"trust root {root.subject.rfc4514_string()}", root) for root in found]


def _certificate(secret: Object | Unread | None, name: str, key: str) -> x509.Certificate | Unread:
    from cryptography import x509

    if secret is None:
        return Unread(
            f"there is no Secret {name} yet", "its server makes it when it starts; `kubectl -n mantle get pods`"
        )
    if isinstance(secret, Unread):
        return secret
    try:
        return x509.load_pem_x509_certificate(base64.b64decode((secret.get("data") or {})[key]))
    except (KeyError, ValueError) as error:
        return Unread(f"Secret {name} has no certificate in {key} ({error})")


def _validity(name: str, certificate: x509.Certificate) -> Validity:
    return Validity(name, certificate.not_valid_before_utc, certificate.not_valid_after_utc)


def _bundles(webhooks: Listed) -> Iterator[str]:
    for configuration in () if isinstance(webhooks, Unread) else webhooks:
        if name_of(configuration) == "mantle-injector":
            for hook in configuration.get("webhooks", ()):
                yield hook.get("clientConfig", {}).get("caBundle", "")


def _bundle_of(service: Object | Unread | None) -> Iterator[str]:
    if isinstance(service, Mapping):
        yield service.get("spec", {}).get("caBundle", "")


def _fits(certificate: x509.Certificate, bundles: Sequence[str]) -> str:
    """Why one of the bundles does not vouch for the certificate; empty if all do."""
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature

    for bundle in bundles:
        if not bundle:
            return "it was given no CA bundle"
        signed = False
        with suppress(ValueError):
            for authority in x509.load_pem_x509_certificates(base64.b64decode(bundle)):
                with suppress(ValueError, TypeError, InvalidSignature):
                    certificate.verify_directly_issued_by(authority)
                    signed = True
        if not signed:
            return "no authority of its CA bundle signed the certificate that is served"
    return "" if bundles else "it was given no CA bundle"


def _ready(client: KubeClient, namespace: str, pod: str) -> tuple[str | Unread, datetime | None]:
    """What identity says to the kubelet's question, asked through the API server; and its clock."""
    path = f"/api/v1/namespaces/{namespace}/pods/{pod}:{IDENTITY_ADMIN}/proxy/ready"
    try:
        with client.answer("GET", path, None, None, 10.0) as response:
            response.read()
            return "", _date(response.headers.get("Date"))
    except Refused as refused:
        if refused.answer.status == 403:
            return Unread(refused.answer.message), None
        return refused.answer.message.strip() or f"status {refused.answer.status}", None
    except Failure as failure:
        return failure.message, None


def _data(
    ask: _Ask,
    cluster: Cluster,
    namespace: str,
    only: str | None,
    values: InstallValues | Unread,
    roots: str | Unread,
    proxies: bool,
) -> Data:
    from mantle.manifests.config import injection_values

    injecting: Values | Unread
    if isinstance(values, Unread):
        injecting = values
    else:
        injecting = roots if isinstance(roots, Unread) else injection_values(values, roots)
    summary: Object | Unread = Unread("not asked")
    if proxies:
        try:
            summary = cluster.views.get("summary", only)
        except Failure as failure:
            summary = Unread(failure.message, failure.problems[0].fix or "`kubectl -n mantle get pods`")
    return Data(
        pods=ask.of("pods", only),
        namespaces=ask.namespaces(only),
        values=injecting,
        version="" if isinstance(values, Unread) else values.version,
        summary=summary,
        control_namespace=namespace,
        services=ask.of("services", only),
        namespace=only,
    )


def _text(config: Object | Unread | None, key: str) -> str | Unread:
    if isinstance(config, Unread):
        return config
    found = None if config is None else (config.get("data") or {}).get(key)
    return Unread("there is no ConfigMap mantle-identity-trust-roots") if found is None else str(found)


def _date(text: str | None) -> datetime | None:
    with suppress(TypeError, ValueError):
        return parsedate_to_datetime(str(text)) + timedelta(milliseconds=500)  # whole seconds, cut off
    return None
