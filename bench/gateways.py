"""What further gateways do for fan-out, by processor time: `python -m bench.gateways`.

Clients join one group, spread over the gateways by the system; events are written with several in
flight. With one gateway all deliveries are its work; with several each does its share, and what
bounds the broker is the busiest. Prints for each number of gateways the processor time of all of
them, of the busiest, and of all shards, in seconds for a million deliveries; runs of each number
are made in turn. Writes `bench/results/gateways.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from functools import partial
from typing import cast

import uvloop

from bench.broker import Running, cpu_seconds, running
from bench.load import masked_text_frame
from bench.results import RESULTS
from bench.stalled_subscriber import PATH, UPGRADE

CALL = (
    b'{"type":"invokefunction","invocation_id":"%d","function_id":"stream::set","data":'
    b'{"stream_name":"bench","group_id":"group","item_id":"item-%d","data":"%b"}}'
)


class Subscriber(asyncio.Protocol):
    """Joined; takes whatever comes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(UPGRADE % PATH)


class Writer(asyncio.Protocol):
    """A worker that keeps some writes in flight until it has made `count`."""

    def __init__(self, count: int, in_flight: int) -> None:
        self.done = asyncio.Event()
        self._left, self._in_flight = count, in_flight
        self._answers = count

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(UPGRADE % b"/")

    def begin(self) -> None:
        for _ in range(self._in_flight):
            self._write()

    def data_received(self, data: bytes) -> None:
        for _ in range(data.count(b'"invocationresult"')):
            self._answers -= 1
            self._write()
        if not self._answers:
            self.done.set()

    def _write(self) -> None:
        if self._left:
            self._left -= 1
            payload = CALL % (self._left, self._left % 100, b"x" * 126)
            self.transport.write(masked_text_frame(payload))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gateways", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--events", type=int, default=3000, help="of each run")
    parser.add_argument("--in-flight", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3, help="of each number, in turn")
    options = parser.parse_args()
    found: dict[int, list[dict[str, float]]] = {count: [] for count in options.gateways}
    for number in range(options.runs):
        for count, runs in found.items():
            with running("in_memory", settings={"gateways": count}) as broker:
                runs.append(uvloop.run(run(options, broker)))
            print(f"run {number + 1} of {options.runs}, gateways: {count}", file=sys.stderr)
    rows = [
        {"gateways": count} | {k: statistics.median(r[k] for r in runs) for k in runs[0]}
        for count, runs in found.items()
    ]
    print(f"{'gateways':>8} {'all':>8} {'busiest':>8} {'shards':>8}   CPU s per 1 M deliveries")
    for row in rows:
        figures = (row[key] for key in ("all_s", "busiest_s", "shards_s"))
        print(f"{row['gateways']:>8.0f} " + " ".join(f"{figure:>8.3f}" for figure in figures))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "gateways.json").write_text(json.dumps(rows, indent=1) + "\n")
    return 0


async def run(options: argparse.Namespace, broker: Running) -> dict[str, float]:
    loop = asyncio.get_running_loop()
    for _ in range(options.clients):
        await loop.create_connection(Subscriber, "127.0.0.1", broker.stream_port)
    writer = Writer(options.events, options.in_flight)
    await loop.create_connection(partial(_same, writer), "127.0.0.1", broker.worker_port)
    await asyncio.sleep(1)
    before = {pid: cpu_seconds(pid) for pid in broker.roles}
    writer.begin()
    await writer.done.wait()
    await asyncio.sleep(1)  # what was written last is delivered
    used = {pid: cpu_seconds(pid) - before[pid] for pid in broker.roles}
    gateways = [used[pid] for pid, role in broker.roles.items() if role == "gateway"]
    millions = options.events * options.clients / 1e6
    return {
        "all_s": sum(gateways) / millions,
        "busiest_s": max(gateways) / millions,
        "shards_s": (sum(used.values()) - sum(gateways)) / millions,
    }


def _same(writer: Writer) -> Writer:
    return writer


if __name__ == "__main__":
    raise SystemExit(main())
