"""RFC 6455 on both ports, byte by byte: framing, control frames, fragments, UTF-8, closing.

What is sent are messages that are answered, padded with spaces where a size matters: a message
that came through as a whole is one that was answered.
"""

from __future__ import annotations

import contextlib
import json
import socket
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import count
from typing import Any, NamedTuple, Self

import pytest
import yaml

from tests.support.broker import IN_MEMORY, Broker
from tests.support.connection import PATIENCE_S
from tests.support.stream_client import UPGRADE

CONT, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
FIN, RSV1, RSV2, RSV3 = 0x80, 0x40, 0x20, 0x10
PROTOCOL_ERROR, INVALID_DATA, TOO_BIG = 1002, 1007, 1009
MESSAGE_BYTES_MAX = 256 * 1024
MASK = bytes.fromhex("37fa213d")
STREAM = "conformance"

LIMITS = {
    "worker_message_bytes_max": MESSAGE_BYTES_MAX,
    "client_message_bytes_max": MESSAGE_BYTES_MAX,
}


def length_field(size: int) -> bytes:
    """The shortest one, with the bit that says that a mask follows."""
    if size < 126:
        return bytes([FIN | size])
    return b"\xfe" + size.to_bytes(2) if size < 2**16 else b"\xff" + size.to_bytes(8)


