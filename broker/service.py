"""What every process of the broker does: settings, event loop, signals, telling that it is ready.

The supervisor starts a process with its configuration, as JSON in one line, on standard input,
and keeps that pipe open: a further line is a new configuration, answered with a `Reloaded` on
standard output, and its end tells the process that the supervisor is gone. Under systemd a
process is given a configuration file instead, which it reads again on SIGHUP.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, MutableMapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import msgspec
import uvloop
from msgspec import structs

from broker import config, logs, tracing
from broker.config import Config, Overrides
from broker.errors import ConfigError
from broker.notify import Notifier
from broker.tracing import Tracing

CONFIG_EXIT_CODE = 2
RESTARTS = "BROKER_RESTARTS"
"""Variable by which the supervisor tells a process how often it was started again."""
STREAM_PORT_KEY = "modules[].config.port"
WORKER_PORT_KEY = "broker.worker.port"
"""Keys that errors about the ports name."""
BACKLOG = 4096
_GC_THRESHOLD = 50_000
_READ_BYTES = 65536
_RELOADED_LIMITS = (
    "auth_context_bytes_max",
    "auth_timeout_s",
    "auth_waiting_max",
    "client_messages_per_s_max",
    "connections_max",
    "connections_per_address_max",
    "handshake_timeout_s",
    "ping_interval_s",
    "ping_timeout_s",
    "stalled_timeout_s",
    "subscriptions_per_connection_max",
    "trigger_timeout_s",
    "worker_calls_in_flight_max",
    "worker_messages_per_s_max",
)

_log = logs.Log("service")


class Ready(msgspec.Struct, frozen=True):
    """What a process says on standard output when it serves: where it listens."""

    stream: str = ""
    worker: str = ""
    metrics: str = ""


class Reloaded(msgspec.Struct, frozen=True):
    """What a process says of a further configuration: why it can't be used; empty: it is used."""

    refused: str = ""


def _restarts_of(environ: MutableMapping[str, str]) -> int:
    text = environ.pop(RESTARTS, "")
    return int(text) if text.isascii() and text.isdigit() else 0


Serve = Callable[["Service"], Coroutine[Any, Any, None]]
_Value = TypeVar("_Value")


class Service:
    """Handed to a process's main coroutine.

    Args:
        path: of the configuration file; None for a process that is supervised.
        overrides: options that win over the file.
    """

    def __init__(
        self,
        name: str,
        settings: Config,
        index: int,
        path: str | None,
        *,
        overrides: Overrides,
        notifier: Notifier,
        tracing: Tracing | None,
    ) -> None:
        self.name = name
        self.tracing = tracing
        self._overrides = overrides
        self.config = settings
        self.index = index
        self.stopping = asyncio.Event()
        self.hurried = asyncio.Event()
        """Set when it is to stop at once: nothing may be waited for that can be left out."""
        self.exit_code = 0
        self.restarts = _restarts_of(os.environ)
        self.on_reload: Callable[[Config], None] | None = None
        """Makes the process's parts use a configuration that `reloaded` made. Raises ConfigError
        when it can't be used; then everything is as it was."""
        self._path = path
        self._notifier = notifier
        self._status = ""
        self._reload_wanted = False

    def ready(self, ready: Ready) -> None:
        """Tell whoever started the process that it serves."""
        if self._path is None:
            _say(ready)
        self._status = status_of(ready)
        self._notifier.ready(self._status)
        gc.freeze()  # what start-up made lives as long as the process
        gc.set_threshold(_GC_THRESHOLD)  # few cycles are made, many objects are
        if self._reload_wanted:
            self.reload_file()

    def stop(self) -> None:
        """Begin to stop; told again, hurry."""
        if self.stopping.is_set():
            self.hurried.set()
        else:
            self._notifier.stopping()
            self.stopping.set()

    def stop_at_once(self) -> None:
        """Stop and hurry: somebody may be about to start in this process's place."""
        self.hurried.set()
        if not self.stopping.is_set():
            self.stop()

    def crash(self, reason: str) -> None:
        """Stop with an exit code that makes whoever supervises start the process again."""
        _log.error("process_failed", reason=reason)
        self.exit_code = 1
        self.stop_at_once()

    def reload_file(self) -> None:
        """Read the configuration file again and use what can be used without a restart."""
        if self._path is None or self.stopping.is_set():
            return  # the supervisor reads the file and hands it over
        if not self._status:
            self._reload_wanted = True
            return
        self._notifier.reloading()
        try:
            settings, _ = config.load(self._path, self._overrides, os.environ)
            self._reload(settings)
        except ConfigError as error:
            _log.error("config_not_reloaded", reason=error)
        self._notifier.ready(self._status)

    def hand_over(self, line: bytes) -> None:
        """Use the configuration in a line of the supervisor's, and answer it."""
        try:
            self._reload(config.from_json(line))
        except ConfigError as error:
            _say(Reloaded(str(error)))
        else:
            _say(Reloaded())

    def _reload(self, settings: Config) -> None:
        used, left = reloaded(self.config, settings)
        if self.on_reload is not None:
            self.on_reload(used)
        self.config = used
        logs.configure(self.name, used.log_format, used.log_level)
        tell_reloaded(left)


