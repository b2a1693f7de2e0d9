"""Subscriptions that gateways hold, so that their leaves are told when a gateway dies. No I/O.

What a dead gateway leaves is its estate: for each of its leave triggers the subscriptions that it
would have told. Whoever registers such a trigger again is told them. An estate becomes due after a
delay, in which clients may come back; after a longer one what nobody asked for is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from broker.messages import AddLeaveTrigger, Lease, Left

G = TypeVar("G")


class _Held:
    """What one gateway told: its leases, and the triggers that can be fired there."""

    def __init__(self, gateway_id: str) -> None:
        self.gateway_id = gateway_id
        self.leases: dict[int, Lease] = {}
        self.triggers: dict[str, AddLeaveTrigger] = {}


class _Estate:
    """What a dead gateway left: leases by head, and by the triggers that are owed them, which may
    be those of other gateways."""

    def __init__(
        self,
        held: _Held,
        triggers: Mapping[str, AddLeaveTrigger],
        due_at: float,
        dropped_at: float,
    ) -> None:
        self.due_at = due_at
        self.dropped_at = dropped_at
        self.returned: set[int] = set()
        self.by_head: dict[bytes, list[int]] = {}
        self.owed: list[tuple[AddLeaveTrigger, list[Lease]]] = []
        for trigger in triggers.values():
            leases = [lease for lease in held.leases.values() if _matches(trigger, lease)]
            if leases:
                self.owed.append((trigger, leases))
        if self.owed:
            for lease_id, lease in held.leases.items():
                self.by_head.setdefault(_head(lease), []).append(lease_id)

    def take(self, trigger: AddLeaveTrigger) -> list[Lease]:
        """What is owed to `trigger`: that with its id, else to one like it."""
        found = [o for o in self.owed if o[0].trigger_id == trigger.trigger_id] or [
            o for o in self.owed if o[0].likeness == trigger.likeness
        ]
        if not found:
            return []
        self.owed.remove(found[0])
        return [lease for lease in found[0][1] if lease.lease_id not in self.returned]


class Leases(Generic[G]):
    """The leases of all gateways; `G` is what stands for a gateway.

    Args:
        delay_s: for which clients of a dead gateway may come back without having left.
        wait_s: for which what it owes waits for its triggers after that.
    """

    def __init__(self, delay_s: float, wait_s: float) -> None:
        self._delay_s = delay_s
        self._wait_s = wait_s
        self._held: dict[G, _Held] = {}
        self._estates: dict[str, _Estate] = {}
        self.told_total = 0
        self.dropped_total = 0

    def __len__(self) -> int:
        return sum(len(held.leases) for held in self._held.values())

    @property
    def owed(self) -> int:
        """Leaves that wait for a trigger to be registered again."""
        return sum(len(leases) for e in self._estates.values() for _, leases in e.owed)

    def gateway_linked(self, gateway: G, gateway_id: str) -> None:
        """A gateway is there; what it left when its link was lost is its own again."""
        self._estates.pop(gateway_id, None)
        self._held[gateway] = _Held(gateway_id)

    def gateway_lost(self, gateway: G, now: float) -> list[float]:
        """A link is lost. Returns when `due` has to be called; never when nothing is owed."""
        held = self._held.pop(gateway, None)
        if held is None:
            return []
        due_at = now + self._delay_s
        triggers = {i: t for one in (*self._held.values(), held) for i, t in one.triggers.items()}
        estate = _Estate(held, triggers, due_at, due_at + self._wait_s)
        if not estate.owed:
            return []
        self._estates[held.gateway_id] = estate
        return [estate.due_at, estate.dropped_at]

    def add(self, gateway: G, lease: Lease, now: float) -> None:
        """A subscription stands; it may be one that was lost and is back."""
        if (held := self._held.get(gateway)) is None:
            return
        if lease.lease_id not in held.leases:
            for estate in self._estates.values():
                if now < estate.due_at and (ids := estate.by_head.get(_head(lease))):
                    estate.returned.add(ids.pop())
                    break
        held.leases[lease.lease_id] = lease

    def end(self, gateway: G, lease_id: int) -> None:
        """A subscription ended and its leave was told."""
        if (held := self._held.get(gateway)) is not None:
            held.leases.pop(lease_id, None)

    def add_trigger(self, gateway: G, trigger: AddLeaveTrigger, now: float) -> list[Left]:
        """A leave trigger can be fired. Returns the leaves that it is owed."""
        if (held := self._held.get(gateway)) is None:
            return []
        held.triggers[trigger.trigger_id] = trigger
        return [left for estate in self._due(now) for left in self._left(estate, trigger)]

    def remove_trigger(self, gateway: G, trigger_id: str) -> None:
        """A trigger is gone; nothing if it is not there."""
        if (held := self._held.get(gateway)) is not None:
            held.triggers.pop(trigger_id, None)

    def due(self, now: float) -> list[tuple[G, Left]]:
        """What is owed to triggers that are registered already, and became due."""
        return [
            (gateway, left)
            for estate in self._due(now)
            for gateway, held in self._held.items()
            for trigger in held.triggers.values()
            for left in self._left(estate, trigger)
        ]

    def _due(self, now: float) -> Iterator[_Estate]:
        for gateway_id, estate in list(self._estates.items()):
            if now >= estate.dropped_at:
                self.dropped_total += sum(len(leases) for _, leases in estate.owed)
                estate.owed.clear()
            elif now >= estate.due_at:
                yield estate
            if not estate.owed:
                del self._estates[gateway_id]

    def _left(self, estate: _Estate, trigger: AddLeaveTrigger) -> Iterator[Left]:
        for lease in estate.take(trigger):
            self.told_total += 1
            yield Left(trigger.trigger_id, lease.stream, lease.group_id, lease.payload)


def _head(lease: Lease) -> bytes:
    return lease.payload[: lease.head_bytes]


def _matches(trigger: AddLeaveTrigger, lease: Lease) -> bool:
    return (not trigger.stream or trigger.stream == lease.stream) and (
        not trigger.group_id or trigger.group_id == lease.group_id
    )
