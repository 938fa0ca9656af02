"""The demo's verdict: exit 0 only if every edge of emojivoto was seen encrypted, else 1 with what was wrong."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from mantle.cli import demo_play, launch
from mantle.cli.demo_play import EXPECTED, Play, what_is_wrong
from mantle.cli.output import Failure

Row = dict[str, Any]


def edge(src: str, dst: str, reason: str = "", **counts: int) -> Row:
    row = {"src": src, "dst": dst, "src_namespace": "emojivoto", "dst_namespace": "emojivoto", "control": False}
    return row | {"client_id": "", "server_id": "", "no_tls_reason": reason, "counts": counts or {"secured": 5}}


GOOD = [edge(*ends) for ends in EXPECTED]
PLAIN = edge("web", "voting", "disabled", disabled=5)
SOME = edge("web", "voting", "disabled", secured=5, disabled=1)
STRANGER = edge("cron", "web", "not_provided_by_remote", not_provided_by_remote=2)


@pytest.mark.parametrize(
    ("edges", "wrong"),
    [
        (GOOD, []),
        ([], [f"no traffic was seen from {a} to {b}" for a, b in EXPECTED]),
        (GOOD[:2], ["no traffic was seen from web to voting"]),
        ([*GOOD[:2], GOOD[2] | {"counts": {}}], ["no traffic was seen from web to voting"]),
        ([*GOOD[:2], PLAIN], ["the traffic from web to voting is not encrypted: disabled"]),
        ([*GOOD[:2], SOME], ["some traffic from web to voting is not encrypted: disabled"]),
        ([*GOOD, STRANGER], ["some traffic from cron to web is not encrypted: not_provided_by_remote"]),
        (
            [*GOOD[:2], edge("web", "voting", "", unknown=1)],
            ["the traffic from web to voting is not encrypted: unknown"],
        ),
    ],
)
def test_every_edge_counts(edges: list[Row], wrong: list[str]) -> None:
    assert what_is_wrong(edges) == wrong


class Stage:
    """A mesh whose edges are those given, the last ones for ever. Remembers that it was removed."""

    starting = "starting"
    begun = True

    def __init__(self, *edges: list[Row], fails: bool = False) -> None:
        self._edges, self._fails = list(edges), fails
        self.ended = False
        self.views = self

    def start(self, say: demo_play.Say) -> None:
        if self._fails:
            raise Failure("the mesh does not start")

    def get(self, view: str, namespace: str | None, **query: str | int) -> Any:
        return {"edges": self._edges.pop(0) if len(self._edges) > 1 else self._edges[0]}

    def tap(self, target: Mapping[str, str], body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        yield {"notice": {"pod": "emojivoto/web-1", "message": "not yet"}}
        yield {"seen": "it"}

    def page(self) -> tuple[str | None, str]:
        return "http://127.0.0.1:1", "vote at http://127.0.0.1:1"

    def end(self) -> None:
        self.ended = True


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The play takes signals for itself; how long it waits for traffic is not what is looked at here."""
    monkeypatch.setattr(demo_play, "TRAFFIC_TIMEOUT", 0.2)
    monkeypatch.setattr(demo_play, "ASK_AGAIN", 0.01)
    kept = {number: signal.getsignal(number) for number in (2, 15, 1, signal.SIGALRM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_an_encrypted_mesh_ends_with_0_and_leaves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    stage = Stage([], GOOD)
    assert Play(stage, quiet=True, seconds=1).play() == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["ok"], answer["wrong"]) == (True, []) and answer["encrypted_after_seconds"] >= 0
    assert answer["tap"] and all(event == {"seen": "it"} for event in answer["tap"])
    assert stage.ended


@pytest.mark.parametrize("quiet", [True, False])
def test_plaintext_ends_with_1_and_is_named(quiet: bool, capsys: pytest.CaptureFixture[str]) -> None:
    stage = Stage([*GOOD[:2], PLAIN])
    assert Play(stage, quiet=quiet, seconds=1).play() == 1
    said = capsys.readouterr()
    if quiet:
        answer = json.loads(said.out)
        assert (answer["ok"], answer["encrypted_after_seconds"], answer["tap"]) == (False, None, [])
        assert answer["wrong"] == ["the traffic from web to voting is not encrypted: disabled"]
    else:
        assert "error: the traffic from web to voting is not encrypted: disabled\n" in said.err
        assert "disabled" in said.out and "requests as they happen" not in said.out
    assert stage.ended


def test_what_goes_wrong_while_people_watch_counts_too(capsys: pytest.CaptureFixture[str]) -> None:
    stage = Stage(GOOD, [*GOOD, STRANGER])
    assert Play(stage, quiet=True, seconds=1).play() == 1
    assert json.loads(capsys.readouterr().out)["wrong"] == [
        "some traffic from cron to web is not encrypted: not_provided_by_remote"
    ]
    assert stage.ended


def test_a_mesh_that_does_not_start_is_removed_all_the_same() -> None:
    stage = Stage(GOOD, fails=True)
    with pytest.raises(Failure, match="does not start"):
        Play(stage, quiet=True, seconds=1).play()
    assert stage.ended


def test_another_system_than_linux_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    (problem,) = launch.obstacles()
    assert "needs Linux" in problem.message and "Linux virtual machine" in str(problem.fix)
