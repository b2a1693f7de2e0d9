"""What commands print: values stay what they are, and nothing obeys or breaks a terminal."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from broker.output import (
    CHANGE_COLUMNS_MAX,
    Colour,
    Frame,
    KnownValues,
    Output,
    WatchView,
    changes,
    columns,
    cut,
    frames,
    json_line,
    json_lines,
    padded,
    printable,
    table,
)

texts = st.text(st.characters(exclude_categories=["Cs"]))
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
HARMFUL = "\x00\t\n\r\x1b\x7f\x85\x9b\u061c\u200e\u200f\u2028\u2029\u202a\u202e\u2066\u2069"


def is_harmless(text: str) -> bool:
    """Whether a terminal shows `text` and does nothing else."""
    return not any(c in HARMFUL or unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in text)


@given(texts)
@example(HARMFUL)
def test_what_is_printable_does_no_harm(text: str) -> None:
    shown = printable(text)
    assert is_harmless(shown)
    if is_harmless(text):
        assert shown == text


def test_harmful_characters_can_be_told() -> None:
    assert printable("a\x1b[1m\n\x9b\u202e\u00e9") == "a\\x1b[1m\\n\\x9b\\u202e\u00e9"


@given(values, st.sampled_from([None, 2]), st.booleans())
@example({HARMFUL: [HARMFUL]}, 2, False)
def test_json_stays_the_same_value(value: Any, indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only).encode()
    line, lines = json_line(text), json_lines(text)
    assert json.loads(line) == json.loads(lines) == value
    assert is_harmless(line)
    assert all(is_harmless(part) for part in lines.split("\n"))


def test_numbers_stay_as_they_were_written() -> None:
    text = b"[ 18446744073709551616, 12345678901234567890123, 1.0, 1e2, -0.0,\n 1E+400 ]"
    assert json_line(text) == "[18446744073709551616,12345678901234567890123,1.0,1e2,-0.0,1E+400]"
    assert "12345678901234567890123,\n" in json_lines(text)


@given(texts.map(printable), st.integers(0, 60))
@example("e\u0301" * 100, 3)
@example("\u90e8\u5c4b", 3)
def test_cut_fits(text: str, width: int) -> None:
    shown = cut(text, width)
    assert columns(shown) <= width
    if len(text) <= width and columns(text) <= width:
        assert shown == text
    elif width:
        assert shown.endswith("…")
        assert text.startswith(shown[:-1])


def test_columns_of_wide_and_combining_characters() -> None:
    assert [columns(t) for t in ("", "ab", "\u90e8\u5c4b", "e\u0301", "\U0001f4a1")] == [
        0,
        2,
        4,
        1,
        2,
    ]
    assert padded("\u90e8", 4) + "|" == "\u90e8  |"


def test_a_table_is_aligned_and_cut() -> None:
    rows = [["ITEM", "VALUE"], ["a", "1"], ["\u90e8\u5c4b 1", "x" * 50], ["n" * 60, "2"]]
    assert table(rows, 50) == [
        "ITEM" + " " * 36 + "  VALUE",
        "a" + " " * 39 + "  1",
        "\u90e8\u5c4b 1" + " " * 34 + "  xxxxxxx…",
        "n" * 39 + "…  2",
    ]
    assert table([], 50) == []
    assert table([["a", ""]], 50) == ["a"]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (None, '{"a": 1}', '{"a":1}'),
        ('{"a": 1, "b": 2}', '{"a":1,"b":2}', "(unchanged)"),
        ('{"a": 1, "b": 2}', '{"b": 2, "a": 1}', "(unchanged)"),
        ('{"a": 1, "b": 2}', '{"a": 1, "b": "x"}', 'b 2 → "x"'),
        ('{"a": 1}', '{"b": [1, 2]}', "-a 1  +b [1,2]"),
        ('{"a": {"x": 1}}', '{"a": {"x": 2}}', 'a {"x":1} → {"x":2}'),
        ('{"a": 1}', '{"a": 1.0}', "a 1 → 1.0"),
        ("null", '{"a": 1}', 'null → {"a":1}'),
        ("[1]", "[2]", "[1] → [2]"),
        ('{"\\u001b": 1}', "{}", "-\\x1b 1"),
        ("18446744073709551616", "18446744073709551617", "18446744073709551616 → …617"),
    ],
)
def test_changes(old: str | None, new: str, told: str) -> None:
    expected = told.replace("…617", "18446744073709551617")
    assert changes(None if old is None else old.encode(), new.encode()) == expected


def test_a_change_of_a_long_value_is_short() -> None:
    told = changes(b'{"t": "%b"}' % (b"a" * 999), b'{"t": "%b"}' % (b"b" * 999))
    assert columns(told) == len("t  → ") + 2 * CHANGE_COLUMNS_MAX


def test_known_values_are_bounded() -> None:
    known = KnownValues(bytes_max=10)
    known.put("a", b"1234")
    known.put("b", b"1234")
    known.put("a", b"12345")  # the younger of the two now
    known.put("c", b"123")
    assert [known.get(name) for name in ("a", "b", "c", None)] == [b"12345", None, b"123", None]
    known.put("d", b"x" * 11)
    assert [known.get(name) for name in ("a", "b", "c", "d")] == [None] * 4
    known.put("a", b"1234567890")
    known.remove("b")
    assert known.get("a") == b"1234567890"
    known.clear()
    assert known.get("a") is None


def frame(event: dict[str, Any], item_id: str | None = None, timestamp: int = 0) -> Frame:
    """A frame as it comes from the stream port."""
    envelope = {"type": "stream", "timestamp": timestamp, "id": item_id, "event": event}
    return frames.decode(msgspec.json.encode(envelope))


def watched(*seen: Frame, width: int = 80) -> list[str]:
    """What a view shows of frames, without the times, spaces joined."""
    view = WatchView(lambda text, _: text, width)
    return [" ".join(view.line(one).split()[1:]) for one in seen]


def test_watching_a_group() -> None:
    sync = {"type": "sync", "data": [{"n": 1}, 5], "ids": ["a", "b"]}
    assert watched(
        frame(sync),
        frame({"type": "update", "data": {"n": 2}}, "a"),
        frame({"type": "update", "data": 6}, "b"),
        frame({"type": "create", "data": {"x": "\x1b[1m"}}, "c\n"),
        frame({"type": "update", "data": {}}, "c\n"),
        frame({"type": "delete", "data": {}}, "c\n"),
        frame({"type": "update", "data": 7}, "c\n"),
        frame({"type": "event", "event": {"type": "typing", "data": {"by": "x"}}}),
        frame({"type": "error", "code": "shard_unavailable", "message": "wait\na bit"}),
        frame({"type": "resume"}),
        frame({"type": "sync", "data": []}),
        frame({"type": "update", "data": {"n": 3}}, "a"),
    ) == [
        "sync - 2 items",
        "update a n 1 → 2",
        "update b 5 → 6",
        'create c\\n {"x":"\\u001b[1m"}',
        'update c\\n -x "\\u001b[1m"',
        "delete c\\n {}",
        "update c\\n 7",
        'event - typing {"by":"x"}',
        "error - shard_unavailable: wait\\na bit",
        "resume -",
        "sync - 0 items",
        'update a {"n":3}',
    ]


def test_watching_an_item() -> None:
    assert watched(
        frame({"type": "sync", "data": None}, "a"),
        frame({"type": "create", "data": [1]}, "a"),
        frame({"type": "sync", "data": {"n": 1}}, "a"),
        frame({"type": "update", "data": {"n": 2}}, "a"),
    ) == ["sync a null", "create a [1]", 'sync a {"n":1}', "update a n 1 → 2"]


def test_what_a_worker_that_stores_a_stream_may_send() -> None:
    assert watched(
        frame({"type": "sync", "data": {"not": "a list"}}),
        frame({"type": "sync", "data": None}),
        frame({"type": "update", "data": 1}, "a"),
    ) == ['sync - {"not":"a list"}', "sync - null", "update a 1"]


@pytest.mark.parametrize("width", [1, 20, 40])
def test_a_watched_line_fits(width: int) -> None:
    view = WatchView(lambda text, _: text, width)
    line = view.line(frame({"type": "create", "data": "v" * 100}, "i" * 100))
    assert columns(line) <= max(width, len("00:00:00.000  update  12345678  "))


@pytest.mark.parametrize("timestamp", [0, -(2**53), 2**62, 1795594943898])
def test_any_timestamp_is_shown(timestamp: int) -> None:
    line = WatchView(lambda text, _: text, 80).line(frame({"type": "resume"}, None, timestamp))
    assert line.split()[1] == "resume"


def test_colours_only_where_asked_for() -> None:
    assert Output(False, True, 80).painted("a", Colour.RED) == "\x1b[31ma\x1b[0m"
    assert Output(False, True, 80).painted("", Colour.RED) == ""
    assert Output(False, False, 80).painted("a", Colour.RED) == "a"
