"""`mantle identity POD…|deploy/NAME`: the certificate a workload uses now, as its proxy shows it to every peer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import click

from mantle.cli.live_certificate import LiveCertificate, fetch
from mantle.cli.live_certificate import parse as certificate_of
from mantle.cli.main import Globals, mesh_command
from mantle.cli.output import Failure, Problem, escape, json_text, write
from mantle.cli.resource import KINDS as ALL_KINDS
from mantle.cli.resource import Resource, checked_selector, parse
from mantle.cli.target import Machine, Target, namespace_of
from mantle.cli.target import target as target_of
from mantle.core.views import WORKLOADS

KINDS = (*WORKLOADS, "namespace", "pod")


@mesh_command(selects="Al")
@click.argument("resource", nargs=-1, metavar="POD|KIND[/NAME]…")
@click.option("--pem", is_flag=True, help="Only the certificates, in PEM.")
def command(flags: Globals, resource: tuple[str, ...], pem: bool) -> None:
    """Show the certificate that a workload uses now.

    \b
    mantle identity web-6f5d-x2x7q      one pod, or several
    mantle identity deploy/web          every pod of a deployment
    mantle identity -l app=web          every pod with this label
    """
    output = flags.output_of("table", "json")
    if not resource and not (flags.selector or flags.all_namespaces):
        raise click.UsageError("name a pod or a workload, or select pods with -l")
    targets, selector = meant(resource), checked_selector(flags)
    mesh = target_of(flags, json=output == "json")
    shown: list[tuple[str, LiveCertificate]] = []
    problems: list[Problem] = []
    for target in targets:
        try:
            if isinstance(mesh, Machine) and not (selector or flags.all_namespaces):
                shown += _on_machine(mesh, target, flags.namespace or mesh.default_namespace)
            else:
                shown += _by_viz(mesh, target, namespace_of(flags, mesh), selector)
        except Failure as failure:
            problems += failure.problems
    if pem:
        write("".join(certificate.pem for _, certificate in shown))
    elif output == "json" and (shown or not problems):
        write(json_text([object_of(name, certificate) for name, certificate in shown]))
    elif output == "table":
        now = datetime.now(UTC)
        write("".join(page(name, number, len(shown), c, now) for number, (name, c) in enumerate(shown, 1)))
    if problems:
        raise Failure.of(problems)


def meant(words: Sequence[str]) -> list[Resource]:
    """What the words name: pods by their names alone, `KIND/NAME` each, or `KIND NAME`; no word: every pod. Raises
    `click.UsageError`.
    """
    if not words:
        return [Resource("pod")]
    kinds = [word for word in words if "/" not in word and word.partition(".")[0].lower() in ALL_KINDS]
    if kinds and len(words) <= 2:
        return [parse(words, KINDS)]
    return [parse([word], KINDS) if "/" in word or word in kinds else Resource("pod", word) for word in words]


def _on_machine(mesh: Machine, target: Resource, namespace: str) -> list[tuple[str, LiveCertificate]]:
    """Asked of the proxies themselves, which works without a control plane."""
    pods = choose(mesh.client.get("/v1/status")["pods"], target, namespace)
    directory = mesh.client.socket_path.parent
    return [(pod["name"], fetch(directory, pod["uid"], f"{pod['namespace']}/{pod['name']}")) for pod in pods]


def _by_viz(mesh: Target, target: Resource, namespace: str | None, selector: str) -> list[tuple[str, LiveCertificate]]:
    """Asked of viz, whose own proxy ends the TLS of the others."""
    import ssl

    query: dict[str, str | int] = {"resource": target.kind, "name": target.name}
    if target.kind == "namespace":
        namespace, query["name"] = target.name or namespace, ""
    query |= {"selector": selector} if selector else {}
    rows = mesh.views.get("certificates", namespace, **query)["certificates"]
    if wrong := [row for row in rows if "error" in row]:
        fix = "it may still wait for its first one: see the log of its container mantle-proxy"
        raise Failure.of([Problem(f"{row['namespace']}/{row['pod']}: {row['error']}", fix) for row in wrong])
    return [(row["pod"], certificate_of(ssl.PEM_cert_to_DER_cert(row["pem"]))) for row in rows]


def choose(pods: Sequence[Mapping[str, Any]], target: Resource, namespace: str) -> list[Mapping[str, Any]]:
    """The pods that are meant, by name. Raises `Failure` if there is none, with the namespaces where one would be."""
    where = target.name if target.kind == "namespace" else namespace
    found = [pod for pod in pods if pod["namespace"] == where and _is_meant(pod, target)]
    if found:
        return sorted(found, key=lambda pod: str(pod["name"]))
    elsewhere = sorted({pod["namespace"] for pod in pods if _is_meant(pod, target)} - {where})
    what = " ".join(word for word in (target.kind, target.name) if word)
    raise Failure(
        f"there is no {what} in namespace {where}" + ("" if target.kind == "pod" else " that has a pod"),
        fix=f"it is in {', '.join(elsewhere)}: use -n" if elsewhere else "`mantle ps -A` shows the pods there are",
    )


def _is_meant(pod: Mapping[str, Any], target: Resource) -> bool:
    match target.kind:
        case "namespace":
            return True
        case "pod":
            return target.name in ("", pod["name"])
        case kind:
            owner = pod["owner"]
            return owner["kind"].lower() == kind and target.name in ("", owner["name"])


def page(pod: str, number: int, count: int, certificate: LiveCertificate, now: datetime) -> str:
    """One certificate for people, in the order of `openssl x509 -text`."""
    names = ", ".join([f"DNS:{n}" for n in certificate.dns_names] + [f"URI:{uri}" for uri in certificate.uris])
    left = certificate.not_after - now
    state = f"expires in {_span(left.total_seconds())}" if left.total_seconds() > 0 else "EXPIRED"
    lines = [
        "Certificate:",
        f"    Serial Number: {_hex(certificate.serial)}",
        f"    Signature Algorithm: {certificate.signature}",
        f"    Issuer: {certificate.issuer}",
        "    Validity",
        f"        Not Before: {_time(certificate.not_before)}",
        f"        Not After : {_time(certificate.not_after)} ({state})",
        f"    Subject: {certificate.subject}",
        f"    Subject Public Key: {certificate.key}",
        f"    Extended Key Usage: {', '.join(certificate.usages) or '-'}",
        f"    Subject Alternative Name: {names or '-'}",
        f"    SPIFFE ID: {certificate.spiffe_id or '-'}",
    ]
    return f"\nPOD {escape(pod)} ({number} of {count})\n\n" + "\n".join(map(escape, lines)) + "\n"


def object_of(pod: str, certificate: LiveCertificate) -> dict[str, Any]:
    return {
        "pod": pod,
        "subject": certificate.subject,
        "issuer": certificate.issuer,
        "serial": _hex(certificate.serial),
        "not_before": _time(certificate.not_before),
        "not_after": _time(certificate.not_after),
        "dns_names": list(certificate.dns_names),
        "uris": list(certificate.uris),
        "spiffe_id": certificate.spiffe_id,
        "public_key": certificate.key,
        "signature_algorithm": certificate.signature,
        "extended_key_usage": list(certificate.usages),
        "pem": certificate.pem,
    }


def _hex(serial: int) -> str:
    text = f"{serial:x}"
    text = text.zfill(len(text) + len(text) % 2)
    return ":".join(text[i : i + 2] for i in range(0, len(text), 2))


def _time(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


def _span(seconds: float) -> str:
    """The two biggest units of a span: `23h 59m`."""
    whole = int(seconds)
    units = (("d", whole // 86400), ("h", whole // 3600 % 24), ("m", whole // 60 % 60), ("s", whole % 60))
    first = next((i for i, (_, n) in enumerate(units) if n), len(units) - 1)
    return " ".join(f"{n}{unit}" for unit, n in units[first : first + 2])
