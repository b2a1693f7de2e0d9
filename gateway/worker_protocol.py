"""Messages of the worker port, without I/O (protocol section 3)."""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw, Struct

from broker.errors import BrokerError
from gateway import decoding

_encode = msgspec.json.encode

NULL = Raw(b"null")
ABSENT = Raw(b"")
InvocationId = Annotated[str, Meta(min_length=1, max_length=128)]
Id = Annotated[str, Meta(min_length=1)]


class _Message(Struct, tag_field="type", tag=str.lower, gc=False):
    """Base: the tag on the wire is the class's name in lower case."""


class RegisterFunction(_Message):
    id: Id
    description: str | None = None
    metadata: Raw = NULL
    request_format: Raw = NULL
    response_format: Raw = NULL
    invocation: Raw = NULL


class UnregisterFunction(_Message):
    id: str


class RegisterTriggerType(_Message):
    id: Id
    description: str | None = None
    trigger_request_format: Raw = NULL
    call_request_format: Raw = NULL


class UnregisterTriggerType(_Message):
    id: str


class RegisterTrigger(_Message):
    id: Id
    trigger_type: Id
    function_id: Id
    config: Raw = ABSENT
    metadata: Raw = NULL
    namespace: str | None = None


class UnregisterTrigger(_Message):
    id: str
    trigger_type: str | None = None


class TriggerRegistrationResult(_Message):
    id: str
    trigger_type: str | None = None
    function_id: str | None = None
    error: Raw = NULL


class Action(Struct, gc=False):
    type: str
    queue: str | None = None


class InvokeFunction(_Message):
    function_id: str
    data: Raw = NULL
    invocation_id: InvocationId | None = None
    action: Action | None = None
    traceparent: str | None = None
    baggage: str | None = None
    metadata: Raw = NULL
    namespace: str | None = None

    @property
    def answered(self) -> bool:
        """Whether the caller gets an answer."""
        return self.invocation_id is not None and (
            self.action is None or self.action.type != "void"
        )


class InvocationResult(_Message):
    invocation_id: str
    function_id: str | None = None
    result: Raw = NULL
    error: Raw = NULL


class Reattach(_Message):
    previous_worker_id: str
    reattach_token: str | None = None


class Ping(_Message):
    pass


WorkerMessage = (
    RegisterFunction
    | UnregisterFunction
    | RegisterTriggerType
    | UnregisterTriggerType
    | RegisterTrigger
    | UnregisterTrigger
    | TriggerRegistrationResult
    | InvokeFunction
    | InvocationResult
    | Reattach
    | Ping
)

PONG = b'{"type":"pong"}'

_decoder: msgspec.json.Decoder[WorkerMessage] = msgspec.json.Decoder(WorkerMessage)
_INVOCATION_ID = re.compile(rb'"invocation_id"\s*:\s*"([^"\\\x00-\x1f]{1,128})"')
_FUNCTION_ID = re.compile(rb'"function_id"\s*:\s*"([^"\\\x00-\x1f]{1,1024})"')
_IS_RESULT = re.compile(rb'"type"\s*:\s*"invocationresult"')


def decode(text: bytes) -> WorkerMessage | None:
    """The message in a frame; None for a blank one.

    Raises:
        InvalidRequest: `invalid_message`, saying why it can't be read.
    """
    return decoding.decode(_decoder, text)


class Undecodable(Struct):
    """What can be told of a frame that could not be decoded."""

    invocation_id: str | None
    function_id: str
    is_result: bool


def look_into(text: bytes) -> Undecodable:
    """Find the ids in the text of a frame that can't be decoded (protocol section 4.3)."""
    invocation = _INVOCATION_ID.search(text)
    function = _FUNCTION_ID.search(text)
    return Undecodable(
        invocation.group(1).decode(errors="replace") if invocation else None,
        function.group(1).decode(errors="replace") if function else "",
        _IS_RESULT.search(text) is not None,
    )


def present(raw: Raw) -> bytes | None:
    """An optional field: None where it is absent or null."""
    text = bytes(raw)
    return None if text in (b"", b"null") else text


def worker_registered(worker_id: str, reattach_token: str) -> bytes:
    """The greeting. Without `features`: section 3.16."""
    return _encode(
        {
            "type": "workerregistered",
            "worker_id": worker_id,
            "reattach_token": reattach_token,
        }
    )


