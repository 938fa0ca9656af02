"""A request of the admission webhook in, the answer for the API server and what people are told about it out.

`decide` takes an AdmissionReview (admission.k8s.io/v1), the Namespace, the workload and the mesh's `Values`, and
applies the same `inject_pod` as everything else. The answer holds a JSON patch (RFC 6902). A `Note` is what becomes an
event; whom it is written to, and when, is `control/injector_events.py`'s business. Pure: dictionaries in, values out.

Source: https://kubernetes.io/docs/reference/access-authn-authz/extensible-admission-controllers/.
"""

from __future__ import annotations

import base64
import enum
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mantle.core.annotations import (
    CREATED_BY,
    INHERITED_OPAQUE_PORTS,
    INJECT,
    OPAQUE_PORTS,
    PREFIX,
    SKIPPED,
    Mistake,
    own_opaque_ports,
    read_config,
)
from mantle.core.inject import Injected, Object, Refused, inject_pod
from mantle.core.inject_containers import PROXY
from mantle.core.names import is_label
from mantle.core.pod_facts import Skip, containers
from mantle.core.proxy_env import Values

REVIEW = "admission.k8s.io/v1"
MIRROR = "kubernetes.io/config.mirror"
"""The annotation of a mirror pod: https://kubernetes.io/docs/tasks/configure-pod-container/static-pod/."""
INJECTED = "Injected"
POD_SECURITY = "pod-security.kubernetes.io/enforce"
OWNERS_ABOVE: Mapping[str, str] = {"ReplicaSet": "Deployment", "Job": "CronJob"}
"""Owners that have an owner of their own, which is the one that people know."""
_ASKED = ("enabled", "ingress")
_API_VERSION, _KIND = re.compile(r"[A-Za-z0-9./-]{1,317}"), re.compile(r"[A-Za-z][A-Za-z0-9]{0,62}")
_NAME, _UID = re.compile(r"[A-Za-z0-9._:-]{1,253}"), re.compile(r"[A-Za-z0-9-]{1,64}")
_LABEL_KEY, _LABEL_VALUE = re.compile(r"[A-Za-z0-9._/-]{1,317}"), re.compile(r"[A-Za-z0-9._-]{0,63}")
_POD = re.compile(r"[a-z0-9][a-z0-9.-]{0,252}")


class NotAReview(ValueError):
    """What was posted is not an AdmissionReview of the version we registered for, or of no namespace that can be; the
    text says what it is. The API server proves nothing about itself to a webhook: anybody on a pods' network can ask.
    """


class Outcome(enum.StrEnum):
    INJECTED = "injected"
    SKIPPED = "skipped"
    REFUSED = "refused"
    UNCHANGED = "unchanged"
    """Nothing was asked of us: another kind of object, or another operation."""


@dataclass(frozen=True, slots=True)
class Owner:
    """The workload that made a pod."""

    api_version: str
    kind: str
    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class Note:
    """What is said about a pod, as an event: `reason` is one word, `message` is for people."""

    reason: str
    message: str
    warning: bool = False


@dataclass(frozen=True, slots=True)
class Subject:
    """A pod or service of a request, as far as it is known before it exists. `name` is empty where the API server will
    make it.
    """

    namespace: str
    name: str
    generate_name: str
    owner: Owner | None
    kind: str = "Pod"


@dataclass(frozen=True, slots=True)
class Decision:
    review: Object
    """The AdmissionReview to answer with."""
    outcome: Outcome
    subject: Subject
    reasons: tuple[str, ...] = ()
    """Labels of why not: `core.pod_facts.Skip`, or those of `_label`."""
    asked_at: str = ""
    """Who asked for injection: `workload`, `namespace`, or nobody (empty)."""
    note: Note | None = None
    """None where there is nothing (more) to say, and for a dry run, which must leave no trace."""
    again: bool = False
    """The pod was decided about before, and something else was changed since."""


