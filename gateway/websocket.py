"""WebSocket frames that the gateway writes, made once and written to many."""

from __future__ import annotations


def text_frame(payload: bytes) -> bytes:
    """An unmasked, unfragmented text frame with `payload` (RFC 6455 section 5.2)."""
    size = len(payload)
    if size < 126:
        return b"\x81" + size.to_bytes(1, "big") + payload
    if size < 65536:
        return b"\x81\x7e" + size.to_bytes(2, "big") + payload
    return b"\x81\x7f" + size.to_bytes(8, "big") + payload
