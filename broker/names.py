"""Names of streams, groups and items: any text, bounded, escaped wherever they leave JSON."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import quote, unquote_to_bytes

from broker.errors import InvalidRequest

NAME_BYTES_MAX = 1024
"""Bytes of UTF-8 that a stream, group or item name, or a subscription id, may have."""


class Group(NamedTuple):
    """A group of a stream: the unit of order, of routing and of subscription."""

    stream: str
    group_id: str


def check_name(field: str, name: str, bytes_max: int = NAME_BYTES_MAX) -> None:
    """Refuse a name that is too long.

    Raises:
        InvalidRequest: `name_too_long`; the message has the field, the limit and the length.
    """
    if len(name) * 4 <= bytes_max:  # a character has at most 4 bytes
        return
    size = len(name.encode())
    if size > bytes_max:
        raise InvalidRequest(
            "name_too_long",
            f"{field} has {size} bytes of UTF-8, the limit is {bytes_max}",
            field,
        )


def file_name(stream: str) -> str:
    """The name of a stream as a file name: percent-encoded, never empty, `.` or hidden.

    Reversible and different for different streams, also on a file system that ignores case, as
    capitals are encoded too. Names too long for a file system's 255 bytes are the caller's to cut.
    """
    quoted = quote(stream, safe="")
    escaped = "".join(f"%{ord(c):02X}" if c.isupper() and c.isascii() else c for c in _split(quoted))
    if not escaped:
        return "%"
    return "%2E" + escaped[1:] if escaped[0] == "." else escaped


def stream_of_file_name(name: str) -> str:
    """The inverse of `file_name`."""
    return "" if name == "%" else unquote_to_bytes(name).decode()


def _split(quoted: str) -> list[str]:
    """The characters of a quoted text, each `%XX` escape kept whole."""
    parts: list[str] = []
    position = 0
    while position < len(quoted):
        width = 3 if quoted[position] == "%" else 1
        parts.append(quoted[position : position + width])
        position += width
    return parts
