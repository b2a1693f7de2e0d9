"""Several storages on one Redis: each is told what the others did, in one order."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis

from broker import messages
from broker.clock import wall_clock_ms
from broker.names import Group
from shards.group import Change, Done, Kind, Operation, Snapshot
from shards.history import HistoryLimits
from shards.storage.base import Settled
from shards.storage.redis import RedisStorage
from shards.storage.redis_foreign import Foreign
from shards.storage.redis_keys import RedisKeys
from tests.storage.test_storages import (
    INCREMENT,
    asynchronous,
    delete,
    get,
    join,
    put,
    send,
    update,
)
from tests.support.redis_cluster import RedisClusterServers
from tests.support.redis_server import RedisServer

PATIENCE_S = 10.0
LIMITS = HistoryLimits(1000, 3_600_000, 2**20, 2**26)


class Member:
    """A storage, and what its shard hears of stream `s`: own changes and those of others."""

    def __init__(self, url: str, limits: HistoryLimits = LIMITS, key_prefix: str = "") -> None:
        self.heard: list[tuple[str, Change]] = []
        self.remote: list[Change] = []
        self.foreign: list[Foreign] = []
        self.storage = RedisStorage(
            url,
            wall_clock_ms,
            10**6,
            limits,
            key_prefix=key_prefix,
            remote_changes=self._changed,
            foreign=self.foreign.append,
        )

    def _changed(self, stream: str, group_id: str, change: Change) -> None:
        assert stream == "s"
        self.remote.append(change)
        self.heard.append((group_id, change))

    async def perform(self, *operations: Operation) -> list[Settled]:
        future: asyncio.Future[list[Settled]] = asyncio.get_running_loop().create_future()

        def settle(settled: Any) -> None:
            for operation, (outcome, _) in zip(operations, settled, strict=True):
                if isinstance(outcome, Done) and outcome.change is not None:
                    self.heard.append((operation.group_id, outcome.change))
            future.set_result(list(settled))

        self.storage.execute("s", operations, settle)
        async with asyncio.timeout(PATIENCE_S):
            return await future

    def seqs(self, group_id: str = "g") -> list[int]:
        return [change.seq for group, change in self.heard if group == group_id]

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not holds():
                await asyncio.sleep(0.005)


@asynccontextmanager
async def members(
    server: RedisServer | RedisClusterServers,
    count: int = 2,
    *groups: str,
    limits: HistoryLimits = LIMITS,
) -> AsyncIterator[list[Member]]:
    """Members that joined `g`, and the other groups."""
    found = [Member(server.url, limits) for _ in range(count)]
    for member in found:
        await member.storage.open()
        for group in ("g", *groups):
            await member.perform(join(group=group))
            member.storage.interest("s", group, True)
    try:
        yield found
    finally:
        for member in found:
            await member.storage.close()


@asynchronous
async def test_others_are_told_and_own_changes_are_not(redis_server: RedisServer) -> None:
    async with members(redis_server) as (one, other):
        await one.perform(put("a", 1), send("x", "a"), put("a", 2), delete("a"))
        await other.until(lambda: len(other.remote) == 4)
        assert one.remote == []
        assert [(c.kind, c.item_id, c.data, c.seq, c.event_type) for c in other.remote] == [
            (Kind.CREATE, "a", b"1", 1, None),
            (Kind.EVENT, "a", b'"x"', 2, "t"),
            (Kind.UPDATE, "a", b"2", 3, None),
            (Kind.DELETE, "a", b"2", 4, None),
        ]
        assert [c for _, c in one.heard] == other.remote
        await other.perform(put("b", 1))
        await one.until(lambda: one.seqs() == [1, 2, 3, 4, 5])
        assert other.seqs() == [1, 2, 3, 4, 5]


@asynchronous
async def test_only_groups_of_interest(redis_server: RedisServer) -> None:
    async with members(redis_server) as (one, other):
        await one.perform(put("a", 1, "elsewhere"), put("a", 1))
        await other.until(lambda: other.seqs() == [1])
        other.storage.interest("s", "g", False)
        other.storage.interest("s", "h", True)
        await one.perform(put("a", 2))
        await other.perform(put("b", 1, "h"))
        await one.perform(put("a", 2, "h"))
        await other.until(lambda: other.seqs("h") == [1, 2])
        assert other.seqs() == [1]
        await other.perform(join())
        other.storage.interest("s", "g", True)
        await one.perform(put("a", 3))
        await other.until(lambda: other.seqs() == [1, 3])


@asynchronous
async def test_what_others_did_comes_before_what_came_after_it(redis_server: RedisServer) -> None:
    """Whoever joins or writes hears at once all that was before, however late its message is."""
    async with members(redis_server) as (one, other):
        for n in range(50):
            await one.perform(put("a", n))
            await other.perform(put("b", n) if n % 2 else join())
            assert other.seqs() == list(range(1, other.seqs()[-1] + 1))
            assert len(other.remote) == n + 1
        await one.until(lambda: len(one.remote) == 25)
        assert one.seqs() == other.seqs() == list(range(1, 76))


@pytest.mark.parametrize("seed", range(3))
@asynchronous
async def test_all_at_once(redis_server: RedisServer, seed: int) -> None:
    """No update is lost, and everyone hears everything in one order, once."""
    async with members(redis_server, 3, "h") as all_members:
        increments = 0

        async def write(member: Member, chance: random.Random) -> None:
            nonlocal increments
            for _ in range(25):
                operations: list[Operation] = []
                for _ in range(chance.randint(1, 8)):
                    group = chance.choice("ggh")
                    if chance.random() < 0.6:
                        operations.append(update("n", INCREMENT, group=group))
                        increments += 1
                    else:
                        make = chance.choice([put("a", 1, group), send(1, None, group)])
                        operations.append(chance.choice([make, delete("a", group)]))
                for outcome, _ in await member.perform(*operations):
                    assert isinstance(outcome, Done), outcome
                if chance.random() < 0.3:
                    await asyncio.sleep(chance.random() / 100)

        chances = [random.Random(f"{seed} {n}") for n in range(3)]
        await asyncio.gather(*map(write, all_members, chances))
        for group in "gh":
            head = max(member.seqs(group)[-1] for member in all_members)
            for member in all_members:
                await member.until(lambda m=member, g=group, h=head: len(m.seqs(g)) >= h)
                assert member.seqs(group) == list(range(1, head + 1))
        total = 0
        for group in "gh":
            ((outcome, _),) = await all_members[0].perform(get("n", group))
            assert isinstance(outcome, Done)
            total += int(outcome.result or b"0")
        assert total == increments


@asynchronous
async def test_a_lost_connection(redis_server: RedisServer) -> None:
    """What was told meanwhile is read from the history."""
    async with members(redis_server) as (one, other):
        await one.perform(put("a", 0))
        await other.until(lambda: other.seqs() == [1])
        for n in range(5):
            redis_server.client.client_kill_filter(_type="pubsub")
            await one.perform(put("a", n))
        await other.until(lambda: other.seqs() == [1, 2, 3, 4, 5, 6])
        assert one.seqs() == [1, 2, 3, 4, 5, 6]


@asynchronous
async def test_what_is_not_kept_any_more_is_left_out(redis_server: RedisServer) -> None:
    """The gap shows in the numbers."""
    async with members(redis_server, limits=HistoryLimits(3, 60_000, 10**6, 10**6)) as (one, other):
        await one.perform(put("a", 0))
        await other.until(lambda: other.seqs() == [1])
        other.storage.interest("s", "g", False)
        await one.perform(*(put("a", n) for n in range(10)))
        other.storage.interest("s", "g", True)
        await one.perform(put("a", "last"))
        await other.until(lambda: other.seqs()[-1] == 12)
        assert other.seqs() in ([1, 10, 11, 12], [1, 9, 10, 11, 12], [1, 12])


@asynchronous
async def test_without_history(redis_server: RedisServer) -> None:
    async with members(redis_server, limits=HistoryLimits(0, 60_000, 10**6, 10**6)) as (one, other):
        await one.perform(put("a", 1))
        await one.perform(put("a", 2), put("a", 3))
        await other.until(lambda: bool(other.seqs()) and other.seqs()[-1] == 3)


@asynchronous
async def test_a_numbering_that_was_lost(redis_server: RedisServer) -> None:
    async with members(redis_server) as (one, other):
        await one.perform(put("a", 1), put("a", 2))
        await other.until(lambda: other.seqs() == [1, 2])
        redis_server.client.flushall()
        await one.perform(put("a", 3))
        await one.perform(put("a", 4))
        await other.until(lambda: other.seqs() == [1, 2, 1, 2])
        await other.perform(put("b", 5))
        assert other.seqs() == [1, 2, 1, 2, 3]


@asynchronous
async def test_changes_that_were_told_and_lost(redis_server: RedisServer) -> None:
    """As after a failover to a replica that lacked them: no number is told twice, whoever goes on,
    and the numbering is another one, so that nobody resumes from what is not there."""
    async with members(redis_server) as (one, other):
        await one.perform(put("a", 1), put("a", 2))
        keys = redis_server.client.keys("*")
        raw = redis.Redis(port=redis_server.port)
        kept = {key: raw.dump(key) for key in keys}
        await one.perform(put("a", 3), put("a", 4), put("b", 1))
        await other.until(lambda: other.seqs() == [1, 2, 3, 4, 5])
        epoch = redis_server.client.hget(head_key(), "epoch")
        for key, text in kept.items():
            raw.restore(key, 0, text, replace=True)
        raw.close()
        await other.perform(get("a"), put("c", 1))
        await one.until(lambda: one.seqs()[-1] == 7)
        assert one.seqs() == other.seqs() == [1, 2, 3, 4, 5, 7]
        assert redis_server.client.hget(head_key(), "epoch") != epoch
        await one.perform(put("a", 5))
        await other.until(lambda: other.seqs()[-1] == 8)
        ((outcome, _),) = await one.perform(messages.Join(0, "s", "g", None, None, 5, epoch))
        assert isinstance(outcome, Snapshot)
        assert outcome.data == b"[5,1]"


@asynchronous
async def test_a_user_who_may_not_hear_others(redis_server: RedisServer) -> None:
    """Hears what brokers say; what other programs say is done without."""
    rules = ("on", ">pass", "~stream:*", "~broker:*", "&broker:*", "+@all")
    redis_server.client.execute_command("ACL SETUSER", "member", *rules)
    try:
        url = redis_server.url.replace("//", "//member:pass@")
        one, other = Member(url), Member(url)
        for member in (one, other):
            await member.storage.open()
            await member.perform(join())
            member.storage.interest("s", "g", True)
        await one.perform(put("a", 1))
        await other.until(lambda: other.seqs() == [1])
        for member in (one, other):
            await member.storage.close()
    finally:
        redis_server.client.execute_command("ACL DELUSER", "member")


def head_key() -> str:
    return RedisKeys().group_keys(Group("s", "g")).head
