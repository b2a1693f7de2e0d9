"""A world of processes on one thread: an event loop for each, one scheduler, one virtual clock.

A process runs its callbacks in the order in which they came, as asyncio promises; which process
runs next is drawn from the seed. Time passes only by the world's hand, so waits cost nothing. A
process can be killed between any two callbacks, and within one, where it writes to a socket or
hands work to a thread.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import random
from asyncio.events import _set_running_loop
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

STEP_S = 1e-6
"""How long a callback takes."""
WORK_S = (20e-6, 2e-3)
"""How long a thread takes to begin, and to tell that it is done; mostly the shorter time."""


class Killed(BaseException):
    """The process ends here, within a callback."""


class End(Protocol):
    """A process's end of a connection."""

    def died(self) -> None:
        """The process is gone."""


Connect = Callable[["SimLoop", str, Callable[[], Any], "asyncio.Future[Any]"], None]
"""Connects a loop to an address; the protocol is made by the third, the fourth is told."""


class World:
    """The scheduler, its clock and its randomness.

    Args:
        seed: everything follows from it.
        connect: the network.
    """

    def __init__(self, seed: int, connect: Connect) -> None:
        self.rng = random.Random(seed)
        self.now = 1000.0
        self.steps = 0
        self.faults: list[tuple[str, dict[str, Any]]] = []
        """Exceptions that nobody caught, with the process's name."""
        self.listeners: dict[str, Listener] = {}
        self.loops: list[SimLoop] = []
        self.stopped = False
        self.working: SimLoop | None = None
        """The process of which a thread did something last."""
        self.connect = connect
        self._timers: list[tuple[float, int, asyncio.Handle | _Call]] = []
        self._number = 0
        self._runnable: list[SimLoop] = []

    def run(self) -> None:
        """Let everything run until `stopped` is set."""
        try:
            self._run()
        finally:
            _set_running_loop(None)

    def _run(self) -> None:
        timers, runnable = self._timers, self._runnable
        draw = self.rng.random
        running: SimLoop | None = None
        while not self.stopped:
            if timers and (not runnable or timers[0][0] <= self.now):
                self._wake()
                continue
            assert runnable, "nothing will ever happen again"
            index = int(draw() * len(runnable))
            loop = runnable[index]
            self.now += STEP_S
            self.steps += 1
            handle = loop.ready.popleft()
            if not loop.ready:
                runnable[index] = runnable[-1]
                runnable.pop()
                loop.waits_to_run = False
            if not handle._cancelled:
                if loop is not running:  # it costs as much as a callback
                    _set_running_loop(loop)
                    running = loop
                handle._run()

    def _wake(self) -> None:
        when, _, entry = heapq.heappop(self._timers)
        self.now = max(self.now, when)
        if isinstance(entry, tuple):
            callback, args = entry
            callback(*args)
        elif not entry._cancelled and not entry._loop.dead:
            entry._loop.push(entry)

    def at(self, when: float, entry: asyncio.Handle | _Call) -> None:
        """Have a loop run a handle at a time; or call back, outside of all processes."""
        self._number += 1
        heapq.heappush(self._timers, (when, self._number, entry))

    def after(self, delay_s: float, callback: Callable[..., None], *args: Any) -> None:
        """Call back, outside of all processes, after a delay."""
        self._number += 1
        heapq.heappush(self._timers, (self.now + delay_s, self._number, (callback, args)))

    def may_run(self, loop: SimLoop) -> None:
        """The loop has something to do."""
        if not loop.waits_to_run and not loop.paused and not loop.dead:
            loop.waits_to_run = True
            self._runnable.append(loop)

    def may_not_run(self, loop: SimLoop) -> None:
        """The loop runs no more, for now or for ever."""
        if loop.waits_to_run:
            loop.waits_to_run = False
            self._runnable.remove(loop)

    def close(self) -> None:
        """End all processes, without a sound. Not before: what a collector calls comes at random,
        so everything is kept until then."""
        for loop in self.loops:
            loop.dead = True
        for loop in self.loops:
            loop.bury()
        self.loops.clear()
        self._timers.clear()
        self._runnable.clear()
        self.listeners.clear()


_Call = tuple[Callable[..., None], tuple[Any, ...]]


class Listener:
    """A listening socket: what `create_server` and `create_unix_server` return."""

    def __init__(
        self, loop: SimLoop, address: str, factory: Callable[[], asyncio.BaseProtocol]
    ) -> None:
        self.loop = loop
        self.address = address
        self.factory = factory
        loop.world.listeners[address] = self

    def close(self) -> None:
        """Listen no more."""
        if self.loop.world.listeners.get(self.address) is self:
            del self.loop.world.listeners[self.address]


class ListeningSocket:
    """Stands for a socket that listens at an address."""

    def __init__(self, address: str) -> None:
        self.address = address

    def getsockname(self) -> tuple[str, int]:
        """Host and port, as a socket says it."""
        return "127.0.0.1", 1


