"""Whom the aggregated API believes: the ConfigMap of the API server, and what comes with a request."""

from __future__ import annotations

import json

import pytest

from mantle.viz.front_proxy import BadConfiguration, FrontProxy, NotAuthenticated, User, parse, user_of

DATA = {
    "client-ca-file": "another CA, which must not be believed",
    "requestheader-client-ca-file": "-----BEGIN CERTIFICATE-----\n…",
    "requestheader-allowed-names": '["front-proxy-client"]',
    "requestheader-username-headers": '["X-Remote-User","X-Other-User"]',
    "requestheader-group-headers": '["X-Remote-Group"]',
    "requestheader-extra-headers-prefix": '["X-Remote-Extra-"]',
    "requestheader-uid-headers": '["X-Remote-Uid"]',
}


def proxy(**changes: str) -> FrontProxy:
    found = parse(DATA | {f"requestheader-{k.replace('_', '-')}": v for k, v in changes.items()})
    assert isinstance(found, FrontProxy)
    return found


def test_a_request_of_the_front_proxy_has_its_user() -> None:
    headers = [
        ("X-REMOTE-USER", "alice"),
        ("X-Remote-Group", "devs"),
        ("X-Remote-Group", "system:authenticated"),
        ("X-Remote-Uid", "7"),
        ("X-Remote-Extra-Scopes", "a"),
        ("X-Remote-Extra-Scopes", "b"),
        ("X-Remote-Extra-Acme.com%2Fproject", "p"),
        ("X-Remote-Extra-", "nothing"),
        ("Authorization", "Bearer of nobody"),
    ]
    extra = {"scopes": ("a", "b"), "acme.com/project": ("p",)}
    found = user_of(proxy(), "front-proxy-client", headers)
    assert found == User("alice", ("devs", "system:authenticated"), "7", extra)


@pytest.mark.parametrize(
    ("common_name", "headers", "found"),
    [
        (None, [("X-Remote-User", "root")], "no client certificate"),
        ("someone-else", [("X-Remote-User", "root")], "a client certificate for 'someone-else'"),
        ("", [("X-Remote-User", "root")], "a client certificate for ''"),
        ("front-proxy-client", [("X-Remote-Group", "system:masters")], "no user's name"),
        ("front-proxy-client", [("X-Remote-User", "")], "no user's name"),
    ],
)
def test_what_does_not_come_from_the_front_proxy_has_no_user(
    common_name: str | None, headers: list[tuple[str, str]], found: str
) -> None:
    refused = user_of(proxy(), common_name, headers)
    assert isinstance(refused, NotAuthenticated)
    assert refused.found == found


def test_the_first_header_that_is_there_names_the_user() -> None:
    both = [("x-other-user", "second"), ("x-remote-user", "first")]
    for headers, name in ((both, "first"), (both[:1], "second")):
        found = user_of(proxy(), "front-proxy-client", headers)
        assert isinstance(found, User)
        assert found.name == name


def test_without_allowed_names_any_certificate_of_the_ca_will_do() -> None:
    assert isinstance(user_of(proxy(allowed_names="[]"), "whoever", [("X-Remote-User", "a")]), User)


def test_all_that_is_wrong_with_the_config_map_at_once() -> None:
    found = parse({"client-ca-file": "x", "requestheader-allowed-names": "front", "requestheader-group-headers": "[1]"})
    assert isinstance(found, BadConfiguration)
    assert len(found.problems) == 4
    assert "no aggregation layer" in str(found)
    assert "names no header" in str(found)


def test_other_cas_of_the_config_map_are_not_taken() -> None:
    assert proxy().client_ca == DATA["requestheader-client-ca-file"]
    assert json.loads(DATA["requestheader-allowed-names"]) == list(proxy().allowed_names)
