"""Redis refuses what is read to find missed changes: they are told as soon as it can be read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from redis.exceptions import ResponseError

from broker.names import Group
from broker.redis_client import Command, Reply
from shards.storage.redis_keys import RedisKeys
from tests.storage.test_redis_changes import Member
from tests.storage.test_storages import asynchronous, put
from tests.support.redis_server import RedisServer

REFUSALS = 3
"""Answers to one kind of command that are errors, until Redis is well again."""
BUSY = "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE."


@asynccontextmanager
async def members(server: RedisServer) -> AsyncIterator[list[Member]]:
    found = [Member(server.url) for _ in range(2)]
    for member in found:
        await member.storage.open()
    try:
        yield found
    finally:
        for member in found:
            await member.storage.close()


def refuse(member: Member, monkeypatch: pytest.MonkeyPatch, name: str) -> list[Command]:
    """Let the next commands `name` of the member be refused; which these were so far."""
    client = member.storage._client
    run, refused = client.run, list[Command]()

    async def refusing(commands: Sequence[Command]) -> list[Reply]:
        replies = await run(commands)
        for n, command in enumerate(commands):
            if command[0] == name and len(refused) < REFUSALS:
                refused.append(command)
                replies[n] = ResponseError(BUSY)
        return replies

    monkeypatch.setattr(client, "run", refusing)
    return refused


async def miss(one: Member, other: Member, *groups: str) -> None:
    """Let `other`, which made the first change of each group, want them after it missed two."""
    await other.perform(*(put("a", 0, group) for group in groups))
    for group in groups:
        await one.perform(put("a", 1, group), put("a", 2, group))
    for group in groups:
        other.storage.interest("s", group, True)


@pytest.mark.parametrize("name", ["HMGET", "LRANGE"])
@asynchronous
async def test_a_group(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    async with members(redis_server) as (one, other):
        refused = refuse(other, monkeypatch, name)
        await miss(one, other, "g")
        await other.until(lambda: other.seqs() == [1, 2, 3])
        assert len(refused) == REFUSALS


@pytest.mark.parametrize("name", ["SMEMBERS", "HMGET", "LRANGE"])
@asynchronous
async def test_groups_of_a_stream_that_were_not_seen(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """After a lost connection, before which nothing was told of them."""
    async with members(redis_server) as (one, other):
        other.storage.interest_stream("s", True)
        channel = RedisKeys().stream_channel("s")
        await other.until(lambda: redis_server.client.pubsub_numsub(channel) == [(channel, 1)])
        await asyncio.sleep(0.1)  # that the subscription is older than what comes
        refused = refuse(other, monkeypatch, name)
        redis_server.client.client_kill_filter(_type="pubsub")
        await one.perform(put("a", 1, "new"), put("a", 2, "new"), put("a", 1, "newer"))
        await other.until(lambda: (other.seqs("new"), other.seqs("newer")) == ([1, 2], [1]))
        assert len(refused) == REFUSALS


@asynchronous
async def test_a_head_that_is_put_right(redis_server: RedisServer) -> None:
    """And meanwhile other groups are told of."""
    client = redis_server.client
    head = RedisKeys().group_keys(Group("s", "g")).head

    def refusals() -> int:
        found = client.info("errorstats").get("errorstat_WRONGTYPE", {"count": 0})
        return int(found["count"])

    async with members(redis_server) as (one, other):
        client.config_resetstat()
        await other.perform(put("a", 0))
        await one.perform(put("a", 1), put("a", 2))
        client.rename(head, "kept")
        client.set(head, "no hash")
        other.storage.interest("s", "g", True)
        await other.until(lambda: refusals() >= 1)
        await miss(one, other, "h")
        await other.until(lambda: other.seqs("h") == [1, 2, 3])
        await other.until(lambda: refusals() >= REFUSALS)
        await other.until(lambda: other.storage.groups_refused == 1)
        client.rename("kept", head)
        await other.until(lambda: other.seqs() == [1, 2, 3])
        assert other.storage.groups_refused == 0


@asynchronous
async def test_a_group_that_nobody_wants_any_more(redis_server: RedisServer) -> None:
    """Is not asked for again and again."""
    client = redis_server.client
    head = RedisKeys().group_keys(Group("s", "g")).head

    def asked() -> int:
        return int(client.info("commandstats").get("cmdstat_hmget", {"calls": 0})["calls"])

    async with members(redis_server) as (_, other):
        await other.perform(put("a", 0))
        client.config_resetstat()
        client.delete(head)
        client.set(head, "no hash")
        other.storage.interest("s", "g", True)
        await other.until(lambda: asked() >= REFUSALS)
        other.storage.interest("s", "g", False)
        await asyncio.sleep(1.5)  # more than between two attempts
        before = asked()
        await asyncio.sleep(1.5)
        assert asked() == before
