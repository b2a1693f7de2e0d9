"""Which `stream` triggers a change fires."""

from __future__ import annotations

import pytest

from broker.messages import AddTrigger
from shards.triggers import Triggers


def added(*triggers: AddTrigger, gateway: str = "g1") -> Triggers[str]:
    found = Triggers[str]()
    for trigger in triggers:
        found.add(gateway, trigger)
    return found


@pytest.mark.parametrize(
    ("group_id", "item_id", "fires"),
    [
        (None, None, True),
        ("", "", True),
        ("g", None, True),
        ("g", "i", True),
        (None, "i", True),
        ("", "i", True),
        ("G", None, False),
        ("g", "I", False),
        ("other", "i", False),
    ],
)
def test_filters(group_id: str | None, item_id: str | None, fires: bool) -> None:
    triggers = added(AddTrigger("t", "s", group_id, item_id))
    assert triggers.matching("s", "g", "i") == ({"g1": ["t"]} if fires else {})


def test_an_event_without_item_passes_no_item_filter() -> None:
    triggers = added(AddTrigger("all", "s", None, None), AddTrigger("one", "s", None, "i"))
    assert triggers.matching("s", "g", None) == {"g1": ["all"]}


def test_streams_are_matched_exactly() -> None:
    triggers = added(AddTrigger("t", "s", None, None))
    assert triggers.matching("S", "g", "i") == {}
    assert triggers.matching("", "g", "i") == {}


def test_order_of_registration_per_gateway() -> None:
    triggers = added(AddTrigger("b", "s", None, None), AddTrigger("a", "s", "g", None))
    triggers.add("g2", AddTrigger("b", "s", None, None))
    triggers.add("g1", AddTrigger("c", "s", None, "i"))
    assert triggers.matching("s", "g", "i") == {"g1": ["b", "a", "c"], "g2": ["b"]}


def test_the_same_id_replaces_also_on_another_stream() -> None:
    triggers = added(AddTrigger("t", "s", None, None), AddTrigger("u", "s", None, None))
    triggers.add("g1", AddTrigger("t", "other", None, None))
    assert triggers.matching("s", "g", "i") == {"g1": ["u"]}
    assert triggers.matching("other", "g", "i") == {"g1": ["t"]}
    assert len(triggers) == 2
    triggers.add("g1", AddTrigger("u", "s", "g", None))
    assert triggers.matching("s", "not g", "i") == {}


def test_the_same_id_of_another_gateway_is_another_trigger() -> None:
    triggers = added(AddTrigger("t", "s", None, None))
    triggers.add("g2", AddTrigger("t", "s", "g", None))
    triggers.remove("g1", "t")
    assert triggers.matching("s", "g", "i") == {"g2": ["t"]}


def test_remove() -> None:
    triggers = added(AddTrigger("t", "s", None, None))
    triggers.remove("g1", "nobody")
    triggers.remove("g2", "t")
    assert len(triggers) == 1
    triggers.remove("g1", "t")
    triggers.remove("g1", "t")
    assert (len(triggers), triggers.matching("s", "g", "i")) == (0, {})


def test_all_triggers_of_a_gateway_go_with_it() -> None:
    triggers = added(*(AddTrigger(str(n), f"s{n % 3}", None, None) for n in range(9)))
    triggers.add("g2", AddTrigger("1", "s1", None, None))
    triggers.remove_all("g1")
    assert len(triggers) == 1
    assert triggers.matching("s1", "g", "i") == {"g2": ["1"]}
