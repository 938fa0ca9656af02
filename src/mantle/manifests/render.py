"""Fills the manifests: values in, Kubernetes objects out.

`control_plane` gives what both platforms have (`control-plane.yml`); `install_objects` what a cluster is given: those
objects with what `cluster/*.yml` adds, each pod with its proxy already in it (by `core.inject`, as everywhere), so that
the control plane depends on no webhook. Placeholders are replaced in parsed strings, never in YAML text, so no value
can change the structure. The only I/O is reading packaged files; no cluster is asked anything here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from string import Template
from typing import Any

from mantle.core.annotations import LABEL_COMPONENT, LABEL_CONTROL_NS
from mantle.core.inject import Injected, inject_pod
from mantle.core.proxy_env import Values
from mantle.manifests.config import InstallValues, dump, injection_values

Object = dict[str, Any]

PART_OF, PART_OF_VALUE = "mantle.dev/part-of", "mantle"
"""The label of everything that `upgrade` may replace and `kubectl apply --prune` remove."""
PROXY_REQUESTS: Mapping[str, str] = {"proxy-cpu-request": "20m", "proxy-memory-request": "24Mi"}
"""What the control plane's own proxies ask for where `proxy.cpuRequest` and `proxy.memoryRequest` say nothing."""
NARROWING = ("ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding")
ALONE = ("ca",)
"""Components with one pod always: two of them would undo each other's work."""
TRUST_ROOTS, ISSUER = "mantle-identity-trust-roots", "mantle-identity-issuer"
"""The ConfigMap and the Secret of the first tier: made once, never replaced, never pruned."""


@dataclass(frozen=True, slots=True)
class ControlPlane:
    """What the control plane's manifests depend on. Certificates and key are PEM text, durations as `24h`, `20s`."""

    version: str
    trust_roots: str
    issuer_certificate: str
    issuer_key: str
    networks: tuple[str, ...]
    """The mesh's networks (CIDRs)."""
    platform: str
    """Where components reach the platform: `unix:/PATH` of `mantle.v1.Platform`, or `kubernetes`."""
    control_namespace: str = "mantle"
    trust_domain: str = "cluster.local"
    issuance_lifetime: str = "24h"
    clock_skew: str = "20s"


@dataclass(frozen=True, slots=True)
class TrustMaterial:
    """The trust a mesh is installed with. PEM text.

    `roots` is always known. The issuer is there only where `install` makes it: not where the cluster has one already,
    nor where somebody else makes it.
    """

    roots: str
    issuer: str = ""
    issuer_key: str = ""
    emit_roots: bool = True
    """The cluster has no trust-roots ConfigMap yet."""


def control_plane(values: ControlPlane) -> list[Object]:
    """The objects of the control plane, in the order to create them. Pods are not injected yet: they ask for it."""
    placeholders = {
        "VERSION": values.version,
        "CONTROL_NAMESPACE": values.control_namespace,
        "TRUST_DOMAIN": values.trust_domain,
        "TRUST_ROOTS": values.trust_roots,
        "ISSUER_CERTIFICATE": values.issuer_certificate,
        "ISSUER_KEY": values.issuer_key,
        "NETWORKS": ",".join(values.networks),
        "PLATFORM": values.platform,
        "ISSUANCE_LIFETIME": values.issuance_lifetime,
        "CLOCK_SKEW": values.clock_skew,
    }
    return _read("control-plane.yml", placeholders)


def install_objects(
    values: InstallValues,
    trust: TrustMaterial,
    overrides: Mapping[str, Any] | None = None,
    *,
    admission_policies: bool = True,
) -> list[Object]:
    """Everything `mantle install` prints, in the order to apply it.

    `overrides`: the values that were given, nested; kept in the cluster for `upgrade`.
    `admission_policies`: whether the cluster knows ValidatingAdmissionPolicy.
    """
    objects = control_plane(
        ControlPlane(
            version=values.version,
            trust_roots=trust.roots,
            issuer_certificate=trust.issuer,
            issuer_key=trust.issuer_key,
            networks=values.networks,
            platform="kubernetes",
            control_namespace=values.control_namespace,
            trust_domain=values.trust_domain,
            issuance_lifetime=values.issuance_lifetime,
            clock_skew=values.clock_skew,
        )
    )
    placeholders = _cluster_placeholders(values, overrides or {})
    files = ["rbac.yml", "config.yml", "injector.yml", "tap-api.yml", *(["ca.yml"] if values.tls == "optional" else [])]
    additions = [obj for name in files for obj in _read(f"cluster/{name}", placeholders)]
    if not admission_policies:
        additions = [obj for obj in additions if obj["kind"] not in NARROWING]
    # A right and what narrows it come first.
    roles = [obj for obj in additions if obj["apiVersion"].startswith("rbac.") or obj["kind"] in NARROWING]
    # What answers the API server comes last: a webhook or an API whose program does not exist yet only makes it wait.
    last = [obj for obj in additions if obj["kind"] in ("MutatingWebhookConfiguration", "APIService")]
    objects = [objects[0], *roles, *objects[1:], *(obj for obj in additions if obj not in roles and obj not in last)]
    overlays = ["overlay.yml", *(["ca-overlay.yml"] if values.tls == "optional" else [])]
    for name in overlays:
        objects = overlaid(objects, _read(f"cluster/{name}", placeholders))
    injection = control_plane_injection(values, trust.roots)
    finished: list[Object] = []
    for obj in objects:
        finished += _workload(obj, values, placeholders, injection) if obj["kind"] == "Deployment" else [obj]
    return [_labelled(obj, values) for obj in _first_tier([*finished, *last], values, trust)]


