"""One stream's SQLite file: schema, reads and commits. Blocking: runs on a storage thread.

WAL with `synchronous=FULL`: a commit is on disk when `commit` returns. Rows are written with few
statements of many rows each, because every statement gives up and takes back the interpreter's
lock, and the event loop is busy on the other side of it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path

import msgspec

from broker.errors import StorageError
from shards.files import sync_directory

LAYOUT_VERSION = 2
_APPLICATION_ID = 0x53425231  # "SBR1"
_ROWS_PER_STATEMENT = (256, 64, 16, 4, 1)
_SELECT_NAMES_MAX = 500

_HISTORY = """
CREATE TABLE history (
    id INTEGER PRIMARY KEY,  -- grows with time
    group_key INTEGER NOT NULL,
    last_seq INTEGER NOT NULL,
    timestamp_ms INTEGER NOT NULL,  -- of the last of its changes
    changes BLOB NOT NULL
);
CREATE INDEX history_of_group ON history (group_key, last_seq);
"""
_SCHEMA = f"""
PRAGMA journal_mode = WAL;
BEGIN IMMEDIATE;
CREATE TABLE stream (name TEXT NOT NULL);
CREATE TABLE groups (
    id INTEGER PRIMARY KEY,
    group_id TEXT NOT NULL UNIQUE,
    epoch TEXT NOT NULL,
    seq INTEGER NOT NULL,
    timestamp_ms INTEGER NOT NULL,
    items INTEGER NOT NULL,
    bytes INTEGER NOT NULL
);
CREATE TABLE items (
    id INTEGER PRIMARY KEY,  -- grows in order of first insertion
    group_key INTEGER NOT NULL,
    item_id TEXT NOT NULL,
    value TEXT NOT NULL,
    UNIQUE (group_key, item_id)
);
{_HISTORY}
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {LAYOUT_VERSION};
"""

_INSERT_ITEMS = (
    "INSERT INTO items (group_key, item_id, value) VALUES {rows}"
    " ON CONFLICT (group_key, item_id) DO UPDATE SET value = excluded.value"
)
_INSERT_GROUPS = (
    "INSERT INTO groups (id, group_id, epoch, seq, timestamp_ms, items, bytes) VALUES {rows}"
    " ON CONFLICT (id) DO UPDATE SET epoch = excluded.epoch, seq = excluded.seq,"
    " timestamp_ms = excluded.timestamp_ms, items = excluded.items, bytes = excluded.bytes"
)
_INSERT_HISTORY = "INSERT INTO history (group_key, last_seq, timestamp_ms, changes) VALUES {rows}"
_DELETE_EXPIRED = (
    "DELETE FROM history WHERE timestamp_ms < ?"
    " AND id IN (SELECT id FROM history ORDER BY id LIMIT ?)"
)
_DELETE_ITEMS = "DELETE FROM items WHERE (group_key, item_id) IN (VALUES {rows})"


class GroupRow(msgspec.Struct, frozen=True):
    """A row of `groups`: a group's head, and the number and bytes of its items."""

    id: int
    group_id: str
    epoch: str
    seq: int
    timestamp_ms: int
    items: int
    bytes: int


class HistoryRow(msgspec.Struct, frozen=True):
    """Changes of one group that were committed together; `changes` is opaque here."""

    group_key: int
    last_seq: int
    timestamp_ms: int
    changes: bytes


class Trim(msgspec.Struct, frozen=True):
    """What may be kept of a group's history: changes after `seq`, and up to so many bytes."""

    group_key: int
    seq: int
    bytes_max: int


class Batch(msgspec.Struct, frozen=True):
    """What one commit writes, in this order. An item is named by its group's row and its id.

    expired_ms: history that is older goes, a little with each commit.
    """

    deleted: list[tuple[int, str]]
    items: list[tuple[int, str, bytes]]
    groups: list[GroupRow]
    history: list[HistoryRow]
    trims: list[Trim]
    expired_ms: float


