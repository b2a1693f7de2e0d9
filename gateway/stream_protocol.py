"""Messages of the stream port, without I/O (protocol section 5)."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from broker.errors import InvalidRequest
from gateway import decoding


class JoinData(msgspec.Struct, rename="camel"):
    """What a join or leave is about; `id` None: the whole group."""

    subscription_id: str
    stream_name: str
    group_id: str
    id: str | None = None


class Join(msgspec.Struct, tag_field="type", tag="join"):
    data: JoinData


class Leave(msgspec.Struct, tag_field="type", tag="leave"):
    data: JoinData


class Auth(msgspec.Struct, tag_field="type", tag="auth"):
    """A fresh token, or what else the auth function understands."""

    data: msgspec.Raw


ClientMessage = Join | Leave | Auth

_decoder: msgspec.json.Decoder[ClientMessage] = msgspec.json.Decoder(ClientMessage)
_encode = msgspec.json.encode


def decode(text: bytes) -> ClientMessage | None:
    """The message in a frame; None for a blank one.

    Raises:
        InvalidRequest: `invalid_message`, with the field at fault where it is known.
    """
    return decoding.decode(_decoder, text)


def error_payload(error: InvalidRequest, text: bytes) -> bytes:
    """The envelope that tells a client what is wrong with its frame `text`."""
    data = _data_of(text)
    event: dict[str, Any] = {"type": "error", "code": error.code, "message": error.message}
    if error.field is not None:
        event["field"] = error.field
    if isinstance(subscription_id := data.get("subscriptionId"), str):
        event["subscriptionId"] = subscription_id
    stream, group_id = data.get("streamName"), data.get("groupId")
    return envelope(
        stream if isinstance(stream, str) else "",
        group_id if isinstance(group_id, str) else "",
        None,
        event,
    )


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
