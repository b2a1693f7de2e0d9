"""Replay of `golden/worker_wire.json`: transcripts of the worker port.

`tests/support/transcripts.py` says how a transcript is read. What the protocol document says to do
better than the original is put into the recorded frames before they are replayed: see `CHANGES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.conftest import Run
from tests.support.broker import Broker
from tests.support.compare import assert_names, assert_refused, assert_same, recording
from tests.support.stream_client import UPGRADE, RawHttp
from tests.support.transcripts import Check, Frame, Transcript, result_frame
from tests.support.worker import Invocation, Worker

SCENARIOS: dict[str, dict[str, Any]] = {
    entry["name"]: entry for entry in recording("worker_wire.json") if "name" in entry
}
ID = "00000000-0000-4000-8000-0000000000"  # of the recorder, followed by two digits

STREAM_FUNCTIONS = {
    f"stream::{name}"
    for name in ("set", "get", "delete", "list", "list_groups", "list_all", "send", "update")
}
ENGINE_FUNCTIONS = {
    "engine::workers::register",
    "engine::functions::list",
    "engine::functions::info",
    "engine::workers::list",
    "engine::workers::info",
    "engine::triggers::list",
    "engine::triggers::info",
    "engine::registered-triggers::list",
    "engine::registered-triggers::info",
}


# How a transcript is changed ------------------------------------------------------------------


class Script:
    """The frames of a transcript while they are changed."""

    def __init__(self, frames: list[Frame]) -> None:
        self.frames = list(frames)

    def index(self, direction: str, **fields: Any) -> int:
        """The first frame of `direction` whose message has these fields."""
        for index, frame in enumerate(self.frames):
            message = frame.get("json")
            if frame.get("dir") != direction or not isinstance(message, dict):
                continue
            if all(str(message.get(key)) == value for key, value in fields.items()):
                return index
        raise LookupError(fields)

    def answered(self, invocation_id: str, check: Check | None = None, **answer: Any) -> None:
        """The call is answered so; or so that `check` holds."""
        call = self.index(">", invocation_id=invocation_id, type="invokefunction")
        frame = self.frames[call]
        function_id = frame["json"]["function_id"]
        expected = result_frame(frame["c"], invocation_id, function_id, **answer)
        if check is not None:
            expected["check"] = check
        try:
            known = self.index("<", invocation_id=invocation_id, type="invocationresult")
            self.frames[known] = expected
        except LookupError:
            self.frames.insert(call + 1, expected)

    def not_decodable(self, invocation_id: str) -> None:
        """The call is answered with `invalid_message` (protocol section 4.3)."""

        def check(message: Any) -> None:
            assert_refused("invalid_message", answer_of(message))

        self.answered(invocation_id, check)

    def no_such_function(self, invocation_id: str) -> None:
        call = self.frames[self.index(">", invocation_id=invocation_id)]["json"]
        message = f"Function {call['function_id']} not found in namespace default."
        self.answered(invocation_id, error={"code": "function_not_found", "message": message})

    def drop(self, direction: str, **fields: Any) -> None:
        del self.frames[self.index(direction, **fields)]


def answer_of(message: Any) -> dict[str, Any]:
    return {key: message[key] for key in ("result", "error") if key in message}


def functions_of(message: Any) -> dict[str, dict[str, Any]]:
    """The answer of `engine::functions::list`: sorted, well formed; by id."""
    functions = message["result"]["functions"]
    ids = [function["function_id"] for function in functions]
    assert ids == sorted(ids)
    for function in functions:
        assert function.keys() >= {"function_id", "namespace", "worker_name"}, function
        optional = {"description", "metadata"}
        assert function.keys() <= {"function_id", "namespace", "worker_name", *optional}, function
        if function["function_id"] in STREAM_FUNCTIONS:
            assert function["worker_name"] == "iii-stream"
    return dict(zip(ids, functions, strict=True))


def workers_of(message: Any) -> dict[str, dict[str, Any]]:
    """The answer of `engine::workers::list`: sorted, well formed, with the broker's own entry."""
    workers = message["result"]["workers"]
    names = [worker["name"] for worker in workers]
    assert names == sorted(names)
    fields = (
        "id name description version namespace runtime os status function_count connected_at_ms "
        "active_invocations isolation ip_address"
    )
    for worker in workers:
        assert worker.keys() == set(fields.split()), worker
    own = workers[names.index("iii-stream")]
    assert own["id"] == "iii-stream"
    assert own["runtime"] == "engine"
    assert own["status"] == "available"
    assert own["isolation"] == "in-process"
    assert own["ip_address"] is None
    return dict(zip(names, workers, strict=True))


