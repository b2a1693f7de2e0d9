"""The checker accepts what may happen and rejects what may not."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest

from tests.sim import history, order
from tests.sim.checker import Report, check
from tests.sim.history import (
    Call,
    Caught,
    Fault,
    Final,
    Fired,
    Frame,
    Join,
    Leave,
    Record,
    Told,
    Trigger,
)
from tests.sim.order import Impossible, Placed, Searched, explained, placed_wrongly

S, G = "chat", "room"


class Model:
    """A right broker of one group; tests bend what it records."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.told: list[Told] = []
        self.items: dict[str, Any] = {}
        self.time = 1000
        self.orders: dict[str, int] = {}

    def call(
        self,
        function: Any,
        item: str | None = None,
        *,
        at: float,
        until: float | None = None,
        session: str = "w",
        outcome: Any = "ok",
        **more: Any,
    ) -> Call:
        """A call that takes effect now; `at` to `until` is when its caller waited."""
        order = self.orders[session] = self.orders.get(session, 0) + 1
        call = Call(
            id=f"{session}{order}",
            session=session,
            order=order,
            stream=S,
            group=G,
            function=function,
            item=item,
            began=at,
            ended=at + 0.5 if until is None else until,
            outcome=outcome,
            **more,
        )
        before = self.items.get(item) if item else None
        if function == "set":
            call.data = {"by": call.id, "n": 0}
        elif function == "update":
            by = {"type": "set", "path": "by", "value": call.id}
            call.ops = [{"type": "increment", "path": "n", "by": 1}, by]
        elif function == "send":
            call.data = {"by": call.id}
            self.tell("event", None, call.data, name="ping")
        if outcome == "refused":
            pass
        elif function in ("set", "update"):
            n = (before or {}).get("n", 0) + 1 if function == "update" else 0
            value = {"by": call.id, "n": n}
            call.result = {"old_value": before, "new_value": value}
            self.items[str(item)] = value
            self.tell("create" if before is None else "update", item, value)
        elif function == "delete":
            call.result = {"old_value": before}
            if self.items.pop(str(item), None) is not None:
                self.tell("delete", item, before)
        elif function == "get":
            call.result = before
        elif function == "list":
            call.result = list(self.items.values())
        if outcome != "ok":
            call.result, call.ended = None, None
        self.records.append(call)
        return call

    def tell(self, kind: Any, item: str | None, data: Any, name: str | None = None) -> None:
        self.time += 1
        seq = len(self.told) + 1
        self.told.append(
            Told(kind=kind, seq=seq, timestamp=self.time, item=item, data=data, name=name)
        )

    def join(self, name: str = "c", since: int | None = None, item: str | None = None) -> None:
        self.records.append(
            Join(
                subscriber=name,
                at=0,
                stream=S,
                group=G,
                item=item,
                since=since,
                epoch=None if since is None else "e",
            )
        )

    def sync(self, name: str = "c", item: str | None = None) -> Frame:
        self.time += 1
        return self.frame(
            name,
            kind="sync",
            seq=len(self.told),
            timestamp=self.time,
            epoch="e",
            item=item,
            data=list(self.items.values()) if item is None else self.items.get(item),
            ids=list(self.items) if item is None else None,
        )

    def frame(self, subscriber: str, /, **fields: Any) -> Frame:
        frame = Frame(subscriber=subscriber, at=0, **fields)
        self.records.append(frame)
        return frame

    def hear(self, *seqs: int, name: str = "c") -> None:
        """The subscriber gets these events."""
        for seq in seqs:
            told = self.told[seq - 1]
            fields = {f: getattr(told, f) for f in told.__struct_fields__}
            self.frame(name, **fields)

    def fire(self, *seqs: int) -> None:
        for seq in seqs:
            told = self.told[seq - 1]
            fields = {f: getattr(told, f) for f in told.__struct_fields__}
            self.records.append(Fired(trigger="t", at=0, stream=S, group=G, **fields))

    def trigger(self, **fields: Any) -> None:
        self.records.append(Trigger(trigger="t", at=0, stream=S, **fields))

    def report(self, *, final: bool = True) -> Report:
        if final:
            self.records.append(
                Final(
                    stream=S,
                    group=G,
                    epoch="e",
                    seq=len(self.told),
                    items=list(self.items.items()),
                    events=self.told,
                )
            )
        return check(history.load(history.dump(self.records)))

    def rules(self, *, final: bool = True) -> set[str]:
        return {violation.rule for violation in self.report(final=final).violations}


