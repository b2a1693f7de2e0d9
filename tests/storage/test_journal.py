"""The journal of a stream's file: what is in it and not in the tables yet counts all the same."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from pathlib import Path

import pytest

from broker import messages
from shards.storage import pending, sqlite
from shards.storage.sqlite import SqliteStorage
from tests.storage.test_history import epoch_of, missed
from tests.storage.test_storages import (
    Storages,
    asynchronous,
    delete,
    get,
    is_corrupt,
    listing,
    perform,
    put,
    settle,
)


@pytest.fixture(params=["sqlite", "sqlite tiny cache"])
def files(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Storages:
    """Storages that write their tables only when a test wants it."""
    monkeypatch.setattr(sqlite, "FLUSH_AFTER_S", 1e6)
    return Storages(request.param, tmp_path / "shard-0")


def crashed(files: Storages) -> Storages:
    """The files as kill -9 leaves them, under another path."""
    copy = files.directory.with_name("crashed")
    shutil.copytree(files.directory, copy, dirs_exist_ok=True)
    left = Storages(files.kind, copy)
    left.clock = files.clock
    return left


def rows(files: Storages, table: str) -> int:
    connection = sqlite3.connect(files.directory / "s.db")
    try:
        (count,) = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
        return int(count)
    finally:
        connection.close()


@asynchronous
async def test_what_only_the_journal_holds_survives(files: Storages) -> None:
    async with files.opened() as storage:
        await perform(storage, put("first", 1), put("gone", 1), put("last", 1))
        await perform(storage, put("first", 2), delete("gone"), put("other", 1, "h"))
        epoch = await epoch_of(storage)
        assert (rows(files, "items"), rows(files, "journal")) == (0, 2)
        left = crashed(files)
    async with left.opened() as storage:
        assert await perform(storage, listing(), get("gone"), get("other", "h")) == [
            [2, 1],
            None,
            1,
        ]
        assert sorted(await storage.groups("s")) == ["g", "h"]
        assert await missed(storage, 0, epoch) == [1, 2, 3, 4, 5]


@asynchronous
async def test_journal_and_tables_are_read_as_one(files: Storages) -> None:
    """An item that was deleted and set again is the youngest, wherever its old row is."""
    async with files.opened() as storage:
        await perform(storage, *(put(name, 1) for name in "abcd"), put("i", 1, "h"))
    async with files.opened() as storage:
        assert rows(files, "journal") == 0
        await perform(storage, delete("a"), put("b", 2), put("a", 3), put("e", 4), delete("c"))
        await perform(storage, delete("i", "h"))
        expected = [2, 1, 3, 4]
        assert await perform(storage, listing()) == [expected]
        left = crashed(files)
    for one in (left, files):
        async with one.opened() as storage:
            assert await perform(storage, listing(), get("c"), get("a")) == [expected, None, 3]
            assert await storage.groups("s") == ["g"]
        assert rows(one, "journal") == 0
        async with one.opened() as storage:
            assert await perform(storage, listing()) == [expected]


@asynchronous
async def test_the_tables_are_written_before_long(
    files: Storages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "FLUSH_AFTER_S", 0.01)
    async with files.opened() as storage:
        for n in range(3):
            await perform(storage, put("i", n))
            async with asyncio.timeout(10):
                while rows(files, "journal"):
                    await asyncio.sleep(0.01)
            assert rows(files, "items") == 1
        assert await perform(storage, get("i")) == [2]


@asynchronous
async def test_writes_and_flushes_take_turns(
    files: Storages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "FLUSH_AFTER_S", 0)
    monkeypatch.setattr(sqlite, "FLUSH_PAUSE_S", 0)
    monkeypatch.setattr(pending, "CHANGES_MAX", 7)
    async with files.opened() as storage:
        for n in range(200):
            await perform(storage, put(str(n % 20), n))
        expected = list(range(180, 200))
        assert await perform(storage, listing()) == [expected]
        left = crashed(files)
    async with left.opened() as storage:
        assert await perform(storage, listing()) == [expected]


@asynchronous
async def test_the_end_and_a_flush_do_not_meet(
    files: Storages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written twice, the history would have each change twice, and be of no use."""
    monkeypatch.setattr(sqlite, "FLUSH_AFTER_S", 0.001)
    monkeypatch.setattr(sqlite, "FLUSH_PAUSE_S", 0)
    for number in range(1, 30):
        async with files.opened() as storage:
            await asyncio.gather(
                *(settle(storage, stream, put("i", number)) for stream in ("s", "t", "u"))
            )
            await asyncio.sleep(0.0005)
    async with files.opened() as storage:
        past = messages.ReadHistory(0, "", "g", None, 100)
        for stream in ("s", "t", "u"):
            ((found, _),) = await settle(storage, stream, past)
            assert [change.seq for change in found.changes] == list(range(20, 30))


@asynchronous
async def test_a_long_journal_goes_to_the_tables(
    files: Storages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pending, "BYTES_MAX", 5000)
    async with files.opened() as storage:
        for n in range(20):
            await perform(storage, put(str(n), "x" * 400))
            assert rows(files, "journal") < 20
        assert rows(files, "items") > 5


@asynchronous
async def test_a_flush_that_fails_loses_nothing(files: Storages) -> None:
    async with files.opened() as storage:
        assert isinstance(storage, SqliteStorage)
        await perform(storage, put("i", 1))
        lock = sqlite3.connect(files.directory / "s.db", isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")  # as long as SQLite waits, and longer
        state = storage._streams["s"]
        assert state.file is not None
        state.file._connection.execute("PRAGMA busy_timeout = 1")
        await storage._flush_now("s")
        assert state.file is None  # nothing of it is trusted
        lock.close()
        assert await perform(storage, get("i"), put("i", 2)) == [
            1,
            {"old_value": 1, "new_value": 2},
        ]


@asynchronous
async def test_a_damaged_journal(files: Storages) -> None:
    async with files.opened() as storage:
        await perform(storage, put("i", 1))
        left = crashed(files)
    path = left.directory / "s.db"
    connection = sqlite3.connect(path)
    connection.execute("UPDATE journal SET entry = x'00'")
    connection.commit()
    connection.close()
    async with left.opened() as storage:
        for operation in (get("i"), put("i", 2)):
            ((outcome, _),) = await settle(storage, "s", operation)
            assert is_corrupt(outcome, path)
