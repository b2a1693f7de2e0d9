"""Which messages of others are for subscribers, and what is left of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shards.storage.redis_foreign import Foreign, foreign_of

UPDATE = {"type": "update", "data": {"id": "i"}}
ENVELOPE = {"type": "stream", "timestamp": 5, "streamName": "s", "groupId": "g", "id": "i"}


def parsed(**more: Any) -> Foreign | None:
    return foreign_of(json.dumps(ENVELOPE | {"event": UPDATE} | more).encode(), 10_000)


def test_what_is_told() -> None:
    found = parsed()
    assert found is not None
    assert (found.stream, found.group_id, found.item_id, found.type) == ("s", "g", "i", "stream")
    assert json.loads(found.event) == UPDATE


@pytest.mark.parametrize(
    "event",
    [
        {"type": "sync", "data": []},
        {"type": "create", "data": None},
        {"type": "delete", "data": 1.0},
        {"type": "event", "event": {"type": 't"', "data": {"a": [1]}}},
        {"type": "unauthorized"},
    ],
)
def test_every_kind_of_event_without_what_does_not_belong(event: dict[str, Any]) -> None:
    found = parsed(event=event | {"more": 1})
    assert found is not None
    assert json.loads(found.event) == event


def test_a_number_alone_does_not_make_it_a_brokers_own() -> None:
    assert parsed(seq=7) is not None
    assert parsed(epoch="e") is not None
    assert parsed(seq=7, epoch="e") is None


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"garbage",
        b"[]",
        json.dumps(ENVELOPE).encode(),
        json.dumps(ENVELOPE | {"event": UPDATE, "timestamp": "x"}).encode(),
        json.dumps(ENVELOPE | {"event": UPDATE, "groupId": 1}).encode(),
        json.dumps(ENVELOPE | {"event": {"type": "update"}}).encode(),
        json.dumps(ENVELOPE | {"event": {"type": "event"}}).encode(),
        json.dumps(ENVELOPE | {"event": {"type": "other", "data": 1}}).encode(),
        json.dumps(ENVELOPE | {"event": UPDATE, "groupId": "g" * 2000}).encode(),
        json.dumps(ENVELOPE | {"event": {"type": "update", "data": "x" * 10_000}}).encode(),
        b'{"type":"stream","timestamp":5,"streamName":"s","groupId":"g","event":'
        b'{"type":"update","data":"\xff"}}',
        b'{"type":"stream","timestamp":5,"streamName":"s","groupId":"g","event":'
        b'{"type":"update","data":' + b"[" * 500 + b"]" * 500 + b"}}",
        b"[" * 100_000,
    ],
)
def test_what_is_skipped(text: bytes) -> None:
    assert foreign_of(text, 10_000) is None
