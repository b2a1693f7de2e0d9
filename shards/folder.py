"""A KvStore folder as the commands see that work on all of it while no broker does."""

from __future__ import annotations

import argparse
import os
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

import msgspec

from broker import config, locks
from broker.config import FILE_PATH_KEY, Config, KvAdapter, Overrides
from broker.errors import ConfigError, StorageError
from broker.service import CONFIG_EXIT_CODE
from shards.storage.sqlite_file import StreamFile

FAILED_EXIT_CODE = 1


class Contents(msgspec.Struct):
    """What a set of stream files holds, independent of how it is spread over them."""

    groups: int = 0
    items: int = 0
    checksum: int = 0

    def add(self, stream: str, group_id: str, items: int, checksum: int) -> None:
        """Count a group; `checksum` is `group_checksum`."""
        self.groups += 1
        self.items += items
        name = blake2b(repr((stream, group_id)).encode(), digest_size=8).digest()
        self.checksum ^= int.from_bytes(name, "big") * (checksum | 1) % 2**64

    def __str__(self) -> str:
        return f"{self.groups} groups, {self.items} items, checksum {self.checksum:016x}"


def stream_files(directory: Path) -> list[Path]:
    """The stream files of a shard's folder."""
    return sorted(directory.glob("*.db"))


def shard_directories(folder: Path) -> list[Path]:
    """The shards' folders in `folder`, in any order."""
    return sorted(path for path in folder.glob("shard-*") if path.is_dir())


def contents_of(file: StreamFile, stream: str, contents: Contents) -> None:
    """Add what a stream file holds to `contents`.

    Raises:
        StorageError: it can't be read.
    """
    for row in file.all_group_rows():
        digest = blake2b(f"{row.epoch}:{row.seq}:{row.timestamp_ms}".encode(), digest_size=8)
        count = 0
        for item_id, value in file.iterate_items(row.id):
            count += 1
            digest.update(len(item_id).to_bytes(4, "big") + item_id.encode())
            digest.update(len(value).to_bytes(8, "big") + value)
        contents.add(stream, row.group_id, count, int.from_bytes(digest.digest(), "big"))


@contextmanager
def locked(folder: Path, *, offline: bool = True) -> Iterator[None]:
    """No other such command uses the folder meanwhile, and if `offline` no broker.

    Raises:
        ConfigError: one does.
    """
    held: list[int] = []
    try:
        held.append(locks.take(folder / "lock", FILE_PATH_KEY, f"the data in {folder}"))
        for directory in shard_directories(folder) if offline else ():
            held.append(locks.take(directory / "lock", FILE_PATH_KEY, f"the data in {directory}"))
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Make all files below `directory` durable, and their names."""
    for path in [directory, *sorted(directory.rglob("*"))]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def options(name: str, explained: str) -> argparse.ArgumentParser:
    """The command line of a command on a folder."""
    parser = argparse.ArgumentParser(prog=f"broker {name}", description=explained)
    parser.add_argument("--config", metavar="FILE", help="configuration of the broker")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of all data, as in broker serve")
    return parser


def folder_of(parsed: argparse.Namespace) -> tuple[Config, Path]:
    """The configuration, and the folder that it keeps its data in.

    Raises:
        ConfigError: the configuration can't be used, or keeps nothing in a folder.
    """
    overrides = Overrides(data_dir=parsed.data_dir)
    settings, _ = config.load(parsed.config, overrides, os.environ)
    adapter = settings.adapter
    if not isinstance(adapter, KvAdapter) or adapter.store_method != "file_based":
        raise ConfigError("modules[].config.adapter", "keeps no files; this is for file_based")
    return settings, Path(adapter.file_path)


def run(command: Callable[[], None]) -> int:
    """Run a command; its exit code. What is wrong is one line on standard error."""
    try:
        command()
    except ConfigError as error:
        print(f"broker: {error}", file=sys.stderr)
        return CONFIG_EXIT_CODE
    except (StorageError, OSError, sqlite3.Error) as error:
        print(f"broker: {error}", file=sys.stderr)
        return FAILED_EXIT_CODE
    except KeyboardInterrupt:
        print("broker: interrupted; run it again", file=sys.stderr)
        return 130
    return 0
