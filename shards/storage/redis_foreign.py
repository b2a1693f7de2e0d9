"""Messages of other programs on the original's channel (protocol section 10.1). Pure: no I/O.

Brokers tell their changes there too, marked with `epoch` beside `seq`: those are not meant.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from broker.json_text import is_deeper_than
from broker.names import NAME_BYTES_MAX


class Foreign(msgspec.Struct, frozen=True):
    """A message for the subscribers of a group, or of one of its items.

    type: of the envelope. event: its JSON text.
    """

    stream: str
    group_id: str
    item_id: str | None
    type: str
    event: bytes


_MISSING = msgspec.Raw(b"")


class _Custom(msgspec.Struct):
    type: str
    data: msgspec.Raw = _MISSING


class _Event(msgspec.Struct):
    type: Literal["sync", "create", "update", "delete", "event", "unauthorized"]
    data: msgspec.Raw = _MISSING
    event: _Custom | None = None


class _Envelope(msgspec.Struct):
    type: str
    timestamp: int
    streamName: str
    groupId: str
    event: _Event
    id: str | None = None
    seq: msgspec.Raw = _MISSING
    epoch: msgspec.Raw = _MISSING


_decode = msgspec.json.Decoder(_Envelope).decode
_encode = msgspec.json.encode


def foreign_of(text: bytes, bytes_max: int) -> Foreign | None:
    """What `text` tells; None if it is no envelope, a broker's own, or larger than `bytes_max`."""
    if len(text) > bytes_max:
        return None
    try:
        envelope = _decode(text)
        text.decode()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if bytes(envelope.seq) and bytes(envelope.epoch):
        return None
    event = _event_text(envelope.event)
    if event is None or is_deeper_than(event):
        return None
    names = (envelope.streamName, envelope.groupId, envelope.id or "")
    if any(len(name.encode()) > NAME_BYTES_MAX for name in names):
        return None
    return Foreign(envelope.streamName, envelope.groupId, envelope.id, envelope.type, event)


def _event_text(event: _Event) -> bytes | None:
    """The event without fields that it does not have to have."""
    match event.type:
        case "event":
            custom = event.event
            if custom is None or not bytes(custom.data):
                return None
            return b'{"type":"event","event":{"type":%b,"data":%b}}' % (
                _encode(custom.type),
                bytes(custom.data),
            )
        case "unauthorized":
            return b'{"type":"unauthorized"}'
        case _:
            data = bytes(event.data)
            return b'{"type":"%b","data":%b}' % (event.type.encode(), data) if data else None
