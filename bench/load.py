"""A load generator for the worker port: raw sockets and prepared frames, so that it is never the
bottleneck. Run as a process of its own: `python -m bench.load HOST PORT ...`; prints JSON."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
import uuid
from collections import deque
from typing import cast

import uvloop

MASK = b"\0\0\0\0"  # masking with zeros leaves the payload as it is


def masked_text_frame(payload: bytes) -> bytes:
    """A client's text frame."""
    size = len(payload)
    if size < 126:
        return b"\x81" + bytes([0x80 | size]) + MASK + payload
    return b"\x81\xfe" + size.to_bytes(2, "big") + MASK + payload


def set_call(connection: int, number: int, value: bytes) -> bytes:
    """A `stream::set`; 1,000 items in 16 groups."""
    return masked_text_frame(
        b'{"type":"invokefunction","invocation_id":"%b","function_id":"stream::set","data":'
        b'{"stream_name":"bench","group_id":"group-%d","item_id":"item-%d","data":%b}}'
        % (str(uuid.uuid4()).encode(), (connection * 7 + number) % 16, number % 1000, value)
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


async def run(options: argparse.Namespace) -> dict[str, float]:
    """Load the broker; what came of it."""
    loop = asyncio.get_running_loop()
    value = json.dumps({"text": "x" * (options.value_bytes - 11)}).encode()
    connections = []
    for k in range(options.connections):
        calls = [set_call(k, n, value) for n in range(2000)]
        _, connection = await loop.create_connection(
            lambda calls=calls: Connection(calls, options.in_flight), options.host, options.port
        )
        connections.append(connection)
    await asyncio.sleep(options.warm_up)
    cpu, started = time.process_time(), time.perf_counter()
    before = sum(c.answers for c in connections)
    for connection in connections:
        connection.latencies.clear()
    await asyncio.sleep(options.seconds)
    took = time.perf_counter() - started
    latencies = sorted(x for c in connections for x in c.latencies)
    answers = sum(c.answers for c in connections) - before
    return {
        "calls_per_s": answers / took,
        "p50_ms": latencies[len(latencies) // 2] * 1000,
        "p99_ms": latencies[len(latencies) * 99 // 100] * 1000,
        "generator_cpu": (time.process_time() - cpu) / took,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--in-flight", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--warm-up", type=float, default=1)
    parser.add_argument("--value-bytes", type=int, default=128)
    print(json.dumps(uvloop.run(run(parser.parse_args()))), flush=True)
    os._exit(0)  # calls are under way: nobody waits for them


if __name__ == "__main__":
    main()
