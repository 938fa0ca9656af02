"""Which cluster, and as whom: kubectl's configuration files, read as kubectl reads them.

In: the files' text, the environment, what the flags say. Out: one `Access`, or every mistake with its fix. Nothing here
opens a connection (`kube_client.py` does) or runs a credential plugin. Relative paths are relative to their file.
Source: https://kubernetes.io/docs/concepts/configuration/organize-cluster-access-kubeconfig/ and
https://kubernetes.io/docs/reference/config-api/kubeconfig.v1/
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mantle.cli.output import Failure, Problem

IN_POD = Path("/var/run/secrets/kubernetes.io/serviceaccount")


@dataclass(frozen=True, slots=True)
class Plugin:
    """A program that gives credentials (`users[].user.exec`)."""

    command: str
    args: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    api_version: str
    install_hint: str
    provide_cluster_info: bool
    config: Any


@dataclass(frozen=True, slots=True)
class Impersonation:
    """Who to act as. Empty `user`: nobody else."""

    user: str = ""
    groups: tuple[str, ...] = ()
    uid: str = ""
    extra: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Access:
    """All that a client needs. Certificates and keys are PEM; a key never leaves memory but for the files it is in."""

    context: str
    server: str
    namespace: str
    """The context's own; `default` if it has none."""
    ca: bytes | None = None
    insecure: bool = False
    tls_server_name: str = ""
    certificate: bytes | None = field(default=None, repr=False)
    key: bytes | None = field(default=None, repr=False)
    token: str = field(default="", repr=False)
    token_file: Path | None = None
    basic: tuple[str, str] | None = field(default=None, repr=False)
    plugin: Plugin | None = None
    acting_as: Impersonation = Impersonation()


def paths(flag: str | None, environment: Mapping[str, str], home: Path) -> list[Path]:
    """The files to read, first one first: that of `--kubeconfig`, else those of $KUBECONFIG, else ~/.kube/config."""
    if flag is not None:
        return [Path(flag).expanduser()]
    if listed := environment.get("KUBECONFIG", ""):
        return [Path(name) for name in dict.fromkeys(listed.split(":")) if name]
    return [home / ".kube" / "config"]


def load(
    flag: str | None,
    context: str | None,
    environment: Mapping[str, str],
    home: Path,
    acting_as: Impersonation | None = None,
) -> Access | None:
    """The access that flags and files mean; None if there is no configuration at all. Raises `Failure`."""
    files = paths(flag, environment, home)
    documents = []
    for path in files:
        try:
            text = path.read_text()
        except FileNotFoundError:
            if flag is not None:
                raise Failure(f"there is no file {path}", fix="give --kubeconfig the path of a kubeconfig") from None
            continue  # kubectl passes over files of $KUBECONFIG that are not there
        except (OSError, UnicodeDecodeError) as error:
            raise Failure(f"{path} cannot be read: {error}", fix="give --kubeconfig a file that can be read") from error
        documents.append((path, _document(path, text)))
    merged = merge(documents)
    if not (context or merged.current):
        if flag is not None or any(merged.contexts):
            names = ", ".join(sorted(merged.contexts)) or "none"
            raise Failure(
                f"{_list(files)}: no context is current", fix=f"choose one with --context; there are: {names}"
            )
        if context is None and (found := in_pod(environment)) is not None:
            return replace(found, acting_as=acting_as) if acting_as else found
        return None
    access = access_of(merged, context or merged.current, _list(files))
    return replace(access, acting_as=acting_as) if acting_as and acting_as != Impersonation() else access


def in_pod(environment: Mapping[str, str], directory: Path = IN_POD) -> Access | None:
    """How a pod reaches its own cluster; None outside of one."""
    host, port = environment.get("KUBERNETES_SERVICE_HOST"), environment.get("KUBERNETES_SERVICE_PORT")
    if not host or not port or not (directory / "token").exists():
        return None
    try:
        ca, namespace = (directory / "ca.crt").read_bytes(), (directory / "namespace").read_text().strip()
    except OSError as error:
        raise Failure(f"the credentials of this pod cannot be read: {error}") from error
    server = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
    return Access("in this pod", server, namespace or "default", ca=ca, token_file=directory / "token")


@dataclass(slots=True)
class Merged:
    """Named entries of all files, each with the file it came from; the first file that has a name wins."""

    current: str = ""
    contexts: dict[str, tuple[Path, Mapping[str, Any]]] = field(default_factory=dict)
    clusters: dict[str, tuple[Path, Mapping[str, Any]]] = field(default_factory=dict)
    users: dict[str, tuple[Path, Mapping[str, Any]]] = field(default_factory=dict)


def merge(documents: Sequence[tuple[Path, Mapping[str, Any]]]) -> Merged:
    """Raises `Failure` with everything that has not the shape of a kubeconfig."""
    merged, problems = Merged(), []
    for path, document in documents:
        merged.current = merged.current or str(document.get("current-context") or "")
        for table, plural, singular in (
            (merged.contexts, "contexts", "context"),
            (merged.clusters, "clusters", "cluster"),
            (merged.users, "users", "user"),
        ):
            for number, entry in enumerate(document.get(plural) or []):
                inner = entry.get(singular) if isinstance(entry, Mapping) else None
                if not isinstance(entry, Mapping) or not entry.get("name") or not isinstance(inner, Mapping | None):
                    problems.append(Problem(f"{plural}[{number}] is not a name with a {singular}", file=str(path)))
                    continue
                table.setdefault(str(entry["name"]), (path, inner or {}))
    if problems:
        raise Failure.of(problems)
    return merged


