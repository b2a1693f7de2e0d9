"""Metrics: plain numbers on objects, read when scraped."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate

from msgspec import Struct, structs
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from broker import logs

LAG_INTERVAL_S, LAG_WINDOW_S = 0.25, 10.0

try:
    VERSION = version("stream-broker")
except PackageNotFoundError:  # run from a checkout that is not installed
    VERSION = "unknown"

Labels = Mapping[str, str]
Sample = tuple[Labels, float]


class Histogram:
    """Counts observations by size. `bounds`: the upper bounds of the buckets, ascending."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """What an exposition has: how many were at most each bound, and the sum of all."""
        bounds = [*map(str, self._bounds), "+Inf"]
        return list(zip(bounds, accumulate(self._counts), strict=True)), self._sum


SECONDS = tuple(base * 10**power for power in range(-5, 1) for base in (1, 2.5, 5))
"""Bounds of durations: 10 µs to 5 s."""
SIZES = tuple(float(2**power) for power in range(0, 13, 2))
"""Bounds of numbers of things: 1 to 4096."""


class LoopLag:
    """How late the event loop is: the most of the last seconds."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._windows = [0.0, 0.0]  # the current one and the one before
        self._window_ends = 0.0
        self._wait()

    @property
    def seconds(self) -> float:
        return max(self._windows)

    def _wait(self) -> None:
        due = self._loop.time() + LAG_INTERVAL_S
        self._loop.call_later(LAG_INTERVAL_S, self._woken, due)

    def _woken(self, due: float) -> None:
        now = self._loop.time()
        if now > self._window_ends:
            self._windows = [0.0, self._windows[0]]
            self._window_ends = now + LAG_WINDOW_S
        self._windows[0] = max(self._windows[0], now - due)
        self._wait()


class Metrics(Collector):
    """The metrics of one process. Names get the prefix `broker_`, counters end in `_total`."""

    def __init__(self, labels: Labels, restarts: int, limits: Callable[[], Struct]) -> None:
        """`labels` are on every metric, such as the shard's number. `limits` are read when
        scraped: all that is a number in them is exposed."""
        self._labels = dict(labels)
        self._sources: list[Callable[[], Metric]] = []
        self.registry = CollectorRegistry()
        self.registry.register(self)
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self.lag = lag = LoopLag(asyncio.get_running_loop())
        self.gauge(
            "loop_lag_seconds", "The most that the event loop was late lately.", lambda: lag.seconds
        )
        self.gauges(
            "build_info", "1; the release is in the label.", lambda: [({"version": VERSION}, 1)]
        )

        self.counter(
            "restarts", "Times that `broker serve` started the process again.", lambda: restarts
        )
        self.counter(
            "log_lines_left_out",
            "Log lines not written as there were too many of their event.",
            lambda: logs.Log.left_out_total,
        )
        self.gauges(
            "limit",
            "The configuration's limits, each in the unit that its name ends in.",
            lambda: by_label("limit", structs.asdict(limits())),
        )

    def counter(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A counter whose value `read` gives."""
        self.counters(name, text, lambda: [({}, read())])

    def counters(self, name: str, text: str, read: Callable[[], Iterable[Sample]]) -> None:
        """A counter with labels; their values must be few."""
        self._add(CounterMetricFamily, name, text, read)

    def histogram(self, name: str, text: str, histogram: Histogram) -> None:
        """A histogram."""
        self.histograms(name, text, lambda: [({}, histogram)])

    def histograms(
        self, name: str, text: str, read: Callable[[], Iterable[tuple[Labels, Histogram]]]
    ) -> None:
        """A histogram with labels; their values must be few."""

        def source() -> Metric:
            found = [({**self._labels, **labels}, histogram) for labels, histogram in read()]
            names = list(found[0][0]) if found else []
            family = HistogramMetricFamily(f"broker_{name}", text, labels=names)
            for labels, histogram in found:
                buckets, total = histogram.buckets()
                family.add_metric([labels[n] for n in names], buckets, total)
            return family

        self._sources.append(source)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A gauge whose value `read` gives."""
        self._add(GaugeMetricFamily, name, text, lambda: [({}, read())])

    def gauges(self, name: str, text: str, read: Callable[[], Iterable[Sample]]) -> None:
        """A gauge with labels; their values must be few."""
        self._add(GaugeMetricFamily, name, text, read)

    def collect(self) -> Iterator[Metric]:
        for source in self._sources:
            yield source()

    def _add(
        self,
        family: type[CounterMetricFamily] | type[GaugeMetricFamily],
        name: str,
        text: str,
        read: Callable[[], Iterable[Sample]],
    ) -> None:
        def source() -> Metric:
            metric = family(f"broker_{name}", text)
            for labels, value in read():
                metric.add_sample(
                    metric.name + ("_total" if family is CounterMetricFamily else ""),
                    {**self._labels, **labels},
                    value,
                )
            return metric

        self._sources.append(source)


def by_label(name: str, values: Mapping[str, float]) -> list[Sample]:
    """Samples of a dictionary whose keys are the values of label `name`."""
    return [({name: key}, value) for key, value in values.items()]
