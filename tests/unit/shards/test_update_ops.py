"""The operations of `stream::update` against the recorded cases, and what those do not cover."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from broker.errors import InvalidRequest
from shards.update_ops import OPS_MAX, OpError, Outcome, apply_ops, ops_text, parse_ops

GOLDEN = Path(__file__).parents[2] / "golden" / "update_cases.json"
CASES: list[dict[str, Any]] = json.loads(GOLDEN.read_text())["cases"]

PREFIX = "Failed to deserialize input for stream::update: "
MERGE_REFUSED = {  # allowed difference 21: an error instead of silence; the value stays the same
    "merge root onto array is dropped silently": (0, "array"),
    "merge root onto string is dropped silently": (0, "string"),
    "merge root onto number is dropped silently": (0, "number"),
    "merge root onto null is dropped silently": (0, "null"),
    "remove root then merge root is dropped": (1, "null"),
}
ACCEPTED = {  # allowed difference 22: `by` as a finite float
    "increment by float": {"n": 2.5},
    "increment by integral float": {"n": 3.0},
    "decrement by float": {"n": 0.5},
}
KEPT_EXACTLY = {  # allowed difference 23: integers of any size
    "set integer past u64 becomes float": {"a": 2**64},
}
ARRAY_REFUSED = {  # allowed difference 19: payloads given as arrays
    "op given as array, tag first",
    "op is an empty array",
}


def same(left: Any, right: Any) -> bool:
    """Whether two decoded JSON values are equal, `1` and `1.0` being different."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float):
        return repr(left) == repr(right)  # -0.0 is not 0.0
    return bool(left == right)


def update(current: bytes | None, ops: str | bytes) -> Outcome:
    text = ops.encode() if isinstance(ops, str) else ops
    return apply_ops(current, parse_ops(text))


def refused(ops: str | bytes) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse_ops(ops.encode() if isinstance(ops, str) else ops)
    return caught.value


def wire_errors(outcome: Outcome) -> Any:
    return json.loads(msgspec.json.encode(outcome.errors))


def test_differences_name_recorded_cases() -> None:
    named = MERGE_REFUSED.keys() | ACCEPTED.keys() | KEPT_EXACTLY.keys() | ARRAY_REFUSED
    assert named <= {case["name"] for case in CASES}
    assert len(CASES) == 272


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_recorded_case(case: dict[str, Any]) -> None:
    name = case["name"]
    current = json.dumps(case["initial"]).encode() if "initial" in case else None
    ops = json.dumps(case["ops"]).encode()

    if name in ARRAY_REFUSED:
        error = refused(ops)
        assert (error.code, error.field) == ("deserialization_error", "ops[0]")
        return
    if "error" in case and name not in ACCEPTED:
        error = refused(ops)
        recorded = case["error"]["message"].removeprefix(PREFIX)
        assert error.code == case["error"]["code"]
        assert error.message.startswith(PREFIX)
        if recorded.startswith("missing field"):
            assert recorded in error.message
        return

    outcome = apply_ops(current, parse_ops(ops))
    value = json.loads(outcome.value)
    if name in ACCEPTED or name in KEPT_EXACTLY:
        assert same(value, (ACCEPTED | KEPT_EXACTLY)[name])
        assert outcome.errors == []
        return
    assert same(value, case["result"]["new_value"])
    assert same(value, case["stored"])
    errors = case["result"].get("errors", [])
    for error_ in errors:
        del error_["doc_url"]  # allowed difference 24
    if name in MERGE_REFUSED:
        index, kind = MERGE_REFUSED[name]
        message = f"Cannot merge at path 'root': target is {kind}, expected object."
        errors.append({"op_index": index, "code": "merge.target_not_object", "message": message})
    assert wire_errors(outcome) == errors


