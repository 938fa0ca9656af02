"""The annotations of a pod or namespace that steer injection: their names, who inherits them, and what is accepted.

One table, `CONFIG`, is the only list: injection, `mantle inject`'s flags and the documentation are made from it. A
value is parsed once, here; every mistake is collected with what would have been accepted, because a typo in a security
setting must never mean "the default". Pure: dictionaries in, values out.

Names follow Linkerd's `config.linkerd.io/*` one for one under `config.mantle.dev/*`, so that people can move over.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

INJECT = "mantle.dev/inject"
PREFIX = "config.mantle.dev/"
DISABLE_TAP = "viz.mantle.dev/disable-tap"
CREATED_BY = "mantle.dev/created-by"
PROXY_VERSION = "mantle.dev/proxy-version"
TRUST_ROOT_SHA256 = "mantle.dev/trust-root-sha256"
SKIPPED = "mantle.dev/injection-skipped"
"""On a pod that somebody wanted meshed and that is not: why."""
OPAQUE_PORTS = f"{PREFIX}opaque-ports"
INHERITED_OPAQUE_PORTS = "mantle.dev/inherited-opaque-ports"
"""On a Service: the opaque ports that the injector wrote, as its namespace said then. While both are equal they are a
copy, and what the namespace says now counts.
"""
ADDED = "mantle.dev/added-annotations"
"""On a meshed pod: which of its other annotations injection wrote, so that they can be taken away again."""
LABEL_CONTROL_NS = "mantle.dev/control-plane-ns"
LABEL_WORKLOAD_NS = "mantle.dev/workload-ns"
LABEL_COMPONENT = "mantle.dev/control-plane-component"
LABEL_OWNER_PREFIX = "mantle.dev/proxy-"

INJECT_VALUES = ("enabled", "disabled", "ingress")
POLICIES = (
    "all-unauthenticated",
    "all-authenticated",
    "cluster-authenticated",
    "cluster-unauthenticated",
    "deny",
    "audit",
)


@dataclass(frozen=True, slots=True)
class Mistake:
    """A value that cannot be used: where it stands, what stands there, and what would be accepted."""

    annotation: str
    value: str
    accepted: str
    where: str = "pod"
    """`pod` or `namespace`."""

    def __str__(self) -> str:
        what = f"annotation {self.annotation}" if "/" in self.annotation else self.annotation
        return f"{self.where} {what}: {self.value!r} is not accepted; use {self.accepted}"


class _NotAccepted(ValueError):
    """Raised by a parser; `CONFIG` knows what to say."""


def _choice(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in words:
            raise _NotAccepted(text)
        return text

    return parse


def _boolean(text: str) -> bool:
    return _choice("true", "false")(text) == "true"


def _enabled(text: str) -> bool:
    return _choice("enabled", "disabled")(text) == "enabled"


def _port(text: str) -> int:
    if not re.fullmatch(r"\d{1,5}", text) or not 1 <= int(text) <= 65535:
        raise _NotAccepted(text)
    return int(text)


def _number(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"\d{1,10}", text) or not low <= int(text) <= high:
            raise _NotAccepted(text)
        return int(text)

    return parse


def port_ranges(text: str) -> tuple[tuple[int, int], ...]:
    """Parses `80,443,8000-8010` into inclusive ranges; raises ValueError on anything else, an empty list is ()."""
    ranges = []
    for part in filter(None, (item.strip() for item in text.split(","))):
        low, dash, high = part.partition("-")
        first = _port(low.strip())
        last = _port(high.strip()) if dash else first
        if last < first:
            raise _NotAccepted(part)
        ranges.append((first, last))
    return tuple(ranges)


def _ports(text: str) -> str:
    """A port list in canonical spelling, as the proxy and the redirect take it."""
    return spelled(port_ranges(text))


def spelled(ranges: Iterable[tuple[int, int]]) -> str:
    """Ranges of ports as the proxy takes them."""
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)


_PORT_NAME = re.compile(r"(?=.*[a-z])[a-z0-9]([a-z0-9-]{0,13}[a-z0-9])?")
"""IANA_SVC_NAME: it may begin with a digit (`9p`)."""


def _ports_or_names(text: str) -> str:
    """A port list in which a container port may be given by its name."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return ",".join(part if _PORT_NAME.fullmatch(part) else _ports(part) for part in parts)


