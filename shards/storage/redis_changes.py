"""Changes that other brokers made, told in the order of each group.

Redis tells every change on a channel of its group, our own ones too. What arrives is told when it
is the next of its group. What is missing, after a lost message or connection, is read from the
history. While an `execute` of our own is under way on a group, what arrives is held: its outcomes
come between what came before and what came after.

Of a stream that triggers want all groups are told, from the moment at which its channel is
subscribed to. What comes first of a group is the first since then; for one that we change first,
what others changed before comes ahead of our own. After a lost connection the groups that were
seen go on from where they were; of others what is newer than the subscription is told.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

import msgspec
from redis.exceptions import NoPermissionError, RedisError, ResponseError

from broker import logs
from broker.clock import Clock
from broker.errors import StorageError
from broker.names import Group
from broker.redis_client import RETRY_S_MAX, RedisClient
from broker.redis_cluster import RedisCluster
from broker.tasks import Tasks
from shards.group import Change
from shards.storage.redis_foreign import Foreign, foreign_of
from shards.storage.redis_keys import RedisKeys, decoded
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
NEW_MAX = 1000
"""Changes that are read of a group that was not seen, at most."""
QUIET_S_MAX = 10.0
"""Seconds without a message after which the connection is asked for a sign of life."""
TRACKED_MAX = 100_000
"""Groups that are followed for triggers; the longest quiet ones are forgotten."""
BARRIER_S_MAX = 0.3
"""Seconds that what was told before has to arrive; else it is looked for in the history."""
SKEW_MS_MAX = 2000
"""That brokers' clocks may differ. It decides only what is new in a group that was not seen since
its stream was subscribed to, after a lost connection."""
AWAY_S = 0.1
"""Seconds before a lost connection is made again, or what was refused is asked again."""
RETRIED_MAX = 10_000
"""Groups that are asked again at a time; attempts are `RETRY_S_MAX` apart, as trouble lasts."""

_log = logs.Log("redis")

_Position = tuple[str, int]


class _Watched:
    """A group that is wanted: what was told of it, and what waits to be told."""

    def __init__(self, position: _Position | None, is_wanted: bool = True) -> None:
        self.epoch, self.seq = position or ("", 0)
        self.is_known = position is not None
        self.is_wanted = is_wanted  # for itself, not only because its stream is
        self.awaited: asyncio.Future[None] | None = None  # the next that is held
        self.is_doubtful = False  # whether changes may be missing before the first that comes
        self.busy = False
        self.held: dict[int, tuple[str, Change]] = {}


class _Stream:
    """A stream that triggers want."""

    def __init__(self) -> None:
        self.since_ms: int | None = None  # when its channel was first subscribed to
        self.lost_ms = 0  # when the connection was lost last
        self.is_subscribed = False
        self.is_healing = False

    @property
    def is_in_doubt(self) -> bool:
        """Whether changes may be missing of groups that were not seen yet."""
        return self.since_ms is not None and (self.is_healing or not self.is_subscribed)


class RemoteChanges:
    """Subscribes to the groups and streams that are wanted and calls `tell`.

    Args:
        owns: which groups of a stream are wanted.
    """

    def __init__(
        self,
        client: RedisClient | RedisCluster,
        keys: RedisKeys,
        *,
        tell: RemoteChange,
        tell_foreign: Callable[[Foreign], None],
        tell_lost: Callable[[str, str, str], None],
        clock: Clock,
        owns: Callable[[Group], bool],
    ) -> None:
        self._client = client
        self._keys = keys
        self._events = keys.events.encode()
        self._echo_channel = keys.echo_channel(secrets.token_hex(8))
        self._echo = self._echo_channel.encode()
        self._tell = tell
        self._tell_foreign = tell_foreign
        self._tell_lost = tell_lost
        self._clock = clock
        self._owns = owns
        self._streams: dict[str, _Stream] = {}
        self._stream_channels: dict[bytes, str] = {}
        self._tracked: OrderedDict[Group, None] = OrderedDict()
        self._forgotten_ms = 0
        self._pongs: dict[bytes, asyncio.Future[None]] = {}
        self._pings = 0
        self.lost_total = 0
        self._watched: dict[Group, _Watched] = {}
        self._channels: dict[bytes, Group] = {}
        self._positions: OrderedDict[Group, _Position] = OrderedDict()
        self._missing: set[Group] = set()
        self._refused: dict[Group, None] = {}  # missing too, but Redis did not let us look
        self._retry: asyncio.TimerHandle | None = None
        self._retry_s = AWAY_S
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
        if self._retry is not None:
            self._retry.cancel()
        while self._listener is not None and not self._listener.done():
            self._listener.cancel()  # again: one that meets a timeout of the library gets lost
            await asyncio.wait([self._listener], timeout=1)
        if self._sharded is not None:
            await self._sharded.close()
        await self._tasks.wait()

    @property
    def refused(self) -> int:
        """Groups of which Redis refuses to tell what was missed."""
        return len(self._refused)

    def interest(self, group: Group, wanted: bool) -> None:
        """Tell the changes of `group` from its last known position on, or stop it."""
        channel = self._keys.group_keys(group).channel
        if wanted == (channel.encode() in self._channels):
            return
        watched = self._watched.get(group)
        if wanted:
            if watched is None:
                self._watched[group] = _Watched(self._positions.get(group))
            else:
                watched.is_wanted = True
                self._tracked.pop(group, None)
            self._channels[channel.encode()] = group
        else:
            assert watched is not None, "as long as there is its channel"
            watched.is_wanted = False
            if group.stream in self._streams:
                self._tracked[group] = None
            else:
                del self._watched[group]
            del self._channels[channel.encode()]
        if self._sharded is None:
            self._wish(channel, wanted)
        elif wanted:
            self._sharded.want(channel, self._keys.group_keys(group).slot)
        else:
            self._sharded.drop(channel)

    def interest_stream(self, stream: str, wanted: bool) -> None:
        """Tell the changes of all groups of `stream` that are ours from now on, or stop it."""
        if wanted == (stream in self._streams):
            return
        channel = self._keys.stream_channel(stream)
        if wanted:
            self._streams[stream] = _Stream()
            self._stream_channels[channel.encode()] = stream
        else:
            del self._streams[stream]
            del self._stream_channels[channel.encode()]
            for group in [group for group in self._tracked if group.stream == stream]:
                del self._tracked[group]
                del self._watched[group]
        self._wish(channel, wanted)

    def _wish(self, channel: str, wanted: bool) -> None:
        self._wishes[channel] = wanted
        self._send_soon()

    def _slots_seen(self) -> None:
        """Listen where the slots are, once and for all by shards where all nodes can."""
        if self._sharded is None and self._cluster is not None and self._cluster.is_sharded:
            self._sharded = ShardedSubscriptions(self._cluster, self._message)
            for group in self._channels.values():
                keys = self._keys.group_keys(group)
                self._wishes[keys.channel] = False
                self._sharded.want(keys.channel, keys.slot)
            self._send_soon()
        elif self._sharded is not None:
            self._sharded.assign()

    def _find(self, group: Group) -> _Watched | None:
        """The group, if it is wanted."""
        watched = self._watched.get(group)
        if watched is None and group.stream in self._streams and self._owns(group):
            watched = self._watched[group] = _Watched(None, is_wanted=False)
            self._tracked[group] = None
            if len(self._tracked) > TRACKED_MAX:
                self._forget_quiet()
        elif watched is not None and not watched.is_wanted:
            self._tracked.move_to_end(group)
        return watched

    def _forget_quiet(self) -> None:
        group = next(iter(self._tracked))
        watched = self._watched[group]
        if watched.busy or watched.held:
            self._tracked.move_to_end(group)
        else:
            del self._tracked[group]
            del self._watched[group]
            self._forgotten_ms = self._clock()

    # Around our own `execute` -----------------------------------------------------------------

    def begin(self, groups: Iterable[Group]) -> None:
        """An `execute` on `groups` is under way until `end`."""
        for group in groups:
            if (watched := self._find(group)) is not None:
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
            await self._find_position(group, watched, epoch, seq, own)
        missing = [n for n in range(watched.seq + 1, seq + 1) if n not in own]
        if missing:
            found = {n: change for n, (of, change) in watched.held.items() if of == epoch}
            if any(n not in found for n in missing):
                with suppress(StorageError):
                    found |= await self._read(group, watched.seq, seq)
            for n in missing:
                if n in found:
                    self._tell(*group, found[n])
        watched.seq = max(watched.seq, seq)

    async def _find_position(
        self, group: Group, watched: _Watched, epoch: str, seq: int, own: set[int]
    ) -> None:
        """Up to where a group was told of which nothing was told yet."""
        stream = self._streams.get(group.stream)
        first = min(own, default=seq + 1)
        if stream is not None and stream.since_ms is not None:
            is_doubtful = stream.is_in_doubt or watched.is_doubtful
            if is_doubtful or not await self._heard_before(group, watched, epoch, own):
                with suppress(StorageError):
                    await self._find_new([group])
                if watched.is_known and watched.epoch == epoch:
                    return
            first = min([first, *(n for n, (of, _) in watched.held.items() if of == epoch)])
        watched.is_known, watched.epoch, watched.seq = True, epoch, first - 1

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
        watched = self._find(group)
        if watched is None:
            return
        if watched.busy:
            self._hold(watched, epoch, change)
            return
        if not watched.is_known and not watched.is_wanted:
            watched.is_doubtful |= self._streams[group.stream].is_in_doubt
            if watched.is_doubtful:
                self._hold(watched, epoch, change)
                self._heal_soon(group)
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
        if watched.awaited is not None and not watched.awaited.done():
            watched.awaited.set_result(None)

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
        if not self._refused:
            self._retry_s = AWAY_S

    def _heal_later(self, group: Group, error: StorageError) -> None:
        """Look once more for what is missing of a group, as Redis refused to tell.

        As long as somebody wants the group: what keeps Redis from it may pass at any time.
        """
        if not self._refused and self._retry_s == AWAY_S:
            _log.warning("redis_refuses_changes", **group._asdict(), reason=error.message)
        self._refused[group] = None
        self._retry_soon()

    def _retry_soon(self) -> None:
        if self._refused and self._retry is None and not self._closed:
            loop = asyncio.get_running_loop()
            self._retry = loop.call_later(self._retry_s, self._retry_refused)

    def _retry_refused(self) -> None:
        self._retry = None
        self._retry_s = min(2 * self._retry_s, RETRY_S_MAX)
        for group in list(islice(self._refused, RETRIED_MAX)):
            del self._refused[group]
            self._heal_soon(group)
        self._retry_soon()

    async def _heal_page(self, groups: list[Group]) -> None:
        heads = await self._client.run(
            [("HMGET", self._keys.group_keys(group).head, "epoch", "seq") for group in groups]
        )
        for group, head in zip(groups, heads, strict=True):
            watched = self._watched.get(group)
            if watched is None:
                continue
            if isinstance(head, ResponseError):
                self._heal_later(group, self._client.refused(head))
            elif head[0] is not None:
                try:
                    await self._heal_group(group, watched, head[0].decode(), int(head[1]))
                except StorageError as error:
                    self._heal_later(group, error)

    async def _heal_group(self, group: Group, watched: _Watched, epoch: str, seq: int) -> None:
        stream = self._streams.get(group.stream)
        if not watched.is_known and stream is not None and not watched.is_wanted:
            await self._find_new([group])
            if not watched.is_known:
                return
        elif not watched.is_known:
            watched.is_known, watched.epoch, watched.seq = True, epoch, seq
            return
        if watched.epoch == epoch and seq < watched.seq and not watched.busy:
            self._tell_lost(*group, epoch)
            return
        since = watched.seq if watched.epoch == epoch else seq - 1
        if since >= seq:
            return
        found = await self._read(group, since, seq)
        if not watched.busy:
            held, watched.held = watched.held, {}
            found |= {n: change for n, (of, change) in held.items() if of == epoch}
        for n in sorted(found):
            if n > watched.seq + 1 and not watched.busy:  # no more kept: a gap, told as one
                self.lost_total += n - watched.seq - 1
                watched.seq = n - 1
            self._arrived(group, epoch, found[n])

    async def _read(self, group: Group, since: int, seq: int) -> dict[int, Change]:
        """The changes after `since`, which are up to `seq` at least, that are kept; by number.

        Raises:
            StorageError: Redis is away, or may tell later.
        """
        key = self._keys.group_keys(group).history
        count = seq - since + READ_MORE
        while True:
            (envelopes,) = await self._client.run([("LRANGE", key, -count, -1)])
            if isinstance(envelopes, ResponseError):
                self._raise_passing(envelopes)
                return {}
            try:
                changes = [change_of(envelope) for envelope in envelopes]
            except msgspec.DecodeError:
                return {}
            if len(changes) < count or changes[0].seq <= since + 1:
                return {change.seq: change for change in changes if change.seq > since}
            count *= 4  # others go on

    def _raise_passing(self, reply: ResponseError) -> None:
        """Raise the error for `reply`, if the same may be answered later."""
        error = self._client.refused(reply)
        if error.retryable:
            raise error

    # Streams after a lost connection ----------------------------------------------------------

    async def _heal_stream(self, name: str, stream: _Stream) -> None:
        """Tell what is missing of a stream's groups; of those that were not seen what is new."""
        for group, watched in list(self._watched.items()):
            if group.stream == name:
                watched.is_doubtful = not watched.is_known
                self._heal_soon(group)
        while self._streams.get(name) is stream and not self._closed:
            try:
                (members,) = await self._client.run([("SMEMBERS", self._keys.groups_key(name))])
                if isinstance(members, ResponseError):
                    self._raise_passing(members)
                    break
                names = [decoded(text.decode(errors="replace")) for text in members]
                groups = [Group(name, group_id) for group_id in names if group_id is not None]
                unseen = [g for g in groups if g not in self._watched and self._owns(g)]
                for start in range(0, len(unseen), PAGE):
                    await self._find_new(unseen[start : start + PAGE])
            except StorageError:
                await asyncio.sleep(AWAY_S)
            else:
                break
        stream.is_healing = False

    async def _find_new(self, groups: Sequence[Group]) -> None:
        """Of groups of streams that triggers want, and of which nothing was told: where what is
        new begins. What is new is told afterwards.

        Raises:
            StorageError: Redis is away, or may tell later of one of the groups.
        """
        keys = [self._keys.group_keys(group) for group in groups]
        heads = await self._client.run([("HMGET", k.head, "epoch", "seq", "time") for k in keys])
        trouble: StorageError | None = None
        for group, head in zip(groups, heads, strict=True):
            stream = self._streams.get(group.stream)
            if stream is None or stream.since_ms is None:
                continue
            if isinstance(head, ResponseError):
                error = self._client.refused(head)
                trouble = error if error.retryable else trouble
                continue
            if head[0] is None:
                continue
            # Nothing came between the subscription and the loss: any moment between them will do.
            between = (stream.lost_ms - stream.since_ms) // 2
            since_ms = stream.since_ms + max(0, min(SKEW_MS_MAX, between))
            since_ms = max(since_ms, self._forgotten_ms)
            epoch, seq, time_ms = head[0].decode(), int(head[1]), int(head[2] or 0)
            found = self._watched.get(group)
            if time_ms <= since_ms and found is None:
                continue
            first = seq + 1
            if time_ms > since_ms:
                try:
                    kept = await self._read(group, max(0, seq - NEW_MAX), seq)
                except StorageError as error:
                    trouble = error
                    continue
                first = min(
                    (n for n, c in kept.items() if c.timestamp_ms > since_ms), default=first
                )
            watched = self._find(group)
            if watched is None or watched.is_known:
                continue
            watched.is_known, watched.epoch, watched.seq = True, epoch, first - 1
            if not watched.busy:
                self._heal_soon(group)
        if trouble is not None:
            raise trouble

    async def _heard_before(
        self, group: Group, watched: _Watched, epoch: str, own: set[int]
    ) -> bool:
        """Return when all has arrived that others changed before the changes `own`; False when
        nobody can say. Our own come the same way, right behind it; where there are none, what
        comes before the answer to a ping will do. In a cluster our own may have come from their
        node by sharded pub/sub, which is another way."""
        if not own or self._cluster is not None:
            return await self._barrier(group)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(BARRIER_S_MAX):
                while not any(watched.held.get(n, ("",))[0] == epoch for n in own):
                    watched.awaited = loop.create_future()
                    await watched.awaited
        except TimeoutError:
            return False
        finally:
            watched.awaited = None
        return True

    async def _barrier(self, group: Group) -> bool:
        """Return when all that Redis told of `group` before has arrived; False when nobody can
        say."""
        pubsub = self._pubsub
        if pubsub is None:
            return False
        node: RedisClient | None = None
        if self._cluster is not None:
            node = self._cluster.server_of(self._keys.group_keys(group).slot)
            if node is None:
                return False
        self._pings += 1
        name = b"%d" % self._pings
        pong = self._pongs[name] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(BARRIER_S_MAX):
                if node is None:
                    await pubsub.ping(name)
                else:  # by the node that tells of the group: nodes tell one another in order
                    await node.run([("PUBLISH", self._echo_channel, name)])
                await pong
        except (RedisError, OSError, TimeoutError, AttributeError, StorageError):
            # AttributeError: from the library, whose reader loses the connection this moment.
            return False
        finally:
            del self._pongs[name]
        return self._pubsub is pubsub

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
                if self._cluster is not None:
                    channels = (self._echo_channel, *channels)
                await pubsub.subscribe(self._keys.present, *channels, *self._stream_channels)
                if self._hears_others:  # both at once: the script compares how many there are
                    await pubsub.subscribe(self._keys.events, self._keys.listeners)
                self._pubsub = pubsub
                self._send_soon()
                await self._receive(pubsub)
            except (RedisError, OSError) as error:
                _log.warning("redis_changes_lost", address=self._client.address, reason=error)
                if isinstance(error, NoPermissionError):  # the least that can be done without
                    self._hears_others = False
            finally:
                self._pubsub = None
                for stream in self._streams.values():
                    if stream.is_subscribed:
                        stream.is_subscribed, stream.lost_ms = False, self._clock()
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
        channel = message["channel"] or b""
        if message["type"] == "message" and channel == self._events:
            foreign = foreign_of(message["data"], FOREIGN_BYTES_MAX)
            if foreign is not None and Group(foreign.stream, foreign.group_id) in self._watched:
                self._tell_foreign(foreign)
            return
        if message["type"] == "pong" or channel == self._echo:
            pong = self._pongs.get(message["data"])
            if pong is not None and not pong.done():
                pong.set_result(None)
            return
        if (name := self._stream_channels.get(channel)) is not None:
            self._stream_message(name, message)
            return
        group = self._channels.get(channel)
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

    def _stream_message(self, name: str, message: dict[str, Any]) -> None:
        stream = self._streams[name]
        if message["type"] == "subscribe":
            stream.is_subscribed = True
            if stream.since_ms is None:
                stream.since_ms = self._clock()
            elif not stream.is_healing:
                stream.is_healing = True
                self._tasks.start(self._heal_stream(name, stream))
        elif message["type"] == "message":
            try:
                epoch, seq, group_id, envelopes = message["data"].split(b":", 3)
                plain_id = decoded(group_id.decode())
                if plain_id is None:
                    return
                group = Group(name, plain_id)
                watched = self._watched.get(group)
                if (
                    watched is not None
                    and watched.is_known
                    and watched.epoch == epoch.decode()
                    and int(seq) <= watched.seq
                ):
                    return  # our own, mostly
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
        except (RedisError, OSError, AttributeError):  # the last as in `_barrier`
            return  # whoever reads meets the same, and subscribes to all
        finally:
            self._sending = False
