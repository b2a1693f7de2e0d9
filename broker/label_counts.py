"""Counts by labels whose values are not all known beforehand, but bounded all the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from broker.metrics import Sample

OTHER = "other"
VALUES_MAX = 256
"""Combinations of labels that are counted apart; further ones are `other` in their last label."""


class LabelCounts:
    """A counter with labels `names`. Those in `known` are there from the start, at 0: the growth
    from nothing to the first is seen by nobody who asks for rates."""

    def __init__(self, names: Sequence[str], known: Iterable[tuple[str, ...]]) -> None:
        self._names = tuple(names)
        self._counts: dict[tuple[str, ...], int] = dict.fromkeys(known, 0)

    def add(self, *values: str) -> None:
        """Count one."""
        if values not in self._counts and len(self._counts) >= VALUES_MAX:
            values = (*values[:-1], OTHER)
        self._counts[values] = self._counts.get(values, 0) + 1

    @property
    def total(self) -> int:
        return sum(self._counts.values())

    def samples(self) -> list[Sample]:
        """For `Metrics.counters`."""
        return [
            (dict(zip(self._names, values, strict=True)), count)
            for values, count in self._counts.items()
        ]
