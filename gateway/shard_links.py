"""One link per shard: calls with their answers, heartbeats, linking again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol, assert_never

from broker import logs, messages
from broker.errors import BrokerError, ShardUnavailable
from broker.link import Link
from broker.link_protocol import gateway_reader
from broker.messages import (
    Event,
    Failure,
    Heartbeat,
    Hello,
    Left,
    Reply,
    StorageState,
    Synced,
    ToGateway,
    Welcome,
)
from broker.names import Group
from broker.routing import shard_of
from broker.sync_bodies import ReceivedBodies

HEARTBEAT_INTERVAL_S = 1.0
SILENCE_MAX_S = 10.0
"""A shard that gives no sign of life for so long counts as dead."""
FLUSH_AT = 64
"""Messages that a shard is sent at once, to work on them while more are read from clients. With
fewer a shard's commits are so much smaller that more of them cost more than that gains. The shard
does not do so: events that come in one piece go to a client with one system call."""
RETRY_FIRST_S, RETRY_MAX_S = 0.02, 1.0

Answer = Reply | Synced | BrokerError
Answered = Callable[[Answer], None]
"""Called once, in the order in which the shard's messages came."""

_log = logs.Log("shard_link")


class LinkUser(Protocol):
    """Who hears what shards say besides answers."""

    def shard_linked(self, shard: int) -> None:
        """The shard knows nothing of this gateway: tell it what it has to know."""

    def event_received(self, shard: int, event: Event) -> None: ...

    def left(self, left: Left) -> None: ...

    def batch_received(self) -> None:
        """All messages that came in one piece were handed over."""


