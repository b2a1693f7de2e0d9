"""One connection to a running broker, and one call over it.

A call is an `invokefunction` on the worker port and its `invocationresult` (protocol sections 3.10
and 3.13). JSON goes in and comes out as text, so that numbers of any size stay as they are.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
import uuid
from collections.abc import Iterator

import msgspec
from msgspec import Raw, Struct
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.sync.client import ClientConnection, connect

from broker.config import Limits
from broker.config_text import shown

FAILED = 1
"""Exit code: the call failed, or nothing was found."""
USAGE = 2
"""Exit code: the command line, the environment or a file is at fault."""
UNREACHABLE = 3
"""Exit code: no broker is there, or it did not answer in time."""

MESSAGE_BYTES_MAX = 1025 * 1024 * 1024
"""Bytes of one message of the broker: what its limits may be set to, and the envelope."""

_CLOSE_S = 1.0  # what a closing handshake may take: by then everything has been said
_PING_S = 20.0  # between pings; a broker that leaves one unanswered for as long is gone
_TOO_LARGE = 1009  # close code
_BODY_MAX = 200  # characters of an HTTP answer that an error repeats

_logger = logging.getLogger("broker.worker_call")
_logger.addHandler(logging.NullHandler())  # what goes wrong is told once, as the command's error
_logger.propagate = False


class CommandError(Exception):
    """Why a command ends without success.

    Args:
        code: for programs; the broker's own where it answered.
        message: for people, in one sentence.
        exit_code: of the command.
    """

    def __init__(self, code: str, message: str, exit_code: int = FAILED) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.exit_code = exit_code


class Address(Struct, frozen=True):
    """Where a broker is, and how long it may take."""

    url: str
    token: str
    """Sent as `Authorization: Bearer`; empty: none."""
    timeout_s: float


class _Error(Struct):
    code: str = "error"
    message: str = ""


class _Answer(Struct):
    """Any message on the worker port, as far as a caller reads it."""

    type: str
    invocation_id: str | None = None
    result: Raw = Raw()
    error: _Error | None = None


_answers = msgspec.json.Decoder(_Answer)


@contextlib.contextmanager
def connected(address: Address) -> Iterator[ClientConnection]:
    """A connection that has been upgraded; closed at the end.

    Raises:
        CommandError: `unreachable`, `timeout`, `unauthorized` or `forbidden`; `connection_lost`,
            or `message_too_large`, when it ended while it was used.
    """
    with _connect(address) as connection:
        try:
            yield connection
        except ConnectionClosed as closed:
            raise _closed(closed, address) from None
        finally:
            connection.close()  # a normal end, also of what was interrupted


def call(address: Address, function_id: str, payload: bytes) -> bytes | None:
    """Call `function_id` with the JSON text `payload`.

    Returns the result's JSON text; None when the answer has none, which is how `stream::get` tells
    a missing item from a stored null.

    Raises:
        CommandError: as of `connected`, `timeout`, `invalid_answer`, or the error that the broker
            answered.
    """
    with connected(address) as connection:
        return call_over(connection, address, function_id, payload)


def call_over(
    connection: ClientConnection, address: Address, function_id: str, payload: bytes
) -> bytes | None:
    """`call` over a connection that is there, made to `address`.

    Raises:
        CommandError: as of `call`.
        ConnectionClosed: the connection ended.
    """
    end = time.monotonic() + address.timeout_s
    call_id = str(uuid.uuid4())
    request = {
        "type": "invokefunction",
        "invocation_id": call_id,
        "function_id": function_id,
        "data": Raw(payload),
    }
    message = msgspec.json.encode(request)
    try:
        send(connection, message, end)
    except ConnectionClosed as closed:
        raise _unsent(closed, len(message), end, address) from None
    while True:
        try:
            reply = received(connection, max(0.0, end - time.monotonic()))
        except TimeoutError:
            raise _too_late(address) from None
        answer = _decoded(reply, address)
        if answer.type == "invocationresult" and answer.invocation_id == call_id:
            break
    if answer.error is not None:
        raise CommandError(answer.error.code, answer.error.message)
    return bytes(answer.result) or None


def send(connection: ClientConnection, message: bytes, end: float) -> None:
    """Send a text message; a peer that has not taken it at `end` (`time.monotonic`) is cut.

    Raises:
        ConnectionClosed: the connection has ended, or was cut.
    """
    # Sending has no time limit of its own: without this, a broker that stands still holds it up.
    watch = threading.Timer(max(0.0, end - time.monotonic()), _cut, (connection.socket,))
    watch.daemon = True
    watch.start()
    try:
        connection.send(message, text=True)
    finally:
        watch.cancel()


def received(connection: ClientConnection, timeout_s: float | None = None) -> bytes:
    """The next message; without `timeout_s` it is waited for as long as the connection lives.

    Raises:
        TimeoutError, ConnectionClosed.
    """
    message = connection.recv(timeout_s, decode=False)
    return message.encode() if isinstance(message, str) else message


def _cut(peer: socket.socket) -> None:
    with contextlib.suppress(OSError):  # has just been closed
        peer.shutdown(socket.SHUT_RDWR)


def _connect(address: Address) -> ClientConnection:
    headers = {"Authorization": f"Bearer {address.token}"} if address.token else None
    where = shown(address.url)
    try:
        return connect(
            address.url,
            additional_headers=headers,
            compression=None,
            proxy=None,  # brokers stand in private networks
            open_timeout=address.timeout_s,
            ping_interval=_PING_S,
            ping_timeout=_PING_S,
            close_timeout=_CLOSE_S,
            max_size=MESSAGE_BYTES_MAX,
            logger=_logger,
        )
    except InvalidStatus as refusal:
        raise _refused(refusal, where) from None
    except TimeoutError:
        raise _too_late(address) from None
    except (OSError, InvalidHandshake, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CommandError("unreachable", f"{where}: {reason}", UNREACHABLE) from None
    except (InvalidURI, ValueError):  # after OSError: errors of certificates are both
        reason = f"{where} is no address of a broker, such as ws://127.0.0.1:49134"
        raise CommandError("url", reason, USAGE) from None


def _refused(refusal: InvalidStatus, where: str) -> CommandError:
    status = refusal.response.status_code
    body = bytes(refusal.response.body or b"").decode(errors="replace").strip()[:_BODY_MAX]
    reason = f"{where} answered {status}" + (f": {body}" if body else "")
    match status:
        case 401:
            return CommandError("unauthorized", reason)
        case 403:
            return CommandError("forbidden", reason)
        case _:
            return CommandError("unreachable", reason, UNREACHABLE)


def _closed(closed: ConnectionClosed, address: Address) -> CommandError:
    received = closed.rcvd
    if received is not None and received.code == _TOO_LARGE:
        reason = received.reason or "the broker takes no message of this size"
        return CommandError("message_too_large", reason)
    reason = f"{shown(address.url)} ended the connection"
    if received is not None:
        reason += f" with {received.code}" + (f": {received.reason}" if received.reason else "")
    return CommandError("connection_lost", reason, UNREACHABLE)


def _unsent(closed: ConnectionClosed, size: int, end: float, address: Address) -> CommandError:
    """Why a message was not taken. What the broker said of it is lost when it was still coming."""
    if time.monotonic() >= end:
        return _too_late(address)
    usual = Limits().worker_message_bytes_max
    if closed.rcvd is None and size > usual:
        reason = f"{shown(address.url)} did not take {size} bytes; the limit is usually {usual}"
        return CommandError("message_too_large", reason)
    return _closed(closed, address)


def _too_late(address: Address) -> CommandError:
    reason = f"{shown(address.url)} did not answer within {address.timeout_s:g} s"
    return CommandError("timeout", reason, UNREACHABLE)


def _decoded(message: bytes, address: Address) -> _Answer:
    answer = None
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
        answer = _answers.decode(message)
    if answer is None or answer.type == "stream":  # a stream port complains of the call
        reason = f"what listens on {shown(address.url)} is no worker port of a broker"
        raise CommandError("invalid_answer", reason, UNREACHABLE)
    return answer
