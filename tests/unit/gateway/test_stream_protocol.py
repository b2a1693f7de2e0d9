"""What a client sends is a message, or is refused in one way."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import InvalidRequest
from gateway import stream_protocol as wire


@pytest.mark.parametrize(
    ("text", "field"),
    [
        (b'{"type":"required field"}', "type"),
        (b'{"type":"Object missing required field `x`"}', "type"),
        (b'{"type":"join"}', "data"),
        (b'{"type":"join","data":{"subscriptionId":"1","streamName":"s"}}', "data.groupId"),
        (b'{"type":"join","data":{"subscriptionId":1}}', "data.subscriptionId"),
        (b"[" * 100_000, None),
        (b"[" * 129 + b'"' + b'\\"' * 100_000, None),
        (b'{"type":"join","data":' + b'{"a":' * 100_000, None),
        (b'{"type":"join","data":{"subscriptionId":"\xff"}}', None),
    ],
)
def test_bad_messages(text: bytes, field: str | None) -> None:
    with pytest.raises(InvalidRequest) as raised:
        wire.decode(text)
    assert raised.value.field == field
    answer = msgspec.json.decode(wire.error_payload(raised.value, text))
    assert answer["event"]["type"] == "error"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "data", "subscriptionId", "streamName", "groupId", "id"]),
            inner | st.sampled_from(["join", "leave", "required field"]),
            max_size=4,
        )
    ),
    max_leaves=10,
)


@given(json_values.map(msgspec.json.encode) | st.binary(max_size=40))
def test_nothing_else_is_raised(text: bytes) -> None:
    with contextlib.suppress(InvalidRequest):
        wire.decode(text)
