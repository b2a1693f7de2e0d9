"""The pictures of docs/operations.md anew: `python -m tests.deploy.pictures` (two minutes).

A Prometheus scrapes a broker every second under a light load that rises and falls; then the
dashboards are drawn from what it has.
"""

from __future__ import annotations

import asyncio
import math
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.deploy.test_monitoring import CONFIG, SHARDS, Prometheus
from tests.support.broker import REPOSITORY, Broker
from tests.support.calls import item
from tests.support.stream_client import UPGRADE, RawHttp, StreamClient
from tests.support.worker import Worker

LOAD_S = 95
SHOWN_S = 90
"""The end of the load; the start is left out, as rates need some scrapes."""
ROUND_S = 0.2
GROUPS = 24
CLIENTS_MAX = 30


async def load(broker: Broker) -> float:
    """Workers that set, update and read; subscribers that come and go; a trigger, and refusals.

    Returns when it ended, everybody still connected: seconds since 1970.
    """
    chance = random.Random(7)
    workers = [await Worker.open(broker.worker_url) for _ in range(3)]
    server = workers[0]
    await server.register_function("access::check", lambda _: {"context": {"user": 1}})
    await server.register_function("audit::changed", lambda _: None)
    await server.register_trigger("stream", "audit::changed", {"stream_name": "chat"})
    await server.barrier()
    clients: list[StreamClient] = []
    begin = time.monotonic()
    while (passed := time.monotonic() - begin) < LOAD_S:
        wave = 0.5 - 0.5 * math.cos(2 * math.pi * passed / 45)
        await come_and_go(broker, clients, 3 + round((CLIENTS_MAX - 3) * wave), chance)
        calls = []
        for _ in range(4 + round(20 * wave)):
            room = f"room-{int(GROUPS * chance.random() ** 2)}"  # some are busier than others
            name = chance.choices(("set", "get", "update", "list"), (6, 3, 2, 1))[0]
            calls.append(chance.choice(workers).call(f"stream::{name}", arguments(name, room)))
        await asyncio.gather(*calls)
        if chance.random() < 0.1:
            refused = {"ops": [{"type": "no such operation"}]}
            await server.call("stream::update", item("chat", "room-1", "m", **refused))
            await chance.choice(clients).send_text("no JSON")
            unknown = UPGRADE.replace(b"/ ", b"/no ")
            async with await RawHttp.request(broker.stream_url, unknown) as raw:
                await raw.response()
        await asyncio.sleep(ROUND_S)
    end = time.time()
    for connection in (*clients, *workers):
        await connection.close()
    return end


def arguments(name: str, room: str) -> dict[str, object]:
    """Of a call of `stream::{name}` in a group."""
    match name:
        case "set":
            return item("chat", room, "m", data={"text": "x" * 200, "at": time.time()})
        case "update":
            return item("chat", room, "n", ops=[{"type": "set", "path": "at", "value": 1}])
        case "list":
            return {"stream_name": "chat", "group_id": room}
        case _:
            return item("chat", room, "m")


async def come_and_go(
    broker: Broker, clients: list[StreamClient], wanted: int, chance: random.Random
) -> None:
    """One client more or less, towards so many as are wanted."""
    if len(clients) < wanted:
        clients.append(await StreamClient.open(broker.stream_url))
        for room in chance.sample(range(GROUPS), 4):
            await clients[-1].join("chat", f"room-{room}", f"s{room}")
    elif len(clients) > wanted:
        await clients.pop(0).close()


def main() -> None:
    into = REPOSITORY / "docs" / "pictures"
    with tempfile.TemporaryDirectory() as directory, Broker(CONFIG, shards=SHARDS) as broker:
        prometheus = Prometheus(Path(directory), broker)
        try:
            prometheus.wait_for_scrapes()
            end = asyncio.run(load(broker))
            command = [sys.executable, "-m", "deploy.grafana.pictures", prometheus.url]
            command += ["--into", str(into), "--end", str(end), "--range", str(SHOWN_S)]
            command += ["--scrape-interval", "1"]
            subprocess.run(command, check=True, cwd=REPOSITORY)
        finally:
            prometheus.close()


if __name__ == "__main__":
    main()