def busy() -> Model:
    """Three writes, a read of all, and a subscriber who saw them."""
    model = Model()
    model.join()
    model.sync()
    model.call("set", "a", at=1)
    model.call("update", "a", at=2)
    model.call("set", "b", at=3)
    model.call("list", at=4)
    model.hear(1, 2, 3)
    model.records.append(Caught(subscriber="c"))
    return model


def test_a_right_run_is_right() -> None:
    model = busy()
    model.call("delete", "a", at=5)
    model.call("get", "a", at=6)
    model.call("delete", "a", at=7)
    model.call("send", at=8)
    model.hear(4, 5)
    model.trigger()
    model.fire(1, 2, 3, 4, 5)
    report = model.report()
    assert not report.violations, report
    assert (report.calls, report.events, report.frames, report.fired) == (8, 5, 6, 5)


@pytest.mark.parametrize("seed", range(30))
def test_random_right_runs_are_right(seed: int) -> None:
    rng, model = random.Random(seed), Model()
    names = ["c", "d"]
    heard = dict.fromkeys(names, 0)
    for name in names:
        model.join(name)
        model.sync(name)
    model.trigger(item="a")
    for step in range(60):
        # Calls of three sessions overlap, but take effect where the model makes them.
        session = rng.choice("uvw")
        at = step - 0.5
        model.call(
            rng.choice(["set", "update", "delete", "get", "list", "send"]),
            rng.choice("ab"),
            at=at,
            until=step + 0.4,
            session=session,
            outcome=rng.choice(["ok", "ok", "ok", "unknown"]),
        )
        name = rng.choice(names)
        if rng.random() < 0.2:
            model.records.append(Leave(subscriber=name, at=0))
            if rng.random() < 0.5:
                model.join(name)
                model.sync(name)
            else:
                model.join(name, since=heard[name])
                times = [t.timestamp for t in model.told[heard[name] :]]
                model.time += 1
                fields = {"seq": heard[name], "epoch": "e"}
                model.frame(
                    name, kind="resume", timestamp=[*times, model.time + 1][0] - 1, **fields
                )
                model.hear(*range(heard[name] + 1, len(model.told) + 1), name=name)
        else:
            model.hear(*range(heard[name] + 1, len(model.told) + 1), name=name)
        heard[name] = len(model.told)
    model.fire(*(t.seq for t in model.told if t.item == "a"))
    unsure = [c for c in model.records if isinstance(c, Call) and c.outcome == "unknown"]
    assert unsure
    report = model.report()
    assert not report.violations, report


def test_an_acknowledged_write_without_an_event_is_lost() -> None:
    model = busy()
    model.call("set", "c", at=9)
    model.items.pop("c")
    model.told.pop()
    assert "lost" in model.rules()


def test_an_acknowledged_delete_that_did_nothing_is_lost() -> None:
    model = busy()
    call = model.call("delete", "a", at=9)
    model.told.pop()
    model.items["a"] = call.result["old_value"]
    assert "lost" in model.rules()


def test_what_was_shown_and_is_gone_is_lost() -> None:
    model = busy()
    model.told.pop()
    model.items.pop("b")
    assert "lost" in model.rules()


def test_items_that_the_events_do_not_explain_are_lost() -> None:
    model = busy()
    model.items.pop("b")
    assert "lost" in model.rules()


def test_a_gap_is_found() -> None:
    model = busy()
    model.join("d")
    model.frame("d", kind="sync", seq=0, timestamp=1000, epoch="e", data=[])
    model.hear(1, 3, name="d")
    assert model.rules() == {"gap"}


def test_a_gap_of_an_item_is_found() -> None:
    model = busy()
    model.call("set", "a", at=5)
    model.hear(4)
    model.join("d", item="a")
    model.frame("d", kind="sync", seq=0, timestamp=1000, epoch="e", item="a", data=None)
    model.hear(1, 4, name="d")
    assert model.rules() == {"gap"}


def test_a_double_is_found() -> None:
    model = busy()
    model.hear(3)
    assert "double" in model.rules()


def test_an_inversion_is_found() -> None:
    model = busy()
    model.hear(2)
    assert "inversion" in model.rules()


def test_an_end_that_was_not_heard_is_found() -> None:
    model = busy()
    model.call("set", "c", at=5)
    assert model.rules() == {"behind"}


def test_who_conflates_may_miss_what_is_no_more() -> None:
    for last, rules in ((3, set()), (2, {"behind"})):
        model = busy()
        model.join("d")
        join = model.records[-1]
        assert isinstance(join, Join)
        join.conflate = True
        model.frame("d", kind="sync", seq=0, timestamp=1000, epoch="e", data=[], ids=[])
        model.hear(*range(2, last + 1), name="d")
        model.records.append(Caught(subscriber="d"))
        assert model.rules() == rules


