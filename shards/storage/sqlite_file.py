"""One stream's SQLite file: schema, reads and commits. Blocking: runs on a storage thread.

WAL with `synchronous=FULL`: a commit is on disk when `commit` returns. It is one row of the table
`journal`, so it touches few pages however many items changed; once in a while all that is in the
journal goes to the other tables, and reads look at both meanwhile. Rows are written with few
statements of many rows each, because every statement gives up and takes back the interpreter's
lock, and the event loop is busy on the other side of it.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from itertools import islice
from pathlib import Path

import msgspec

from broker.errors import StorageError
from shards.files import remove_files, replace_file, sync_directory, sync_file, write_again
from shards.group import Change, entry
from shards.history import HistoryLimits
from shards.storage.pending import Commit, GroupRow, Pending, Trim

LAYOUT_VERSION = 3
_APPLICATION_ID = 0x53425231  # "SBR1"
_ROWS_PER_STATEMENT = (256, 64, 16, 4, 1)
_SELECT_NAMES_MAX = 500
DRAFT = "-draft"
"""Behind the name of a file: what is to become it."""
PAGE_CACHE_KIB = 512
"""Of SQLite's pages that an open file may keep in memory."""

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
_JOURNAL = """
CREATE TABLE journal (
    id INTEGER PRIMARY KEY,  -- grows with time
    entry BLOB NOT NULL  -- a commit that is not in the other tables yet
);
"""
_UPGRADES = {1: _HISTORY, 2: _JOURNAL}
"""What leads from a layout to the next one."""
_SCHEMA = f"""
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
{_JOURNAL}
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {LAYOUT_VERSION};
"""
_WAL = slice(18, 20)
"""Where a file's first page says that it has a write-ahead log, as 2 for writers and readers."""

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
_APPEND = "INSERT INTO journal (entry) VALUES (?)"
_ALL_KEPT = HistoryLimits(2**31, 2**53, 2**30, 2**30)
_encode = msgspec.msgpack.encode
_decode_commit = msgspec.msgpack.Decoder(Commit).decode
_decode_changes = msgspec.msgpack.Decoder(list[Change]).decode


Connect = Callable[[Path], sqlite3.Connection]


def connect_file(path: Path) -> sqlite3.Connection:
    """A connection to the file at `path`, which is made; any thread may use it, one at a time."""
    return sqlite3.connect(
        path, isolation_level=None, check_same_thread=False, cached_statements=64
    )


