"""The Redis adapter through the front door: Redis's faults, other writers, strange names."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import redis

from tests.conftest import Run
from tests.support.broker import Broker
from tests.support.calls import item, result_of
from tests.support.connection import PATIENCE_S
from tests.support.redis_server import IS_INSTALLED, RedisServer
from tests.support.stream_client import StreamClient
from tests.support.worker import Worker

pytestmark = pytest.mark.skipif(not IS_INSTALLED, reason="redis-server is not installed")

FAST_S = 8.0
"""Within which a call fails while Redis does not answer: twice the 3 s of one attempt, and room."""


def config(url: str, key_prefix: str = "") -> str:
    prefix = f', key_prefix: "{key_prefix}"' if key_prefix else ""
    return f"""\
workers:
  - name: iii-stream
    config:
      adapter: {{name: redis, config: {{redis_url: "{url}"{prefix}}}}}
"""


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def broker(server: RedisServer) -> Iterator[Broker]:
    with Broker(config(server.url)) as broker:
        yield broker


@pytest.fixture(scope="module")
def common_server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="module")
def common_broker(common_server: RedisServer) -> Iterator[Broker]:
    with Broker(config(common_server.url)) as broker:
        yield broker


async def put(worker: Worker, group: str, item_id: str, data: Any) -> Any:
    return await worker.call("stream::set", item("s", group, item_id, data=data))


def refusal(answer: dict[str, Any], code: str = "STREAM_SET_ERROR") -> str:
    """The message of an answer that must be an error."""
    assert answer.keys() == {"error"}, answer
    assert answer["error"]["code"] == code, answer
    message: str = answer["error"]["message"]
    return message


async def until_served(call: Callable[[], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
    """The first answer without an error."""
    async with asyncio.timeout(PATIENCE_S):
        while "error" in (answer := await call()):
            await asyncio.sleep(0.02)
    return answer


# Away ----------------------------------------------------------------------------------------


def test_not_there_at_start(run: Run) -> None:
    async def main(server: RedisServer, broker: Broker) -> None:
        async with await Worker.open(broker.worker_url) as worker:
            message = refusal(await put(worker, "g", "i", 1))
            assert f"Redis at 127.0.0.1:{server.port} can't be reached" in message
            refusal(await worker.call("stream::list_all", {}), "STREAM_LIST_ALL_ERROR")
            server.start()
            await until_served(lambda: put(worker, "g", "i", 1))
            assert await result_of(worker, "stream::get", item("s", "g", "i")) == 1

    with RedisServer(started=False) as server, Broker(config(server.url)) as broker:
        run(main(server, broker))


def test_restarted(run: Run) -> None:
    """Subscribers stay, and miss nothing that was acknowledged."""

    async def main(server: RedisServer, broker: Broker) -> None:
        async with (
            await Worker.open(broker.worker_url) as worker,
            await StreamClient.open(broker.stream_url) as client,
        ):
            sync = await client.join("s", "g")
            await result_of(worker, "stream::set", item("s", "g", "i", data=1))
            server.stop()
            assert "retry later" in refusal(await put(worker, "g", "i", 2))
            server.start()
            await until_served(lambda: put(worker, "g", "i", 3))
            frames = [await client.next(), await client.next()]
            assert [frame["event"]["data"] for frame in frames] == [1, 3]
            assert [frame["seq"] for frame in frames] == [sync["seq"] + 1, sync["seq"] + 2]
            assert await result_of(worker, "stream::list", item("s", "g", "")) == [3]

    with (
        RedisServer("--appendonly", "yes", "--appendfsync", "always") as server,
        Broker(config(server.url)) as broker,
    ):
        run(main(server, broker))


def test_everything_was_lost(server: RedisServer, broker: Broker, run: Run) -> None:
    """The numbering is another one, and subscribers hear of what is there now."""

    async def main() -> None:
        async with (
            await Worker.open(broker.worker_url) as worker,
            await StreamClient.open(broker.stream_url) as client,
        ):
            sync = await client.join("s", "g")
            for n in range(3):
                await put(worker, "g", str(n), n)
                await client.next()
            server.client.flushall()
            await put(worker, "g", "i", "new")
            frame = await client.next()
            assert frame["event"] == {"type": "sync", "data": ["new"]}
            assert frame["epoch"] != sync["epoch"]
            await put(worker, "g", "j", "more")
            assert (await client.next())["event"] == {"type": "create", "data": "more"}
            assert await result_of(worker, "stream::list_groups", item("s", "", "")) == ["g"]

    run(main())


def test_something_was_lost(server: RedisServer, broker: Broker, run: Run) -> None:
    """As in a failover to a replica that lacked the last write: who saw it is synced, though nobody
    writes, and no number is given twice."""

    async def main() -> None:
        async with (
            await Worker.open(broker.worker_url) as worker,
            await StreamClient.open(broker.stream_url) as client,
        ):
            await client.join("s", "g")
            await put(worker, "g", "i", "kept")
            raw = redis.Redis(port=server.port)
            kept = {key: raw.dump(key) for key in raw.keys("*{*}*") + raw.keys("stream:*")}
            await put(worker, "g", "i", "lost")
            frames = [await client.next(), await client.next()]
            for key, text in kept.items():
                raw.restore(key, 0, text, replace=True)
            raw.client_kill_filter(_type="pubsub")
            raw.close()
            sync = await client.next()
            assert sync["event"] == {"type": "sync", "data": ["kept"]}
            assert sync["seq"] > frames[-1]["seq"]
            await put(worker, "g", "i", "new")
            frame = await client.next()
            assert frame["event"] == {"type": "update", "data": "new"}
            assert frame["seq"] == sync["seq"] + 1
            await client.quiet()
            assert client.waiting == []

    run(main())


def test_paused(server: RedisServer, broker: Broker, run: Run) -> None:
    async def main() -> None:
        async with await Worker.open(broker.worker_url) as worker:
            await result_of(worker, "stream::set", item("s", "g", "i", data=1))
            server.pause()
            start = time.monotonic()
            answers = await asyncio.gather(*(put(worker, f"g{n}", "i", n) for n in range(20)))
            assert all("does not answer" in refusal(answer) for answer in answers)
            assert time.monotonic() - start < FAST_S
            refusal(await worker.call("stream::get", item("s", "g", "i")), "STREAM_GET_ERROR")
            server.resume()
            await until_served(lambda: put(worker, "g", "i", 2))

    try:
        run(main())
    finally:
        server.resume()


def test_wrong_password(run: Run) -> None:
    async def main(server: RedisServer, broker: Broker) -> None:
        async with await Worker.open(broker.worker_url) as worker:
            message = refusal(await put(worker, "g", "i", 1))
            assert "password" in message
            assert "s3cret" not in message + broker.log
            server.client.config_set("requirepass", "s3cret")
            await until_served(lambda: put(worker, "g", "i", 1))

    with RedisServer(password="other") as server:
        url = f"redis://:s3cret@127.0.0.1:{server.port}"
        with Broker(config(url)) as broker:
            run(main(server, broker))


def test_unix_socket(server: RedisServer, run: Run) -> None:
    async def main(broker: Broker) -> None:
        async with await Worker.open(broker.worker_url) as worker:
            await result_of(worker, "stream::set", item("s", "g", "i", data=1))
            assert server.client.hgetall("stream:s:g") == {"i": "1"}

    with Broker(config(f"unix://{server.socket}")) as broker:
        run(main(broker))


# Refusing ------------------------------------------------------------------------------------


def test_out_of_memory(server: RedisServer, broker: Broker, run: Run) -> None:
    async def main() -> None:
        async with (
            await Worker.open(broker.worker_url) as worker,
            await StreamClient.open(broker.stream_url) as client,
        ):
            await client.join("s", "g")
            await result_of(worker, "stream::set", item("s", "g", "i", data="old"))
            await client.next()
            server.client.config_set("maxmemory", 1)
            for function_id, more in (("set", {"data": 1}), ("update", {"ops": []})):
                answer = await worker.call(f"stream::{function_id}", item("s", "g", "i", **more))
                code = f"STREAM_{function_id.upper()}_ERROR"
                assert "out of memory" in refusal(answer, code), answer
            send = {"stream_name": "s", "group_id": "g", "type": "t", "data": 1}
            refusal(await worker.call("stream::send", send), "STREAM_SEND_ERROR")
            assert await result_of(worker, "stream::get", item("s", "g", "i")) == "old"
            async with await StreamClient.open(broker.stream_url) as other:
                assert (await other.join("s", "g"))["event"]["data"] == ["old"]
            await client.quiet()
            assert client.waiting == []
            await result_of(worker, "stream::delete", item("s", "g", "i"))  # makes room
            assert (await client.next())["event"] == {"type": "delete", "data": "old"}
            server.client.config_set("maxmemory", 0)
            await result_of(worker, "stream::set", item("s", "g", "i", data="new"))
            assert (await client.next())["event"] == {"type": "create", "data": "new"}

    run(main())


def test_read_only(server: RedisServer, broker: Broker, run: Run) -> None:
    async def main() -> None:
        async with await Worker.open(broker.worker_url) as worker:
            await result_of(worker, "stream::set", item("s", "g", "i", data=1))
            server.client.replicaof("127.0.0.1", "1")
            assert "read-only" in refusal(await put(worker, "g", "i", 2))
            answer = await worker.call("stream::delete", item("s", "g", "i"))
            assert "read-only" in refusal(answer, "STREAM_DELETE_ERROR")
            assert await result_of(worker, "stream::get", item("s", "g", "i")) == 1
            assert await result_of(worker, "stream::list_groups", item("s", "", "")) == ["g"]
            server.client.replicaof("NO", "ONE")
            await result_of(worker, "stream::set", item("s", "g", "i", data=2))

    run(main())


def test_a_key_of_another_type(common_server: RedisServer, common_broker: Broker, run: Run) -> None:
    async def main() -> None:
        common_server.client.set("stream:wrong:g", "x")
        async with (
            await Worker.open(common_broker.worker_url) as worker,
            await StreamClient.open(common_broker.stream_url) as client,
        ):
            calls = {
                "set": ("STREAM_SET_ERROR", {"data": 1}),
                "update": ("STREAM_UPDATE_ERROR", {"ops": []}),
                "get": ("STREAM_GET_ERROR", {}),
                "delete": ("STREAM_DELETE_ERROR", {}),
                "list": ("STREAM_GET_GROUP_ERROR", {}),
            }
            for name, (code, more) in calls.items():
                answer = await worker.call(f"stream::{name}", item("wrong", "g", "i", **more))
                message = refusal(answer, code)
                assert "stream:wrong:g" in message
                assert "string" in message
            frame = await client.join("wrong", "g")
            assert frame["event"]["type"] == "error"
            assert "stream:wrong:g" in frame["event"]["message"]
            await result_of(worker, "stream::set", item("wrong", "h", "i", data=1))
            assert await result_of(worker, "stream::list_groups", item("wrong", "", "")) == ["h"]

    run(main())


def test_a_field_that_is_no_json(
    common_server: RedisServer, common_broker: Broker, run: Run
) -> None:
    """Whatever meets its value fails and names it; set and delete are done, and mend it."""

    async def main() -> None:
        texts = {"a": "oops", "b": "", "c": "1,2", "d": b'"\xff"', "good": "1"}
        async with (
            await Worker.open(common_broker.worker_url) as worker,
            await StreamClient.open(common_broker.stream_url) as client,
        ):
            for name in "abcd":
                names = item("bad", "g", name)
                common_server.client.delete("stream:bad:g")
                common_server.client.hset("stream:bad:g", mapping={name: texts[name], "good": "1"})
                answer = await worker.call("stream::get", names)
                assert f"'{name}'" in refusal(answer, "STREAM_GET_ERROR")
                answer = await worker.call("stream::list", names)
                assert f"'{name}'" in refusal(answer, "STREAM_GET_GROUP_ERROR")
                answer = await worker.call("stream::update", names | {"ops": []})
                assert f"'{name}'" in refusal(answer, "STREAM_UPDATE_ERROR")
                frame = await client.join("bad", "g", f"group {name}")
                assert frame["event"]["type"] == "error"
                assert f"'{name}'" in frame["event"]["message"]
                assert await result_of(worker, "stream::get", names | {"item_id": "good"}) == 1
                answer = await worker.call("stream::delete", names)
                assert f"'{name}'" in refusal(answer, "STREAM_DELETE_ERROR")
                assert await result_of(worker, "stream::list", names) == [1]
                frame = await client.join("bad", "g", f"item {name}", id=name)
                assert frame["event"] == {"type": "sync", "data": None}
                common_server.client.hset("stream:bad:g", name, texts[name])
                answer = await worker.call("stream::set", names | {"data": 2})
                assert f"'{name}'" in refusal(answer)
                assert (await client.next())["event"] == {"type": "update", "data": 2}
                assert await result_of(worker, "stream::get", names) == 2

    run(main())


# Names, and other writers --------------------------------------------------------------------


def test_names(common_server: RedisServer, common_broker: Broker, run: Run) -> None:
    """Names that would collide, split a cluster's slot or be a pattern are kept apart."""

    async def main() -> None:
        names = ["n:a", "n%3Aa", "n%", "ch?t", "*", "[c]hat", "chat", "\\", "a{b}c", "{x}", "}{"]
        common_server.client.flushall()
        async with await Worker.open(common_broker.worker_url) as worker:
            for n, stream in enumerate(names):
                for group in (*names[n:], ""):
                    payload = item(stream, group, "i", data=[stream, group])
                    await result_of(worker, "stream::set", payload)
            for n, stream in enumerate(names):
                listed = await result_of(worker, "stream::list_groups", item(stream, "", ""))
                assert listed == sorted({*names[n:], ""})
                for group in listed:
                    found = await result_of(worker, "stream::list", item(stream, group, ""))
                    assert found == [[stream, group]]
            whole = await result_of(worker, "stream::list_all", {})
            assert [entry["id"] for entry in whole["stream"]] == sorted(names)
        text = common_server.client.hget("stream:n%3Aa:chat", "i")
        assert json.loads(text) == ["n:a", "chat"]

    run(main())


