"""One suite over all storages."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

from broker import messages
from broker.errors import BrokerError, InvalidRequest, LimitExceeded, StorageError
from broker.names import file_name
from shards.group import Change, Done, GroupState, Kind, Operation, Snapshot
from shards.history import HistoryLimits
from shards.storage import pending
from shards.storage.base import Settled, Storage
from shards.storage.memory import EMPTY_GROUPS_MAX, MemoryStorage
from shards.storage.redis import RedisStorage
from shards.storage.sqlite import SqliteStorage

RESPONSE_BYTES_MAX = 1000
CACHE_BYTES = 2**20
TINY = 1024
"""Of a cache, the least that can be configured: no group is kept whole."""

FILES = ["sqlite", "sqlite tiny cache", "sqlite short journal"]
REDIS = ["redis", "redis cluster", "redis with a prefix", "redis cluster with a prefix"]
PREFIX = "team:chat:"
DURABLE = [*FILES, *REDIS]
KINDS = ["memory", *DURABLE]


class Clock:
    """A wall clock that is set by hand."""

    def __init__(self) -> None:
        self.now_ms = 1_000_000

    def __call__(self) -> int:
        return self.now_ms


class Storages:
    """Opens storages of one kind on one directory, or one Redis."""

    def __init__(self, kind: str, directory: Path, redis_url: str = "") -> None:
        self.kind = kind
        self.directory = directory
        self.redis_url = redis_url
        self.clock = Clock()
        self.history = HistoryLimits(10, 60_000, 4000, 10_000)

    @asynccontextmanager
    async def opened(self, response_bytes_max: int = RESPONSE_BYTES_MAX) -> AsyncIterator[Storage]:
        storage: Storage
        if self.kind == "memory":
            storage = MemoryStorage(self.clock, response_bytes_max, self.history)
        elif self.kind in REDIS:
            storage = RedisStorage(
                self.redis_url,
                self.clock,
                response_bytes_max,
                self.history,
                key_prefix=PREFIX if "prefix" in self.kind else "",
            )
        else:
            cache_bytes = TINY if "tiny" in self.kind else CACHE_BYTES
            storage = SqliteStorage(
                self.directory,
                self.clock,
                self.history,
                response_bytes_max=response_bytes_max,
                cache_bytes_max=cache_bytes,
            )
        await storage.open()
        try:
            yield storage
        finally:
            await storage.close()


def asynchronous(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run the test on an event loop of its own."""

    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


def storages_of(request: pytest.FixtureRequest, tmp_path: Path) -> Storages:
    """Storages of the kind that the fixture is asked for."""
    if "short journal" in request.param:
        request.getfixturevalue("monkeypatch").setattr(pending, "CHANGES_MAX", 3)
    kind = request.param.removesuffix(" with a prefix")
    server = {"redis": "redis_server", "redis cluster": "redis_cluster"}.get(kind)
    url = request.getfixturevalue(server).url if server else ""
    return Storages(request.param, tmp_path / "shard-0", url)


@pytest.fixture(params=KINDS)
def storages(request: pytest.FixtureRequest, tmp_path: Path) -> Storages:
    return storages_of(request, tmp_path)


@pytest.fixture(params=DURABLE)
def durable(request: pytest.FixtureRequest, tmp_path: Path) -> Storages:
    return storages_of(request, tmp_path)


@pytest.fixture(params=FILES)
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Storages:
    return storages_of(request, tmp_path)


# Operations on group `g` unless said otherwise; streams are chosen when they are performed.


def put(item_id: str, value: Any, group: str = "g") -> Operation:
    return messages.Set(0, "", group, item_id, json.dumps(value).encode())


def get(item_id: str, group: str = "g") -> Operation:
    return messages.Get(0, "", group, item_id)


def delete(item_id: str, group: str = "g") -> Operation:
    return messages.Delete(0, "", group, item_id)


def update(item_id: str, *ops: dict[str, Any], group: str = "g") -> Operation:
    return messages.Update(0, "", group, item_id, json.dumps(ops).encode())


def send(value: Any, item_id: str | None = None, group: str = "g") -> Operation:
    return messages.Send(0, "", group, item_id, "t", json.dumps(value).encode())


def listing(group: str = "g") -> Operation:
    return messages.List(0, "", group)


def join(item_id: str | None = None, group: str = "g") -> Operation:
    return messages.Join(0, "", group, item_id)


INCREMENT = {"type": "increment", "path": "", "by": 1}


