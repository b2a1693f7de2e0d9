"""What storages keep of the past, and what is told to whoever asks for it."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import messages
from shards.group import Change, Kind, Operation, Past, Resumed, Snapshot
from shards.history import CHANGE_OVERHEAD_BYTES, Histories, History, HistoryLimits
from shards.storage.base import Storage
from tests.storage.test_storages import (
    DURABLE,
    FILES,
    KINDS,
    Storages,
    asynchronous,
    delete,
    put,
    send,
    settle,
    storages_of,
    update,
)

LIMITS = HistoryLimits(events_max=10, age_ms_max=60_000, group_bytes_max=4000, bytes_max=10_000)


@pytest.fixture(params=KINDS)
def storages(request: pytest.FixtureRequest, tmp_path: Path) -> Storages:
    found = storages_of(request, tmp_path)
    found.history = LIMITS
    return found


@pytest.fixture(params=DURABLE)
def durable(request: pytest.FixtureRequest, tmp_path: Path) -> Storages:
    found = storages_of(request, tmp_path)
    found.history = LIMITS
    return found


@pytest.fixture(params=FILES)
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Storages:
    found = storages_of(request, tmp_path)
    found.history = LIMITS
    return found


def join_since(since: int, epoch: str, item_id: str | None = None, group: str = "g") -> Operation:
    return messages.Join(0, "", group, item_id, None, since, epoch)


async def epoch_of(storage: Storage, group: str = "g") -> str:
    ((snapshot, _),) = await settle(storage, "s", messages.Join(0, "", group, None))
    assert isinstance(snapshot, Snapshot)
    assert snapshot.resumed is None
    return snapshot.epoch


async def missed(
    storage: Storage, since: int, epoch: str, item_id: str | None = None, group: str = "g"
) -> list[int] | None:
    """The seqs of the missed changes; None when there was a sync instead."""
    ((outcome, _),) = await settle(storage, "s", join_since(since, epoch, item_id, group))
    if isinstance(outcome, Snapshot):
        assert outcome.resumed is False
        return None
    assert isinstance(outcome, Resumed)
    assert outcome.since == since
    times = [outcome.timestamp_ms, *(change.timestamp_ms for change in outcome.missed)]
    assert times == sorted(set(times))
    return [change.seq for change in outcome.missed]


async def past(storage: Storage, since: int | None = None, limit: int = 100) -> Past:
    ((outcome, _),) = await settle(storage, "s", messages.ReadHistory(0, "", "g", since, limit))
    assert isinstance(outcome, Past)
    return outcome


@asynchronous
async def test_exactly_what_was_missed(storages: Storages) -> None:
    async with storages.opened() as storage:
        await settle(storage, "s", put("a", 1), put("b", 2))
        epoch = await epoch_of(storage)
        await settle(storage, "s", put("a", 3), send("x"), delete("b"), update("a"))
        assert await missed(storage, 2, epoch) == [3, 4, 5, 6]
        assert await missed(storage, 5, epoch) == [6]
        assert await missed(storage, 6, epoch) == []
        assert await missed(storage, 0, epoch) == [1, 2, 3, 4, 5, 6]
        assert await missed(storage, 0, epoch, "a") == [1, 3, 6]
        assert await missed(storage, 0, epoch, "none") == []
        for since, other in ((7, epoch), (-1, epoch), (2, "other"), (2, "")):
            assert await missed(storage, since, other) is None
        assert await missed(storage, 0, await epoch_of(storage, "h"), group="h") == []


@asynchronous
async def test_the_changes_are_as_they_were(storages: Storages) -> None:
    async with storages.opened() as storage:
        await settle(storage, "s", put("a", {"é": [1]}), send(None, "a"), delete("a"))
        found = await past(storage)
    assert (found.seq, found.complete) == (3, True)
    assert [(c.kind, c.item_id, json.loads(c.data), c.event_type) for c in found.changes] == [
        (Kind.CREATE, "a", {"é": [1]}, None),
        (Kind.EVENT, "a", None, "t"),
        (Kind.DELETE, "a", {"é": [1]}, None),
    ]


@asynchronous
async def test_who_joined_an_empty_group_can_resume(storages: Storages) -> None:
    """The group begins with its first event, and goes on when it is empty again."""
    async with storages.opened() as storage:
        epoch = await epoch_of(storage)
        await epoch_of(storage, "another")
        await settle(storage, "s", put("a", 1))
        await settle(storage, "s", delete("a"))
        assert await missed(storage, 0, epoch) == [1, 2]
        await settle(storage, "s", put("a", 1))
        assert await missed(storage, 2, epoch) == [3]


@asynchronous
async def test_within_one_batch_a_resume_sees_what_came_before_it(storages: Storages) -> None:
    async with storages.opened() as storage:
        await settle(storage, "s", put("a", 1))
        epoch = await epoch_of(storage)
        operations = [put("a", 2), join_since(1, epoch), put("a", 3), join_since(1, epoch)]
        outcomes = [outcome for outcome, _ in await settle(storage, "s", *operations)]
    resumed = [outcome for outcome in outcomes if isinstance(outcome, Resumed)]
    assert [[change.seq for change in r.missed] for r in resumed] == [[2], [2, 3]]


@asynchronous
async def test_no_more_than_the_last_events(storages: Storages) -> None:
    async with storages.opened() as storage:
        for n in range(25):
            await settle(storage, "s", put("a", n))
        epoch = await epoch_of(storage)
        assert await missed(storage, 15, epoch) == list(range(16, 26))
        assert await missed(storage, 14, epoch) is None
        kept = await past(storage)
        assert [change.seq for change in kept.changes] == list(range(16, 26))
        assert not (await past(storage, 14)).complete
        page = await past(storage, 20, limit=2)
        assert ([c.seq for c in page.changes], page.complete) == ([21, 22], True)
        beyond = await past(storage, 99)
        assert (beyond.changes, beyond.complete) == ([], False)


@asynchronous
async def test_no_older_than_allowed(storages: Storages) -> None:
    async with storages.opened() as storage:
        await settle(storage, "s", put("a", 1))
        storages.clock.now_ms += 50_000
        await settle(storage, "s", put("a", 2))
        epoch = await epoch_of(storage)
        storages.clock.now_ms += 20_000
        assert await missed(storage, 0, epoch) is None
        assert await missed(storage, 1, epoch) == [2]
        assert [change.seq for change in (await past(storage)).changes] == [2]
        storages.clock.now_ms += 60_000
        assert await missed(storage, 1, epoch) is None
        assert await missed(storage, 2, epoch) == []


@asynchronous
async def test_no_more_bytes_than_allowed(storages: Storages) -> None:
    async with storages.opened(response_bytes_max=100_000) as storage:
        for _ in range(5):
            await settle(storage, "s", put("a", "x" * 1000))
        epoch = await epoch_of(storage)
        assert await missed(storage, 2, epoch) == [3, 4, 5]
        assert await missed(storage, 1, epoch) is None
        await settle(storage, "s", put("a", "x" * 5000), put("b", 1))
        assert await missed(storage, 6, epoch) == [7]
        assert await missed(storage, 5, epoch) is None


@asynchronous
async def test_a_batch_larger_than_what_is_kept(storages: Storages) -> None:
    async with storages.opened(response_bytes_max=100_000) as storage:
        await settle(storage, "s", *(put("a", "x" * 800) for _ in range(20)))
        epoch = await epoch_of(storage)
        assert await missed(storage, 19, epoch) == [20]
        assert await missed(storage, 10, epoch) is None
        await settle(storage, "s", put("a", "x" * 9000))
        assert await missed(storage, 20, epoch) is None
        await settle(storage, "s", put("a", 1))
        assert await missed(storage, 21, epoch) == [22]
        assert await missed(storage, 20, epoch) is None


@asynchronous
async def test_a_quiet_group_keeps_its_past(storages: Storages) -> None:
    async with storages.opened(response_bytes_max=100_000) as storage:
        await settle(storage, "s", put("a", 1, "quiet"), put("a", 2, "quiet"))
        epoch = await epoch_of(storage, "quiet")
        for n in range(100):
            await settle(storage, "s", *(put("a", "x" * 500, f"busy {n % 9}") for _ in range(5)))
        assert await missed(storage, 0, epoch, group="quiet") == [1, 2]


@asynchronous
async def test_it_survives(durable: Storages) -> None:
    async with durable.opened() as storage:
        await settle(storage, "s", put("a", 1), send("x"))
        epoch = await epoch_of(storage)
    async with durable.opened() as storage:
        await settle(storage, "s", put("a", 2))
        assert await missed(storage, 0, epoch) == [1, 2, 3]


@asynchronous
async def test_times_of_syncs_survive_a_crash_and_a_step_back(
    files: Storages,
) -> None:
    async with files.opened() as storage:
        await settle(storage, "s", put("a", 1))
        files.clock.now_ms += 3_600_000
        ((sync, _),) = await settle(storage, "s", messages.Join(0, "", "g", None))
        ((other, _),) = await settle(storage, "s", messages.Join(0, "", "empty", None))
        copy = files.directory.with_name("crashed")
        shutil.copytree(files.directory, copy)  # as kill -9 leaves it
    files.directory = copy
    files.clock.now_ms -= 7_200_000
    async with files.opened() as storage:
        ((done, _),) = await settle(storage, "s", put("a", 2))
        assert done.change.timestamp_ms > sync.timestamp_ms
        ((later, _),) = await settle(storage, "s", messages.Join(0, "", "empty", None))
        assert later.timestamp_ms > other.timestamp_ms


@asynchronous
async def test_the_time_of_a_resume_is_kept_too(files: Storages) -> None:
    async with files.opened() as storage:
        await settle(storage, "s", put("a", 1))
        epoch = await epoch_of(storage)
        files.clock.now_ms += 3_600_000
        join = messages.Join(0, "", "g", None, None, 1, epoch)
        ((resumed, _),) = await settle(storage, "s", join)
        copy = files.directory.with_name("crashed")
        shutil.copytree(files.directory, copy)
    files.directory = copy
    files.clock.now_ms -= 7_200_000
    async with files.opened() as storage:
        ((done, _),) = await settle(storage, "s", put("a", 2))
        assert done.change.timestamp_ms > resumed.timestamp_ms


@asynchronous
async def test_in_memory_a_new_life_is_another_epoch(tmp_path: Path) -> None:
    storages = Storages("memory", tmp_path)
    async with storages.opened() as storage:
        await settle(storage, "s", put("a", 1))
        epoch = await epoch_of(storage)
    async with storages.opened() as storage:
        await settle(storage, "s", put("a", 1))
        assert await missed(storage, 1, epoch) is None


@asynchronous
async def test_files_do_not_grow_for_ever(files: Storages) -> None:
    """Neither with events of one group, nor with groups that are never written again."""
    files.history = HistoryLimits(100, 60_000, 20_000, 10_000)
    async with files.opened() as storage:
        sizes = []
        for n in range(180):
            await settle(storage, "s", *(put("a", "x" * 50, f"g{n}") for _ in range(60)))
            await settle(storage, "s", *(put("a", "x" * 50, "busy") for _ in range(300)))
            files.clock.now_ms += 10_000
            if n % 60 == 59:
                file = next(files.directory.glob("*.db"))
                sizes.append(file.stat().st_size)
        assert sizes[2] < sizes[0] * 1.5, sizes


@asynchronous
async def test_a_file_of_the_first_layout_is_taken_over(files: Storages) -> None:
    async with files.opened() as storage:
        await settle(storage, "s", put("a", 1))
        epoch = await epoch_of(storage)
    file = next(files.directory.glob("*.db"))
    connection = sqlite3.connect(file)
    connection.executescript("DROP TABLE journal; DROP TABLE history; PRAGMA user_version = 1;")
    connection.close()
    async with files.opened() as storage:
        await settle(storage, "s", put("a", 2))
        assert await missed(storage, 1, epoch) == [2]
        assert await missed(storage, 0, epoch) is None


@asynchronous
async def test_a_file_of_the_second_layout_is_taken_over(files: Storages) -> None:
    async with files.opened() as storage:
        await settle(storage, "s", put("a", 1))
        epoch = await epoch_of(storage)
    file = next(files.directory.glob("*.db"))
    connection = sqlite3.connect(file)
    connection.executescript("DROP TABLE journal; PRAGMA user_version = 2;")
    connection.close()
    async with files.opened() as storage:
        await settle(storage, "s", put("a", 2))
        assert await missed(storage, 0, epoch) == [1, 2]


@asynchronous
async def test_nothing_is_kept_when_nothing_is_to_be(storages: Storages) -> None:
    storages.history = HistoryLimits(0, 60_000, 4000, 10_000)
    async with storages.opened() as storage:
        await settle(storage, "s", put("a", 1), put("a", 2))
        epoch = await epoch_of(storage)
        assert await missed(storage, 2, epoch) == []
        assert await missed(storage, 1, epoch) is None
        assert (await past(storage)).changes == []


# Histories in memory, bounded together.


def change(seq: int, size: int = 0) -> Change:
    return Change(Kind.UPDATE, "a", b"x" * size, seq, 1000 + seq)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 400)), max_size=200))
def test_all_together_are_bounded(writes: list[tuple[int, int]]) -> None:
    limits = HistoryLimits(20, 60_000, 4000, 6000)
    histories = Histories(limits)
    groups = [histories.new() for _ in range(6)]
    seqs = [0] * 6
    for index, size in writes:
        seqs[index] += 1
        histories.add(groups[index], change(seqs[index], size), 1000)
        assert histories.bytes == sum(group.bytes for group in groups)
        assert histories.bytes <= limits.bytes_max + 4000
        for group, head in zip(groups, seqs, strict=True):
            size_of_all = sum(len(c.data) + CHANGE_OVERHEAD_BYTES for c in group.changes)
            assert group.bytes == size_of_all <= limits.group_bytes_max
            kept = [c.seq for c in group.kept(head, 1000)]
            assert kept == list(range(head - len(kept) + 1, head + 1))


@given(
    st.lists(st.integers(0, 3000), max_size=40),
    st.integers(-2, 45),
    st.integers(0, 100_000),
)
def test_since_is_all_or_nothing(sizes: list[int], since: int, now_ms: int) -> None:
    history = History(LIMITS)
    for seq, size in enumerate(sizes, 1):
        history.add(change(seq, size))
    found = history.since(since, len(sizes), now_ms)
    if found is not None:
        assert [c.seq for c in found] == list(range(since + 1, len(sizes) + 1))
