"""What a client of the stream port knows and does, without I/O (protocol section 5).

All watches of the same group, or of the same item, share one subscription: a frame does not say
which subscription it is for, only which group and item. A subscription remembers the position of
the last event or sync that it took, and takes an event only if it comes after it:

    joining   a join was sent; events are passed over until the answer comes, because they are
              those of another subscription to the same group on the same connection
    live      each event of a whole group must have the next `seq`; after a gap it joins again,
              as of its position. An item's events may be any distance apart.
"""

from __future__ import annotations

import json
import random
import uuid
from collections import deque
from enum import Enum
from typing import Any, NamedTuple, TypeAlias

import msgspec

from broker.errors import BrokerError, InvalidRequest, ProtocolError
from broker.names import Group

RECONNECT_S_FIRST = 0.2
"""The wait before the second attempt to connect is at most so long, twice as long each time."""
RECONNECT_S_MAX = 10.0

REFUSALS = frozenset({"invalid_message", "name_too_long", "too_many_subscriptions"})
"""Codes of `error` events that say that a join will never be answered."""


class Unauthorized(BrokerError):
    """The broker lets this client not connect, or not join; asking again is no use."""


class Kind(Enum):
    """Of a `Change`; the `type` of its event on the wire."""

    SYNC = "sync"
    CREATE = "create"
    UPDATE = "update"
    DELETE = "delete"
    EVENT = "event"


class Change(msgspec.Struct, frozen=True):
    """What happened to a group or an item.

    item_id: whose change it is; None in the sync of a group and in events that are of no item.
    data: the new value, the deleted one, or what a custom event carries. In a sync: of a group a
        dict of item ids to values, in order of first insertion; of an item its value or None.
    seq: of the change within the group; of a sync: that of the last change it contains.
    epoch: the numbering that `seq` belongs to; another epoch begins with a sync.
    timestamp_ms: the broker's, since 1970; strictly increasing within a group.
    event_type: of a custom event.
    """

    kind: Kind
    item_id: str | None
    data: Any
    seq: int
    epoch: str
    timestamp_ms: int
    event_type: str | None = None


class Target(NamedTuple):
    """What is watched; `item_id` None: the whole group."""

    group: Group
    item_id: str | None


State: TypeAlias = Any
"""Of a group: a dict of item ids to values. Of an item: its value or None."""


