"""Triggers, conditions, auth and custom streams when workers and clients fail, come and go.

`test_case_NN_kind` as in `test_cases.py`: NN is the fault's number in the project's collection.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import pytest
import yaml
from websockets.exceptions import InvalidHandshake

from broker.names import Group
from broker.routing import shard_of
from tests.conftest import Run
from tests.front_door.sdk_programs import Program, browser, python_worker
from tests.support.broker import IN_MEMORY, Broker
from tests.support.calls import LONG_S, item, result_of
from tests.support.connection import Closed
from tests.support.stream_client import UPGRADE, RawHttp, StreamClient, settled
from tests.support.worker import NOTHING, Failure, Handler, Invocation, Worker

from .test_cases import AUTH, metrics

TIMEOUTS = yaml.safe_dump({"broker": {"limits": {"auth_timeout_s": 1, "trigger_timeout_s": 1}}})
"""Short, so that what hangs is given up soon."""

FAULTS = ["raises", "missing", "hangs", "killed"]
BOOM = Failure("BOOM", "it went wrong")

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def quick_broker() -> Iterator[Broker]:
    """A broker that gives up soon on what hangs."""
    with Broker(IN_MEMORY + TIMEOUTS) as broker:
        yield broker


@pytest.fixture(scope="module")
def guarded_broker() -> Iterator[Broker]:
    """A broker that gives up soon on what hangs, with an auth function `stream::auth`."""
    with Broker(AUTH + TIMEOUTS) as broker:
        yield broker


# What goes wrong, and what is beside it ------------------------------------------------------


async def break_function(worker: Worker, function_id: str, fault: str) -> None:
    """Let `worker` serve `function_id` as `fault` says, which is one of `FAULTS`.

    `killed` ends the worker's connection at the first call, without an answer or a close frame.
    """

    async def hang(_: Invocation) -> Any:
        await asyncio.Event().wait()

    async def die(_: Invocation) -> Any:
        await worker.abort()
        return NOTHING

    handlers: dict[str, Handler] = {"raises": lambda _: BOOM, "hangs": hang, "killed": die}
    if fault in handlers:
        await worker.register_function(function_id, handlers[fault])
    await worker.barrier()


async def heal_function(broken: Worker, healthy: Worker, function_id: str, fault: str) -> None:
    """From now on `healthy` serves what `broken` was to serve; it answers nothing."""
    if fault != "killed":
        await broken.unregister_function(function_id)
        await broken.barrier()
    await healthy.register_function(function_id, lambda _: NOTHING)
    await healthy.barrier()


class Beside:
    """A client and a worker with a trigger, whom nothing that happens elsewhere may disturb."""

    def __init__(self, client: StreamClient, worker: Worker) -> None:
        self.client = client
        self.worker = worker
        self.group = str(next(_numbers))
        self.count = 0

    @classmethod
    @asynccontextmanager
    async def open(cls, broker: Broker) -> AsyncIterator[Beside]:
        """Connect, and check once more at the end."""
        async with (
            await StreamClient.open(broker.stream_url) as client,
            await Worker.open(broker.worker_url) as worker,
        ):
            beside = cls(client, worker)
            function_id = f"beside-{beside.group}"
            await worker.register_function(function_id, lambda _: None)
            config = {"stream_name": "beside", "group_id": beside.group}
            await worker.register_trigger("stream", function_id, config)
            assert (await client.join("beside", beside.group))["seq"] == 0
            await beside.check()
            yield beside
            await beside.check()

    async def check(self) -> None:
        """A change reaches both, once."""
        self.count += 1
        data = {"id": "i", "n": self.count}
        await put(self.worker, "beside", self.group, "i", data)
        event = await self.client.next()
        assert (event["seq"], event["event"]["data"]) == (self.count, data)
        (fired,) = await self.worker.asked(1)
        assert fired.data == {key: event[key] for key in fired.data}
        assert fired.data["event"]["data"] == data
        assert not self.client.waiting
        assert not self.worker.invocations


async def put(worker: Worker, stream: str, group: str, item_id: str, data: Any) -> None:
    """Set an item; it must succeed."""
    await result_of(worker, "stream::set", item(stream, group, item_id, data=data))


def given(worker: Worker, function_id: str) -> list[Any]:
    """What one function of the worker was asked so far."""
    return [i.data for i in worker.invocations if i.function_id == function_id]


def item_ids(worker: Worker, function_id: str) -> list[str]:
    """The items whose changes one function of the worker was told of, in order."""
    return [data["id"] for data in given(worker, function_id)]


async def until(holds: Callable[[], Any]) -> None:
    """Return when `holds()`, which is asked again and again, on a thread."""
    async with asyncio.timeout(LONG_S):
        while not await asyncio.to_thread(holds):
            await asyncio.sleep(0.02)


def outcome(broker: Broker, name: str) -> float:
    """How many triggers had this outcome so far."""
    samples = metrics(broker.metrics_url)
    return samples[f'broker_trigger_invocations_total{{outcome="{name}"}}']


async def until_workers(observer: Worker, present: set[str], absent: set[str]) -> None:
    """Return when workers with the one ids are listed, and none with the others.

    Only those that described themselves are listed.
    """
    async with asyncio.timeout(LONG_S):
        while True:
            listed = await result_of(observer, "engine::workers::list", {})
            ids = {worker["id"] for worker in listed["workers"]}
            if present <= ids and not absent & ids:
                return
            await asyncio.sleep(0.01)


# Failing handlers ----------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
def test_failing_auth_lets_nobody_in(fault: str, guarded_broker: Broker, run: Run) -> None:
    status = 401 if fault == "raises" else 503
    url = guarded_broker.stream_url

    async def knock(expected: int) -> None:
        async with await RawHttp.request(url, UPGRADE) as http:
            assert (await http.response()).status == expected

    async def scenario() -> None:
        async with (
            await Worker.open(guarded_broker.worker_url) as door,
            await Worker.open(guarded_broker.worker_url) as broken,
        ):
            await door.register_function("stream::auth", lambda _: {"context": None})
            await door.barrier()
            async with Beside.open(guarded_broker) as beside:
                await door.unregister_function("stream::auth")
                await door.barrier()
                await break_function(broken, "stream::auth", fault)
                knocking = asyncio.create_task(knock(status))
                await beside.check()
                await knocking
                if fault == "killed":  # as if it had never been there
                    await knock(503)
                else:
                    await broken.unregister_function("stream::auth")
                    await broken.barrier()
                await door.register_function("stream::auth", lambda _: {"context": None})
                await door.barrier()
                await knock(101)
                await door.unregister_function("stream::auth")
                await door.barrier()

    run(scenario())


async def check_join_refused(
    broker: Broker, fault: str, stream: str, *, condition: str | None = None
) -> None:
    """A join trigger of `stream` refuses as its condition fails, or without one its handler."""
    handler = f"joined {stream}"
    broken = condition or handler
    async with (
        Beside.open(broker) as beside,
        await Worker.open(broker.worker_url) as victim,
        await Worker.open(broker.worker_url) as owner,
        await StreamClient.open(broker.stream_url) as client,
    ):
        if fault == "answers a string":
            await victim.register_function(broken, lambda _: {"unauthorized": "true"})
            await victim.barrier()
        else:
            await break_function(victim, broken, fault)
        if condition is not None:
            await owner.register_function(handler, lambda _: None)
        config = {"stream_name": stream, "condition_function_id": condition}
        await owner.register_trigger("stream:join", handler, config)
        await owner.barrier()
        await client.send_join(stream, "g", "refused")
        await beside.check()
        refused = await client.next()
        assert (refused["streamName"], refused["groupId"]) == (stream, "g")
        assert refused["event"] == {"type": "unauthorized"}
        await put(owner, stream, "g", "i", {"id": "i"})
        free = f"free of {stream}"
        assert (await client.join(free, "g", "other"))["event"] == {"type": "sync", "data": []}
        await put(owner, free, "g", "i", {"id": "i"})
        assert (await client.next())["event"]["type"] == "create"
        await settled([client], owner, [(stream, "g"), (free, "g")])
        assert len(client.received) == 3
        assert owner.invocations == []


@pytest.mark.parametrize("fault", [*FAULTS, "answers a string"])
def test_case_09_failing_join_handler_refuses(fault: str, quick_broker: Broker, run: Run) -> None:
    run(check_join_refused(quick_broker, fault, f"s9 {fault}"))


@pytest.mark.parametrize("fault", FAULTS)
def test_failing_join_condition_refuses(fault: str, quick_broker: Broker, run: Run) -> None:
    stream = f"conditional {fault}"
    run(check_join_refused(quick_broker, fault, stream, condition=f"may-join-{fault}"))


@pytest.mark.parametrize("fault", FAULTS)
def test_failing_stream_condition_skips(fault: str, quick_broker: Broker, run: Run) -> None:
    stream, condition = f"skip {fault}", f"if-{fault}"

    async def scenario() -> None:
        async with (
            Beside.open(quick_broker) as beside,
            await Worker.open(quick_broker.worker_url) as broken,
            await Worker.open(quick_broker.worker_url) as owner,
        ):
            await break_function(broken, condition, fault)
            for function_id in ("skipped", "runs"):
                await owner.register_function(function_id, lambda _: None)
            config = {"stream_name": stream}
            conditional = config | {"condition_function_id": condition}
            await owner.register_trigger("stream", "skipped", conditional)
            await owner.register_trigger("stream", "runs", config)
            await owner.barrier()
            failed = outcome(quick_broker, "condition_failed")
            for name in ("a", "b"):
                await put(owner, stream, "g", name, name)
            await owner.until(lambda: len(given(owner, "runs")) == 2)
            await beside.check()
            await until(lambda: outcome(quick_broker, "condition_failed") >= failed + 2)
            await heal_function(broken, owner, condition, fault)
            await put(owner, stream, "g", "c", "c")
            await owner.until(lambda: bool(given(owner, "skipped")))
            await settled([], owner, [(stream, "g")])
            assert item_ids(owner, "runs") == ["a", "b", "c"]
            assert item_ids(owner, "skipped") == ["c"]
            assert outcome(quick_broker, "condition_failed") == failed + 2

    run(scenario())


@pytest.mark.parametrize("fault", FAULTS)
def test_failing_stream_handler_is_alone(fault: str, quick_broker: Broker, run: Run) -> None:
    stream, function = f"fail {fault}", f"handler-{fault}"

    async def scenario() -> None:
        async with (
            Beside.open(quick_broker) as beside,
            await Worker.open(quick_broker.worker_url) as broken,
            await Worker.open(quick_broker.worker_url) as owner,
            await StreamClient.open(quick_broker.stream_url) as client,
        ):
            await break_function(broken, function, fault)
            await owner.register_function("good", lambda _: None)
            await owner.register_trigger("stream", function, {"stream_name": stream})
            await owner.register_trigger("stream", "good", {"stream_name": stream})
            await client.join(stream, "g")
            failed = outcome(quick_broker, "failed")
            for name in ("a", "b", "c"):
                await put(owner, stream, "g", name, name)  # answered, whatever the handler does
                assert (await client.next())["id"] == name
            await owner.until(lambda: len(given(owner, "good")) == 3)
            await beside.check()
            if fault == "hangs":
                assert outcome(quick_broker, "failed") == failed
                await broken.until(lambda: len(broken.invocations) == 3)
                await broken.abort()
            await until(lambda: outcome(quick_broker, "failed") >= failed + 3)
            how = "killed" if fault == "hangs" else fault
            await heal_function(broken, owner, function, how)
            await put(owner, stream, "g", "d", "d")
            await owner.until(lambda: bool(given(owner, function)))
            await settled([client], owner, [(stream, "g")])
            assert item_ids(owner, function) == ["d"]
            assert item_ids(owner, "good") == ["a", "b", "c", "d"]
            assert outcome(quick_broker, "failed") == failed + 3
            assert len(client.received) == 5

    run(scenario())


def test_hanging_handler_is_given_up(run: Run) -> None:
    """Nothing is kept for ever of those that never answer."""
    config = IN_MEMORY + yaml.safe_dump({"broker": {"limits": {"handler_timeout_s": 0.1}}})

    async def scenario() -> None:
        async with (
            await Worker.open(broker.worker_url) as worker,
            await StreamClient.open(broker.stream_url) as client,
        ):
            await break_function(worker, "never", "hangs")
            for kind in ("stream", "stream:leave"):
                await worker.register_trigger(kind, "never", {"stream_name": "s"})
            await worker.barrier()
            for n in range(5):
                await client.join("s", "g", str(n))
                await client.send_leave("s", "g", str(n))
                await put(worker, "s", "h", str(n), n)
            await worker.asked(10)
            await until(lambda: outcome(broker, "failed") >= 10)
            assert metrics(broker.metrics_url)["broker_invocations_pending"] == 0
            assert outcome(broker, "failed") == outcome(broker, "fired") == 10

    with Broker(config) as broker:
        run(scenario())


@pytest.mark.parametrize("fault", FAULTS)
def test_failing_leave_handler_is_ignored(fault: str, quick_broker: Broker, run: Run) -> None:
    stream, function = f"leave {fault}", f"left-{fault}"

    async def scenario() -> None:
        async with (
            Beside.open(quick_broker) as beside,
            await Worker.open(quick_broker.worker_url) as broken,
            await Worker.open(quick_broker.worker_url) as owner,
            await StreamClient.open(quick_broker.stream_url) as client,
        ):
            await break_function(broken, function, fault)
            await owner.register_function("good", lambda _: None)
            await owner.register_trigger("stream:leave", function, {"stream_name": stream})
            await owner.register_trigger("stream:leave", "good", {"stream_name": stream})
            await owner.barrier()
            for name in ("a", "b"):
                await client.join(stream, "g", name)
                await client.send_leave(stream, "g", name)
            assert (await client.join(stream, "g", "c"))["event"]["type"] == "sync"
            await beside.check()
            await client.close()
            await owner.until(lambda: len(given(owner, "good")) == 3)
            await settled([], owner, [(stream, "g")])
            left = [data["subscription_id"] for data in given(owner, "good")]
            assert left == ["a", "b", "c"]

    run(scenario())


# Custom streams ------------------------------------------------------------------------------


class Store:
    """The storage of one custom stream; its worker registers `handlers`."""

    def __init__(self) -> None:
        self.items: dict[tuple[str, str], Any] = {}
        self.handlers: dict[str, Handler] = {
            "get": lambda call: self.items.get(_key(call)),
            "set": self._set,
            "delete": lambda call: {"old_value": self.items.pop(_key(call), None)},
            "list": lambda call: [
                value for (group, _), value in self.items.items() if group == call.data["group_id"]
            ],
            "list_groups": lambda _: sorted({group for group, _ in self.items}),
        }

    def _set(self, call: Invocation) -> Any:
        old = self.items.get(_key(call))
        self.items[_key(call)] = call.data["data"]
        return {"old_value": old, "new_value": call.data["data"]}


def _key(call: Invocation) -> tuple[str, str]:
    return call.data["group_id"], call.data["item_id"]


VALUE = {"id": "i", "n": 1}
CALLS: dict[str, tuple[dict[str, Any], Any, Any]] = {
    # function: what is asked beside stream_name; the custom stream's answer, the built-in one's
    "get": ({"group_id": "g", "item_id": "i"}, VALUE, None),
    "set": (
        {"group_id": "g", "item_id": "i", "data": VALUE},
        {"old_value": VALUE, "new_value": VALUE},
        {"old_value": None, "new_value": VALUE},
    ),
    "delete": ({"group_id": "g", "item_id": "i"}, {"old_value": VALUE}, {"old_value": None}),
    "list": ({"group_id": "g"}, [VALUE], []),
    "list_groups": ({}, ["g"], []),
}
WRAPPED = {"set": "STREAM_SET_ERROR", "delete": "STREAM_DELETE_ERROR"}


def check_error(function: str, fault: str, answer: dict[str, Any]) -> None:
    """The error of a call whose worker raised, or was killed in the middle."""
    assert set(answer) == {"error"}, answer
    error = answer["error"]
    code, message = BOOM[:2] if fault == "raises" else ("invocation_stopped", "Invocation stopped")
    if function in WRAPPED:
        assert error["code"] == WRAPPED[function], error
        assert code in error["message"], error
        assert message in error["message"], error
    else:
        assert (error["code"], error["message"]) == (code, message)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("function", CALLS)
def test_failing_custom_stream(function: str, fault: str, quick_broker: Broker, run: Run) -> None:
    stream = f"custom {function} {fault}"
    function_id = f"stream::{function}({stream})"
    _, answer, built_in = CALLS[function]
    store = Store()
    store.items["g", "i"] = VALUE

    async def call(caller: Worker, name: str, **more: Any) -> dict[str, Any]:
        data = {"stream_name": stream} | CALLS[name][0] | more
        return await caller.call(f"stream::{name}", data, LONG_S)

    async def scenario() -> None:
        async with (
            Beside.open(quick_broker) as beside,
            await Worker.open(quick_broker.worker_url) as broken,
            await Worker.open(quick_broker.worker_url) as owner,
            await StreamClient.open(quick_broker.stream_url) as client,
        ):
            for name, handler in store.handlers.items():
                if name != function:
                    await owner.register_function(f"stream::{name}({stream})", handler)
            await owner.barrier()
            await client.join(stream, "g", id=None if function != "list" else "i")
            await break_function(broken, function_id, fault)
            if fault != "missing":  # stands by until the other one is gone
                await owner.register_function(function_id, store.handlers[function])
                await owner.barrier()
            calling = asyncio.create_task(call(owner, function))
            await beside.check()
            if fault == "hangs":
                await broken.until(lambda: bool(broken.invocations))
                other = "get" if function == "list" else "list"  # in another group
                assert "error" not in await call(owner, other, group_id="h")
                assert not calling.done()
                await broken.abort()
            got = await calling
            if fault == "missing":
                assert got.get("result") == built_in
                await settled([client])
                assert len(client.received) == (2 if function == "set" else 1)
                return
            check_error(function, fault, got)
            await settled([client])
            assert len(client.received) == 1  # nothing was changed, nothing is told
            if fault == "raises":
                await broken.unregister_function(function_id)
                await broken.barrier()
            assert await call(owner, function) == {"result": answer}

    run(scenario())


@pytest.mark.parametrize("fault", ["raises", "hangs", "killed"])
def test_join_of_a_failing_custom_stream(fault: str, quick_broker: Broker, run: Run) -> None:
    """The client is told, and gets its sync once reading works."""
    stream = f"custom join {fault}"
    function_id = f"stream::list({stream})"
    store = Store()
    store.items["g", "i"] = VALUE

    async def scenario() -> None:
        async with (
            Beside.open(quick_broker) as beside,
            await Worker.open(quick_broker.worker_url) as broken,
            await Worker.open(quick_broker.worker_url) as owner,
            await StreamClient.open(quick_broker.stream_url) as client,
        ):
            await break_function(broken, function_id, fault)
            for name, handler in store.handlers.items():  # the list stands by
                await owner.register_function(f"stream::{name}({stream})", handler)
            await owner.barrier()
            await client.send_join(stream, "g", "s1")
            await beside.check()
            if fault == "hangs":
                await broken.until(lambda: bool(broken.invocations))
                assert client.received == []
                await broken.abort()
            frame = await client.next()
            assert frame["event"]["type"] == "error", frame
            assert frame["event"]["subscriptionId"] == "s1"
            assert frame["event"]["code"] == ("BOOM" if fault == "raises" else "invocation_stopped")
            if fault == "raises":
                await broken.unregister_function(function_id)
                await broken.barrier()
            sync = await client.next(lambda frame: frame["event"]["type"] == "sync")
            assert sync["event"]["data"] == [VALUE]
            await put(owner, stream, "g", "i", VALUE | {"n": 2})
            event = await client.next()
            assert (event["event"]["type"], event["seq"]) == ("update", sync["seq"] + 1)

    run(scenario())


# Triggers that come and go -------------------------------------------------------------------


async def open_when_up(broker: Broker) -> Worker:
    """A worker, as soon as the gateway that was killed is back."""
    async with asyncio.timeout(LONG_S):
        while True:
            try:
                return await Worker.open(broker.worker_url)
            except (OSError, InvalidHandshake):
                await asyncio.sleep(0.02)


async def until_triggers(observer: Worker, function_id: str, count: int) -> None:
    """Return when the function has `count` triggers."""
    async with asyncio.timeout(LONG_S):
        while True:
            query = {"function_id": function_id}
            listed = await result_of(observer, "engine::registered-triggers::list", query)
            if len(listed["registered_triggers"]) == count:
                return
            await asyncio.sleep(0.02)


@pytest.mark.timeout(180)
def test_case_24_trigger_after_reconnect(run: Run) -> None:
    names = [f"g{n}" for n in range(100)]
    groups = [next(g for g in names if shard_of(Group("tasks", g), 2) == k) for k in range(2)]
    counter = itertools.count(1)
    kills = {2: "shard-0", 4: "gateway", 6: "shard-1", 8: "gateway"}

    async def put_again(group: str, number: int) -> None:
        """Set until the shard is back; what was refused has not been done."""
        data = item("tasks", group, "i", data={"id": "i", "n": number})
        async with asyncio.timeout(LONG_S):
            while "error" in (answer := await writer.call("stream::set", data, LONG_S)):
                assert answer["error"]["code"] == "shard_unavailable", answer
                await asyncio.sleep(0.02)

    def check_fired(program: Program) -> None:
        """Two sets in each group are told once each; the second shows that no more was to come."""
        for group in groups:
            expected = [next(counter), next(counter)]
            for number in expected:
                run(put_again(group, number))
            sent.extend(expected)
            wait_for_number(program, expected[1])
        assert sorted(filter(None, map(_number, program.reports))) == sent

    def wait_for_number(program: Program, number: int) -> None:
        program.wait_for(lambda report: _number(report) == number)

    def _number(report: dict[str, Any]) -> int:
        if report.get("called") != "f24":
            return 0
        number: int = report["data"]["event"]["data"]["n"]
        return number

    with Broker(IN_MEMORY) as broker, ExitStack() as programs:
        writer = run(Worker.open(broker.worker_url))
        for round_number in range(10):
            sent: list[int] = []
            program = python_worker(broker)
            programs.callback(program.kill)
            program.send("function", id="f24", returns=None)
            config = {"stream_name": "tasks"}
            program.send("trigger", type="stream", function_id="f24", config=config)
            run(until_triggers(writer, "f24", 1))
            check_fired(program)
            if (doomed := kills.get(round_number)) is not None:
                pid = broker.children()[doomed]
                os.kill(pid, signal.SIGKILL)
                if doomed == "gateway":
                    run(writer.abort())
                    writer = run(open_when_up(broker))
                    run(until_triggers(writer, "f24", 1))
                check_fired(program)
                assert broker.children()[doomed] != pid
            program.kill()
            run(until_triggers(writer, "f24", 0))
            for group in groups:  # for nobody, then and later
                run(put_again(group, next(counter)))
        run(writer.close())


def test_case_25_one_trigger_however_often_registered(quick_broker: Broker, run: Run) -> None:
    async def scenario() -> None:
        writer = await Worker.open(quick_broker.worker_url)
        workers = [await Worker.open(quick_broker.worker_url)]
        for number in range(6):
            worker = workers[-1]
            await worker.register_function("f25", lambda _: None)
            for _ in range(5 if number == 0 else 1):
                config = {"stream_name": "s25"}
                await worker.register_trigger("stream", "f25", config, id="t25")
            await worker.barrier()
            await put(writer, "s25", "g", str(number), number)
            await worker.until(lambda: bool(workers[-1].invocations))
            await settled([], worker, [("s25", "g")])
            assert [item_ids(w, "f25") for w in workers] == [[str(n)] for n in range(number + 1)]
            if number < 5:
                again = await Worker.open(quick_broker.worker_url)
                ids = {
                    "previous_worker_id": worker.worker_id,
                    "reattach_token": worker.reattach_token,
                }
                await again.send({"type": "reattach", **ids})
                workers.append(again)
                assert isinstance(await worker.next(lambda f: isinstance(f, Closed)), Closed)
        for worker in (writer, *workers):
            await worker.close()

    run(scenario())


def test_case_26_function_reregistration(run: Run) -> None:
    count, after_count = 1000, 700

    async def scenario() -> None:
        caller = await Worker.open(broker.worker_url)
        frozen = await Worker.open(broker.worker_url)
        await frozen.describe("old")
        await frozen.register_function("f26", lambda _: "old")
        await frozen.barrier()
        frozen.socket.transport.pause_reading()
        before = [
            asyncio.create_task(caller.call("f26", n, LONG_S)) for n in range(count - after_count)
        ]
        await asyncio.sleep(0)
        await caller.barrier()
        again = await Worker.open(broker.worker_url)
        previous = {"previous_worker_id": frozen.worker_id}
        await again.send({"type": "reattach", **previous, "reattach_token": frozen.reattach_token})
        await again.register_function("f26", lambda _: "new")
        await again.describe("new")
        after = [asyncio.create_task(caller.call("f26", n, LONG_S)) for n in range(after_count)]
        for answer in await asyncio.gather(*after):
            assert answer == {"result": "new"}
        for answer in await asyncio.gather(*before):
            assert answer["error"]["code"] == "invocation_stopped", answer
        await until_workers(caller, {again.worker_id}, {frozen.worker_id})
        frozen.socket.transport.resume_reading()
        await frozen.next(lambda frame: isinstance(frame, Closed))
        assert await caller.call("f26", 1) == {"result": "new"}
        seen = {
            (what, worker.worker_id): len(
                re.findall(rf"worker_{what} id={worker.worker_id}", broker.log)
            )
            for what in ("connected", "disconnected")
            for worker in (frozen, again)
        }
        assert seen == {
            ("connected", frozen.worker_id): 1,
            ("disconnected", frozen.worker_id): 1,
            ("connected", again.worker_id): 1,
            ("disconnected", again.worker_id): 0,
        }
        for worker in (caller, again):
            await worker.close()

    with Broker(IN_MEMORY) as broker:
        run(scenario())


def test_case_27_condition_function(quick_broker: Broker, run: Run) -> None:
    async def scenario() -> None:
        async with await Worker.open(quick_broker.worker_url) as worker:
            await worker.register_function("raises27", lambda _: BOOM)
            for condition in ("raises27", "missing27", None):
                function_id = f"f27 {condition}"
                await worker.register_function(function_id, lambda _: None)
                config = {"stream_name": "s27", "condition_function_id": condition}
                await worker.register_trigger("stream", function_id, config)
            before = outcome(quick_broker, "condition_failed")
            for n in range(10):
                await put(worker, "s27", "g", str(n), n)
            await until(lambda: outcome(quick_broker, "condition_failed") >= before + 20)
            await settled([], worker, [("s27", "g")])
            assert item_ids(worker, "f27 None") == [str(n) for n in range(10)]
            assert len(given(worker, "raises27")) == 10
            assert given(worker, "f27 raises27") == given(worker, "f27 missing27") == []
            assert outcome(quick_broker, "condition_failed") == before + 20

    run(scenario())


def test_case_52_trigger_stall(quick_broker: Broker, run: Run) -> None:
    """The function's worker dies in the middle; the trigger is another worker's and stays."""

    async def scenario() -> None:
        async with (
            await Worker.open(quick_broker.worker_url) as owner,
            await Worker.open(quick_broker.worker_url) as doomed,
        ):
            await break_function(doomed, "f52", "hangs")
            await owner.register_trigger("stream", "f52", {"stream_name": "s52"})
            failed = outcome(quick_broker, "failed")
            await put(owner, "s52", "g", "first", 0)
            await doomed.asked(1)
            await doomed.abort()
            for n in range(100):
                await put(owner, "s52", "g", str(n), n)
            await until(lambda: outcome(quick_broker, "failed") >= failed + 101)
            async with await Worker.open(quick_broker.worker_url) as back:
                await back.register_function("f52", lambda _: None)
                await back.barrier()
                sets = (put(owner, "s52", "g", f"later {n}", n) for n in range(100))
                await asyncio.gather(*sets)
                await back.until(lambda: len(back.invocations) >= 100)
                await settled([], back, [("s52", "g")])
                assert item_ids(back, "f52") == [f"later {n}" for n in range(100)]
                assert outcome(quick_broker, "failed") == failed + 101

    run(scenario())


@pytest.mark.parametrize("leaving", ["close", "abort", "abort while busy"])
def test_rolling_deployment(leaving: str, quick_broker: Broker, run: Run) -> None:
    """Two workers with the same functions and a trigger each; the older one leaves."""
    stream, function = f"rolling {leaving}", f"on-{leaving}"

    async def write(writer: Worker, numbers: range) -> None:
        for first in range(numbers.start, numbers.stop, 10):
            names = map(str, range(first, first + 10))
            await asyncio.gather(*(put(writer, stream, "g", name, name) for name in names))

    async def scenario() -> None:
        async with (
            Beside.open(quick_broker) as beside,
            await Worker.open(quick_broker.worker_url) as writer,
            await Worker.open(quick_broker.worker_url) as old,
            await Worker.open(quick_broker.worker_url) as new,
        ):
            for worker in (old, new):
                await worker.register_function(function, lambda _: None)
                config, metadata = {"stream_name": stream}, {"of_new": worker is new}
                await worker.register_trigger("stream", function, config, metadata=metadata)
                await worker.describe("on duty")
            writing = asyncio.create_task(write(writer, range(300)))
            await old.until(lambda: len(old.invocations) >= 100)
            assert not writing.done()
            if leaving == "abort while busy":  # what was sent to it is never read
                old.socket.transport.pause_reading()
                await writing
            await (old.close() if leaving == "close" else old.abort())
            await writing
            await until_workers(writer, {new.worker_id}, {old.worker_id})
            await write(writer, range(300, 500))
            await new.until(lambda: "499" in item_ids(new, function)[-1:])
            await settled([], new, [(stream, "g")])
            await beside.check()
            told = item_ids(new, function)
            handled = {*item_ids(old, function), *told}
            assert {str(n) for n in range(500)} - handled == set()
            later = [name for name in told if int(name) >= 300]
            assert later == [str(n) for n in range(300, 500)]
            of_new = [i for i in new.invocations if i.metadata == {"of_new": True}]
            survivor = [int(i.data["id"]) for i in of_new if i.function_id == function]
            assert survivor == sorted(set(survivor))  # in order, with what was sent again

    run(scenario())


def test_rolling_deployment_refuses_nobody(run: Run) -> None:
    """A worker dies with questions unread; the one that takes over answers them."""
    count = 20

    async def door(name: str) -> Worker:
        worker = await presence_worker(broker, "rolling")
        await worker.describe(name)
        return worker

    async def abort_when_asked(worker: Worker) -> None:
        pending = "broker_invocations_pending"
        await until(lambda: metrics(broker.metrics_url)[pending] >= count)
        await worker.abort()

    async def scenario() -> None:
        oldest, older = await door("oldest"), await door("older")
        oldest.socket.transport.pause_reading()
        opening = [
            asyncio.create_task(StreamClient.open(f"{broker.stream_url}/?u={n}"))
            for n in range(count)
        ]
        await abort_when_asked(oldest)
        clients = await asyncio.gather(*opening)
        newest = await door("newest")
        older.socket.transport.pause_reading()
        for client in clients:
            await client.send_join("rolling", "g")
        await abort_when_asked(older)
        for client in clients:
            assert (await client.next())["event"]["type"] == "sync"
        for peer in (newest, *clients):
            await peer.close()

    with Broker(AUTH) as broker:
        run(scenario())


# Leaves --------------------------------------------------------------------------------------


async def presence_worker(broker: Broker, stream: str) -> Worker:
    """A worker that lets in everybody as the user in the query `u`, and is told of `stream`.

    Its functions are `joined` and `left`, with the stream's name behind it.
    """
    worker = await Worker.open(broker.worker_url)

    def context(call: Invocation) -> Any:
        return {"context": {"user": call.data["query_params"].get("u")}}

    await worker.register_function("stream::auth", context)
    for kind, name in (("stream:join", "joined"), ("stream:leave", "left")):
        await worker.register_function(f"{name} {stream}", lambda _: None)
        await worker.register_trigger(kind, f"{name} {stream}", {"stream_name": stream})
    await worker.barrier()
    return worker


def told_of(stream: str, subscription_id: str, user: str | None, **more: Any) -> dict[str, Any]:
    """What the handlers of a join and of a leave are given."""
    names = {"subscription_id": subscription_id, "stream_name": stream, "group_id": "g", "id": None}
    return names | {"context": None if user is None else {"user": [user]}} | more


async def leaves_before_fence(broker: Broker, worker: Worker, stream: str) -> list[Any]:
    """All leaves, when one of another client's came after them."""
    function_id = f"left {stream}"
    async with await StreamClient.open(f"{broker.stream_url}/?u=fence") as client:
        await client.join(stream, "g", "fence")
        await client.send_leave(stream, "g", "fence")
        await worker.until(
            lambda: any(data["subscription_id"] == "fence" for data in given(worker, function_id))
        )
        await settled([client], worker, [(stream, "g")])
    return [data for data in given(worker, function_id) if data["subscription_id"] != "fence"]


