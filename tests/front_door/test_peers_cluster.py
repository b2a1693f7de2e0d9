"""Brokers that share a Redis Cluster find one another's workers, and fire each trigger once."""

from __future__ import annotations

import asyncio

import pytest

from tests.conftest import Run
from tests.support.broker import Broker
from tests.support.calls import item, result_of
from tests.support.pair import TwoBrokers, until, until_has, until_has_triggers
from tests.support.redis_cluster import RedisClusterServers
from tests.support.redis_server import IS_INSTALLED

pytestmark = [
    pytest.mark.skipif(not IS_INSTALLED, reason="redis-server is not installed"),
    pytest.mark.timeout(300),
]


class OnCluster(TwoBrokers):
    """Two brokers on a cluster of three."""

    def __init__(self) -> None:
        self.servers = RedisClusterServers()
        self.brokers = []
        config = (
            "workers:\n  - name: iii-stream\n    config:\n      adapter: {name: redis, config:"
            f' {{redis_url: "{self.servers.url}"}}}}\n'
        )
        for _ in range(2):
            self.brokers.append(Broker(config))

    def __exit__(self, *_: object) -> None:
        for broker in self.brokers:
            broker.close()
        self.servers.close()


def test_calls_and_triggers(run: Run) -> None:
    async def main(pair: OnCluster) -> None:
        here, there = await pair.worker(0), await pair.worker(1)
        await here.register_function("take", lambda _: "taken")
        await here.register_trigger("stream", "take", {"stream_name": "s"})
        await until_has(there, "take")
        await until_has_triggers(there, 1, "stream")

        async def fires() -> bool:
            await result_of(there, "stream::set", item("s", "warm", "i", data=0))
            await asyncio.sleep(0.05)
            return bool(here.invocations)

        await until(fires)
        await here.quiet()
        assert await result_of(there, "take", 1) == "taken"
        here.invocations.clear()
        await asyncio.gather(
            *(
                worker.call("stream::set", item("s", f"g{n % 8}", "i", data=n))
                for n in range(100)
                for worker in (here, there)
            )
        )
        await until(lambda: len(here.invocations) >= 200)
        await here.quiet(0.3)
        assert len(here.invocations) == 200
        for group in range(8):
            seqs = [i.data["seq"] for i in here.invocations if i.data["groupId"] == f"g{group}"]
            assert seqs == list(range(1, len(seqs) + 1))
        await here.close()
        await there.close()

    with OnCluster() as pair:
        run(main(pair))
