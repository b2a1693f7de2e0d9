"""Envelopes for subscribers and triggers, each encoded once (protocol section 5.4)."""

from __future__ import annotations

import msgspec

from shards.group import Change, GroupState, Kind, Past, Resumed, Snapshot
from shards.storage.redis_foreign import Foreign

_encode = msgspec.json.encode


def event_payload(group: GroupState, change: Change) -> bytes:
    """The JSON text of the envelope that tells `change`."""
    item_id = b"null" if change.item_id is None else _encode(change.item_id)
    if change.kind is Kind.EVENT:
        kind = b'event","event":{"type":' + _encode(change.event_type) + b',"data":'
        end = b"}}}"
    else:
        kind = b"%b" % change.kind.encode() + b'","data":'
        end = b"}}"
    return b"".join(
        (
            b'{"type":"stream","timestamp":%d,' % change.timestamp_ms,
            group.names,
            b',"id":',
            item_id,
            b',"seq":%d,"event":{"type":"' % change.seq,
            kind,
            change.data,
            end,
        )
    )


def foreign_payload(group: GroupState, message: Foreign, timestamp_ms: int) -> bytes:
    """The JSON text of the envelope of what another program tells; it has no number."""
    return b"".join(
        (
            b'{"type":',
            _encode(message.type),
            b',"timestamp":%d,' % timestamp_ms,
            group.names,
            b',"id":',
            b"null" if message.item_id is None else _encode(message.item_id),
            b',"event":',
            message.event,
            b"}",
        )
    )


def sync_parts(group: GroupState, item_id: str | None, snapshot: Snapshot) -> tuple[bytes, bytes]:
    """Head and body of the `sync` envelope of a group, or of one item: see `messages.Synced`."""
    resumed = b"" if snapshot.resumed is None else b',"resumed":false'
    head = b"".join(
        (
            *_beginning(group, item_id, snapshot.timestamp_ms),
            b',"seq":%d,"epoch":"%b"' % (snapshot.seq, snapshot.epoch.encode()),
            resumed,
            b',"event":{"type":"sync","data":',
        )
    )
    if snapshot.ids is None:
        return head, snapshot.data
    return head, snapshot.data + b',"ids":' + snapshot.ids


def resume_head(group: GroupState, item_id: str | None, resumed: Resumed) -> bytes:
    """Head of the envelope that says that what follows is what was missed; its body is empty."""
    return b"".join(
        (
            *_beginning(group, item_id, resumed.timestamp_ms),
            b',"seq":%d,"epoch":"%b"' % (resumed.since, resumed.epoch.encode()),
            b',"resumed":true,"event":{"type":"resume"',
        )
    )


def past_payload(group: GroupState, past: Past) -> bytes:
    """The JSON text of what `stream::history` answers."""
    events = b",".join(event_payload(group, change) for change in past.changes)
    return b'{"epoch":"%b","seq":%d,"complete":%b,"events":[%b]}' % (
        past.epoch.encode(),
        past.seq,
        b"true" if past.complete else b"false",
        events,
    )


def _beginning(
    group: GroupState, item_id: str | None, timestamp_ms: int
) -> tuple[bytes, bytes, bytes, bytes]:
    """An envelope up to its `id`."""
    return (
        b'{"type":"stream","timestamp":%d,' % timestamp_ms,
        group.names,
        b',"id":',
        b"null" if item_id is None else _encode(item_id),
    )
