"""What a client of the stream port does with frames, against a model of the broker."""

from __future__ import annotations

import itertools
import json
import random
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.client_state import (
    RECONNECT_S_FIRST,
    RECONNECT_S_MAX,
    Change,
    ClientState,
    Kind,
    Target,
    Unauthorized,
    Watching,
    backoff_s,
)
from broker.errors import InvalidRequest, ProtocolError
from broker.names import Group

GROUP = Group("chat", "room-1")
WHOLE = Target(GROUP, None)
ITEM = Target(GROUP, "a")


def frame(
    kind: str, seq: int | None = None, item_id: str | None = None, **fields: Any
) -> dict[str, Any]:
    """An envelope. `epoch`, `resumed` and `group_id` go to its top, other fields into `event`."""
    top = {"type": "stream", "timestamp": 1000 + (seq or 0), "streamName": "chat"}
    top |= {"groupId": fields.pop("group_id", "room-1"), "id": item_id}
    top |= {name: fields.pop(name) for name in ("epoch", "resumed") if name in fields}
    if seq is not None:
        top["seq"] = seq
    return top | {"event": {"type": kind} | fields}


def sync(seq: int, epoch: str = "e1", **items: Any) -> dict[str, Any]:
    return frame("sync", seq, data=list(items.values()), ids=list(items), epoch=epoch)


def custom(seq: int, item_id: str | None = None) -> dict[str, Any]:
    return frame("event", seq, item_id, event={"type": "ping", "data": seq})


class Session:
    """A client with the watches that a test makes, connected at once."""

    def __init__(self) -> None:
        self.state = ClientState()
        self.sent: list[dict[str, Any]] = []
        self.ids: list[str] = []  # of subscriptions, in the order of their first joins
        self.connect()

    def connect(self) -> None:
        self._sent(self.state.connect())

    def watch(self, target: Target = WHOLE) -> Watching:
        watching = Watching(target)
        self._sent(self.state.watch(watching))
        return watching

    def unwatch(self, watching: Watching) -> None:
        self._sent(self.state.unwatch(watching))

    def receive(self, *frames: dict[str, Any]) -> None:
        for each in frames:
            number = each["event"].get("subscriptionId", "")
            if number in map(str, range(1, len(self.ids) + 1)):
                each["event"]["subscriptionId"] = self.ids[int(number) - 1]
            self._sent(self.state.receive(json.dumps(each).encode()))

    def _sent(self, frames: list[str]) -> None:
        """Keep what was sent, with numbers, as text, instead of random ids."""
        for text in frames:
            message = json.loads(text)
            subscription_id = message["data"]["subscriptionId"]
            if subscription_id not in self.ids:
                self.ids.append(subscription_id)
            message["data"]["subscriptionId"] = str(self.ids.index(subscription_id) + 1)
            self.sent.append(message)


def taken(watching: Watching) -> list[Change]:
    changes = []
    while (change := watching.take()) is not None:
        changes.append(change)
    return changes


def told(watching: Watching) -> list[tuple[Kind, int]]:
    return [(change.kind, change.seq) for change in taken(watching)]


# What is sent --------------------------------------------------------------------------------


def test_join_of_a_group_asks_for_ids() -> None:
    session = Session()
    session.watch()
    data = {"subscriptionId": "1", "streamName": "chat", "groupId": "room-1", "ids": True}
    assert session.sent == [{"type": "join", "data": data}]


def test_join_of_an_item() -> None:
    session = Session()
    session.watch(ITEM)
    data = {"subscriptionId": "1", "streamName": "chat", "groupId": "room-1", "id": "a"}
    assert session.sent == [{"type": "join", "data": data}]


def test_no_two_clients_have_a_subscription_id_in_common() -> None:
    first, second = Session(), Session()
    for session in (first, second):
        session.watch()
        session.watch(ITEM)
    assert len({*first.ids, *second.ids}) == 4


def test_item_without_a_name_is_an_item() -> None:
    session = Session()
    watching = session.watch(Target(GROUP, ""))
    assert session.sent[0]["data"]["id"] == ""
    session.receive(frame("sync", 1, "", data=5, epoch="e1"))
    assert (told(watching), watching.state) == ([(Kind.SYNC, 1)], 5)


