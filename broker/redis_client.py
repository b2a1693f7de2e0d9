"""The connections to Redis, and what its faults are called.

While Redis is known to be away nothing is tried: calls fail at once, and one task knocks until it
is back.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from hashlib import sha1
from typing import Any

from hiredis import pack_command
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.sentinel import SentinelConnectionPool
from redis.exceptions import (
    AskError,
    AuthenticationError,
    AuthenticationWrongNumberOfArgsError,
    BusyLoadingError,
    NoScriptError,
    RedisError,
    ResponseError,
)
from redis.exceptions import TimeoutError as RedisTimeoutError

from broker import logs
from broker.errors import StorageError
from broker.redis_pools import ANSWER_S_MAX
from broker.tasks import Tasks

PIPELINES_MAX = 8
"""Of one shard at the same time, each on a connection of its own; more wait."""
RETRY_S_MIN, RETRY_S_MAX = 0.05, 1.0
"""Seconds between attempts to reach Redis again: doubled from the least to the most."""
CHECK_S = 1.0
"""Seconds between looks whether Redis can be written to."""
TROUBLE_LENGTH_MAX = 300
"""Characters of what is told of trouble."""

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
        key_prefix: what all keys begin with.
        on_return: called when Redis can be reached: at first, and each time after it was lost.
        on_trouble: called when `trouble` changed.
        is_copying: also use a Redis that holds a copy which is not finished.
    """

    def __init__(
        self,
        pool: ConnectionPool,
        address: str,
        on_return: Callable[[], None],
        on_trouble: Callable[[], None],
        *,
        key_prefix: str,
        is_copying: bool = False,
    ) -> None:
        self.address = address
        self._is_copying = is_copying
        self.probe_key = f"{key_prefix}broker:probe"
        self._copying_key = copying_key(key_prefix)
        self._on_return = on_return
        self._on_trouble = on_trouble
        self.round_trips_total = 0
        self._down: str | None = "was not reached yet"
        self._refusing: str | None = None
        self._trouble: str | None = None
        self._knocking = False
        self._tasks = Tasks()
        self._closed = asyncio.Event()
        self._free = asyncio.Semaphore(PIPELINES_MAX)
        self._pool: Any = pool
        self._redis = Redis(connection_pool=pool)
        self.database = int(self._pool.connection_kwargs.get("db") or 0)
        """The number of the database that holds the keys."""

    @property
    def is_up(self) -> bool:
        """Whether Redis was there when it was last asked."""
        return self._down is None

    @property
    def trouble(self) -> str | None:
        """Why nothing can be written, or read; None: as far as is known both can."""
        return self._trouble

    @property
    def servers(self) -> list[RedisClient]:
        """Those that hold data."""
        return [self]

    def place(self, slot: int) -> int:
        """The same for keys in slots that one call of a script may touch."""
        return 0

    async def open(self) -> None:
        """Reach Redis; when it is not there, go on trying in the background."""
        if not await self._reach():
            self._look_for_it()
        self._tasks.start(self._watch())

    async def close(self) -> None:
        """Cut the connections."""
        self._closed.set()
        await self._tasks.wait()
        await self._redis.aclose()
        await self._pool.aclose()
        if isinstance(self._pool, SentinelConnectionPool):
            for sentinel in self._pool.sentinel_manager.sentinels:
                await sentinel.aclose()

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
            try:
                async with asyncio.timeout(ANSWER_S_MAX):
                    return await self._exchange(commands)
            except (RedisError, OSError) as error:
                raise self._lost(error) from None

    async def each(self, commands: Sequence[Command]) -> list[Reply]:
        """As `run`, but with the error for each reply where Redis was not reached."""
        try:
            return await self.run(commands)
        except StorageError as error:
            return [error] * len(commands)

    async def _exchange(self, commands: Sequence[Command]) -> list[Reply]:
        # Not by the library's pipeline, whose parts cost more per command than Redis's work.
        packed = b"".join(
            [pack_command(tuple(command)) for command in commands]  # type: ignore[arg-type]  # says: one
        )
        connection = await self._pool.get_connection()
        try:
            await connection.send_packed_command(packed, check_health=False)
            replies: list[Reply] = []
            for _ in commands:
                try:
                    replies.append(await connection.read_response(timeout=math.inf))
                except ResponseError as error:
                    replies.append(error)
        except BaseException:  # what comes on it would be taken for the answer to something else
            await connection.disconnect(nowait=True)
            raise
        finally:
            await self._pool.release(connection)
        return replies

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
                raise self.refused(loaded)
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
        self._down = why = _words(error)
        self._note()
        self._look_for_it()
        return self._unavailable(why)

    def refused(self, answer: str | ResponseError) -> StorageError:
        """The error for what Redis answered with an error, or with its text."""
        error = answer if isinstance(answer, str) else _whole_text(answer)
        code = error.split(" ", 1)[0].removesuffix(":")
        message = f"Redis at {self.address} {_refusal(error)}"
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
            if await self._is_closed_within(wait_s):
                break
            wait_s = min(2 * wait_s, RETRY_S_MAX)
        self._knocking = False

    async def _is_closed_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._closed.wait()
        except TimeoutError:
            return False
        return True

    async def _watch(self) -> None:
        """Notice trouble when nobody asks for anything, and its end when nobody may."""
        while not await self._is_closed_within(CHECK_S):
            if self._down is None:
                try:
                    await self._probe()
                except (RedisError, OSError) as error:
                    self._lost(error)

    async def _probe(self) -> None:
        """Find out whether Redis can be written to."""
        async with asyncio.timeout(ANSWER_S_MAX):
            reply, is_unfinished = await self._exchange(
                [("SET", self.probe_key, "", "PX", 1), ("EXISTS", self._copying_key)]
            )
        if is_unfinished == 1 and not self._is_copying:
            raise RedisError("it holds a copy that is not finished; run broker copy again")
        before, self._refusing = self._refusing, None
        # A slot that moves is no trouble: who has it then is asked.
        if isinstance(reply, ResponseError) and not isinstance(reply, AskError):
            self._refusing = _refusal(_whole_text(reply))
        if self._refusing is not None and self._refusing != before:
            _log.warning("redis_refuses", address=self.address, reason=self._refusing)
        elif self._refusing is None and before is not None:
            _log.info("redis_accepts_writes", address=self.address)
        self._note()

    def _note(self) -> None:
        """Tell when the trouble is another one."""
        why = self._down or self._refusing
        trouble = None if why is None else f"Redis at {self.address} {why}"[:TROUBLE_LENGTH_MAX]
        if trouble != self._trouble:
            self._trouble = trouble
            self._on_trouble()

    async def _reach(self) -> bool:
        try:
            await self._probe()
        except (RedisError, OSError) as error:
            if self._down != (why := _words(error)):
                _log.warning("redis_not_reached", address=self.address, reason=why)
            self._down = why
            self._note()
            return False
        self._down = None
        self._note()
        _log.info("redis_reached", address=self.address)
        self._on_return()
        return True


def copying_key(key_prefix: str) -> str:
    """Of what is there while a copy is not finished: nobody serves from it."""
    return f"{key_prefix}broker:copying"


def _whole_text(error: ResponseError) -> str:
    """What Redis answered; the library takes the codes that it knows out of the text."""
    code = getattr(error, "status_code", None)
    return f"{code} {error}" if code else str(error)


def _refusal(error: str) -> str:
    """What it means that Redis answered a write with `error`."""
    code = error.split(" ", 1)[0].removesuffix(":")
    what = {"OOM": "is out of memory", "READONLY": "is read-only"}.get(code, "refuses")
    return f"{what}: {error}"


def _words(error: Exception) -> str:
    match error:
        case AuthenticationError() | AuthenticationWrongNumberOfArgsError():
            return f"refuses the name or the password of redis_url: {error}"
        case BusyLoadingError():
            return f"is not ready: {error}"
        case RedisTimeoutError() | TimeoutError():
            return f"does not answer: {error or f'nothing came for {ANSWER_S_MAX:g} s'}"
        case ResponseError():
            return f"refuses: {error}"
        case _:
            return f"can't be reached: {error}"