def masked(payload: bytes, mask: bytes = MASK) -> bytes:
    key = int.from_bytes((mask * (len(payload) // 4 + 1))[: len(payload)])
    return (int.from_bytes(payload) ^ key).to_bytes(len(payload))


def frame(opcode: int, payload: bytes = b"", flags: int = FIN) -> bytes:
    """A masked frame."""
    return bytes([flags | opcode]) + length_field(len(payload)) + MASK + masked(payload)


def fragments(opcode: int, *payloads: bytes, between: bytes = b"") -> bytes:
    """A message in several frames, with the bytes `between` after each but the last."""
    frames = [
        frame(CONT if n else opcode, payload, FIN if n == len(payloads) - 1 else 0)
        for n, payload in enumerate(payloads)
    ]
    return between.join(frames)


def close_frame(code: int, reason: bytes = b"") -> bytes:
    return frame(CLOSE, code.to_bytes(2) + reason)


class Received(NamedTuple):
    """A frame of the server."""

    opcode: int
    payload: bytes


class Peer(ABC):
    """A socket that is connected to one of the ports; `early` is sent with the request."""

    numbers = count()

    def __init__(self, url: str, early: bytes = b"", chop: int = 0) -> None:
        host, port = url.split("/")[2].rsplit(":", 1)
        self.socket = socket.create_connection((host, int(port)), PATIENCE_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.reader = self.socket.makefile("rb")
        try:
            self.send(UPGRADE + early, chop)
            assert self.reader.readline().startswith(b"HTTP/1.1 101 ")
            while self.reader.readline() != b"\r\n":
                pass
            self.greeted()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the socket; may be called again."""
        self.reader.close()
        self.socket.close()

    @abstractmethod
    def greeted(self) -> None:
        """Take what comes first."""

    @abstractmethod
    def message(self, size: int = 0) -> bytes:
        """A message of at least `size` bytes that is answered."""

    @abstractmethod
    def is_answer(self, payload: bytes) -> bool:
        """Whether the last message is answered by this."""

    @abstractmethod
    def odd_message(self, text: bytes, place: str) -> bytes:
        """A message with `text` in it; `place`: value, unknown or key."""

    @abstractmethod
    def is_refusal(self, payload: bytes) -> bool:
        """Whether an odd message is refused by this."""

    def send(self, data: bytes, chop: int = 0) -> None:
        """Send `data`, `chop` bytes at a time. A server that has closed may take no more of it."""
        try:
            if not chop:
                self.socket.sendall(data)
            for start in range(0, len(data) if chop else 0, chop or 1):
                self.socket.sendall(data[start : start + chop])
        except ConnectionError:
            return

    def next(self) -> Received | None:
        """The next frame, which has to be well formed; None at the end."""
        try:
            head = self.reader.read(2)
        except ConnectionError:
            return None
        if not head:
            return None
        opcode, size = head[0] & 0x0F, head[1]
        assert head[0] & (RSV1 | RSV2 | RSV3) == 0
        assert head[0] & FIN
        if size >= 126:
            size = int.from_bytes(self.reader.read(2 if size == 126 else 8))
        payload = self.reader.read(size)
        assert len(payload) == size
        if opcode == TEXT:
            payload.decode()
        return Received(opcode, payload)

    def answered(self) -> None:
        received = self.next()
        assert received is not None
        assert received.opcode == TEXT
        assert self.is_answer(received.payload), received

    def works(self) -> None:
        """Nothing waits, and a round trip can be made."""
        self.send(frame(TEXT, self.message()))
        self.answered()

    def ended(self, *codes: int) -> None:
        """The server closes with one of `codes` now, and ends the connection."""
        received = self.next()
        assert received is not None, "ended without a close frame"
        assert received.opcode == CLOSE, received
        assert int.from_bytes(received.payload[:2]) in codes, received
        received.payload[2:].decode()
        assert self.next() is None


class WorkerPeer(Peer):
    def greeted(self) -> None:
        received = self.next()
        assert received is not None
        assert json.loads(received.payload)["type"] == "workerregistered"

    def message(self, size: int = 0) -> bytes:
        return b'{"type":"ping"}'.ljust(size)

    def is_answer(self, payload: bytes) -> bool:
        return bool(json.loads(payload) == {"type": "pong"})

    def odd_message(self, text: bytes, place: str) -> bytes:
        value, key, unknown = b"x", b"k", b""
        match place:
            case "value":
                value = text
            case "key":
                key = text
            case "unknown":
                unknown = b'"unknown":"%b",' % text
        return (
            b'{%b"type":"invokefunction","invocation_id":"i","function_id":"stream::set","data":'
            b'{"stream_name":"%b","group_id":"g","item_id":"i","data":{"%b":"%b"}}}'
        ) % (unknown, STREAM.encode(), key, value)

    def is_refusal(self, payload: bytes) -> bool:
        answer = json.loads(payload)
        return answer["invocation_id"] == "i" and "error" in answer


class StreamPeer(Peer):
    group = ""

    def greeted(self) -> None:
        """Nothing comes."""

    def message(self, size: int = 0) -> bytes:
        self.group = str(next(self.numbers))
        return self.join(self.group).encode().ljust(size)

    def join(self, group: str) -> str:
        data = {"subscriptionId": "s", "streamName": STREAM, "groupId": group}
        return json.dumps({"type": "join", "data": data}, separators=(",", ":"))

    def is_answer(self, payload: bytes) -> bool:
        answer = json.loads(payload)
        return (answer["groupId"], answer["event"]["type"]) == (self.group, "sync")

    def seq_of(self, group: str) -> int:
        """Join; the sync has to be what comes next."""
        self.send(frame(TEXT, self.join(group).encode()))
        received = self.next()
        assert received is not None
        sync = json.loads(received.payload)
        assert (sync["groupId"], sync["event"]["type"]) == (group, "sync")
        seq: int = sync["seq"]
        return seq

    def odd_message(self, text: bytes, place: str) -> bytes:
        match place:
            case "value":
                return self.join("%b").encode() % text
            case "key":
                return b'{"%b":1,%b' % (text, self.join("g").encode()[1:])
            case _:
                return b'{"unknown":["%b"],%b' % (text, self.join("g").encode()[1:])

    def is_refusal(self, payload: bytes) -> bool:
        return bool(json.loads(payload)["event"]["type"] == "error")


class Port(NamedTuple):
    """One of the two ports."""

    kind: type[Peer]
    url: str

    def open(self, early: bytes = b"", chop: int = 0) -> Peer:
        return self.kind(self.url, early, chop)


@pytest.fixture(scope="module")
def broker() -> Iterator[Broker]:
    """A broker with a small limit of messages, which ends with the processes it began with."""
    with Broker(IN_MEMORY + yaml.safe_dump({"broker": {"limits": LIMITS}})) as broker:
        before = broker.children()
        yield broker
        assert broker.children() == before


@pytest.fixture(params=["worker", "stream"])
def port(request: pytest.FixtureRequest, broker: Broker) -> Port:
    if request.param == "worker":
        return Port(WorkerPeer, broker.worker_url)
    return Port(StreamPeer, broker.stream_url)


# Framing -------------------------------------------------------------------------------------

SIZES = [125, 126, 127, 65535, 65536, MESSAGE_BYTES_MAX]
CHOPS = [0, 997, 1]


@pytest.mark.parametrize("opcode", [TEXT, BINARY], ids=["text", "binary"])
@pytest.mark.parametrize("chop", CHOPS)
@pytest.mark.parametrize("size", SIZES)
def test_messages_of_any_size_in_any_pieces(port: Port, size: int, chop: int, opcode: int) -> None:
    if chop == 1 and size == MESSAGE_BYTES_MAX:
        chop = 7
    with port.open() as peer:
        data = frame(opcode, peer.message(size))
        assert len(data) in (size + 6, size + 8, size + 14)
        peer.send(data, chop)
        peer.answered()
        peer.works()


@pytest.mark.parametrize("opcode", [TEXT, BINARY], ids=["text", "binary"])
@pytest.mark.parametrize("payload", [b"", b" ", b"\r\n\t "], ids=["empty", "space", "blank"])
def test_blank_messages_are_ignored(port: Port, opcode: int, payload: bytes) -> None:
    with port.open() as peer:
        peer.send(frame(opcode, payload) * 3)
        peer.send(fragments(opcode, payload, payload, b""))
        peer.works()


@pytest.mark.parametrize("chop", CHOPS)
def test_many_messages_in_one_write(port: Port, chop: int) -> None:
    with port.open() as peer:
        for size in (0, 126, 300, 0):
            messages = [peer.message(size) for _ in range(20)]
            peer.send(b"".join(frame(TEXT, message) for message in messages), chop)
            for _ in messages[:-1]:
                received = peer.next()
                assert received is not None
                assert received.opcode == TEXT
            peer.answered()


@pytest.mark.parametrize("chop", CHOPS)
def test_a_longer_length_field_than_needed(port: Port, chop: int) -> None:
    """Section 5.2 forbids it; it is taken or refused, never misread."""
    for field in (b"\xfe" + (100).to_bytes(2), b"\xff" + (100).to_bytes(8)):
        with port.open() as peer:
            peer.send(b"\x81" + field + MASK + masked(peer.message(100)), chop)
            received = peer.next()
            assert received is not None
            if received.opcode == TEXT:
                assert peer.is_answer(received.payload)
                peer.works()
            else:
                assert received.payload[:2] == PROTOCOL_ERROR.to_bytes(2)


@pytest.mark.parametrize("mask", [bytes(4), b"\xff\xff\xff\xff", b"\x00\xff\x00\xff"])
def test_any_mask(port: Port, mask: bytes) -> None:
    with port.open() as peer:
        for size in range(120, 130):
            payload = peer.message(size)
            peer.send(b"\x81" + length_field(len(payload)) + mask + masked(payload, mask))
            peer.answered()


@pytest.mark.parametrize("chop", CHOPS)
def test_messages_that_come_with_the_request(port: Port, chop: int) -> None:
    data = frame(TEXT, b" ") + fragments(TEXT, b" ", b"\t") + frame(BINARY)
    with port.open(data, chop) as peer:
        peer.works()
    data += frame(TEXT, b" " * 200)
    for cut in range(0, len(data), 7):
        with port.open(data[:cut]) as peer:
            peer.send(data[cut:])
            peer.works()


@pytest.mark.parametrize("chop", CHOPS)
def test_a_ping_that_comes_with_the_request(port: Port, chop: int) -> None:
    with port.open(frame(PING, b"early"), chop) as peer:  # the 101 comes first
        assert peer.next() == Received(PONG, b"early")
        peer.works()


@pytest.mark.parametrize("chop", [0, 1])
def test_the_first_read_ends_like_a_request(port: Port, chop: int) -> None:
    """It ends within a frame, and by chance with what an empty line is."""
    mask = bytes([0x42, 0x2B, 0x42, 0x2B])
    odd = masked(b"\r\n\r\n", mask) + b"\xc3\xa9" + b"x" * 10
    with port.open() as peer:  # it has a message to send
        rest = peer.message()[1:]
    text = b'{"a":"..%b",%b' % (odd, rest)
    whole = b"\x81" + length_field(len(text)) + mask + masked(text, mask)
    cut = whole.index(b"\r\n\r\n") + 4
    assert whole[cut : cut + 2] == b"\x81\x82"  # what follows looks like the start of a frame
    with port.open(whole[:cut]) as other:
        other.send(whole[cut:], chop)
        received = other.next()
        assert received is not None
        assert received.opcode == TEXT
        assert peer.is_answer(received.payload), received
        other.works()


@pytest.mark.parametrize("flags", [RSV1, RSV2, RSV3, RSV1 | RSV2 | RSV3])
@pytest.mark.parametrize("opcode", [TEXT, BINARY, CLOSE, PING, PONG])
def test_reserved_bits(port: Port, opcode: int, flags: int) -> None:
    for chop in (0, 1):
        with port.open() as peer:
            payload = b"\x03\xe8" if opcode == CLOSE else peer.message()[:125]
            peer.send(frame(PING, b"1") + frame(opcode, payload, FIN | flags), chop)
            assert peer.next() == Received(PONG, b"1")
            peer.ended(PROTOCOL_ERROR)


@pytest.mark.parametrize("opcode", [3, 4, 5, 6, 7, 11, 12, 13, 14, 15])
@pytest.mark.parametrize("payload", [b"", b"{}"])
def test_reserved_opcodes(port: Port, opcode: int, payload: bytes) -> None:
    for chop in (0, 1):
        with port.open() as peer:
            peer.send(frame(PING) + frame(opcode, payload) + frame(PING), chop)
            assert peer.next() == Received(PONG, b"")
            peer.ended(PROTOCOL_ERROR)


@pytest.mark.parametrize("opcode", [TEXT, BINARY, PING, PONG, CLOSE])
@pytest.mark.parametrize("size", [0, 15, 125, 126, 65536])
def test_frames_without_a_mask(port: Port, opcode: int, size: int) -> None:
    if size > 125 and opcode > 7:
        size = 1
    with port.open() as peer:
        field = length_field(size)
        peer.send(bytes([FIN | opcode, field[0] & 0x7F]) + field[1:] + bytes(size))
        peer.ended(PROTOCOL_ERROR)


@pytest.mark.parametrize("opcode", [TEXT, BINARY])
@pytest.mark.parametrize("size", [MESSAGE_BYTES_MAX + 1, 2**32, 2**62, 2**63 - 1])
def test_too_big_by_the_announced_length(port: Port, size: int, opcode: int) -> None:
    for chop in (0, 1):
        with port.open() as peer:
            peer.send(frame(PING) + bytes([FIN | opcode]) + b"\xff" + size.to_bytes(8) + MASK, chop)
            assert peer.next() == Received(PONG, b"")
            peer.ended(TOO_BIG)


@pytest.mark.parametrize("opcode", [TEXT, BINARY, CONT, PING, CLOSE])
@pytest.mark.parametrize("size", [2**63, 2**63 + 1, 2**64 - 1])
def test_lengths_of_64_bits(port: Port, size: int, opcode: int) -> None:
    for more in (b"", b"x" * 100, frame(PING)):
        with port.open() as peer:
            peer.send(bytes([FIN | opcode]) + b"\xff" + size.to_bytes(8) + MASK + more)
            peer.ended(PROTOCOL_ERROR, TOO_BIG)


@pytest.mark.parametrize("opcode", [TEXT, BINARY])
def test_too_big_and_sent_all_the_same(port: Port, opcode: int) -> None:
    for size in (MESSAGE_BYTES_MAX + 1, 3 * MESSAGE_BYTES_MAX):
        with port.open() as peer:
            peer.send(frame(opcode, peer.message(size)))
            peer.ended(TOO_BIG)


def test_too_big_in_fragments(port: Port) -> None:
    half = MESSAGE_BYTES_MAX // 2
    with port.open() as peer:
        message = peer.message(MESSAGE_BYTES_MAX)
        peer.send(fragments(TEXT, message[:half], b"", message[half:]))
        peer.answered()
        peer.send(fragments(TEXT, message[:half], message[half:], b" "))
        peer.ended(TOO_BIG)
    with port.open() as peer:  # it is not waited for the last one
        peer.send(frame(TEXT, b" " * half, 0))
        for _ in range(2):
            peer.send(frame(PING))
            assert peer.next() == Received(PONG, b"")
            peer.send(frame(CONT, b" " * half, 0))
        peer.ended(TOO_BIG)


# Pings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("chop", CHOPS)
@pytest.mark.parametrize("payload", [b"", b"hello", b"\x00\xff\xfe\xfd", b"p" * 125])
def test_pings_are_answered(port: Port, payload: bytes, chop: int) -> None:
    with port.open() as peer:
        peer.send(frame(PING, payload), chop)
        assert peer.next() == Received(PONG, payload)
        peer.works()


@pytest.mark.parametrize("opcode", [PING, PONG])
@pytest.mark.parametrize("size", [126, 127, 65536])
def test_pings_too_big(port: Port, opcode: int, size: int) -> None:
    with port.open() as peer:
        peer.send(frame(opcode, b"p" * size))
        peer.ended(PROTOCOL_ERROR)


@pytest.mark.parametrize("chop", CHOPS)
def test_ten_pings_in_order(port: Port, chop: int) -> None:
    with port.open() as peer:
        peer.send(b"".join(frame(PING, b"%d" % n) for n in range(10)), chop)
        assert [peer.next() for _ in range(10)] == [Received(PONG, b"%d" % n) for n in range(10)]
        peer.works()


def test_pongs_nobody_asked_for(port: Port) -> None:
    with port.open() as peer:
        peer.send(frame(PONG) + frame(PONG, b"unasked") + frame(PONG, b"p" * 125))
        peer.send(frame(PONG, b"a") + frame(PING, b"b") + frame(PONG, b"c"))
        assert peer.next() == Received(PONG, b"b")
        peer.works()


@pytest.mark.parametrize("chop", CHOPS)
@pytest.mark.parametrize("opcode", [TEXT, BINARY])
def test_control_frames_within_a_message(port: Port, opcode: int, chop: int) -> None:
    with port.open() as peer:
        message = peer.message(200)
        parts = [message[:1], message[1:50], message[50:50], message[50:]]
        between = frame(PING, b"in between") + frame(PONG, b"unasked")
        peer.send(fragments(opcode, *parts, between=between), chop)
        for _ in range(3):
            assert peer.next() == Received(PONG, b"in between")
        peer.answered()
        peer.works()


# Fragments -----------------------------------------------------------------------------------


@pytest.mark.parametrize("chop", CHOPS)
@pytest.mark.parametrize("opcode", [TEXT, BINARY])
def test_fragments_of_any_size(port: Port, opcode: int, chop: int) -> None:
    with port.open() as peer:
        for size in (1, 2, 77, 126, 1000):
            message = peer.message(1000)
            parts = [message[at : at + size] for at in range(0, len(message), size)]
            peer.send(fragments(opcode, *parts), chop)
            peer.answered()
            peer.send(fragments(opcode, b"", *parts, b"", b""), chop)
            peer.answered()
        peer.works()


def test_messages_whole_and_in_fragments_mixed(port: Port) -> None:
    with port.open() as peer:
        first, second, third = peer.message(), peer.message(), peer.message()
        peer.send(
            frame(TEXT, first)
            + fragments(TEXT, second[:5], second[5:])
            + frame(BINARY, third)
            + frame(TEXT, peer.message())
        )
        for _ in range(3):
            received = peer.next()
            assert received is not None
            assert received.opcode == TEXT
        peer.answered()


NOT_FRAGMENTS = {
    "continuation of nothing": frame(CONT, b"{}"),
    "empty continuation of nothing": frame(CONT),
    "start of a continuation of nothing": frame(CONT, b"{}", 0),
    "continuation after the end": fragments(TEXT, b" ", b" ") + frame(CONT, b" "),
    "continuation after a whole message": frame(TEXT, b" ") + frame(CONT, b" "),
    "text within a text": frame(TEXT, b"{", 0) + frame(TEXT, b"}"),
    "binary within a text": frame(TEXT, b"{", 0) + frame(BINARY, b"}"),
    "start of a text within a text": frame(TEXT, b"{", 0) + frame(TEXT, b"}", 0),
    "text within a binary": frame(BINARY, b"{", 0) + frame(TEXT, b"}"),
    "text after a continuation": frame(TEXT, b"{", 0) + frame(CONT, b" ", 0) + frame(TEXT, b"}"),
    "ping in fragments": frame(PING, b"p", 0) + frame(CONT, b"p"),
    "pong in fragments": frame(PONG, b"p", 0) + frame(CONT, b"p"),
    "close in fragments": frame(CLOSE, b"\x03\xe8", 0) + frame(CONT),
    "ping in fragments within a text": frame(TEXT, b"{", 0) + frame(PING, b"p", 0),
}


@pytest.mark.parametrize("chop", [0, 1])
@pytest.mark.parametrize("data", NOT_FRAGMENTS.values(), ids=NOT_FRAGMENTS)
def test_what_is_no_fragment(port: Port, data: bytes, chop: int) -> None:
    with port.open() as peer:
        peer.send(data + frame(TEXT, peer.message()), chop)
        peer.ended(PROTOCOL_ERROR)


# UTF-8 ---------------------------------------------------------------------------------------

NONCHARACTERS = [chr(plane * 0x10000 + low) for plane in range(17) for low in (0xFFFE, 0xFFFF)]
VALID = [
    text.encode()
    for text in (
        "κόσμε",
        "Hello-µ@ßöäüàá-UTF-8!!",
        "\x7f\x80߿ࠀ￿\U00010000\U0010ffff",
        "퟿\ue000\ufffd",
        "\U0001f4a1\U0001f468\u200d\U0001f469\u200d\U0001f467",
        "\ufeff\u202e \u2029",
        *NONCHARACTERS,
    )
]
CONTINUATIONS = bytes(range(0x80, 0xC0))
INVALID = [
    # continuation bytes alone
    b"\x80", b"\xbf", b"\x80\xbf", b"\x80\xbf\x80", b"\x80\xbf\x80\xbf", CONTINUATIONS,
    # starts without what has to follow
    *(bytes([start]) + b" " for start in range(0xC0, 0x100)),
    b"".join(bytes([start]) + b" " for start in range(0xC0, 0x100)),
    b"\xe0\x80", b"\xf0\x80\x80", b"\xf8\x80\x80\x80", b"\xfc\x80\x80\x80\x80",
    b"\xdf", b"\xef\xbf", b"\xf7\xbf\xbf", b"\xfb\xbf\xbf\xbf", b"\xfd\xbf\xbf\xbf\xbf",
    b"\xce\xba\xe1\xbd", b"\xe1\xbd ", b"\xf0\x9f\x92 ", b"\xe0\xa0\xe0\xa0\x80",
    # bytes that are in no text
    b"\xfe", b"\xff", b"\xfe\xfe\xff\xff",
    # longer than needed
    b"\xc0\xaf", b"\xe0\x80\xaf", b"\xf0\x80\x80\xaf", b"\xf8\x80\x80\x80\xaf",
    b"\xfc\x80\x80\x80\x80\xaf", b"\xc1\xbf", b"\xe0\x9f\xbf", b"\xf0\x8f\xbf\xbf",
    b"\xf8\x87\xbf\xbf\xbf", b"\xfc\x83\xbf\xbf\xbf\xbf", b"\xc0\x80", b"\xe0\x80\x80",
    b"\xf0\x80\x80\x80", b"\xc0\xa2",
    # beyond the last character
    b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80", b"\xf7\xbf\xbf\xbf", b"\xf8\x88\x80\x80\x80",
    b"\xfb\xbf\xbf\xbf\xbf", b"\xfc\x84\x80\x80\x80\x80", b"\xfd\xbf\xbf\xbf\xbf\xbf",
    # surrogates, alone and in pairs
    b"\xed\xa0\x80", b"\xed\xad\xbf", b"\xed\xae\x80", b"\xed\xaf\xbf", b"\xed\xb0\x80",
    b"\xed\xbe\x80", b"\xed\xbf\xbf", b"\xed\xa0\x80\xed\xb0\x80", b"\xed\xaf\xbf\xed\xbf\xbf",
    # the same, escaped
    b"\\ud800", b"\\udfff", b"\\udc00\\ud800", b"\\ud83dx",
]  # fmt: skip
PLACES = ["value", "unknown", "key"]


@pytest.mark.parametrize("place", PLACES)
def test_valid_text_comes_through(port: Port, place: str) -> None:
    with port.open() as peer:
        for text in VALID:
            message = peer.odd_message(text, place)
            at = message.index(text)
            cut = [message[: at + 1], message[at + 1 : at + 2], message[at + 2 :]]
            for data in (frame(TEXT, message), frame(BINARY, message), fragments(TEXT, *cut)):
                peer.send(data)
                received = peer.next()
                assert received is not None
                assert not peer.is_refusal(received.payload)
                if place == "value":  # as they are, or escaped
                    assert text.decode() in texts_of(json.loads(received.payload))


def texts_of(answer: Any) -> str:
    """All texts in an answer, joined."""
    match answer:
        case dict():
            return "".join(map(texts_of, answer.values()))
        case list():
            return "".join(map(texts_of, answer))
    return answer if isinstance(answer, str) else ""


@pytest.mark.parametrize("opcode", [TEXT, BINARY])
@pytest.mark.parametrize("place", PLACES)
def test_invalid_text_goes_no_further(port: Port, broker: Broker, place: str, opcode: int) -> None:
    """It is refused with an error, or by closing; nobody else ever gets it."""
    with StreamPeer(broker.stream_url) as watcher, contextlib.ExitStack() as opened:
        peer = opened.enter_context(port.open())
        seq = watcher.seq_of("g")
        for text in INVALID:
            message = peer.odd_message(text, place)
            at = message.index(text) + 1
            for data in (frame(opcode, message), fragments(opcode, message[:at], message[at:])):
                peer.send(data)
                received = peer.next()
                assert received is not None
                if received.opcode == CLOSE:
                    assert received.payload[:2] == INVALID_DATA.to_bytes(2)
                    peer = opened.enter_context(port.open())
                else:
                    assert peer.is_refusal(received.payload), (text, received)
        peer.works()
        assert watcher.seq_of("g") == seq  # and nothing came in between


def test_text_that_ends_within_a_character(port: Port) -> None:
    for tail in (b"\xce", b"\xe1\xbd", b"\xf0\x9f\x92", b"\xf4"):
        for text in (tail, b'{"type":"ping"}' + tail, b'{"x":"' + tail, b"x" * 200 + tail):
            for data in (frame(TEXT, text), fragments(TEXT, text[:-1], text[-1:])):
                with port.open() as peer:
                    peer.send(data + frame(PING))
                    received = peer.next()
                    while received is not None and received.opcode == TEXT:
                        assert not peer.is_answer(received.payload)
                        assert peer.is_refusal(received.payload)
                        received = peer.next()
                    assert received is not None
                    if received.opcode == CLOSE:
                        assert received.payload[:2] == INVALID_DATA.to_bytes(2)
                    else:
                        assert received.opcode == PONG


# Closing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", [b"", b"bye", "κόσμε".encode(), b"r" * 123])
@pytest.mark.parametrize(
    "code", [1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999]
)
def test_close_codes_are_echoed(port: Port, code: int, reason: bytes) -> None:
    for chop in (0, 1):
        with port.open() as peer:
            peer.send(close_frame(code, reason), chop)
            received = peer.next()
            assert received is not None
            assert received.opcode == CLOSE
            assert received.payload[:2] == code.to_bytes(2)
            assert peer.next() is None


@pytest.mark.parametrize(
    "code", [0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535]
)
def test_close_codes_that_are_none(port: Port, code: int) -> None:
    for reason in (b"", b"reason"):
        with port.open() as peer:
            peer.send(close_frame(code, reason))
            peer.ended(PROTOCOL_ERROR)


def test_close_without_a_code(port: Port) -> None:
    with port.open() as peer:
        peer.send(frame(CLOSE))
        received = peer.next()
        assert received is not None
        assert received.opcode == CLOSE
        assert received.payload[:2] in (b"", b"\x03\xe8")
        assert peer.next() is None


@pytest.mark.parametrize("payload", [b"\x03", b"\xff"])
def test_close_with_half_a_code(port: Port, payload: bytes) -> None:
    with port.open() as peer:
        peer.send(frame(CLOSE, payload))
        peer.ended(PROTOCOL_ERROR)


@pytest.mark.parametrize("size", [124, 125, 1000])
def test_close_with_a_reason_too_long(port: Port, size: int) -> None:
    with port.open() as peer:
        peer.send(close_frame(1000, b"r" * size))
        peer.ended(PROTOCOL_ERROR)


def test_close_with_a_reason_that_is_no_text(port: Port) -> None:
    for reason in INVALID:
        if reason.startswith(b"\\") or len(reason) > 123:
            continue
        with port.open() as peer:
            peer.send(close_frame(1000, reason))
            peer.ended(INVALID_DATA)


@pytest.mark.parametrize(
    "after",
    [
        close_frame(1000),
        close_frame(1001, b"again"),
        frame(PING, b"p"),
        frame(CONT, b"}"),
        frame(15),
        b"\x81",
        b"garbage" * 1000,
    ],
    ids=["close", "other close", "ping", "continuation", "reserved", "half", "garbage"],
)
@pytest.mark.parametrize("chop", [0, 1])
def test_what_comes_after_a_close(port: Port, after: bytes, chop: int) -> None:
    with port.open() as peer:
        peer.send(close_frame(1000) + after + frame(TEXT, peer.message()), chop)
        assert peer.next() == Received(CLOSE, b"\x03\xe8")
        assert peer.next() is None


def test_close_within_a_message(port: Port) -> None:
    with port.open() as peer:
        peer.send(frame(TEXT, b"{", 0) + close_frame(1000) + frame(CONT, b"}"))
        peer.ended(1000, PROTOCOL_ERROR)


def test_half_a_frame_then_the_end(port: Port) -> None:
    """Ended without a word, on either side."""
    for data in (b"", b"\x81", b"\x81\xfe\x01", frame(TEXT, b"{" * 200)[:-1], frame(TEXT, b"{", 0)):
        with port.open() as peer:
            peer.send(data)
            peer.socket.shutdown(socket.SHUT_WR)
            assert peer.next() is None


def test_answers_come_before_the_close(broker: Broker) -> None:
    """Of what was handled before the close frame was read."""
    with WorkerPeer(broker.worker_url) as peer:
        peer.send(frame(TEXT, peer.message()) + close_frame(1000))
        peer.answered()
        peer.ended(1000)


# Compression ---------------------------------------------------------------------------------

OFFERS = [
    "permessage-deflate",
    "permessage-deflate; client_max_window_bits",
    "permessage-deflate; server_no_context_takeover; client_no_context_takeover",
    "permessage-deflate; server_max_window_bits=8, permessage-deflate",
    "permessage-bzip2, permessage-snappy, x-webkit-deflate-frame",
    "permessage-deflate; unknown=1",
    ", ,",
    "permessage-deflate;" + "x" * 2000,
    '=;,"',
]


@pytest.mark.parametrize("offer", OFFERS)
def test_no_compression_whatever_is_offered(port: Port, offer: str) -> None:
    """Declined; an offer that can't be read may be refused instead."""
    header = f"Sec-WebSocket-Extensions: {offer}\r\n\r\n".encode()
    host, number = port.url.split("/")[2].rsplit(":", 1)
    with socket.create_connection((host, int(number)), PATIENCE_S) as tcp:
        tcp.sendall(UPGRADE.removesuffix(b"\r\n") + header)
        reader = tcp.makefile("rb")
        status = int(reader.readline().split()[1])
        assert status in (101, 400)
        assert status == 101 or offer in OFFERS[-3:]
        head = b""
        while (line := reader.readline()) not in (b"\r\n", b""):
            head += line
        assert b"extensions" not in head.lower()
