"""Envelopes for subscribers and triggers, each encoded once (protocol section 5.4)."""

from __future__ import annotations

import msgspec

from shards.group import Change, GroupState, Kind, Snapshot

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


def sync_payload(group: GroupState, item_id: str | None, snapshot: Snapshot) -> bytes:
    """The JSON text of the `sync` envelope of a group, or of one item."""
    return b"".join(
        (
            b'{"type":"stream","timestamp":%d,' % snapshot.timestamp_ms,
            group.names,
            b',"id":',
            b"null" if item_id is None else _encode(item_id),
            b',"seq":%d,"epoch":"%b","event":{"type":"sync","data":'
            % (snapshot.seq, snapshot.epoch.encode()),
            snapshot.data,
            b"}}",
        )
    )
