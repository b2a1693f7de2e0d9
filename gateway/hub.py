"""Who gets which event: subscriptions by group, and fan-out. No I/O.

A link carries a group's events and the syncs of joins in one order, so a subscription is live from
the moment its sync arrives: all events before it are in the sync, all after it follow.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Protocol

from broker.messages import Event
from broker.names import Group
from gateway.websocket import text_frame


class State(Enum):
    """Of a subscription."""

    JOINING = auto()
    """Waits for its sync; gets no events."""
    LIVE = auto()
    BEHIND = auto()
    """Missed events; gets a new sync before it gets events again."""


class Subscriber(Protocol):
    """A connection that can be sent frames."""

    context: bytes
    """JSON text of what the auth function said of it."""

    def deliver(self, frames: bytes) -> bool:
        """Send what may be several frames, joined; False: nothing sent, too much waits already."""

    def fell_behind(self) -> None:
        """Drop what waits and get the subscriptions, all of them `behind`, synced again."""


class Subscription:
    """One join of one connection. `item_id` None: of the whole group."""

    __slots__ = (
        "group",
        "item_id",
        "number",
        "state",
        "subscriber",
        "subscription_id",
        "with_ids",
    )

    def __init__(
        self, subscriber: Subscriber, subscription_id: str, group: Group, item_id: str | None
    ) -> None:
        self.subscriber = subscriber
        self.subscription_id = subscription_id
        self.group = group
        self.item_id = item_id
        self.number = 0  # of the hub, in the order of the joins
        self.with_ids = False  # in its syncs
        self.state = State.JOINING


_Live = dict[Subscriber, dict[Subscription, None]]


class _HubGroup:
    """The subscriptions of one group, and its events of this turn."""

    def __init__(self) -> None:
        self.seq: int | None = None  # of the last event or sync; None before the first
        self.epoch = ""
        self.subscriptions: dict[Subscription, None] = {}
        self.whole: _Live = {}
        self.items: dict[str, _Live] = {}
        self.events: list[tuple[str | None, bytes]] = []  # item and frame

    def live_of(self, item_id: str | None) -> _Live:
        return self.whole if item_id is None else self.items.setdefault(item_id, {})


class Hub:
    """All subscriptions of a gateway.

    What the caller has to act on is returned: groups to be left at their shard, subscriptions
    that need a new sync.
    """

    def __init__(self) -> None:
        self._groups: dict[tuple[str, str], _HubGroup] = {}
        self._turn: dict[tuple[str, str], _HubGroup] = {}
        self.subscriptions = 0
        self.subscriptions_total = 0
        self.events_total = 0
        self.deliveries_total = 0
        self.gaps_total = 0

    def __len__(self) -> int:
        return len(self._groups)

    def add(self, subscription: Subscription) -> None:
        """Enter a subscription that waits for its sync."""
        group = self._groups.setdefault(subscription.group, _HubGroup())
        group.subscriptions[subscription] = None
        self.subscriptions += 1
        self.subscriptions_total += 1
        subscription.number = self.subscriptions_total

    def remove(self, subscription: Subscription) -> bool:
        """Take a subscription out; True when it was the last of its group."""
        group = self._groups[subscription.group]
        self._unlive(group, subscription)
        del group.subscriptions[subscription]
        self.subscriptions -= 1
        if group.subscriptions:
            return False
        del self._groups[subscription.group]
        self._turn.pop(subscription.group, None)
        return True

    def has(self, group: tuple[str, str]) -> bool:
        """Whether anybody is subscribed to the group."""
        return group in self._groups

    def of_group(self, group: tuple[str, str]) -> list[Subscription]:
        """The subscriptions of a group, in the order of their joins."""
        found = self._groups.get(group)
        return list(found.subscriptions) if found is not None else []

    def position(self, group: tuple[str, str]) -> tuple[int, str] | None:
        """Up to where the live subscriptions of a group got its events; None without such."""
        found = self._groups.get(group)
        if found is None or found.seq is None or not (found.whole or found.items):
            return None
        return found.seq, found.epoch

    def groups(self) -> list[tuple[str, str]]:
        """The groups with subscriptions."""
        return list(self._groups)

    def synced(self, subscription: Subscription, seq: int, epoch: str) -> list[Subscription]:
        """The sync of `subscription`, as of `seq`, is about to be sent: it is live after it.

        Returns subscriptions that are behind now, as `publish` does.
        """
        group = self._groups[subscription.group]
        self._flush(group)
        behind = [] if group.seq in (None, seq) else self._gap(group)
        group.seq, group.epoch = seq, epoch
        live = group.live_of(subscription.item_id)
        live.setdefault(subscription.subscriber, {})[subscription] = None
        subscription.state = State.LIVE
        return behind

    def behind(self, subscription: Subscription) -> None:
        """The subscription gets no events until it is synced again."""
        self._unlive(self._groups[subscription.group], subscription)
        subscription.state = State.BEHIND

    def publish(self, event: Event) -> list[Subscription]:
        """Take an event in; it goes out with `flush`.

        Returns subscriptions that are behind now, because events before this one are missing.
        """
        key = (event.stream, event.group_id)
        group = self._groups.get(key)
        if group is None:
            return []
        behind: list[Subscription] = []
        if group.seq is not None and event.seq != group.seq + 1:
            behind = self._gap(group)
        group.seq = event.seq
        self.events_total += 1
        if group.whole or group.items:
            group.events.append((event.item_id, text_frame(event.payload)))
            self._turn[key] = group
        return behind

    def flush(self) -> None:
        """Deliver what was published since the last time."""
        if not self._turn:
            return
        turn, self._turn = self._turn, {}
        for group in turn.values():
            self._flush(group)

    def all_subscriptions(self) -> list[Subscription]:
        """Every subscription of every group."""
        return [s for group in self._groups.values() for s in group.subscriptions]

    def _flush(self, group: _HubGroup) -> None:
        events = group.events
        if not events:
            return
        group.events = []
        if group.whole:
            count = len(events)
            frames = events[0][1] if count == 1 else b"".join([frame for _, frame in events])
            self.deliveries_total += count * len(group.whole)
            late = [s for s in group.whole if not s.deliver(frames)]
            for subscriber in late:
                subscriber.fell_behind()
        if group.items:
            for item_id, frame in events:
                self._deliver_item(group, item_id, frame)

    def _deliver_item(self, group: _HubGroup, item_id: str | None, frame: bytes) -> None:
        if item_id is None:
            return
        late: list[Subscriber] = []
        for subscriber in group.items.get(item_id, ()):
            if subscriber in group.whole:
                continue  # it got the frame already: one per connection and event
            self.deliveries_total += 1
            if not subscriber.deliver(frame):
                late.append(subscriber)
        for subscriber in late:
            subscriber.fell_behind()

    def _gap(self, group: _HubGroup) -> list[Subscription]:
        self.gaps_total += 1
        self._flush(group)
        behind = [s for s in group.subscriptions if s.state is State.LIVE]
        for subscription in behind:
            self.behind(subscription)
        return behind

    def _unlive(self, group: _HubGroup, subscription: Subscription) -> None:
        if subscription.state is not State.LIVE:
            return
        live = group.live_of(subscription.item_id)
        subscriptions = live[subscription.subscriber]
        del subscriptions[subscription]
        if not subscriptions:
            del live[subscription.subscriber]
            if not live and subscription.item_id is not None:
                del group.items[subscription.item_id]
