"""Replay of `golden/update_cases.json`: `stream::update`, 272 recorded cases.

`initial` is stored with `stream::set` first (absent: the item does not exist). Then `ops` are
applied: `result` is the function's whole result, or `error` its error and nothing is applied.
`stored` is what `stream::get` gives afterwards, null also when the item does not exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import Run
from tests.support.broker import Broker
from tests.support.compare import assert_refused, assert_same, assert_same_answer, recording
from tests.support.worker import Worker

CASES = {case["name"]: case for case in recording("update_cases.json")["cases"]}
NAMES = {"stream_name": "update cases", "group_id": "g", "item_id": "i"}


def _target_not_object(op_index: int, kind: str) -> list[dict[str, Any]]:
    message = f"Cannot merge at path 'root': target is {kind}, expected object."
    return [{"op_index": op_index, "code": "merge.target_not_object", "message": message}]


# What is right instead of what was recorded: name of the case to the number of the allowed
# difference and the fields of the case that are others.
INSTEAD: dict[str, tuple[int, dict[str, Any]]] = {
    "op given as array, tag first": (
        19,
        {"error": {"code": "deserialization_error", "message": "array"}, "stored": {"a": 1}},
    ),
    "merge root onto array is dropped silently": (21, {"errors": _target_not_object(0, "array")}),
    "merge root onto string is dropped silently": (21, {"errors": _target_not_object(0, "string")}),
    "merge root onto number is dropped silently": (21, {"errors": _target_not_object(0, "number")}),
    "merge root onto null is dropped silently": (21, {"errors": _target_not_object(0, "null")}),
    "remove root then merge root is dropped": (21, {"errors": _target_not_object(1, "null")}),
    "increment by float": (
        22,
        {"result": {"old_value": {"n": 1}, "new_value": {"n": 2.5}}, "stored": {"n": 2.5}},
    ),
    "increment by integral float": (
        22,
        {"result": {"old_value": {"n": 1}, "new_value": {"n": 3.0}}, "stored": {"n": 3.0}},
    ),
    "decrement by float": (
        22,
        {"result": {"old_value": {"n": 1}, "new_value": {"n": 0.5}}, "stored": {"n": 0.5}},
    ),
    "set integer past u64 becomes float": (
        23,
        {"result": {"old_value": {}, "new_value": {"a": 2**64}}, "stored": {"a": 2**64}},
    ),
}


def expected(case: dict[str, Any]) -> dict[str, Any]:
    """The case, with what is right instead."""
    _, instead = INSTEAD.get(case["name"], (0, {}))
    if "errors" in instead:
        return case | {"result": case["result"] | instead}
    if "error" in instead:
        return {key: value for key, value in case.items() if key != "result"} | instead
    if "result" in instead:
        return {key: value for key, value in case.items() if key != "error"} | instead
    return case


@pytest.fixture(scope="module")
def worker(memory_broker: Broker, run: Run) -> Iterator[Worker]:
    worker = run(Worker.open(memory_broker.worker_url))
    yield worker
    run(worker.close())


def test_the_recording_is_complete() -> None:
    assert len(CASES) == 272
    assert INSTEAD.keys() <= CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_update_case(name: str, worker: Worker, run: Run) -> None:
    run(replay(worker, expected(CASES[name])))


async def replay(worker: Worker, case: dict[str, Any]) -> None:
    await worker.call("stream::delete", NAMES)
    if "initial" in case:
        answer = await worker.call("stream::set", NAMES | {"data": case["initial"]})
        assert "error" not in answer, answer
    answer = await worker.call("stream::update", NAMES | {"ops": case["ops"]})
    if "error" in case:
        assert_refused(case["error"]["code"], answer, case["name"], naming="ops")
    else:
        assert_same_answer({"result": case["result"]}, answer, case["name"])
    stored = await worker.call("stream::get", NAMES)
    assert_same(case["stored"], stored.get("result"), case["name"])
