"""Links between gateways of different brokers that share a Redis.

Each gateway has a Redis stream that it alone reads, a field in a hash that tells who there is, and
a key that expires when it dies. All commands have one key: they work on a Redis Cluster.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from redis.exceptions import ResponseError

from broker import logs
from broker.errors import StorageError
from broker.redis_client import Command
from broker.redis_cluster import client_of
from gateway.peer_sessions import Sessions
from gateway.peers import Peers

TICK_S = 1.0
ALIVE_MS = 5000
"""Of the key that tells that a gateway is alive, after it was last renewed."""
INBOX_MS = 60_000
"""Of a stream that nobody renews any more."""
INBOX_MAX = 100_000
"""Frames of a stream, about; its reader takes out what it has read."""
READ_MAX = 256
BLOCK_MS = 1000
"""That one read waits for a frame: less than a call to Redis may take."""
FORGET_S = 60.0
"""Seconds after which a gateway that is not alive is taken out of the hash."""
GATEWAYS_MAX = 1024
KNOWN_S_MAX = 10.0
"""Seconds for which joins wait, at the start, for gateways that are found but can't be linked."""
AWAY_S = 0.1

_log = logs.Log("peers")


class _Place(msgspec.Struct):
    broker_id: str
    index: int
    version: int


class RedisPeers:
    """Finds the gateways of other brokers and keeps links to them.

    Args:
        key_prefix: what all keys begin with; brokers with another one are not found.
    """

    def __init__(
        self, url: str, peers: Peers, queue_bytes_max: int, *, key_prefix: str = ""
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._peers = peers
        self._me = peers.me
        self._client = client_of(url, self._returned, _untold, key_prefix=key_prefix)
        self._sessions = Sessions(peers, self._post, self._loop.call_soon, queue_bytes_max)
        self._outbox: list[tuple[str, bytes]] = []
        self._posted = asyncio.Event()
        self._wake = asyncio.Event()
        self._prefix = key_prefix
        self._gateways_key = f"{key_prefix}broker:gateways"  # hash: id of a gateway to its `_Place`
        self._inbox = self._inbox_key(self._me.gateway_id)
        self._reading = ("COUNT", READ_MAX, "BLOCK", BLOCK_MS, "STREAMS", self._inbox)
        self._last_id = "0"
        self._missing_since: dict[str, float] = {}
        self._mismatched: set[str] = set()
        self._present: set[str] | None = None
        self._began_at: float | None = None

    @property
    def is_blind(self) -> bool:
        """Whether Redis is away, so that nothing is known of other brokers."""
        return not self._client.is_up

    @property
    def settled(self) -> bool:
        """Whether all that were found are linked and have told what there is, or Redis is away."""
        return self._present is not None and (
            self._sessions.linked(self._present) and self._peers.all_announced
        )

    async def known(self) -> None:
        """Return when Redis was there, and all that were found have told what there is."""
        while True:
            if self._began_at is not None:
                if self.settled:
                    return
                if self._loop.time() - self._began_at > KNOWN_S_MAX:
                    _log.warning("peers_not_linked", found=len(self._present or ()))
                    return
            await asyncio.sleep(AWAY_S)

    async def run(self) -> None:
        """Keep the links until cancelled."""
        await self._client.open()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._tick())
            tasks.create_task(self._read())
            tasks.create_task(self._write())

    async def close(self) -> None:
        """Take this gateway out, when what was sent is with Redis; `run` is cancelled."""
        me = self._me.gateway_id
        try:
            await self._write_once()
            await self._client.run(
                [
                    ("HDEL", self._gateways_key, me),
                    ("DEL", self._alive_key(me)),
                    ("DEL", self._inbox),
                ]
            )
        except StorageError:
            pass  # it expires
        await self._client.close()

    def _returned(self) -> None:
        self._wake.set()

    async def _tick(self) -> None:
        while True:
            try:
                await self._renew()
            except StorageError as error:
                self._sessions.lose_all(error.message)
                self._present = set() if self._present is None else self._present
            self._wake.clear()
            try:
                async with asyncio.timeout(TICK_S):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _renew(self) -> None:
        """Say that this gateway is alive, and see who else is.

        Raises:
            StorageError: Redis is away.
        """
        me = self._me.gateway_id
        place = _Place(self._me.broker_id, self._me.index, self._me.version)
        replies = await self._client.run(
            [
                ("PEXPIRE", self._inbox, INBOX_MS),
                ("SET", self._alive_key(me), 1, "PX", ALIVE_MS),
                ("HSET", self._gateways_key, me, msgspec.json.encode(place)),
                ("HGETALL", self._gateways_key),
            ]
        )
        self._check(*replies)
        kept, *_, places = replies
        if not kept:  # at first, or Redis lost it: frames may be lost, which their links notice
            self._last_id = "0"
            await self._client.run(
                [("XADD", self._inbox, "*", "f", b""), ("PEXPIRE", self._inbox, INBOX_MS)]
            )
        others = self._others(places)
        alive = await self._client.run([("EXISTS", self._alive_key(other)) for other in others])
        self._check(*alive)
        present = {other for other, there in zip(others, alive, strict=True) if there}
        await self._forget_dead([other for other in others if other not in present])
        self._present = present
        self._began_at = self._loop.time() if self._began_at is None else self._began_at
        self._sessions.tick(present, self._loop.time())

    def _others(self, places: Any) -> list[str]:
        """Ids of the gateways of other brokers that speak as we do."""
        pairs = _pairs(places)
        found: list[str] = []
        for key, text in pairs:
            gateway_id = bytes(key).decode(errors="replace")
            try:
                place = msgspec.json.decode(text, type=_Place)
            except msgspec.DecodeError:
                continue
            if place.broker_id == self._me.broker_id or len(found) >= GATEWAYS_MAX:
                continue
            if place.version != self._me.version:
                if gateway_id not in self._mismatched:
                    self._mismatched.add(gateway_id)
                    _log.error("peer_mismatched", peer=gateway_id, version=place.version)
                continue
            found.append(gateway_id)
        self._mismatched &= {bytes(key).decode(errors="replace") for key, _ in pairs}
        return found

    async def _forget_dead(self, dead: list[str]) -> None:
        now = self._loop.time()
        self._missing_since = {other: self._missing_since.get(other, now) for other in dead}
        gone = [other for other, since in self._missing_since.items() if now - since > FORGET_S]
        if gone:
            await self._client.run([("HDEL", self._gateways_key, other) for other in gone])

    async def _read(self) -> None:
        while True:
            try:
                _, reply = await self._client.run(
                    [
                        ("XTRIM", self._inbox, "MINID", self._last_id),
                        ("XREAD", *self._reading, self._last_id),
                    ]
                )
                self._check(reply)
            except StorageError as error:
                self._sessions.lose_all(error.message)
                await asyncio.sleep(AWAY_S)
                continue
            for entry_id, fields in _entries(reply):
                self._last_id = entry_id
                if data := fields.get(b"f"):
                    self._sessions.received(data, self._loop.time())

    def _post(self, target: str, data: bytes) -> None:
        self._outbox.append((target, data))
        self._posted.set()

    async def _write(self) -> None:
        while True:
            await self._posted.wait()
            try:
                await self._write_once()
            except StorageError as error:
                self._sessions.lose_all(error.message)

    async def _write_once(self) -> None:
        """Add what was posted to the streams, in order.

        Raises:
            StorageError: nothing is known of what was added.
        """
        self._posted.clear()
        outbox, self._outbox = self._outbox, []
        commands: list[Command] = [
            (
                "XADD",
                self._inbox_key(target),
                "NOMKSTREAM",
                "MAXLEN",
                "~",
                INBOX_MAX,
                "*",
                "f",
                data,
            )
            for target, data in outbox
        ]
        for (target, _), reply in zip(outbox, await self._client.run(commands), strict=True):
            if reply is None or isinstance(reply, ResponseError):
                self._sessions.lose_target(target, str(reply or "it is gone"))

    def _inbox_key(self, gateway_id: str) -> str:
        """Of the stream that a gateway reads."""
        return f"{self._prefix}broker:inbox:{gateway_id}"

    def _alive_key(self, gateway_id: str) -> str:
        """Of what expires when a gateway dies."""
        return f"{self._prefix}broker:gateway:{gateway_id}"

    def _check(self, *replies: Any) -> None:
        """Raises: StorageError when Redis refused a command."""
        for reply in replies:
            if isinstance(reply, ResponseError):
                raise self._client.refused(str(reply))


def _untold() -> None:
    """What keeps Redis from being used is told by the shards."""


def _pairs(reply: Any) -> list[tuple[bytes, bytes]]:
    """Names and values of a hash, or an entry, whichever form the client library has for it."""
    if isinstance(reply, dict):
        return list(reply.items())
    return list(zip(reply[::2], reply[1::2], strict=True))


def _entries(reply: Any) -> list[tuple[str, dict[bytes, bytes]]]:
    """Ids and fields of what one stream gave, whichever form the client library has for it."""
    if not reply:
        return []
    streams = reply.values() if isinstance(reply, dict) else [entries for _, entries in reply]
    return [
        (
            bytes(entry_id).decode(),
            dict(_pairs(fields)),
        )
        for entries in streams
        for entry_id, fields in entries
    ]
