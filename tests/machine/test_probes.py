"""Probes on virtual time: when they are sent, and what their answers mean."""

from __future__ import annotations

from mantle.platform.machine.probes import Ask, Kill, Kind, Probes
from mantle.platform.machine.spec import ContainerSpec, ProbeSpec, Role

READY = ProbeSpec(http=("http", 80, "/ready"), period=10.0, failure=3)
LIVE = ProbeSpec(tcp=80, period=10.0, initial_delay=5.0, failure=2)


def box(**probes: ProbeSpec) -> ContainerSpec:
    return ContainerSpec("c", Role.APP, ("/bin/true",), **probes)  # type: ignore[arg-type]


def play(state: Probes, script: list[tuple[float, Kind, bool]]) -> Kill | None:
    """Answers each probe when it is asked; fails if it is not asked by the time given."""
    last = None
    for at, kind, ok in script:
        asked = state.poll(at)
        assert any(ask.kind == kind for ask in asked), (at, kind, asked, state.next_due())
        last = state.answer(kind, ok, "connection refused", at)
    return last


def test_without_probes_a_container_is_ready_when_it_runs() -> None:
    state = Probes(box(), 0.0)
    assert state.started and state.ready and state.next_due() is None


def test_readiness_follows_the_threshold() -> None:
    state = Probes(box(readiness=READY), 0.0)
    assert not state.ready
    assert state.poll(0.0) == [Ask(Kind.READINESS, READY)] and state.poll(0.0) == []
    state.answer(Kind.READINESS, True, "", 0.0)
    assert state.ready and state.next_due() == 10.0
    play(state, [(10.0, Kind.READINESS, False), (20.0, Kind.READINESS, False)])
    assert state.ready, "two failures of three"
    assert play(state, [(30.0, Kind.READINESS, False)]) is None
    assert not state.ready
    play(state, [(40.0, Kind.READINESS, True)])
    assert state.ready


def test_the_first_tries_are_close_together_but_do_not_count() -> None:
    startup = ProbeSpec(tcp=80, period=10.0, failure=2)
    state = Probes(box(startup=startup), 0.0)
    now, tries = 0.0, 0
    while now < 9.9:
        play(state, [(now, Kind.STARTUP, False)])
        tries += 1
        due = state.next_due()
        assert due is not None
        now = due
    assert tries > 15
    play(state, [(now, Kind.STARTUP, True)])
    assert state.started and state.ready


def test_a_startup_that_never_passes_kills() -> None:
    state = Probes(box(startup=ProbeSpec(tcp=80, period=1.0, failure=2)), 0.0)
    killed, now = None, 0.0
    while killed is None and now < 10.0:
        killed = play(state, [(now, Kind.STARTUP, False)])
        now = state.next_due() or now
    assert killed == Kill(Kind.STARTUP, "connection refused") and now < 4.0


def test_liveness_waits_for_its_delay_and_kills() -> None:
    state = Probes(box(liveness=LIVE), 100.0)
    assert state.poll(104.0) == [] and state.next_due() == 105.0
    play(state, [(105.0, Kind.LIVENESS, True), (115.0, Kind.LIVENESS, False)])
    assert play(state, [(125.0, Kind.LIVENESS, False)]) == Kill(Kind.LIVENESS, "connection refused")


def test_a_startup_probe_that_asks_the_same_makes_it_ready_at_once() -> None:
    state = Probes(box(startup=READY, readiness=READY), 0.0)
    play(state, [(0.0, Kind.STARTUP, True)])
    assert state.started and state.ready


def test_a_restarted_daemon_takes_over_what_was_ready() -> None:
    state = Probes(box(startup=LIVE, readiness=READY), 0.0)
    state.resume(started=True, ready=True, now=50.0)
    assert state.started and state.ready
