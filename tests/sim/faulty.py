"""Ways to break the broker that the simulation has to find: what proves that it would."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import count
from typing import Any, cast
from unittest import mock

from broker.errors import StorageError
from broker.messages import AddTrigger, Event, Get
from gateway.hub import Hub, Subscription
from gateway.invocations import Invocations
from gateway.shard_links import ShardLink
from shards.group import Done, Head
from shards.history import History
from shards.requests import Requests
from shards.storage.base import Settled
from shards.storage.clock_file import ClockFile
from shards.storage.sqlite import SqliteStorage
from shards.storage.sqlite_file import StreamFile
from shards.triggers import Triggers
from tests.sim.loop import SimLoop


@contextmanager
def answer_before_commit() -> Iterator[None]:
    """Writes are answered and told a moment before they are committed."""
    commit = StreamFile.commit

    def commit_later(self: StreamFile, *given: Any) -> None:
        world = cast(SimLoop, asyncio.get_running_loop()).world
        process = world.working
        assert process is not None, "a thread of it called"

        def work() -> None:
            if not process.dead:
                with suppress(StorageError):
                    commit(self, *given)

        world.after(0.01, work)

    with mock.patch.object(StreamFile, "commit", commit_later):
        yield


@contextmanager
def keep_what_was_not_committed() -> Iterator[None]:
    """After a failed commit memory goes on with what the disk does not have."""
    with mock.patch.object(SqliteStorage, "_forget"):
        yield


@contextmanager
def drop_an_event() -> Iterator[None]:
    """The hub loses one event in fifty."""
    publish, number = Hub.publish, count(1)

    def lossy(self: Hub, event: Event) -> list[Subscription]:
        behind = publish(self, event)
        group = self._groups.get((event.stream, event.group_id))
        if group is not None and group.events and not next(number) % 50:
            group.events.pop()
        return behind

    with mock.patch.object(Hub, "publish", lossy):
        yield


@contextmanager
def deliver_twice() -> Iterator[None]:
    """The hub delivers one event in fifty twice."""
    publish, number = Hub.publish, count(1)

    def double(self: Hub, event: Event) -> list[Subscription]:
        behind = publish(self, event)
        group = self._groups.get((event.stream, event.group_id))
        if group is not None and group.events and not next(number) % 50:
            group.events.append(group.events[-1])
        return behind

    with mock.patch.object(Hub, "publish", double):
        yield


@contextmanager
def raw_timestamps() -> Iterator[None]:
    """Timestamps are the wall clock's."""

    def tick(self: Head, now_ms: int) -> int:
        self.timestamp_ms = now_ms
        return now_ms

    with mock.patch.object(Head, "tick", tick):
        yield


@contextmanager
def forget_the_clock() -> Iterator[None]:
    """The times of syncs are not kept past a crash."""
    with mock.patch.object(ClockFile, "reserve"):
        yield


@contextmanager
def resume_too_late() -> Iterator[None]:
    """Who resumes misses the first event."""
    since = History.since

    def late(self: History, *given: int) -> Sequence[Any] | None:
        missed = since(self, *given)
        return missed[1:] if missed and len(missed) > 1 else missed

    with mock.patch.object(History, "since", late):
        yield


@contextmanager
def forget_interest() -> Iterator[None]:
    """A gateway that links again does not ask for what its subscribers missed."""
    with mock.patch("gateway.stream_port.StreamPort.shard_linked"):
        yield


@contextmanager
def swap_triggers() -> Iterator[None]:
    """Calls of triggers go out in any order."""
    invoke = Invocations.invoke

    def delayed(self: Invocations, function_id: str, *given: Any, **more: Any) -> None:
        if "/changed" in function_id and not len(self._pending) % 3:
            loop = asyncio.get_running_loop()
            loop.call_later(0.02, lambda: invoke(self, function_id, *given, **more))
        else:
            invoke(self, function_id, *given, **more)

    with mock.patch.object(Invocations, "invoke", delayed):
        yield


@contextmanager
def miss_triggers() -> Iterator[None]:
    """One match of a trigger in fifty is lost."""
    matching, number = Triggers.matching, count(1)

    def lossy(self: Triggers[Any], *given: Any) -> dict[Any, list[str]]:
        return {} if not next(number) % 50 else matching(self, *given)

    with mock.patch.object(Triggers, "matching", lossy):
        yield


@contextmanager
def forget_triggers() -> Iterator[None]:
    """A shard that was started again is not told of the triggers."""
    tell = ShardLink.tell

    def forgetful(self: ShardLink, message: Any) -> None:
        if not (isinstance(message, AddTrigger) and self.links_total > 1):
            tell(self, message)

    with mock.patch.object(ShardLink, "tell", forgetful):
        yield


@contextmanager
def leave_calls_hanging() -> Iterator[None]:
    """Calls in flight to a shard that dies are never answered."""
    lost = ShardLink.link_lost

    def silent(self: ShardLink, *given: Any) -> None:
        self._answers.clear()
        lost(self, *given)

    with mock.patch.object(ShardLink, "link_lost", silent):
        yield


@contextmanager
def read_what_was() -> Iterator[None]:
    """One read in ten is answered with what the one before it found."""
    settle, number = Requests._settle, count(1)
    found: dict[tuple[str, str, str], Settled] = {}

    def stale(self: Requests, operation: Any, link: Any, settled: Settled) -> None:
        if isinstance(operation, Get) and isinstance(settled[0], Done):
            key = (operation.stream, operation.group_id, operation.item_id)
            before, found[key] = found.get(key, settled), settled
            settled = settled if next(number) % 10 else before
        settle(self, operation, link, settled)

    with mock.patch.object(Requests, "_settle", stale):
        yield


FAULTY: tuple[tuple[Callable[[], AbstractContextManager[None]], set[str]], ...] = (
    (answer_before_commit, {"lost"}),
    (keep_what_was_not_committed, {"result", "sync"}),
    (drop_an_event, {"gap"}),
    (deliver_twice, {"double"}),
    (raw_timestamps, {"timestamp"}),
    (forget_the_clock, {"timestamp"}),
    (resume_too_late, {"gap"}),
    (forget_interest, {"behind"}),
    (swap_triggers, {"trigger inversion"}),
    (miss_triggers, {"trigger missed"}),
    (forget_triggers, {"trigger missed"}),
    (leave_calls_hanging, {"stuck"}),
    (read_what_was, {"order"}),
)
"""Each with the rules by one of which it has to be found."""
