"""The other gateways: of this broker, and of brokers that share its Redis. No I/O.

A peer's workers are entered here (`gateway.remote_workers`), ours are told to it. What is sent to
one of them goes by way of its gateway, and so does what it answers. A link that is lost takes with
it whatever is under way on it: calls fail, or go to another worker, as when the worker had left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Protocol, assert_never

import msgspec
from msgspec import Raw, structs

from broker import logs, messages
from broker.errors import BrokerError
from broker.names import Group
from gateway import peer_protocol as wire
from gateway.custom_streams import StreamCall
from gateway.engine_functions import WorkerInfo
from gateway.functions import Registration
from gateway.invocations import Executor, Result
from gateway.remote_workers import Mirror, PeerLink, Registry, RemoteWorker, unavailable
from gateway.shard_links import Answer, Answered
from gateway.triggers import Home as TriggerHome
from gateway.triggers import Trigger, TriggerType
from gateway.triggers import Worker as LocalWorker
from gateway.worker_protocol import (
    RegisterFunction,
    UnregisterFunction,
    UnregisterTrigger,
    UnregisterTriggerType,
    error_text,
)

TRANSPORTS = ("socket", "redis")
"""What links to peers are made of: labels of metrics."""
GUARDS_S = 60.0
"""Seconds that joins are refused which a worker of a gateway that does not answer had to allow."""

_encode = msgspec.json.encode

_log = logs.Log("peers")

_Said = RegisterFunction | UnregisterFunction | UnregisterTrigger | UnregisterTriggerType

_Asked = (
    wire.Forget | wire.Reattach | wire.Returned | wire.Operate | wire.Read | wire.Release | wire.Ask
)


class Home(Protocol):
    """What peers ask this gateway for."""

    def local_worker(self, worker_id: str) -> LocalWorker | None:
        """A worker that is connected here."""

    def reattach(self, worker_id: str, token: str) -> None:
        """Part with a worker that is connected elsewhere now, if the token is its."""

    def client_returned(self, head: bytes) -> None:
        """A client has joined again."""

    def operate(self, group: Group, call: StreamCall, answered: Answered) -> None:
        """Make a call on a group that a worker stores."""

    def read(
        self, group: Group, item_id: str | None, answered: Answered, released: asyncio.Event
    ) -> None:
        """Read such a group, and hold it."""

    def ask(self, function_id: str, data: bytes, answered: Answered) -> None:
        """Call a function that tells of this gateway's clients."""


class Peer:
    """Another gateway that is linked."""

    def __init__(self, link: PeerLink, hello: wire.Hello, own_broker: bool) -> None:
        self.link = link
        self.hello = hello
        self.own_broker = own_broker
        self.announced = False
        self.stopping = False
        self.clients_gone = False
        self.calls: dict[int, Answered] = {}
        self.held: dict[int, asyncio.Event] = {}
        self._call_id = 0

    @property
    def place(self) -> tuple[str, int]:
        """The same when the process is started again."""
        return _place(self.hello)

    def operate(self, call: StreamCall, answered: Answered) -> None:
        """Have a call made on a group that one of its workers stores."""
        self._call(lambda call_id: wire.Operate(call_id, wire.call_text(call)), answered)

    def read(self, group: Group, item_id: str | None, answered: Answered) -> int:
        """Have such a group, or an item, read and held until `release` with the id returned."""
        return self._call(lambda call_id: wire.Read(call_id, *group, item_id), answered)

    def release(self, call_id: int) -> None:
        """Let the group go on."""
        self.link.send(wire.Release(call_id))

    def ask(self, function_id: str, data: bytes, answered: Answered) -> None:
        """Call a function that tells of its clients."""
        self._call(lambda call_id: wire.Ask(call_id, function_id, data), answered)

    def _call(self, message: Callable[[int], wire.PeerMessage], answered: Answered) -> int:
        self._call_id += 1
        if self.link.half_full:
            answered(unavailable(self.link.name, "too much waits to be sent to it"))
        else:
            self.calls[self._call_id] = answered
            self.link.send(message(self._call_id))
        return self._call_id

    def lost(self, reason: str) -> None:
        """Nothing under way is answered any more, and nothing it holds is released."""
        calls, self.calls = self.calls, {}
        for answered in calls.values():
            answered(unavailable(self.link.name, reason))
        for released in self.held.values():
            released.set()


