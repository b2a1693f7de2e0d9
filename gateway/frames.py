"""The short way for what nearly every frame is: one whole, masked, unfragmented message.

The library's parser is general and costs about 6 µs a frame. This one looks at headers only. It
takes the plain messages out itself and hands every other frame, byte for byte, to the library:
control frames, fragments, what is incomplete, what breaks the protocol.
"""

from __future__ import annotations

from collections.abc import Callable

from websockets.speedups import apply_mask

_PLAIN = (0x81, 0x82)  # FIN and TEXT or BINARY, no reserved bits
_MASKED = 0x80


class FrameSplitter:
    """Splits what a socket gives.

    Args:
        message: takes the payload of a plain message.
        other: takes bytes for the library's parser; says whether a next plain message may be
            taken out, which it may not within a fragmented one and after a fault.
        message_bytes_max: larger messages are left to the library, which refuses them.
    """

    def __init__(
        self,
        message: Callable[[bytes], None],
        other: Callable[[bytes], bool],
        message_bytes_max: int,
    ) -> None:
        self._message = message
        self._other = other
        self._message_bytes_max = message_bytes_max
        self._owed = 0  # bytes of the library's frame that are still to come
        self._header = b""  # the incomplete header of a frame
        self._broken = False
        self._plain_allowed = True
        self.closed = False
        """Set when nothing more is to be taken."""

    def receive_data(self, data: bytes) -> int:
        """Take the next bytes. Returns how many plain messages were in them."""
        messages = 0
        if self._header:
            data = self._header + data
            self._header = b""
        position, size = 0, len(data)
        while position < size and not self.closed:
            if self._broken:
                self._other(data[position:])
                return messages
            if self._owed:
                some = min(self._owed, size - position)
                self._owed -= some
                self._plain_allowed = self._other(data[position : position + some])
                position += some
                continue
            if size - position < 2:
                break
            first, second = data[position], data[position + 1]
            if second < _MASKED:  # a client's frames are masked: let the library say so
                self._broken = True
                continue
            length = second - _MASKED
            start = position + 6
            if length == 126:
                start = position + 8
                length = int.from_bytes(data[position + 2 : position + 4], "big")
            elif length == 127:
                start = position + 14
                length = int.from_bytes(data[position + 2 : position + 10], "big")
            if size < start:
                break
            end = start + length
            if (
                first in _PLAIN
                and end <= size
                and self._plain_allowed
                and length <= self._message_bytes_max
            ):
                messages += 1
                self._message(apply_mask(data[start:end], data[start - 4 : start]))
                position = end
            else:
                self._owed = end - position
        if position < size and not self.closed:
            self._header = data[position:]
        return messages
