"""A Redis, as `broker copy` reads and fills it."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Self

from redis.exceptions import ResponseError

from broker.errors import ConfigError, StorageError
from broker.names import Group
from broker.redis_client import Command, copying_key
from broker.redis_cluster import client_of
from broker.redis_pools import REDIS_URL_KEY
from shards.copy_places import PAGE, GroupHead, Item, Put, Source
from shards.group import new_epoch
from shards.storage.redis_keys import RedisKeys, encoded
from shards.storage.redis_turn import EMPTY_GROUP_MS_MIN, is_json

SCAN_COUNT = 1000


class RedisPlace:
    """See `shards.copy_places`: both a `Source` and a `Target`. What lacks `key_prefix` is left
    alone."""

    def __init__(self, url: str, key_prefix: str = "") -> None:
        self._copying_key = copying_key(key_prefix)
        self._client = client_of(url, _nothing, _nothing, key_prefix=key_prefix, is_copying=True)
        self._keys = RedisKeys(key_prefix, self._client.database)
        where = f" under the key prefix {key_prefix!r}" if key_prefix else ""
        database = f"database {self._client.database} of " if self._client.database else ""
        self._name = f"{database}the Redis at {self._client.address}{where}"
        self._is_entered = 0

    async def __aenter__(self) -> Self:
        self._is_entered += 1
        if self._is_entered == 1:
            await self._client.open()
            if self._client.trouble is not None:
                raise StorageError("redis_unavailable", self._client.trouble)
            for server in self._client.servers:
                (reply,) = await server.run([("PUBSUB", "NUMSUB", self._keys.present)])
                if self._good(reply)[1]:
                    reason = f"{self._name} is in use by a broker; stop it"
                    raise ConfigError(REDIS_URL_KEY, reason)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._is_entered -= 1
        if not self._is_entered:
            await self._client.close()

    # Read ---------------------------------------------------------------------------------------

    async def names(self) -> list[Group]:
        found: dict[Group, None] = {}
        async for key in self._scan(self._keys.data_pattern):
            if (group := self._keys.group_of_data_key(key)) is not None:
                found[group] = None
        async for key in self._scan(self._keys.head_pattern):
            if (group := self._keys.group_of_head_key(key)) is not None:
                found[group] = None
        return list(found)

    async def head(self, group: Group) -> GroupHead:
        key = self._keys.group_keys(group).head
        epoch, seq, time = await self._one("HMGET", key, "epoch", "seq", "time")
        if epoch is None:
            epoch = new_epoch().encode()
        return GroupHead(group, epoch.decode(), int(seq or 0), int(time or 0))

    async def items(self, group: Group) -> AsyncIterator[list[Item]]:
        keys = self._keys.group_keys(group)
        seen: set[bytes] = set()
        start = 0
        while fields := await self._one("ZRANGE", keys.order, start, start + PAGE - 1):
            start += PAGE
            texts = await self._one("HMGET", keys.data, *fields)
            found = {f: t for f, t in zip(fields, texts, strict=True) if t is not None}
            seen |= found.keys()
            yield [_item(keys.data, *pair) for pair in found.items()]
        if await self._one("HLEN", keys.data) == len(seen):
            return
        cursor: Any = 0
        while True:  # what others wrote: it comes last
            cursor, pairs = await self._one("HSCAN", keys.data, cursor, "COUNT", PAGE)
            found = dict(zip(pairs[::2], pairs[1::2], strict=True))
            yield [_item(keys.data, *pair) for pair in found.items() if pair[0] not in seen]
            seen |= found.keys()
            if int(cursor) == 0:
                return

    async def copying(self) -> bytes | None:
        """The mark of a copy that is not finished."""
        mark: bytes | None = await self._one("GET", self._copying_key)
        return mark

    # Write --------------------------------------------------------------------------------------

    async def begin(self, is_replacing: bool, source: Source) -> None:
        other = source if isinstance(source, RedisPlace) else None
        if other is not None and await other.copying() is not None:
            raise ConfigError("--from", "names a Redis with a copy that is not finished")
        is_unfinished = await self.copying() is not None
        if not (is_replacing or is_unfinished) and await self.names():
            reason = f"{self._name} holds data already; say --replace"
            raise ConfigError("--to", f"{reason} to delete it")
        token = secrets.token_hex(8)
        await self._one("SET", self._copying_key, token)
        if other is not None and await other.copying() == token.encode():
            await self._one("DEL", self._copying_key)
            raise ConfigError("--to", "names the place that is copied from")
        async for key in self._scan(self._keys.data_pattern):
            if self._keys.group_of_data_key(key) is not None:
                await self._one("UNLINK", key.decode())
        async for key in self._scan(self._keys.own_pattern):
            if key != self._copying_key.encode():
                await self._one("UNLINK", key.decode())

    @asynccontextmanager
    async def group(self, head: GroupHead) -> AsyncIterator[Put]:
        keys = self._keys.group_keys(head.group)
        number = 0

        async def put(items: list[Item]) -> None:
            nonlocal number
            if not items:
                return
            fields: list[str | bytes | int] = []
            places: list[str | bytes | int] = []
            for item_id, value in items:
                number += 1
                fields += (item_id, value)
                places += (number, item_id)
            await self._all([("HSET", keys.data, *fields), ("ZADD", keys.order, *places)])

        yield put
        state = ("epoch", head.epoch, "seq", head.seq, "time", head.timestamp_ms, "order", number)
        await self._one("HSET", keys.head, *state)
        if not number:
            await self._one("PEXPIRE", keys.head, EMPTY_GROUP_MS_MIN)
            return
        stream, group_id = head.group
        await self._one("SADD", self._keys.groups_key(stream), encoded(group_id))
        await self._one("SADD", self._keys.streams, encoded(stream))

    async def written(self) -> None:
        """Each command has been answered."""

    def copy(self) -> Source:
        return self

    async def finish(self) -> None:
        await self._one("DEL", self._copying_key)

    # ----------------------------------------------------------------------------------------------

    async def _one(self, *command: str | bytes | int) -> Any:
        (reply,) = await self._all([command])
        return reply

    async def _all(self, commands: list[Command]) -> list[Any]:
        return [self._good(reply) for reply in await self._client.run(commands)]

    def _good(self, reply: Any) -> Any:
        if isinstance(reply, ResponseError):
            raise self._client.refused(reply)
        return reply

    async def _scan(self, pattern: str) -> AsyncIterator[bytes]:
        for server in self._client.servers:
            cursor: Any = 0
            while True:
                command = ("SCAN", cursor, "MATCH", pattern, "COUNT", SCAN_COUNT)
                (reply,) = await server.run([command])
                cursor, keys = self._good(reply)
                for key in keys:
                    yield key
                if int(cursor) == 0:
                    break


def _item(key: str, field: bytes, text: bytes) -> Item:
    try:
        item_id = field.decode()
    except UnicodeDecodeError:
        message = f"key {key!r} has a field {field!r}, which is not UTF-8"
        raise StorageError("not_readable", f"{message}; delete it first") from None
    if not is_json(text):
        message = f"item_id {item_id[:100]!r} of key {key!r} holds text that is no JSON"
        raise StorageError("not_readable", f"{message}; mend it first")
    return item_id, text


def _nothing() -> None:
    """Whoever copies meets all trouble itself."""
