"""More data, and more streams, than a shard keeps in memory or has open.

`python -m bench.large` does the same with a million items and ten thousand streams.
"""

from __future__ import annotations

import asyncio
import os
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import Run
from tests.support.broker import Broker
from tests.support.calls import LONG_S, item, result_of
from tests.support.stream_client import StreamClient
from tests.support.worker import Worker

MIB = 2**20


def config(**limits: int) -> str:
    return yaml.safe_dump({"broker": {"limits": limits}})


async def put_all(worker: Worker, entries: Iterable[tuple[str, str, str, Any]]) -> None:
    """Set all of them; returns when they are."""
    names: dict[str, Any] = {}
    for stream, group, item_id, value in entries:
        names = item(stream, group, item_id)
        await worker.void("stream::set", {**names, "data": value})
    await result_of(worker, "stream::get", names)


def gauge(broker: Broker, name: str) -> list[float]:
    """A gauge of each shard."""
    host, port = broker.metrics_url.split("/")[2].rsplit(":", 1)
    found = []
    for shard in range(broker.shards):
        with urllib.request.urlopen(f"http://{host}:{int(port) + 1 + shard}/metrics") as response:
            lines = response.read().decode().splitlines()
        found += [float(line.split()[-1]) for line in lines if line.startswith(f"broker_{name}{{")]
    assert len(found) == broker.shards
    return found


def resident_bytes(broker: Broker) -> int:
    """Of all shards."""
    pages = 0
    for name, pid in broker.children().items():
        if name != "gateway":
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_a_group_that_is_never_in_memory(run: Run) -> None:
    count = 20_000
    group = {"stream_name": "s", "group_id": "g"}

    async def main(broker: Broker) -> None:
        worker = await Worker.open(broker.worker_url)
        await put_all(worker, (("s", "g", f"i{n}", {"n": n}) for n in range(count)))
        values = [{"n": n} for n in range(count)]
        assert await result_of(worker, "stream::list", group) == values
        entries = await result_of(worker, "broker::items", group)
        assert entries == [{"item_id": f"i{n}", "value": {"n": n}} for n in range(count)]
        async with await StreamClient.open(broker.stream_url) as client:
            sync = await client.join("s", "g", ids=True)
            assert sync["event"]["data"] == values
            assert sync["event"]["ids"] == [f"i{n}" for n in range(count)]
            await result_of(worker, "stream::set", item("s", "g", "i7", data=0))
            await result_of(worker, "stream::delete", item("s", "g", "i8"))
            assert [(await client.next())["seq"] - sync["seq"] for _ in range(2)] == [1, 2]
        listed = await result_of(worker, "stream::list", group)
        assert (len(listed), listed[7], listed[8]) == (count - 1, 0, {"n": 9})
        assert max(gauge(broker, "cache_bytes")) < MIB
        broker.restart()
        await worker.close()
        async with await Worker.open(broker.worker_url) as worker:
            assert await result_of(worker, "stream::list", group) == listed

    with Broker(config(group_cache_bytes_max=MIB)) as broker:
        run(main(broker))


def test_what_no_answer_holds_is_refused(run: Run) -> None:
    """Values, values with long ids, and names of groups; the rest goes on."""
    limit = 32 * 1024

    async def refused(worker: Worker, function_id: str, **data: str) -> None:
        error = (await worker.call(function_id, data, LONG_S))["error"]
        assert error["code"] == "response_too_large", error
        assert str(limit) in error["message"]

    async def main(broker: Broker) -> None:
        worker = await Worker.open(broker.worker_url)
        await put_all(worker, (("s", "values", f"i{n}", "x" * 1000) for n in range(40)))
        await put_all(worker, (("s", "ids", f"{n:0900}", n) for n in range(40)))
        await put_all(worker, (("many", f"{n:0900}", "i", n) for n in range(200)))
        await refused(worker, "stream::list", stream_name="s", group_id="values")
        await refused(worker, "broker::items", stream_name="s", group_id="values")
        await refused(worker, "broker::items", stream_name="s", group_id="ids")
        assert len(await result_of(worker, "stream::list", {"stream_name": "s", "group_id": "ids"}))
        await refused(worker, "stream::list_groups", stream_name="many")
        await refused(worker, "stream::list_all")
        groups = await result_of(worker, "stream::list_groups", {"stream_name": "s"})
        assert groups == ["ids", "values"]
        async with await StreamClient.open(broker.stream_url) as client:
            answer = await client.join("s", "values")
            assert answer["event"]["code"] == "response_too_large"
            answer = await client.join("s", "ids", "s2", ids=True)
            assert answer["event"]["code"] == "response_too_large"
            assert (await client.join("s", "ids", "s3"))["event"]["type"] == "sync"
        await worker.close()

    for cache in (1024, MIB):  # of groups that are kept whole, and that are not
        with Broker(config(response_bytes_max=limit, group_cache_bytes_max=cache)) as broker:
            run(main(broker))