@pytest.mark.parametrize(
    ("ops", "field", "reason"),
    [
        ('{"type":"set"}', "ops", "object"),
        ("null", "ops", "null"),
        ('"x"', "ops", "str"),
        ("7", "ops", "int"),
        ("[null]", "ops[0]", "null"),
        ('[["set","a",1]]', "ops[0]", "array"),
        ('[{"type":"remove","path":"a"},{"type":"frob"}]', "ops[1].type", "`decrement`"),
        ('[{"type":"SET","path":"a"}]', "ops[0].type", "`set`"),
        ('[{"type":null,"path":"a"}]', "ops[0].type", "`set`"),
        ('[{"path":"a"}]', "ops[0].type", "missing field `type`"),
        ('[{"type":"set"}]', "ops[0].path", "missing field `path`"),
        ('[{"type":"set","path":["a"]}]', "ops[0].path", "array"),
        ('[{"type":"remove","path":null}]', "ops[0].path", "null"),
        ('[{"type":"merge","path":"a"}]', "ops[0].value", "missing field `value`"),
        ('[{"type":"merge","path":{},"value":{}}]', "ops[0].path", "object"),
        ('[{"type":"append","path":["a",1],"value":1}]', "ops[0].path[1]", "int"),
        ('[{"type":"increment","path":"a"}]', "ops[0].by", "missing field `by`"),
        ('[{"type":"increment","path":"a","by":"1"}]', "ops[0].by", "64 bits"),
        ('[{"type":"increment","path":"a","by":null}]', "ops[0].by", "64 bits"),
        ('[{"type":"increment","path":"a","by":true}]', "ops[0].by", "64 bits"),
        ('[{"type":"increment","path":"a","by":1e400}]', "ops[0].by", "finite"),
        ('[{"type":"increment","path":"a","by":9223372036854775808}]', "ops[0].by", "64 bits"),
        ('[{"type":"decrement","path":"a","by":-9223372036854775809}]', "ops[0].by", "64 bits"),
        ('[{"type":"decrement","path":"a","by":1' + "0" * 5000 + "}]", "ops[0].by", "64 bits"),
    ],
)
def test_shape_error_names_field_and_reason(ops: str, field: str, reason: str) -> None:
    error = refused(ops)
    assert error.code == "deserialization_error"
    assert error.field == field
    assert error.message.startswith(f"{PREFIX}{field}: ")
    assert reason in error.message


def test_shape_error_does_not_repeat_a_long_type() -> None:
    assert len(refused('[{"type":"' + "x - at `$[7]`" * 1000 + '"}]').message) < 200


@pytest.mark.parametrize("ops", [b"", b"[", b"[]]", b"[{]", b'[{"type":"set","path":"\xff"}]'])
def test_text_that_is_no_json_is_refused(ops: bytes) -> None:
    assert refused(ops).code == "deserialization_error"


def test_nesting_beyond_the_decoder_is_refused() -> None:
    deep = "[" * 100_000 + "]" * 100_000
    assert refused('[{"type":"set","path":"a","value":' + deep + "}]").code == (
        "deserialization_error"
    )


def test_number_of_ops_is_bounded() -> None:
    op = '{"type":"increment","path":"n","by":1}'
    assert update(None, f"[{','.join([op] * OPS_MAX)}]").value == b'{"n":1024}'
    error = refused(f"[{','.join([op] * (OPS_MAX + 1))}]")
    assert (error.code, error.field) == ("limit_exceeded", "ops")
    assert "1025" in error.message
    assert "1024" in error.message


def test_fields_may_come_in_any_order_and_unknown_ones_are_ignored() -> None:
    ops = '[{"x":[{}],"by":1,"path":"n","type":"increment"}]'
    assert update(b'{"n":1}', ops).value == b'{"n":2}'


def test_untouched_parts_keep_their_bytes() -> None:
    odd = (
        b'{"t":[ 1e400, -0.0 , 1E2],"u":123456789012345678901234567890,"v":{"b":1 , "a":"\\u00e9"}'
    )
    for ops, changed in [
        ('[{"type":"increment","path":"n","by":1}]', b'"n":2'),
        ('[{"type":"set","path":"n","value":{"k": 1e400}}]', b'"n":{"k": 1e400}'),
        ('[{"type":"merge","value":{"n": -0.0}}]', b'"n":-0.0'),
        ('[{"type":"merge","path":["n","m"],"value":{"x":1.50}}]', b'"n":{"m":{"x":1.50}}'),
    ]:
        outcome = update(odd + b',"n":1}', ops)
        assert outcome == Outcome(odd + b"," + changed + b"}", [])
    assert update(odd + b',"n":1}', '[{"type":"remove","path":"n"}]').value == odd + b"}"


def test_elements_keep_their_bytes_when_appended_to() -> None:
    ops = '[{"type":"append","path":"l","value":1e400},{"type":"append","path":"l","value":[ ]}]'
    outcome = update(b'{"l": [ 1.0 , -0.0 \n] }', ops)
    assert outcome == Outcome(b'{"l":[ 1.0 , -0.0,1e400,[ ]]}', [])
    assert update(b" [ \t ] ", '[{"type":"append","value":1}]').value == b"[1]"
    assert update(b'["["]', '[{"type":"append","value":1}]').value == b'["[",1]'


def test_strings_are_joined_as_they_are_spelled() -> None:
    ops = rb'[{"type":"append","value":"\u00e9\""},{"type":"append","value":""}]'
    assert update(rb'"a\\"', ops).value == rb'"a\\\u00e9\""'


def test_value_is_unchanged_to_the_byte_when_no_op_applies() -> None:
    current = b' { "a" : 1 } '
    assert update(current, "[]").value == current
    assert update(current, '[{"type":"append","value":1}]').value == current


def test_last_of_equal_keys_counts() -> None:
    current = b'{"a":1,"b":2,"a":3}'
    assert update(current, '[{"type":"increment","path":"a","by":1}]').value == b'{"a":4,"b":2}'


