"""Workers of other gateways, entered here so that everything finds them as it finds our own.

What they registered is listed, called and asked like that of our own workers, which come first.
What must be done once in a deployment is left to the gateway that a worker is connected to: its
`stream` triggers, and registrations with it as a provider.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Protocol

import msgspec

from broker import logs
from broker.errors import BrokerError, InvalidRequest
from gateway import peer_protocol as wire
from gateway import worker_protocol
from gateway.custom_streams import UNAVAILABLE, StreamOwner
from gateway.engine_functions import Availability, WorkerInfo
from gateway.functions import Functions
from gateway.invocations import Executor, Invocations
from gateway.triggers import Triggers

_fields = msgspec.json.Decoder(dict[str, object])

_log = logs.Log("peers")


class PeerLink(Protocol):
    """A link to another gateway, made of whatever."""

    name: str
    """Of the other end, for logs."""
    transport: str
    """What it is made of, for metrics."""

    @property
    def half_full(self) -> bool:
        """Whether so much waits to be sent that calls are not taken."""

    @property
    def queue_bytes(self) -> int:
        """Bytes that the other end has not taken yet."""

    def send(self, message: wire.PeerMessage) -> None:
        """Send a message, in order; nothing when the link is lost."""

    def close(self) -> None:
        """End the link."""


class Registry(msgspec.Struct):
    """Where workers and what they register are entered."""

    functions: Functions[Executor]
    invocations: Invocations
    triggers: Triggers
    infos: MutableMapping[str, WorkerInfo]
    availability: Availability


class RemoteWorker:
    """A worker that is connected to another gateway."""

    def __init__(self, link: PeerLink, peer: StreamOwner, worker_id: str, own_broker: bool) -> None:
        self._link = link
        self.peer = peer
        self.worker_id = worker_id
        self.own_broker = own_broker
        self.namespace = "default"
        self.calls_total = 0
        self.refused_total = 0

    def send_call(self, payload: bytes, invocation_id: str | None) -> bool:
        """Send a call; False when too much waits for the worker's gateway already."""
        if self._link.half_full:
            self.refused_total += 1
            return False
        self.calls_total += 1
        self._link.send(wire.Deliver(self.worker_id, payload, invocation_id))
        return True

    def send(self, payload: bytes) -> None:
        """Send what must not be lost."""
        self._link.send(wire.Deliver(self.worker_id, payload, None, is_call=False))

    def forget(self, invocation_id: str) -> None:
        """Nobody waits for the answer any more."""
        self._link.send(wire.Forget(self.worker_id, invocation_id))


class Mirror:
    """The workers of one other gateway."""

    def __init__(
        self, link: PeerLink, peer: StreamOwner, own_broker: bool, registry: Registry
    ) -> None:
        self._link = link
        self._peer = peer
        self._own_broker = own_broker
        self._registry = registry
        self.workers: dict[str, RemoteWorker] = {}
        self._calls_total = 0
        self._refused_total = 0

    @property
    def calls_total(self) -> int:
        """Calls that were sent to these workers."""
        return self._calls_total + sum(w.calls_total for w in self.workers.values())

    @property
    def refused_total(self) -> int:
        """Calls that were not, as too much waits."""
        return self._refused_total + sum(w.refused_total for w in self.workers.values())

    def worker_is(self, message: wire.WorkerIs) -> None:
        """A worker came, or says something else of itself."""
        registry = self._registry
        worker = self.workers.get(message.worker_id)
        if worker is None:
            worker = RemoteWorker(self._link, self._peer, message.worker_id, self._own_broker)
            worker.namespace = message.namespace
            self.workers[message.worker_id] = worker
            info = WorkerInfo(
                worker, message.worker_id, message.connected_at_ms, f"{message.ip_address}:"
            )
            registry.infos[message.worker_id] = info
        elif worker.namespace != message.namespace:
            registry.functions.move_worker(worker, worker.namespace, message.namespace)
            worker.namespace = message.namespace
            registry.triggers.functions_changed()
        registry.infos[message.worker_id].fields = _fields.decode(message.fields)
        registry.availability.worker(message.event, message.worker_id)

    def worker_gone(self, worker_id: str) -> None:
        """A worker left, with all that it registered."""
        if (worker := self.workers.pop(worker_id, None)) is not None:
            self._registry.functions.remove_worker(worker)
            self._remove(worker)
            self._registry.triggers.remove_worker(worker)

    def registered(self, message: wire.Registered) -> None:
        """A worker registered something, or took it back."""
        worker = self.workers.get(message.worker_id)
        if worker is None:
            return
        registry = self._registry
        try:
            said = worker_protocol.decode(message.text)
        except InvalidRequest as error:
            _log.error("registration_unreadable", peer=self._link.name, reason=error.message)
            return
        match said:
            case worker_protocol.RegisterFunction():
                registry.functions.register(
                    worker.namespace, worker, said, at_ms=message.at_ms, remote=True
                )
                registry.availability.functions_changed()
                registry.triggers.functions_changed()
            case worker_protocol.UnregisterFunction():
                registry.functions.unregister(worker.namespace, worker, said.id)
                registry.availability.functions_changed()
            case worker_protocol.RegisterTrigger():
                registry.triggers.mirror(
                    worker, said, at_ms=message.at_ms, own_broker=self._own_broker
                )
            case worker_protocol.UnregisterTrigger():
                registry.triggers.unregister(worker, said.id)
            case worker_protocol.RegisterTriggerType():
                registry.triggers.register_type(worker, said, message.at_ms)
            case worker_protocol.UnregisterTriggerType():
                registry.triggers.unregister_type(worker, said.id)
            case _:
                _log.error("registration_odd", peer=self._link.name, said=type(said).__name__)

    def lost(self) -> list[RemoteWorker]:
        """The gateway does not answer any more. Returns the workers whose join triggers stay: as
        nobody can be asked, they refuse."""
        workers = list(self.workers.values())
        self.workers.clear()
        for worker in workers:  # all of them first: calls go to workers that are left
            self._registry.functions.remove_worker(worker)
        for worker in workers:
            self._remove(worker)
        return [w for w in workers if self._registry.triggers.remove_worker(w, keep_guards=True)]

    def _remove(self, worker: RemoteWorker) -> None:
        registry = self._registry
        self._calls_total += worker.calls_total
        self._refused_total += worker.refused_total
        del registry.infos[worker.worker_id]
        registry.invocations.remove_worker(worker)
        registry.availability.functions_changed()
        registry.availability.worker("worker_disconnected", worker.worker_id)


def owner_of(worker: Executor) -> StreamOwner | None:
    """The gateway that has the worker; None for this one."""
    return worker.peer if isinstance(worker, RemoteWorker) else None


def unavailable(name: str, reason: str) -> BrokerError:
    """A gateway can't be asked; nothing is known of what it did."""
    return BrokerError(
        UNAVAILABLE, f"gateway {name} is unavailable ({reason}); retry later", retryable=True
    )