def pod_of(review: Mapping[str, Any]) -> Subject:
    """Whom a request is about. Raises `NotAReview`."""
    request = _request(review)
    metadata = (request.get("object") or {}).get("metadata") or {}
    namespace = str(request.get("namespace") or metadata.get("namespace") or "")
    if not is_label(namespace):
        raise NotAReview(f"found the namespace {namespace[:100]!r}; wanted the name of one")
    return Subject(
        kind="Service" if (request.get("object") or {}).get("kind") == "Service" else "Pod",
        namespace=namespace,
        name=str(metadata.get("name") or request.get("name") or ""),
        generate_name=str(metadata.get("generateName") or ""),
        owner=controller(metadata),
    )


def controller(metadata: Mapping[str, Any]) -> Owner | None:
    """The owner reference that says `controller: true`. One that no object can have is none: the API server looks at
    references only after us.
    """
    for ref in metadata.get("ownerReferences") or []:
        if ref.get("controller"):
            owner = Owner(*(str(ref.get(key) or "") for key in ("apiVersion", "kind", "name", "uid")))
            forms = (_API_VERSION, owner.api_version), (_KIND, owner.kind), (_NAME, owner.name), (_UID, owner.uid)
            return owner if all(form.fullmatch(text) for form, text in forms) else None
    return None


def can_exist(subject: Subject, labels: Mapping[str, Any]) -> bool:
    """Whether a pod of that name with those labels can come into being: one that cannot is not waited for."""
    return _POD.fullmatch(subject.name or subject.generate_name) is not None and all(
        _LABEL_KEY.fullmatch(str(key)) and isinstance(value, str) and _LABEL_VALUE.fullmatch(value)
        for key, value in labels.items()
    )


def bears_out(annotations: Mapping[str, str], note: Note) -> bool:
    """Whether `note` can be about a pod or service with these annotations: each of our answers leaves its mark, so
    nothing is said of those that were never asked about.
    """
    if note.reason == INJECTED:
        return CREATED_BY in annotations or INHERITED_OPAQUE_PORTS in annotations
    return SKIPPED in annotations or MIRROR in annotations or annotations.get(INJECT) == "disabled"


def decide(
    review: Mapping[str, Any], namespace: Mapping[str, Any], values: Values, owner: Owner | None = None
) -> Decision:
    """What becomes of the pod in `review`. Raises `NotAReview`.

    `namespace`: its Namespace object. `owner`: the workload people know it by (a Deployment, not its ReplicaSet).
    """
    request, subject = _request(review), pod_of(review)
    pod: Mapping[str, Any] = request.get("object") or {}
    if request.get("operation") != "CREATE" or pod.get("kind") != "Pod":
        return Decision(_answer(request), Outcome.UNCHANGED, subject, (Skip.UNSUPPORTED,))
    owner = owner or subject.owner
    own = (pod.get("metadata") or {}).get("annotations") or {}
    inherited = (namespace.get("metadata") or {}).get("annotations") or {}
    asked = "workload" if own.get(INJECT) in _ASKED else "namespace" if inherited.get(INJECT) in _ASKED else ""
    # Another webhook came after us and we are asked once more (reinvocationPolicy): all is said already.
    again = own.get(CREATED_BY) == values.created_by
    quiet = bool(request.get("dryRun"))

    def made(answer: Object, outcome: Outcome, reasons: tuple[str, ...], note: Note | None) -> Decision:
        seen = again or (outcome is Outcome.SKIPPED and SKIPPED in own)
        return Decision(answer, outcome, subject, reasons, asked, None if quiet or seen else note, seen)

    if MIRROR in own:
        note = _skip_note((Skip.STATIC,)) if asked else None
        return made(_answer(request, warnings=_warned(note)), Outcome.SKIPPED, (Skip.STATIC,), note)
    result = inject_pod(pod, namespace, values, (owner.kind, owner.name) if owner else None)
    if isinstance(result, Refused):
        message = "Mantle cannot do what this pod asks for: " + "; ".join(str(m) for m in result.mistakes)
        note = Note("InjectionRefused", message, warning=True)
        reasons = tuple(dict.fromkeys(_label(mistake) for mistake in result.mistakes))
        return made(_answer(request, denied=message), Outcome.REFUSED, reasons, note)
    if isinstance(result, Injected):
        note, warnings = _injected_note(pod, result, namespace, values)
        return made(_answer(request, json_patch(pod, result.pod), warnings), Outcome.INJECTED, (), note)
    if not asked:
        return made(_answer(request), Outcome.SKIPPED, result.reasons, None)
    note = _skip_note(result.reasons)
    if result.reasons == (Skip.DISABLED,):  # its author said so, on the pod: nothing to add, nobody to warn
        return made(_answer(request), Outcome.SKIPPED, result.reasons, note)
    patch = json_patch(pod, _annotated(pod, {SKIPPED: skipped_text(result.reasons)}))
    return made(_answer(request, patch, _warned(note)), Outcome.SKIPPED, result.reasons, note)