def test_prototype_keys_are_refused() -> None:
    outcome = update(
        b'{"a":1}',
        '[{"type":"merge","path":["__proto__","x"],"value":{"a":1}},'
        '{"type":"merge","value":{"constructor":{"p":1}}},'
        '{"type":"set","path":"prototype","value":1}]',
    )
    assert outcome.value == b'{"a":1}'
    assert [error.code for error in outcome.errors] == [
        "merge.path.proto_polluted",
        "merge.value.proto_polluted",
        "set.path.proto_polluted",
    ]


def test_numbers_stay_exact() -> None:
    outcome = update(
        b'{"id":"n","a":9007199254740993,"b":18446744073709551616,"c":1.0,"d":1e2,"e":-0.0,'
        b'"f":0.1234567890123456}',
        '[{"type":"increment","path":"a","by":1},{"type":"merge","value":{"g":1}}]',
    )
    assert outcome == Outcome(
        b'{"id":"n","a":9007199254740994,"b":18446744073709551616,"c":1.0,"d":1e2,"e":-0.0,'
        b'"f":0.1234567890123456,"g":1}',
        [],
    )


@pytest.mark.parametrize(
    ("stored", "by", "total"),
    [
        ("1", "2.0", "3.0"),  # a float makes a float
        ("1.0", "2", "3.0"),
        ("1e2", "1", "101.0"),
        ("-0.0", "0", "0.0"),
        ("-0", "0", "0"),
        ("18446744073709551615", "0.5", "18446744073709552000.0"),
        ("18446744073709551615", "0", "18446744073709551615"),
        ("18446744073709551616", "-1", None),  # stored beyond 64 bits
        ("18446744073709551616", "0.5", None),
        ("-9223372036854775809", "1", None),
        ("1" * 5000, "1", None),
        ("1e400", "1", None),
        ("1.7976931348623157e308", "1.7976931348623157e308", None),
    ],
)
def test_increment_of_numbers(stored: str, by: str, total: str | None) -> None:
    current = f'{{"n":{stored}}}'.encode()
    outcome = update(current, f'[{{"type":"increment","path":"n","by":{by}}}]')
    if total is None:
        message = "Expected number at path 'n', got number."
        assert outcome == Outcome(current, [OpError(0, "increment.not_number", message)])
    else:
        assert outcome.errors == []
        assert same(json.loads(outcome.value)["n"], json.loads(total))


def test_float_by_starts_a_missing_number() -> None:
    ops = '[{"type":"increment","path":"a","by":0.5},{"type":"decrement","path":"b","by":2.0}]'
    assert update(None, ops).value == b'{"a":0.5,"b":-2.0}'


def test_braces_in_a_path_are_plain_text() -> None:
    outcome = update(b"1", '[{"type":"append","path":"{x}{}","value":1}]')
    assert outcome.errors[0].message == (
        "Cannot append at path '[{x}{}]': target is number, expected object."
    )


def test_append_of_a_field_makes_a_missing_item_exist() -> None:
    ops = '[{"type":"append","path":"l","value":1},{"type":"increment","path":"","by":1}]'
    outcome = update(None, ops)
    assert outcome.value == b'{"l":[1]}'
    assert outcome.errors == [
        OpError(1, "increment.not_number", "Expected number at path 'root', got object.")
    ]


def test_a_value_may_be_put_in_twice() -> None:
    ops = parse_ops(b'[{"type":"merge","path":"a","value":{"l":[]}}]')
    more = parse_ops(b'[{"type":"append","path":["a","l"],"value":1}]')
    assert apply_ops(None, [*ops, *more, *ops]).value == b'{"a":{"l":[]}}'
    assert apply_ops(None, [*ops, *more, *more]).value == b'{"a":{"l":[1,1]}}'


def test_canonical_form_of_ops() -> None:
    ops = parse_ops(
        b'[{"path":"a","type":"set","x":1},{"type":"merge","path":null,"value":{"b": 1e400}},'
        b'{"value":1,"path":["a","b"],"type":"append"},{"by":2,"path":"n","type":"increment"},'
        b'{"by":2.0,"path":"n","type":"decrement"},{"path":"","type":"remove"},'
        b'{"type":"append","path":"","value":null},{"type":"append","path":[],"value":0}]'
    )
    assert ops_text(ops) == (
        b'[{"type":"set","path":"a","value":null},{"type":"merge","value":{"b": 1e400}},'
        b'{"type":"append","path":["a","b"],"value":1},{"type":"increment","path":"n","by":2},'
        b'{"type":"decrement","path":"n","by":2.0},{"type":"remove","path":""},'
        b'{"type":"append","path":"","value":null},{"type":"append","path":[],"value":0}]'
    )
    assert ops_text(parse_ops(ops_text(ops))) == ops_text(ops)
