"""A raw WebSocket connection: sends anything, keeps everything that it gets, in order."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self, cast

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

PATIENCE_S = 10.0
"""How long a test waits for something that must come. Only ends what would hang."""

QUIET_S = 0.05
"""After a round trip, how long nothing may come until nothing more is expected."""


class Closed(NamedTuple):
    """The end of a connection, as the client saw it: 1006 when no close frame came."""

    code: int
    reason: str


class Connection:
    """Use `open`. Everything in here belongs to the loop that opened it."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.received: list[Any] = []  # everything, ever: parsed text frames, `bytes`, `Closed`
        self.waiting: list[Any] = []  # what `next` did not take yet
        self._arrived = asyncio.Event()
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def open(
        cls,
        url: str,
        headers: Mapping[str, str] | None = None,
        subprotocols: list[str] | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> Self:
        """Connect to `url`. Raises what `websockets` raises when the upgrade is refused."""
        socket = await connect(
            url,
            additional_headers=headers,
            subprotocols=cast("list[Subprotocol] | None", subprotocols),
            compression=None,
            ping_interval=None,
            max_size=None,
            open_timeout=PATIENCE_S,
            close_timeout=PATIENCE_S,
            proxy=None,
            ssl=tls,
        )
        return cls(socket)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _read(self) -> None:
        try:
            while True:
                message = await self.socket.recv()
                if isinstance(message, str):
                    self._take(json.loads(message, parse_constant=_no_constant))
                else:
                    self._take(message)
        except ConnectionClosed as end:
            close = end.rcvd
            self._take(Closed(close.code, close.reason) if close else Closed(1006, ""))

    def _take(self, frame: Any) -> None:
        self.received.append(frame)
        self._keep(frame)

    def _keep(self, frame: Any) -> None:
        self.waiting.append(frame)
        self._arrived.set()

    async def send(self, message: Any) -> None:
        """Send `message` as JSON in a text frame."""
        await self.socket.send(json.dumps(message))

    async def send_text(self, text: str) -> None:
        await self.socket.send(text)

    async def send_binary(self, data: bytes) -> None:
        await self.socket.send(data)

    async def next(
        self, matches: Callable[[Any], bool] = lambda _: True, patience_s: float = PATIENCE_S
    ) -> Any:
        """Take the first frame for which `matches` holds, waiting for it if need be."""
        try:
            async with asyncio.timeout(patience_s):
                while True:
                    for index, frame in enumerate(self.waiting):
                        if matches(frame):
                            return self.waiting.pop(index)
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            raise AssertionError(
                f"nothing came that was expected; waiting: {self.waiting}"
            ) from None

    async def ping(self, payload: str = "") -> None:
        """A WebSocket ping; returns when the pong with the same payload came."""
        async with asyncio.timeout(PATIENCE_S):
            await (await self.socket.ping(payload or None))

    async def quiet(self, quiet_s: float = QUIET_S) -> None:
        """Return when a round trip was made after which nothing came for a short while."""
        while True:
            count = len(self.received)
            with contextlib.suppress(ConnectionClosed):
                await self.ping()
            await asyncio.sleep(quiet_s)
            if len(self.received) == count:
                return

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Close in order. The `Closed` of it comes as the last frame."""
        await self.socket.close(code, reason)
        await self._reader

    async def abort(self) -> None:
        """End the TCP connection without a close frame."""
        self.socket.transport.abort()
        await self.socket.wait_closed()
        await self._reader


def _no_constant(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")
