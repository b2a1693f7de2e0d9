"""The broker's processes in a simulated world: the real parts, started as `process.py` does it."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec

from broker import service
from broker.config import Config
from broker.link import Link
from broker.link_protocol import shard_reader
from gateway.process import Gateway
from shards.group import Change
from shards.history import HistoryLimits
from shards.leases import Leases
from shards.requests import GatewayLink, Requests
from shards.storage import sqlite
from shards.storage.sqlite_file import Batch, StreamFile, failure
from tests.sim.loop import ListeningSocket, SimLoop, World
from tests.sim.peers import STREAM_PORT, WORKER_PORT

_decode = msgspec.msgpack.Decoder(list[Change]).decode

Committed = Callable[[str, str, Change], None]
"""Told of each change that is on disk: stream, group, change."""


class Machine:
    """What all processes of the broker share: the wall clock, and the disk with its faults.

    full: the disk takes nothing. failing: it fails in the middle of some commits.
    """

    def __init__(self, world: World, committed: Committed) -> None:
        self.world = world
        self.committed = committed
        self.offset_s = 1.7e9
        self.full = False
        self.failing = False

    def wall_clock_ms(self) -> int:
        """The wall clock, as `broker.clock`."""
        return int((self.world.now + self.offset_s) * 1000)


class Disk:
    """Opens stream files that fail when the machine's disk does, and say what they have written."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.files: list[StreamFile] = []

    def open(self, path: Path, stream: str) -> StreamFile:
        """As `StreamFile`; raises StorageError."""
        if self.machine.full:
            raise failure(path, OSError(errno.ENOSPC, "No space left on device"))
        file = _File(path, stream)
        file.bind(self, stream)
        self.files.append(file)
        return file


class _File(StreamFile):
    def bind(self, disk: Disk, stream: str) -> None:
        self._disk = disk
        self._stream = stream

    def commit(self, batch: Batch) -> None:
        machine = self._disk.machine
        if machine.full:
            raise failure(self._path, sqlite3.OperationalError("database or disk is full"))
        if machine.failing and machine.world.rng.random() < 0.5:
            self._connection = _Failing(self._connection)  # type: ignore[assignment]
        super().commit(batch)
        groups = {row.id: row.group_id for row in batch.groups}
        for row in batch.history:
            for change in _decode(row.changes):
                machine.committed(self._stream, groups[row.group_key], change)


