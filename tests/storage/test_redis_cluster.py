"""A Redis Cluster: several members on it, slots that move, nodes that go."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from broker.errors import StorageError
from broker.names import Group
from broker.redis_slots import probe_key, slot_of
from shards.group import Done, Operation
from shards.storage.redis_keys import RedisKeys
from tests.storage.test_redis_changes import Member, members
from tests.storage.test_storages import INCREMENT, asynchronous, get, join, put, update
from tests.support.held_bus import HeldBus
from tests.support.redis_cluster import RedisClusterServers, until
from tests.support.redis_server import RedisServer

GROUPS = [f"g{n}" for n in range(12)]


def key_of(group_id: str) -> str:
    return RedisKeys().data_key(Group("s", group_id))


async def settled(member: Member, operation: Operation) -> Any:
    ((outcome, _),) = await member.perform(operation)
    return outcome


@asynchronous
async def test_members_hear_each_other(redis_cluster: RedisClusterServers) -> None:
    """Whichever node has the group, and whichever node is listened on."""
    async with members(redis_cluster, 3, *GROUPS) as everyone:
        for group in GROUPS:
            for member in everyone:
                await member.perform(update("n", INCREMENT, group=group), put("a", 1, group))
        for member in everyone:
            for group in GROUPS:
                await member.until(lambda m=member, g=group: len(m.seqs(g)) == 6)
                assert member.seqs(group) == [1, 2, 3, 4, 5, 6]
        for group in GROUPS:  # by sharded pub/sub, which goes to no other node
            channel = RedisKeys().group_keys(Group("s", group)).channel
            for node in redis_cluster.nodes:
                ((_, heard),) = node.client.pubsub_shardnumsub(channel)
                assert heard == (3 if node is redis_cluster.node_of(key_of(group)) else 0)
                assert node.client.pubsub_numsub(channel) == [(channel, 0)]


@pytest.mark.parametrize("is_changed", [False, True])
@asynchronous
async def test_what_came_before_the_first_touch_is_told(
    redis_cluster: RedisClusterServers, is_changed: bool
) -> None:
    """Of a group of a stream that triggers want, also when the node that has the group is slow to
    tell the one that is listened on."""
    async with members(redis_cluster) as (writer, hearer):
        hearer.storage.interest_stream("s", True)
        channel = RedisKeys().stream_channel("s")

        def listened() -> list[RedisServer]:
            return [n for n in redis_cluster.nodes if n.client.pubsub_numsub(channel)[0][1]]

        await hearer.until(lambda: len(listened()) == 1)
        (near,) = listened()
        far = [group for group in GROUPS if redis_cluster.node_of(key_of(group)) is not near]
        async with HeldBus(redis_cluster, near) as bus:
            for group in far[:4]:
                bus.is_open.clear()
                await writer.perform(put("i", 1, group))
                touch = put("i", 2, group) if is_changed else join(group=group)
                touched = asyncio.create_task(hearer.perform(touch))
                await asyncio.sleep(0.05)
                bus.is_open.set()
                await touched
                count = 1 + is_changed
                await hearer.until(lambda g=group, n=count: len(hearer.seqs(g)) >= n)
                assert hearer.seqs(group) == list(range(1, count + 1))


@asynchronous
async def test_slots_that_move_lose_nothing(redis_cluster: RedisClusterServers) -> None:
    """Writers go on meanwhile; every increment counts once and all hear one order."""
    async with members(redis_cluster, 2) as everyone:
        await everyone[0].perform(*(put(f"i{n}", "x" * 100) for n in range(200)))
        moved = asyncio.Event()
        counts = [0, 0]

        async def write(place: int) -> None:
            rest = 20
            while rest:
                rest -= moved.is_set()
                outcome = await settled(everyone[place], update("n", INCREMENT))
                if isinstance(outcome, StorageError):
                    assert outcome.retryable, outcome
                else:
                    counts[place] += 1
                await asyncio.sleep(0)

        async def move() -> None:
            for _ in range(2):
                source = redis_cluster.node_of(key_of("g"))
                target = next(n for n in redis_cluster.nodes if n is not source)
                await asyncio.to_thread(redis_cluster.move_slot, key_of("g"), target)
            moved.set()

        await asyncio.gather(write(0), write(1), move())
        outcome = await settled(everyone[0], get("n"))
        assert isinstance(outcome, Done)
        assert int(outcome.result or b"0") == sum(counts)
        last = max(member.seqs()[-1] for member in everyone)
        assert last == sum(counts) + 200
        for member in everyone:
            await member.until(lambda m=member: m.seqs()[-1] == last)
            assert member.seqs() == list(range(1, last + 1))


@asynchronous
async def test_a_slot_that_moves_while_nobody_writes(redis_cluster: RedisClusterServers) -> None:
    """Who listens follows it."""
    async with members(redis_cluster) as (one, other):
        await one.perform(put("i", 0))
        for n in range(3):
            source = redis_cluster.node_of(key_of("g"))
            target = next(node for node in redis_cluster.nodes if node is not source)
            await asyncio.to_thread(redis_cluster.move_slot, key_of("g"), target)
            await asyncio.sleep(0.3)
            assert isinstance(await settled(one, put("i", n)), Done)
            await other.until(lambda n=n: other.seqs() == list(range(1, n + 3)))


@asynchronous
async def test_failover() -> None:
    """While a master is gone its groups fail, retryably, and no others; its replica goes on."""
    with RedisClusterServers(replicas=1) as servers:
        async with members(servers, 2, *GROUPS) as (one, other):
            for group in GROUPS:
                await one.perform(put("i", 1, group))
            lost = servers.node_of(key_of("g0"))
            concerned = [g for g in GROUPS if servers.node_of(key_of(g)) is lost]
            # Waits for what the same connection wrote, and so for all before.
            written = lost.client.pipeline(transaction=False)
            written.set(probe_key("", slot_of(key_of("g0"))), "")
            written.execute_command("WAIT", 1, 10_000)
            assert written.execute()[-1] == 1
            assert lost.process is not None
            lost.process.kill()
            lost.process.wait()
            lost.process = None
            for group in GROUPS:
                outcome = await settled(one, put("i", 2, group))
                if group in concerned:
                    assert isinstance(outcome, StorageError), group
                    assert outcome.retryable, outcome
                else:
                    assert isinstance(outcome, Done), outcome
            for group in concerned:
                async with asyncio.timeout(30):
                    while isinstance(await settled(one, put("i", 3, group)), StorageError):
                        await asyncio.sleep(0.05)
            for group in GROUPS:
                await other.until(lambda g=group: other.seqs(g)[-1:] == [2])
                assert one.seqs(group) == other.seqs(group) == [1, 2]
            lost.start()
            await asyncio.to_thread(until, servers.is_well, "it came back as a replica")
            assert isinstance(await settled(other, put("i", 4, concerned[0])), Done)
