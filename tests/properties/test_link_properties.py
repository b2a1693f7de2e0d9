"""The link's framing, whatever a peer sends: messages or `ProtocolError`, nothing else."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from broker.errors import ProtocolError
from broker.link_protocol import (
    FRAME_BYTES_MAX,
    FrameReader,
    encode_frame,
    gateway_reader,
    shard_reader,
)
from broker.messages import Heartbeat, Message, ToGateway, ToShard, Trace

READERS = [gateway_reader, shard_reader]
NewReader = Callable[[], FrameReader[Any]]
PEAK_BYTES_MAX = 64 * 1024
PEAK_FACTOR_MAX = 100
"""Bytes of messages that one byte may turn into; a heartbeat of 3 bytes has about 60."""

unhurried = settings(  # the machine may be busy
    deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)

texts = st.text(st.characters(codec="utf-8"), max_size=8)
VALUES: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(-(2**63), 2**64 - 1),
    bool: st.booleans(),
    str: texts,
    bytes: st.binary(max_size=40),
    list[str]: st.lists(texts, max_size=3),
    list[int]: st.lists(st.integers(-(2**63), 2**64 - 1), max_size=3),
    list[bytes]: st.lists(st.binary(max_size=8), max_size=3),
    Trace: st.builds(Trace, st.none() | texts, st.none() | texts),
}


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Any value of a field's type; a new type of field has to be added to `VALUES`."""
    if kind in VALUES:
        return VALUES[kind]
    return st.one_of(st.none() if part is type(None) else VALUES[part] for part in get_args(kind))


def any_of(union: Any) -> st.SearchStrategy[Message]:
    """Any message of those in `union`."""
    return st.one_of(
        st.builds(
            kind, **{field.name: values_of(field.type) for field in msgspec.structs.fields(kind)}
        )
        for kind in get_args(union)
    )


cuts = st.lists(st.integers(0, 400), max_size=12)


def pieces(data: bytes, at: Sequence[int]) -> list[bytes]:
    """`data` cut at the positions `at`, some pieces empty."""
    ends = sorted(min(position, len(data)) for position in at)
    return [data[start:end] for start, end in pairwise([0, *ends, len(data)])]


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4) + body


def outcome(new_reader: NewReader, parts: Sequence[bytes]) -> tuple[list[Any], bool]:
    """The messages that came, and whether the peer was found out; no other exception may come."""
    reader, messages = new_reader(), []
    for part in parts:
        try:
            messages += reader.receive_data(part)
        except ProtocolError:
            return messages, True
    return messages, False


@pytest.mark.parametrize(
    ("new_reader", "union"), [(gateway_reader, ToGateway), (shard_reader, ToShard)]
)
def test_messages_survive_any_pieces(new_reader: NewReader, union: Any) -> None:
    @unhurried
    @given(st.lists(st.lists(any_of(union), max_size=5), max_size=4), cuts)
    def survive(frames: list[list[Message]], at: list[int]) -> None:
        data = b"".join(bytes(encode_frame(messages)) for messages in frames)
        sent = [message for messages in frames for message in messages]
        assert outcome(new_reader, pieces(data, at)) == (sent, False)

    survive()


def test_every_byte_alone() -> None:
    beats = [Heartbeat(n) for n in (0, 2**40, -1)]
    data = bytes(encode_frame(beats) + encode_frame([]) + encode_frame(beats))
    assert outcome(shard_reader, [bytes([byte]) for byte in data]) == (beats * 2, False)


@pytest.mark.parametrize("new_reader", READERS)
def test_any_bytes_are_messages_or_a_fault(new_reader: NewReader) -> None:
    anything = st.binary(max_size=60)
    mended = st.lists(anything.map(framed), max_size=3).map(b"".join)  # so that bodies are read

    @unhurried
    @given(anything | mended, cuts)
    @example(framed(b"\xdc\xff\xff\xff\x00\x00"), [])
    def told_apart(data: bytes, at: list[int]) -> None:
        outcome(new_reader, pieces(data, at))

    told_apart()


