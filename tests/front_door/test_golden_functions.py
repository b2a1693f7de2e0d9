"""Replay of `golden/functions.json`: every `stream::*` function, and custom streams.

`sequences[i].steps`: on an empty broker a worker makes the calls in order; `answer` is what the
result frame carried, `{}` when it had neither `result` nor `error`. `custom[i]`: a worker registers
the functions `registered` (`returns` is their result, `"<nothing>"` none, `{"error": …}` an error),
then the `steps` are called; `worker_was_called` is what these functions were asked,
`subscriber_received` what a client got that is joined to stream `cs`, group `g`. Where there is a
`client` instead of steps, it joins, and then one custom event is sent to what it joined.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import Run
from tests.support.broker import Broker
from tests.support.compare import (
    assert_in_order,
    assert_names,
    assert_refused,
    assert_same,
    assert_same_answer,
    recording,
)
from tests.support.stream_client import StreamClient, settled
from tests.support.worker import NOTHING, Failure, Handler, Invocation, Worker

RECORDING = recording("functions.json")
SEQUENCES = {sequence["name"]: sequence for sequence in RECORDING["sequences"]}
CUSTOM = {scene["name"]: scene for scene in RECORDING["custom"]}

ARRAY_REFUSED = {"error": {"code": "deserialization_error", "message": "array"}}
TOO_LONG = {"error": {"code": "name_too_long", "message": "item_id"}}

# The answers that are right instead of the recorded ones: name of the sequence, then the number of
# the allowed difference, then index of the step to the answer. Of an error the code is compared,
# and that the message has the word given here.
INSTEAD: dict[str, dict[int, dict[int, dict[str, Any]]]] = {
    "payload as an array is read by position": {19: dict.fromkeys(range(5), ARRAY_REFUSED)},
    "payload is not an object": {19: {4: ARRAY_REFUSED}},
    # For functions without required fields null means {} (protocol section 4.3).
    "list_all input": {19: {1: ARRAY_REFUSED}, 4: {0: {"result": {"count": 0, "stream": []}}}},
    "a long name": {20: dict.fromkeys(range(2), TOO_LONG)},
    "colons collide: stream a:b group c is stream a group b:c": {
        17: {
            1: {},
            2: {"result": []},
            3: {"result": {"old_value": None, "new_value": 2}},
            4: {"result": 1},
        }
    },
    "list_all with colons cuts names": {
        17: {1: {"result": {"count": 1, "stream": [{"id": "x:y", "groups": ["g:h"]}]}}}
    },
    "list_groups: a group stays after its last item is deleted": {
        18: {2: {"result": []}, 3: {"result": {"count": 0, "stream": []}}}
    },
    "numbers come back as they were given": {
        23: {
            11: {"result": {"new_value": 2**64, "old_value": 2**64 - 1}},
            12: {"result": 2**64},
        }
    },
}

_FIELDS = {  # in the order in which they are checked
    "set": ("stream_name", "group_id", "item_id", "data"),
    "get": ("stream_name", "group_id", "item_id"),
    "delete": ("stream_name", "group_id", "item_id"),
    "list": ("stream_name", "group_id"),
    "list_groups": ("stream_name",),
    "send": ("stream_name", "group_id", "type", "data"),
    "update": ("stream_name", "group_id", "item_id", "ops"),
}


@pytest.fixture(scope="module")
def worker(memory_broker: Broker, run: Run) -> Iterator[Worker]:
    worker = run(Worker.open(memory_broker.worker_url))
    yield worker
    run(worker.close())


def test_every_difference_is_of_a_recorded_sequence() -> None:
    assert INSTEAD.keys() <= SEQUENCES.keys()


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequence(name: str, worker: Worker, run: Run) -> None:
    run(replay_sequence(worker, SEQUENCES[name]))


async def replay_sequence(worker: Worker, sequence: dict[str, Any]) -> None:
    instead: dict[int, dict[str, Any]] = {}
    for steps in INSTEAD.get(sequence["name"], {}).values():
        instead |= steps
    empty = {"result": {"count": 0, "stream": []}}
    assert await worker.call("stream::list_all", {}) == empty, "left over from another sequence"
    try:
        for index, step in enumerate(sequence["steps"]):
            call = step["call"]
            answer = await worker.call(call["function_id"], call["payload"])
            what = f"step {index}, {call}"[:300]
            expected = instead.get(index, step["answer"])
            if index in instead and "error" in expected:
                error = expected["error"]
                assert_refused(error["code"], answer, what, naming=error["message"])
                continue
            if index in sequence.get("unordered_answers", []):
                assert answer["result"] == sorted(answer["result"]), what
            assert_same_answer(expected, answer, what)
            if "error" in answer and (field := wrong_field(call)):
                assert_names(field, answer["error"], what)
    finally:
        await delete_items(worker, (step["call"]["payload"] for step in sequence["steps"]))


def wrong_field(call: dict[str, Any]) -> str:
    """The first field of a payload that is missing or no string; empty when there is none."""
    fields = _FIELDS.get(call["function_id"].removeprefix("stream::"), ())
    payload = call["payload"]
    if not isinstance(payload, dict):
        return ""
    texts = {"stream_name", "group_id", "item_id", "type"}
    for field in fields:
        if field not in payload or (field in texts and not isinstance(payload[field], str)):
            return field
        if field == "ops" and not isinstance(payload[field], list):
            return field
    return ""


async def delete_items(worker: Worker, payloads: Iterator[Any]) -> None:
    """Delete every item that one of the payloads names."""
    for payload in payloads:
        if isinstance(payload, dict):
            names = {key: payload.get(key) for key in ("stream_name", "group_id", "item_id")}
            if all(isinstance(name, str) for name in names.values()):
                await worker.call("stream::delete", names)


# Custom streams ------------------------------------------------------------------------------

READABLE = 25
GROUPS_GONE = 18
# As above: the step's answer, what the worker was called with and what the subscriber received.
CUSTOM_INSTEAD: dict[str, dict[int, dict[int, dict[str, Any]]]] = {
    "custom get and set only: update and list still use the built-in storage": {
        READABLE: {
            3: {
                "answer": {"result": {"new_value": {"id": "i"}, "old_value": None}},
                "worker_was_called": [
                    {
                        "function_id": "stream::get(cs)",
                        "data": {"stream_name": "cs", "group_id": "g", "item_id": "i"},
                    },
                    {
                        "function_id": "stream::set(cs)",
                        "data": {
                            "stream_name": "cs",
                            "group_id": "g",
                            "item_id": "i",
                            "data": {"id": "i", "a": 1},
                        },
                    },
                ],
                "subscriber_received": [
                    {
                        "recv": {
                            "type": "stream",
                            "timestamp": "<ts>",
                            "streamName": "cs",
                            "groupId": "g",
                            "id": "i",
                            "event": {"type": "create", "data": {"id": "i"}},
                        }
                    }
                ],
            },
            4: {"answer": {"result": []}},
            5: {"answer": {"result": {"old_value": None}}, "subscriber_received": []},
        }
    },
    "list_all never asks a worker": {
        GROUPS_GONE: {0: {"answer": {"result": {"count": 0, "stream": []}}}}
    },
}
# Reading fails: the client is told (protocol section 5.3) before any event of the group.
READING_FAILS = "join when list fails: no sync, subscription stands"


@pytest.mark.parametrize("name", CUSTOM)
def test_custom_stream(name: str, memory_broker: Broker, run: Run) -> None:
    assert CUSTOM_INSTEAD.keys() <= CUSTOM.keys()
    run(replay_custom(memory_broker, CUSTOM[name]))


def returns(function: dict[str, Any]) -> Any:
    """What a handler has to return for the recorded `returns`."""
    value = function["returns"]
    if value == "<nothing>":
        return NOTHING
    if isinstance(value, dict) and value.keys() == {"error"}:
        return Failure(**value["error"])
    return value


def always(value: Any) -> Handler:
    return lambda _: value


async def replay_custom(broker: Broker, scene: dict[str, Any]) -> None:
    async with (
        await Worker.open(broker.worker_url) as server,
        await Worker.open(broker.worker_url) as caller,
        await StreamClient.open(broker.stream_url) as client,
    ):
        try:
            if "steps" in scene:
                await client.join("cs", "g")
            for function in scene["registered"]:
                await server.register_function(function["function_id"], always(returns(function)))
            await server.barrier()
            if "steps" in scene:
                await replay_custom_steps(scene, server, caller, client)
            else:
                await replay_custom_join(scene, server, caller, client)
            assert_in_order(client.frames, scene["name"])
        finally:
            for function in scene["registered"]:
                await server.unregister_function(function["function_id"])
            await server.barrier()
            await delete_items(caller, (step["call"]["payload"] for step in scene.get("steps", [])))


async def replay_custom_steps(
    scene: dict[str, Any], server: Worker, caller: Worker, client: StreamClient
) -> None:
    instead: dict[int, dict[str, Any]] = {}
    for steps in CUSTOM_INSTEAD.get(scene["name"], {}).values():
        instead |= steps
    for index, recorded in enumerate(scene["steps"]):
        step = recorded | instead.get(index, {})
        what = f"step {index}, {step['call']}"
        answer = await caller.call(step["call"]["function_id"], step["call"]["payload"])
        wrapped = {"STREAM_SET_ERROR", "STREAM_DELETE_ERROR", "STREAM_UPDATE_ERROR"}
        if step["answer"].get("error", {}).get("code") in wrapped:
            assert_refused(step["answer"]["error"]["code"], answer, what)
            for function in scene["registered"]:
                if isinstance(failure := returns(function), Failure):
                    assert failure.code in answer["error"]["message"], answer
                    assert failure.message in answer["error"]["message"], answer
        else:
            assert_same_answer(step["answer"], answer, what)
        await settled([client], server)
        asked = [asked_for(invocation) for invocation in server.invocations]
        assert_same(step["worker_was_called"], asked, what)
        server.invocations.clear()
        for expected in step["subscriber_received"]:
            assert_same(expected["recv"], await client.next(), what, more=("seq",))
        assert client.waiting == [], what


async def replay_custom_join(
    scene: dict[str, Any], server: Worker, caller: Worker, client: StreamClient
) -> None:
    join, *received = scene["client"]
    data = join["send"]["data"]
    await client.send(join["send"])
    if scene["name"] == READING_FAILS:
        frame = await client.next()
        assert frame["event"]["type"] == "error", frame
        assert frame["event"]["subscriptionId"] == data["subscriptionId"], frame
    else:
        sync = received.pop(0)["recv"]
        assert_same(sync, await client.next(), scene["name"], more=("seq", "epoch"))
    event = {"stream_name": "cs", "group_id": data["groupId"], "type": "t", "data": 1}
    if "id" in data:
        event["id"] = data["id"]
    await caller.call("stream::send", event)
    for expected in received:
        assert_same(expected["recv"], await client.next(), scene["name"], more=("seq",))
    await settled([client], server)
    assert client.waiting == []
    asked = [asked_for(invocation) for invocation in server.invocations]
    assert_same(scene["worker_was_called"], asked, scene["name"])


def asked_for(invocation: Invocation) -> dict[str, Any]:
    return {"function_id": invocation.function_id, "data": invocation.data}
