"""Two gateways to put workers and clients on: of one broker, or of two that share a Redis."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import urllib.request
from collections.abc import Awaitable, Callable
from typing import Any, Self, TypeVar

from websockets.exceptions import WebSocketException

from tests.support.broker import IN_MEMORY, Broker
from tests.support.connection import Connection
from tests.support.redis_server import RedisServer
from tests.support.stream_client import StreamClient
from tests.support.worker import Worker

WAIT_S = 30.0
"""Only ends what would hang."""
ATTEMPTS_MAX = 200

C = TypeVar("C", bound=Connection)


class Pair:
    """Places 0 and 1. Use it as a context manager.

    Args:
        more: the `broker:` block of the configuration, as YAML in one line.
        stream: the same for what the stream block has beside its adapter.
    """

    brokers: list[Broker]

    def __init__(self, more: str = "", stream: str = "") -> None:
        self.more = more
        self.stream = stream

    @property
    def broker(self) -> Broker:
        """The first one."""
        return self.brokers[0]

    async def worker(self, place: int, **options: Any) -> Worker:
        """A worker that is connected there."""
        broker = self.brokers[place % len(self.brokers)]
        return await self._at(place, "worker", lambda: Worker.open(broker.worker_url, **options))

    async def client(self, place: int, path: str = "", **options: Any) -> StreamClient:
        """A client that is connected there."""
        url = self.brokers[place % len(self.brokers)].stream_url + path
        return await self._at(place, "stream", lambda: StreamClient.open(url, **options))

    async def _at(self, place: int, port: str, connect: Callable[[], Awaitable[C]]) -> C:
        raise NotImplementedError

    def metric(self, place: int, name: str) -> float:
        """The sum of a metric's samples, as the gateway there has them."""
        with urllib.request.urlopen(self.metrics_url(place), timeout=10) as response:
            text = response.read().decode()
        found = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        return sum(map(float, found))

    def metrics_url(self, place: int) -> str:
        raise NotImplementedError

    def gateway_pid(self, place: int) -> int:
        raise NotImplementedError

    def kill(self, place: int) -> None:
        """SIGKILL the gateway there; its supervisor starts it again."""
        os.kill(self.gateway_pid(place), signal.SIGKILL)

    def cut(self, place: int) -> None:
        """Take the gateway there away, for at least as long as it takes to notice."""
        raise NotImplementedError

    async def back(self) -> None:
        """Return when both gateways serve and know of one another."""
        await until(lambda: all(self.metric(place, "broker_peers") == 1 for place in (0, 1)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for broker in self.brokers:
            broker.close()


class TwoGateways(Pair):
    """Of one broker, which keeps everything in memory unless `config` says something else."""

    def __init__(self, more: str = "", stream: str = "", *, config: str = IN_MEMORY) -> None:
        super().__init__(more, stream)
        config += _lines(stream) + f"broker: {{gateways: 2{more and ', ' + more}}}\n"
        self.brokers = [Broker(config, gateways=2)]

    def metrics_url(self, place: int) -> str:
        port = int(self.broker.metrics_url.rpartition(":")[2].split("/")[0])
        return f"http://127.0.0.1:{port + (self.broker.shards + place if place else 0)}/metrics"

    def gateway_pid(self, place: int) -> int:
        return self.broker.children()[f"gateway-{place}"]

    def cut(self, place: int) -> None:
        self.kill(place)

    async def _at(self, place: int, port: str, connect: Callable[[], Awaitable[C]]) -> C:
        """The system chooses: connect until it chose that one."""
        name = f'broker_connections{{port="{port}"}}'

        def count() -> float:
            with urllib.request.urlopen(self.metrics_url(place), timeout=10) as response:
                text: str = response.read().decode()
            return float(text.partition(f"{name} ")[2].partition("\n")[0])

        others: list[C] = []
        try:
            for _ in range(ATTEMPTS_MAX):
                before = count()
                connection = await connect()
                if count() > before:
                    return connection
                others.append(connection)
            raise AssertionError(f"no connection came to gateway {place}")
        finally:
            for other in others:
                await other.close()


class TwoBrokers(Pair):
    """On one redis-server, `server`, which is the tests' own; with `gateways` each.

    Args:
        shared: another pair, whose server is used.
        key_prefix: of the adapter.
        database: of the server.
    """

    def __init__(
        self,
        more: str = "",
        stream: str = "",
        gateways: int = 1,
        *,
        shared: TwoBrokers | None = None,
        key_prefix: str = "",
        database: int = 0,
    ) -> None:
        super().__init__(more, stream)
        self._is_shared = shared is not None
        self.server = shared.server if shared is not None else RedisServer()
        prefix = f', key_prefix: "{key_prefix}"' if key_prefix else ""
        url = f"{self.server.url}/{database}" if database else self.server.url
        config = (
            "workers:\n  - name: iii-stream\n    config:\n      adapter: {name: redis, config:"
            f' {{redis_url: "{url}"{prefix}}}}}\n'
            + _lines(stream)
            + f"broker: {{gateways: {gateways}{more and ', ' + more}}}\n"
        )
        self.brokers = []
        try:
            for _ in range(2):
                self.brokers.append(Broker(config, gateways=gateways))
        except BaseException:
            self.__exit__()
            raise

    def metrics_url(self, place: int) -> str:
        return self.brokers[place].metrics_url

    def gateway_pid(self, place: int) -> int:
        return self.brokers[place].children()["gateway"]

    def cut(self, place: int) -> None:
        """It hangs, until its supervisor ends it."""
        os.kill(self.gateway_pid(place), signal.SIGSTOP)

    async def _at(self, place: int, port: str, connect: Callable[[], Awaitable[C]]) -> C:
        return await connect()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        if not self._is_shared:
            self.server.close()


def _lines(stream: str) -> str:
    """A line of the stream block, whose `adapter` stands before it."""
    return f"      {stream}\n" if stream else ""


async def until(holds: Callable[[], bool | Awaitable[bool]], wait_s: float = WAIT_S) -> None:
    """Return when `holds()`, asked again and again."""
    async with asyncio.timeout(wait_s):
        while True:
            with contextlib.suppress(OSError, WebSocketException):
                held = holds()
                if held if isinstance(held, bool) else await held:
                    return
            await asyncio.sleep(0.02)


async def until_has(worker: Worker, *function_ids: str) -> None:
    """Return when the functions are listed where `worker` is."""

    async def has() -> bool:
        answer = await worker.call("engine::functions::list", {"include_internal": True})
        listed = {f["function_id"] for f in answer["result"]["functions"]}
        return listed.issuperset(function_ids)

    await until(has)


async def until_lacks(worker: Worker, function_id: str) -> None:
    """Return when the function is not listed any more where `worker` is."""

    async def lacks() -> bool:
        answer = await worker.call("engine::functions::list", {"search": function_id})
        return function_id not in {f["function_id"] for f in answer["result"]["functions"]}

    await until(lacks)


async def until_has_triggers(worker: Worker, count: int, kind: str | None = None) -> None:
    """Return when so many triggers are listed where `worker` is."""

    async def has() -> bool:
        query = {"trigger_type": kind, "include_internal": True}
        answer = await worker.call("engine::registered-triggers::list", query)
        return len(answer["result"]["registered_triggers"]) == count

    await until(has)
