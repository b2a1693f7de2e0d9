"""A planned stop: clients are let go one after the other, and come back one after the other."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from websockets.exceptions import WebSocketException

from tests.conftest import Run
from tests.support.broker import Broker
from tests.support.calls import LONG_S, item, result_of
from tests.support.connection import Closed
from tests.support.stream_client import StreamClient
from tests.support.worker import Worker

CONFIG = "broker: {{limits: {{drain_seconds: {}}}}}\n"
RETRY_S = 2.0
"""After which a published client connects again."""


class Client(StreamClient):
    """Notes when it was closed."""

    closed_at: float | None = None

    def _take(self, frame: Any) -> None:
        if isinstance(frame, Closed):
            self.closed_at = time.monotonic()
        super()._take(frame)

    async def gone(self) -> tuple[float, int]:
        """When it was closed, and with which code."""
        closed = await self.next(lambda frame: isinstance(frame, Closed), LONG_S)
        assert self.closed_at is not None
        return self.closed_at, closed.code


async def joined(broker: Broker, count: int) -> list[Client]:
    clients = [await Client.open(broker.stream_url) for _ in range(count)]
    for client in clients:
        await client.join("chat", "r")
    return clients


def stopping(broker: Broker) -> asyncio.Future[int]:
    """SIGTERM; the exit code."""
    return asyncio.get_running_loop().run_in_executor(None, broker.stop)


def test_closes_are_spread_and_the_rest_goes_on(run: Run) -> None:
    drain_s = 3.0

    async def main(broker: Broker) -> None:
        clients = await joined(broker, 120)
        worker = await Worker.open(broker.worker_url)
        stopped = stopping(broker)
        await asyncio.wait(
            [asyncio.create_task(client.gone()) for client in clients],
            return_when=asyncio.FIRST_COMPLETED,
        )
        # in the middle of it: writes are taken, and told to those who are still there
        await result_of(worker, "stream::set", item("chat", "r", "late", data=1))
        async with asyncio.timeout(LONG_S):
            while any(client.closed_at is None for client in clients):
                await asyncio.sleep(0.01)
        told = [c for c in clients if any(f.get("id") == "late" for f in c.frames)]
        assert len(told) > len(clients) // 4
        assert {f.code for c in clients for f in c.received if isinstance(f, Closed)} == {1001}
        times = sorted(client.closed_at or 0.0 for client in clients)
        assert times[-1] - times[0] > drain_s / 2
        assert await stopped == 0
        await worker.close()
        broker.start()
        async with await Worker.open(broker.worker_url) as again:
            assert await result_of(again, "stream::get", item("chat", "r", "late")) == 1

    with Broker(CONFIG.format(drain_s)) as broker:
        run(main(broker))


def _kill_supervisor(broker: Broker) -> None:
    os.kill(broker.pid, signal.SIGKILL)


def _signal_twice(broker: Broker) -> None:
    os.kill(broker.pid, signal.SIGTERM)
    time.sleep(0.5)
    os.kill(broker.pid, signal.SIGINT)


def _signal_gateway_twice(broker: Broker) -> None:
    os.kill(broker.children()["gateway"], signal.SIGTERM)
    time.sleep(0.5)
    os.kill(broker.children()["gateway"], signal.SIGTERM)


@pytest.mark.parametrize("end", [_signal_twice, _signal_gateway_twice, _kill_supervisor])
def test_what_cuts_it_short(end: Callable[[Broker], None], run: Run) -> None:
    """A second signal, or a supervisor that is gone: another broker may be about to start."""
    drain_s = 40.0 * 60

    async def main(broker: Broker) -> None:
        clients = [await Client.open(broker.stream_url) for _ in range(1000)]
        await asyncio.to_thread(end, broker)
        ends = await asyncio.gather(*(client.gone() for client in clients))
        assert {code for _, code in ends} == {1001}
        times = sorted(at for at, _ in ends)
        assert times[-1] - times[0] < 25  # 1,000 clients, 50 ms each, make 50 s

    with Broker(CONFIG.format(drain_s)) as broker:
        run(main(broker))


def test_a_reconnect_storm(run: Run) -> None:
    """A planned restart with 1,000 clients that come back exactly 2 s later, each asked about."""
    count = 1000

    async def auth(_: Any) -> Any:
        await asyncio.sleep(0.02)
        return {}

    async def life(client: Client, url: str, refused: list[int]) -> None:
        await client.gone()
        tries = 0
        while True:
            await asyncio.sleep(RETRY_S)
            try:
                again = await Client.open(url)
            except (OSError, WebSocketException):
                tries += 1
                continue
            break
        for group in ("a", "b"):
            await again.send_join("storm", group, group)
            sync = await again.next(patience_s=LONG_S)
            assert (sync["groupId"], len(sync["event"]["data"])) == (group, 100)
        refused.append(tries)
        await again.close()

    async def main(broker: Broker) -> None:
        worker = await Worker.open(broker.worker_url)
        await worker.register_function("stream::auth", auth)
        for group in ("a", "b"):
            for number in range(100):
                await result_of(worker, "stream::set", item("storm", group, f"i{number}", data=0))
        clients = [await Client.open(broker.stream_url) for _ in range(count)]
        refused: list[int] = []
        lives = asyncio.gather(*(life(client, broker.stream_url, refused) for client in clients))
        assert await stopping(broker) == 0
        await asyncio.to_thread(broker.start)
        began, calls = time.monotonic(), 0
        worker = await Worker.open(broker.worker_url)
        await worker.register_function("stream::auth", auth)
        while not lives.done():
            await result_of(worker, "stream::set", item("other", "g", "i", data=calls))
            calls += 1
            await asyncio.sleep(0.01)
        await lives
        took = time.monotonic() - began
        assert len(refused) == count
        assert calls > took  # more than one a second, all the time
        await worker.close()

    config = "workers:\n  - name: iii-stream\n    config: {auth_function: stream::auth}\n"
    with Broker(config) as broker:
        run(main(broker))