def list_all_of(message: Any) -> None:
    result = message["result"]
    assert result.keys() == {"stream", "count"}
    assert result["count"] == len(result["stream"])


def without_description(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if k != "description"} for entry in entries]


# The changes, by scenario ---------------------------------------------------------------------


def invoke_unknown(script: Script) -> None:
    """Built-in functions are there in every namespace (section 4.11)."""

    def check(message: Any) -> None:
        assert workers_of(message)["unk-A"]["status"] == "connected"

    script.answered(ID + "03", check)
    script.answered(ID + "04", check)


def invoke_bad_payload(script: Script) -> None:
    """null means {} where nothing is required; an array is a wrong type (section 4.3)."""

    def check(message: Any) -> None:
        assert functions_of(message).keys() >= STREAM_FUNCTIONS

    script.answered(ID + "07", check)
    script.answered(ID + "08", error={"code": "deserialization_error", "message": ""})


def enqueue(script: Script) -> None:
    """An unknown action is answered (section 3.10); queue providers are out of scope (4.10)."""
    for number in ("02", "03", "04"):
        script.not_decodable(ID + number)
    script.answered(ID + "05", error={"code": "enqueue_error", "message": ""})
    script.drop("<", function_id="engine::queue::enqueue")
    script.drop(">", function_id="engine::queue::enqueue", type="invocationresult")


def unknown_trigger_type(script: Script) -> None:
    """`unregistertriggertype` removes the type: its triggers are parked (section 3.4)."""
    script.drop("<", type="registertrigger", id=ID + "c4")
    script.drop("<", type="unregistertrigger", id=ID + "c1")


def stream_trigger_bad(script: Script) -> None:
    """Without a config the built-in types take {} (section 3.5)."""
    recorded = script.frames[script.index("<", invocation_id=ID + "01")]["json"]["result"]
    first = recorded["registered_triggers"][0]
    second = first | {"id": ID + "e4", "config": {}, "config_summary": "{}"}
    script.answered(ID + "01", result={"registered_triggers": [first, second]})


def duplicate_worker_name(script: Script) -> None:
    """Equal names are accepted (section 2.3): the second worker's functions work."""
    rejected = script.index("<", type="registrationrejected")
    del script.frames[rejected : rejected + 2]  # and the close
    script.answered(ID + "01", result={"success": True})
    script.answered(ID + "02", result="served")
    answer = script.index("<", invocation_id=ID + "02", type="invocationresult")
    call = {
        "type": "invokefunction",
        "invocation_id": ID + "02",
        "function_id": "t::never",
        "data": {"_caller_worker_id": "<uuid:1>"},
    }
    served = result_frame("B", ID + "02", "t::never", result="served") | {"dir": ">"}
    script.frames[answer:answer] = [{"c": "B", "dir": "<", "json": call}, served]


def malformed(script: Script) -> None:
    """Any id is echoed; absent data is {}; what cannot be decoded is answered if it has an id."""
    script.answered("not-a-uuid", list_all_of)
    script.not_decodable(ID + "01")
    script.answered(ID + "02", list_all_of)


def registration_before_metadata(script: Script) -> None:
    """Registrations take effect at once (section 2.3)."""
    refused = script.index("<", invocation_id=ID + "01", type="invocationresult")
    call = {
        "type": "invokefunction",
        "invocation_id": ID + "01",
        "function_id": "t::early",
        "data": {"_caller_worker_id": "<uuid:3>"},
    }
    served = result_frame("A", ID + "01", "t::early", result="early")
    script.frames[refused : refused + 1] = [
        {"c": "A", "dir": "<", "json": call},
        served | {"dir": ">"},
        served | {"c": "B"},
    ]


