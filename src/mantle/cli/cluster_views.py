"""The views of a mesh on a cluster: viz, through the API server's aggregated API, as the user the kubeconfig says.

The API server decides who may see what; a refusal becomes the command that grants the right. Which path has which view
is in `core/views.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mantle.cli.kube_client import Answer, KubeClient, Refused
from mantle.cli.output import Failure, Problem
from mantle.core import views
from mantle.core.views import Right

_USER = re.compile(r'User "((?:[^"\\]|\\.)*)" cannot ')
"""How the API server says whom it refused."""


class ClusterViews:
    def __init__(self, client: KubeClient) -> None:
        self._client = client

    def get(self, view: str, namespace: str | None, **query: str | int) -> Any:
        try:
            return self._client.get(views.view_path(view, namespace), query)
        except Refused as refused:
            raise failure(refused.answer, views.view_right(view, namespace), self._client) from refused

    def tap(self, target: Mapping[str, str], body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        named = target["kind"], target["name"], target["namespace"]
        try:
            yield from self._client.lines("POST", views.tap_path(*named), dict(body))
        except Refused as refused:
            raise failure(refused.answer, views.tap_right(*named), self._client) from refused


def failure(answer: Answer, right: Right, client: KubeClient) -> Failure:
    """What an error answer means to who asked for a view."""
    where = f"context {client.access.context!r}"
    if isinstance(answer.body, dict) and (problems := _ours(answer.body)):
        return Failure.of(problems)
    match answer.status:
        case 401:
            return Failure(
                f"the API server does not accept the credentials of {where}: {answer.message}",
                fix="log in again, or choose another context with --context",
            )
        case 403:
            found = _USER.search(answer.message)
            user = found[1] if found else client.access.acting_as.user
            if not user or "impersonate" in answer.message:
                return Failure(answer.message, fix="ask who may grant rights in this cluster")
            return Failure(*views.refusal(right, user))
        case 404:
            return Failure(
                f"this cluster ({where}) does not serve {views.GROUP}: Mantle is not installed, or its views are not",
                fix="install it with `mantle install | kubectl apply -f -`; `mantle check` says what is missing",
            )
        case 502 | 503 | 504:
            return Failure(
                f"the views of this cluster ({where}) do not answer: {answer.message}",
                fix=f"see `kubectl get apiservice {views.VERSION}.{views.GROUP}` and `kubectl -n mantle get pods`",
            )
        case _:
            return Failure(f"the API server answered {answer.status}: {answer.message}")


def _ours(body: Mapping[str, Any]) -> list[Problem]:
    """The problems of an answer that viz made."""
    errors = body.get("errors")
    if not isinstance(errors, list):
        return []
    return [Problem(str(e.get("message")), e.get("fix")) for e in errors if isinstance(e, dict) and e.get("message")]
