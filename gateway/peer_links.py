"""Links between the gateways of one broker: Unix sockets in its run_dir.

Each gateway listens; of two the one with the higher number connects, again and again until it is
linked.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from broker import logs, service
from broker.errors import ConfigError
from broker.link import Link
from gateway import peer_protocol as wire
from gateway.peers import Peers

HEARTBEAT_INTERVAL_S = 1.0
SILENCE_MAX_S = 10.0
"""A gateway that gives no sign of life for so long counts as dead."""
RETRY_FIRST_S, RETRY_MAX_S = 0.02, 1.0

_log = logs.Log("peers")


def broker_id(run_dir: Path) -> str:
    """A name of the broker with this run_dir, which its gateways share; made by the first.

    Raises:
        ConfigError: it can't be kept.
    """
    path = run_dir / "broker.id"
    fresh = run_dir / f"broker.id.{os.getpid()}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        fresh.write_text(str(uuid.uuid4()))
        try:
            os.link(fresh, path)  # whole, or not at all
        except FileExistsError:
            pass
        finally:
            fresh.unlink()
        return path.read_text()
    except OSError as error:
        raise ConfigError("broker.run_dir", f"{path} can't be made: {error.strerror}") from None


class PeerLinks:
    """The links to the other gateways of this broker.

    Args:
        sockets: where each listens, by their numbers; this one is number `index`.
    """

    def __init__(
        self, sockets: Sequence[Path], index: int, queue_bytes_max: int, peers: Peers
    ) -> None:
        self._sockets = sockets
        self._index = index
        self._queue_bytes_max = queue_bytes_max
        self._peers = peers
        self._links: set[PeerSocket] = set()
        self._server: asyncio.Server | None = None

    @property
    def complete(self) -> bool:
        """Whether all are linked and have told what there is."""
        linked = len(self._peers.siblings()) == len(self._sockets) - 1
        return linked and self._peers.all_announced

    async def start(self) -> None:
        """Take connections of the gateways with higher numbers, if there may be some.

        Raises:
            ConfigError: the socket can't be had.
        """
        if len(self._sockets) > 1:
            listener = service.unix_socket(self._sockets[self._index], "broker.run_dir")
            loop = asyncio.get_running_loop()
            self._server = await loop.create_unix_server(self._new, sock=listener)

    async def run(self) -> None:
        """Keep the links made, and watch them, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch())
            for number in range(self._index):
                tasks.create_task(self._keep(self._sockets[number]))

    def close(self) -> None:
        """End all links when what was sent has arrived."""
        if self._server is not None:
            self._server.close()
        for link in list(self._links):
            link.close()

    def _new(self) -> Link[wire.AnyPeerMessage]:
        return PeerSocket(self._peers, self._links).protocol(self._queue_bytes_max)

    async def _keep(self, path: Path) -> None:
        loop = asyncio.get_running_loop()
        retry_s = RETRY_FIRST_S
        while True:
            link = PeerSocket(self._peers, self._links)
            try:
                await loop.create_unix_connection(
                    partial(link.protocol, self._queue_bytes_max), str(path)
                )
            except OSError:
                pass  # it is not there yet
            else:
                await link.ended.wait()
                if link.was_linked:
                    retry_s = RETRY_FIRST_S
            await asyncio.sleep(retry_s)
            retry_s = min(retry_s * 2, RETRY_MAX_S)

    async def _watch(self) -> None:
        """Give signs of life, and cut links to whoever gives none."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(HEARTBEAT_INTERVAL_S)
            now = loop.time()
            for link in list(self._links):
                link.look_for_life(now)


class PeerSocket:
    """One link: introduces both ends, then hands on what comes."""

    transport = "socket"

    def __init__(self, peers: Peers, links: set[PeerSocket]) -> None:
        self._peers = peers
        self._links = links
        self._link: Link[wire.AnyPeerMessage] | None = None
        self._linked = False
        self._heard_at = 0.0
        self.name = "?"
        self.was_linked = False
        self.ended = asyncio.Event()

    def protocol(self, queue_bytes_max: int) -> Link[wire.AnyPeerMessage]:
        """What the socket's transport is given."""
        return Link(self, wire.reader, queue_bytes_max, pause_when_full=False)

    @property
    def half_full(self) -> bool:
        return self._link is None or self._link.half_full

    @property
    def queue_bytes(self) -> int:
        return self._link.queue_bytes if self._link is not None else 0

    def send(self, message: wire.PeerMessage) -> None:
        if self._link is not None:
            self._link.send(message)

    def close(self) -> None:
        """End the link when what was sent has arrived."""
        if self._link is not None:
            self._link.flush_and_close()

    def look_for_life(self, now: float) -> None:
        """Cut the link when the other end was silent for long, and give a sign of life."""
        if self._link is None:
            return
        if now - self._heard_at > SILENCE_MAX_S:
            self._link.cut(f"no sign of life for {SILENCE_MAX_S:.0f} s")
        else:
            self._link.send(wire.Heartbeat())

    # What the link calls.

    def link_made(self, link: Link[wire.AnyPeerMessage]) -> None:
        self._link = link
        self._links.add(self)
        self._heard_at = asyncio.get_running_loop().time()
        link.send(self._peers.me)

    def messages_received(
        self, link: Link[wire.AnyPeerMessage], received: list[wire.AnyPeerMessage]
    ) -> None:
        self._heard_at = asyncio.get_running_loop().time()
        if not self._linked:
            hello = received[0]
            if not isinstance(hello, wire.Hello):
                link.cut("it did not say who it is")
                return
            self.name = str(hello.index)
            self._linked = self.was_linked = self._peers.linked(self, hello)
            if not self._linked:
                link.cut("it is of another release")
                return
        self._peers.received(self, received)

    def link_lost(self, link: Link[wire.AnyPeerMessage], reason: str) -> None:
        self._link = None
        self._links.discard(self)
        self._linked = False
        self._peers.lost(self, reason)
        self.ended.set()