def sorted_by_id(payloads: list[Any]) -> list[Any]:
    return sorted(payloads, key=lambda data: data["subscription_id"])


def reset(client: StreamClient) -> None:
    """End the TCP connection with RST."""
    linger = struct.pack("ii", 1, 0)
    sock = client.socket.transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


@pytest.mark.parametrize("end", ["leave frame", "close frame", "reset"])
def test_case_28_leave_events(end: str, guarded_broker: Broker, run: Run) -> None:
    stream = f"s28 {end}"

    async def scenario() -> None:
        worker = await presence_worker(guarded_broker, stream)
        client = await StreamClient.open(f"{guarded_broker.stream_url}/?u=ann")
        await client.join(stream, "g", "one")
        await client.join(stream, "g", "two", id="i")
        match end:
            case "leave frame":
                for name in ("one", "two"):
                    await client.send_leave(stream, "g", name)
            case "close frame":
                await client.close()
            case _:
                reset(client)
                await client.abort()
        await worker.until(lambda: len(given(worker, f"left {stream}")) >= 2)
        leaves = await leaves_before_fence(guarded_broker, worker, stream)
        expected = [told_of(stream, "one", "ann"), told_of(stream, "two", "ann", id="i")]
        assert sorted_by_id(leaves) == expected
        assert given(worker, f"joined {stream}")[:2] == expected
        await client.close()
        assert len(await leaves_before_fence(guarded_broker, worker, stream)) == 2
        await worker.close()

    run(scenario())


