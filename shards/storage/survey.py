"""How much a shard stores: counted now and again by a thread, beside what is going on.

Each file has a row for every group with the number and bytes of its items, kept by the commits. The
rows are added up without locks, as of one moment for each file; files that did not change since the
last time are not read again.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from broker import logs
from broker.report import StoreReport

FIRST_AFTER_S = 1.0
INTERVAL_S = 60.0
SHARE_MAX = 50
"""Between two surveys lies at least this many times what the last one took."""

_SUMS = "SELECT count(*), ifnull(sum(items), 0), ifnull(sum(bytes), 0) FROM groups WHERE items > 0"

_log = logs.Log("survey")


class Sums(NamedTuple):
    """Of one file."""

    groups: int = 0
    items: int = 0
    bytes: int = 0


class Survey:
    """The data below a folder of stream files; `run` keeps it up to date.

    Attributes: `report`; `disk_bytes` of all files, logs included; `unreadable` files.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._seen: dict[Path, tuple[object, Sums | None]] = {}
        self._over = False
        self.report = StoreReport()
        self.disk_bytes: int | None = None
        self.unreadable = 0

    async def run(self) -> None:
        """Look at the files until cancelled."""
        wait_s = FIRST_AFTER_S
        while True:
            await asyncio.sleep(wait_s)
            began_at = time.monotonic()
            taking = asyncio.ensure_future(asyncio.to_thread(self.take))
            try:
                await asyncio.shield(taking)
            except asyncio.CancelledError:  # a file that it reads would not be closed for good
                self._over = True
                await taking
                raise
            wait_s = max(INTERVAL_S, SHARE_MAX * (time.monotonic() - began_at))

    def take(self) -> None:
        """Look at the files once. Blocks."""
        seen: dict[Path, tuple[object, Sums | None]] = {}
        disk_bytes = 0
        for path in sorted(self._directory.glob("*.db")):
            if self._over:
                return
            state, size = _state(path)
            disk_bytes += size
            known = self._seen.get(path)
            if known is None or known[0] != state:
                known = (state, _sums(path))
            seen[path] = known
        self._seen = seen
        found = [sums for _, sums in seen.values() if sums is not None]
        self.unreadable = len(seen) - len(found)
        self.disk_bytes = disk_bytes
        self.report = StoreReport(
            streams=sum(bool(sums.groups) for sums in found),
            groups=sum(sums.groups for sums in found),
            items=sum(sums.items for sums in found),
            bytes=sum(sums.bytes for sums in found),
        )


def _state(path: Path) -> tuple[object, int]:
    """What changes when the file does, and the bytes that it and its log take."""
    state: list[tuple[int, int, int] | None] = []
    size = 0
    for name in (path, path.with_name(path.name + "-wal")):
        try:
            found = name.stat()
        except OSError:  # no log, or the file has just gone
            state.append(None)
        else:
            state.append((found.st_mtime_ns, found.st_size, found.st_ino))
            size += found.st_size
    return state, size


def _sums(path: Path) -> Sums | None:
    if not path.with_name(f"{path.name}-wal").exists():  # so that none is made, for a moment
        with suppress(sqlite3.Error):  # just being opened by the storage
            return _read(path, "immutable=1")
    try:
        return _read(path, "mode=ro")
    except sqlite3.Error as error:  # damaged, or just being made: calls on it tell
        _log.warning("file_not_counted", path=path, reason=error)
        return None


def _read(path: Path, how: str) -> Sums:
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?{how}", uri=True)
    try:
        return Sums(*connection.execute(_SUMS).fetchone())
    finally:
        connection.close()
