"""KvStore `in_memory`: dictionaries. What is in them ends with the process."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence

from broker.clock import Clock
from broker.report import StoreReport
from shards.group import Done, GroupState, Head, Operation, attempt, new_epoch
from shards.history import Histories, HistoryLimits
from shards.storage.base import Settle, Settled

EMPTY_GROUPS_MAX = 100_000
"""Groups without items whose numbering is remembered; the longest unused is forgotten first."""
REPORT_REST = 500
"""Counting what is stored may take one part in so many of the time."""


class MemoryStorage:
    """See `shards.storage.base.Storage`."""

    def __init__(
        self, clock: Clock, response_bytes_max: int, history_limits: HistoryLimits
    ) -> None:
        self._clock = clock
        self._histories = Histories(history_limits)
        self._response_bytes_max = response_bytes_max
        self._streams: dict[str, dict[str, GroupState]] = {}
        self._empty: OrderedDict[tuple[str, str], GroupState] = OrderedDict()
        self._report = StoreReport(0, 0, 0, 0)
        self._report_until = 0.0  # `time.monotonic` up to which it is not made again
        self._forgotten_timestamp_ms = 0
        self._epoch = new_epoch()  # of groups of which nothing is known

    async def open(self) -> None:
        """Nothing to do."""

    async def close(self) -> None:
        """Nothing to do."""

    def execute(self, stream: str, operations: Sequence[Operation], settle: Settle) -> None:
        now_ms = self._clock()
        groups = self._streams.setdefault(stream, {})
        settled: list[Settled] = []
        for operation in operations:
            group_id = operation.group_id
            group = groups.get(group_id)
            if group is None:
                group = self._empty.pop((stream, group_id), None) or self._new(stream, group_id)
                groups[group_id] = group
            outcome = attempt(group, operation, now_ms, self._response_bytes_max)
            settled.append((outcome, group))
            if isinstance(outcome, Done) and outcome.change is not None:
                assert group.history is not None, "every group here has one"
                self._histories.add(group.history, outcome.change, now_ms)
            if not group.count:
                del groups[group_id]
                if group.head.seq:
                    self._remember((stream, group_id), group)
                else:  # only ever looked at: its numbering has not begun
                    self._forget(group)
        if not groups:
            del self._streams[stream]
        settle(settled)

    def report(self) -> StoreReport:
        """What is stored now; where counting it takes long, as it was a while ago."""
        began_at = time.monotonic()
        if began_at >= self._report_until:
            self._report = self._counted()
            took = time.monotonic() - began_at
            self._report_until = began_at + REPORT_REST * took
        return self._report

    def _counted(self) -> StoreReport:
        groups = items = size = 0
        for stream in self._streams.values():
            groups += len(stream)
            for group in stream.values():
                items += group.count
                size += group.bytes
        return StoreReport(len(self._streams), groups, items, size)

    def interest(self, stream: str, group_id: str, wanted: bool) -> None:
        """Nothing to do: nobody else changes it."""

    def interest_stream(self, stream: str, wanted: bool) -> None:
        """Nobody else changes anything."""

    async def streams(self) -> list[str]:
        return list(self._streams)

    async def groups(self, stream: str) -> list[str]:
        return list(self._streams.get(stream, ()))

    def _new(self, stream: str, group_id: str) -> GroupState:
        # A client may remember a later time of it.
        head = Head(self._epoch, 0, self._forgotten_timestamp_ms)
        group = GroupState(stream, group_id, head)
        group.history = self._histories.new()
        return group

    @property
    def history_bytes(self) -> int:
        """About what the kept changes of all groups cost."""
        return self._histories.bytes

    def _remember(self, key: tuple[str, str], group: GroupState) -> None:
        self._empty[key] = group
        if len(self._empty) > EMPTY_GROUPS_MAX:
            _, forgotten = self._empty.popitem(last=False)
            self._forget(forgotten)

    def _forget(self, group: GroupState) -> None:
        assert group.history is not None, "every group here has one"
        self._histories.forget(group.history)
        if group.head.seq:  # it would begin anew
            self._epoch = new_epoch()
        self._forgotten_timestamp_ms = max(self._forgotten_timestamp_ms, group.head.timestamp_ms)
