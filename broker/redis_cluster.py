"""The nodes of a Redis Cluster: who has which slot, and what happens when slots move.

Commands go to the node that has the slot of their key. A node that says MOVED or ASK did nothing,
so what it was asked is asked again where it points to; everything else is as with one server, node
by node: one that is away fails what is asked of its slots, and nothing else.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from redis.exceptions import (
    AskError,
    ConnectionError,
    MovedError,
    NoScriptError,
    ResponseError,
    TryAgainError,
)

from broker import logs
from broker.errors import StorageError
from broker.redis_client import Command, RedisClient, Reply, Script
from broker.redis_pools import node_pool, parsed, pool_of
from broker.redis_slots import SLOTS, probe_key, slot_of
from broker.redis_url import RedisUrl, shown_address
from broker.tasks import Tasks

REDIRECTIONS_MAX = 8
"""Times that a command follows slots that move."""
REDIRECTION_S = 0.02
"""Seconds, once more each time, before what a node can't do while a slot moves is asked again."""
REFRESH_S = 10.0
"""Seconds between looks at who has which slot, while all is well."""
REFRESH_TROUBLED_S = 0.3
"""The same while it is not."""

SHARDED_VERSION_MIN = 7
"""Of Redis, which has sharded pub/sub."""
_VERSION = re.compile(rb"^redis_version:(\d+)", re.MULTILINE)

_log = logs.Log("redis")

_Address = tuple[str, int]
_Perform = Callable[[RedisClient, Sequence[Command]], Awaitable[list[Reply]]]


