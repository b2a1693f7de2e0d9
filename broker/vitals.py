"""How a process is: its age, memory, CPU, and how fast its counters grow."""

from __future__ import annotations

import asyncio
import os
import resource
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

from broker.metrics import LoopLag
from broker.report import ProcessReport

SAMPLE_S, SAMPLES = 1.0, 10
"""Rates are over the last `SAMPLES` of these."""

_STATM = Path("/proc/self/statm")
_PAGE_BYTES = resource.getpagesize()


class Vitals:
    """Of this process; made on its loop, which it looks at once a second.

    Args:
        process: its name, such as `shard-0`.
        counters: by name, what only grows and whose growth per second is of interest.
        each_second: called with `time.monotonic()`.
    """

    def __init__(
        self,
        process: str,
        restarts: int,
        lag: LoopLag,
        counters: Mapping[str, Callable[[], float]],
        each_second: Callable[[float], None],
    ) -> None:
        self._process = process
        self._restarts = restarts
        self._lag = lag
        self._counters = {**counters, "_cpu": time.process_time}
        self._each_second = each_second
        self._started_at = time.monotonic()
        self._samples: deque[tuple[float, dict[str, float]]] = deque(maxlen=SAMPLES + 1)
        self._loop = asyncio.get_running_loop()
        self._sample()

    def _sample(self) -> None:
        now = time.monotonic()
        self._samples.append((now, self._read()))
        self._each_second(now)
        self._loop.call_later(SAMPLE_S, self._sample)

    def _read(self) -> dict[str, float]:
        return {name: read() for name, read in self._counters.items()}

    def rates(self) -> dict[str, float]:
        """Growth of each counter per second, lately."""
        now, newest = time.monotonic(), self._read()
        then, oldest = self._samples[0]
        seconds = max(now - then, SAMPLE_S)
        return {name: round((newest[name] - oldest[name]) / seconds, 3) for name in newest}

    def report(self) -> ProcessReport:
        """All of it."""
        rates = self.rates()
        return ProcessReport(
            process=self._process,
            pid=os.getpid(),
            uptime_s=round(time.monotonic() - self._started_at, 1),
            restarts=self._restarts,
            cpu_cores=rates.pop("_cpu"),
            memory_bytes=resident_bytes(),
            loop_lag_s=round(self._lag.seconds, 4),
            rates=rates,
        )


def resident_bytes() -> int:
    """Memory that this process has resident."""
    return int(_STATM.read_text().split()[1]) * _PAGE_BYTES
