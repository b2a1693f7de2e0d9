"""Framing of the link, without I/O: a 4-byte big-endian length, then a msgpack list of messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import msgspec

from broker.errors import ProtocolError
from broker.messages import Message, ToGateway, ToShard

FRAME_BYTES_MAX = 256 * 2**20
"""Bytes of one frame's body; a peer that announces more is not one of ours."""

_LENGTH_BYTES = 4
_encoder = msgspec.msgpack.Encoder()

M = TypeVar("M")


def encode_frame(messages: Sequence[Message]) -> bytearray:
    """One frame with `messages`, in order."""
    frame = bytearray(_LENGTH_BYTES)
    _encoder.encode_into(messages, frame, _LENGTH_BYTES)
    frame[:_LENGTH_BYTES] = (len(frame) - _LENGTH_BYTES).to_bytes(_LENGTH_BYTES, "big")
    return frame


class FrameReader(Generic[M]):
    """Turns what a socket gives, in pieces of any size, into messages."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[list[M]]) -> None:
        self._decoder = decoder
        self._buffer = bytearray()

    def receive_data(self, data: bytes) -> list[M]:
        """The messages that are complete with `data`, in order.

        Raises:
            ProtocolError: the peer does not speak this protocol; the link is of no more use.
        """
        buffer = self._buffer
        source: bytes | bytearray = data  # most frames come whole: nothing is copied together
        if buffer:
            buffer += data
            source = buffer
        messages: list[M] = []
        start = 0
        while len(source) - start >= _LENGTH_BYTES:
            body = start + _LENGTH_BYTES
            size = int.from_bytes(source[start:body], "big")
            if size > FRAME_BYTES_MAX:
                raise ProtocolError("link_protocol", f"a link frame of {size} bytes")
            if len(source) - body < size:
                break
            try:
                messages += self._decoder.decode(memoryview(source)[body : body + size])
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise ProtocolError("link_protocol", f"a bad link frame: {error}") from None
            start = body + size
        if source is buffer:
            del buffer[:start]
        else:
            buffer += data[start:]
        return messages


def gateway_reader() -> FrameReader[ToGateway]:
    """A reader for the gateway's end of a link."""
    return FrameReader(msgspec.msgpack.Decoder(list[ToGateway]))


def shard_reader() -> FrameReader[ToShard]:
    """A reader for the shard's end of a link."""
    return FrameReader(msgspec.msgpack.Decoder(list[ToShard]))
