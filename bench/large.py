"""More data than memory: a group of a million items, a data set several times the cache, ten
thousand streams, and a thousand of them written at once beside one.

`python -m bench.large [--items N] [--streams N] [--written N]`; prints as it goes.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from tests.support.broker import Broker
from tests.support.calls import item, result_of
from tests.support.stream_client import StreamClient
from tests.support.worker import Worker

PATIENCE_S = 600.0
CACHE_MIB = 16
CONFIG = f"""
broker:
  limits: {{group_cache_bytes_max: {CACHE_MIB * 2**20}}}
"""
SHARDS = 2


def memory_mib(broker: Broker, what: str = "VmRSS") -> dict[str, float]:
    """Resident memory of each process, or with VmHWM the most that it ever was."""
    found = {}
    for name, pid in sorted(broker.children().items()):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(what):
                found[name] = round(int(line.split()[1]) / 1024)
    return found


def descriptors(broker: Broker) -> dict[str, int]:
    """Open descriptors of each process."""
    return {
        name: len(os.listdir(f"/proc/{pid}/fd")) for name, pid in sorted(broker.children().items())
    }


def metric(broker: Broker, name: str) -> list[float]:
    """A gauge of all shards."""
    values = []
    host, port = broker.metrics_url.split("/")[2].rsplit(":", 1)
    for shard in range(SHARDS):
        url = f"http://{host}:{int(port) + 1 + shard}/metrics"
        with urllib.request.urlopen(url, timeout=30) as response:
            for line in response.read().decode().splitlines():
                if line.startswith(f"broker_{name}{{"):
                    values.append(float(line.split()[-1]))
    return values


@contextmanager
def timed(what: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    say(f"{what}: {time.monotonic() - began:.2f} s")


def say(text: str) -> None:
    print(text, flush=True)


async def write_all(worker: Worker, entries: Iterable[tuple[str, str, str, Any]]) -> int:
    """Set all, without waiting for each; how many."""
    count, last = 0, None
    for stream, group, item_id, value in entries:
        last = item(stream, group, item_id, data=value)
        await worker.void("stream::set", last)
        count += 1
    assert last is not None
    await result_of_long(worker, "stream::get", {k: v for k, v in last.items() if k != "data"})
    return count


async def result_of_long(worker: Worker, function_id: str, data: Any) -> Any:
    answer = await worker.call(function_id, data, PATIENCE_S)
    return answer.get("result", answer)


async def start_seconds(broker: Broker) -> float:
    """A restart's second half."""
    await asyncio.to_thread(broker.stop)
    began = time.monotonic()
    await asyncio.to_thread(broker.start)
    return time.monotonic() - began


