"""The hub: each live subscription gets exactly the events after its sync, in order, once."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from broker.messages import Event
from broker.names import Group
from gateway.hub import Hub, HubEvent, State, Subscription
from gateway.websocket import text_frame

GROUPS = [Group("s", "g"), Group("s", "h")]
ITEMS = ["i", "j"]


def payload_of(group: Group, item_id: str | None, seq: int) -> bytes:
    return json.dumps([*group, item_id, seq]).encode()


def event_of(group: Group, item_id: str | None, seq: int) -> Event:
    return Event(*group, item_id, seq, payload_of(group, item_id, seq), True, [], False)


class Client:
    """A connection as the hub sees it; it stalls when it is told to.

    log: what it was sent, in order: parsed payloads of events, and `("sync", …)`.
    """

    context = b"null"

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.log: list[Any] = []
        self.subscriptions: list[Subscription] = []
        self.stalled = False
        self.deliveries = 0

    def deliver(self, frames: bytes) -> bool:
        if self.stalled:
            return False
        self.deliveries += 1
        while frames:
            assert frames[0] == 0x81
            start = 2 if frames[1] < 126 else 4
            size = frames[1] if start == 2 else int.from_bytes(frames[2:4])
            self.log.append(json.loads(frames[start : start + size]))
            frames = frames[start + size :]
        return True

    def deliver_newest(self, group: Group, events: Sequence[HubEvent]) -> bool:
        return self.deliver(b"".join([event.frame for event in events]))

    def fell_behind(self) -> None:
        for subscription in self.subscriptions:
            if subscription.state is State.LIVE:
                self.hub.behind(subscription)


def joined(
    hub: Hub,
    client: Client,
    group: Group,
    item_id: str | None = None,
    *,
    seq: int | None = 0,
    conflate: bool = False,
) -> Subscription:
    """A subscription of `client`, live since `seq`; None: still waiting for its sync."""
    name = str(len(client.subscriptions))
    subscription = Subscription(client, name, group, item_id)
    subscription.conflate = conflate
    client.subscriptions.append(subscription)
    hub.add(subscription)
    if seq is not None:
        assert hub.synced(subscription, seq, "e") == []
    return subscription


def publish(hub: Hub, group: Group, item_id: str | None, seq: int) -> list[Subscription]:
    return hub.publish(event_of(group, item_id, seq))


def test_frames_of_a_turn_are_joined() -> None:
    hub = Hub()
    client = Client(hub)
    joined(hub, client, GROUPS[0])
    for seq in (1, 2, 3):
        assert publish(hub, GROUPS[0], "i", seq) == []
    assert client.log == []
    hub.flush()
    assert client.log == [["s", "g", "i", 1], ["s", "g", "i", 2], ["s", "g", "i", 3]]
    assert client.deliveries == 1
    hub.flush()
    assert client.deliveries == 1


def test_one_frame_per_connection_and_event() -> None:
    hub = Hub()
    client = Client(hub)
    for item_id in (None, None, "i", "i"):
        joined(hub, client, GROUPS[0], item_id)
    publish(hub, GROUPS[0], "i", 1)
    publish(hub, GROUPS[0], None, 2)
    hub.flush()
    assert client.log == [["s", "g", "i", 1], ["s", "g", None, 2]]
    for subscription in client.subscriptions[:2]:
        assert not hub.remove(subscription)
    publish(hub, GROUPS[0], "i", 3)
    publish(hub, GROUPS[0], None, 4)
    hub.flush()
    assert client.log[2:] == [["s", "g", "i", 3]]


def test_item_subscriptions_get_their_item_only() -> None:
    hub = Hub()
    one, other = Client(hub), Client(hub)
    joined(hub, one, GROUPS[0], "i")
    joined(hub, other, GROUPS[0], "j")
    for seq, item_id in enumerate(["i", "j", None, "i"], 1):
        publish(hub, GROUPS[0], item_id, seq)
    hub.flush()
    assert [entry[3] for entry in one.log] == [1, 4]
    assert [entry[3] for entry in other.log] == [2]


def test_the_item_with_the_empty_name_is_not_the_group() -> None:
    hub = Hub()
    client = Client(hub)
    joined(hub, client, GROUPS[0], "")
    publish(hub, GROUPS[0], None, 1)
    publish(hub, GROUPS[0], "i", 2)
    publish(hub, GROUPS[0], "", 3)
    hub.flush()
    assert [entry[3] for entry in client.log] == [3]


def test_nothing_comes_before_the_sync() -> None:
    hub = Hub()
    client = Client(hub)
    subscription = joined(hub, client, GROUPS[0], seq=None)
    publish(hub, GROUPS[0], "i", 1)
    assert hub.synced(subscription, 1, "e") == []
    publish(hub, GROUPS[0], "i", 2)
    hub.flush()
    assert [entry[3] for entry in client.log] == [2]


def test_a_sync_comes_after_what_was_published_before_it() -> None:
    """For those that are live already; the new one has these events in its sync."""
    hub = Hub()
    old, new = Client(hub), Client(hub)
    joined(hub, old, GROUPS[0])
    subscription = joined(hub, new, GROUPS[0], seq=None)
    publish(hub, GROUPS[0], "i", 1)
    hub.synced(subscription, 1, "e")
    assert old.log == [["s", "g", "i", 1]]
    hub.flush()
    assert (len(old.log), new.log) == (1, [])


def test_a_gap_leaves_the_live_behind() -> None:
    hub = Hub()
    live, waiting, elsewhere = Client(hub), Client(hub), Client(hub)
    subscription = joined(hub, live, GROUPS[0])
    joined(hub, waiting, GROUPS[0], seq=None)
    joined(hub, elsewhere, GROUPS[1])
    publish(hub, GROUPS[0], "i", 1)
    assert publish(hub, GROUPS[0], "i", 3) == [subscription]
    assert subscription.state is State.BEHIND
    publish(hub, GROUPS[0], "i", 4)
    hub.flush()
    assert [entry[3] for entry in live.log] == [1]
    assert hub.synced(subscription, 4, "e") == []
    publish(hub, GROUPS[0], "i", 5)
    hub.flush()
    assert [entry[3] for entry in live.log] == [1, 5]
    assert hub.gaps_total == 1


def test_nobody_misses_anything_while_nobody_is_live() -> None:
    hub = Hub()
    client = Client(hub)
    subscription = joined(hub, client, GROUPS[0])
    hub.behind(subscription)
    assert hub.synced(subscription, 7, "e") == []
    assert hub.gaps_total == 0


def test_a_sync_ahead_of_the_events_leaves_the_others_behind() -> None:
    hub = Hub()
    old, new = Client(hub), Client(hub)
    behind = joined(hub, old, GROUPS[0])
    subscription = joined(hub, new, GROUPS[0], seq=None)
    assert hub.synced(subscription, 7, "e") == [behind]
    assert (behind.state, subscription.state) == (State.BEHIND, State.LIVE)


def test_who_takes_nothing_falls_behind_alone() -> None:
    hub = Hub()
    slow, healthy = Client(hub), Client(hub)
    for client in (slow, healthy):
        joined(hub, client, GROUPS[0])
        joined(hub, client, GROUPS[1], "i")
    slow.stalled = True
    publish(hub, GROUPS[0], "i", 1)
    publish(hub, GROUPS[1], "i", 1)
    hub.flush()
    assert [s.state for s in slow.subscriptions] == [State.BEHIND] * 2
    assert [s.state for s in healthy.subscriptions] == [State.LIVE] * 2
    assert healthy.log == [["s", "g", "i", 1], ["s", "h", "i", 1]]
    slow.stalled = False
    publish(hub, GROUPS[0], "i", 2)
    hub.flush()
    assert slow.log == []


def test_the_last_to_leave_is_told() -> None:
    hub = Hub()
    client = Client(hub)
    first = joined(hub, client, GROUPS[0])
    second = joined(hub, client, GROUPS[0], "i")
    assert (len(hub), hub.subscriptions) == (1, 2)
    assert not hub.remove(first)
    publish(hub, GROUPS[0], "i", 1)
    assert hub.remove(second)
    assert (len(hub), hub.subscriptions) == (0, 0)
    assert not hub.has(GROUPS[0])
    hub.flush()
    assert publish(hub, GROUPS[0], "i", 2) == []
    hub.flush()
    assert client.log == []
    joined(hub, client, GROUPS[0], seq=9)  # nothing is left of the numbering before
    publish(hub, GROUPS[0], "i", 10)
    hub.flush()
    assert [entry[3] for entry in client.log] == [10]


def test_long_payloads_are_framed() -> None:
    for size in (0, 1, 125, 126, 65535, 65536, 70000):
        frame = text_frame(b"x" * size)
        assert frame.endswith(b"x" * size)
        assert len(frame) - size == (2 if size < 126 else 4 if size < 65536 else 10)


class HubMachine(RuleBasedStateMachine):
    """Clients join, leave, stall and close while groups change, with a link in between.

    The shard is a number per group; what it says waits in `link`, in one order, until the gateway
    reads it. `lives` has for each subscription where in its client's log it became live, since
    which seq, and where in the log that ended (None: it has not).
    """

    def __init__(self) -> None:
        super().__init__()
        self.hub = Hub()
        self.clients = [Client(self.hub) for _ in range(3)]
        self.seqs = dict.fromkeys(GROUPS, 0)
        self.items: dict[tuple[Group, int], str | None] = {}
        self.link: deque[Event | tuple[Subscription, int]] = deque()
        self.read = dict.fromkeys(GROUPS, 0)  # seq of the last event that the gateway read
        self.lives: list[dict[str, Any]] = []

    # What the parts around the hub do.

    def ask_sync(self, subscription: Subscription) -> None:
        if subscription.state is State.BEHIND:
            subscription.state = State.JOINING
        self.link.append((subscription, self.seqs[subscription.group]))

    def end_lives(self) -> None:
        """Note the lives that ended, after whatever may end them."""
        for life in self.lives:
            live = life["subscription"].state is State.LIVE and not life["left"]
            if life["end"] is None and not live:
                life["end"] = len(life["client"].log)

    def leave_one(self, subscription: Subscription) -> None:
        client = subscription.subscriber
        assert isinstance(client, Client)
        client.subscriptions.remove(subscription)
        self.hub.remove(subscription)
        for life in self.lives:
            if life["subscription"] is subscription:
                life["left"] = True
        self.end_lives()

    # Rules.

    @rule(
        client=st.integers(0, 2),
        group=st.sampled_from(GROUPS),
        item_id=st.sampled_from([None, *ITEMS]),
        conflate=st.booleans(),
    )
    def join(self, client: int, group: Group, item_id: str | None, conflate: bool) -> None:
        subscription = joined(
            self.hub, self.clients[client], group, item_id, seq=None, conflate=conflate
        )
        self.ask_sync(subscription)

    @rule(client=st.integers(0, 2), which=st.integers(0, 9))
    def leave(self, client: int, which: int) -> None:
        subscriptions = self.clients[client].subscriptions
        if subscriptions:
            self.leave_one(subscriptions[which % len(subscriptions)])

    @rule(client=st.integers(0, 2), which=st.integers(0, 9))
    def join_again(self, client: int, which: int) -> None:
        """With the same id: what is live stays so, and gets another sync."""
        subscriptions = self.clients[client].subscriptions
        if subscriptions:
            self.ask_sync(subscriptions[which % len(subscriptions)])

    @rule(client=st.integers(0, 2))
    def close(self, client: int) -> None:
        for subscription in list(self.clients[client].subscriptions):
            self.leave_one(subscription)

    @rule(
        group=st.sampled_from(GROUPS),
        item_ids=st.lists(st.sampled_from([None, *ITEMS]), min_size=1, max_size=4),
    )
    def change(self, group: Group, item_ids: list[str | None]) -> None:
        for item_id in item_ids:
            self.seqs[group] += 1
            seq = self.seqs[group]
            self.items[group, seq] = item_id
            self.link.append(event_of(group, item_id, seq))

    @precondition(lambda self: self.link)
    @rule(count=st.integers(1, 8), flush=st.booleans())
    def read_link(self, count: int, flush: bool) -> None:
        for _ in range(min(count, len(self.link))):
            message = self.link.popleft()
            if isinstance(message, Event):
                self.read[Group(message.stream, message.group_id)] = message.seq
                behind = self.hub.publish(message)
            else:
                behind = self.take_sync(*message)
            self.end_lives()
            for subscription in behind:
                self.ask_sync(subscription)
        if flush:
            self.flush()

    def take_sync(self, subscription: Subscription, seq: int) -> list[Subscription]:
        client = subscription.subscriber
        assert isinstance(client, Client)
        if subscription not in client.subscriptions:
            return []
        behind = self.hub.synced(subscription, seq, "e")
        for life in self.lives:  # its own gap, when it was live: a new life at once
            if life["subscription"] is subscription in behind and life["end"] is None:
                life["end"] = len(client.log)
        if client.stalled:
            client.fell_behind()
            return behind
        life = {
            "subscription": subscription,
            "client": client,
            "start": len(client.log),
            "seq": seq,
            "end": None,
            "left": False,
        }
        self.lives.append(life)
        client.log.append(("sync", *subscription.group, subscription.item_id, seq))
        return behind

    @rule()
    def flush(self) -> None:
        """Afterwards who is live has all that the gateway read."""
        self.hub.flush()
        self.end_lives()
        for life in self.lives:
            if life["end"] is None:
                self.check(life, self.read[life["subscription"].group])

    @rule(client=st.integers(0, 2))
    def stall(self, client: int) -> None:
        self.clients[client].stalled = True

    @rule(client=st.integers(0, 2))
    def drain(self, client: int) -> None:
        self.clients[client].stalled = False
        for subscription in self.clients[client].subscriptions:
            if subscription.state is State.BEHIND:
                self.ask_sync(subscription)

    @precondition(lambda self: any(isinstance(message, Event) for message in self.link))
    @rule(which=st.integers(0, 9))
    def lose_an_event(self, which: int) -> None:
        events = [message for message in self.link if isinstance(message, Event)]
        self.link.remove(events[which % len(events)])

    # What must hold.

    @invariant()
    def each_live_subscription_got_what_came_after_its_sync(self) -> None:
        for life in self.lives:
            log = life["client"].log[life["start"] + 1 : life["end"]]
            group = [*life["subscription"].group]
            self.check(life, max([e[3] for e in log if e[:2] == group], default=life["seq"]))

    def check(self, life: dict[str, Any], last: int) -> None:
        """The subscription got exactly its events from its sync to `last`."""
        subscription = life["subscription"]
        log = life["client"].log[life["start"] + 1 : life["end"]]
        got = [e[3] for e in log if e[0] != "sync" and self.is_for(subscription, e)]
        expected = [
            seq
            for seq in range(life["seq"] + 1, last + 1)
            if subscription.item_id in (None, self.items[subscription.group, seq])
        ]
        assert got == expected, (life, log)

    def is_for(self, subscription: Subscription, entry: list[Any]) -> bool:
        same = tuple(entry[:2]) == tuple(subscription.group)
        return same and subscription.item_id in (None, entry[2])

    @invariant()
    def no_event_comes_twice(self) -> None:
        for client in self.clients:
            events = [tuple(entry) for entry in client.log if entry[0] != "sync"]
            assert len(set(events)) == len(events)

    @invariant()
    def the_hub_counts_right(self) -> None:
        subscriptions = [s for client in self.clients for s in client.subscriptions]
        assert self.hub.subscriptions == len(subscriptions)
        assert len(self.hub) == len({s.group for s in subscriptions})
        assert set(self.hub.all_subscriptions()) == set(subscriptions)

    def teardown(self) -> None:
        """In the end everybody who reads is up to date."""
        for client in self.clients:
            client.stalled = False
        for _ in range(4):
            for number in range(len(self.clients)):
                self.drain(number)
            if self.link:
                self.read_link(len(self.link), flush=True)
            self.flush()
        for client in self.clients:
            for subscription in client.subscriptions:
                assert subscription.state is State.LIVE
        self.each_live_subscription_got_what_came_after_its_sync()
        for group in GROUPS:
            self.change(group, ["i"])
        self.read_link(len(self.link), flush=True)
        self.each_live_subscription_got_what_came_after_its_sync()
        for client in self.clients:
            for subscription in client.subscriptions:
                assert subscription.state is State.LIVE or self.link
                if subscription.item_id != "j" and subscription.state is State.LIVE:
                    entry = [*subscription.group, "i", self.seqs[subscription.group]]
                    assert entry in client.log


HubMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestHubMachine = HubMachine.TestCase
