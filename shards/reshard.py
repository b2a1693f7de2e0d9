"""`broker reshard`: spread a KvStore's data over another number of shards, offline.

The new files are made beside the old ones, in `resharding/`, and checked; a file `complete` in
there is the point from which on the new ones count. Interrupted before it, the next run begins
anew; after it, it goes on with putting them in place, and no broker starts until it has.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from broker.errors import ConfigError, StorageError
from broker.names import Group, file_name
from broker.routing import shard_of
from shards import folder, manifest
from shards.files import sync_directory
from shards.folder import Contents, contents_of, shard_directories, stream_files
from shards.progress import Progress
from shards.storage.sqlite_file import StreamFile, stream_name


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = folder.options("reshard", "Spread the data over another number of shards, offline.")
    parser.add_argument("--shards", type=int, required=True, metavar="N")
    parsed = parser.parse_args(arguments)

    def command() -> None:
        if not 1 <= parsed.shards <= 1024:
            raise ConfigError("--shards", f"holds {parsed.shards}, may hold 1 to 1024")
        _, path = folder.folder_of(parsed)
        reshard(path, parsed.shards)

    return folder.run(command)


def reshard(path: Path, shards: int) -> None:
    """Spread what the KvStore folder `path` holds over `shards` shards.

    Raises:
        ConfigError: there is nothing, or a broker uses it.
        StorageError: a file can't be read or written; the data is as it was.
    """
    work = path / manifest.RESHARDING
    with folder.locked(path):
        if not (work / manifest.COMPLETE).exists():
            current = manifest.read(path)
            if current is None:
                raise ConfigError("--config", f"there is no data in {path}")
            if current.shards == shards:
                print(f"the data in {path} is spread over {shards} shards already")
                return
            _build(path, work, shards)
        made = _put_in_place(path, work)
    print(f"the data in {path} is spread over {made} shards; set broker.shards to {made}")


def _build(path: Path, work: Path, shards: int) -> None:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    for shard in range(shards):
        (work / f"shard-{shard}").mkdir()
    files = [file for directory in shard_directories(path) for file in stream_files(directory)]
    progress = Progress("moving", 2 * len(files))
    before, after = Contents(), Contents()
    for file in files:
        _move(file, work, shards, before)
        progress.add(1)
    made = [file for directory in shard_directories(work) for file in stream_files(directory)]
    for file in made:
        _check(file, shards, after)
        progress.add(1)
    progress.add(2 * len(files))
    if before != after:
        raise StorageError("reshard_failed", f"the copy differs: {before}, copied {after}")
    print(f"checked: {after}", file=sys.stderr)
    folder.sync_tree(work)
    manifest.write(work / manifest.COMPLETE, shards)


def _move(source: Path, work: Path, shards: int, contents: Contents) -> None:
    """Copy the groups of one old file into the new ones."""
    stream = stream_name(source)
    if stream is None:
        raise StorageError("storage_corrupt", f"{source} can't be read; move it away to go on")
    old = StreamFile(source, stream)
    targets: dict[int, StreamFile] = {}
    try:
        contents_of(old, stream, contents)
        for row in old.all_group_rows():
            shard = shard_of(Group(stream, row.group_id), shards)
            if shard not in targets:
                target = work / f"shard-{shard}" / f"{file_name(stream)}.db"
                targets[shard] = StreamFile(target, stream, durable=False)
            targets[shard].copy_group(old, row)
        for new in targets.values():
            new.finish_copy()
    finally:
        for file in (old, *targets.values()):
            file.close()


def _check(path: Path, shards: int, contents: Contents) -> None:
    """Read a new file back; its groups must be where the routing looks."""
    stream = stream_name(path)
    assert stream is not None, "has just been written"
    file = StreamFile(path, stream)
    try:
        for row in file.all_group_rows():
            shard = shard_of(Group(stream, row.group_id), shards)
            if path.parent.name != f"shard-{shard}":
                raise StorageError("reshard_failed", f"{path} has a group of shard {shard}")
        contents_of(file, stream, contents)
    finally:
        file.close()


def _put_in_place(path: Path, work: Path) -> int:
    """From `complete` on: may be interrupted anywhere and done again."""
    shards = manifest.read_file(work / manifest.COMPLETE).shards
    old, cleared = work / "old", work / "cleared"
    if not cleared.exists():  # so all that is in place is old
        old.mkdir(exist_ok=True)
        for directory in shard_directories(path):
            directory.rename(old / directory.name)
        sync_directory(old)
        sync_directory(path)
        manifest.write(cleared, shards)
    for directory in shard_directories(work):
        directory.rename(path / directory.name)
    sync_directory(path)
    manifest.replace(path, shards)
    (work / manifest.COMPLETE).unlink()  # first of all: what is left is worth nothing then
    sync_directory(work)
    shutil.rmtree(work)
    return shards


if __name__ == "__main__":
    raise SystemExit(main())
