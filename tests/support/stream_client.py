"""A raw client of the stream port (protocol section 5), and raw HTTP to it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import Any, NamedTuple, Self

from websockets.frames import Frame, Opcode

from tests.support.connection import PATIENCE_S, QUIET_S, Connection
from tests.support.worker import Worker


class StreamClient(Connection):
    """A client: `join`, `leave`, `next` for the frames that come."""

    async def join(
        self, stream: str, group: str, subscription_id: str = "s1", **fields: Any
    ) -> dict[str, Any]:
        """Join and take the next frame, the `sync` when nothing else is going on."""
        await self.send_join(stream, group, subscription_id, **fields)
        frame: dict[str, Any] = await self.next()
        return frame

    async def send_join(
        self, stream: str, group: str, subscription_id: str = "s1", **fields: Any
    ) -> None:
        data = {"subscriptionId": subscription_id, "streamName": stream, "groupId": group}
        await self.send({"type": "join", "data": data | fields})

    async def send_leave(
        self, stream: str, group: str, subscription_id: str = "s1", **fields: Any
    ) -> None:
        data = {"subscriptionId": subscription_id, "streamName": stream, "groupId": group}
        await self.send({"type": "leave", "data": data | fields})

    @property
    def frames(self) -> list[dict[str, Any]]:
        """Every JSON frame that came so far."""
        return [frame for frame in self.received if isinstance(frame, dict)]


async def settled(
    clients: Iterable[Connection],
    worker: Worker | None = None,
    groups: Iterable[tuple[str, str]] = (),
    quiet_s: float = QUIET_S,
) -> None:
    """Return when nothing more comes from what was done before.

    A barrier first: a round trip on the worker's connection through the shards of `groups` and one
    on each client. Then a short time in which nothing may come, else all of it again.
    """
    clients = list(clients)
    while True:
        count = sum(len(client.received) for client in clients)
        asked = len(worker.log) if worker else 0
        if worker:
            for stream, group in groups:
                names = {"stream_name": stream, "group_id": group, "item_id": "no such item"}
                await worker.call("stream::get", names)
            await worker.idle()
        await asyncio.gather(*(client.quiet(quiet_s) for client in clients))
        if worker and not clients:
            await worker.quiet(quiet_s)
        if count == sum(len(client.received) for client in clients) and (
            not worker or asked == len(worker.log)
        ):
            return


class Response(NamedTuple):
    """The head of an HTTP answer, names of headers in lower case, and its body."""

    status: int
    headers: dict[str, str]
    body: str


UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
"""A request that upgrades to a WebSocket."""


class RawHttp:
    """A request sent byte for byte; after a 101 JSON frames can be exchanged."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def request(cls, url: str, request: bytes) -> Self:
        """Connect to the host and port of `url` (`ws://host:port…`) and send `request`."""
        host, port = url.split("/")[2].rsplit(":", 1)
        self = cls(*await asyncio.open_connection(host, int(port)))
        self.writer.write(request)
        await self.writer.drain()
        return self

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.transport.abort()

    async def response(self, patience_s: float = PATIENCE_S) -> Response:
        """The answer. Status 0 when the connection ended without one."""
        async with asyncio.timeout(patience_s):
            try:
                head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            except (asyncio.IncompleteReadError, ConnectionError):
                return Response(0, {}, "")
            status_line, *lines = head.split("\r\n")[:-2]
            pairs = (line.split(":", 1) for line in lines)
            headers = {name.lower(): value.strip() for name, value in pairs}
            length = int(headers.get("content-length", 0))
            body = await self.reader.read(length) if length else b""
        return Response(int(status_line.split()[1]), headers, body.decode())

    def send(self, message: Any) -> None:
        """Send a JSON text frame (after a 101)."""
        frame = Frame(Opcode.TEXT, json.dumps(message).encode())
        self.writer.write(frame.serialize(mask=True))

    async def frame(self, patience_s: float = PATIENCE_S) -> Any:
        """The next text frame, parsed. What is not one is passed over."""
        async with asyncio.timeout(patience_s):
            while True:
                opcode, payload = await self._next_frame()
                if opcode is Opcode.TEXT:
                    return json.loads(payload)

    async def close_code(self, patience_s: float = PATIENCE_S) -> int:
        """The code of the close frame that comes; 1006 when the connection ends without one."""
        async with asyncio.timeout(patience_s):
            try:
                while True:
                    opcode, payload = await self._next_frame()
                    if opcode is Opcode.CLOSE:
                        return int.from_bytes(payload[:2])
            except (asyncio.IncompleteReadError, ConnectionError):
                return 1006

    async def _next_frame(self) -> tuple[Opcode, bytes]:
        first, second = await self.reader.readexactly(2)
        length = second & 0x7F
        if length >= 126:
            length = int.from_bytes(await self.reader.readexactly(2 if length == 126 else 8))
        return Opcode(first & 0x0F), await self.reader.readexactly(length)
