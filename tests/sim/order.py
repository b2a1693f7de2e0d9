"""Whether calls can be put into one order that explains their answers. Pure.

`placed_wrongly` is for calls whose place is known or bounded, as events number what was written;
`explained` searches where nothing is known (Wing and Gong, with Lowe's memory of dead ends).
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Hashable, Iterator, Sequence
from math import inf

import msgspec

STEPS_MAX = 200_000
"""Of a search; past it nothing is decided."""


class Placed(msgspec.Struct, eq=False):
    """A call and where it may stand.

    places: ranges of whole numbers, ascending, both ends included, of which it takes one place.
        What is written at `seq` stands at `2 * seq`, what is read behind that at `2 * seq + 1`.
    session, order: calls of one session stand in this order.
    """

    id: str
    began: float
    ended: float
    session: str
    order: int
    places: Sequence[tuple[int, int]]

    @property
    def fixed(self) -> bool:
        """Whether it can stand in one place only."""
        return len(self.places) == 1 and self.places[0][0] == self.places[0][1]


def placed_wrongly(calls: Sequence[Placed]) -> Iterator[tuple[Placed, Placed | None]]:
    """Pairs of calls, of which the first was over before the second began or was sent before it
    on one session, and yet stands behind it; None: no single call is to blame.

    Each call with room takes the first place that what came before it allows, which never takes
    anything from those that come after.
    """
    fixed = [call for call in calls if call.fixed]
    free = sorted((c for c in calls if not c.fixed), key=lambda c: (c.began, c.order))
    yield from _fixed_wrongly(fixed)
    over = sorted(((c.ended, c.id, c.places[0][0], c) for c in fixed), key=lambda e: e[:2])
    starts = sorted(fixed, key=lambda c: c.began, reverse=True)
    heap: list[tuple[float, str, float, Placed]] = [*over]  # a sorted list is a heap
    ceilings = _Ceilings(starts)
    lowest: float = -1
    lowest_by: Placed | None = None
    sessions = _Sessions(fixed)
    for call in free:
        while heap and heap[0][0] < call.began:
            _, _, place, before = heapq.heappop(heap)
            if place > lowest:
                lowest, lowest_by = place, before
        floor, floor_by = max((lowest, lowest_by), sessions.floor(call), key=_place)
        ceiling, ceiling_by = min(ceilings.of(call.ended), sessions.ceiling(call), key=_place)
        found = next((max(a, floor) for a, b in call.places if b >= floor), None)
        if found is None:
            yield (floor_by or call), call
        elif found > ceiling:
            yield call, ceiling_by
        else:
            heapq.heappush(heap, (call.ended, call.id, found, call))
            sessions.placed(call, found)


_Bound = tuple[float, Placed | None]


def _place(bound: _Bound) -> float:
    return bound[0]


class _Sessions:
    """Where the calls of each session stand; those that are not fixed are placed in their order."""

    def __init__(self, fixed: Sequence[Placed]) -> None:
        self._orders: dict[str, list[int]] = {}
        self._floors: dict[str, list[_Bound]] = {}
        self._ceilings: dict[str, list[_Bound]] = {}
        self._placed: dict[str, _Bound] = {}
        for call in sorted(fixed, key=lambda c: c.order):
            bound = (call.places[0][0], call)
            floors = self._floors.setdefault(call.session, [])
            floors.append(max(floors[-1], bound, key=_place) if floors else bound)
            self._orders.setdefault(call.session, []).append(call.order)
        for call in sorted(fixed, key=lambda c: c.order, reverse=True):
            bound = (call.places[0][0], call)
            ceilings = self._ceilings.setdefault(call.session, [])
            ceilings.append(min(ceilings[-1], bound, key=_place) if ceilings else bound)

    def floor(self, call: Placed) -> _Bound:
        """The highest place of a call that was sent before on the same session."""
        count = bisect_left(self._orders.get(call.session, []), call.order)
        fixed = self._floors[call.session][count - 1] if count else (-1, None)
        return max(fixed, self._placed.get(call.session, (-1, None)), key=_place)

    def ceiling(self, call: Placed) -> _Bound:
        """The lowest place of a fixed call that was sent behind it."""
        orders = self._orders.get(call.session, [])
        count = len(orders) - bisect_right(orders, call.order)
        return self._ceilings[call.session][count - 1] if count else (inf, None)

    def placed(self, call: Placed, place: float) -> None:
        """A call that was not fixed has its place."""
        bound = (place, call)
        self._placed[call.session] = max(self._placed.get(call.session, bound), bound, key=_place)


class _Ceilings:
    """The lowest place among the fixed calls that began after a moment."""

    def __init__(self, latest_first: Sequence[Placed]) -> None:
        self._began: list[float] = []  # negated, so that they ascend
        self._lowest: list[_Bound] = []
        lowest: _Bound = (inf, None)
        for call in latest_first:
            lowest = min(lowest, (call.places[0][0], call), key=_place)
            self._began.append(-call.began)
            self._lowest.append(lowest)

    def of(self, moment: float) -> _Bound:
        count = bisect_left(self._began, -moment)
        return self._lowest[count - 1] if count else (inf, None)


def _fixed_wrongly(fixed: Sequence[Placed]) -> Iterator[tuple[Placed, Placed]]:
    latest: Placed | None = None
    last_of: dict[str, Placed] = {}
    for call in sorted(fixed, key=lambda c: c.places[0][0]):
        if latest is not None and call.ended < latest.began:
            yield call, latest
        if latest is None or call.began > latest.began:
            latest = call
        before = last_of.get(call.session)
        if before is not None and before.order > call.order:
            yield call, before
        else:
            last_of[call.session] = call


State = Hashable
Step = Callable[[State], State]


class Impossible(Exception):
    """Raised by a step: the call can't have been made in that state."""


class Searched(msgspec.Struct, eq=False):
    """A call of which only its time and effect are known.

    step: the state that it leaves, from the one that it finds. Raises Impossible.
    certain: whether it was made at all. seq: its place among those that have one.
    """

    began: float
    ended: float
    step: Step
    certain: bool
    seq: int | None = None


def explained(calls: Sequence[Searched], state: State) -> bool | None:
    """Whether some order of `calls` explains all of them; None: undecided, as there were too
    many."""
    calls = sorted(calls, key=lambda c: (not c.certain, c.began))
    certain = sum(1 << i for i, call in enumerate(calls) if call.certain)
    dead: set[tuple[int, State]] = set()
    stack = [(0, state)]
    for _ in range(STEPS_MAX):
        if not stack:
            return False
        done, found = stack.pop()
        if done & certain == certain:
            return True
        if (done, found) in dead:
            continue
        dead.add((done, found))
        undone = [i for i in range(len(calls)) if not done >> i & 1]
        until = min(calls[i].ended for i in undone if calls[i].certain)
        next_seq = min(
            (seq for i in undone if (seq := calls[i].seq) is not None and calls[i].certain),
            default=inf,
        )
        for i in reversed(undone):
            call = calls[i]
            if call.began > until or (call.seq is not None and call.seq > next_seq):
                continue
            try:
                stack.append((done | 1 << i, call.step(found)))
            except Impossible:
                continue
    return None
