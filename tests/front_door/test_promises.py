"""What the broker promises on order, snapshots, durability and crashes, through the front door."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import uuid
from itertools import pairwise, product
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode

from broker.names import Group
from broker.routing import shard_of
from tests.conftest import Run
from tests.support.broker import Broker
from tests.support.calls import LONG_S, item, result_of
from tests.support.connection import Closed
from tests.support.stream_client import UPGRADE, RawHttp, StreamClient, settled
from tests.support.worker import Worker


async def list_of(worker: Worker, stream: str, group: str) -> Any:
    """The values of a group."""
    return await result_of(worker, "stream::list", {"stream_name": stream, "group_id": group})


def is_sync(frame: Any) -> bool:
    return isinstance(frame, dict) and "event" in frame and frame["event"]["type"] == "sync"


# Order ---------------------------------------------------------------------------------------


def state_after(frames: list[dict[str, Any]]) -> list[Any]:
    """The group's values, in order, as the frames of one group subscription tell of them."""
    items: dict[str, Any] = {}
    for frame in frames:
        event = frame["event"]
        match event["type"]:
            case "sync":
                items = {value["id"]: value for value in event["data"]}
            case "create":
                assert frame["id"] not in items
                items[frame["id"]] = event["data"]
            case "update":
                assert frame["id"] in items
                items[frame["id"]] = event["data"]
            case "delete":
                assert items.pop(frame["id"]) == event["data"]
    return list(items.values())


async def write_all_kinds(worker: Worker, group: str, name: str, count: int) -> None:
    """Sets, updates, deletes and custom events of items `name`N of stream `p`, 10 in flight."""
    for first in range(0, count, 10):
        calls = []
        for n in range(first, first + 10):
            of_item = item("p", group, f"{name}{n % 7}")
            data = {"id": of_item["item_id"], "n": n}
            match n % 5:
                case 0:
                    send = {"stream_name": "p", "group_id": group, "type": "t", "data": n}
                    calls.append(result_of(worker, "stream::send", send))
                case 1:
                    calls.append(result_of(worker, "stream::delete", of_item))
                case 2:
                    ops = [{"type": "set", "path": "", "value": data}]
                    calls.append(result_of(worker, "stream::update", of_item | {"ops": ops}))
                case _:
                    calls.append(result_of(worker, "stream::set", of_item | {"data": data}))
        await asyncio.gather(*calls)


@pytest.mark.timeout(180)
def test_snapshot_then_stream_in_one_order(any_broker: Broker, run: Run) -> None:
    """Promises 3, 4, 5 and 13: clients join, each twice, while 4 workers write."""

    async def scenario() -> None:
        workers = [await Worker.open(any_broker.worker_url) for _ in range(4)]
        clients: list[StreamClient] = []
        writing = [
            asyncio.create_task(write_all_kinds(worker, "g", name, 400))
            for worker, name in zip(workers, "abcd", strict=True)
        ]
        while not all(task.done() for task in writing):
            client = await StreamClient.open(any_broker.stream_url)
            clients.append(client)
            await client.join("p", "g", "one")
            await client.send_join("p", "g", "two")  # no event may come twice for it
            await client.next(is_sync)
        await asyncio.gather(*writing)
        assert len(clients) >= 2
        await settled(clients, workers[0], [("p", "g")])
        stored = await list_of(workers[0], "p", "g")
        last_seq = clients[0].frames[-1]["seq"]
        event_of_seq: dict[int, Any] = {}
        syncs: list[tuple[int, int]] = []
        for client in clients:
            first, *events = client.frames
            (second,) = filter(is_sync, events)
            at = events.index(second)
            del events[at]
            assert is_sync(first)
            numbers = [frame["seq"] for frame in events]
            assert numbers == list(range(first["seq"] + 1, last_seq + 1))
            assert second["seq"] == (events[at - 1]["seq"] if at else first["seq"])
            assert all(a["timestamp"] < b["timestamp"] for a, b in pairwise(client.frames))
            assert state_after([first, *events]) == stored
            assert state_after([second, *events[at:]]) == stored
            for frame in events:  # everybody gets the same
                assert event_of_seq.setdefault(frame["seq"], frame) == frame
            syncs += [(sync["timestamp"], sync["seq"]) for sync in (first, second)]
        stamps = [(frame["timestamp"], seq) for seq, frame in event_of_seq.items()] + syncs
        assert len({timestamp for timestamp, _ in stamps}) == len(stamps)
        assert all(a <= b for (_, a), (_, b) in pairwise(sorted(stamps)))
        for peer in (*workers, *clients):
            await peer.close()

    run(scenario())


