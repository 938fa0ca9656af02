"""`mantle install`, `upgrade`, `uninstall` with the real kubectl and API server: what is applied stays as it is,
what is obsolete goes, the CA survives, and nobody may read its key.
"""

import json
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from click.testing import CliRunner, Result

from mantle.cli.main import cli
from mantle.core import ca as ca_core
from mantle.core.names import MeshNames
from mantle.manifests.inventory import KINDS, PRUNE
from mantle.manifests.render import PART_OF

from .apiserver import ApiServer

NS = "mantle"
COMPONENTS = ("identity", "destination", "viz", "injector")
PLAIN_PRUNE = ("apply", "--prune", "-l", f"{PART_OF}=mantle", "-f", "-")
REDIRECT = ("mantle-init", "mantle-guard")
FULL_PRUNE = tuple(PRUNE.split()[1:])


def run(server: ApiServer, *args: str) -> Result:
    return CliRunner().invoke(cli, ["--kubeconfig", str(server.kubeconfig), *args])


def printed(server: ApiServer, *args: str) -> str:
    result = run(server, *args)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def remove(server: ApiServer) -> None:
    """Uninstalls, if there is something."""
    result = run(server, "uninstall")
    if result.exit_code == 0:
        server.kubectl("delete", "--ignore-not-found", "-f", "-", input=result.stdout)


@pytest.fixture(scope="module")
def installed(api_server: ApiServer) -> Iterator[ApiServer]:
    """A cluster with an installation that every test leaves as it is."""
    try:
        api_server.kubectl("apply", "-f", "-", input=printed(api_server, "install"))
        yield api_server
    finally:
        remove(api_server)


@pytest.fixture
def changed(installed: ApiServer) -> Iterator[ApiServer]:
    """The same installation, made whole again after a test that changes it; its trust must have survived the test."""
    before = ca(installed)
    try:
        yield installed
    finally:
        installed.kubectl(*FULL_PRUNE, input=printed(installed, "install"))
        assert ca(installed) == before, "a test changed the trust"


@pytest.fixture
def bare(api_server: ApiServer) -> Iterator[ApiServer]:
    """A cluster on which nothing is installed; what the test leaves is removed."""
    try:
        yield api_server
    finally:
        remove(api_server)
        api_server.kubectl("delete", "namespace", NS, "--ignore-not-found")


def data(server: ApiServer, kind: str, name: str) -> dict[str, str]:
    return json.loads(server.kubectl("-n", NS, "get", kind, name, "-o", "json")).get("data") or {}


def ca(server: ApiServer) -> tuple[dict[str, str], dict[str, str]]:
    return data(server, "secret", "mantle-identity-issuer"), data(server, "configmap", "mantle-identity-trust-roots")


def names(server: ApiServer, kind: str) -> list[str]:
    found = server.kubectl("get", kind, "-A", "-l", f"{PART_OF}=mantle", "-o", "name").split()
    return [name.partition("/")[2] for name in found]


# ---- nothing is installed yet ----


def test_a_namespace_with_another_meshs_control_plane_is_refused(bare: ApiServer):
    namespace = bare.new_namespace("linkerd")
    bare.kubectl("label", "namespace", namespace, "linkerd.io/is-control-plane=true")
    result = run(bare, "-n", namespace, "install")
    assert result.exit_code == 1 and result.stdout == ""
    assert f"namespace {namespace}: found Linkerd's control plane" in result.stderr


def test_nothing_to_upgrade_and_nothing_to_uninstall(bare: ApiServer):
    for command in ("upgrade", "uninstall"):
        result = run(bare, command)
        assert result.exit_code == 1
        assert "this cluster has no control plane" in result.stderr


def test_half_of_the_trust_is_refused_with_both_ways_out(bare: ApiServer):
    bare.kubectl("create", "namespace", NS)
    bare.kubectl("-n", NS, "create", "configmap", "mantle-identity-trust-roots", "--from-literal=ca-bundle.crt=x")
    result = run(bare, "install")
    assert result.exit_code == 1 and result.stdout == ""
    assert "no Secret mantle-identity-issuer" in result.stderr and "restore" in result.stderr


