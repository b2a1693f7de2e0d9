"""The connections to Redis, and what its faults are called.

While Redis is known to be away nothing is tried: calls fail at once, and one task knocks until it
is back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from hashlib import sha1
from typing import Any
from urllib.parse import urlsplit

from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthenticationWrongNumberOfArgsError,
    BusyLoadingError,
    NoScriptError,
    RedisError,
    ResponseError,
)
from redis.exceptions import TimeoutError as RedisTimeoutError

from broker import logs
from broker.errors import ConfigError, StorageError
from broker.tasks import Tasks

REDIS_URL_KEY = "modules[].config.adapter.config.redis_url"
"""The key that errors about the URL name."""

PIPELINES_MAX = 8
"""Of one shard at the same time, each on a connection of its own; more wait."""
ANSWER_S_MAX = 3.0
"""Seconds without an answer, or without a connection, after which a call fails."""
RETRY_S_MIN, RETRY_S_MAX = 0.05, 1.0
"""Seconds between attempts to reach Redis again: doubled from the least to the most."""

Command = Sequence[str | bytes | int]
Reply = Any
"""Of a command: bytes, int, None, a list of these, or the `ResponseError` that it got."""

_PASSING = {
    "ASK",
    "BUSY",
    "CLUSTERDOWN",
    "MASTERDOWN",
    "MISCONF",
    "MOVED",
    "NOREPLICAS",
    "OOM",
    "READONLY",
    "TRYAGAIN",
}
"""Codes of errors after which the same call may succeed later."""

_log = logs.Log("redis")


class Script:
    """A Lua script, called by its hash."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = sha1(text.encode(), usedforsecurity=False).hexdigest()


class RedisClient:
    """Sends commands in pipelines, and knows whether Redis is there.

    Args:
        on_return: called when Redis can be reached: at first, and each time after it was lost.

    Raises:
        ConfigError: nothing can be made of the URL.
    """

    def __init__(self, url: str, on_return: Callable[[], None]) -> None:
        self.address = _address(url)
        self._on_return = on_return
        self.round_trips_total = 0
        self._down: str | None = "was not reached yet"
        self._knocking = False
        self._tasks = Tasks()
        self._closed = asyncio.Event()
        self._free = asyncio.Semaphore(PIPELINES_MAX)
        try:
            pool: Any = ConnectionPool.from_url(
                url,
                socket_timeout=ANSWER_S_MAX,
                socket_connect_timeout=ANSWER_S_MAX,
                retry=Retry(NoBackoff(), 0),  # a write that may have been done is not repeated
                protocol=2,
            )
            pool.make_connection()  # finds fault with options that the URL gives
        except (ValueError, TypeError) as error:
            raise ConfigError(REDIS_URL_KEY, f"can't be used: {error}") from None
        self._pool = pool
        self._redis = Redis(connection_pool=pool)

    @property
    def is_up(self) -> bool:
        """Whether Redis was there when it was last asked."""
        return self._down is None

    async def open(self) -> None:
        """Reach Redis; when it is not there, go on trying in the background."""
        if not await self._reach():
            self._look_for_it()

    async def close(self) -> None:
        """Cut the connections."""
        self._closed.set()
        await self._tasks.wait()
        await self._redis.aclose()
        await self._pool.aclose()

    async def run(self, commands: Sequence[Command]) -> list[Reply]:
        """The replies to `commands`, sent in one go; for one that Redis refused, its error.

        Raises:
            StorageError: Redis was not reached, or nothing is known of what it did.
        """
        self._check()
        if not commands:
            return []
        async with self._free:
            self._check()
            self.round_trips_total += 1
            pipeline = self._redis.pipeline(transaction=False)
            for command in commands:
                pipeline.execute_command(*command)
            try:
                return await pipeline.execute(raise_on_error=False)
            except (RedisError, OSError) as error:
                raise self._lost(error) from None

    async def call(
        self, script: Script, calls: Sequence[Command], after: Sequence[Command] = ()
    ) -> list[Reply]:
        """The replies to calls of `script`, each with its number of keys, keys and arguments.

        `after` are commands that go out behind them; their replies come last.

        Raises:
            StorageError: as `run`.
        """
        commands: list[Command] = [("EVALSHA", script.sha, *call) for call in calls]
        commands += after
        replies = await self.run(commands)
        unknown = [n for n, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if unknown:  # Redis was restarted, or never saw it; these calls did nothing
            load = ("SCRIPT", "LOAD", script.text)
            loaded, *again = await self.run([load, *(commands[n] for n in unknown)])
            if isinstance(loaded, ResponseError):
                raise self.refused(str(loaded))
            for n, reply in zip(unknown, again, strict=True):
                replies[n] = reply
        return replies

    def pubsub(self) -> Any:
        """A connection for messages, still to be made."""
        return self._redis.pubsub(ignore_subscribe_messages=False)

    def _lost(self, error: Exception) -> StorageError:
        """Take note that `error` cut a connection off, and look for Redis."""
        if self._down is None:
            _log.warning("redis_lost", address=self.address, reason=_words(error))
        self._down = _words(error)
        self._look_for_it()
        return self._unavailable(self._down)

    def refused(self, error: str) -> StorageError:
        """The error for what Redis answered with `error`."""
        code = error.split(" ", 1)[0].removesuffix(":")
        what = {"OOM": "is out of memory", "READONLY": "is read-only"}.get(code, "refuses")
        message = f"Redis at {self.address} {what}: {error}"
        return StorageError("redis_refused", message, retryable=code in _PASSING)

    def _check(self) -> None:
        if self._down is not None:
            raise self._unavailable(self._down)

    def _unavailable(self, why: str) -> StorageError:
        message = f"Redis at {self.address} {why}; retry later"
        return StorageError("redis_unavailable", message, retryable=True)

    def _look_for_it(self) -> None:
        if not self._knocking and not self._closed.is_set():
            self._knocking = True
            self._tasks.start(self._knock())

    async def _knock(self) -> None:
        wait_s = RETRY_S_MIN
        while not await self._reach():
            try:
                async with asyncio.timeout(wait_s):
                    await self._closed.wait()
                break
            except TimeoutError:
                wait_s = min(2 * wait_s, RETRY_S_MAX)
        self._knocking = False

    async def _reach(self) -> bool:
        try:
            await self._redis.ping()
        except (RedisError, OSError) as error:
            if self._down != (why := _words(error)):
                _log.warning("redis_not_reached", address=self.address, reason=why)
            self._down = why
            return False
        self._down = None
        _log.info("redis_reached", address=self.address)
        self._on_return()
        return True


def _address(url: str) -> str:
    """The place that the URL names, without its password."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return parts.path
    host = parts.hostname or "localhost"
    return f"{f'[{host}]' if ':' in host else host}:{parts.port or 6379}"


def _words(error: Exception) -> str:
    match error:
        case AuthenticationError() | AuthenticationWrongNumberOfArgsError():
            return f"refuses the name or the password of redis_url: {error}"
        case BusyLoadingError():
            return f"is not ready: {error}"
        case RedisTimeoutError():
            return f"does not answer: {error}"
        case ResponseError():
            return f"refuses: {error}"
        case _:
            return f"can't be reached: {error}"