async def settle(storage: Storage, stream: str, *operations: Operation) -> list[Settled]:
    """What came of `operations`, performed in one batch."""
    settled: asyncio.Future[list[Settled]] = asyncio.get_running_loop().create_future()
    storage.execute(stream, operations, lambda found: settled.set_result(list(found)))
    async with asyncio.timeout(5):
        return await settled


async def perform(storage: Storage, *operations: Operation, stream: str = "s") -> list[Any]:
    """Their outcomes: results and the data of syncs parsed, errors as their codes."""
    return [parsed(outcome) for outcome, _ in await settle(storage, stream, *operations)]


def parsed(outcome: Any) -> Any:
    match outcome:
        case Done(result=None):
            return None
        case Done(result=bytes(text)) | Snapshot(data=text):
            return json.loads(text)
        case BrokerError():
            return outcome.code
    raise AssertionError(outcome)


async def one_by_one(storage: Storage, *operations: Operation, stream: str = "s") -> list[Any]:
    """As `perform`, each in a batch of its own."""
    return [(await perform(storage, operation, stream=stream))[0] for operation in operations]


batching = pytest.mark.parametrize("perform_all", [perform, one_by_one], ids=["batch", "alone"])


def new(value: Any, old: Any = None) -> dict[str, Any]:
    return {"old_value": old, "new_value": value}


# Results -------------------------------------------------------------------------------------


@batching
@asynchronous
async def test_results(storages: Storages, perform_all: Any) -> None:
    async with storages.opened() as storage:
        assert await perform_all(
            storage,
            get("i"),
            put("i", {"a": 1}),
            get("i"),
            put("i", 5),
            update("i", INCREMENT),
            update("j", INCREMENT, {"type": "increment", "path": "a", "by": 1}),
            listing(),
            send("x"),
            delete("i"),
            delete("i"),
            delete("nothing"),
            get("i"),
            put("n", None),
            get("n"),
            delete("n"),
            listing(),
        ) == [
            None,
            new({"a": 1}),
            {"a": 1},
            new(5, {"a": 1}),
            new(6, 5),
            new(1)
            | {
                "errors": [
                    {
                        "op_index": 1,
                        "code": "increment.target_not_object",
                        "message": "Cannot increment at path 'a': target is number,"
                        " expected object.",
                    }
                ]
            },
            [6, 1],
            None,
            {"old_value": 6},
            {"old_value": None},
            {"old_value": None},
            None,
            new(None),
            None,
            {"old_value": None},
            [1],
        ]


@batching
@asynchronous
async def test_values_are_kept_as_text(storages: Storages, perform_all: Any) -> None:
    texts = [b"1e2", b"-0.0", b"18446744073709551616", b'{"b":1,"a":[ ]}', b'"\\u00e9\xc3\xa9"']
    async with storages.opened() as storage:
        sets = [messages.Set(0, "s", "g", str(n), text) for n, text in enumerate(texts)]
        await perform_all(storage, *sets)
        for number, text in enumerate(texts):
            ((outcome, _),) = await settle(storage, "s", get(str(number)))
            assert isinstance(outcome, Done)
            assert outcome.result == text


@batching
@asynchronous
async def test_changes(storages: Storages, perform_all: Any) -> None:
    """Only what changed something, or is told, has a change; `seq` counts these."""
    async with storages.opened() as storage:
        found = await settle(
            storage, "s", put("i", 1), get("i"), put("i", 1), send(2), delete("x"), delete("i")
        )
        changes = [outcome.change for outcome, _ in found if isinstance(outcome, Done)]
        told = [(c.kind, c.item_id, c.data, c.seq) if c else None for c in changes]
        assert told == [
            (Kind.CREATE, "i", b"1", 1),
            None,
            (Kind.UPDATE, "i", b"1", 2),
            (Kind.EVENT, None, b"2", 3),
            None,
            (Kind.DELETE, "i", b"1", 4),
        ]
        assert await perform_all(storage, put("i", None), put("i", 2)) == [new(None), new(2)]
        ((again, _),) = await settle(storage, "s", put("i", 3))
        assert isinstance(again, Done)
        assert isinstance(again.change, Change)
        assert (again.change.kind, again.change.seq) == (Kind.UPDATE, 7)


@batching
@asynchronous
async def test_syncs(storages: Storages, perform_all: Any) -> None:
    async with storages.opened() as storage:
        await perform_all(storage, put("b", 1), put("a", 2))
        found = await settle(storage, "s", join(), join("a"), join("x"), join(group="empty"))
        syncs = [outcome for outcome, _ in found if isinstance(outcome, Snapshot)]
        assert [(sync.data, sync.seq) for sync in syncs] == [
            (b"[1,2]", 2),
            (b"2", 2),
            (b"null", 2),
            (b"[]", 0),
        ]
        assert syncs[0].epoch == syncs[2].epoch


