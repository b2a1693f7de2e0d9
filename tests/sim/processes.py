"""The broker's processes in a simulated world: real, but for what they ask of the system."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast
from unittest import mock

from msgspec import structs

import gateway.process
import shards.process
from broker import link, locks, service
from broker.config import Config, KvAdapter
from broker.service import Ready, Service
from gateway import connection
from shards import committer
from shards.group import Change, Done, GroupState
from shards.storage import sqlite
from tests.sim.loop import ListeningSocket, SimLoop, World
from tests.sim.peers import STREAM_PORT, WORKER_PORT

Made = Callable[[str, str, Change], None]
"""Told of each change that is about to be committed: stream, group, change."""


class Machine:
    """What all processes of the broker share: the wall clock, and the disk with its faults.

    full: the disk takes nothing. failing: half of all commits fail at their end.
    tight: whether what may wait for a peer is so little that it does not fit at times.
    """

    def __init__(self, world: World, made: Made) -> None:
        self.world = world
        self.made = made
        self.offset_s = 1.7e9
        self.full = False
        self.failing = False
        # Bounds that the load of a run would never reach.
        self.tight = world.rng.random() < 0.25
        self.open_files_max = world.rng.choice([256, 256, 1])
        self.batch_max = world.rng.choice([512, 512, 3])
        self.client_high_water = 512 if self.tight else world.rng.choice([65536, 2048])
        self.link_high_water = 4096 if self.tight else 2**20
        self.files: list[sqlite3.Connection] = []

    def wall_clock_s(self) -> float:
        """The wall clock."""
        return self.world.now + self.offset_s

    def write_to_disk(self, sql: str) -> None:
        """A statement writes.

        Raises:
            sqlite3.OperationalError: the disk does not take it.
        """
        if self.full:
            raise sqlite3.OperationalError("database or disk is full")
        # What begins a transaction, or is none of its own, is no commit.
        ends = sql == "COMMIT" or sql.startswith("INSERT INTO journal")
        if ends and self.failing and self.world.rng.random() < 0.5:
            raise sqlite3.OperationalError("disk I/O error")


_WRITES = ("INSERT", "UPDATE", "DELETE", "BEGIN", "COMMIT", "CREATE")


class Process:
    """A process of the broker, through all its lives."""

    def __init__(self, machine: Machine, name: str) -> None:
        self.machine = machine
        self.name = name
        self.loop: SimLoop | None = None
        self.ended: Callable[[Process, str], None] = lambda *_: None
        """Told when a life is over, and how it ended."""
        self._service: _Service | None = None

    @property
    def lives(self) -> bool:
        return self.loop is not None and not self.loop.dead

    def start(self) -> None:
        """Begin a life; nothing when it lives."""
        if not self.lives:
            self._service = None
            self.loop = SimLoop(self.machine.world, self.name)
            self.loop.killed = self.kill
            self.loop.call_soon(self._begin)

    def stop(self) -> None:
        """Tell it to stop, as by SIGTERM."""
        if self.lives and self.loop is not None and self._service is not None:
            self.loop.call_soon(self._service.stop)

    def kill(self, how: str = "kill") -> None:
        """End it, as by SIGKILL."""
        if self.lives:
            assert self.loop is not None, "it lives"
            self.loop.kill()
            self.ended(self, how)

    def _begin(self) -> None:
        assert self.loop is not None, "it was made"
        settings, index, serve = self._main()
        self._service = _Service(self.name, settings, index)
        served = serve(cast(Service, self._service))
        self.loop.create_task(served).add_done_callback(self._served)

    def _served(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            context = {"message": "the process failed", "exception": error}
            task.get_loop().call_exception_handler(context)
        self.kill("exit")

    def _main(self) -> tuple[Config, int, service.Serve]:
        """With what settings and number this life runs, and what it runs."""
        raise NotImplementedError


class _Service:
    """What a process is handed, as `broker.service.Service`, which says nothing to anyone."""

    tracing = None
    restarts = 0
    exit_code = 0
    on_reload: Callable[[Config], None] | None = None

    def __init__(self, name: str, settings: Config, index: int) -> None:
        self.name = name
        self.config = settings
        self.index = index
        self.stopping = asyncio.Event()
        self.hurried = asyncio.Event()

    def ready(self, _: Ready) -> None:
        """Nobody waits for it."""

    def stop(self) -> None:
        """Begin to stop; told again, hurry."""
        (self.hurried if self.stopping.is_set() else self.stopping).set()


class Shard(Process):
    """A shard. Each life finds the files of the last one as that left them, in a folder of its
    own: nothing closes them when it is killed."""

    def __init__(self, machine: Machine, index: int, settings: Config, folder: Path) -> None:
        super().__init__(machine, f"shard {index}")
        self.index = index
        self._settings = settings
        self._folder = folder
        self._number = 0

    def _main(self) -> tuple[Config, int, service.Serve]:
        path = self._folder / f"{self.index}.{self._number}"
        if self._number:
            shutil.copytree(self._folder / f"{self.index}.{self._number - 1}", path)
        self._number += 1
        settings = structs.replace(self._settings, adapter=KvAdapter(file_path=str(path)))
        return settings, self.index, shards.process.serve


class GatewayProcess(Process):
    """The gateway."""

    def __init__(self, machine: Machine, settings: Config) -> None:
        super().__init__(machine, "gateway")
        self._settings = settings

    def _main(self) -> tuple[Config, int, service.Serve]:
        return self._settings, 0, gateway.process.serve


class _Threads:
    """Stands for the storage's threads."""

    def __init__(self, *_: Any, **__: Any) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimLoop)
        self._loop = loop

    def submit(self, work: Callable[[], Any], told: Any = None) -> None:
        """Do it some time."""
        self._loop.in_thread(work, told)

    async def run(self, work: Callable[[], Any]) -> Any:
        """Do it; what it returns or raises."""
        return await self._loop.run_in_executor(None, work)

    def shutdown(self) -> None:
        """There are none."""

    close = shutdown


