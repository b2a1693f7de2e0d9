"""Pools of connections for what `redis_url` names."""

from __future__ import annotations

from typing import Any

from redis.asyncio import Connection, ConnectionPool, SSLConnection, sentinel
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from broker.errors import ConfigError
from broker.redis_url import RedisUrl, parse

REDIS_URL_KEY = "modules[].config.adapter.config.redis_url"
"""The key that errors about the URL name."""
ANSWER_S_MAX = 3.0
"""Seconds without an answer, or without a connection, after which a call fails."""
SENTINEL_S_MAX = 0.5
"""Seconds that one Sentinel has to answer before the next one is asked."""


def parsed(url: str) -> RedisUrl:
    """The parts of `url`.

    Raises:
        ConfigError: it is none.
    """
    try:
        return parse(url)
    except ValueError as error:
        raise ConfigError(REDIS_URL_KEY, f"can't be used: {error}") from None


def pool_of(url: RedisUrl) -> ConnectionPool:
    """Connections to the one server of `url`, or to the master that its Sentinels name.

    Raises:
        ConfigError: the URL has options that don't exist.
    """
    try:
        if url.kind == "sentinel":
            return _sentinel_pool(url)
        pool: Any = ConnectionPool.from_url(url.text, **_settings())
        pool.make_connection()  # finds fault with options that the URL gives
    except (ValueError, TypeError) as error:
        raise ConfigError(REDIS_URL_KEY, f"can't be used: {error}") from None
    made: ConnectionPool = pool
    return made


def node_pool(url: RedisUrl, host: str, port: int) -> ConnectionPool:
    """Connections to a node of the cluster of `url`."""
    kind = SSLConnection if url.tls else Connection
    return ConnectionPool(
        connection_class=kind,
        host=host,
        port=port,
        username=url.username,
        password=url.password,
        **_settings(),
    )


def _sentinel_pool(url: RedisUrl) -> ConnectionPool:
    options = {name.removeprefix("sentinel_"): value for name, value in url.options}
    times = {"socket_timeout": SENTINEL_S_MAX, "socket_connect_timeout": SENTINEL_S_MAX}
    retry = {"retry": Retry(NoBackoff(), 0)}
    library: Any = sentinel  # which has no types
    sentinels = library.Sentinel(
        list(url.hosts), sentinel_kwargs={**options, **times, **retry, "ssl": url.tls}
    )
    pool: ConnectionPool = library.SentinelConnectionPool(
        url.service,
        sentinels,
        ssl=url.tls,
        username=url.username,
        password=url.password,
        db=url.db,
        **_settings(),
    )
    return pool


def _settings() -> dict[str, Any]:
    return {
        "socket_timeout": ANSWER_S_MAX,
        "socket_connect_timeout": ANSWER_S_MAX,
        "retry": Retry(NoBackoff(), 0),  # a write that may have been done is not repeated
        "protocol": 2,
    }
