"""What counting costs: `python -m bench.metrics_cost`.

Two brokers run side by side: one as it is, and one that counts nothing
(`bench.without_counting`). They get the same calls in turn, a slice each, so that what else the
machine does meets both alike. Compared is what a call takes of the CPU, on gateway and shards
together, in the tenth of the slices that was disturbed least. Two processes of the same program
differ by some percent from start to start: so there are rounds with new ones. What scraping takes
comes on top.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import uvloop

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
SHARDS, GROUPS, ITEMS, CONNECTIONS, IN_FLIGHT = 2, 16, 1000, 4, 32
VALUE = json.dumps({"text": "x" * 117})
SCRAPES = 20
HEAD = (
    b"Host: bench\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12, help="each with brokers of its own")
    parser.add_argument("--pairs", type=int, default=30, help="of slices in a round")
    parser.add_argument("--calls", type=int, default=3_000, help="of a slice")
    parser.add_argument("--store", choices=("in_memory", "file_based"), default="in_memory")
    parser.add_argument("--subscribers", type=int, default=2, help="of each group")
    parser.add_argument("--same", action="store_true", help="compare alike, to see the noise")
    options = parser.parse_args()
    rounds = [round_of(options, swapped=bool(n % 2)) for n in range(options.rounds)]
    # The broker that is started first is a little slower, whichever it is: two rounds make a cost.
    costs = [
        (math.sqrt(a["counting_us"] / a["without_us"] * b["counting_us"] / b["without_us"]) - 1)
        * 100
        for a, b in zip(rounds[::2], rounds[1::2], strict=True)
    ]
    low, middle, high = statistics.quantiles(costs, n=4)
    counting, without = (
        statistics.median(found[key] for found in rounds) for key in ("counting_us", "without_us")
    )
    scrapes = [min(found["scrape_ms"][k] for found in rounds) for k in range(1 + SHARDS)]
    print(f"{counting:.2f} µs of CPU a call, without counting {without:.2f}: {middle:+.1f} %")
    print(f"half of the pairs of rounds lie between {low:+.1f} and {high:+.1f} %")
    shares = ", ".join(f"{ms / 10:.2f}" for ms in scrapes)
    print(f"scraping every second: {shares} % of a core, of the gateway and each shard")
    result = {
        "options": vars(options),
        "counting_us": counting,
        "without_us": without,
        "cost_percent": [round(cost, 2) for cost in costs],
        "scrape_ms": scrapes,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "metrics_cost.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


def round_of(options: argparse.Namespace, *, swapped: bool) -> dict[str, Any]:
    """One round with brokers of its own; `swapped`: the one that counts is started last."""
    with (
        running(options.store, counts=not swapped or options.same) as first,
        running(options.store, counts=swapped or options.same) as second,
    ):
        found = uvloop.run(compare(first, second, options))
    if swapped:
        found["first_us"], found["second_us"] = found["second_us"], found["first_us"]
    return {"counting_us": found["first_us"], "without_us": found["second_us"], **found}


class Running:
    """A broker. `pids` and `metrics_ports` are those of its processes but the supervisor, the
    gateway's first."""

    def __init__(self, ports: list[int], pids: list[int]) -> None:
        self.stream_port, self.worker_port, *self.metrics_ports = ports
        self.pids = pids

    def cpu_seconds(self) -> float:
        """Of gateway and shards, to the nanosecond."""
        return sum(map(_threads_ns, self.pids)) / 1e9


def _threads_ns(pid: int) -> int:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)