def test_data_of_the_original(common_server: RedisServer, common_broker: Broker, run: Run) -> None:
    """It is there, in the order in which Redis has it, and is numbered when it is touched."""

    async def main() -> None:
        fields = {f"i{n}": json.dumps({"id": n}) for n in (3, 1, 2)}
        common_server.client.flushall()
        common_server.client.hset("stream:old:g", mapping=fields)
        async with (
            await Worker.open(common_broker.worker_url) as worker,
            await StreamClient.open(common_broker.stream_url) as client,
        ):
            assert await result_of(worker, "stream::list_groups", item("old", "", "")) == ["g"]
            values = [{"id": 3}, {"id": 1}, {"id": 2}]
            assert await result_of(worker, "stream::list", item("old", "g", "")) == values
            sync = await client.join("old", "g")
            assert (sync["seq"], sync["event"]["data"]) == (0, values)
            await result_of(worker, "stream::set", item("old", "g", "i0", data=0))
            await result_of(worker, "stream::set", item("old", "g", "i3", data=3))
            assert [(await client.next())["seq"] for _ in range(2)] == [1, 2]
            common_server.client.hset("stream:old:g", "i9", "9")  # beside the broker
            listed = await result_of(worker, "stream::list", item("old", "g", ""))
            assert listed == [3, {"id": 1}, {"id": 2}, 0, 9]

    run(main())