@pytest.mark.parametrize(
    ("new_reader", "union"), [(gateway_reader, ToGateway), (shard_reader, ToShard)]
)
def test_damaged_messages_are_messages_or_a_fault(new_reader: NewReader, union: Any) -> None:
    @unhurried
    @given(
        st.lists(any_of(union), min_size=1, max_size=4),
        st.lists(st.tuples(st.integers(4, 200), st.integers(0, 255)), min_size=1, max_size=4),
        st.integers(-3, 3),
        cuts,
    )
    def damaged(
        messages: list[Message], changes: list[tuple[int, int]], longer: int, at: list[int]
    ) -> None:
        body = bytearray(encode_frame(messages)[4:])
        for position, byte in changes:
            body[position % len(body)] = byte
        size = max(0, len(body) + longer)  # the length may be wrong, too
        taken, _ = outcome(new_reader, pieces(size.to_bytes(4) + body, at))
        for message in taken:
            encode_frame([message])  # it is whole

    damaged()


@unhurried
@given(st.lists(st.binary(max_size=30).map(framed), min_size=1, max_size=4), cuts)
def test_pieces_do_not_matter(frames: list[bytes], at: list[int]) -> None:
    """Up to the first fault the same comes, however the bytes are cut."""
    data = b"".join(frames)
    for new_reader in READERS:
        by_frame = outcome(new_reader, frames)
        assert outcome(new_reader, [data[n : n + 1] for n in range(len(data))]) == by_frame
        messages, faulty = outcome(new_reader, pieces(data, at))
        assert faulty == by_frame[1]
        assert messages == by_frame[0][: len(messages)]


@pytest.mark.parametrize("new_reader", READERS)
@pytest.mark.parametrize("size", [FRAME_BYTES_MAX + 1, 2**31, 2**32 - 1])
def test_a_frame_too_long_is_refused_by_its_length(new_reader: NewReader, size: int) -> None:
    reader = new_reader()
    with pytest.raises(ProtocolError):
        reader.receive_data(size.to_bytes(4))


HUGE = {  # what each announces is not there
    "list": b"\xdd\xff\xff\xff\xff",
    "message": b"\x91\xdd\xff\xff\xff\xff\x01\x05",
    "field too many": b"\x91\x93\x01\x05\xdd\xff\xff\xff\xff",
    "map": b"\x91\x93\x01\x05\xdf\xff\xff\xff\xff",
    "bytes": b"\x91\x93\x15\x05\xc6\xff\xff\xff\xff",
    "text": b"\x91\x93\x00\x02\xdb\xff\xff\xff\xff",
    "texts": b"\x91\x98\x18\xa1s\xa1g\xc0\x01\xc4\x00\xc3\xdd\xff\xff\xff\xff",
    "extension": b"\x91\x93\x01\x05\xc9\xff\xff\xff\xff\x01",
}


@pytest.mark.parametrize("new_reader", READERS)
@pytest.mark.parametrize("body", HUGE.values(), ids=HUGE)
def test_announcing_much_takes_no_memory(new_reader: NewReader, body: bytes) -> None:
    tracemalloc.start()
    try:
        assert outcome(new_reader, [framed(body)]) == ([], True)
        assert tracemalloc.get_traced_memory()[1] < PEAK_BYTES_MAX
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("new_reader", READERS)
def test_what_was_taken_is_not_kept(new_reader: NewReader) -> None:
    """A reader that has seen much holds nothing but what is incomplete."""
    reader = new_reader()
    data = bytes(encode_frame([Heartbeat(1)] * 1000))
    tracemalloc.start()
    try:
        for _ in range(200):
            assert len(reader.receive_data(data + data[:3])) == 1000
            assert reader.receive_data(data[3:-1]) == []
            assert len(reader.receive_data(data[-1:])) == 1000
        kept, peak = tracemalloc.get_traced_memory()
        assert kept < PEAK_BYTES_MAX
        assert peak < PEAK_BYTES_MAX + PEAK_FACTOR_MAX * 2 * len(data)
    finally:
        tracemalloc.stop()


NESTED = {
    "lists": b"\x91",
    "maps": b"\x81\x01",
    "maps of two": b"\x82\x01\xc0\x01",
}


@pytest.mark.parametrize("new_reader", READERS)
@pytest.mark.parametrize("level", NESTED.values(), ids=NESTED)
@pytest.mark.parametrize("before", [b"", b"\x91", b"\x91\x93\x01\x05"], ids=["", "in", "after"])
def test_any_depth_is_a_message_or_a_fault(
    new_reader: NewReader, level: bytes, before: bytes
) -> None:
    """Also in a field too many, which is passed over: a later version may have it."""
    outcome(new_reader, [framed(before + level * 100_000 + b"\xc0")])