def control_plane_injection(values: InstallValues, roots: str) -> Values:
    """What injection is told for the control plane's own pods: as for any pod, but they ask for some resources, and
    reach the API server past their proxy.
    """
    proxy = {**PROXY_REQUESTS, **values.proxy}
    return injection_values(replace(values, proxy=proxy), roots, f"mantle/install {values.version}")


def identify(obj: Mapping[str, Any]) -> tuple[str, str, str]:
    """(kind, namespace, name) of an object."""
    meta = obj["metadata"]
    return obj["kind"], meta.get("namespace", ""), meta["name"]


# ---- steps ----


def _cluster_placeholders(values: InstallValues, overrides: Mapping[str, Any]) -> dict[str, str]:
    closed = values.failure_policy == "Fail"
    return {
        "VERSION": values.version,
        "CONTROL_NAMESPACE": values.control_namespace,
        "TRUST_DOMAIN": values.trust_domain,
        "CLUSTER_DOMAIN": values.cluster_domain,
        "NETWORKS": ",".join(values.networks),
        "PLATFORM": "kubernetes",
        "AUDIENCES": ",".join(values.audiences),
        "CHECK_ADDRESS": str(values.check_address).lower(),
        "DEFAULT_POLICY": values.proxy.get("default-inbound-policy", "all-unauthenticated"),
        "PULL_POLICY": values.image_pull_policy,
        "CPU_REQUEST": values.cpu_request,
        "MEMORY_REQUEST": values.memory_request,
        "VALUES": _json(dump(values)),
        "OVERRIDES": _json(overrides),
        "OPEN_OPERATOR": "In" if closed else "NotIn",
        "OPEN_VALUE": "open" if closed else "closed",
        "CLOSED_OPERATOR": "NotIn" if closed else "In",
        "CLOSED_VALUE": "open" if closed else "closed",
    }


def _json(value: Mapping[str, Any]) -> str:
    """JSON that people can read; it is YAML, too."""
    return json.dumps(value, indent=2) + "\n"


def _workload(
    deployment: Object, values: InstallValues, placeholders: Mapping[str, str], injection: Values
) -> list[Object]:
    """A Deployment as it runs on a cluster, with what belongs to it alone."""
    component = deployment["spec"]["template"]["metadata"]["labels"][LABEL_COMPONENT]
    known = {**placeholders, "COMPONENT": component}
    result = _merged(deployment, _read("cluster/workload.yml", known)[0])
    beside: list[Object] = []
    if values.ha and component not in ALONE:
        spread, *beside = _read("cluster/ha.yml", known)
        result = _merged(result, spread)
    result["spec"]["replicas"] = 1 if component in ALONE else values.running
    if component in ALONE:
        result["spec"]["strategy"] = {"type": "Recreate"}  # a rolling update has two for a moment
    template = result["spec"]["template"]
    if values.image_pull_secrets:
        template["spec"]["imagePullSecrets"] = [{"name": name} for name in values.image_pull_secrets]
    for container in template["spec"]["containers"]:
        container["image"] = (
            container["image"].replace("mantle/", f"{values.registry}/mantle/", 1)
            if (values.registry)
            else container["image"]
        )
        if values.memory_limit:
            container["resources"]["limits"] = {"memory": values.memory_limit}
    if component == "identity" and values.external_issuer:
        (issuer,) = (volume for volume in template["spec"]["volumes"] if volume["name"] == "issuer")
        issuer["secret"]["items"] = [{"key": "tls.crt", "path": "crt.pem"}, {"key": "tls.key", "path": "key.pem"}]
    namespace = {"metadata": {"name": values.control_namespace}}
    injected = inject_pod(template, namespace, injection, ("Deployment", result["metadata"]["name"]))
    if not isinstance(injected, Injected):  # values were checked, and the templates are ours
        raise ValueError(f"{result['metadata']['name']} cannot be injected: {injected}")
    result["spec"]["template"] = injected.pod
    return [result, *beside]