def _say(message: Ready | Reloaded) -> None:
    print(msgspec.json.encode(message).decode(), flush=True)


def status_of(ready: Ready) -> str:
    """What `systemctl status` shows of a process that serves."""
    addresses = structs.asdict(ready).items()
    return " ".join(["ready", *(f"{name}={url}" for name, url in addresses if url)])


# Reloading.


def reloaded(old: Config, new: Config) -> tuple[Config, list[str]]:
    """`old` with all of `new` that a running broker can take over, and the keys, as a file has
    them, of what it can't, each of which needs a restart."""
    limits = {name: getattr(new.limits, name) for name in _RELOADED_LIMITS}
    used = structs.replace(
        old,
        # One replaces another only: clients that nobody was asked about can't renew anything.
        stream=structs.replace(
            old.stream, auth_function=_other(old.stream.auth_function, new.stream.auth_function)
        ),
        stream_access=structs.replace(
            old.stream_access,
            allowed_origins=new.stream_access.allowed_origins,
            trusted_proxies=new.stream_access.trusted_proxies,
            tls=_other(old.stream_access.tls, new.stream_access.tls),
        ),
        worker=structs.replace(
            old.worker,
            allowed_origins=new.worker.allowed_origins,
            token=_other(old.worker.token, new.worker.token),
            tls=_other(old.worker.tls, new.worker.tls),
        ),
        limits=structs.replace(old.limits, **limits),
        log_level=new.log_level,
        log_format=new.log_format,
    )
    parts: tuple[tuple[str, msgspec.Struct, msgspec.Struct], ...] = (
        ("modules[].config", used.stream, new.stream),
        ("broker.stream", used.stream_access, new.stream_access),
        ("broker.worker", used.worker, new.worker),
        ("broker.metrics", used.metrics, new.metrics),
        ("broker.limits", used.limits, new.limits),
    )
    left = [
        f"{path}.{name}"
        for path, mine, wanted in parts
        for name, value in structs.asdict(wanted).items()
        if getattr(mine, name) != value
    ]
    if used.adapter != new.adapter:
        left.append("modules[].config.adapter")
    if used.shards != new.shards:
        left.append("broker.shards")
    if used.gateways != new.gateways:
        left.append("broker.gateways")
    if used.run_dir != new.run_dir:
        left.append("broker.run_dir")
    if used.tracing != new.tracing:
        left.append("broker.tracing")
    return used, left


def tell_reloaded(left: list[str]) -> None:
    """Log that the configuration was taken over, but for these keys."""
    _log.info("config_reloaded")
    for key in left:
        _log.warning("config_key_needs_restart", key=key)


def _other(old: _Value | None, new: _Value | None) -> _Value | None:
    return old if old is None or new is None else new  # what is off stays off, what is on, on


def options(name: str) -> argparse.ArgumentParser:
    """The command line of a process."""
    parser = argparse.ArgumentParser(prog=f"python -m {name}", allow_abbrev=False)
    parser.add_argument("--config", help="configuration file; without it, JSON on standard input")
    add_log_options(parser)
    return parser


def add_log_options(parser: argparse.ArgumentParser) -> None:
    """The options that every process takes; they win over the configuration."""
    for option, kind in (("--log-format", logs.LogFormat), ("--log-level", logs.LogLevel)):
        parser.add_argument(option, choices=get_args(kind), help="of all processes")


