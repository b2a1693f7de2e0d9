"""Connections that break, or lie behind a proxy, with the published client.

`test_case_NN_kind`: as in test_cases.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from broker.config import Limits
from tests.conftest import Run
from tests.front_door.sdk_programs import NODE, Program
from tests.front_door.sdk_scenarios import until
from tests.support.broker import IN_MEMORY, Broker, free_ports
from tests.support.calls import item, result_of
from tests.support.stream_client import StreamClient
from tests.support.worker import Worker


class CuttingProxy:
    """Passes TCP connections on to `port`, until it cuts all and takes none for a while."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    async def listen(self) -> None:
        self._server = await asyncio.start_server(self._accepted, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers |= {writer, back}
        for source, target in ((reader, back), (there, writer)):
            task = asyncio.create_task(self._pass(source, target))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65536):
                target.write(data)
                await target.drain()
        target.transport.abort()


def test_case_03_reconnect_gap(memory_broker: Broker, run: Run) -> None:
    """What happened while the connection was cut is there when it is back, deletions too."""
    broker_port = int(memory_broker.stream_url.rpartition(":")[2])

    async def set_all(worker: Worker, names: list[str], n: int) -> None:
        for name in names:
            data = {"id": name, "n": n}
            await result_of(worker, "stream::set", item("chat", "gap", name, data=data))

    proxy = CuttingProxy(broker_port)
    worker = run(Worker.open(memory_broker.worker_url))
    run(set_all(worker, [f"old-{n}" for n in range(6)], 0))
    run(proxy.listen())
    url = f"ws://127.0.0.1:{proxy.port}"
    with Program(["node", NODE / "client.mjs"], {"STREAM_URL": url}) as client:
        client.send("group", name="g", stream="chat", group="gap")

        def state() -> list[Any]:
            # the proxy lives in this loop: let it work
            run(asyncio.sleep(0.05))
            changes = [r["state"] for r in client.reports if r.get("changed") == "g"]
            return changes[-1] if changes else []

        until(lambda: len(state()) == 6, "the first sync")
        run(proxy.cut())
        run(set_all(worker, [f"new-{n}" for n in range(10)], 1))
        run(set_all(worker, [f"old-{n}" for n in range(5)], 2))
        for n in range(3):
            run(result_of(worker, "stream::delete", item("chat", "gap", f"old-{n}")))
        run(proxy.listen())
        group = {"stream_name": "chat", "group_id": "gap"}
        listed = run(result_of(worker, "stream::list", group))
        assert len(listed) == 13
        until(lambda: state() == listed, "the state is that of stream::list")
        run(set_all(worker, ["old-5"], 3))
        until(lambda: {"id": "old-5", "n": 3} in state(), "events come again")
    run(proxy.cut())
    run(worker.close())


NGINX = """\
pid {folder}/pid;
error_log {folder}/error.log;
daemon off;
worker_processes 1;
events {{ worker_connections 64; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://127.0.0.1:{broker_port};
      proxy_http_version 1.1;
      proxy_set_header Upgrade $http_upgrade;
      proxy_set_header Connection upgrade;
      proxy_set_header Host $host;
      proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
      proxy_read_timeout 2s;
    }}
  }}
}}
"""


@contextlib.contextmanager
def nginx(folder: Path, broker_port: int) -> Iterator[int]:
    """A running nginx before the broker; gives its port."""
    (port,) = free_ports(1)
    file = folder / "nginx.conf"
    file.write_text(NGINX.format(folder=folder, port=port, broker_port=broker_port))
    process = subprocess.Popen(
        ["/usr/sbin/nginx", "-c", str(file), "-p", str(folder), "-e", str(folder / "error.log")]
    )
    try:
        yield port
    finally:
        process.terminate()
        process.wait()


def test_case_42_proxy(tmp_path: Path, run: Run) -> None:
    """Pings keep a proxy from cutting an idle client, and come often enough for usual ones."""

    async def main(port: int, broker: Broker) -> None:
        async with asyncio.timeout(30):
            while True:
                try:
                    client = await StreamClient.open(f"ws://127.0.0.1:{port}/stream/chat/r/")
                    break
                except OSError:
                    await asyncio.sleep(0.05)
        assert (await client.next())["event"] == {"type": "sync", "data": []}
        await asyncio.sleep(6)  # three times what nginx waits for
        worker = await Worker.open(broker.worker_url)
        await result_of(worker, "stream::set", item("chat", "r", "m", data=1))
        assert (await client.next())["event"]["type"] == "create"
        shown = await result_of(worker, "broker::connections", {})
        assert shown["connections"][0]["addr"] == "127.0.0.1"  # as nginx says, without a port
        await client.close()
        await worker.close()

    config = yaml.safe_load(IN_MEMORY)
    config["broker"] = {
        "limits": {"ping_interval_s": 0.7},
        "stream": {"trusted_proxies": ["127.0.0.1"]},
    }
    with (
        Broker(yaml.safe_dump(config)) as broker,
        nginx(tmp_path, int(broker.stream_url.rpartition(":")[2])) as port,
    ):
        run(main(port, broker))


def test_the_default_interval_suits_usual_proxies() -> None:
    assert Limits().ping_interval_s < 60 / 2
