"""Syncs of one group that are alike: a link carries what they hold once. No I/O.

When many clients join a group, each gets a sync of its own, with the same items in it. The shard
has the gateway keep the body of a sync, and names it in the next one that holds the same.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from broker.messages import Synced

BODY_BYTES_MIN = 512
"""Smaller bodies are sent anew each time."""
BODY_BYTES_MAX = 1024 * 1024
KEPT_BYTES_MAX = 8 * 1024 * 1024
"""Of all that is kept for one link, at each end; what was not used for longest gives way."""


class SentBodies:
    """The shard's end: what the gateway keeps."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, tuple[int, bytes]] = OrderedDict()
        self._last_id = 0
        self._forgotten: list[int] = []
        self.bytes = 0
        self.shared_total = 0

    def shorten(self, key: Hashable, synced: Synced) -> None:
        """Take the body out of a message that is about to be sent, if the gateway has it, or else
        have the gateway keep it.

        Args:
            key: of syncs that may be alike; the last body of each is kept.
        """
        body = synced.body
        assert body is not None, "shortened already"
        kept = self._kept.get(key)
        if kept is not None:
            if kept[1] == body:
                self._kept.move_to_end(key)
                self.shared_total += 1
                synced.body_id, synced.body = kept[0], None
                return
            self._forget(key)
        if BODY_BYTES_MIN <= len(body) <= BODY_BYTES_MAX:
            self._last_id += 1
            self._kept[key] = (self._last_id, body)
            self.bytes += len(body)
            while self.bytes > KEPT_BYTES_MAX:
                self._forget(next(iter(self._kept)))
            synced.body_id = self._last_id
        synced.forgotten, self._forgotten = self._forgotten, []

    def _forget(self, key: Hashable) -> None:
        body_id, body = self._kept.pop(key)
        self.bytes -= len(body)
        self._forgotten.append(body_id)


class ReceivedBodies:
    """The gateway's end."""

    def __init__(self) -> None:
        self._bodies: dict[int, bytes] = {}

    def complete(self, synced: Synced) -> None:
        """Put the body in that was left out, and keep what is to be kept."""
        for body_id in synced.forgotten:
            del self._bodies[body_id]
        if synced.body is None:
            synced.body = self._bodies[synced.body_id]
        elif synced.body_id:
            self._bodies[synced.body_id] = synced.body
