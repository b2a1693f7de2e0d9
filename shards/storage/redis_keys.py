"""Names of what the Redis adapter keeps in Redis. Pure: no I/O.

Items lie where the original engine keeps them (protocol section 10.1). What belongs to a group
besides has another prefix and a hash tag that puts it into the slot of the group's items, so that
one script touches one slot of a Redis Cluster.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from broker.names import Group
from broker.redis_slots import slot_of, tag_of
from shards.group import names_text

DATA_PREFIX = "stream:"
DATA_PATTERN = "stream:*"
"""Matches the keys of all groups' items, whatever their names are."""
EVENTS_CHANNEL = "stream::events"
"""Where the original engines tell, and are told of, every change."""
HEAD_PATTERN = "broker:{*}:head:*"
"""Matches the keys of all groups' heads."""
STREAMS_KEY = "broker:streams"
"""A set: encoded names of streams that may have groups."""

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


def data_key(group: Group) -> str:
    """The key of the group's items."""
    return f"{DATA_PREFIX}{encoded(group.stream)}:{encoded(group.group_id)}"


def group_of_data_key(key: bytes) -> Group | None:
    """The inverse of `data_key`; None for keys that are no group's."""
    try:
        names = key.decode().removeprefix(DATA_PREFIX).split(":")
    except UnicodeDecodeError:
        return None
    if len(names) != 2 or not key.startswith(DATA_PREFIX.encode()):
        return None
    stream, group_id = decoded(names[0]), decoded(names[1])
    return None if stream is None or group_id is None else Group(stream, group_id)


def group_of_head_key(key: bytes) -> Group | None:
    """The group of a head; None for keys that are none."""
    _, is_one, names = key.partition(b"}:head:")
    return group_of_data_key(DATA_PREFIX.encode() + names) if is_one else None


def groups_key(stream: str) -> str:
    """Of a set: encoded ids of the stream's groups that may have items."""
    return f"broker:groups:{encoded(stream)}"


def stream_channel(stream: str) -> str:
    """Where the changes of all groups of a stream are told, for those with triggers on it."""
    return f"broker:changes:{encoded(stream)}"


@lru_cache(maxsize=KEYS_CACHED)
def group_keys(group: Group) -> GroupKeys:
    """All keys of `group`, in one slot."""
    data = data_key(group)
    slot = slot_of(data)
    tag = tag_of(slot)
    names = data.removeprefix(DATA_PREFIX)
    head, order, history, channel = (
        f"broker:{{{tag}}}:{kind}:{names}" for kind in ("head", "order", "history", "changes")
    )
    return GroupKeys(data, head, order, history, channel, names_text(*group), slot)
