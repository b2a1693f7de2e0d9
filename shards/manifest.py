"""The manifest of a KvStore folder: which layout it has and over how many shards it is spread."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from broker.config import FILE_PATH_KEY
from broker.errors import ConfigError
from shards.files import create_file, make_directory, replace_file

LAYOUT_VERSION = 1
FILE_NAME = "manifest.json"
RESHARDING = "resharding"
COMPLETE = "complete"
"""A file in the folder `resharding`: from it on what is in there counts (`shards.reshard`)."""


class Manifest(msgspec.Struct, frozen=True):
    """`layout` of the files, and the number of shards that they were written by."""

    layout: int
    shards: int


def check(folder: Path, shards: int) -> None:
    """Read the manifest, or write it when the folder has none.

    All shards of a broker may do so at once: the first one writes, the others read the same.

    Raises:
        ConfigError: the folder is of another layout or another number of shards, or unusable.
    """
    path = folder / FILE_NAME
    half_done = folder / RESHARDING / COMPLETE
    try:
        make_directory(folder)
        if half_done.exists():
            wanted = read_file(half_done).shards
            raise ConfigError(
                FILE_PATH_KEY,
                f"the data in {folder} is being moved to {wanted} shards, which was interrupted;"
                f" run again: broker reshard --config FILE --shards {wanted}",
            )
        if not path.exists():
            write(path, shards)
    except OSError as error:
        raise ConfigError(FILE_PATH_KEY, f"{path} can't be used: {error.strerror}") from None
    manifest = read_file(path)
    if manifest.shards != shards:
        raise ConfigError(
            "broker.shards",
            f"is {shards}, but the data in {folder} is spread over {manifest.shards} shards;"
            f" keep {manifest.shards}, or run: broker reshard --config FILE --shards {shards}",
        )


def read(folder: Path) -> Manifest | None:
    """The manifest of a folder; None when it has none.

    Raises:
        ConfigError: it can't be read, or is of another layout.
    """
    path = folder / FILE_NAME
    return read_file(path) if path.exists() else None


def read_file(path: Path) -> Manifest:
    """The manifest at `path`.

    Raises:
        ConfigError: it can't be read, or is of another layout.
    """
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except OSError as error:
        raise ConfigError(FILE_PATH_KEY, f"{path} can't be used: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise ConfigError(FILE_PATH_KEY, f"{path} is damaged: {error}") from None
    if manifest.layout != LAYOUT_VERSION:
        raise ConfigError(
            FILE_PATH_KEY, f"{path} has layout {manifest.layout}, this release has {LAYOUT_VERSION}"
        )
    return manifest


def write(path: Path, shards: int) -> None:
    """Make a manifest at `path`, durable, unless there is one. Raises `OSError`."""
    create_file(path, _text(shards), _draft(path))  # never over that of a shard that was faster


def replace(folder: Path, shards: int) -> None:
    """Put another number of shards into the folder's manifest. Raises `OSError`."""
    path = folder / FILE_NAME
    replace_file(path, _text(shards), _draft(path))


def _text(shards: int) -> bytes:
    return msgspec.json.encode(Manifest(LAYOUT_VERSION, shards)) + b"\n"


def _draft(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}")
