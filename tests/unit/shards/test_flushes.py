"""Streams are flushed one by one, in the order in which they changed."""

from __future__ import annotations

import asyncio

from shards.storage import pending
from shards.storage.flushes import Flushes
from shards.storage.pending import Commit, GroupRow, Pending

PAUSE_S = 0.02


class Flushed:
    """What was flushed, and when; streams in `clean` have nothing to write."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.at: list[float] = []
        self.clean: set[str] = set()

    def __call__(self, name: str) -> bool:
        self.names.append(name)
        self.at.append(asyncio.get_running_loop().time())
        return name not in self.clean


async def until(flushed: Flushed, count: int) -> None:
    while len(flushed.names) < count:
        await asyncio.sleep(0.001)


def test_one_by_one_with_a_pause() -> None:
    async def scenario() -> None:
        flushed = Flushed()
        flushes = Flushes(flushed, 0.001, PAUSE_S)
        for name in ("a", "b", "a", "c"):
            flushes.add(name)
        assert (len(flushes), flushed.names) == (3, [])
        await until(flushed, 1)
        flushes.add("a")  # it changed again: behind those that wait
        await until(flushed, 4)
        assert flushed.names == ["a", "b", "c", "a"]
        gaps = [later - at for at, later in zip(flushed.at, flushed.at[1:], strict=False)]
        assert min(gaps) >= 0.9 * PAUSE_S
        assert len(flushes) == 0
        flushes.add("b")
        await until(flushed, 5)
        assert flushed.names[4] == "b"

    asyncio.run(scenario())


def test_no_pause_where_nothing_was_to_do() -> None:
    async def scenario() -> None:
        flushed = Flushed()
        flushed.clean = {str(number) for number in range(1000)}
        flushes = Flushes(flushed, 0.001, 1e6)
        for number in range(1000):
            flushes.add(str(number))
        flushes.add("last")
        await until(flushed, 1001)
        assert flushed.names[-1] == "last"

    asyncio.run(scenario())


def test_none_after_the_end() -> None:
    async def scenario() -> None:
        flushed = Flushed()
        flushes = Flushes(flushed, 0.001, 0.001)
        flushes.add("a")
        flushes.close()
        flushes.add("b")
        await asyncio.sleep(0.01)
        assert (flushed.names, len(flushes)) == ([], 0)

    asyncio.run(scenario())


def test_the_journals_of_all_streams_are_bounded() -> None:
    """The more streams wait to be flushed, the less may wait in each."""
    journal = Pending()
    journal.add(Commit([GroupRow(1, "g", "e", 1, 1, 1, 2)], []), pending.ALL_BYTES_MAX // 100)
    assert not journal.is_large(0)
    assert not journal.is_large(1)
    assert not journal.is_large(99)
    assert journal.is_large(100)
    assert journal.is_large(500)
    journal.add(Commit([], []), pending.BYTES_MAX)
    assert journal.is_large(0)
