"""Links over mailboxes that lose things: what is sent arrives in order, or the link ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import peer_protocol as wire
from gateway.peer_sessions import OPENING_S_MAX, SILENCE_S_MAX, Frame, Sessions
from gateway.remote_workers import PeerLink


class End:
    """A gateway: its sessions, its mailbox, and what it was told."""

    def __init__(self, gateway_id: str, queue_bytes_max: int = 2**26) -> None:
        self.me = wire.Hello(wire.VERSION, gateway_id, f"broker of {gateway_id}", 0)
        self.mail: deque[bytes] = deque()
        self.others: dict[str, End] = {}
        self.links: list[PeerLink] = []
        self.lives: list[list[str]] = []  # of each life of a link: what came
        self.reasons: list[str] = []
        self.refuses = False
        self.soon: list[Callable[[], None]] = []
        self.sessions = Sessions(self, self.post, self.soon.append, queue_bytes_max)

    def post(self, target: str, data: bytes) -> None:
        self.others[target].mail.append(data)

    def linked(self, link: PeerLink, hello: wire.Hello) -> bool:
        if self.refuses:
            return False
        self.links.append(link)
        self.lives.append([])
        return True

    def received(self, link: PeerLink, received: list[wire.AnyPeerMessage]) -> None:
        assert link is self.links[-1]
        self.lives[-1] += [m.worker_id for m in received if isinstance(m, wire.WorkerGone)]

    def lost(self, link: PeerLink, reason: str) -> None:
        assert link is self.links[-1]
        self.reasons.append(reason)

    @property
    def is_linked(self) -> bool:
        return len(self.reasons) < len(self.links)

    def say(self, word: str) -> None:
        self.links[-1].send(wire.WorkerGone(word))

    def turn(self) -> None:
        """What the loop does: post what was sent."""
        soon, self.soon[:] = list(self.soon), []
        for call in soon:
            call()

    def read(self, now: float, count: int = 1000) -> None:
        for _ in range(min(count, len(self.mail))):
            self.sessions.received(self.mail.popleft(), now)


def two(queue_bytes_max: int = 2**26) -> tuple[End, End]:
    ends = End("a", queue_bytes_max), End("b", queue_bytes_max)
    for end, other in (ends, ends[::-1]):
        end.others[other.me.gateway_id] = other
    return ends


def exchange(ends: tuple[End, End], now: float) -> None:
    """Until nothing is under way."""
    for end in ends:
        end.turn()
    while any(end.mail for end in ends):
        for end in ends:
            end.read(now)
            end.turn()


def tick(ends: tuple[End, End], now: float) -> None:
    for end in ends:
        end.sessions.tick(set(end.others), now)
    exchange(ends, now)


def test_linked_and_in_order() -> None:
    ends = a, b = two()
    tick(ends, 0)
    assert a.is_linked
    assert b.is_linked
    assert a.sessions.linked(["b"])
    for n in range(5):
        a.say(str(n))
        a.turn()
    b.say("x")
    exchange(ends, 1)
    assert (a.lives, b.lives) == ([["x"]], [["0", "1", "2", "3", "4"]])
    a.sessions.tick({"b"}, 1)
    exchange(ends, 1)
    b.sessions.tick({"a"}, 1)
    exchange(ends, 1)
    assert a.links[0].queue_bytes == 0


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_what_is_lost_ends_the_link(lost: int) -> None:
    """Both ends notice, and what comes after the hole is not taken."""
    ends = a, b = two()
    tick(ends, 0)
    for n in range(3):
        a.say(str(n))
        a.turn()
    del b.mail[lost]
    exchange(ends, 0)
    tick(ends, 1)  # the last one is missed by what comes after it
    tick(ends, 2)
    assert b.lives[0] == ["0", "1", "2"][:lost]
    assert len(a.lives) == len(b.lives) == 2
    assert a.is_linked
    assert b.is_linked


def test_one_end_is_started_again() -> None:
    for which in (0, 1):
        ends = two()
        tick(ends, 0)
        fresh = End(ends[which].me.gateway_id)
        other = ends[1 - which]
        fresh.others[other.me.gateway_id] = other
        other.others[fresh.me.gateway_id] = fresh
        pair = (fresh, other) if which == 0 else (other, fresh)
        for now in range(1, 4):
            tick(pair, now)
        assert fresh.is_linked
        assert other.is_linked
        assert len(other.lives) == 2


def test_silence_and_absence() -> None:
    ends = a, b = two()
    tick(ends, 0)
    a.sessions.tick({"b"}, SILENCE_S_MAX + 1)
    assert a.reasons == ["no sign of life for 10 s"]
    b.sessions.tick(set(), 1)
    assert b.reasons == ["it is gone"]
    b.mail.clear()
    a.soon.clear()


def test_an_attempt_without_an_answer_is_made_again() -> None:
    ends = a, b = two()
    a.sessions.tick({"b"}, 0)
    a.turn()
    b.mail.clear()
    a.sessions.tick({"b"}, 1)
    a.turn()
    assert not b.mail
    a.sessions.tick({"b"}, OPENING_S_MAX + 1)
    exchange(ends, OPENING_S_MAX + 1)
    assert a.is_linked
    assert b.is_linked


def test_too_much_unread() -> None:
    a, b = two(2**21)
    tick((a, b), 0)
    for _ in range(8):
        a.links[0].send(wire.Deliver("w", bytes(2**18), None))
        a.turn()
    assert a.links[0].half_full
    assert a.is_linked
    a.links[0].send(wire.Deliver("w", bytes(2**19), None))
    a.turn()
    a.links[0].send(wire.Deliver("w", bytes(2**18), None))
    a.turn()
    assert a.reasons == ["it left more than 2097152 bytes unread"]


def test_another_release_and_rubbish() -> None:
    ends = a, b = two()
    b.refuses = True
    tick(ends, 0)
    assert not b.links
    a.mail.append(b"\xff")
    a.mail.append(b"")
    exchange(ends, 0)
    b.refuses = False
    tick(ends, 10)
    tick(ends, 11)
    assert b.is_linked


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("say"), st.integers(0, 1)),
            st.tuples(st.just("turn"), st.integers(0, 1)),
            st.tuples(st.just("read"), st.integers(0, 1)),
            st.tuples(st.just("lose"), st.integers(0, 1)),
            st.tuples(st.just("tick"), st.integers(0, 1)),
        ),
        max_size=80,
    )
)
def test_never_a_hole(steps: list[tuple[str, int]]) -> None:
    """Whatever is lost, each life of a link has a beginning of what was said in it; and when
    nothing is lost any more the two are linked."""
    ends = two()
    now, word = 0.0, 0
    said: list[list[list[str]]] = [[], []]
    for step, which in steps:
        end = ends[which]
        now += 0.5
        match step:
            case "say" if end.is_linked:
                word += 1
                said[which] += [[] for _ in range(len(end.lives) - len(said[which]))]
                said[which][-1].append(str(word))
                end.say(str(word))
            case "turn":
                end.turn()
            case "read":
                end.read(now, 1)
            case "lose" if end.mail:
                end.mail.popleft()
            case "tick":
                end.sessions.tick(set(end.others), now)
    for _ in range(6):
        now += 5
        tick(ends, now)
    for end, other in ((0, 1), (1, 0)):
        assert ends[end].is_linked
        for life in ends[end].lives:
            if life:
                assert any(life == words[: len(life)] for words in said[other]), (life, said)


def test_frames_can_be_read_by_both() -> None:
    """The form on the wire is part of the protocol between releases."""
    a, b = two()
    a.sessions.tick({"b"}, 0)
    a.turn()
    (data,) = b.mail
    frame = msgspec.msgpack.decode(data, type=Frame)
    assert (frame.source, frame.to_life, frame.number, frame.ack) == ("a", "", 0, -1)
    assert frame.messages == [a.me]