class SimLoop(asyncio.AbstractEventLoop):
    """The event loop of one life of one process."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.ready: deque[asyncio.Handle] = deque()
        self.waits_to_run = False
        self.paused = False
        self.dead = False
        self.ends: dict[End, None] = {}
        self.dies_in = 0
        """Counts down what the process does to the outside; when it gets to 0 it is killed."""
        self.killed: Callable[[], None] | None = None
        self._tasks: list[asyncio.Task[Any]] = []
        self._tasks_limit = 64
        world.loops.append(self)

    # What a process does with it.

    def time(self) -> float:
        return self.world.now

    def call_soon(  # type: ignore[override]  # the library says which arguments go with which callback
        self,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        if not self.dead:
            self.push(handle)
        return handle

    def call_later(  # type: ignore[override]
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        return self.call_at(self.world.now + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        if not self.dead:
            self.world.at(when, timer)
        return timer

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It stays among the timers and does nothing."""

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(  # type: ignore[override]
        self,
        coro: Coroutine[Any, Any, Any],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
    ) -> asyncio.Task[Any]:
        task = asyncio.Task(coro, loop=self, name=name or "", context=context)
        self._tasks.append(task)
        if len(self._tasks) > self._tasks_limit:
            self._tasks = [task for task in self._tasks if not task.done()]
            self._tasks_limit = 64 + 2 * len(self._tasks)
        return task

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        future = self.create_future()
        self.in_thread(partial(func, *args), partial(_settle, future))
        return future

    def in_thread(
        self, work: Callable[[], Any], told: Callable[[Any, Exception | None], None] | None
    ) -> None:
        """Have a thread do `work`: all of it at one moment; `told` is called at a later one with
        what it returned or raised."""
        self.might_die()
        self.world.after(self._work_time(), self._work, work, told)

    def _work(
        self, work: Callable[[], Any], told: Callable[[Any, Exception | None], None] | None
    ) -> None:
        if self.dead:
            return
        result, error = None, None
        self.world.working = self
        try:
            result = work()
        except Exception as raised:  # noqa: BLE001 - whoever is told has it
            error = raised
        if told is not None:
            self.world.after(self._work_time(), self.call_soon, told, result, error)

    def _work_time(self) -> float:
        short, long = WORK_S
        return short + (long - short) * self.world.rng.random() ** 4

    async def create_unix_connection(  # type: ignore[override]
        self, protocol_factory: Callable[[], Any], path: str, **_: Any
    ) -> tuple[Any, Any]:
        return await self.connect(protocol_factory, path)

    async def create_unix_server(  # type: ignore[override]
        self, protocol_factory: Callable[[], Any], *, sock: ListeningSocket, **_: Any
    ) -> Listener:
        return Listener(self, sock.address, protocol_factory)

    async def create_server(  # type: ignore[override]
        self,
        protocol_factory: Callable[[], Any],
        host: None = None,
        port: None = None,
        *,
        sock: ListeningSocket,
        **_: Any,
    ) -> Listener:
        return Listener(self, sock.address, protocol_factory)

    async def connect(self, factory: Callable[[], Any], address: str) -> tuple[Any, Any]:
        """Connect to a listener.

        Raises:
            ConnectionRefusedError: nobody listens there.
        """
        future: asyncio.Future[tuple[Any, Any]] = self.create_future()
        self.world.connect(self, address, factory, future)
        return await future

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return self.dead

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if self.dead or isinstance(context.get("exception"), Killed):
            return
        self.world.faults.append((self.name, context))

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        """Nothing: the world has it."""

    # What the world does with it.

    def push(self, handle: asyncio.Handle) -> None:
        """Have `handle` run behind what is there."""
        self.ready.append(handle)
        if not self.waits_to_run:
            self.world.may_run(self)

    def might_die(self) -> None:
        """The process is about to do something to the outside.

        Raises:
            Killed: it is dead before it did.
        """
        if self.dies_in and not self.dead:
            self.dies_in -= 1
            if not self.dies_in:
                assert self.killed is not None, "set by whoever counts down"
                self.killed()
                raise Killed

    def pause(self) -> None:
        """Stand still; time goes on."""
        self.paused = True
        self.world.may_not_run(self)

    def resume(self) -> None:
        """Go on."""
        self.paused = False
        if self.ready and not self.dead:
            self.world.may_run(self)

    def kill(self) -> None:
        """Be gone, as by SIGKILL: what sockets were handed stays with the kernel."""
        if self.dead:
            return
        self.dead = True
        self.ready.clear()
        self.world.may_not_run(self)
        for listener in [x for x in self.world.listeners.values() if x.loop is self]:
            listener.close()
        for end in list(self.ends):
            end.died()

    def bury(self) -> None:
        """Let go of the tasks of a dead loop."""
        _set_running_loop(self)
        for task in self._tasks:
            if not task.done():
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                with suppress(RuntimeError, Killed):  # it wants to wait for something once more
                    task.get_coro().close()  # type: ignore[union-attr]
        _set_running_loop(None)
        self._tasks.clear()


def _settle(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.cancelled():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
