"""Records what a program does to the files below a folder: SQLite's calls through a virtual file
system, and those of `shards.files` in place of its `os`.

The files are real, so the program runs as ever; only nothing is synced, the log is what counts.
"""

from __future__ import annotations

import itertools
import os
import random
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import apsw

from tests.power.state import DIRECTORY, State

_numbers = itertools.count()
_JOURNALS = apsw.SQLITE_OPEN_WAL | apsw.SQLITE_OPEN_MAIN_JOURNAL


class Recorder:
    """The disk below `root`, which is filled from `state`. Close it."""

    def __init__(self, root: Path, state: State, seed: int = 0) -> None:
        self.root = root
        self.log: list[tuple[Any, ...]] = []
        self.failing_syncs = 0
        """How many of the next syncs of SQLite's files fail."""
        self.stopped = False
        """Set it when nothing counts any more."""
        self.rng = random.Random(seed)
        state.materialize(root)
        self.names = {
            str(root / path / name): number
            for path, directory in state.directories.items()
            for name, number in directory.cache.items()
            if number != DIRECTORY
        }
        self._next = max(state.files, default=0) + 1
        self.os = RecordedOs(self)
        self._vfs = _Vfs(self)

    def connect(self, path: Path, checkpoint_pages: int) -> Any:
        """In place of `sqlite3.connect`."""
        return Connection(path, self._vfs.vfs_name, checkpoint_pages)

    def close(self) -> None:
        self._vfs.unregister()

    def record(self, kind: str, *rest: Any) -> None:
        if not self.stopped:
            self.log.append((kind, *rest))

    def opened(self, path: str, created: bool) -> int:
        """The number of the file; a new one when it was made."""
        if not created and path in self.names:
            return self.names[path]
        number, self._next = self._next, self._next + 1
        self.names[path] = number
        self.record("create", *self.split(path), number)
        return number

    def removed(self, path: str) -> None:
        directory, name = self.split(path)
        if self.names.pop(path, None) is not None:
            self.record("change", directory, {name: None})

    def sync(self, number: int) -> bool:
        """Whether it works."""
        if self.failing_syncs and not self.stopped:
            self.failing_syncs -= 1
            self.record("sync_failed", number, self.rng.getrandbits(32))
            return False
        self.record("sync", number)
        return True

    def split(self, path: str) -> tuple[str, str]:
        """Directory, below the root, and name."""
        directory, _, name = os.path.relpath(path, self.root).rpartition("/")
        return directory, name