_THREADS = ("Threads", "ThreadPoolExecutor")
"""Names of what the storage has its blocking work done by."""


class _Lock(int):
    """Stands for the descriptor of a lock; nobody else runs a broker here."""


@contextmanager
def nothing_by_chance(machine: Machine) -> Iterator[None]:
    """Within it what is asked of the system comes from the seed: clocks, randomness, sockets,
    threads, locks, and the faults of SQLite's disk."""
    world = machine.world
    rng = random.Random(world.rng.random())
    connect, close, evaluate = sqlite3.connect, os.close, GroupState.evaluate

    class Connection(sqlite3.Connection):
        def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
            if sql.startswith(_WRITES):
                machine.write_to_disk(sql)
            return super().execute(sql, *parameters)

        def executescript(self, sql: str) -> sqlite3.Cursor:
            machine.write_to_disk(sql)
            return super().executescript(sql)

    def connect_here(*given: Any, **more: Any) -> sqlite3.Connection:
        opened = connect(*given, factory=Connection, **more)
        machine.files.append(opened)
        return opened

    def evaluate_here(self: GroupState, operation: Any, *given: Any) -> Any:
        outcome = evaluate(self, operation, *given)
        if isinstance(outcome, Done) and outcome.change is not None:
            machine.made(operation.stream, operation.group_id, outcome.change)
        return outcome

    def listening_socket(_: str, port: int, *__: Any, **___: Any) -> ListeningSocket:
        return ListeningSocket({3112: STREAM_PORT, 49134: WORKER_PORT}.get(port, f"port {port}"))

    def close_here(descriptor: int) -> None:
        if not isinstance(descriptor, _Lock):
            close(descriptor)

    patches: tuple[tuple[Any, str, Any], ...] = (
        (time, "time", machine.wall_clock_s),
        (time, "time_ns", lambda: int(machine.wall_clock_s() * 1000) * 1_000_000),
        (time, "monotonic", lambda: world.now),
        (time, "perf_counter", lambda: world.now),
        (os, "urandom", rng.randbytes),
        (random, "_urandom", rng.randbytes),
        (os, "close", close_here),
        (locks, "take", lambda *_: _Lock()),
        (service, "listening_socket", listening_socket),
        (service, "unix_socket", lambda path, *_: ListeningSocket(str(path))),
        *((sqlite, name, _Threads) for name in _THREADS if hasattr(sqlite, name)),
        (sqlite, "OPEN_FILES_MAX", machine.open_files_max),
        (committer, "BATCH_MAX", machine.batch_max),
        (connection, "WRITE_HIGH_WATER_BYTES", machine.client_high_water),
        (link, "_HIGH_WATER_BYTES", machine.link_high_water),
        (sqlite3, "connect", connect_here),
        (GroupState, "evaluate", evaluate_here),
    )
    with ExitStack() as stack:
        for target, name, value in patches:
            stack.enter_context(mock.patch.object(target, name, value))
        stack.callback(_close, machine.files)
        yield


def _close(files: list[sqlite3.Connection]) -> None:
    for file in files:
        file.close()
