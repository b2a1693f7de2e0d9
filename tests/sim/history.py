"""What happened in a run, as records that a judge can be given: plain, and a JSON line each.

Whoever runs a broker, real or simulated, writes a record for each thing that its workers and
clients did and saw. Times are seconds of one clock that never steps, shared by all who record.
`tests.sim.checker` judges them; their order in a file means nothing but where it is said.

Every value that is written, and the data of every custom event, is a JSON object whose member
`by` is the id of the call that wrote it: a `set` has it in its data, an `update` sets it with
`{"type": "set", "path": "by", "value": <id>}`. So each state of an item says who made it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import msgspec

Function = Literal["set", "update", "delete", "get", "list", "send"]
Outcome = Literal["ok", "refused", "unknown"]
Kind = Literal["sync", "resume", "create", "update", "delete", "event"]


class Call(msgspec.Struct, tag_field="record", tag="call", kw_only=True):
    """A call of a worker on one group.

    id: unique in the run.
    session: the worker's connection; `order` numbers its calls as they were sent.
    ended: when its answer came; None: none did, as the call was void or something died.
    outcome: `ok`; `refused`, which says that nothing was changed; `unknown`, when it may have been.
    data: of a `set` and a `send`. ops: of an `update`.
    result: of an `ok` call, as the function answered it.
    """

    id: str
    session: str
    order: int
    stream: str
    group: str
    function: Function
    item: str | None = None
    began: float
    ended: float | None = None
    outcome: Outcome = "unknown"
    data: Any = None
    ops: list[dict[str, Any]] = []
    result: Any = None


class Join(msgspec.Struct, tag_field="record", tag="join", kw_only=True):
    """A subscription was asked for, on a new connection or after a leave.

    subscriber: the same over reconnects, and always on the same group and item. A connection has
        at most one of a group, so that each frame belongs to one.
    since, epoch: the position that it gave, if it gave one.
    conflate: whether it wants the newest state of each item only while it is slow.
    A subscriber's joins, frames and leaves are in order in the file.
    """

    subscriber: str
    at: float
    stream: str
    group: str
    item: str | None = None
    since: int | None = None
    epoch: str | None = None
    conflate: bool = False


class Frame(msgspec.Struct, tag_field="record", tag="frame", kw_only=True):
    """What a subscriber got.

    item: the envelope's `id`. epoch: of `sync` and `resume`. data: of the event, or of the sync.
    ids: of a sync that names its items. name: the type of a custom event (kind `event`).
    """

    subscriber: str
    at: float
    kind: Kind
    seq: int
    timestamp: int
    item: str | None = None
    epoch: str | None = None
    data: Any = None
    ids: list[str] | None = None
    name: str | None = None


class Leave(msgspec.Struct, tag_field="record", tag="leave", kw_only=True):
    """The subscriber left or lost its connection: it gets nothing before its next join."""

    subscriber: str
    at: float


class Caught(msgspec.Struct, tag_field="record", tag="caught_up", kw_only=True):
    """At the end: the subscriber is joined, and was given time to get all there is."""

    subscriber: str


class Trigger(msgspec.Struct, tag_field="record", tag="trigger", kw_only=True):
    """A `stream` trigger stands from `at` to `until` (None: to the end) at every shard.

    trigger: unique among those that stood at one time; its registrations one after the other
        may share it, unless calls may be sent again to another worker that serves its function.
    at: the moment of which it is certain, such as the answer to a `stream::list_all` that was sent
        behind the registration.
    group, item: its filters; None: none.
    """

    trigger: str
    at: float
    until: float | None = None
    stream: str
    group: str | None = None
    item: str | None = None


class Fired(msgspec.Struct, tag_field="record", tag="fired", kw_only=True):
    """A trigger's handler was called; in the file in the order of the calls of each trigger."""

    trigger: str
    at: float
    stream: str
    group: str
    kind: Kind
    seq: int
    timestamp: int
    item: str | None = None
    data: Any = None
    name: str | None = None


class Fault(msgspec.Struct, tag_field="record", tag="fault", kw_only=True):
    """Something died, or a link or a trigger's worker was cut off; triggers may have been lost.

    groups: `[stream, group]` of those that it may concern; None: all.
    """

    at: float
    what: str
    groups: list[tuple[str, str]] | None = None


class Told(msgspec.Struct, kw_only=True):
    """An event as `stream::history` tells it."""

    kind: Kind
    seq: int
    timestamp: int
    item: str | None = None
    data: Any = None
    name: str | None = None


class Final(msgspec.Struct, tag_field="record", tag="final", kw_only=True):
    """A group as it was read after all had come to rest.

    items: `[id, value]` in the group's order. events: what `stream::history` gave, if asked.
    """

    stream: str
    group: str
    epoch: str
    seq: int
    items: list[tuple[str, Any]]
    events: list[Told] = []


Record = Call | Join | Frame | Leave | Caught | Trigger | Fired | Fault | Final

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)


def dump(records: Iterable[Record]) -> bytes:
    """The records as JSON lines."""
    return b"".join(_encoder.encode(record) + b"\n" for record in records)


def load(text: bytes) -> list[Record]:
    """The inverse of `dump`."""
    return [_decoder.decode(line) for line in text.splitlines() if line]
