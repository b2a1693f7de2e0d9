"""Which shard owns a group: the same in every process, on every machine, in every release."""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b

from broker.names import Group


@lru_cache(maxsize=4096)
def shard_of(group: Group, shards: int) -> int:
    """The index, from 0, of the shard that owns `group` when there are `shards` of them.

    The length of the stream's name goes into the hash, so that no two different groups hash the
    same bytes. Stored data lies where this says: a change of it is a change of the data's layout.
    """
    stream = group.stream.encode()
    digest = blake2b(
        len(stream).to_bytes(4, "big") + stream + group.group_id.encode(), digest_size=8
    ).digest()
    return int.from_bytes(digest, "big") % shards
