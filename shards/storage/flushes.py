"""When the tables of streams are brought up to date: each a while after a change, one by one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

S = TypeVar("S")


class Flushes(Generic[S]):
    """Streams with changes that only their journals hold, in the order in which they are due.

    A flush costs as much as two commits, whatever it finds to write: with changes in hundreds of
    streams they would take half of the time if each stream had its own a quarter of a second later.
    So there is a pause between two of them, and they find the more to write, the more streams
    there are.

    Args:
        flush: begins to write a stream's tables; False when there is nothing to write.
        after_s: from a change to the flush, if nothing else waits.
        pause_s: between two flushes.
    """

    def __init__(self, flush: Callable[[S], bool], after_s: float, pause_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._flush = flush
        self._after_s = after_s
        self._pause_s = pause_s
        self._due: dict[S, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._due)

    def add(self, stream: S) -> None:
        """A stream has something to flush; nothing more happens if that is known."""
        if stream in self._due or self._closed:
            return
        self._due[stream] = self._loop.time() + self._after_s
        if self._timer is None:
            self._timer = self._loop.call_later(self._after_s, self._next)

    def close(self) -> None:
        """Begin no further flush."""
        self._closed = True
        self._due.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _next(self) -> None:
        self._timer = None
        wait_s = 0.0
        while self._due and not wait_s:
            stream, due = next(iter(self._due.items()))
            wait_s = max(due - self._loop.time(), 0.0)
            if not wait_s:
                del self._due[stream]
                if self._flush(stream):
                    wait_s = self._pause_s
        if self._due and not self._closed:
            self._timer = self._loop.call_later(wait_s, self._next)
