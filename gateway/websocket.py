"""WebSocket frames that the gateway writes, made once and written to many."""

from __future__ import annotations


def text_frame(payload: bytes) -> bytes:
    """An unmasked, unfragmented text frame with `payload` (RFC 6455 section 5.2)."""
    return _header(len(payload)) + payload


def text_frame_of(*parts: bytes) -> bytes:
    """The same with a payload that lies in several parts, joined once."""
    return b"".join((_header(sum(map(len, parts))), *parts))


def _header(size: int) -> bytes:
    if size < 126:
        return b"\x81" + size.to_bytes(1, "big")
    if size < 65536:
        return b"\x81\x7e" + size.to_bytes(2, "big")
    return b"\x81\x7f" + size.to_bytes(8, "big")
