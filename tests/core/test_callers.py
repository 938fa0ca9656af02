"""Who may ask, and for whom: the caller's proved identity against the workload it speaks for."""

from __future__ import annotations

import pytest
from discovery_play import IDENTITY, MESH, pod, snapshot

from mantle.core.callers import Caller, CallerDenied, Presented, check_caller, parse_workload
from mantle.core.model import Key
from mantle.core.reasons import CallerRefused
from mantle.core.world import World

WORLD = World.empty(MESH).next(snapshot(1, pod("web-1", "10.0.0.1"), pod("emoji-1", "10.0.0.2")))
WEB, EMOJI, OWN = Key("emojivoto", "web-1"), Key("emojivoto", "emoji-1"), Key("mantle", "mantle-destination-x")
AS_WEB = Presented(IDENTITY.format("web", "emojivoto"), loopback=False)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"ns":"emojivoto","pod":"web-1"}', WEB),
        ('{"ns":"emojivoto","nodeName":"n1","pod":"web-1"}', WEB),
        ("emojivoto:web-1", WEB),
    ],
)
def test_workloads_that_can_be_read(text: str, key: Key) -> None:
    assert parse_workload(text) == key


@pytest.mark.parametrize("text", ["{", "{}", '{"ns":"a"}', '{"ns":1,"pod":"b"}', "a", ":", "a:", "{" * 10_000, "[]"])
def test_workloads_that_cannot(text: str) -> None:
    refused = parse_workload(text)
    assert isinstance(refused, CallerDenied) and refused.reason is CallerRefused.BAD_WORKLOAD


def test_a_pod_may_ask_for_itself_and_for_nothing_in_particular() -> None:
    assert check_caller(WORLD, AS_WEB, WEB, OWN, False) == Caller(AS_WEB.client_id, WEB)
    assert check_caller(WORLD, AS_WEB, None, OWN, False) == Caller(AS_WEB.client_id, None)


@pytest.mark.parametrize(
    ("presented", "workload", "reason"),
    [
        (AS_WEB, EMOJI, CallerRefused.OTHER_WORKLOAD),
        (AS_WEB, Key("other", "web-1"), CallerRefused.UNKNOWN_WORKLOAD),
        (Presented(IDENTITY.format("web", "other"), False), WEB, CallerRefused.OTHER_WORKLOAD),
        (Presented("web.emojivoto.serviceaccount.identity.linkerd.cluster.local", False), WEB, CallerRefused.ANONYMOUS),
        (Presented("", False), WEB, CallerRefused.ANONYMOUS),
        (Presented("", True), WEB, CallerRefused.ANONYMOUS),
        (Presented("", False), OWN, CallerRefused.ANONYMOUS),
        (Presented("", True), None, CallerRefused.ANONYMOUS),
    ],
)
def test_others_may_not(presented: Presented, workload: Key | None, reason: CallerRefused) -> None:
    refused = check_caller(WORLD, presented, workload, OWN, False)
    assert isinstance(refused, CallerDenied) and refused.reason is reason
    assert refused.found and refused.wanted


def test_the_servers_own_sidecar_asks_over_loopback_for_its_own_pod() -> None:
    assert check_caller(WORLD, Presented("", True), OWN, OWN, False) == Caller("", OWN)


def test_the_interop_switch_takes_an_anonymous_callers_word_but_not_a_named_ones() -> None:
    assert check_caller(WORLD, Presented("", False), WEB, OWN, True) == Caller("", WEB)
    assert isinstance(check_caller(WORLD, AS_WEB, EMOJI, OWN, True), CallerDenied)


def test_viz_may_ask_for_every_workload_but_nobody_who_is_only_named_so() -> None:
    viz = Presented(IDENTITY.format("mantle-viz", "mantle"), False)
    assert check_caller(WORLD, viz, EMOJI, OWN, False) == Caller(viz.client_id, EMOJI)
    elsewhere = Presented(IDENTITY.format("mantle-viz", "other"), False)
    assert isinstance(check_caller(WORLD, elsewhere, EMOJI, OWN, False), CallerDenied)
    assert isinstance(check_caller(WORLD, Presented("", False), EMOJI, OWN, False), CallerDenied)
