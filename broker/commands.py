"""The commands that talk to a running broker. Each returns its exit code."""

from __future__ import annotations

import argparse
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from msgspec import Raw, Struct

from broker import status_commands
from broker.config_text import shown
from broker.output import (
    Colour,
    Frame,
    Output,
    WatchView,
    complain,
    cut,
    drop_rest,
    frames,
    json_line,
    json_lines,
    printable,
    table,
)
from broker.worker_call import (
    FAILED,
    UNREACHABLE,
    USAGE,
    Address,
    CommandError,
    call,
    connected,
    received,
    send,
)

WORKER_URL = "ws://127.0.0.1:49134"
STREAM_URL = "ws://127.0.0.1:3112"
RECONNECT_S = 2.0
INTERRUPTED = 130  # as shells say it of a program that SIGINT ended
_JOIN_REFUSED = ("invalid_message", "name_too_long", "too_many_subscriptions")

_Fields = dict[str, "str | Raw"]
_Kind = TypeVar("_Kind")


class _Stream(Struct):
    id: str
    groups: list[str]


class _Item(Struct):
    item_id: str | None  # a worker that stores the stream does not tell it
    value: Raw


class _OpError(Struct):
    op_index: int
    code: str
    message: str


class _Change(Struct):
    old_value: Raw = Raw(b"null")
    new_value: Raw = Raw()
    errors: list[_OpError] = []


class _Streams(Struct):
    stream: list[Raw]


