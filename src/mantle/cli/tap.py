"""`mantle tap RESOURCE`: requests as proxies see them, one line each as it happens, until Ctrl-C.

The lines are those of `linkerd tap`, to the byte. Everything a peer wrote (method, authority, path) is escaped, spaces
too, so that a line always has the fields it seems to have.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from mantle.cli.main import Globals, mesh_command
from mantle.cli.output import escape, json_line, write
from mantle.cli.tapped import tapped, which_requests

GRPC_CODES = (
    "OK", "Canceled", "Unknown", "InvalidArgument", "DeadlineExceeded", "NotFound", "AlreadyExists",
    "PermissionDenied", "ResourceExhausted", "FailedPrecondition", "Aborted", "OutOfRange", "Unimplemented",
    "Internal", "Unavailable", "DataLoss", "Unauthenticated",
)  # fmt: skip
"""Names of gRPC status codes by number, as Go prints them (https://pkg.go.dev/google.golang.org/grpc/codes)."""


@mesh_command(selects="Al")
@which_requests
def command(
    flags: Globals,
    resource: tuple[str, ...],
    to: str | None,
    to_namespace: str | None,
    **filters: Any,
) -> None:
    """Watch requests as they happen, with their TLS state.

    \b
    mantle tap deploy -n emojivoto              every deployment of the namespace
    mantle tap deploy/web --to deploy/emoji     what web asks of emoji
    mantle tap po/web-6f5d-x2x7q --path /api    one pod, one part of its paths
    """
    output = flags.output_of("table", "wide", "json")
    asked = {**filters, "headers": output == "json"}
    with contextlib.suppress(KeyboardInterrupt):  # how it ends
        for event in tapped(flags, resource, to, to_namespace, asked, json=output == "json"):
            write(json_line(event) if output == "json" else line_of(event, wide=output == "wide") + "\n")


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
