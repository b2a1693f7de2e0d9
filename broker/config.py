"""The configuration: its structs with their bounds, and how a file and options become one.

A file has the stream module's documented block, in either of its spellings (protocol section 11),
and the broker's own below `broker:`. Options of the command line win over it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from ipaddress import ip_network
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, structs

from broker import redis_url
from broker.config_text import (
    Value,
    check_keys,
    convert,
    converted,
    dump,
    key_path,
    mapping,
    read_file,
    shown,
)
from broker.errors import ConfigError
from broker.logs import LogFormat, LogLevel

KIB = 1024
MIB = 1024 * 1024
SHARDS_MAX = 1024
GATEWAYS_MAX = 64

Port = Annotated[int, Meta(ge=0, le=65535)]
# No control characters, which would break lines, and no lone surrogates, which are no UTF-8.
_TEXT = r"\A[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]*\Z"
Text = Annotated[str, Meta(min_length=1, max_length=4096, pattern=_TEXT)]
KeyPrefix = Annotated[str, Meta(min_length=0, max_length=128, pattern=_TEXT)]
Shards = Annotated[int, Meta(ge=1, le=SHARDS_MAX)]
Gateways = Annotated[int, Meta(ge=1, le=GATEWAYS_MAX)]
FILE_PATH_KEY = "modules[].config.adapter.config.file_path"
"""The key that errors about the KvStore's folder name."""

StoreMethod = Literal["in_memory", "file_based"]
MessageBytes = Annotated[int, Meta(ge=KIB, le=1024 * MIB)]
MemoryBytes = Annotated[int, Meta(ge=KIB, le=1024 * 1024 * MIB)]
NameBytes = Annotated[int, Meta(ge=1, le=65536)]
Count = Annotated[int, Meta(ge=1, le=10_000_000)]
Seconds = Annotated[float, Meta(ge=0.01, le=86_400)]
Delay = Annotated[float, Meta(ge=0, le=3600)]
Texts = Annotated[tuple[Text, ...], Meta(max_length=1000)]

_Ignored = Annotated[int, Meta(ge=0, le=2**63 - 1)]  # settings of storage that is not built so