def run(name: str, arguments: argparse.Namespace, index: int, serve: Serve) -> int:
    """Run a process until it is told to stop; returns its exit code.

    A configuration that can't be used, or an address that can't be had, is one line on stderr
    and `CONFIG_EXIT_CODE`.
    """
    overrides = Overrides(log_level=arguments.log_level, log_format=arguments.log_format)
    logs.configure(name, overrides.log_format or "text", overrides.log_level or "info")
    notifier = Notifier(os.environ)
    lines = _Lines(sys.stdin.fileno()) if arguments.config is None else None
    try:
        if lines is not None:
            settings = config.from_json(lines.first())
        else:
            settings, _ = config.load(arguments.config, overrides, os.environ)
        logs.configure(name, settings.log_format, settings.log_level)
        spans = tracing.start(settings.tracing, name, os.environ)
        process = Service(
            name,
            settings,
            index,
            arguments.config,
            overrides=overrides,
            notifier=notifier,
            tracing=spans,
        )
        try:
            return uvloop.run(_main(process, notifier, lines, serve))
        finally:
            if spans is not None:
                spans.close()
    except ConfigError as error:
        print(f"broker: {error}", file=sys.stderr)
        return CONFIG_EXIT_CODE


async def _main(service: Service, notifier: Notifier, lines: _Lines | None, serve: Serve) -> int:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, service.stop)
    loop.add_signal_handler(signal.SIGHUP, service.reload_file)
    if lines is not None:
        loop.add_reader(lines.descriptor, _supervisor_said, lines, service, loop)
    notifier.watch(loop)

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


class _Lines:
    """Lines that the supervisor writes."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._received = b""

    def first(self) -> bytes:
        """The first line, waiting for it; what there is when none comes."""
        while b"\n" not in self._received and (data := os.read(self.descriptor, _READ_BYTES)):
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line

    def read(self) -> list[bytes] | None:
        """What can be read now, as whole lines; None at the end."""
        data = os.read(self.descriptor, _READ_BYTES)
        if not data:
            return None
        *lines, self._received = (self._received + data).split(b"\n")
        return lines


def _supervisor_said(lines: _Lines, service: Service, loop: asyncio.AbstractEventLoop) -> None:
    further = lines.read()
    if further is None:
        loop.remove_reader(lines.descriptor)
        service.stop_at_once()
        return
    for line in further:
        service.hand_over(line)


def listening_socket(host: str, port: int, key: str, *, shared: bool = False) -> socket.socket:
    """A TCP socket that listens on `host` and `port` (0: a free one).

    Of those that listen on a `shared` address the system gives each connection to one.

    Raises:
        ConfigError: under `key`, naming the address, when it is taken or can't be had.
    """
    listener = _bound_socket(host, port, key, shared)
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(key, f"can't listen on {host}:{port}: {error.strerror}") from None
    listener.setblocking(False)
    return listener


def reserved_port(host: str, port: int, key: str) -> socket.socket:
    """A TCP socket that keeps an address (port 0: a free one) for processes that share it.

    Raises:
        ConfigError: as `listening_socket`; also when others share the address already.
    """
    if port:
        _bound_socket(host, port, key, shared=False).close()
    return _bound_socket(host, port, key, shared=True)


def _bound_socket(host: str, port: int, key: str, shared: bool) -> socket.socket:
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
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(key, f"can't listen on {host}:{port}: {error.strerror}") from None
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


def gateway_socket(settings: Config, gateway: int) -> Path:
    """Where gateway `gateway` listens for the other gateways of its broker."""
    return Path(settings.run_dir) / f"gateway-{gateway}.sock"


def shard_metrics_port(settings: Config, shard: int) -> int:
    """The metrics port of a shard; 0 for a free one."""
    return settings.metrics.port and settings.metrics.port + 1 + shard


def gateway_metrics_port(settings: Config, gateway: int) -> int:
    """The metrics port of a gateway: the first has the one that is configured, the others have
    those behind the shards'; 0 for a free one."""
    first = settings.metrics.port
    return first + settings.shards + gateway if first and gateway else first


def url_host(host: str) -> str:
    """`host` as it stands in a URL."""
    return f"[{host}]" if ":" in host else host