class RecordedOs:
    """What `shards.files` uses of `os`."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._open: dict[int, tuple[str, int]] = {}

    def __getattr__(self, name: str) -> Any:
        allowed = ("O_RDONLY", "O_WRONLY", "O_RDWR", "O_CREAT", "O_TRUNC", "O_DIRECTORY", "pread")
        if name not in (*allowed, "O_EXCL", "O_CLOEXEC", "fstat"):
            raise AttributeError(f"os.{name} is not recorded")
        return getattr(os, name)

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        text = str(path)
        existed = os.path.exists(text)
        descriptor = os.open(path, flags, mode)
        if flags & os.O_DIRECTORY:
            self._open[descriptor] = (text, DIRECTORY)
            return descriptor
        number = self._recorder.opened(text, not existed)
        self._open[descriptor] = (text, number)
        if flags & os.O_TRUNC and existed:
            self._recorder.record("truncate", number, 0)
        return descriptor

    def close(self, descriptor: int) -> None:
        del self._open[descriptor]
        os.close(descriptor)

    def write(self, descriptor: int, data: bytes) -> int:
        offset = os.lseek(descriptor, 0, os.SEEK_CUR)
        count = os.write(descriptor, data)
        self._recorder.record("write", self._open[descriptor][1], offset, bytes(data[:count]))
        return count

    def pwrite(self, descriptor: int, data: bytes, offset: int) -> int:
        count = os.pwrite(descriptor, data, offset)
        self._recorder.record("write", self._open[descriptor][1], offset, bytes(data[:count]))
        return count

    def fsync(self, descriptor: int) -> None:
        path, number = self._open[descriptor]
        if number == DIRECTORY:
            inside = os.path.relpath(path, self._recorder.root)
            if not inside.startswith(".."):
                self._recorder.record("sync_directory", "" if inside == "." else inside)
        else:
            self._recorder.record("sync", number)

    def mkdir(self, path: Path) -> None:
        os.mkdir(path)
        self._recorder.record("mkdir", *self._recorder.split(str(path)))

    def link(self, source: Path, target: Path) -> None:
        os.link(source, target)
        names = self._recorder.names
        names[str(target)] = number = names[str(source)]
        directory, name = self._recorder.split(str(target))
        self._recorder.record("change", directory, {name: number})

    def unlink(self, path: Path) -> None:
        os.unlink(path)
        self._recorder.removed(str(path))

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)
        names = self._recorder.names
        names[str(target)] = number = names.pop(str(source))
        directory, old = self._recorder.split(str(source))
        same, new = self._recorder.split(str(target))
        assert directory == same, "the model has no other renames"
        self._recorder.record("change", directory, {old: None, new: number})


class _Vfs(apsw.VFS):
    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.vfs_name = f"power-{next(_numbers)}"
        super().__init__(self.vfs_name, "")

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:
        return _VfsFile(self.recorder, name, flags)

    def xDelete(self, path: str, sync_directory: bool) -> None:
        super().xDelete(path, sync_directory)
        self.recorder.removed(path)
        if sync_directory:
            self.recorder.record("sync_directory", self.recorder.split(path)[0])

    def xRandomness(self, count: int) -> bytes:
        return self.recorder.rng.randbytes(count)


class _VfsFile(apsw.VFSFile):
    def __init__(self, recorder: Recorder, name: Any, flags: list[int]) -> None:
        self._recorder = recorder
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        existed = path is not None and os.path.exists(path)
        super().__init__("", name, flags)
        self._number = recorder.opened(path, not existed) if path else None
        self._path = path
        # As SQLite's own file system does it: the first sync of a log syncs its name too.
        self._syncs_directory = bool(flags[0] & _JOURNALS and flags[0] & apsw.SQLITE_OPEN_CREATE)

    def xWrite(self, data: bytes, offset: int) -> None:
        super().xWrite(data, offset)
        if self._number is not None:
            self._recorder.record("write", self._number, offset, bytes(data))

    def xTruncate(self, size: int) -> None:
        super().xTruncate(size)
        if self._number is not None:
            self._recorder.record("truncate", self._number, size)

    def xSync(self, flags: int) -> None:
        if self._number is None:
            return
        if not self._recorder.sync(self._number):
            error = apsw.IOError("fsync failed")
            error.extendedresult = apsw.SQLITE_IOERR_FSYNC
            raise error
        if self._syncs_directory:
            self._recorder.record("sync_directory", self._recorder.split(self._path)[0])
            self._syncs_directory = False


class Rows:
    """As a cursor whose rows were all read."""

    def __init__(self, rows: list[Any]) -> None:
        self._rows = iter(rows)

    def __iter__(self) -> Iterator[Any]:
        return self._rows

    def fetchone(self) -> Any:
        return next(self._rows, None)

    def fetchall(self) -> list[Any]:
        return list(self._rows)


class Connection:
    """What the storage uses of `sqlite3.Connection`, by apsw, whose SQLite is another build."""

    def __init__(self, path: Path, vfs: str, checkpoint_pages: int) -> None:
        with _Errors():
            self._connection = apsw.Connection(str(path), vfs=vfs)
            self._connection.wal_autocheckpoint(checkpoint_pages)

    @property
    def in_transaction(self) -> bool:
        return self._connection.in_transaction

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> Rows:
        with _Errors():
            return Rows(self._connection.execute(sql, parameters).fetchall())

    def executemany(self, sql: str, parameters: Any) -> Rows:
        with _Errors():
            return Rows(self._connection.executemany(sql, parameters).fetchall())

    executescript = execute

    def close(self) -> None:
        with suppress(apsw.Error):  # what fails when a file is closed sqlite3 does not tell
            self._connection.close()


class _Errors:
    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, apsw.Error):
            raised = sqlite3.OperationalError(str(error))
            code = getattr(error, "extendedresult", 0)
            raised.sqlite_errorname = apsw.mapping_extended_result_codes.get(
                code, apsw.mapping_result_codes.get(code & 0xFF, "")
            )
            raise raised from error
