"""Connections to a Kubernetes API server: from inside a pod, or as a user's kubeconfig says.

`Client` is lightkube's, with the HTTP client below it open to those who need what lightkube has no call for: watches
with bookmarks and read timeouts, the cluster's token keys, aggregated APIs. Knows no resource.
"""

from __future__ import annotations

import os
import socket
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
from lightkube import AsyncClient
from lightkube.config.client_adapter import verify_cluster
from lightkube.config.kubeconfig import KubeConfig, SingleConfig
from lightkube.core.exceptions import ConfigError

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TIMEOUT = httpx2.Timeout(10.0, connect=3.0)
"""Seconds; a watch brings its own read timeout."""
DEAD_PEER = 15
"""Seconds after which the kernel gives up a connection whose other end is gone: long before a quiet watch would."""


NO_ANSWER = (httpx2.HTTPError, OSError, ConfigError)
"""What a request raises that gets no answer: the network, TLS, or a token file that is not there just now."""


class BadCluster(Exception):
    """Why there is no way to an API server: the configuration is missing or wrong. The text says what to do."""


class Client(AsyncClient):
    """lightkube's asynchronous client. Close it with `async with` or `close`."""

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def http(self) -> httpx2.AsyncClient:
        """The HTTP client, whose base URL is the API server's, with its credentials."""
        http: httpx2.AsyncClient = self._client._client  # lightkube has no name for it
        return http

    @property
    def server(self) -> str:
        """The API server's URL."""
        return str(self.config.cluster.server)


def in_cluster(service_account: Path = SERVICE_ACCOUNT) -> Client:
    """As the pod's own service account: `https://$KUBERNETES_SERVICE_HOST:$KUBERNETES_SERVICE_PORT`, never through a
    proxy of the environment. The token file is read again when the API server refuses the one before.

    Raises `BadCluster` outside a pod. https://kubernetes.io/docs/tasks/run-application/access-api-from-pod/
    """
    missing = [name for name in ("KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT") if not os.environ.get(name)]
    missing += [str(path) for name in ("token", "ca.crt") if not (path := service_account / name).exists()]
    if missing:
        raise BadCluster(
            f"this is no pod of a cluster: found no {', no '.join(missing)}; "
            "run it in a pod with a service account token, or name a kubeconfig"
        )
    return _client(KubeConfig.from_service_account(service_account).get())


def from_kubeconfig(path: Path, context: str | None = None) -> Client:
    """As one user of a kubeconfig: that of `context`, else of its current one. For programs that are no pods: tests,
    benches, a control plane under development.

    Raises `BadCluster` with what was found and wanted.
    """
    try:
        configuration = KubeConfig.from_file(path)
    except (ConfigError, KeyError, TypeError, ValueError, OSError) as error:
        raise BadCluster(f"cannot read the kubeconfig {path}: {type(error).__name__} {error}") from error
    try:
        chosen = configuration.get(context)
    except (ConfigError, KeyError) as error:
        contexts = ", ".join(sorted(configuration.contexts)) or "none"
        raise BadCluster(f"the kubeconfig {path} is of no use: {error}; its contexts: {contexts}") from error
    if chosen is None or chosen.user is None:
        raise BadCluster(f"the kubeconfig {path} is of no use: its context {context or 'chosen'} names no user")
    return _client(chosen)


def _client(config: SingleConfig | None) -> Client:
    assert config is not None
    through_proxy = _proxied(config.cluster.server)
    transport = None if through_proxy else _transport(config)
    return Client(config=config, timeout=TIMEOUT, trust_env=through_proxy, transport=transport, lazy=True)


def _transport(config: SingleConfig) -> httpx2.AsyncHTTPTransport:
    assert config.user is not None  # `from_kubeconfig` has seen to it
    verify = verify_cluster(config.cluster, config.user, config.abs_file, trust_env=False)
    return httpx2.AsyncHTTPTransport(verify=verify, trust_env=False, socket_options=list(_alive_or_gone()))


def _alive_or_gone() -> Iterable[tuple[int, int, int]]:
    """Socket options that end a connection `DEAD_PEER` seconds after its other end vanished without a word."""
    yield (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    yield (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, DEAD_PEER // 3)
    yield (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, DEAD_PEER // 3)
    yield (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
    yield (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_PEER * 1000)


def _proxied(server: str) -> bool:
    """Whether the environment names an HTTP proxy for this server. Never for loopback (as kubectl), never in a pod."""
    if os.environ.get("KUBERNETES_SERVICE_HOST"):
        return False
    host = urlsplit(server).hostname or ""
    if host == "localhost" or host.startswith("127.") or host == "::1" or urllib.request.proxy_bypass(host):
        return False
    return bool(urllib.request.getproxies().keys() & {"https", "all"})
