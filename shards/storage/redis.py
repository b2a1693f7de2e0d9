"""Redis: items where the original engine keeps them (protocol section 10.1), numbered and ordered.

The operations of one `execute` become few calls of a Lua script, all in one pipeline: the script
stores, numbers, stamps, keeps the history and publishes, one group after the other. An update
starts from the item's text, which is read before and which the script compares; when another broker
was faster, that update and what follows it on the group are tried again. Nothing of an item is kept
in memory, so that what other programs write is seen.
"""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

from redis.exceptions import ResponseError

from broker.clock import Clock
from broker.errors import StorageError
from broker.names import Group
from broker.redis_client import Command, RedisClient, Reply, Script
from broker.redis_cluster import RedisCluster, client_of
from broker.redis_slots import prepare
from broker.routing import shard_of
from broker.tasks import Tasks
from shards.group import Change, Operation, new_epoch
from shards.history import HistoryLimits
from shards.storage.base import Settle, Settled
from shards.storage.redis_changes import RemoteChange, RemoteChanges
from shards.storage.redis_foreign import Foreign
from shards.storage.redis_keys import RedisKeys, decoded, encoded
from shards.storage.redis_turn import Answer, Call, Settings, Turn

CONFLICTS_MAX = 200
"""Times that an update is tried while others change its item."""
CONFLICT_WAIT_S_MAX = 0.005
"""Seconds, chosen at random, before it is tried once more."""
INDEXED_MAX = 100_000
"""Groups of which it is remembered that they are in the index."""
SCAN_COUNT = 1000
"""Keys that Redis looks at in one step."""
SCAN_STEPS_FREE = 5
SCAN_PAUSE = 10
"""Groups that others made are looked for each time that groups are asked for, but where it takes
more steps than that not before so many times what it took."""
PAGE = 1000
"""Groups of one pipeline."""


@cache
def _script() -> Script:
    return Script((Path(__file__).parent / "lua" / "apply.lua").read_text())