class RedisCluster:
    """As `RedisClient`, of several servers.

    Args:
        key_prefix: what all keys begin with.
        on_return: called each time that a node can be reached again, and when slots moved.
        on_trouble: called when `trouble` changed.
    """

    def __init__(
        self,
        url: RedisUrl,
        on_return: Callable[[], None],
        on_trouble: Callable[[], None],
        *,
        key_prefix: str,
        is_copying: bool = False,
    ) -> None:
        self.address = url.address
        self.database = 0  # there is no other
        self._url = url
        self._key_prefix = key_prefix
        self._is_copying = is_copying
        self._on_return = on_return
        self._on_trouble = on_trouble
        self._nodes: dict[_Address, RedisClient] = {}
        self._masters: list[RedisClient] = []
        self._slots: list[RedisClient | None] = [None] * SLOTS
        self._texts: dict[str, str] = {}  # of scripts, by their hash
        self._why: str | None = "was not reached yet"
        self._trouble: str | None = None
        self._stale = asyncio.Event()
        self._closed = False
        self._tasks = Tasks()
        self._pubsubs = 0
        self.is_sharded = False
        """Whether changes are told by sharded pub/sub: every node has it."""
        self.on_slots: Callable[[], None] = _nothing
        """Called after each look at who has which slot."""

    @property
    def round_trips_total(self) -> int:
        """Pipelines that were sent to the nodes that are known now."""
        return sum(node.round_trips_total for node in self._nodes.values())

    @property
    def is_up(self) -> bool:
        """Whether some node is there."""
        return any(node.is_up for node in self._masters)

    @property
    def trouble(self) -> str | None:
        """Why some slots can't be used; None: as far as is known all can."""
        return self._trouble

    @property
    def servers(self) -> list[RedisClient]:
        """Those that hold data."""
        return list(self._masters)

    def server_of(self, slot: int) -> RedisClient | None:
        """Who has a slot, as far as is known."""
        return self._slots[slot]

    def look_again(self) -> None:
        """Somebody noticed that slots moved."""
        self._stale.set()

    def place(self, slot: int) -> int:
        """The same for keys in slots that one call of a script may touch."""
        return slot

    async def open(self) -> None:
        """Find the nodes; go on trying in the background."""
        await asyncio.gather(*(self._node(address) for address in self._url.hosts))
        await self._refresh()
        self._tasks.start(self._keep_fresh())

    async def close(self) -> None:
        """Cut the connections."""
        self._closed = True
        self._stale.set()
        await self._tasks.wait()
        for node in self._nodes.values():
            await node.close()

    def pubsub(self) -> Any:
        """A connection for messages, still to be made: each node has those of all.

        Raises:
            ConnectionError: no node is there.
        """
        up = [node for node in self._masters if node.is_up]
        if not up:
            raise ConnectionError("no node of the cluster is there")
        self._pubsubs += 1
        return up[self._pubsubs % len(up)].pubsub()

    def refused(self, answer: str | ResponseError) -> StorageError:
        """The error for what a node answered with an error, or with its text."""
        return next(iter(self._nodes.values())).refused(answer)

    async def run(self, commands: Sequence[Command]) -> list[Reply]:
        """The replies to `commands`; for one that was refused, its error.

        Commands for different slots are done in any order.

        Raises:
            StorageError: a node that is needed was not reached.
        """
        replies = await self.each(commands)
        for reply in replies:
            if isinstance(reply, StorageError):
                raise reply
        return replies

    async def each(self, commands: Sequence[Command]) -> list[Reply]:
        """As `run`, but a node that was not reached spoils its own replies only: its error."""
        return await self._routed(commands, _each)

    async def call(
        self, script: Script, calls: Sequence[Command], after: Sequence[Command] = ()
    ) -> list[Reply]:
        """The replies to calls of `script`, each with its number of keys, keys and arguments.

        As with `each`. `after` are commands that are sent at the same time; what becomes of them is
        not told.
        """

        async def perform(node: RedisClient, commands: Sequence[Command]) -> list[Reply]:
            try:
                return await node.call(script, [command[2:] for command in commands])
            except StorageError as error:
                return [error] * len(commands)

        self._texts[script.sha] = script.text
        commands = [("EVALSHA", script.sha, *call) for call in calls]
        replies, _ = await asyncio.gather(self._routed(commands, perform), self.each(after))
        return replies

    # Where to ----------------------------------------------------------------------------------

    async def _routed(self, commands: Sequence[Command], perform: _Perform) -> list[Reply]:
        replies: list[Reply] = [None] * len(commands)
        left = list(range(len(commands)))
        for attempt in range(REDIRECTIONS_MAX):
            parts: dict[RedisClient | None, list[int]] = {}
            for index in left:
                parts.setdefault(self._slots[_slot(commands[index])], []).append(index)
            await asyncio.gather(
                *(
                    self._part(node, part, commands, replies, perform)
                    for node, part in parts.items()
                )
            )
            left = [n for n in left if isinstance(replies[n], AskError | TryAgainError)]
            if not left:
                break
            self._stale.set()
            for index in left:
                await self._redirect(commands[index], replies, index)
            left = [n for n in left if isinstance(replies[n], AskError | TryAgainError)]
            await asyncio.sleep(REDIRECTION_S * attempt)
        return replies

    async def _part(
        self,
        node: RedisClient | None,
        part: list[int],
        commands: Sequence[Command],
        replies: list[Reply],
        perform: _Perform,
    ) -> None:
        if node is None:
            found: list[Reply] = [self._unavailable()] * len(part)
        else:
            found = await perform(node, [commands[index] for index in part])
        for index, reply in zip(part, found, strict=False):
            replies[index] = reply

    async def _redirect(self, command: Command, replies: list[Reply], index: int) -> None:
        """Note where the slot of a command went, or ask there once."""
        error = replies[index]
        if not isinstance(error, AskError):
            return
        node = await self._node((error.host or self._url.hosts[0][0], error.port))
        if isinstance(error, MovedError):  # which is an AskError
            self._slots[error.slot_id] = node
            return
        asking: Command = ("ASKING",)
        try:
            _, reply = await node.run([asking, command])
            if isinstance(reply, NoScriptError):
                load = ("SCRIPT", "LOAD", self._texts[str(command[1])])
                _, _, reply = await node.run([load, asking, command])
        except StorageError as lost:
            reply = lost
        replies[index] = reply

    def _unavailable(self) -> StorageError:
        message = f"the Redis Cluster at {self.address} has no node for a slot; retry later"
        return StorageError("redis_unavailable", message, retryable=True)

    # The nodes ---------------------------------------------------------------------------------

    async def _node(self, address: _Address) -> RedisClient:
        node = self._nodes.get(address)
        if node is None:
            node = self._nodes[address] = RedisClient(
                node_pool(self._url, *address),
                shown_address(*address),
                self._on_return,
                self._node_troubled,
                key_prefix=self._key_prefix,
                is_copying=self._is_copying,
            )
            await node.open()
        return node

    def _node_troubled(self) -> None:
        self._note()
        if self._trouble is not None:
            self._stale.set()

    async def _keep_fresh(self) -> None:
        while not self._closed:
            wait_s = REFRESH_S if self._trouble is None else REFRESH_TROUBLED_S
            try:
                async with asyncio.timeout(wait_s):
                    await self._stale.wait()
            except TimeoutError:
                pass
            else:
                await asyncio.sleep(REDIRECTION_S)  # for what else comes of it
            self._stale.clear()
            if not self._closed:
                await self._refresh()

    async def _refresh(self) -> None:
        """Ask who has which slot."""
        for node in sorted(self._nodes.values(), key=lambda n: n not in self._masters):
            if not node.is_up:
                continue
            try:
                (reply,) = await node.run([("CLUSTER", "SLOTS")])
            except StorageError:
                continue
            if isinstance(reply, ResponseError):
                self._why = f"refuses: {reply}"
                continue
            await self._take(reply, node)
            break
        else:
            if not any(node.is_up for node in self._nodes.values()):
                self._why = "can't be reached"
        self._note()

    async def _take(self, ranges: list[Any], asked: RedisClient) -> None:
        """Note the answer of a node."""
        slots: list[RedisClient | None] = [None] * SLOTS
        firsts: dict[RedisClient, int] = {}
        addresses = {node: address for address, node in self._nodes.items()}
        for start, end, (name, port, *_), *_ in ranges:
            host = name.decode() if name else addresses[asked][0]
            node = await self._node((host, port))
            slots[start : end + 1] = [node] * (end + 1 - start)
            firsts.setdefault(node, start)
        for node, slot in firsts.items():
            node.probe_key = probe_key(self._key_prefix, slot)
        missing = slots.count(None)
        self._why = f"has no node for {missing} slots" if missing else None
        has_moved = slots != self._slots
        self._slots, self._masters = slots, list(firsts)
        for address, node in list(self._nodes.items()):
            if node not in firsts and not node.is_up and address not in self._url.hosts:
                del self._nodes[address]
                await node.close()
        if has_moved and not self.is_sharded:
            self.is_sharded = await self._all_have_sharded()
        self.on_slots()
        if has_moved:
            _log.info("redis_cluster_seen", address=self.address, nodes=len(firsts))
            self._on_return()

    async def _all_have_sharded(self) -> bool:
        for reply in await asyncio.gather(*(n.each([("INFO", "server")]) for n in self._masters)):
            found = _VERSION.search(reply[0]) if isinstance(reply[0], bytes) else None
            if found is None:
                return False  # not known now
            if int(found[1]) < SHARDED_VERSION_MIN:
                return False
        return True

    def _note(self) -> None:
        trouble = next((node.trouble for node in self._masters if node.trouble), None)
        if self._why is not None:
            trouble = f"the Redis Cluster at {self.address} {self._why}"
        if trouble != self._trouble:
            self._trouble = trouble
            self._on_trouble()


