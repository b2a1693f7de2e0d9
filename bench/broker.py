"""A broker of a measurement's own, in a temporary folder."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
STOP_S_MAX = 30


class StartFailed(Exception):
    """The broker ended before it was ready."""


class Running(NamedTuple):
    """Where it listens, and its processes but the supervisor: pid to module."""

    stream_port: int
    worker_port: int
    roles: dict[int, str]


@contextmanager
def running(
    store: str,
    shards: int = 2,
    *,
    settings: Mapping[str, Any] | None = None,
    checkout: Path = REPOSITORY,
) -> Iterator[Running]:
    """`broker serve` on free ports; stopped, and its folder removed, at the end.

    Raises:
        StartFailed

    Args:
        store: `in_memory`, `file_based`, or `redis:PORT` of a Redis on this machine.
        settings: what else stands below `broker:` in its configuration.
        checkout: the folder whose code is run.
    """
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    config = folder / "broker.yaml"
    config.write_text(json.dumps(_config(store, settings or {})))  # JSON is YAML
    port, worker_port = free_port(), free_port()
    broker = subprocess.Popen(
        f"{sys.executable} -m broker serve --config {config} --data-dir {folder / 'data'}"
        f" --shards {shards} --host 127.0.0.1 --port {port} --worker-port {worker_port}"
        " --metrics-port 0 --log-level error".split(),
        stdout=subprocess.PIPE,
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout)},
    )
    try:
        assert broker.stdout is not None
        ready = broker.stdout.readline()
        if not ready.startswith(b"ready "):
            raise StartFailed(f"the broker in {checkout} did not start: its error is above")
        yield Running(port, worker_port, _roles(broker.pid))
    finally:
        broker.terminate()
        try:
            broker.wait(STOP_S_MAX)
        finally:
            broker.kill()
            if broker.stdout is not None:
                broker.stdout.close()
            shutil.rmtree(folder, ignore_errors=True)


def _config(store: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    adapter: dict[str, Any] = {
        "class": "modules::stream::adapters::KvStore",
        "config": {"store_method": store},
    }
    if store.startswith("redis:"):
        adapter["class"] = "modules::stream::adapters::RedisAdapter"
        adapter["config"] = {"redis_url": f"redis://127.0.0.1:{store.split(':')[1]}"}
    module = {"class": "modules::stream::StreamModule", "config": {"adapter": adapter}}
    return {"modules": [module], "broker": dict(settings)}


@contextmanager
def redis_server() -> Iterator[tuple[int, int]]:
    """A Redis that keeps nothing on disk: its port and pid."""
    folder = tempfile.mkdtemp(prefix="bench-redis-")
    port = free_port()
    command = f"redis-server --port {port} --bind 127.0.0.1 --dir {folder} --appendonly no --save"
    server = subprocess.Popen(
        [*command.split(), ""],
        stdout=subprocess.DEVNULL,
    )
    try:
        _wait_for(port)
        yield port, server.pid
    finally:
        server.terminate()
        server.wait(STOP_S_MAX)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(port: int) -> None:
    end = time.monotonic() + STOP_S_MAX
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)
        else:
            return


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _roles(parent: int) -> dict[int, str]:
    """The processes that the supervisor started: pid to module."""
    found = {}
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        found[int(pid)] = arguments[arguments.index(b"-m") + 1].decode()
    return found


def resident_kib(pid: int) -> float:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1024


def cpu_seconds(pid: int) -> float:
    """CPU time that a process took so far, its threads' included."""
    return time.clock_gettime((~pid << 3) | 2)  # what clock_getcpuclockid(3) makes of a pid