def test_every_one_of_many_syncs_is_whole(any_broker: Broker, run: Run) -> None:
    """Also where many hold the same, and where what they hold changes between them."""

    async def main() -> None:
        worker = await Worker.open(any_broker.worker_url)
        group = ("alike", uuid.uuid4().hex)
        held = {f"i{n}": f"{n}" * 300 for n in range(10)}
        for item_id, data in held.items():
            await result_of(worker, "stream::set", item(*group, item_id, data=data))
        clients = [await StreamClient.open(any_broker.stream_url) for _ in range(8)]
        for turn in range(6):
            syncs = await asyncio.gather(
                *(c.join(*group, f"s{turn}", ids=n % 2 == 0) for n, c in enumerate(clients))
            )
            for number, sync in enumerate(syncs):
                assert sync["event"]["data"] == list(held.values())
                assert sync["event"].get("ids") == (None if number % 2 else list(held))
            for client in clients:
                await client.send_leave(*group, f"s{turn}")
                await client.ping()
            if turn % 2:
                held["i3"] = f"{turn}" * 300
                await result_of(worker, "stream::set", item(*group, "i3", data=held["i3"]))
        for client in clients:
            await client.close()
        await worker.close()

    run(main())


def test_joining_again_with_the_same_id_misses_nothing(any_broker: Broker, run: Run) -> None:
    """Promise 3: whoever is subscribed all the time gets every event."""

    async def scenario() -> None:
        async with (
            await Worker.open(any_broker.worker_url) as worker,
            await StreamClient.open(any_broker.stream_url) as client,
        ):
            await client.join("rejoin", "g", "s")
            send = {"stream_name": "rejoin", "group_id": "g", "type": "t"}
            for n in range(2000):
                await worker.void("stream::send", send | {"data": n})
                if n % 100 == 50:
                    await client.send_join("rejoin", "g", "s")
            await settled([client], worker, [("rejoin", "g")])
            events = [frame for frame in client.frames if not is_sync(frame)]
            assert len(client.frames) - len(events) == 21
            assert [frame["seq"] for frame in events] == list(range(1, 2001))

    run(scenario())


def test_calls_of_one_connection_take_effect_in_order(any_broker: Broker, run: Run) -> None:
    """Promise 3: also when nobody waits for the answers."""

    async def scenario() -> None:
        async with await Worker.open(any_broker.worker_url) as worker:
            of_item = item("o", "g", "i")
            ops = [{"type": "increment", "path": "", "by": 1000}]
            gets = []
            for n in range(200):
                await worker.void("stream::set", of_item | {"data": n})
                gets.append(asyncio.create_task(worker.call("stream::get", of_item)))
                await asyncio.sleep(0)  # the call is sent
                await worker.void("stream::update", of_item | {"ops": ops})
                gets.append(asyncio.create_task(worker.call("stream::get", of_item)))
                await asyncio.sleep(0)
                await worker.void("stream::delete", of_item)
                gets.append(asyncio.create_task(list_of(worker, "o", "g")))
                await asyncio.sleep(0)
            answers = await asyncio.gather(*gets)
            expected = [({"result": n}, {"result": n + 1000}, []) for n in range(200)]
            assert [tuple(answers[i : i + 3]) for i in range(0, len(answers), 3)] == expected

    run(scenario())


# Crashes -------------------------------------------------------------------------------------


