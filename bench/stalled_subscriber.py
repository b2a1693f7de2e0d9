"""What one subscriber that stops reading costs the others: `python -m bench.stalled_subscriber`.

A thousand clients join one group; events come at a steady rate. Runs with and without one more
client that joined and reads nothing are made in turn, so that both meet the same machine. Prints
latency from the call to the last byte at a client (percentiles over a sample of the clients) and
what the gateway's memory grew by, and writes `bench/results/stalled_subscriber.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import statistics
import sys
import time
from functools import partial
from typing import cast

import uvloop

from bench.broker import resident_kib, running
from bench.load import masked_text_frame
from bench.results import RESULTS

UPGRADE = (
    b"GET %b HTTP/1.1\r\nHost: bench\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
PATH = b"/stream/bench/group/"
SAMPLE = 50
"""Every so many clients notes when events came."""


class Subscriber(asyncio.Protocol):
    """Counts bytes; `arrived` is told with each piece that a sampled one gets."""

    def __init__(self, sample: Sample | None) -> None:
        self.sample = sample
        self.received = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(UPGRADE % PATH)

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        if self.sample is not None:
            self.sample.take(data)


class Sample:
    """When events came at some clients: each holds the time of its call, in nanoseconds."""

    def __init__(self) -> None:
        self.latencies_ms: list[float] = []

    def take(self, data: bytes) -> None:
        now = time.perf_counter_ns()
        for part in data.split(b'"at":')[1:]:
            sent = int(part[: part.index(b",")])
            self.latencies_ms.append((now - sent) / 1e6)


class Writer(asyncio.Protocol):
    """A worker that sets an item; answers are not looked at."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(UPGRADE % b"/")

    def set(self, number: int) -> None:
        payload = (
            b'{"type":"invokefunction","function_id":"stream::set","action":{"type":"void"},"data":'
            b'{"stream_name":"bench","group_id":"group","item_id":"item-%d","data":'
            b'{"at":%d,"x":"%b"}}}' % (number % 100, time.perf_counter_ns(), b"x" * 1000)
        )
        self.transport.write(masked_text_frame(payload))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=10, help="of each run")
    parser.add_argument("--per-second", type=int, default=20, help="events")
    parser.add_argument("--runs", type=int, default=3, help="of each kind, in turn")
    options = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {"none stalled": [], "one stalled": []}
    for number in range(options.runs):
        for kind, runs in found.items():
            runs.append(measure(options, stalled=kind == "one stalled"))
            print(f"run {number + 1} of {options.runs}, {kind}", file=sys.stderr)
    rows = [
        {"scenario": kind} | {k: statistics.median(r[k] for r in runs) for k in runs[0]}
        for kind, runs in found.items()
    ]
    print(f"{'':<13} {'p50 ms':>8} {'p99 ms':>8} {'deliveries':>11} {'gateway grew by KiB':>20}")
    for row in rows:
        print(
            f"{row['scenario']:<13} {row['p50_ms']:>8.2f} {row['p99_ms']:>8.2f}"
            f" {row['deliveries']:>11,.0f} {row['grew_kib']:>20,.0f}"
        )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "stalled_subscriber.json").write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def measure(options: argparse.Namespace, *, stalled: bool) -> dict[str, float]:
    """One run against a broker of its own."""
    with running("in_memory") as broker:
        gateway = next(pid for pid, role in broker.roles.items() if role == "gateway")
        return uvloop.run(run(options, broker.stream_port, broker.worker_port, gateway, stalled))


async def run(
    options: argparse.Namespace, port: int, worker_port: int, gateway: int, stalled: bool
) -> dict[str, float]:
    loop = asyncio.get_running_loop()
    sample = Sample()
    clients = []
    for number in range(options.clients):
        client = Subscriber(sample if number % SAMPLE == 0 else None)
        await loop.create_connection(partial(_same, client), "127.0.0.1", port)
        clients.append(client)
    sleeper = stalled_client(port) if stalled else None
    _, writer = await loop.create_connection(Writer, "127.0.0.1", worker_port)
    await asyncio.sleep(1)
    before, memory = sum(c.received for c in clients), resident_kib(gateway)
    sample.latencies_ms.clear()
    end = loop.time() + options.seconds
    number = 0
    while loop.time() < end:
        writer.set(number)
        number += 1
        await asyncio.sleep(1 / options.per_second)
    await asyncio.sleep(1)
    latencies = sorted(sample.latencies_ms)
    if sleeper is not None:
        sleeper.close()
    size = (sum(c.received for c in clients) - before) / options.clients / number
    return {
        "p50_ms": latencies[len(latencies) // 2],
        "p99_ms": latencies[len(latencies) * 99 // 100],
        "deliveries": len(latencies) * SAMPLE,
        "frame_bytes": size,
        "grew_kib": resident_kib(gateway) - memory,
    }


def _same(client: Subscriber) -> Subscriber:
    return client


def stalled_client(port: int) -> socket.socket:
    """A client that has joined and will never read."""
    client = socket.create_connection(("127.0.0.1", port))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.sendall(UPGRADE % PATH)
    return client


if __name__ == "__main__":
    raise SystemExit(main())
