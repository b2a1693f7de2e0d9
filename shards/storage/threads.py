"""Threads for blocking work, told of by callbacks.

An executor makes a future with a lock of its own for each piece of work and a second one for the
loop; a commit waits for both hops, so they are kept as short as they can be (half the time).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")

Told = Callable[[T | None, Exception | None], None]
"""Called on the loop with what the work returned, or raised."""


class Threads:
    """Does work on `count` threads, in the order in which it came."""

    def __init__(self, count: int, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._count = count
        self._name = name
        self._under_way = 0

    def submit(self, work: Callable[[], T], told: Told[T]) -> None:
        """Have `work` done, and `told` called."""

        def run() -> None:
            result, error = None, None
            try:
                result = work()
            except Exception as raised:  # noqa: BLE001 - whoever is told raises it
                error = raised
            self._loop.call_soon_threadsafe(self._done, told, result, error)

        self._under_way += 1
        if len(self._threads) < min(self._under_way, self._count):  # few that are warm are better
            name = f"{self._name}-{len(self._threads)}"
            thread = threading.Thread(target=self._serve, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()
        self._work.put(run)

    async def run(self, work: Callable[[], T]) -> T:
        """Have `work` done; what it returns or raises."""
        future: asyncio.Future[T] = self._loop.create_future()

        def told(result: T | None, error: Exception | None) -> None:
            if future.cancelled():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]  # None is T's own then

        self.submit(work, told)
        return await future

    def close(self) -> None:
        """End the threads when all work is done. Blocking."""
        for _ in self._threads:
            self._work.put(None)
        for thread in self._threads:
            thread.join()

    def _done(self, told: Told[T], result: T | None, error: Exception | None) -> None:
        self._under_way -= 1
        told(result, error)

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            work()
