"""Metrics: plain numbers on objects, read when scraped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

Labels = Mapping[str, str]
Sample = tuple[Labels, float]


class Metrics(Collector):
    """The metrics of one process. Names get the prefix `broker_`, counters end in `_total`."""

    def __init__(self, labels: Labels) -> None:
        """`labels` are on every metric, such as the shard's number."""
        self._labels = dict(labels)
        self._sources: list[Callable[[], Metric]] = []
        self.registry = CollectorRegistry()
        self.registry.register(self)
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)

    def counter(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A counter whose value `read` gives."""
        self.counters(name, text, lambda: [({}, read())])

    def counters(self, name: str, text: str, read: Callable[[], Iterable[Sample]]) -> None:
        """A counter with labels; their values must be few."""
        self._add(CounterMetricFamily, name, text, read)

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
