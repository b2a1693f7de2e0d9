"""Names of streams, groups and items: any text, bounded, escaped wherever they leave JSON."""

from __future__ import annotations

from hashlib import blake2b
from typing import NamedTuple
from urllib.parse import quote, unquote_to_bytes

from broker.errors import InvalidRequest

NAME_BYTES_MAX = 1024
"""Bytes of UTF-8 that a stream, group or item name, or a subscription id, may have."""

_FILE_NAME_MAX = 200  # of the 255 bytes that file systems take: SQLite adds `.db-journal`


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
    """The name of a stream as a file name: percent-encoded, never empty, hidden or a path.

    Different for different streams. What would be longer than a file system takes is cut and
    ends in `%~` and a hash, which no encoding holds; `stream_of_file_name` can't invert that one.
    """
    escaped = quote(stream, safe="") or "%"
    if escaped.startswith("."):
        escaped = "%2E" + escaped[1:]
    if len(escaped) > _FILE_NAME_MAX:
        digest = blake2b(stream.encode(), digest_size=16).hexdigest()
        escaped = f"{escaped[: _FILE_NAME_MAX - 34]}%~{digest}"
    return escaped


def stream_of_file_name(name: str) -> str | None:
    """The inverse of `file_name`; None where the name was cut."""
    if "%~" in name:
        return None
    return "" if name == "%" else unquote_to_bytes(name).decode()
