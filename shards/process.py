"""The shard process: builds the parts, serves the link, drains."""

from __future__ import annotations

import asyncio
import os
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from broker import locks, logs, service
from broker.clock import wall_clock_ms
from broker.config import FILE_PATH_KEY, Config, RedisAdapter
from broker.errors import ConfigError
from broker.http import MetricsServer
from broker.link import Link
from broker.link_protocol import shard_reader
from broker.metrics import Metrics, by_label
from broker.service import Ready, Service
from broker.vitals import Vitals
from shards import manifest
from shards.group import Change
from shards.history import HistoryLimits
from shards.introspection import Introspection
from shards.leases import Leases
from shards.metrics import add_files, add_links, add_store, add_top_streams, store_report
from shards.requests import GatewayLink, Requests
from shards.storage.base import Storage
from shards.storage.memory import MemoryStorage
from shards.storage.redis import RedisStorage
from shards.storage.redis_changes import RemoteChange
from shards.storage.redis_foreign import Foreign
from shards.storage.sqlite import DESCRIPTORS_PER_FILE, OPEN_FILES_MAX, SqliteStorage
from shards.storage.survey import Survey

_SWITCH_INTERVAL_S = 0.0005  # a storage thread that is back from the disk waits that long at most

_OTHER_DESCRIPTORS = 200  # sockets, locks, what Python and the event loop need
_DESCRIPTORS_LEAST = 1024  # what every system gives

_log = logs.Log("shard")


def main(arguments: list[str] | None = None) -> int:
    """Run `python -m shards`; returns the exit code."""
    parser = service.options("shards")
    parser.add_argument("--index", type=int, required=True, help="number of the shard, from 0")
    parsed = parser.parse_args(arguments)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    return service.run(f"shard-{parsed.index}", parsed, parsed.index, serve)


async def serve(process: Service) -> None:
    """Serve until told to stop.

    Raises:
        ConfigError: the data, the socket or the metrics port can't be had.
    """
    settings, index = process.config, process.index
    if index >= settings.shards:
        raise ConfigError("broker.shards", f"is {settings.shards}: there is no shard {index}")
    socket_path = service.shard_socket(settings, index)
    lock = locks.take(
        socket_path.with_suffix(".lock"), "broker.run_dir", f"the run_dir {settings.run_dir}"
    )

    def changed_elsewhere(stream: str, group_id: str, change: Change) -> None:
        requests.changed_elsewhere(stream, group_id, change)

    def storage_state(trouble: str | None) -> None:
        requests.storage_state(trouble)

    def foreign_received(message: Foreign) -> None:
        requests.foreign_received(message)

    def changes_lost(stream: str, group_id: str, epoch: str) -> None:
        requests.changes_lost(stream, group_id, epoch)

    told = Told(changed_elsewhere, storage_state, foreign_received, changes_lost)
    storage = _storage(settings, index, told)
    leases = Leases[GatewayLink](settings.stream_access.leave_delay_s, settings.limits.leave_wait_s)
    requests = Requests(index, settings.shards, storage, leases, settings.limits.response_bytes_max)
    registry, survey = _introspected(process, requests, storage)
    await storage.open()
    listener = service.unix_socket(socket_path, "broker.run_dir")
    server = await asyncio.get_running_loop().create_unix_server(
        partial(
            Link,
            requests,
            shard_reader,
            settings.limits.link_queue_bytes_max,
            pause_when_full=True,
        ),
        sock=listener,
    )
    metrics = MetricsServer(registry.registry, requests.not_ready)
    host, port = settings.metrics.host, service.shard_metrics_port(settings, index)
    port = await metrics.start(service.listening_socket(host, port, "broker.metrics.port"))
    process.ready(Ready(metrics=f"http://{service.url_host(host)}:{port}/metrics"))
    surveying = None if survey is None else asyncio.create_task(survey.run())
    _log.info("shard_started", socket=socket_path, metrics_port=port)
    await process.stopping.wait()
    server.close()
    metrics.close()
    await _drain(requests, settings.limits.stop_timeout_s)
    if surveying is not None:
        surveying.cancel()
        await asyncio.wait((surveying,))
    await storage.close()
    socket_path.unlink(missing_ok=True)
    os.close(lock)
    _log.info("shard_stopped")


