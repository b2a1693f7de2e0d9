"""The configuration that `broker init` writes: every key, its default, and what it is for.

Keys and defaults come from the structs of `broker.config`, so none can be missing or wrong here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import Struct, structs

from broker.config import KvAdapter, Limits, MetricsPorts, StreamAccess, StreamPort, WorkerPort
from broker.config_text import dump, shown
from broker.errors import ConfigError

DEFAULT_FILE = "broker.yaml"

_HEAD = """\
# Configuration of a stream broker.
#
#   broker check FILE            checks this file and prints all that it means
#   broker serve --config FILE   runs a broker with it
#
# Lines that begin with `#` and a key show a default: remove the `#` to set another value.
# ${VAR:default} in a value is replaced by an environment variable. docs/configuration.md says more.

modules:
  - class: modules::stream::StreamModule
    config:
"""
_ADAPTER = """\
      adapter:
        # Where items are kept; `modules::stream::adapters::RedisAdapter` with `redis_url` is Redis,
        # with `key_prefix` one that others use too.
        class: modules::stream::adapters::KvStore
        config:
"""
_BROKER = """\

broker:
  # Shard processes; one per core, at least 2, unless said here. Fixed once data is written.
  #shards: 2
  # Processes that share both ports, when one is not enough for the clients.
  #gateways: 1
  # debug, info, warning or error; taken over on SIGHUP. The format is text or json.
  #log_level: info
  #log_format: text
  # Spans for OpenTelemetry, sent where the OTEL_* variables say; needs the extra `otel`.
  #tracing: false
  # Folder of Unix sockets and locks; its path may be about 90 bytes long.
  run_dir: ./data/run
"""
_COMMENTS = {
    "stream": "The stream port: who may connect, and when a client has left.",
    "worker": "The worker port, where backend programs connect. Keep it private.",
    "metrics": "GET /metrics of the gateway; shard K answers on port + 1 + K.",
    "metrics.top_streams": "So many streams, those used most, are exposed by name.",
    "limits": "Bounds of all that grows with what others send; bytes and s are the units.",
    "modules.host": "Address of the stream port, where clients connect.",
    "modules.port": "0 takes a free one.",
    "modules.auth_function": "Function asked before each client is let in; null lets everybody in.",
    "adapter.store_method": "file_based, or in_memory, which keeps nothing on disk.",
    "adapter.file_path": "Folder of the shards' folders.",
    "stream.allowed_origins": "Origins of pages that may connect: [https://app.example].",
    "stream.trusted_proxies": "Addresses or networks whose X-Forwarded-For is believed.",
    "stream.leave_delay_s": "Time that a client whose connection ended has to come back.",
    "stream.tls": "PEM files, {certificate: FILE, key: FILE}: the port speaks wss://.",
    "worker.allowed_origins": "Origins of pages that may connect as workers.",
    "worker.token": "What workers have to send as Authorization: Bearer; null: III_TOKEN, if set.",
    "worker.tls": "As for the stream port.",
}
_ACTIVE = ("host", "port", "store_method", "file_path")


def text() -> str:
    """The file: loading it gives the defaults, with and without the lines in comments."""
    return "".join(
        [
            _HEAD,
            *_settings(StreamPort(), "modules", 6),
            _ADAPTER,
            *_settings(KvAdapter(), "adapter", 10),
            _BROKER,
            *_block(StreamAccess(), "stream"),
            *_block(WorkerPort(), "worker"),
            *_block(MetricsPorts(), "metrics"),
            *_block(Limits(), "limits"),
        ]
    )


def write(path: str) -> None:
    """Write the file to `path`, where nothing may be yet.

    Raises:
        ConfigError: names the path and why it can't be written.
    """
    try:
        with Path(path).open("x", encoding="utf-8") as file:
            file.write(text())
    except FileExistsError:
        raise ConfigError(shown(path), "is there already, and is not overwritten") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(shown(path), f"can't be written: {reason}") from None


def _block(part: Struct, name: str) -> Iterator[str]:
    yield f"\n  # {_COMMENTS[name]}\n  {name}:\n"
    yield from _settings(part, name, 4)


def _settings(part: Struct, name: str, indent: int) -> Iterator[str]:
    for field in structs.fields(part):
        comment = _COMMENTS.get(f"{name}.{field.name}")
        if comment is not None:
            yield f"{' ' * indent}# {comment}\n"
        setting = dump({field.name: msgspec.to_builtins(getattr(part, field.name))})
        mark = "" if field.name in _ACTIVE else "#"
        yield f"{' ' * indent}{mark}{setting}"
