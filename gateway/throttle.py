"""A bound on how many messages a second one connection may send: more wait in its socket."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gateway.connection import PAUSED_BY_RATE, Connection

BURST_S = 2.0
"""A connection that was quiet may send what it may in so many seconds at once."""


class Throttle:
    """A token bucket for one connection; past it nothing is read from it until there are tokens.

    Args:
        go_on: called when there are; what was read already may have waited for it.
    """

    __slots__ = ("_at", "_connection", "_go_on", "_loop", "_per_s", "_tokens", "throttled")

    def __init__(self, connection: Connection, per_s: float, go_on: Callable[[], None]) -> None:
        self._connection = connection
        self._go_on = go_on
        self._per_s = per_s
        self._loop = asyncio.get_running_loop()
        self._at = self._loop.time()
        self._tokens = per_s * BURST_S
        self.throttled = False

    def count(self) -> bool:
        """A message came. True when it is the one after which reading stops."""
        self._tokens -= 1
        if self._tokens >= 0 or self.throttled:
            return False
        self._refill()
        if self._tokens >= 0:
            return False
        self.throttled = True
        self._connection.pause_reading(PAUSED_BY_RATE)
        self._loop.call_later(-self._tokens / self._per_s, self._end)
        return True

    def _refill(self) -> None:
        now = self._loop.time()
        self._tokens = min(self._tokens + (now - self._at) * self._per_s, self._per_s * BURST_S)
        self._at = now

    def _end(self) -> None:
        self._refill()
        if self._tokens < 0:  # more came in what had been read already
            self._loop.call_later(-self._tokens / self._per_s, self._end)
            return
        self.throttled = False
        self._connection.resume_reading(PAUSED_BY_RATE)
        self._go_on()