KILLED_CLIENT = """\
import json, sys
from websockets.sync.client import connect
with connect(sys.argv[1], proxy=None) as socket:
    names = {"subscriptionId": "one", "streamName": sys.argv[2], "groupId": "g"}
    socket.send(json.dumps({"type": "join", "data": names}))
    print(socket.recv(), flush=True)
    socket.recv()
"""


def test_case_28_leave_of_a_killed_client(guarded_broker: Broker, run: Run) -> None:
    stream = "s28 kill"
    worker = run(presence_worker(guarded_broker, stream))
    url = f"{guarded_broker.stream_url}/?u=bob"
    command = [sys.executable, "-c", KILLED_CLIENT, url, stream]

    async def killed() -> None:
        client = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
        try:
            assert client.stdout is not None
            assert json.loads(await client.stdout.readline())["event"]["type"] == "sync"
        finally:
            client.kill()
            await client.wait()
        await worker.until(lambda: bool(given(worker, f"left {stream}")))
        leaves = await leaves_before_fence(guarded_broker, worker, stream)
        assert leaves == [told_of(stream, "one", "bob")]
        assert given(worker, f"joined {stream}")[:1] == leaves
        await worker.close()

    run(killed())


@pytest.mark.timeout(180)
def test_case_28_leave_of_a_closed_tab(guarded_broker: Broker, run: Run) -> None:
    stream = "s28 tab"
    worker = run(presence_worker(guarded_broker, stream))
    names = {"subscriptionId": "one", "streamName": stream, "groupId": "g"}

    async def opened(page: Program) -> None:
        page.send("socket", url=f"{guarded_broker.stream_url}/?u=eve")
        await asyncio.to_thread(page.wait_for_keys, open="")
        page.send("send", message={"type": "join", "data": names})
        await asyncio.to_thread(page.wait_for, lambda report: "frame" in report)
        assert given(worker, f"left {stream}") == []
        page.send("leave")
        await worker.until(lambda: bool(given(worker, f"left {stream}")), LONG_S)
        leaves = await leaves_before_fence(guarded_broker, worker, stream)
        assert leaves == [told_of(stream, "one", "eve")]
        await worker.close()

    with browser() as page:
        page.wait_for(lambda report: "origin" in report)
        run(opened(page))