def registration_rejected(namespace: str, function_id: str, owner_worker_id: str) -> bytes:
    """Told to a worker whose function id is taken."""
    return _encode(
        {
            "type": "registrationrejected",
            "code": "FUNCTION_NAMESPACE_CONFLICT",
            "namespace": namespace,
            "function_id": function_id,
            "owner_worker_id": owner_worker_id,
        }
    )


def trigger_registration_result(
    trigger_id: str, trigger_type: str, function_id: str, error: dict[str, str] | bytes
) -> bytes:
    """Told to a worker whose trigger could not be registered; `error` may be JSON text."""
    return _encode(
        {
            "type": "triggerregistrationresult",
            "id": trigger_id,
            "trigger_type": trigger_type,
            "function_id": function_id,
            "error": Raw(error) if isinstance(error, bytes) else error,
        }
    )


def register_trigger(message: RegisterTrigger) -> bytes:
    """A registration as it is forwarded to the provider of its type."""
    fields: dict[str, Any] = {
        "type": "registertrigger",
        "id": message.id,
        "trigger_type": message.trigger_type,
        "function_id": message.function_id,
        "config": Raw(bytes(message.config) or b"null"),
    }
    if (metadata := present(message.metadata)) is not None:
        fields["metadata"] = Raw(metadata)
    return _encode(fields)


def unregister_trigger(trigger_id: str, trigger_type: str) -> bytes:
    """Told to the provider of a trigger's type when the trigger is gone."""
    return _encode({"type": "unregistertrigger", "id": trigger_id, "trigger_type": trigger_type})


def invoke_function(
    invocation_id: str,
    function_id: str,
    data: bytes,
    *,
    traceparent: str | None,
    baggage: str | None,
    metadata: bytes | None,
) -> bytes:
    """A call to a worker's function (section 3.11)."""
    parts = [
        b'{"type":"invokefunction","invocation_id":',
        _encode(invocation_id),
        b',"function_id":',
        _encode(function_id),
        b',"data":',
        data,
        _tracing(traceparent, baggage),
    ]
    if metadata is not None:
        parts += (b',"metadata":', metadata)
    parts.append(b"}")
    return b"".join(parts)


def invocation_result(call: InvokeFunction, result: bytes | None) -> bytes:
    """The answer to a call that succeeded; without `result` where there is none."""
    return b"".join(
        (
            b'{"type":"invocationresult","invocation_id":',
            _encode(call.invocation_id),
            b',"function_id":',
            _encode(call.function_id),
            b"" if result is None else b',"result":' + result,
            _tracing(call.traceparent, call.baggage),
            b"}",
        )
    )


def invocation_error(call: InvokeFunction, error: bytes) -> bytes:
    """The answer to a call that failed; `error` is the JSON text of the error object."""
    return b"".join(
        (
            b'{"type":"invocationresult","invocation_id":',
            _encode(call.invocation_id),
            b',"function_id":',
            _encode(call.function_id),
            b',"error":',
            error,
            _tracing(call.traceparent, call.baggage),
            b"}",
        )
    )


def error_text(error: BrokerError) -> bytes:
    """The JSON text of an error object."""
    fields: dict[str, object] = {"code": error.code, "message": error.message}
    if error.retryable:
        fields["retryable"] = True
    return _encode(fields)


def with_caller(data: bytes, worker_id: str) -> bytes:
    """`data`, with `_caller_worker_id` when it is an object (section 4.1)."""
    text = data.lstrip()
    if not text.startswith(b"{"):
        return data
    caller = b'{"_caller_worker_id":' + _encode(worker_id)
    if b'"_caller_worker_id"' in text:  # forged, or a worker passes on what it was given
        members = _members.decode(text)
        members.pop("_caller_worker_id", None)
        text = _encode(members)
    rest = text[1:].lstrip()
    return caller + (b"}" if rest.startswith(b"}") else b"," + rest)


_members = msgspec.json.Decoder(dict[str, Raw])


def _tracing(traceparent: str | None, baggage: str | None) -> bytes:
    if traceparent is None and baggage is None:
        return b""
    parts = b""
    if traceparent is not None:
        parts += b',"traceparent":' + _encode(traceparent)
    if baggage is not None:
        parts += b',"baggage":' + _encode(baggage)
    return parts
