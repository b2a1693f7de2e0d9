"""Lives of a storage between power cuts, told by one seed.

A life is a random run of the production storage on a recorded disk: writes in batches, reads,
closing and opening again, clocks that jump, checkpoints all the time, streams that give way to
others. Then the power is cut at random points of it, again and again; each time what may be left
of the disk is opened and compared with what was answered by then. The next life goes on from the
last of these disks, or from one whose process was killed while the power stayed.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import sqlite3
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from broker import messages
from broker.errors import StorageError
from shards import files, manifest
from shards.group import Done, Operation, Past, Snapshot
from shards.history import HistoryLimits
from shards.storage import pending
from shards.storage.base import Settled
from shards.storage.sqlite import SqliteStorage
from shards.storage.sqlite_file import (
    LAYOUT_VERSION,
    Connect,
    StreamFile,
    connect_file,
    stream_name,
)
from tests.power.expected import Expected, Stream, after
from tests.power.recorder import Recorder
from tests.power.state import State

HISTORY = HistoryLimits(events_max=12, age_ms_max=1e15, group_bytes_max=10**6, bytes_max=10**6)
SHARDS = 2
OPEN_FILES_MAX = 2
CHANGES_MAX = 9
"""Streams give way to others, and journals to tables, all the time."""
PATIENCE_S = 30.0

STREAMS = ("s", "t/..", "ü" * 120)
GROUPS = ("g", "h", "")
ITEMS = ("a", "b", "c", "d", "e")
HOUR_MS = 3_600_000


class Clock:
    """A wall clock that is set by hand."""

    def __init__(self) -> None:
        self.now_ms = 1_700_000_000_000

    def __call__(self) -> int:
        return self.now_ms


@dataclass
class Mark:
    """What is known from this length of the recorder's log on."""

    index: int
    note: Callable[[Expected], None]


@contextmanager
def folder() -> Iterator[Path]:
    """A directory for a little while, in memory where that can be had."""
    memory = Path("/dev/shm")
    above = memory if os.access(memory, os.W_OK) else None
    path = Path(tempfile.mkdtemp(prefix="power-", dir=above))
    try:
        yield path
    finally:
        shutil.rmtree(path)


@contextmanager
def short_journals() -> Iterator[None]:
    """Journals go to their tables all the time."""
    before = pending.CHANGES_MAX
    pending.CHANGES_MAX = CHANGES_MAX
    try:
        yield
    finally:
        pending.CHANGES_MAX = before


@contextmanager
def recorded_files(recorder: Recorder) -> Iterator[None]:
    """`shards.files` works on the recorder's disk."""
    files.os = recorder.os
    try:
        yield
    finally:
        files.os = os


@asynccontextmanager
async def opened(
    root: Path, clock: Clock, connect: Connect, cache_bytes_max: int = 2**20
) -> AsyncIterator[SqliteStorage]:
    """The storage of a shard, as its process opens it."""
    directory = root / "store"
    manifest.check(directory, SHARDS)
    storage = SqliteStorage(
        directory / "shard-0",
        clock,
        HISTORY,
        response_bytes_max=2**24,
        cache_bytes_max=cache_bytes_max,
        open_files_max=OPEN_FILES_MAX,
        connect=connect,
    )
    await storage.open()
    try:
        yield storage
    finally:
        await storage.close()


async def settle(storage: SqliteStorage, stream: str, *operations: Operation) -> list[Settled]:
    """What came of `operations`, performed in one batch."""
    settled: asyncio.Future[list[Settled]] = asyncio.get_running_loop().create_future()
    storage.execute(stream, operations, lambda found: settled.set_result(list(found)))
    async with asyncio.timeout(PATIENCE_S):
        return await settled


