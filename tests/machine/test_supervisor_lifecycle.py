"""The supervisor's decisions on virtual time: order, back-off, completion, termination."""

import signal
from typing import Any

import pytest

from mantle.platform.machine.lifecycle import Action, Finish, Lifecycle, Signal, Start
from mantle.platform.machine.spec import ContainerSpec, Phase, PodSpec, ProbeSpec, Restart, Role

TERM, KILL = signal.SIGTERM, signal.SIGKILL


def container(name: str, role: Role = Role.APP, *, probe: bool = False) -> ContainerSpec:
    return ContainerSpec(name, role, ("/bin/true",), startup=ProbeSpec(tcp=1) if probe else None)


def pod(*containers: ContainerSpec, restart: Restart = Restart.ALWAYS, grace: float = 30.0) -> Lifecycle:
    return Lifecycle(PodSpec("u", "ns", "p", "10.0.0.1", restart, containers, grace=grace))


def state(life: Lifecycle, name: str) -> Any:
    return next(c for c in life.status().containers if c.name == name)


INIT, PROXY, APP = container("init", Role.INIT), container("proxy", Role.SIDECAR, probe=True), container("app")


def test_init_then_sidecar_until_started_then_apps() -> None:
    life = pod(INIT, PROXY, APP, container("other"))
    assert life.tick(0) == [Start("init")]
    assert life.running("init", 7, 0) == []
    assert life.status().phase is Phase.PENDING
    assert life.ended("init", 0, 1) == [Start("proxy")]
    assert life.running("proxy", 8, 1) == []
    assert (state(life, "proxy").started, state(life, "app").reason) == (False, "PodInitializing")
    assert life.probed("proxy", 2) == [Start("app"), Start("other")]
    assert life.status().phase is Phase.RUNNING
    assert life.running("app", 9, 2) == []
    assert (state(life, "app").started, state(life, "app").pid) == (True, 9)
    assert life.deadline is None


def test_a_sidecar_without_a_probe_has_started_when_it_runs() -> None:
    life = pod(container("proxy", Role.SIDECAR), APP)
    assert life.tick(0) == [Start("proxy")]
    assert life.running("proxy", 8, 0) == [Start("app")]


def test_restarts_back_off_and_recover() -> None:
    life = pod(APP)
    now = 0.0
    assert life.tick(now) == [Start("app")]
    waited = []
    for _ in range(8):
        life.running("app", 1, now)
        actions = life.ended("app", 1, now)
        if actions == []:
            assert (state(life, "app").state, state(life, "app").reason) == ("waiting", "CrashLoopBackOff")
            assert life.deadline is not None
            waited.append(life.deadline - now)
            assert life.tick(life.deadline - 0.001) == []
            now = life.deadline
            actions = life.tick(now)
        else:
            waited.append(0.0)
        assert actions == [Start("app")]
    assert waited == [0, 10, 20, 40, 80, 160, 300, 300]
    assert state(life, "app").restarts == 8
    life.running("app", 1, now)
    assert life.ended("app", 1, now + 600) == [Start("app")]
    life.running("app", 1, now + 600)
    life.ended("app", 1, now + 601)
    assert life.deadline == now + 611


def test_a_restarted_sidecar_does_not_hold_up_the_apps() -> None:
    life = pod(PROXY, APP)
    life.tick(0)
    life.running("proxy", 8, 0)
    life.probed("proxy", 0)
    life.running("app", 9, 0)
    assert life.ended("proxy", 137, 5) == [Start("proxy")]
    life.running("proxy", 10, 5)
    assert life.ended("app", 1, 6) == [Start("app")]
    assert state(life, "proxy").started is False


@pytest.mark.parametrize(
    ("policy", "code", "again"),
    [
        (Restart.ALWAYS, 0, True),
        (Restart.ALWAYS, 1, True),
        (Restart.ON_FAILURE, 0, False),
        (Restart.ON_FAILURE, 1, True),
        (Restart.NEVER, 0, False),
        (Restart.NEVER, 1, False),
    ],
)
def test_restart_policy(policy: Restart, code: int, again: bool) -> None:
    life = pod(APP, restart=policy)
    life.tick(0)
    life.running("app", 1, 0)
    assert life.ended("app", code, 1) == [Start("app") if again else Finish()]
    if not again:
        assert life.status().phase is (Phase.SUCCEEDED if code == 0 else Phase.FAILED)
        assert state(life, "app").reason == ("Completed" if code == 0 else "Error")


