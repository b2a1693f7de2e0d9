"""The slots of a Redis Cluster. Pure: no I/O."""

from __future__ import annotations

from binascii import crc_hqx
from functools import cache

SLOTS = 16384


def slot_of(key: str) -> int:
    """The slot of `key`: CRC16 of its first non-empty `{…}`, else of it all."""
    hashed = key.encode()
    start = hashed.find(b"{")
    end = hashed.find(b"}", start + 1)
    if start >= 0 and end > start + 1:
        hashed = hashed[start + 1 : end]
    return crc_hqx(hashed, 0) % SLOTS


def tag_of(slot: int) -> str:
    """A short text that lies in `slot`, to be put between braces."""
    return _tags()[slot]


def probe_key(key_prefix: str, slot: int) -> str:
    """A key in `slot`, which is written to see whether it can be."""
    return f"{key_prefix}broker:{{{tag_of(slot)}}}:probe"


def prepare() -> None:
    """Make the table of tags, which takes about 0.1 s, before it is needed."""
    _tags()


@cache
def _tags() -> dict[int, str]:
    """A short text of each slot."""
    tags: dict[int, str] = {}
    number = 0
    while len(tags) < SLOTS:
        text = f"{number:x}"
        tags.setdefault(crc_hqx(text.encode(), 0) % SLOTS, text)
        number += 1
    return tags
