"""What is used most, told in bounded space: a Misra-Gries summary per window of time. No I/O.

Counting is an addition to a dictionary. The price is that counts are a little low when there are
many more keys than are kept: by at most `error`, which is told with them.
"""

from __future__ import annotations

from collections.abc import Hashable
from heapq import nlargest
from operator import itemgetter
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

KEPT = 500
"""Keys that a summary keeps for sure; twice as many are held before the smallest are dropped."""
WINDOW_S = 10.0
"""What is told is of the last one to two of these."""

EXACT = 200
"""Things of a second that are all looked at, unless looking is expensive."""
EACH = 64
"""Of the things that follow in that second one in so many is looked at."""


class Sampler:
    """Counts things and says which of them are looked at, so that looking costs little however
    many there are.

    Who counts one adds it to `total`. When that reaches `due`, it is to be looked at, and `take`
    says how many it stands for: what most things cost is an addition and a comparison.

    Args:
        exact: of each second so many are all looked at.
    """

    __slots__ = ("_exact", "_exact_until", "_state", "due", "total")

    def __init__(self, exact: int = EXACT) -> None:
        self.total = 0
        self.due = 1
        self._state = 1
        self._exact = self._exact_until = exact

    def take(self) -> int:
        """The thing that was counted last is looked at. Returns for how many it stands."""
        if self.total < self._exact_until:
            self.due = self.total + 1
            return 1
        exact = self.total == self._exact_until
        # At steps that no regular order of things has.
        self._state = (self._state * 1103515245 + 12345) & 0x7FFFFFFF
        self.due = self.total + 1 + (self._state >> 16) % (2 * EACH - 1)
        return 1 if exact else EACH

    def refill(self) -> None:
        """A second is over."""
        self.due, self._exact_until = self.total + 1, self.total + self._exact


_count = itemgetter(1)


class Summary(Generic[K]):
    """Counts by key.

    Every count is between the true one less `error` and the true one, and `error` is at most the
    sum of all counts divided by `kept` + 1: whatever has a larger share is here.
    """

    __slots__ = ("_counts", "_kept", "error", "total")

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._counts: dict[K, int] = {}
        self.total = 0
        self.error = 0

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, key: K, count: int) -> None:
        """Count `key` so many times."""
        counts = self._counts
        counts[key] = counts.get(key, 0) + count
        self.total += count
        if len(counts) > 2 * self._kept:
            self._shrink()

    def counts(self) -> dict[K, int]:
        """What is kept."""
        return self._counts

    def _shrink(self) -> None:
        """Take from every count what the largest one that is not kept has."""
        less = nlargest(self._kept + 1, self._counts.values())[-1]
        self._counts = {key: count - less for key, count in self._counts.items() if count > less}
        self.error += less


class Hot(Generic[K]):
    """Rates of the keys that are used most now; `rotate` has to be called about once a second."""

    __slots__ = ("_before", "_before_s", "_began_at", "_current", "_kept")

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._current = Summary[K](kept)
        self._before = Summary[K](kept)
        self._before_s = 0.0
        self._began_at: float | None = None

    def add(self, key: K, count: int) -> None:
        """Count `key` so many times."""
        self._current.add(key, count)

    def rotate(self, now: float) -> None:
        """Begin a new window when the current one is over. `now`: seconds of any one clock."""
        if self._began_at is None:
            self._began_at = now
        elif now - self._began_at >= WINDOW_S:
            self._before, self._current = self._current, Summary(self._kept)
            self._before_s, self._began_at = now - self._began_at, now

    def top(self, limit: int, now: float) -> list[tuple[K, float]]:
        """Up to `limit` keys and how often each was counted a second, most first."""
        counts = dict(self._before.counts())
        for key, count in self._current.counts().items():
            counts[key] = counts.get(key, 0) + count
        began_at = now if self._began_at is None else self._began_at
        seconds = max(self._before_s + now - began_at, 1.0)
        return [
            (key, count / seconds) for key, count in nlargest(limit, counts.items(), key=_count)
        ]
