"""`broker backup` and `broker restore`: a KvStore's data as a folder of its own.

A backup may be made while the broker runs: each stream is as of one of its commits.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import sys
from pathlib import Path

from broker.errors import ConfigError, StorageError
from shards import folder, manifest
from shards.files import sync_directory
from shards.folder import Contents, contents_of, shard_directories, stream_files
from shards.group import new_epoch
from shards.progress import Progress
from shards.storage.sqlite_file import StreamFile, failure, stream_name


def main(arguments: list[str] | None = None) -> int:
    """Run one of the commands; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    name, rest = arguments[0], arguments[1:]
    explained = {
        "backup": "Copy the data of a broker, which may run, into a new folder.",
        "restore": "Put a backup where the configuration keeps its data; there must be none yet.",
    }
    parser = folder.options(name, explained[name])
    parser.add_argument("directory", metavar="DIR", help="the folder of the backup")
    parsed = parser.parse_args(rest)

    def command() -> None:
        _, path = folder.folder_of(parsed)
        work = {"backup": backup, "restore": restore}[name]
        print(f"{name}: {work(path, Path(parsed.directory))}")

    return folder.run(command)


def backup(path: Path, target: Path) -> Contents:
    """Copy what the KvStore folder `path` holds to `target`, which is made; what was copied.

    Raises:
        ConfigError: there is nothing to copy, or `target` exists.
        StorageError: a file can't be read; there is no backup.
    """
    current = manifest.read(path)
    if current is None:
        raise ConfigError("--config", f"there is no data in {path}")
    with folder.locked(path, offline=False):
        return _copy(path, target, current.shards)


def restore(path: Path, source: Path) -> Contents:
    """Put the backup `source` at `path`; what was restored.

    Raises:
        ConfigError: `source` is no backup, or there is data at `path`.
        StorageError: a file of the backup is damaged; there is no data at `path` then.
    """
    current = manifest.read(source)
    if current is None:
        raise ConfigError("DIR", f"{source} is no backup: it has no {manifest.FILE_NAME}")
    if path.exists() and any(path.iterdir()):
        raise ConfigError("--config", f"{path} holds data already; move it away first")
    with contextlib.suppress(OSError):
        path.rmdir()
    # What came after the backup is gone, and its numbers will be given to other changes.
    return _copy(source, path, current.shards, epoch=new_epoch())


def _copy(source: Path, target: Path, shards: int, epoch: str | None = None) -> Contents:
    """Copy, and begin other numberings, called `epoch`, if it is given."""
    draft = target.with_name(f"{target.name}.unfinished")
    if target.exists():
        raise ConfigError("DIR", f"{target} exists already")
    shutil.rmtree(draft, ignore_errors=True)
    for shard in range(shards):
        (draft / f"shard-{shard}").mkdir(parents=True)
    files = [file for directory in shard_directories(source) for file in stream_files(directory)]
    progress, contents = Progress("copying", len(files)), Contents()
    for file in files:
        _copy_file(file, draft / file.parent.name / file.name, contents, epoch)
        progress.add(1)
    manifest.write(draft / manifest.FILE_NAME, shards)
    folder.sync_tree(draft)
    draft.rename(target)
    sync_directory(target.parent)
    return contents


def _copy_file(source: Path, target: Path, contents: Contents, epoch: str | None) -> None:
    try:
        old = sqlite3.connect(f"{source.absolute().as_uri()}?mode=rw", uri=True)
        new = sqlite3.connect(target)
        try:
            old.backup(new)  # in one read transaction, which keeps no writer waiting
        finally:
            new.close()
            old.close()
    except sqlite3.Error as error:
        raise failure(source, error) from error
    stream = stream_name(target)
    if stream is None:
        raise StorageError("storage_corrupt", f"{source} is no stream file")
    file = StreamFile(target, stream)
    try:
        contents_of(file, stream, contents)
        if epoch is not None:
            file.begin_epoch(epoch)
    finally:
        file.close()


if __name__ == "__main__":
    raise SystemExit(main())
