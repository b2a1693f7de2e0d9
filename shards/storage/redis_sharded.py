"""Sharded pub/sub of a Redis Cluster: each channel is heard from the node that has its slot.

When a slot moves, its node ends the subscription; the channel is then wanted from the node that has
it, as soon as that is known.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from redis.exceptions import RedisError

from broker import logs
from broker.redis_client import RedisClient
from broker.redis_cluster import RedisCluster

QUIET_S_MAX = 10.0
"""Seconds without a message after which a connection is asked for a sign of life."""
AWAY_S = 0.1
"""Seconds before a lost connection is made again."""

_log = logs.Log("redis")

_Heard = Callable[[dict[str, Any]], None]


class ShardedSubscriptions:
    """Channels that are wanted, and the connections to the nodes that have them."""

    def __init__(self, cluster: RedisCluster, heard: _Heard) -> None:
        self._cluster = cluster
        self._heard = heard
        self._slots: dict[str, int] = {}
        self._links: dict[RedisClient, _Link] = {}
        self._at: dict[str, _Link] = {}

    def want(self, channel: str, slot: int) -> None:
        """Hear `channel`, which hashes to `slot`."""
        self._slots[channel] = slot
        self._assign(channel)

    def drop(self, channel: str) -> None:
        """Hear it no more."""
        if self._slots.pop(channel, None) is not None and channel in self._at:
            self._at.pop(channel).drop(channel)

    def assign(self) -> None:
        """Hear each channel from where it is now."""
        for channel in self._slots:
            self._assign(channel)
        masters = set(self._cluster.servers)
        for server, link in list(self._links.items()):
            if server not in masters and not link.channels:
                link.stop()
                del self._links[server]

    async def close(self) -> None:
        """Hear nothing any more."""
        for link in self._links.values():
            await link.close()

    def _assign(self, channel: str) -> None:
        server = self._cluster.server_of(self._slots[channel])
        before = self._at.get(channel)
        if server is None:
            return  # told again when it is known
        link = self._links.get(server)
        if link is None:
            link = self._links[server] = _Link(server, self._heard, self._cluster.look_again)
        if before is not None and before is not link:
            before.drop(channel)
        self._at[channel] = link
        link.want(channel)


class _Link:
    """The channels of one node, on one connection."""

    def __init__(self, server: RedisClient, heard: _Heard, moved: Callable[[], None]) -> None:
        self._server = server
        self._heard = heard
        self._moved = moved
        self.channels: set[str] = set()
        self._asked: set[str] = set()
        self._pubsub: Any = None
        self._changed = asyncio.Event()
        self._closed = False
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._listen()), loop.create_task(self._ask())]

    def want(self, channel: str) -> None:
        self.channels.add(channel)
        if channel not in self._asked:
            self._changed.set()

    def drop(self, channel: str) -> None:
        self.channels.discard(channel)
        self._changed.set()

    def stop(self) -> None:
        self._closed = True
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        while left := [task for task in self._tasks if not task.done()]:
            self.stop()  # again: a cancellation that meets a timeout of the library gets lost
            await asyncio.wait(left, timeout=1)

    async def _listen(self) -> None:
        while not self._closed:
            if not self._server.is_up:
                await asyncio.sleep(AWAY_S)
                continue
            pubsub = self._server.pubsub()
            try:
                self._asked.clear()
                # A channel of a slot that the node has, so that there is a connection.
                await pubsub.ssubscribe(self._server.probe_key)
                self._pubsub = pubsub
                self._changed.set()
                await self._receive(pubsub)
            except (RedisError, OSError) as error:
                _log.warning("redis_changes_lost", address=self._server.address, reason=error)
                self._moved()
            finally:
                self._pubsub = None
                await pubsub.aclose()
            await asyncio.sleep(AWAY_S)

    async def _receive(self, pubsub: Any) -> None:
        is_asked = False
        while not self._closed:
            message = await pubsub.get_message(timeout=QUIET_S_MAX)
            if message is None:
                if is_asked:
                    raise OSError("no sign of life from the connection for changes")
                is_asked = True
                await pubsub.ping()
                continue
            is_asked = False
            if message["type"] == "sunsubscribe":
                channel = (message["channel"] or b"").decode()
                if channel in self._asked:  # the node did, as the slot moves
                    self._asked.discard(channel)
                    self._moved()
            else:
                self._heard(message)

    async def _ask(self) -> None:
        """Subscribe to what came to be wanted, and the other way round."""
        while not self._closed:
            await self._changed.wait()
            self._changed.clear()
            pubsub = self._pubsub
            if pubsub is None:
                continue  # whoever connects says so
            try:
                for channel in self.channels - self._asked:  # one by one: slots differ
                    self._asked.add(channel)
                    await pubsub.ssubscribe(channel)
                for channel in self._asked - self.channels:
                    self._asked.discard(channel)
                    await pubsub.sunsubscribe(channel)
            except (RedisError, OSError):
                continue  # whoever reads meets the same, and subscribes to all
