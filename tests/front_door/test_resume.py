"""Whoever says what it saw last gets exactly what it missed, or a sync that says so."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from typing import Any
from urllib.parse import quote

import pytest
import yaml

from tests.conftest import Run
from tests.support.broker import IN_MEMORY, Broker
from tests.support.calls import LONG_S, item, result_of
from tests.support.stream_client import StreamClient
from tests.support.worker import Worker


def with_limits(config: str, **limits: float) -> str:
    return config + yaml.safe_dump({"broker": {"limits": limits}})


async def put(worker: Worker, group: str, item_id: str, data: Any, stream: str = "chat") -> None:
    await result_of(worker, "stream::set", item(stream, group, item_id, data=data))


def is_live(frame: Any, *types: str) -> bool:
    return isinstance(frame, dict) and "event" in frame and frame["event"]["type"] in types


async def resume(client: StreamClient, group: str, since: Any, epoch: Any, **more: Any) -> Any:
    """The first frame of the answer to a join from a position."""
    return await client.join("chat", group, since=since, epoch=epoch, **more)


async def seqs(client: StreamClient, count: int) -> list[int]:
    return [(await client.next())["seq"] for _ in range(count)]


def test_exactly_what_was_missed_then_what_comes(any_broker: Broker, run: Run) -> None:
    async def main() -> None:
        worker = await Worker.open(any_broker.worker_url)
        async with await StreamClient.open(any_broker.stream_url) as client:
            sync = await client.join("chat", "exact")
            assert "resumed" not in sync
        await put(worker, "exact", "a", {"id": "a", "n": 1})
        await put(worker, "exact", "b", {"id": "b"})
        send = {"stream_name": "chat", "group_id": "exact", "type": "typing", "data": {"é": 1}}
        await result_of(worker, "stream::send", send)
        await result_of(worker, "stream::delete", item("chat", "exact", "b"))
        async with await StreamClient.open(any_broker.stream_url) as client:
            first = await resume(client, "exact", sync["seq"], sync["epoch"])
            assert first["resumed"] is True
            assert (first["seq"], first["epoch"]) == (sync["seq"], sync["epoch"])
            assert (first["streamName"], first["groupId"], first["id"]) == ("chat", "exact", None)
            assert first["event"] == {"type": "resume"}
            frames = [await client.next() for _ in range(4)]
            assert [f["seq"] - sync["seq"] for f in frames] == [1, 2, 3, 4]
            assert [(f["id"], f["event"]) for f in frames] == [
                ("a", {"type": "create", "data": {"id": "a", "n": 1}}),
                ("b", {"type": "create", "data": {"id": "b"}}),
                (None, {"type": "event", "event": {"type": "typing", "data": {"é": 1}}}),
                ("b", {"type": "delete", "data": {"id": "b"}}),
            ]
            times = [f["timestamp"] for f in (first, *frames)]
            assert times == sorted(set(times))
            await put(worker, "exact", "a", 2)
            live = await client.next()
            assert (live["seq"], live["event"]["type"]) == (sync["seq"] + 5, "update")
            assert live["timestamp"] > times[-1]
            again = await resume(client, "exact", live["seq"], sync["epoch"])
            assert again["resumed"] is True
            await client.quiet()
            assert client.waiting == []
        await worker.close()

    run(main())


def test_over_the_path_and_for_an_item(any_broker: Broker, run: Run) -> None:
    async def main() -> None:
        worker = await Worker.open(any_broker.worker_url)
        base = f"{any_broker.stream_url}/stream/chat/{quote('by path')}"
        async with await StreamClient.open(f"{base}/") as client:
            sync = await client.next()
        since, epoch = sync["seq"], sync["epoch"]
        for n in range(3):
            await put(worker, "by path", "a", n)
            await put(worker, "by path", "b", n)
        async with await StreamClient.open(f"{base}/?since={since}&epoch={epoch}") as client:
            assert (await client.next())["resumed"] is True
            assert await seqs(client, 6) == list(range(since + 1, since + 7))
        async with await StreamClient.open(f"{base}/b/?x=1&since={since}&epoch={epoch}") as client:
            first = await client.next()
            assert (first["resumed"], first["id"]) == (True, "b")
            assert await seqs(client, 3) == [since + 2, since + 4, since + 6]
        async with await StreamClient.open(f"{base}/?since=x&epoch={epoch}&ids=true") as client:
            sync = await client.next()
            assert sync["resumed"] is False
            assert sync["event"] == {"type": "sync", "data": [2, 2], "ids": ["a", "b"]}
        await worker.close()

    run(main())


@pytest.mark.parametrize(
    "position",
    [
        {"since": 99},
        {"since": 1},
        {"since": 1, "epoch": None},
        {"since": 1, "epoch": ""},
        {"since": 1, "epoch": "x" * 10_000},
        {"since": -1},
        {"since": 2**64},
        {"since": 10**300},
        {"since": "1"},
        {"since": 1.5},
        {"since": True},
        {"since": {}},
        {"since": 1, "epoch": 5},
        {"since": 1, "epoch": ["x"]},
    ],
)
def test_nonsense_is_answered_at_once(position: Any, memory_broker: Broker, run: Run) -> None:
    async def main() -> None:
        worker = await Worker.open(memory_broker.worker_url)
        async with await StreamClient.open(memory_broker.stream_url) as client:
            epoch = (await client.join("chat", "odd"))["epoch"]
            await put(worker, "odd", "a", 1)
            await client.next()
            given = {"epoch": epoch} if position["since"] not in (1,) else {}
            answer = await client.join("chat", "odd", "s2", **{**given, **position})
            if answer["event"]["type"] == "sync":
                assert (answer["resumed"], answer["event"]["data"]) == (False, [1])
            else:
                assert answer["event"]["type"] == "error"
                assert answer["event"]["field"] in ("data.since", "data.epoch")
            assert (await client.join("chat", "odd", "s3"))["event"]["type"] == "sync"
        await worker.close()

    run(main())


def test_case_04_reconnect_duplicate(any_broker: Broker, run: Run) -> None:
    """Under a steady stream of writes, resumed again and again: each seq once."""

    async def main() -> None:
        worker = await Worker.open(any_broker.worker_url)
        written = 0
        stop = asyncio.Event()

        async def write() -> None:
            nonlocal written
            while not stop.is_set():
                await asyncio.gather(*(put(worker, "steady", f"i{n}", n) for n in range(10)))
                written += 10

        async with await StreamClient.open(any_broker.stream_url) as client:
            sync = await client.join("chat", "steady")
        since, epoch = sync["seq"], sync["epoch"]
        seen: list[int] = []
        writer = asyncio.create_task(write())
        for _ in range(30):
            client = await StreamClient.open(any_broker.stream_url)
            first = await resume(client, "steady", since, epoch)
            assert first["resumed"] is True
            seen += await seqs(client, 20)
            since = seen[-1]
            await client.abort()
        stop.set()
        await writer
        async with await StreamClient.open(any_broker.stream_url) as client:
            assert (await resume(client, "steady", since, epoch))["resumed"] is True
            seen += await seqs(client, sync["seq"] + written - since)
            await client.quiet()
            assert client.waiting == []
        assert seen == list(range(sync["seq"] + 1, sync["seq"] + written + 1))
        await worker.close()

    run(main())


def test_case_05_resume_epoch(run: Run) -> None:
    async def main(broker: Broker) -> None:
        worker = await Worker.open(broker.worker_url)
        for n in range(5):
            await put(worker, "r", "a", n)
        async with await StreamClient.open(broker.stream_url) as client:
            sync = await client.join("chat", "r")
        assert sync["seq"] == 5
        await worker.close()
        assert broker.stop() == 0
        shutil.rmtree(broker.data_dir)
        broker.start()
        worker = await Worker.open(broker.worker_url)
        for n in range(7):
            await put(worker, "r", f"n{n}", n)
        async with await StreamClient.open(broker.stream_url) as client:
            answer = await resume(client, "r", 5, sync["epoch"])
            assert answer["resumed"] is False
            assert answer["epoch"] != sync["epoch"]
            assert answer["event"] == {"type": "sync", "data": list(range(7))}
        await worker.close()

    with Broker() as broker:
        run(main(broker))


def test_it_survives_the_death_of_every_process(run: Run) -> None:
    async def main(broker: Broker) -> None:
        worker = await Worker.open(broker.worker_url)
        async with await StreamClient.open(broker.stream_url) as client:
            sync = await client.join("chat", "durable")
        for n in range(10):
            await put(worker, "durable", "a", n)
        send = {"stream_name": "chat", "group_id": "durable", "type": "t", "data": 1}
        await result_of(worker, "stream::send", send)
        broker.kill()
        broker.start()
        await worker.close()
        worker = await Worker.open(broker.worker_url)
        await put(worker, "durable", "a", 10)
        async with await StreamClient.open(broker.stream_url) as client:
            assert (await resume(client, "durable", 0, sync["epoch"]))["resumed"] is True
            assert await seqs(client, 12) == list(range(1, 13))
        await worker.close()

    with Broker() as broker:
        run(main(broker))


def test_a_shard_that_is_away_when_the_client_comes(run: Run) -> None:
    """It is told so, and gets what it missed once the shard is back."""

    async def main(broker: Broker) -> None:
        worker = await Worker.open(broker.worker_url)
        async with await StreamClient.open(broker.stream_url) as client:
            sync = await client.join("chat", "away")
        for n in range(3):
            await put(worker, "away", "a", n)
        client = await StreamClient.open(broker.stream_url)
        for name in ("shard-0", "shard-1"):
            os.kill(broker.children()[name], signal.SIGKILL)
        await client.send_join("chat", "away", since=sync["seq"], epoch=sync["epoch"])
        frame = await client.next(lambda f: f["event"]["type"] != "error", patience_s=LONG_S)
        assert frame["resumed"] is True
        missed = [await client.next(lambda f: "seq" in f) for _ in range(3)]
        assert [frame["seq"] for frame in missed] == [1, 2, 3]
        await client.close()
        await worker.close()

    with Broker() as broker:
        run(main(broker))


def test_no_more_than_is_kept(run: Run) -> None:
    async def main(broker: Broker) -> None:
        worker = await Worker.open(broker.worker_url)
        async with await StreamClient.open(broker.stream_url) as client:
            epoch = (await client.join("chat", "few"))["epoch"]
            for n in range(12):
                await put(worker, "few", "a", n)
            kept = await resume(client, "few", 2, epoch, subscriptionId="x")
        async with await StreamClient.open(broker.stream_url) as client:
            kept = await resume(client, "few", 2, epoch)
            assert kept["resumed"] is True
            assert await seqs(client, 10) == list(range(3, 13))
        async with await StreamClient.open(broker.stream_url) as client:
            assert (await resume(client, "few", 1, epoch))["resumed"] is False
        await worker.close()

    for config in (IN_MEMORY, "{}\n"):
        with Broker(with_limits(config.replace("{}\n", ""), history_events_max=10)) as broker:
            run(main(broker))


def test_history(any_broker: Broker, run: Run) -> None:
    async def main() -> None:
        worker = await Worker.open(any_broker.worker_url)
        group = {"stream_name": "chat", "group_id": "past"}
        empty = await result_of(worker, "stream::history", group)
        assert (empty["seq"], empty["complete"], empty["events"]) == (0, True, [])
        async with await StreamClient.open(any_broker.stream_url) as client:
            sync = await client.join("chat", "past")
            for n in range(5):
                await put(worker, "past", "a", {"n": n})
            live = [await client.next() for _ in range(5)]
        found = await result_of(worker, "stream::history", group)
        assert found == {"epoch": sync["epoch"], "seq": 5, "complete": True, "events": live}
        page = await result_of(worker, "stream::history", group | {"since": 1, "limit": 2})
        assert page == found | {"events": live[1:3]}
        for bad in ({"since": -1}, {"since": "x"}, {"limit": 0}, {"limit": 1001}):
            answer = await worker.call("stream::history", group | bad)
            assert answer["error"]["code"] == "deserialization_error"
            assert next(iter(bad)) in answer["error"]["message"]
        await worker.close()

    run(main())


def test_many_groups_in_one_message(memory_broker: Broker, run: Run) -> None:
    """Each is answered as if it had come alone, in order; one that is refused harms no other."""

    async def main() -> None:
        worker = await Worker.open(memory_broker.worker_url)
        await put(worker, "m-2", "a", 1)

        def one(subscription_id: str, group: str, **more: Any) -> dict[str, Any]:
            return {
                "subscriptionId": subscription_id,
                "streamName": "chat",
                "groupId": group,
            } | more

        async with await StreamClient.open(memory_broker.stream_url) as client:
            groups = [
                one("1", "m-1"),
                one("2", "m-2", ids=True),
                one("3", "x" * 2000),
                one("4", "m-2", id="a"),
                one("5", "m-2", since=1, epoch="none"),
            ]
            await client.send({"type": "join", "data": {"groups": groups}})
            await client.send_join("chat", "m-1", "6")
            frames = [await client.next() for _ in range(6)]
            assert [f["event"]["type"] for f in frames] == ["sync", "sync", "error"] + ["sync"] * 3
            assert frames[1]["event"] == {"type": "sync", "data": [1], "ids": ["a"]}
            assert frames[2]["event"]["subscriptionId"] == "3"
            assert (frames[3]["id"], frames[3]["event"]["data"]) == ("a", 1)
            assert frames[4]["resumed"] is False
            await put(worker, "m-2", "a", 2)
            assert is_live(await client.next(), "update")
            await client.quiet()
            assert client.waiting == []
            for bad in ({"groups": []}, {"groups": "x"}, {"groups": [one("1", "g"), {}]}):
                await client.send({"type": "join", "data": bad})
                assert (await client.next())["event"]["type"] == "error"
            many = [one(f"n{n}", f"many-{n}") for n in range(500)]
            await client.send({"type": "join", "data": {"groups": many}})
            names = [(await client.next())["groupId"] for _ in range(500)]
            assert names == [f"many-{n}" for n in range(500)]
        await worker.close()

    run(main())


def test_a_shard_that_dies_costs_subscribers_nothing(run: Run) -> None:
    """What was committed and not told is told when it is back, custom events too; no sync."""

    async def main(broker: Broker) -> None:
        worker = await Worker.open(broker.worker_url)
        groups = [f"g{n}" for n in range(6)]  # on both shards
        client = await StreamClient.open(broker.stream_url)
        for group in groups:
            await client.join("chat", group, group)
        item_client = await StreamClient.open(broker.stream_url)
        await item_client.join("chat", "g0", id="a")
        for _ in range(3):
            calls = []
            for n in range(40):
                for group in groups:
                    send = {"stream_name": "chat", "group_id": group, "type": "t", "data": n}
                    calls.append(worker.call("stream::send", send, LONG_S))
                    put_it = item("chat", group, "a", data=n)
                    calls.append(worker.call("stream::set", put_it, LONG_S))
            answers = asyncio.gather(*calls)
            await asyncio.sleep(0.01)
            for shard in ("shard-0", "shard-1"):
                os.kill(broker.children()[shard], signal.SIGKILL)
            await answers
            while "error" in await worker.call("stream::get", item("chat", "g0", "a"), LONG_S):
                await asyncio.sleep(0.05)
            while "error" in await worker.call("stream::list_all", {}, LONG_S):
                await asyncio.sleep(0.05)
        heads = {}
        for group in groups:
            past = await result_of(
                worker, "stream::history", {"stream_name": "chat", "group_id": group}
            )
            heads[group] = past["seq"]
        for group in groups:
            got: list[int] = []
            while not got or got[-1] < heads[group]:
                frame = await client.next(lambda f, g=group: f["groupId"] == g)
                assert frame["event"]["type"] != "sync", frame
                got.append(frame["seq"])
            assert got == list(range(1, heads[group] + 1))
        await item_client.quiet()
        assert all(f["event"]["type"] != "sync" for f in item_client.waiting)
        item_seqs = [f["seq"] for f in item_client.waiting]
        past = await result_of(
            worker, "stream::history", {"stream_name": "chat", "group_id": "g0", "limit": 1000}
        )
        assert item_seqs == [e["seq"] for e in past["events"] if e["id"] == "a"]
        await client.close()
        await item_client.close()
        await worker.close()

    with Broker() as broker:
        run(main(broker))
