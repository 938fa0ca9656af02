"""Identity as a pod of the cluster: the rights of its service account and no others, real tokens, events to be seen."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import ruamel.yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from prometheus_client import CollectorRegistry, generate_latest

from mantle.control import identity
from mantle.control.admin import PlatformCounts
from mantle.core import ca
from mantle.core.model import Key
from mantle.core.names import MeshNames
from mantle.core.ratelimit import RateLimiter
from mantle.core.reasons import CertifyRefused, TokenReason
from mantle.gen.io.linkerd.proxy import identity_pb2 as pb
from mantle.platform.kubernetes.client import BadCluster, Client, in_cluster
from mantle.platform.kubernetes.reflector import Timing
from mantle.platform.kubernetes.world import DISCOVERY, IDENTITY, KubernetesPlatform, running

from .apiserver import ApiServer
from .test_platform import a_node, a_pod, apply, run_pod

RBAC = Path(__file__).parents[2] / "src" / "mantle" / "manifests" / "cluster" / "rbac.yml"
NAMES = MeshNames("mantle", "cluster.local")


@pytest.fixture(scope="module")
def installed(api_server: ApiServer) -> ApiServer:
    """The service accounts of identity and destination with the roles that `mantle install` gives them."""
    text = RBAC.read_text().replace("${CONTROL_NAMESPACE}", "mantle")
    documents = [document for document in ruamel.yaml.YAML(typ="safe").load_all(text) if document]
    rules = [r for r in documents if r["metadata"].get("namespace") in (None, "mantle")]
    accounts = [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": "mantle"}}
        for name in ("mantle-identity", "mantle-destination", "nobody")
    ]
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "mantle"}}
    apply(api_server, "mantle", namespace, *accounts, *rules)
    return api_server


def as_pod(server: ApiServer, account: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    """A client as a pod with this service account has it: files, and the two variables the kubelet sets."""
    (directory / "token").write_text(server.token("mantle", account))
    (directory / "namespace").write_text("mantle")
    (directory / "ca.crt").write_bytes((server.state / "pki" / "ca.crt").read_bytes())
    url = urlsplit(server.url)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", str(url.hostname))
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(url.port))
    return in_cluster(directory)


def test_outside_a_pod_there_is_no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(BadCluster, match=r"no KUBERNETES_SERVICE_HOST.*no .*/token.*name a kubeconfig"):
        in_cluster(tmp_path)


def csr(name: str) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    made = builder.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    return made.public_bytes(serialization.Encoding.DER)


async def until(true: Callable[[], Any]) -> None:
    """Waits as long as a busy machine needs."""
    async with asyncio.timeout(120):
        while not true():
            await asyncio.sleep(0.05)


class Play:
    """Identity on the cluster, and the running pod `web` of a namespace."""

    def __init__(self, server: ApiServer, namespace: str, platform: KubernetesPlatform, certifier: Any) -> None:
        self.server, self.namespace, self.platform, self.certifier = server, namespace, platform, certifier

    async def ask(self, audience: str = "identity.mantle.dev", address: str = "10.9.0.8") -> ca.Leaf | ca.Refusal:
        """Asks as the pod's proxy does."""
        bound = ("--bound-object-kind=Pod", "--bound-object-name=web", f"--audience={audience}")
        token = await asyncio.to_thread(self.server.token, self.namespace, "default", *bound)
        name = f"default.{self.namespace}.serviceaccount.identity.mantle.cluster.local"
        request = pb.CertifyRequest(identity=name, token=token.encode(), certificate_signing_request=csr(name))
        answer: ca.Leaf | ca.Refusal = await self.certifier.certify(request, address, loopback=False)
        return answer

    async def events(self, reason: str) -> list[dict[str, Any]]:
        selector = f"--field-selector=reason={reason}"
        text = await asyncio.to_thread(
            self.server.kubectl, "-n", self.namespace, "get", "events", selector, "-o", "json"
        )
        found: list[dict[str, Any]] = json.loads(text)["items"]
        return found


@asynccontextmanager
async def identity_play(server: ApiServer, client: Client, directory: Path) -> AsyncIterator[Play]:
    namespace = await asyncio.to_thread(server.new_namespace, "certify")
    await asyncio.to_thread(a_node, server)
    await asyncio.to_thread(apply, server, namespace, a_pod("web"))
    await asyncio.to_thread(run_pod, server, namespace, "web", "10.9.0.8")
    now = datetime.now(UTC)
    trust = ca.make_trust(NAMES, now, (secrets.token_bytes(16), secrets.token_bytes(16)))
    for name, pem in (("tls.crt", trust.issuer_pem), ("tls.key", trust.issuer_key_pem), ("roots", trust.roots_pem)):
        (directory / name).write_bytes(pem)
    registry = CollectorRegistry()
    async with client, running(client, IDENTITY, Timing(), "mantle-identity") as platform:
        issuer = identity.IssuerFiles(directory / "tls.crt", directory / "tls.key", directory / "roots", platform.tell)
        issuer.refresh()
        certifier = identity.Certifier(
            names=NAMES,
            platform=platform,
            issuer=issuer,
            audiences=["identity.mantle.dev"],
            own_pod=Key("mantle", "mantle-identity-x"),
            lifetime=timedelta(hours=24),
            skew=timedelta(seconds=20),
            limiter=RateLimiter(100.0, 100),
            metrics=identity.Metrics(registry, issuer, lambda: now),
            now=lambda: datetime.now(UTC),
            ticks=asyncio.get_running_loop().time,
            entropy=secrets.token_bytes,
            tell=platform.tell,
        )
        registry.register(PlatformCounts(platform))
        play = Play(server, namespace, platform, certifier)
        yield play
        assert b"mantle_platform_lists_total" in generate_latest(registry)


