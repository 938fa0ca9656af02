"""`mantle diagnostics`: what the control plane tells proxies, and what proxies say of themselves, as they say it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import click

from mantle.cli.main import Globals, MeshSubgroup, mesh_command
from mantle.cli.output import Failure, Problem, escape, json_text, left_table, write
from mantle.cli.resource import Resource, checked_selector, parse
from mantle.cli.target import namespace_of, target
from mantle.core.views import WORKLOADS

PODS = (*WORKLOADS, "namespace", "pod")


@click.group(cls=MeshSubgroup)
def command() -> None:
    """Look at what proxies are told, and at what they measure."""


@mesh_command("endpoints")
@click.argument("authorities", nargs=-1, required=True, metavar="NAME[.NAMESPACE]:PORT…")
def endpoints(flags: Globals, authorities: tuple[str, ...]) -> None:
    """Where a service's connections go, as the control plane tells its clients.

    \b
    mantle diagnostics endpoints web-svc.emojivoto:80 emoji-svc.emojivoto.svc.cluster.local:8080
    mantle diagnostics endpoints web-svc:80 -n emojivoto
    """
    output = flags.output_of("table", "wide", "json")
    parsed = [_authority(text) for text in authorities]
    mesh = target(flags, json=output == "json")
    default = flags.namespace or mesh.default_namespace
    found: list[Any] = []
    problems: list[Problem] = []
    for name, namespace, rest in parsed:
        authority = f"{name}.{namespace or default}{rest}"
        try:
            found.append(mesh.views.get("endpoints", namespace or default, authority=authority))
        except Failure as error:
            problems += error.problems
    if output == "json":
        write(json_text([endpoint for answer in found for endpoint in answer["endpoints"]]))
    elif found:
        write(endpoints_table([e for answer in found for e in answer["endpoints"]], wide=output == "wide"))
    if problems:
        raise Failure.of(problems)


def _authority(text: str) -> tuple[str, str, str]:
    """The service's name, its namespace (empty: that of -n), and what follows. Raises `click.UsageError`."""
    host, colon, port = text.rpartition(":")
    name, *more = host.split(".", 2)
    if not colon or not name or "" in more or not port.isdecimal():
        raise click.UsageError(f"{text}: write NAME.NAMESPACE:PORT, such as web-svc.emojivoto:80")
    return name, more[0] if more else "", (f".{more[1]}" if len(more) > 1 else "") + f":{port}"


def endpoints_table(rows: Sequence[Mapping[str, Any]], *, wide: bool = False) -> str:
    """The columns of the model system; `wide` adds who must be there, and how it is reached."""
    if not rows:
        return "No endpoints found.\n"
    header = ["NAMESPACE", "IP", "PORT", "POD", "SERVICE", *(["IDENTITY", "TRANSPORT"] if wide else [])]
    return left_table(header, [_endpoint(row, wide) for row in rows])


def _endpoint(row: Mapping[str, Any], wide: bool) -> list[str]:
    cells = [row["namespace"], row["ip"], str(row["port"]), row["pod"] or "-", row["service"]]
    if wide:
        port = row["opaque_transport_port"]
        how = "plaintext" if not row["identity"] else f"link to {port}" if port else "TLS"
        cells += [(row["identity"] or "-").partition(".serviceaccount.identity.")[0], how]
    return cells


@mesh_command("policy", selects="Al")
@click.argument("resource", nargs=-1, required=True, metavar="KIND/NAME PORT")
def policy(flags: Globals, resource: tuple[str, ...]) -> None:
    """Who may connect to a port, or how clients reach a service, as the control plane tells proxies.

    \b
    mantle diagnostics policy -n emojivoto deploy/web 8080     of each pod: who may connect
    mantle diagnostics policy -n emojivoto svc/web-svc 80      of a service: how clients reach it
    """
    output = flags.output_of("yaml", "json")
    *words, port = resource
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise click.UsageError(f"{port}: end with a port from 1 to 65535")
    what = parse(words, (*PODS, "service"))
    if what.kind == "service" and not what.name:
        raise click.UsageError("name one service: svc/NAME PORT")
    answer = _asked(flags, "policies", what, json=output == "json", port=int(port))
    if "pods" in answer:
        answer = _by_pod(answer["pods"], "inbound")
    if output == "json":
        write(json_text(answer))
        return
    from io import StringIO

    from ruamel.yaml import YAML

    text = StringIO()
    YAML(typ="safe", pure=True).dump(answer, text)
    write(escape(text.getvalue(), keep="\n"))