class Watching:
    """One watch: changes that wait to be taken, and the state as of the last one taken.

    Attributes: `ended`, and `error`: what ended it, None when it was closed.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.state: State = {} if target.item_id is None else None
        self.waiting: deque[Change] = deque()
        self.ended = False
        self.error: BaseException | None = None

    def deliver(self, change: Change) -> None:
        """Put a change at the end of those that wait."""
        self.waiting.append(change)

    def end(self, error: BaseException | None) -> None:
        """No more changes come. After an error those that wait may still be taken."""
        if self.ended:
            return
        self.ended = True
        self.error = error
        if error is None:
            self.waiting.clear()

    def take(self) -> Change | None:
        """The next change, which is in `state` from now on; None when none waits."""
        if not self.waiting:
            return None
        change = self.waiting.popleft()
        self.state = self._applied(self.state, change)
        return change

    def latest(self) -> State:
        """A copy of the state with what waits applied to it."""
        state = dict(self.state) if self.target.item_id is None else self.state
        for change in self.waiting:
            state = self._applied(state, change)
        return state

    def _applied(self, state: State, change: Change) -> State:
        """`state` after `change`; the state of a group is changed in place."""
        if change.kind is Kind.EVENT:
            return state
        if self.target.item_id is not None:
            return None if change.kind is Kind.DELETE else change.data
        if change.kind is Kind.SYNC:
            return dict(change.data)
        if change.kind is Kind.DELETE:
            state.pop(change.item_id, None)
        else:
            state[change.item_id] = change.data
        return state


class ClientState:
    """The subscriptions of one client, over all its connections.

    Frames to send are returned, to be sent in their order on the connection that is open.
    """

    def __init__(self) -> None:
        self.connected = False
        self._groups: dict[Group, dict[str | None, _Subscription]] = {}
        self.answered = False
        """Whether a join was answered on this connection."""

    # What the application does.

    def watch(self, watching: Watching) -> list[str]:
        """Begin a watch. It gets a sync first: at once if there is a watch of the same thing."""
        group, item_id = watching.target
        subscriptions = self._groups.setdefault(group, {})
        subscription = subscriptions.get(item_id)
        if subscription is None:
            subscription = _Subscription(watching.target)
            subscription.watchings.append(watching)
            subscriptions[item_id] = subscription
            return [subscription.join()] if self.connected else []
        if subscription.seq is not None:
            watching.deliver(subscription.local_sync())
        subscription.watchings.append(watching)
        return []

    def unwatch(self, watching: Watching) -> list[str]:
        """End a watch."""
        watching.end(None)
        subscription = self._groups.get(watching.target.group, {}).get(watching.target.item_id)
        if subscription is None or watching not in subscription.watchings:
            return []
        subscription.watchings.remove(watching)
        if subscription.watchings:
            return []
        self._forget(subscription)
        return [subscription.leave()] if self.connected else []

    def fail(self, error: BaseException | None) -> None:
        """End every watch, with `error` if there is one."""
        for subscription in self._all():
            self._end(subscription, error)

    # What the connection does.

    def connect(self) -> list[str]:
        """A connection is open: join everything, each where it was."""
        self.connected = True
        self.answered = False
        # Whole groups first: an answer to one makes live ones of its items join again.
        joined = sorted(self._all(), key=lambda s: s.target.item_id is not None)
        return [subscription.join() for subscription in joined]

    def disconnect(self) -> None:
        """The connection is lost; whatever it still carried comes again with the next one."""
        self.connected = False

    def receive(self, text: bytes) -> list[str]:
        """Take in a frame.

        Raises:
            ProtocolError: it cannot be understood, and is passed over.
        """
        frame = _decode(text)
        if frame.type != "stream":
            return []
        event = frame.event
        subscriptions = self._groups.get(Group(frame.stream_name, frame.group_id), {})
        match event.type:
            case "sync":
                return self._sync(subscriptions, frame)
            case "resume":
                subscription = subscriptions.get(frame.id)
                if subscription is not None and subscription.resume(frame):
                    self.answered = True
                return _rejoin_others(subscriptions, frame)
            case "create" | "update" | "delete" | "event":
                found = [subscriptions.get(None)]
                if frame.id is not None:
                    found.append(subscriptions.get(frame.id))
                return [s.join() for s in found if s is not None and not s.take(frame)]
            case "unauthorized":
                subscription = subscriptions.get(frame.id)
                if subscription is not None:
                    target = "/".join(filter(None, (*subscription.target.group, frame.id)))
                    error = Unauthorized("unauthorized", f"joining {target} was refused")
                    self._end(subscription, error)
            case "error":
                self._error(event)
            case _:  # added later
                pass
        return []

    def _sync(self, subscriptions: dict[str | None, _Subscription], frame: _Frame) -> list[str]:
        subscription = subscriptions.get(frame.id)
        joins = _rejoin_others(subscriptions, frame)
        if subscription is not None:
            self.answered = True
            if subscription.postponed and frame.resumed is None:
                joins.append(subscription.join())  # the broker forgot the position meanwhile
            else:
                subscription.sync(frame)
        return joins

    def _error(self, event: _Event) -> None:
        for subscription in self._all():
            if subscription.subscription_id != event.subscription_id:
                continue
            if event.code in REFUSALS:
                self._end(subscription, InvalidRequest(event.code, event.message, event.field))
            else:  # a sync comes when it can
                subscription.postponed = subscription.seq is not None and not subscription.live

    def _end(self, subscription: _Subscription, error: BaseException | None) -> None:
        self._forget(subscription)
        for watching in subscription.watchings:
            watching.end(error)

    def _forget(self, subscription: _Subscription) -> None:
        group, item_id = subscription.target
        subscriptions = self._groups[group]
        del subscriptions[item_id]
        if not subscriptions:
            del self._groups[group]

    def _all(self) -> list[_Subscription]:
        return [s for subscriptions in self._groups.values() for s in subscriptions.values()]


def _rejoin_others(subscriptions: dict[str | None, _Subscription], frame: _Frame) -> list[str]:
    """Join again what may have missed events before those that follow this sync or resume.

    The broker may have dropped an item's events and not have said so yet; the whole group's do
    not show that one is missing. In another epoch no event shows it. That the answer may be one
    to a subscription that was left meanwhile makes no difference.
    """
    whole = frame.id is None
    others = [s for item_id, s in subscriptions.items() if s.live and item_id != frame.id]
    return [s.join() for s in others if whole or s.epoch != frame.epoch]


class _Subscription:
    """Of a group or an item, for all its watches. `seq` None: there was no sync yet."""

    def __init__(self, target: Target) -> None:
        # the same over all connections; presence and leaves tell clients apart by it
        self.subscription_id = str(uuid.uuid4())
        self.target = target
        self.watchings: list[Watching] = []
        self.live = False
        self.postponed = False
        """An answer to a join as of the position could not be given yet."""
        self.epoch = ""
        self.seq: int | None = None
        self.timestamp_ms = 0

    def join(self) -> str:
        """The frame that joins, as of the position if there is one."""
        self.live = self.postponed = False
        data = self._names()
        if self.target.item_id is None:
            data["ids"] = True
        if self.epoch and self.seq is not None:
            data |= {"since": self.seq, "epoch": self.epoch}
        return _encode({"type": "join", "data": data})

    def leave(self) -> str:
        return _encode({"type": "leave", "data": self._names()})

    def _names(self) -> dict[str, Any]:
        group, item_id = self.target
        names: dict[str, Any] = {"subscriptionId": self.subscription_id}
        names |= {"streamName": group.stream, "groupId": group.group_id}
        return names if item_id is None else names | {"id": item_id}

    def sync(self, frame: _Frame) -> None:
        self.live = True
        self.epoch = frame.epoch or ""
        self.seq = frame.seq or 0
        data = frame.event.data
        if self.target.item_id is None:
            data = _items(data, frame.event.ids)
        self._deliver(Kind.SYNC, frame, data)

    def resume(self, frame: _Frame) -> bool:
        """Go on after the position. False: this answers an earlier join, whose sync came since."""
        if self.live or (self.epoch, self.seq) != (frame.epoch, frame.seq):
            return False
        self.live = True
        return True

    def take(self, frame: _Frame) -> bool:
        """Take an event if it is the next one. False: there is a gap before it."""
        if not self.live:
            return True
        event = frame.event
        if frame.seq is not None:  # brokers of other make number nothing
            assert self.seq is not None, "live without a sync"
            if frame.seq <= self.seq:
                return True
            if self.target.item_id is None and frame.seq != self.seq + 1:
                return False
            self.seq = frame.seq
        if event.type == "event" and event.event is not None:
            self._deliver(Kind.EVENT, frame, event.event.data, event.event.type)
        else:
            self._deliver(Kind(event.type), frame, event.data)
        return True

    def local_sync(self) -> Change:
        """What the broker would sync as of the position."""
        assert self.seq is not None, "nothing is known before a sync"
        data = self.watchings[0].latest()
        item_id = self.target.item_id
        return Change(Kind.SYNC, item_id, data, self.seq, self.epoch, self.timestamp_ms)

    def _deliver(self, kind: Kind, frame: _Frame, data: Any, event_type: str | None = None) -> None:
        self.timestamp_ms = frame.timestamp
        seq = self.seq if frame.seq is None else frame.seq
        change = Change(kind, frame.id, data, seq or 0, self.epoch, frame.timestamp, event_type)
        for watching in self.watchings:
            watching.deliver(change)


class _CustomEvent(msgspec.Struct):
    type: str
    data: Any = None


class _Event(msgspec.Struct, rename="camel"):
    """Any `event` of an envelope; fields of other types have their defaults."""

    type: str
    data: Any = None
    ids: list[str] | None = None
    event: _CustomEvent | None = None
    code: str = ""
    message: str = ""
    field: str | None = None
    subscription_id: str | None = None


class _Frame(msgspec.Struct, rename="camel"):
    """The envelope (protocol section 5.4)."""

    type: str
    stream_name: str
    group_id: str
    event: _Event
    id: str | None = None
    timestamp: int = 0
    seq: int | None = None
    epoch: str | None = None
    resumed: bool | None = None


_decoder = msgspec.json.Decoder(_Frame)
_encoder = msgspec.json.Encoder()


def _encode(message: dict[str, Any]) -> str:
    return _encoder.encode(message).decode()


def _decode(text: bytes) -> _Frame:
    try:
        return _decoder.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass
    try:  # half a surrogate pair, or a number beyond floats, is JSON all the same
        return msgspec.convert(json.loads(text), _Frame)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("invalid_message", f"a frame of the broker: {error}") from error


def _items(values: Any, ids: list[str] | None) -> dict[str, Any]:
    """The items of a group's sync. Without `ids` those count whose value has its id in it."""
    if not isinstance(values, list):
        return {}
    if ids is not None and len(ids) == len(values):
        return dict(zip(ids, values, strict=True))
    named = [value for value in values if isinstance(value, dict)]
    return {value["id"]: value for value in named if isinstance(value.get("id"), str)}


def backoff_s(failures: int, rng: random.Random) -> float:
    """How long to wait before connecting again, after `failures` in a row (1 or more).

    Anything up to a bound that doubles: clients that a broker lost together come back one by one.
    """
    exponent = min(failures - 1, 16)
    return rng.uniform(0, min(RECONNECT_S_MAX, RECONNECT_S_FIRST * 2**exponent))