class Writing:
    """What one worker wrote: per item, numbers that count up, acknowledged and sent."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.acknowledged: dict[tuple[str, str], int] = {}
        self.sent: dict[tuple[str, str], int] = {}
        self.deleted: set[tuple[str, str]] = set()

    async def write(self, worker: Worker) -> None:
        """Write until the connection ends."""
        try:
            await asyncio.gather(*(self._write(worker, f"{self.name}{k}") for k in range(8)))
        except (ConnectionClosed, asyncio.CancelledError):
            return

    async def _write(self, worker: Worker, item_id: str) -> None:
        number = 0
        while True:
            group = f"g{number % 4}"
            number += 1
            self.sent[group, item_id] = number
            data = item("k", group, item_id, data={"id": item_id, "n": number})
            answer = await worker.call("stream::set", data, LONG_S)
            if "error" in answer:  # it was killed
                return
            self.acknowledged[group, item_id] = number
            name = f"{item_id}-{number}"
            once = item("k", group, name, data={"id": name, "n": 0})
            if number % 10 == 0 and "result" in await worker.call("stream::set", once, LONG_S):
                names = item("k", group, once["item_id"])
                if "result" in await worker.call("stream::delete", names, LONG_S):
                    self.deleted.add((group, once["item_id"]))


@pytest.mark.timeout(180)
def test_kill_of_all_loses_nothing_acknowledged(run: Run) -> None:
    """Promises 1, 2 and 5, twice on the same data."""
    rng = random.Random()  # every moment is as good as another

    async def write_until_killed() -> tuple[list[Writing], StreamClient]:
        client = await StreamClient.open(broker.stream_url)
        for group in range(4):
            await client.send_join("k", f"g{group}", str(group))
        workers = [await Worker.open(broker.worker_url) for _ in range(4)]
        writings = [Writing(name) for name in "abcd"]
        tasks = [
            asyncio.create_task(writing.write(worker))
            for writing, worker in zip(writings, workers, strict=True)
        ]
        await asyncio.sleep(rng.uniform(0.3, 1.5))
        await asyncio.to_thread(broker.kill)
        await client.next(lambda frame: isinstance(frame, Closed))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks)
        return writings, client

    async def compare(writings: list[Writing], client: StreamClient) -> None:
        assert sum(len(writing.acknowledged) for writing in writings) > 0
        async with (
            await Worker.open(broker.worker_url) as worker,
            await StreamClient.open(broker.stream_url) as again,
        ):
            for writing in writings:
                for (group, item_id), number in writing.acknowledged.items():
                    stored = await result_of(worker, "stream::get", item("k", group, item_id))
                    assert number <= stored["n"] <= writing.sent[group, item_id]
                for group, item_id in writing.deleted:
                    gone = await result_of(worker, "stream::get", item("k", group, item_id))
                    assert gone is None
            for number in range(4):
                group = f"g{number}"
                sync = await again.join("k", group, group)
                seen = [frame for frame in client.frames if frame["groupId"] == group]
                assert sync["event"]["data"] == await list_of(worker, "k", group)
                # what was seen was durable: the numbering and the clock go on after it
                assert sync["seq"] >= seen[-1]["seq"]
                assert sync["timestamp"] > seen[-1]["timestamp"]
                values = {value["id"]: value["n"] for value in sync["event"]["data"]}
                for frame in seen:
                    if frame["event"]["type"] in ("create", "update") and "-" not in frame["id"]:
                        assert values[frame["id"]] >= frame["event"]["data"]["n"]

    with Broker() as broker:
        for _ in range(2):
            outcome = run(write_until_killed())
            broker.start()
            run(compare(*outcome))


def groups_of_shards(stream: str, shards: int) -> list[str]:
    """The name of a group on each shard."""
    names = [f"g{n}" for n in range(100)]
    return [
        next(n for n in names if shard_of(Group(stream, n), shards) == k) for k in range(shards)
    ]


@pytest.mark.timeout(180)
def test_kill_of_one_shard_stays_small(run: Run) -> None:
    """Promise 10."""
    doomed, other = groups_of_shards("c", 2)

    async def scenario() -> None:
        pids = broker.children()
        worker = await Worker.open(broker.worker_url)
        client = await StreamClient.open(broker.stream_url)
        await worker.register_function("fired", lambda _: None)
        await worker.register_trigger("stream", "fired", {"stream_name": "c"})
        await client.join("c", doomed, "doomed")
        await client.join("c", other, "other")
        for group in (doomed, other):
            data = {"id": "i", "n": 0}
            await result_of(worker, "stream::set", item("c", group, "i", data=data))
        await worker.asked(2)

        os.kill(pids["shard-0"], signal.SIGSTOP)  # so that calls are in flight for certain
        calls = [
            asyncio.create_task(
                worker.call("stream::set", item("c", doomed, "i", data={"id": "i", "n": n}), LONG_S)
            )
            for n in range(1, 21)
        ]
        await asyncio.sleep(0)
        await worker.barrier()
        data = {"id": "i", "n": 1}
        await result_of(worker, "stream::set", item("c", other, "i", data=data))  # goes on
        assert not any(call.done() for call in calls)
        os.kill(pids["shard-0"], signal.SIGKILL)
        for answer in await asyncio.gather(*calls):
            assert answer["error"]["code"] == "shard_unavailable", answer
        await result_of(worker, "stream::set", item("c", other, "i", data=data))

        of_item = item("c", doomed, "i", data={"id": "i", "n": 100})
        async with asyncio.timeout(LONG_S):
            while "error" in (answer := await worker.call("stream::set", of_item)):
                assert answer["error"]["code"] == "shard_unavailable", answer
                await asyncio.sleep(0.02)
        assert answer["result"]["old_value"] == {"id": "i", "n": 0}  # the killed calls never ran
        await settled([client], worker, [("c", doomed), ("c", other)])

        assert not any(isinstance(frame, Closed) for frame in client.received)
        told = [
            f for f in client.frames if f["groupId"] == doomed and f["event"]["type"] != "error"
        ]
        assert [is_sync(frame) for frame in told] == [True, False, False]  # it went on where it was
        assert state_after(told) == [{"id": "i", "n": 100}]
        assert [frame["seq"] for frame in told] == [0, 1, 2]
        assert all(a["timestamp"] < b["timestamp"] for a, b in pairwise(told))
        undisturbed = [frame for frame in client.frames if frame["groupId"] == other]
        assert [frame["seq"] for frame in undisturbed] == [0, 1, 2, 3]

        fired = [i.data["groupId"] for i in await worker.asked(3)]
        assert sorted(fired) == sorted([doomed, other, other])
        now = broker.children()
        assert now["shard-0"] != pids["shard-0"]
        assert now | {"shard-0": 0} == pids | {"shard-0": 0}
        await client.close()
        await worker.close()

    with Broker() as broker:
        run(scenario())


# Bad input -----------------------------------------------------------------------------------

UNDECODABLE = {
    "not a number": "NaN",
    "infinity": "-Infinity",
    "lone surrogate": '"\\ud800"',
    "lone surrogate as a key": '{"\\udc00":1}',
    "too deep": "[" * 2000 + "]" * 2000,
}


@pytest.mark.parametrize("value", UNDECODABLE.values(), ids=UNDECODABLE.keys())
@pytest.mark.parametrize("order", ["type first", "type last"])
def test_undecodable_calls_are_answered(
    value: str, order: str, memory_broker: Broker, run: Run
) -> None:
    """Promise 11: the caller learns of it, nobody else does."""
    call_id = str(uuid.uuid4())
    fields = [
        '"type":"invokefunction"',
        f'"invocation_id":"{call_id}"',
        '"function_id":"stream::set"',
        f'"data":{{"stream_name":"bad","group_id":"g","item_id":"i","data":{value}}}',
    ]
    text = "{" + ",".join(fields if order == "type first" else reversed(fields)) + "}"

    async def scenario() -> None:
        async with (
            await Worker.open(memory_broker.worker_url) as worker,
            await StreamClient.open(memory_broker.stream_url) as client,
        ):
            await client.join("bad", "g")
            await worker.send_text(text)
            answer = await worker.next(lambda frame: frame.get("invocation_id") == call_id)
            assert answer["error"]["code"] == "invalid_message", answer
            assert answer["error"]["message"]
            assert await list_of(worker, "bad", "g") == []
            await settled([client], worker, [("bad", "g")])
            assert len(client.received) == 1

    run(scenario())


def test_bad_text_of_a_client_stays_with_it(memory_broker: Broker, run: Run) -> None:
    """Promise 11, on the stream port."""

    async def scenario() -> None:
        pids = memory_broker.children()
        async with (
            await StreamClient.open(memory_broker.stream_url) as other,
            await StreamClient.open(memory_broker.stream_url) as client,
        ):
            await other.join("bad", "g")
            join = {"subscriptionId": "s", "streamName": "NAME", "groupId": "g"}
            text = json.dumps({"type": "join", "data": join})
            await client.send_text(text.replace("NAME", "\\ud800"))
            assert (await client.next())["event"]["type"] == "error"
            assert (await client.join("bad", "g"))["event"]["type"] == "sync"
            async with await RawHttp.request(memory_broker.stream_url, UPGRADE) as raw:
                assert (await raw.response()).status == 101
                frame = Frame(Opcode.TEXT, text.encode().replace(b"NAME", b"\xff\xfe"))
                raw.writer.write(frame.serialize(mask=True))
                with contextlib.suppress(asyncio.IncompleteReadError):  # closed: right too
                    assert (await raw.frame())["event"]["type"] == "error"
            await other.quiet()
            assert len(other.received) == 1
        assert memory_broker.children() == pids

    run(scenario())


# Names ---------------------------------------------------------------------------------------


def test_names_never_collide(any_broker: Broker, run: Run) -> None:
    """Promise 14: names that become equal when they are joined, cut, folded or normalized."""
    names = ["", "a", "A", "a:", ":a", "a/", "a\0", "\0", "a%3A", "\u00e9", "e\u0301", " a", "a "]
    keys = list(product(names, names, ["", "a", ":", "\u00e9", "e\u0301"]))

    async def scenario() -> None:
        async with await Worker.open(any_broker.worker_url) as worker:
            sets = (
                result_of(worker, "stream::set", item(f"n{s}", g, i, data=[s, g, i]))
                for s, g, i in keys
            )
            for answer in await asyncio.gather(*sets):
                assert answer["old_value"] is None
            gets = (result_of(worker, "stream::get", item(f"n{s}", g, i)) for s, g, i in keys)
            assert await asyncio.gather(*gets) == [list(key) for key in keys]
            for name in names:
                stream = {"stream_name": f"n{name}"}
                groups = await result_of(worker, "stream::list_groups", stream)
                assert groups == sorted(names)
            listed = await result_of(worker, "stream::list_all", {})
            expected = [{"id": f"n{name}", "groups": sorted(names)} for name in sorted(names)]
            assert [entry for entry in listed["stream"] if entry["id"][:1] == "n"] == expected

    run(scenario())