def test_joins_again_as_of_the_last_event() -> None:
    session = Session()
    session.watch()
    session.receive(sync(3), custom(4), custom(5))
    session.state.disconnect()
    session.connect()
    data = session.sent[-1]["data"]
    assert (data["since"], data["epoch"], data["subscriptionId"]) == (5, "e1", "1")


def test_joins_again_from_the_start_without_a_sync() -> None:
    session = Session()
    session.watch()
    session.state.disconnect()
    session.connect()
    assert session.sent[0] == session.sent[1]


def test_one_subscription_for_all_watches_of_a_thing() -> None:
    session = Session()
    watches = [session.watch(), session.watch()]
    assert len(session.sent) == 1
    session.receive(sync(0), custom(1))
    for watching in watches:
        assert told(watching) == [(Kind.SYNC, 0), (Kind.EVENT, 1)]
    session.unwatch(watches[0])
    assert len(session.sent) == 1
    session.unwatch(watches[1])
    assert session.sent[1]["type"] == "leave"
    assert session.sent[1]["data"]["subscriptionId"] == "1"


def test_nothing_is_sent_while_there_is_no_connection() -> None:
    session = Session()
    session.state.disconnect()
    session.unwatch(session.watch())
    assert session.sent == []


# What frames do ------------------------------------------------------------------------------


def test_state_of_a_group() -> None:
    session = Session()
    watching = session.watch()
    session.receive(
        sync(3, a=1, b=2),
        frame("update", 4, "a", data=10),
        frame("create", 5, "c", data=3),
        frame("delete", 6, "b", data=2),
        frame("create", 7, "b", data=20),
        custom(8, "a"),
    )
    assert taken(watching)[-1] == Change(Kind.EVENT, "a", 8, 8, "e1", 1008, "ping")
    assert list(watching.state.items()) == [("a", 10), ("c", 3), ("b", 20)]


def test_state_is_as_of_the_change_that_was_taken() -> None:
    session = Session()
    watching = session.watch()
    session.receive(sync(1, a=1), frame("update", 2, "a", data=2))
    assert watching.state == {}
    first = watching.take()
    assert watching.state == {"a": 1}
    watching.take()
    assert watching.state == {"a": 2}
    assert first is not None
    assert first.data == {"a": 1}


def test_state_of_an_item() -> None:
    session = Session()
    watching = session.watch(ITEM)
    session.receive(frame("sync", 1, "a", data=None, epoch="e1"))
    session.receive(frame("create", 5, "a", data=1), frame("create", 6, "b", data=1))
    assert (told(watching), watching.state) == ([(Kind.SYNC, 1), (Kind.CREATE, 5)], 1)
    session.receive(frame("delete", 9, "a", data=1))
    assert (told(watching), watching.state) == ([(Kind.DELETE, 9)], None)


def test_events_that_came_already_are_passed_over() -> None:
    session = Session()
    watching = session.watch()
    session.receive(sync(3), custom(3), custom(4), custom(4), custom(5), custom(4))
    assert told(watching) == [(Kind.SYNC, 3), (Kind.EVENT, 4), (Kind.EVENT, 5)]


def test_goes_on_after_a_loss() -> None:
    session = Session()
    watching = session.watch()
    session.receive(sync(3), custom(4))
    session.state.disconnect()
    session.connect()
    session.receive(frame("resume", 4, epoch="e1", resumed=True), custom(5), custom(6))
    assert told(watching) == [(Kind.SYNC, 3)] + [(Kind.EVENT, seq) for seq in (4, 5, 6)]


def test_sync_when_events_are_no_longer_kept() -> None:
    session = Session()
    watching = session.watch()
    session.receive(sync(3, a=1))
    session.state.disconnect()
    session.connect()
    session.receive(sync(9, b=2) | {"resumed": False})
    assert told(watching) == [(Kind.SYNC, 3), (Kind.SYNC, 9)]
    assert watching.state == {"b": 2}


