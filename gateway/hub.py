"""Who gets which event: subscriptions by group, and fan-out. No I/O.

A link carries a group's events and the syncs of joins in one order, so a subscription is live from
the moment its sync arrives: all events before it are in the sync, all after it follow.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import Enum, auto
from typing import NamedTuple, Protocol

from broker.hot import Hot
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

    def deliver_newest(self, group: Group, events: Sequence[HubEvent]) -> bool:
        """The same for who wants only what is newest of each item while it is slow."""

    def fell_behind(self) -> None:
        """Drop what waits and get the subscriptions, all of them `behind`, synced again."""


class HubEvent(NamedTuple):
    """An event as the hub holds it until the end of the turn. `custom`: no item changed."""

    item_id: str | None
    frame: bytes
    custom: bool


class Subscription:
    """One join of one connection. `item_id` None: of the whole group."""

    __slots__ = (
        "conflate",
        "group",
        "item_id",
        "number",
        "position",
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
        self.conflate = False
        self.position: tuple[int, str | None] | None = None
        """From where it wants to go on, until it could: a seq and an epoch."""
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
        self.conflating: _Live = {}
        self.events: list[HubEvent] = []

    def live_of(self, subscription: Subscription) -> _Live:
        item_id = subscription.item_id
        if subscription.conflate:
            return self.conflating
        return self.whole if item_id is None else self.items.setdefault(item_id, {})

    @property
    def live(self) -> bool:
        return bool(self.whole or self.items or self.conflating)


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
        self.deliveries_total = 0
        self.gaps_total = 0
        self.hot = Hot[tuple[str, str]]()
        """Deliveries by group."""

    def __len__(self) -> int:
        return len(self._groups)

    def add(self, subscription: Subscription) -> None:
        """Enter a subscription that waits for its sync."""
        group = self._groups.get(subscription.group)
        if group is None:
            group = self._groups[subscription.group] = _HubGroup()
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

    def count(self, group: tuple[str, str]) -> int:
        """How many subscriptions a group has."""
        found = self._groups.get(group)
        return len(found.subscriptions) if found is not None else 0

    def rotate(self, now: float) -> None:
        """A second is over; `now` of `time.monotonic`."""
        self.hot.rotate(now)

    def position(self, group: tuple[str, str]) -> tuple[int, str] | None:
        """Up to where the live subscriptions of a group got its events; None without such."""
        found = self._groups.get(group)
        if found is None or found.seq is None or not found.live:
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
        live = group.live_of(subscription)
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
        if event.seq:  # 0: a word of another program, which has no number
            if group.seq is not None and event.seq != group.seq + 1:
                behind = self._gap(group)
            group.seq = event.seq
        if group.live:
            frame = text_frame(event.payload)
            group.events.append(HubEvent(event.item_id, frame, event.custom))
            self._turn[key] = group
        return behind

    @property
    def has_events(self) -> bool:
        """Whether `flush` has anything to deliver."""
        return bool(self._turn)

    def flush(self, weight: int = 0) -> None:
        """Deliver what was published since the last time.

        Args:
            weight: for how many times it stands in `hot`; 0: it is passed over there.
        """
        if not self._turn:
            return
        turn, self._turn = self._turn, {}
        for key, group in turn.items():
            before = self.deliveries_total
            self._flush(group)
            if weight:
                self.hot.add(key, (self.deliveries_total - before) * weight)

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
            frames = events[0].frame if count == 1 else b"".join([e.frame for e in events])
            whole: Collection[Subscriber] = group.whole
            if group.conflating:
                whole = [s for s in whole if s not in group.conflating]
            self.deliveries_total += count * len(whole)
            late = [s for s in whole if not s.deliver(frames)]
            for subscriber in late:
                subscriber.fell_behind()
        if group.items:
            for event in events:
                self._deliver_item(group, event.item_id, event.frame)
        if group.conflating:
            self._deliver_newest(group, events)

    def _deliver_item(self, group: _HubGroup, item_id: str | None, frame: bytes) -> None:
        if item_id is None:
            return
        late: list[Subscriber] = []
        for subscriber in group.items.get(item_id, ()):
            if subscriber in group.whole or subscriber in group.conflating:
                continue  # it gets the frame by that: one per connection and event
            self.deliveries_total += 1
            if not subscriber.deliver(frame):
                late.append(subscriber)
        for subscriber in late:
            subscriber.fell_behind()

    def _deliver_newest(self, group: _HubGroup, events: list[HubEvent]) -> None:
        """To connections with a conflating subscription, whatever else of the group they have."""
        late: list[Subscriber] = []
        for subscriber, subscriptions in group.conflating.items():
            items = {s.item_id for s in subscriptions}
            wanted: Sequence[HubEvent] = events
            if None not in items and subscriber not in group.whole:
                wanted = [
                    e
                    for e in events
                    if e.item_id is not None
                    and (e.item_id in items or subscriber in group.items.get(e.item_id, ()))
                ]
            self.deliveries_total += len(wanted)
            if wanted and not subscriber.deliver_newest(next(iter(subscriptions)).group, wanted):
                late.append(subscriber)
        for subscriber in late:
            subscriber.fell_behind()

    def _gap(self, group: _HubGroup) -> list[Subscription]:
        self._flush(group)
        behind = [s for s in group.subscriptions if s.state is State.LIVE]
        self.gaps_total += bool(behind)
        for subscription in behind:
            self.behind(subscription)
        return behind

    def _unlive(self, group: _HubGroup, subscription: Subscription) -> None:
        if subscription.state is not State.LIVE:
            return
        live = group.live_of(subscription)
        subscriptions = live[subscription.subscriber]
        del subscriptions[subscription]
        if not subscriptions:
            del live[subscription.subscriber]
            if not live and subscription.item_id is not None and not subscription.conflate:
                del group.items[subscription.item_id]
