"""Group commit: what waits for a stream while it is busy becomes the next batch.

Streams go their own way, each with one batch at a time, so the order of a group is the order in
which its operations came.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, TypeVar

from broker.errors import StorageError
from broker.hot import Sampler
from broker.metrics import SECONDS, SIZES, Histogram
from broker.tasks import Tasks
from shards.group import Operation
from shards.hot_groups import HotGroups
from shards.storage.base import Settled, Storage

T = TypeVar("T")

BATCH_MAX = 512
"""Operations of one commit: what came first need not wait for thousands that came later."""

_GroupsFuture = asyncio.Future[list[str]]


class _Lane(Generic[T]):
    """What waits for one stream: operations with whoever asked, and askers for its groups."""

    def __init__(self, stream: str) -> None:
        self.stream = stream
        self.waiting: deque[tuple[Operation, T] | _GroupsFuture] = deque()
        self.executing = False
        self.settled_at_once = False

    def take(self) -> list[tuple[Operation, T]]:
        """The next operations that may share a commit, at least one."""
        batch: list[tuple[Operation, T]] = []
        while self.waiting and len(batch) < BATCH_MAX:
            entry = self.waiting[0]
            if not isinstance(entry, tuple):
                break
            self.waiting.popleft()
            batch.append(entry)
        return batch


class Committer(Generic[T]):
    """Hands operations to the storage in batches and their outcomes to `settle`, in order."""

    def __init__(self, storage: Storage, settle: Callable[[Operation, T, Settled], None]) -> None:
        self._storage = storage
        self._settle = settle
        self._lanes: dict[str, _Lane[T]] = {}
        self._ready: list[_Lane[T]] = []
        self._tasks = Tasks()
        self.waiting = 0
        self.operations_total = 0
        self.durations = Histogram(SECONDS)
        self.sizes = Histogram(SIZES)
        self.hot = HotGroups()
        self._batches = Sampler()

    @property
    def batches_total(self) -> int:
        """Batches handed to the storage."""
        return self._batches.total

    def add(self, operation: Operation, asker: T) -> None:
        """Queue `operation`; it starts with the next `start`."""
        self._lane(operation.stream).waiting.append((operation, asker))
        self.waiting += 1

    async def groups(self, stream: str) -> list[str]:
        """The groups of `stream` after all operations that were added before.

        Raises:
            StorageError: they could not be read.
        """
        future: _GroupsFuture = asyncio.get_running_loop().create_future()
        self._lane(stream).waiting.append(future)
        self.start()
        return await future

    def start(self) -> None:
        """Start the streams that got something to do."""
        ready, self._ready = self._ready, []
        for lane in ready:
            self._run(lane)

    def rotate(self, now: float) -> None:
        """A second is over; `now` of `time.monotonic`."""
        self._batches.refill()
        self.hot.rotate(now)

    async def drain(self) -> None:
        """Wait until nothing waits."""
        while self._lanes:
            await asyncio.sleep(0.01)

    def _lane(self, stream: str) -> _Lane[T]:
        lane = self._lanes.get(stream)
        if lane is None:
            lane = self._lanes[stream] = _Lane(stream)
            self._ready.append(lane)
        return lane

    def _run(self, lane: _Lane[T]) -> None:
        while lane.waiting:
            entry = lane.waiting[0]
            if not isinstance(entry, tuple):
                lane.waiting.popleft()
                self._tasks.start(self._answer_groups(lane, entry))
                return
            batch = lane.take()
            batches = self._batches
            batches.total += 1
            self.operations_total += len(batch)
            lane.executing, lane.settled_at_once = True, False
            operations = [operation for operation, _ in batch]
            began_at = 0.0
            if batches.total >= batches.due:
                began_at = time.perf_counter()
                self.sizes.observe(len(batch))
                self.hot.add(lane.stream, operations, batches.take())
            settle = partial(self._settled, lane, batch, began_at)
            self._storage.execute(lane.stream, operations, settle)
            lane.executing = False
            if not lane.settled_at_once:
                return  # `_settled` goes on
        del self._lanes[lane.stream]

    def _settled(
        self,
        lane: _Lane[T],
        batch: list[tuple[Operation, T]],
        began_at: float,
        settled: Sequence[Settled],
    ) -> None:
        if began_at:
            self.durations.observe(time.perf_counter() - began_at)
        self.waiting -= len(batch)
        for (operation, asker), outcome in zip(batch, settled, strict=True):
            self._settle(operation, asker, outcome)
        if lane.executing:
            lane.settled_at_once = True
        else:
            self._run(lane)

    async def _answer_groups(self, lane: _Lane[T], future: _GroupsFuture) -> None:
        try:
            groups = await self._storage.groups(lane.stream)
        except StorageError as error:
            if not future.done():
                future.set_exception(error)
        else:
            if not future.done():
                future.set_result(groups)
        self._run(lane)
