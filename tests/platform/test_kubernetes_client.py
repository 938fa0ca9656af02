"""Ways to an API server, and what is said when there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mantle.platform.kubernetes.client import BadCluster, from_kubeconfig, in_cluster


def kubeconfig(directory: Path, **changes: Any) -> Path:
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "one",
        "clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:6443", "insecure-skip-tls-verify": True}}],
        "users": [{"name": "u", "user": {"token": "secret"}}],
        "contexts": [
            {"name": "one", "context": {"cluster": "c", "user": "u"}},
            {"name": "nobody", "context": {"cluster": "c"}},
        ],
    } | changes
    path = directory / "kubeconfig"
    path.write_text(json.dumps(document))
    return path


def test_the_server_of_the_context(tmp_path: Path) -> None:
    assert from_kubeconfig(kubeconfig(tmp_path)).server == "https://127.0.0.1:6443"


@pytest.mark.parametrize(
    ("changes", "context", "said"),
    [
        ({}, "two", "Context 'two' not found; its contexts: nobody, one"),
        ({"current-context": None}, None, "No current context set"),
        ({}, "nobody", "its context nobody names no user"),
        ({"clusters": None}, None, "cannot read the kubeconfig"),
        ({"users": []}, None, "is of no use: 'u'"),
    ],
)
def test_a_kubeconfig_of_no_use_says_why(
    changes: dict[str, Any], context: str | None, said: str, tmp_path: Path
) -> None:
    with pytest.raises(BadCluster) as caught:
        from_kubeconfig(kubeconfig(tmp_path, **changes), context)
    assert said in str(caught.value)


def test_a_kubeconfig_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadCluster, match=r"cannot read the kubeconfig .*/none"):
        from_kubeconfig(tmp_path / "none")


def test_a_pod_is_known_by_what_the_kubelet_gives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
    monkeypatch.delenv("KUBERNETES_SERVICE_PORT", raising=False)
    (tmp_path / "token").write_text("t")
    with pytest.raises(BadCluster) as caught:
        in_cluster(tmp_path)
    assert "no KUBERNETES_SERVICE_PORT, no " in str(caught.value)
    assert "KUBERNETES_SERVICE_HOST" not in str(caught.value)
    assert f"{tmp_path}/token" not in str(caught.value)
