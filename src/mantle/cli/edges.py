"""`mantle edges KIND`: who talks to whom, with the identities both proved, or the reason why not encrypted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from mantle.cli.duration import seconds_of
from mantle.cli.main import Globals, mesh_command
from mantle.cli.output import json_text, left_table, write
from mantle.cli.resource import checked_selector, parse
from mantle.cli.target import namespace_of, target
from mantle.core.views import WORKLOADS

KINDS = (*WORKLOADS, "namespace", "pod")
SECURED = "secured"


@mesh_command(selects="Al")
@click.argument("kind", nargs=-1, required=True, metavar="KIND")
@click.option("-t", "--time-window", default="5m", show_default=True, help="How far back, from 15s to 15m.")
def command(flags: Globals, kind: tuple[str, ...], time_window: str) -> None:
    """Show who talks to whom, with both identities, or why not encrypted.

    An edge is shown if either end is in the namespace. MSG is - where every connection and request in the window was
    mutual TLS, else the reasons, with counts where they are mixed.
    """
    output = flags.output_of("table", "wide", "json")
    resource = parse(kind, KINDS)
    if resource.name:
        raise click.UsageError(
            f"edges cannot be returned for a specific resource name; remove {resource.name} from the query"
        )
    query: dict[str, str | int] = {"resource": resource.kind, "window": seconds_of(time_window)}
    query |= {"selector": selector} if (selector := checked_selector(flags)) else {}
    mesh = target(flags, json=output == "json")
    rows = mesh.views.get("edges", namespace_of(flags, mesh), **query)["edges"]
    write(json_text(rows) if output == "json" else table(rows, wide=output == "wide", namespaces=flags.all_namespaces))


def table(rows: Sequence[Mapping[str, Any]], *, wide: bool = False, namespaces: bool = False) -> str:
    """The columns of the model system, or `No edges found.`; `namespaces` and `wide` add columns."""
    if not rows:
        return "No edges found.\n"
    header = ["SRC", "DST", "CLIENT", "SERVER", "MSG"]
    if namespaces or wide:
        header[2:2] = ["SRC_NS", "DST_NS"]
    if wide:
        header[-1:] = ["PROTOCOL", "OPEN", "SECURED", "MSG"]
    return left_table(header, [_cells(row, wide, namespaces or wide) for row in rows])


def _cells(row: Mapping[str, Any], wide: bool, namespaces: bool) -> list[str]:
    cells = [row["src"], row["dst"]]
    if namespaces:
        cells += [row["src_namespace"] or "-", row["dst_namespace"] or "-"]
    cells += [short_identities(row["client_id"]), short_identities(row["server_id"])]
    if wide:
        total = sum(row["counts"].values())
        cells += [row["protocol"], str(row["open"]), f"{row['counts'].get(SECURED, 0)}/{total}"]
    return [*cells, message(row)]


def message(row: Mapping[str, Any]) -> str:
    """`-` if all was mutual TLS; one reason alone as it is; several, or one beside secured traffic, with counts."""
    counts: dict[str, int] = dict(row["counts"])
    reasons: list[str] = [reason for reason in row["no_tls_reason"].split(",") if reason]
    if not reasons:
        return "-"
    if len(reasons) == 1 and SECURED not in counts:
        return reasons[0]
    order = [*reasons, *([SECURED] if SECURED in counts else [])]
    return ", ".join(f"{word} ({counts.get(word, 0)})" for word in order)


def short_identities(identities: str) -> str:
    """`service-account.namespace` of each identity (`owner.kind.namespace` in the experimental mode), `-` for none."""
    forms = (".serviceaccount.identity.", ".optional.")
    names = (next((name.partition(f)[0] for f in forms if f in name), name) for name in identities.split(",") if name)
    return ",".join(names) or "-"
