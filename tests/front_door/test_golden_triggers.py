"""Replay of `golden/triggers.json`: what the functions of triggers were given.

`scenes[i].steps` as in `tests/support/scenes.py`. `register_trigger` is what a worker asked for,
`answered` whether a `triggerregistrationresult` came, `registration_error` its error. `invoked` is
what the worker was asked to run, `returns` what it gave back. Every function of a scene exists,
except those whose id begins with `no::`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import Run
from tests.support.broker import Broker
from tests.support.compare import recording
from tests.support.scenes import CLOSED_IN_ORDER, Scene, Step, handlers_of
from tests.support.worker import Worker

SCENES = {scene["name"]: scene for scene in recording("triggers.json")["scenes"]}

SLOW_S = 0.2
REFUSED = {"code": "trigger_registration_failed", "message": "Failed to deserialize stream trigger"}


def _drop(*keys: str) -> Any:
    return lambda step: None if step.keys() & set(keys) else step


def _unauthorized(step: Step) -> Step | None:
    """The join is refused: `unauthorized` instead of `sync`, and no event afterwards."""
    if "recv" not in step:
        return step
    if step["recv"]["event"]["type"] != "sync":
        return None
    return step | {"recv": step["recv"] | {"event": {"type": "unauthorized"}}}


def _allowed(step: Step) -> Step | None:
    """The trigger is not run, so nothing refuses the join: `sync`."""
    if "invoked" in step:
        return None
    if "recv" in step:
        return step | {"recv": step["recv"] | {"event": {"type": "sync", "data": []}}}
    return step


def _asks_condition(step: Step) -> Step | None:
    """The condition is asked with what the handler would be given, and says no."""
    if "invoked" in step:
        return {"invoked": step["invoked"] | {"function_id": "cond"}, "returns": {"result": False}}
    return step


def _registration_refused(step: Step) -> Step | None:
    if "register_trigger" in step:
        return step | {"answered": True, "registration_error": REFUSED}
    return step


def _name_refused(step: Step) -> Step | None:
    """The registration is refused, and the connection goes on working."""
    if "worker_connection" in step:
        return None
    if "register_trigger" in step:
        more = {"answered": True, "registration_error": REFUSED, "naming": "stream_name"}
        return step | more
    return step


def _only_new_stream(step: Step) -> Step | None:
    is_old = "invoked" in step and step["invoked"]["data"]["streamName"] == "t39"
    return None if is_old else step


# What is right instead of what was recorded: the name of the scene to the number of the allowed
# difference and what becomes of each step (None: it is left out).
INSTEAD: dict[str, tuple[int, Any]] = {
    "join trigger returns an error": (11, _unauthorized),
    "join function does not exist: join is allowed": (11, _unauthorized),
    "join trigger returns {'unauthorized': 'yes'}": (11, _unauthorized),
    "join trigger returns {'unauthorized': 1}": (11, _unauthorized),
    "join trigger config: stream_name is not looked at": (12, _allowed),
    "join trigger config: condition_function_id is not looked at": (12, _asks_condition),
    "leave trigger config: condition_function_id is not looked at": (12, _asks_condition),
    "leave of an unknown subscription fires the leave trigger with what the client said": (
        13,
        _drop("invoked"),
    ),
    "bad config: no stream_name": (14, _name_refused),
    "bad config: stream_name null": (14, _name_refused),
    "bad config: camelCase streamName": (14, _name_refused),
    "same trigger id registered twice": (15, None),  # one invocation: see `steps_of`
    "same trigger id registered again for another stream": (15, _only_new_stream),
    "two join triggers, one refuses: all are called, refused": (16, None),  # in order: ditto
    "bad config: config is an array by position": (19, _registration_refused),
}
SAME_TRIGGER_ID = {name for name in SCENES if name.startswith("same trigger id")}
ANY_ORDER = {"close with two subscriptions: a leave for each"}
CONDITION_SAYS_NO = {
    "join trigger config: condition_function_id is not looked at",
    "leave trigger config: condition_function_id is not looked at",
}
SLOW_JOIN = "a slow join trigger holds up the connection's later frames"


def steps_of(name: str) -> list[Step]:
    """The steps of a scene with what is right instead; closed in order (difference 4)."""
    steps: list[Step] = []
    _, change = INSTEAD.get(name, (0, None))
    for recorded in SCENES[name]["steps"]:
        step = change(recorded) if change else recorded
        if step is None:
            continue
        if "closed" in step:
            step = step | {"closed": {"code": CLOSED_IN_ORDER}}
        steps.append(step)
    if name == "same trigger id registered twice":
        steps.pop()
    if name.startswith("two join triggers"):
        second, first = (index for index, step in enumerate(steps) if "invoked" in step)
        assert steps[first]["invoked"]["function_id"] == "j1"
        steps[first], steps[second] = steps[second], steps[first]
    return steps


@pytest.fixture(scope="module")
def workers(memory_broker: Broker, run: Run) -> Iterator[tuple[Worker, Worker]]:
    """One that calls, one that serves."""
    caller = run(Worker.open(memory_broker.worker_url))
    server = run(Worker.open(memory_broker.worker_url))
    yield caller, server
    run(caller.close())
    run(server.close())


def test_every_difference_is_of_a_recorded_scene() -> None:
    assert INSTEAD.keys() <= SCENES.keys()
    assert SCENES.keys() >= ANY_ORDER | CONDITION_SAYS_NO | {SLOW_JOIN}
    assert len(SAME_TRIGGER_ID) == 2


@pytest.mark.parametrize("name", SCENES)
def test_scene(name: str, memory_broker: Broker, workers: tuple[Worker, Worker], run: Run) -> None:
    run(replay(name, memory_broker, *workers))


async def replay(name: str, broker: Broker, caller: Worker, server: Worker) -> None:
    steps = steps_of(name)
    handlers = handlers_of(steps, {"cond": False} if name in CONDITION_SAYS_NO else {})
    if name == SLOW_JOIN:
        handlers = {function_id: _slow(handler) for function_id, handler in handlers.items()}
    for function_id, handler in handlers.items():
        await server.register_function(function_id, handler)
    await server.barrier()
    scene = Scene(broker, caller, server, any_order=name in ANY_ORDER)
    try:
        await scene.replay(name, steps, name in SAME_TRIGGER_ID)
        if name == SLOW_JOIN:
            assert [what for what, _ in server.log] == ["asked", "answered"] * 2
    finally:
        await scene.clean(list(handlers))


def _slow(handler: Any) -> Any:
    async def slow(invocation: Any) -> Any:
        await asyncio.sleep(SLOW_S)
        return handler(invocation)

    return slow