class Life:
    """One life, from a disk `before` of which `expected` is known."""

    def __init__(self, root: Path, before: State, expected: Expected, rng: random.Random) -> None:
        self.before = before
        self.known_before = expected.copy()
        self.expected = expected
        self.recorder = Recorder(root, before, rng.getrandbits(32))
        self.marks: list[Mark] = []
        self.rng = rng
        self.root = root
        self.failures = rng.random() < 0.3  # of syncs

    async def live(self, clock: Clock, steps: int) -> None:
        """Go on for so many steps."""
        rng = self.rng
        connect = partial(self.recorder.connect, checkpoint_pages=rng.choice((2, 5, 12, 1000)))
        cache = rng.choice((1024, 2**20))
        try:
            with short_journals(), recorded_files(self.recorder):
                while steps > 0:
                    async with opened(self.root, clock, connect, cache) as storage:
                        self.recorder.failing_syncs = 0
                        await look(storage, self.expected, self._mark)
                        steps -= 1
                        while steps > 0 and rng.random() > 0.05:
                            steps -= 1
                            clock.now_ms += rng.choice((0, 1, 50, 3000, HOUR_MS, -HOUR_MS))
                            await self._step(storage)
                        # what closing does at the end of the life is nobody's business
                        self.recorder.stopped = steps <= 0
        finally:
            self.recorder.stopped = True
            self.recorder.close()

    async def _step(self, storage: SqliteStorage) -> None:
        rng = self.rng
        stream = rng.choice(STREAMS)
        if rng.random() < 0.2:
            self.recorder.failing_syncs = 0
            await look_at_group(storage, self.expected, stream, rng.choice(GROUPS), self._mark)
            return
        operations = [self._write() for _ in range(rng.choice((1, 1, 2, 6)))]
        groups = after(self.expected.answered(stream), operations)
        changes = groups != self.expected.answered(stream)
        if changes:
            self._mark(lambda expected: expected.may_be(stream, groups))
        if self.failures and rng.random() < 0.2:
            self.recorder.failing_syncs = rng.randint(1, 6)
        settled = await settle(storage, stream, *operations)
        if any(isinstance(outcome, StorageError) for outcome, _ in settled):
            assert all(isinstance(outcome, StorageError) for outcome, _ in settled)
            return
        if changes:  # else nothing was committed, and what failed before may still come up
            self._answered(stream, groups, settled)

    def _answered(self, stream: str, groups: Stream, settled: list[Settled]) -> None:
        seen: list[tuple[str, int]] = []
        for outcome, state in settled:
            assert isinstance(outcome, Done)
            assert state is not None
            group = groups.get(state.group_id)
            if group is None:
                continue
            assert group.epoch in (None, state.head.epoch)
            groups[state.group_id] = replace(group, epoch=state.head.epoch)
            if (change := outcome.change) is not None:
                told = (change.kind.value, change.item_id, json.loads(change.data))
                assert (*told, change.event_type) == group.changes[change.seq - 1]
                seen.append((state.group_id, change.timestamp_ms))

        changed = bool(seen)

        def note(expected: Expected) -> None:
            if changed:  # only a commit makes sure that one before it that failed is gone
                expected.settle(stream, groups)
            for group_id, timestamp_ms in seen:
                expected.seen(stream, group_id, timestamp_ms)

        self._mark(note)

    def _mark(self, note: Callable[[Expected], None]) -> None:
        note(self.expected)
        self.marks.append(Mark(len(self.recorder.log), note))

    def _write(self) -> Operation:
        rng = self.rng
        group_id, item_id = rng.choice(GROUPS), rng.choice(ITEMS)
        kind = rng.random()
        if kind < 0.2:
            return messages.Delete(0, "", group_id, item_id)
        value = rng.randrange(10**6), "x" * rng.choice((0, 10, 500, 6000))
        data = json.dumps(value).encode()
        if kind < 0.35:
            return messages.Send(0, "", group_id, rng.choice((item_id, None)), "t", data)
        return messages.Set(0, "", group_id, item_id, data)

    def cut(self, index: int) -> tuple[State, Expected]:
        """The disk, with what is not synced, and what is known when `index` calls were made."""
        state, expected = self.before.copy(), self.known_before.copy()
        for entry in self.recorder.log[:index]:
            state.apply(entry)
        for mark in self.marks:
            if mark.index <= index:
                mark.note(expected)
        return state, expected

    def moment(self, first: int = 0) -> int:
        """A number of calls, from `first` on; often just before or after something was synced."""
        log = self.recorder.log
        if self.rng.random() < 0.5:
            syncs = [i for i in range(first, len(log)) if log[i][0].startswith("sync")]
            if syncs:
                return self.rng.choice(syncs) + self.rng.randint(0, 1)
        return self.rng.randint(first, len(log))


Note = Callable[[Callable[[Expected], None]], None]


async def look(storage: SqliteStorage, expected: Expected, note: Note) -> None:
    """Read all; it is what it may be, and from now on what was seen."""
    streams = set(await storage.streams())
    for stream in STREAMS:
        with_items = sorted(await storage.groups(stream))
        assert not with_items or stream in streams
        seen = {group_id: await read(storage, stream, group_id, note) for group_id in GROUPS}
        for alternative in expected.streams.get(stream, [{}]):
            found = matching(alternative, seen)
            if found is not None:
                break
        else:
            raise AssertionError(f"{stream!r} holds {seen}, may hold {expected.streams[stream]}")
        assert with_items == sorted(g for g, (_, items, _) in seen.items() if items)
        note(lambda expected, stream=stream, found=found: expected.settle(stream, found))


Seen = tuple[str, dict[str, object], Past]


async def read(storage: SqliteStorage, stream: str, group_id: str, note: Note) -> Seen:
    """Epoch, items and history of a group, by a join and a call, in an order of their own."""
    join = messages.Join(0, "", group_id, None, with_ids=True)
    ask = messages.ReadHistory(0, "", group_id, None, 10**6)
    (snapshot, _), (past, _) = await settle(storage, stream, join, ask)
    assert isinstance(snapshot, Snapshot), snapshot
    assert isinstance(past, Past), past
    assert (snapshot.seq, snapshot.epoch) == (past.seq, past.epoch)
    note(lambda expected: expected.seen(stream, group_id, snapshot.timestamp_ms))
    assert snapshot.ids is not None
    items = zip(json.loads(snapshot.ids), json.loads(snapshot.data), strict=True)
    return snapshot.epoch, dict(items), past