# Order ---------------------------------------------------------------------------------------


@batching
@asynchronous
async def test_order_of_insertion(storages: Storages, perform_all: Any) -> None:
    async with storages.opened() as storage:
        await perform_all(storage, put("c", 1), put("a", 2), put("b", 3))
        await perform_all(storage, put("c", 4), update("a", INCREMENT))
        assert await perform(storage, listing()) == [[4, 3, 3]]
        await perform_all(storage, delete("c"), put("c", 5), put("d", 6))
        assert await perform(storage, listing()) == [[3, 3, 5, 6]]
        await perform_all(storage, delete("d"), delete("a"), put("a", 7), put("d", 8))
        assert await perform(storage, listing()) == [[3, 5, 7, 8]]
        await perform_all(storage, put("e", 9), delete("e"), put("f", 1), put("e", 2), delete("f"))
        assert await perform(storage, listing()) == [[3, 5, 7, 8, 2]]


@batching
@asynchronous
async def test_order_is_kept_by_the_file(durable: Storages, perform_all: Any) -> None:
    async with durable.opened() as storage:
        operations = [put(str(n % 10), n) for n in range(25)]
        operations += [delete("3"), delete("9"), put("9", 90), put("3", 30), delete("0")]
        await perform_all(storage, *operations)
        (before,) = await perform(storage, listing())
        assert before == [21, 22, 24, 15, 16, 17, 18, 90, 30]
    async with durable.opened() as storage:
        assert await perform(storage, listing()) == [before]


# Groups and streams --------------------------------------------------------------------------


@batching
@asynchronous
async def test_a_group_is_there_while_it_has_items(storages: Storages, perform_all: Any) -> None:
    async with storages.opened() as storage:
        await perform_all(
            storage, get("i", "read"), send(1, group="told"), put("i", 1, "a"), put("i", 1, "b")
        )
        assert sorted(await storage.groups("s")) == ["a", "b"]
        assert await storage.groups("other") == []
        await perform_all(storage, delete("i", "a"))
        assert await storage.groups("s") == ["b"]
        await perform_all(storage, put("i", 1, "a"), delete("i", "b"))
        assert await storage.groups("s") == ["a"]


@asynchronous
async def test_streams(storages: Storages) -> None:
    names = ["s", "", "../x", "S", "x" * 1000, "d\u00e9j\u00e0", "a\0b", "%"]
    async with storages.opened() as storage:
        for number, name in enumerate(names):
            assert await perform(storage, put("i", number), stream=name) == [new(number)]
        assert {*names} <= {*await storage.streams()}
        for number, name in enumerate(names):
            assert await perform(storage, get("i"), stream=name) == [number]
            assert await storage.groups(name) == ["g"]
        if "sqlite" in storages.kind:
            files = {path.parent for path in storages.directory.rglob("*.db*")}
            assert files == {storages.directory}


@asynchronous
async def test_streams_are_found_again(durable: Storages) -> None:
    names = ["s", "", "x" * 1000, "d\u00e9j\u00e0/"]
    async with durable.opened() as storage:
        for name in names:
            await perform(storage, put("i", len(name)), stream=name)
    async with durable.opened() as storage:
        assert sorted(await storage.streams()) == sorted(names)
        for name in names:
            assert await perform(storage, get("i"), stream=name) == [len(name)]


@asynchronous
async def test_reading_makes_no_file(files: Storages) -> None:
    async with files.opened() as storage:
        assert await perform(storage, get("i"), listing(), join(), delete("i")) == [
            None,
            [],
            [],
            {"old_value": None},
        ]
        assert await storage.groups("s") == []
    assert list(files.directory.glob("*.db*")) == []


@asynchronous
async def test_streams_at_the_same_time(storages: Storages) -> None:
    async with storages.opened() as storage:
        operations = [update("i", INCREMENT) for _ in range(20)]
        found = await asyncio.gather(
            *(perform(storage, *operations, stream=f"s{n}") for n in range(20))
        )
        assert all([r["new_value"] for r in results] == list(range(1, 21)) for results in found)


# Time and numbering --------------------------------------------------------------------------


def stamps_of(settled: list[Settled]) -> list[int]:
    outcomes = [outcome for outcome, _ in settled]
    changes = [o.change if isinstance(o, Done) else o for o in outcomes]
    return [c.timestamp_ms for c in changes if isinstance(c, Change | Snapshot)]


