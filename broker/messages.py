"""What the link between a gateway and a shard carries.

Values are JSON texts in `bytes` fields: nobody on the way decodes them. A frame of the link is a
list of these messages, all that was sent in one turn of the sender's event loop.
"""

from __future__ import annotations

import msgspec

VERSION = 4
"""Of the messages below; both ends refuse a peer that speaks another one."""


class Message(msgspec.Struct, array_like=True, gc=False):
    """Base of all messages: encoded as an array that begins with the tag."""


class Trace(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Where a call stands in a trace, as its caller gave it (W3C Trace Context, and Baggage)."""

    traceparent: str | None
    baggage: str | None = None


class Traced(Message, kw_only=True):
    """A message that may be part of a trace; costs a byte when it is not."""

    trace: Trace | None = None


# Gateway to shard.


class Hello(Message, tag=0):
    """First on a link, from the gateway."""

    version: int
    gateway_id: str


class Heartbeat(Message, tag=1):
    """Asks for a sign of life, which is the same message sent back."""

    number: int


class GroupCall(Traced):
    """A call on one group; answered by `Reply`, `Synced` or `Failure` with the same `call_id`."""

    call_id: int
    stream: str
    group_id: str


class Get(GroupCall, tag=2):
    item_id: str


class Set(GroupCall, tag=3):
    item_id: str
    data: bytes


class Delete(GroupCall, tag=4):
    item_id: str


class Update(GroupCall, tag=5):
    """`ops` is the JSON text of the list of operations, not yet checked."""

    item_id: str
    ops: bytes


class Send(GroupCall, tag=6):
    """A custom event of type `event_type`; `item_id` None: to the group as a whole."""

    item_id: str | None
    event_type: str
    data: bytes


class List(GroupCall, tag=7):
    """All values of a group, in order of first insertion; `with_ids`: as pairs with their ids."""

    with_ids: bool = False


class Join(GroupCall, tag=8):
    """Asks for a snapshot and for every event of the group that comes after it.

    `item_id` None: of the whole group. Events come once per link, however often it is asked.
    `data`: JSON text of what the sync holds when a worker stores the stream, else None.
    `since`, `epoch`: the position from which the events are wanted instead, if they are kept; -1
    for one that can't be. `with_ids`: the sync of a group names its items.
    """

    item_id: str | None
    data: bytes | None = None
    since: int | None = None
    epoch: str | None = None
    with_ids: bool = False


class Leave(Message, tag=9):
    """The gateway wants no more events of the group."""

    stream: str
    group_id: str


class ListGroups(Message, tag=10):
    """The groups of a stream that this shard holds; answered with a JSON list of names."""

    call_id: int
    stream: str


class ListAll(Message, tag=11):
    """Answered with a JSON object: stream name to list of group names, of this shard."""

    call_id: int


class AddTrigger(Message, tag=12):
    """A `stream` trigger; None and "" in a filter match everything. The same id replaces."""

    trigger_id: str
    stream: str
    group_id: str | None
    item_id: str | None


class RemoveTrigger(Message, tag=13):
    trigger_id: str


class Publish(GroupCall, tag=14):
    """Number and tell a change that a worker stored; `kind`: create, update or delete."""

    item_id: str
    kind: str
    data: bytes


class CheckOps(Message, tag=15):
    """Asks for the canonical form of `ops`; answered with a JSON list."""

    call_id: int
    ops: bytes


class ApplyOps(Message, tag=16):
    """Asks what `ops` make of `current` (None: a missing item); nothing is stored.

    Answered with a JSON object: `new_value`, and `errors` where there are some.
    """

    call_id: int
    current: bytes | None
    ops: bytes


class Lease(Message, tag=17):
    """A subscription stands at the gateway; the same id again replaces.

    `payload` is the JSON text that leave triggers are given when it ends; its first `head_bytes`
    bytes name the subscription.
    """

    lease_id: int
    stream: str
    group_id: str
    head_bytes: int
    payload: bytes


class EndLease(Message, tag=18):
    """The subscription ended, and the gateway told it."""

    lease_id: int


class AddLeaveTrigger(Message, tag=19):
    """A leave trigger that can be fired, for leaves that a gateway which died could not tell.

    `likeness`: the same for the same trigger of a worker that was started again, whose ids are
    new. None and "" in a filter match everything. `RemoveTrigger` takes it out.
    """

    trigger_id: str
    likeness: str
    stream: str | None
    group_id: str | None


class AskStatus(Message, tag=30):
    """How the shard is; answered with the JSON text of a `broker.report.ShardReport`."""

    call_id: int


class AskTop(Message, tag=31):
    """What is used most, up to `limit` of each kind; answered with a `broker.report.ShardTop`."""

    call_id: int
    limit: int


class GatewayTells(Message, tag=32):
    """How the gateway is: the JSON text of a `broker.report.GatewayReport`, now and again."""

    report: bytes


class ReadHistory(GroupCall, tag=26):
    """The events after `since` that are kept, at most `limit`; None: from the oldest.

    Answered with a JSON object: `epoch`, `seq` of the last event of all, `complete` (no event
    after `since` is missing before the first of them), and `events`, as envelopes.
    """

    since: int | None
    limit: int


# Shard to gateway.


class Welcome(Message, tag=20):
    """Answer to `Hello`."""

    version: int
    shard: int
    shards: int


class Reply(Message, tag=21):
    """`result` is a JSON text; None: the call succeeded and has no result."""

    call_id: int
    result: bytes | None


class Failure(Message, tag=22):
    call_id: int
    code: str
    message: str
    field: str | None
    retryable: bool


class Synced(Message, tag=23):
    """Answer to `Join`: all events up to `seq` came before it on this link, later ones follow.

    `head`, `body` and `}}` are the JSON text of the `sync` envelope (protocol section 5.4), or of
    the one that says that the join resumes; then `missed` has those of the events up to `seq`, else
    it is None. `body` None: it is the one that came under `body_id`. 0: it is not kept. `forgotten`
    are ids that will not be used again. See `broker.sync_bodies`.
    """

    call_id: int
    seq: int
    epoch: str
    head: bytes
    body: bytes | None = b""
    missed: list[bytes] | None = None
    body_id: int = 0
    forgotten: list[int] = []

    @property
    def resumed(self) -> bool:
        """Whether it goes on from the position that the join gave."""
        return self.missed is not None


class Event(Traced, tag=24):
    """A committed change or a custom event, encoded for subscribers and triggers alike.

    `subscribed`: the gateway had joined the group. `triggers`: ids that matched, in order of
    their registration. `custom`: no item changed. `seq` 0: a word of another program, beside the
    group's numbers.
    """

    stream: str
    group_id: str
    item_id: str | None
    seq: int
    payload: bytes
    subscribed: bool
    triggers: list[str]
    custom: bool


class Left(Message, tag=25):
    """Fire the leave trigger: a subscription ended with the gateway that held it."""

    trigger_id: str
    stream: str
    group_id: str
    payload: bytes


class StorageState(Message, tag=40):
    """What keeps the shard's storage from working, in words; None: it works. Told when it changes,
    and after `Welcome` when there is trouble."""

    trouble: str | None


ToShard = (
    Hello
    | Heartbeat
    | Get
    | Set
    | Delete
    | Update
    | Send
    | List
    | Join
    | Leave
    | ListGroups
    | ListAll
    | AddTrigger
    | RemoveTrigger
    | Publish
    | CheckOps
    | ApplyOps
    | Lease
    | EndLease
    | AddLeaveTrigger
    | ReadHistory
    | AskStatus
    | AskTop
    | GatewayTells
)
ToGateway = Heartbeat | Welcome | Reply | Failure | Synced | Event | Left | StorageState
