"""The last changes of a group, kept so that clients can resume. No I/O."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from shards.group import Change

CHANGE_OVERHEAD_BYTES = 200
"""About what a kept change costs in memory beside its data."""
_EXAMINED_MAX = 8  # other groups that are looked at when all together keep too much


class HistoryLimits(msgspec.Struct, frozen=True):
    """What is kept of a group: the last events, not older than this, up to so many bytes.

    bytes_max: of all groups of a shard together, where they are kept in memory.
    """

    events_max: int
    age_ms_max: float
    group_bytes_max: int
    bytes_max: int


class History:
    """Changes of one group in order, without a gap, up to the newest."""

    __slots__ = ("_limits", "bytes", "changes")

    def __init__(self, limits: HistoryLimits, changes: Sequence[Change] = ()) -> None:
        self._limits = limits
        self.changes: deque[Change] = deque(changes)
        self.bytes = sum(_size(change) for change in changes)

    def add(self, change: Change) -> None:
        """Keep `change`, and what came before it within the limits."""
        self.changes.append(change)
        self.bytes += len(change.data) + CHANGE_OVERHEAD_BYTES
        limits = self._limits
        while len(self.changes) > limits.events_max or self.bytes > limits.group_bytes_max:
            self.bytes -= len(self.changes.popleft().data) + CHANGE_OVERHEAD_BYTES

    def drop_oldest(self) -> None:
        """Forget the oldest change."""
        self.bytes -= _size(self.changes.popleft())

    def drop_old(self, now_ms: int) -> None:
        """Forget what is too old."""
        oldest_ms = now_ms - self._limits.age_ms_max
        while self.changes and self.changes[0].timestamp_ms < oldest_ms:
            self.drop_oldest()

    def since(self, seq: int, head_seq: int, now_ms: int) -> list[Change] | None:
        """The changes after `seq`; None when not all of them up to `head_seq` are kept."""
        limits = self._limits
        count = head_seq - seq
        if not 0 <= count <= min(limits.events_max, len(self.changes)):
            return None
        missed = list(self.changes)[len(self.changes) - count :]
        if not missed:
            return missed
        if missed[0].timestamp_ms < now_ms - limits.age_ms_max:
            return None
        if sum(_size(change) for change in missed) > limits.group_bytes_max:
            return None
        return missed if missed[0].seq == seq + 1 and missed[-1].seq == head_seq else None

    def kept(self, head_seq: int, now_ms: int) -> list[Change]:
        """All that `since` would give, from the earliest seq that it knows."""
        limits, size = self._limits, 0
        kept: list[Change] = []
        for change in reversed(self.changes):
            size += _size(change)
            if (
                change.seq != head_seq - len(kept)
                or len(kept) == limits.events_max
                or size > limits.group_bytes_max
                or change.timestamp_ms < now_ms - limits.age_ms_max
            ):
                break
            kept.append(change)
        return kept[::-1]


class Histories:
    """The histories of all groups of a shard in memory, bounded together.

    When all together are too large, the group that grows gives way first, down to its fair share;
    then others that have more than theirs: a quiet group keeps what it has however busy its
    neighbours are.
    """

    def __init__(self, limits: HistoryLimits) -> None:
        self._limits = limits
        self._kept: OrderedDict[int, History] = OrderedDict()
        self.bytes = 0

    def new(self) -> History:
        """An empty history, for a group of its own."""
        return History(self._limits)

    def add(self, history: History, change: Change, now_ms: int) -> None:
        """Keep `change` in `history`."""
        if not self._limits.events_max:
            return
        before = history.bytes
        if not history.changes:
            self._kept[id(history)] = history
        history.add(change)
        self.bytes += history.bytes - before
        if self.bytes > self._limits.bytes_max:
            self._shrink(history, now_ms)

    def forget(self, history: History) -> None:
        """The group is forgotten, and its history with it."""
        if self._kept.pop(id(history), None) is not None:
            self.bytes -= history.bytes

    def _shrink(self, growing: History, now_ms: int) -> None:
        share = self._limits.bytes_max // len(self._kept)
        self._cut(growing, share)
        for _ in range(min(_EXAMINED_MAX, len(self._kept))):
            if self.bytes <= self._limits.bytes_max:
                return
            key, history = next(iter(self._kept.items()))
            self._kept.move_to_end(key)
            before = history.bytes
            history.drop_old(now_ms)
            self.bytes -= before - history.bytes
            self._cut(history, share)
            if not history.changes:
                del self._kept[key]

    def _cut(self, history: History, share: int) -> None:
        while self.bytes > self._limits.bytes_max and history.bytes > share:
            before = history.bytes
            history.drop_oldest()
            self.bytes -= before - history.bytes


def _size(change: Change) -> int:
    return len(change.data) + CHANGE_OVERHEAD_BYTES
