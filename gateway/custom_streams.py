"""Streams whose storage a worker serves (protocol section 10.4).

The worker stores, the shard numbers, publishes and triggers. Operations on one group of such a
stream run one after the other, so that an event is of what was stored, a sync is as of its seq,
and an update through the worker's get and set is atomic. So one gateway runs those of a stream:
that of the worker which registered a function of it first. The others send theirs to it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
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

_Work = Callable[[], Coroutine[None, None, None]]


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


class _Stored(Struct):
    """What a worker's set or update answers."""

    new_value: Raw
    old_value: Raw = Raw(b"null")
    errors: Raw = Raw(b"null")


class _Deleted(Struct):
    old_value: Raw = Raw(b"null")


class Unread(Struct):
    """Answer to a join: events after `seq` follow, but the worker could not tell what it has."""

    seq: int
    epoch: str
    error: BrokerError


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
        self._links = links
        self._owner_of = owner_of
        self._queues: dict[Group, deque[_Work]] = {}
        self._tasks = Tasks()
        self.refused_total = 0

    @property
    def waiting(self) -> int:
        """Operations that wait or run."""
        return sum(len(queue) for queue in self._queues.values())

    def serves(self, stream: str, function: str) -> bool:
        """Whether a worker has `function` of the stream."""
        if not self._functions.custom:
            return False
        return self._functions.find("default", _function_id(function, stream)) is not None

    def takes(self, group: Group) -> bool:
        """Whether operations on the group have to come here."""
        return group.stream in self._functions.custom or group in self._queues

    def call(self, group: Group, call: StreamCall, answered: Answered) -> None:
        """Make a call on a group, after those before it, wherever that is done."""
        if (owner := self._owner_elsewhere(group)) is not None:
            owner.operate(call, answered)
        else:
            self.call_here(group, call, answered)

    def call_here(self, group: Group, call: StreamCall, answered: Answered) -> None:
        """Make a call on a group, after those before it."""

        async def work() -> None:
            try:
                answer = await self._perform(group, call)
            except BrokerError as error:
                answered(error)
            else:
                answered(Reply(0, answer))

        self._enqueue(group, work, answered)

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
            self._enqueue(group, partial(self._join, group, join, answered), answered)

    def read_here(
        self, group: Group, item_id: str | None, answered: Answered, released: asyncio.Event
    ) -> None:
        """Read a group, or an item, for another gateway, and hold the group until `released`."""

        async def work() -> None:
            data = await self._read(group, item_id)
            answered(data if isinstance(data, BrokerError) else Reply(0, data))
            with suppress(TimeoutError):
                async with asyncio.timeout(TIMEOUT_S):
                    await released.wait()

        self._enqueue(group, work, answered)

    def _owner_elsewhere(self, group: Group) -> StreamOwner | None:
        """The gateway that runs the operations on the group, when it is another one and nothing
        is under way here."""
        if group in self._queues:
            return None
        worker = self._functions.custom_owner(group.stream, lambda worker: worker.worker_id)
        return None if worker is None else self._owner_of(worker)

    def _enqueue(
        self,
        group: Group,
        work: _Work,
        refused: Callable[[BrokerError], None],
    ) -> None:
        queue = self._queues.get(group)
        if queue is None:
            queue = self._queues[group] = deque()
            self._tasks.start(self._run(group, queue))
        elif len(queue) >= WAITING_MAX:
            self.refused_total += 1
            refused(
                LimitExceeded(
                    "overloaded",
                    f"{WAITING_MAX} operations wait for the worker that stores the stream",
                    retryable=True,
                )
            )
            return
        queue.append(work)

    async def _run(self, group: Group, queue: deque[_Work]) -> None:
        while queue:
            await queue[0]()
            queue.popleft()
        del self._queues[group]

    async def _join(
        self, group: Group, join: messages.Join, answered: Callable[[Answer | Unread], None]
    ) -> None:
        done = asyncio.Event()
        data = await self._read(group, join.item_id)
        self._join_shard(group, join, data, answered, done.set)
        await done.wait()

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

    async def _read(self, group: Group, item_id: str | None) -> bytes | BrokerError | None:
        """What the worker has of a group, or an item; None: it is not asked."""
        function = "list" if item_id is None else "get"
        if not self.serves(group.stream, function):
            return None
        return _passed_on(await self._invoke(function, group, item_id, {})) or b"null"

    def _join_shard(
        self,
        group: Group,
        join: messages.Join,
        data: bytes | BrokerError | None,
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

    async def _perform(self, group: Group, call: StreamCall) -> bytes | None:
        """Do the worker's part, then the shard's.

        Raises:
            BrokerError: what the caller is told.
        """
        match call:
            case messages.Get() if self.serves(group.stream, "get"):
                return _passed_on_or_raise(
                    await self._invoke("get", group, call.item_id, {}, call.trace)
                )
            case messages.List() if self.serves(group.stream, "list"):
                values = _passed_on_or_raise(
                    await self._invoke("list", group, None, {}, call.trace)
                )
                return _without_ids(values) if call.with_ids else values
            case messages.Set() if self.serves(group.stream, "set"):
                return await self._set(group, call, call.data, b"")
            case messages.Delete() if self.serves(group.stream, "delete"):
                return await self._delete(group, call)
            case messages.Update() if self.serves(group.stream, "update"):
                ops = await self._ask_reply(group, messages.CheckOps(0, call.ops))
                more = {"ops": Raw(ops)}
                result = await self._invoke("update", group, call.item_id, more, call.trace)
                stored = _stored(result, "STREAM_UPDATE_ERROR", "Failed to update value")
                return await self._publish_stored(group, call, stored)
            case messages.Update() if self._has_get_and_set(group.stream):
                return await self._update(group, call)
            case _:
                return (await self._ask(group, call)).result

    def _has_get_and_set(self, stream: str) -> bool:
        return self.serves(stream, "get") and self.serves(stream, "set")

    async def _set(
        self, group: Group, call: messages.Set | messages.Update, data: bytes, errors: bytes
    ) -> bytes:
        more = {"data": Raw(data)}
        result = await self._invoke("set", group, call.item_id, more, call.trace)
        stored = _stored(result, "STREAM_SET_ERROR", "Failed to set value")
        if errors:
            stored.errors = Raw(errors)
        return await self._publish_stored(group, call, stored)

    async def _delete(self, group: Group, call: messages.Delete) -> bytes:
        result = await self._invoke("delete", group, call.item_id, {}, call.trace)
        text = _result_text(result, "STREAM_DELETE_ERROR", "Failed to delete value")
        old = bytes(_converted(text, _Deleted).old_value)
        if old != b"null":
            publish = messages.Publish(0, *group, call.item_id, "delete", old, trace=call.trace)
            await self._ask(group, publish)
        return b'{"old_value":' + old + b"}"

    async def _update(self, group: Group, call: messages.Update) -> bytes:
        """An update of a stream whose worker has get and set, but no update."""
        ops = await self._ask_reply(group, messages.CheckOps(0, call.ops))
        result = await self._invoke("get", group, call.item_id, {}, call.trace)
        if result.error is not None:
            raise _wrapped(result.error, "STREAM_UPDATE_ERROR", "Failed to update value")
        current = result.result if result.result != b"null" else None
        reply = await self._ask_reply(group, messages.ApplyOps(0, current, ops))
        applied = msgspec.json.decode(reply, type=dict[str, Raw])
        errors = bytes(applied.get("errors", Raw(b"")))
        return await self._set(group, call, bytes(applied["new_value"]), errors)

    async def _publish_stored(
        self, group: Group, call: messages.Set | messages.Update, stored: _Stored
    ) -> bytes:
        old, new = bytes(stored.old_value), bytes(stored.new_value)
        kind = "create" if old == b"null" else "update"
        publish = messages.Publish(0, *group, call.item_id, kind, new, trace=call.trace)
        await self._ask(group, publish)
        errors = bytes(stored.errors)
        tail = b"" if errors == b"null" else b',"errors":' + errors
        return b'{"old_value":' + old + b',"new_value":' + new + tail + b"}"

    async def _invoke(
        self,
        function: str,
        group: Group,
        item_id: str | None,
        more: dict[str, Raw],
        trace: Trace | None = None,
    ) -> Result:
        fields: dict[str, object] = {"stream_name": group.stream, "group_id": group.group_id}
        if item_id is not None:
            fields["item_id"] = item_id
        return await self._invocations.call(
            _function_id(function, group.stream), _encode(fields | more), TIMEOUT_S, trace=trace
        )

    async def _ask(self, group: Group, call: _ShardCall) -> Reply:
        """Ask the shard that owns the group.

        Raises:
            BrokerError: its answer.
        """
        link = self._links.of(group)
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        call.call_id = link.next_call_id()
        link.call(call, call.call_id, future.set_result)
        answer = await future
        if isinstance(answer, BrokerError):
            raise answer
        assert isinstance(answer, Reply), "what these calls are answered with"
        return answer

    async def _ask_reply(self, group: Group, call: _ShardCall) -> bytes:
        answer = await self._ask(group, call)
        assert answer.result is not None, "these calls have results"
        return answer.result


_ShardCall = StreamCall | messages.Publish | messages.CheckOps | messages.ApplyOps


def _function_id(function: str, stream: str) -> str:
    return f"stream::{function}({stream})"


def _passed_on(result: Result) -> bytes | BrokerError | None:
    """What the worker answered, unchanged."""
    if result.error is None:
        return result.result
    error = _read_error(result.error)
    return BrokerError(error.code, error.message)


def _result_of(answer: Answer) -> bytes | None:
    assert isinstance(answer, Reply), "what reading is answered with"
    return answer.result


def _as_answer(answer: bytes | BrokerError | None) -> Answer:
    return answer if isinstance(answer, BrokerError) else Reply(0, answer)


def _passed_on_or_raise(result: Result) -> bytes | None:
    answer = _passed_on(result)
    if isinstance(answer, BrokerError):
        raise answer
    return answer


def _without_ids(values: bytes | None) -> bytes:
    """What a worker listed in the form that has ids, which it does not tell."""
    return _encode([{"item_id": None, "value": v} for v in _converted(values or b"[]", list[Raw])])


def _stored(result: Result, code: str, what: str) -> _Stored:
    return _converted(_result_text(result, code, what), _Stored)


def _result_text(result: Result, code: str, what: str) -> bytes:
    if result.error is not None:
        raise _wrapped(result.error, code, what)
    if result.result is None:
        raise BrokerError(code, f"{what}: Function returned no result")
    return result.result


def _converted(text: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(text, type=kind)
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