def named_ranges(text: str, named: Mapping[str, int]) -> tuple[tuple[int, int], ...]:
    """What `_ports_or_names` accepted, as ranges. A name that is not in `named` is a port of another pod or service:
    it means nothing here.
    """
    ranges: list[tuple[int, int]] = []
    for part in filter(None, text.split(",")):
        if not _PORT_NAME.fullmatch(part):
            ranges += port_ranges(part)
        elif part in named:
            ranges.append((named[part], named[part]))
    return tuple(ranges)


def _networks(text: str) -> str:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return ",".join(str(ipaddress.ip_network(part)) for part in parts)


def _duration(text: str) -> str:
    """A duration as the proxy takes it: one number and one unit."""
    if not re.fullmatch(r"\d{1,9}(ms|s|m|h|d)", text):
        raise _NotAccepted(text)
    return text


def _quantity(text: str) -> str:
    """https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/ (its usual spellings)."""
    if not re.fullmatch(r"\d+(\.\d+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?", text):
        raise _NotAccepted(text)
    return text


def _ratio(text: str) -> str:
    if not re.fullmatch(r"0?\.\d+", text) or float(text) == 0:
        raise _NotAccepted(text)
    return text


def _text(text: str) -> str:
    if not text or any(ord(char) < 32 for char in text):
        raise _NotAccepted(text)
    return text


def _image(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9./:_@-]*", text):
        raise _NotAccepted(text)
    return text


def _environment(text: str) -> tuple[Mapping[str, Any], ...]:
    parsed = json.loads(text)
    if not isinstance(parsed, list) or not all(_is_entry(item) for item in parsed):
        raise _NotAccepted(text)
    return tuple(parsed)


def _is_entry(item: object) -> bool:
    name = item.get("name") if isinstance(item, dict) else None
    return isinstance(name, str) and name != ""


@dataclass(frozen=True, slots=True)
class Setting:
    """One `config.mantle.dev/*` annotation. `parse` raises ValueError; `accepted` is said then."""

    name: str
    parse: Callable[[str], Any]
    accepted: str
    help: str
    inherited: bool = True
    """Taken from the namespace when the pod does not set it."""


_PORT = "a port from 1 to 65535"
_PORTS = "ports and ranges such as 25,3306,8000-8010"
_DURATION = "a number and one unit (ms, s, m, h or d), such as 500ms"
_QUANTITY = "a Kubernetes quantity such as 100m or 64Mi"
_BOOL = "true or false"
_SWITCH = "enabled or disabled"
_IMAGE = "an image name"