@mesh_command("proxy-metrics", selects="Al")
@click.argument("resource", nargs=-1, required=True, metavar="KIND[/NAME]")
def proxy_metrics(flags: Globals, resource: tuple[str, ...]) -> None:
    """What the proxies of pods measure, as Prometheus reads it."""
    output = flags.output_of("table", "json")
    answer = _asked(flags, "proxymetrics", parse(resource, PODS), json=output == "json")
    pods = answer["pods"]
    if output == "json":
        write(json_text(_by_pod(pods, "text")))
        return
    for number, pod in enumerate(pods, 1):
        head = f"#\n# POD {escape(pod['pod'])} ({number} of {len(pods)})\n#\n"
        write(head + escape(pod.get("text", f"# {pod.get('error', '')}\n"), keep="\n\t"))
    if problems := _problems(pods):
        raise Failure.of(problems)


@mesh_command("controller-metrics")
def controller_metrics(flags: Globals) -> None:
    """What the programs of the control plane measure, as Prometheus reads it.

    On a cluster -n names the control plane's namespace; the programs are asked through the API server (`get` on
    pods/proxy there).
    """
    from mantle.cli import controller_metrics as metrics
    from mantle.cli.target import Cluster

    output = flags.output_of("table", "json")
    mesh = target(flags, json=output == "json")
    if isinstance(mesh, Cluster):
        from mantle.cli.cluster_facts import control_namespaces
        from mantle.cli.upgrade import the_one

        namespace = flags.namespace or the_one(control_namespaces(mesh.client))
        measured = list(metrics.of_cluster(mesh.client, namespace))
        if not measured:
            raise Failure(f"no control plane runs in namespace {namespace}", "name its namespace with -n")
    else:
        measured = list(metrics.of_machine(mesh.client))
    if output == "json":
        write(json_text(metrics.as_json(measured)))
    else:
        for number, one in enumerate(measured, 1):
            head = f"#\n# POD {escape(one.pod)} ({number} of {len(measured)})\n# CONTAINER {escape(one.container)}\n#\n"
            write(head + (f"# {escape(one.problem)}\n" if one.problem else escape(one.text, keep="\n\t")))
    if problems := [Problem(f"{m.namespace}/{m.pod}: {m.problem}", m.fix) for m in measured if m.problem]:
        raise Failure.of(problems)


def _asked(flags: Globals, view: str, what: Resource, *, json: bool, **query: int) -> Any:
    """The answer of a view of pods for the resource that was named."""
    fields: dict[str, str | int] = {"resource": what.kind, "name": what.name, **query}
    fields |= {"selector": selector} if (selector := checked_selector(flags)) else {}
    mesh = target(flags, json=json)
    namespace = namespace_of(flags, mesh)
    if what.kind == "namespace":
        namespace, fields["name"] = what.name or namespace, ""
    return mesh.views.get(view, namespace, **fields)


def _by_pod(pods: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any]:
    return {f"{pod['namespace']}/{pod['pod']}": pod.get(key, {"error": pod.get("error")}) for pod in pods}


def _hidden(meant: click.Command) -> click.Command:
    """The same command, not listed in the help: for an alias."""
    alias = copy.copy(meant)
    alias.hidden = True
    return alias


def _problems(pods: Sequence[Mapping[str, Any]]) -> list[Problem]:
    return [
        Problem(f"{pod['namespace']}/{pod['pod']}: {pod['error']}", "see the log of its container mantle-proxy")
        for pod in pods
        if "error" in pod
    ]


for subcommand in (endpoints, policy, proxy_metrics, controller_metrics):
    command.add_command(subcommand)
for alias, meant in (("ep", endpoints), ("cp-metrics", controller_metrics)):
    command.add_command(_hidden(meant), alias)
