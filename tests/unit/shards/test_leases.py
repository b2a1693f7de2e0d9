"""What a dead gateway owes is told once, to whoever asks for it in time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from broker.messages import AddLeaveTrigger, Lease, Left
from shards.leases import Leases

WAIT_S = 100.0


def lease(lease_id: int, group: str = "g", name: str = "s", context: str = "1") -> Lease:
    head = f"{name}@{group}".encode()
    return Lease(lease_id, "chat", group, len(head), head + context.encode())


def trigger(trigger_id: str, likeness: str = "f", group: str | None = None) -> AddLeaveTrigger:
    return AddLeaveTrigger(trigger_id, likeness, "chat", group)


def two_gateways(delay_s: float = 0.0) -> Leases[str]:
    """`old` holds a lease of g and one of h, and has a trigger on all and one on h."""
    leases = Leases[str](delay_s, WAIT_S)
    leases.gateway_linked("old", "1")
    leases.add("old", lease(1), 0)
    leases.add("old", lease(2, "h"), 0)
    assert leases.add_trigger("old", trigger("t1"), 0) == []
    assert leases.add_trigger("old", trigger("t2", "f2", "h"), 0) == []
    return leases


def told(lefts: list[Left]) -> list[tuple[str, str, bytes]]:
    return [(left.trigger_id, left.group_id, left.payload) for left in lefts]


def test_triggers_are_told_what_they_would_have_been() -> None:
    leases = two_gateways()
    assert leases.gateway_lost("old", 5) == [5, 5 + WAIT_S]
    leases.gateway_linked("new", "2")
    assert leases.owed == 3
    assert told(leases.add_trigger("new", trigger("t2", "f2", "h"), 6)) == [("t2", "h", b"s@h1")]
    found = told(leases.add_trigger("new", trigger("other", "f"), 7))
    assert found == [("other", "g", b"s@g1"), ("other", "h", b"s@h1")]
    assert leases.add_trigger("new", trigger("t1"), 8) == []
    assert (leases.owed, leases.told_total, len(leases)) == (0, 3, 0)


def test_the_same_id_comes_before_likeness() -> None:
    leases = Leases[str](0, WAIT_S)
    leases.gateway_linked("old", "1")
    leases.add("old", lease(1), 0)
    leases.add("old", lease(2, "h"), 0)
    leases.add_trigger("old", trigger("a", "same", "g"), 0)
    leases.add_trigger("old", trigger("b", "same", "h"), 0)
    leases.gateway_lost("old", 1)
    leases.gateway_linked("new", "2")
    assert told(leases.add_trigger("new", trigger("b", "same", "h"), 2)) == [("b", "h", b"s@h1")]
    assert told(leases.add_trigger("new", trigger("c", "same", "g"), 2)) == [("c", "g", b"s@g1")]


def test_what_ended_or_is_the_gateways_own_again_is_not_owed() -> None:
    leases = two_gateways()
    leases.end("old", 1)
    leases.gateway_lost("old", 5)
    leases.gateway_linked("old again", "1")
    assert leases.owed == 0
    leases.gateway_linked("new", "2")
    assert leases.add_trigger("new", trigger("t1"), 6) == []


def test_who_comes_back_in_time_is_not_told() -> None:
    leases = two_gateways(delay_s=10)
    leases.add("old", lease(3, name="late"), 0)
    leases.gateway_lost("old", 5)
    leases.gateway_linked("new", "2")
    leases.add("new", lease(1, context="2"), 14.9)
    assert leases.add_trigger("new", trigger("t1"), 14.9) == []
    assert leases.due(14.9) == []
    leases.add("new", lease(2, name="late"), 15)  # too late: has left and come again
    assert told([left for _, left in leases.due(15)]) == [
        ("t1", "h", b"s@h1"),
        ("t1", "g", b"late@g1"),
    ]
    assert leases.due(16) == []


def test_what_nobody_asks_for_is_dropped() -> None:
    leases = two_gateways()
    leases.gateway_lost("old", 5)
    leases.gateway_linked("new", "2")
    assert leases.due(5 + WAIT_S) == []
    assert (leases.owed, leases.dropped_total) == (0, 3)
    assert leases.add_trigger("new", trigger("t1"), 6 + WAIT_S) == []


steps = st.lists(
    st.one_of(
        st.tuples(st.just("join"), st.sampled_from("gh")),
        st.tuples(st.just("end"), st.integers(0, 20)),
        st.tuples(st.just("trigger"), st.sampled_from(["t1", "t2", "t3"])),
        st.tuples(st.just("no trigger"), st.sampled_from(["t1", "t2", "t3"])),
        st.tuples(st.just("die"), st.none()),
        st.tuples(st.just("cut"), st.none()),
    ),
    max_size=40,
)


@given(steps)
def test_never_told_twice_and_nobody_forgotten(drawn: list[tuple[str, object]]) -> None:
    """One gateway after the other; a cut one links again and keeps what it has."""
    leases = Leases[int](0, WAIT_S)
    generation, link = 1, 1
    leases.gateway_linked(link, "1")
    held: dict[int, bytes] = {}
    registered: set[str] = set()
    owed: set[tuple[str, bytes]] = set()
    tellings: list[tuple[str, bytes]] = []
    for number, (step, argument) in enumerate(drawn):
        match step, argument:
            case "join", str(group):
                message = lease(number, group, name=f"s{number}")
                held[number] = message.payload
                leases.add(link, message, number)
            case "end", int(index) if held:
                lease_id = list(held)[index % len(held)]
                del held[lease_id]
                leases.end(link, lease_id)
            case "trigger", str(trigger_id):
                registered.add(trigger_id)
                lefts = leases.add_trigger(link, trigger(trigger_id, trigger_id), number)
                got = [(left.trigger_id, left.payload) for left in lefts]
                expected = {pair for pair in owed if pair[0] == trigger_id}
                assert sorted(got) == sorted(expected)
                owed -= expected
                tellings += got
            case "no trigger", str(trigger_id):
                registered.discard(trigger_id)
                leases.remove_trigger(link, trigger_id)
            case "die", _:
                owed |= {(name, payload) for name in registered for payload in held.values()}
                leases.gateway_lost(link, number)
                generation, link = generation + 1, link + 1
                held, registered = {}, set()
                leases.gateway_linked(link, str(generation))
            case "cut", _:
                leases.gateway_lost(link, number)
                link += 1
                leases.gateway_linked(link, str(generation))
                for lease_id, payload in held.items():
                    size = len(payload) - 1
                    leases.add(link, Lease(lease_id, "chat", "g", size, payload), number)
                for name in registered:
                    assert leases.add_trigger(link, trigger(name, name), number) == []
    assert len(tellings) == len(set(tellings))


def test_triggers_of_other_gateways_are_owed_too() -> None:
    """Told by the gateway that has the trigger, or kept until it is registered again."""
    leases = Leases[str](0, WAIT_S)
    leases.gateway_linked("a", "1")
    leases.gateway_linked("b", "2")
    leases.gateway_linked("c", "3")
    leases.add("a", lease(1), 0)
    leases.add("b", lease(1, "h"), 0)
    for gateway in ("b", "c"):  # both know of a trigger of another broker
        leases.add_trigger(gateway, trigger("far", "far"), 0)
    leases.add_trigger("b", trigger("b's", "near"), 0)
    leases.gateway_lost("a", 1)
    assert leases.owed == 2
    due = leases.due(1)
    assert sorted(left.trigger_id for _, left in due) == ["b's", "far"]
    assert {left.group_id for _, left in due} == {"g"}
    assert leases.due(2) == []
    leases.gateway_lost("b", 3)
    assert [(gateway, left.trigger_id) for gateway, left in leases.due(3)] == [("c", "far")]
    assert leases.owed == 1
    assert told(leases.add_trigger("c", trigger("again", "near"), 4)) == [("again", "h", b"s@h1")]
    assert leases.owed == 0
