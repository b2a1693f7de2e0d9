"""Peers that flood, lie, stall and vanish: whoever is beside them does not notice."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Self

import pytest
import yaml
from websockets.frames import Frame, Opcode

from tests.conftest import Run
from tests.support.broker import IN_MEMORY, Broker
from tests.support.calls import LONG_S, item, result_of
from tests.support.connection import Closed
from tests.support.stream_client import UPGRADE, RawHttp, StreamClient
from tests.support.worker import Worker

KIB, MIB = 1024, 1024 * 1024
GROWTH_BYTES_MAX = 20 * MIB
SLOWER_MAX = 50
"""How many times longer a round trip may take while others flood; all share two cores."""
SLOWER_MAX_BESIDE_WORKERS = 250
"""Workers are not throttled: each turn of the loop deals with what one read of a socket gave."""
TRIPS = 100
GAUGES = (
    'broker_connections{port="stream"}',
    'broker_connections{port="worker"}',
    "broker_subscriptions",
    "broker_subscribed_groups",
    "broker_invocations_pending",
    "broker_workers",
    "broker_functions",
)
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing drops what waits and sends RST


def with_limits(**limits: float) -> str:
    """A configuration in memory with `broker.limits`."""
    return IN_MEMORY + yaml.safe_dump({"broker": {"limits": limits}})


def metrics(broker: Broker) -> dict[str, float]:
    """The samples of the gateway's `/metrics`: name with labels to value."""
    with urllib.request.urlopen(broker.metrics_url, timeout=LONG_S) as response:
        lines = response.read().decode().splitlines()
    samples = (line.rpartition(" ") for line in lines if line[:1] not in ("#", ""))
    return {name: float(value) for name, _, value in samples}


def resident_bytes(pid: int) -> int:
    """The memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def open_files(pid: int) -> int:
    """Descriptors that a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


async def until(holds: Callable[[], bool], what: Callable[[], Any]) -> None:
    """Return when `holds()`; fail with `what()` when that takes too long."""
    try:
        async with asyncio.timeout(LONG_S):
            while not holds():
                await asyncio.sleep(0.02)
    except TimeoutError:
        pytest.fail(f"never came to hold: {what()}")


class Unharmed:
    """Around what hostile peers do: same processes, gauges and descriptors afterwards."""

    def __init__(self, broker: Broker, growth_bytes_max: int = 3 * GROWTH_BYTES_MAX) -> None:
        self.broker = broker
        self.growth_bytes_max = growth_bytes_max

    async def __aenter__(self) -> Self:
        self.children = self.broker.children()
        self.before = self._kept()
        self.gateway_bytes = resident_bytes(self.children["gateway"])
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            return
        assert self.broker.children() == self.children
        await until(lambda: self._kept() == self.before, lambda: (self.before, self._kept()))
        grown = resident_bytes(self.children["gateway"]) - self.gateway_bytes
        assert grown < self.growth_bytes_max

    def _kept(self) -> dict[str, float]:
        samples = metrics(self.broker)
        kept = {name: samples[name] for name in GAUGES}
        for name, pid in self.children.items():
            kept[f"descriptors of {name}"] = open_files(pid)
        return kept


@pytest.fixture(scope="module")
def broker() -> Iterator[Broker]:
    """A broker that waits neither long for requests nor with much for a worker that is slow."""
    with Broker(with_limits(handshake_timeout_s=5, worker_send_queue_bytes_max=MIB)) as broker:
        yield broker


def address_of(url: str) -> tuple[str, int]:
    host, port = url.split("/")[2].rsplit(":", 1)
    return host, int(port)


def text_frame(text: bytes | str, opcode: Opcode = Opcode.TEXT) -> bytes:
    """A client's frame."""
    payload = text.encode() if isinstance(text, str) else text
    return Frame(opcode, payload).serialize(mask=True)


def join_text(stream: str, group: str, subscription_id: str = "s", kind: str = "join") -> str:
    names = {"subscriptionId": subscription_id, "streamName": stream, "groupId": group}
    return json.dumps({"type": kind, "data": names})


# Bystanders ----------------------------------------------------------------------------------


