"""A client of the stream port that neither misses nor doubles a change.

    async with Client("ws://localhost:3112") as client:
        async for change in client.watch("chat", "room-1"):
            print(change.kind, change.item_id, change.data)

It connects, connects again after every loss, and goes on where it was. When the broker no longer
keeps what was missed, the next change is a `sync`, which has the whole state. `BlockingClient` is
the same for programs without asyncio.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import random
import ssl
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import CancelledError
from contextlib import suppress
from types import MappingProxyType
from typing import Any, Literal, Self, TypeVar

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.uri import parse_uri

from broker.client_state import (
    Change,
    ClientState,
    Kind,
    Target,
    Unauthorized,
    Watching,
    backoff_s,
)
from broker.errors import BrokerError, ProtocolError
from broker.names import Group

__all__ = ["BlockingClient", "BlockingWatch", "Change", "Client", "Kind", "Unauthorized", "Watch"]

WAITING_MAX = 1000
"""Changes of one watch that wait to be taken; past it the client stops reading its socket."""
FRAME_BYTES_MAX = 128 * 1024 * 1024
"""More than any broker sends: a sync holds at most what `response_bytes_max` allows."""
OPEN_S_MAX = 20.0
PING_INTERVAL_S = 20.0
PING_S_MAX = 20.0
"""How long the broker may take to answer a ping. A client that is not read from, because a watch
is full, gets no answer either: it connects again once there is room."""
CLOSE_S_MAX = 5.0

_UNWANTED = range(4400, 4500)
"""Close codes: the client, as it is, had to go. It waits longer each time that happens."""
_RETRIED = frozenset({408, 425, 429})  # beside all of 5xx

Token = str | Callable[[], str | Awaitable[str]] | None
"""A token, or what gives one, asked each time the client connects."""

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class Client:
    """A connection to the stream port, kept up, and the watches on it.

    Use it as an asynchronous context manager, or call `close`. It connects when the first watch
    is made, and belongs to the loop that made it.

    Args:
        url: of the stream port, `ws://` or `wss://`.
        token: sent as `Authorization: Bearer <token>`.
        headers: further headers of the handshake.
        tls: for `wss://`, instead of the default context.
        proxy: URL of a proxy; True: what the environment says; None: none.
        waiting_max: changes of one watch that wait to be taken.

    Raises:
        websockets.exceptions.InvalidURI: `url` is not one of a WebSocket.
    """

    def __init__(
        self,
        url: str,
        *,
        token: Token = None,
        headers: Mapping[str, str] | None = None,
        tls: ssl.SSLContext | None = None,
        proxy: str | Literal[True] | None = True,
        waiting_max: int = WAITING_MAX,
    ) -> None:
        parsed = parse_uri(url)
        self._url = url
        self._address = f"{parsed.host}:{parsed.port}"  # for people: a URL may hold a token
        self._token = token
        self._headers = dict(headers or {})
        self._tls = tls
        self._proxy = proxy
        self._waiting_max = waiting_max
        self._rng = random.Random()
        self._state = ClientState()
        self._full: set[_Waiting] = set()
        self._outbox: asyncio.Queue[str] = asyncio.Queue()
        self._running: asyncio.Task[None] | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def watch(self, stream: str, group_id: str, item_id: str | None = None) -> Watch:
        """Watch a group, or one item of it: an asynchronous iterator of changes, a sync first.

        A watch ends when it is closed, or when nothing refers to it any more. One that is not
        iterated over holds up all others of the client once `waiting_max` changes wait in it.

        Raises:
            RuntimeError: the client is closed.
        """
        if self._closed:
            raise RuntimeError("the client is closed")
        waiting = _Waiting(Target(Group(stream, group_id), item_id), self._waiting_max, self._full)
        self._send(self._state.watch(waiting))
        if self._running is None:
            self._running = asyncio.get_running_loop().create_task(self._run())
            self._running.add_done_callback(self._ended)
        return Watch(waiting, self, asyncio.get_running_loop())

    async def close(self) -> None:
        """End every watch and the connection."""
        self._closed = True
        self._state.fail(None)
        if (running := self._running) is not None:
            running.cancel()
            await asyncio.wait([running])

    def _unwatch(self, waiting: _Waiting) -> None:
        self._send(self._state.unwatch(waiting))

    def _send(self, frames: list[str]) -> None:
        for frame in frames:
            self._outbox.put_nowait(frame)

    def _ended(self, running: asyncio.Task[None]) -> None:
        """Connecting again is no use: who watches is told why."""
        self._running = None
        if not running.cancelled() and (error := running.exception()) is not None:
            self._state.fail(error)

    # The connection.

    async def _run(self) -> None:
        """Connect, again and again, until it makes no sense any more.

        Raises:
            Unauthorized: the handshake was refused.
            BrokerError: there is no stream port at the address.
        """
        failures = 0
        while True:
            failures = 1 if await self._connect() else failures + 1
            delay_s = backoff_s(failures, self._rng)
            _log.debug("connecting to %s again in %.1f s", self._address, delay_s)
            await asyncio.sleep(delay_s)

    async def _connect(self) -> bool:
        """One connection to its end; whether it was of any use."""
        options: dict[str, Any] = {} if self._tls is None else {"ssl": self._tls}
        try:
            async with connect(
                self._url,
                additional_headers=await self._handshake_headers(),
                compression=None,
                proxy=self._proxy,
                open_timeout=OPEN_S_MAX,
                ping_interval=PING_INTERVAL_S,
                ping_timeout=PING_S_MAX,
                close_timeout=CLOSE_S_MAX,
                max_size=FRAME_BYTES_MAX,
                **options,
            ) as socket:
                return await self._serve(socket)
        except InvalidStatus as refusal:
            self._check_status(refusal.response.status_code)
        except (OSError, WebSocketException) as error:
            _log.warning("cannot connect to %s: %s", self._address, error)
        return False

    async def _handshake_headers(self) -> dict[str, str]:
        token = self._token
        if callable(token):
            given = token()
            token = await given if inspect.isawaitable(given) else given
        return (
            self._headers if token is None else self._headers | {"Authorization": f"Bearer {token}"}
        )

    def _check_status(self, status: int) -> None:
        answer = f"{self._address} answered the handshake with {status}"
        if status in (401, 403):
            raise Unauthorized("unauthorized", answer)
        if status < 500 and status not in _RETRIED:
            raise BrokerError("handshake_refused", answer)
        _log.warning("%s", answer)

    async def _serve(self, socket: ClientConnection) -> bool:
        """Read and write until the connection ends; whether it was of any use."""
        self._outbox = asyncio.Queue()
        self._send(self._state.connect())
        writer = asyncio.create_task(self._write(socket, self._outbox))
        try:
            while True:
                frame = await socket.recv(decode=False)
                try:
                    self._send(self._state.receive(frame))
                except ProtocolError as error:
                    _log.warning("%s", error)
                while self._full:
                    await next(iter(self._full)).room.wait()
        except ConnectionClosed as end:
            _log.info("connection to %s lost: %s", self._address, end)
            unwanted = end.rcvd is not None and end.rcvd.code in _UNWANTED
            return self._state.answered and not unwanted
        finally:
            self._state.disconnect()
            writer.cancel()

    async def _write(self, socket: ClientConnection, outbox: asyncio.Queue[str]) -> None:
        with suppress(ConnectionClosed):  # the reader sees it as well
            while True:
                await socket.send(await outbox.get())


class _Waiting(Watching):
    """A watch and who waits for it. Does not refer to its `Watch`, which ends it when let go of."""

    def __init__(self, target: Target, waiting_max: int, full: set[_Waiting]) -> None:
        super().__init__(target)
        self.arrived = asyncio.Event()
        self.room = asyncio.Event()
        self._waiting_max = waiting_max
        self._full = full

    def deliver(self, change: Change) -> None:
        super().deliver(change)
        self.arrived.set()
        if len(self.waiting) >= self._waiting_max:
            self.room.clear()
            self._full.add(self)

    def end(self, error: BaseException | None) -> None:
        super().end(error)
        self.arrived.set()
        self._make_room()

    def take(self) -> Change | None:
        change = super().take()
        if self in self._full and len(self.waiting) < self._waiting_max:
            self._make_room()
        return change

    def _make_room(self) -> None:
        self._full.discard(self)
        self.room.set()


class Watch:
    """An asynchronous iterator of the changes of a group or an item. Made by `Client.watch`.

    Iterating raises `Unauthorized` when the broker refuses the join or the handshake,
    `InvalidRequest` when it refuses the names, `BrokerError` when there is no stream port.
    """

    def __init__(self, waiting: _Waiting, client: Client, loop: asyncio.AbstractEventLoop) -> None:
        self._waiting = waiting
        self._client = client
        self._end = weakref.finalize(self, _end_soon, loop, client, waiting)
        self._end.atexit = False

    @property
    def state(self) -> Any:
        """Of a group: a read-only view of item ids to values, in order of first insertion.

        Of an item: its value, or None. As of the change that was taken last.
        """
        state = self._waiting.state
        return state if self._waiting.target.item_id is not None else MappingProxyType(state)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Change:
        change = await self.next()
        if change is None:
            raise StopAsyncIteration
        return change

    async def next(self) -> Change | None:
        """The next change; None when the watch, or the client, is closed.

        Raises:
            Unauthorized, InvalidRequest, BrokerError: what ended it.
        """
        waiting = self._waiting
        while (change := waiting.take()) is None:
            if waiting.ended:
                if waiting.error is not None:
                    raise waiting.error
                return None
            waiting.arrived.clear()
            await waiting.arrived.wait()
        return change

    def close(self) -> None:
        """End the watch; changes that wait are dropped."""
        self._client._unwatch(self._waiting)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


def _end_soon(loop: asyncio.AbstractEventLoop, client: Client, waiting: _Waiting) -> None:
    """End a watch from whatever thread lets go of it."""
    with suppress(RuntimeError):  # the loop is closed, and with it everything else
        loop.call_soon_threadsafe(client._unwatch, waiting)


class BlockingClient:
    """`Client` for programs without asyncio: a thread of its own runs it.

        with BlockingClient("ws://localhost:3112") as client:
            for change in client.watch("chat", "room-1"):
                print(change)

    Arguments as of `Client`. Watches may be used from any thread, each from one at a time.
    """

    def __init__(
        self,
        url: str,
        *,
        token: Token = None,
        headers: Mapping[str, str] | None = None,
        tls: ssl.SSLContext | None = None,
        proxy: str | Literal[True] | None = True,
        waiting_max: int = WAITING_MAX,
    ) -> None:
        self._client = Client(
            url, token=token, headers=headers, tls=tls, proxy=proxy, waiting_max=waiting_max
        )
        self._closed = False
        self._closing = threading.Lock()
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(started)), daemon=True)
        self._thread.start()
        started.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def watch(self, stream: str, group_id: str, item_id: str | None = None) -> BlockingWatch:
        """As `Client.watch`, an iterator.

        Raises:
            RuntimeError: the client is closed.
        """

        async def begin() -> Watch:
            return self._client.watch(stream, group_id, item_id)

        return BlockingWatch(self, self._call(begin))

    def close(self) -> None:
        """End every watch, the connection and the thread."""
        with self._closing:
            if not self._closed:
                self._loop.call_soon_threadsafe(self._stop.set)
            self._closed = True
        self._thread.join()

    async def _run(self, started: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        started.set()
        await self._stop.wait()
        await self._client.close()

    def _call(self, work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        """Do `work` in the thread and wait for it.

        Raises:
            RuntimeError: the client is closed.
        """
        with self._closing:
            if self._closed:
                raise RuntimeError("the client is closed")
            future = asyncio.run_coroutine_threadsafe(work(), self._loop)
        try:
            return future.result()
        except CancelledError:
            raise RuntimeError("the client is closed") from None
        finally:
            future.cancel()  # when this thread was interrupted: nobody waits any more


class BlockingWatch:
    """An iterator of the changes of a group or an item. Made by `BlockingClient.watch`."""

    def __init__(self, client: BlockingClient, watch: Watch) -> None:
        self._client = client
        self._watch = watch

    @property
    def state(self) -> Any:
        """As of `Watch.state`."""
        return self._watch.state

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Change:
        change = self.next()
        if change is None:
            raise StopIteration
        return change

    def next(self) -> Change | None:
        """As of `Watch.next`."""
        try:
            return self._client._call(self._watch.next)
        except RuntimeError:
            if self._client._closed:
                return None
            raise

    def close(self) -> None:
        """End the watch; changes that wait are dropped."""
        self._watch._end()
