"""Which mesh a command means, on this machine or on a cluster, and one way to ask the views of either.

The order: `--mesh` is a mesh of this machine; `--context`, `--kubeconfig` and `--as` are a cluster; else the mesh that
runs on this machine; else the cluster of the current kubeconfig. What was found is said on standard error, but not
where `-o json` asks for output that programs read. Commands know a `Target` and its views, and nothing of where it is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from mantle.cli.main import Globals
from mantle.cli.output import Failure, escape

if TYPE_CHECKING:
    from mantle.cli.kube_client import KubeClient
    from mantle.cli.kubeconfig import Access
    from mantle.cli.machine_client import MachineClient


class Views(Protocol):
    """What viz answers. `namespace` None: all of them."""

    def get(self, view: str, namespace: str | None, **query: str | int) -> Any:
        """The object of one view (`edges`, `stat`, `summary`, …). Raises `Failure`."""
        ...

    def tap(self, target: Mapping[str, str], body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of `target` (kind, name, namespace; empty: all) as they happen. Raises `Failure`."""
        ...


@dataclass(frozen=True, slots=True)
class Machine:
    """A mesh of this machine."""

    client: MachineClient
    views: Views

    default_namespace = "default"

    def __str__(self) -> str:
        return f"mesh {self.client.mesh} on this machine"


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster, as the user that the kubeconfig and `--as` say."""

    client: KubeClient
    views: Views

    @property
    def default_namespace(self) -> str:
        return self.client.access.namespace

    def __str__(self) -> str:
        access = self.client.access
        acting = f", as {access.acting_as.user}" if access.acting_as.user else ""
        return f"cluster {access.server} (context {access.context}{acting})"


Target = Machine | Cluster


def target(flags: Globals, *, json: bool) -> Target:
    """The mesh that the flags mean, said on standard error unless `json`. Raises a usage error or `Failure`."""
    found = _target(flags)
    if not json:
        sys.stderr.write(f"{escape(str(found))}\n")
    return found


def _target(flags: Globals) -> Target:
    named = None if flags.mesh_from_environment and flags.cluster_flags else flags.mesh
    refuse_contradictions(flags)
    if named is not None:
        return machine(named)
    if flags.cluster_flags:
        return cluster(flags)
    from mantle.cli.machine_client import running_meshes, state_root

    if running_meshes(state_root()):
        return machine(None)
    access = access_of(flags)
    if access is None:
        raise Failure(
            "no mesh is running on this machine, and no kubeconfig names a cluster",
            fix="start one with `mantle demo` or `mantle up FILE`, or choose a cluster with --context or --kubeconfig",
        )
    return _cluster(access)


def refuse_contradictions(flags: Globals) -> None:
    """Raises a usage error for flags that cannot both be meant."""
    if flags.mesh is not None and flags.cluster_flags and not flags.mesh_from_environment:
        raise click.UsageError(
            f"--mesh is a mesh of this machine and {flags.cluster_flags[0]} a cluster: leave one of them out"
        )
    if flags.as_groups and flags.as_user is None:
        raise click.UsageError("--as-group needs --as USER: groups are asked for together with a user")


def machine(mesh: str | None) -> Machine:
    """The mesh of that name on this machine; None: the only one."""
    from mantle.cli.machine_client import MachineClient

    client = MachineClient(mesh)
    return Machine(client, _MachineViews(client))


def cluster(flags: Globals) -> Cluster:
    """The cluster that the flags and the kubeconfig mean. Raises `Failure` if there is none."""
    refuse_contradictions(flags)
    access = access_of(flags)
    if access is None:
        raise Failure("no kubeconfig names a cluster", fix="choose a file with --kubeconfig, or set $KUBECONFIG")
    return _cluster(access)


def access_of(flags: Globals) -> Access | None:
    """How to reach the cluster that the flags mean; None if nothing names one."""
    from mantle.cli.kubeconfig import Impersonation, load

    acting_as = Impersonation(flags.as_user, flags.as_groups) if flags.as_user is not None else None
    return load(flags.kubeconfig, flags.context, os.environ, Path.home(), acting_as)


def _cluster(access: Access) -> Cluster:
    from mantle.cli.cluster_views import ClusterViews
    from mantle.cli.kube_client import KubeClient

    client = KubeClient(access)
    return Cluster(client, ClusterViews(client))


def namespace_of(flags: Globals, found: Target) -> str | None:
    """The namespace that is meant; None: all of them."""
    return None if flags.all_namespaces else flags.namespace or found.default_namespace


class _MachineViews:
    def __init__(self, client: MachineClient) -> None:
        self._client = client

    def get(self, view: str, namespace: str | None, **query: str | int) -> Any:
        where: dict[str, str | int] = {"all": 1} if namespace is None else {"namespace": namespace}
        return self._client.get(f"/v1/viz/{view}", **query, **where)

    def tap(self, target: Mapping[str, str], body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        named = {**target, **({} if target["namespace"] else {"all": True})}
        return self._client.stream("/v1/viz/tap", {**body, "target": named})
