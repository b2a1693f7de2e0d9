"""Storages with different key prefixes on one Redis share nothing, with databases hardly."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from shards.storage.redis_keys import RedisKeys
from tests.storage.test_redis_changes import Member
from tests.storage.test_storages import INCREMENT, asynchronous, delete, join, put, send, update
from tests.support.redis_cluster import RedisClusterServers
from tests.support.redis_server import RedisServer

PREFIXES = ["", "a:", "a:b:"]
PREFIX = PREFIXES[-1]


@asynccontextmanager
async def members(url: str, *prefixes: str) -> AsyncIterator[list[Member]]:
    """One with each of the prefixes, that joined group `g` and wants stream `s`."""
    found = [Member(url, key_prefix=prefix) for prefix in prefixes]
    for member in found:
        await member.storage.open()
        await member.perform(join())
        member.storage.interest("s", "g", True)
        member.storage.interest_stream("s", True)
    try:
        yield found
    finally:
        for member in found:
            await member.storage.close()


async def until_listened(
    server: RedisServer, prefix: str, count: int, database: int = 0, listeners: int | None = None
) -> None:
    """So many are there that hear changes of stream `s`, and what others say; `listeners`: so many
    hear that, if they are more."""
    keys = RedisKeys(prefix, database)
    expected = [(keys.stream_channel("s"), count), (keys.events, listeners or count)]
    async with asyncio.timeout(10):
        while server.client.pubsub_numsub(*dict(expected)) != expected:
            await asyncio.sleep(0.005)


@asynchronous
async def test_all_names_begin_with_it(redis_server: RedisServer) -> None:
    client = redis_server.client
    async with members(redis_server.url, PREFIX, PREFIX) as (one, other):
        await until_listened(redis_server, PREFIX, 2)
        await one.perform(put("i", 1), update("n", INCREMENT), send(1), put("i", 1, "h"))
        await other.perform(put("i", 2), delete("i", "h"), put("i", 1, "left"))
        await one.until(lambda: one.seqs() == [1, 2, 3, 4])
        assert sorted(await one.storage.groups("s")) == ["g", "left"]
        client.hset(f"{PREFIX}stream:t:g", "i", "1")
        assert sorted(await one.storage.streams()) == ["s", "t"]
        keys = set(client.keys())
        assert {RedisKeys(PREFIX).streams, f"{PREFIX}stream:s:g"} < keys
        assert len(keys) > 10
        channels = client.pubsub_channels()
        assert len(channels) >= 5
        assert [name for name in (*keys, *channels) if not name.startswith(PREFIX)] == []
        assert client.pubsub_numpat() == 0


@asynchronous
async def test_nobody_hears_or_finds_what_has_another(redis_server: RedisServer) -> None:
    async with members(redis_server.url, *PREFIXES, *PREFIXES) as found:
        for prefix in PREFIXES:
            await until_listened(redis_server, prefix, 2)
        writers, hearers = found[:3], found[3:]
        for n, writer in enumerate(writers):
            await writer.perform(*[put("i", n)] * (n + 1), put("i", n, f"own{n}"))
        for n, prefix in enumerate(PREFIXES):
            message = {"type": "stream", "timestamp": 1, "streamName": "s", "groupId": "g"}
            message |= {"event": {"type": "update", "data": n}}
            redis_server.client.publish(f"{prefix}stream::events", json.dumps(message))
        for writer in writers:
            await writer.perform(put("last", 1))
        for n, hearer in enumerate(hearers):
            await hearer.until(lambda m=hearer, n=n: len(m.seqs()) == n + 2)
        for n, member in enumerate([*writers, *hearers]):
            place = n % 3
            groups = {"g", f"own{place}"}
            await member.until(lambda m=member: len(m.foreign) == 1)
            assert {group for group, _ in member.heard} == groups
            assert member.seqs() == list(range(1, place + 3))
            assert json.loads(member.foreign[0].event)["data"] == place
            assert set(await member.storage.groups("s")) == groups
            assert await member.storage.streams() == ["s"]


DATABASES = [0, 1, 2]


@asynccontextmanager
async def members_of_databases(server: RedisServer, prefix: str) -> AsyncIterator[list[Member]]:
    """Two of each database."""
    async with AsyncExitStack() as stack:
        found: list[Member] = []
        for database in [*DATABASES, *DATABASES]:
            member = members(f"{server.url}/{database}", prefix)
            found += await stack.enter_async_context(member)
        for database in DATABASES:
            await until_listened(server, prefix, 2, database, len(found))
        yield found


@pytest.mark.parametrize("prefix", ["", PREFIX])
@asynchronous
async def test_databases_share_only_what_others_say(redis_server: RedisServer, prefix: str) -> None:
    async with members_of_databases(redis_server, prefix) as found:
        writers, hearers = found[:3], found[3:]
        for n, writer in enumerate(writers):
            await writer.perform(*[put("i", n)] * (n + 1), put("i", n, f"own{n}"))
        message = {"type": "stream", "timestamp": 1, "streamName": "s", "groupId": "g"}
        message |= {"event": {"type": "update", "data": 7}}
        redis_server.client.publish(f"{prefix}stream::events", json.dumps(message))
        for writer in writers:
            await writer.perform(put("last", 1))
        for n, hearer in enumerate(hearers):
            await hearer.until(lambda m=hearer, n=n: len(m.seqs()) == n + 2)
        for n, member in enumerate(found):
            place = n % 3
            await member.until(lambda m=member: len(m.foreign) == 1)
            assert {group for group, _ in member.heard} == {"g", f"own{place}"}
            assert member.seqs() == list(range(1, place + 3))
            assert {c.data for _, c in member.heard if c.item_id == "i"} == {b"%d" % place}
            assert set(await member.storage.groups("s")) == {"g", f"own{place}"}


async def told(client: Any, member: Member) -> int:
    """On how many channels a write of the member is told."""
    client.config_resetstat()
    await member.perform(put("i", 1))
    stats: dict[str, Any] = client.info("commandstats")
    return int(stats["cmdstat_publish"]["calls"])


@asynchronous
async def test_brokers_of_other_databases_do_not_count_as_engines(
    redis_server: RedisServer,
) -> None:
    """What they do is told to brokers alone, until somebody else listens."""
    client = redis_server.client

    async with members_of_databases(redis_server, "") as found:
        assert [await told(client, member) for member in found] == [2] * len(found)
        with client.pubsub() as engine:
            engine.subscribe("stream::events")
            engine.get_message(timeout=5)
            assert [await told(client, member) for member in found] == [3] * len(found)
        for member in found:
            assert member.foreign == []


@pytest.mark.parametrize("prefix", ["", PREFIX])
@asynchronous
async def test_the_originals_channel_is_told_only_who_listens(
    redis_server: RedisServer, prefix: str
) -> None:
    """Neither brokers, whatever their prefixes are, nor those that listen on another's count."""
    client = redis_server.client

    async with members(redis_server.url, *PREFIXES, prefix) as found:
        for one in PREFIXES:
            await until_listened(redis_server, one, 1 + (one == prefix))
        member, channel = found[-1], f"{prefix}stream::events"
        assert await told(client, member) == 2  # on the channels of the group and of the stream
        with client.pubsub() as other:
            other.subscribe("x:stream::events")
            other.get_message(timeout=5)
            assert await told(client, member) == 2
            other.subscribe(channel)
            other.get_message(timeout=5)
            assert await told(client, member) == 3
            message = other.get_message(timeout=5)
            assert message["channel"] == channel
            assert json.loads(message["data"])["seq"] == 3
            other.unsubscribe()
            other.psubscribe(f"{prefix}stream::e*")
            for _ in range(3):
                other.get_message(timeout=5)
            assert await told(client, member) == 3
            message = other.get_message(timeout=5)
            assert (message["type"], message["channel"]) == ("pmessage", channel)


