"""The summary of what is used most keeps its promise about what it leaves out."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from broker import messages
from broker.hot import WINDOW_S, Hot, Summary
from shards.hot_groups import HotGroups

counted = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), max_size=300)


@given(counted, st.integers(1, 10))
def test_counts_are_low_by_the_error_at_most(added: list[tuple[int, int]], kept: int) -> None:
    summary, true = Summary[int](kept), Counter[int]()
    for key, count in added:
        summary.add(key, count)
        true[key] += count
        assert len(summary) <= 2 * kept
    found = summary.counts()
    assert summary.total == true.total()
    assert summary.error <= true.total() / (kept + 1)
    for key, count in true.items():
        assert count - summary.error <= found.get(key, 0) <= count
        if count > true.total() / (kept + 1):
            assert key in found


def test_rates_are_of_the_last_windows() -> None:
    hot = Hot[str]()
    hot.rotate(100.0)
    hot.add("a", 50)
    hot.add("b", 20)
    assert hot.top(9, 105.0) == [("a", 10.0), ("b", 4.0)]
    hot.rotate(100.0 + WINDOW_S)
    hot.add("b", 60)
    assert hot.top(1, 110.0) == [("b", 8.0)]
    hot.rotate(100.0 + 2 * WINDOW_S)
    assert hot.top(9, 120.0) == [("b", 6.0)], "a has not been used for a window"
    hot.rotate(100.0 + 3 * WINDOW_S)
    assert hot.top(9, 130.0) == []


@given(st.lists(st.integers(1, 60), min_size=20, max_size=80))
def test_few_batches_are_counted_exactly(sizes: list[int]) -> None:
    """By stream; of groups that take turns all are seen, to within what samples can tell."""
    hot = HotGroups()
    for size in sizes:
        hot.add("s", [messages.Get(0, "s", f"g{n % 2}", "i") for n in range(size)])
    assert hot.streams.top(1, 0.0) == [("s", float(sum(sizes)))]
    counts = dict(hot.groups.top(2, 0.0))
    assert counts.keys() <= {("s", "g0"), ("s", "g1")}
    assert abs(sum(counts.values()) - sum(sizes)) <= sum(size // 2 for size in sizes)


def test_many_batches_are_counted_by_samples() -> None:
    """To a few of a hundred; and exactly again when there are few."""
    hot = HotGroups()
    for n in range(5000):
        stream = "often" if n % 3 else "seldom"
        hot.add(stream, [messages.Get(0, stream, "g", "i")] * 3)
    counts = dict(hot.streams.top(2, 0.0))
    assert abs(counts["often"] - 10_000) < 500
    assert abs(counts["seldom"] - 5_000) < 500
    hot.rotate(0.0)
    hot.add("new", [messages.Get(0, "new", "g", "i")])
    assert ("new", 1.0) in hot.streams.top(3, 1.0)
