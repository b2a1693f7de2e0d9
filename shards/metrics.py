"""Metrics of what a shard stores, caches and sends."""

from __future__ import annotations

from collections.abc import Callable

from broker.metrics import Metrics, Sample
from broker.report import StoreReport
from shards.requests import Requests
from shards.storage.memory import MemoryStorage
from shards.storage.sqlite import SqliteStorage
from shards.storage.survey import Survey


def store_report(
    storage: MemoryStorage | SqliteStorage | None, survey: Survey | None
) -> StoreReport:
    """What is stored, as far as it is known."""
    if isinstance(storage, MemoryStorage):
        return storage.report()
    return StoreReport() if survey is None else survey.report


def add_store(metrics: Metrics, report: Callable[[], StoreReport]) -> None:
    """What is stored. Nothing is exposed of what is not known."""
    for name, text in (
        ("streams", "Streams with items."),
        ("groups", "Groups with items."),
        ("items", "Items."),
        ("bytes", "About the bytes of their values."),
    ):

        def read(field: str = name) -> list[Sample]:
            count = getattr(report(), field)
            return [] if count is None else [({}, count)]

        metrics.gauges(f"store_{name}", text, read)


def add_files(metrics: Metrics, storage: SqliteStorage, survey: Survey) -> None:
    """Files and the cache of what is in them."""

    def disk_bytes() -> list[Sample]:
        return [] if survey.disk_bytes is None else [({}, survey.disk_bytes)]

    metrics.gauges("store_disk_bytes", "Bytes of the files, with their logs.", disk_bytes)
    metrics.gauge(
        "store_files_unreadable", "Files that could not be read.", lambda: survey.unreadable
    )
    metrics.counter(
        "cache_hits", "Operations whose data was in memory.", lambda: storage.hits_total
    )
    metrics.counter(
        "cache_misses", "Operations whose data had to be read.", lambda: storage.misses_total
    )
    metrics.counter(
        "cache_evictions", "Groups forgotten as others need room.", lambda: storage.evictions_total
    )
    metrics.counter(
        "stream_files_closed", "Files closed as too many are open.", lambda: storage.closed_total
    )


def add_links(metrics: Metrics, requests: Requests) -> None:
    """Bytes of the links, and those that were cut."""
    metrics.counter(
        "link_received_bytes", "Bytes received from gateways.", lambda: requests.received_bytes
    )
    metrics.counter("link_sent_bytes", "Bytes sent to gateways.", lambda: requests.sent_bytes)
    metrics.counter(
        "link_overflows",
        "Links cut as the gateway left too much unread.",
        lambda: requests.overflows_total,
    )


def add_top_streams(
    metrics: Metrics, requests: Requests, count: int, now: Callable[[], float]
) -> None:
    """The `count` streams that are used most, by name; none unless asked for."""

    def read() -> list[Sample]:
        top = requests.committer.hot.streams.top(count, now()) if count else []
        return [({"stream": stream}, rate) for stream, rate in top]

    metrics.gauges(
        "top_stream_operations_per_second", "Operations on the streams used most, lately.", read
    )
