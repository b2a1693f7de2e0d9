"""The example of docs/scaling.md: three brokers behind one address, on a Redis Cluster."""

from __future__ import annotations

import asyncio
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from websockets.exceptions import WebSocketException

from broker import config
from broker.config import Overrides, RedisAdapter
from tests.conftest import Run
from tests.deploy.test_proxy import DEPLOY, NGINX, _wait_until_it_listens
from tests.support.broker import Broker, free_ports
from tests.support.calls import item, result_of
from tests.support.connection import Closed
from tests.support.redis_cluster import RedisClusterServers
from tests.support.redis_server import IS_INSTALLED
from tests.support.stream_client import StreamClient
from tests.support.worker import Worker

CLUSTER = DEPLOY / "cluster"
CLIENTS = 9
PATIENCE_S = 60.0

pytestmark = pytest.mark.skipif(
    not IS_INSTALLED or not Path(NGINX).exists(), reason="redis-server and nginx are needed"
)


def redis_options() -> list[str]:
    """What redis.conf says, as options of the command line."""
    lines = (CLUSTER / "redis.conf").read_text().splitlines()
    settings = [line.split(None, 1) for line in lines if line and not line.startswith("#")]
    return [word for name, value in settings for word in (f"--{name}", value)]


@pytest.fixture
def brokers() -> Iterator[list[Broker]]:
    with ExitStack() as stack:
        servers = stack.enter_context(RedisClusterServers(0, *redis_options()))
        text = (CLUSTER / "broker.yaml").read_text()
        environment = {"REDIS_URL": servers.url}
        yield [stack.enter_context(Broker(text, 1, env=environment)) for _ in range(3)]


@pytest.fixture
def front(brokers: list[Broker], tmp_path: Path) -> Iterator[tuple[int, int]]:
    """nginx in front of them: the ports of clients and of workers."""
    ports = free_ports(2)
    text = (CLUSTER / "nginx.conf").read_text()
    for number, broker in enumerate(brokers, 1):
        text = text.replace(f"broker-{number}:3112", broker.stream_url.removeprefix("ws://"))
        text = text.replace(f"broker-{number}:49134", broker.worker_url.removeprefix("ws://"))
    text = text.replace("listen 80;", f"listen 127.0.0.1:{ports[0]};")
    text = text.replace("listen 49134;", f"listen 127.0.0.1:{ports[1]};")
    folders = "".join(
        f"{kind}_temp_path {tmp_path}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {tmp_path}/pid; error_log {tmp_path}/errors;\n"
        f"events {{}}\nhttp {{ access_log off; {folders} {text} }}\n"
    )
    command = [NGINX, "-p", str(tmp_path), "-e", str(tmp_path / "errors"), "-c", "nginx.conf"]
    process = subprocess.Popen(command, cwd=tmp_path)
    try:
        for port in ports:
            _wait_until_it_listens(port)
        yield ports[0], ports[1]
    finally:
        process.terminate()
        process.wait(60)


def test_one_deployment(brokers: list[Broker], front: tuple[int, int], run: Run) -> None:
    """Clients are spread over the brokers and see one order; a broker that dies takes nothing with
    it: its clients go on where they were, on the others."""
    stream_url, worker_url = (f"ws://127.0.0.1:{port}" for port in front)

    async def write(count: int) -> None:
        for n in range(count):
            async with await Worker.open(worker_url) as worker:
                await result_of(worker, "stream::set", item("chat", "r", f"i{n}", data=n))

    async def member() -> tuple[StreamClient, list[int], str]:
        client = await StreamClient.open(stream_url)
        sync = await client.join("chat", "r")
        return client, [sync["seq"]], sync["epoch"]

    async def come_back(seq: int, epoch: str) -> StreamClient:
        """On whichever broker is there."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    client = await StreamClient.open(stream_url)
                except (OSError, WebSocketException):
                    await asyncio.sleep(0.2)
                    continue
                answer = await client.join("chat", "r", since=seq, epoch=epoch)
                if not isinstance(answer, Closed):
                    assert answer["resumed"] is True, answer
                    return client

    async def follow(client: StreamClient, seqs: list[int], epoch: str) -> None:
        while seqs[-1] < 40:
            frame = await client.next()
            if isinstance(frame, Closed):
                client = await come_back(seqs[-1], epoch)
            else:
                seqs.append(frame["seq"])
        await client.close()

    async def main() -> None:
        everyone = [await member() for _ in range(CLIENTS)]
        counts = []
        for broker in brokers:
            async with await Worker.open(broker.worker_url) as worker:
                counts.append(len(await result_of(worker, "broker::connections", {})))
        assert all(counts), counts
        await write(20)
        following = [asyncio.create_task(follow(*one)) for one in everyone]
        await asyncio.sleep(0.2)
        await asyncio.to_thread(brokers[0].kill)
        await write(20)
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*following)
        for _, seqs, _ in everyone:
            assert seqs == list(range(41))

    run(main())
    with urllib.request.urlopen(stream_url.replace("ws", "http") + "/readyz", timeout=10) as page:
        assert page.status == 200


def test_the_configuration_is_valid() -> None:
    settings, warnings = config.load(str(CLUSTER / "broker.yaml"), Overrides(), {})
    assert not warnings
    assert isinstance(settings.adapter, RedisAdapter)
    assert settings.adapter.redis_url.startswith("redis+cluster://redis-1:6379,")
