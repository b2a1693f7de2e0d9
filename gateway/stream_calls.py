"""The functions `stream::*`: checks their input, routes them to shards, merges what spans them.

Protocol section 7.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Raw, Struct

from broker import messages
from broker.errors import BrokerError, InvalidRequest
from broker.hot import Sampler
from broker.label_counts import OTHER, LabelCounts
from broker.messages import Reply, Trace
from broker.metrics import SECONDS, Histogram
from broker.names import Group, check_name
from broker.tracing import Kind, Span, Tracing
from gateway.custom_streams import CustomStreams, StreamCall
from gateway.decoding import located
from gateway.shard_links import Answer, Answered, ShardLinks

FAILURES = ("deserialization_error", "overloaded", "shard_unavailable", OTHER)
"""Codes that are exposed from the start, of every function."""
HISTORY_LIMIT_MAX = 1000
"""Events that one `stream::history` may ask for."""


class _Group(Struct, gc=False):
    stream_name: str
    group_id: str


class _Item(_Group):
    item_id: str


class _Set(_Item):
    data: Raw


class _Update(_Item):
    ops: Raw


class _Send(_Group):
    type: str
    data: Raw
    id: str | None = None


class _History(_Group):
    since: Annotated[int, Meta(ge=0, le=2**62)] | None = None
    limit: Annotated[int, Meta(ge=1, le=HISTORY_LIMIT_MAX)] = 100


class _Stream(Struct, gc=False):
    stream_name: str


class _Nothing(Struct, gc=False):
    pass


_Input = TypeVar("_Input")


class _Calls(Sampler):
    """Of one function: how many, and how long some took."""

    __slots__ = ("durations", "function")

    def __init__(self, function: Callable[[bytes, Answered], None]) -> None:
        super().__init__()
        self.function = function
        self.durations = Histogram(SECONDS)


class StreamCalls:
    """Makes calls; counts them by function."""

    def __init__(self, links: ShardLinks, custom: CustomStreams, name_bytes_max: int) -> None:
        self._links = links
        self._custom = custom
        self._name_bytes_max = name_bytes_max
        functions: dict[str, Callable[[bytes, Answered], None]] = {
            "stream::set": self._set,
            "stream::get": self._get,
            "stream::delete": self._delete,
            "stream::update": self._update,
            "stream::send": self._send,
            "stream::list": self._list,
            "stream::list_groups": self._list_groups,
            "stream::list_all": self._list_all,
            "stream::history": self._history,
            "broker::items": self._items,
        }
        self._calls = {name: _Calls(function) for name, function in functions.items()}
        self.failures_total = LabelCounts(
            ["function", "code"], [(f, c) for f in self._calls for c in FAILURES]
        )
        self.tracing: Tracing | None = None
        self._trace: Trace | None = None  # of the call that is being made

    def call(
        self, function_id: str, data: bytes, answered: Answered, trace: Trace | None = None
    ) -> bool:
        """Make a call; False when there is no such function. A result comes as a `Reply`.

        Calls on one group take effect in the order in which they were made here. What they cause
        gets `trace`.
        """
        calls = self._calls.get(function_id)
        if calls is None:
            return False
        calls.total += 1
        if calls.total >= calls.due:
            calls.take()
            answered = partial(_measured, calls.durations, time.perf_counter(), answered)
        if self.tracing is not None:
            span = self.tracing.start(function_id, Kind.SERVER, trace)
            trace, answered = span.trace, partial(_traced, span, answered)
        self._trace = trace
        try:
            calls.function(b"{}" if data == b"null" else data, answered)
        except InvalidRequest as refusal:
            answered(refusal)
        return True

    def count_failure(self, function_id: str, code: str) -> None:
        """A call was answered with an error; nothing if the function is not one of these."""
        if function_id in self._calls:
            self.failures_total.add(function_id, code)

    @property
    def calls_total(self) -> dict[str, int]:
        """By function."""
        return {function: calls.total for function, calls in self._calls.items()}

    @property
    def durations(self) -> dict[str, Histogram]:
        """By function, of the calls that were looked at."""
        return {function: calls.durations for function, calls in self._calls.items()}

    def refill(self) -> None:
        """A second is over."""
        for calls in self._calls.values():
            calls.refill()

    def _set(self, data: bytes, answered: Answered) -> None:
        i = _decode(_set_decoder, "set", data)
        group = self._group(i.stream_name, i.group_id, i.item_id)
        self._ask(group, messages.Set(0, *group, i.item_id, bytes(i.data)), answered)

    def _get(self, data: bytes, answered: Answered) -> None:
        group, item_id = self._item("get", data)
        self._ask(group, messages.Get(0, *group, item_id), answered)

    def _delete(self, data: bytes, answered: Answered) -> None:
        group, item_id = self._item("delete", data)
        self._ask(group, messages.Delete(0, *group, item_id), answered)

    def _update(self, data: bytes, answered: Answered) -> None:
        i = _decode(_update_decoder, "update", data)
        group = self._group(i.stream_name, i.group_id, i.item_id)
        self._ask(group, messages.Update(0, *group, i.item_id, bytes(i.ops)), answered)

    def _send(self, data: bytes, answered: Answered) -> None:
        i = _decode(_send_decoder, "send", data)
        group = self._group(i.stream_name, i.group_id)
        check_name("type", i.type, self._name_bytes_max)
        if i.id is not None:
            check_name("id", i.id, self._name_bytes_max)
        self._ask(group, messages.Send(0, *group, i.id, i.type, bytes(i.data)), answered)

    def _list(self, data: bytes, answered: Answered) -> None:
        i = _decode(_group_decoder, "list", data)
        group = self._group(i.stream_name, i.group_id)
        self._ask(group, messages.List(0, *group), answered)

    def _items(self, data: bytes, answered: Answered) -> None:
        i = _decode(_group_decoder, "items", data, "broker")
        group = self._group(i.stream_name, i.group_id)
        self._ask(group, messages.List(0, *group, with_ids=True), answered)

    def _history(self, data: bytes, answered: Answered) -> None:
        i = _decode(_history_decoder, "history", data)
        group = self._group(i.stream_name, i.group_id)
        self._ask(group, messages.ReadHistory(0, *group, i.since, i.limit), answered)

    def _list_groups(self, data: bytes, answered: Answered) -> None:
        stream = _decode(_stream_decoder, "list_groups", data).stream_name
        check_name("stream_name", stream, self._name_bytes_max)

        if self._custom.serves(stream, "list_groups"):
            self._custom.list_groups(stream, answered, self._trace)
            return

        def merged(results: list[bytes]) -> bytes:
            return msgspec.json.encode(sorted(name for r in results for name in _names.decode(r)))

        self._ask_all(lambda call_id: messages.ListGroups(call_id, stream), merged, answered)

    def _list_all(self, data: bytes, answered: Answered) -> None:
        _decode(_nothing_decoder, "list_all", data)
        self._ask_all(messages.ListAll, _merged_streams, answered)

    def _ask(self, group: Group, call: StreamCall, answered: Answered) -> None:
        """Ask the shard that owns the group, or the worker that stores the stream."""
        call.trace = self._trace
        if self._custom.takes(group):
            self._custom.call(group, call, answered)
        else:
            link = self._links.of(group)
            call.call_id = link.next_call_id()
            link.call(call, call.call_id, answered)

    def _ask_all(
        self,
        message: Callable[[int], messages.Message],
        merge: Callable[[list[bytes]], bytes],
        answered: Answered,
    ) -> None:
        """Ask every shard; the first error is the answer, else what `merge` makes of all."""
        results: list[bytes] = []
        failures: list[BrokerError] = []
        waiting = len(self._links.links)

        def one_answered(answer: Answer) -> None:
            nonlocal waiting
            waiting -= 1
            if isinstance(answer, BrokerError):
                failures.append(answer)
            else:
                assert isinstance(answer, Reply)
                assert answer.result is not None
                results.append(answer.result)
            if not waiting:
                answered(failures[0] if failures else Reply(0, merge(results)))

        for link in self._links.links:
            call_id = link.next_call_id()
            link.call(message(call_id), call_id, one_answered)

    def _item(self, function: str, data: bytes) -> tuple[Group, str]:
        i = _decode(_item_decoder, function, data)
        return self._group(i.stream_name, i.group_id, i.item_id), i.item_id

    def _group(self, stream: str, group_id: str, item_id: str = "") -> Group:
        """The group, all names checked."""
        bytes_max = self._name_bytes_max
        if (len(stream) + len(group_id) + len(item_id)) * 4 > bytes_max:  # else none is too long
            check_name("stream_name", stream, bytes_max)
            check_name("group_id", group_id, bytes_max)
            check_name("item_id", item_id, bytes_max)
        return Group(stream, group_id)


def _measured(durations: Histogram, began_at: float, answered: Answered, answer: Answer) -> None:
    durations.observe(time.perf_counter() - began_at)
    answered(answer)


def _traced(span: Span, answered: Answered, answer: Answer) -> None:
    span.end(answer.code if isinstance(answer, BrokerError) else None)
    answered(answer)


_set_decoder = msgspec.json.Decoder(_Set)
_item_decoder = msgspec.json.Decoder(_Item)
_update_decoder = msgspec.json.Decoder(_Update)
_send_decoder = msgspec.json.Decoder(_Send)
_history_decoder = msgspec.json.Decoder(_History)
_group_decoder = msgspec.json.Decoder(_Group)
_stream_decoder = msgspec.json.Decoder(_Stream)
_nothing_decoder = msgspec.json.Decoder(_Nothing)
_names = msgspec.json.Decoder(list[str])
_groups_by_stream = msgspec.json.Decoder(dict[str, list[str]])


def _merged_streams(results: list[bytes]) -> bytes:
    groups: dict[str, list[str]] = {}
    for result in results:
        for stream, names in _groups_by_stream.decode(result).items():
            groups.setdefault(stream, []).extend(names)
    streams = [{"id": stream, "groups": sorted(groups[stream])} for stream in sorted(groups)]
    return msgspec.json.encode({"stream": streams, "count": len(streams)})


def _decode(
    decoder: msgspec.json.Decoder[_Input], function: str, data: bytes, module: str = "stream"
) -> _Input:
    try:
        return decoder.decode(data)
    except msgspec.DecodeError as error:
        raise deserialization_error(f"{module}::{function}", error) from None


def deserialization_error(function_id: str, error: msgspec.DecodeError) -> InvalidRequest:
    """What is told to a caller whose payload is not of the right form (section 4.3)."""
    reason, field = located(error)
    if "missing required field" in reason:
        reason = f"missing field `{field}`"
    else:
        reason = f"invalid type: {reason[0].lower()}{reason[1:]}"
        reason = reason if field is None else f"{field}: {reason}"
    return InvalidRequest(
        "deserialization_error", f"Failed to deserialize input for {function_id}: {reason}", field
    )