def run(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Run the command that `options` (of `broker.cli`) say; errors are told on standard error."""
    try:
        output = Output.of(environ, options.json)
        if options.command == "watch":
            return _watch(options, _address(options, environ, STREAM_URL), output)
        return _COMMANDS[options.command](options, _address(options, environ, WORKER_URL), output)
    except CommandError as error:
        complain(error.code, error.message)
        return error.exit_code
    except BrokenPipeError:  # of standard output: connections tell theirs as a CommandError
        drop_rest()
        return 0
    except OSError as error:  # of standard input or output, such as a full disk
        drop_rest()
        complain("io", error.strerror or str(error))
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


def _address(options: argparse.Namespace, environ: Mapping[str, str], default: str) -> Address:
    """Where to connect: options win over the environment.

    `III_TOKEN` is what makes a worker; the stream port's auth function, which may be anybody's,
    is sent only what was asked for.
    """
    is_worker = default == WORKER_URL
    variable = "BROKER_URL" if is_worker else "BROKER_STREAM_URL"
    token = options.token
    if token is None:
        token = environ.get("III_TOKEN", "") if is_worker else ""
    if not (token.isascii() and token.isprintable()):
        raise CommandError("token", "holds a character that no HTTP header may hold", USAGE)
    return Address(options.url or environ.get(variable) or default, token, options.timeout)


# Calls.


def _streams(_options: argparse.Namespace, address: Address, output: Output) -> int:
    result = _result(address, "stream::list_all", {})
    streams = _decoded(_Streams, result).stream
    if output.for_programs:
        output.values(map(bytes, streams))
        return 0
    rows = []
    for stream in (_decoded(_Stream, bytes(stream)) for stream in streams):
        names = ", ".join(map(printable, stream.groups))
        rows.append([printable(stream.id), str(len(stream.groups)), names])
    _print_table(output, ["STREAM", "GROUPS", "NAMES"], rows)
    return 0


def _groups(options: argparse.Namespace, address: Address, output: Output) -> int:
    result = _result(address, "stream::list_groups", {"stream_name": options.stream})
    if output.for_programs:
        output.values(map(bytes, _decoded(list[Raw], result)))
    else:
        names = _decoded(list[str], result)
        output.lines(cut(printable(name), output.width) for name in names)
    return 0


def _list(options: argparse.Namespace, address: Address, output: Output) -> int:
    result = _result(address, "broker::items", _group(options))
    if output.for_programs:
        output.values(map(bytes, _decoded(list[Raw], result)))
        return 0
    items = _decoded(list[_Item], result)
    rows = []
    for item in items:
        name = "-" if item.item_id is None else printable(item.item_id)
        rows.append([name, json_line(bytes(item.value))])
    _print_table(output, ["ITEM", "VALUE"], rows)
    return 0


def _get(options: argparse.Namespace, address: Address, output: Output) -> int:
    value = call(address, "stream::get", _payload(_item(options)))
    if value is None:
        names = f"{options.stream}/{options.group}/{options.item}"
        raise CommandError("not_found", f"{names} does not exist")
    if output.for_programs:
        output.values([value])
    else:
        output.lines([json_lines(value)])
    return 0


def _set(options: argparse.Namespace, address: Address, output: Output) -> int:
    fields = _item(options) | {"data": Raw(_json(options.json_text))}
    return _print_change(output, _result(address, "stream::set", fields))


def _update(options: argparse.Namespace, address: Address, output: Output) -> int:
    ops = _json(options.ops)
    if ops.lstrip().startswith(b"{"):
        ops = b"[" + ops + b"]"
    return _print_change(
        output, _result(address, "stream::update", _item(options) | {"ops": Raw(ops)})
    )


def _delete(options: argparse.Namespace, address: Address, output: Output) -> int:
    return _print_change(output, _result(address, "stream::delete", _item(options)))


def _send(options: argparse.Namespace, address: Address, _output: Output) -> int:
    fields = _group(options) | {"type": options.type, "data": Raw(_json(options.json_text))}
    if options.id is not None:
        fields["id"] = options.id
    call(address, "stream::send", _payload(fields))
    return 0


_COMMANDS: dict[str, Callable[[argparse.Namespace, Address, Output], int]] = {
    "streams": _streams,
    "groups": _groups,
    "list": _list,
    "get": _get,
    "set": _set,
    "update": _update,
    "delete": _delete,
    "send": _send,
    "status": status_commands.status,
    "top": status_commands.top,
}


def _group(options: argparse.Namespace) -> _Fields:
    return {"stream_name": options.stream, "group_id": options.group}


def _item(options: argparse.Namespace) -> _Fields:
    return _group(options) | {"item_id": options.item}


def _payload(fields: _Fields) -> bytes:
    return msgspec.json.encode(fields)


def _result(address: Address, function_id: str, fields: _Fields) -> bytes:
    """The result of a call of a function that always has one."""
    result = call(address, function_id, _payload(fields))
    return b"null" if result is None else result


def _json(argument: str) -> bytes:
    """The JSON text that an argument is, or that standard input holds if it is `-`."""
    text = sys.stdin.buffer.read() if argument == "-" else argument.encode()
    try:
        text.decode()
        msgspec.json.decode(text, type=Raw)
    except RecursionError:
        raise CommandError("invalid_json", "the JSON argument nests too deep", USAGE) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        given = "standard input" if argument == "-" else shown(argument)
        raise CommandError("invalid_json", f"{given}: {error}", USAGE) from None
    return text


def _decoded(kind: type[_Kind], text: bytes) -> _Kind:
    """`text` as `kind`: a worker that stores a stream may have answered anything."""
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CommandError("invalid_answer", str(error)) from None


def _print_table(output: Output, header: list[str], rows: Sequence[list[str]]) -> None:
    if rows:
        head, *lines = table([header, *rows], output.width)
        output.lines([output.painted(head, Colour.BOLD), *lines])


def _print_change(output: Output, result: bytes) -> int:
    """Print what a write answered. Ops that failed are errors, though the others took effect."""
    change = _decoded(_Change, result)
    if output.for_programs:
        output.values([result])
    else:
        rows = [["old", json_line(bytes(change.old_value))]]
        if new := bytes(change.new_value):
            rows.append(["new", json_line(new)])
        output.lines(table(rows, output.width))
    for error in change.errors:
        complain(error.code, f"ops[{error.op_index}]: {error.message}")
    return FAILED if change.errors else 0


# Watching.


class _Watched(Struct):
    """What is watched, and up to where it was seen."""

    stream: str
    group_id: str
    item_id: str | None
    subscription_id: str
    seq: int | None = None
    epoch: str | None = None

    def join(self) -> bytes:
        """The message that joins, and that asks for what was missed if something was seen."""
        data: dict[str, Any] = {
            "subscriptionId": self.subscription_id,
            "streamName": self.stream,
            "groupId": self.group_id,
            "id": self.item_id,
            "ids": True,
        }
        if self.seq is not None and self.epoch is not None:
            data |= {"since": self.seq, "epoch": self.epoch}
        return msgspec.json.encode({"type": "join", "data": data})

    def seen(self, frame: Frame) -> None:
        """Keep where the frame stands."""
        self.seq = self.seq if frame.seq is None else frame.seq
        self.epoch = frame.epoch or self.epoch


def _watch(options: argparse.Namespace, address: Address, output: Output) -> int:
    """Print a line for each frame until SIGINT; a connection that is lost is made again."""
    watched = _Watched(options.stream, options.group, options.item, str(uuid.uuid4()))
    view = WatchView(output.painted, output.width)
    try:
        for text, frame in _frames(watched, address):
            if output.for_programs:
                output.values([text])
            else:
                output.lines([view.line(frame)])
    except KeyboardInterrupt:
        pass  # how one stops watching
    return 0


def _frames(watched: _Watched, address: Address) -> Iterator[tuple[bytes, Frame]]:
    """Frames as they came, and decoded, without end.

    Raises:
        CommandError: the first connection could not be made, or the join was refused.
    """
    is_told = has_joined = False
    while True:
        try:
            with connected(address) as connection:
                send(connection, watched.join(), time.monotonic() + address.timeout_s)
                while True:
                    text = received(connection)
                    frame = _accepted(text, address)
                    is_told, has_joined = False, True
                    watched.seen(frame)
                    yield text, frame
        except CommandError as error:
            if error.exit_code != UNREACHABLE or not has_joined:
                raise
            if not is_told:  # once for each connection that was lost
                complain(error.code, f"{error.message}; trying again every {RECONNECT_S:g} s")
            is_told = True
        time.sleep(RECONNECT_S)


def _accepted(text: bytes, address: Address) -> Frame:
    """The frame `text`, unless it says that the join was refused for good."""
    try:
        frame = frames.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError):
        reason = f"what listens on {shown(address.url)} is no stream port of a broker"
        raise CommandError("invalid_answer", reason, UNREACHABLE) from None
    event = frame.event
    if event.type == "unauthorized":
        raise CommandError("unauthorized", "the broker refused the join")
    if event.type == "error" and event.code in _JOIN_REFUSED:
        raise CommandError(event.code, event.message)
    return frame
