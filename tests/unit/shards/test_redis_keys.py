"""Names in Redis: different for different groups, and of one slot for one group."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot

from broker.names import Group
from broker.redis_slots import prepare, slot_of
from shards.storage.redis_keys import (
    data_key,
    decoded,
    encoded,
    group_keys,
    group_of_data_key,
)

prepare()  # takes longer than an example may

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.text(
    ":%{}25A3*", max_size=8
)


@given(names)
def test_encoding_is_undone(name: str) -> None:
    assert ":" not in encoded(name)
    assert decoded(encoded(name)) == name


def test_what_is_not_encoded_here() -> None:
    for text in ("50%", "%2F", "%3a", "a:b", "%"):
        assert decoded(text) is None


@given(names, names)
def test_a_key_names_its_group(stream: str, group_id: str) -> None:
    group = Group(stream, group_id)
    assert group_of_data_key(data_key(group).encode()) == group


def test_keys_that_name_no_group() -> None:
    for key in (b"stream:a", b"stream:a:b:c", b"other:a:b", b"stream:\xff:b", b"stream:a:50%"):
        assert group_of_data_key(key) is None


def test_data_lies_where_the_original_has_it() -> None:
    assert data_key(Group("chat", "room-1")) == "stream:chat:room-1"
    assert data_key(Group("a:b", "50%")) == "stream:a%3Ab:50%25"


@given(names, names)
def test_all_keys_of_a_group_are_in_one_slot(stream: str, group_id: str) -> None:
    keys = group_keys(Group(stream, group_id))
    assert {key_slot(key.encode()) for key in keys[:5]} == {slot_of(keys.data)}
    assert len(set(keys[:5])) == 5
    assert not any(key.startswith("stream:") for key in keys[1:5])


def test_slots_with_braces() -> None:
    for key in ("123456789", "a{b}c", "{x}", "}{", "a{}b", "a{b", "{{x}}", "é{ü}"):
        assert slot_of(key) == key_slot(key.encode())