def test_another_numbering_begins_with_a_sync() -> None:
    session = Session()
    watching = session.watch()
    session.receive(sync(30), sync(0, "e2"), custom(1))
    assert [(c.epoch, c.seq) for c in taken(watching)] == [("e1", 30), ("e2", 0), ("e2", 1)]


def test_events_before_the_answer_are_not_this_subscriptions() -> None:
    """A group's events come before the item, which was at 2, is told 3."""
    session = Session()
    group, item = session.watch(), session.watch(ITEM)
    session.receive(sync(2), frame("sync", 2, "a", data=None, epoch="e1"))
    session.state.disconnect()
    session.connect()
    events = [frame("create", 3, "a", data=1), custom(4), frame("update", 5, "a", data=2)]
    session.receive(frame("resume", 2, epoch="e1"), *events)
    session.receive(frame("resume", 2, "a", epoch="e1"), events[0], events[2])
    assert told(group) == [(Kind.SYNC, 2), (Kind.CREATE, 3), (Kind.EVENT, 4), (Kind.UPDATE, 5)]
    assert told(item) == [(Kind.SYNC, 2), (Kind.CREATE, 3), (Kind.UPDATE, 5)]


def test_gap_is_asked_for() -> None:
    session = Session()
    watching = session.watch()
    session.receive(sync(2), custom(5), custom(6))
    assert [(f["type"], f["data"].get("since")) for f in session.sent[1:]] == [("join", 2)]
    session.receive(frame("resume", 2, epoch="e1"), *(custom(seq) for seq in (3, 4, 5, 6)))
    assert [seq for _, seq in told(watching)] == [2, 3, 4, 5, 6]


def test_sync_that_nobody_asked_for_tells_that_others_missed_something_too() -> None:
    session = Session()
    session.watch()
    item = session.watch(ITEM)
    session.receive(sync(2), frame("sync", 2, "a", data=1, epoch="e1"))
    session.receive(sync(9), frame("update", 10, "a", data=10))
    assert [f["data"].get("id") for f in session.sent[2:]] == ["a"]
    session.receive(frame("sync", 10, "a", data=10, epoch="e1"))
    assert told(item) == [(Kind.SYNC, 2), (Kind.SYNC, 10)]


def test_position_that_the_broker_forgot_while_its_shard_was_away() -> None:
    session = Session()
    watching = session.watch()
    session.receive(sync(2))
    session.state.disconnect()
    session.connect()
    session.receive(frame("error", code="shard_unavailable", message="", subscriptionId="1"))
    session.receive(sync(4), custom(5))
    assert [f["data"].get("since") for f in session.sent] == [None, 2, 2]
    session.receive(frame("resume", 2, epoch="e1", resumed=True), custom(3), custom(4), custom(5))
    assert [seq for _, seq in told(watching)] == [2, 3, 4, 5]
    session.receive(frame("error", code="shard_unavailable", message="", subscriptionId="1"))
    session.receive(sync(9), custom(10))
    assert [seq for _, seq in told(watching)] == [9, 10]


@pytest.mark.parametrize("resumed", [{"resumed": False}, {}])
def test_sync_after_a_shard_was_away_is_taken_when_nothing_is_kept(resumed: dict[str, Any]) -> None:
    session = Session()
    watching = session.watch()
    session.receive(sync(2))
    session.state.disconnect()
    session.connect()
    session.receive(frame("error", code="shard_unavailable", message="", subscriptionId="1"))
    session.receive(sync(4) | resumed)
    if not resumed:  # nor does the broker know of positions
        session.receive(sync(5))
    assert [seq for _, seq in told(watching)] == [2, 4 if resumed else 5]


def test_whole_groups_join_first() -> None:
    """Else the answers to their items would be followed by one that makes those join again."""
    session = Session()
    session.watch(ITEM)
    session.watch()
    session.receive(sync(2), frame("sync", 2, "a", data=1, epoch="e1"))
    session.state.disconnect()
    session.connect()
    assert [f["data"].get("id") for f in session.sent] == ["a", None, None, "a"]
    session.receive(frame("resume", 2, epoch="e1"), frame("resume", 2, "a", epoch="e1"))
    assert len(session.sent) == 4


