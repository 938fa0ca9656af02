"""Resources as people type them: `deploy/web`, `deploy web`, `deploy`, `po/web-1`, `ns/emojivoto`, `svc/web-svc`.

Names and short names of kinds are those of kubectl (https://kubernetes.io/docs/reference/kubectl/#resource-types).
Pure: errors are usage errors that say what would do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import click

from mantle.cli.main import Globals
from mantle.core.selector import BadSelector
from mantle.core.selector import parse as parse_selector

ALIASES: dict[str, tuple[str, ...]] = {
    "authority": ("authorities", "au"),
    "cronjob": ("cronjobs", "cj"),
    "daemonset": ("daemonsets", "ds"),
    "deployment": ("deployments", "deploy"),
    "job": ("jobs",),
    "namespace": ("namespaces", "ns"),
    "pod": ("pods", "po"),
    "replicaset": ("replicasets", "rs"),
    "replicationcontroller": ("replicationcontrollers", "rc"),
    "service": ("services", "svc"),
    "statefulset": ("statefulsets", "sts"),
}
"""Each kind by its singular name, with the other names it has."""

GROUPS = {
    **dict.fromkeys(("daemonset", "deployment", "replicaset", "statefulset"), "apps"),
    **dict.fromkeys(("cronjob", "job"), "batch"),
}
"""The API group of each kind that has one: `kubectl get deploy -o name` says `deployment.apps/web`."""

KINDS = {alias: kind for kind, names in ALIASES.items() for alias in (kind, *names)}
SHORT = {kind: names[-1] if kind != "job" else kind for kind, names in ALIASES.items()}


@dataclass(frozen=True, slots=True)
class Resource:
    """A kind (a key of `ALIASES`) and a name; an empty name means all of that kind."""

    kind: str
    name: str = ""

    def __str__(self) -> str:
        return f"{SHORT[self.kind]}/{self.name}" if self.name else SHORT[self.kind]


def parse(words: Sequence[str], allowed: Sequence[str]) -> Resource:
    """The one resource that `words` name: `KIND`, `KIND/NAME` or `KIND NAME`. Raises `click.UsageError`."""
    if not words or len(words) > 2 or any(not word for word in words):
        raise click.UsageError(f"name one resource: KIND, KIND/NAME or KIND NAME, with KIND one of {_list(allowed)}")
    kind_word, slash, name = words[0].partition("/")
    if len(words) == 2:
        if slash:
            raise click.UsageError(f"{words[0]} {words[1]}: write {kind_word}/NAME or {kind_word} NAME, not both")
        name = words[1]
    elif slash and not name:
        raise click.UsageError(f"{words[0]} has no name after the slash")
    if "/" in name:
        raise click.UsageError(f"{name!r} is not a name")
    return Resource(kind_of(kind_word, allowed), name)


def kind_of(word: str, allowed: Sequence[str]) -> str:
    """The kind that `word` names, as `deploy` or as `deployment.apps`. Raises `click.UsageError` unless it is one of
    `allowed`.
    """
    plain, _, group = word.lower().partition(".")
    kind = KINDS.get(plain)
    if kind is None or (group and group.removeprefix("v1.") != GROUPS.get(kind)):
        raise click.UsageError(f"there is no kind {word!r}; use one of {_list(allowed)}")
    if kind not in allowed:
        raise click.UsageError(f"resource type is not supported here: {kind}; use one of {_list(allowed)}")
    return kind


def checked_selector(flags: Globals) -> str:
    """What `-l` says, empty if it was not given. Raises `click.UsageError` if it is no selector."""
    text = flags.selector or ""
    if isinstance(parsed := parse_selector(text), BadSelector):
        raise click.UsageError(f"--selector: {parsed}")
    return text


def _list(kinds: Sequence[str]) -> str:
    return ", ".join(kind if SHORT[kind] == kind else f"{kind} ({SHORT[kind]})" for kind in kinds)
