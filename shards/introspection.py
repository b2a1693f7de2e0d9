"""What a shard tells of itself, and of the gateways that are linked to it."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from broker.report import GatewayReport, ShardReport, ShardTop, StoreReport
from broker.vitals import Vitals
from shards.requests import GatewayLink, Requests

_encode = msgspec.json.encode
_gateway = msgspec.json.Decoder(GatewayReport)


class Introspection:
    """Answers `AskStatus` and `AskTop`; keeps what each gateway told last.

    Args:
        store: what is stored, as of the last look at it.
    """

    def __init__(
        self, index: int, requests: Requests, vitals: Vitals, store: Callable[[], StoreReport]
    ) -> None:
        self._index = index
        self._requests = requests
        self._vitals = vitals
        self._store = store
        self._told: dict[GatewayLink, bytes] = {}
        requests.reporter = self

    def status(self) -> bytes:
        """JSON text of a `ShardReport`."""
        requests = self._requests
        links = requests.links
        report = ShardReport(
            self._vitals.report(),
            self._index,
            operations_waiting=requests.committer.waiting,
            triggers=len(requests.triggers),
            links=len(links),
            queue_bytes=sum(link.queue_bytes for link in links),
            store=self._store(),
            gateways=[_gateway.decode(self._told[link]) for link in links if link in self._told],
        )
        return _encode(report)

    def top(self, limit: int) -> bytes:
        """JSON text of a `ShardTop` with up to `limit` of each kind."""
        hot, now = self._requests.committer.hot, time.monotonic()
        groups = [(*group, round(rate, 3)) for group, rate in hot.groups.top(limit, now)]
        streams = [(stream, round(rate, 3)) for stream, rate in hot.streams.top(limit, now)]
        return _encode(ShardTop(groups, streams))

    def told(self, link: GatewayLink, payload: bytes) -> None:
        """Keep what a gateway said of itself, the JSON text of a `GatewayReport`."""
        living = set(self._requests.links)
        self._told = {other: text for other, text in self._told.items() if other in living}
        self._told[link] = payload
