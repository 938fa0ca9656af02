"""From what people type (`web-5d4f-abcde`, `pod/NAME`, `deploy/web`, `svc/web-svc`) to a pod of `/v1/status`. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import click

from mantle.cli.output import Failure
from mantle.cli.resource import KINDS

Pod = Mapping[str, Any]
DEFAULT_NAMESPACE = "default"


def find_pod(status: Mapping[str, Any], word: str, namespace: str | None) -> Pod:
    """The pod of that name, or of that workload (a ready one first). Without a namespace: `default`, else the only
    match.
    """
    kind_word, slash, name = word.partition("/")
    kind = KINDS.get(kind_word.lower(), "") if slash else "pod"
    name = name if slash else word
    if kind not in ("pod", "deployment", "job") or not name:
        raise click.UsageError(f"{word}: name a pod, or write deploy/NAME or job/NAME")
    pods: Sequence[Pod] = status["pods"]
    if kind == "pod":
        matches = [p for p in pods if p["name"] == name]
    else:
        matches = [p for p in pods if (p["owner"]["kind"].lower(), p["owner"]["name"]) == (kind, name)]
    return _choose(matches, pods, f"{kind}/{name}", namespace)


def _choose(matches: Sequence[Pod], pods: Sequence[Pod], what: str, namespace: str | None) -> Pod:
    found = [p for p in matches if p["namespace"] == (namespace or DEFAULT_NAMESPACE)]
    if not found and namespace is None:
        elsewhere = sorted({p["namespace"] for p in matches})
        if len(elsewhere) > 1:
            raise Failure(f"{what} is in several namespaces: {', '.join(elsewhere)}", fix="say which with -n NAME")
        found = list(matches)
    if found:
        return sorted(found, key=lambda p: (not p["ready"], p["age_seconds"]))[0]
    if matches:
        raise Failure(f"{what} is not in namespace {namespace}", fix=f"use -n {matches[0]['namespace']}")
    names = [p["name"] for p in pods] + [
        f"deploy/{p['owner']['name']}" for p in pods if p["owner"]["kind"] == "Deployment"
    ]
    near = difflib.get_close_matches(what.partition("/")[2], names, n=1)
    raise Failure(f"there is no {what}", fix=f"did you mean {near[0]}?" if near else "see `mantle ps`")


def choose_container(pod: Pod, wanted: str | None, running: bool) -> str:
    """The container to look into: the one named, else the first of the application's. `running`: it must run."""
    names = [c["name"] for c in pod["containers"]]
    if wanted is not None:
        if wanted not in names:
            raise Failure(f"pod {pod['name']} has no container {wanted}", fix=f"it has {', '.join(names)}")
        chosen = wanted
    else:
        own = [c["name"] for c in pod["containers"] if c["role"] == "app" and c["name"] != "mantle-proxy"]
        chosen = own[0] if own else names[0]
    state = next(c for c in pod["containers"] if c["name"] == chosen)
    if running and state["state"] != "running":
        why = state["reason"] + (f": {state['message']}" if state["message"] else "")
        raise Failure(
            f"container {chosen} of pod {pod['name']} is not running ({why or state['state']})",
            fix=f"see `mantle logs {pod['name']} -c {chosen}`",
        )
    return chosen


def find_port(status: Mapping[str, Any], word: str, namespace: str | None, port: str) -> tuple[str, int]:
    """(uid, port) of the pod behind `POD`, `deploy/NAME` or `svc/NAME` and a port number or name."""
    kind_word, slash, name = word.partition("/")
    if not (slash and KINDS.get(kind_word.lower()) == "service"):
        if not port.isdecimal():
            raise click.UsageError(f"{port}: the port of a pod is a number")
        return find_pod(status, word, namespace)["uid"], int(port)
    matches = [s for s in status["services"] if s["name"] == name]
    found = [s for s in matches if s["namespace"] == (namespace or DEFAULT_NAMESPACE)]
    if not found and namespace is None:
        found = matches
    if len(found) != 1:
        places = ", ".join(s["namespace"] for s in matches)
        raise Failure(
            f"there is no svc/{name}" if not matches else f"svc/{name} is in {places}",
            fix="say which with -n NAME" if matches else "see `mantle ps`",
        )
    ports = found[0]["ports"]
    chosen = next((p for p in ports if port in (str(p["port"]), p["name"])), None)
    if chosen is None:
        raise Failure(f"svc/{name} has no port {port}", fix=f"it has {', '.join(str(p['port']) for p in ports)}")
    if not chosen["endpoints"]:
        raise Failure(f"no pod behind svc/{name} is ready", fix="see `mantle ps`")
    return chosen["endpoints"][0]["uid"], int(chosen["endpoints"][0]["port"])