def _first_tier(objects: Iterable[Object], values: InstallValues, trust: TrustMaterial) -> Iterator[Object]:
    """Leaves out the trust roots and the issuer where they are not this install's to make."""
    for obj in objects:
        if identify(obj) == ("ConfigMap", values.control_namespace, TRUST_ROOTS) and not trust.emit_roots:
            continue
        if identify(obj) == ("Secret", values.control_namespace, ISSUER) and not trust.issuer_key:
            continue
        yield obj


def _labelled(obj: Object, values: InstallValues) -> Object:
    """Labels that say whose an object is. The first tier and the namespace around it are never pruned."""
    labels = {LABEL_CONTROL_NS: values.control_namespace}
    if obj["kind"] != "Namespace" and obj["metadata"]["name"] not in (TRUST_ROOTS, ISSUER):
        labels[PART_OF] = PART_OF_VALUE
    return {**obj, "metadata": {**obj["metadata"], "labels": {**obj["metadata"].get("labels", {}), **labels}}}


# ---- reading, merging, writing ----


def _read(name: str, placeholders: Mapping[str, str]) -> list[Object]:
    return [_fill(document, placeholders) for document in _documents(name)]


@cache
def _documents(name: str) -> tuple[Any, ...]:
    from ruamel.yaml import YAML

    text = resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
    return tuple(YAML(typ="safe", pure=True).load_all(text))


def _fill(node: Any, placeholders: Mapping[str, str]) -> Any:
    """A copy of the node with `${NAME}` replaced in every string; KeyError for a placeholder nobody fills."""
    if isinstance(node, dict):
        return {key: _fill(value, placeholders) for key, value in node.items()}
    if isinstance(node, list):
        return [_fill(item, placeholders) for item in node]
    return Template(node).substitute(placeholders) if isinstance(node, str) else node


def overlaid(objects: Iterable[Object], overlay: Iterable[Object]) -> list[Object]:
    """The objects with each document of the overlay merged into the one of its kind and name.

    Raises ValueError if there is none: an overlay that changes nothing is a mistake.
    """
    result = list(objects)
    for extra in overlay:
        places = [
            i
            for i, obj in enumerate(result)
            if (obj["kind"], obj["metadata"]["name"]) == (extra["kind"], extra["metadata"]["name"])
        ]
        if not places:
            raise ValueError(f"the overlay changes {extra['kind']} {extra['metadata']['name']}, which does not exist")
        for place in places:
            result[place] = _merged(result[place], extra)
    return result


def _merged(base: Any, extra: Any) -> Any:
    """Two trees as one: mappings key by key, lists of named things by name, other lists one after the other."""
    if isinstance(base, dict) and isinstance(extra, dict):
        return {**base, **{key: _merged(base[key], value) if key in base else value for key, value in extra.items()}}
    if isinstance(base, list) and isinstance(extra, list):
        named = all(isinstance(item, dict) and "name" in item for item in (*base, *extra))
        if not named:
            return [*base, *extra]
        above = {item["name"]: item for item in extra}
        kept = [_merged(item, above.pop(item["name"])) if item["name"] in above else item for item in base]
        return [*kept, *above.values()]
    return extra


def yaml_text(objects: Iterable[Mapping[str, Any]]) -> str:
    """The objects as YAML documents for people: block style, texts of several lines as such, `---` between."""
    from io import StringIO

    from ruamel.yaml import YAML
    from ruamel.yaml.representer import SafeRepresenter
    from ruamel.yaml.scalarstring import LiteralScalarString

    class Representer(SafeRepresenter):
        """Texts of several lines stay readable."""

    def text(representer: Any, value: str) -> Any:
        style = "|" if "\n" in value.rstrip("\n") and not any(c in value for c in "\t\r") else None
        return representer.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Representer.add_representer(str, text)
    Representer.add_representer(LiteralScalarString, text)
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # upstream: None is its only default
    yaml.width = 4096
    parts = []
    for obj in objects:
        out = StringIO()
        yaml.dump(json.loads(json.dumps(obj)), out)  # a copy without shared parts: no anchors for the reader to follow
        parts.append(out.getvalue())
    return "---\n".join(parts)
