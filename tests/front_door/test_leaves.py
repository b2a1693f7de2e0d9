"""Leaves are told once each, also when the gateway that held the subscriptions was killed."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest
import yaml
from websockets.exceptions import WebSocketException

from tests.conftest import Run
from tests.support.broker import IN_MEMORY, Broker
from tests.support.connection import Closed
from tests.support.stream_client import StreamClient
from tests.support.worker import Invocation, Worker


def with_delay(delay_s: float) -> str:
    """A configuration in memory with `leave_delay_s`."""
    return IN_MEMORY + yaml.safe_dump({"broker": {"stream": {"leave_delay_s": delay_s}}})


async def wait_for(holds: Any) -> None:
    """Return when `holds()`."""
    async with asyncio.timeout(30):
        while not holds():
            await asyncio.sleep(0.02)


class Watch:
    """A worker that is told of leaves, and comes back after the gateway was killed."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.left: list[str] = []
        self.worker: Worker | None = None

    async def connect(self, trigger_id: str | None, config: Any, function_late: bool) -> Worker:
        while True:
            try:
                worker = await Worker.open(self.broker.worker_url)
            except (OSError, WebSocketException):
                await asyncio.sleep(0.05)
            else:
                break
        if not function_late:
            await worker.register_function("left", self.told)
        await worker.register_trigger("stream:leave", "left", config, id=trigger_id)
        if function_late:
            await worker.barrier()
            await worker.register_function("left", self.told)
        await worker.barrier()
        self.worker = worker
        return worker

    def told(self, invocation: Invocation) -> None:
        self.left.append(invocation.data["subscription_id"])


async def connected_again(url: str) -> StreamClient:
    async with asyncio.timeout(30):
        while True:
            try:
                return await StreamClient.open(url)
            except (OSError, WebSocketException):
                await asyncio.sleep(0.05)


@pytest.mark.parametrize("same_id", [True, False])
def test_every_leave_is_told_once_after_the_gateway_was_killed(same_id: bool, run: Run) -> None:
    """To the trigger with the same id, or to one like it of a worker that was started again."""

    async def main(broker: Broker) -> None:
        watch = Watch(broker)
        config = {"stream_name": "live"}
        worker = await watch.connect("t1" if same_id else None, config, False)
        clients = [await StreamClient.open(broker.stream_url) for _ in range(5)]
        for n, client in enumerate(clients):
            for group in ("r1", "r2", "r3"):
                await client.join("live", group, f"{n}-{group}")
            await client.join("quiet", "r1", f"{n}-quiet")
        await clients[0].send_leave("live", "r1", "0-r1")
        await clients[1].close()
        await wait_for(lambda: len(watch.left) == 4)
        os.kill(broker.children()["gateway"], signal.SIGKILL)
        for client in clients:
            await client.next(lambda frame: isinstance(frame, Closed))
        await worker.close()
        back = await connected_again(broker.stream_url)
        await back.join("live", "r1", "4-r1")  # who has no delay has left all the same
        worker = await watch.connect("t1" if same_id else None, config, not same_id)
        expected = {f"{n}-{group}" for n in range(5) for group in ("r1", "r2", "r3")}
        await wait_for(lambda: set(watch.left) == expected)
        await back.close()
        await wait_for(lambda: len(watch.left) == len(expected) + 1)
        await worker.quiet(0.3)
        assert sorted(watch.left) == sorted([*expected, "4-r1"])
        assert all(frame.get("type") != "invokefunction" for frame in worker.waiting)
        await worker.close()

    with Broker(IN_MEMORY) as broker:
        run(main(broker))


def test_killed_again_and_again(run: Run) -> None:
    """Each leave is owed until somebody asks for it; no lease of the living dies with a shard."""

    async def main(broker: Broker) -> None:
        watch = Watch(broker)
        worker = await watch.connect("t1", {}, False)
        client = await StreamClient.open(broker.stream_url)
        await client.join("live", "r1", "first")
        for shard in ("shard-0", "shard-1"):
            os.kill(broker.children()[shard], signal.SIGKILL)
        await client.next(lambda f: isinstance(f, dict) and f["event"]["type"] == "sync")
        os.kill(broker.children()["gateway"], signal.SIGKILL)
        await worker.close()
        await connected_again(broker.stream_url)  # nobody asks for leaves
        os.kill(broker.children()["gateway"], signal.SIGKILL)
        client = await connected_again(broker.stream_url)
        worker = await watch.connect("t1", {}, False)
        await wait_for(lambda: watch.left == ["first"])
        await client.join("live", "r1", "second")
        os.kill(broker.children()["gateway"], signal.SIGKILL)
        await worker.close()
        worker = await watch.connect("t1", {}, False)
        await wait_for(lambda: len(watch.left) == 2)
        await worker.quiet(0.3)
        assert watch.left == ["first", "second"]
        await worker.close()

    with Broker(IN_MEMORY) as broker:
        run(main(broker))


@pytest.mark.parametrize("killed", [False, True])
def test_who_comes_back_in_time_has_not_left(killed: bool, run: Run) -> None:
    """After a loss of the connection, and of the gateway; a `leave` counts at once."""

    async def main(broker: Broker) -> None:
        watch = Watch(broker)
        worker = await watch.connect("t1", {}, False)
        client = await StreamClient.open(broker.stream_url)
        for name in ("stays", "goes", "left"):
            await client.join("live", "r1", name)
        await client.send_leave("live", "r1", "left")
        await wait_for(lambda: watch.left == ["left"])
        if killed:
            os.kill(broker.children()["gateway"], signal.SIGKILL)
            await worker.close()
            worker = await watch.connect("t1", {}, False)
        else:
            await client.abort()
        client = await connected_again(broker.stream_url)
        await client.join("live", "r1", "stays")
        assert watch.left == ["left"]
        await wait_for(lambda: len(watch.left) == 2)
        await worker.quiet(0.3)
        assert watch.left == ["left", "goes"]
        await client.send_leave("live", "r1", "stays")
        await wait_for(lambda: watch.left == ["left", "goes", "stays"])
        await client.close()
        await worker.close()

    with Broker(with_delay(4)) as broker:
        run(main(broker))


def test_who_is_away_has_left_when_the_broker_stops(run: Run) -> None:
    async def main(broker: Broker) -> None:
        watch = Watch(broker)
        worker = await watch.connect("t1", {"condition_function_id": "asked"}, False)
        await worker.register_function("asked", lambda _: True)
        client = await StreamClient.open(broker.stream_url)
        await client.join("live", "r1", "away")
        await client.abort()
        client = await StreamClient.open(broker.stream_url)
        await client.join("live", "r1", "here")
        stopped = asyncio.get_running_loop().run_in_executor(None, broker.stop)
        await worker.next(lambda frame: isinstance(frame, Closed))
        assert sorted(watch.left) == ["away", "here"]
        assert await stopped == 0
        await client.close()

    with Broker(with_delay(600)) as broker:
        run(main(broker))
