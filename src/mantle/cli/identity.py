"""`mantle identity POD|deploy/NAME`: the certificate a workload uses now, as its proxy shows it to every peer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import click

from mantle.cli.live_certificate import LiveCertificate, fetch
from mantle.cli.main import Globals, mesh_command
from mantle.cli.output import Failure, escape, json_text, write
from mantle.cli.resource import Resource, parse
from mantle.core.views import WORKLOADS

KINDS = (*WORKLOADS, "namespace", "pod")


@mesh_command()
@click.argument("resource", nargs=-1, required=True, metavar="POD|KIND/NAME")
@click.option("--pem", is_flag=True, help="Only the certificates, in PEM.")
def command(flags: Globals, resource: tuple[str, ...], pem: bool) -> None:
    """Show the certificate that a workload uses now.

    \b
    mantle identity web-6f5d-x2x7q      one pod
    mantle identity deploy/web          every pod of a deployment
    """
    output = flags.output_of("table", "json")
    one_word = len(resource) == 1 and "/" not in resource[0]
    target = Resource("pod", resource[0]) if one_word else parse(resource, KINDS)
    from mantle.cli.machine_client import MachineClient

    client = MachineClient(flags.mesh)
    namespace = flags.namespace or "default"
    pods = choose(client.get("/v1/status")["pods"], target, namespace)
    directory = client.socket_path.parent
    shown = [(pod["name"], fetch(directory, pod["uid"], f"{pod['namespace']}/{pod['name']}")) for pod in pods]
    if pem:
        write("".join(certificate.pem for _, certificate in shown))
    elif output == "json":
        write(json_text([object_of(name, certificate) for name, certificate in shown]))
    else:
        now = datetime.now(UTC)
        write("".join(page(name, number, len(shown), c, now) for number, (name, c) in enumerate(shown, 1)))


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
