"""The power is cut at random points, and at those where it would hurt; nothing answered is lost."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from broker import messages
from broker.errors import ConfigError, StorageError
from shards import files, manifest
from shards.files import make_directory
from shards.group import Done, Operation, Snapshot
from shards.storage.clock_file import ClockFile
from shards.storage.sqlite import SqliteStorage
from tests.power.expected import Expected
from tests.power.lives import OPEN_FILES_MAX, Clock, Life, opened, recorded_files, run_seed, settle
from tests.power.recorder import Connection, Recorder
from tests.power.state import State
from tests.storage.test_storages import asynchronous

SEEDS = 20


@pytest.mark.parametrize("first", range(0, SEEDS, 4))
def test_random_lives(first: int) -> None:
    """`make power CUTS=10000` runs more of them, `python -m tests.power --seed N` one again."""
    asyncio.run(run_seeds(first, first + 4))


async def run_seeds(first: int, last: int) -> None:
    for seed in range(first, last):
        await run_seed(seed)


@asynchronous
async def test_a_seed_tells_all_of_a_life(tmp_path: Path) -> None:
    logs = []
    for name in ("a", "b"):
        make_directory(tmp_path / name)
        life = Life(tmp_path / name, State(), Expected(), random.Random(5))
        await life.live(Clock(), 25)
        logs.append([[len(x) if isinstance(x, bytes) else x for x in e] for e in life.recorder.log])
    assert logs[0] == logs[1]
    assert len(logs[0]) > 100


def _never_synced(connection: Connection, sql: str, parameters: Any = ()) -> Any:
    return execute(connection, sql.replace("synchronous = FULL", "synchronous = OFF"), parameters)


execute = Connection.execute


@pytest.mark.parametrize(
    ("owner", "name", "careless"),
    [
        (Connection, "execute", _never_synced),
        (files, "sync_directory", lambda _: None),
    ],
)
def test_carelessness_is_found(
    owner: Any, name: str, careless: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What these tests are worth: they fail when something is not synced."""
    monkeypatch.setattr(owner, name, careless)
    with pytest.raises(AssertionError):
        asyncio.run(run_seeds(0, 20))


def put(item_id: str, value: str) -> Operation:
    return messages.Set(0, "", "g", item_id, b'"%s"' % value.encode())


async def items_of(storage: SqliteStorage) -> bytes | StorageError:
    ((snapshot, _),) = await settle(storage, "s", messages.Join(0, "", "g", None))
    return snapshot.data if isinstance(snapshot, Snapshot) else snapshot


def uncut(state: State, recorder: Recorder, count: int | None = None) -> State:
    """The disk when `count` calls, or all, were made."""
    state = state.copy()
    for entry in recorder.log[:count]:
        state.apply(entry)
    return state


def disks(state: State, count: int = 30) -> list[State]:
    """What may be left of it."""
    return [state.after_power_cut(random.Random(seed)) for seed in range(count)]


async def items_on(state: State, root: Path) -> bytes | StorageError:
    make_directory(root)
    recorder = Recorder(root, state)
    with recorded_files(recorder):
        async with opened(root, Clock(), partial(recorder.connect, checkpoint_pages=1000)) as found:
            items = await items_of(found)
    recorder.close()
    return items


@asynchronous
async def test_what_was_seen_after_a_kill_is_durable(tmp_path: Path) -> None:
    """A process dies between writing to the log and syncing it; the next one reads the write from
    the page cache and shows it, then the power goes."""
    recorder = Recorder(tmp_path, State())
    with recorded_files(recorder):
        connect = partial(recorder.connect, checkpoint_pages=1000)
        async with opened(tmp_path, Clock(), connect) as storage:
            await settle(storage, "s", put("a", "old"))
            begin = len(recorder.log)
            await settle(storage, "s", put("a", "new"))
            recorder.stopped = True
    recorder.close()
    (synced,) = [i for i in range(begin, len(recorder.log)) if recorder.log[i][0] == "sync"]
    killed = uncut(State(), recorder, synced)
    make_directory(tmp_path / "next")
    recorder = Recorder(tmp_path / "next", killed)
    with recorded_files(recorder):
        connect = partial(recorder.connect, checkpoint_pages=1000)
        async with opened(tmp_path / "next", Clock(), connect) as storage:
            seen = await items_of(storage)
            recorder.stopped = True
    recorder.close()
    assert seen == b'["new"]', "the page cache had it"
    for number, disk in enumerate(disks(uncut(killed, recorder))):
        assert await items_on(disk, tmp_path / str(number)) == seen