def test_a_resume_from_elsewhere_is_found() -> None:
    model = busy()
    model.join(since=2)
    model.frame("c", kind="resume", seq=3, timestamp=model.time + 1, epoch="e")
    assert "resume" in model.rules()


def test_an_event_before_the_sync_is_found() -> None:
    model = busy()
    model.join("d")
    model.hear(1, name="d")
    assert "early" in model.rules()


def test_a_sync_of_another_state_is_found() -> None:
    model = busy()
    model.join("d")
    sync = model.sync("d")
    sync.data = sync.data[:1]
    sync.ids = ["a"]
    assert model.rules() == {"sync"}


def test_a_sync_under_wrong_names_is_found() -> None:
    model = busy()
    model.join("d")
    sync = model.sync("d")
    assert sync.ids is not None
    sync.ids.reverse()
    assert model.rules() == {"sync"}


def test_times_that_do_not_grow_are_found() -> None:
    model = busy()
    for record in model.records:
        if isinstance(record, Frame) and record.seq == 3:
            record.timestamp = model.told[1].timestamp
    model.told[2].timestamp = model.told[1].timestamp
    assert model.rules() == {"timestamp"}


@pytest.mark.parametrize("off", [-1, 0, 1])
def test_a_sync_with_the_time_of_an_event_is_found(off: int) -> None:
    model = busy()
    model.join("d")
    sync = model.sync("d")
    model.call("set", "c", at=5)
    model.hear(4)
    model.hear(4, name="d")
    assert sync.seq == 3
    sync.timestamp = model.told[2 + max(off, 0)].timestamp + min(off, 0)
    assert "timestamp" in model.rules()


def test_two_things_under_one_seq_are_found() -> None:
    model = busy()
    model.join("d")
    model.frame("d", kind="sync", seq=2, timestamp=1003, epoch="e", data=[model.told[1].data])
    told = model.told[2]
    model.frame("d", kind="create", seq=3, timestamp=told.timestamp, item="x", data=told.data)
    assert "conflict" in model.rules()


def test_a_stale_read_is_found() -> None:
    model = busy()
    model.call("get", "a", at=5).result = model.told[0].data
    assert model.rules() == {"order"}


def test_a_read_of_the_future_is_found() -> None:
    model = busy()
    model.call("get", "a", at=0.1).result = model.told[1].data
    assert model.rules() == {"order"}


def test_a_stale_list_is_found() -> None:
    model = busy()
    model.call("list", at=5, session="x").result = [model.told[0].data]
    assert model.rules() == {"order"}


def test_reads_that_go_back_are_found() -> None:
    model = Model()
    model.call("set", "a", at=1, until=9, session="u")
    model.call("get", "a", at=2, session="x")
    model.call("get", "a", at=4, session="x").result = None
    assert model.rules() == {"order"}


def test_a_value_that_never_was_is_found() -> None:
    model = busy()
    model.call("get", "a", at=5).result = {"by": "nobody"}
    assert "result" in model.rules()


def test_writes_in_the_wrong_order_are_found() -> None:
    model = Model()
    model.call("set", "a", at=5, session="u")
    model.call("set", "a", at=1, session="x")
    assert model.rules() == {"order"}


def test_calls_of_a_session_in_the_wrong_order_are_found() -> None:
    model = Model()
    first = model.call("set", "a", at=1, until=9, session="u")
    second = model.call("set", "a", at=1, until=9, session="u")
    first.order, second.order = second.order, first.order
    assert model.rules() == {"order"}


def test_a_get_behind_a_void_set_that_misses_it_is_found() -> None:
    model = Model()
    model.call("set", "a", at=1, session="u", outcome="unknown")
    model.call("get", "a", at=1, until=9, session="u").result = None
    assert model.rules() == {"order"}


def test_a_lost_update_is_found() -> None:
    model = Model()
    model.call("set", "a", at=1)
    model.call("update", "a", at=2, session="u")
    lost = model.call("update", "a", at=2, session="v")
    value = {"by": lost.id, "n": 1}
    lost.result = {"old_value": {"by": "w1", "n": 0}, "new_value": value}
    model.told[2].data = model.items["a"] = value
    assert "result" in model.rules()


def test_a_refused_write_that_is_there_is_found() -> None:
    model = busy()
    model.call("set", "c", at=5).outcome = "refused"
    model.hear(4)
    assert model.rules() == {"phantom"}