def test_uninstall_leaves_nothing_and_names_pods_that_are_still_meshed(bare: ApiServer):
    app = bare.new_namespace("app")
    pod = {"apiVersion": "v1", "kind": "Pod", "spec": {"containers": [{"name": "a", "image": "a:1"}]}}
    pod["metadata"] = {"name": "web-1", "namespace": app, "labels": {"mantle.dev/control-plane-ns": NS}}
    bare.kubectl("apply", "-f", "-", input=json.dumps(pod))

    bare.kubectl("apply", "-f", "-", input=printed(bare, "install"))
    result = run(bare, "uninstall")
    assert result.exit_code == 0
    assert f"1 pod still has a proxy: {app}/web-1" in result.stderr
    assert "PRIVATE KEY" not in result.stdout and "\ndata:" not in result.stdout
    bare.kubectl("delete", "-f", "-", input=result.stdout)
    kinds = ",".join(kind.plural for kind in KINDS)
    assert bare.kubectl("get", kinds, "-A", "-l", f"mantle.dev/control-plane-ns={NS}", "-o", "name") == ""
    bare.kubectl("-n", app, "delete", "pod", "web-1", "--grace-period=0", "--force")


def test_a_namespace_that_others_live_in_is_not_uninstalled_with_them(bare: ApiServer):
    shared = bare.new_namespace("shared")
    template = {"metadata": {"labels": {"app": "a"}}, "spec": {"containers": [{"name": "a", "image": "a:1"}]}}
    theirs = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "theirs", "namespace": shared}}
    theirs["spec"] = {"selector": {"matchLabels": {"app": "a"}}, "template": template}
    bare.kubectl("apply", "-f", "-", input=json.dumps(theirs))
    bare.kubectl("apply", "-f", "-", input=printed(bare, "-n", shared, "install"))
    bare.kubectl("-n", shared, "create", "secret", "generic", "mantle-viz-tls")
    result = run(bare, "uninstall")
    assert f"namespace {shared} stays, as it also holds deployment/theirs" in result.stderr
    bare.kubectl("delete", "-f", "-", input=result.stdout)
    left = bare.kubectl("-n", shared, "get", "deployments,secrets,serviceaccounts,roles", "-o", "name").split()
    assert left == ["deployment.apps/theirs", "serviceaccount/default"]
    said = bare.kubectl("get", "namespace", shared, "-o", "jsonpath={.status.phase}")
    assert said == "Active"
    # As the note says: then nothing says any more that a control plane is there.
    for command in result.stderr.partition("control plane: ")[2].strip().split("; "):
        bare.kubectl(*command.split()[1:])
    assert "this cluster has no control plane" in run(bare, "uninstall").stderr


def test_an_issuer_of_cert_managers_form_is_taken_with_its_roots_and_never_printed(bare: ApiServer):
    names = MeshNames(NS, "cluster.local")
    trust = ca_core.make_trust(names, datetime.now(UTC), (b"r" * 16, b"i" * 16))
    data = {"tls.crt": trust.issuer_pem, "tls.key": trust.issuer_key_pem}
    secret = {"apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls"}
    secret["metadata"] = {"name": "mantle-identity-issuer", "namespace": NS}
    secret["stringData"] = {key: value.decode() for key, value in data.items()}
    bare.kubectl("create", "namespace", NS)
    bare.kubectl("apply", "-f", "-", input=json.dumps(secret))
    for flags, said in (((), "give --identity-external-issuer"), (("--identity-external-issuer",), "no key ca.crt")):
        result = run(bare, "install", *flags)
        assert result.exit_code == 1 and said in result.stderr and result.stdout == ""

    secret["stringData"]["ca.crt"] = trust.roots_pem.decode()
    bare.kubectl("apply", "-f", "-", input=json.dumps(secret))
    install = printed(bare, "install", "--identity-external-issuer")
    assert "PRIVATE KEY" not in install
    bare.kubectl("apply", "-f", "-", input=install)
    issuer, roots = ca(bare)
    assert roots["ca-bundle.crt"] == trust.roots_pem.decode() and set(issuer) == {"tls.crt", "tls.key", "ca.crt"}
    assert bare.kubectl("diff", "-f", "-", input=printed(bare, "install", "--identity-external-issuer")) == ""
    bare.kubectl(*PLAIN_PRUNE, input=printed(bare, "upgrade"))
    assert ca(bare) == (issuer, roots)


# ---- again and again ----