def _introspected(
    process: Service, requests: Requests, storage: Storage
) -> tuple[Metrics, Survey | None]:
    """What tells how the shard is: its metrics, and who counts what its files hold."""
    settings = process.config
    registry = _metrics(process, requests, storage)
    survey = Survey(storage.directory) if isinstance(storage, SqliteStorage) else None
    known = storage if isinstance(storage, MemoryStorage) else None
    report = partial(store_report, known, survey)
    add_store(registry, report)
    add_links(registry, requests)
    add_top_streams(registry, requests, settings.metrics.top_streams, time.monotonic)
    if isinstance(storage, SqliteStorage) and survey is not None:
        add_files(registry, storage, survey)
    rotate = requests.committer.rotate
    vitals = Vitals(process.name, process.restarts, registry.lag, _totals(requests), rotate)
    Introspection(process.index, requests, vitals, report)
    requests.tracing = process.tracing
    return registry, survey


class Told(NamedTuple):
    """What a storage that others use too says by itself: see `RedisStorage`."""

    remote_changes: RemoteChange
    told: Callable[[str | None], None]
    foreign: Callable[[Foreign], None]
    lost: Callable[[str, str, str], None]


def _storage(settings: Config, index: int, told: Told) -> Storage:
    adapter = settings.adapter
    limits = settings.limits
    history = HistoryLimits(
        limits.history_events_max,
        limits.history_age_s_max * 1000,
        limits.history_group_bytes_max,
        limits.history_bytes_max,
    )
    if isinstance(adapter, RedisAdapter):
        return RedisStorage(
            adapter.redis_url,
            wall_clock_ms,
            limits.response_bytes_max,
            history,
            key_prefix=adapter.key_prefix,
            shard=index,
            shards=settings.shards,
            **told._asdict(),
        )
    if adapter.store_method == "in_memory":
        return MemoryStorage(wall_clock_ms, limits.response_bytes_max, history)
    folder = Path(adapter.file_path)
    manifest.check(folder, settings.shards)
    directory = folder / f"shard-{index}"
    locks.take(directory / "lock", FILE_PATH_KEY, f"the data in {directory}")
    return SqliteStorage(
        directory,
        wall_clock_ms,
        history,
        open_files_max=_open_files_max(),
        response_bytes_max=limits.response_bytes_max,
        cache_bytes_max=limits.group_cache_bytes_max,
    )


def _open_files_max() -> int:
    """How many stream files may be open, with the descriptors that this process may have; as many
    as it needs where it may ask for more."""
    wanted = 2 * OPEN_FILES_MAX * DESCRIPTORS_PER_FILE + _OTHER_DESCRIPTORS
    try:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < wanted:
            soft = min(wanted, hard) if hard != resource.RLIM_INFINITY else wanted
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    except (OSError, ValueError):  # a sandbox that forbids to ask, or to change it
        soft = _DESCRIPTORS_LEAST
    share = (soft - _OTHER_DESCRIPTORS) // (2 * DESCRIPTORS_PER_FILE)
    return max(1, min(OPEN_FILES_MAX, share))


async def _drain(requests: Requests, timeout_s: float) -> None:
    """Finish what came, and let the gateways have the answers."""
    try:
        async with asyncio.timeout(timeout_s):
            await requests.committer.drain()
            for link in requests.links:
                link.flush_and_close()
            while requests.links:
                await asyncio.sleep(0.01)
    except TimeoutError:
        _log.warning("drain_timed_out", waiting=requests.committer.waiting)


def _totals(requests: Requests) -> dict[str, Callable[[], float]]:
    """What is told of as rates."""
    return {
        "calls": lambda: sum(requests.calls_total.values()),
        "operations": lambda: requests.committer.operations_total,
        "batches": lambda: requests.committer.batches_total,
        "events": lambda: requests.events_total,
        "triggers": lambda: requests.triggers_fired_total,
        "failures": lambda: requests.failures_total.total,
    }


