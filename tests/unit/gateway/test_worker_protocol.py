"""What a worker sends is a message, or is refused in one way."""

from __future__ import annotations

import contextlib

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import InvalidRequest
from gateway import worker_protocol as wire

FIELDS = [
    "type", "id", "function_id", "trigger_type", "config", "metadata", "namespace", "data",
    "invocation_id", "action", "queue", "result", "error", "reattach_token", "description",
]  # fmt: skip
TYPES = [
    "invokefunction", "invocationresult", "registerfunction", "registertrigger", "reattach",
    "registertriggertype", "unregistertrigger", "ping", "void", "enqueue", "nope",
]  # fmt: skip

json_values = st.recursive(
    st.none()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(FIELDS), inner | st.sampled_from(TYPES), max_size=6)
    ),
    max_leaves=12,
)


@given(json_values.map(msgspec.json.encode) | st.binary(max_size=60))
def test_nothing_else_is_raised(text: bytes) -> None:
    with contextlib.suppress(InvalidRequest):
        wire.decode(text)
    wire.look_into(text)


@given(json_values)
def test_the_caller_is_put_into_objects_only(value: object) -> None:
    text = msgspec.json.encode(value)
    told = msgspec.json.decode(wire.with_caller(text, "w"))
    if isinstance(value, dict):
        assert told == value | {"_caller_worker_id": "w"}
    else:
        assert wire.with_caller(text, "w") == text
