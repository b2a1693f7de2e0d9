"""How a stream's file is made: whole, durable, and as SQLite would have made it."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest

from broker.clock import wall_clock_ms
from broker.errors import StorageError
from shards import files
from shards.group import Change, Kind
from shards.history import HistoryLimits
from shards.storage.pending import Commit, GroupRow
from shards.storage.sqlite import SqliteStorage
from shards.storage.sqlite_file import StreamFile, stream_name

NAMES = ["s", "", "ünï ∞", "a\"b'c", "n" * 4000]


def commit(file: StreamFile, group_id: str = "g") -> None:
    change = Change(Kind.CREATE, "i", b"1", 1, 1)
    file.commit(Commit([GroupRow(file.next_row, group_id, "e", 1, 1, 1, 2)], [(1, [change])]), [])


def described(path: Path) -> list[object]:
    """What SQLite says of a closed file."""
    connection = sqlite3.connect(path)
    try:
        pragmas = ("application_id", "user_version", "journal_mode", "page_size", "encoding")
        found = [connection.execute(f"PRAGMA {name}").fetchone() for name in pragmas]
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        tables = "SELECT type, name, tbl_name, rootpage, sql FROM sqlite_master ORDER BY rowid"
        return found + connection.execute(tables).fetchall()
    finally:
        connection.close()


def left_by_an_older_release(path: Path, *, with_log: bool) -> None:
    """A file that its process was killed over, before it had tables."""
    if with_log:
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.close()
    else:
        path.touch()


@pytest.mark.parametrize("name", NAMES)
def test_a_new_file_is_what_sqlite_makes(name: str, tmp_path: Path) -> None:
    made, filled = tmp_path / "made.db", tmp_path / "filled.db"
    left_by_an_older_release(filled, with_log=False)
    for path in (made, filled):
        file = StreamFile(path, name)
        assert file.next_row == 1
        commit(file)
        file.flush()
        commit(file)
        file.close()
        assert stream_name(path) == name
        again = StreamFile(path, name)
        assert (again.groups(), again.next_row) == (["g"], 2)
        again.close()
    assert described(made) == described(filled)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["filled.db", "made.db"]


@pytest.mark.parametrize("with_log", [False, True])
def test_a_file_without_tables_gets_them(with_log: bool, tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    left_by_an_older_release(path, with_log=with_log)
    file = StreamFile(path, "s")
    commit(file)
    file.close()
    again = StreamFile(path, "s")
    assert again.groups() == ["g"]
    again.close()


def test_a_log_without_its_file_counts_for_nothing(tmp_path: Path) -> None:
    """Its names were not durable when the power went, nobody was told of it."""
    path = tmp_path / "s.db"
    file = StreamFile(path, "s")
    commit(file, "lost")
    log = path.with_name("s.db-wal")
    left = log.read_bytes()
    assert left
    file.close()
    path.unlink()
    log.write_bytes(left)
    path.with_name("s.db-journal").write_bytes(bytes.fromhex("d9d505f920a163d7") + bytes(504))
    path.with_name("s.db-draft").write_bytes(b"half of it")
    file = StreamFile(path, "s")
    assert (file.groups(), file.next_row) == ([], 1)
    commit(file)
    file.close()
    again = StreamFile(path, "s")
    assert again.groups() == ["g"]
    again.close()
    assert [path.name for path in tmp_path.iterdir()] == ["s.db"]


def test_a_file_has_its_name_only_when_all_of_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a full disk nor a kill leaves a part of it where the next process finds it."""

    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[:5000])
        raise OSError(28, "No space left on device")

    path = tmp_path / "s.db"
    with monkeypatch.context() as patched:
        patched.setattr(files, "write_file", full)
        with pytest.raises(StorageError) as caught:
            StreamFile(path, "s")
    assert caught.value.retryable
    assert not path.exists()
    file = StreamFile(path, "s")
    commit(file)
    assert file.groups() == ["g"]
    file.close()


def test_drafts_of_a_killed_process_go(tmp_path: Path) -> None:
    for name in ("a.db-draft", "b%2E.db-draft", "a.db", "note"):
        (tmp_path / name).write_bytes(b"")

    async def scenario() -> None:
        limits = HistoryLimits(10, 1000, 1000, 1000)
        storage = SqliteStorage(
            tmp_path, wall_clock_ms, limits, response_bytes_max=1000, cache_bytes_max=1000
        )
        await storage.open()
        await storage.close()

    asyncio.run(scenario())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.db", "note"]