class ShardLinks:
    """The links to all shards."""

    def __init__(
        self,
        paths: list[Path],
        gateway_id: str,
        queue_bytes_max: int,
        user: LinkUser,
    ) -> None:
        self.links = [
            ShardLink(
                shard,
                path,
                shards=len(paths),
                gateway_id=gateway_id,
                queue_bytes_max=queue_bytes_max,
                user=user,
            )
            for shard, path in enumerate(paths)
        ]

    def of(self, group: Group) -> ShardLink:
        """The link to the shard that owns `group`."""
        return self.links[shard_of(group, len(self.links))]

    def shard_of(self, group: tuple[str, str]) -> int:
        """The number of the shard that owns `group`."""
        return shard_of(Group(*group), len(self.links))

    @property
    def events_total(self) -> int:
        """Events that came from all shards."""
        return sum(link.events_total for link in self.links)

    @property
    def ready(self) -> bool:
        """Whether every shard is linked."""
        return all(link.ready for link in self.links)

    async def run(self) -> None:
        """Keep all links made until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for link in self.links:
                tasks.create_task(link.run())

    def close(self) -> None:
        """End all links when what was sent is with the shards."""
        for link in self.links:
            link.close()


class ShardLink:
    """The link to one shard, made again when it is lost."""

    def __init__(
        self,
        shard: int,
        path: Path,
        *,
        shards: int,
        gateway_id: str,
        queue_bytes_max: int,
        user: LinkUser,
    ) -> None:
        self.shard = shard
        self._shards = shards
        self._path = path
        self._gateway_id = gateway_id
        self._queue_bytes_max = queue_bytes_max
        self._user = user
        self._link: Link[ToGateway] | None = None
        self._lost = asyncio.Event()
        self._answers: dict[int, Answered] = {}
        self._bodies = ReceivedBodies()
        self._call_id = 0
        self._heard_at = 0.0
        self.ready = False
        self.trouble: str | None = None
        """What the shard says of its storage, if it does not work."""
        self.links_total = 0
        self.events_total = 0
        self.refused_total = 0
        self.overflows_total = 0
        self._before = (0, 0)  # bytes of links that are over

    @property
    def in_flight(self) -> int:
        """Calls that wait for their answer."""
        return len(self._answers)

    @property
    def queue_bytes(self) -> int:
        """Bytes that the shard has not taken yet."""
        return self._link.queue_bytes if self._link else 0

    @property
    def received_bytes(self) -> int:
        """From the shard, over all links so far."""
        return self._before[0] + (self._link.received_bytes if self._link else 0)

    @property
    def sent_bytes(self) -> int:
        """To the shard, likewise."""
        return self._before[1] + (self._link.sent_bytes if self._link else 0)

    def next_call_id(self) -> int:
        """An id for a message that `call` is given."""
        self._call_id += 1
        return self._call_id

    def call(self, message: messages.Message, call_id: int, answered: Answered) -> None:
        """Send a call whose `call_id` came from `next_call_id`.

        `answered` is called at once, with `ShardUnavailable`, when the shard can't be asked.
        """
        if self._link is None or not self.ready:
            answered(ShardUnavailable(self.shard, "it is not linked"))
        elif self._link.half_full:
            self.refused_total += 1
            answered(ShardUnavailable(self.shard, "too much waits to be sent to it"))
        else:
            self._answers[call_id] = answered
            self._link.send(message)

    def tell(self, message: messages.Message) -> None:
        """Send a message that is not answered; nothing when the shard is not linked."""
        if self._link is not None and self.ready:
            self._link.send(message)

    def close(self) -> None:
        """End the link when what was sent is with the shard."""
        if self._link is not None:
            self._link.flush_and_close()

    async def run(self) -> None:
        """Keep the link made until cancelled."""
        loop = asyncio.get_running_loop()
        retry_s = RETRY_FIRST_S
        while True:
            self._lost.clear()
            try:
                await loop.create_unix_connection(
                    partial(
                        Link,
                        self,
                        gateway_reader,
                        self._queue_bytes_max,
                        pause_when_full=False,
                        flush_at=FLUSH_AT,
                    ),
                    str(self._path),
                )
            except OSError:
                await asyncio.sleep(retry_s)
                retry_s = min(retry_s * 2, RETRY_MAX_S)
                continue
            await self._watch()
            retry_s = RETRY_FIRST_S
            await asyncio.sleep(retry_s)

    async def _watch(self) -> None:
        """Exchange heartbeats until the link is lost."""
        number = 0
        loop = asyncio.get_running_loop()
        while not self._lost.is_set():
            link = self._link
            if link is not None:
                if loop.time() - self._heard_at > SILENCE_MAX_S:
                    link.cut(f"no sign of life for {SILENCE_MAX_S:.0f} s")
                number += 1
                link.send(Heartbeat(number))
            try:
                async with asyncio.timeout(HEARTBEAT_INTERVAL_S):
                    await self._lost.wait()
            except TimeoutError:
                continue

    # What the link calls.

    def link_made(self, link: Link[ToGateway]) -> None:
        self._link = link
        self._bodies = ReceivedBodies()
        self._heard_at = asyncio.get_running_loop().time()
        link.send(Hello(messages.VERSION, self._gateway_id))

    def messages_received(self, link: Link[ToGateway], received: list[ToGateway]) -> None:
        self._heard_at = asyncio.get_running_loop().time()
        answers = self._answers
        events = 0
        for message in received:
            match message:
                case Reply():
                    answers.pop(message.call_id)(message)
                case Event():
                    events += 1
                    self._user.event_received(self.shard, message)
                case Synced():
                    self._bodies.complete(message)
                    answers.pop(message.call_id)(message)
                case Failure():
                    answers.pop(message.call_id)(
                        BrokerError(message.code, message.message, message.field, message.retryable)
                    )
                case Left():
                    self._user.left(message)
                case StorageState():
                    self.trouble = message.trouble
                case Heartbeat():
                    pass
                case Welcome():
                    self._welcomed(link, message)
                case _:
                    assert_never(message)
        self.events_total += events
        self._user.batch_received()

    def link_lost(self, link: Link[ToGateway], reason: str) -> None:
        if self.ready:
            _log.warning("link_lost", shard=self.shard, reason=reason)
        self._before = (self.received_bytes, self.sent_bytes)
        self.overflows_total += link.overflowed
        self._link = None
        self.ready, self.trouble = False, None
        self._lost.set()
        answers, self._answers = self._answers, {}
        for answered in answers.values():
            answered(ShardUnavailable(self.shard, reason))

    def _welcomed(self, link: Link[ToGateway], welcome: Welcome) -> None:
        expected = (messages.VERSION, self.shard, self._shards)
        if (welcome.version, welcome.shard, welcome.shards) != expected:
            _log.error("shard_mismatched", shard=self.shard, answered=welcome)
            link.cut("it is another shard, or of another release")
            return
        self.ready = True
        self.links_total += 1
        _log.info("shard_linked", shard=self.shard)
        self._user.shard_linked(self.shard)
