"""`broker serve`: starts shards and gateway, restarts what dies, stops them in order.

On SIGHUP it reads the configuration file again and hands it to the gateway, which may refuse it,
and then to the shards, which have the log's level to take over.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence

import msgspec
from msgspec import structs

from broker import config, logs, service
from broker.config import Config
from broker.errors import ConfigError
from broker.notify import Notifier
from broker.service import (
    CONFIG_EXIT_CODE,
    RESTARTS,
    Ready,
    Reloaded,
    reloaded,
    status_of,
    tell_reloaded,
)
from broker.watchdog import Watchdog

RESTART_FIRST_S, RESTART_MAX_S = 0.1, 5.0
STABLE_S = 30.0
"""A process that lived so long is restarted at once when it dies."""
KILL_AFTER_S = 5.0
"""Beyond the configured stop timeout, after which a process that does not end is killed."""

NAME = "supervisor"
"""In its log lines."""

_log = logs.Log(NAME)


class _Child:
    """One process that is kept running."""

    def __init__(self, name: str, arguments: Sequence[str], settings: Config) -> None:
        self.name = name
        self._arguments = arguments
        self._settings = settings
        self.process: asyncio.subprocess.Process | None = None
        self._serves = False
        self._restarts = 0
        self._watchdog = Watchdog(settings.limits.hang_timeout_s)

    async def start(self) -> Ready | None:
        """Start the process; what it says when it is ready, None when it ends before."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *self._arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # a terminal's Ctrl-C is for the supervisor alone
            env={**os.environ, **self._watchdog.environment(), RESTARTS: str(self._restarts)},
        )
        self.process = process
        assert process.stdin is not None
        assert process.stdout is not None
        # The pipe stays open: its end would stop the process.
        await _hand_over(process.stdin, self._settings)
        line = await process.stdout.readline()
        self._serves = bool(line)
        self._watchdog.restart()
        return msgspec.json.decode(line, type=Ready) if line else None

    async def reload(self, settings: Config) -> None:
        """Make the process use other settings, now and when it is started again.

        Raises:
            ConfigError: it can't, and goes on as before.
        """
        process = self.process
        if process is None or not self._serves:
            raise ConfigError("", f"the {self.name} does not run just now")
        assert process.stdin is not None
        assert process.stdout is not None
        await _hand_over(process.stdin, settings)
        line = await process.stdout.readline()
        if not line:
            raise ConfigError("", f"the {self.name} ended meanwhile")
        refused = msgspec.json.decode(line, type=Reloaded).refused
        if refused:
            raise ConfigError("", refused)
        self._settings = settings

    async def take_over(self, settings: Config) -> None:
        """`reload` for a process that need not have them now: when it is started again will do."""
        try:
            await self.reload(settings)
        except ConfigError as error:
            self._settings = settings
            _log.info("config_waits_for_restart", process=self.name, reason=error)

    async def keep(self) -> None:
        """Start the process again whenever it ends or hangs, until it is given up."""
        loop = asyncio.get_running_loop()
        deaths, started = 0, loop.time()
        while True:
            code = await self._ended()
            self._serves = False
            deaths = 1 if loop.time() - started > STABLE_S else deaths + 1
            if deaths > self._settings.limits.restarts_max:
                _log.error("process_given_up", process=self.name, exit_code=code, deaths=deaths)
                return
            delay_s = min(RESTART_FIRST_S * 2 ** (deaths - 1), RESTART_MAX_S)
            _log.warning("process_died", process=self.name, exit_code=code, restart_in_s=delay_s)
            await asyncio.sleep(delay_s)
            self._restarts += 1
            started = loop.time()
            try:
                if await self.start() is not None:
                    _log.info("process_restarted", process=self.name)
            except OSError as error:  # no memory or processes to be had: tried again
                _log.error("process_not_started", process=self.name, reason=error)

    async def _ended(self) -> int:
        """Wait for the end of the process, and see to it when it hangs; its exit code."""
        assert self.process is not None, "started before"
        while True:
            try:
                async with asyncio.timeout(self._watchdog.timeout_s / 4):
                    return await self.process.wait()
            except TimeoutError:
                if self._serves and self._watchdog.silent_s > self._watchdog.timeout_s:
                    silent_s = round(self._watchdog.silent_s, 1)
                    _log.error("process_hung", process=self.name, silent_s=silent_s)
                    with contextlib.suppress(ProcessLookupError):
                        self.process.kill()

    def terminate(self) -> None:
        """Tell the process to end, if there is one."""
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)

    async def stop(self, timeout_s: float) -> None:
        """End the process, with force when it takes too long."""
        process = self.process
        if process is not None and process.returncode is None:
            self.terminate()
            try:
                async with asyncio.timeout(timeout_s):
                    await process.wait()
            except TimeoutError:
                _log.error("process_killed", process=self.name)
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        self._watchdog.close()


async def _hand_over(pipe: asyncio.StreamWriter, settings: Config) -> None:
    """Write settings in one line; nothing when whoever reads them has just ended."""
    with contextlib.suppress(ConnectionError):
        if not pipe.transport.is_closing():
            pipe.write(config.to_json(settings) + b"\n")
            await pipe.drain()


Load = Callable[[], Config]