_SETTINGS = (
    Setting("proxy-image", _image, _IMAGE, "image of the proxy, without its tag"),
    Setting("proxy-version", _image, "an image tag", "tag of the proxy's image"),
    Setting(
        "image-pull-policy",
        _choice("Always", "IfNotPresent", "Never"),
        "Always, IfNotPresent or Never",
        "pull policy of Mantle's images",
    ),
    Setting("debug-image", _image, _IMAGE, "image of the debug container"),
    Setting("debug-image-version", _image, "an image tag", "tag of the debug image"),
    Setting(
        "debug-image-pull-policy",
        _choice("Always", "IfNotPresent", "Never"),
        "Always, IfNotPresent or Never",
        "pull policy of the debug image",
    ),
    Setting("enable-debug-sidecar", _boolean, _BOOL, "adds the container mantle-debug"),
    Setting("control-port", _port, _PORT, "the proxy's tap port (4190)"),
    Setting("admin-port", _port, _PORT, "the proxy's metrics and health port (4191)"),
    Setting("inbound-port", _port, _PORT, "the proxy's inbound port (4143)"),
    Setting("outbound-port", _port, _PORT, "the proxy's outbound port (4140)"),
    Setting("pod-inbound-ports", _ports, _PORTS, "replaces the list of the pod's own ports"),
    Setting("skip-inbound-ports", _ports, _PORTS, "ports that bypass the proxy on the way in: no mTLS"),
    Setting("skip-outbound-ports", _ports, _PORTS, "ports that bypass the proxy on the way out: no mTLS"),
    Setting("skip-subnets", _networks, "networks such as 10.1.0.0/16", "networks that bypass the proxy: no mTLS"),
    Setting(
        "opaque-ports",
        _ports_or_names,
        f"{_PORTS}, or names of container ports",
        "ports without protocol detection, still mTLS",
    ),
    Setting(
        "transport-mode",
        _choice("link", "transparent"),
        "link or transparent",
        "how meshed clients come: over links to the proxy's inbound port (the default), or by TLS straight to the "
        "application's port",
    ),
    Setting("proxy-cpu-request", _quantity, _QUANTITY, "CPU request of the proxy"),
    Setting("proxy-cpu-limit", _quantity, _QUANTITY, "CPU limit of the proxy"),
    Setting(
        "proxy-cpu-ratio-limit",
        _ratio,
        "a ratio above 0 and below 1",
        "share of the node's CPUs used as data threads",
        False,
    ),
    Setting("proxy-memory-request", _quantity, _QUANTITY, "memory request of the proxy"),
    Setting("proxy-memory-limit", _quantity, _QUANTITY, "memory limit of the proxy"),
    Setting("proxy-ephemeral-storage-request", _quantity, _QUANTITY, "storage request of the proxy"),
    Setting("proxy-ephemeral-storage-limit", _quantity, _QUANTITY, "storage limit of the proxy"),
    Setting("proxy-uid", _number(1, 4294967294), "a user id other than 0", "user id of the proxy (2102)"),
    Setting("proxy-gid", _number(0, 4294967294), "a group id", "group id of the proxy"),
    Setting("proxy-admin-shutdown", _enabled, _SWITCH, "POST /shutdown on the admin port, from loopback only"),
    Setting("proxy-log-level", _text, "a log filter such as info,mantle=debug", "log filter of the proxy"),
    Setting("proxy-log-format", _choice("plain", "json"), "plain or json", "log format of the proxy"),
    Setting("proxy-log-http-headers", _choice("off", "insecure"), "off or insecure", "whether debug logs show headers"),
    Setting("enable-external-profiles", _boolean, _BOOL, "profiles for names outside the cluster"),
    Setting("proxy-require-identity-inbound-ports", _ports, _PORTS, "ports that accept meshed clients only"),
    Setting("tls", _choice("required", "optional"), "required or optional", "optional: the weaker, experimental mode"),
    Setting("default-inbound-policy", _choice(*POLICIES), ", ".join(POLICIES), "who may connect where no policy says"),
    Setting("proxy-metrics-hostname-labels", _boolean, _BOOL, "host names as labels of outbound metrics"),
    Setting("proxy-outbound-connect-timeout", _duration, _DURATION, "for the proxy's connections to others (1000ms)"),
    Setting("proxy-inbound-connect-timeout", _duration, _DURATION, "for the proxy's connections to the app (100ms)"),
    Setting("proxy-outbound-discovery-cache-unused-timeout", _duration, _DURATION, "how long an unused answer stays"),
    Setting("proxy-inbound-discovery-cache-unused-timeout", _duration, _DURATION, "how long an unused policy stays"),
    Setting("proxy-disable-outbound-protocol-detect-timeout", _boolean, _BOOL, "wait as long as it takes (365d)"),
    Setting("proxy-disable-inbound-protocol-detect-timeout", _boolean, _BOOL, "wait as long as it takes (365d)"),
    Setting("enable-gateway", _boolean, _BOOL, "gateway mode between clusters", False),
    Setting(
        "close-wait-timeout",
        _number(0, 86400),
        "seconds, 0 to 86400",
        "conntrack timeout of CLOSE_WAIT (a sysctl of the pod, which the kubelet must allow)",
        False,
    ),
    Setting("proxy-await", _enabled, _SWITCH, "the application starts only when the proxy is ready"),
    Setting("access-log", _choice("apache", "json"), "apache or json", "access log of the proxy"),
    Setting("shutdown-grace-period", _duration, _DURATION, "how long the proxy drains"),
    Setting("proxy-enable-native-sidecar", _boolean, _BOOL, "the proxy as an init container that keeps running"),
    Setting("redirect-guard", _enabled, _SWITCH, "a container that puts the redirect back when somebody flushes it"),
    Setting(
        "proxy-wait-before-exit-seconds",
        _number(0, 3600),
        "seconds, 0 to 3600",
        "pause before the proxy drains (from Kubernetes 1.30)",
    ),
    Setting(
        "proxy-additional-env",
        _environment,
        'a JSON list of environment entries such as [{"name": "A", "value": "b"}]',
        "more environment of the proxy",
    ),
)

