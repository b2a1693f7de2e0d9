"""Links over mailboxes, without I/O: whatever is posted to one arrives in order, or is lost.

Each end of a link has a name for this life of it, and frames carry both names and a number. Of two
gateways the one with the smaller id opens; who gets a frame that is not the next one of a link
that it knows says so, and the link is made anew. So a lost frame is a lost link, never a hole.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Collection
from typing import Protocol

import msgspec

from broker import logs
from gateway import peer_protocol as wire
from gateway.remote_workers import PeerLink

OPENING_S_MAX = 3.0
"""Seconds for the answer to an attempt to link, after which there is another one."""
SILENCE_S_MAX = 10.0
"""Seconds without a frame after which the other end counts as dead."""
HALF_FULL_MIN = 2**20
"""Bytes that may wait before calls are not taken."""

_RESET = -1

_log = logs.Log("peers")


class Frame(msgspec.Struct, array_like=True):
    """What is posted.

    source: id of the gateway that posts. life, to_life: names of this life of the link at its end
    and at the other; "" for what is not known yet. number: 0, 1, … of each end; `_RESET` tells that
    `to_life` is over. ack: the last number that came from the other end.
    """

    source: str
    life: str
    to_life: str
    number: int
    ack: int
    messages: list[wire.AnyPeerMessage]


class Linked(Protocol):
    """Who is told of links: see `gateway.peers.Peers`."""

    me: wire.Hello

    def linked(self, link: PeerLink, hello: wire.Hello) -> bool: ...

    def received(self, link: PeerLink, received: list[wire.AnyPeerMessage]) -> None: ...

    def lost(self, link: PeerLink, reason: str) -> None: ...


_encode = msgspec.msgpack.encode
_decoder = msgspec.msgpack.Decoder(Frame)


class Session:
    """One end of a link, from the attempt to make it on."""

    transport = "redis"

    def __init__(self, sessions: Sessions, target: str, to_life: str, now: float) -> None:
        self._sessions = sessions
        self.target = target
        self.name = target.partition("-")[0]
        self.life = secrets.token_hex(8)
        self.to_life = to_life
        self.began_at = self.heard_at = now
        self.is_linked = False
        self.is_over = False
        self.sent = self.received = -1
        self.pending: list[wire.PeerMessage] = []
        self.unacked: deque[tuple[int, int]] = deque()
        self.unacked_bytes = 0

    @property
    def half_full(self) -> bool:
        return self.is_over or self.unacked_bytes > self._sessions.half_full_bytes

    @property
    def queue_bytes(self) -> int:
        return self.unacked_bytes

    def send(self, message: wire.PeerMessage) -> None:
        if not self.is_over:
            self.pending.append(message)
            self._sessions.flush_soon()

    def close(self) -> None:
        self._sessions.lose(self, "it is closed")


class Sessions:
    """All links of one gateway.

    Args:
        post: puts a frame into the mailbox of the gateway with an id.
        soon: has a function called at the end of this turn of the loop.
    """

    def __init__(
        self,
        peers: Linked,
        post: Callable[[str, bytes], None],
        soon: Callable[[Callable[[], None]], object],
        queue_bytes_max: int,
    ) -> None:
        self._peers = peers
        self._me = peers.me.gateway_id
        self._post = post
        self._soon = soon
        self._queue_bytes_max = queue_bytes_max
        self.half_full_bytes = max(queue_bytes_max // 2, HALF_FULL_MIN)
        self._links: dict[str, Session] = {}
        self._is_flushing = False
        self._told_over: set[str] = set()
        self._now = 0.0

    def linked(self, targets: Collection[str]) -> bool:
        """Whether all of `targets` are linked."""
        links = self._links
        return all(target in links and links[target].is_linked for target in targets)

    def tick(self, present: Collection[str], now: float) -> None:
        """Once a second or so: `present` are the ids of all other gateways that are alive."""
        self._now = now
        self._told_over.clear()
        for link in list(self._links.values()):
            if link.target not in present:
                self.lose(link, "it is gone")
            elif now - link.heard_at > SILENCE_S_MAX:
                self.lose(link, f"no sign of life for {SILENCE_S_MAX:.0f} s")
            elif not link.is_linked and now - link.began_at > OPENING_S_MAX:
                self.lose(link, "it did not answer")
            elif link.is_linked:
                link.send(wire.Heartbeat())
        for target in present:
            if self._me < target and target not in self._links:
                self._begin(target, "")

    def received(self, data: bytes, now: float) -> None:
        """A frame was in our mailbox."""
        self._now = now
        try:
            frame = _decoder.decode(data)
        except msgspec.DecodeError as error:
            _log.error("peer_frame_unreadable", reason=error)
            return
        link = self._links.get(frame.source)
        if frame.number == _RESET:
            if link is not None and frame.to_life == link.life:
                self.lose(link, "it does not know the link any more")
        elif not frame.to_life and frame.number == 0:
            if self._me > frame.source:
                if link is not None:
                    self.lose(link, "it links anew")
                link = self._begin(frame.source, frame.life)
                self._take(link, frame)
        elif link is None or frame.to_life != link.life or link.to_life not in ("", frame.life):
            self._tell_over(frame)
        elif frame.number != link.received + 1:
            self.lose(link, "something that it sent was lost")
            self._tell_over(frame)
        else:
            link.to_life = frame.life
            self._take(link, frame)

    def lose(self, link: Session, reason: str) -> None:
        """The link is over; it is made anew with the next tick."""
        if link.is_over:
            return
        link.is_over = True
        link.pending.clear()
        if self._links.get(link.target) is link:
            del self._links[link.target]
        if link.is_linked:
            self._peers.lost(link, reason)

    def lose_all(self, reason: str) -> None:
        """Nothing is known of what was posted."""
        for link in list(self._links.values()):
            self.lose(link, reason)

    def lose_target(self, target: str, reason: str) -> None:
        """There is no such mailbox."""
        if (link := self._links.get(target)) is not None:
            self.lose(link, reason)

    def flush_soon(self) -> None:
        """Post what links have to send when this turn is over."""
        if not self._is_flushing:
            self._is_flushing = True
            self._soon(self._flush)

    def _begin(self, target: str, to_life: str) -> Session:
        link = Session(self, target, to_life, self._now)
        self._links[target] = link
        link.send(self._peers.me)
        return link

    def _take(self, link: Session, frame: Frame) -> None:
        link.received = frame.number
        link.heard_at = self._now
        while link.unacked and link.unacked[0][0] <= frame.ack:
            link.unacked_bytes -= link.unacked.popleft()[1]
        if not link.is_linked:
            hello = frame.messages[0]
            if not isinstance(hello, wire.Hello) or hello.gateway_id != link.target:
                self.lose(link, "it did not say who it is")
                return
            link.is_linked = True
            if not self._peers.linked(link, hello):
                link.is_linked = False
                self.lose(link, "it is of another release")
                return
        self._peers.received(link, frame.messages)

    def _tell_over(self, frame: Frame) -> None:
        """Tell the other end that its life of the link is over, once a tick."""
        if frame.life not in self._told_over:
            self._told_over.add(frame.life)
            over = Frame(self._me, "", frame.life, _RESET, -1, [])
            self._post(frame.source, _encode(over))

    def _flush(self) -> None:
        self._is_flushing = False
        for link in list(self._links.values()):
            if link.pending:
                pending, link.pending = link.pending, []
                link.sent += 1
                fields = (self._me, link.life, link.to_life, link.sent, link.received, pending)
                data = _encode(fields)
                link.unacked.append((link.sent, len(data)))
                link.unacked_bytes += len(data)
                self._post(link.target, data)
                if link.unacked_bytes > self._queue_bytes_max + len(data):
                    self.lose(link, f"it left more than {self._queue_bytes_max} bytes unread")
