"""Names of what the Redis adapter keeps in Redis. Pure: no I/O.

Items lie where the original engine keeps them (protocol section 10.1). What belongs to a group
besides has another prefix and a hash tag that puts it into the slot of the group's items, so that
one script touches one slot of a Redis Cluster.

All of it begins with the key prefix of the configuration, if there is one: names that each end with
a colon, none of which is `stream` or `broker` (`broker.config`). So no key under one prefix is one
under another, nor matches a pattern of its keys, also where one prefix begins the other.

Keys are a database's own, channels are of all databases of a server: those where brokers tell one
another something have the number of the database, unless it is 0. The original's channel has none,
as the original's engines of all databases meet there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from broker.names import Group
from broker.redis_slots import slot_of, tag_of
from shards.group import names_text

KEYS_CACHED = 16384
"""Groups whose keys are kept made, about 1 KiB each with names of usual length."""
_CANONICAL = re.compile(r"(?:[^%:]|%25|%3A)*")


class GroupKeys(NamedTuple):
    """What belongs to one group.

    data: hash, item id to JSON text.
    head: hash: `epoch`, `seq`, `time`, the last number of `order`, bytes of `history`.
    order: sorted set, item id to its number in order of first insertion.
    history: list of the last envelopes, oldest first, without a gap.
    channel: where changes are told to other brokers.
    names: JSON members of the envelope that name the group.
    slot: of all of them in a Redis Cluster.
    """

    data: str
    head: str
    order: str
    history: str
    channel: str
    names: bytes
    slot: int


def encoded(name: str) -> str:
    """`name` with `:` and `%` percent-encoded: no two groups share a key."""
    return name.replace("%", "%25").replace(":", "%3A")


def decoded(text: str) -> str | None:
    """The inverse of `encoded`; None for what it never makes."""
    if not _CANONICAL.fullmatch(text):
        return None
    return text.replace("%3A", ":").replace("%25", "%")


class RedisKeys:
    """The names under one key prefix, in one database.

    Attributes:
        group_keys: all keys of a group, in one slot; those of the last ones are kept made.
        events: channel where the original engines tell, and are told of, every change.
        listeners: channel, on which nothing is told; all brokers that listen on `events` listen
            there too, whatever their database is, so that how many there are tells whether
            somebody else does.
        present: channel, on which nothing is told; all brokers listen there as long as they run.
        channel_prefix: what channels begin with on which brokers tell one another something.
        data_pattern: matches the keys of all groups' items, whatever their names are.
        head_pattern: matches the keys of all groups' heads.
        own_pattern: matches all that is not the groups' items.
        streams: a set: encoded names of streams that may have groups.
    """

    def __init__(self, prefix: str = "", database: int = 0) -> None:
        self.prefix = prefix
        self._data = f"{prefix}stream:"
        self._data_bytes = self._data.encode()
        self._own = f"{prefix}broker:"
        self.events = f"{prefix}stream::events"
        self.listeners = f"{self._own}listeners"
        self.data_pattern = f"{self._data}*"
        self.head_pattern = f"{self._own}{{*}}:head:*"
        self.own_pattern = f"{self._own}*"
        self.streams = f"{self._own}streams"
        self.channel_prefix = f"{self._own}db{database}:" if database else self._own
        self.present = f"{self.channel_prefix}streams"
        self.group_keys: Callable[[Group], GroupKeys] = lru_cache(maxsize=KEYS_CACHED)(
            self._group_keys
        )

    def data_key(self, group: Group) -> str:
        """The key of the group's items."""
        return f"{self._data}{encoded(group.stream)}:{encoded(group.group_id)}"

    def group_of_data_key(self, key: bytes) -> Group | None:
        """The inverse of `data_key`; None for keys that are no group's."""
        if not key.startswith(self._data_bytes):
            return None
        return _group_of_names(key[len(self._data_bytes) :])

    def group_of_head_key(self, key: bytes) -> Group | None:
        """The group of a head; None for keys that are none."""
        _, is_one, names = key.partition(b"}:head:")
        return _group_of_names(names) if is_one else None

    def groups_key(self, stream: str) -> str:
        """Of a set: encoded ids of the stream's groups that may have items."""
        return f"{self._own}groups:{encoded(stream)}"

    def stream_channel(self, stream: str) -> str:
        """Where the changes of all groups of a stream are told, for those with triggers on it."""
        return f"{self.channel_prefix}changes:{encoded(stream)}"

    def echo_channel(self, listener: str) -> str:
        """Where a listener says something to itself, to hear it behind what others said before."""
        return f"{self.channel_prefix}echo:{listener}"

    def _group_keys(self, group: Group) -> GroupKeys:
        data = self.data_key(group)
        slot = slot_of(data)
        tag = tag_of(slot)
        names = data[len(self._data) :]
        head, order, history = (
            f"{self._own}{{{tag}}}:{kind}:{names}" for kind in ("head", "order", "history")
        )
        channel = f"{self.channel_prefix}{{{tag}}}:changes:{names}"
        return GroupKeys(data, head, order, history, channel, names_text(*group), slot)


def _group_of_names(text: bytes) -> Group | None:
    """The group that the end of a key names."""
    try:
        names = text.decode().split(":")
    except UnicodeDecodeError:
        return None
    if len(names) != 2:
        return None
    stream, group_id = decoded(names[0]), decoded(names[1])
    return None if stream is None or group_id is None else Group(stream, group_id)
