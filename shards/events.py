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


def sync_payload(group: GroupState, item_id: str | None, snapshot: Snapshot) -> bytes:
    """The JSON text of the `sync` envelope of a group, or of one item."""
    resumed = b"" if snapshot.resumed is None else b',"resumed":false'
    return b"".join(
        (
            *_beginning(group, item_id, snapshot.timestamp_ms),
            b',"seq":%d,"epoch":"%b"' % (snapshot.seq, snapshot.epoch.encode()),
            resumed,
            b',"event":{"type":"sync","data":',
            snapshot.data,
            b"" if snapshot.ids is None else b',"ids":' + snapshot.ids,
            b"}}",
        )
    )


def resume_payload(group: GroupState, item_id: str | None, resumed: Resumed) -> bytes:
    """The JSON text of the envelope that says that what follows is what was missed."""
    return b"".join(
        (
            *_beginning(group, item_id, resumed.timestamp_ms),
            b',"seq":%d,"epoch":"%b"' % (resumed.since, resumed.epoch.encode()),
            b',"resumed":true,"event":{"type":"resume"}}',
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
