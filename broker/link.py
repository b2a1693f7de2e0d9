"""A socket that carries link frames: batches what one loop turn sends, bounds what waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar, cast

from broker.errors import ProtocolError
from broker.link_protocol import FRAME_BYTES_MAX, FrameReader, encode_frame
from broker.messages import Message

M = TypeVar("M")

_HIGH_WATER_BYTES = 2**20


class LinkOwner(Protocol[M]):
    """Who hears of a link's life."""

    def link_made(self, link: Link[M]) -> None: ...

    def messages_received(self, link: Link[M], messages: list[M]) -> None: ...

    def link_lost(self, link: Link[M], reason: str) -> None: ...


class Link(asyncio.Protocol, Generic[M]):
    """One end of a link.

    With `pause_when_full` no more is read from a peer that does not take what is written to it, so
    that calls wait where they come from. Only the shard's end does so: if both did, each could
    wait for the other. What waits all the same is bounded by `queue_bytes_max`; past it the link is
    cut, and the gateway links again and asks for what it missed.

    With `flush_at` so many messages are sent without waiting for the end of the turn.
    """

    def __init__(
        self,
        owner: LinkOwner[M],
        new_reader: Callable[[], FrameReader[M]],
        queue_bytes_max: int,
        *,
        pause_when_full: bool,
        flush_at: int = 0,
    ) -> None:
        self._owner = owner
        self._reader = new_reader()
        self._queue_bytes_max = queue_bytes_max
        self._pause_when_full = pause_when_full
        self._flush_at = flush_at
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._waiting: list[Message] = []
        self._lost_reason = "the connection was lost"
        self.received_bytes = 0
        self.sent_bytes = 0
        self.overflowed = False
        """Whether it was cut as the peer left too much unread."""
        self.half_full = False
        """Whether more than half of what may wait does; checked when something is written."""

    def send(self, message: Message) -> None:
        """Send `message` with what else this turn of the loop sends, or sooner when that is much;
        nothing once cut."""
        if not self._waiting:
            self._loop.call_soon(self._flush)
        self._waiting.append(message)
        if len(self._waiting) == self._flush_at:
            self._flush()

    @property
    def queue_bytes(self) -> int:
        """Bytes that the peer has not taken yet."""
        return self._transport.get_write_buffer_size() if self._transport else 0

    def cut(self, reason: str) -> None:
        """End the link at once; `link_lost` follows with `reason`."""
        self._lost_reason = reason
        if self._transport is not None:
            self._transport.abort()

    def flush_and_close(self) -> None:
        """End the link when all that was sent is with the peer."""
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=_HIGH_WATER_BYTES)
        self._owner.link_made(self)

    def data_received(self, data: bytes) -> None:
        self.received_bytes += len(data)
        try:
            messages = self._reader.receive_data(data)
        except ProtocolError as error:
            self.cut(error.message)
            return
        if messages:
            self._owner.messages_received(self, messages)

    def pause_writing(self) -> None:
        if self._pause_when_full and self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self.half_full = False
        if self._pause_when_full and self._transport is not None:
            self._transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._waiting.clear()
        self._owner.link_lost(self, self._lost_reason if exc is None else str(exc))

    def _flush(self) -> None:
        messages, self._waiting = self._waiting, []
        if messages:
            self._write(messages)

    def _write(self, messages: list[Message]) -> None:
        if self._transport is None:
            return
        frame = encode_frame(messages)
        if len(frame) > FRAME_BYTES_MAX and len(messages) > 1:
            half = len(messages) // 2
            self._write(messages[:half])
            self._write(messages[half:])
            return
        self._transport.write(frame)
        self.sent_bytes += len(frame)
        waiting = self.queue_bytes
        self.half_full = waiting > max(self._queue_bytes_max // 2, _HIGH_WATER_BYTES)
        if waiting > self._queue_bytes_max + len(frame):
            self.overflowed = True
            self.cut(f"the peer left more than {self._queue_bytes_max} bytes unread")
