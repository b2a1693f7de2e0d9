"""What it costs to tell clients of events, measured for each piece that a shard sent at once."""

from __future__ import annotations

import time

from broker.hot import Sampler
from broker.messages import Event
from broker.metrics import SECONDS, SIZES, Histogram
from gateway.hub import Hub

_TIMESTAMP = b'"timestamp":'  # near the beginning of every envelope, see `shards.events`
_LOOKED_AT = 64
EXACT = 50
"""Pieces of a second that are all measured; each group of a piece is counted by its name then."""


class FanOut:
    """Flushes the hub.

    Attributes: `durations` in seconds; `sizes`, frames to clients; `delays`, seconds from a
    change's timestamp, which it gets just before it is committed, to when its frames are handed
    to sockets, by the wall clock's milliseconds. Of the first pieces of a second, and then of one
    in a few.
    """

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self.last: Event | None = None
        """Of the events of the piece that is being taken; it is looked at."""
        self._sampler = Sampler(EXACT)
        self.durations = Histogram(SECONDS)
        self.sizes = Histogram(SIZES)
        self.delays = Histogram(SECONDS)

    def flush(self) -> None:
        """The piece is taken: deliver it."""
        hub = self._hub
        event, self.last = self.last, None
        if not hub.has_events:
            return
        sampler = self._sampler
        sampler.total += 1
        if sampler.total < sampler.due:
            hub.flush()
            return
        began_at, before = time.perf_counter(), hub.deliveries_total
        hub.flush(sampler.take())
        self.durations.observe(time.perf_counter() - began_at)
        self.sizes.observe(hub.deliveries_total - before)
        if event is not None and event.subscribed:
            timestamp_ms = timestamp_of(event.payload)
            if timestamp_ms is not None:
                # A group's timestamps may run ahead of the clock.
                self.delays.observe(max(0.0, time.time() - timestamp_ms / 1000))

    def refill(self) -> None:
        """A second is over."""
        self._sampler.refill()


def timestamp_of(payload: bytes) -> int | None:
    """The timestamp in an envelope's JSON text; None if it is not where it always is."""
    start = payload.find(_TIMESTAMP, 0, _LOOKED_AT) + len(_TIMESTAMP)
    end = payload.find(b",", start, _LOOKED_AT)
    digits = payload[start:end]
    return int(digits) if start >= len(_TIMESTAMP) and end > 0 and digits.isdigit() else None