def test_case_28_leaves_when_the_broker_stops(run: Run) -> None:
    stream = "s28 stop"

    async def scenario() -> None:
        worker = await presence_worker(broker, stream)
        clients = []
        for number in range(20):
            client = await StreamClient.open(f"{broker.stream_url}/?u=u{number}")
            await client.join(stream, "g", f"{number:02}")
            clients.append(client)
        assert await asyncio.to_thread(broker.stop) == 0
        for client in clients:
            assert (await client.next()).code == 1001
        await worker.next(lambda frame: isinstance(frame, Closed))
        expected = [told_of(stream, f"{number:02}", f"u{number}") for number in range(20)]
        assert sorted_by_id(given(worker, f"left {stream}")) == expected

    with Broker(AUTH) as broker:
        run(scenario())


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize("end", ["close", "abort"])
def test_join_allowed_after_the_client_left(
    end: str, allowed: bool, quick_broker: Broker, run: Run
) -> None:
    """Whoever was let in leaves once, also when nobody was there any more to hear of it."""
    stream = f"ghost {end} {allowed}"

    async def scenario() -> None:
        asked, answer = asyncio.Event(), asyncio.Event()
        let_in: list[Any] = []

        async def slow(call: Invocation) -> Any:
            if call.data["subscription_id"] == "ghost":
                asked.set()
                await answer.wait()
                if not allowed:
                    return {"unauthorized": True}
            let_in.append(call.data)
            return None

        worker = await presence_worker(quick_broker, stream)
        worker.handlers[f"joined {stream}"] = slow
        connections = 'broker_connections{port="stream"}'
        before = metrics(quick_broker.metrics_url)[connections]
        client = await StreamClient.open(quick_broker.stream_url)
        await client.send_join(stream, "g", "ghost")
        await client.send_join(stream, "g", "later")  # whether anybody is asked is left open
        await asked.wait()
        await (client.close() if end == "close" else client.abort())
        await until(lambda: metrics(quick_broker.metrics_url)[connections] <= before)
        answer.set()
        leaves = await leaves_before_fence(quick_broker, worker, stream)
        assert sorted_by_id([*leaves, told_of(stream, "fence", None)]) == sorted_by_id(let_in)
        assert (told_of(stream, "ghost", None) in leaves) == allowed
        await worker.close()

    run(scenario())