def test_a_write_that_happened_twice_is_found() -> None:
    model = busy()
    model.tell("update", "a", model.told[1].data)
    model.hear(4)
    assert "phantom" in model.rules()


def test_an_event_of_no_call_is_found() -> None:
    model = busy()
    model.tell("delete", "a", model.items.pop("a"))
    model.hear(4)
    assert model.rules() == {"phantom"}


def test_a_numbering_that_began_anew_is_found() -> None:
    model = busy()
    model.join("d")
    model.sync("d").epoch = "another"
    assert model.rules() == {"epoch"}


@pytest.mark.parametrize(
    ("fired", "rules"),
    [
        ((1, 2, 3), set()),
        ((1, 3), {"trigger missed"}),
        ((1, 2, 2, 3), {"trigger double"}),
        ((2, 1, 3), {"trigger inversion"}),
    ],
)
def test_triggers_fire_once_and_in_order(fired: tuple[int, ...], rules: set[str]) -> None:
    model = busy()
    model.trigger(group=G)
    model.fire(*fired)
    assert model.rules() == rules


def test_triggers_fire_only_when_asked_to() -> None:
    model = busy()
    model.trigger(item="b")
    model.fire(1, 3)
    assert model.rules() == {"trigger unasked"}


def test_a_death_may_take_triggers() -> None:
    model = busy()
    model.trigger()
    model.records.append(Fault(at=2.2, what="kill shard"))
    model.fire(1)
    assert model.rules() == {"trigger missed"}, "the third call began after it"
    model.records.append(Fault(at=3.2, what="kill shard", groups=[(S, "another")]))
    assert model.rules() == {"trigger missed"}
    model.records.append(Fault(at=3.2, what="kill shard", groups=[(S, G)]))
    assert model.rules() == set()


# Where some events were seen by nobody.


def test_a_search_explains_what_is_right() -> None:
    model = Model()
    model.call("set", "a", at=1, until=8, session="u")
    model.call("update", "a", at=1, until=8, session="v")
    model.call("get", "a", at=1, until=8, session="x")
    model.call("set", "a", at=9, outcome="unknown")
    model.call("get", "a", at=20)
    model.join()
    model.sync()
    model.call("update", "a", at=30)
    model.hear(4)
    report = model.report(final=False)
    assert report.incomplete_groups == 1
    assert not report.violations, report


def test_a_search_finds_a_lost_update() -> None:
    model = Model()
    model.call("set", "a", at=1)
    model.call("update", "a", at=2, session="u")
    lost = model.call("update", "a", at=2, session="v")
    lost.result = {"old_value": {"by": "w1", "n": 0}, "new_value": {"by": lost.id, "n": 1}}
    model.join()
    model.sync()
    model.call("set", "b", at=5)
    model.hear(4)
    assert model.rules(final=False) == {"order"}


def test_a_search_finds_a_stale_read_and_a_lost_end() -> None:
    for bend in ("read", "end"):
        model = busy()
        model.records = [r for r in model.records if not isinstance(r, Frame | Join | Caught)]
        if bend == "read":
            model.call("get", "a", at=5).result = model.told[0].data
        else:
            model.items["a"] = model.told[0].data
        final = Final(stream=S, group=G, epoch="e", seq=3, items=list(model.items.items()))
        report = check([*model.records, final])
        assert {v.rule for v in report.violations} == {"order"}, bend


def test_calls_that_can_stand_in_several_places_take_what_is_left() -> None:
    def call(name: str, began: float, ended: float, *places: tuple[int, int]) -> Placed:
        return Placed(name, began, ended, name, 0, places)

    write = call("w", 4, 5, (2, 2))
    either = [(1, 1), (3, 3)]
    assert not list(placed_wrongly([write, call("r", 0, 9, *either)]))
    assert not list(placed_wrongly([write, call("r", 6, 9, *either), call("q", 0, 1, *either)]))
    late, early = call("r", 0, 1, *either), call("q", 2, 3, *either)
    assert not list(placed_wrongly([write, late, early]))
    assert list(placed_wrongly([write, call("r", 6, 9, (1, 1))]))
    assert list(placed_wrongly([write, call("q", 0, 1, (3, 3))]))


def test_a_search_that_is_too_long_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "STEPS_MAX", 1000)

    def impossible(_: Any) -> Any:
        raise Impossible

    calls = [Searched(0, 99, partial(_noted, number), True) for number in range(12)]
    assert explained([*calls, Searched(100, 101, impossible, True)], ()) is None


def _noted(number: int, state: Any) -> Any:
    return (*state, number)