def _metrics(process: Service, requests: Requests, storage: Storage) -> Metrics:
    metrics = Metrics(
        {"shard": str(process.index)}, process.restarts, lambda: process.config.limits
    )
    committer = requests.committer
    metrics.counters(
        "calls",
        "Calls received from gateways, by function.",
        lambda: by_label("function", requests.calls_total),
    )
    metrics.counters(
        "call_failures",
        "Calls answered with an error, by function and the error's code.",
        requests.failures_total.samples,
    )
    metrics.counter(
        "commit_batches", "Batches handed to the storage.", lambda: committer.batches_total
    )
    metrics.counter(
        "commit_operations", "Operations in those batches.", lambda: committer.operations_total
    )
    metrics.histogram(
        "commit_seconds",
        "Duration of a batch, from start to settled; of the same batches.",
        committer.durations,
    )
    metrics.histogram(
        "commit_batch_operations",
        "Operations of a batch; of the first 200 batches of a second, then of one in 64.",
        committer.sizes,
    )
    metrics.gauge("operations_waiting", "Operations not yet settled.", lambda: committer.waiting)
    metrics.counter("events", "Events sent to gateways.", lambda: requests.events_total)
    metrics.counters(
        "foreign_events",
        "What other programs told subscribers through Redis, by outcome.",
        lambda: by_label("outcome", requests.foreign_total),
    )
    metrics.counter(
        "triggers_fired", "Trigger invocations asked for.", lambda: requests.triggers_fired_total
    )
    metrics.gauge(
        "sync_bodies_bytes",
        "Bytes of syncs that gateways keep for others that hold the same.",
        lambda: requests.sync_bodies_bytes,
    )
    metrics.counter(
        "syncs_shared",
        "Syncs of which the gateway had what they hold already.",
        lambda: requests.syncs_shared_total,
    )
    metrics.gauge("triggers", "Triggers registered.", lambda: len(requests.triggers))
    metrics.gauge("leases", "Subscriptions that gateways hold.", lambda: len(requests.leases))
    metrics.gauge(
        "leaves_owed",
        "Leaves of dead gateways that wait for their trigger.",
        lambda: requests.leases.owed,
    )
    metrics.counter(
        "leaves_told", "Leaves told for dead gateways.", lambda: requests.leases.told_total
    )
    metrics.counter(
        "leaves_dropped",
        "Leaves of dead gateways whose trigger did not come back in time.",
        lambda: requests.leases.dropped_total,
    )
    metrics.counter(
        "changes_lost",
        "Changes of other brokers that could not be told any more, as Redis did not keep them.",
        lambda: storage.changes_lost_total if isinstance(storage, RedisStorage) else 0,
    )
    metrics.gauge(
        "groups_refused",
        "Groups of which Redis refuses to tell what was missed; it is asked again.",
        lambda: storage.groups_refused if isinstance(storage, RedisStorage) else 0,
    )
    metrics.gauge("links", "Gateways linked.", lambda: len(requests.links))
    metrics.gauge(
        "link_queue_bytes",
        "Bytes that gateways have not taken yet.",
        lambda: sum(link.queue_bytes for link in requests.links),
    )
    if isinstance(storage, MemoryStorage):
        metrics.gauge("history_bytes", "Bytes of kept events.", lambda: storage.history_bytes)
    if isinstance(storage, SqliteStorage):
        metrics.gauge("cache_bytes", "Bytes of cached groups.", lambda: storage.cached_bytes)
        metrics.gauge("groups_cached", "Cached groups.", lambda: storage.cached_groups)
        metrics.gauge("streams_open", "Open stream files.", lambda: storage.open_files)
        metrics.gauge(
            "streams_suspect",
            "Open stream files that a commit failed on and that wait for their disk.",
            lambda: storage.suspect_files,
        )
    return metrics
