"""Which worker serves which function, and who is next when it leaves. No I/O."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from gateway.worker_protocol import RegisterFunction

W = TypeVar("W")

STREAM_FUNCTIONS = {
    "stream::delete": "Delete a value from a stream",
    "stream::get": "Get a value from a stream",
    "stream::list": "List all items in a stream group",
    "stream::list_all": "List all available stream with metadata",
    "stream::list_groups": "List all groups in a stream",
    "stream::send": "Send a custom event to stream subscribers",
    "stream::set": "Set a value in a stream",
    "stream::update": "Atomically update a stream value with multiple operations",
}
ENGINE_FUNCTIONS = {
    "engine::functions::info": "Tell all about functions",
    "engine::functions::list": "List the registered functions",
    "engine::registered-triggers::info": "Tell all about a registered trigger",
    "engine::registered-triggers::list": "List the registered triggers",
    "engine::triggers::info": "Tell all about a trigger type",
    "engine::triggers::list": "List the trigger types",
    "engine::workers::info": "Tell all about a worker",
    "engine::workers::list": "List the connected workers",
    "engine::workers::register": "Say who the calling worker is",
}
BROKER_FUNCTIONS = {
    "stream::history": "Read the last events of a stream group",
    "broker::connections": "List the connected clients",
    "broker::disconnect": "Close the connections of clients",
    "broker::items": "List the items of a stream group with their ids",
    "broker::members": "List the subscriptions of a stream group",
    "broker::status": "Tell how the broker's processes are",
    "broker::top": "List the streams and groups that are used most",
}
BUILTINS = STREAM_FUNCTIONS | ENGINE_FUNCTIONS | BROKER_FUNCTIONS
"""Ids and descriptions of the functions that the broker answers itself."""

CUSTOM_FUNCTIONS = tuple(
    f"stream::{name}" for name in ("get", "set", "delete", "list", "list_groups", "update")
)
"""What workers that store a stream register, followed by its name in parentheses."""

_CUSTOM = re.compile(rf"(?:{'|'.join(CUSTOM_FUNCTIONS)})\((.*)\)", re.DOTALL)
_PREFIX = re.compile(r"(.*?)::")

Key = tuple[str, str]
"""Namespace and id."""


class Registration(Generic[W]):
    """A function as one worker registered it."""

    __slots__ = ("at_ms", "definition", "remote", "worker")

    def __init__(self, worker: W, definition: RegisterFunction, at_ms: int, remote: bool) -> None:
        self.worker = worker
        self.definition = definition
        self.at_ms = at_ms
        self.remote = remote


class Functions(Generic[W]):
    """The functions of all workers. Of several registrations the first is served, others wait;
    those of workers of other gateways, which are `remote`, come after our own."""

    def __init__(self) -> None:
        self._registrations: dict[Key, list[Registration[W]]] = {}
        self.custom: dict[str, int] = {}
        """Streams that workers store, and how many functions of them are registered."""
        self._owners: dict[str, W] = {}  # of those streams, as far as they were asked for

    def __len__(self) -> int:
        return len(self._registrations)

    def register(
        self,
        namespace: str,
        worker: W,
        definition: RegisterFunction,
        *,
        at_ms: int = 0,
        remote: bool = False,
    ) -> W | None:
        """Enter a function. Returns another worker that owns the id and keeps it, if there is."""
        key = (namespace, definition.id)
        self._owners.clear()
        if key not in self._registrations:
            self._count_custom(key, 1)
        waiting = self._registrations.setdefault(key, [])
        for registration in waiting:
            if registration.worker is worker:
                registration.definition = definition
                break
        else:
            registration = Registration(worker, definition, at_ms, remote)
            place = len(waiting)
            while not remote and place and waiting[place - 1].remote:
                place -= 1
            waiting.insert(place, registration)
        owner = waiting[0].worker
        return None if owner is worker else owner

    def unregister(self, namespace: str, worker: W, function_id: str) -> None:
        """Take the worker's registration out; the longest waiting one takes its place."""
        key = (namespace, function_id)
        waiting = self._registrations.get(key)
        if waiting is None:
            return
        self._owners.clear()
        waiting[:] = [r for r in waiting if r.worker is not worker]
        if not waiting:
            del self._registrations[key]
            self._count_custom(key, -1)

    def remove_worker(self, worker: W) -> None:
        """Take out all of a worker's registrations."""
        for namespace, function_id in list(self._registrations):
            self.unregister(namespace, worker, function_id)

    def move_worker(self, worker: W, old: str, new: str) -> None:
        """Move a worker's registrations to another namespace."""
        for key, waiting in list(self._registrations.items()):
            if key[0] == old:
                for registration in [r for r in waiting if r.worker is worker]:
                    self.unregister(old, worker, key[1])
                    self.register(
                        new,
                        worker,
                        registration.definition,
                        at_ms=registration.at_ms,
                        remote=registration.remote,
                    )

    def _count_custom(self, key: Key, change: int) -> None:
        found = _CUSTOM.fullmatch(key[1]) if key[0] == "default" else None
        if found is None:
            return
        stream = found.group(1)
        count = self.custom.get(stream, 0) + change
        if count:
            self.custom[stream] = count
        else:
            del self.custom[stream]

    def custom_owner(self, stream: str, order: Callable[[W], str]) -> W | None:
        """The worker whose gateway runs the operations on a stream that workers store: of all that
        have functions of it the one that registered first; `order` decides between equals."""
        if (owner := self._owners.get(stream)) is not None:
            return owner
        found = [
            registration
            for function in CUSTOM_FUNCTIONS
            for registration in self._registrations.get(("default", f"{function}({stream})"), ())
        ]
        if not found:
            return None
        owner = min(found, key=lambda r: (r.at_ms, order(r.worker))).worker
        self._owners[stream] = owner
        return owner

    def all(self) -> Iterator[tuple[Key, Registration[W]]]:
        """Every registration, in the order in which they are served."""
        for key, waiting in self._registrations.items():
            for registration in waiting:
                yield key, registration

    def find(self, namespace: str, function_id: str) -> Registration[W] | None:
        """The registration that is served."""
        waiting = self._registrations.get((namespace, function_id))
        return waiting[0] if waiting else None

    def served(self) -> list[tuple[Key, Registration[W]]]:
        """All functions, sorted by id."""
        items = ((key, waiting[0]) for key, waiting in self._registrations.items())
        return sorted(items, key=lambda item: (item[0][1], item[0][0]))

    def served_by(self, worker: W) -> int:
        """How many functions the worker owns."""
        return sum(1 for waiting in self._registrations.values() if waiting[0].worker is worker)


def id_prefix(function_id: str) -> str:
    """The part of an id before the first `::`, or all of it."""
    found = _PREFIX.match(function_id)
    return found.group(1) if found else function_id
