"""Replay of `golden/sdk_python_trace.json` and `golden/sdk_node_trace.json`.

What the published SDKs sent (`>`) and got (`<`), see `tests/support/transcripts.py`. `connect` is a
new connection, `closed_by: worker` its end (1006: reset). `step` and `application sees` tell what
the application did, and are not compared. In the recording the two SDKs called each other; here
a worker of the harness takes the other's part. Numbers in `changed_*` are indexes into the file.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from tests.conftest import Run
from tests.support.broker import IN_MEMORY, Broker
from tests.support.compare import recording
from tests.support.transcripts import Frame, Transcript, result_frame
from tests.support.worker import Failure, Invocation, Worker

PYTHON: list[Frame] = recording("sdk_python_trace.json")
NODE: list[Frame] = recording("sdk_node_trace.json")

RESET = 1006
NO_CODE = 1005
NOTHING_STORED = {"count": 0, "stream": []}
NODE_CUSTOM = range(103, 115)  # the calls that go to the custom stream
NODE_CUSTOM_FUNCTIONS = range(95, 102)
Do = Callable[[], Coroutine[Any, Any, None]]


def as_transcript(frames: dict[int, Frame]) -> list[Frame]:
    """The recorded lines as frames of a transcript, in the order of their numbers."""
    transcript = []
    for index in sorted(frames):
        frame = frames[index]
        if frame.get("closed_by") == "worker":
            code = frame["code"]
            end = {"abort": True} if code == RESET else {"close": {"code": code}}
            if code == NO_CODE:
                end = {"close": {"code": 1000}}
            frame = {"c": frame["c"], "dir": ">"} | end
        elif "binary_prefix" in frame:
            frame = {"c": frame["c"], "dir": ">", "binary": frame["binary_prefix"] + "{}"}
        transcript.extend(frame.get("frames", [frame]))
    return transcript


def numbered(recorded: list[Frame]) -> dict[int, Frame]:
    return dict(enumerate(recorded))


def after(*frames: Frame) -> Frame:
    """Several frames at one number."""
    return {"frames": list(frames)}


def paths_of(recorded: list[Frame]) -> dict[int, str]:
    return {frame["c"]: frame["connect"] for frame in recorded if "connect" in frame}


def event_asked(c: int, function_id: str, stream: str) -> tuple[Frame, Frame]:
    """The trigger's call for the set that was made while disconnected, and the SDK's answer.

    The original applies registrations later, so that there it does not fire (section 2.3).
    """
    data = {
        "type": "stream",
        "timestamp": "<number>",
        "streamName": stream,
        "groupId": "g1",
        "id": "i1",
        "event": {"type": "create", "data": {"after": "drop"}},
    }
    call = {
        "type": "invokefunction",
        "invocation_id": "<uuid:900>",
        "function_id": function_id,
        "data": data,
        "metadata": {"tag": "t1"},
    }
    answer = result_frame(c, "<uuid:900>", function_id, result={})
    return {"c": c, "dir": "<", "json": call}, answer | {"dir": ">"}


class OtherSdk:
    """Takes the part of the SDK whose trace is not replayed: serves and makes calls."""

    def __init__(self, worker: Worker, prefix: str, name: str) -> None:
        self.worker = worker
        self.prefix = prefix
        self.name = name
        self.calls: list[asyncio.Task[dict[str, Any]]] = []
        self.trigger_id = ""

    async def register(self, failure: str) -> None:
        runtime, version = ("node", "0.22.1") if self.prefix == "node" else ("python", "0.25.0")
        await self.worker.describe(self.name, runtime=runtime, version=version)

        def echo(invocation: Invocation) -> Any:
            return {self.prefix: invocation.data}

        def fail(_: Invocation) -> Failure:
            return Failure("invocation_failed", failure, "at x")

        await self.worker.register_function(f"{self.prefix}::echo", echo)
        await self.worker.register_function(f"{self.prefix}::fail", fail)
        await self.worker.register_function(f"{self.prefix}::on_change", lambda _: None)
        await self.worker.barrier()

    def calls_function(self, function_id: str, data: Any) -> Do:
        """Makes the call, and does not wait for its answer."""

        async def do() -> None:
            call = self.worker.call(function_id, data)
            self.calls.append(asyncio.create_task(call))

        return do

    async def register_trigger(self) -> None:
        config = {"every": 1}
        self.trigger_id = await self.worker.register_trigger("node-ticks", "py::echo", config)

    async def unregister_trigger(self) -> None:
        await self.worker.unregister_trigger(self.trigger_id, trigger_type="node-ticks")

    async def register_late(self) -> None:
        await self.worker.register_function(f"{self.prefix}::late", lambda _: None)

    async def answers(self) -> list[dict[str, Any]]:
        return await asyncio.gather(*self.calls)


@pytest.fixture
def broker() -> Iterator[Broker]:
    """A fresh one: `list_all` is called."""
    with Broker(IN_MEMORY) as broker:
        yield broker


def test_python_sdk(broker: Broker, run: Run) -> None:
    run(replay_python(broker))


async def replay_python(broker: Broker) -> None:
    async with await Worker.open(broker.worker_url) as worker:
        node = OtherSdk(worker, "node", "node-trace")
        await node.register('node nope ["_caller_worker_id","from"]')
        transcript = Transcript(broker.worker_url, worker, paths_of(PYTHON))
        try:
            await transcript.replay(as_transcript(changed_python(node)), "sdk_python_trace")
            await transcript.finish("sdk_python_trace")
        finally:
            await transcript.close()
        echoed, failed = await node.answers()
        assert echoed["result"]["py"] == {"from": "node", "_caller_worker_id": worker.worker_id}
        assert failed["error"]["message"] == "nope 9"


def changed_python(node: OtherSdk) -> dict[int, Frame]:
    frames = numbered(PYTHON)
    # a get after a void set sees the set (promise 3)
    frames[22] = result_frame(1, "<uuid:5>", "stream::get", result={"n": 2, "name": "Bob"})
    # groups without items are not listed (difference 18); other streams were of other recordings
    frames[59] = result_frame(1, "<uuid:17>", "stream::list_all", result=NOTHING_STORED)
    # a call without a payload is answered (section 3.10)
    answered = result_frame(1, "<uuid:25>", "stream::list_all", result=NOTHING_STORED)
    frames[95] = after(PYTHON[95], answered)
    frames[96] = after({"do": node.calls_function("py::echo", {"from": "node"})}, PYTHON[96])
    frames[98] = after({"do": node.calls_function("py::fail", {"x": 9})}, PYTHON[98])
    frames[136] = after(PYTHON[136], *event_asked(3, "py::on_change", "trace-py"))
    return frames


def test_node_sdk(broker: Broker, run: Run) -> None:
    run(replay_node(broker))


async def replay_node(broker: Broker) -> None:
    async with await Worker.open(broker.worker_url) as worker:
        python = OtherSdk(worker, "py", "py-trace")
        await python.register("nope 9")
        transcript = Transcript(broker.worker_url, worker, paths_of(NODE))
        try:
            await transcript.replay(as_transcript(changed_node(python)), "sdk_node_trace")
            await transcript.finish("sdk_node_trace", told_functions)
        finally:
            await transcript.close()
        echoed, failed = await python.answers()
        assert echoed["result"]["node"] == {"from": "py", "_caller_worker_id": worker.worker_id}
        assert failed["error"]["code"] == "invocation_failed"


def told_functions(frame: Any) -> bool:
    """Whether it is the call for `engine::functions-available`: how many come is not promised."""
    return bool(frame.get("function_id") == "node::fns")


def functions_changed(message: Any) -> None:
    assert message["data"].keys() == {"event", "functions"}
    assert message["data"]["event"] == "functions_changed"
    assert "node::fns" in [function["function_id"] for function in message["data"]["functions"]]


def changed_node(python: OtherSdk) -> dict[int, Frame]:
    frames = numbered(NODE)
    frames[76] = after({"do": python.calls_function("node::echo", {"from": "py"})}, NODE[76])
    frames[78] = after({"do": python.calls_function("node::fail", {"from": "py"})}, NODE[78])
    answered = result_frame(2, "<uuid:26>", "stream::list_all", result=NOTHING_STORED)
    frames[89] = after(NODE[89], answered)
    frames[96] = after({"do": python.register_trigger}, NODE[96])
    for index in NODE_CUSTOM:
        del frames[index]
    frames[118] = after({"do": python.unregister_trigger}, NODE[118])
    frames[121] = after({"do": python.register_late}, NODE[121] | {"check": functions_changed})
    frames[152] = after(NODE[152], *event_asked(4, "node::on_change", "trace-node"))
    del frames[176], frames[178]  # one more call of node::fns, see `told_functions`
    return frames


def test_custom_stream_of_the_node_sdk(broker: Broker, run: Run) -> None:
    run(replay_node_custom(broker))


async def replay_node_custom(broker: Broker) -> None:
    async with await Worker.open(broker.worker_url) as observer:
        transcript = Transcript(broker.worker_url, observer)
        registered = [NODE[i] for i in NODE_CUSTOM_FUNCTIONS if NODE[i].get("dir") == ">"]
        frames = [NODE[4], *registered, *(NODE[index] for index in NODE_CUSTOM)]
        try:
            await transcript.replay(frames, "custom stream of sdk_node_trace")
            await transcript.finish("custom stream of sdk_node_trace")
        finally:
            await transcript.close()
