"""Ops of any spelling and any damage on any stored value: refused by field, or applied."""

from __future__ import annotations

import json

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from broker.errors import InvalidRequest
from shards.update_ops import Op, apply_ops, ops_text, parse_ops

unhurried = settings(  # the machine may be busy
    deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)

NAMES = ["set", "merge", "increment", "decrement", "append", "remove"]

spaces = st.sampled_from(["", "", "", " ", "\n", "\t \r\n"])
texts = st.sampled_from(
    [
        r'"a"',
        r'"b"',
        r'"n"',
        r'""',
        r'"\u0061"',
        r'"\/"',
        r'"é"',
        r'"\u00e9"',
        r'"\ud83d\ude00"',
        r'"a.b"',
        r'"\""',
        r'"\\"',
        r'"ÿ"',
        r'"\t"',
    ]
) | st.sampled_from(
    [r'"__proto__"', r'"\u005f_proto__"', r'"constructor"', '"\x7f"', '"\U0010ffff"']
)
numbers = st.sampled_from(
    [
        "0",
        "-0",
        "1",
        "-1",
        "1.0",
        "1.50",
        "-0.0",
        "1e2",
        "1E+2",
        "1e-400",
        "0.1",
        "1e308",
        "-1e308",
        "1e400",
        "-1e400",
    ]
) | st.sampled_from(
    [
        *map(str, (2**53 + 1, 2**63 - 1, -(2**63), 2**63, 2**64 - 1, 2**64)),
        *("9" * 60, "1" * 5000),
    ]
)
words = st.sampled_from(["null", "true", "false"])


def array_of(inner: st.SearchStrategy[str], max_size: int = 3) -> st.SearchStrategy[str]:
    """The text of an array, spaced in any way."""
    return st.tuples(st.lists(inner, max_size=max_size), spaces).map(
        lambda parts: f"[{parts[1]}{(',' + parts[1]).join(parts[0])}{parts[1]}]"
    )


def object_of(
    keys: st.SearchStrategy[str], inner: st.SearchStrategy[str], max_size: int = 4
) -> st.SearchStrategy[str]:
    """The text of an object; keys may come twice."""
    members = st.lists(st.tuples(keys, inner, spaces), max_size=max_size)
    return members.map(
        lambda found: "{" + ",".join(f"{s}{k}{s}:{s}{v}{s}" for k, v, s in found) + "}"
    )


any_json = st.recursive(
    texts | numbers | words,
    lambda inner: array_of(inner) | object_of(texts, inner),
    max_leaves=8,
)
nested = st.tuples(any_json, st.integers(1, 127)).map(lambda p: "[" * p[1] + p[0] + "]" * p[1])
paths = texts | array_of(texts) | any_json
op_names = st.sampled_from([f'"{name}"' for name in NAMES] + ['"s\\u0065t"', '"Set"', "null", "1"])


def op_of(
    names: st.SearchStrategy[str], path: st.SearchStrategy[str], by: st.SearchStrategy[str]
) -> st.SearchStrategy[str]:
    """The text of an op with fields of any kind, in any order, some missing or too many."""
    members = st.fixed_dictionaries(
        {"type": names, "path": path},
        optional={"value": any_json | nested, "by": by, "unknown": any_json | nested},
    ).flatmap(lambda fields: st.permutations(list(fields.items())))
    return members.map(lambda found: "{" + ",".join(f'"{k}":{v}' for k, v in found) + "}")


plausible = op_of(st.sampled_from([f'"{name}"' for name in NAMES]), texts, numbers)
odd = op_of(op_names, paths, any_json)
ops_texts = array_of(plausible | odd, 5) | array_of(plausible, 6) | any_json
stored_texts = st.none() | object_of(texts, any_json) | any_json


def parsed_or_error(text: bytes) -> list[Op] | InvalidRequest:
    try:
        return parse_ops(text)
    except InvalidRequest as error:
        return error


def parsed_or_none(text: bytes) -> list[Op] | None:
    """The ops, or None when they are refused as they should be."""
    parsed = parsed_or_error(text)
    if not isinstance(parsed, InvalidRequest):
        return parsed
    assert parsed.code in ("deserialization_error", "limit_exceeded")
    assert parsed.field is not None
    assert parsed.field.startswith("ops")
    assert parsed.field in parsed.message
    parsed.message.encode()
    return None


def meaning(text: bytes) -> str:
    """A value in a form in which all spellings of the same are equal, and nothing else is."""
    return repr(json.loads(text, parse_int=str))


def check(current: bytes | None, ops: list[Op]) -> None:
    outcome = apply_ops(current, ops)
    meaning(outcome.value)  # it is JSON
    indexes = [error.op_index for error in outcome.errors]
    assert indexes == sorted(set(indexes))
    for error in outcome.errors:
        assert error.code.startswith(f"{type(ops[error.op_index]).__name__.lower()}.")
        error.message.encode()
    if len(outcome.errors) == len(ops):
        assert outcome.value == (b"{}" if current is None else current)
    canonical = ops_text(ops)
    assert apply_ops(current, parse_ops(canonical)) == outcome


@unhurried
@given(stored_texts, ops_texts)
def test_any_spelling_is_refused_or_applied(stored: str | None, ops: str) -> None:
    parsed = parsed_or_none(ops.encode())
    if parsed is not None:
        check(None if stored is None else stored.encode(), parsed)


@unhurried
@given(object_of(texts, any_json) | any_json, st.lists(plausible | odd, max_size=6))
def test_ops_in_one_call_or_one_by_one(stored: str, ops: list[str]) -> None:
    current = stored.encode()
    each = [parsed for op in ops if (parsed := parsed_or_none(f"[{op}]".encode())) is not None]
    together = apply_ops(current, [op for parsed in each for op in parsed])
    failed = []
    for index, parsed in enumerate(each):
        outcome = apply_ops(current, parsed)
        failed += [(index, error.code, error.message) for error in outcome.errors]
        current = outcome.value
    assert meaning(current) == meaning(together.value)
    assert [(e.op_index, e.code, e.message) for e in together.errors] == failed


@unhurried
@given(
    stored_texts,
    array_of(plausible | odd, 3),
    st.lists(
        st.tuples(st.integers(0, 400), st.integers(0, 3), st.binary(max_size=3)),
        min_size=1,
        max_size=3,
    ),
)
def test_damaged_text_is_refused_or_applied(
    stored: str | None, ops: str, damage: list[tuple[int, int, bytes]]
) -> None:
    text = bytearray(ops.encode())
    for at, length, replacement in damage:
        start = at % (len(text) + 1)
        text[start : start + length] = replacement
    assume(is_utf8(text))  # a gateway lets nothing else through
    parsed = parsed_or_none(bytes(text))
    if parsed is not None:
        meaning(bytes(text))  # what was taken is JSON
        check(None if stored is None else stored.encode(), parsed)


def is_utf8(text: bytes | bytearray) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
