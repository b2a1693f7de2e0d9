"""Which streams and groups of a shard are used most. No I/O."""

from __future__ import annotations

from collections.abc import Sequence

from broker.hot import Hot
from shards.group import Operation

SAMPLES = 4
"""Operations of a batch that are looked at, about: what it costs does not grow with it."""


class HotGroups:
    """Counts operations. Streams exactly; groups by evenly spaced samples of each batch, each of
    which stands for those between it and the next."""

    def __init__(self) -> None:
        self.streams = Hot[str]()
        self.groups = Hot[tuple[str, str]]()
        self._turn = 0

    def add(self, stream: str, operations: Sequence[Operation]) -> None:
        """Count a batch."""
        count = len(operations)
        self.streams.add(stream, count)
        step = count // SAMPLES or 1
        # Where a batch is begun with wanders, lest callers that take turns are seen one-sidedly.
        self._turn += 1
        for index in range(self._turn % step, count, step):
            self.groups.add((stream, operations[index].group_id), step)

    def rotate(self, now: float) -> None:
        """To be called about once a second."""
        self.streams.rotate(now)
        self.groups.rotate(now)