async def test_a_pod_gets_its_certificate_and_its_account_an_event(
    installed: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = as_pod(installed, "mantle-identity", tmp_path, monkeypatch)
    async with identity_play(installed, client, tmp_path) as play:
        leaf = await play.ask()
        assert isinstance(leaf, ca.Leaf), leaf
        async with asyncio.timeout(120):
            while not (found := await play.events("IssuedLeafCertificate")):
                await asyncio.sleep(0.1)
        (event,) = found
        assert event["involvedObject"]["kind"] == "ServiceAccount"
        assert event["involvedObject"]["name"] == "default"
        assert event["source"]["component"] == "mantle-identity"
        assert event["message"].startswith(
            f"issued certificate for default.{play.namespace}.serviceaccount.identity.mantle.cluster.local until 20"
        )
        assert leaf.sha256 in event["message"]
        described = await asyncio.to_thread(installed.kubectl, "-n", play.namespace, "describe", "sa", "default")
        assert "IssuedLeafCertificate" in described


async def test_events_of_one_account_are_few(
    installed: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = as_pod(installed, "mantle-identity", tmp_path, monkeypatch)
    async with identity_play(installed, client, tmp_path) as play:
        clock = asyncio.get_running_loop().time
        began = clock()
        for _ in range(14):
            assert isinstance(await play.ask(), ca.Leaf)
        await until(lambda: play.platform.events.outcomes["written"] >= 10)
        outcomes, minutes = play.platform.events.outcomes, int((clock() - began) / 60)
        assert outcomes.total() == 14 and 10 <= outcomes["written"] <= 10 + minutes, outcomes
        assert outcomes["limited"] == 14 - outcomes["written"]


async def test_events_about_the_issuer_are_found_on_its_deployment(
    installed: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = {
        "metadata": {"labels": {"a": "b"}},
        "spec": {"containers": [{"name": "identity", "image": "i"}]},
    }
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "mantle-identity"},
        "spec": {"replicas": 0, "selector": {"matchLabels": {"a": "b"}}, "template": template},
    }
    await asyncio.to_thread(apply, installed, "mantle", deployment)
    client = as_pod(installed, "mantle-identity", tmp_path, monkeypatch)
    async with identity_play(installed, client, tmp_path) as play:
        (tmp_path / "tls.crt").write_text("no certificate")
        play.certifier.issuer.refresh()
        assert isinstance(await play.ask(), ca.Leaf), "the issuer before is used on"
        await until(lambda: play.platform.events.outcomes["written"] >= 2)
        said = await asyncio.to_thread(installed.kubectl, "-n", "mantle", "describe", "deployment", "mantle-identity")
        assert "IssuerUpdateSkipped" in said
        assert "Warning" in said


async def test_a_token_of_another_audience_says_found_wanted_and_fix(
    installed: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = as_pod(installed, "mantle-identity", tmp_path, monkeypatch)
    async with identity_play(installed, client, tmp_path) as play:
        refused = await play.ask(audience="vault")
        assert isinstance(refused, ca.Refusal)
        assert (refused.reason, refused.detail) == (CertifyRefused.TOKEN_REJECTED, TokenReason.WRONG_AUDIENCE)
        assert "the token is for vault, wanted identity.mantle.dev" in str(refused)


async def test_a_stolen_token_is_worth_nothing_elsewhere(
    installed: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = as_pod(installed, "mantle-identity", tmp_path, monkeypatch)
    async with identity_play(installed, client, tmp_path) as play:
        refused = await play.ask(address="10.9.0.9")
        assert isinstance(refused, ca.Refusal)
        assert refused.reason == CertifyRefused.OTHER_ADDRESS


async def test_identity_without_its_rights_says_which(
    installed: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = as_pod(installed, "nobody", tmp_path, monkeypatch)
    async with identity_play(installed, client, tmp_path) as play:
        refused = await play.ask()
        assert isinstance(refused, ca.Refusal)
        assert refused.reason == CertifyRefused.PLATFORM_UNAVAILABLE
        assert "create tokenreviews.authentication.k8s.io" in str(refused)
        await until(play.platform.denied)
        assert "apply `mantle install` again" in play.platform.denied()


async def test_destination_sees_all_it_needs_with_its_own_rights(
    installed: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = as_pod(installed, "mantle-destination", tmp_path, monkeypatch)
    async with client, running(client, DISCOVERY) as platform, asyncio.timeout(120):
        async for snapshot in platform.watch():
            assert "mantle" in snapshot.namespaces
            assert platform.missing() == ""
            break


async def test_a_token_file_that_is_away_for_a_moment_is_waited_for(
    installed: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = as_pod(installed, "mantle-destination", tmp_path, monkeypatch)
    (tmp_path / "token").rename(tmp_path / "hidden")
    async with client, running(client, DISCOVERY) as platform, asyncio.timeout(120):
        await until(lambda: all(reflector.trouble for reflector in platform.reflectors.values()))
        assert "pods (unreachable)" in platform.missing() or "pods (cut)" in platform.missing()
        (tmp_path / "hidden").rename(tmp_path / "token")
        async for snapshot in platform.watch():
            assert "mantle" in snapshot.namespaces
            break
