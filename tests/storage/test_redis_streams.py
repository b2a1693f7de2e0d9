"""Several storages on one Redis: whoever wants a whole stream is told of all of its groups."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from broker.clock import wall_clock_ms
from shards.storage.redis import RedisStorage
from tests.storage.test_redis_changes import LIMITS, Member
from tests.storage.test_storages import asynchronous, get, join, put, send
from tests.support.redis_server import RedisServer

CHANNEL = "broker:changes:s"


@asynccontextmanager
async def members(server: RedisServer, count: int = 2) -> AsyncIterator[list[Member]]:
    """Members that want stream `s`, of whose groups nothing was told yet."""
    found = [Member(server.url) for _ in range(count)]
    for member in found:
        await member.storage.open()
        member.storage.interest_stream("s", True)
    try:
        await subscribed(server, count)
        yield found
    finally:
        for member in found:
            await member.storage.close()


async def subscribed(server: RedisServer, count: int) -> None:
    async with asyncio.timeout(10):
        while server.client.pubsub_numsub(CHANNEL)[0][1] != count:
            await asyncio.sleep(0.005)


async def all_told(members: list[Member], groups: dict[str, int]) -> None:
    """Every member hears every change of the groups once, in order; so many there are."""
    for member in members:
        for group, count in groups.items():
            numbers = list(range(1, count + 1))
            await member.until(lambda m=member, g=group, n=count: len(m.seqs(g)) >= n)
            assert member.seqs(group) == numbers, group


@asynchronous
async def test_groups_that_nobody_knew(redis_server: RedisServer) -> None:
    async with members(redis_server) as found:
        one, other = found
        await one.perform(put("a", 1, "x:%"), send("e", None, "x:%"), put("a", 1, ""))
        await other.perform(put("a", 2, "x:%"), put("b", 2, "y"))
        await one.perform(get("b", "y"), join(group="y"), put("b", 3, "y"))
        await all_told(found, {"x:%": 3, "": 1, "y": 2})
        assert len(one.remote) == 2
        assert len(other.remote) == 4
        one.storage.interest_stream("s", False)
        await subscribed(redis_server, 1)
        await other.perform(put("a", 3, "x:%"))
        await one.perform(put("a", 4, "z"))
        await other.until(lambda: other.seqs("z") == [1])
        assert one.seqs("x:%") == [1, 2, 3]


@asynchronous
async def test_what_was_before_is_not_told(redis_server: RedisServer) -> None:
    early = Member(redis_server.url)
    await early.storage.open()
    await early.perform(put("a", 1), put("a", 2), put("b", 1, "h"))
    async with members(redis_server) as (one, other):
        await other.perform(join())
        await other.perform(put("a", 3))
        await one.until(lambda: one.seqs() == [3])
        await early.perform(put("a", 4), put("b", 2, "h"))
        await one.until(lambda: one.seqs("h") == [2])
        assert one.seqs() == other.seqs() == [3, 4]
    await early.storage.close()


@pytest.mark.parametrize("seed", range(3))
@asynchronous
async def test_all_at_once(redis_server: RedisServer, seed: int) -> None:
    """Everyone hears everything of every group in one order, also who changes it first."""
    async with members(redis_server, 3) as found:
        counts: dict[str, int] = {}

        async def write(member: Member, chance: random.Random) -> None:
            for _ in range(60):
                groups = [f"g{chance.randint(1, 40)}" for _ in range(chance.randint(1, 4))]
                for group in groups:
                    counts[group] = counts.get(group, 0) + 1
                await member.perform(*(put("a", 1, group) for group in groups))

        chances = [random.Random(f"{seed} {n}") for n in range(3)]
        await asyncio.gather(*map(write, found, chances))
        await all_told(found, counts)


@pytest.mark.parametrize("seed", range(3))
@asynchronous
async def test_a_lost_connection(redis_server: RedisServer, seed: int) -> None:
    """Groups that were seen go on, of others all that is new is told; each once."""
    chance = random.Random(seed)
    early = Member(redis_server.url)
    await early.storage.open()
    await early.perform(*(put("a", n, "old") for n in range(3)))
    await asyncio.sleep(0.05)
    async with members(redis_server) as found:
        await asyncio.sleep(0.3)  # that the subscription is older than what comes
        one = found[0]
        counts: dict[str, int] = {}

        async def write(groups: list[str]) -> None:
            for group in groups:
                counts[group] = counts.get(group, 0) + 1
                await chance.choice([early, one]).perform(put("a", 1, group))

        await write(["seen", "seen", "both"])
        await all_told(found, counts)
        for n in range(4):
            redis_server.client.client_kill_filter(_type="pubsub")
            await write([chance.choice(["seen", "both", f"new-{n}", "new"]) for _ in range(12)])
        await early.perform(put("a", "more", "old"))
        await all_told(found, counts)
        for member in found:
            await member.until(lambda m=member: m.seqs("old") == [4])
            assert member.storage.changes_lost_total == 0
    await early.storage.close()


@asynchronous
async def test_only_groups_of_the_shard(redis_server: RedisServer) -> None:
    """Of two shards of one broker each is told of its own groups."""
    shards = [Member(redis_server.url) for _ in range(2)]
    for number, member in enumerate(shards):
        member.storage = RedisStorage(
            redis_server.url,
            wall_clock_ms,
            10**6,
            LIMITS,
            shard=number,
            shards=2,
            remote_changes=member._changed,
        )
        await member.storage.open()
        member.storage.interest_stream("s", True)
    await subscribed(redis_server, 2)
    writer = Member(redis_server.url)
    await writer.storage.open()
    groups = {f"g{n}" for n in range(20)}
    await writer.perform(*(put("a", 1, group) for group in groups))
    one, other = shards
    await one.until(lambda: len(one.heard) + len(other.heard) == 20)
    heard = [group for member in shards for group, _ in member.heard]
    assert sorted(heard) == sorted(groups)
    assert one.heard
    assert other.heard
    for member in (*shards, writer):
        await member.storage.close()