def test_two_brokers_lose_no_update(server: RedisServer, broker: Broker, run: Run) -> None:
    async def main(other: Broker) -> None:
        calls = 150
        workers = [await Worker.open(b.worker_url) for b in (broker, other) for _ in range(2)]
        increment = [{"type": "increment", "path": "c", "by": 1}]
        payload = item("s", "g", "n", ops=increment)
        answers = await asyncio.gather(
            *(result_of(w, "stream::update", payload) for _ in range(calls) for w in workers)
        )
        total = calls * len(workers)
        assert sorted(a["new_value"]["c"] for a in answers) == list(range(1, total + 1))
        for worker in workers:
            await worker.close()
        assert json.loads(server.client.hget("stream:s:g", "n")) == {"c": total}

    with Broker(config(server.url)) as other:
        run(main(other))


def test_two_brokers_tell_one_order(server: RedisServer, broker: Broker, run: Run) -> None:
    async def main(other: Broker) -> None:
        brokers, calls = (broker, other), 200
        workers = [await Worker.open(one.worker_url) for one in brokers]
        clients = [await StreamClient.open(one.stream_url) for one in brokers]
        for client in clients:
            await client.join("s", "g")
        payload = item("s", "g", "n", ops=[{"type": "increment", "path": "c", "by": 1}])
        await asyncio.gather(
            *(result_of(w, "stream::update", payload) for _ in range(calls) for w in workers)
        )
        everything = list(range(1, calls * len(workers) + 1))
        for client in clients:
            frames = [await client.next() for _ in everything]
            assert [frame["seq"] for frame in frames] == everything
            assert [frame["event"]["data"]["c"] for frame in frames] == everything
        for connection in (*workers, *clients):
            await connection.close()

    with Broker(config(server.url)) as other:
        run(main(other))
