"""KvStore `in_memory`: dictionaries. What is in them ends with the process."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from broker.clock import Clock
from shards.group import GroupState, Operation, attempt, new_head
from shards.storage.base import Settle, Settled

EMPTY_GROUPS_MAX = 100_000
"""Groups without items whose numbering is remembered; the longest unused is forgotten first."""


class MemoryStorage:
    """See `shards.storage.base.Storage`."""

    def __init__(self, clock: Clock, response_bytes_max: int) -> None:
        self._clock = clock
        self._response_bytes_max = response_bytes_max
        self._streams: dict[str, dict[str, GroupState]] = {}
        self._empty: OrderedDict[tuple[str, str], GroupState] = OrderedDict()
        self._forgotten_timestamp_ms = 0

    async def open(self) -> None:
        """Nothing to do."""

    async def close(self) -> None:
        """Nothing to do."""

    def execute(self, stream: str, operations: Sequence[Operation], settle: Settle) -> None:
        now_ms = self._clock()
        groups = self._streams.setdefault(stream, {})
        settled: list[Settled] = []
        for operation in operations:
            group_id = operation.group_id
            group = groups.get(group_id)
            if group is None:
                group = self._empty.pop((stream, group_id), None) or self._new(stream, group_id)
                groups[group_id] = group
            settled.append((attempt(group, operation, now_ms, self._response_bytes_max), group))
            if not group.count:
                del groups[group_id]
                self._remember((stream, group_id), group)
        if not groups:
            del self._streams[stream]
        settle(settled)

    async def streams(self) -> list[str]:
        return list(self._streams)

    async def groups(self, stream: str) -> list[str]:
        return list(self._streams.get(stream, ()))

    def _new(self, stream: str, group_id: str) -> GroupState:
        head = new_head()
        head.timestamp_ms = self._forgotten_timestamp_ms  # a client may remember a later time
        return GroupState(stream, group_id, head)

    def _remember(self, key: tuple[str, str], group: GroupState) -> None:
        self._empty[key] = group
        if len(self._empty) > EMPTY_GROUPS_MAX:
            _, forgotten = self._empty.popitem(last=False)
            self._forgotten_timestamp_ms = max(
                self._forgotten_timestamp_ms, forgotten.head.timestamp_ms
            )