@asynchronous
async def test_timestamps_increase(storages: Storages) -> None:
    """Over changes, custom events and syncs, whatever the clock does."""
    async with storages.opened() as storage:
        stamps: list[int] = []
        for step_ms in (0, 0, 5, -1000, -1, 2000):
            storages.clock.now_ms += step_ms
            batch = [put("i", 1), join(), send(1), join("i"), delete("i"), join()]
            stamps += stamps_of(await settle(storage, "s", *batch))
        assert len(stamps) == 36
        assert stamps == sorted(set(stamps))
        assert stamps[0] == 1_000_000
        assert stamps[-1] >= storages.clock.now_ms


@batching
@asynchronous
async def test_numbering_goes_on_after_reopening(durable: Storages, perform_all: Any) -> None:
    async with durable.opened() as storage:
        await perform_all(storage, put("i", 1), put("j", 2), send(3), delete("j"))
        first = (await settle(storage, "s", put("i", 2)))[0][0]
    durable.clock.now_ms -= 100_000
    async with durable.opened() as storage:
        (sync, _), (second, _) = await settle(storage, "s", join(), put("i", 4))
        assert isinstance(first, Done)
        assert isinstance(second, Done)
        assert isinstance(sync, Snapshot)
        assert isinstance(first.change, Change)
        assert isinstance(second.change, Change)
        assert (first.change.seq, sync.seq, second.change.seq) == (5, 5, 6)
        assert first.change.timestamp_ms < sync.timestamp_ms < second.change.timestamp_ms
        (again, _) = (await settle(storage, "s", join()))[0]
        assert isinstance(again, Snapshot)
        assert again.epoch == sync.epoch


@batching
@asynchronous
async def test_numbering_goes_on_after_the_last_item(storages: Storages, perform_all: Any) -> None:
    async with storages.opened() as storage:
        await perform_all(storage, put("i", 1), delete("i"))
        ((before, _),) = await settle(storage, "s", join())
        ((change, _),) = await settle(storage, "s", put("i", 2))
        assert isinstance(before, Snapshot)
        assert isinstance(change, Done)
        assert isinstance(change.change, Change)
        assert (before.seq, change.change.seq) == (2, 3)


@asynchronous
async def test_a_sync_of_an_item_shares_the_clock_after_reopening(durable: Storages) -> None:
    """A sync that is the last thing before the end must not be given out again."""
    async with durable.opened() as storage:
        await perform(storage, put("i", 1))
        ((before, _),) = await settle(storage, "s", join("i"))
    durable.clock.now_ms += 10
    async with durable.opened() as storage:
        ((after, _),) = await settle(storage, "s", join("i"))
        assert isinstance(before, Snapshot)
        assert isinstance(after, Snapshot)
        assert after.timestamp_ms > before.timestamp_ms


@asynchronous
async def test_many_groups_that_were_emptied(tmp_path: Path) -> None:
    """What is forgotten of them must not let the time step back."""
    storages = Storages("memory", tmp_path)
    async with storages.opened() as storage:
        (first,) = stamps_of(await settle(storage, "s", send(1, group="first")))
        storages.clock.now_ms -= 1000
        await perform(storage, *(send(1, group=str(n)) for n in range(EMPTY_GROUPS_MAX + 1)))
        (again,) = stamps_of(await settle(storage, "s", send(1, group="first")))
        assert again > first


# Limits --------------------------------------------------------------------------------------


@batching
@asynchronous
async def test_large_groups(storages: Storages, perform_all: Any) -> None:
    """Single items can be read and written however large the group is; all of it cannot."""
    async with storages.opened() as storage:
        value = "x" * 97  # 99 bytes and a comma
        for n in range(10):
            await perform_all(storage, put(str(n), value))
        assert await perform_all(storage, listing(), join()) == [[value] * 10] * 2
        assert await perform_all(storage, put("more", 1), listing(), join(), get("3")) == [
            new(1),
            "response_too_large",
            "response_too_large",
            value,
        ]
        assert await perform_all(storage, join("3"), delete("9"), update("more", INCREMENT)) == [
            value,
            {"old_value": value},
            new(2, 1),
        ]
        assert await perform(storage, listing()) == [[value] * 9 + [2]]


