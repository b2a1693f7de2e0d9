"""Changes that other brokers made, told in the order of each group.

Redis tells every change on a channel of its group, our own ones too. What arrives is told when it
is the next of its group. What is missing, after a lost message or connection, is read from the
history. While an `execute` of our own is under way on a group, what arrives is held: its outcomes
come between what came before and what came after.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
from redis.exceptions import NoPermissionError, RedisError, ResponseError

from broker import logs
from broker.errors import StorageError
from broker.names import Group
from broker.tasks import Tasks
from shards.group import Change
from shards.storage import redis_keys
from shards.storage.redis_client import RedisClient
from shards.storage.redis_cluster import RedisCluster
from shards.storage.redis_foreign import CHANNEL_PATTERN, Foreign, foreign_of
from shards.storage.redis_sharded import ShardedSubscriptions
from shards.storage.redis_turn import change_of

RemoteChange = Callable[[str, str, Change], None]
"""Takes stream, group_id and a change that somebody else made, or that was ours but got lost."""

HELD_MAX = 1000
"""Changes of one group that are held; past it they are read from the history."""
POSITIONS_MAX = 10_000
"""Groups of which the last position is remembered although nobody wants them yet."""
READ_MORE = 16
"""Changes that are read beside those that are missing, as others go on meanwhile."""
SEPARATOR = b"\x1e"
"""Between the envelopes of one message; no JSON text holds it."""
PAGE = 100
"""Groups that are looked at in one pipeline."""
FOREIGN_BYTES_MAX = 2**20
"""Of a message of another program; a larger one is skipped."""
QUIET_S_MAX = 10.0
"""Seconds without a message after which the connection is asked for a sign of life."""
AWAY_S = 0.1
"""Seconds before a lost connection is made again."""

_log = logs.Log("redis")

_Position = tuple[str, int]


class _Watched:
    """A group that is wanted: what was told of it, and what waits to be told."""

    def __init__(self, position: _Position | None) -> None:
        self.epoch, self.seq = position or ("", 0)
        self.is_known = position is not None
        self.busy = False
        self.held: dict[int, tuple[str, Change]] = {}


class RemoteChanges:
    """Subscribes to the groups that are wanted and calls `tell`."""

    def __init__(
        self,
        client: RedisClient | RedisCluster,
        tell: RemoteChange,
        tell_foreign: Callable[[Foreign], None],
        tell_lost: Callable[[str, str, str], None],
    ) -> None:
        self._client = client
        self._tell = tell
        self._tell_foreign = tell_foreign
        self._tell_lost = tell_lost
        self._watched: dict[Group, _Watched] = {}
        self._channels: dict[bytes, Group] = {}
        self._positions: OrderedDict[Group, _Position] = OrderedDict()
        self._missing: set[Group] = set()
        self._pubsub: Any = None
        self._wishes: dict[str, bool] = {}
        self._sending = False
        self._tasks = Tasks()
        self._listener: asyncio.Task[None] | None = None
        self._healing = False
        self._hears_others = True
        self._sharded: ShardedSubscriptions | None = None
        self._cluster = client if isinstance(client, RedisCluster) else None
        if self._cluster is not None:
            self._cluster.on_slots = self._slots_seen
        self._closed = False

    def open(self) -> None:
        """Listen, as soon as Redis is there."""
        self._listener = asyncio.get_running_loop().create_task(self._listen())

    async def close(self) -> None:
        """Tell nothing any more."""
        self._closed = True
        while self._listener is not None and not self._listener.done():
            self._listener.cancel()  # again: one that meets a timeout of the library gets lost
            await asyncio.wait([self._listener], timeout=1)
        if self._sharded is not None:
            await self._sharded.close()
        await self._tasks.wait()

    def interest(self, group: Group, wanted: bool) -> None:
        """Tell the changes of `group` from its last known position on, or stop it."""
        channel = redis_keys.group_keys(group).channel
        if wanted and group not in self._watched:
            self._watched[group] = _Watched(self._positions.get(group))
            self._channels[channel.encode()] = group
        elif not wanted and self._watched.pop(group, None) is not None:
            del self._channels[channel.encode()]
        else:
            return
        if self._sharded is None:
            self._wishes[channel] = wanted
            self._send_soon()
        elif wanted:
            self._sharded.want(channel, redis_keys.group_keys(group).slot)
        else:
            self._sharded.drop(channel)

    def _slots_seen(self) -> None:
        """Listen where the slots are, once and for all by shards where all nodes can."""
        if self._sharded is None and self._cluster is not None and self._cluster.is_sharded:
            self._sharded = ShardedSubscriptions(self._cluster, self._message)
            for group in self._watched:
                keys = redis_keys.group_keys(group)
                self._wishes[keys.channel] = False
                self._sharded.want(keys.channel, keys.slot)
            self._send_soon()
        elif self._sharded is not None:
            self._sharded.assign()

    # Around our own `execute` -----------------------------------------------------------------

    def begin(self, groups: Iterable[Group]) -> None:
        """An `execute` on `groups` is under way until `end`."""
        for group in groups:
            if (watched := self._watched.get(group)) is not None:
                watched.busy = True

    def known(self, group: Group) -> tuple[str, int]:
        """An epoch and the last number in it that was told or settled; "" and 0: none is known."""
        watched = self._watched.get(group)
        if watched is not None and watched.is_known:
            return watched.epoch, watched.seq
        return self._positions.get(group, ("", 0))

    async def catch_up(
        self, group: Group, epoch: str, seq: int, numbers: Callable[[], set[int]]
    ) -> None:
        """Tell what others did up to `seq`, before our own are settled, which have `numbers`.

        Does its best: when Redis is away, whoever counts finds the gap.
        """
        self._positions[group] = epoch, seq
        self._positions.move_to_end(group)
        if len(self._positions) > POSITIONS_MAX:
            self._positions.popitem(last=False)
        watched = self._watched.get(group)
        if watched is None:
            return
        own = numbers()
        if not watched.is_known or watched.epoch != epoch:
            watched.is_known, watched.epoch = True, epoch
            watched.seq = min(own, default=seq + 1) - 1
        missing = [n for n in range(watched.seq + 1, seq + 1) if n not in own]
        if missing:
            found = {n: change for n, (of, change) in watched.held.items() if of == epoch}
            if any(n not in found for n in missing):
                found |= await self._read(group, watched.seq, seq)
            for n in missing:
                if n in found:
                    self._tell(*group, found[n])
        watched.seq = max(watched.seq, seq)

    def end(self, groups: Iterable[Group]) -> None:
        """The `execute` on `groups` is settled."""
        for group in groups:
            if (watched := self._watched.get(group)) is not None:
                watched.busy = False
                held, watched.held = watched.held, {}
                for seq in sorted(held):
                    self._arrived(group, *held[seq])

    # What arrives -----------------------------------------------------------------------------

    def _arrived(self, group: Group, epoch: str, change: Change) -> None:
        watched = self._watched.get(group)
        if watched is None:
            return
        if watched.busy:
            self._hold(watched, epoch, change)
            return
        if not watched.is_known or watched.epoch != epoch:
            watched.is_known, watched.epoch, watched.seq = True, epoch, change.seq - 1
        if change.seq == watched.seq + 1:
            watched.seq = change.seq
            self._tell(*group, change)
        elif change.seq > watched.seq:
            self._hold(watched, epoch, change)
            self._heal_soon(group)

    def _hold(self, watched: _Watched, epoch: str, change: Change) -> None:
        if len(watched.held) < HELD_MAX:
            watched.held[change.seq] = epoch, change

    def _heal_soon(self, group: Group) -> None:
        self._missing.add(group)
        if not self._healing and not self._closed:
            self._healing = True
            self._tasks.start(self._heal())

    async def _heal(self) -> None:
        """Tell what is missing of groups, from their histories."""
        while self._missing and not self._closed:
            groups = [self._missing.pop() for _ in range(min(PAGE, len(self._missing)))]
            try:
                await self._heal_page(groups)
            except StorageError:
                self._missing.update(groups)
                await asyncio.sleep(AWAY_S)
        self._healing = False

    async def _heal_page(self, groups: list[Group]) -> None:
        heads = await self._client.run(
            [("HMGET", redis_keys.group_keys(group).head, "epoch", "seq") for group in groups]
        )
        for group, head in zip(groups, heads, strict=True):
            watched = self._watched.get(group)
            if watched is None or isinstance(head, ResponseError) or head[0] is None:
                continue
            epoch, seq = head[0].decode(), int(head[1])
            if not watched.is_known:
                watched.is_known, watched.epoch, watched.seq = True, epoch, seq
                continue
            if watched.epoch == epoch and seq < watched.seq and not watched.busy:
                self._tell_lost(*group, epoch)
                continue
            since = watched.seq if watched.epoch == epoch else seq - 1
            if since >= seq:
                continue
            found = await self._read(group, since, seq)
            if not watched.busy:
                held, watched.held = watched.held, {}
                found |= {n: change for n, (of, change) in held.items() if of == epoch}
            for n in sorted(found):
                if n > watched.seq + 1 and not watched.busy:  # no more kept: a gap, told as one
                    watched.seq = n - 1
                self._arrived(group, epoch, found[n])

    async def _read(self, group: Group, since: int, seq: int) -> dict[int, Change]:
        """The changes after `since`, which are up to `seq` at least, that are kept; by number."""
        key = redis_keys.group_keys(group).history
        count = seq - since + READ_MORE
        while True:
            try:
                (envelopes,) = await self._client.run([("LRANGE", key, -count, -1)])
                changes = [change_of(envelope) for envelope in envelopes]
            except (StorageError, TypeError, msgspec.DecodeError):
                return {}
            if len(changes) < count or changes[0].seq <= since + 1:
                return {change.seq: change for change in changes if change.seq > since}
            count *= 4  # others go on

    # The connection ---------------------------------------------------------------------------

    async def _listen(self) -> None:
        while True:
            while not self._client.is_up:
                await asyncio.sleep(AWAY_S)
            try:
                pubsub = self._client.pubsub()
            except RedisError:
                continue  # it went away this moment
            try:
                self._wishes.clear()
                # The first is told nothing on: the connection has to be there before it is needed.
                channels = self._channels if self._sharded is None else ()
                await pubsub.subscribe(redis_keys.STREAMS_KEY, *channels)
                if self._hears_others:
                    await pubsub.psubscribe(CHANNEL_PATTERN)
                self._pubsub = pubsub
                self._send_soon()
                await self._receive(pubsub)
            except (RedisError, OSError) as error:
                _log.warning("redis_changes_lost", address=self._client.address, reason=error)
                if isinstance(error, NoPermissionError):  # the least that can be done without
                    self._hears_others = False
            finally:
                self._pubsub = None
                await pubsub.aclose()
            await asyncio.sleep(AWAY_S)

    async def _receive(self, pubsub: Any) -> None:
        is_asked = False
        while True:
            message = await pubsub.get_message(timeout=QUIET_S_MAX)
            if message is not None:
                is_asked = False
                self._message(message)
            elif is_asked:
                raise OSError("no sign of life from the connection for changes")
            else:
                is_asked = True
                await pubsub.ping()

    def _message(self, message: dict[str, Any]) -> None:
        if message["type"] == "pmessage":
            foreign = foreign_of(message["data"], FOREIGN_BYTES_MAX)
            if foreign is not None and Group(foreign.stream, foreign.group_id) in self._watched:
                self._tell_foreign(foreign)
            return
        group = self._channels.get(message["channel"] or b"")
        if group is None:
            return
        if message["type"] in ("subscribe", "ssubscribe"):  # what came before may be missing
            self._heal_soon(group)
        elif message["type"] in ("message", "smessage"):
            try:
                epoch, envelopes = message["data"].split(b" ", 1)
                for envelope in envelopes.split(SEPARATOR):
                    self._arrived(group, epoch.decode(), change_of(envelope))
            except (ValueError, msgspec.DecodeError):
                return  # not one of ours

    def _send_soon(self) -> None:
        if self._wishes and self._pubsub is not None and not self._sending:
            self._sending = True
            self._tasks.start(self._send())

    async def _send(self) -> None:
        """Subscribe to what came to be wanted, and the other way round."""
        try:
            while self._wishes and (pubsub := self._pubsub) is not None:
                wishes, self._wishes = self._wishes, {}
                for is_wanted, send in ((False, pubsub.unsubscribe), (True, pubsub.subscribe)):
                    channels = [name for name, wanted in wishes.items() if wanted is is_wanted]
                    if channels:
                        await send(*channels)
        except (RedisError, OSError):
            return  # whoever reads meets the same, and subscribes to all
        finally:
            self._sending = False
