"""Streams whose storage a worker serves (protocol section 10.4).

The worker stores, the shard numbers, publishes and triggers. Operations on one group of such a
stream are with the worker one after the other, and what comes of them is told the shard in the same
order, so that an event is of what was stored, a sync is as of its seq, and an update through the
worker's get and set is atomic. So one gateway runs those of a stream: that of the worker which
registered a function of it first. The others send theirs to it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Protocol, TypeVar

import msgspec
from msgspec import Raw, Struct

from broker import messages
from broker.errors import BrokerError, InvalidRequest, LimitExceeded
from broker.messages import Reply, Synced, Trace
from broker.names import Group
from broker.tasks import Tasks
from gateway.functions import Functions
from gateway.invocations import Executor, Invocations, Result
from gateway.shard_links import Answer, Answered, ShardLinks

WAITING_MAX = 1000
"""Operations of one group that wait for the worker; past it calls are refused."""
TIMEOUT_S = 30.0
"""For one answer of the worker: the SDKs' own limit on a call."""
UNAVAILABLE = "gateway_unavailable"
"""Code of the error when another gateway can't be asked."""

StreamCall = (
    messages.Get
    | messages.Set
    | messages.Delete
    | messages.Update
    | messages.Send
    | messages.List
    | messages.ReadHistory
)

_ShardCall = StreamCall | messages.Publish | messages.CheckOps | messages.ApplyOps
_Read = bytes | BrokerError | None
"""What a worker has of a group, or an item; None: it was not asked."""


class StreamOwner(Protocol):
    """Another gateway, whose worker stores a stream."""

    def operate(self, call: StreamCall, answered: Answered) -> None:
        """Have a call made."""

    def read(self, group: Group, item_id: str | None, answered: Answered) -> int:
        """Have the group, or an item, read and held until `release` with the id returned."""

    def release(self, call_id: int) -> None:
        """Let the group go on."""


_encode = msgspec.json.encode

T = TypeVar("T")


class _Stored(Struct, gc=False):
    """What a worker's set or update answers."""

    new_value: Raw
    old_value: Raw = Raw(b"null")
    errors: Raw = Raw(b"null")


class _Deleted(Struct, gc=False):
    old_value: Raw = Raw(b"null")


class _Applied(Struct):
    """What a shard makes of the ops of an update."""

    new_value: Raw
    errors: Raw = Raw(b"null")


class Unread(Struct):
    """Answer to a join: events after `seq` follow, but the worker could not tell what it has."""

    seq: int
    epoch: str
    error: BrokerError


class _Line:
    """The operations on one group.

    busy: whether one has begun that the next has to wait for.
    unanswered: calls that the shard has not answered. The next operation need not wait for these,
        as the link keeps their order.
    when_answered: called once the shard has answered all of them.
    """

    __slots__ = ("beginning", "busy", "group", "unanswered", "waiting", "when_answered")

    def __init__(self, group: Group) -> None:
        self.group = group
        self.waiting: deque[_Work] = deque()
        self.busy = False
        self.beginning = False
        self.unanswered = 0
        self.when_answered: Callable[[], None] | None = None


_Work = Callable[[_Line], None]
"""Begins an operation, at whose end the line has to go on."""


class _Turn:
    """A call whose turn it is."""

    __slots__ = ("answered", "call", "line")

    def __init__(self, call: StreamCall, answered: Answered, line: _Line) -> None:
        self.call = call
        self.answered = answered
        self.line = line


