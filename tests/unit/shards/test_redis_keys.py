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


databases = st.sampled_from([0, 1, 11])


def channels_of(keys: RedisKeys, group: Group) -> set[str]:
    """Where brokers tell one another something."""
    of_stream, own = keys.stream_channel(group.stream), keys.group_keys(group).channel
    return {of_stream, own, keys.present, keys.echo_channel("ab12")}


def names_under(prefix: str, group: Group, database: int = 0) -> set[str]:
    """Keys and channels, each of them that belongs to a group or to nobody in particular."""
    keys = RedisKeys(prefix, database)
    own = (keys.events, keys.listeners, keys.streams, probe_key(prefix, 1), copying_key(prefix))
    of_stream = (keys.groups_key(group.stream), *channels_of(keys, group))
    return {*keys.group_keys(group)[:5], *own, *of_stream}


@given(prefixes, prefixes, st.tuples(databases, databases), names, names)
def test_prefixes_share_nothing(
    prefix: str, more: str, pair: tuple[int, int], stream: str, group_id: str
) -> None:
    """Also where one begins the other, whatever groups are called."""
    assume(more)
    group, (database, other_database) = Group(stream, group_id), pair
    short, long = RedisKeys(prefix, database), RedisKeys(prefix + more, other_database)
    short_names = names_under(prefix, group, database)
    long_names = names_under(prefix + more, group, other_database)
    for one, other, found in ((short, long, long_names), (long, short, short_names)):
        assert all(name.startswith(other.prefix) for name in found)
        for name in found:
            assert one.group_of_data_key(name.encode()) is None
            for pattern in (one.data_pattern, one.head_pattern, one.own_pattern):
                assert not fnmatchcase(name, pattern)
    assert not short_names & long_names
    # A group of one that is called what a key of the other is.
    for name in long_names:
        end = name.removeprefix(prefix)
        assert not names_under(prefix, Group(end, end), database) & long_names


@given(prefixes, st.lists(databases, min_size=2, max_size=2, unique=True), names, names)
def test_databases_share_no_channel(
    prefix: str, pair: list[int], stream: str, group_id: str
) -> None:
    """But the original's, whatever groups are called; keys have the same names in all."""
    group = Group(stream, group_id)
    one, other = (RedisKeys(prefix, database) for database in pair)
    assert (one.events, one.listeners) == (other.events, other.listeners)
    assert one.group_keys(group)[:4] == other.group_keys(group)[:4]
    told = channels_of(one, group)
    assert not told & channels_of(other, group)
    for name in told:
        end = name.removeprefix(prefix)
        assert not told & channels_of(other, Group(end, end))


def test_channels_of_the_first_database_have_no_number() -> None:
    channels = channels_of(RedisKeys("x:"), Group("s", "g"))
    assert {"x:broker:changes:s", "x:broker:streams"} < channels
    assert not any("db0" in name for name in channels)


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
