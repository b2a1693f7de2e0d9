"""What commands print: lines for people, or lines of JSON for programs. Mostly without I/O.

Nothing here lets a control character, or one that turns the direction of writing, through: names
and values are anybody's text, and a terminal obeys such characters.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Self

import msgspec
from msgspec import Raw, Struct

_HARMFUL_REST = (
    "\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028\\u2029\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff"
)
_HARMFUL = re.compile(f"[\\x00-\\x1f{_HARMFUL_REST}]")
_HARMFUL_IN_JSON = re.compile(f"[\\x00-\\x09\\x0b-\\x1f{_HARMFUL_REST}]")  # lines may end

GAP = "  "
NAME_COLUMNS_MAX = 40
"""Columns of a terminal that a name may take where a value stands beside it."""
CHANGE_COLUMNS_MAX = 60
"""Columns of one old or new value of a change."""
MESSAGE_MAX = 2000
"""Characters of an error's message."""

KNOWN_BYTES_MAX = 64 * 1024 * 1024
"""Bytes of values that a view remembers to tell what an update changed."""

_members = msgspec.json.Decoder(dict[str, Raw])
_elements = msgspec.json.Decoder(list[Raw])


class Colour(StrEnum):
    """Codes of terminals (ECMA-48, SGR)."""

    BOLD = "1"
    DIM = "2"
    RED = "31"
    GREEN = "32"
    YELLOW = "33"
    CYAN = "36"


def printable(text: str) -> str:
    """`text` in one line, harmful characters as `\\xNN` or `\\uNNNN`."""
    return _HARMFUL.sub(_escaped, text)


def json_line(text: bytes) -> str:
    """The JSON text `text` in one line without spaces: the same value, numbers as they came."""
    return _decoded(msgspec.json.format(text, indent=-1))


def json_lines(text: bytes) -> str:
    """The JSON text `text` over several lines, indented."""
    return _decoded(msgspec.json.format(text, indent=2))


def columns(text: str) -> int:
    """How many columns of a terminal the printable `text` takes."""
    return len(text) if text.isascii() else sum(map(_columns_of, text))


def cut(text: str, width: int) -> str:
    """`text`, or as much of it as fits into `width` columns with `…` at its end."""
    if len(text) <= width and columns(text) <= width:
        return text
    kept, room = [], width - 1
    for character in text[: 4 * width]:  # more are only marks that take no column
        room -= _columns_of(character)
        if room < 0:
            break
        kept.append(character)
    return "".join(kept) + "…" if width > 0 else ""


def padded(text: str, width: int) -> str:
    """`text` and as many spaces as are missing to `width` columns."""
    return text + " " * (width - columns(text))


