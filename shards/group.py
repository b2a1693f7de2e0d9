"""One group: validates and applies operations, in one order. Pure: no I/O, no clock of its own.

Every storage that keeps its data on this side of a network evaluates operations here, so that
they mean the same everywhere (protocol section 7.2).
"""

from __future__ import annotations

import secrets
from enum import StrEnum
from typing import assert_never

import msgspec

from broker import messages
from broker.errors import InvalidRequest, LimitExceeded
from shards import update_ops
from shards.history import History

Operation = (
    messages.Get
    | messages.Set
    | messages.Delete
    | messages.Update
    | messages.Send
    | messages.List
    | messages.Join
    | messages.Publish
    | messages.ReadHistory
)
"""What can be asked of one group: the link's messages as they are."""

ITEM_OVERHEAD_BYTES = 150
"""About what an item costs in memory beside its texts: two objects and their place in a dict."""

_encode = msgspec.json.encode


class Kind(StrEnum):
    """Of a change; the `type` of its event on the wire."""

    CREATE = "create"
    UPDATE = "update"
    DELETE = "delete"
    EVENT = "event"


class Head(msgspec.Struct):
    """Where a group's numbering is.

    epoch: which numbering it is; another one when the last cannot be continued.
    seq: of the last event; 0 before the first.
    timestamp_ms: the last one handed out, to an event or a sync; the next is greater.
    """

    epoch: str
    seq: int = 0
    timestamp_ms: int = 0

    def tick(self, now_ms: int) -> int:
        """The next timestamp: the wall clock's, or one more than the last (design promise 5)."""
        self.timestamp_ms = max(now_ms, self.timestamp_ms + 1)
        return self.timestamp_ms


