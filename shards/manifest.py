"""The manifest of a KvStore folder: which layout it has and over how many shards it is spread."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from broker.config import FILE_PATH_KEY
from broker.errors import ConfigError
from shards.files import sync_directory

LAYOUT_VERSION = 1
FILE_NAME = "manifest.json"


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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _write(path, Manifest(LAYOUT_VERSION, shards))
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except OSError as error:
        raise ConfigError(FILE_PATH_KEY, f"{path} can't be used: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise ConfigError(FILE_PATH_KEY, f"{path} is damaged: {error}") from None
    if manifest.layout != LAYOUT_VERSION:
        raise ConfigError(
            FILE_PATH_KEY, f"{path} has layout {manifest.layout}, this release has {LAYOUT_VERSION}"
        )
    if manifest.shards != shards:
        raise ConfigError(
            "broker.shards",
            f"is {shards}, but the data in {folder} is spread over {manifest.shards} shards;"
            f" keep {manifest.shards}, or run: broker reshard --config FILE --shards {shards}",
        )


def _write(path: Path, manifest: Manifest) -> None:
    draft = path.with_name(f"{FILE_NAME}.{os.getpid()}")
    with draft.open("wb") as file:
        file.write(msgspec.json.encode(manifest) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(draft, path)  # never over the manifest of a shard that was faster
    except FileExistsError:
        pass
    finally:
        draft.unlink()
    sync_directory(path.parent)
