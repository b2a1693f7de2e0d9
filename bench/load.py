"""The generator where there is no C compiler: pipelined sets from raw sockets with prepared frames.

`python -m bench.load --worker-port PORT …` takes those options of `bench/c` that it can do and
prints the same JSON; exit code 3 says that it can't do what is asked.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
import uuid
from collections import deque
from functools import partial
from typing import Any, NoReturn, cast

import uvloop

from bench.broker import cpu_seconds

MASK = b"\0\0\0\0"  # masking with zeros leaves the payload as it is
CALLS_PREPARED = 2000


def masked_text_frame(payload: bytes) -> bytes:
    """A client's text frame."""
    size = len(payload)
    if size < 126:
        return b"\x81" + bytes([0x80 | size]) + MASK + payload
    return b"\x81\xfe" + size.to_bytes(2, "big") + MASK + payload


def set_call(number: int, options: argparse.Namespace) -> bytes:
    """A `stream::set` of an item of one of the groups."""
    value = json.dumps({"x": "x" * (options.value_bytes - 8)}, separators=(",", ":"))
    data = (
        b'{"stream_name":"bench-000000","group_id":"group-%08d","item_id":"item-%08d","data":%b}'
        % (
            number % options.groups,
            number // options.groups % options.items,
            value.encode(),
        )
    )
    return masked_text_frame(
        b'{"type":"invokefunction","invocation_id":"%b","function_id":"stream::set","data":%b}'
        % (str(uuid.uuid4()).encode(), data)
    )


class Connection(asyncio.Protocol):
    """Keeps `in_flight` calls under way; counts answers and notes how long each took.

    Answers are only counted: calls of one connection go to several shards, so an answer is taken
    to be that of the oldest call, which is exact with one in flight.
    """

    def __init__(self, calls: list[bytes], in_flight: int) -> None:
        self._calls = calls
        self._in_flight = in_flight
        self._next = 0
        self._buffer = b""
        self._upgraded = False
        self._sent: deque[float] = deque()
        self.answers = 0
        self.latencies: list[float] = []
        self.stopped = False

    @property
    def unanswered(self) -> int:
        """Calls that are under way."""
        return len(self._sent)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(
            b"GET / HTTP/1.1\r\nHost: bench\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data
        if not self._upgraded:
            end = buffer.find(b"\r\n\r\n")
            if end < 0:
                self._buffer = buffer
                return
            assert buffer.startswith(b"HTTP/1.1 101"), buffer
            self._upgraded = True
            buffer = buffer[end + 4 :]
            self._send(self._in_flight)
        position, size = 0, len(buffer)
        answered = 0
        while size - position >= 2:
            length, head = buffer[position + 1], 2
            if length == 126:
                if size - position < 4:
                    break
                length, head = int.from_bytes(buffer[position + 2 : position + 4], "big"), 4
            if size - position < head + length:
                break
            if (
                buffer[position] == 0x81
                and b'"invocationresult"' in buffer[position + head : position + head + 40]
            ):
                assert b'"error"' not in buffer[position : position + head + length], buffer
                answered += 1
            position += head + length
        self._buffer = buffer[position:]
        if answered:
            now = time.perf_counter()
            for _ in range(answered):
                self.latencies.append(now - self._sent.popleft())
            self.answers += answered
            if not self.stopped:
                self._send(answered)

    def _send(self, count: int) -> None:
        now = time.perf_counter()
        frames = []
        for _ in range(count):
            frames.append(self._calls[self._next % len(self._calls)])
            self._next += 1
            self._sent.append(now)
        self._transport.write(b"".join(frames))


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """Load the broker; what came of it."""
    loop = asyncio.get_running_loop()
    connections = []
    for k in range(options.writers):
        first = k * CALLS_PREPARED
        calls = [set_call(n, options) for n in range(first, first + CALLS_PREPARED)]
        _, connection = await loop.create_connection(
            partial(Connection, calls, options.in_flight),
            "127.0.0.1",
            options.worker_port,
        )
        connections.append(connection)
    await asyncio.sleep(options.warm_up)
    pids = [int(pid) for pid in options.watch.split(",") if pid]
    before = {pid: cpu_seconds(pid) for pid in pids}
    cpu, started = time.process_time(), time.perf_counter()
    answers_before = sum(c.answers for c in connections)
    for connection in connections:
        connection.latencies.clear()
    await asyncio.sleep(options.seconds)
    took = time.perf_counter() - started
    cpu_s = {str(pid): cpu_seconds(pid) - before[pid] for pid in pids}
    own_cpu_s = time.process_time() - cpu
    latencies = sorted(x for c in connections for x in c.latencies)
    answers = sum(c.answers for c in connections) - answers_before
    for connection in connections:
        connection.stopped = True
    end = loop.time() + 10
    while (unanswered := sum(c.unanswered for c in connections)) and loop.time() < end:
        await asyncio.sleep(0.01)
    percentiles = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}
    return {
        "seconds": took,
        "generator_cpu_s": own_cpu_s,
        "calls": answers,
        "calls_per_s": answers / took,
        **{
            f"call_{name}_ms": latencies[int(len(latencies) * part)] * 1000
            for name, part in percentiles.items()
        },
        "errors": 0,
        "unanswered": unanswered,
        "cpu_s": cpu_s,
    }


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"needs a C compiler: {message}", file=sys.stderr)
        raise SystemExit(3)


def main() -> None:
    parser = _Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--worker-port", type=int, required=True)
    parser.add_argument("--stream-port", type=int)
    parser.add_argument("--writers", type=int, required=True)
    parser.add_argument("--in-flight", type=int, default=1)
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--value-bytes", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--warm-up", type=float, default=1)
    parser.add_argument("--watch", default="")
    print(json.dumps(uvloop.run(run(parser.parse_args()))), flush=True)


if __name__ == "__main__":
    main()
