"""Names in Redis: different for different groups, and of one slot for one group."""

from __future__ import annotations

from fnmatch import fnmatchcase

from hypothesis import assume, given
from hypothesis import strategies as st
from redis.crc import key_slot

from broker.names import Group
from broker.redis_client import copying_key
from broker.redis_slots import prepare, probe_key, slot_of
from shards.storage.redis_keys import RedisKeys, decoded, encoded

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


prefix_names = st.sampled_from(
    ["a", "ab", "streams", "mybroker", "groups", "changes", "streams%3A", "head", "é", "-"]
)
prefixes = st.lists(prefix_names, max_size=3).map(lambda found: "".join(f"{n}:" for n in found))
"""As the configuration allows them."""


@given(prefixes, names, names)
def test_a_key_names_its_group(prefix: str, stream: str, group_id: str) -> None:
    keys, group = RedisKeys(prefix), Group(stream, group_id)
    assert keys.group_of_data_key(keys.data_key(group).encode()) == group
    assert keys.group_of_head_key(keys.group_keys(group).head.encode()) == group


def test_keys_that_name_no_group() -> None:
    for key in (b"stream:a", b"stream:a:b:c", b"other:a:b", b"stream:\xff:b", b"stream:a:50%"):
        assert RedisKeys().group_of_data_key(key) is None
        assert RedisKeys("x:").group_of_data_key(b"x:" + key) is None
    for key in (b"stream:a:b", b"y:stream:a:b", b"x:x:stream:a:b", b"xx:stream:a:b"):
        assert RedisKeys("x:").group_of_data_key(key) is None


def names_under(prefix: str, group: Group) -> set[str]:
    """Keys and channels, each of them that belongs to a group or to nobody in particular."""
    keys = RedisKeys(prefix)
    own = (keys.events, keys.listeners, keys.streams, probe_key(prefix, 1), copying_key(prefix))
    of_stream = (keys.groups_key(group.stream), keys.stream_channel(group.stream))
    return {*keys.group_keys(group)[:5], *own, *of_stream}


@given(prefixes, prefixes, names, names)
def test_prefixes_share_nothing(prefix: str, more: str, stream: str, group_id: str) -> None:
    """Also where one begins the other, whatever groups are called."""
    assume(more)
    group = Group(stream, group_id)
    short, long = RedisKeys(prefix), RedisKeys(prefix + more)
    for one, other in ((short, long), (long, short)):
        found = names_under(other.prefix, group)
        assert all(name.startswith(other.prefix) for name in found)
        for name in found:
            assert one.group_of_data_key(name.encode()) is None
            for pattern in (one.data_pattern, one.head_pattern, one.own_pattern):
                assert not fnmatchcase(name, pattern)
    assert not names_under(short.prefix, group) & names_under(long.prefix, group)
    # A group of one that is called what a key of the other is.
    for name in names_under(long.prefix, group):
        end = name.removeprefix(prefix)
        assert not names_under(short.prefix, Group(end, end)) & names_under(long.prefix, group)


def test_data_lies_where_the_original_has_it() -> None:
    assert RedisKeys().data_key(Group("chat", "room-1")) == "stream:chat:room-1"
    assert RedisKeys().data_key(Group("a:b", "50%")) == "stream:a%3Ab:50%25"
    assert RedisKeys("x:").data_key(Group("chat", "room-1")) == "x:stream:chat:room-1"


@given(prefixes, names, names)
def test_all_keys_of_a_group_are_in_one_slot(prefix: str, stream: str, group_id: str) -> None:
    keys = RedisKeys(prefix).group_keys(Group(stream, group_id))
    assert {key_slot(key.encode()) for key in keys[:5]} == {slot_of(keys.data)}
    assert len(set(keys[:5])) == 5
    assert not any(key.startswith(f"{prefix}stream:") for key in keys[1:5])


def test_slots_with_braces() -> None:
    for key in ("123456789", "a{b}c", "{x}", "}{", "a{}b", "a{b", "{{x}}", "é{ü}"):
        assert slot_of(key) == key_slot(key.encode())