async def serve(settings: Config, load: Load | None = None) -> int:
    """Run a whole broker until SIGTERM or SIGINT; returns the exit code.

    On SIGHUP `load` is asked for the settings anew; it may raise ConfigError. Without it, and on a
    terminal, whose end is what the signal tells there, SIGHUP ends the broker too.
    """
    notifier = Notifier(os.environ)
    stopping, hung_up = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    notifier.watch(loop)
    shards = [
        _Child(f"shard-{k}", ["-m", "shards", "--index", str(k)], settings)
        for k in range(settings.shards)
    ]
    reserved: list[socket.socket] = []
    gateways: list[_Child] = []

    def stop() -> None:
        if stopping.is_set():
            for gateway in gateways:
                gateway.terminate()  # told again, it waits for nothing that can be left out
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    reloads = load is not None and not os.isatty(0)
    loop.add_signal_handler(signal.SIGHUP, hung_up.set if reloads else stop)
    stopped = asyncio.create_task(stopping.wait())
    try:
        settings, reserved = _with_shared_ports(settings)
        gateways = _gateways(settings)
        children = [*shards, *gateways]
        ready = await _start(children, stopped, gateways[0])
        if ready is None:
            return 0 if stopping.is_set() else CONFIG_EXIT_CODE
        print(
            f"ready stream={ready.stream} worker={ready.worker} metrics={ready.metrics}"
            f" shards={settings.shards}"
            + (f" gateways={settings.gateways}" if settings.gateways > 1 else ""),
            flush=True,
        )
        status = status_of(ready)
        notifier.ready(status)
        keepers = [asyncio.create_task(child.keep()) for child in children]
        gateway_keepers = keepers[len(shards) :]
        if load is not None:
            reloading = _reload_when(
                hung_up, load, settings, gateways, shards=shards, notifier=notifier, status=status
            )
            keepers.append(asyncio.create_task(reloading))
        await _until_over(stopped, gateway_keepers, keepers)
        return 0 if stopping.is_set() else 1
    finally:
        notifier.stopping()
        stopped.cancel()
        timeout_s = settings.limits.stop_timeout_s + KILL_AFTER_S
        gateway_timeout_s = settings.limits.drain_seconds + timeout_s
        await asyncio.gather(*(gateway.stop(gateway_timeout_s) for gateway in gateways))
        await asyncio.gather(*(shard.stop(timeout_s) for shard in shards))
        for placeholder in reserved:
            placeholder.close()


def _gateways(settings: Config) -> list[_Child]:
    command = ["-m", "gateway"]
    if settings.gateways == 1:
        return [_Child("gateway", command, settings)]
    return [
        _Child(f"gateway-{i}", [*command, "--index", str(i)], settings)
        for i in range(settings.gateways)
    ]


def _with_shared_ports(settings: Config) -> tuple[Config, list[socket.socket]]:
    """`settings` with ports that several gateways can share, and sockets that keep these.

    Raises:
        ConfigError: a port is taken.
    """
    if settings.gateways == 1:
        return settings, []
    stream, worker = settings.stream, settings.worker
    kept = [service.reserved_port(stream.host, stream.port, service.STREAM_PORT_KEY)]
    try:
        kept.append(service.reserved_port(worker.host, worker.port, service.WORKER_PORT_KEY))
    except ConfigError:
        kept[0].close()
        raise
    stream_port, worker_port = (placeholder.getsockname()[1] for placeholder in kept)
    return (
        structs.replace(
            settings,
            stream=structs.replace(stream, port=stream_port),
            worker=structs.replace(worker, port=worker_port),
        ),
        kept,
    )


async def _until_over(
    stopped: asyncio.Task[bool],
    gateway_keepers: list[asyncio.Task[None]],
    tasks: list[asyncio.Task[None]],
) -> None:
    """Wait until the broker is to stop or its last gateway is given up; shards may be. Raises what
    one of `tasks` raised; all are over then."""
    waiting: set[asyncio.Task[None] | asyncio.Task[bool]] = {stopped, *tasks}
    while not stopped.done() and not all(g.done() for g in gateway_keepers):
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if any(task.exception() for task in done):
            break
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Exception):
            raise outcome


async def _reload_when(
    hung_up: asyncio.Event,
    load: Load,
    settings: Config,
    gateways: list[_Child],
    *,
    shards: Sequence[_Child],
    notifier: Notifier,
    status: str,
) -> None:
    """Reload whenever `hung_up` is set, until cancelled."""
    while True:
        await hung_up.wait()
        hung_up.clear()
        notifier.reloading()
        try:
            used, left = reloaded(settings, load())
            for gateway in gateways:
                await gateway.reload(used)
        except ConfigError as error:
            _log.error("config_not_reloaded", reason=error)
        else:
            settings = used
            await asyncio.gather(*(shard.take_over(used) for shard in shards))
            logs.configure(NAME, used.log_format, used.log_level)
            tell_reloaded(left)
        notifier.ready(status)


async def _start(
    children: list[_Child], stopped: asyncio.Task[bool], first: _Child
) -> Ready | None:
    """Start all; the addresses of `first` when all are ready, None when one of them is not."""
    starts = [asyncio.create_task(child.start()) for child in children]
    waiting: set[asyncio.Task[Ready | None]] = set(starts)
    while waiting and not stopped.done():
        done, _ = await asyncio.wait({*waiting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        waiting -= done
        if any(task in done and task.result() is None for task in starts):
            break  # it said why
    for task in starts:
        task.cancel()
    outcomes = await asyncio.gather(*starts, return_exceptions=True)
    if any(not isinstance(outcome, Ready) for outcome in outcomes):
        return None
    ready = outcomes[children.index(first)]
    assert isinstance(ready, Ready)
    return ready