class Bystanders:
    """A worker that writes and a client that is told, beside the hostile ones."""

    def __init__(self, worker: Worker, client: StreamClient) -> None:
        self.worker = worker
        self.client = client
        self.number = 0

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, broker: Broker) -> Any:
        async with (
            await Worker.open(broker.worker_url) as worker,
            await StreamClient.open(broker.stream_url) as client,
        ):
            await client.join("bystanders", "g")
            yield cls(worker, client)

    async def trip(self) -> float:
        """Seconds until a write was answered and its event came; the next one, no other."""
        self.number += 1
        data = {"id": "i", "n": self.number}
        start = time.perf_counter()
        await result_of(self.worker, "stream::set", item("bystanders", "g", "i", data=data))
        event = await self.client.next(patience_s=LONG_S)
        assert event["event"]["data"] == data
        return time.perf_counter() - start

    async def trips_during(self, flood: Callable[[], None]) -> list[float]:
        """Run `flood`, which blocks, and make one round trip after the other meanwhile."""
        flooding = asyncio.create_task(asyncio.to_thread(flood))
        busy = [await self.trip()]
        while not flooding.done():
            busy.append(await self.trip())
        await flooding
        return [*busy, await self.trip()]

    async def not_disturbed_by(
        self, flood: Callable[[], None], slower_max: float = SLOWER_MAX
    ) -> None:
        """Compare the round trips during `flood` with those before it."""
        for _ in range(TRIPS // 4):
            await self.trip()
        quiet = [await self.trip() for _ in range(TRIPS)]
        busy = await self.trips_during(flood)
        assert median(busy) < slower_max * median(quiet), (median(quiet), median(busy), len(busy))


# Floods --------------------------------------------------------------------------------------


def connect(url: str, receive_bytes: int = 0) -> socket.socket:
    tcp = socket.socket()
    tcp.settimeout(LONG_S)
    if receive_bytes:
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    tcp.connect(address_of(url))
    return tcp


def upgraded(url: str, receive_bytes: int = 0) -> socket.socket:
    """A raw socket after its 101."""
    tcp = connect(url, receive_bytes)
    tcp.sendall(UPGRADE)
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += tcp.recv(1)
    assert head.startswith(b"HTTP/1.1 101 ")
    return tcp


def send_and_read_to_end(tcp: socket.socket, data: bytes) -> bytes:
    """Send `data`, then no more; returns the end of all that came until the peer ended it."""
    last = b""
    with contextlib.suppress(OSError):  # closed already
        tcp.sendall(data)
        tcp.shutdown(socket.SHUT_WR)
    with contextlib.suppress(ConnectionError):
        while data := tcp.recv(64 * KIB):
            last = (last + data)[-KIB:]
    return last


def all_taken(tcp: socket.socket, frames: Iterable[bytes]) -> None:
    """Send `frames` as fast as they are taken, reading what comes, until all were dealt with."""
    data = memoryview(b"".join([*frames, text_frame(b"done", Opcode.PING)]))
    tcp.setblocking(False)
    last, end = b"", time.monotonic() + LONG_S
    while b"\x8a\x04done" not in last:
        assert time.monotonic() < end, "not dealt with"
        idle = True
        if data:
            with contextlib.suppress(BlockingIOError):
                data = data[tcp.send(data) :]
                idle = False
        with contextlib.suppress(BlockingIOError):
            read = tcp.recv(256 * KIB)
            assert read, "closed"
            last = last[-16:] + read
            idle = False
        if idle:
            time.sleep(0.001)


def test_2000_connections_dropped_at_once(broker: Broker, run: Run) -> None:
    starts = [b"", b"G", UPGRADE[:40], UPGRADE, UPGRADE + b"\x81", UPGRADE + text_frame("{}")]

    def flood() -> None:
        for n in range(2000):
            with connect((broker.stream_url, broker.worker_url)[n % 2]) as tcp:
                if n % 3:
                    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                tcp.sendall(starts[n // 2 % len(starts)])

    async def scenario() -> None:
        async with Unharmed(broker), Bystanders.open(broker) as bystanders:
            await bystanders.not_disturbed_by(flood)

    run(scenario())


def test_500_connections_of_garbage(broker: Broker, run: Run) -> None:
    rng = random.Random(500)

    def garbage() -> bytes:
        size = rng.choice([1, 20, 300, 5000, 70_000])
        noise = rng.randbytes(size)
        opcode = rng.choice(list(Opcode))
        return rng.choice(
            [
                noise,
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + noise,  # TLS
                b"GET / HTTP/1.1\r\n" + noise,
                b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * size,
                b"GET /" + b"x" * size + b" HTTP/1.1\r\n\r\n",
                b"POST / HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n" + noise,
                UPGRADE.replace(b"\r\n\r\n", b"\r\nCookie: " + b"x" * size + b"\r\n\r\n"),
                UPGRADE.replace(b"\r\n\r\n", b"\r\n" + noise + b"\r\n\r\n"),
                b"\r\n" * size,
                UPGRADE * 3,
                UPGRADE + noise,
                UPGRADE + text_frame(noise, rng.choice([Opcode.TEXT, Opcode.BINARY])),
                UPGRADE + bytes([rng.randrange(256), rng.randrange(128, 256)]) + noise,
                UPGRADE + text_frame(noise[:125], opcode) * 5 + noise,
            ]
        )

    def flood() -> None:
        for n in range(500):
            with connect((broker.stream_url, broker.worker_url)[n % 2]) as tcp:
                send_and_read_to_end(tcp, garbage())

    async def scenario() -> None:
        async with Unharmed(broker), Bystanders.open(broker) as bystanders:
            await bystanders.not_disturbed_by(flood)

    run(scenario())


def test_a_flood_of_joins_and_leaves(broker: Broker, run: Run) -> None:
    """20,000 from a few clients, as fast as they are taken."""
    clients, messages = 8, 20_000

    def joins_and_leaves(client: int) -> Iterator[bytes]:
        for n in range(messages // clients // 2):
            group = f"{client}-{n}"
            yield text_frame(join_text("flood", group, group if n % 2 else "s"))
            yield text_frame(join_text("flood", group, group if n % 2 else "s", "leave"))

    def flood() -> None:
        with contextlib.ExitStack() as opened:
            for client in range(clients):
                tcp = opened.enter_context(upgraded(broker.stream_url))
                all_taken(tcp, joins_and_leaves(client))

    async def scenario() -> None:
        async with Unharmed(broker), Bystanders.open(broker) as bystanders:
            await bystanders.not_disturbed_by(flood)

    run(scenario())


CLIENT_BAD = [
    "{",
    "[]",
    '{"type":"nope"}',
    '{"type":"join"}',
    '{"type":"join","data":{"subscriptionId":1,"streamName":[],"groupId":{}}}',
    '{"type":"join","data":null}',
    "[" * 2000,
    "\x00",
]
WORKER_BAD = [
    "{",
    "[]",
    '{"type":"nope"}',
    '{"type":"invokefunction"}',
    '{"type":"invokefunction","invocation_id":"i","function_id":"stream::set","data":NaN}',
    '{"type":"invokefunction","invocation_id":"i","function_id":"stream::set","data":{}}',
    '{"type":"invokefunction","invocation_id":"i","function_id":"no such function"}',
    '{"type":"invocationresult","invocation_id":"unknown"}',
    '{"type":"registertrigger","id":"t","trigger_type":"nope","function_id":"f","config":1}',
    '{"type":"registerfunction"}',
    "[" * 2000,
]


@pytest.mark.parametrize("port", ["stream", "worker"])
def test_a_flood_of_bad_messages(broker: Broker, run: Run, port: str) -> None:
    peers, messages = 8, 20_000
    url, bad = (
        (broker.stream_url, CLIENT_BAD) if port == "stream" else (broker.worker_url, WORKER_BAD)
    )
    slower_max = SLOWER_MAX if port == "stream" else SLOWER_MAX_BESIDE_WORKERS
    frames = [text_frame(text) for text in bad]

    def flood() -> None:
        for _ in range(peers):
            with upgraded(url) as tcp:
                all_taken(tcp, (frames[n % len(frames)] for n in range(messages // peers)))

    async def scenario() -> None:
        async with Unharmed(broker), Bystanders.open(broker) as bystanders:
            await bystanders.not_disturbed_by(flood, slower_max)

    run(scenario())


# Memory --------------------------------------------------------------------------------------


def deflated_zeros(size: int) -> bytes:
    """`size` zeros, as permessage-deflate has them."""
    deflate = zlib.compressobj(9, wbits=-15)
    data = deflate.compress(bytes(size)) + deflate.flush(zlib.Z_SYNC_FLUSH)
    return data.removesuffix(b"\x00\x00\xff\xff")


@pytest.mark.parametrize("port", ["stream", "worker"])
def test_case_18_compression(broker: Broker, run: Run, port: str) -> None:
    payload = deflated_zeros(64 * MIB)
    assert len(payload) < 70_000
    first, *rest = text_frame(payload)
    bomb = bytes([first | 0x40, *rest])  # RSV1: compressed
    offer = b"\r\nSec-WebSocket-Extensions: permessage-deflate\r\n\r\n"
    request = UPGRADE.replace(b"\r\n\r\n", offer)

    async def scenario() -> None:
        async with Unharmed(broker, GROWTH_BYTES_MAX), Bystanders.open(broker) as bystanders:
            for _ in range(10):
                url = broker.stream_url if port == "stream" else broker.worker_url
                async with await RawHttp.request(url, request) as http:
                    response = await http.response()
                    assert response.status == 101
                    assert "sec-websocket-extensions" not in response.headers
                    http.writer.write(bomb)
                    assert await http.close_code() in (1002, 1009)
                await bystanders.trip()

    run(scenario())


class Unread(NamedTuple):
    """A peer that sends the same again and again and reads nothing.

    growth_bytes_max: of the gateway, above all what 2,048 answers under way have.
    """

    port: str
    sent: bytes
    growth_bytes_max: int = (1 + 20) * MIB


UNREAD = {
    "pings to the stream port": Unread("stream", text_frame(b"p" * 125, Opcode.PING)),
    "pings to the worker port": Unread("worker", text_frame(b"p" * 125, Opcode.PING)),
    "joins": Unread("stream", text_frame(join_text("unread", "g"))),
    "bad messages": Unread("stream", text_frame('{"type":"' + "x" * 100)),
    "calls": Unread(
        "worker",
        text_frame(
            json.dumps(
                {
                    "type": "invokefunction",
                    "invocation_id": "i",
                    "function_id": "stream::get",
                    "data": item("unread", "g", "i"),
                }
            )
        ),
        3 * 20 * MIB,
    ),
}
UNREAD_SENT_BYTES = 12 * MIB
LOG_LINES_MAX = 100
"""That one peer may cause so."""
TAKEN_S = 1.0
"""After so long without taking a byte the broker has stopped to read."""


@pytest.mark.parametrize("unread", UNREAD.values(), ids=UNREAD)
def test_answers_that_nobody_reads(broker: Broker, run: Run, unread: Unread) -> None:
    """What waits for a peer is bounded: it is cut, or nothing more is read from it."""
    block = unread.sent * (64 * KIB // len(unread.sent))

    def flood(url: str) -> None:
        with upgraded(url, 4 * KIB) as tcp:
            tcp.settimeout(TAKEN_S)
            with contextlib.suppress(ConnectionError, TimeoutError):
                for _ in range(UNREAD_SENT_BYTES // len(block)):
                    tcp.sendall(block)

    async def scenario() -> None:
        async with Bystanders.open(broker) as bystanders:
            data = {"t": "x" * 10 * KIB}
            put = item("unread", "g", "i", data=data)
            await result_of(bystanders.worker, "stream::set", put)
            logged = len(broker.log.splitlines())
            async with Unharmed(broker, unread.growth_bytes_max):
                url = broker.stream_url if unread.port == "stream" else broker.worker_url
                await bystanders.trips_during(lambda: flood(url))
            assert len(broker.log.splitlines()) - logged < LOG_LINES_MAX

    run(scenario())


class Counting(asyncio.Protocol):
    """A client that upgrades, and counts the bytes that come without looking at them."""

    transport: asyncio.Transport
    taken_bytes = 0

    @classmethod
    async def open(cls, url: str) -> Self:
        loop = asyncio.get_running_loop()
        transport, client = await loop.create_connection(cls, *address_of(url))
        client.transport = transport
        return client

    def connection_made(self, transport: Any) -> None:
        transport.write(UPGRADE)

    def data_received(self, data: bytes) -> None:
        self.taken_bytes += len(data)


def test_case_21_slow_consumers_among_many(broker: Broker, run: Run) -> None:
    """20 never read, 50 do: memory stays within the bound of each, the 50 get everything."""
    healthy_count, stalled_count, events, at_once = 50, 20, 1000, 20
    value = {"id": "i", "t": "x" * 10 * KIB}

    earlier = metrics(broker)

    async def scenario(stalled: Sequence[socket.socket]) -> None:
        def joined() -> float:
            return metrics(broker)["broker_subscriptions"] - earlier["broker_subscriptions"]

        def taken() -> list[int]:
            return [client.taken_bytes for client in healthy]

        for tcp in stalled:
            tcp.sendall(text_frame(join_text("s21", "g")))
        healthy = [await Counting.open(broker.stream_url) for _ in range(healthy_count)]
        await until(lambda: min(taken()) > 0, taken)  # the 101
        for client in healthy:
            client.transport.write(text_frame(join_text("s21", "g")))
        await until(lambda: joined() == healthy_count + stalled_count, joined)
        async with (
            await Worker.open(broker.worker_url) as worker,
            await StreamClient.open(broker.stream_url) as looking,
        ):
            await looking.join("s21", "g")
            gateway = broker.children()["gateway"]
            before = resident_bytes(gateway)
            for first in range(0, events, at_once):
                calls = [
                    result_of(worker, "stream::set", item("s21", "g", f"i{n % 20}", data=value))
                    for n in range(first, first + at_once)
                ]
                await asyncio.gather(*calls)
            while len(looking.received) < 1 + events:
                await looking.next(patience_s=LONG_S)
            assert [frame["seq"] for frame in looking.frames] == list(range(events + 1))
            await until(lambda: min(taken()) == max(taken()) > events * 10 * KIB, taken)
            assert resident_bytes(gateway) - before < (stalled_count + 20) * MIB
            name = "broker_clients_behind_total"
            assert metrics(broker)[name] - earlier[name] >= stalled_count
        assert not any(client.transport.is_closing() for client in healthy)
        for client in healthy:
            client.transport.abort()

    with contextlib.ExitStack() as opened:
        sockets = [
            opened.enter_context(upgraded(broker.stream_url, 4 * KIB)) for _ in range(stalled_count)
        ]
        run(scenario(sockets))


# Slow and vanishing peers --------------------------------------------------------------------


RELAY = """
import asyncio, sys

async def pump(reader, writer):
    try:
        while data := await reader.read(4096):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    writer.close()

async def serve(reader, writer):
    far_reader, far_writer = await asyncio.open_connection("127.0.0.1", int(sys.argv[1]))
    await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
"""


class Relay:
    """A process between a peer and the broker: frozen, it is a peer that vanished."""

    def __init__(self, url: str) -> None:
        command = [sys.executable, "-c", RELAY, str(address_of(url)[1])]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
        )

    def __enter__(self) -> Self:
        assert self.process.stdout is not None
        self.url = f"ws://127.0.0.1:{int(self.process.stdout.readline())}"
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)


QUICK_PINGS = with_limits(ping_interval_s=0.5, ping_timeout_s=2)


@pytest.fixture(scope="module")
def pinging_broker() -> Iterator[Broker]:
    """A broker that gives up silent peers quickly."""
    with Broker(QUICK_PINGS) as broker:
        yield broker


def test_case_20_a_client_that_vanished(pinging_broker: Broker, run: Run) -> None:
    """It is cut, its leave is told, and who is idle but alive is not cut."""
    broker = pinging_broker

    async def scenario() -> None:
        async with Unharmed(broker), Bystanders.open(broker) as bystanders:
            worker = bystanders.worker
            await worker.register_function("left", lambda _: None)
            await worker.register_trigger("stream:leave", "left", {"stream_name": "vanished"})
            await worker.barrier()
            dead = 'broker_connections_dead_total{port="stream"}'
            before = metrics(broker)[dead]
            with Relay(broker.stream_url) as relay:
                vanished = await StreamClient.open(relay.url)
                await vanished.join("vanished", "g")
                relay.freeze()
                (asked,) = await worker.asked(1, LONG_S)
                assert asked.data["group_id"] == "g"
                assert metrics(broker)[dead] == before + 1
                relay.thaw()
                assert (await vanished.next(patience_s=LONG_S)).code == 1006
                await vanished.close()
            await bystanders.trip()  # pings alone kept them

    run(scenario())


def test_a_worker_that_vanished(pinging_broker: Broker, run: Run) -> None:
    """Calls in flight to it fail, later ones find no function."""
    broker = pinging_broker

    async def scenario() -> None:
        async with Unharmed(broker), Bystanders.open(broker) as bystanders:
            with Relay(broker.worker_url) as relay:
                vanished = await Worker.open(relay.url)
                asked = asyncio.Event()

                async def never(_: Any) -> None:
                    asked.set()
                    await asyncio.Event().wait()

                await vanished.register_function("vanished", never)
                await vanished.barrier()
                call = asyncio.create_task(
                    bystanders.worker.call("vanished", {}, patience_s=LONG_S)
                )
                await asked.wait()
                relay.freeze()
                assert (await call)["error"]["code"] == "invocation_stopped"
                answer = await bystanders.worker.call("vanished", {})
                assert answer["error"]["code"] == "function_not_found"
                relay.thaw()
                assert isinstance(await vanished.next(patience_s=LONG_S), Closed)
                await vanished.close()
            await bystanders.trip()

    run(scenario())


class SlowReader:
    """A client that reads so many bytes a second, answers pings, and keeps what it read."""

    def __init__(self, url: str, bytes_per_s: int) -> None:
        self.tcp = upgraded(url, 4 * KIB)
        self.bytes_per_s = bytes_per_s
        self.buffer = bytearray()
        self.frames: list[tuple[int, bytes]] = []
        self.pings = 0
        self.ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.tcp.close()

    def send(self, data: bytes) -> None:
        self.tcp.sendall(data)

    def read_for(self, seconds: float, enough: Callable[[], bool] = lambda: False) -> None:
        """Read at the set pace for so long, or until `enough()`, or the end."""
        start, taken, size = time.monotonic(), 0, max(self.bytes_per_s // 50, 1)
        while not self.ended and not enough() and time.monotonic() - start < seconds:
            ahead = start + taken / self.bytes_per_s - time.monotonic()
            if ahead > 0:
                time.sleep(ahead)
            self.tcp.settimeout(0.1)
            try:
                data = self.tcp.recv(min(size, 64 * KIB))
            except TimeoutError:
                continue
            except ConnectionError:
                data = b""
            self.ended = not data
            taken += len(data)
            self._take(data)

    def _take(self, data: bytes) -> None:
        self.buffer += data
        while len(self.buffer) >= 2:
            size, start = self.buffer[1], 2
            if size >= 126:
                start = 4 if size == 126 else 10
                if len(self.buffer) < start:
                    return
                size = int.from_bytes(self.buffer[2:start])
            if len(self.buffer) < start + size:
                return
            opcode, payload = self.buffer[0] & 0x0F, bytes(self.buffer[start : start + size])
            del self.buffer[: start + size]
            if opcode == Opcode.PING:
                self.pings += 1
                with contextlib.suppress(ConnectionError):
                    self.tcp.sendall(text_frame(payload, Opcode.PONG))
            else:
                self.frames.append((opcode, payload))

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(payload) for opcode, payload in self.frames if opcode == Opcode.TEXT]

    @property
    def close_code(self) -> int | None:
        codes = [int.from_bytes(p[:2]) for opcode, p in self.frames if opcode == Opcode.CLOSE]
        return codes[0] if codes else None


async def write_until(
    worker: Worker, stream: str, groups: Sequence[str], done: Callable[[], bool], data: Any
) -> int:
    """Write items of `groups` in turn, 20 at a time, until `done()`; returns the last number."""
    number = 0
    while not done():
        calls = []
        for _ in range(20):
            number += 1
            value = {**data, "id": f"i{number % 5}", "n": number}
            group = groups[number % len(groups)]
            of_item = item(stream, group, value["id"], data=value)
            calls.append(result_of(worker, "stream::set", of_item))
        await asyncio.gather(*calls)
    return number


def state_after(frames: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Item ids to numbers, as the frames of one group tell; each has to go on where one ended."""
    items: dict[str, int] = {}
    seq = -1
    for frame in frames:
        event = frame["event"]
        if event["type"] == "sync":
            assert frame["seq"] >= seq
            items = {value["id"]: value["n"] for value in event["data"]}
        else:
            assert frame["seq"] == seq + 1, (frame["seq"], seq)
            items[frame["id"]] = event["data"]["n"]
        seq = frame["seq"]
    return items


def test_case_22_a_client_that_reads_slowly(pinging_broker: Broker, run: Run) -> None:
    """It is behind for two ping timeouts, stays, and is brought up to date in the end.

    Its answers to pings come late, behind all that it has to read before them. In proportion as
    with 10 KB/s and the timeout of 60 s that is the default.
    """
    broker = pinging_broker
    before = metrics(broker)

    async def scenario() -> None:
        async with await Worker.open(broker.worker_url) as worker:
            with SlowReader(broker.stream_url, 300 * KIB) as reader:
                reader.send(text_frame(join_text("s22", "g")))
                reading = asyncio.create_task(asyncio.to_thread(reader.read_for, 5))
                data = {"t": "x" * 10 * KIB}
                last = await write_until(worker, "s22", ["g"], reading.done, data)
                await reading
                after = metrics(broker)
                behind, standing = "broker_clients_behind_total", "broker_subscriptions"
                assert after[behind] > before[behind]
                assert after[standing] == before[standing] + 1, "cut"
                reader.bytes_per_s = 1000 * MIB

                def converged() -> bool:
                    return b'"n": %d}' % last in reader.frames[-1][1]

                await asyncio.to_thread(reader.read_for, 20, converged)
                expected = {f"i{n % 5}": n for n in range(last - 4, last + 1)}
                assert state_after(reader.events) == expected
                reader.send(text_frame(b"\x03\xe8", Opcode.CLOSE))
                await asyncio.to_thread(reader.read_for, 20)
                assert (reader.ended, reader.close_code) == (True, 1000)

    run(scenario())


def test_case_22_closing_under_backlog(broker: Broker, run: Run) -> None:
    """The closing handshake is completed behind what waits already."""

    async def scenario() -> None:
        async with await Worker.open(broker.worker_url) as worker:
            with SlowReader(broker.stream_url, 1000 * MIB) as reader:
                reader.send(text_frame(join_text("s22b", "g")))
                await asyncio.to_thread(reader.read_for, 20, lambda: bool(reader.frames))
                behind = metrics(broker)["broker_clients_behind_total"]
                data = {"t": "x" * 10 * KIB}

                def is_behind() -> bool:
                    return metrics(broker)["broker_clients_behind_total"] > behind

                await write_until(worker, "s22b", ["g"], is_behind, data)
                reader.send(text_frame(b"\x03\xe8", Opcode.CLOSE))
                await worker.barrier()
                await asyncio.to_thread(reader.read_for, 20)
                assert (reader.ended, reader.close_code) == (True, 1000)
                state_after(reader.events)  # in a row

    run(scenario())


def test_a_large_sync_read_steadily(run: Run) -> None:
    """Who takes something of what waits for it is not stalled, however long it takes."""
    count, size = 48, 256 * KIB

    async def scenario(broker: Broker) -> None:
        async with await Worker.open(broker.worker_url) as worker:
            for n in range(count):
                data = {"id": str(n), "n": n, "t": "x" * size}
                await result_of(worker, "stream::set", item("large", "g", str(n), data=data))
            with SlowReader(broker.stream_url, 3 * MIB) as reader:
                reader.send(text_frame(join_text("large", "g")))
                await asyncio.to_thread(reader.read_for, 20, lambda: bool(reader.frames))
                assert len(state_after(reader.events)) == count
                assert metrics(broker)['broker_connections_stalled_total{port="stream"}'] == 0

    with Broker(with_limits(stalled_timeout_s=1)) as broker:
        run(scenario(broker))


@pytest.mark.parametrize("value_bytes", [100, 10 * KIB], ids=["small", "large"])
def test_case_43_a_client_in_the_background(broker: Broker, run: Run, value_bytes: int) -> None:
    """Frozen while its 5 groups change, then it goes on: each group in order, right at the end."""
    groups = [f"{value_bytes}-{n}" for n in range(5)]

    async def scenario() -> None:
        with Relay(broker.stream_url) as relay:
            async with (
                await Worker.open(broker.worker_url) as worker,
                await StreamClient.open(relay.url) as client,
            ):
                for group in groups:
                    await client.join("s43", group, group)
                relay.freeze()
                left = iter(range(25))
                data = {"t": "x" * value_bytes}
                await write_until(worker, "s43", groups, lambda: next(left, None) is None, data)
                relay.thaw()
                await check_states(worker, client, groups)

    run(scenario())


async def check_states(worker: Worker, client: StreamClient, groups: Sequence[str]) -> None:
    """What the client was told of each group leads to what is stored."""
    for group in groups:
        names = {"stream_name": "s43", "group_id": group}
        stored = {v["id"]: v["n"] for v in await result_of(worker, "stream::list", names)}
        try:
            async with asyncio.timeout(LONG_S):
                while of_group(client, group) != stored:
                    await client.next(patience_s=LONG_S)
        except (TimeoutError, AssertionError):
            assert of_group(client, group) == stored


def of_group(client: StreamClient, group: str) -> dict[str, int]:
    return state_after(frame for frame in client.frames if frame["groupId"] == group)


def test_case_43_too_long_in_the_background(pinging_broker: Broker, run: Run) -> None:
    """It is closed, and resumes with what it knows."""
    broker, groups = pinging_broker, [f"long-{n}" for n in range(5)]

    def subscriptions() -> float:
        return metrics(broker)["broker_subscriptions"]

    async def scenario() -> None:
        async with await Worker.open(broker.worker_url) as worker:
            with Relay(broker.stream_url) as relay:
                client = await StreamClient.open(relay.url)
                for group in groups:
                    await client.join("s43", group, group)
                    data = {"id": "first", "n": 0}
                    await result_of(worker, "stream::set", item("s43", group, "first", data=data))
                    await client.next()
                before = subscriptions()
                relay.freeze()
                left = iter(range(25))
                await write_until(worker, "s43", groups, lambda: next(left, None) is None, {})
                await until(lambda: subscriptions() == before - 5, subscriptions)
                relay.thaw()
                closed = await client.next(lambda f: isinstance(f, Closed), LONG_S)
                assert closed.code in (1006, 4408)
                await client.close()
            known = {frame["groupId"]: frame for frame in client.frames}
            syncs = {f["groupId"]: f for f in client.frames if f["event"]["type"] == "sync"}
            async with await StreamClient.open(broker.stream_url) as again:
                for group in groups:
                    position = {"since": known[group]["seq"], "epoch": syncs[group]["epoch"]}
                    await again.send_join("s43", group, group, **position)
                again.received[:0] = client.frames  # what it knew, the new frames go on from
                for group in groups:
                    await resumed(worker, again, group)

    run(scenario())


async def resumed(worker: Worker, client: StreamClient, group: str) -> None:
    """Events go on where the client was."""
    names = {"stream_name": "s43", "group_id": group}
    stored = {v["id"]: v["n"] for v in await result_of(worker, "stream::list", names)}

    def frames(*types: str) -> list[dict[str, Any]]:
        of_group = (frame for frame in client.frames if frame["groupId"] == group)
        return [frame for frame in of_group if frame["event"]["type"] in types]

    while state_after(frames("sync", "create", "update")) != stored:
        await client.next(patience_s=LONG_S)
    assert len(frames("sync")) == len(frames("resume")) == 1