def test_a_job_completes_though_it_has_a_sidecar() -> None:
    life = pod(PROXY, APP, container("other"), restart=Restart.NEVER)
    life.tick(0)
    life.running("proxy", 1, 0)
    life.probed("proxy", 0)
    life.running("app", 2, 0)
    life.running("other", 3, 0)
    assert life.ended("app", 0, 1) == []
    assert life.ended("other", 0, 2) == [Signal("proxy", TERM)]
    assert life.status().phase is Phase.RUNNING
    assert life.ended("proxy", 143, 3) == [Finish()]
    assert life.status().phase is Phase.SUCCEEDED


def test_a_failing_init_container() -> None:
    again = pod(INIT, APP, restart=Restart.ON_FAILURE)
    again.tick(0)
    again.running("init", 1, 0)
    assert again.ended("init", 3, 1) == [Start("init")]
    once = pod(INIT, APP, restart=Restart.NEVER)
    once.tick(0)
    once.running("init", 1, 0)
    assert once.ended("init", 3, 1) == [Finish()]
    assert once.status().phase is Phase.FAILED
    assert once.status().message == "init container init failed: exit code 3"


def test_what_cannot_be_started_is_tried_again_and_says_why() -> None:
    life = pod(APP)
    life.tick(0)
    assert life.ended("app", 128, 0, error="no such file") == [Start("app")]
    assert life.ended("app", 128, 0, error="no such file") == []
    found = state(life, "app")
    assert (found.state, found.reason) == ("waiting", "StartError")
    assert found.message == "no such file; back-off 10s restarting failed container"


def test_stopping_apps_first_then_sidecars_last_first_then_the_clock() -> None:
    life = pod(container("one", Role.SIDECAR), container("two", Role.SIDECAR), APP, container("other"))
    life.tick(0)
    for pid, name in enumerate(("one", "two", "app", "other")):
        life.running(name, pid + 1, 0)
    assert life.stop(None, 10) == [Signal("app", TERM), Signal("other", TERM)]
    assert life.ended("app", 143, 11) == []
    assert life.ended("other", 143, 12) == [Signal("two", TERM)]
    assert life.ended("two", 0, 13) == [Signal("one", TERM)]
    assert life.deadline == 40
    assert life.tick(40) == [Signal("one", KILL)]
    assert life.tick(41) == []
    assert life.ended("one", 137, 42) == [Finish()]


def test_a_second_stop_can_only_shorten() -> None:
    life = pod(APP)
    life.tick(0)
    life.running("app", 1, 0)
    assert life.stop(None, 0) == [Signal("app", TERM)]
    assert life.stop(100, 0) == []
    assert life.deadline == 30
    assert life.stop(0, 5) == [Signal("app", KILL)]


def test_stopped_while_waiting_for_a_restart() -> None:
    life = pod(APP)
    life.tick(0)
    life.ended("app", 128, 0, error="x")
    life.ended("app", 128, 0, error="x")
    assert life.stop(None, 1) == [Finish()]
    assert life.deadline is None


def test_stopped_while_starting() -> None:
    life = pod(APP)
    life.tick(0)
    assert life.stop(None, 1) == [Signal("app", TERM)]
    assert life.running("app", 1, 2) == []
    assert life.ended("app", 143, 3) == [Finish()]


def test_a_dead_container_is_ended_and_restarted() -> None:
    life = pod(APP, grace=5)
    life.tick(0)
    life.running("app", 1, 0)
    assert life.restart("app", "liveness probe failed: 500", 10) == [Signal("app", TERM)]
    assert life.restart("app", "again", 11) == []
    assert life.tick(15) == [Signal("app", KILL)]
    assert life.ended("app", 137, 16) == [Start("app")]
    life.running("app", 2, 16)
    assert state(life, "app").message == ""
    assert life.restart("app", "liveness probe failed: 500", 17) == [Signal("app", TERM)]
    life.ended("app", 143, 17)
    assert state(life, "app").message.startswith("liveness probe failed: 500; back-off")


def test_every_order_of_endings_finishes_once() -> None:
    """Whatever ends first, exactly one Finish comes, and nothing is started after stop."""
    names = ["one", "two", "app", "other"]
    for first in range(24):
        order = list(names)
        order = [order.pop(first % len(order) if order else 0) for _ in names]
        life = pod(container("one", Role.SIDECAR), container("two", Role.SIDECAR), APP, container("other"))
        actions: list[Action] = life.tick(0)
        for name in names:
            actions += life.running(name, 1, 0)
        actions = life.stop(1, 1)
        for name in order:
            actions += life.ended(name, 0, 2)
        assert actions.count(Finish()) == 1
        assert not [a for a in actions if isinstance(a, Start)]
