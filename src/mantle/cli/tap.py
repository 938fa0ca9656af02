"""`mantle tap RESOURCE`: requests as proxies see them, one line each as it happens, until Ctrl-C.

The lines are those of `linkerd tap`, to the byte. Everything a peer wrote (method, authority, path) is escaped, spaces
too, so that a line always has the fields it seems to have.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import click

from mantle.cli.main import Globals, mesh_command
from mantle.cli.output import escape, json_line, write
from mantle.cli.resource import Resource, checked_selector, parse
from mantle.cli.target import namespace_of
from mantle.cli.target import target as target_of
from mantle.core.views import TAPPED

KINDS = TAPPED

GRPC_CODES = (
    "OK", "Canceled", "Unknown", "InvalidArgument", "DeadlineExceeded", "NotFound", "AlreadyExists",
    "PermissionDenied", "ResourceExhausted", "FailedPrecondition", "Aborted", "OutOfRange", "Unimplemented",
    "Internal", "Unavailable", "DataLoss", "Unauthenticated",
)  # fmt: skip
"""Names of gRPC status codes by number, as Go prints them (https://pkg.go.dev/google.golang.org/grpc/codes)."""


@mesh_command()
@click.argument("resource", nargs=-1, required=True, metavar="KIND[/NAME]")
@click.option("--to", metavar="KIND/NAME", help="Only requests to this resource.")
@click.option("--to-namespace", metavar="NAME", help="Namespace of --to (default: that of the resource).")
@click.option("--method", default="", help="Only requests with this method.")
@click.option("--path", default="", help="Only requests whose path starts so.")
@click.option("--authority", default="", help="Only requests to this authority.")
@click.option("--scheme", default="", help="Only requests with this scheme.")
@click.option("--max-rps", type=click.FloatRange(0, min_open=True), default=100.0, show_default=True,
              help="At most so many requests a second, over all pods.")  # fmt: skip
def command(
    flags: Globals,
    resource: tuple[str, ...],
    to: str | None,
    to_namespace: str | None,
    method: str,
    path: str,
    authority: str,
    scheme: str,
    max_rps: float,
) -> None:
    """Watch requests as they happen, with their TLS state.

    \b
    mantle tap deploy -n emojivoto              every deployment of the namespace
    mantle tap deploy/web --to deploy/emoji     what web asks of emoji
    mantle tap po/web-6f5d-x2x7q --path /api    one pod, one part of its paths
    """
    output = flags.output_of("table", "wide", "json")
    target = parse(resource, KINDS)
    selector = checked_selector(flags)
    refuse_name_everywhere(flags, target)
    mesh = target_of(flags, json=output == "json")
    namespace = flags.namespace or mesh.default_namespace
    body = {
        "to": to_object(to, to_namespace, namespace),
        "method": method,
        "path": path,
        "authority": authority,
        "scheme": scheme,
        "max_rps": max_rps,
        "headers": output == "json",
        **({"selector": selector} if selector else {}),
    }
    try:
        for event in mesh.views.tap(_object(target, namespace_of(flags, mesh) or ""), body):
            if notice := event.get("notice"):
                sys.stderr.write(f"warning: {escape(notice['pod'])}: {escape(notice['message'])}\n")
            else:
                write(json_line(event) if output == "json" else line_of(event, wide=output == "wide") + "\n")
    except KeyboardInterrupt:
        return


def refuse_name_everywhere(flags: Globals, target: Resource) -> None:
    """As in kubectl: one name is not looked for in all namespaces. Raises a usage error."""
    if flags.all_namespaces and target.name:
        raise click.UsageError(f"a resource cannot be named across all namespaces: leave out {target.name}, or -A")


def to_object(to: str | None, to_namespace: str | None, namespace: str) -> dict[str, str] | None:
    """What `--to` and `--to-namespace` mean to viz; None: neither was given."""
    if to is None and to_namespace is None:
        return None
    namespace = to_namespace or namespace
    return _object(Resource("namespace", namespace) if to is None else parse([to], KINDS), namespace)


def _object(resource: Resource, namespace: str) -> dict[str, str]:
    return {"kind": resource.kind, "name": resource.name, "namespace": namespace}


def line_of(event: Mapping[str, Any], *, wide: bool = False) -> str:
    """One event as its line, without the line end."""
    flow = _flow(event)
    labels = _labels(event) if wide else ""
    if init := event.get("requestInitEvent"):
        method, authority, path = (_field(init[name]) for name in ("method", "authority", "path"))
        return f"req id={_id(init)} {flow} :method={method} :authority={authority} :path={path}{labels}"
    if init := event.get("responseInitEvent"):
        latency = _micros(init["sinceRequestInit"])
        return f"rsp id={_id(init)} {flow} :status={init['httpStatus']} latency={latency}µs{labels}"
    if end := event.get("responseEndEvent"):
        rest = f"duration={_micros(end['sinceResponseInit'])}µs response-length={end['responseBytes']}B{labels}"
        if end.get("grpcStatusCode") is not None:
            return f"end id={_id(end)} {flow} grpc-status={_grpc(end['grpcStatusCode'])} {rest}"
        if "resetErrorCode" in end:
            return f"end id={_id(end)} {flow} reset-error={end['resetErrorCode']} {rest}"
        return f"end id={_id(end)} {flow} {rest}"
    return f"unknown {flow}"


def _flow(event: Mapping[str, Any]) -> str:
    source, destination = event["source"], event["destination"]
    direction, tls = {
        "INBOUND": ("in ", source["metadata"].get("tls", "")),
        "OUTBOUND": ("out", destination["metadata"].get("tls", "")),
    }.get(event["proxyDirection"], ("???", ""))
    return f"proxy={direction} src={_address(source)} dst={_address(destination)} tls={_field(tls)}"


def _address(end: Mapping[str, Any]) -> str:
    ip = end["ip"]
    return f"[{ip}]:{end['port']}" if ":" in ip else f"{ip}:{end['port']}"


def _id(event: Mapping[str, Any]) -> str:
    return f"{event['id']['base']}:{event['id']['stream']}"


def _micros(duration: Mapping[str, int]) -> int:
    return duration["nanos"] // 1000


def _grpc(code: int) -> str:
    return GRPC_CODES[code] if code < len(GRPC_CODES) else f"Code({code})"


def _field(text: str) -> str:
    return escape(text).replace(" ", "\\x20")


def _labels(event: Mapping[str, Any]) -> str:
    """` src_…`, ` dst_…` and ` rt_…` for each label, sorted within each."""
    parts = (
        ("src", event["source"]["metadata"]),
        ("dst", event["destination"]["metadata"]),
        ("rt", event.get("routeMeta") or {}),
    )
    return "".join(f" {prefix}_{_field(k)}={_field(v)}" for prefix, labels in parts for k, v in sorted(labels.items()))