def test_sync_of_what_was_left_tells_of_another_numbering_all_the_same() -> None:
    session = Session()
    group, item = session.watch(), session.watch(ITEM)
    session.receive(sync(1), frame("sync", 1, "a", data=1, epoch="e1"))
    session.unwatch(group)
    session.receive(sync(1, "e2"), frame("update", 2, "a", data=2))
    assert session.sent[-1]["data"]["since"] == 1
    session.receive(frame("sync", 2, "a", data=2, epoch="e2"))
    assert [(c.epoch, c.seq) for c in taken(item)] == [("e1", 1), ("e2", 2)]


def test_another_numbering_of_one_is_another_of_all() -> None:
    session = Session()
    group, _ = session.watch(), session.watch(ITEM)
    session.receive(sync(1))
    session.receive(frame("sync", 2, "a", data=1, epoch="e2"), custom(2))
    assert [f["data"].get("since") for f in session.sent] == [None, None, 1]
    session.receive(sync(2, "e2") | {"resumed": False})
    assert [(c.epoch, c.seq) for c in taken(group)] == [("e1", 1), ("e2", 2)]


def test_late_answer_to_an_earlier_join() -> None:
    session = Session()
    watching = session.watch()
    session.receive(sync(2), custom(5), sync(6), custom(7))
    session.receive(frame("resume", 2, epoch="e1"), *(custom(seq) for seq in range(3, 8)))
    assert [seq for _, seq in told(watching)] == [2, 6, 7]


def test_second_watch_begins_with_what_is_known() -> None:
    session = Session()
    first = session.watch()
    session.receive(sync(1, a=1, b=2))
    first.take()
    session.receive(frame("delete", 2, "a", data=1), frame("create", 3, "a", data=3))
    second = session.watch()
    session.receive(custom(4))
    assert [seq for _, seq in told(second)] == [3, 4]
    assert list(second.state.items()) == [("b", 2), ("a", 3)]
    assert first.state == {"a": 1, "b": 2}
    assert [seq for _, seq in told(first)] == [2, 3, 4]


def test_group_of_a_broker_that_sends_no_ids() -> None:
    session = Session()
    watching = session.watch()
    values = [{"id": "a", "n": 1}, {"n": 2}, 3]
    session.receive(frame("sync", 1, data=values, epoch="e1"))
    session.receive(frame("delete", 2, "a", data=values[0]))
    assert told(watching) == [(Kind.SYNC, 1), (Kind.DELETE, 2)]
    assert watching.state == {}


def test_broker_that_numbers_nothing() -> None:
    session = Session()
    watching = session.watch(ITEM)
    session.receive(frame("sync", None, "a", data=1), frame("update", None, "a", data=2))
    assert (told(watching), watching.state) == ([(Kind.SYNC, 0), (Kind.UPDATE, 0)], 2)
    session.state.disconnect()
    session.connect()
    assert "since" not in session.sent[-1]["data"]


def test_refused_join() -> None:
    session = Session()
    watching, other = session.watch(), session.watch(Target(Group("chat", "room-2"), None))
    session.receive(frame("unauthorized"))
    assert isinstance(watching.error, Unauthorized)
    assert (watching.ended, other.ended) == (True, False)
    session.state.disconnect()
    session.connect()
    assert session.sent[-1]["data"]["groupId"] == "room-2"
    assert len(session.sent) == 3
    session.unwatch(watching)
    assert len(session.sent) == 3


def test_error_events() -> None:
    session = Session()
    watching = session.watch()
    wait = {"code": "shard_unavailable", "message": "later", "subscriptionId": "1"}
    session.receive(frame("error", **wait))
    assert not watching.ended
    refusal = {"code": "name_too_long", "message": "too long", "field": "data.groupId"}
    session.receive(frame("error", **refusal, subscriptionId="7"))
    assert not watching.ended
    session.receive(frame("error", **refusal, subscriptionId="1"))
    assert isinstance(watching.error, InvalidRequest)
    assert (watching.error.code, watching.error.field) == ("name_too_long", "data.groupId")