@pytest.mark.parametrize("failures", range(1, 7))
@asynchronous
async def test_a_sync_that_fails(tmp_path: Path, failures: int) -> None:
    """The write fails, and nobody sees it, not even when the file is opened again; what is written
    after it is durable, though the kernel thinks that all before it is."""
    make_directory(tmp_path / "first")
    recorder = Recorder(tmp_path / "first", State())
    with recorded_files(recorder):
        connect = partial(recorder.connect, checkpoint_pages=1000)
        async with opened(tmp_path / "first", Clock(), connect) as storage:
            await settle(storage, "s", put("a", "old"))
            recorder.failing_syncs = failures
            (failed, _), _ = await settle(storage, "s", put("a", "refused"), put("b", "refused"))
            assert isinstance(failed, StorageError)
            assert failed.retryable
            assert await items_of(storage) == b'["old"]'
            while recorder.failing_syncs:
                ((outcome, _),) = await settle(storage, "s", put("c", "more"))
                if isinstance(outcome, Done):
                    break
                assert await items_of(storage) == b'["old"]'
            await settle(storage, "s", put("c", "more"))
            expected = await items_of(storage)
            assert expected == b'["old","more"]'
            recorder.stopped = True
    recorder.close()
    for number, disk in enumerate(disks(uncut(State(), recorder))):
        assert await items_on(disk, tmp_path / str(number)) == expected


@asynchronous
async def test_a_disk_that_fails_for_all_streams(tmp_path: Path) -> None:
    """Files that have to stay open are bounded too, and all is well when the disk is."""
    streams = [f"s{number}" for number in range(5 * OPEN_FILES_MAX)]
    recorder = Recorder(tmp_path, State())
    with recorded_files(recorder):
        connect = partial(recorder.connect, checkpoint_pages=1000)
        async with opened(tmp_path, Clock(), connect) as storage:
            for stream in streams:
                await settle(storage, stream, put("a", "old"))
            assert storage.open_files == OPEN_FILES_MAX
            recorder.failing_syncs = 10**6
            for stream in streams:
                ((outcome, _),) = await settle(storage, stream, put("a", "refused"))
                assert isinstance(outcome, StorageError)
                assert outcome.retryable
                assert storage.suspect_files <= storage.open_files <= 2 * OPEN_FILES_MAX
            assert storage.suspect_files >= OPEN_FILES_MAX
            recorder.failing_syncs = 0
            for stream in streams:
                ((snapshot, _),) = await settle(storage, stream, messages.Join(0, "", "g", None))
                assert isinstance(snapshot, Snapshot)
                assert snapshot.data == b'["old"]'
                ((outcome, _),) = await settle(storage, stream, put("a", "new"))
                assert isinstance(outcome, Done)
            assert storage.suspect_files == 0
            assert storage.open_files == OPEN_FILES_MAX
    recorder.close()


def after_each_call(recorder: Recorder, before: State) -> Iterator[tuple[int, State]]:
    """Each number of calls, and disks that may be left then."""
    for count in range(len(recorder.log) + 1):
        for disk in disks(uncut(before, recorder, count), 10):
            yield count, disk


def test_the_manifest(tmp_path: Path) -> None:
    """Whenever the power goes, the folder can be used, and what was decided stays."""
    make_directory(tmp_path / "first")
    recorder = Recorder(tmp_path / "first", State())
    with recorded_files(recorder):
        manifest.check(tmp_path / "first" / "data" / "store", 2)
        written = len(recorder.log)
        manifest.replace(tmp_path / "first" / "data" / "store", 3)
    recorder.close()
    for number, (count, disk) in enumerate(after_each_call(recorder, State())):
        root = tmp_path / str(number)
        root.mkdir()
        disk.materialize(root)
        store = root / "data" / "store"
        current = manifest.read(store)
        shards = 0 if current is None else current.shards
        decided = {0, 2} if count < written else {2, 3} if count < len(recorder.log) else {3}
        assert shards in decided
        if not shards:
            manifest.check(store, 2)
        else:
            with pytest.raises(ConfigError):
                manifest.check(store, 4)


def test_the_clock_file(tmp_path: Path) -> None:
    """What was reserved is reserved in all lives that come."""
    make_directory(tmp_path / "first")
    recorder = Recorder(tmp_path / "first", State())
    reserved = [(0, 0)]
    with recorded_files(recorder):
        clock = ClockFile(tmp_path / "first")
        for timestamp_ms in (1000, 5000, 20000):
            clock.reserve(timestamp_ms)
            reserved.append((len(recorder.log), timestamp_ms))
    recorder.close()
    for number, (count, disk) in enumerate(after_each_call(recorder, State())):
        root = tmp_path / str(number)
        root.mkdir()
        disk.materialize(root)
        assert ClockFile(root).read() >= max(ms for index, ms in reserved if index <= count)