async def big_group(items: int) -> None:
    say(f"a group of {items:,} items, cache {CACHE_MIB} MiB a shard")
    with Broker(CONFIG, SHARDS) as broker:
        say(f"  start without data: {await start_seconds(broker):.2f} s")
        worker = await Worker.open(broker.worker_url)
        before = memory_mib(broker)
        with timed("  written"):
            await write_all(worker, (("s", "g", f"i{n}", {"n": n}) for n in range(items)))
        say(f"  MiB before: {before}, after: {memory_mib(broker)}")
        say(f"  cache_bytes {metric(broker, 'cache_bytes')}")
        with timed("  1,000 gets, one at a time"):
            for n in range(0, items, items // 1000):
                found = await result_of(worker, "stream::get", item("s", "g", f"i{n}"))
                assert found == {"n": n}
        group = {"stream_name": "s", "group_id": "g"}
        async with watched(broker):
            for function_id in ("stream::list", "broker::items"):
                with timed(f"  {function_id}"):
                    listed = await result_of_long(worker, function_id, group)
                say(f"    got {len(listed) if isinstance(listed, list) else listed}")
            async with await StreamClient.open(broker.stream_url) as client:
                with timed("  sync"):
                    await client.send_join("s", "g")
                    frame = await client.next(patience_s=PATIENCE_S)
                event = frame["event"]
                say(f"    got {event['type']} of {len(event.get('data', ''))}")
        say(f"  most MiB ever: {memory_mib(broker, 'VmHWM')}, now {memory_mib(broker)}")
        await worker.close()
        say(f"  start with it: {await start_seconds(broker):.2f} s, MiB {memory_mib(broker)}")


@asynccontextmanager
async def watched(broker: Broker) -> AsyncIterator[None]:
    """Says how long another worker's calls took at most meanwhile; a process of its own, as this
    one is busy with the answers."""
    watcher = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.large", "--watch", broker.worker_url),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert watcher.stdout is not None
    await watcher.stdout.readline()
    yield
    told, _ = await watcher.communicate(b"")
    say(f"  the longest wait of another worker's get meanwhile: {told.decode().strip()} s")


async def watch(url: str) -> None:
    """Print the longest wait when standard input ends."""
    longest, worker = 0.0, await Worker.open(url)
    ended = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    say("watching")
    while not ended.done():
        began = time.monotonic()
        await result_of_long(worker, "stream::get", item("other", "g", "i"))
        longest = max(longest, time.monotonic() - began)
        await asyncio.sleep(0.01)
    say(f"{longest:.2f}")


async def big_data(factor: int) -> None:
    mib = CACHE_MIB * SHARDS * factor
    groups, size = mib * 8, 1024
    say(f"{mib} MiB in {groups:,} groups, {factor} times the cache of both shards")
    value = {"x": "x" * (size - 10)}
    with Broker(CONFIG, SHARDS) as broker:
        worker = await Worker.open(broker.worker_url)
        before = memory_mib(broker)
        names = itertools.product(range(groups), range(128))
        with timed("  written"):
            await write_all(worker, (("s", f"g{g}", f"i{n}", value) for g, n in names))
        with timed("  500 groups listed"):
            for n in range(0, groups, max(1, groups // 500)):
                group = {"stream_name": "s", "group_id": f"g{n}"}
                assert len(await result_of(worker, "stream::list", group)) == 128
        say(f"  cache_bytes {metric(broker, 'cache_bytes')}")
        say(f"  MiB before: {before}, most ever: {memory_mib(broker, 'VmHWM')}")
        await worker.close()
        say(f"  start with it: {await start_seconds(broker):.2f} s, MiB {memory_mib(broker)}")


async def many_streams(streams: int) -> None:
    say(f"{streams:,} streams")
    with Broker(None, SHARDS) as broker:
        say(f"  start without data: {await start_seconds(broker):.2f} s")
        say(f"  MiB {memory_mib(broker)}, descriptors {descriptors(broker)}")
        worker = await Worker.open(broker.worker_url)
        with timed("  one item written in each"):
            await write_all(worker, ((f"stream {n}", "g", "i", n) for n in range(streams)))
        say(f"  MiB {memory_mib(broker)}, descriptors {descriptors(broker)}")
        say(f"  streams_open {metric(broker, 'streams_open')}")
        with timed("  stream::list_all"):
            found = await result_of_long(worker, "stream::list_all", {})
        say(f"    got {found.get('count', found)}")
        await worker.close()
        say(f"  start with them: {await start_seconds(broker):.2f} s")
        say(f"  MiB {memory_mib(broker)}, descriptors {descriptors(broker)}")


async def at_once(streams: int, rounds: int = 6) -> None:
    say(f"{streams:,} calls at a time, to one stream and to {streams:,}; calls a second")
    with Broker(None, SHARDS) as broker:
        worker = await Worker.open(broker.worker_url)

        async def rate(name: Callable[[int], str]) -> float:
            began = time.monotonic()
            for number in range(rounds):
                calls = (
                    result_of(worker, "stream::set", item(name(n), "g", f"i{n}", data=number))
                    for n in range(streams)
                )
                await asyncio.gather(*calls)
            return rounds * streams / (time.monotonic() - began)

        for _ in range(2):
            one, many = await rate(lambda _: "one"), await rate(lambda n: f"many {n}")
            say(f"  one {one:,.0f}, many {many:,.0f}: {many / one:.3f} of it")
        say(f"  descriptors {descriptors(broker)}, streams_open {metric(broker, 'streams_open')}")
        await worker.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.large", description=__doc__)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--factor", type=int, default=8, help="of the data to the caches")
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--written", type=int, default=1_000)
    parser.add_argument("--watch", help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=("group", "data", "streams", "written"))
    parsed = parser.parse_args()
    if parsed.watch:
        asyncio.run(watch(parsed.watch))
        return
    parts = {
        "group": lambda: big_group(parsed.items),
        "data": lambda: big_data(parsed.factor),
        "streams": lambda: many_streams(parsed.streams),
        "written": lambda: at_once(parsed.written),
    }
    say(json.dumps(vars(parsed)))
    for name, part in parts.items():
        if parsed.only in (None, name):
            asyncio.run(part())


if __name__ == "__main__":
    main()