def test_a_second_install_changes_nothing_and_keeps_the_trust(installed: ApiServer):
    before = ca(installed)
    again = printed(installed, "install")
    assert "mantle-identity-issuer\n  namespace" not in again and "ca-bundle.crt: |" not in again
    assert installed.kubectl("diff", "-f", "-", input=again) == ""
    said = installed.kubectl("apply", "-f", "-", input=again).splitlines()
    assert [line for line in said if not line.endswith("unchanged")] == []
    assert ca(installed) == before
    assert printed(installed, "install") == again
    # Who applies on the server's side from now on (GitOps does) owns nothing that is another value: no conflict.
    installed.kubectl("apply", "--server-side", "--dry-run=server", "-f", "-", input=again)


def test_what_the_injector_writes_into_its_webhooks_survives_an_upgrade(changed: ApiServer):
    bundle = data(changed, "secret", "mantle-identity-issuer")["crt.pem"]  # some PEM in base64
    patch = [{"op": "add", "path": f"/webhooks/{i}/clientConfig/caBundle", "value": bundle} for i in range(3)]
    changed.kubectl("patch", "mutatingwebhookconfiguration", "mantle-injector", "--type=json", "-p", json.dumps(patch))
    upgrade = printed(changed, "upgrade")
    assert changed.kubectl("diff", "-f", "-", input=upgrade) == ""
    changed.kubectl(*FULL_PRUNE, input=upgrade)
    found = json.loads(changed.kubectl("get", "mutatingwebhookconfiguration", "mantle-injector", "-o", "json"))
    assert [hook["clientConfig"]["caBundle"] for hook in found["webhooks"]] == [bundle] * 3


# ---- upgrade and prune ----


@pytest.mark.parametrize("prune", [PLAIN_PRUNE, FULL_PRUNE], ids=["plain", "full"])
def test_prune_removes_what_is_obsolete_and_cannot_reach_the_ca(changed: ApiServer, prune: tuple[str, ...]):
    before = ca(changed)
    obsolete = {"apiVersion": "v1", "kind": "ConfigMap"}
    obsolete["metadata"] = {"name": "obsolete", "namespace": NS, "labels": {PART_OF: "mantle"}}
    changed.kubectl("apply", "-f", "-", input=json.dumps(obsolete))
    assert "obsolete" in names(changed, "configmap")

    changed.kubectl(*prune, input=printed(changed, "upgrade"))
    assert names(changed, "configmap") == ["mantle-config"]
    assert ca(changed) == before
    assert sorted(names(changed, "deployment")) == sorted(f"mantle-{c}" for c in COMPONENTS)


def test_the_experimental_ca_comes_and_goes_and_may_not_read_the_issuer(changed: ApiServer):
    changed.kubectl(*FULL_PRUNE, input=printed(changed, "upgrade", "--tls=optional"))
    assert "mantle-ca" in names(changed, "deployment")
    who = f"--as=system:serviceaccount:{NS}:mantle-ca"
    for verb in ("get", "list", "watch", "patch", "delete"):
        assert may_not(changed, verb, "secret/mantle-identity-issuer", "-n", NS, who), verb
    assert may_not(changed, "list", "secrets", "-A", who)
    changed.kubectl(*FULL_PRUNE, input=printed(changed, "upgrade", "--tls=required"))
    for kind in ("deployment", "clusterrole", "clusterrolebinding", "role", "serviceaccount"):
        assert "mantle-ca" not in names(changed, kind), kind


def test_ha_comes_with_an_upgrade_is_remembered_and_goes_with_another(changed: ApiServer):
    changed.kubectl(*FULL_PRUNE, input=printed(changed, "upgrade", "--ha", "--set", "proxy.logLevel=debug"))
    assert len(names(changed, "poddisruptionbudget")) == len(COMPONENTS)
    assert changed.kubectl("diff", "-f", "-", input=printed(changed, "upgrade")) == ""

    changed.kubectl(*FULL_PRUNE, input=printed(changed, "upgrade", "--set", "ha=false"))
    assert names(changed, "poddisruptionbudget") == []
    assert json.loads(data(changed, "configmap", "mantle-config")["overrides"]) == {
        "ha": "false",
        "proxy": {"logLevel": "debug"},
    }


def test_half_an_upgrade_with_prune_still_leaves_the_ca(changed: ApiServer):
    """Somebody filters the output: everything that is not in it is obsolete to kubectl."""
    before = ca(changed)
    documents = printed(changed, "upgrade").split("---\n")
    only = "---\n".join(d for d in documents if "kind: ServiceAccount\n" in d)
    changed.kubectl(*FULL_PRUNE, input=only)
    assert names(changed, "deployment") == []
    assert ca(changed) == before


# ---- rights ----


