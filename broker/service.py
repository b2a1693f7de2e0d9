"""What every process of the broker does: settings, event loop, signals, telling that it is ready.

The supervisor starts a process with its configuration, as JSON in one line, on standard input,
and keeps that pipe open: its end tells the process that the supervisor is gone. Under systemd a
process is given a configuration file instead.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from broker import config, logs
from broker.config import Config
from broker.errors import ConfigError

CONFIG_EXIT_CODE = 2
BACKLOG = 4096
_GC_THRESHOLD = 50_000

_log = logs.Log("service")


class Ready(msgspec.Struct, frozen=True):
    """What a process says on standard output when it serves: where it listens."""

    stream: str = ""
    worker: str = ""
    metrics: str = ""


Serve = Callable[["Service"], Coroutine[Any, Any, None]]


class Service:
    """Handed to a process's main coroutine."""

    def __init__(self, settings: Config, index: int, supervised: bool) -> None:
        self.config = settings
        self.index = index
        self.stopping = asyncio.Event()
        self.exit_code = 0
        self._supervised = supervised

    def ready(self, ready: Ready) -> None:
        """Tell whoever started the process that it serves."""
        if self._supervised:
            print(msgspec.json.encode(ready).decode(), flush=True)
        gc.freeze()  # what start-up made lives as long as the process
        gc.set_threshold(_GC_THRESHOLD)  # few cycles are made, many objects are

    def crash(self, reason: str) -> None:
        """Stop with an exit code that makes whoever supervises start the process again."""
        _log.error("process_failed", reason=reason)
        self.exit_code = 1
        self.stopping.set()


def options(name: str) -> argparse.ArgumentParser:
    """The command line of a process."""
    parser = argparse.ArgumentParser(prog=f"python -m {name}", allow_abbrev=False)
    parser.add_argument("--config", help="configuration file; without it, JSON on standard input")
    add_log_options(parser)
    return parser


def add_log_options(parser: argparse.ArgumentParser) -> None:
    """The options that every process takes."""
    parser.add_argument("--log-format", choices=("text", "json"), default="text")
    parser.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info"
    )


def run(name: str, arguments: argparse.Namespace, index: int, serve: Serve) -> int:
    """Run a process until it is told to stop; returns its exit code.

    A configuration that can't be used, or an address that can't be had, is one line on stderr
    and `CONFIG_EXIT_CODE`.
    """
    logs.configure(name, arguments.log_format, arguments.log_level)
    try:
        if arguments.config is None:
            settings = config.from_json(sys.stdin.buffer.readline())
        else:
            settings, _ = config.load(arguments.config, config.Overrides(), os.environ)
        return uvloop.run(_main(settings, index, arguments.config is None, serve))
    except ConfigError as error:
        print(f"broker: {error}", file=sys.stderr)
        return CONFIG_EXIT_CODE


async def _main(settings: Config, index: int, supervised: bool, serve: Serve) -> int:
    service = Service(settings, index, supervised)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, service.stopping.set)
    if supervised:
        loop.add_reader(sys.stdin.fileno(), _supervisor_gone, service, loop)

    def unexpected(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        # A fault of ours: what it left behind can't be trusted, a fresh process can.
        error = context.get("exception")
        _log.error("exception_unhandled", message=context.get("message"), error=repr(error))
        if error is not None:
            loop.default_exception_handler(context)
            service.crash(repr(error))

    loop.set_exception_handler(unexpected)
    await serve(service)
    return service.exit_code


def _supervisor_gone(service: Service, loop: asyncio.AbstractEventLoop) -> None:
    if not os.read(sys.stdin.fileno(), 4096):
        loop.remove_reader(sys.stdin.fileno())
        service.stopping.set()


def listening_socket(host: str, port: int, key: str) -> socket.socket:
    """A TCP socket that listens on `host` and `port` (0: a free one).

    Raises:
        ConfigError: under `key`, naming the address, when it is taken or can't be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, ValueError) as error:  # ValueError: no name that could be resolved
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(key, f"can't listen on {host}:{port}: {reason}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(key, f"can't listen on {host}:{port}: {error.strerror}") from None
    listener.setblocking(False)
    return listener


def unix_socket(path: Path, key: str) -> socket.socket:
    """A Unix socket that listens at `path`; one left by a process that died is replaced.

    The caller holds a lock that says that no other broker listens there.

    Raises:
        ConfigError: under `key`, naming the path, when it is taken or can't be had.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists() or path.is_symlink():
            _remove_stale(path, key)
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise ConfigError(key, f"can't listen on the Unix socket {path}: {reason}") from None
    except ConfigError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def _remove_stale(path: Path, key: str) -> None:
    if not path.is_socket():
        raise ConfigError(key, f"can't listen on the Unix socket {path}: it is another file")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)
            return
    raise ConfigError(key, f"can't listen on the Unix socket {path}: another process does")


def shard_socket(settings: Config, shard: int) -> Path:
    """Where shard `shard` listens."""
    return Path(settings.run_dir) / f"shard-{shard}.sock"


def url_host(host: str) -> str:
    """`host` as it stands in a URL."""
    return f"[{host}]" if ":" in host else host
