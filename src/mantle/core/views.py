"""How the views are addressed on a cluster, and which right each needs. Pure; the CLI and viz share it.

The API server authorizes a request by its path before it hands it to viz, which asks again for the same right: the path
must therefore say verb, resource, namespace and name as RBAC means them. Watching traffic is the verb `watch` on
`RESOURCE/tap` (paths below `/watch/` have that verb); every other view is a list, of a namespace or of all.
Source: https://kubernetes.io/docs/reference/access-authn-authz/authorization/#determine-the-request-verb
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

GROUP = "tap.mantle.dev"
VERSION = "v1alpha1"
ROOT = f"/apis/{GROUP}/{VERSION}"
ALL = "-"
"""Stands in a path for "every one of this kind"."""

TAP_ROLE = "mantle-viz-tap-admin"
"""The ClusterRole that may watch traffic, and see every view."""
VIEW_ROLE = "mantle-viz-view"
"""The ClusterRole that may see every view but tap."""

WORKLOADS = ("cronjob", "daemonset", "deployment", "job", "replicaset", "replicationcontroller", "statefulset")
"""Kinds that own pods."""
TAPPED = (*WORKLOADS, "namespace", "pod", "service")
PLURALS: Mapping[str, str] = MappingProxyType({kind: f"{kind}s" for kind in TAPPED})
"""Kinds that can be watched, with their names in paths."""
KIND_OF_PLURAL: Mapping[str, str] = MappingProxyType({plural: kind for kind, plural in PLURALS.items()})

VIEWS = ("certificates", "edges", "endpoints", "policies", "proxymetrics", "stat", "summary")
"""What can be listed."""


@dataclass(frozen=True, slots=True)
class Right:
    """What RBAC is asked. `namespace` empty: all of them; `name` empty: all objects."""

    verb: str
    resource: str
    subresource: str = ""
    namespace: str = ""
    name: str = ""

    @property
    def full_resource(self) -> str:
        return f"{self.resource}/{self.subresource}" if self.subresource else self.resource

    def __str__(self) -> str:
        where = f"in namespace {self.namespace}" if self.namespace else "in all namespaces"
        return f"{self.verb} {self.full_resource} in API group {GROUP} {where}"


def view_path(view: str, namespace: str | None) -> str:
    """Where a view is; `namespace` None: of all."""
    return f"{ROOT}/{view}" if namespace is None else f"{ROOT}/namespaces/{namespace}/{view}"


def view_right(view: str, namespace: str | None) -> Right:
    return Right("list", view, namespace=namespace or "")


def tap_path(kind: str, name: str, namespace: str) -> str:
    """Where the traffic of a resource is watched. `kind` is a key of `PLURALS`; `name` empty: all of that kind;
    `namespace` empty: in all of them.
    """
    if not namespace:
        return f"{ROOT}/watch/{PLURALS[kind]}/{ALL}/tap"
    if kind == "namespace":
        namespace = name = name or namespace
    return f"{ROOT}/watch/namespaces/{namespace}/{PLURALS[kind]}/{name or ALL}/tap"


def tap_right(kind: str, name: str, namespace: str) -> Right:
    if kind == "namespace" and namespace:
        namespace = name = name or namespace
    return Right("watch", PLURALS[kind], "tap", namespace, name)


def grant(right: Right, user: str) -> str:
    """The command by which an administrator gives `user` a right of this group. What is granted is a role of ours: in
    the one namespace where that is enough, else in all.
    """
    role = TAP_ROLE if right.subresource == "tap" else VIEW_ROLE
    account = _service_account(user)
    whom = f"--serviceaccount={account}" if account else f"--user={_quoted(user)}"
    words = user.rpartition(":")[2] if account else user
    binding = f"{_name_of(words)}-{role}"
    if right.namespace:
        return f"kubectl create rolebinding {binding} -n {right.namespace} --clusterrole={role} {whom}"
    return f"kubectl create clusterrolebinding {binding} --clusterrole={role} {whom}"


def refusal(right: Right, user: str, why: str = "") -> tuple[str, str]:
    """(what was refused, what to do) for a user without a right."""
    message = f"user {user!r} may not {right}" + (f" ({why})" if why else "")
    return message, f"somebody who may grant rights gives it with: {grant(right, user)}"


def _service_account(user: str) -> str:
    prefix = "system:serviceaccount:"
    parts: Sequence[str] = user.removeprefix(prefix).split(":")
    return ":".join(parts) if user.startswith(prefix) and len(parts) == 2 and all(parts) else ""


def _name_of(user: str) -> str:
    """A name that Kubernetes takes, made of a user's."""
    text = "".join(c if c.isascii() and (c.isalnum() or c == "-") else "-" for c in user.lower())
    return text.strip("-")[:40].rstrip("-") or "user"


def _quoted(user: str) -> str:
    """As one word of a shell."""
    if user and all(c.isascii() and (c.isalnum() or c in "@%+=:,./-_") for c in user):
        return user
    return "'" + user.replace("'", "'\"'\"'") + "'"