CONFIG: Mapping[str, Setting] = {setting.name: setting for setting in _SETTINGS}


@dataclass(frozen=True, slots=True)
class Config:
    """Every accepted setting of one pod, its namespace's included, parsed."""

    values: Mapping[str, Any]
    inherited: Mapping[str, str]
    """Annotations (full names, texts) that came from the namespace: written onto the pod, so that all see the same."""

    def get(self, name: str, default: Any = None) -> Any:
        """The parsed value of `config.mantle.dev/NAME`, or `default`; KeyError for a name `CONFIG` does not list."""
        CONFIG[name]
        return self.values.get(name, default)


def own_opaque_ports(service: Mapping[str, str]) -> str | None:
    """The opaque ports that a Service's annotations say themselves; None if they say nothing, or hold the copy of the
    namespace's.
    """
    written = service.get(OPAQUE_PORTS)
    return None if written == service.get(INHERITED_OPAQUE_PORTS) else written


def read_config(pod: Mapping[str, str], namespace: Mapping[str, str]) -> tuple[Config, tuple[Mistake, ...]]:
    """Parses the `config.mantle.dev/*` annotations of a pod and its namespace; mistakes do not stop at the first.

    A namespace's setting that no pod inherits is ignored there, as it may be meant for other objects. An unknown name
    is a mistake on a pod and on a namespace alike.
    """
    values: dict[str, Any] = {}
    inherited: dict[str, str] = {}
    mistakes: list[Mistake] = []
    for where, written in (("namespace", namespace), ("pod", pod)):
        for full, text in sorted(written.items()):
            if not full.startswith(PREFIX):
                continue
            name = full.removeprefix(PREFIX)
            setting = CONFIG.get(name)
            if setting is None:
                close = difflib.get_close_matches(name[:100], CONFIG, n=1)
                fix = f"{PREFIX}{close[0]} if that was meant" if close else "a name listed in docs/annotations.md"
                mistakes.append(Mistake(full, str(text), fix, where))
                continue
            if where == "namespace" and (not setting.inherited or (full in pod and name != "proxy-additional-env")):
                continue
            try:
                parsed = setting.parse(str(text).strip())
            except (ValueError, RecursionError):  # the second is JSON that is nested for ever
                mistakes.append(Mistake(full, str(text), setting.accepted, where))
                continue
            if name == "proxy-additional-env":
                parsed = _merge_environment(values.get(name, ()), parsed)
            values[name] = parsed
            if where == "namespace" and full not in pod:
                inherited[full] = str(text)
    return Config(values, inherited), tuple(mistakes)


def _merge_environment(
    base: tuple[Mapping[str, Any], ...], over: tuple[Mapping[str, Any], ...]
) -> tuple[Mapping[str, Any], ...]:
    merged = {item["name"]: item for item in base}
    merged.update({item["name"]: item for item in over})
    return tuple(merged.values())
