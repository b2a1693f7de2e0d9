"""A socket around the `websockets` library's Sans-I/O protocol.

The library keeps the protocol: handshake, frames, closing. The connection owns the socket and
what waits to be written to it, and hands whole messages to its peer object.
"""

from __future__ import annotations

import asyncio
import fcntl
import sys
import termios
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Protocol, cast

from websockets.datastructures import Headers
from websockets.exceptions import InvalidMessage
from websockets.frames import Frame, Opcode
from websockets.http11 import Request, Response
from websockets.protocol import OPEN
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol

from gateway.frames import FrameSplitter

WRITE_HIGH_WATER_BYTES = 64 * 1024
CLOSE_TIMEOUT_S = 5.0
"""How long a peer may take to answer a close frame before its socket is cut."""
CLOSE_STALLED_TIMEOUT_S = 30.0
"""The same for a peer that has to read first what waits for it."""
UNREAD_BYTES_MAX = 1024 * 1024
"""Bytes of pongs that a peer may ask for without reading them."""


_HEAD_END = b"\r\n\r\n"

# Why nothing is read from a peer; any of them is enough.
PAUSED_BY_REQUEST, PAUSED_BY_STOP, PAUSED_BY_WORK, PAUSED_BY_RATE = 1, 2, 4, 8


class Peer(Protocol):
    """What becomes of an accepted connection."""

    def message_received(self, text: bytes) -> None:
        """A whole message, text or binary, not yet checked in any way."""

    def drained(self) -> None:
        """All that waited was handed to the socket."""

    def closed(self) -> None:
        """The connection is over; called once."""


class Port(Protocol):
    """What accepts connections."""

    message_bytes_max: int
    messages_total: int
    send_queue_bytes_max: int
    received_bytes: int
    sent_bytes: int

    def connected(self, connection: Connection) -> None: ...

    def send_soon(self, connection: Connection) -> None:
        """Have the connection flushed at the end of this turn of the loop."""

    def request_received(self, connection: Connection, request: Request) -> None: ...

    def disconnected(self, connection: Connection) -> None: ...


