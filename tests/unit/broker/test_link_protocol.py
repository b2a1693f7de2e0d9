"""Framing of the link: any split of the bytes gives the same messages, garbage one error."""

from __future__ import annotations

import contextlib
import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import messages
from broker.errors import ProtocolError
from broker.link_protocol import (
    FRAME_BYTES_MAX,
    FrameReader,
    encode_frame,
    gateway_reader,
    shard_reader,
)

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
ids = st.integers(0, 2**63 - 1)
data = st.binary(max_size=40)
to_shard = st.one_of(
    st.builds(messages.Hello, ids, names),
    st.builds(messages.Heartbeat, ids),
    st.builds(messages.Get, ids, names, names, names),
    st.builds(messages.Set, ids, names, names, names, data),
    st.builds(messages.Delete, ids, names, names, names),
    st.builds(messages.Update, ids, names, names, names, data),
    st.builds(messages.Send, ids, names, names, st.none() | names, names, data),
    st.builds(messages.List, ids, names, names),
    st.builds(
        messages.Join,
        ids,
        names,
        names,
        st.none() | names,
        st.none() | data,
        st.none() | ids,
        st.none() | names,
        st.booleans(),
    ),
    st.builds(messages.Leave, names, names),
    st.builds(messages.ListGroups, ids, names),
    st.builds(messages.ListAll, ids),
    st.builds(messages.AddTrigger, names, names, st.none() | names, st.none() | names),
    st.builds(messages.RemoveTrigger, names),
    st.builds(messages.Lease, ids, names, names, ids, data),
    st.builds(messages.EndLease, ids),
    st.builds(messages.AddLeaveTrigger, names, names, st.none() | names, st.none() | names),
    st.builds(messages.ReadHistory, ids, names, names, st.none() | ids, ids),
)
to_gateway = st.one_of(
    st.builds(messages.Heartbeat, ids),
    st.builds(messages.Welcome, ids, ids, ids),
    st.builds(messages.Reply, ids, st.none() | data),
    st.builds(messages.Failure, ids, names, names, st.none() | names, st.booleans()),
    st.builds(
        messages.Synced,
        ids,
        ids,
        names,
        data,
        st.none() | data,
        st.none() | st.lists(data),
        ids,
        st.lists(ids),
    ),
    st.builds(messages.Left, names, names, names, data),
    st.builds(
        messages.Event,
        names,
        names,
        st.none() | names,
        ids,
        data,
        st.booleans(),
        st.lists(names),
        st.booleans(),
    ),
)


def pieces(stream: bytes, cuts: list[int]) -> list[bytes]:
    """`stream` cut at `cuts`, wherever these lie."""
    ends = sorted(cut % (len(stream) + 1) for cut in cuts)
    return [stream[a:b] for a, b in zip([0, *ends], [*ends, len(stream)], strict=True)]


def read(reader: FrameReader[Any], stream: bytes, cuts: list[int]) -> list[Any]:
    return [message for piece in pieces(stream, cuts) for message in reader.receive_data(piece)]


cuts_of = st.lists(st.integers(0, 10_000), max_size=20)


@given(st.lists(st.lists(to_shard, max_size=5), max_size=5), cuts_of)
def test_any_split_gives_the_shard_the_same(frames: list[list[Any]], cuts: list[int]) -> None:
    stream = b"".join(encode_frame(frame) for frame in frames)
    expected = [message for frame in frames for message in frame]
    assert read(shard_reader(), stream, cuts) == expected
    assert read(shard_reader(), stream, list(range(len(stream)))) == expected


@given(st.lists(st.lists(to_gateway, max_size=5), max_size=5), cuts_of)
def test_any_split_gives_the_gateway_the_same(frames: list[list[Any]], cuts: list[int]) -> None:
    stream = b"".join(encode_frame(frame) for frame in frames)
    expected = [message for frame in frames for message in frame]
    assert read(gateway_reader(), stream, cuts) == expected


@pytest.mark.parametrize("make", [shard_reader, gateway_reader])
@given(garbage=st.binary(max_size=200), cuts=cuts_of)
def test_garbage_raises_only_protocol_error(make: Any, garbage: bytes, cuts: list[int]) -> None:
    for stream in (garbage, struct.pack(">I", len(garbage)) + garbage):
        with contextlib.suppress(ProtocolError):
            read(make(), stream, cuts)


@given(
    frame=st.lists(to_shard, min_size=1, max_size=3), at=st.integers(4, 500), bit=st.integers(0, 7)
)
def test_a_flipped_bit_raises_only_protocol_error(frame: list[Any], at: int, bit: int) -> None:
    stream = encode_frame(frame)
    stream[4 + at % (len(stream) - 4)] ^= 1 << bit
    with contextlib.suppress(ProtocolError):
        shard_reader().receive_data(bytes(stream))


def test_a_message_for_the_other_end_is_refused() -> None:
    stream = encode_frame([messages.Welcome(1, 0, 2)])
    with pytest.raises(ProtocolError):
        shard_reader().receive_data(bytes(stream))


def test_too_large_a_frame_is_refused_by_its_length() -> None:
    reader = gateway_reader()
    assert reader.receive_data(struct.pack(">I", FRAME_BYTES_MAX)) == []
    with pytest.raises(ProtocolError, match="bytes"):
        gateway_reader().receive_data(struct.pack(">I", FRAME_BYTES_MAX + 1))


def test_decoded_values_do_not_change_with_the_buffer() -> None:
    """A message must not look into the reader's buffer, which is reused."""
    reader = gateway_reader()
    first = encode_frame([messages.Reply(1, b"x" * 100)])
    (reply,) = reader.receive_data(bytes(first))
    reader.receive_data(bytes(encode_frame([messages.Reply(2, b"y" * 100)])))
    assert reply == messages.Reply(1, b"x" * 100)
    assert msgspec.msgpack.decode(bytes(first[4:]))[0][2] == b"x" * 100