class _Failing:
    """A connection whose commit fails when all but the end of it was done."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def execute(self, sql: str, *parameters: Any) -> Any:
        if sql == "COMMIT":
            raise sqlite3.OperationalError("disk I/O error")
        return self._connection.execute(sql, *parameters)

    def close(self) -> None:
        self._connection.close()


class _Threads:
    """Stands for a pool of threads of a process."""

    def __init__(self, *_: Any, **__: Any) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimLoop)
        self._loop = loop

    def submit(self, work: Callable[[], Any]) -> None:
        """Do it some time."""
        self._loop.run_in_executor(self, work)


class Process:
    """A process of the broker, through all its lives."""

    def __init__(self, machine: Machine, name: str) -> None:
        self.machine = machine
        self.name = name
        self.loop: SimLoop | None = None
        self.killed: Callable[[Process], None] = lambda _: None
        """Told when it died."""

    @property
    def lives(self) -> bool:
        return self.loop is not None and not self.loop.dead

    def start(self) -> None:
        """Begin a life; nothing when it lives."""
        if not self.lives:
            self.loop = SimLoop(self.machine.world, self.name)
            self.loop.killed = self.kill
            self.loop.call_soon(self._begin)

    def kill(self) -> None:
        """End it."""
        if self.lives:
            assert self.loop is not None, "it lives"
            self.loop.kill()
            self.killed(self)

    def _begin(self) -> None:
        assert self.loop is not None, "it was made"
        self.loop.create_task(self._run()).add_done_callback(_ended)

    async def _run(self) -> None:
        raise NotImplementedError


def _ended(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        task.get_loop().call_exception_handler({"message": "a process failed", "exception": error})


class Shard(Process):
    """A shard: storage, requests, its end of the link. Each life finds the files of the last one
    as they were when it was killed, in a folder of their own."""

    def __init__(self, machine: Machine, index: int, settings: Config, folder: Path) -> None:
        super().__init__(machine, f"shard {index}")
        self.index = index
        self._settings = settings
        self._folder = folder
        self._number = 0
        self._disk = Disk(machine)

    async def _run(self) -> None:
        settings, limits = self._settings, self._settings.limits
        life = self._folder / f"{self.index}.{self._number}"
        self._number += 1
        if self._number > 1:
            shutil.copytree(self._folder / f"{self.index}.{self._number - 2}", life)
        history = HistoryLimits(
            limits.history_events_max,
            limits.history_age_s_max * 1000,
            limits.history_group_bytes_max,
            limits.history_bytes_max,
        )
        with mock.patch.object(sqlite, "ThreadPoolExecutor", _Threads):
            storage = sqlite.SqliteStorage(
                life,
                self.machine.wall_clock_ms,
                history,
                response_bytes_max=limits.response_bytes_max,
                cache_bytes_max=limits.group_cache_bytes_max,
            )
        await storage.open()
        leases = Leases[GatewayLink](settings.stream_access.leave_delay_s, limits.leave_wait_s)
        requests = Requests(self.index, settings.shards, storage, leases)
        await asyncio.get_running_loop().create_unix_server(
            partial(
                Link, requests, shard_reader, limits.link_queue_bytes_max, pause_when_full=True
            ),
            str(service.shard_socket(settings, self.index)),
        )

    def open_file(self, path: Path, stream: str) -> StreamFile:
        """What the storage opens a stream's file with."""
        return self._disk.open(path, stream)

    def close_files(self) -> None:
        """Let go of the files of all lives."""
        for file in self._disk.files:
            file.close()


class GatewayProcess(Process):
    """The gateway: all its parts, both ports."""

    def __init__(self, machine: Machine, settings: Config) -> None:
        super().__init__(machine, "gateway")
        self._settings = settings
        self.gateway: Gateway | None = None

    async def _run(self) -> None:
        gateway = self.gateway = Gateway(self._settings)
        loop = asyncio.get_running_loop()
        loop.create_task(gateway.links.run()).add_done_callback(_ended)
        while not gateway.links.ready:
            await asyncio.sleep(0.01)
        await gateway.worker_port.start(ListeningSocket(WORKER_PORT), None)  # type: ignore[arg-type]
        await gateway.stream_port.start(ListeningSocket(STREAM_PORT), None)  # type: ignore[arg-type]
        for port in (gateway.worker_port, gateway.stream_port):
            loop.create_task(port.watch()).add_done_callback(_ended)


@contextmanager
def nothing_by_chance(machine: Machine, shards: list[Shard]) -> Iterator[None]:
    """Within it the clocks are the machine's, and what the system draws comes from the seed."""
    world = machine.world
    rng = random.Random(world.rng.random())

    def urandom(count: int) -> bytes:
        return rng.randbytes(count)

    def open_file(path: Path, stream: str) -> StreamFile:
        index = int(path.parent.name.partition(".")[0])
        return shards[index].open_file(path, stream)

    patches = (
        (time, "time", lambda: machine.wall_clock_ms() / 1000),
        (time, "time_ns", lambda: machine.wall_clock_ms() * 1_000_000),
        (time, "monotonic", lambda: world.now),
        (time, "perf_counter", lambda: world.now),
        (os, "urandom", urandom),
        (random, "_urandom", urandom),
        (sqlite, "StreamFile", open_file),
    )
    with ExitStack() as stack:
        for target, name, value in patches:
            stack.enter_context(mock.patch.object(target, name, value))
        yield
