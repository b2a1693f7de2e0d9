"""Where groups are routed: pinned, because stored data lies there."""

from __future__ import annotations

from collections import Counter

import pytest

from broker.names import Group
from broker.routing import shard_of

SHARDS = (1, 2, 3, 16, 1024)
PINNED: dict[tuple[str, str], tuple[int, ...]] = {
    ("chat", "room-1"): (0, 0, 1, 14, 46),
    ("chat", "room-2"): (0, 0, 0, 10, 682),
    ("", ""): (0, 0, 1, 14, 158),
    ("a:b", "c"): (0, 0, 0, 2, 850),
    ("a", "b:c"): (0, 0, 2, 10, 810),
    ("ab", "c"): (0, 0, 1, 8, 232),
    ("a", "bc"): (0, 0, 0, 12, 588),
    ("\xe9", "g"): (0, 0, 2, 10, 234),
    ("e\u0301", "g"): (0, 1, 2, 3, 899),
    ("d\xe9j\xe0-\U0001f4a1", "\u90e8\u5c4b 1"): (0, 1, 0, 15, 111),
    ("a\x00b", "c"): (0, 0, 2, 6, 982),
}


@pytest.mark.parametrize(("names", "shards"), PINNED.items())
def test_routes_stay_as_they_are(names: tuple[str, str], shards: tuple[int, ...]) -> None:
    assert tuple(shard_of(Group(*names), count) for count in SHARDS) == shards


def test_look_alikes_are_routed_by_themselves() -> None:
    """Names that are equal once they are joined must not always end on one shard."""
    looks = [("a:b", "c"), ("a", "b:c"), ("a:b:c", ""), ("", "a:b:c"), ("ab", "c"), ("a", "bc")]
    routes = {names: shard_of(Group(*names), 2**40) for names in looks}
    assert len(set(routes.values())) == len(looks)


@pytest.mark.parametrize("shards", [2, 3, 8])
def test_groups_spread_evenly(shards: int) -> None:
    counts = Counter(shard_of(Group("chat", f"room-{n}"), shards) for n in range(10_000))
    assert set(counts) == set(range(shards))
    assert min(counts.values()) > 0.9 * 10_000 / shards