def client_of(
    url: str,
    on_return: Callable[[], None],
    on_trouble: Callable[[], None],
    *,
    key_prefix: str,
    is_copying: bool = False,
) -> RedisClient | RedisCluster:
    """The client of what `url` names, whose own keys begin with `key_prefix`; `is_copying` for the
    command that fills it.

    Raises:
        ConfigError: nothing can be made of the URL.
    """
    place = parsed(url)
    if place.kind == "cluster":
        return RedisCluster(
            place, on_return, on_trouble, key_prefix=key_prefix, is_copying=is_copying
        )
    return RedisClient(
        pool_of(place),
        place.address,
        on_return,
        on_trouble,
        key_prefix=key_prefix,
        is_copying=is_copying,
    )


def _nothing() -> None:
    """Where nobody asks."""


async def _each(node: RedisClient, commands: Sequence[Command]) -> list[Reply]:
    return await node.each(commands)


_KEY_AT = {"EVAL": 3, "EVALSHA": 3, "XGROUP": 2, "XINFO": 2, "OBJECT": 2}
"""Where commands have their first key, if it does not come first."""


def _slot(command: Command) -> int:
    name = str(command[0])
    at = _KEY_AT.get(name, 1)
    if name in ("XREAD", "XREADGROUP"):
        at = list(command).index("STREAMS") + 1
    key = command[at]
    assert not isinstance(key, int), "a command without a key has no node"
    return slot_of(key if isinstance(key, str) else key.decode())
