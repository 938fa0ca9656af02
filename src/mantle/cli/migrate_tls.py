"""`mantle migrate-tls`: moves workloads from the experimental mode to the default one, without a gap, on a cluster.

What moves and how is decided in `core/tls_migration.py`; this asks the cluster, changes it and waits. Stopped at any
moment, it takes the list of accepted identities away again, and may be run again: what has moved is left alone.
"""

from __future__ import annotations

import base64
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import click

from mantle.cli.duration import seconds_of
from mantle.cli.main import Globals, mesh_command
from mantle.cli.output import Failure, Problem, escape, write

if TYPE_CHECKING:
    from mantle.cli.kube_client import KubeClient
    from mantle.core.optional_names import Owner
    from mantle.core.tls_migration import Plan

STEP_SECONDS = 1.0
SELECTOR = "mantle.dev/tls=optional"


@mesh_command("migrate-tls", selects="A")
@click.option("--timeout", metavar="DURATION", default="30m", help="How long it may take; nothing is accepted longer.")
@click.option("--control-namespace", metavar="NAME", help="Where the mesh lives (default: where it is found).")
@click.option("--dry-run", is_flag=True, help="Say what would be moved, and change nothing.")
def command(flags: Globals, timeout: str, control_namespace: str | None, dry_run: bool) -> int:
    """Move workloads from the experimental mode to the default one, without a gap.

    \b
    mantle migrate-tls              every workload
    mantle migrate-tls -n NAMESPACE those of one namespace
    """
    from mantle.cli.cluster_facts import control_namespaces
    from mantle.cli.target import cluster
    from mantle.core import tls_migration

    target = cluster(flags)
    sys.stderr.write(f"{escape(str(target))}\n")
    client = target.client
    control = control_namespace or next(iter(control_namespaces(client)), "mantle")
    names = _names(client, control)
    namespace = None if flags.all_namespaces else flags.namespace
    plan = tls_migration.plan(tls_migration.owners_of(_pods(client, namespace)), names)
    for owner, advice in plan.by_hand.items():
        write(f"{owner}: {advice}\n")
    if not plan.move:
        write("nothing is left to move\n" if not plan.by_hand else "")
        return 1 if plan.left else 0
    write("".join(f"{owner} is to be moved\n" for owner in plan.move))
    if dry_run:
        return 0
    until = datetime.now(UTC) + timedelta(seconds=seconds_of(timeout))
    roots = _roots(client, plan.move)
    with _accepting(client, plan, roots, control):
        for owner in plan.move:
            body = tls_migration.patch(owner, tls_migration.stated(roots, until))
            _change(client, tls_migration.PATHS[owner.kind].format(owner.namespace, owner.name), body)
        left = _wait(client, namespace, [owner for owner in plan.move if owner.kind in tls_migration.ROLLS], until)
    if left:
        raise Failure.of([Problem(f"{owner} was not moved in time: {why}", fix) for owner, why, fix in left])
    write("moved: every workload is of the default mode\n")
    write("next: `mantle upgrade --tls=required | kubectl apply --prune …` removes the ca\n")
    return 1 if plan.left else 0


@contextmanager
def _accepting(client: KubeClient, plan: Plan, roots: bytes, control_namespace: str) -> Iterator[None]:
    """While it lasts, moving pods accept the identities being migrated."""
    from mantle.core.inject_optional import MIGRATION_CONFIG
    from mantle.core.tls_migration import listing

    made: list[str] = []
    try:
        for namespace in plan.namespaces:
            path = f"/api/v1/namespaces/{namespace}/configmaps"
            made.append(f"{path}/{MIGRATION_CONFIG}")
            _put(client, path, MIGRATION_CONFIG, listing(namespace, roots, plan.identities, control_namespace))
        yield
    finally:
        problems = [problem for path in made if (problem := _delete(client, path))]
        if problems:
            raise Failure.of(problems)


