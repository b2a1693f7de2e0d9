"""A broker of a measurement's own, in a temporary folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


class Running(NamedTuple):
    """Where it listens, and its processes but the supervisor: pid to module."""

    stream_port: int
    worker_port: int
    roles: dict[int, str]


@contextmanager
def running(store: str, shards: int = 2, gateways: int = 1) -> Iterator[Running]:
    """`broker serve` on free ports; stopped, and its folder removed, at the end."""
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    config = folder / "broker.yaml"
    config.write_text(
        "modules:\n- class: modules::stream::StreamModule\n  config:\n    adapter:\n"
        "      class: modules::stream::adapters::KvStore\n"
        f"      config: {{store_method: {store}}}\nbroker: {{gateways: {gateways}}}\n"
    )
    port, worker_port = free_port(), free_port()
    broker = subprocess.Popen(
        f"{sys.executable} -m broker serve --config {config} --data-dir {folder / 'data'}"
        f" --shards {shards} --host 127.0.0.1 --port {port} --worker-port {worker_port}"
        " --metrics-port 0 --log-level error".split(),
        stdout=subprocess.PIPE,
    )
    try:
        assert broker.stdout is not None
        ready = broker.stdout.readline()
        assert ready.startswith(b"ready "), ready
        yield Running(port, worker_port, _roles(broker.pid))
    finally:
        broker.terminate()
        broker.wait(30)
        shutil.rmtree(folder)


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


def cpu_s(pid: int) -> float:
    """Processor time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_kib(pid: int) -> float:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1024
