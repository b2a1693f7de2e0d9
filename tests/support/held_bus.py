"""What the nodes of a Redis Cluster tell one of them, held up on its way."""

from __future__ import annotations

import asyncio
import subprocess
from contextlib import suppress
from typing import Self

from tests.support.redis_cluster import RedisClusterServers, until
from tests.support.redis_server import CLI, RedisServer

BUS = 10_000
"""What the port of a node's bus is higher than that of the node."""
CHUNK = 65536


class HeldBus:
    """The bus of `node`, which other nodes reach by a port of ours. Use it as a context manager.

    While `is_open` is not set, what they send does not go on to the node; nothing of it is lost.
    """

    def __init__(self, servers: RedisClusterServers, node: RedisServer) -> None:
        self._others = [one for one in servers.nodes if one is not node]
        self._node = node
        self._tasks: set[asyncio.Task[None]] = set()
        self.is_open = asyncio.Event()
        self.is_open.set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self._node.client.config_set("cluster-announce-bus-port", port)
        await asyncio.to_thread(until, lambda: self._is_used(port), "all come by our port")
        return self

    async def __aexit__(self, *_: object) -> None:
        self.is_open.set()
        self._node.client.config_set("cluster-announce-bus-port", 0)
        own = self._node.port + BUS
        await asyncio.to_thread(until, lambda: self._is_used(own), "all come by its own port")
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _is_used(self, port: int) -> bool:
        """Whether all others are connected to the node by `port`."""
        begin = f"127.0.0.1:{self._node.port}@{port}"
        for one in self._others:
            command = [CLI, "-p", str(one.port), "cluster", "nodes"]
            text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            if not any(begin in line and " connected" in line for line in text.splitlines()):
                return False
        return True

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        there, back = await asyncio.open_connection("127.0.0.1", self._node.port + BUS)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._carry(reader, back))
                tasks.create_task(self._carry(there, writer, is_held=False))
        finally:
            writer.close()
            back.close()

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_held: bool = True
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(CHUNK):
                if is_held:
                    await self.is_open.wait()
                writer.write(data)
                await writer.drain()
        writer.close()