def test_only_identitys_pod_sees_the_issuer_and_no_service_account_may_read_it(installed: ApiServer):
    for component in COMPONENTS:
        who = f"--as=system:serviceaccount:{NS}:mantle-{component}"
        for verb in ("get", "list", "watch", "patch", "delete"):
            assert may_not(installed, verb, "secret/mantle-identity-issuer", "-n", NS, who), (component, verb)
        for verb in ("get", "list"):
            assert may_not(installed, verb, "secrets", "-A", who), (component, verb)
        assert may_not(installed, "create", "pods", "-n", NS, who)
        assert may_not(installed, "create", "serviceaccounts/token", "-n", NS, who)
        assert may_not(installed, "impersonate", "serviceaccounts", "-n", NS, who)


def test_each_component_may_do_its_own_work(installed: ApiServer):
    def may(component: str, *what: str) -> bool:
        return not may_not(installed, *what, f"--as=system:serviceaccount:{NS}:mantle-{component}")

    assert may("identity", "create", "tokenreviews.authentication.k8s.io")
    assert may("destination", "watch", "endpointslices.discovery.k8s.io", "-A")
    assert may("viz", "create", "subjectaccessreviews.authorization.k8s.io")
    assert may("viz", "get", "configmap/extension-apiserver-authentication", "-n", "kube-system")
    assert may("viz", "patch", "apiservice/v1alpha1.tap.mantle.dev")
    assert may("injector", "update", "secret/mantle-injector-tls", "-n", NS)
    assert may("injector", "patch", "mutatingwebhookconfiguration/mantle-injector")
    for component, what in (("destination", "pods"), ("viz", "pods"), ("identity", "serviceaccounts")):
        assert not may(component, "create", what, "-n", "default")


def may_not(server: ApiServer, *question: str) -> bool:
    """`kubectl auth can-i` ends with 1 for no; the answer itself is what counts."""
    import subprocess

    command = [str(server.bins / "kubectl"), f"--kubeconfig={server.kubeconfig}", "auth", "can-i", *question]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.split()[:1]
    assert answer in (["yes"], ["no"]), question
    return answer == ["no"]


def test_pod_security_admits_everything_but_the_redirect_as_restricted(installed: ApiServer):
    """Server-side dry run in a `restricted` namespace: the one thing it objects to is NET_ADMIN of what installs the
    redirect and puts it back.
    """
    strict = installed.new_namespace("strict")
    installed.kubectl("label", "namespace", strict, "pod-security.kubernetes.io/enforce=restricted")
    for component in COMPONENTS:
        found = json.loads(installed.kubectl("-n", NS, "get", "deployment", f"mantle-{component}", "-o", "json"))
        pod = {"apiVersion": "v1", "kind": "Pod", "spec": found["spec"]["template"]["spec"]}
        pod["metadata"] = {"name": component, "namespace": strict}
        del pod["spec"]["serviceAccountName"], pod["spec"]["serviceAccount"]
        said = refused(installed, pod)
        assert 'must not include "NET_ADMIN"' in said and said.count("must") == 1, said
        for containers in ("initContainers", "containers"):
            pod["spec"][containers] = [c for c in pod["spec"][containers] if c["name"] not in REDIRECT]
        installed.kubectl("apply", "--dry-run=server", "-f", "-", input=json.dumps(pod))


def refused(server: ApiServer, obj: object) -> str:
    with pytest.raises(AssertionError) as caught:
        server.kubectl("apply", "--dry-run=server", "-f", "-", input=json.dumps(obj))
    return str(caught.value)


# ---- refusals ----


def test_a_second_control_plane_on_the_cluster_is_refused(installed: ApiServer):
    result = run(installed, "-n", "other", "install")
    assert result.exit_code == 1 and result.stdout == ""
    assert "one of Mantle's in namespace mantle" in result.stderr and "mantle -n mantle upgrade" in result.stderr


def test_another_trust_domain_is_refused_as_every_identity_would_change(installed: ApiServer):
    result = run(installed, "upgrade", "--identity-trust-domain", "example.org")
    assert result.exit_code == 1
    assert "installed with cluster.local" in result.stderr


def test_who_may_not_read_is_told_so_and_nothing_is_printed(installed: ApiServer):
    result = run(installed, "install", "--as", "nobody")
    assert result.exit_code == 1 and result.stdout == ""
    assert 'User "nobody" cannot get' in result.stderr and "--offline" in result.stderr