class StreamPort(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where clients connect, and the function that lets them in."""

    host: Text = "0.0.0.0"
    port: Port = 3112
    """TCP port; 0 takes a free one."""
    auth_function: Text | None = None
    """Id of the function asked for each connection; None lets everybody in."""


class Tls(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """PEM files of a port that speaks TLS: the certificate with its chain, and its key."""

    certificate: Text
    key: Text


class StreamAccess(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the broker adds to the stream port: who may connect, and when a client has left."""

    allowed_origins: Texts | None = None
    """Origins of pages that may connect, exactly as browsers send them; `*` is any. None: any,
    unless the page asks for the machine that it is shown on (`gateway.access`)."""
    trusted_proxies: Texts = ()
    """Addresses or networks whose `X-Forwarded-For` is believed."""
    leave_delay_s: Delay = 0.0
    """Seconds that a client whose connection ended has to join again without having left."""
    tls: Tls | None = None


class WorkerPort(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where workers connect."""

    host: Text = "127.0.0.1"
    port: Port = 49134
    """TCP port; 0 takes a free one."""
    allowed_origins: Texts = ()
    """Origins of pages that may connect as workers; `*` is any."""
    token: Text | None = None
    """What workers have to send as `Authorization: Bearer`; None: see `III_TOKEN`."""
    tls: Tls | None = None


class MetricsPorts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where metrics are scraped."""

    host: Text = "127.0.0.1"
    port: Port = 9464
    """TCP port of the gateway, shard K has `port + 1 + K`, further gateways have those behind the
    shards'; 0: each process takes a free one."""
    top_streams: Annotated[int, Meta(ge=0, le=100)] = 0
    """Streams of each shard, those used most, that are exposed by name; 0: none."""


class KvAdapter(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="name", tag="kv"
):
    """Items in SQLite files, or in memory only."""

    store_method: StoreMethod = "file_based"
    file_path: Text = "./data/stream_store"
    """Folder of the shards' folders."""


class RedisAdapter(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="name", tag="redis"
):
    """Items in Redis. The URL may hold a password."""

    redis_url: Text = "redis://localhost:6379"
    key_prefix: KeyPrefix = ""
    """What all keys and channels begin with; brokers with different ones share nothing."""


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The bounds of all that grows with what others send. `docs/configuration.md` says what
    happens at each."""

    worker_message_bytes_max: MessageBytes = 64 * MIB
    """Bytes of one message of a worker."""
    client_message_bytes_max: MessageBytes = 256 * KIB
    """Bytes of one message of a client."""
    worker_send_queue_bytes_max: MemoryBytes = 64 * MIB
    """Bytes that wait to be written to one worker."""
    client_send_queue_bytes_max: MemoryBytes = MIB
    """Bytes that wait to be written to one client."""
    worker_calls_in_flight_max: Count = 10_000
    """Calls of one worker that wait for answers of other workers."""
    name_bytes_max: NameBytes = 1024
    """Bytes of UTF-8 of a stream's, group's or item's name."""
    connections_max: Count = 100_000
    """Open connections of each port."""
    connections_per_address_max: Count = 100_000
    """Open connections of each port that come from one address."""
    client_messages_per_s_max: Annotated[float, Meta(ge=0, le=10_000_000)] = 1000.0
    """Messages a second of one client, on average over two; 0 is no limit."""
    worker_messages_per_s_max: Annotated[float, Meta(ge=0, le=10_000_000)] = 0.0
    """Messages a second of one worker, likewise."""
    subscriptions_per_connection_max: Count = 10_000
    """Subscriptions of one client connection."""
    response_bytes_max: MessageBytes = 48 * MIB
    """Bytes of one answer of `stream::list` or of one sync."""
    handshake_timeout_s: Seconds = 10.0
    """Seconds from the accepted connection to the complete request head."""
    ping_interval_s: Seconds = 20.0
    """Seconds between WebSocket pings to a peer."""
    ping_timeout_s: Seconds = 60.0
    """Seconds without any frame of a peer after which it counts as gone."""
    stalled_timeout_s: Seconds = 60.0
    """Seconds that a peer may take nothing of what waits for it."""
    stop_timeout_s: Seconds = 10.0
    """Seconds that a stopping broker gives to what is in flight."""
    drain_seconds: Delay = 2.0
    """Seconds over which a stopping gateway spreads the closes of its clients."""
    group_cache_bytes_max: MemoryBytes = 256 * MIB
    """Bytes of groups that one shard keeps in memory."""
    link_queue_bytes_max: MemoryBytes = 64 * MIB
    """Bytes that wait in one direction of the link between the gateway and one shard."""
    auth_timeout_s: Seconds = 5.0
    """Seconds that the auth function may take."""
    trigger_timeout_s: Seconds = 5.0
    """Seconds that a join trigger or a condition may take."""
    auth_waiting_max: Count = 2000
    """Handshakes, and renewals, that wait for the auth function."""
    auth_context_bytes_max: MessageBytes = 64 * KIB
    """Bytes of the context that the auth function gives a connection."""
    handler_timeout_s: Seconds = 300.0
    """Seconds after which the answer of a `stream` or leave handler is not waited for any more."""
    hang_timeout_s: Annotated[float, Meta(ge=0.5, le=86_400)] = 20.0
    """Seconds without a sign of life after which `broker serve` kills a process and starts it
    again."""
    restarts_max: Count = 20
    """Deaths in a row, each within 30 seconds of its start, after which a process is given up."""
    history_events_max: Annotated[int, Meta(ge=0, le=100_000)] = 1000
    """Events of a group that are kept for clients that resume; 0 keeps none."""
    history_age_s_max: Annotated[float, Meta(ge=0, le=2_592_000)] = 3600.0
    """Seconds after which they are not kept any more."""
    history_group_bytes_max: MemoryBytes = MIB
    """Bytes of them."""
    history_bytes_max: MemoryBytes = 64 * MIB
    """Bytes of them of all groups of one shard, with storage in memory."""
    leave_wait_s: Seconds = 300.0
    """Seconds that leaves of a gateway that died wait for their triggers to be registered again."""


def default_shards() -> int:
    """One shard per core, at least 2."""
    return min(max(2, os.cpu_count() or 1), SHARDS_MAX)


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that the processes of one broker have to know."""

    stream: StreamPort = msgspec.field(default_factory=StreamPort)
    stream_access: StreamAccess = msgspec.field(default_factory=StreamAccess)
    worker: WorkerPort = msgspec.field(default_factory=WorkerPort)
    metrics: MetricsPorts = msgspec.field(default_factory=MetricsPorts)
    adapter: KvAdapter | RedisAdapter = msgspec.field(default_factory=KvAdapter)
    shards: Shards = msgspec.field(default_factory=default_shards)
    gateways: Gateways = 1
    """Processes that share the two ports."""
    run_dir: Text = "./data/run"
    """Folder of the Unix sockets."""
    log_level: LogLevel = "info"
    log_format: LogFormat = "text"
    tracing: bool = False
    """Whether spans are made for OpenTelemetry, which the extra `otel` installs."""
    limits: Limits = msgspec.field(default_factory=Limits)


class Overrides(msgspec.Struct, frozen=True):
    """The options of the command line; None where one was not given."""

    shards: int | None = None
    data_dir: str | None = None
    host: str | None = None
    port: int | None = None
    worker_host: str | None = None
    worker_port: int | None = None
    metrics_port: int | None = None
    log_level: LogLevel | None = None
    log_format: LogFormat | None = None


_STREAM_CLASS = "modules::stream::StreamModule"
_KV_CLASS = "modules::stream::adapters::KvStore"
_REDIS_CLASS = "modules::stream::adapters::RedisAdapter"
_ENTRIES = {
    "class": {
        _STREAM_CLASS: "stream",
        "modules::worker::WorkerModule": "worker",
        "modules::worker_manager::WorkerManagerModule": "worker",
    },
    "name": {"iii-stream": "stream", "iii-worker-manager": "worker"},
}
_ADAPTERS = {
    "class": {
        _KV_CLASS: "kv",
        _REDIS_CLASS: "redis",
        "modules::stream::adapters::Bridge": "bridge",
    },
    "name": {"kv": "kv", "redis": "redis", "bridge": "bridge"},
}
_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/?#\sA-Z]*")
_REDIS_SCHEMES = ("redis://", "rediss://", "unix://", "redis+sentinel://", "redis+cluster://")

# Each name ends with a colon and none is `stream` or `broker`, which begin all that follows: so no
# key under one prefix is a key under another, also where one begins the other. No pattern of keys,
# and no hash tag of a Redis Cluster, may come of it.
_KEY_PREFIX = re.compile(r"(?:(?!stream:|broker:)[^\s:{}*?\[\]\\]+:)*")

_Part = TypeVar("_Part", bound=msgspec.Struct)
_Values = dict[str, Value]


def load(
    path: str | None, overrides: Overrides, environ: Mapping[str, str]
) -> tuple[Config, list[str]]:
    """The configuration of the file at `path`, or without one, and warnings, a line each.

    Raises:
        ConfigError: the file cannot be read, or a key or an option is unknown or holds what it
            may not; in one line.
    """
    values = {} if path is None else read_file(path, environ)
    check_keys(values, ("modules", "workers", "broker"), "")
    warnings: list[str] = []
    entries = _entries(values, warnings)
    stream, adapter = _stream(*entries.get("stream", ("", {})), warnings)
    broker = mapping(values, "broker", "")
    plain = {
        "shards": Shards,
        "gateways": Gateways,
        "run_dir": Text,
        "log_level": LogLevel,
        "log_format": LogFormat,
        "tracing": bool,
    }
    check_keys(broker, (*plain, "stream", "worker", "metrics", "limits"), "broker")
    worker = _worker_manager(*entries.get("worker", ("", {})), warnings)
    for key, value in _part(WorkerPort, broker, "worker").items():
        if key in worker:
            warnings.append(f"{entries['worker'][0]}.{key}: ignored, broker.worker.{key} wins")
        worker[key] = value
    access = _part(StreamAccess, broker, "stream")
    _check_origins(access.get("allowed_origins"), "broker.stream.allowed_origins")
    _check_origins(worker.get("allowed_origins"), "broker.worker.allowed_origins")
    _check_networks(access.get("trusted_proxies", ()), "broker.stream.trusted_proxies")
    config = Config(
        stream=stream,
        stream_access=StreamAccess(**access),
        adapter=adapter,
        worker=WorkerPort(**worker),
        metrics=MetricsPorts(**_part(MetricsPorts, broker, "metrics")),
        limits=Limits(**_part(Limits, broker, "limits")),
        **{
            key: convert(value, plain[key], f"broker.{key}")
            for key, value in broker.items()
            if key in plain
        },
    )
    return _with_overrides(config, overrides), warnings


def to_json(config: Config) -> bytes:
    """`config` as JSON for another process; it may hold a password."""
    return msgspec.json.encode(config)


def from_json(text: bytes) -> Config:
    """The inverse of `to_json`.

    Raises:
        ConfigError: `text` is not what `to_json` makes.
    """
    try:
        return msgspec.json.decode(text, type=Config)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError("", f"the configuration handed over is wrong: {error}") from None


def to_yaml(config: Config) -> str:
    """`config` as a complete file that `load` takes and makes the same of.

    It repeats a token, and a password in `redis_url`: the file would be of no use without.
    """
    adapter = structs.asdict(config.adapter)
    adapter_class = _KV_CLASS if isinstance(config.adapter, KvAdapter) else _REDIS_CLASS
    stream = structs.asdict(config.stream)
    stream["adapter"] = {"class": adapter_class, "config": adapter}
    values = {
        "modules": [{"class": _STREAM_CLASS, "config": stream}],
        "broker": {
            "shards": config.shards,
            "gateways": config.gateways,
            "run_dir": config.run_dir,
            "log_level": config.log_level,
            "log_format": config.log_format,
            "tracing": config.tracing,
            "stream": msgspec.to_builtins(config.stream_access),
            "worker": msgspec.to_builtins(config.worker),
            "metrics": structs.asdict(config.metrics),
            "limits": structs.asdict(config.limits),
        },
    }
    return dump(values)


def _entries(values: _Values, warnings: list[str]) -> dict[str, tuple[str, _Values]]:
    """The blocks `stream` and `worker` of both lists: path and content of their `config`."""
    found: dict[str, tuple[str, _Values]] = {}
    for list_name in ("modules", "workers"):
        entries = values.get(list_name)
        if entries is not None and not isinstance(entries, list):
            raise ConfigError(list_name, f"holds {shown(entries)}, may hold a list")
        for index, entry in enumerate(entries or ()):
            path = f"{list_name}[{index}]"
            if not isinstance(entry, dict):
                raise ConfigError(path, f"holds {shown(entry)}, may hold a mapping")
            spelling, name = _spelling(entry, path)
            kind = _ENTRIES[spelling].get(name)
            if kind is None:
                if any(name in names for names in _ENTRIES.values()):
                    known = ", ".join(_ENTRIES[spelling])
                    reason = f"holds {shown(name)}, may hold one of {known}"
                    raise ConfigError(f"{path}.{spelling}", reason)
                warnings.append(f"{path}: {shown(name)} is not part of this broker and is ignored")
                continue
            if kind in found:
                earlier = found[kind][0].removesuffix(".config")
                raise ConfigError(
                    path, f"holds a second {shown(name)} beside {earlier}, may be one"
                )
            check_keys(entry, (spelling, "config"), path)
            found[kind] = f"{path}.config", mapping(entry, "config", path)
    return found


def _spelling(entry: _Values, path: str) -> tuple[str, str]:
    """Which of `class` and `name` an entry or adapter has, and what it holds."""
    given = [key for key in ("class", "name") if key in entry]
    if len(given) != 1:
        held = "both class and name" if given else "neither class nor name"
        raise ConfigError(path, f"holds {held}, may hold one of them")
    return given[0], convert(entry[given[0]], Text, f"{path}.{given[0]}")


def _stream(
    path: str, config: _Values, warnings: list[str]
) -> tuple[StreamPort, KvAdapter | RedisAdapter]:
    own = {key: value for key, value in config.items() if key != "adapter"}
    stream = StreamPort(**converted(StreamPort, own, path, ("adapter",)))
    if config.get("adapter") is None:
        return stream, KvAdapter()
    return stream, _adapter(mapping(config, "adapter", path), f"{path}.adapter", warnings)


def _adapter(values: _Values, path: str, warnings: list[str]) -> KvAdapter | RedisAdapter:
    spelling, name = _spelling(values, path)
    check_keys(values, (spelling, "config"), path)
    config, config_path = mapping(values, "config", path), f"{path}.config"
    match _ADAPTERS[spelling].get(name):
        case "kv":
            ignored = ("save_interval_ms", "channel_size")
            for key in ignored:
                if key in config:
                    convert(config[key], _Ignored, f"{config_path}.{key}")
                    warnings.append(f"{config_path}.{key}: has no meaning here and is ignored")
            own = {key: value for key, value in config.items() if key not in ignored}
            return KvAdapter(**converted(KvAdapter, own, config_path, ignored))
        case "redis":
            own = dict(config)
            if own.get("key_prefix", "") is None:  # what an empty environment variable leaves
                del own["key_prefix"]
            redis = RedisAdapter(**converted(RedisAdapter, own, config_path))
            try:
                redis_url.parse(redis.redis_url)
            except ValueError as error:
                reason = f"may hold a URL that starts with {' or '.join(_REDIS_SCHEMES)}"
                reason = f"holds {shown(redis.redis_url)}, {reason} and names a valid host and port"
                raise ConfigError(f"{config_path}.redis_url", f"{reason}: {error}") from None
            if not _KEY_PREFIX.fullmatch(redis.key_prefix):
                reason = (
                    f"holds {shown(redis.key_prefix)}, may hold names that each end with a colon"
                )
                reason = (
                    f"{reason}, without spaces and {{ }} * ? [ ] \\, none of them stream or broker"
                )
                raise ConfigError(f"{config_path}.key_prefix", reason)
            return redis
        case "bridge":
            reason = f"holds {shown(name)}, which would keep the data in another engine"
        case _:
            reason = f"holds {shown(name)}"
    known = ", ".join(name for name, kind in _ADAPTERS[spelling].items() if kind != "bridge")
    raise ConfigError(f"{path}.{spelling}", f"{reason}; may hold one of {known}")


def _worker_manager(path: str, config: _Values, warnings: list[str]) -> dict[str, Any]:
    """Host and port as far as the block has them."""
    for key in ("rbac", "middleware_function_id"):
        if config.get(key) is not None:
            reason = f"holds {shown(config[key])}, may be left out: there are no access rules here"
            raise ConfigError(f"{path}.{key}", f"{reason}, and without them all workers get in")
    own: _Values = {key: config[key] for key in ("host", "port") if key in config}
    warnings += [
        f"{key_path(path, key)}: has no meaning here and is ignored"
        for key in config
        if key not in own
    ]
    return converted(WorkerPort, own, path)


def _check_origins(origins: tuple[str, ...] | None, path: str) -> None:
    for index, origin in enumerate(origins or ()):
        if not _ORIGIN.fullmatch(origin):
            reason = "an origin in lower case, such as https://app.example or http://localhost:3000"
            reason = f"holds {shown(origin)}, may hold {reason}, or null, or *"
            raise ConfigError(f"{path}[{index}]", reason)


def _check_networks(networks: tuple[str, ...], path: str) -> None:
    for index, network in enumerate(networks):
        try:
            ip_network(network)
        except ValueError:
            reason = f"holds {shown(network)}, may hold an address or a network such as 10.0.0.0/8"
            raise ConfigError(f"{path}[{index}]", reason) from None


def _part(kind: type[_Part], broker: _Values, key: str) -> dict[str, Any]:
    return converted(kind, mapping(broker, key, "broker"), f"broker.{key}")


def _with_overrides(config: Config, overrides: Overrides) -> Config:
    """Put the options over the configuration, then check what depends on several keys."""
    data_dir, adapter, folders = overrides.data_dir, config.adapter, {}
    if data_dir is not None:
        convert(data_dir, Text, "--data-dir")
        folders = {"run_dir": ("--data-dir", os.path.join(data_dir, "run"))}
        if isinstance(adapter, KvAdapter):
            file_path = ("--data-dir", os.path.join(data_dir, "stream_store"))
            adapter = _with_options(adapter, file_path=file_path)
    config = structs.replace(
        _with_options(
            config,
            shards=("--shards", overrides.shards),
            log_level=("--log-level", overrides.log_level),
            log_format=("--log-format", overrides.log_format),
            **folders,
        ),
        adapter=adapter,
        stream=_with_options(
            config.stream, host=("--host", overrides.host), port=("--port", overrides.port)
        ),
        worker=_with_options(
            config.worker,
            host=("--worker-host", overrides.worker_host),
            port=("--worker-port", overrides.worker_port),
        ),
        metrics=_with_options(config.metrics, port=("--metrics-port", overrides.metrics_port)),
    )
    processes = config.shards + config.gateways
    port, port_max = config.metrics.port, 65536 - processes
    if port > port_max:  # each of them takes one
        path = "broker.metrics.port" if overrides.metrics_port is None else "--metrics-port"
        reason = (
            f"holds {port}, may hold an integer from 0 to {port_max} with {config.shards} shards"
            + (f" and {config.gateways} gateways" if config.gateways > 1 else "")
        )
        raise ConfigError(path, reason)
    return config


def _with_options(part: _Part, **options: tuple[str, object]) -> _Part:
    """`part` with the fields of which the option, given with its name, is not None."""
    kinds = {field.name: field.type for field in structs.fields(part)}
    given = {
        key: convert(value, kinds[key], option)
        for key, (option, value) in options.items()
        if value is not None
    }
    return structs.replace(part, **given)