class Peers:
    """All peers, and what is told to them."""

    def __init__(self, me: wire.Hello) -> None:
        self.me = me
        self._registry: Registry | None = None
        self._home: Home | None = None
        self._peers: dict[PeerLink, Peer] = {}
        self._mirrors: dict[Peer, Mirror] = {}
        self._forwarded: dict[Executor, dict[str, Peer]] = {}
        self.is_blind: Callable[[], bool] = lambda: False
        """Whether nothing can be known of gateways of other brokers just now."""
        self._guards: dict[tuple[str, int], list[RemoteWorker]] = {}
        self._calls_sent = 0
        self._calls_refused = 0
        self.calls_received_total = 0
        self.links_made_total = 0

    def serve(self, registry: Registry, home: Home) -> None:
        """What peers tell goes into `registry`, what they ask is asked of `home`."""
        self._registry, self._home = registry, home
        registry.invocations.on_foreign_answer = self._answered

    # What others want to know.

    def __len__(self) -> int:
        return len(self._peers)

    def siblings(self) -> list[Peer]:
        """The other gateways of this broker that are linked, by their numbers."""
        found = [peer for peer in self._peers.values() if peer.own_broker]
        return sorted(found, key=lambda peer: peer.hello.index)

    @property
    def all_announced(self) -> bool:
        """Whether all that are linked have told what there is."""
        return all(peer.announced for peer in self._peers.values())

    def count(self, transport: str) -> int:
        """How many are linked by `transport`."""
        return sum(link.transport == transport for link in self._peers)

    def queue_bytes(self, transport: str) -> int:
        """Bytes that those have not taken yet."""
        return sum(link.queue_bytes for link in self._peers if link.transport == transport)

    @property
    def calls_sent_total(self) -> int:
        """Calls of functions of peers' workers."""
        return self._calls_sent + sum(m.calls_total for m in self._mirrors.values())

    @property
    def calls_refused_total(self) -> int:
        """Such calls that were not sent, as too much waits."""
        return self._calls_refused + sum(m.refused_total for m in self._mirrors.values())

    @property
    def calls_pending(self) -> int:
        """Calls of peers that our workers have not answered."""
        return sum(map(len, self._forwarded.values()))

    @property
    def clients_told(self) -> bool:
        """Whether all stopping peers of this broker have told the leaves of their clients."""
        return all(peer.clients_gone or not peer.stopping for peer in self.siblings())

    # What our workers and clients do.

    def worker_is(self, info: WorkerInfo, event: str) -> None:
        """A worker connected, or says something else of itself."""
        if self._peers:
            self._tell_all(_worker_is(info, event))

    def worker_gone(self, worker: Executor) -> None:
        """A worker left."""
        self._forwarded.pop(worker, None)
        if self._peers:
            self._tell_all(wire.WorkerGone(worker.worker_id))

    def registered(self, worker: Executor, message: _Said, at_ms: int = 0) -> None:
        """A worker registered a function, or took something back."""
        if self._peers:
            self._tell_all(wire.Registered(worker.worker_id, at_ms, _encode(message)))

    def trigger_registered(self, trigger: Trigger) -> None:
        """A worker registered a trigger."""
        if self._peers:
            self._tell_all(_trigger(trigger))

    def type_registered(self, kind: TriggerType) -> None:
        """A worker provides a trigger type."""
        if self._peers:
            self._tell_all(_type(kind))

    def reattach(self, worker_id: str, token: str) -> None:
        """A worker connected here, and says that it had another connection before."""
        for peer, mirror in self._mirrors.items():
            if worker_id in mirror.workers:
                peer.link.send(wire.Reattach(worker_id, token))

    def client_returned(self, head: bytes) -> None:
        """A client joined; wherever it was before, it has not left."""
        self._tell_all(wire.Returned(head))

    def stopping(self, *, clients_gone: bool) -> None:
        """This gateway stops; its clients are gone or not yet."""
        self._tell_all(wire.Stopping(clients_gone))

    def ask_siblings(
        self, function_id: str, data: bytes, answered: Callable[[list[Answer]], None]
    ) -> None:
        """Ask the other gateways of this broker; the answers are in order of their numbers."""
        siblings = self.siblings()
        answers: list[Answer | None] = [None] * len(siblings)
        waiting = len(siblings)

        def one_answered(place: int, answer: Answer) -> None:
            nonlocal waiting
            answers[place] = answer
            waiting -= 1
            if not waiting:
                answered([a for a in answers if a is not None])

        if not siblings:
            answered([])
        for place, peer in enumerate(siblings):
            peer.ask(function_id, data, partial(one_answered, place))

    def _tell_all(self, message: wire.PeerMessage) -> None:
        for link in list(self._peers):
            link.send(message)

    # What links do.

    def linked(self, link: PeerLink, hello: wire.Hello) -> bool:
        """The other end said who it is. Returns whether it is linked now; else the link is of no
        use. It is told what there is."""
        registry = self._registry
        assert registry is not None, "serve comes first"
        if hello.version != self.me.version or hello.gateway_id == self.me.gateway_id:
            _log.error("peer_mismatched", peer=link.name, version=hello.version)
            return False
        for other in [p for p in self._peers.values() if p.place == _place(hello)]:
            self.lost(other.link, "it was started again")
            other.link.close()
        peer = Peer(link, hello, hello.broker_id == self.me.broker_id)
        self._peers[link] = peer
        self._mirrors[peer] = Mirror(link, peer, peer.own_broker, registry)
        self.links_made_total += 1
        _log.info("peer_linked", peer=link.name, by=link.transport)
        for message in self._all():
            link.send(message)
        link.send(wire.Announced())
        return True

    def lost(self, link: PeerLink, reason: str) -> None:
        """The link ended, or the other end does not answer."""
        peer = self._peers.pop(link, None)
        if peer is None:
            return
        _log.warning("peer_lost", peer=link.name, reason=reason)
        for executor, calls in list(self._forwarded.items()):
            left = {i: p for i, p in calls.items() if p is not peer}
            if left:
                self._forwarded[executor] = left
            else:
                del self._forwarded[executor]
        mirror = self._mirrors.pop(peer)
        guards = mirror.lost()
        self._calls_sent += mirror.calls_total
        self._calls_refused += mirror.refused_total
        if guards:
            kept = self._guards.setdefault(peer.place, [])
            kept += guards
            loop = asyncio.get_running_loop()
            loop.call_later(GUARDS_S, self._guards_due, peer.place, guards)
        peer.lost(reason)

    def received(self, link: PeerLink, received: Iterable[wire.AnyPeerMessage]) -> None:
        """Messages of a linked peer came."""
        for message in received:
            peer = self._peers.get(link)
            if peer is None:
                return  # one of them ended it
            self._receive(peer, message)

    def _receive(self, peer: Peer, message: wire.AnyPeerMessage) -> None:
        registry, mirror = self._registry, self._mirrors[peer]
        assert registry is not None, "serve comes first"
        match message:
            case wire.Deliver():
                self._deliver(peer, message)
            case wire.Answer():
                registry.invocations.answered_elsewhere(
                    message.invocation_id, Result(message.result, message.error)
                )
            case wire.Heartbeat() | wire.Hello():
                pass
            case wire.WorkerIs():
                mirror.worker_is(message)
            case wire.WorkerGone():
                mirror.worker_gone(message.worker_id)
            case wire.Registered():
                mirror.registered(message)
            case wire.Announced():
                peer.announced = True
                self._drop_guards(peer.place, list(self._guards.get(peer.place, ())))
            case wire.Reply():
                if (waiting := peer.calls.pop(message.call_id, None)) is not None:
                    waiting(messages.Reply(0, message.result))
            case wire.Failure():
                if (waiting := peer.calls.pop(message.call_id, None)) is not None:
                    waiting(
                        BrokerError(message.code, message.message, message.field, message.retryable)
                    )
            case wire.Stopping():
                peer.stopping, peer.clients_gone = True, message.clients_gone
            case _:
                self._asked(peer, message)

    def _asked(self, peer: Peer, message: _Asked) -> None:
        home = self._home
        assert home is not None, "serve comes first"
        match message:
            case wire.Forget():
                worker = home.local_worker(message.worker_id)
                if worker is not None:
                    self._forget(worker, message.invocation_id)
            case wire.Reattach():
                home.reattach(message.worker_id, message.token)
            case wire.Returned():
                home.client_returned(message.head)
            case wire.Operate():
                call = wire.call_of(message.call)
                answered = partial(self._reply, peer, message.call_id)
                home.operate(Group(call.stream, call.group_id), call, answered)
            case wire.Read():
                group = Group(message.stream, message.group_id)
                released = peer.held[message.call_id] = asyncio.Event()
                answered = partial(self._reply, peer, message.call_id)
                home.read(group, message.item_id, answered, released)
            case wire.Release():
                if (held := peer.held.pop(message.call_id, None)) is not None:
                    held.set()
            case wire.Ask():
                answered = partial(self._reply, peer, message.call_id)
                home.ask(message.function_id, message.data, answered)
            case _:
                assert_never(message)

    def _reply(self, peer: Peer, call_id: int, answer: Answer) -> None:
        if isinstance(answer, BrokerError):
            peer.link.send(
                wire.Failure(call_id, answer.code, answer.message, answer.field, answer.retryable)
            )
        else:
            assert isinstance(answer, messages.Reply), "what these calls are answered with"
            peer.link.send(wire.Reply(call_id, answer.result))

    # Calls of peers to our workers.

    def _deliver(self, peer: Peer, message: wire.Deliver) -> None:
        assert self._home is not None, "serve comes first"
        worker = self._home.local_worker(message.worker_id)
        if worker is None:
            return  # the peer hears that it left
        if not message.is_call:
            worker.send(message.payload)
            return
        invocation_id = message.invocation_id
        self.calls_received_total += 1
        if worker.send_call(message.payload, invocation_id):
            if invocation_id is not None:
                self._forwarded.setdefault(worker, {})[invocation_id] = peer
        elif invocation_id is not None:
            error = BrokerError(
                "worker_overloaded", "the worker does not take its calls", retryable=True
            )
            peer.link.send(wire.Answer(invocation_id, None, error_text(error)))

    def _answered(self, worker: Executor, invocation_id: str, result: Result) -> None:
        peer = self._forget(worker, invocation_id)
        if peer is not None:
            peer.link.send(wire.Answer(invocation_id, result.result, result.error))

    def _forget(self, worker: Executor, invocation_id: str) -> Peer | None:
        calls = self._forwarded.get(worker)
        if calls is None:
            return None
        peer = calls.pop(invocation_id, None)
        if not calls:
            del self._forwarded[worker]
        return peer

    # Guards.

    def _guards_due(self, place: tuple[str, int], guards: Sequence[RemoteWorker]) -> None:
        if place[0] != self.me.broker_id and self.is_blind():
            loop = asyncio.get_running_loop()
            loop.call_later(GUARDS_S, self._guards_due, place, guards)
        else:
            self._drop_guards(place, guards)

    def _drop_guards(self, place: tuple[str, int], guards: Sequence[RemoteWorker]) -> None:
        """What these workers had to allow is allowed, or asked of others, from now on."""
        kept = self._guards.get(place)
        if kept is None or self._registry is None:
            return
        for worker in guards:
            if worker in kept:
                kept.remove(worker)
                self._registry.triggers.remove_worker(worker)
        if not kept:
            del self._guards[place]

    # What is told to who is linked.

    def _all(self) -> Iterable[wire.PeerMessage]:
        registry = self._registry
        assert registry is not None, "serve comes first"
        for info in list(registry.infos.values()):
            if not isinstance(info.worker, RemoteWorker):
                yield _worker_is(info, "worker_connected")
        for _, registration in registry.functions.all():
            if not registration.remote:
                yield _function(registration)
        for kind in registry.triggers.types().values():
            if kind.here:
                yield _type(kind)
        for trigger in registry.triggers.all():
            if trigger.home is TriggerHome.HERE:
                yield _trigger(trigger)


def _place(hello: wire.Hello) -> tuple[str, int]:
    return hello.broker_id, hello.index


def _worker_is(info: WorkerInfo, event: str) -> wire.WorkerIs:
    return wire.WorkerIs(
        info.worker_id,
        info.namespace,
        info.connected_at_ms,
        info.ip_address,
        _encode(info.fields),
        event,
    )


def _function(registration: Registration[Executor]) -> wire.Registered:
    text = _encode(registration.definition)
    return wire.Registered(registration.worker.worker_id, registration.at_ms, text)


def _trigger(trigger: Trigger) -> wire.Registered:
    message = structs.replace(trigger.message, config=Raw(trigger.config))
    return wire.Registered(trigger.worker.worker_id, trigger.at_ms, _encode(message))


def _type(kind: TriggerType) -> wire.Registered:
    return wire.Registered(kind.provider.worker_id, kind.at_ms, _encode(kind.definition))
