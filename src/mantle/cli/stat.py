"""`mantle stat KIND[/NAME]`: success, request rate, latency and the share of TLS of a recent window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from mantle.cli.duration import seconds_of
from mantle.cli.main import Globals, mesh_command
from mantle.cli.output import json_text, right_table, write
from mantle.cli.resource import SHORT, Resource, checked_selector, kind_of, parse
from mantle.cli.target import target as target_of
from mantle.core.views import WORKLOADS

KINDS = ("authority", *WORKLOADS, "namespace", "pod", "service")
ALL = "all"
MIN_WINDOW_SECONDS = 15


@mesh_command(selects="Al")
@click.argument("resource", nargs=-1, required=True, metavar="KIND[/NAME]")
@click.option("-t", "--time-window", default="1m", show_default=True, help="How far back, from 15s to 15m.")
@click.option("--to", metavar="KIND/NAME", help="Only what the resources send to this one.")
@click.option("--to-namespace", metavar="NAME", help="Namespace of --to (default: that of the resource).")
@click.option("--from", "from_", metavar="KIND/NAME", help="Only what this one sends to the resources.")
@click.option("--from-namespace", metavar="NAME", help="Namespace of --from (default: that of the resource).")
@click.option("--unmeshed", is_flag=True, help="Also workloads without a pod in the mesh.")
def command(
    flags: Globals,
    resource: tuple[str, ...],
    time_window: str,
    to: str | None,
    to_namespace: str | None,
    from_: str | None,
    from_namespace: str | None,
    unmeshed: bool,
) -> None:
    """Show success rate, request rate, latency and share of TLS.

    Of workloads, pods and namespaces it counts what came in; of services and authorities what the pods of the namespace
    sent there. `all` is every kind but namespaces, with a table for each.
    """
    output = flags.output_of("table", "wide", "json")
    target = Resource(ALL) if resource == (ALL,) else parse(resource, KINDS)
    window = seconds_of(time_window)
    if window < MIN_WINDOW_SECONDS:
        raise click.UsageError("metrics time window needs to be at least 15s")
    if to and from_:
        raise click.UsageError("--to and --from exclude each other")
    query: dict[str, str | int] = {"resource": target.kind, "window": window, "name": target.name}
    query |= {"selector": selector} if (selector := checked_selector(flags)) else {}
    mesh = target_of(flags, json=output == "json")
    # Namespaces are not in a namespace: without -n, all of them are meant.
    all_namespaces = flags.all_namespaces or (target.kind == "namespace" and not flags.namespace)
    namespace = flags.namespace or mesh.default_namespace
    for flag, value, value_namespace in (("to", to, to_namespace), ("from", from_, from_namespace)):
        if value:
            kind, slash, name = value.partition("/")
            query |= {flag: kind_of(kind, KINDS) + slash + name, f"{flag}_namespace": value_namespace or namespace}
    rows = mesh.views.get("stat", None if all_namespaces else namespace, **query)["rows"]
    if not unmeshed:
        rows = [row for row in rows if row["meshed"] is None or not row["meshed"].startswith("0/")]
    column = all_namespaces and target.kind != "namespace"
    write(json_text(rows) if output == "json" else table(rows, wide=output == "wide", namespaces=column))


def table(rows: Sequence[Mapping[str, Any]], *, wide: bool = False, namespaces: bool = False) -> str:
    """The columns of the model system, or `No traffic found.` Rows of several kinds are a table for each, with names
    that say the kind.
    """
    if not rows:
        return "No traffic found.\n"
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    if len(kinds) > 1:
        named = [{**row, "name": f"{SHORT[row['kind']]}/{row['name']}"} for row in rows]
        tables = ([row for row in named if row["kind"] == kind] for kind in kinds)
        return "\n".join(table(rows, wide=wide, namespaces=namespaces) for rows in tables)
    status = rows[0]["kind"] == "pod"
    header = ["NAMESPACE"] * namespaces + ["NAME"] + ["STATUS"] * status
    header += ["MESHED", "SUCCESS", "RPS", "LATENCY_P50", "LATENCY_P95", "LATENCY_P99"]
    header += ["TCP_CONN", "READ_BYTES/SEC", "WRITE_BYTES/SEC"] * wide + ["TLS"]
    return right_table(header, [_cells(row, wide, namespaces, status) for row in rows], left=1 + namespaces)


def _cells(row: Mapping[str, Any], wide: bool, namespaces: bool, status: bool) -> list[str]:
    cells = [row["namespace"]] * namespaces + [row["name"]] + [row["status"] or "-"] * status
    cells += [row["meshed"] or "-", _percent(row["success"], 2), _with("{:.1f}rps", row["rps"])]
    cells += [_with("{}ms", row[f"latency_ms_p{percent}"]) for percent in (50, 95, 99)]
    if wide:
        cells += [
            _with("{}", row["tcp_open_connections"]),
            _with("{:.1f}B/s", row["tcp_read_bytes_rate"]),
            _with("{:.1f}B/s", row["tcp_write_bytes_rate"]),
        ]
    return [*cells, _percent(row["tls"], 0)]


def _percent(share: float | None, digits: int) -> str:
    """A share as a percentage. Anything short of all is never rounded up to 100%, nor anything above none to 0%."""
    if share is None:
        return "-"
    text = f"{share * 100:.{digits}f}"
    if share < 1 and float(text) == 100:
        text = f"{100 - 10.0**-digits:.{digits}f}"
    if share > 0 and float(text) == 0:
        text = f"{10.0**-digits:.{digits}f}"
    return f"{text}%"


def _with(form: str, value: float | None) -> str:
    return "-" if value is None else form.format(value)
