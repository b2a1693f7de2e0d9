"""`broker copy`: move all data from where one configuration keeps it to where another one does.

Offline: neither place may be in use. What is copied of a group: its items with their exact texts,
in order of first insertion, and its epoch, number and time, so that numbering goes on. The history
is left behind: who comes back with a position before the last change is synced.

A KvStore is built beside its place and put there when it was checked; a Redis is marked until then,
and no broker serves from it meanwhile. Interrupted, the next run begins anew.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from hashlib import blake2b
from pathlib import Path

from broker import config
from broker.config import KvAdapter, Overrides
from broker.errors import ConfigError, StorageError
from shards import folder
from shards.copy_kv import KvSource, KvTarget
from shards.copy_places import Source, Target
from shards.copy_redis import RedisPlace
from shards.folder import Contents
from shards.progress import Progress


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="broker copy", description="Copy all data to where another configuration keeps it."
    )
    for name, about in (("from", "whose data is copied"), ("to", "where it is copied to")):
        help_ = f"configuration {about}"
        parser.add_argument(f"--{name}", dest=name, metavar="FILE", required=True, help=help_)
    parser.add_argument(
        "--replace", action="store_true", help="put it in place of what is there, if there is some"
    )
    parsed = parser.parse_args(arguments)

    def command() -> None:
        source, target = _source(getattr(parsed, "from")), _target(parsed.to)
        contents = asyncio.run(copy(source, target, parsed.replace))
        print(f"copied: {contents}; the history of changes was left behind")

    return folder.run(command)


async def copy(source: Source, target: Target, is_replacing: bool) -> Contents:
    """Copy everything, and check it; what was copied.

    Raises:
        ConfigError: one of the places can't be used, is in use, or the target is not empty.
        StorageError: something can't be read or written, or the copy differs. The target holds
            what it held before, or is marked as unfinished.
    """
    async with source, target:
        names = await source.names()
        await target.begin(is_replacing, source)
        progress = Progress("copying", 2 * len(names))
        before = Contents()
        for name in names:
            head = await source.head(name)
            count, digest = 0, _digest(head.epoch, head.seq, head.timestamp_ms)
            async with target.group(head) as put:
                async for page in source.items(name):
                    await put(page)
                    count += len(page)
                    _add(digest, page)
            before.add(*name, count, int.from_bytes(digest.digest(), "big"))
            progress.add(1)
        await target.written()
        after = await _contents(target.copy(), progress)
        progress.add(2 * len(names))
        if before != after:
            raise StorageError("copy_failed", f"the copy differs: {before}, copied {after}")
        print(f"checked: {after}", file=sys.stderr)
        await target.finish()
        return after


async def _contents(place: Source, progress: Progress) -> Contents:
    contents = Contents()
    async with place:
        for name in await place.names():
            head = await place.head(name)
            count, digest = 0, _digest(head.epoch, head.seq, head.timestamp_ms)
            async for page in place.items(name):
                count += len(page)
                _add(digest, page)
            contents.add(*name, count, int.from_bytes(digest.digest(), "big"))
            progress.add(1)
    return contents


def _digest(epoch: str, seq: int, timestamp_ms: int) -> blake2b:
    return blake2b(f"{epoch}:{seq}:{timestamp_ms}".encode(), digest_size=8)


def _add(digest: blake2b, page: list[tuple[str, bytes]]) -> None:
    for item_id, value in page:
        name = item_id.encode()
        digest.update(len(name).to_bytes(4, "big") + name)
        digest.update(len(value).to_bytes(8, "big") + value)


def _source(path: str) -> Source:
    adapter = config.load(path, Overrides(), os.environ)[0].adapter
    if isinstance(adapter, KvAdapter):
        return KvSource(_folder(adapter, "--from"))
    return RedisPlace(adapter.redis_url, adapter.key_prefix)


def _target(path: str) -> Target:
    settings, _ = config.load(path, Overrides(), os.environ)
    adapter = settings.adapter
    if isinstance(adapter, KvAdapter):
        return KvTarget(_folder(adapter, "--to"), settings.shards)
    return RedisPlace(adapter.redis_url, adapter.key_prefix)


def _folder(adapter: KvAdapter, option: str) -> Path:
    if adapter.store_method != "file_based":
        raise ConfigError(option, "names a configuration that keeps its data in memory")
    return Path(adapter.file_path)


if __name__ == "__main__":
    raise SystemExit(main())