def decide_service(review: Mapping[str, Any], namespace: Mapping[str, Any]) -> Decision:
    """A new Service that names no opaque ports gets its namespace's, marked as a copy. Raises `NotAReview`.

    Nothing depends on it: discovery answers the same for a service without the copy. It is for people, who look at
    the service, and for other programs. So a service is never refused.
    """
    request, subject = _request(review), pod_of(review)
    service: Mapping[str, Any] = request.get("object") or {}
    own = (service.get("metadata") or {}).get("annotations") or {}
    given = ((namespace.get("metadata") or {}).get("annotations") or {}).get(OPAQUE_PORTS)
    unchanged = Decision(_answer(request), Outcome.UNCHANGED, subject)
    if request.get("operation") != "CREATE" or subject.kind != "Service":
        return unchanged
    # The same copy: another webhook came after us and we are asked once more.
    if given is None or own_opaque_ports(own) is not None or own.get(OPAQUE_PORTS) == given:
        return unchanged
    quiet = bool(request.get("dryRun"))
    _, mistakes = read_config({}, {OPAQUE_PORTS: given})
    if mistakes:
        reason = "invalid_annotation"
        note = Note("InjectionSkipped", f"no opaque ports were taken over: {mistakes[0]}", warning=True)
        patch = json_patch(service, _annotated(service, {SKIPPED: f"{reason}: {mistakes[0]}"}))
        again = SKIPPED in own
        answer = _answer(request, patch, _warned(note))
        told = None if quiet or again else note
        return Decision(answer, Outcome.SKIPPED, subject, (reason,), "namespace", told, again)
    patch = json_patch(service, _annotated(service, {OPAQUE_PORTS: given, INHERITED_OPAQUE_PORTS: given}))
    note = Note(INJECTED, f"{OPAQUE_PORTS}: {given}, as its namespace says")
    return Decision(_answer(request, patch), Outcome.INJECTED, subject, (), "namespace", None if quiet else note)


def _label(mistake: Mistake) -> str:
    """A refusal's reason, as metrics have it."""
    if mistake.annotation != INJECT:
        return "invalid_annotation"
    return f"invalid_inject_annotation_at_{'ns' if mistake.where == 'namespace' else 'workload'}"


def skipped_text(reasons: tuple[Skip, ...]) -> str:
    """The annotation's value: `host_network_enabled: hostNetwork is enabled; …`."""
    return "; ".join(f"{reason}: {reason.message()}" for reason in reasons)


def json_patch(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Object]:
    """The RFC 6902 operations that make `after` of `before`. A list that differs is replaced as a whole."""
    return list(_differences("", before, after))


def _differences(path: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Object]:
    for key in before:
        if key not in after:
            yield {"op": "remove", "path": f"{path}/{_pointer(key)}"}
    for key, value in after.items():
        here = f"{path}/{_pointer(key)}"
        if key not in before:
            yield {"op": "add", "path": here, "value": value}
        elif isinstance(value, Mapping) and isinstance(before[key], Mapping):
            yield from _differences(here, before[key], value)
        elif value != before[key]:
            yield {"op": "replace", "path": here, "value": value}