def test_same_subscription_id_twice(quick_broker: Broker, run: Run) -> None:
    stream = "twice"

    async def scenario() -> None:
        worker = await presence_worker(quick_broker, stream)
        client = await StreamClient.open(quick_broker.stream_url)
        for name, again in (("one", {}), ("two", {"id": "i"})):
            await client.send_join(stream, "g", name)
            await client.send_join(stream, "g", name, **again)  # replaces it
            await client.next()
            assert (await client.next())["event"]["type"] == "sync"
        await put(worker, stream, "g", "i", VALUE)
        await put(worker, stream, "g", "j", VALUE)
        await settled([client], worker, [(stream, "g")])
        counts = Counter((frame["event"]["type"], frame["id"]) for frame in client.frames)
        assert (counts["create", "i"], counts["create", "j"]) == (1, 1)
        assert len(client.received) == 6
        joined = given(worker, f"joined {stream}")
        assert [data["subscription_id"] for data in joined] == ["one", "one", "two", "two"]
        assert given(worker, f"left {stream}") == []
        await client.close()
        await worker.until(lambda: len(given(worker, f"left {stream}")) >= 2)
        leaves = await leaves_before_fence(quick_broker, worker, stream)
        expected = [told_of(stream, "one", None), told_of(stream, "two", None, id="i")]
        assert sorted_by_id(leaves) == expected
        await worker.close()

    run(scenario())


