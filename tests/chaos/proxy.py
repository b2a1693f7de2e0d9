"""A TCP proxy before a port, so that connections can be cut that neither end meant to end."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress

_READ_BYTES = 65536


class Proxy:
    """Use `open`; connections that come are carried to `host:port`."""

    def __init__(self, host: str, port: int) -> None:
        self._target = host, port
        self._server: asyncio.Server | None = None
        self._writers: dict[asyncio.StreamWriter, asyncio.StreamWriter] = {}
        self._carriers: set[asyncio.Task[None]] = set()

    async def open(self) -> str:
        """The URL to connect to."""
        self._server = await asyncio.start_server(self._accepted, "127.0.0.1", 0)
        return f"ws://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        self.cut(1.0, random.Random(0))
        if self._carriers:
            await asyncio.wait(self._carriers)

    def cut(self, share: float, rng: random.Random) -> int:
        """Reset that share of the connections; how many."""
        chosen = [pair for pair in self._writers.items() if rng.random() < share]
        for one, other in chosen:
            one.transport.abort()
            other.transport.abort()
        return len(chosen)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
        except OSError:  # it does not run just now
            writer.transport.abort()
            return
        self._writers[writer] = far_writer
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            carrier = asyncio.create_task(self._carry(source, sink, writer))
            self._carriers.add(carrier)
            carrier.add_done_callback(self._carriers.discard)

    async def _carry(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        writer: asyncio.StreamWriter,
    ) -> None:
        with suppress(OSError):
            while data := await source.read(_READ_BYTES):
                sink.write(data)
                await sink.drain()
        sink.close()
        self._writers.pop(writer, None)