class StreamFile:
    """An open file. Used by one thread at a time.

    Raises (every method, the constructor included):
        StorageError: `storage_failed` or `storage_corrupt`, naming the file. After it the object
            is of no more use but for `close`.
    """

    def __init__(self, path: Path, stream: str, *, durable: bool = True) -> None:
        """Open the file at `path`, or make it. Without `durable` commits may get lost: for a
        copy, which is made durable as a whole."""
        self._path = path
        created = not path.exists()
        try:
            self._connection = sqlite3.connect(
                path, isolation_level=None, check_same_thread=False, cached_statements=64
            )
        except sqlite3.Error as error:
            raise self._failure(error) from error
        try:
            self._connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'OFF'}")
            if not self._pragma("user_version") and not self._pragma("application_id"):
                self._create(stream)
            self._check(stream)
            self.next_row = self._scalar("SELECT ifnull(max(id), 0) + 1 FROM groups")
            if created:
                sync_directory(path.parent)
        except (sqlite3.Error, OSError) as error:
            self.close()
            raise self._failure(error) from error
        except StorageError:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; never fails."""
        self._connection.close()

    def groups(self) -> list[str]:
        """The ids of the groups that have items."""
        try:
            cursor = self._connection.execute("SELECT group_id FROM groups WHERE items > 0")
            return [group_id for (group_id,) in cursor]
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def group_rows(self, group_ids: Sequence[str]) -> list[GroupRow]:
        """The rows of those of `group_ids` that the file knows."""
        rows: list[GroupRow] = []
        names = iter(group_ids)
        try:
            while some := list(islice(names, _SELECT_NAMES_MAX)):
                cursor = self._connection.execute(
                    "SELECT id, group_id, epoch, seq, timestamp_ms, items, bytes FROM groups"
                    f" WHERE group_id IN ({','.join('?' * len(some))})",
                    some,
                )
                rows += [GroupRow(*row) for row in cursor]
        except sqlite3.Error as error:
            raise self._failure(error) from error
        return rows

    def all_group_rows(self) -> list[GroupRow]:
        """The rows of all groups, also of those without items."""
        try:
            cursor = self._connection.execute(
                "SELECT id, group_id, epoch, seq, timestamp_ms, items, bytes FROM groups"
            )
            return [GroupRow(*row) for row in cursor]
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def iterate_items(self, row: int) -> Iterator[tuple[str, bytes]]:
        """As `all_items`, one at a time."""
        try:
            yield from self._connection.execute(
                "SELECT item_id, CAST(value AS BLOB) FROM items WHERE group_key = ? ORDER BY id",
                (row,),
            )
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def copy_group(self, source: StreamFile, row: GroupRow) -> None:
        """Take over a group of another file, with its history; `finish_copy` ends it."""
        execute, read = self._connection.execute, source._connection.execute
        try:
            if not self._connection.in_transaction:
                execute("BEGIN IMMEDIATE")
            key, self.next_row = self.next_row, self.next_row + 1
            values = msgspec.structs.astuple(row)[1:]
            execute("INSERT INTO groups VALUES (?,?,?,?,?,?,?)", (key, *values))
            self._connection.executemany(
                "INSERT INTO items (group_key, item_id, value) VALUES (?,?,?)",
                read(
                    "SELECT ?, item_id, value FROM items WHERE group_key = ? ORDER BY id",
                    (key, row.id),
                ),
            )
            self._connection.executemany(
                "INSERT INTO history (group_key, last_seq, timestamp_ms, changes) VALUES (?,?,?,?)",
                read(
                    "SELECT ?, last_seq, timestamp_ms, changes FROM history"
                    " WHERE group_key = ? ORDER BY id",
                    (key, row.id),
                ),
            )
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def finish_copy(self) -> None:
        """Commit what `copy_group` took over, and put all of it into the file itself."""
        try:
            self._connection.execute("COMMIT")
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def begin_epoch(self, epoch: str) -> None:
        """Let no group's numbering be taken for the one that it had."""
        try:
            self._connection.execute("UPDATE groups SET epoch = ?", (epoch,))
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def all_items(self, row: int) -> list[tuple[str, bytes]]:
        """Ids and values of a group's items, in order of first insertion."""
        try:
            return self._connection.execute(
                "SELECT item_id, CAST(value AS BLOB) FROM items WHERE group_key = ? ORDER BY id",
                (row,),
            ).fetchall()
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def some_items(self, row: int, item_ids: Sequence[str]) -> list[tuple[str, bytes]]:
        """Ids and values of those of `item_ids` that the group has."""
        found: list[tuple[str, bytes]] = []
        names = iter(item_ids)
        try:
            while some := list(islice(names, _SELECT_NAMES_MAX)):
                found += self._connection.execute(
                    "SELECT item_id, CAST(value AS BLOB) FROM items WHERE group_key = ?"
                    f" AND item_id IN ({','.join('?' * len(some))})",
                    (row, *some),
                ).fetchall()
        except sqlite3.Error as error:
            raise self._failure(error) from error
        return found

    def commit(self, batch: Batch) -> None:
        """Make `batch` durable, all of it or nothing."""
        execute = self._connection.execute
        try:
            execute("BEGIN IMMEDIATE")
            for sql, parameters in _statements(_DELETE_ITEMS, "(?,?)", batch.deleted):
                execute(sql, parameters)
            for sql, parameters in _statements(_INSERT_ITEMS, "(?,?,CAST(? AS TEXT))", batch.items):
                execute(sql, parameters)
            groups = [msgspec.structs.astuple(row) for row in batch.groups]
            for sql, parameters in _statements(_INSERT_GROUPS, "(?,?,?,?,?,?,?)", groups):
                execute(sql, parameters)
            rows = [msgspec.structs.astuple(row) for row in batch.history]
            for sql, parameters in _statements(_INSERT_HISTORY, "(?,?,?,?)", rows):
                execute(sql, parameters)
            for trim in batch.trims:
                self._trim(trim)
            if rows:  # more than comes, so that nothing piles up
                execute(_DELETE_EXPIRED, (batch.expired_ms, 2 * len(rows)))
            execute("COMMIT")
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def history(self, row: int, since: int) -> list[bytes]:
        """The `changes` of a group's rows with changes after `since`, in order."""
        try:
            cursor = self._connection.execute(
                "SELECT changes FROM history WHERE group_key = ? AND last_seq > ?"
                " ORDER BY last_seq",
                (row, since),
            )
            return [changes for (changes,) in cursor]
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def _trim(self, trim: Trim) -> None:
        size = 0
        cursor = self._connection.execute(
            "SELECT last_seq, length(changes) FROM history WHERE group_key = ?"
            " ORDER BY last_seq DESC",
            (trim.group_key,),
        )
        for last_seq, length in cursor:
            size += length
            if last_seq <= trim.seq or size > trim.bytes_max:
                self._connection.execute(
                    "DELETE FROM history WHERE group_key = ? AND last_seq <= ?",
                    (trim.group_key, last_seq),
                )
                return

    def _create(self, stream: str) -> None:
        self._connection.executescript(_SCHEMA)
        self._connection.execute("INSERT INTO stream VALUES (?)", (stream,))
        self._connection.execute("COMMIT")

    def _check(self, stream: str) -> None:
        if self._pragma("application_id") != _APPLICATION_ID:
            raise self._corrupt("is no stream file")
        version = self._pragma("user_version")
        if version > LAYOUT_VERSION:
            raise self._corrupt(f"has layout {version}, this release reads up to {LAYOUT_VERSION}")
        if version == 1:
            self._connection.executescript(
                f"BEGIN IMMEDIATE;{_HISTORY}PRAGMA user_version = {LAYOUT_VERSION};COMMIT"
            )
        row = self._connection.execute("SELECT name FROM stream").fetchone()
        if row != (stream,):
            raise self._corrupt(f"belongs to stream {row and row[0]!r}")

    def _pragma(self, name: str) -> int:
        return self._scalar(f"PRAGMA {name}")

    def _scalar(self, sql: str) -> int:
        (value,) = self._connection.execute(sql).fetchone()
        return int(value)

    def _corrupt(self, what: str) -> StorageError:
        return StorageError("storage_corrupt", f"{self._path} {what}")

    def _failure(self, error: sqlite3.Error | OSError) -> StorageError:
        return failure(self._path, error)


def stream_name(path: Path) -> str | None:
    """The name of the stream whose file this is; None where it can't be read."""
    try:
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        try:
            (name,) = connection.execute("SELECT name FROM stream").fetchone()
            return str(name)
        finally:
            connection.close()
    except (sqlite3.Error, TypeError):
        return None


def failure(path: Path, error: sqlite3.Error | OSError) -> StorageError:
    """What callers are told of an error on `path`."""
    name = getattr(error, "sqlite_errorname", "")
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return StorageError("storage_corrupt", f"{path} is damaged: {error}")
    return StorageError("storage_failed", f"{path}: {error}", retryable=True)


def _statements(
    sql: str, row: str, rows: Sequence[tuple[object, ...]]
) -> Iterator[tuple[str, list[object]]]:
    """Statements and parameters that together write `rows`, in order, in few numbers of rows."""
    start = 0
    for width in _ROWS_PER_STATEMENT:
        while len(rows) - start >= width:
            some = rows[start : start + width]
            start += width
            yield _sql(sql, row, width), [value for values in some for value in values]


@cache
def _sql(sql: str, row: str, width: int) -> str:
    return sql.format(rows=",".join([row] * width))
