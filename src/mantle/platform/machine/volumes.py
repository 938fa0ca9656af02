"""What lies in a pod's volumes: pure values from objects, written to tmpfs by `podfiles.py`.

ConfigMap, Secret, downward API and projected volumes become files; emptyDir an empty directory; a projected
serviceAccountToken becomes a `TokenWanted`, because tokens are signed and renewed by whoever holds the key and a clock.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mantle.platform.machine.manifest import Object, ObjectId

DEFAULT_TOKEN_SECONDS = 3600


@dataclass(frozen=True, slots=True)
class File:
    path: str
    """Relative to the volume."""
    data: bytes
    mode: int


@dataclass(frozen=True, slots=True)
class TokenWanted:
    """A projected token of the pod's ServiceAccount, bound to the pod."""

    volume: str
    path: str
    audience: str
    seconds: int


@dataclass(frozen=True, slots=True)
class Volume:
    """One volume of one pod. `source` is set when it is a path of the host instead of files."""

    name: str
    files: tuple[File, ...] = ()
    tokens: tuple[TokenWanted, ...] = ()
    writable: bool = False
    secret: bool = False
    source: str = ""
    create: str = ""
    """`dir` or `file`: make `source` when it is missing (hostPath type …OrCreate)."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a pod may be told about itself (downward API)."""

    name: str
    namespace: str
    uid: str
    ip: str
    service_account: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    node: str
    host_ip: str
    cpus: int
    memory: int
    """Bytes."""


def data_of(item: Object | None) -> dict[str, bytes]:
    """The contents of a ConfigMap or Secret. A missing object is empty (only optional ones can be missing here)."""
    if item is None:
        return {}
    out: dict[str, bytes] = {}
    for key, value in (item.doc.get("data") or {}).items():
        out[key] = base64.b64decode(value) if item.kind == "Secret" else str(value).encode()
    for key, value in (item.doc.get("binaryData") or {}).items():
        out[key] = base64.b64decode(value)
    for key, value in (item.doc.get("stringData") or {}).items():
        out[key] = str(value).encode()
    return out


_SUBSCRIPT = re.compile(r"metadata\.(labels|annotations)\['(.+)'\]\Z")


def field(path: str, me: Identity) -> str:
    """The value of a downward API `fieldPath`. Raises KeyError for a path that does not exist (refused by the table
    of kinds).
    """
    if match := _SUBSCRIPT.match(path):
        return (me.labels if match[1] == "labels" else me.annotations).get(match[2], "")
    values = {
        "metadata.name": me.name,
        "metadata.namespace": me.namespace,
        "metadata.uid": me.uid,
        "metadata.labels": _lines(me.labels),
        "metadata.annotations": _lines(me.annotations),
        "spec.nodeName": me.node,
        "spec.serviceAccountName": me.service_account,
        "status.podIP": me.ip,
        "status.podIPs": me.ip,
        "status.hostIP": me.host_ip,
        "status.hostIPs": me.host_ip,
    }
    return values[path]


def resource(ref: Mapping[str, Any], me: Identity) -> str:
    """Without limits Kubernetes answers with what the node has; so do we."""
    if ref["resource"].endswith(".cpu"):
        return str(me.cpus * 1000 if ref.get("divisor") == "1m" else me.cpus)
    divisor = {"1Ki": 2**10, "1Mi": 2**20, "1Gi": 2**30}.get(str(ref.get("divisor", "1")), 1)
    return str(me.memory // divisor)


def _lines(values: Mapping[str, str]) -> str:
    return "\n".join(f'{key}="{_escape(value)}"' for key, value in sorted(values.items()))


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def volumes(spec: Mapping[str, Any], objects: Mapping[ObjectId, Object], me: Identity) -> list[Volume]:
    """Every volume of a pod spec."""
    return [_volume(v, objects, me) for v in spec.get("volumes") or []]


def _volume(v: Mapping[str, Any], objects: Mapping[ObjectId, Object], me: Identity) -> Volume:
    name = v["name"]
    if "hostPath" in v:
        kind = v["hostPath"].get("type") or ""
        create = {"DirectoryOrCreate": "dir", "FileOrCreate": "file"}.get(kind, "")
        return Volume(name, writable=True, source=v["hostPath"]["path"], create=create)
    if v.get("projected") is not None:
        mode = v["projected"].get("defaultMode", 0o644)
        files: list[File] = []
        tokens: list[TokenWanted] = []
        secret = False
        for source in v["projected"].get("sources") or []:
            if token := source.get("serviceAccountToken"):
                seconds = int(token.get("expirationSeconds") or DEFAULT_TOKEN_SECONDS)
                tokens.append(TokenWanted(name, token["path"], token.get("audience") or "", seconds))
                secret = True
            elif item := source.get("configMap"):
                files += _keyed(objects.get(("ConfigMap", me.namespace, item["name"])), item.get("items"), mode)
            elif item := source.get("secret"):
                files += _keyed(objects.get(("Secret", me.namespace, item["name"])), item.get("items"), mode)
                secret = True
            elif item := source.get("downwardAPI"):
                files += _downward(item.get("items") or [], mode, me)
        return Volume(name, tuple(files), tuple(tokens), secret=secret)
    if (item := v.get("configMap")) is not None:
        return Volume(
            name,
            tuple(
                _keyed(
                    objects.get(("ConfigMap", me.namespace, item["name"])),
                    item.get("items"),
                    item.get("defaultMode", 0o644),
                )
            ),
        )
    if (item := v.get("secret")) is not None:
        files = list(
            _keyed(
                objects.get(("Secret", me.namespace, item["secretName"])),
                item.get("items"),
                item.get("defaultMode", 0o644),
            )
        )
        return Volume(name, tuple(files), secret=True)
    if (item := v.get("downwardAPI")) is not None:
        return Volume(name, tuple(_downward(item.get("items") or [], item.get("defaultMode", 0o644), me)))
    return Volume(name, writable=True)


def _keyed(item: Object | None, items: Iterable[Mapping[str, Any]] | None, mode: int) -> Iterable[File]:
    data = data_of(item)
    if not items:
        return [File(key, value, mode) for key, value in data.items()]
    return [File(i["path"], data[i["key"]], i.get("mode", mode)) for i in items if i["key"] in data]


def _downward(items: Iterable[Mapping[str, Any]], mode: int, me: Identity) -> Iterable[File]:
    for i in items:
        text = field(i["fieldRef"]["fieldPath"], me) if "fieldRef" in i else resource(i["resourceFieldRef"], me)
        yield File(i["path"], text.encode(), i.get("mode", mode))