class Connection(asyncio.Protocol):
    """One connection of a port, from accept to close."""

    __slots__ = (
        "_acceptance",
        "_answered",
        "_close_timer",
        "_control_bytes",
        "_early",
        "_fragments",
        "_head_end",
        "_loop",
        "_now",
        "_out",
        "_outstanding",
        "_peer",
        "_port",
        "_protocol",
        "_read_paused",
        "_splitter",
        "_transport",
        "_waiting",
        "_write_paused",
        "connected_at",
        "counted_address",
        "received_at",
        "remote_address",
        "requested",
        "stalled_since",
        "waiting_bytes",
    )

    def __init__(self, port: Port, now: Callable[[], float]) -> None:
        self._port = port
        self._now = now
        self._loop = asyncio.get_running_loop()
        self._protocol = ServerProtocol(
            select_subprotocol=_first_offered, max_size=port.message_bytes_max
        )
        self._transport: asyncio.Transport | None = None
        self._out: asyncio.Transport | None = None  # the transport while messages can be sent
        self._acceptance: Response | None = None
        self._peer: Peer | None = None
        self._fragments = bytearray()
        self._waiting: list[bytes] = []
        self._write_paused = False
        self._read_paused = 0
        self._control_bytes = 0
        self._answered = False
        self._head_end = b""  # of what came of the request: its end may be cut anywhere
        self._early = b""  # what came behind the request before it was answered
        self._outstanding = 0
        self._splitter: FrameSplitter | None = None
        self._close_timer: asyncio.TimerHandle | None = None
        self.waiting_bytes = 0
        self.requested = False
        """Whether the whole request came."""
        self.connected_at = now()
        self.received_at = self.connected_at
        self.stalled_since: float | None = None
        self.remote_address = ""
        self.counted_address = ""
        """Under which the port counts the connection."""

    # What peers and ports use.

    @property
    def open(self) -> bool:
        """Whether messages can be sent."""
        return self._out is not None

    @property
    def close_code(self) -> int | None:
        """The code of the close frame that was sent; None before, and for plain HTTP."""
        close = self._protocol.close_sent
        return None if close is None else close.code

    @property
    def local_address(self) -> str:
        """The address and port that the peer connected to."""
        return _address(self._transport.get_extra_info("sockname")) if self._transport else ""

    def accept(self, peer: Peer) -> bool:
        """Complete the handshake; messages go to `peer` from now on.

        False: the connection was lost meanwhile, `peer` will never hear of it.
        """
        assert self._acceptance is not None, "accepted before the request was checked"
        if self._transport is None:
            return False
        self._peer = peer
        self._protocol.send_response(self._acceptance)
        self._acceptance = None
        self._write_protocol_data()
        self._out = self._transport
        self._splitter = FrameSplitter(
            self._take_message, self._for_library, self._port.message_bytes_max
        )
        if self._early:
            self._loop.call_soon(self._take_early)  # when the peer is ready for them
        else:
            self.resume_reading(PAUSED_BY_REQUEST)
        return True

    def check_handshake(self, request: Request) -> Response | None:
        """What a request that is no proper WebSocket upgrade has to be answered with, or None."""
        response = self._protocol.accept(request)
        if response.status_code != HTTPStatus.SWITCHING_PROTOCOLS:
            return response
        self._acceptance = response
        return None

    def respond(self, response: Response) -> None:
        """Answer the request with plain HTTP and close."""
        self._protocol.send_response(response)
        self._write_protocol_data()

    def respond_text(self, status: int, text: str) -> None:
        """Answer the request with a line of text and close; an empty `text` is no body."""
        response = self._protocol.reject(status, text)
        if not text:
            del response.headers["Content-Type"]
        self.respond(response)

    def send(self, frame: bytes) -> bool:
        """Send a prepared frame with what else this turn of the loop sends, or let it wait.

        Returns False, and takes nothing, when the socket is full and more would wait than is
        allowed.
        """
        if self._out is None:
            return True  # closing: nobody will miss it
        size = len(frame)
        if self._write_paused and self.waiting_bytes + size > self._port.send_queue_bytes_max:
            return False
        if not self._waiting:
            self._port.send_soon(self)
        self._waiting.append(frame)
        self.waiting_bytes += size
        return True

    def flush(self) -> int:
        """Write what one turn of the loop sent, joined; it waits while the socket is full.

        Returns how many bytes were written.
        """
        if self._write_paused or self._out is None or not self._waiting:
            return 0
        waiting = self._waiting
        data = waiting[0] if len(waiting) == 1 else b"".join(waiting)
        waiting.clear()
        self.waiting_bytes = 0
        self._out.write(data)
        return len(data)

    def drop_waiting(self) -> int:
        """Forget what waits; returns how many frames that were."""
        dropped = len(self._waiting)
        self._waiting.clear()
        self.waiting_bytes = 0
        return dropped

    def close(self, code: int, reason: str = "", timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Start the closing handshake; what still waits is dropped."""
        if self._transport is None:
            return
        if self._protocol.state is not OPEN:
            if self._peer is None:
                self.abort()
            return
        self._port.sent_bytes += self.flush()
        self.drop_waiting()
        self._out = None
        self.resume_reading(self._read_paused)  # for the answer
        self._protocol.send_close(code, reason)
        self._write_protocol_data()
        self._arm_close_timer(timeout_s)

    def abort(self) -> None:
        """Cut the connection."""
        if self._transport is not None:
            self._out = None
            self.drop_waiting()
            self._transport.abort()

    def ping(self) -> None:
        """Send a ping, to see whether the peer lives."""
        if self.open:
            self._protocol.send_ping(b"")
            self._write_protocol_data()

    @property
    def read_paused(self) -> bool:
        """Whether the peer may be silent because nothing is read from it."""
        return self._read_paused != 0

    @property
    def write_paused(self) -> bool:
        """Whether the peer has to read before it is sent more."""
        return self._write_paused

    def takes_bytes(self) -> bool:
        """Whether the peer took something of what it was sent since the last time.

        Pings and their answers lie behind that: a slow peer may be silent, and lives.
        """
        if self._transport is None:
            return False
        outstanding = self._transport.get_write_buffer_size()
        sock = self._transport.get_extra_info("socket")
        if sock is not None and sock.fileno() >= 0:
            unread = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0\0\0\0")
            outstanding += int.from_bytes(unread, sys.byteorder)
        before, self._outstanding = self._outstanding, outstanding
        return outstanding < before

    def pause_reading(self, why: int) -> None:
        """Take nothing more from the peer until every reason for that is gone."""
        if self._transport is not None:
            if not self._read_paused:
                self._transport.pause_reading()
            self._read_paused |= why

    def resume_reading(self, why: int) -> None:
        """One reason, or several, to take nothing from the peer are gone."""
        if self._transport is not None and self._read_paused:
            self._read_paused &= ~why
            if not self._read_paused:
                self.received_at = self._now()
                self._transport.resume_reading()

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_WATER_BYTES)
        self.remote_address = _address(transport.get_extra_info("peername"))
        self._port.connected(self)

    def data_received(self, data: bytes) -> None:
        self.received_at = self._now()
        self._port.received_bytes += len(data)
        if self._splitter is not None:
            messages = self._splitter.receive_data(data)
            self._port.messages_total += messages
            return
        if self.requested:  # not answered yet
            self._early += data
            if len(self._early) > UNREAD_BYTES_MAX:
                self.abort()
            return
        # The library gets the request alone: it would answer a ping before the request.
        before = len(self._head_end)
        end = (self._head_end + data).find(_HEAD_END)
        self._head_end = (self._head_end + data)[-len(_HEAD_END) + 1 :]
        if end >= 0:
            data, self._early = data[: end - before + 4], data[end - before + 4 :]
        self._protocol.receive_data(data)
        self._take_events()

    def _for_library(self, data: bytes) -> bool:
        self._protocol.receive_data(data)
        self._take_events()
        return self._protocol.current_size is None and self._protocol.state is OPEN

    def eof_received(self) -> bool:
        self._protocol.receive_eof()
        self._take_events()
        return False

    def pause_writing(self) -> None:
        self._write_paused = True
        self.stalled_since = self._now()

    def resume_writing(self) -> None:
        self._write_paused = False
        self.stalled_since = None
        self._control_bytes = 0
        written = sent = 0
        for frame in self._waiting:
            if self._write_paused or self._out is None:
                break
            written += 1
            self.waiting_bytes -= len(frame)
            sent += len(frame)
            self._out.write(frame)  # may pause writing again
        del self._waiting[:written]
        self._port.sent_bytes += sent
        if not self._write_paused and self._peer is not None:
            self._peer.drained()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = self._out = None
        if self._splitter is not None:
            self._splitter.closed = True
            self._splitter = None
        self.drop_waiting()
        if self._close_timer is not None:
            self._close_timer.cancel()
        self._port.disconnected(self)
        if self._peer is not None:
            self._peer.closed()
            self._peer = None

    def _take_events(self) -> None:
        for event in self._protocol.events_received():
            if isinstance(event, Frame):
                self._take_frame(event)
            elif isinstance(event, Request):
                self.requested = True
                self.pause_reading(PAUSED_BY_REQUEST)  # until it is accepted
                self._port.request_received(self, event)
        self._write_protocol_data()
        if self._protocol.close_expected():
            self._arm_close_timer(CLOSE_TIMEOUT_S)

    def _take_frame(self, frame: Frame) -> None:
        if frame.opcode is Opcode.TEXT or frame.opcode is Opcode.BINARY:
            if frame.fin:
                self._port.messages_total += 1
                self._take_message(bytes(frame.data))
            else:
                self._fragments = bytearray(frame.data)
        elif frame.opcode is Opcode.CONT:
            self._fragments += frame.data
            if frame.fin:
                message, self._fragments = bytes(self._fragments), bytearray()
                self._port.messages_total += 1
                self._take_message(message)

    def _take_message(self, text: bytes) -> None:
        if self._peer is not None and self._out is not None:  # not while closing
            self._peer.message_received(text)

    def _take_early(self) -> None:
        early, self._early = self._early, b""
        self._port.sent_bytes += self.flush()  # a greeting comes before the answer to anything
        self.resume_reading(PAUSED_BY_REQUEST)
        if self._splitter is not None:
            messages = self._splitter.receive_data(early)
            self._port.messages_total += messages

    def _write_protocol_data(self) -> None:
        """Write what the library wants sent: handshake, pongs, close frames, the end."""
        if isinstance(self._protocol.handshake_exc, InvalidMessage) and not self.requested:
            self._answer_garbage()
        if self._protocol.state is not OPEN:
            self._port.sent_bytes += self.flush()  # what was answered before the peer closed
        for data in self._protocol.data_to_send():
            if self._transport is None:
                return
            if not data:
                self._out = None
                self._transport.close()  # when all is written
                return
            self._transport.write(data)
            if self._write_paused:
                self._control_bytes += len(data)
        if self._control_bytes > UNREAD_BYTES_MAX:
            self.abort()

    def _answer_garbage(self) -> None:
        """What is no HTTP request is answered all the same; the library just ends it."""
        if self._transport is not None and not self._answered:
            self._answered = True
            refusal = self._protocol.reject(HTTPStatus.BAD_REQUEST, "not a valid HTTP request\n")
            self._transport.write(refusal.serialize())

    def _arm_close_timer(self, timeout_s: float) -> None:
        if self._close_timer is None:
            self._close_timer = self._loop.call_later(timeout_s, self.abort)


def plain_response(
    text: str,
    content_type: str = "text/plain; charset=utf-8",
    status: HTTPStatus = HTTPStatus.OK,
) -> Response:
    """A whole answer with `text`."""
    body = text.encode()
    headers = Headers(
        {
            "Content-Type": content_type,
            "Content-Length": str(len(body)),
            "X-Content-Type-Options": "nosniff",
            "Access-Control-Allow-Origin": "*",  # what is said here is said to everybody
            "Connection": "close",
        }
    )
    return Response(status.value, status.phrase, headers, body)


def _first_offered(_: ServerProtocol, subprotocols: Sequence[Subprotocol]) -> Subprotocol | None:
    """Browsers fail a connection that answers none of what they offered (protocol section 5.1)."""
    return subprotocols[0] if subprotocols else None


def _address(peername: object) -> str:
    """Address and port of a TCP peer, an IPv6 address in brackets."""
    if not isinstance(peername, tuple):
        return ""
    host, port = peername[0], peername[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
