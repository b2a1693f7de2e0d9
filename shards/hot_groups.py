"""Which streams and groups of a shard are used most. No I/O."""

from __future__ import annotations

from collections.abc import Sequence

from broker.hot import Hot
from shards.group import Operation

SAMPLES = 2
"""Operations of a batch that are looked at, about: what it costs does not grow with it."""


class HotGroups:
    """Counts operations of the batches that it is given: streams exactly, groups by a few of each
    batch, of which each stands for those around it."""

    def __init__(self) -> None:
        self.streams = Hot[str]()
        self.groups = Hot[tuple[str, str]]()
        self._turn = 0

    def add(self, stream: str, operations: Sequence[Operation], weight: int) -> None:
        """Count a batch that stands for `weight` of them."""
        count = len(operations)
        self.streams.add(stream, count * weight)
        step = count // SAMPLES or 1
        # Where a batch is begun with wanders, lest callers that take turns are seen one-sidedly.
        self._turn += 1
        for operation in operations[self._turn % step :: step]:
            self.groups.add((stream, operation.group_id), step * weight)

    def rotate(self, now: float) -> None:
        """To be called about once a second."""
        self.streams.rotate(now)
        self.groups.rotate(now)
