"""Who asks the aggregated API: the API server in front of it says so, and proves with a certificate that it is one.

The API server authenticates users and hands their requests on, with names and groups in headers. Whom to believe, and
which headers, stands in the ConfigMap kube-system/extension-apiserver-authentication. Pure: its data and a request in,
a user or the reason why not out. The TLS library has verified the chain; this checks the name.
Source: https://kubernetes.io/docs/tasks/extend-kubernetes/configure-aggregation-layer/
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote

NAMESPACE, CONFIG_MAP = "kube-system", "extension-apiserver-authentication"
_CA, _NAMES = "requestheader-client-ca-file", "requestheader-allowed-names"
_USER, _GROUP = "requestheader-username-headers", "requestheader-group-headers"
_EXTRA, _UID = "requestheader-extra-headers-prefix", "requestheader-uid-headers"


@dataclass(frozen=True, slots=True)
class FrontProxy:
    """Whom to believe. `client_ca` is PEM; header names are lower case."""

    client_ca: str
    allowed_names: frozenset[str]
    """Common names of its certificate; none: any that the CA has signed."""
    username_headers: tuple[str, ...]
    group_headers: tuple[str, ...]
    extra_prefixes: tuple[str, ...] = ()
    uid_headers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BadConfiguration:
    """Why the ConfigMap cannot be used: everything that is wrong with it."""

    problems: tuple[str, ...]

    def __str__(self) -> str:
        return f"ConfigMap {NAMESPACE}/{CONFIG_MAP}: {'; '.join(self.problems)}"


@dataclass(frozen=True, slots=True)
class User:
    """Who asks, as the API server authenticated them."""

    name: str
    groups: tuple[str, ...] = ()
    uid: str = ""
    extra: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NotAuthenticated:
    """Why a request comes from nobody."""

    found: str
    wanted: str

    def __str__(self) -> str:
        return f"found {self.found}, wanted {self.wanted}"


def parse(data: Mapping[str, str]) -> FrontProxy | BadConfiguration:
    """The ConfigMap's data. A cluster without an aggregation layer has none of it."""
    problems: list[str] = []

    def words(key: str, *, needed: bool) -> tuple[str, ...]:
        text = data.get(key, "")
        try:
            found = json.loads(text) if text else []
        except ValueError:
            found = None
        if not isinstance(found, list) or not all(isinstance(word, str) for word in found):
            problems.append(f"{key} is {text!r}, not a list of names")
            return ()
        if needed and not found:
            problems.append(f"{key} names no header")
        return tuple(found)

    ca = data.get(_CA, "")
    if "BEGIN CERTIFICATE" not in ca:
        problems.append(f"{_CA} holds no certificate: the API server has no aggregation layer")
    names = words(_NAMES, needed=False)
    users, groups = words(_USER, needed=True), words(_GROUP, needed=False)
    extra, uids = words(_EXTRA, needed=False), words(_UID, needed=False)
    if problems:
        return BadConfiguration(tuple(problems))
    lower = (tuple(map(str.lower, words_)) for words_ in (users, groups, extra, uids))
    return FrontProxy(ca, frozenset(names), *lower)


def user_of(proxy: FrontProxy, common_name: str | None, headers: Iterable[tuple[str, str]]) -> User | NotAuthenticated:
    """The user of a request. `common_name`: of the verified certificate it came with; None: it came without one."""
    wanted = f"a certificate of the API server's front proxy ({', '.join(sorted(proxy.allowed_names)) or 'any name'})"
    if common_name is None:
        return NotAuthenticated("no client certificate", wanted)
    if proxy.allowed_names and common_name not in proxy.allowed_names:
        return NotAuthenticated(f"a client certificate for {common_name!r}", wanted)
    pairs = [(name.lower(), value) for name, value in headers]

    def values(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(value for name, value in pairs if name in names and value)

    users = next((found for header in proxy.username_headers if (found := values((header,)))), ())
    if not users:
        return NotAuthenticated("no user's name", f"one in the header {' or '.join(proxy.username_headers)}")
    extra: dict[str, tuple[str, ...]] = {}
    for name, value in pairs:
        for prefix in proxy.extra_prefixes:
            if name.startswith(prefix) and len(name) > len(prefix):
                key = unquote(name.removeprefix(prefix))
                extra[key] = (*extra.get(key, ()), value)
                break
    return User(users[0], values(proxy.group_headers), next(iter(values(proxy.uid_headers)), ""), extra)
