"""Messages of the stream port, without I/O (protocol section 5)."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any
from urllib.parse import parse_qs, unquote_to_bytes

import msgspec
from msgspec import Meta

from broker.errors import InvalidRequest, LimitExceeded
from broker.messages import Event
from broker.names import Group, check_name
from gateway import decoding

POSITION_MAX = 2**62
EPOCH_CHARACTERS_MAX = 64


class LeaveData(msgspec.Struct, rename="camel"):
    """What a leave is about, by its subscription id alone; the rest is only checked."""

    subscription_id: str
    stream_name: str
    group_id: str
    id: str | None = None


class JoinData(LeaveData, rename="camel"):
    """What a join is about; `id` None: the whole group.

    since, epoch: the position to resume from. ids: whether a sync names its items. conflate:
    whether only the newest state of each item is wanted when the client is behind.
    """

    since: int | None = None
    epoch: str | None = None
    ids: bool = False
    conflate: bool = False

    @property
    def position(self) -> int | None:
        """`since` as far as it may be one that was given out; -1 for what never was."""
        if self.since is None:
            return None
        odd = not 0 <= self.since < POSITION_MAX or len(self.epoch or "") > EPOCH_CHARACTERS_MAX
        return -1 if odd else self.since


class Join(msgspec.Struct, tag_field="type", tag="join"):
    data: JoinData

    @property
    def joins(self) -> Sequence[JoinData]:
        """What is joined, in order."""
        return (self.data,)


class Groups(msgspec.Struct):
    groups: Annotated[list[JoinData], Meta(min_length=1)]


class JoinMany(msgspec.Struct, tag_field="type", tag="join"):
    """Several joins in one message, answered as if they came one by one."""

    data: Groups

    @property
    def joins(self) -> Sequence[JoinData]:
        """What is joined, in order."""
        return self.data.groups


class Leave(msgspec.Struct, tag_field="type", tag="leave"):
    data: LeaveData


class Auth(msgspec.Struct, tag_field="type", tag="auth"):
    """A fresh token, or what else the auth function understands."""

    data: msgspec.Raw


ClientMessage = Join | JoinMany | Leave | Auth

_decoder: msgspec.json.Decoder[ClientMessage] = msgspec.json.Decoder(Join | Leave | Auth)
_many_decoder: msgspec.json.Decoder[ClientMessage] = msgspec.json.Decoder(JoinMany)
_encode = msgspec.json.encode
_DIGITS_MAX = 18


def decode(text: bytes) -> ClientMessage | None:
    """The message in a frame; None for a blank one.

    Raises:
        InvalidRequest: `invalid_message`, with the field at fault where it is known.
    """
    try:
        return decoding.decode(_decoder, text)
    except InvalidRequest:
        if b'"groups"' not in text:
            raise
    return decoding.decode(_many_decoder, text)


def error_payload(error: InvalidRequest, text: bytes) -> bytes:
    """The envelope that tells a client what is wrong with its frame `text`."""
    data = _data_of(text)
    subscription_id, stream, group_id = (
        name if isinstance(name := data.get(key), str) else None
        for key in ("subscriptionId", "streamName", "groupId")
    )
    return _error(error, subscription_id, stream or "", group_id or "")


def join_error(error: InvalidRequest, join: JoinData) -> bytes:
    """The envelope that tells a client why a join is refused that could be read."""
    return _error(error, join.subscription_id, join.stream_name, join.group_id)


def _error(error: InvalidRequest, subscription_id: str | None, stream: str, group_id: str) -> bytes:
    event: dict[str, Any] = {"type": "error", "code": error.code, "message": error.message}
    if error.field is not None:
        event["field"] = error.field
    if subscription_id is not None:
        event["subscriptionId"] = subscription_id
    return envelope(stream, group_id, None, event)


def envelope(stream: str, group_id: str, item_id: str | None, event: dict[str, Any]) -> bytes:
    """An envelope that the gateway itself sends: `unauthorized` and `error`."""
    return _encode(
        {
            "type": "stream",
            "timestamp": time.time_ns() // 1_000_000,
            "streamName": stream,
            "groupId": group_id,
            "id": item_id,
            "event": event,
        }
    )


class _Kind(msgspec.Struct):
    type: str


class _Numbered(msgspec.Struct):
    seq: int
    id: str | None
    event: _Kind


_numbered_decoder = msgspec.json.Decoder(_Numbered)


def event_of(group: Group, payload: bytes) -> Event:
    """The event that the envelope `payload` tells to subscribers."""
    numbered = _numbered_decoder.decode(payload)
    custom = numbered.event.type == "event"
    return Event(*group, numbered.id, numbered.seq, payload, True, [], custom)


def authenticated(expires_at_ms: float | None) -> bytes:
    """The envelope that tells a client that its renewal was accepted."""
    expires_at = None if expires_at_ms is None else int(expires_at_ms)
    return envelope("", "", None, {"type": "authenticated", "expiresAt": expires_at})


def auth_error(retryable: bool) -> bytes:
    """The envelope that tells a client that its renewal was not accepted, or not answered."""
    event: dict[str, Any] = {"type": "error", "code": "unauthorized"}
    event["message"] = "the auth function did not accept the data; what held before still does"
    if retryable:
        event["code"] = "auth_unavailable"
        event["message"] = "the auth function can't be asked now; what held before still does"
    return envelope("", "", None, event)


def _data_of(text: bytes) -> dict[str, Any]:
    """`data` of a bad frame, as far as it can be read."""
    try:
        message = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    data = message.get("data") if isinstance(message, dict) else None
    return data if isinstance(data, dict) else {}


def joined_by_path(path: str, query: str) -> JoinData | None:
    """What a path joins: None for `/`, else a group, or an item of it (section 5.2).

    `query` may have `since`, `epoch` and `ids` as a join has them.

    Raises:
        ValueError: there is nothing at that path.
    """
    if path == "/":
        return None
    parts = path.removesuffix("/").split("/")
    if len(parts) not in (4, 5) or parts[:2] != ["", "stream"]:
        raise ValueError(path)
    names = [unquote_to_bytes(part).decode() for part in parts[2:]]
    if not all(names[:2]) or not all(_is_quoted(part) for part in parts[2:]):
        raise ValueError(path)
    for name in names:
        try:
            check_name("path", name)
        except (InvalidRequest, LimitExceeded) as error:
            raise ValueError(path) from error
    item_id = names[2] if len(names) == 3 else None
    data = JoinData(str(uuid.uuid4()), names[0], names[1], item_id)
    given = {name: values[-1] for name, values in parse_qs(query).items()}
    if (since := given.get("since")) is not None:
        is_number = since.isascii() and since.isdecimal() and len(since) <= _DIGITS_MAX
        data.since = int(since) if is_number else -1
    data.epoch = given.get("epoch")
    data.ids = given.get("ids") == "true"
    return data


def _is_quoted(part: str) -> bool:
    """Whether every `%` begins an escape."""
    return all(
        len(rest) >= 2 and all(c in "0123456789abcdefABCDEF" for c in rest[:2])
        for rest in part.split("%")[1:]
    )
