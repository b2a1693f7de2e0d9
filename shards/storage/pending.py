"""What a stream's file has in its journal, and not yet in its tables. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from shards.group import Change, Kind
from shards.history import HistoryLimits

CHANGES_MAX = 4096
BYTES_MAX = 2**20
"""With as many changes, or bytes, in the journal, it goes to the tables before the next batch."""
ALL_BYTES_MAX = 32 * 2**20
"""Bytes of the journals of a shard: a stream's share of it, if that is less."""
ROWS_PER_HISTORY = 4
"""A row of the history holds at most its limits divided by this."""


class GroupRow(msgspec.Struct, frozen=True, array_like=True):
    """A row of `groups`: a group's head, and the number and bytes of its items."""

    id: int
    group_id: str
    epoch: str
    seq: int
    timestamp_ms: int
    items: int
    bytes: int


class HistoryRow(msgspec.Struct, frozen=True):
    """Changes of one group that were written together; `changes` is opaque to SQL."""

    group_key: int
    last_seq: int
    timestamp_ms: int
    changes: bytes


class Trim(msgspec.Struct, frozen=True):
    """What may be kept of a group's history: changes after `seq`, and up to so many bytes."""

    group_key: int
    seq: int
    bytes_max: int


class Commit(msgspec.Struct, frozen=True, array_like=True):
    """What one commit makes durable, as a row of the journal holds it.

    groups: as they are after it. changes: of each group, in order.
    """

    groups: list[GroupRow]
    changes: list[tuple[int, list[Change]]]


class Pending:
    """The commits of a journal, merged: of each item the last state only."""

    def __init__(self) -> None:
        self.groups: dict[str, GroupRow] = {}
        self.deleted: dict[tuple[int, str], None] = {}
        """Items to delete first; some of them are in `items` again, behind all others."""
        self.items: dict[tuple[int, str], bytes] = {}
        self.trims: dict[int, Trim] = {}
        self._changes: dict[int, list[Change]] = {}
        self._count = 0
        self._bytes = 0

    def add(self, commit: Commit, size: int) -> None:
        """Merge a commit whose text has `size` bytes."""
        self._bytes += size
        for row in commit.groups:
            self.groups[row.group_id] = row
        items, deleted = self.items, self.deleted
        for group_key, changes in commit.changes:
            self._count += len(changes)
            known = self._changes.get(group_key)
            if known is None:
                self._changes[group_key] = changes
            else:
                known += changes
            for change in changes:
                if not change.stored:
                    continue
                assert change.item_id is not None, "only custom events may be of no item"
                key = (group_key, change.item_id)
                if change.kind is Kind.DELETE:
                    items.pop(key, None)
                    deleted[key] = None
                else:
                    items[key] = change.data

    def __bool__(self) -> bool:
        return bool(self.groups)

    def is_large(self, streams: int) -> bool:
        """Whether it is time to write the tables; so many streams have something in journals."""
        share = ALL_BYTES_MAX // max(streams, 1)
        return self._count >= CHANGES_MAX or self._bytes >= min(BYTES_MAX, share)

    def over_items(
        self, group_key: int, found: Iterable[tuple[str, bytes]]
    ) -> Iterable[tuple[str, bytes]]:
        """All items of a group, in order of first insertion, given what its table holds."""
        return self._over(group_key, found) if group_key in self._changes else found

    def _over(
        self, group_key: int, found: Iterable[tuple[str, bytes]]
    ) -> Iterator[tuple[str, bytes]]:
        deleted = {item_id for key, item_id in self.deleted if key == group_key}
        items = {i: value for (key, i), value in self.items.items() if key == group_key}
        for item_id, value in found:
            if item_id not in deleted:
                yield item_id, items.pop(item_id, value)
        yield from items.items()

    def over_groups(self, group_ids: list[str]) -> list[str]:
        """The ids of the groups that have items, given those of the table."""
        if not self.groups:
            return group_ids
        names = dict.fromkeys(group_ids)
        for group_id, row in self.groups.items():
            if row.items:
                names[group_id] = None
            else:
                names.pop(group_id, None)
        return list(names)

    def since(self, group_key: int, seq: int) -> list[Change]:
        """The changes of a group after `seq`."""
        return [change for change in self._changes.get(group_key, ()) if change.seq > seq]

    def history_rows(self, limits: HistoryLimits) -> Iterator[HistoryRow]:
        """The rows that the history gets; what is too large for it is left out."""
        if not limits.events_max:
            return
        for group_key, changes in self._changes.items():
            for part in _parts(changes[-limits.events_max :], limits):
                last = part[-1]
                text = msgspec.msgpack.encode(part)
                yield HistoryRow(group_key, last.seq, last.timestamp_ms, text)


def _parts(changes: Iterable[Change], limits: HistoryLimits) -> Iterator[list[Change]]:
    """Cut `changes` into rows that can be deleted one by one when the history is too large."""
    size_max = limits.group_bytes_max // ROWS_PER_HISTORY
    count_max = limits.events_max // ROWS_PER_HISTORY + 1
    part: list[Change] = []
    size = 0
    for change in changes:
        if len(change.data) > limits.group_bytes_max // 2:
            continue
        if part and (size + len(change.data) > size_max or len(part) == count_max):
            yield part
            part, size = [], 0
        part.append(change)
        size += len(change.data)
    if part:
        yield part