# Logs ----------------------------------------------------------------------------------------

BREAKS = ["\n", "\r\n", "\r", "\x85", "\u2028", "\x1b[2K\r"]
FORGED = "2026-01-01 ERROR forged"


async def complain(broker: Broker, name: str) -> None:
    """Have errors of every kind that name `name`."""
    async with (
        await Worker.open(broker.worker_url) as worker,
        await StreamClient.open(broker.stream_url) as client,
    ):
        await worker.describe(name)
        config: dict[str, Any] = {"stream_name": name}
        for kind in ("stream", "stream:join", "stream:leave", name):
            for more in ({}, {"condition_function_id": name}):
                trigger_id = f"{name}{kind}{len(more)}"
                await worker.register_trigger(kind, name, config | more, id=trigger_id)
        await worker.register_trigger("stream", name, {name: name}, id=f"bad {name}")
        await worker.register_function(f"http {name}", lambda _: None, invocation={"url": name})
        await worker.send({"type": name})
        await worker.send_text(json.dumps({"type": "invokefunction", "function_id": name})[:-1])
        refused = item(name, name, name, data={"id": name})
        await result_of(worker, "stream::set", refused)
        for function_id, data in (
            (name, refused),
            (f"stream::{name}", refused),
            ("stream::set", refused | {"stream_name": [name]}),
            ("stream::set", refused | {"stream_name": name * 1000}),
            ("engine::triggers::info", {"id": name}),
        ):
            assert "error" in await worker.call(function_id, data)
        refusal = await client.join(name, "g", name)
        assert refusal["event"] == {"type": "unauthorized"}
        for frame in ({"type": name}, {"type": "join", "data": {name: name}}, name):
            await client.send(frame)
            assert (await client.next())["event"]["type"] == "error"
        await client.send_join(name, "g", name * 1000)
        assert (await client.next())["event"]["type"] == "error"
        await client.join("free", name, name)
        await client.quiet()


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_case_47_log_injection(log_format: str, run: Run) -> None:
    args = ["--log-format", log_format, "--log-level", "debug"]
    with Broker(IN_MEMORY, args=args) as broker:
        for line_break in BREAKS:
            run(complain(broker, f"x{line_break}{FORGED}"))
        assert broker.stop() == 0
        log = broker.log_file.read_bytes().decode()
    assert log.count(FORGED) >= 5 * len(BREAKS)  # it is told, in some form
    if log_format == "json":
        lines = log.removesuffix("\n").split("\n")
        parsed = [json.loads(line) for line in lines]
        assert all({"time", "level", "process", "event"} <= line.keys() for line in parsed)
    else:
        for line in log.splitlines():
            assert re.match(r"\d{4}-\d\d-\d\dT[\d:.+]+ [A-Z]+ \S+ \w+( |$)", line), line
        assert "\x1b" not in log
    for line in re.split(r"[\r\n]", log):
        assert not line.startswith(FORGED)