def access_of(merged: Merged, name: str, files: str) -> Access:
    """What the context `name` means. Raises `Failure` with every mistake."""
    if name not in merged.contexts:
        there = ", ".join(sorted(merged.contexts)) or "none"
        raise Failure(f"{files}: there is no context {name!r}", fix=f"use one of: {there}")
    path, context = merged.contexts[name]
    cluster_name, user_name = str(context.get("cluster") or ""), str(context.get("user") or "")
    mistakes = _Mistakes(files, name)
    cluster_path, cluster = merged.clusters.get(cluster_name, (path, {}))
    user_path, user = merged.users.get(user_name, (path, {}))
    if cluster_name not in merged.clusters:
        mistakes.add(f"its cluster {cluster_name!r} is not there", "add it under `clusters`")
    if user_name and user_name not in merged.users:
        mistakes.add(f"its user {user_name!r} is not there", "add it under `users`")
    server = str(cluster.get("server") or "").rstrip("/")
    if cluster and not server.startswith(("https://", "http://")):
        mistakes.add(f"cluster {cluster_name!r} has the server {server!r}", "write https://HOST:PORT")
    if cluster.get("proxy-url"):
        mistakes.add(
            f"cluster {cluster_name!r} has proxy-url, which mantle cannot use",
            "use a context without it, or reach the API server through `kubectl proxy`",
        )
    if user.get("auth-provider"):
        mistakes.add(
            f"user {user_name!r} has auth-provider, which Kubernetes 1.26 removed", "use its credential plugin (exec)"
        )
    certificate = mistakes.data(user_path, user, "client-certificate")
    key = mistakes.data(user_path, user, "client-key")
    if bool(certificate) != bool(key):
        missing = "client-key" if certificate else "client-certificate"
        mistakes.add(f"user {user_name!r} has no {missing}", "a client certificate needs both")
    token_file = user.get("tokenFile")
    access = Access(
        context=name,
        server=server,
        namespace=str(context.get("namespace") or "default"),
        ca=mistakes.data(cluster_path, cluster, "certificate-authority"),
        insecure=cluster.get("insecure-skip-tls-verify") is True,
        tls_server_name=str(cluster.get("tls-server-name") or ""),
        certificate=certificate,
        key=key,
        token=str(user.get("token") or ""),
        token_file=_beside(user_path, str(token_file)) if token_file else None,
        basic=(str(user["username"]), str(user.get("password") or "")) if user.get("username") else None,
        plugin=_plugin(user_path, user.get("exec"), mistakes),
        acting_as=Impersonation(
            str(user.get("as") or ""),
            tuple(map(str, user.get("as-groups") or ())),
            str(user.get("as-uid") or ""),
            tuple((str(k), str(v)) for k, values in (user.get("as-user-extra") or {}).items() for v in values),
        ),
    )
    mistakes.done()
    return access


class _Mistakes:
    """Collects what is wrong with one context."""

    def __init__(self, files: str, context: str) -> None:
        self._where = f"{files}: context {context!r}"
        self._problems: list[Problem] = []

    def add(self, message: str, fix: str) -> None:
        self._problems.append(Problem(f"{self._where}: {message}", fix))

    def data(self, path: Path, entry: Mapping[str, Any], name: str) -> bytes | None:
        """The octets of `NAME-data` (base64), else of the file `NAME`; None if neither is there."""
        if encoded := entry.get(f"{name}-data"):
            try:
                return base64.b64decode(str(encoded), validate=True)
            except binascii.Error as error:
                self.add(f"{name}-data is not base64: {error}", "write the file's base64 in one line")
                return None
        if file := entry.get(name):
            found = _beside(path, str(file))
            try:
                return found.read_bytes()
            except OSError as error:
                self.add(f"{name} {found} cannot be read: {error.strerror}", "give it a file that can be read")
        return None

    def done(self) -> None:
        if self._problems:
            raise Failure.of(self._problems)


def _plugin(path: Path, entry: Any, mistakes: _Mistakes) -> Plugin | None:
    if not entry:
        return None
    if not isinstance(entry, Mapping) or not entry.get("command"):
        mistakes.add("exec has no command", "name the credential plugin")
        return None
    version = str(entry.get("apiVersion") or "")
    if version not in ("client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1"):
        mistakes.add(f"exec has the apiVersion {version!r}", "write client.authentication.k8s.io/v1")
    command = str(entry["command"])
    return Plugin(
        command=str(_beside(path, command)) if "/" in command else command,
        args=tuple(map(str, entry.get("args") or ())),
        env=tuple((str(e["name"]), str(e.get("value", ""))) for e in entry.get("env") or ()),
        api_version=version,
        install_hint=str(entry.get("installHint") or "").strip(),
        provide_cluster_info=entry.get("provideClusterInfo") is True,
        config=entry.get("config"),
    )


def _document(path: Path, text: str) -> Mapping[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        document = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise Failure(f"{path} is not YAML: {error}", fix="repair it, or choose another with --kubeconfig") from error
    if document is None:
        return {}
    if not isinstance(document, Mapping):
        raise Failure(f"{path} is not a kubeconfig: it holds no mapping", fix="choose another with --kubeconfig")
    return document


def _beside(path: Path, name: str) -> Path:
    """A path as its file means it."""
    return path.parent / Path(name).expanduser()


def _list(files: Sequence[Path]) -> str:
    return ":".join(map(str, files))