def test_what_waits_can_be_taken_after_an_error_but_not_after_a_close() -> None:
    session = Session()
    watching = session.watch()
    session.receive(sync(1), frame("unauthorized"))
    assert told(watching) == [(Kind.SYNC, 1)]
    closed = session.watch()
    session.receive(sync(1))
    session.unwatch(closed)
    assert (told(closed), closed.error, closed.ended) == ([], None, True)


def test_frames_of_other_kinds_are_passed_over() -> None:
    session = Session()
    watching = session.watch()
    session.receive(sync(1), frame("authenticated", expiresAt=None), frame("new"), custom(2))
    session.receive(sync(1) | {"type": "other"}, frame("sync", 5, group_id="x", data=[]))
    assert [seq for _, seq in told(watching)] == [1, 2]


@pytest.mark.parametrize("text", [b"", b"[]", b'{"type":"stream"}', b"\xff", b"[" * 100_000])
def test_frames_that_make_no_sense(text: bytes) -> None:
    with pytest.raises(ProtocolError):
        Session().state.receive(text)


def test_values_that_strict_readers_refuse() -> None:
    session = Session()
    watching = session.watch(ITEM)
    text = json.dumps(frame("sync", 1, "a", data=["\ud800", "X"], epoch="e1"))
    session.state.receive(text.replace('"X"', "1e999").encode())
    watching.take()
    assert watching.state == ["\ud800", float("inf")]


def test_waits_between_attempts() -> None:
    rng = random.Random(1)
    for failures in (1, 2, 3, 10, 10_000):
        most = max(backoff_s(failures, rng) for _ in range(500))
        bound = min(RECONNECT_S_MAX, RECONNECT_S_FIRST * 2 ** min(failures - 1, 60))
        assert 0.9 * bound < most <= bound


# Any interleaving ----------------------------------------------------------------------------


class Position(NamedTuple):
    epoch: str
    seq: int


class Joined:
    """A subscription at the broker."""

    def __init__(self, item_id: str | None) -> None:
        self.item_id = item_id
        self.live = False
        self.resync = False  # a sync that nobody asked for is still to come


ITEMS = ("a", "b")
TARGETS = (WHOLE, Target(GROUP, "a"), Target(GROUP, "b"))


