"""Logs: one event a line on stderr, `noun_verb key=value`, as text or JSON.

Values are escaped in both formats, so that no name of a stream or function can forge a line.
"""

from __future__ import annotations

import logging
import sys
import time
from datetime import UTC, datetime
from typing import ClassVar, Literal

import msgspec

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

REPEATS_MAX, WINDOW_S = 100, 10.0

_FIELDS = "broker_fields"
_TEXT_MAX = 500  # characters of a value that a line shows


def configure(process: str, log_format: LogFormat, level: LogLevel) -> None:
    """Send the logs of this process, called `process` in them, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(process, log_format))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("websockets").setLevel(logging.CRITICAL)  # a peer's faults, told by us
    logging.getLogger("asyncio").setLevel(logging.WARNING)


class Log:
    """Writes events of one part of the program.

    Of one event at most `REPEATS_MAX` lines are written in `WINDOW_S`, whatever peers do; how many
    more there were is told with the next one after that.
    """

    left_out_total: ClassVar[int] = 0
    """Of all parts."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)
        self._windows: dict[str, _Window] = {}

    def debug(self, event: str, **fields: object) -> None:
        self._write(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: object) -> None:
        self._write(logging.INFO, event, fields)

    def warning(self, event: str, **fields: object) -> None:
        self._write(logging.WARNING, event, fields)

    def error(self, event: str, **fields: object) -> None:
        self._write(logging.ERROR, event, fields)

    def _write(self, level: int, event: str, fields: dict[str, object]) -> None:
        if not self._logger.isEnabledFor(level):
            return
        window = self._windows.setdefault(event, _Window())
        now = time.monotonic()
        if now - window.began_at > WINDOW_S:
            if window.left_out:
                fields = fields | {"left_out_before": window.left_out}
            window.began_at, window.count, window.left_out = now, 0, 0
        window.count += 1
        if window.count > REPEATS_MAX:
            window.left_out += 1
            Log.left_out_total += 1
            return
        self._logger.log(level, event, extra={_FIELDS: fields})


class _Window:
    """How often an event was written lately."""

    __slots__ = ("began_at", "count", "left_out")

    def __init__(self) -> None:
        self.began_at = float("-inf")
        self.count = 0
        self.left_out = 0


class _Whole(str):
    """A text that is not cut."""


class _Formatter(logging.Formatter):
    def __init__(self, process: str, log_format: LogFormat) -> None:
        super().__init__()
        self._process = process
        self._json = log_format == "json"

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields: dict[str, object] = dict(getattr(record, _FIELDS, {}))
        if record.exc_info:
            fields["exception"] = _Whole(self.formatException(record.exc_info))
        event = record.getMessage()
        if self._json:
            line = {"time": time, "level": record.levelname, "process": self._process}
            line["event"] = event
            line.update({key: _shown(value) for key, value in fields.items()})
            return msgspec.json.encode(line).decode()
        pairs = "".join(f" {key}={_quoted(_shown(value))}" for key, value in fields.items())
        text = event if event.isprintable() else _quoted(event)
        return f"{time} {record.levelname} {self._process} {text}{pairs}"


def _shown(value: object) -> str:
    text = str(value)
    whole = len(text) <= _TEXT_MAX or isinstance(value, _Whole)
    return text if whole else text[:_TEXT_MAX] + "…"


def _quoted(text: str) -> str:
    if text and text.isprintable() and not set(text) & {" ", '"', "=", "\\"}:
        return text
    return ascii(text) if not text.isprintable() else msgspec.json.encode(text).decode()
