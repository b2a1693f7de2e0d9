"""Tells the leave triggers when subscriptions end, each once (protocol section 6.2).

The shard that owns the group keeps a lease of each subscription, so that leaves are told even when
this gateway dies with all that it knows. Leases cost what nobody needs while no leave trigger is
registered: they are made from when one is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import msgspec

from broker import messages
from broker.names import Group
from gateway.hub import Subscription
from gateway.peers import Peers
from gateway.shard_links import ShardLink, ShardLinks
from gateway.triggers import Triggers

AWAY_MAX = 200_000
"""Subscriptions whose leave is put off; past it leaves are told at once."""

_encode = msgspec.json.encode


class _Lease:
    """What is told when the subscription ends: `head` without its brace, then the context."""

    __slots__ = ("context", "group", "head", "lease_id", "timer")

    def __init__(self, lease_id: int, group: Group, head: bytes, context: bytes) -> None:
        self.lease_id = lease_id
        self.group = group
        self.head = head
        self.context = context
        self.timer: asyncio.TimerHandle | None = None


class Leaves:
    """Knows who has left and who is only away.

    Args:
        delay_s: for which a client whose connection ended may come back without having left.
    """

    def __init__(self, triggers: Triggers, links: ShardLinks, peers: Peers, delay_s: float) -> None:
        self._triggers = triggers
        self._links = links
        self._peers = peers
        self._delay_s = delay_s
        self._leases: dict[Subscription, _Lease] = {}
        self._away: dict[bytes, list[_Lease]] = {}
        self.away = 0
        self.returned_total = 0

    def joined(self, subscription: Subscription) -> None:
        """The subscription stands from now on; who comes back has not left."""
        returned = bool(self._away) and self.returned(head_of(subscription))
        if self._triggers.has_leave:
            if self._delay_s and not returned and len(self._peers):
                self._peers.client_returned(head_of(subscription))
            self._lease(subscription)

    def returned(self, head: bytes) -> bool:
        """A subscription with this head stands, here or elsewhere; whether it was away here."""
        if not (away := self._away.get(head)):
            return False
        lease = away[-1]
        self._forget_away(lease)
        self._end(lease)
        self.returned_total += 1
        return True

    def replaced(self, subscription: Subscription) -> None:
        """The subscription made room for another one with its id: nobody has left."""
        if (lease := self._leases.pop(subscription, None)) is not None:
            self._end(lease)

    def left(self, subscription: Subscription, *, on_purpose: bool) -> None:
        """The subscription is over, by the client's own message or because of its connection."""
        lease = self._leases.pop(subscription, None)
        if on_purpose or not self._delay_s or self.away >= AWAY_MAX:
            if self._triggers.has_leave:
                head, context = head_of(subscription), subscription.subscriber.context
                self._triggers.fire_leave(*subscription.group, leave_payload(head, context))
            if lease is not None:
                self._end(lease)
            return
        if lease is None:
            lease = self._new_lease(subscription)
        lease.timer = asyncio.get_running_loop().call_later(self._delay_s, self._gone, lease)
        self._away.setdefault(lease.head, []).append(lease)
        self.away += 1

    def renewed(self, subscriptions: Iterable[Subscription]) -> None:
        """The context of these subscriptions is another one."""
        for subscription in subscriptions:
            if subscription in self._leases:
                self._lease(subscription)

    def lease_all(self, subscriptions: Iterable[Subscription]) -> None:
        """A leave trigger was registered: from now on leases are needed."""
        for subscription in subscriptions:
            if subscription not in self._leases:
                self._lease(subscription)

    def shard_linked(self, link: ShardLink) -> None:
        """The shard knows nothing: give it the leases of its groups."""
        away = [lease for leases in self._away.values() for lease in leases]
        for lease in (*self._leases.values(), *away):
            if self._links.of(lease.group) is link:
                link.tell(_message(lease))

    def stop(self) -> None:
        """The gateway stops: whoever is away has left."""
        for leases in list(self._away.values()):
            for lease in list(leases):
                self._gone(lease)

    def _lease(self, subscription: Subscription) -> None:
        lease = self._leases.get(subscription) or self._new_lease(subscription)
        lease.context = subscription.subscriber.context
        self._leases[subscription] = lease
        self._links.of(lease.group).tell(_message(lease))

    def _new_lease(self, subscription: Subscription) -> _Lease:
        context = subscription.subscriber.context
        return _Lease(subscription.number, subscription.group, head_of(subscription), context)

    def _end(self, lease: _Lease) -> None:
        self._links.of(lease.group).tell(messages.EndLease(lease.lease_id))

    def _gone(self, lease: _Lease) -> None:
        self._forget_away(lease)
        self._triggers.fire_leave(*lease.group, leave_payload(lease.head, lease.context))
        self._end(lease)

    def _forget_away(self, lease: _Lease) -> None:
        assert lease.timer is not None, "set for whoever is away"
        lease.timer.cancel()
        self.away -= 1
        leases = self._away[lease.head]
        leases.remove(lease)
        if not leases:
            del self._away[lease.head]


def head_of(subscription: Subscription) -> bytes:
    """The JSON text of what a join or leave is about, up to the context: it names the
    subscription, also when its client comes back with another connection."""
    stream, group_id = subscription.group
    fields = {
        "subscription_id": subscription.subscription_id,
        "stream_name": stream,
        "group_id": group_id,
        "id": subscription.item_id,
    }
    return _encode(fields).removesuffix(b"}")


def leave_payload(head: bytes, context: bytes) -> bytes:
    """The JSON text that join and leave triggers are given."""
    return head + b',"context":' + context + b"}"


def _message(lease: _Lease) -> messages.Lease:
    payload = leave_payload(lease.head, lease.context)
    return messages.Lease(lease.lease_id, *lease.group, len(lease.head), payload)