class Change(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """What an operation did, or told, to a group.

    data: JSON text of the new value, of the deleted one, or of a custom event's data.
    event_type: of a custom event.
    stored: whether an item of this storage changed; custom events, and changes of what a worker
        stores, are numbered and told only.
    """

    kind: Kind
    item_id: str | None
    data: bytes
    seq: int
    timestamp_ms: int
    event_type: str | None = None
    stored: bool = True


class Done(msgspec.Struct, frozen=True, gc=False):
    """Outcome of an operation.

    result: JSON text of what the caller gets; None: nothing.
    change: what everyone else gets, if there is anything to tell.
    failure: what the caller is told instead of the result, although it is done.
    """

    result: bytes | None
    change: Change | None = None
    failure: str | None = None


class Snapshot(msgspec.Struct, frozen=True, gc=False):
    """Outcome of `Join`: the data of its sync as of `seq`, under a timestamp of its own.

    ids: JSON text of the items' ids, where they were asked for.
    resumed: whether a position could be resumed; None: none was given.
    """

    data: bytes
    seq: int
    epoch: str
    timestamp_ms: int
    ids: bytes | None = None
    resumed: bool | None = None


class Resumed(msgspec.Struct, frozen=True, gc=False):
    """Outcome of `Join` from a position: the changes after `since`, up to `seq`."""

    since: int
    seq: int
    epoch: str
    timestamp_ms: int
    missed: list[Change]


class Past(msgspec.Struct, frozen=True, gc=False):
    """Outcome of `ReadHistory`."""

    seq: int
    epoch: str
    complete: bool
    changes: list[Change]


def new_epoch() -> str:
    """A name for numberings that nobody has seen before."""
    return secrets.token_hex(6)


def names_text(stream: str, group_id: str) -> bytes:
    """JSON members of an envelope that name a group (protocol section 5.4)."""
    return b'"streamName":' + _encode(stream) + b',"groupId":' + _encode(group_id)


def entry(item_id: str, value: bytes) -> bytes:
    """JSON text of an item with its id."""
    return b'{"item_id":' + _encode(item_id) + b',"value":' + value + b"}"


class GroupState:
    """A group's head and items, in order of first insertion.

    `items` may hold a part only (`complete` False); then it must hold whatever an operation on
    single items touches, and whole-group reads are not for this class.
    """

    __slots__ = (
        "bytes",
        "complete",
        "count",
        "group_id",
        "head",
        "history",
        "id_bytes",
        "items",
        "names",
        "row",
        "untrimmed",
    )

    def __init__(self, stream: str, group_id: str, head: Head, names: bytes = b"") -> None:
        self.group_id = group_id
        self.head = head
        self.items: dict[str, bytes] = {}
        self.complete = True
        self.count = 0
        self.bytes = 0
        self.id_bytes = 0
        """About, of the ids of `items`, when that is complete."""
        self.names = names or names_text(stream, group_id)
        """The JSON text of the envelope's names, encoded once."""
        self.row = 0
        """The storage's own number of the group; 0: none yet."""
        self.history: History | None = None
        """What is kept of the past; it has to be there for operations that ask for it."""
        self.untrimmed = 0
        """For the storage: bytes of history written since what is too much was last deleted."""

    def evaluate(
        self, operation: Operation, now_ms: int, bytes_max: int
    ) -> Done | Snapshot | Resumed | Past:
        """Apply `operation` and say what came of it.

        Args:
            bytes_max: of the values that one answer may hold.

        Raises:
            InvalidRequest: nothing was applied.
            LimitExceeded: the answer would be too large.
        """
        match operation:  # what is frequent comes first: every pattern that does not match costs
            case messages.Set():
                return self._put(operation.item_id, operation.data, now_ms, bytes_max)
            case messages.Get():
                return Done(self.items.get(operation.item_id))
            case messages.Update():
                ops = update_ops.parse_ops(operation.ops)
                outcome = update_ops.apply_ops(self.items.get(operation.item_id), ops)
                errors = b',"errors":' + _encode(outcome.errors) if outcome.errors else b""
                return self._put(operation.item_id, outcome.value, now_ms, bytes_max, errors)
            case messages.Join():
                return self.resume(operation, now_ms) or self._sync(operation, now_ms, bytes_max)
            case messages.Delete():
                return self._delete(operation.item_id, now_ms)
            case messages.Send():
                item_id, event_type = operation.item_id, operation.event_type
                return self._tell(Kind.EVENT, item_id, operation.data, now_ms, event_type)
            case messages.Publish():
                kind = Kind(operation.kind)
                return self._tell(kind, operation.item_id, operation.data, now_ms)
            case messages.List():
                read = self.entries if operation.with_ids else self.values
                return Done(read(bytes_max))
            case messages.ReadHistory():
                return self._past(operation, now_ms)
            case _:
                assert_never(operation)

    def values(self, bytes_max: int) -> bytes:
        """The JSON list of all values.

        Raises:
            LimitExceeded: they have more than `bytes_max` bytes.
        """
        self.check_size(bytes_max)
        return b"[" + b",".join(self.items.values()) + b"]"

    def entries(self, bytes_max: int) -> bytes:
        """The JSON list of all items as `{"item_id", "value"}`.

        Raises:
            LimitExceeded: that has more than `bytes_max` bytes.
        """
        self.check_size(bytes_max)
        entries = (entry(item_id, value) for item_id, value in self.items.items())
        text = b"[" + b",".join(entries) + b"]"
        if len(text) > bytes_max + 2:
            raise self.too_large(bytes_max)
        return text

    def check_size(self, bytes_max: int) -> None:
        """Refuse to read the whole group when it is too large for one answer.

        Raises:
            LimitExceeded: `response_too_large`.
        """
        if self.bytes > bytes_max:
            raise self.too_large(bytes_max)

    def too_large(self, bytes_max: int) -> LimitExceeded:
        """The refusal of a read of the whole group: its values, or they with their ids, are more
        than one answer may hold."""
        return LimitExceeded(
            "response_too_large",
            f"the values of group_id {self.group_id[:100]!r} have {self.bytes} bytes,"
            f" the limit of one answer, with what names them, is {bytes_max}",
            "group_id",
        )

    def _sync(self, join: messages.Join, now_ms: int, bytes_max: int) -> Snapshot:
        ids: bytes | None = None
        if join.data is not None:
            data = join.data
        elif join.item_id is not None:
            data = self.items.get(join.item_id, b"null")
        else:
            data = self.values(bytes_max)
            if join.with_ids:
                ids = _encode(list(self.items))
                if len(ids) > bytes_max:
                    raise self.too_large(bytes_max)
        head, resumed = self.head, None if join.since is None else False
        return Snapshot(data, head.seq, head.epoch, head.tick(now_ms), ids, resumed)

    def resume(self, join: messages.Join, now_ms: int) -> Resumed | None:
        """What was missed since the position that the join gives; None when it can't be told."""
        head, since = self.head, join.since
        if since is None or join.epoch != head.epoch or self.history is None:
            return None
        missed = self.history.since(since, head.seq, now_ms)
        if missed is None:
            return None
        # Timestamps grow from frame to frame, and what was missed has its own.
        timestamp_ms = missed[0].timestamp_ms - 1 if missed else head.tick(now_ms)
        if join.item_id is not None:
            missed = [change for change in missed if change.item_id == join.item_id]
        return Resumed(since, head.seq, head.epoch, timestamp_ms, missed)

    def _past(self, call: messages.ReadHistory, now_ms: int) -> Past:
        head = self.head
        changes = self.history.kept(head.seq, now_ms) if self.history is not None else []
        first = changes[0].seq if changes else head.seq + 1
        since = first - 1 if call.since is None else call.since
        complete = first - 1 <= since <= head.seq
        later = [change for change in changes if change.seq > since]
        return Past(head.seq, head.epoch, complete, later[: call.limit])

    def _put(
        self, item_id: str, value: bytes, now_ms: int, bytes_max: int, errors: bytes = b""
    ) -> Done:
        if len(value) > bytes_max // 2:  # the answer to the next write holds two values
            raise LimitExceeded(
                "value_too_large",
                f"the value has {len(value)} bytes, the limit is {bytes_max // 2}",
                "data",
            )
        old = self.items.get(item_id)
        self.items[item_id] = value
        self.bytes += len(value) + 1
        if old is None:
            kind, old = Kind.CREATE, b"null"
            self.count += 1
            self.id_bytes += len(item_id)
        else:
            kind = Kind.UPDATE
            self.bytes -= len(old) + 1
        result = b"".join((b'{"old_value":', old, b',"new_value":', value, errors, b"}"))
        return Done(result, self._change(kind, item_id, value, now_ms))

    def _delete(self, item_id: str, now_ms: int) -> Done:
        old = self.items.pop(item_id, None)
        if old is None:
            return Done(b'{"old_value":null}')
        self.count -= 1
        self.id_bytes -= len(item_id)
        self.bytes -= len(old) + 1
        change = self._change(Kind.DELETE, item_id, old, now_ms)
        return Done(b'{"old_value":' + old + b"}", change)

    def _change(self, kind: Kind, item_id: str, data: bytes, now_ms: int) -> Change:
        self.head.seq += 1
        return Change(kind, item_id, data, self.head.seq, self.head.tick(now_ms))

    def _tell(
        self,
        kind: Kind,
        item_id: str | None,
        data: bytes,
        now_ms: int,
        event_type: str | None = None,
    ) -> Done:
        head = self.head
        head.seq += 1
        change = Change(kind, item_id, data, head.seq, head.tick(now_ms), event_type, stored=False)
        return Done(b"null", change)


Outcome = Done | Snapshot | Resumed | Past | InvalidRequest | LimitExceeded
"""What came of an operation that a group was asked for, refusals included."""


def reads_history(operation: Operation) -> bool:
    """Whether the group's history has to be there for `operation`."""
    kind = type(operation)
    return kind is messages.ReadHistory or (
        isinstance(operation, messages.Join) and operation.since is not None
    )


def attempt(group: GroupState, operation: Operation, now_ms: int, bytes_max: int) -> Outcome:
    """`GroupState.evaluate` with a refusal as a value."""
    try:
        return group.evaluate(operation, now_ms, bytes_max)
    except (InvalidRequest, LimitExceeded) as refusal:
        return refusal