@asynchronous
async def test_on_a_cluster(redis_cluster: RedisClusterServers) -> None:
    groups = [f"g{n}" for n in range(12)]
    async with members(redis_cluster.url, *PREFIXES, *PREFIXES) as found:
        for member in found:
            for group in groups:
                await member.perform(join(group=group))
                member.storage.interest("s", group, True)
        for n, member in enumerate(found):
            for group in groups:
                await member.perform(*[put("i", n, group)] * (n % 3 + 1))
        for n, member in enumerate(found):
            for group in groups:
                expected = list(range(1, 2 * (n % 3 + 1) + 1))
                await member.until(lambda m=member, g=group, e=expected: m.seqs(g) == e)
    begins = {"stream:", "broker:", "a:stream:", "a:broker:", "a:b:stream:", "a:b:broker:"}
    keys = [key for node in redis_cluster.nodes for key in node.client.scan_iter()]
    # Probes live for a millisecond.
    assert {key[: key.index(":", key.index("r")) + 1] for key in keys} == begins


@asynchronous
async def test_a_user_who_may_touch_nothing_else(redis_server: RedisServer) -> None:
    client = redis_server.client
    rules = ("on", ">pass", f"~{PREFIX}*", f"&{PREFIX}*", "+@all")
    client.execute_command("ACL SETUSER", "tenant", "reset", *rules)
    client.execute_command("ACL LOG", "RESET")
    client.hset("stream:s:hidden", "i", "1")
    try:
        url = redis_server.url.replace("//", "//tenant:pass@")
        async with members(url, PREFIX, PREFIX) as (one, other):
            await until_listened(redis_server, PREFIX, 2)
            await one.perform(put("i", 1), put("i", 1, "h"))
            await other.until(lambda: (other.seqs(), other.seqs("h")) == ([1], [1]))
            message = {"type": "stream", "timestamp": 1, "streamName": "s", "groupId": "g"}
            message |= {"event": {"type": "update", "data": 1}}
            client.publish(f"{PREFIX}stream::events", json.dumps(message))
            await other.until(lambda: len(other.foreign) == 1)
            assert set(await one.storage.groups("s")) == {"g", "h"}
        assert client.execute_command("ACL LOG") == []
    finally:
        client.execute_command("ACL DELUSER", "tenant")