@asynchronous
async def test_a_value_that_no_answer_could_hold_is_refused(storages: Storages) -> None:
    async with storages.opened() as storage:
        ((outcome, _),) = await settle(storage, "s", put("i", "x" * RESPONSE_BYTES_MAX))
        assert isinstance(outcome, LimitExceeded)
        assert str(RESPONSE_BYTES_MAX // 2) in outcome.message
        assert await perform(storage, get("i"), listing()) == [None, []]


@asynchronous
async def test_a_refused_update_changes_nothing(storages: Storages) -> None:
    async with storages.opened() as storage:
        await perform(storage, put("i", 1))
        found = await settle(storage, "s", update("i", INCREMENT, {"type": "nope"}), join())
        (refused, _), (sync, _) = found
        assert isinstance(refused, InvalidRequest)
        assert isinstance(sync, Snapshot)
        assert (sync.seq, sync.data) == (1, b"[1]")


@asynchronous
async def test_many_groups_with_little_cache(durable: Storages) -> None:
    async with durable.opened() as storage:
        for _ in range(3):
            operations = [update(f"i{n}", INCREMENT, group=f"g{n % 50}") for n in range(200)]
            await perform(storage, *operations)
        for n in range(200):
            assert await perform(storage, get(f"i{n}", f"g{n % 50}")) == [3]
        assert len(await storage.groups("s")) == 50
        if "tiny" in durable.kind:
            assert isinstance(storage, SqliteStorage)
            assert storage.cached_bytes <= TINY


# Failures ------------------------------------------------------------------------------------


@asynchronous
async def test_long_ids_count_in_the_cache(tmp_path: Path) -> None:
    """They are in memory like values; loaded or written, they are the same."""
    storages = Storages("sqlite", tmp_path)
    ids = [f"{number:0500}" for number in range(80)]
    sizes = []
    for operations in ([put(item_id, 1) for item_id in ids], [join()], [delete(ids[0])]):
        async with storages.opened() as storage:
            assert isinstance(storage, SqliteStorage)
            await settle(storage, "s", *operations)
            sizes.append(storage.cached_bytes)
    assert sizes[0] == sizes[1] > 80 * 500
    assert 500 < sizes[1] - storage.cached_bytes < 1000


def is_corrupt(outcome: Any, path: Path) -> bool:
    return (
        isinstance(outcome, StorageError)
        and outcome.code == "storage_corrupt"
        and str(path) in outcome.message
    )


@pytest.mark.parametrize("damage", ["zeros", "text", "half", "another stream", "newer layout"])
@asynchronous
async def test_a_damaged_file(files: Storages, damage: str) -> None:
    path = files.directory / f"{file_name('bad')}.db"
    async with files.opened(10**9) as storage:
        for stream in ("bad", "good"):
            await perform(storage, *(put(str(n), "x" * 5000) for n in range(100)), stream=stream)
    content = path.read_bytes()
    match damage:
        case "zeros":
            content = bytes(len(content))
        case "text":
            content = b"no database " * 1000
        case "half":
            content = content[: len(content) // 2]
        case "another stream":
            content = (files.directory / "good.db").read_bytes()
        case "newer layout":
            content = content[:60] + (99).to_bytes(4, "big") + content[64:]
    path.write_bytes(content)
    async with files.opened(10**9) as storage:
        for operations in ([get("99"), listing()], [put("99", 1)], [listing()]):
            for outcome, group in await settle(storage, "bad", *operations):
                assert is_corrupt(outcome, path), outcome
                assert group is None
            assert await perform(storage, get("7"), stream="good") == ["x" * 5000]
        await perform(storage, put("7", 1), stream="good")
        assert "good" in await storage.streams()
    assert path.read_bytes() == content  # left for rescue


@asynchronous
async def test_a_file_damaged_while_it_is_not_open(files: Storages) -> None:
    """Mended again, it works without a restart."""
    path = files.directory / "s.db"
    async with files.opened() as storage:
        await perform(storage, put("i", 1))
    content = path.read_bytes()
    path.write_bytes(b"x" * len(content))
    async with files.opened() as storage:
        ((outcome, _),) = await settle(storage, "s", put("i", 2))
        assert is_corrupt(outcome, path)
        path.write_bytes(content)
        assert await perform(storage, put("i", 3)) == [new(3, 1)]


@asynchronous
async def test_a_failed_commit_leaves_nothing_in_memory(files: Storages) -> None:
    """The directory is taken away while a new stream's file has to be made."""
    async with files.opened() as storage:
        await perform(storage, put("i", 1), stream="old")
        elsewhere = files.directory.with_name("elsewhere")
        files.directory.rename(elsewhere)
        found: list[tuple[Any, GroupState | None]] = await settle(
            storage, "new", put("i", 1), get("i")
        )
        for outcome, _ in found:
            assert isinstance(outcome, StorageError)
            assert outcome.retryable
        elsewhere.rename(files.directory)
        assert await perform(storage, get("i"), listing(), stream="new") == [None, []]
        assert await perform(storage, put("i", 2), stream="new") == [new(2)]
        assert await perform(storage, get("i"), stream="old") == [1]
