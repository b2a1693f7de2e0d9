"""What the Redis storage asks of Redis, and how it lies there."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from broker import messages
from broker.clock import wall_clock_ms
from broker.errors import ConfigError
from shards.group import Past
from shards.storage.redis import SCAN_COUNT, SCAN_STEPS_FREE, RedisStorage
from tests.storage.test_redis_changes import LIMITS
from tests.storage.test_storages import (
    INCREMENT,
    asynchronous,
    delete,
    get,
    join,
    listing,
    perform,
    put,
    send,
    settle,
    update,
)
from tests.support.redis_server import RedisServer

RESPONSE_BYTES_MAX = 100_000


@asynccontextmanager
async def storage_on(server: RedisServer, **more: Any) -> AsyncIterator[RedisStorage]:
    url = more.pop("url", server.url)
    storage = RedisStorage(url, wall_clock_ms, RESPONSE_BYTES_MAX, LIMITS, **more)
    await storage.open()
    try:
        yield storage
    finally:
        await storage.close()


@asynchronous
async def test_round_trips(redis_server: RedisServer) -> None:
    """One for a batch, whatever is in it; one more for what updates start from."""
    async with storage_on(redis_server) as storage:
        await perform(storage, put("i", 1))
        plain = [put("i", 1), send(1), delete("j"), get("i"), listing(), join(), put("i", 1, "h")]
        for operations, expected in (
            ([put("i", 2)], 1),
            ([put("i", 2, "new")], 1),
            ([*plain, *[put(str(n), n) for n in range(200)]], 1),
            ([update("i", INCREMENT)], 2),
            ([*plain, *[update("i", INCREMENT)] * 10, put("i", 1), update("i", INCREMENT)], 2),
        ):
            before = storage.round_trips_total
            await settle(storage, "s", *operations)
            assert storage.round_trips_total - before == expected


@asynchronous
async def test_keys(redis_server: RedisServer) -> None:
    """Items are a plain hash; the rest has another prefix, and ends with the group."""
    client = redis_server.client
    async with storage_on(redis_server) as storage:
        await perform(storage, put("i", {"a": [1.0]}), put("j", None))
        assert client.keys("stream:*") == ["stream:s:g"]
        assert client.hgetall("stream:s:g") == {"i": '{"a": [1.0]}', "j": "null"}
        assert client.ttl("stream:s:g") == -1
        (head,) = client.keys("broker:*:head:*")
        (order,) = client.keys("broker:*:order:*")
        (history,) = client.keys("broker:*:history:*")
        assert client.ttl(head) == -1
        assert client.zrange(order, 0, -1) == ["i", "j"]
        assert [json.loads(one)["seq"] for one in client.lrange(history, 0, -1)] == [1, 2]
        await perform(storage, delete("i"), delete("j"))
        assert client.keys("stream:*") == []
        assert client.exists(order) == 0
        assert client.ttl(head) > 0
        assert client.ttl(history) > 0
        await perform(storage, put("i", 1))
        assert client.ttl(head) == -1


@pytest.mark.parametrize("prefix", ["", "team:chat:"])
@asynchronous
async def test_a_cluster_keeps_each_group_in_one_slot(prefix: str) -> None:
    with RedisServer("--cluster-enabled", "yes") as server:
        server.client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        while "cluster_state:ok" not in str(server.client.execute_command("CLUSTER", "INFO")):
            pass
        url = server.url.replace("redis", "redis+cluster")
        async with storage_on(server, url=url, key_prefix=prefix) as storage:
            for stream in ("a{b}c", "{x}", "}{", "", "{", "s"):
                for group in ("g", "{y}", "}", ""):
                    found = await perform(
                        storage,
                        put("i", 1, group),
                        update("i", INCREMENT, group=group),
                        delete("i", group),
                        put("j", 1, group),
                        listing(group),
                        stream=stream,
                    )
                    assert found[-1] == [1], (stream, group, found)
                assert sorted(await storage.groups(stream)) == ["", "g", "{y}", "}"]


@asynchronous
async def test_groups_of_others_are_found_among_many_keys(redis_server: RedisServer) -> None:
    pipeline = redis_server.client.pipeline(transaction=False)
    count = SCAN_COUNT * (SCAN_STEPS_FREE + 2)
    for n in range(count):
        pipeline.hset(f"stream:s{n % 3}:g{n}", "i", "1")
    pipeline.set("stream:s0:text", "x")
    pipeline.hset("stream:a:b:c", "i", "1")
    pipeline.execute()
    found: list[str] = []
    for shard in range(2):
        async with storage_on(redis_server, shard=shard, shards=2) as storage:
            assert sorted(await storage.streams()) == ["s0", "s1", "s2"]
            mine = await storage.groups("s1")
        assert len(mine) > count // 10
        found += mine
    assert sorted(found) == sorted(f"g{n}" for n in range(count) if n % 3 == 1)


@asynchronous
async def test_a_large_group_of_others_is_numbered_at_once(redis_server: RedisServer) -> None:
    names = [f"i{n}" for n in range(3500)]
    redis_server.client.hset("stream:s:g", mapping=dict.fromkeys(names, "1"))
    before = redis_server.client.hkeys("stream:s:g")
    async with storage_on(redis_server) as storage:
        await perform(storage, put("last", 2))
        ((outcome, _),) = await settle(
            storage, "s", messages.Join(0, "s", "g", None, with_ids=True)
        )
        assert json.loads(getattr(outcome, "ids", b"")) == [*before, "last"]


@asynchronous
async def test_a_damaged_history_is_no_history(redis_server: RedisServer) -> None:
    """What others put there is not told, and does no harm."""
    async with storage_on(redis_server) as storage:
        await perform(storage, put("i", 1), put("i", 2))
        (history,) = redis_server.client.keys("broker:*:history:*")
        redis_server.client.lset(history, -1, "garbage")
        ((past, _),) = await settle(storage, "s", messages.ReadHistory(0, "s", "g", None, 10))
        assert isinstance(past, Past)
        assert past.changes == []
        ((sync, _),) = await settle(storage, "s", join())
        epoch = getattr(sync, "epoch", "")
        ((again, _),) = await settle(storage, "s", messages.Join(0, "s", "g", None, None, 0, epoch))
        assert getattr(again, "resumed", None) is False
        redis_server.client.delete(history)
        redis_server.client.set(history, "text")
        assert await perform(storage, put("i", 3), get("i")) == [
            {"old_value": 2, "new_value": 3},
            3,
        ]


@pytest.mark.parametrize("end", ["?nope=1", "?socket_timeout=x"])
def test_a_url_with_options_that_do_not_exist(end: str) -> None:
    with pytest.raises(ConfigError, match="redis_url: can't be used"):
        RedisStorage("redis://:secret@127.0.0.1" + end, wall_clock_ms, 1000, LIMITS)