def _pointer(key: str) -> str:
    """RFC 6901, section 3."""
    return key.replace("~", "~0").replace("/", "~1")


def _request(review: Mapping[str, Any]) -> Mapping[str, Any]:
    found = f"{review.get('apiVersion')} {review.get('kind')}" if isinstance(review, Mapping) else type(review).__name__
    if found != f"{REVIEW} AdmissionReview" or not isinstance(review.get("request"), Mapping):
        raise NotAReview(f"found {found}; wanted {REVIEW} AdmissionReview with a request")
    request: Mapping[str, Any] = review["request"]
    return request


def _answer(
    request: Mapping[str, Any], patch: list[Object] | None = None, warnings: tuple[str, ...] = (), denied: str = ""
) -> Object:
    response: Object = {"uid": request.get("uid", ""), "allowed": not denied}
    if denied:
        response["status"] = {"code": 400, "reason": "BadRequest", "message": denied}
    if patch:
        response["patchType"] = "JSONPatch"
        response["patch"] = base64.b64encode(json.dumps(patch).encode()).decode()
    if warnings:
        response["warnings"] = list(warnings)
    return {"apiVersion": REVIEW, "kind": "AdmissionReview", "response": response}


def _skip_note(reasons: tuple[Skip, ...]) -> Note:
    message = "not in the mesh, its traffic is plain: " + "; ".join(reason.message() for reason in reasons)
    return Note("InjectionSkipped", message, warning=reasons != (Skip.DISABLED,))


def _warned(note: Note | None) -> tuple[str, ...]:
    return (f"mantle: {note.message}",) if note else ()


def _injected_note(
    pod: Mapping[str, Any], result: Injected, namespace: Mapping[str, Any], values: Values
) -> tuple[Note, tuple[str, ...]]:
    """What is said of a meshed pod, and what of that is a warning to whoever creates it."""
    message = f"{PROXY} {values.version} added"
    warnings: list[str] = []
    spec = pod.get("spec") or {}
    if spec.get("automountServiceAccountToken") is False:
        message += "; automountServiceAccountToken is false, which is fine: the proxy has a token of its own"
    if any(container.get("name") == PROXY for container in containers(spec)):
        message += f"; the {PROXY} it came with was made anew with the mesh's current settings"
    if result.udp_ports:
        warnings.append("it declares UDP ports, which bypass the mesh")
    if result.clashes:
        ports = ", ".join(map(str, result.clashes))
        warnings.append(
            f"the proxy and a container of it both listen on port {ports}, so one of them will not start; move the "
            f"proxy with {PREFIX}inbound-port, outbound-port, control-port or admin-port"
        )
    if result.tcp_probes:
        ports = ", ".join(map(str, result.tcp_probes))
        warnings.append(
            f"its tcpSocket probes (port {ports}) are answered by the proxy, whether the application listens or not; "
            "use httpGet, grpc or exec"
        )
    level = ((namespace.get("metadata") or {}).get("labels") or {}).get(POD_SECURITY)
    if level in ("baseline", "restricted"):
        warnings.append(
            f"its namespace enforces PodSecurity {level}, which refuses the capability NET_ADMIN that installs the "
            f"redirect; label the namespace {POD_SECURITY}=privileged"
        )
    note = Note(INJECTED, "; ".join([message, *warnings]), warning=level in ("baseline", "restricted"))
    return note, tuple(f"mantle: {warning}" for warning in warnings)


def _annotated(obj: Mapping[str, Any], more: Mapping[str, str]) -> Object:
    metadata = dict(obj.get("metadata") or {})
    metadata["annotations"] = {**(metadata.get("annotations") or {}), **more}
    return {**obj, "metadata": metadata}