def test_more_data_than_cache(run: Run) -> None:
    groups, items, size = 64, 512, 1024
    value = "x" * (size - 2)

    async def fill(broker: Broker, worker: Worker, numbers: range) -> int:
        """Write and read whole groups; the memory that the shards have then."""
        names = [(f"g{g}", f"i{i}") for g in numbers for i in range(items)]
        await put_all(worker, (("s", group, item_id, value) for group, item_id in names))
        for number in numbers:
            group = {"stream_name": "s", "group_id": f"g{number}"}
            assert await result_of(worker, "stream::list", group) == [value] * items
            assert max(gauge(broker, "cache_bytes")) <= 2 * MIB
        return resident_bytes(broker)

    async def main(broker: Broker) -> None:
        worker = await Worker.open(broker.worker_url)
        warm = await fill(broker, worker, range(groups // 4))  # twice the caches
        full = await fill(broker, worker, range(groups // 4, groups))
        assert full - warm < groups * items * size // 4
        await worker.close()

    with Broker(config(group_cache_bytes_max=2 * MIB)) as broker:
        run(main(broker))


class Frugal(Broker):
    """Its processes may have few descriptors."""

    DESCRIPTORS = 800
    OPEN_FILES = (DESCRIPTORS - 200) // 6

    @property
    def command(self) -> list[str]:
        limit = f'ulimit -n {self.DESCRIPTORS}; exec "$@"'
        return ["/bin/sh", "-c", limit, "sh", *super().command]


def test_more_streams_than_descriptors(run: Run) -> None:
    count = 5 * Frugal.OPEN_FILES
    streams = [f"stream {n}" for n in range(count)]

    async def main(broker: Broker) -> None:
        worker = await Worker.open(broker.worker_url)
        at_first = resident_bytes(broker)
        for value in range(2):
            await put_all(worker, ((stream, "g", "i", value) for stream in streams))
            assert max(gauge(broker, "streams_open")) <= Frugal.OPEN_FILES
            async with asyncio.timeout(LONG_S):  # until none gives way to another any more
                while min(gauge(broker, "streams_open")) <= Frugal.OPEN_FILES // 2:
                    await asyncio.sleep(0.1)
        for name, pid in broker.children().items():
            assert len(os.listdir(f"/proc/{pid}/fd")) < Frugal.DESCRIPTORS - 100, name
        listed = await result_of(worker, "stream::list_all", {})
        assert sorted(entry["id"] for entry in listed["stream"]) == sorted(streams)
        assert all(entry["groups"] == ["g"] for entry in listed["stream"])
        for stream in streams[::17]:
            assert await result_of(worker, "stream::get", item(stream, "g", "i")) == 1
        await worker.close()
        broker.restart()
        assert gauge(broker, "streams_open") == [0.0, 0.0]  # so starting takes no longer
        assert resident_bytes(broker) < at_first * 1.2
        async with await Worker.open(broker.worker_url) as worker:
            listed = await result_of(worker, "stream::list_all", {})
            assert listed["count"] == count
            assert (
                sum(gauge(broker, "streams_open")) < count / 10
            )  # some may be looked at just then

    with Frugal() as broker:
        run(main(broker))
