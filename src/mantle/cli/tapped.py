"""What `tap` and `top` share: the flags that say which requests are meant, and the tap itself.

Events are as viz sends them; what it says besides (a proxy that cannot be tapped) goes to standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import click

from mantle.cli.main import Globals
from mantle.cli.output import escape
from mantle.cli.resource import Resource, checked_selector, parse
from mantle.cli.target import namespace_of
from mantle.cli.target import target as target_of
from mantle.core.views import TAPPED

OPTIONS = (
    click.argument("resource", nargs=-1, required=True, metavar="KIND[/NAME]"),
    click.option("--to", metavar="KIND/NAME", help="Only requests to this resource."),
    click.option("--to-namespace", metavar="NAME", help="Namespace of --to (default: that of the resource)."),
    click.option("--method", default="", help="Only requests with this method."),
    click.option("--path", default="", help="Only requests whose path starts so."),
    click.option("--authority", default="", help="Only requests to this authority."),
    click.option("--scheme", default="", help="Only requests with this scheme."),
    click.option("--max-rps", type=click.FloatRange(0, min_open=True), default=100.0, show_default=True,
                 help="At most so many requests a second, over all pods."),
)  # fmt: skip


def which_requests(function: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command the argument and the flags that `tapped` takes."""
    for option in reversed(OPTIONS):
        function = option(function)
    return function


def tapped(
    flags: Globals,
    resource: tuple[str, ...],
    to: str | None,
    to_namespace: str | None,
    filters: Mapping[str, Any],
    *,
    json: bool,
) -> Iterator[dict[str, Any]]:
    """The events, as they happen. Everything that can be wrong with the flags is a usage error before the first.

    `filters`: what viz is asked besides, such as `method`. `json`: the output is for a program, so nothing is said
    of which mesh is meant.
    """
    target, selector = parse(resource, TAPPED), checked_selector(flags)
    if flags.all_namespaces and target.name:  # as in kubectl: one name is not looked for in all namespaces
        raise click.UsageError(f"a resource cannot be named across all namespaces: leave out {target.name}, or -A")
    mesh = target_of(flags, json=json)
    namespace = flags.namespace or mesh.default_namespace
    body = {"to": _to(to, to_namespace, namespace), **filters} | ({"selector": selector} if selector else {})
    return _events(mesh.views.tap(_object(target, namespace_of(flags, mesh) or ""), body))


def _events(stream: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for event in stream:
        if notice := event.get("notice"):
            sys.stderr.write(f"warning: {escape(notice['pod'])}: {escape(notice['message'])}\n")
        else:
            yield event


def _to(to: str | None, to_namespace: str | None, namespace: str) -> dict[str, str] | None:
    """What `--to` and `--to-namespace` mean to viz; None: neither was given."""
    if to is None and to_namespace is None:
        return None
    namespace = to_namespace or namespace
    return _object(Resource("namespace", namespace) if to is None else parse([to], TAPPED), namespace)


def _object(resource: Resource, namespace: str) -> dict[str, str]:
    return {"kind": resource.kind, "name": resource.name, "namespace": namespace}