def engine_calls(script: Script) -> None:
    """Other functions are built in, and those of other modules are out of scope (section 4.10)."""

    def all_functions(message: Any) -> None:
        functions = functions_of(message)
        assert functions.keys() == STREAM_FUNCTIONS | {"t::eng"}

    def stream_get_only(message: Any) -> None:
        assert functions_of(message).keys() == {"stream::get"}

    def engine_functions(message: Any) -> None:
        functions = functions_of(message)
        assert functions.keys() >= ENGINE_FUNCTIONS
        assert all(function_id.startswith("engine::") for function_id in functions)

    def all_workers(message: Any) -> None:
        worker = workers_of(message)["eng-A"]
        assert worker["status"] == "connected"
        assert worker["function_count"] == 1

    def all_types(message: Any) -> None:
        recorded = [
            {"id": "stream", "namespace": "default", "worker_name": "iii-stream"},
            {"id": "stream:join", "namespace": "default", "worker_name": "iii-stream"},
            {"id": "stream:leave", "namespace": "default", "worker_name": "iii-stream"},
            {"id": "t-eng", "namespace": "default", "worker_name": "eng-A"},
        ]
        assert without_description(message["result"]["triggers"]) == recorded
        assert message["result"]["triggers"][3]["description"] == "a type"

    def engine_types(message: Any) -> None:
        ids = [entry["id"] for entry in message["result"]["triggers"]]
        assert ids == ["engine::functions-available", "engine::workers-available"]

    recorded = script.frames[script.index("<", invocation_id=ID + "12")]["json"]["result"]

    def registered_trigger(message: Any) -> None:
        result = dict(message["result"])
        trigger = result.pop("trigger")
        assert_same({k: v for k, v in recorded.items() if k != "trigger"}, result)
        assert trigger["id"] == "stream"
        assert trigger["instance_count"] == 1
        assert trigger["worker_name"] == "iii-stream"

    script.answered(ID + "01", all_functions)
    script.answered(ID + "03", stream_get_only)
    script.answered(ID + "04", engine_functions)
    script.answered(ID + "0a", all_workers)
    script.answered(ID + "0d", all_types)
    script.answered(ID + "0e", engine_types)
    script.answered(ID + "12", registered_trigger)
    for number in ("14", "15", "16", "17", "18", "19"):
        script.no_such_function(ID + number)


def channel(script: Script) -> None:
    """Out of scope (section 4.7)."""
    script.no_such_function(ID + "01")
    script.frames = [frame for frame in script.frames if frame.get("c") == "A"]


def invocation_id_collision(script: Script) -> None:
    """Calls are forwarded with ids of the broker's own: each caller gets its answer."""
    frames = [
        frame
        for frame in script.frames
        if not (frame.get("dir") == "<" and frame["json"]["type"] == "invocationresult")
    ]
    first = result_frame("B", ID + "01", "t::col", result="first answer")
    second = result_frame("C", ID + "01", "t::col", result="second answer")
    script.frames = [*frames, first, second]


def forged_answer(script: Script) -> None:
    """Only the worker that was asked may answer (3.12); an id is echoed as it is written (1)."""
    script.drop("<", invocation_id=ID + "01", type="invocationresult")
    late = script.index(">", type="invocationresult", result="too late")
    answer = result_frame("B", ID + "01", "t::for", result="too late")
    script.frames.insert(late + 1, answer)
    answer_index = script.index("<", invocation_id=ID + "ab")
    answer = script.frames[answer_index]
    spelled = answer["json"] | {"invocation_id": "000000000000400080000000000000AB"}
    script.frames[answer_index] = answer | {"json": spelled}


def payload_json(script: Script) -> None:
    """Payloads are passed on as they are; frames that cannot be decoded are answered (4.3)."""
    sent = script.frames[script.index(">", invocation_id=ID + "01")]["json"]["data"]
    forwarded = script.index("<", invocation_id=ID + "01", type="invokefunction")
    message = script.frames[forwarded]["json"] | {"data": sent}
    script.frames[forwarded] = script.frames[forwarded] | {"json": message}
    # 1e400 is JSON: like whole numbers of any size it is carried as it is, not decoded.
    script.frames = [frame for frame in script.frames if "1e400" not in frame.get("text", "")]
    for index, frame in enumerate(script.frames):
        if frame.get("dir") == ">" and "text" in frame:
            invocation_id = frame["text"].split('"invocation_id":"')[1].split('"')[0]
            script.frames[index] = frame | {"answer": invocation_id}
    answers = []
    for frame in script.frames:
        answers.append(frame)
        if "answer" in frame:
            expected = result_frame("B", frame["answer"], "t::pay")
            answers.append(expected | {"check": is_invalid_message})
    script.frames = answers
    script.not_decodable(ID + "06")


def is_invalid_message(message: Any) -> None:
    assert_refused("invalid_message", answer_of(message))


def namespaces(script: Script) -> None:
    script.answered(ID + "03", list_all_of)


def stream_trigger_no_name(script: Script) -> None:
    """Refused with an error, the connection goes on (section 3.5); it is forgotten when it ends."""

    def names_the_field(message: Any) -> None:
        assert message["id"] == ID + "ee"
        assert_refused("trigger_registration_failed", answer_of(message))
        assert_names("stream_name", message["error"])

    asked = script.index(">", type="registertrigger")
    refused = {"type": "triggerregistrationresult", "id": ID + "ee"}
    expected = {"c": "A", "dir": "<", "json": refused, "check": names_the_field}
    script.frames.insert(asked + 1, expected)
    pinged = script.index(">", type="ping")
    script.frames.insert(pinged + 1, {"c": "A", "dir": "<", "json": {"type": "pong"}})
    script.answered(ID + "01", result={"workers": []})


