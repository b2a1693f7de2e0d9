"""The network between the processes of a world: bytes that take their time, split and joined.

Each direction of a connection is a pipe with a bounded room in the kernel; what does not fit waits
in the writer's transport, which pauses its protocol. A connection can be cut, slowed down, or
stalled (half-open: nobody is told anything).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from tests.sim.loop import SimLoop, World

CHUNK_MAX = 65536


class Endpoint(asyncio.Transport):
    """One end of a connection."""

    def __init__(self, loop: SimLoop, peername: tuple[str, int]) -> None:
        super().__init__({"peername": peername, "sockname": ("127.0.0.1", 1)})
        self.loop = loop
        self.protocol: Any = None
        self.out: Pipe
        self.into: Pipe
        self.closing = False
        self.lost = False
        self.reading_paused = False
        self._buffer = bytearray()
        self._high, self._low = 65536, 16384
        self._writing_paused = False
        self._ended = False
        self.broken = False
        self.incoming: deque[bytes] = deque()
        loop.ends[self] = None

    # What a protocol does with it.

    def get_protocol(self) -> Any:
        return self.protocol

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = 65536 if high is None else high
        self._low = self._high // 4 if low is None else low

    def get_write_buffer_size(self) -> int:
        return len(self._buffer)

    def is_closing(self) -> bool:
        return self.closing

    def is_reading(self) -> bool:
        return not self.reading_paused and not self.closing

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self.closing or not data:
            return
        self.loop.might_die()
        if self.broken:
            self.loop.call_soon(self.reset)
            return
        taken = 0 if self._buffer else self.out.put(data)
        if taken < len(data):
            self._buffer += memoryview(data)[taken:]
            if len(self._buffer) > self._high and not self._writing_paused:
                self._writing_paused = True
                self.protocol.pause_writing()

    def pause_reading(self) -> None:
        self.reading_paused = True

    def resume_reading(self) -> None:
        if self.reading_paused and not self.closing:
            self.reading_paused = False
            for _ in self.incoming:
                self.loop.call_soon(self.take)
            if self._ended:
                self.loop.call_soon(self.ended)
            self.into.pump()

    def close(self) -> None:
        if self.closing:
            return
        self.closing = True
        if not self._buffer:
            self._finish(None)

    def abort(self) -> None:
        if self.lost:
            return
        self._buffer.clear()
        self.out.end(reset=True)
        self._finish(None)

    # What the network does with it.

    def take(self) -> None:
        """Hand the next piece to the protocol."""
        if self.incoming and not self.closing and not self.reading_paused:
            self.protocol.data_received(self.incoming.popleft())

    def ended(self) -> None:
        """The peer sends no more."""
        if self.closing:
            return
        self._ended = bool(self.reading_paused or self.incoming)  # what is there is read first
        if not self._ended and not self.protocol.eof_received():
            self.close()

    def reset(self) -> None:
        """The connection is broken."""
        if not self.lost:
            self._buffer.clear()
            self._finish(ConnectionResetError("Connection reset by peer"))

    def writable(self) -> None:
        """There is room in the kernel."""
        if self.lost:
            return
        taken = self.out.put(self._buffer)
        del self._buffer[:taken]
        if len(self._buffer) <= self._low and self._writing_paused:
            self._writing_paused = False
            self.protocol.resume_writing()
        if self.closing and not self._buffer:
            self._finish(None)

    @property
    def wants_to_write(self) -> bool:
        """Whether something waits for room."""
        return bool(self._buffer)

    def died(self) -> None:
        """The process is gone."""
        self.lost = self.closing = True
        self.out.end(reset=self.loop.world.rng.random() < 0.5)
        self.into.pump()  # what was not read comes to nobody

    def _finish(self, error: Exception | None) -> None:
        if self.lost:
            return
        self.lost = self.closing = True
        self.incoming.clear()
        self.loop.ends.pop(self, None)
        self.out.end()
        self.into.pump()
        self.loop.call_soon(self.protocol.connection_lost, error)


class Pipe:
    """One direction."""

    def __init__(self, connection: Connection, source: Endpoint, target: Endpoint) -> None:
        world = source.loop.world
        self._world = world
        self._connection = connection
        self._source, self._target = source, target
        self._room = int(2 ** (11 + 7 * world.rng.random()))
        self._data = bytearray()
        self._moving = False
        self.ended = False
        self._reset = False

    def put(self, data: bytes | bytearray | memoryview) -> int:
        """Take what there is room for; how much that was."""
        if self.ended:
            return len(data)
        count = min(len(data), self._room - len(self._data))
        if count > 0:
            self._data += memoryview(data)[:count]
            self.pump()
        return max(count, 0)

    @property
    def holds(self) -> bool:
        """Whether something is on the way."""
        return bool(self._data)

    def end(self, *, reset: bool = False) -> None:
        """Nothing more comes."""
        if reset and not self._reset:
            self._reset = True
            if self._world.rng.random() < 0.5:
                self._data.clear()
        if not self.ended:
            self.ended = True
            self.pump()

    def pump(self) -> None:
        """Have the next piece arrive, in a while."""
        if not self._moving and (self._data or self.ended):
            self._moving = True
            self._world.after(self._connection.next_delay(), self._arrive)

    def _arrive(self) -> None:
        self._moving = False
        target, source, data = self._target, self._source, self._data
        if self._connection.stalled:
            return
        if target.lost:  # what comes to nobody is answered so
            data.clear()
            source.loop.call_soon(source.reset)
            return
        if target.reading_paused:
            target.broken = target.broken or self._reset
            return
        if not data:
            if self.ended:
                target.loop.call_soon(target.reset if self._reset else target.ended)
            return
        size = min(len(data), CHUNK_MAX)
        if self._world.rng.random() < self._connection.splits:
            size = 1 + int(self._world.rng.random() * size)
        target.incoming.append(bytes(data[:size]))
        del data[:size]
        target.loop.call_soon(target.take)
        if source.wants_to_write and not source.lost:
            source.loop.call_soon(source.writable)
        self.pump()


class Connection:
    """Two ends and what is between them.

    slowness: by how much longer than usual everything takes.
    """

    def __init__(self, address: str, client: SimLoop, server: SimLoop) -> None:
        world = client.world
        self.world = world
        self.address = address
        self.slowness = 1.0
        self.splits = 0.2 * world.rng.random()
        self.stalled = False
        self.client = Endpoint(client, ("127.0.0.1", 1))
        self.server = Endpoint(server, ("127.0.0.1", 2 + len(server.ends)))
        self.client.out = self.server.into = Pipe(self, self.client, self.server)
        self.server.out = self.client.into = Pipe(self, self.server, self.client)

    @staticmethod
    def delay(world: World, address: str) -> float:
        """How long something usually takes on the way to or from an address."""
        usual_s = 20e-6 if address.startswith("/") else 500e-6
        return usual_s * (0.1 + 4 * world.rng.random() ** 3)

    def next_delay(self) -> float:
        """For the next piece, in either direction."""
        return self.slowness * self.delay(self.world, self.address)

    def cut(self) -> None:
        """Break it; each end learns of it in its own time."""
        for end in (self.client, self.server):
            end.out.end(reset=True)
            self.world.after(self.next_delay(), self._reset, end)

    @staticmethod
    def _reset(end: Endpoint) -> None:
        end.loop.call_soon(end.reset)

    def stall(self, stalled: bool) -> None:
        """Have nothing arrive any more, not even an end; or again."""
        self.stalled = stalled
        if not stalled:
            self.client.out.pump()
            self.server.out.pump()

    @property
    def open(self) -> bool:
        """Whether both ends are."""
        return not self.client.lost and not self.server.lost

    @property
    def quiet(self) -> bool:
        """Whether nothing is on the way."""
        return not any(
            end.incoming or end.wants_to_write or end.out.holds
            for end in (self.client, self.server)
        )


class Network:
    """Makes connections, and knows them."""

    def __init__(self) -> None:
        self._connections: list[Connection] = []

    def connect(
        self,
        loop: SimLoop,
        address: str,
        factory: Callable[[], Any],
        future: asyncio.Future[Any],
    ) -> None:
        """Connect `loop` to `address`, in a while."""
        delay_s = Connection.delay(loop.world, address)
        loop.world.after(delay_s, self._connect, loop, address, factory, future)

    def _connect(
        self,
        loop: SimLoop,
        address: str,
        factory: Callable[[], Any],
        future: asyncio.Future[Any],
    ) -> None:
        """The kernel accepts, also for a process that is busy or stands still."""
        listener = loop.world.listeners.get(address)
        if listener is None:
            loop.call_soon(_refuse, future, address)
        elif not loop.dead:
            connection = Connection(address, loop, listener.loop)
            self._connections.append(connection)
            listener.loop.call_soon(_opened, connection.server, listener.factory)
            loop.call_soon(_connected, connection.client, factory, future)

    def open(self) -> list[Connection]:
        """The connections that are open."""
        self._connections = [c for c in self._connections if c.open]
        return self._connections


def _refuse(future: asyncio.Future[Any], address: str) -> None:
    if not future.done():
        future.set_exception(ConnectionRefusedError(f"nobody listens at {address}"))


def _opened(end: Endpoint, factory: Callable[[], Any]) -> None:
    end.protocol = factory()
    end.protocol.connection_made(end)


def _connected(end: Endpoint, factory: Callable[[], Any], future: asyncio.Future[Any]) -> None:
    if future.done():  # whoever wanted it has given up
        end.protocol = asyncio.Protocol()
        end.abort()
        return
    _opened(end, factory)
    future.set_result((end, end.protocol))
