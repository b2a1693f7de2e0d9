"""`broker status` and `broker top`: once, or again and again.

Drawn with what `broker.output` has: its tables are safe with anybody's names, and the commands
start without the modules that a library for tables would load.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import msgspec
from msgspec import structs

from broker.output import Colour, Output, complain, cut, printable
from broker.report import StatusReport, TopReport
from broker.status_view import status_lines, top_lines
from broker.worker_call import UNREACHABLE, Address, CommandError, call, call_over, connected

INTERVAL_S = 2.0
"""Between two looks on a terminal, unless asked otherwise."""

_status_decoder = msgspec.json.Decoder(StatusReport)
_top_decoder = msgspec.json.Decoder(TopReport)

_Show = Callable[[bytes], list[str]]
_Asked = tuple[str, bytes]
"""A function and its payload."""
_Report = TypeVar("_Report", StatusReport, TopReport)


def status(options: argparse.Namespace, address: Address, output: Output) -> int:
    """How every process is: a document, or tables."""

    def show(text: bytes) -> list[str]:
        if output.for_programs:
            return [text.decode()]
        return status_lines(_decoded(_status_decoder, text), output.painted, _width(output))

    return _run(options, address, output, ("broker::status", b"{}"), show)


def top(options: argparse.Namespace, address: Address, output: Output) -> int:
    """What is used most: a line each, or tables."""

    def show(text: bytes) -> list[str]:
        report = _decoded(_top_decoder, text)
        if not output.for_programs:
            return top_lines(report, output.painted, _width(output))
        found = [
            *(("group", structs.asdict(group)) for group in report.groups),
            *(("stream", structs.asdict(stream)) for stream in report.streams),
        ]
        rows = ({"at_ms": report.at_ms, "kind": kind, **fields} for kind, fields in found)
        for shard in report.missing:
            complain("shard_unavailable", f"shard {shard} does not answer")
        return [msgspec.json.encode(row).decode() for row in rows]

    payload = msgspec.json.encode({"limit": options.limit})
    return _run(options, address, output, ("broker::top", payload), show)


def _run(
    options: argparse.Namespace, address: Address, output: Output, asked: _Asked, show: _Show
) -> int:
    function_id, payload = asked
    if options.once or (output.for_programs and options.interval is None):
        output.lines(show(call(address, function_id, payload) or b"null"))
        return 0
    interval_s = INTERVAL_S if options.interval is None else options.interval
    answers = _answers(address, function_id, payload, interval_s)
    with contextlib.suppress(KeyboardInterrupt):  # how one stops looking
        if output.for_programs:
            _print_each(answers, output, show)
        else:
            _draw_each(answers, output, show)
    return 0


def _answers(
    address: Address, function_id: str, payload: bytes, interval_s: float
) -> Iterator[bytes | CommandError]:
    """Answers, or why there is none just now, without end.

    Raises:
        CommandError: there was not one answer yet, or the broker refuses.
    """
    has_answered = False
    while True:
        try:
            with connected(address) as connection:
                while True:
                    yield call_over(connection, address, function_id, payload) or b"null"
                    has_answered = True
                    time.sleep(interval_s)
        except CommandError as error:
            if error.exit_code != UNREACHABLE or not has_answered:
                raise
            yield error
        time.sleep(interval_s)


def _print_each(answers: Iterator[bytes | CommandError], output: Output, show: _Show) -> None:
    is_told = False
    for answer in answers:
        if isinstance(answer, bytes):
            is_told = False
            output.lines(show(answer))
        elif not is_told:
            is_told = True
            complain(answer.code, answer.message)


def _draw_each(answers: Iterator[bytes | CommandError], output: Output, show: _Show) -> None:
    """On a screen of its own, which is gone in the end."""
    lines: list[str] = []
    with _screen():
        for answer in answers:
            if isinstance(answer, bytes):
                shown = lines = show(answer)
            else:
                error = cut(printable(f"{answer.code}: {answer.message}"), _width(output))
                shown = [output.painted(error, Colour.RED), *lines[1:]]
            height = shutil.get_terminal_size().lines
            # Each line over what stood there: clearing the screen first would flicker.
            drawn = "\x1b[K\n".join(shown[: height - 1])
            sys.stdout.write(f"\x1b[H{drawn}\x1b[K\n\x1b[J")
            sys.stdout.flush()


@contextlib.contextmanager
def _screen() -> Iterator[None]:
    """The terminal's other screen, without a cursor."""
    sys.stdout.write("\x1b[?1049h\x1b[?25l")
    try:
        yield
    finally:
        sys.stdout.write("\x1b[?25h\x1b[?1049l")
        sys.stdout.flush()


def _width(output: Output) -> int:
    """Of the terminal as it is now, which people make larger and smaller."""
    return output.width if output.for_programs else shutil.get_terminal_size().columns


def _decoded(decoder: msgspec.json.Decoder[_Report], text: bytes) -> _Report:
    try:
        return decoder.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CommandError("invalid_answer", str(error)) from None
