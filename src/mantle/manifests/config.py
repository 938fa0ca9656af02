"""What can be set at `mantle install`: one table of values, read from YAML and `--set` alike, every mistake at once.

`load` makes an `InstallValues` from a nested mapping (a file, `--set`, or what ConfigMap `mantle-config` holds);
`dump` is its inverse; `injection_values` is what injection needs of it. Settings of proxies (`proxy.NAME`) are the
`config.mantle.dev/*` annotations in camel case: there is one table of those (`core/annotations.py`) and this is not a
second one. Pure: knows no cluster, no file and no YAML.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from typing import Any

from mantle import __version__
from mantle.core.annotations import CONFIG, Setting
from mantle.core.names import is_label, is_subdomain
from mantle.core.proxy_env import Values
from mantle.core.world import PRIVATE_NETWORKS

CONFIG_MAP = "mantle-config"
"""The ConfigMap of the control namespace that keeps the values."""
VALUES_KEY, OVERRIDES_KEY = "values", "overrides"
"""Its keys: every value as installed (what the injector, `inject --manual` and `check` read), and only those that were
given (what `upgrade` starts from, so that a new version's defaults apply to the rest)."""

API_SERVER = "$(KUBERNETES_SERVICE_HOST)/32"
"""The address at which pods reach the API server. The kubelet puts it in when the container starts."""


@dataclass(frozen=True, slots=True)
class InstallValues:
    """Everything that `mantle install` can be told, checked. Make it with `load`, or with defaults."""

    control_namespace: str = "mantle"
    trust_domain: str = "cluster.local"
    cluster_domain: str = "cluster.local"
    networks: tuple[str, ...] = tuple(str(network) for network in PRIVATE_NETWORKS)
    api_server: tuple[str, ...] = (API_SERVER,)
    registry: str = ""
    version: str = __version__
    image_pull_policy: str = "IfNotPresent"
    image_pull_secrets: tuple[str, ...] = ()
    tls: str = "required"
    ha: bool = False
    replicas: int = 0
    """0: one, or three with `ha`."""
    webhook_failure_policy: str = ""
    """Empty: `Ignore`, or `Fail` with `ha`."""
    cpu_request: str = "20m"
    memory_request: str = "64Mi"
    memory_limit: str = ""
    issuance_lifetime: str = "24h"
    clock_skew: str = "20s"
    external_issuer: bool = False
    audiences: tuple[str, ...] = ("identity.mantle.dev",)
    check_address: bool = True
    proxy: Mapping[str, str] = field(default_factory=dict)
    """Settings of every proxy: `config.mantle.dev/` names without prefix, to their texts. Already accepted."""

    @property
    def running(self) -> int:
        """How many pods each component has."""
        return self.replicas or (3 if self.ha else 1)

    @property
    def failure_policy(self) -> str:
        """What becomes of pods while the injector does not answer: `Ignore` (they start unmeshed) or `Fail`."""
        return self.webhook_failure_policy or ("Fail" if self.ha else "Ignore")

    def image(self, name: str) -> str:
        """The full name, without tag, of the image `mantle/NAME`."""
        return f"{self.registry}/mantle/{name}" if self.registry else f"mantle/{name}"


@dataclass(frozen=True, slots=True)
class Fault:
    """A value that cannot be used: where it stands, what stands there, what would be accepted."""

    path: str
    found: str
    accepted: str

    def __str__(self) -> str:
        return f"{self.path}: found {self.found}; wanted {self.accepted}"


class BadValues(ValueError):
    """Every mistake in a set of values."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("; ".join(map(str, faults)))
        self.faults = tuple(faults)


@dataclass(frozen=True, slots=True)
class Value:
    """One value: its path in YAML and `--set`, the field it fills, how it is read, and what people are told of it."""

    path: str
    field: str
    parse: Callable[[Any], Any]
    accepted: str
    help: str


# ---- how values are read: raw YAML or the text of --set in, ValueError if it is not accepted ----


def _text(matches: Callable[[str], bool]) -> Callable[[Any], str]:
    def parse(raw: Any) -> str:
        if not isinstance(raw, str) or not matches(raw):
            raise ValueError(raw)
        return raw

    return parse


def _pattern(pattern: str) -> Callable[[Any], str]:
    compiled = re.compile(pattern)
    return _text(lambda text: compiled.fullmatch(text) is not None)


def _choice(*words: str) -> Callable[[Any], str]:
    return _text(lambda text: text in words)


def _boolean(raw: Any) -> bool:
    if raw in (True, "true"):
        return True
    if raw in (False, "false"):
        return False
    raise ValueError(raw)


def _count(raw: Any) -> int:
    if isinstance(raw, bool) or not re.fullmatch(r"\d{1,2}", str(raw)):
        raise ValueError(raw)
    return int(raw)


def _list(item: Callable[[str], str], least: int = 1) -> Callable[[Any], tuple[str, ...]]:
    def parse(raw: Any) -> tuple[str, ...]:
        parts = [part.strip() for part in raw.split(",") if part.strip()] if isinstance(raw, str) else raw
        if (
            not isinstance(parts, list | tuple)
            or len(parts) < least
            or not all(isinstance(part, str) for part in parts)
        ):
            raise ValueError(raw)
        return tuple(item(part) for part in parts)

    return parse


def _network(text: str) -> str:
    return str(ipaddress.ip_network(text))


def _api_server(text: str) -> str:
    return text if text == API_SERVER else _network(text)


_QUANTITY = r"\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?"
_DURATION = r"[1-9]\d{0,8}(ms|s|m|h|d)"

VALUES: tuple[Value, ...] = (
    Value(
        "controlNamespace",
        "control_namespace",
        _text(is_label),
        "a namespace's name (DNS-1123 label)",
        "namespace of the control plane; part of every identity. `-n` sets it, too",
    ),
    Value(
        "trustDomain",
        "trust_domain",
        _text(is_subdomain),
        "a DNS name",
        "what identities end in; cannot change while the mesh lives",
    ),
    Value("clusterDomain", "cluster_domain", _text(is_subdomain), "a DNS name", "what names of services end in"),
    Value(
        "networks",
        "networks",
        _list(_network),
        "a list of networks such as 10.0.0.0/8",
        "the networks of pods, services and nodes: inside them a proxy never falls back to plaintext when discovery "
        "does not answer",
    ),
    Value(
        "apiServer",
        "api_server",
        _list(_api_server),
        f"a list of networks such as 10.96.0.1/32, or {API_SERVER}",
        "addresses of the API server, which the control plane's own pods reach past their proxies",
    ),
    Value(
        "registry",
        "registry",
        _pattern(r"|[a-z0-9][a-z0-9./:_-]*[a-z0-9]"),
        "a registry, with a path if there is one, such as registry.example.com/team",
        "stands before the name of every image",
    ),
    Value("version", "version", _pattern(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"), "an image tag", "tag of every image"),
    Value(
        "imagePullPolicy",
        "image_pull_policy",
        _choice("Always", "IfNotPresent", "Never"),
        "Always, IfNotPresent or Never",
        "when images are pulled",
    ),
    Value(
        "imagePullSecrets",
        "image_pull_secrets",
        _list(_text(is_subdomain), least=0),
        "a list of names of Secrets",
        "what the control plane's pods show the registry; a meshed pod shows its own, for its proxy, too",
    ),
    Value(
        "tls",
        "tls",
        _choice("required", "optional"),
        "required or optional",
        "`optional` adds the experimental mode with its `ca`: weaker, see its page",
    ),
    Value("ha", "ha", _boolean, "true or false", "three pods of everything, disruption budgets, spread over nodes"),
    Value("replicas", "replicas", _count, "a number up to 99; 0 for 1 (3 with ha)", "pods of each component"),
    Value(
        "webhookFailurePolicy",
        "webhook_failure_policy",
        _choice("", "Ignore", "Fail"),
        "Ignore or Fail; empty for Ignore (Fail with ha)",
        "what becomes of new pods while the injector does not answer: they start unmeshed, or not at all",
    ),
    Value(
        "controller.cpuRequest", "cpu_request", _pattern(_QUANTITY), "a quantity such as 20m", "CPU of each component"
    ),
    Value(
        "controller.memoryRequest",
        "memory_request",
        _pattern(_QUANTITY),
        "a quantity such as 64Mi",
        "memory of each component",
    ),
    Value(
        "controller.memoryLimit",
        "memory_limit",
        _pattern(f"|{_QUANTITY}"),
        "a quantity such as 1Gi, or empty",
        "most memory of each component; none by default",
    ),
    Value(
        "identity.issuanceLifetime",
        "issuance_lifetime",
        _pattern(_DURATION),
        "a number and one unit (ms, s, m, h or d), such as 24h",
        "how long a proxy's certificate lasts",
    ),
    Value(
        "identity.clockSkewAllowance",
        "clock_skew",
        _pattern(_DURATION),
        "a number and one unit (ms, s, m, h or d), such as 20s",
        "added at both ends of a certificate's validity",
    ),
    Value(
        "identity.externalIssuer",
        "external_issuer",
        _boolean,
        "true or false",
        "the issuer Secret is made by somebody else (cert-manager): tls.crt, tls.key and ca.crt",
    ),
    Value(
        "identity.audiences",
        "audiences",
        _list(_text(lambda text: bool(text) and text.isprintable() and "," not in text)),
        "a list of token audiences",
        "which tokens identity accepts; proxies use the first",
    ),
    Value(
        "identity.checkAddress",
        "check_address",
        _boolean,
        "true or false",
        "a token is good only from its pod's own address; false where the network rewrites addresses between pods and "
        "services (kube-proxy's masquerade-all), as no pod gets a certificate there otherwise",
    ),
)
"""Every value but those of proxies, in the order of the documentation."""

BY_PATH: Mapping[str, Value] = {value.path: value for value in VALUES}


def _proxy_paths() -> dict[str, Setting]:
    """`proxy.NAME` for each annotation: its name in camel case, without a leading `proxy-` or `proxy-enable-`."""
    paths = {}
    for name, setting in CONFIG.items():
        short = name.removeprefix("proxy-").removeprefix("enable-") if name.startswith("proxy-") else name
        first, *rest = short.split("-")
        paths["proxy." + first + "".join(part.capitalize() for part in rest)] = setting
    return paths


PROXY: Mapping[str, Setting] = _proxy_paths()
"""Each `proxy.NAME` with the annotation whose default it sets."""


def load(mapping: Mapping[str, Any], defaults: InstallValues | None = None) -> InstallValues:
    """Reads values from a nested mapping as YAML has it; what is not given is taken from `defaults`.

    Raises `BadValues` with every unknown and every ill-typed value.
    """
    base = defaults or InstallValues()
    found: dict[str, Any] = {}
    proxy: dict[str, str] = dict(base.proxy)
    faults: list[Fault] = []
    for path, raw in flatten(mapping):
        if path in BY_PATH:
            value = BY_PATH[path]
            try:
                found[value.field] = value.parse(raw)
            except ValueError:
                faults.append(Fault(path, _spelled(raw), value.accepted))
        elif path in PROXY:
            setting = PROXY[path]
            text = _as_text(raw)
            try:
                if text is None:
                    raise ValueError(raw)
                setting.parse(text)
                proxy[setting.name] = text
            except ValueError:
                faults.append(Fault(path, _spelled(raw), setting.accepted))
        else:
            faults.append(Fault(path, "a value that does not exist", _near(path)))
    if faults:
        raise BadValues(faults)
    kept = {f.name: getattr(base, f.name) for f in dataclass_fields(InstallValues)}
    return InstallValues(**{**kept, **found, "proxy": proxy})


def dump(values: InstallValues) -> dict[str, Any]:
    """All values as a nested mapping that `load` takes: what `mantle-config` keeps."""
    result: dict[str, Any] = {}
    for value in VALUES:
        raw = getattr(values, value.field)
        put(result, value.path, list(raw) if isinstance(raw, tuple) else raw)
    names = {setting.name: path for path, setting in PROXY.items()}
    for name, text in values.proxy.items():
        put(result, names[name], text)
    return result


def injection_values(values: InstallValues, trust_anchors: str, created_by: str = "") -> Values:
    """What injection must know of this mesh. `trust_anchors`: PEM text, as ConfigMap `mantle-identity-trust-roots`
    holds it now.
    """
    defaults = {"debug-image": values.image("debug"), "image-pull-policy": values.image_pull_policy, **values.proxy}
    return Values(
        version=values.version,
        trust_anchors=trust_anchors,
        networks=values.networks,
        control_namespace=values.control_namespace,
        trust_domain=values.trust_domain,
        cluster_domain=values.cluster_domain,
        token_audience=values.audiences[0],
        guard=True,
        proxy_image=values.image("proxy"),
        created_by=created_by,
        defaults={name: CONFIG[name].parse(text) for name, text in defaults.items()},
        api_server=",".join(values.api_server),
        tls=values.tls,
    )


# ---- nested mappings ----


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every leaf. A section that is empty (`proxy:`) has none."""
    for key, raw in mapping.items():
        path = f"{prefix}{key}"
        if path in BY_PATH or path in PROXY:
            yield path, raw
        elif isinstance(raw, Mapping):
            yield from flatten(raw, path + ".")
        elif raw is not None or not any(known.startswith(path + ".") for known in (*BY_PATH, *PROXY)):
            yield path, raw


def put(mapping: dict[str, Any], path: str, raw: Any) -> None:
    """Sets the value at a dotted path, making the sections on the way."""
    *sections, last = path.split(".")
    for section in sections:
        inner = mapping.get(section)
        if not isinstance(inner, dict):
            inner = mapping[section] = {}
        mapping = inner
    mapping[last] = raw


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested mappings as one that shares no section with them; the second wins, section by section."""
    result = {key: merge({}, raw) if isinstance(raw, Mapping) else raw for key, raw in below.items()}
    for key, raw in above.items():
        mine = result.get(key)
        result[key] = merge(mine if isinstance(mine, Mapping) else {}, raw) if isinstance(raw, Mapping) else raw
    return result


def _as_text(raw: Any) -> str | None:
    """The text an annotation would have: YAML writes `true`, `4143` and lists of ports in their own way."""
    if isinstance(raw, bool):
        return "true" if raw else "false"
    if isinstance(raw, list) and all(isinstance(item, str | int) and not isinstance(item, bool) for item in raw):
        return ",".join(map(str, raw))
    return str(raw) if isinstance(raw, str | int) else None


def _spelled(raw: Any) -> str:
    return repr(raw) if len(repr(raw)) <= 80 else repr(raw)[:79] + "…"


def _near(path: str) -> str:
    known = [*BY_PATH, *PROXY]
    close = difflib.get_close_matches(path, known, n=1)
    sections = sorted({name.split(".")[0] for name in known})
    return f"{close[0]} if that was meant" if close else f"one of {', '.join(sections)} (all are in docs/install.md)"