@contextmanager
def running(store: str, *, counts: bool) -> Iterator[Running]:
    """`broker serve` on free ports, in a folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    paths = [str(REPOSITORY)]
    if not counts:
        hook = "from bench.without_counting import install\ninstall()\n"
        (folder / "sitecustomize.py").write_text(hook)
        paths.insert(0, str(folder))
    adapter = {"name": "kv", "config": {"store_method": store}}
    module = {"name": "iii-stream", "config": {"adapter": adapter}}
    (folder / "broker.yaml").write_text(json.dumps({"workers": [module]}))
    ports = free_ports(3 + SHARDS)
    command = [sys.executable, "-m", "broker", "serve", "--config", str(folder / "broker.yaml")]
    command += ["--data-dir", str(folder / "data"), "--shards", str(SHARDS), "--host", "127.0.0.1"]
    command += ["--port", str(ports[0]), "--worker-port", str(ports[1])]
    command += ["--metrics-port", str(ports[2]), "--log-level", "error"]
    broker = subprocess.Popen(
        command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    )
    try:
        assert broker.stdout is not None
        ready = broker.stdout.readline()
        assert ready.startswith(b"ready "), ready
        children = Path(f"/proc/{broker.pid}/task/{broker.pid}/children").read_text().split()
        yield Running(ports, _in_order(map(int, children)))
    finally:
        broker.terminate()
        broker.wait(30)
        shutil.rmtree(folder)


def _in_order(pids: Iterable[int]) -> list[int]:
    """Of the gateway, then of the shards as they are numbered."""
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in pids}
    return sorted(commands, key=lambda pid: ("-m gateway" not in commands[pid], commands[pid]))


def free_ports(count: int) -> list[int]:
    """As many in a row, below those that systems give to outgoing connections: shards' metrics
    ports follow the gateway's."""
    while True:
        first = random.randrange(10_000, 32_000)
        ports = range(first, first + count)
        if not any(_answers(port) for port in ports):
            return list(ports)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Caller(asyncio.Protocol):
    """A worker's connection. `make` calls; frames that come are counted, not read."""

    def __init__(self, number: int) -> None:
        self._calls = [_call(number, k) for k in range(ITEMS)]
        self._next = self._left = self._under_way = 0
        self._buffer = b""
        self._done: asyncio.Future[None] | None = None
        self._upgraded = False
        self.greeted = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(b"GET / HTTP/1.1\r\n" + HEAD)

    async def make(self, count: int) -> None:
        """So many calls, `IN_FLIGHT` at a time."""
        self._left, self._done = count, asyncio.get_running_loop().create_future()
        self._send(min(IN_FLIGHT, count))
        await self._done

    def _send(self, count: int) -> None:
        frames = [self._calls[(self._next + k) % ITEMS] for k in range(count)]
        self._next, self._left = self._next + count, self._left - count
        self._under_way += count
        self._transport.write(b"".join(frames))

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data
        if not self._upgraded:
            head, end, buffer = buffer.partition(b"\r\n\r\n")
            if not end:
                self._buffer = head
                return
            assert head.startswith(b"HTTP/1.1 101"), head
            self._upgraded = True
        position, size, answers = 0, len(buffer), 0
        while size - position >= 4:
            length, head_bytes = buffer[position + 1], 2
            if length == 126:
                length, head_bytes = int.from_bytes(buffer[position + 2 : position + 4]), 4
            if size - position < head_bytes + length:
                break
            position += head_bytes + length
            answers += 1
        self._buffer = buffer[position:]
        if answers and not self.greeted.done():
            self.greeted.set_result(None)
            answers -= 1
        if self._done is None:
            return
        self._under_way -= answers
        if more := min(answers, self._left):
            self._send(more)
        if not self._under_way and not self._done.done():
            self._done.set_result(None)


def _call(number: int, k: int) -> bytes:
    fields = {"stream_name": "bench", "group_id": f"group-{(number + k) % GROUPS}"}
    data = json.dumps(fields | {"item_id": f"item-{k}"})[:-1] + f', "data": {VALUE}}}'
    message = '{"type":"invokefunction","function_id":"stream::set","invocation_id":"%08d-%d"'
    text = (message % (k, number) + f',"data":{data}}}').encode()
    return b"\x81\xfe" + len(text).to_bytes(2, "big") + bytes(4) + text  # masked with zeros


class Subscriber(asyncio.Protocol):
    """A client that reads and forgets."""

    def __init__(self, group: int) -> None:
        self._group = group

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        request = f"GET /stream/bench/group-{self._group}/ HTTP/1.1\r\n".encode()
        cast(asyncio.Transport, transport).write(request + HEAD)


async def compare(one: Running, other: Running, options: argparse.Namespace) -> dict[str, Any]:
    """Slices in turn, then the scrapes."""
    loop = asyncio.get_running_loop()
    callers: dict[Running, list[Caller]] = {}
    for broker in (one, other):
        for k in range(GROUPS * options.subscribers):
            make = partial(Subscriber, k % GROUPS)
            await loop.create_connection(make, "127.0.0.1", broker.stream_port)
        made = [
            await loop.create_connection(
                lambda number=number: Caller(number), "127.0.0.1", broker.worker_port
            )
            for number in range(CONNECTIONS)
        ]
        callers[broker] = [caller for _, caller in made]
        await asyncio.gather(*(caller.greeted for caller in callers[broker]))
    share = options.calls // CONNECTIONS

    async def slice_of(broker: Running) -> float:
        """Microseconds of CPU a call."""
        before = broker.cpu_seconds()
        await asyncio.gather(*(caller.make(share) for caller in callers[broker]))
        return (broker.cpu_seconds() - before) / (share * CONNECTIONS) * 1e6

    for broker in (one, other):
        await slice_of(broker)  # warms up
    pairs = []
    for n in range(options.pairs):
        order = (one, other) if n % 2 else (other, one)
        took = {broker: await slice_of(broker) for broker in order}
        pairs.append((took[one], took[other]))
    # What others do on the machine only ever adds: the quickest tenth is the least disturbed.
    first, second = (statistics.quantiles(took, n=10)[0] for took in zip(*pairs, strict=True))
    return {"first_us": first, "second_us": second, "scrape_ms": await scrape_ms(one)}


async def scrape_ms(broker: Running) -> list[float]:
    """CPU of one scrape of each process, the least disturbed of some."""
    found = []
    for port, pid in zip(broker.metrics_ports, broker.pids, strict=True):
        took = []
        for _ in range(SCRAPES):
            before = _threads_ns(pid)
            await asyncio.to_thread(_fetch, port)
            took.append((_threads_ns(pid) - before) / 1e6)
        found.append(round(min(took), 2))
    return found


def _fetch(port: int) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert b"broker_" in answer.read()


if __name__ == "__main__":
    raise SystemExit(main())