class StreamFile:
    """An open file. Used by one thread at a time.

    Raises (every method, the constructor included):
        StorageError: `storage_failed` or `storage_corrupt`, naming the file. After it the object
            is of no more use but for `close`; while it is `suspect`, for reads and commits too.
    """

    def __init__(
        self,
        path: Path,
        stream: str,
        limits: HistoryLimits = _ALL_KEPT,
        *,
        durable: bool = True,
        connect: Connect = connect_file,
    ) -> None:
        """Open the file at `path`, or make it; `limits` say what of its past gets into its tables.
        Without `durable` commits may get lost: for a copy, which is made durable as a whole."""
        self._path = path
        self._limits = limits
        self._log = path.with_name(f"{path.name}-wal")
        self.pending = Pending()
        """What only the journal holds."""
        self.suspect = False
        """A commit failed, and what it left in the log could count for whoever opens the file
        again: it is to be kept open."""
        try:
            if durable:  # a process that died may have left what it did not sync: nobody saw it
                write_again(self._log)
            if made := not path.exists():
                self._make(stream)
            self._connection = connect(path)
        except (sqlite3.Error, OSError) as error:
            raise self._failure(error) from error
        try:
            self._connection.execute(f"PRAGMA cache_size = -{PAGE_CACHE_KIB}")
            self._connection.execute("PRAGMA cache_spill = OFF")  # writes few pages twice
            self._connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'OFF'}")
            if made:
                self.next_row = 1
                return
            if not self._pragma("user_version") and not self._pragma("application_id"):
                self._fill(stream)
            self._check(stream)
            for (text,) in self._connection.execute("SELECT entry FROM journal ORDER BY id"):
                self.pending.add(_decode_commit(text), len(text))
            last = self._scalar("SELECT ifnull(max(id), 0) FROM groups")
            self.next_row = max(last, *(row.id for row in self.pending.groups.values()), 0) + 1
        except (sqlite3.Error, OSError) as error:
            self.close()
            raise self._failure(error) from error
        except msgspec.MsgspecError as error:
            self.close()
            raise self._corrupt(f"has a damaged journal: {error}") from error
        except StorageError:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; never fails."""
        suspect = self.suspect
        if suspect:
            with suppress(StorageError):
                self.clear_log()
        self._connection.close()
        if suspect:  # the log is gone, and may not come back, or it stays for all to see
            with suppress(OSError):
                sync_directory(self._path.parent)

    def groups(self) -> list[str]:
        """The ids of the groups that have items."""
        try:
            cursor = self._connection.execute("SELECT group_id FROM groups WHERE items > 0")
            return self.pending.over_groups([group_id for (group_id,) in cursor])
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def group_rows(self, group_ids: Sequence[str]) -> list[GroupRow]:
        """The rows of those of `group_ids` that the file knows."""
        known = self.pending.groups
        rows = [known[group_id] for group_id in group_ids if group_id in known]
        names = (group_id for group_id in group_ids if group_id not in known)
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
        """The rows of all groups, also of those without items; the file is flushed for it."""
        self.flush()
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
            found = self._connection.execute(
                "SELECT item_id, CAST(value AS BLOB) FROM items WHERE group_key = ? ORDER BY id",
                (row,),
            )
            yield from self.pending.over_items(row, found)
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def copy_group(self, source: StreamFile, row: GroupRow) -> None:
        """Take over a group of another file, which was flushed, with its history; `finish_copy`
        ends it."""
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

    def add_group(self, group_id: str, epoch: str, seq: int, timestamp_ms: int) -> int:
        """Make a group for `add_items` and `end_group`; its row. `finish_copy` ends it all."""
        execute = self._connection.execute
        try:
            if not self._connection.in_transaction:
                execute("BEGIN IMMEDIATE")
            key, self.next_row = self.next_row, self.next_row + 1
            values = (key, group_id, epoch, seq, timestamp_ms, 0, 0)
            execute("INSERT INTO groups VALUES (?,?,?,?,?,?,?)", values)
        except sqlite3.Error as error:
            raise self._failure(error) from error
        return key

    def add_items(self, row: int, items: Sequence[tuple[str, bytes]]) -> None:
        """Put items behind those of a group that is being made."""
        try:
            self._connection.executemany(
                "INSERT INTO items (group_key, item_id, value) VALUES (?,?,CAST(? AS TEXT))",
                [(row, item_id, value) for item_id, value in items],
            )
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def end_group(self, row: int) -> None:
        """Note how much a group that was made has."""
        size = "SELECT count(*), ifnull(sum(length(CAST(value AS BLOB)) + 1), 0) FROM items"
        try:
            self._connection.execute(
                f"UPDATE groups SET (items, bytes) = ({size} WHERE group_key = ?) WHERE id = ?",
                (row, row),
            )
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def finish_copy(self) -> None:
        """Commit what `copy_group` or `add_group` made, and put all of it into the file itself."""
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
        return list(self.iterate_items(row))

    def whole_group(
        self, row: int, bytes_max: int, *, entries: bool, ids: bool
    ) -> tuple[bytes, bytes | None] | None:
        """The JSON list of a group's values, or of its entries (`shards.group.entry`), and if asked
        for that of its ids; row by row, as there may be millions.

        None when one of them has more than `bytes_max` bytes.
        """
        values, names = bytearray(b"["), bytearray(b"[")
        for item_id, value in self.iterate_items(row):
            values += entry(item_id, value) if entries else value
            values += b","
            if ids:
                names += msgspec.json.encode(item_id) + b","
            if max(len(values), len(names)) > bytes_max + 2:
                return None
        return _ended(values), _ended(names) if ids else None

    def some_items(self, row: int, item_ids: Sequence[str]) -> list[tuple[str, bytes]]:
        """Ids and values of those of `item_ids` that the group has."""
        items, deleted = self.pending.items, self.pending.deleted
        found = [(i, items[row, i]) for i in item_ids if (row, i) in items]
        names = (i for i in item_ids if (row, i) not in items and (row, i) not in deleted)
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

    def commit(self, commit: Commit, trims: Sequence[Trim]) -> None:
        """Make `commit` durable, all of it or nothing. `trims`: of the history of its groups."""
        if self.suspect:
            self.clear_log()
        text = _encode(commit)
        try:
            self._connection.execute(_APPEND, (text,))
        except sqlite3.Error as error:
            raise self._commit_failed(error) from error
        self.pending.add(commit, len(text))
        for trim in trims:
            self.pending.trims[trim.group_key] = trim

    def flush(self, expired_ms: float = 0) -> None:
        """Put what is in the journal into the tables; history that is older than `expired_ms` goes,
        a little each time. It is synced as every commit, so that all that a later one finds in the
        log is on disk: see `clear_log`."""
        if not self.pending:
            return
        if self.suspect:
            self.clear_log()
        execute = self._connection.execute
        committing = False
        try:
            execute("BEGIN IMMEDIATE")
            self._write_tables(expired_ms)
            committing = True
            execute("COMMIT")
        except sqlite3.Error as error:
            raise (self._commit_failed if committing else self._failure)(error) from error
        self.pending = Pending()

    def _commit_failed(self, error: sqlite3.Error) -> StorageError:
        failed = self._failure(error)
        if failed.retryable:
            self.suspect = True
            with suppress(StorageError):  # tried again before the next commit
                self.clear_log()
        return failed

    def clear_log(self) -> None:
        """Put what was committed into the file itself and empty the log: what a commit left there
        whose sync failed is whole to everyone who reads it, as far as the page cache knows.
        After it nothing is `suspect` any more."""
        try:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            row = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if row[0]:
                raise StorageError(
                    "storage_failed",
                    f"{self._path}: another program reads it while its log has to be emptied",
                    retryable=True,
                )
            sync_file(self._log)  # SQLite does not: it could be whole again after a power cut
        except (sqlite3.Error, OSError) as error:
            raise self._failure(error) from error
        self.suspect = False

    def _write_tables(self, expired_ms: float) -> None:
        execute, pending = self._connection.execute, self.pending
        for sql, parameters in _statements(_DELETE_ITEMS, "(?,?)", list(pending.deleted)):
            execute(sql, parameters)
        items = [(group_key, i, value) for (group_key, i), value in pending.items.items()]
        for sql, parameters in _statements(_INSERT_ITEMS, "(?,?,CAST(? AS TEXT))", items):
            execute(sql, parameters)
        groups = [msgspec.structs.astuple(row) for row in pending.groups.values()]
        for sql, parameters in _statements(_INSERT_GROUPS, "(?,?,?,?,?,?,?)", groups):
            execute(sql, parameters)
        rows = [msgspec.structs.astuple(row) for row in pending.history_rows(self._limits)]
        for sql, parameters in _statements(_INSERT_HISTORY, "(?,?,?,?)", rows):
            execute(sql, parameters)
        for trim in pending.trims.values():
            self._trim(trim)
        if rows:  # more than comes, so that nothing piles up
            execute(_DELETE_EXPIRED, (expired_ms, 2 * len(rows)))
        execute("DELETE FROM journal")

    def history(self, row: int, since: int) -> list[Change]:
        """The changes of a group after `since`, as far as they are kept, in order; some before it
        may come with them."""
        try:
            cursor = self._connection.execute(
                "SELECT changes FROM history WHERE group_key = ? AND last_seq > ?"
                " ORDER BY last_seq",
                (row, since),
            )
            changes = [change for (text,) in cursor for change in _decode_changes(text)]
        except sqlite3.Error as error:
            raise self._failure(error) from error
        except msgspec.MsgspecError as error:
            raise self._corrupt(f"has a damaged history: {error}") from error
        return changes + self.pending.since(row, since)

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

    def _make(self, stream: str) -> None:
        """Make the file, all of it or nothing; its name is durable before there is a log."""
        path = self._path
        journal = path.with_name(f"{path.name}-journal")
        remove_files(self._log, journal)  # of a file whose name was not durable yet
        replace_file(path, _template().for_stream(stream), path.with_name(path.name + DRAFT))

    def _fill(self, stream: str) -> None:
        """Make the tables of a file that has none, left by a release that made them in it."""
        sync_directory(self._path.parent)
        self._connection.execute("PRAGMA journal_mode = WAL")
        _make_tables(self._connection, stream)

    def _check(self, stream: str) -> None:
        if self._pragma("application_id") != _APPLICATION_ID:
            raise self._corrupt("is no stream file")
        version = self._pragma("user_version")
        if version > LAYOUT_VERSION:
            raise self._corrupt(f"has layout {version}, this release reads up to {LAYOUT_VERSION}")
        if version < LAYOUT_VERSION:
            steps = "".join(_UPGRADES[old] for old in range(version, LAYOUT_VERSION))
            self._connection.executescript(
                f"BEGIN IMMEDIATE;{steps}PRAGMA user_version = {LAYOUT_VERSION};COMMIT"
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


def _ended(entries: bytearray) -> bytes:
    if len(entries) > 1:
        del entries[-1]  # the last comma
    entries += b"]"
    return bytes(entries)


def _make_tables(connection: sqlite3.Connection, stream: str) -> None:
    connection.executescript(_SCHEMA)
    connection.execute("INSERT INTO stream VALUES (?)", (stream,))
    connection.execute("COMMIT")


class _Template:
    """A new file in memory. To write that in one piece costs half of having SQLite make tables in a
    file, which makes a journal, syncs each of these and the directory, and removes the journal."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connection = sqlite3.Connection(
            ":memory:", isolation_level=None, check_same_thread=False
        )
        _make_tables(self._connection, "")

    def for_stream(self, stream: str) -> bytes:
        """What the file of a stream begins with."""
        with self._lock:
            self._connection.execute("UPDATE stream SET name = ?", (stream,))
            data = bytearray(self._connection.serialize())
        data[_WAL] = b"\2\2"
        return bytes(data)


@cache
def _template() -> _Template:
    return _Template()


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


def closed_groups(path: Path, stream: str) -> list[str] | None:
    """As `StreamFile.groups`, of a file that nobody has open, at a fraction of the cost.

    None when it can't be read so: it has a log or a journal to be looked at, or something is wrong
    with it.
    """
    if path.with_name(f"{path.name}-wal").exists():
        return None
    if not path.exists():
        return []
    try:
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?immutable=1", uri=True)
        try:
            if connection.execute("SELECT name FROM stream").fetchone() != (stream,):
                return None
            if connection.execute("SELECT 1 FROM journal LIMIT 1").fetchone():
                return None
            cursor = connection.execute("SELECT group_id FROM groups WHERE items > 0")
            return [group_id for (group_id,) in cursor]
        finally:
            connection.close()
    except sqlite3.Error:
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