class RedisStorage:
    """See `shards.storage.base.Storage`. Several shards, and brokers, may share one Redis.

    Args:
        url: of Redis: `redis://`, `rediss://` or `unix://`.
        key_prefix: what all keys and channels begin with; brokers with different ones share
            nothing. Those with different databases share what engines and other programs say.
        shard, shards: which groups `groups` tells of; all can be asked.
        remote_changes: called with each change that another broker made to a group of
            `interest`, in order of the group's numbers and in turn with what is settled here.
            Numbers that are left out could not be had any more.
        foreign: called with what other programs tell the subscribers of a group of `interest`.
        lost: called with stream, group_id and epoch when Redis seems to have lost changes of a
            group of `interest` that were told; the next operation on it makes sure, and begins
            another epoch if so.
        told: called with what keeps Redis from being used, and None when it can be again.

    Raises:
        ConfigError: the URL can't be used.
    """

    def __init__(
        self,
        url: str,
        clock: Clock,
        response_bytes_max: int,
        history_limits: HistoryLimits,
        *,
        key_prefix: str = "",
        shard: int = 0,
        shards: int = 1,
        remote_changes: RemoteChange | None = None,
        told: Callable[[str | None], None] | None = None,
        foreign: Callable[[Foreign], None] | None = None,
        lost: Callable[[str, str, str], None] | None = None,
    ) -> None:
        prepare()
        self._clock = clock
        self._shard, self._shards = shard, shards
        self._told = told
        self._client = client_of(url, self._returned, self._troubled, key_prefix=key_prefix)
        self._keys = keys = RedisKeys(key_prefix, self._client.database)
        self._settings = Settings(
            history_limits, response_bytes_max, key_prefix, keys.channel_prefix
        )
        if isinstance(self._client, RedisCluster):
            # The original's engines, which know no clusters, don't listen; each node would.
            self._settings = self._settings._replace(serves_others=False)
        self._changes = RemoteChanges(
            self._client,
            self._keys,
            tell=remote_changes or _nobody,
            tell_foreign=foreign or _nobody_is_told,
            tell_lost=lost or _nobody_cares,
            clock=clock,
            owns=lambda group: shard_of(group, shards) == shard,
        )
        self._indexed: OrderedDict[Group, None] = OrderedDict()
        self._scanning = asyncio.Lock()
        self._scan_due_s = 0.0
        self._tasks = Tasks()
        self.conflicts_total = 0

    async def open(self) -> None:
        """Reach Redis, or go on trying; until then calls fail."""
        await self._client.open()
        self._changes.open()

    async def close(self) -> None:
        await self._tasks.wait()
        await self._changes.close()
        await self._client.close()

    @property
    def round_trips_total(self) -> int:
        """Pipelines that were sent."""
        return self._client.round_trips_total

    def execute(self, stream: str, operations: Sequence[Operation], settle: Settle) -> None:
        self._tasks.start(self._execute(stream, operations, settle))

    def interest(self, stream: str, group_id: str, wanted: bool) -> None:
        """Tell of a group's changes that others make, from what was last settled of it; or not."""
        self._changes.interest(Group(stream, group_id), wanted)

    def interest_stream(self, stream: str, wanted: bool) -> None:
        """Tell of the changes that others make in groups of the stream that are this shard's."""
        self._changes.interest_stream(stream, wanted)

    @property
    def changes_lost_total(self) -> int:
        """Changes of others that could not be told, as they were not kept any more."""
        return self._changes.lost_total

    @property
    def groups_refused(self) -> int:
        """Groups of which Redis refuses to tell what was missed; it is asked again."""
        return self._changes.refused

    async def streams(self) -> list[str]:
        """The streams that may have groups, in any order.

        Raises:
            StorageError: they could not be read.
        """
        await self._find_others()
        return await self._names(self._keys.streams)

    async def groups(self, stream: str) -> list[str]:
        await self._find_others()
        group_ids = [
            group_id
            for group_id in await self._names(self._keys.groups_key(stream))
            if shard_of(Group(stream, group_id), self._shards) == self._shard
        ]
        found: list[str] = []
        for start in range(0, len(group_ids), PAGE):
            found += await self._with_items(stream, group_ids[start : start + PAGE])
        return found

    async def _execute(self, stream: str, operations: Sequence[Operation], settle: Settle) -> None:
        turns: dict[str, Turn] = {}
        for index, operation in enumerate(operations):
            turn = turns.get(operation.group_id)
            if turn is None:
                group = Group(stream, operation.group_id)
                turn = Turn(group, self._keys.group_keys(group), self._settings)
                turn.known = self._changes.known(turn.key)
                turns[operation.group_id] = turn
            turn.add(index, operation)
        groups = [turn.key for turn in turns.values()]
        self._changes.begin(groups)
        try:
            while waiting := [turn for turn in turns.values() if turn.waiting]:
                await self._perform(waiting)
        except StorageError as error:
            for turn in turns.values():
                turn.fail(error)
        settled: dict[int, Settled] = {}
        for turn in turns.values():
            settled |= turn.settled
            if turn.seq is not None:
                await self._changes.catch_up(turn.key, turn.group.head.epoch, turn.seq, turn.own)
        settle([settled[index] for index in range(len(operations))])
        self._changes.end(groups)

    async def _perform(self, turns: list[Turn]) -> None:
        """Let the script do what waits, or as much as fits and nobody interferes with."""
        await self._read_updated(turns)
        now_ms = self._clock()
        calls = self._calls(turns, now_ms)
        if not calls:
            return
        asking = [turn for call in calls for turn in call.turns]
        new = [turn.key for turn in asking if turn.puts and turn.key not in self._indexed]
        is_sharded = isinstance(self._client, RedisCluster) and self._client.is_sharded
        publish = "SPUBLISH" if is_sharded else "PUBLISH"
        head = self._settings.asked(now_ms, new_epoch(), publish)
        replies = await self._client.call(
            _script(), [call.arguments(head) for call in calls], self._index_commands(new)
        )
        began: list[Group] = []
        conflicts = 0
        for call, reply in zip(calls, replies, strict=False):
            if isinstance(reply, ResponseError):
                reply = self._client.refused(reply)  # noqa: PLW2901 - from here on alike
            if isinstance(reply, StorageError):
                for turn in call.turns:
                    turn.fail(reply)
                continue
            answer = Answer(reply)
            for turn in call.turns:
                before = turn.conflicts
                if turn.take(answer, self._client.refused) and turn.key not in new:
                    began.append(turn.key)
                conflicts += turn.conflicts - before
                if turn.conflicts > CONFLICTS_MAX:
                    turn.fail(_contended(turn.key))
        self.conflicts_total += conflicts
        self._note_indexed(new)
        await self._index(began)
        if conflicts:
            await asyncio.sleep(random.uniform(0, CONFLICT_WAIT_S_MAX))

    def _calls(self, turns: list[Turn], now_ms: int) -> list[Call]:
        """Share out what waits over calls of the script, as few as may be."""
        calls: list[Call] = []
        open_calls: dict[int, Call] = {}
        for turn in turns:
            asked = turn.ask(now_ms)
            if not turn.steps:
                continue
            place = self._client.place(turn.keys.slot)
            call = open_calls.get(place)
            if call is None or not call.takes(asked):
                call = open_calls[place] = Call()
                calls.append(call)
            call.add(turn, asked)
        return calls

    async def _read_updated(self, turns: Iterable[Turn]) -> None:
        """Bring in the texts that updates start from."""
        wanted = [(turn, items) for turn in turns if (items := turn.updated())]
        if not wanted:
            return
        commands = [("HMGET", turn.keys.data, *items) for turn, items in wanted]
        for (turn, items), texts in zip(wanted, await self._client.each(commands), strict=True):
            if isinstance(texts, StorageError):
                turn.fail(texts)
            elif isinstance(texts, ResponseError):  # the script meets the same
                turn.current = {}
            else:
                turn.current = dict(zip(items, texts, strict=True))

    # The index --------------------------------------------------------------------------------
    #
    # Sets of names, which may name more than there is. A group is entered with the script that
    # begins it, so nothing is missing but what a cut connection or another program left out, and
    # that is found by looking at all keys.

    async def _index(self, groups: list[Group]) -> None:
        """Enter groups that began although they seemed to be there."""
        if groups:
            try:
                await self._client.run(self._index_commands(groups))
            except StorageError:
                return  # they are found by their keys
            self._note_indexed(groups)

    def _note_indexed(self, groups: Iterable[Group]) -> None:
        self._indexed |= dict.fromkeys(groups)
        while len(self._indexed) > INDEXED_MAX:
            self._indexed.popitem(last=False)

    def _returned(self) -> None:
        """Redis is there; nobody knows what it lost."""
        self._indexed.clear()
        self._scan_due_s = 0.0

    def _troubled(self) -> None:
        if self._told is not None:
            self._told(self._client.trouble)

    async def _names(self, index: str) -> list[str]:
        (members,) = await self._client.run([("SMEMBERS", index)])
        if isinstance(members, ResponseError):
            raise self._client.refused(members)
        texts = [member.decode(errors="replace") for member in members]
        return [name for text in texts if (name := decoded(text)) is not None]

    async def _with_items(self, stream: str, group_ids: list[str]) -> list[str]:
        """Those of the groups that have items; others are taken out of the index."""
        groups = [Group(stream, group_id) for group_id in group_ids]
        counts = await self._client.run([("HLEN", self._keys.data_key(g)) for g in groups])
        gone = [group for group, count in zip(groups, counts, strict=True) if count == 0]
        if gone:
            await self._take_out(stream, gone)
        return [
            group_id
            for group_id, count in zip(group_ids, counts, strict=True)
            if isinstance(count, int) and count
        ]

    async def _take_out(self, stream: str, groups: list[Group]) -> None:
        """Take groups out of the index, and the stream if it has no more."""
        index = self._keys.groups_key(stream)
        names = [encoded(group.group_id) for group in groups]
        checks = [("HLEN", self._keys.data_key(group)) for group in groups]
        await self._client.run([("SREM", index, *names)])
        *counts, left = await self._client.run([*checks, ("SCARD", index)])
        # Begun by others meanwhile, who may have entered them before they were taken out.
        came = [group for group, count in zip(groups, counts, strict=True) if count != 0]
        await self._client.run(self._index_commands(came))
        if left == 0 and not came:
            name = encoded(stream)
            await self._client.run([("SREM", self._keys.streams, name)])
            (now,) = await self._client.run([("SCARD", index)])
            if now != 0:
                await self._client.run([("SADD", self._keys.streams, name)])

    def _index_commands(self, groups: Iterable[Group]) -> list[Command]:
        """Enter `groups` in the index."""
        streams: dict[str, list[str]] = {}
        for group in groups:
            streams.setdefault(group.stream, []).append(encoded(group.group_id))
        commands: list[Command] = [
            ("SADD", self._keys.groups_key(stream), *names) for stream, names in streams.items()
        ]
        if streams:
            names = [encoded(stream) for stream in streams]
            commands.append(("SADD", self._keys.streams, *names))
        return commands

    async def _find_others(self) -> None:
        """Enter the groups that other programs made, unless that was done just now."""
        loop = asyncio.get_running_loop()
        async with self._scanning:
            start_s = loop.time()
            if start_s < self._scan_due_s:
                return
            steps = 0
            for server in self._client.servers:
                steps += await self._look_through(server)
            if steps > SCAN_STEPS_FREE:
                now_s = loop.time()
                self._scan_due_s = now_s + SCAN_PAUSE * (now_s - start_s)

    async def _look_through(self, server: RedisClient) -> int:
        """Enter the groups that a server has; the steps that it took."""
        cursor: Reply = 0
        steps = 0
        while True:
            steps += 1
            command = ("SCAN", cursor, "MATCH", self._keys.data_pattern, "COUNT", SCAN_COUNT)
            (reply,) = await server.run([command])
            if isinstance(reply, ResponseError):
                raise self._client.refused(reply)
            cursor, keys = reply
            groups = [self._keys.group_of_data_key(key) for key in keys]
            await self._client.run(self._index_commands(g for g in groups if g is not None))
            if int(cursor) == 0:
                return steps


def _contended(group: Group) -> StorageError:
    message = f"items of group_id {group.group_id[:100]!r} are changed too often; retry later"
    return StorageError("contended", message, retryable=True)


def _nobody(stream: str, group_id: str, change: Change) -> None:
    """Where nobody asks what others do."""


def _nobody_is_told(message: Foreign) -> None:
    """Where nobody asks what other programs say."""


def _nobody_cares(stream: str, group_id: str, epoch: str) -> None:
    """Where nobody was told anything."""