def table(rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Lines of at most `width` columns; every column but the last as wide as its widest cell.

    All of `rows` are printable and have the same number of cells.
    """
    if not rows:
        return []
    widths = [
        min(max(columns(cell) for cell in column), NAME_COLUMNS_MAX)
        for column in list(zip(*rows, strict=True))[:-1]
    ]
    lines = []
    for *cells, last in rows:
        fixed = [padded(cut(c, w), w) for c, w in zip(cells, widths, strict=True)]
        lines.append(cut(GAP.join([*fixed, last]).rstrip(" "), width))
    return lines


def changes(old: bytes | None, new: bytes) -> str:
    """What is different in the JSON text `new`: `key old → new`, `+key new`, `-key old`.

    Objects are compared at their top level, anything else as a whole. Without `old`, all of `new`.
    """
    if old is None:
        return json_line(new)
    if json_line(old) == json_line(new):
        return "(unchanged)"
    before, after = _object(old), _object(new)
    if before is None or after is None:
        return f"{_short(old)} → {_short(new)}"
    found = []
    for key in [*before, *(key for key in after if key not in before)]:
        if key not in after:
            found.append(f"-{_key(key)} {_short(before[key])}")
        elif key not in before:
            found.append(f"+{_key(key)} {_short(after[key])}")
        elif json_line(before[key]) != json_line(after[key]):
            found.append(f"{_key(key)} {_short(before[key])} → {_short(after[key])}")
    return GAP.join(found) or "(unchanged)"  # only the order of its keys, or a key given twice


class CustomEvent(Struct):
    type: str
    data: Raw = Raw(b"null")


class Event(Struct):
    """What happened; which fields it has depends on `type`."""

    type: str
    data: Raw = Raw(b"null")
    ids: list[str] | None = None
    event: CustomEvent | None = None
    code: str = ""
    message: str = ""


class Frame(Struct):
    """A frame of the stream port (protocol section 5.4), as far as it is read here."""

    event: Event
    timestamp: int = 0
    id: str | None = None
    seq: int | None = None
    epoch: str | None = None


frames = msgspec.json.Decoder(Frame)


class WatchView:
    """Frames as lines for a person: time, what, item, and its value or what changed in it."""

    def __init__(self, painted: Callable[[str, Colour], str], width: int) -> None:
        self._painted = painted
        self._width = width
        self._known = KnownValues()
        self._id_columns = 0
        self._id_columns_max = min(NAME_COLUMNS_MAX, max(8, width // 3))

    def line(self, frame: Frame) -> str:
        """The line of a frame; to be asked for each frame, in order."""
        what, text, colour = self._told(frame)
        name = "-" if frame.id is None else cut(printable(frame.id), self._id_columns_max)
        self._id_columns = max(self._id_columns, columns(name))
        name = padded(name, self._id_columns)
        when, what = _time_of_day(frame.timestamp), padded(what, len("update"))
        used = columns(GAP.join([when, what, name, ""]))
        return GAP.join(
            [
                self._painted(when, Colour.DIM),
                self._painted(what, colour),
                name,
                cut(text, self._width - used),
            ]
        )

    def _told(self, frame: Frame) -> tuple[str, str, Colour]:
        event, value = frame.event, bytes(frame.event.data)
        match event.type:
            case "sync":
                return "sync", self._synced(frame.id, value, event.ids), Colour.CYAN
            case "create":
                self._known.put(frame.id, value)
                return "create", json_line(value), Colour.GREEN
            case "update":
                changed = changes(self._known.get(frame.id), value)
                self._known.put(frame.id, value)
                return "update", changed, Colour.YELLOW
            case "delete":
                self._known.remove(frame.id)
                return "delete", json_line(value), Colour.RED
            case "event" if event.event is not None:
                text = f"{printable(event.event.type)} {json_line(bytes(event.event.data))}"
                return "event", text, Colour.CYAN
            case "error":
                return "error", printable(f"{event.code}: {event.message}"), Colour.RED
            case other:
                text = "" if value == b"null" else json_line(value)
                return cut(printable(other), NAME_COLUMNS_MAX), text, Colour.DIM

    def _synced(self, item_id: str | None, value: bytes, ids: list[str] | None) -> str:
        self._known.clear()
        if item_id is not None:
            self._known.put(item_id, value)
        if item_id is not None or not value.lstrip().startswith(b"["):
            return json_line(value)  # where a worker stores the stream, a group may be anything
        values = _elements.decode(value)
        if ids is not None:
            for name, part in zip(ids, values, strict=False):
                self._known.put(name, bytes(part))
        return f"{len(values)} item" + ("" if len(values) == 1 else "s")


class KnownValues:
    """The last values of items, as many as `bytes_max` allows; the oldest go first."""

    def __init__(self, bytes_max: int = KNOWN_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._size = 0
        self._values: dict[str, bytes] = {}

    def get(self, item_id: str | None) -> bytes | None:
        """The value of an item, None if it is not known."""
        return None if item_id is None else self._values.get(item_id)

    def put(self, item_id: str | None, value: bytes) -> None:
        """Remember the value of an item."""
        self.remove(item_id)
        if item_id is None:
            return
        self._values[item_id] = value
        self._size += len(value)
        while self._size > self._bytes_max:
            self.remove(next(iter(self._values)))

    def remove(self, item_id: str | None) -> None:
        """Forget an item."""
        if item_id is not None:
            self._size -= len(self._values.pop(item_id, b""))

    def clear(self) -> None:
        """Forget everything."""
        self._size = 0
        self._values.clear()


class Output:
    """Standard output, for a person or for a program.

    Attributes: `for_programs` (JSON lines), `width` (columns of the terminal).
    """

    def __init__(self, for_programs: bool, colours: bool, width: int) -> None:
        self.for_programs = for_programs
        self.width = width
        self._colours = colours

    @classmethod
    def of(cls, environ: Mapping[str, str], wants_json: bool) -> Self:
        """For a person if standard output is a terminal and JSON was not asked for."""
        is_terminal = sys.stdout.isatty()
        return cls(
            for_programs=wants_json or not is_terminal,
            colours=is_terminal and not environ.get("NO_COLOR"),
            width=shutil.get_terminal_size().columns,
        )

    def painted(self, text: str, colour: Colour) -> str:
        """`text` in a colour, where there are colours."""
        return f"\x1b[{colour}m{text}\x1b[0m" if self._colours and text else text

    def lines(self, lines: Iterable[str]) -> None:
        """Print lines, and have them seen.

        Raises:
            BrokenPipeError: nobody reads any more.
        """
        encoding = "utf-8" if self.for_programs else sys.stdout.encoding
        output = sys.stdout.buffer
        for line in lines:
            output.write(f"{line}\n".encode(encoding, "replace"))
        output.flush()

    def values(self, texts: Iterable[bytes]) -> None:
        """Print JSON texts, a line each."""
        self.lines(json_line(text) for text in texts)


def complain(code: str, message: str) -> None:
    """Print an error: one line on standard error."""
    text = printable(f"{code}: {message[:MESSAGE_MAX]}")
    print(f"broker: {text}", file=sys.stderr, flush=True)


def drop_rest() -> None:
    """Nobody reads standard output any more: let nothing be written to it when Python ends."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    match code:
        case 10:
            return "\\n"
        case _ if code < 256:
            return f"\\x{code:02x}"
        case _:
            return f"\\u{code:04x}"


def _decoded(text: bytes) -> str:
    plain = text.decode(errors="replace")
    return _HARMFUL_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", plain)


def _columns_of(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _object(text: bytes) -> dict[str, bytes] | None:
    """The members of the JSON text `text`; None if it is no object."""
    if not text.lstrip().startswith(b"{"):
        return None
    return {key: bytes(value) for key, value in _members.decode(text).items()}


def _key(key: str) -> str:
    return cut(printable(key), NAME_COLUMNS_MAX)


def _time_of_day(timestamp_ms: int) -> str:
    """Hours to milliseconds, local time."""
    try:
        when = datetime.fromtimestamp(timestamp_ms / 1000)
    except (ValueError, OverflowError, OSError):
        return str(timestamp_ms)
    return when.isoformat(timespec="milliseconds")[11:23]


def _short(text: bytes) -> str:
    return cut(json_line(text), CHANGE_COLUMNS_MAX)