class CustomStreams:
    """Runs operations on streams that workers store.

    Args:
        owner_of: the gateway that a worker is connected to, when it is another one.
    """

    def __init__(
        self,
        functions: Functions[Executor],
        invocations: Invocations,
        links: ShardLinks,
        owner_of: Callable[[Executor], StreamOwner | None],
    ) -> None:
        self._functions = functions
        self._invocations = invocations
        self._deadlines = invocations.deadlines(TIMEOUT_S)
        self._links = links
        self._owner_of = owner_of
        self._lines: dict[Group, _Line] = {}
        self._tasks = Tasks()
        self.refused_total = 0

    @property
    def waiting(self) -> int:
        """Operations that wait for a worker, or are with one."""
        return sum(len(line.waiting) + line.busy for line in self._lines.values())

    def serves(self, stream: str, function: str) -> bool:
        """Whether a worker has `function` of the stream."""
        if not self._functions.custom:
            return False
        return self._functions.find("default", _function_id(function, stream)) is not None

    def takes(self, group: Group) -> bool:
        """Whether operations on the group have to come here."""
        return group.stream in self._functions.custom or group in self._lines

    def call(self, group: Group, call: StreamCall, answered: Answered) -> None:
        """Make a call on a group, after those before it, wherever that is done."""
        if (owner := self._owner_elsewhere(group)) is not None:
            owner.operate(call, answered)
        else:
            self.call_here(group, call, answered)

    def call_here(self, group: Group, call: StreamCall, answered: Answered) -> None:
        """Make a call on a group, after those before it."""
        self._enqueue(group, partial(self._perform, call, answered), answered)

    def list_groups(self, stream: str, answered: Answered, trace: Trace | None) -> None:
        """Ask the worker for the stream's groups."""
        self._invocations.call_within(
            TIMEOUT_S,
            _function_id("list_groups", stream),
            _encode({"stream_name": stream}),
            lambda result: answered(_as_answer(_passed_on(result))),
            trace=trace,
        )

    def join(self, join: messages.Join, answered: Callable[[Answer | Unread], None]) -> None:
        """Make a sync of what the worker has, as of the shard's seq, or resume."""
        group = Group(join.stream, join.group_id)
        if (owner := self._owner_elsewhere(group)) is not None:
            self._join_elsewhere(owner, group, join, answered)
        else:
            self._enqueue(group, partial(self._join, join, answered), answered)

    def read_here(
        self, group: Group, item_id: str | None, answered: Answered, released: asyncio.Event
    ) -> None:
        """Read a group, or an item, for another gateway, and hold the group until `released`."""

        def read(line: _Line, data: _Read) -> None:
            answered(_as_answer(data))
            self._tasks.start(self._hold(line, released))

        def work(line: _Line) -> None:
            # The other gateway joins over a link of its own, which must not overtake ours.
            line.when_answered = lambda: self._read(line, item_id, partial(read, line))
            self._look(line)

        self._enqueue(group, work, answered)

    async def _hold(self, line: _Line, released: asyncio.Event) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(TIMEOUT_S):
                await released.wait()
        self._go_on(line)

    def _owner_elsewhere(self, group: Group) -> StreamOwner | None:
        """The gateway that runs the operations on the group, when it is another one and nothing
        is under way here."""
        if group in self._lines:
            return None
        worker = self._functions.custom_owner(group.stream, _worker_id)
        return None if worker is None else self._owner_of(worker)

    # Lines.

    def _enqueue(
        self,
        group: Group,
        work: _Work,
        refused: Callable[[BrokerError], None],
    ) -> None:
        line = self._lines.get(group)
        if line is None:
            line = self._lines[group] = _Line(group)
        elif len(line.waiting) + line.busy >= WAITING_MAX:
            self.refused_total += 1
            refused(
                LimitExceeded(
                    "overloaded",
                    f"{WAITING_MAX} operations wait for the worker that stores the stream",
                    retryable=True,
                )
            )
            return
        line.waiting.append(work)
        self._begin_next(line)

    def _go_on(self, line: _Line) -> None:
        """The operation that had begun is over, but for what the shard answers."""
        line.busy = False
        self._begin_next(line)

    def _begin_next(self, line: _Line) -> None:
        if line.beginning:  # below on the stack: an operation may end at once, and so may many
            return
        line.beginning = True
        while line.waiting and not line.busy:
            line.busy = True
            line.waiting.popleft()(line)
        line.beginning = False
        if not line.unanswered:
            self._look(line)

    def _look(self, line: _Line) -> None:
        """Do what has to wait for the shard's answers, if they have come."""
        if line.unanswered:
            return
        if (then := line.when_answered) is not None:
            line.when_answered = None
            then()
        elif not line.busy and not line.waiting and not line.beginning:
            del self._lines[line.group]

    # Joins.

    def _join(
        self, join: messages.Join, answered: Callable[[Answer | Unread], None], line: _Line
    ) -> None:
        def read(data: _Read) -> None:
            line.unanswered += 1
            self._join_shard(line.group, join, data, answered, partial(self._answer_came, line))
            self._go_on(line)

        self._read(line, join.item_id, read)

    def _join_elsewhere(
        self,
        owner: StreamOwner,
        group: Group,
        join: messages.Join,
        answered: Callable[[Answer | Unread], None],
    ) -> None:
        """As `_join`, with data that another gateway reads; it holds the group meanwhile."""

        def read(answer: Answer) -> None:
            if isinstance(answer, BrokerError) and answer.code == UNAVAILABLE:
                answered(answer)
                return
            data = answer if isinstance(answer, BrokerError) else _result_of(answer)
            self._join_shard(group, join, data, answered, lambda: owner.release(call_id))

        call_id = owner.read(group, join.item_id, read)

    def _read(self, line: _Line, item_id: str | None, then: Callable[[_Read], None]) -> None:
        """Ask the worker what it has of a group, or an item."""
        function = "list" if item_id is None else "get"
        if not self.serves(line.group.stream, function):
            then(None)
            return

        def answered(result: Result) -> None:
            then(_passed_on(result) or b"null")

        self._invoke(function, line.group, item_id, b"", answered)

    def _join_shard(
        self,
        group: Group,
        join: messages.Join,
        data: _Read,
        answered: Callable[[Answer | Unread], None],
        done: Callable[[], None],
    ) -> None:
        """Join with the data of the sync, or without it where it could not be read."""
        error = data if isinstance(data, BrokerError) else None
        link = self._links.of(group)
        join.call_id = link.next_call_id()

        def joined(answer: Answer) -> None:
            # At once: the events that follow are right behind it.
            if error is not None and isinstance(answer, Synced) and not answer.resumed:
                answered(Unread(answer.seq, answer.epoch, error))
            else:
                answered(answer)
            done()

        join.data = b"null" if isinstance(data, BrokerError) else data
        link.call(join, join.call_id, joined)

    # Calls.

    def _perform(self, call: StreamCall, answered: Answered, line: _Line) -> None:
        """Have the worker do its part, then the shard."""
        turn = _Turn(call, answered, line)
        stream = line.group.stream
        match call:
            case messages.Get() if self.serves(stream, "get"):
                self._ask_worker(turn, "get", call.item_id, b"", self._pass_on)
            case messages.List() if self.serves(stream, "list"):
                self._ask_worker(turn, "list", None, b"", self._pass_on)
            case messages.Set() if self.serves(stream, "set"):
                data = b',"data":' + call.data
                self._ask_worker(turn, "set", call.item_id, data, self._was_set)
            case messages.Delete() if self.serves(stream, "delete"):
                self._ask_worker(turn, "delete", call.item_id, b"", self._was_deleted)
            case messages.Update() if self.serves(stream, "update"):
                self._ask_shard(turn, messages.CheckOps(0, call.ops), self._update_by_worker)
            case messages.Update() if self.serves(stream, "get") and self.serves(stream, "set"):
                self._ask_shard(turn, messages.CheckOps(0, call.ops), self._update_by_get)
            case _:
                self._tell_shard(line, call, answered)
                self._go_on(line)

    def _pass_on(self, turn: _Turn, result: Result) -> None:
        answer = _passed_on(result)
        if isinstance(turn.call, messages.List) and turn.call.with_ids:
            answer = answer if isinstance(answer, BrokerError) else _without_ids(answer)
        self._end(turn, _as_answer(answer))

    def _was_set(self, turn: _Turn, result: Result) -> None:
        stored = _stored(result, "STREAM_SET_ERROR", "Failed to set value")
        self._publish_stored(turn, stored)

    def _was_updated(self, turn: _Turn, result: Result) -> None:
        stored = _stored(result, "STREAM_UPDATE_ERROR", "Failed to update value")
        self._publish_stored(turn, stored)

    def _was_deleted(self, turn: _Turn, result: Result) -> None:
        text = _result_text(result, "STREAM_DELETE_ERROR", "Failed to delete value")
        old = bytes(_converted(text, _deleted_decoder).old_value)
        reply = b'{"old_value":' + old + b"}"
        if old == b"null":
            self._end(turn, Reply(0, reply))
        else:
            self._publish(turn, "delete", old, reply)

    def _update_by_worker(self, turn: _Turn, ops: bytes) -> None:
        item_id = _item_of(turn.call)
        self._ask_worker(turn, "update", item_id, b',"ops":' + ops, self._was_updated)

    def _update_by_get(self, turn: _Turn, ops: bytes) -> None:
        """An update of a stream whose worker has get and set, but no update."""

        def got(turn: _Turn, result: Result) -> None:
            if result.error is not None:
                raise _wrapped(result.error, "STREAM_UPDATE_ERROR", "Failed to update value")
            current = result.result if result.result != b"null" else None
            self._ask_shard(turn, messages.ApplyOps(0, current, ops), self._set_applied)

        self._ask_worker(turn, "get", _item_of(turn.call), b"", got)

    def _set_applied(self, turn: _Turn, reply: bytes) -> None:
        applied = _applied_decoder.decode(reply)

        def was_set(turn: _Turn, result: Result) -> None:
            stored = _stored(result, "STREAM_SET_ERROR", "Failed to set value")
            if bytes(applied.errors) != b"null":
                stored.errors = applied.errors
            self._publish_stored(turn, stored)

        data = b',"data":' + bytes(applied.new_value)
        self._ask_worker(turn, "set", _item_of(turn.call), data, was_set)

    def _publish_stored(self, turn: _Turn, stored: _Stored) -> None:
        old, new, errors = bytes(stored.old_value), bytes(stored.new_value), bytes(stored.errors)
        tail = b"}" if errors == b"null" else b',"errors":' + errors + b"}"
        reply = b"".join((b'{"old_value":', old, b',"new_value":', new, tail))
        self._publish(turn, "create" if old == b"null" else "update", new, reply)

    def _publish(self, turn: _Turn, kind: str, data: bytes, reply: bytes) -> None:
        """Tell the shard of a change; the caller gets `reply` when it has answered."""
        call, line, answered = turn.call, turn.line, turn.answered

        def published(answer: Answer) -> None:
            answered(answer if isinstance(answer, BrokerError) else Reply(0, reply))

        publish = messages.Publish(0, *line.group, _item_of(call), kind, data, trace=call.trace)
        self._tell_shard(line, publish, published)
        self._go_on(line)

    def _end(self, turn: _Turn, answer: Answer) -> None:
        turn.answered(answer)
        self._go_on(turn.line)

    # Asking.

    def _ask_worker(
        self,
        turn: _Turn,
        function: str,
        item_id: str | None,
        more: bytes,
        then: Callable[[_Turn, Result], None],
    ) -> None:
        """Have `then` take the worker's answer; a `BrokerError` that it raises ends the turn."""

        def answered(result: Result) -> None:
            try:
                then(turn, result)
            except BrokerError as error:
                self._end(turn, error)

        group, trace = turn.line.group, turn.call.trace
        self._invoke(function, group, item_id, more, answered, trace=trace)

    def _invoke(
        self,
        function: str,
        group: Group,
        item_id: str | None,
        more: bytes,
        answered: Callable[[Result], None],
        *,
        trace: Trace | None = None,
    ) -> None:
        """Call a function of the worker; `more` is JSON text of further members of its input."""
        item = b"" if item_id is None else b',"item_id":' + _encode(item_id)
        stream, group_id = _encode(group.stream), _encode(group.group_id)
        self._invocations.invoke(
            _function_id(function, group.stream),
            b"".join((b'{"stream_name":', stream, b',"group_id":', group_id, item, more, b"}")),
            answered,
            trace=trace,
            deadlines=self._deadlines,
        )

    def _ask_shard(
        self, turn: _Turn, call: _ShardCall, then: Callable[[_Turn, bytes], None]
    ) -> None:
        """Have `then` take the shard's answer, or end the turn with its error."""

        def answered(answer: Answer) -> None:
            if isinstance(answer, BrokerError):
                self._end(turn, answer)
            else:
                result = _result_of(answer)
                assert result is not None, "these calls have results"
                then(turn, result)

        self._tell_shard(turn.line, call, answered)

    def _tell_shard(self, line: _Line, call: _ShardCall, answered: Answered) -> None:
        link = self._links.of(line.group)
        call.call_id = link.next_call_id()
        line.unanswered += 1
        link.call(call, call.call_id, partial(self._shard_answered, line, answered))

    def _shard_answered(self, line: _Line, answered: Answered, answer: Answer) -> None:
        answered(answer)
        self._answer_came(line)

    def _answer_came(self, line: _Line) -> None:
        line.unanswered -= 1
        if not line.unanswered:
            self._look(line)


