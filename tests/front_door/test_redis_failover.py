"""A Redis whose master fails: Sentinels name another one, and the broker follows."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.conftest import Run
from tests.front_door.test_redis import config, put, refusal, until_served
from tests.front_door.test_redis_ready import until as until_readyz
from tests.support.broker import Broker
from tests.support.calls import item, result_of
from tests.support.redis_cluster import RedisClusterServers, SentinelServers
from tests.support.redis_server import IS_INSTALLED, RedisServer
from tests.support.stream_client import StreamClient
from tests.support.worker import Worker

pytestmark = pytest.mark.skipif(not IS_INSTALLED, reason="redis-server is not installed")


def kill(server: RedisServer) -> None:
    assert server.process is not None
    server.process.kill()
    server.process.wait()
    server.process = None


@pytest.mark.parametrize("password", [None, "s3cret"])
def test_sentinel(run: Run, password: str | None) -> None:
    """Subscribers stay and miss nothing that the new master has; the old one comes back as its
    replica, and is not written to."""

    async def main(servers: SentinelServers, broker: Broker, other: Broker) -> None:
        async with (
            await Worker.open(broker.worker_url) as worker,
            await StreamClient.open(broker.stream_url) as client,
            await StreamClient.open(other.stream_url) as far,
        ):
            sync = await client.join("s", "g")
            await far.join("s", "g")
            await result_of(worker, "stream::set", item("s", "g", "i", data=1))
            servers.master.client.execute_command("WAIT", 1, 2000)
            kill(servers.master)
            message = refusal(await put(worker, "g", "i", 2))
            assert "retry later" in message
            assert "s3cret" not in message
            text = await asyncio.to_thread(until_readyz, broker, 503, "main of 127.0.0.1:")
            assert "s3cret" not in text
            async with asyncio.timeout(40):
                while "error" in await put(worker, "g", "i", 3):
                    await asyncio.sleep(0.1)
            await asyncio.to_thread(until_readyz, broker, 200)
            assert servers.replica.client.info("replication")["role"] == "master"
            for one in (client, far):
                frames = [await one.next(), await one.next()]
                assert [frame["seq"] for frame in frames] == [sync["seq"] + 1, sync["seq"] + 2]
                assert [frame["event"]["data"] for frame in frames] == [1, 3]
            servers.master.start()
            async with asyncio.timeout(40):
                while servers.master.client.info("replication")["role"] != "slave":
                    await asyncio.sleep(0.1)
            await until_served(lambda: put(worker, "g", "i", 4))
            assert json.loads(servers.replica.client.hget("stream:s:g", "i")) == 4

    with (
        SentinelServers(password) as servers,
        Broker(config(servers.url)) as broker,
        Broker(config(servers.url)) as other,
    ):
        run(main(servers, broker, other))


def test_no_sentinel_answers(run: Run) -> None:
    async def main(broker: Broker) -> None:
        async with await Worker.open(broker.worker_url) as worker:
            assert "can't be reached" in refusal(await put(worker, "g", "i", 1))

    with RedisServer(started=False) as server:
        url = f"redis+sentinel://127.0.0.1:{server.port}/main"
        with Broker(config(url)) as broker:
            run(main(broker))
            until_readyz(broker, 503, f"main of 127.0.0.1:{server.port}")


def test_cluster(run: Run) -> None:
    """Two brokers on a cluster: all functions, and one node that fails."""

    async def main(servers: RedisClusterServers, broker: Broker, other: Broker) -> None:
        groups = ["a{b}c", "{x}", "}{", "", *(f"g{n}" for n in range(9))]
        async with (
            await Worker.open(broker.worker_url) as worker,
            await Worker.open(other.worker_url) as far,
            await StreamClient.open(other.stream_url) as client,
        ):
            await client.join("s", "g0")
            for group in groups:
                await result_of(worker, "stream::set", item("s", group, "i", data={"n": 1}))
            ops = [{"type": "increment", "path": "n", "by": 1}]
            for group in groups:
                await result_of(far, "stream::update", item("s", group, "i", ops=ops))
                assert await result_of(worker, "stream::list", item("s", group, "")) == [{"n": 2}]
            assert [(await client.next())["seq"] for _ in range(2)] == [1, 2]
            for one in (worker, far):
                listed = await result_of(one, "stream::list_groups", item("s", "", ""))
                assert listed == sorted(groups)
            lost = servers.node_of("stream:s:g0")
            lost.client.execute_command("WAIT", 1, 2000)
            kill(lost)
            assert "retry later" in refusal(await put(worker, "g0", "i", 2))
            await asyncio.to_thread(until_readyz, other, 503, f"127.0.0.1:{lost.port}")
            async with asyncio.timeout(40):
                while "error" in await put(worker, "g0", "i", 3):
                    await asyncio.sleep(0.1)
            frame = await client.next()
            assert (frame["seq"], frame["event"]["data"]) == (3, 3)
            await asyncio.to_thread(until_readyz, other, 200)

    with (
        RedisClusterServers(replicas=1) as servers,
        Broker(config(servers.url)) as broker,
        Broker(config(servers.url)) as other,
    ):
        run(main(servers, broker, other))