class Model:
    """A broker with one group: every state that it ever had, the events kept, one connection."""

    def __init__(self, extended: bool) -> None:
        self.extended = extended  # knows `since` and `ids`
        self.shard_up = True
        self.epochs = itertools.count(1)
        self.values = itertools.count(1)
        self.states: dict[Position, dict[str, Any]] = {}
        self.events: dict[Position, dict[str, Any]] = {}
        self.new_epoch({})
        self.lose_connection()

    def new_epoch(self, items: dict[str, Any]) -> None:
        self.position = Position(f"e{next(self.epochs)}", 0)
        self.kept_from = 0
        self.states[self.position] = items

    def lose_connection(self) -> None:
        self.joined: dict[str, Joined] = {}
        self.to_client: deque[dict[str, Any]] = deque()
        self.to_broker: deque[dict[str, Any]] = deque()

    @property
    def items(self) -> dict[str, Any]:
        return self.states[self.position]

    def write(self, kind: str, item_id: str | None) -> None:
        if not self.shard_up:
            return
        items = dict(self.items)
        seq = self.position.seq + 1
        if kind == "event":
            event = custom(seq, item_id)
        elif item_id is None or (kind == "delete" and item_id not in items):
            return
        elif kind == "delete":
            event = frame("delete", seq, item_id, data=items.pop(item_id))
        else:
            name = "update" if item_id in items else "create"
            items[item_id] = {"id": item_id, "n": next(self.values)}
            event = frame(name, seq, item_id, data=items[item_id])
        self.position = Position(self.position.epoch, seq)
        self.states[self.position] = items
        self.events[self.position] = event
        if any(j.live and j.item_id in (None, item_id) for j in self.joined.values()):
            self.to_client.append(event)

    def handle(self) -> None:
        """The oldest frame of the client."""
        message = self.to_broker.popleft()
        data = message["data"]
        if message["type"] == "leave":
            self.joined.pop(data["subscriptionId"], None)
            return
        joined = self.joined.setdefault(data["subscriptionId"], Joined(data.get("id")))
        if not self.shard_up:  # a sync comes later, and the position is forgotten
            joined.live, joined.resync = False, True
            error = {"code": "shard_unavailable", "message": "later"}
            self.to_client.append(frame("error", **error, subscriptionId=data["subscriptionId"]))
            return
        joined.live = True
        since, epoch = data.get("since"), data.get("epoch")
        kept = epoch == self.position.epoch and self.kept_from <= (since or 0) <= self.position.seq
        if self.extended and since is not None and kept:
            joined.resync = False
            self.to_client.append(frame("resume", since, joined.item_id, epoch=epoch, resumed=True))
            for seq in range(since + 1, self.position.seq + 1):
                event = self.events[Position(epoch, seq)]
                if joined.item_id in (None, event["id"]):
                    self.to_client.append(event)
        else:
            self.sync(joined, {"resumed": False} if self.extended and since is not None else {})

    def sync(self, joined: Joined, resumed: dict[str, Any] | None = None) -> None:
        joined.live = True
        seq, epoch = self.position.seq, self.position.epoch
        if joined.item_id is not None:
            data = self.items.get(joined.item_id)
            answer = frame("sync", seq, joined.item_id, data=data, epoch=epoch)
            self.to_client.append(answer | (resumed or {}))
            return
        answer = sync(seq, epoch, **self.items) | (resumed or {})
        if not self.extended:
            del answer["event"]["ids"]
        self.to_client.append(answer)

    def fall_behind(self, kept: int) -> None:
        """What waits for the client is dropped but for the first `kept` frames."""
        self.to_client = deque(list(self.to_client)[:kept])
        self.all_behind()

    def all_behind(self) -> None:
        for joined in self.joined.values():
            joined.live = False
            joined.resync = True

    def resync(self, index: int) -> None:
        waiting = [joined for joined in self.joined.values() if joined.resync]
        if waiting and self.shard_up:
            joined = waiting[index % len(waiting)]
            joined.resync = False
            self.sync(joined)


class Observer:
    """Takes the changes of one watch and compares each with what the broker did."""

    def __init__(self, model: Model, target: Target) -> None:
        self.model = model
        self.watching = Watching(target)
        self.position: Position | None = None
        self.syncs = 0

    def take(self) -> bool:
        change = self.watching.take()
        if change is None:
            return False
        model, item_id = self.model, self.watching.target.item_id
        position = Position(change.epoch, change.seq)
        before, self.position = self.position, position
        if change.kind is Kind.SYNC:
            self.syncs += 1
            if before is not None and before.epoch == position.epoch:
                assert before.seq <= position.seq
        else:
            assert before is not None
            assert before.epoch == position.epoch
            event = model.events[position]
            assert (event["event"]["type"], event["id"]) == (change.kind.value, change.item_id)
            missed = [
                seq
                for seq in range(before.seq + 1, position.seq)
                if item_id in (None, model.events[Position(position.epoch, seq)]["id"])
            ]
            assert before.seq < position.seq
            assert missed == []
        self.compare(model.states[position])
        return True

    def compare(self, items: dict[str, Any]) -> None:
        item_id = self.watching.target.item_id
        if item_id is not None:
            assert self.watching.state == items.get(item_id)
        else:
            assert list(self.watching.state.items()) == list(items.items())