def _wait(
    client: KubeClient, namespace: str | None, owners: Sequence[Owner], until: datetime
) -> list[tuple[Owner, str, str]]:
    """Until each has only new pods, and the old ones, which go on speaking while they end, are gone. Those that have
    not, why, and what to do.
    """
    from mantle.core.tls_migration import PATHS, owners_of, stuck, unfinished

    waiting = dict.fromkeys(owners, "")
    fix = "`kubectl rollout status` shows more; run the command again"
    while waiting:
        left = []
        ending = owners_of(_pods(client, namespace))
        for owner in list(waiting):
            workload = client.get(PATHS[owner.kind].format(owner.namespace, owner.name))
            why = unfinished(owner, workload) or ("its last old pods are ending" if owner in ending else "")
            if not why:
                write(f"{owner} is moved\n")
                del waiting[owner]
            elif (never := stuck(workload)) or datetime.now(UTC) >= until:
                left.append((owner, never or why, never or fix))
        if left and (len(left) == len(waiting) or datetime.now(UTC) >= until):
            return left
        if waiting:
            time.sleep(STEP_SECONDS)
    return []


# ---- the cluster ----


def _names(client: KubeClient, control_namespace: str) -> Any:
    """The names of the mode in the installed mesh."""
    import json

    from mantle.cli.kube_client import Refused
    from mantle.core.inject_optional import names_of
    from mantle.manifests.config import CONFIG_MAP, VALUES_KEY, load

    try:
        config = client.get(f"/api/v1/namespaces/{control_namespace}/configmaps/{CONFIG_MAP}")
    except Refused as refused:
        raise Failure(
            f"the values of the installation cannot be read: {refused.answer.message}",
            fix="`mantle check` says what is wrong; --control-namespace names another namespace",
        ) from refused
    values = load(json.loads(config["data"][VALUES_KEY]))
    return names_of(values.control_namespace, values.trust_domain)


def _pods(client: KubeClient, namespace: str | None) -> Iterator[dict[str, Any]]:
    path = "/api/v1/pods" if namespace is None else f"/api/v1/namespaces/{namespace}/pods"
    query: dict[str, str | int] = {"labelSelector": SELECTOR, "limit": 500}
    while True:
        page = client.get(path, query)
        yield from page.get("items") or ()
        query["continue"] = page.get("metadata", {}).get("continue", "")
        if not query["continue"]:
            return


def _roots(client: KubeClient, owners: Sequence[Owner]) -> bytes:
    """The mode's roots, from the Secret of an owner: each has them."""
    from mantle.cli.kube_client import Refused

    why = ""
    for owner in owners:
        try:
            secret = client.get(f"/api/v1/namespaces/{owner.namespace}/secrets/{owner.secret}")
            return base64.b64decode(secret["data"]["ca.crt"])
        except Refused as refused:
            why = refused.answer.message
        except KeyError:
            why = f"Secret {owner.secret} has no ca.crt"
    raise Failure(
        f"the roots of the experimental mode cannot be read: {why}",
        fix="this needs `get secrets` there; `kubectl -n mantle logs deployment/mantle-ca -c ca` says what the ca does",
    )


def _put(client: KubeClient, path: str, name: str, body: dict[str, Any]) -> None:
    from mantle.cli.kube_client import Refused

    try:
        client.request("POST", path, None, body)
    except Refused as refused:
        if refused.answer.status != 409:
            raise _failure(f"ConfigMap {name}", refused.answer.message) from refused
        _change(client, f"{path}/{name}", {"data": body["data"]})


def _change(client: KubeClient, path: str, body: dict[str, Any]) -> None:
    from mantle.cli.kube_client import Refused

    try:
        client.request("PATCH", path, None, body)
    except Refused as refused:
        raise _failure(path, refused.answer.message) from refused


def _delete(client: KubeClient, path: str) -> Problem | None:
    from mantle.cli.kube_client import Refused

    try:
        client.request("DELETE", path)
    except (Refused, Failure) as error:
        if isinstance(error, Refused) and error.answer.status == 404:
            return None
        return Problem(f"{path} is still there: {error}", "delete it: until then, or its deadline, it is accepted")
    return None


def _failure(what: str, message: str) -> Failure:
    return Failure(f"{what} could not be changed: {message}", fix="nothing else is changed; run the command again")