def matching(alternative: Stream, seen: dict[str, Seen]) -> Stream | None:
    """The stream as it was seen, with its epochs, if that is `alternative`."""
    found = {}
    for group_id, (epoch, items, past) in seen.items():
        group = alternative.get(group_id)
        if group is None or not group.seq:
            if past.seq or items:
                return None
            continue
        told = [
            (change.kind.value, change.item_id, json.loads(change.data), change.event_type)
            for change in past.changes
        ]
        kept_from = max(group.history_from, group.seq - HISTORY.events_max)
        if (
            past.seq != group.seq
            or list(items.items()) != list(group.items.items())
            or told != list(group.changes[kept_from:])
            or [change.seq for change in past.changes] != list(range(kept_from + 1, past.seq + 1))
            or group.epoch not in (None, epoch)
        ):
            return None
        found[group_id] = replace(group, epoch=epoch)
    return found


async def look_at_group(
    storage: SqliteStorage, expected: Expected, stream: str, group_id: str, note: Note
) -> None:
    """Nothing but what was answered is visible, also after a write that failed."""
    seen = {group_id: await read(storage, stream, group_id, note)}
    answered = expected.answered(stream)
    assert matching(answered, seen) is not None, f"{seen} is not {answered.get(group_id)}"


async def check(state: State, expected: Expected, clock: Clock, rng: random.Random) -> Expected:
    """Open a disk after a power cut, and go on a little; what was seen of it at first."""

    def note(what: Callable[[Expected], None]) -> None:
        what(expected)

    floors = dict(expected.floors)
    with folder() as root:
        state.materialize(root)
        async with opened(root, clock, connect_file) as storage:
            await look(storage, expected, note)
            resolved = expected.copy()
            resolved.floors = floors  # what was told here was told by a copy
            stream, group_id = rng.choice(STREAMS), rng.choice(GROUPS)
            group = expected.answered(stream).get(group_id)
            send = messages.Send(0, "", group_id, None, "t", b"1")
            ((done, head),) = await settle(storage, stream, send)
            assert isinstance(done, Done), done
            assert done.change is not None
            assert head is not None
            expected.seen(stream, group_id, done.change.timestamp_ms)
            assert done.change.seq == (group.seq + 1 if group else 1)
            assert group is None or head.head.epoch == group.epoch
    return resolved


def downgraded(state: State) -> State:
    """The same disk, its streams in the first layout."""
    with folder() as root:
        state.materialize(root)
        for path in root.rglob("*.db"):
            connection = sqlite3.connect(path)
            (layout,) = connection.execute("PRAGMA user_version").fetchone()
            connection.close()
            if layout == LAYOUT_VERSION:
                file = StreamFile(path, str(stream_name(path)))
                file.flush()
                file.close()
                connection = sqlite3.connect(path)
                connection.executescript(
                    "DROP TABLE journal; DROP TABLE history; PRAGMA user_version = 1;"
                )
                connection.close()
        return loaded(root)


def loaded(root: Path) -> State:
    """The files below `root`, all durable."""
    with folder() as empty:
        recorder = Recorder(empty, State())
        with recorded_files(recorder):
            for path in sorted(root.rglob("*")):
                target = empty / path.relative_to(root)
                if path.is_dir():
                    recorder.os.mkdir(target)
                else:
                    files.write_file(target, path.read_bytes())
        recorder.close()
    state = State()
    for entry in recorder.log:
        state.apply(entry)
    for directory in state.directories.values():
        directory.sync()
    return state


async def run_seed(seed: int, lives: int = 3, cuts: int = 6) -> int:
    """Live and cut the power; how often it was cut.

    Raises:
        AssertionError: something that was promised did not hold.
    """
    rng = random.Random(seed)
    state, expected, clock = State(), Expected(), Clock()
    for _ in range(lives):
        with folder() as root:
            life = Life(root, state, expected, rng)
            await life.live(clock, rng.randint(3, 25))
            for _ in range(cuts):
                index = life.moment()
                uncut, known = life.cut(index)
                disk = uncut.after_power_cut(rng)
                clock.now_ms += rng.choice((0, 5000, HOUR_MS, -HOUR_MS))
                resolved = await check(disk, known, clock, rng)
            state, expected = disk, resolved
            fate = rng.random()
            if fate < 0.25:  # killed a little later, and the power stays
                state, expected = life.cut(life.moment(index))
            elif fate < 0.4:
                state = downgraded(disk)
                for stream, (groups, *_) in expected.streams.items():
                    expected.settle(
                        stream,
                        {
                            group_id: replace(group, history_from=group.seq)
                            for group_id, group in groups.items()
                        },
                    )
    return lives * cuts