class Interleaving:
    """A client and its broker; `run` takes steps of both, and loses what can be lost between them.

    `client` is a `ClientState`, or behaves like one. `lossy`: also what costs changes happens.
    """

    def __init__(self, client: Any, extended: bool, lossy: bool) -> None:
        self.model = Model(extended)
        self.client = client
        self.connected = False
        self.lossy = lossy
        self.one_sync_each = extended and not lossy
        self.observers: list[Observer] = []
        actions: list[tuple[int, Callable[[int], None]]] = [
            (6, self.write),
            (5, self.broker_reads),
            (8, self.client_reads),
            (5, self.take),
            (2, self.watch),
            (1, self.unwatch),
            (2, self.lose_connection),
            (4, self.connect),
            (2, self.lose_or_restart_shard),
            (3, self.resync),
        ]
        if lossy:
            actions += [
                (2, self.fall_behind),
                (1, self.sync_all),
                (1, self.restart_numbering),
                (1, self.forget_history),
            ]
        self.actions = [action for weight, action in actions for _ in range(weight)]

    def run(self, steps: bytes) -> None:
        """Each two bytes are a step: which one, and its argument."""
        self.watch(0)
        self.connect(0)
        for which, argument in batched_pairs(steps):
            self.actions[which % len(self.actions)](argument)
        self.finish()

    def _send(self, frames: list[str]) -> None:
        if self.connected:
            self.model.to_broker.extend(map(json.loads, frames))
        else:
            assert frames == []

    def write(self, argument: int) -> None:
        kind = ("set", "set", "delete", "event")[argument % 4]
        item_id = (*ITEMS, None)[argument // 4 % 3] if kind == "event" else ITEMS[argument // 4 % 2]
        self.model.write(kind, item_id)

    def broker_reads(self, argument: int) -> None:
        for _ in range(min(1 + argument % 3, len(self.model.to_broker))):
            self.model.handle()

    def client_reads(self, argument: int) -> None:
        for _ in range(min(1 + argument % 5, len(self.model.to_client))):
            text = json.dumps(self.model.to_client.popleft()).encode()
            self._send(self.client.receive(text))

    def take(self, argument: int) -> None:
        if self.observers:
            for _ in range(1 + argument // 8 % 5):
                self.observers[argument % len(self.observers)].take()

    def watch(self, argument: int) -> None:
        if len(self.observers) < 5:
            observer = Observer(self.model, TARGETS[argument % len(TARGETS)])
            self.observers.append(observer)
            self._send(self.client.watch(observer.watching))

    def unwatch(self, argument: int) -> None:
        if not self.observers:
            return
        observer = self.observers.pop(argument % len(self.observers))
        leave = self.client.unwatch(observer.watching)
        self._send(leave)
        if leave:  # the answer to a join before it may come yet, for the one after it
            self.one_sync_each = False

    def lose_connection(self, _: int) -> None:
        if self.connected:
            self.connected = False
            self.model.lose_connection()
            self.client.disconnect()

    def connect(self, _: int) -> None:
        if not self.connected:
            self.connected = True
            self._send(self.client.connect())

    def lose_or_restart_shard(self, _: int) -> None:
        self.model.shard_up = not self.model.shard_up

    def resync(self, argument: int) -> None:
        self.model.resync(argument)

    def fall_behind(self, argument: int) -> None:
        self.model.fall_behind(argument % 6)

    def sync_all(self, _: int) -> None:
        self.model.all_behind()

    def restart_numbering(self, argument: int) -> None:
        self.model.new_epoch({} if argument % 2 else self.model.items)
        self.model.all_behind()

    def forget_history(self, _: int) -> None:
        self.model.kept_from = self.model.position.seq

    def finish(self) -> None:
        """Everything works, and all is read: each watch is where the broker is."""
        model = self.model
        model.shard_up = True
        self.connect(0)
        while True:
            if model.to_client:
                self.client_reads(0)
            elif model.to_broker:
                model.handle()
            elif any(joined.resync for joined in model.joined.values()):
                model.resync(0)
            else:
                break
        for observer in self.observers:
            while observer.take():
                pass
            assert observer.position is not None
            if observer.watching.target.item_id is None:
                assert observer.position == model.position
            observer.compare(model.items)
            assert observer.syncs == 1 or not self.one_sync_each


def batched_pairs(steps: bytes) -> Iterator[tuple[int, int]]:
    return zip(steps[::2], steps[1::2], strict=False)


STEPS = st.binary(min_size=200, max_size=600)


@settings(max_examples=300, deadline=None)
@given(extended=st.booleans(), lossy=st.booleans(), steps=STEPS)
def test_any_interleaving(extended: bool, lossy: bool, steps: bytes) -> None:
    """Every change once, or covered by a sync where something was lost; the right state always."""
    Interleaving(ClientState(), extended, lossy).run(steps)
