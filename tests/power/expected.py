"""What may be found after a power cut, told from what was asked and what was answered."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from broker import messages
from shards.group import Operation

Told = tuple[str, str | None, object, str | None]
"""Kind, item, data and event type of a change."""


@dataclass(frozen=True)
class Group:
    """A group as a reader may see it. epoch: None as long as nothing is known of it.

    history_from: seq after which changes can be asked for.
    """

    epoch: str | None = None
    items: dict[str, object] = field(default_factory=dict)
    changes: tuple[Told, ...] = ()
    history_from: int = 0

    @property
    def seq(self) -> int:
        return len(self.changes)

    def after(self, operation: Operation) -> Group:
        match operation:
            case messages.Set(item_id=item_id):
                data = json.loads(operation.data)
                kind = "update" if item_id in self.items else "create"
                told, items = (kind, item_id, data, None), {**self.items, item_id: data}
            case messages.Delete(item_id=item_id):
                if item_id not in self.items:
                    return self
                items = {name: data for name, data in self.items.items() if name != item_id}
                told = ("delete", item_id, self.items[item_id], None)
            case messages.Send():
                data = json.loads(operation.data)
                told = ("event", operation.item_id, data, operation.event_type)
                items = self.items
            case _:
                return self
        return replace(self, items=items, changes=(*self.changes, told))


Stream = dict[str, Group]


def after(stream: Stream, operations: Sequence[Operation]) -> Stream:
    """The stream when all of them were performed."""
    groups = dict(stream)
    for operation in operations:
        group = groups.get(operation.group_id, Group())
        changed = group.after(operation)
        if changed is not group:
            groups[operation.group_id] = changed
    return groups


class Expected:
    """Each stream as it may be: what was answered, first, and what else may be there.

    floors: the last timestamp that a client may have seen of each group.
    """

    def __init__(self) -> None:
        self.streams: dict[str, list[Stream]] = {}
        self.floors: dict[tuple[str, str], int] = {}

    def copy(self) -> Expected:
        other = Expected()
        other.streams = {name: list(some) for name, some in self.streams.items()}
        other.floors = dict(self.floors)
        return other

    def answered(self, stream: str) -> Stream:
        return self.streams.get(stream, [{}])[0]

    def settle(self, stream: str, groups: Stream) -> None:
        """The stream is so, and nothing else."""
        self.streams[stream] = [groups]

    def may_be(self, stream: str, groups: Stream) -> None:
        """The stream is as it was, or so."""
        self.streams.setdefault(stream, [{}]).append(groups)

    def seen(self, stream: str, group_id: str, timestamp_ms: int) -> None:
        """A client saw this timestamp: later ones are greater."""
        key = (stream, group_id)
        assert timestamp_ms > self.floors.get(key, 0), f"time went back in {key}"
        self.floors[key] = timestamp_ms