CHANGES: dict[str, Callable[[Script], None]] = {
    change.__name__: change
    for change in (
        invoke_unknown,
        invoke_bad_payload,
        enqueue,
        unknown_trigger_type,
        stream_trigger_bad,
        duplicate_worker_name,
        malformed,
        registration_before_metadata,
        engine_calls,
        channel,
        invocation_id_collision,
        forged_answer,
        payload_json,
        namespaces,
        stream_trigger_no_name,
    )
}
AVAILABILITY = "availability"  # the original's list of functions, and its times, are its own


# Tests ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def observer(memory_broker: Broker, run: Run) -> Iterator[Worker]:
    worker = run(Worker.open(memory_broker.worker_url))
    yield worker
    run(worker.close())


def test_every_change_is_of_a_recorded_scenario() -> None:
    assert CHANGES.keys() | {AVAILABILITY} <= SCENARIOS.keys()


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != AVAILABILITY])
def test_scenario(name: str, memory_broker: Broker, observer: Worker, run: Run) -> None:
    run(replay(name, memory_broker, observer))


async def replay(name: str, broker: Broker, observer: Worker) -> None:
    scenario = SCENARIOS[name]
    script = Script(scenario["frames"])
    if name in CHANGES:
        CHANGES[name](script)
    paths = {c: connection["path"] for c, connection in scenario["connections"].items()}
    transcript = Transcript(broker.worker_url, observer, paths)
    try:
        await transcript.replay(script.frames, name)
        await transcript.finish(name)
    finally:
        await transcript.close()
    await observer.call("stream::delete", {"stream_name": "w", "group_id": "g", "item_id": "v"})


def test_channels_are_not_found(memory_broker: Broker, run: Run) -> None:
    """`/ws/channels/…` and every other path but `/` and `/otel` (section 2.1)."""
    run(not_found(memory_broker))


async def not_found(broker: Broker) -> None:
    for path in (b"/ws/channels/x?key=y&dir=read", b"/x", b"//"):
        request = UPGRADE.replace(b"GET /", b"GET " + path)
        async with await RawHttp.request(broker.worker_url, request) as http:
            response = await http.response()
            assert response.status == 404, (path, response)


def test_availability(memory_broker: Broker, run: Run) -> None:
    """`engine::workers-available` and `engine::functions-available` (section 4.6)."""
    run(availability(memory_broker))


async def availability(broker: Broker) -> None:
    async with await Worker.open(broker.worker_url) as watcher:
        await watcher.describe("ava-A")
        await watcher.register_function("t::wa", lambda _: None)
        await watcher.register_function("t::fa", lambda _: None)
        await watcher.register_trigger("engine::workers-available", "t::wa", {})
        trigger_type = "engine::functions-available"
        await watcher.register_trigger(trigger_type, "t::fa", {}, metadata={"m": 2})
        await watcher.barrier()
        worker = await Worker.open(broker.worker_url)
        await worker.describe("ava-B")
        await worker.register_function("t::new", lambda _: None)
        await until_told(watcher, lambda functions: "t::new" in functions)
        await worker.close()
        await until_told(watcher, lambda functions: "t::new" not in functions)
        await watcher.until(lambda: len(workers_told(watcher, worker.worker_id)) == 3)
        told = workers_told(watcher, worker.worker_id)
        assert told == ["worker_connected", "worker_metadata_updated", "worker_disconnected"]


def workers_told(watcher: Worker, worker_id: str) -> list[str]:
    """What was told about the worker, in order."""
    data = [asked.data for asked in watcher.invocations if asked.function_id == "t::wa"]
    for one in data:
        assert one.keys() == {"event", "worker_id"}
    return [one["event"] for one in data if one["worker_id"] == worker_id]


async def until_told(watcher: Worker, holds: Callable[[dict[str, Any]], bool]) -> None:
    """Wait for a call of `t::fa` with functions for which `holds` is true; take those before."""
    seen: list[Invocation] = []

    def told() -> bool:
        seen.extend(one for one in watcher.invocations if one.function_id == "t::fa")
        watcher.invocations = [one for one in watcher.invocations if one.function_id != "t::fa"]
        while seen:
            if holds(functions_told(seen.pop(0))):
                return True
        return False

    await watcher.until(told)


def functions_told(invocation: Invocation) -> dict[str, Any]:
    assert invocation.metadata == {"m": 2}
    assert invocation.data.keys() == {"event", "functions"}
    assert invocation.data["event"] == "functions_changed"
    functions = functions_of({"result": invocation.data})
    assert functions.keys() >= STREAM_FUNCTIONS | ENGINE_FUNCTIONS
    return functions
