"""The summary of what is used most keeps its promise about what it leaves out."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from broker import messages
from broker.hot import EACH, EXACT, WINDOW_S, Hot, Sampler, Summary
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
def test_batches_are_counted(sizes: list[int]) -> None:
    """By stream; of groups that take turns all are seen, to within what samples can tell."""
    hot = HotGroups()
    for size in sizes:
        hot.add("s", [messages.Get(0, "s", f"g{n % 2}", "i") for n in range(size)], 1)
    assert hot.streams.top(1, 0.0) == [("s", float(sum(sizes)))]
    counts = dict(hot.groups.top(2, 0.0))
    assert counts.keys() <= {("s", "g0"), ("s", "g1")}
    assert abs(sum(counts.values()) - sum(sizes)) <= sum(size // 2 for size in sizes)


def test_a_sampler_takes_all_of_few_and_a_share_of_many() -> None:
    sampler = Sampler()

    def weight() -> int:
        sampler.total += 1
        return sampler.take() if sampler.total >= sampler.due else 0

    assert [weight() for _ in range(EXACT)] == [1] * EXACT
    weights = [weight() for _ in range(100 * EACH)]
    assert set(weights) == {0, EACH}
    assert 80 * EACH <= sum(weights) <= 120 * EACH
    sampler.refill()
    assert [weight() for _ in range(EXACT)] == [1] * EXACT
    assert sampler.total == 2 * EXACT + 100 * EACH
