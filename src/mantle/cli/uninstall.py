"""`mantle uninstall`: prints everything that an install left in a cluster, for `kubectl delete -f -`.

With a cluster it prints what is there, found by label, whatever values it was installed with; with --offline what any
install could have made. Pods that still have a proxy are named on standard error. A namespace that holds workloads of
somebody else's is not in the output: deleting it would delete them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mantle.cli.install import cluster_client, print_objects, say
from mantle.cli.main import Globals, mesh_command
from mantle.cli.output import Failure

if TYPE_CHECKING:
    from mantle.cli.kube_client import KubeClient


@mesh_command()
@click.option("--offline", is_flag=True, help="Ask no cluster: print what any install could have made.")
def command(flags: Globals, offline: bool) -> None:
    """Print everything of Mantle's in a cluster: `mantle uninstall | kubectl delete -f -`."""
    from mantle.manifests import inventory

    output = flags.output_of("yaml", "json")
    client = None if offline else cluster_client(flags)
    if client is None:
        say(["no cluster was asked: this is what any install could have made; use kubectl delete --ignore-not-found"])
        print_objects(inventory.possible(flags.namespace or "mantle"), output)
        return

    from mantle.cli.cluster_facts import control_namespaces
    from mantle.cli.upgrade import the_one

    namespace = flags.namespace or the_one(control_namespaces(client))
    query = inventory.selector(namespace)
    found = [
        (kind.kind, item["metadata"].get("namespace", ""), item["metadata"]["name"])
        for kind in inventory.KINDS
        for item in _items(client, kind.path, query)
    ]
    if not found:
        raise Failure(f"nothing of Mantle's is installed in namespace {namespace}", "name its namespace with -n")
    say(inventory.still_meshed(_items(client, "/api/v1/pods", query), namespace))
    around = ("Namespace", "", namespace)
    there = [(kind, item) for kind in inventory.WORKLOADS for item in _items(client, kind.path_in(namespace), None)]
    if around in found and (theirs := inventory.others(there, namespace)):
        found.remove(around)
        secrets = _items(client, f"/api/v1/namespaces/{namespace}/secrets", None)
        names = {item["metadata"]["name"] for item in secrets}
        found += [("Secret", namespace, name) for name in inventory.MADE_THERE if name in names]
        say([inventory.staying(theirs, namespace)])
    print_objects(inventory.in_order(found), output)


def _items(client: KubeClient, path: str, query: Any) -> list[Any]:
    from mantle.cli.cluster_facts import get

    return list((get(client, path, query) or {}).get("items", []))