_stored_decoder = msgspec.json.Decoder(_Stored)
_deleted_decoder = msgspec.json.Decoder(_Deleted)
_applied_decoder = msgspec.json.Decoder(_Applied)
_values_decoder = msgspec.json.Decoder(list[Raw])


def _worker_id(worker: Executor) -> str:
    return worker.worker_id


def _item_of(call: StreamCall) -> str:
    assert isinstance(call, messages.Set | messages.Update | messages.Delete), "what is published"
    return call.item_id


def _function_id(function: str, stream: str) -> str:
    return f"stream::{function}({stream})"


def _passed_on(result: Result) -> _Read:
    """What the worker answered, unchanged."""
    if result.error is None:
        return result.result
    error = _read_error(result.error)
    return BrokerError(error.code, error.message)


def _result_of(answer: Answer) -> bytes | None:
    assert isinstance(answer, Reply), "what reading is answered with"
    return answer.result


def _as_answer(answer: _Read) -> Answer:
    return answer if isinstance(answer, BrokerError) else Reply(0, answer)


def _without_ids(values: bytes | None) -> bytes:
    """What a worker listed in the form that has ids, which it does not tell."""
    listed = _converted(values or b"[]", _values_decoder)
    return _encode([{"item_id": None, "value": value} for value in listed])


def _stored(result: Result, code: str, what: str) -> _Stored:
    return _converted(_result_text(result, code, what), _stored_decoder)


def _result_text(result: Result, code: str, what: str) -> bytes:
    if result.error is not None:
        raise _wrapped(result.error, code, what)
    if result.result is None:
        raise BrokerError(code, f"{what}: Function returned no result")
    return result.result


def _converted(text: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    try:
        return decoder.decode(text)
    except msgspec.DecodeError as error:
        reason = str(error).replace("Object missing required field", "missing field")
        raise InvalidRequest("JSON_ERROR", f"Failed to convert result to value: {reason}") from None


def _wrapped(error: bytes, code: str, what: str) -> BrokerError:
    fault = _read_error(error)
    return BrokerError(code, f"{what}: Failed to invoke function: {fault.code}: {fault.message}")


class _WorkerError(Struct):
    code: str = "UNKNOWN"
    message: str = ""


def _read_error(error: bytes) -> _WorkerError:
    try:
        return msgspec.json.decode(error, type=_WorkerError)
    except msgspec.DecodeError:
        return _WorkerError(message=error.decode())
