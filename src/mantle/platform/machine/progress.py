"""How far a mesh is from what is wanted, for people who wait: from the controller's state to events. Changes
nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

from mantle.platform.machine.controller import Controller
from mantle.platform.machine.manifest import Object, ObjectId, template
from mantle.platform.machine.pods import PodState
from mantle.platform.machine.reconcile import Goal
from mantle.platform.machine.spec import Phase

LASTS = 2.0
"""Seconds that a reason must last before people are told."""
SETTLES = 1.0
"""Seconds that a container without a readiness probe must run before it counts: many fail in the first."""


def standing(controller: Controller, item: ObjectId) -> tuple[bool, str]:
    """(is this workload as wanted, what keeps it from that)."""
    want = controller.wants.get(item)
    if want is None:
        return True, ""
    if trouble := controller.troubles.get(item):
        return False, trouble.message
    mine = [p for p in controller.pods.values() if p.object == item]
    if any(p.spec.spec_hash != want.hash or p.stopping for p in mine):
        return False, "waiting for the old pods to stop"
    if item[0] == "Job":
        return _job_standing(controller.goal(want), mine)
    ready = sum(p.ready or p.status.phase is Phase.SUCCEEDED for p in mine)
    if ready >= want.replicas:
        return True, ""
    troubles = [f"pod {p.spec.name}: {text}" for p in mine if (text := p.trouble())]
    return False, "; ".join(troubles[:3]) or f"{ready} of {want.replicas} pods ready"


def settled(controller: Controller, item: ObjectId, now: float) -> bool:
    """Have the pods of it run long enough to be believed? Finished ones have."""
    mine = [p for p in controller.pods.values() if p.object == item and not p.gone]
    return all((since := p.unproved_since()) is None or now - since >= SETTLES for p in mine)


def _job_standing(goal: Goal, mine: list[PodState]) -> tuple[bool, str]:
    done = sum(p.status.phase is Phase.SUCCEEDED for p in mine)
    failed = sum(p.status.phase is Phase.FAILED for p in mine)
    if done >= goal.completions:
        return True, ""
    if failed > goal.backoff_limit:
        return False, f"failed {failed} times, and backoffLimit is {goal.backoff_limit}"
    return (True, "") if any(p.ready for p in mine) else (False, f"{done} of {goal.completions} done")


def hopeless(controller: Controller, item: ObjectId) -> bool:
    """Does a pod of it fail again and again, so that waiting longer is no use?"""
    for state in controller.pods.values():
        if state.object != item or state.stopping:
            continue
        if state.status.phase is Phase.FAILED and item[0] == "Pod":
            return True
        for status in state.status.containers:
            failing = status.reason in ("CrashLoopBackOff", "StartError") and status.state != "running"
            if failing and status.restarts >= 2:
                return True
    return False


async def progress(controller: Controller, items: list[ObjectId], seconds: float) -> AsyncIterator[dict[str, Any]]:
    """What becomes of these workloads within so many seconds.

    `ready` for each that is, `waiting` for a reason that lasts, `error` when it is no use to wait longer.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    waiting = list(dict.fromkeys(items))
    since: dict[ObjectId, tuple[str, float]] = {}
    said: dict[ObjectId, str] = {}
    while waiting:
        left = deadline - loop.time()
        for item in list(waiting):
            good, why = standing(controller, item)
            if good and not settled(controller, item, loop.time()):
                good, why = False, "it has just started"
            name = {"object": f"{item[0].lower()}/{item[2]}", "namespace": item[1]}
            if good:
                waiting.remove(item)
                yield {"event": "ready", **name, "message": ""}
            elif left <= 0 or hopeless(controller, item):
                waiting.remove(item)
                yield {"event": "error", **name, "message": f"not ready: {why}"}
            elif since.get(item, ("", 0.0))[0] != why:
                since[item] = (why, loop.time())
            elif loop.time() - since[item][1] > LASTS and said.get(item) != why:
                said[item] = why
                yield {"event": "waiting", **name, "message": why}
        if waiting:
            await controller.moved(min(left, SETTLES / 4))


async def pod_events(controller: Controller) -> AsyncIterator[dict[str, Any]]:
    """What happens to pods from now on: started, ready, not ready and why, restarted, gone."""
    before = {uid: _face(p) for uid, p in controller.pods.items()}
    names = {uid: p.key for uid, p in controller.pods.items()}
    while True:
        await controller.moved(None)
        now = {uid: _face(p) for uid, p in controller.pods.items()}
        names.update({uid: p.key for uid, p in controller.pods.items()})
        for uid in before | now:
            if before.get(uid) != now.get(uid):
                event, message = now.get(uid, ("removed", ""))
                yield {
                    "event": event,
                    "object": f"pod/{names[uid].name}",
                    "namespace": names[uid].namespace,
                    "message": message,
                }
        before = now


def _face(state: PodState) -> tuple[str, str]:
    if state.stopping:
        return "stopping", state.why
    return ("ready", "") if state.ready else ("waiting", state.trouble())


def workloads(objects: Mapping[ObjectId, Object], namespace: str) -> list[ObjectId]:
    """The workloads of one namespace."""
    return [key for key, item in objects.items() if key[1] == namespace and template(item) is not None]
