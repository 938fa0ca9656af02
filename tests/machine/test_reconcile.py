"""What an `up` changes, and what is stopped and started then: tables on virtual time."""

from __future__ import annotations

from mantle.platform.machine import manifest
from mantle.platform.machine.reconcile import (
    Addresses,
    Goal,
    Running,
    Start,
    Stop,
    decide,
    forget,
    job_failed,
    merge,
    objects_of,
    pod_name,
)
from mantle.platform.machine.spec import Phase

WEB = ("Deployment", "shop", "web")
JOB = ("Job", "shop", "once")


def config(file: str, **values: str) -> dict[str, tuple[manifest.Object, ...]]:
    made = [manifest.Object("ConfigMap", "shop", name, {"data": {"v": value}}, file) for name, value in values.items()]
    return {file: tuple(made)}


def test_up_is_additive_and_says_what_it_does() -> None:
    files, changes = merge({}, config("a", one="1", two="2"))
    assert [(c.event, c.item.name) for c in changes] == [("created", "one"), ("created", "two")]
    files, changes = merge(files, config("b", three="3"))
    assert set(objects_of(files)) == {("ConfigMap", "shop", n) for n in ("one", "two", "three")}
    files, changes = merge(files, config("a", one="new"))
    assert [(c.event, c.item.name) for c in changes] == [("updated", "one"), ("removed", "two")]
    files, changes = merge(files, config("a", one="new"))
    assert [(c.event, c.item.name) for c in changes] == [("unchanged", "one")]


def test_an_object_that_moves_to_another_file_is_not_removed() -> None:
    files, _ = merge({}, config("a", one="1", two="2"))
    files, changes = merge(files, {**config("a", one="1"), **config("b", two="2")})
    assert [c.event for c in changes] == ["unchanged", "unchanged"]
    files, changes = merge(files, config("c", one="1"))
    assert "a" not in files and [c.event for c in changes] == ["unchanged"]
    files, changes = forget(files, ["c"])
    assert [(c.event, c.item.name) for c in changes] == [("removed", "one")]
    assert forget(files, None)[0] == {}


def pod(uid: str, of: tuple[str, str, str] = WEB, made: str = "h1", **more: object) -> Running:
    return Running(uid, uid, of, made, **more)  # type: ignore[arg-type]


def test_replicas_are_started_once_and_not_again() -> None:
    goal = Goal(WEB, "h1", 2)
    assert decide([goal], [], 0).start == (Start(WEB), Start(WEB))
    assert decide([goal], [pod("a")], 0).start == (Start(WEB),)
    assert decide([goal], [pod("a"), pod("b")], 0) == decide([], [], 0)


def test_scaling_down_stops_what_is_not_ready_then_the_youngest() -> None:
    pods = [pod("old", ready=True, since=1), pod("young", ready=True, since=9), pod("sick", since=2)]
    assert decide([Goal(WEB, "h1", 1)], pods, 0).stop == (Stop("sick", "scaled down"), Stop("young", "scaled down"))


def test_a_change_stops_first_and_starts_when_the_old_pods_are_gone() -> None:
    goal = Goal(WEB, "h2", 1)
    assert decide([goal], [pod("a")], 0) == decide([goal], [pod("a")], 0)
    first = decide([goal], [pod("a")], 0)
    assert (first.stop, first.start) == ((Stop("a", "replaced"),), ())
    during = decide([goal], [pod("a", stopping=True)], 0)
    assert (during.stop, during.start) == ((), ())
    assert decide([goal], [], 0).start == (Start(WEB),)


def test_what_nobody_wants_is_stopped() -> None:
    assert decide([], [pod("a"), pod("b", stopping=True)], 0).stop == (Stop("a", "removed"),)


def test_a_job_runs_to_its_completions_and_waits_after_failures() -> None:
    goal = Goal(JOB, "h1", 2, completions=3, backoff_limit=1)
    assert len(decide([goal], [], 0).start) == 2
    one_done = [pod("a", JOB, phase=Phase.SUCCEEDED), pod("b", JOB)]
    assert len(decide([goal], one_done, 0).start) == 1
    all_done = [pod(n, JOB, phase=Phase.SUCCEEDED) for n in "abc"]
    assert decide([goal], all_done, 0) == decide([], [], 0)
    failed = [pod("a", JOB, phase=Phase.FAILED, ended=100.0)]
    waiting = decide([goal], failed, 105.0)
    assert waiting.start == () and waiting.later == 110.0
    assert len(decide([goal], failed, 110.0).start) == 2
    twice = [*failed, pod("b", JOB, phase=Phase.FAILED, ended=100.0)]
    assert decide([goal], twice, 999.0).start == () and job_failed(goal, twice)


def test_a_finished_pod_of_its_own_is_left() -> None:
    alone = ("Pod", "shop", "p")
    assert decide([Goal(alone, "h1", 1)], [pod("a", alone, phase=Phase.SUCCEEDED)], 0) == decide([], [], 0)


def test_names_look_like_those_of_kubernetes() -> None:
    name = pod_name(WEB, "00" * 16, b"\x01\x02\x03")
    assert name.startswith("web-bbbbbbbbbb-") and len(name) == len("web-") + 10 + 1 + 5
    assert pod_name(("Pod", "shop", "p"), "00", b"") == "p"
    assert len(pod_name(("Deployment", "a", "x" * 200), "ff" * 16, b"\xff" * 8)) <= 63


def test_addresses_are_not_reused_soon_and_run_out() -> None:
    free = Addresses(10, 12)
    first = free.take()
    assert first == 10
    free.give_back(first)
    assert [free.take(), free.take(), free.take(), free.take()] == [11, 12, 10, None]
    free.give_back(11)
    assert free.take(12) == 11
