"""Both ends of a link agree on what is kept, whatever comes."""

from __future__ import annotations

from unittest.mock import patch

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from broker import sync_bodies
from broker.messages import Synced
from broker.sync_bodies import BODY_BYTES_MIN, ReceivedBodies, SentBodies

KEPT = 4 * BODY_BYTES_MIN
sizes = st.sampled_from(
    [0, 1, BODY_BYTES_MIN - 1, BODY_BYTES_MIN, 2 * BODY_BYTES_MIN, KEPT, KEPT + 1]
)
syncs_made = st.lists(
    st.tuples(st.sampled_from("abcdef"), sizes, st.sampled_from(b"xy")), max_size=60
)


def carried(synced: Synced) -> Synced:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(synced), type=Synced)


@given(syncs_made)
def test_what_was_left_out_is_put_in_again(syncs: list[tuple[str, int, int]]) -> None:
    sent, received = SentBodies(), ReceivedBodies()
    with (
        patch.object(sync_bodies, "KEPT_BYTES_MAX", KEPT),
        patch.object(sync_bodies, "BODY_BYTES_MAX", KEPT),
    ):
        last: dict[str, bytes] = {}
        kept: dict[int, int] = {}
        for number, (key, size, character) in enumerate(syncs):
            body = bytes([character]) * size
            synced = Synced(number, number, "e", b"head", body)
            sent.shorten(key, synced)
            if synced.body is None:
                assert last[key] == body
            last[key] = body
            got = carried(synced)
            received.complete(got)
            assert got.body == body
            for body_id in got.forgotten:
                del kept[body_id]
            if got.body_id:
                kept[got.body_id] = size
            assert sent.bytes == sum(kept.values()) <= KEPT


def test_the_same_body_is_carried_once() -> None:
    sent = SentBodies()
    body = b"x" * BODY_BYTES_MIN
    carried_bodies = []
    for number in range(5):
        synced = Synced(number, 7, "e", b"head", bytes(body))
        sent.shorten("a", synced)
        carried_bodies.append(synced.body)
    assert carried_bodies == [body, None, None, None, None]
    assert sent.shared_total == 4
