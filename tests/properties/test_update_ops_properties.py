"""`stream::update` on any value and any ops, against a plain model of protocol section 8."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker.errors import InvalidRequest
from shards.update_ops import Op, apply_ops, ops_text, parse_ops

KINDS = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
POLLUTING = ("__proto__", "constructor", "prototype")
MISSING = object()

unhurried = settings(  # the machine may be busy
    deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)

keys = st.sampled_from(["a", "b", "n", "a.b", "é", '"', "{}", "", "é" * 129, *POLLUTING])
integers = st.integers(-(2**63), 2**63 - 1) | st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63)])
floats = st.floats(allow_nan=False, allow_infinity=False)
scalars = (
    st.none()
    | st.booleans()
    | integers
    | st.sampled_from([2**63, 2**64 - 1, 2**64, -(2**63) - 1, 10**40])
    | floats
    | st.text(st.characters(codec="utf-8"), max_size=5)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=8,
)
objects = st.dictionaries(keys, values, max_size=4)
deep = st.integers(14, 19).flatmap(lambda levels: values.map(lambda v: nested(v, levels)))
segments = st.lists(keys, max_size=4) | st.lists(st.just("a"), min_size=31, max_size=34)
paths = {"path": keys}
long_paths = st.fixed_dictionaries({}, optional={"path": st.none() | keys | segments})
amounts = integers | floats


def nested(value: Any, levels: int) -> Any:
    for level in range(levels):
        value = [value] if level % 3 else {"a": value}
    return {"b": value}


def an_op(name: str, fields: dict[str, Any], **optional: Any) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries({"type": st.just(name), **fields}, optional=optional)


def with_path(op: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.tuples(op, long_paths).map(lambda parts: parts[0] | parts[1])


one_op = (
    an_op("set", paths, value=values)
    | with_path(an_op("merge", {"value": objects | values | deep}))
    | an_op("increment", {"path": keys, "by": amounts})
    | an_op("decrement", {"path": keys, "by": amounts})
    | with_path(an_op("append", {"value": values}))
    | an_op("remove", paths)
)
several_ops = st.lists(one_op, max_size=6)
stored = st.just(MISSING) | objects | values


class Refused(Exception):
    """Code and message of a failed op."""


def kind(value: Any) -> str:
    return KINDS.get(type(value), "number")


def depth(value: Any) -> int:
    match value:
        case dict():
            return 1 + max(map(depth, value.values()), default=0)
        case list():
            return 1 + max(map(depth, value), default=0)
    return 0


def model(initial: Any, ops: list[dict[str, Any]]) -> tuple[Any, list[tuple[int, str, str]]]:
    """What section 8 says, on decoded values; values are copied, never changed in place."""
    current, unset = ({}, True) if initial is MISSING else (initial, False)
    errors = []
    for index, op in enumerate(ops):
        try:
            current = model_op(op, json.loads(json.dumps(current)), unset)
            unset = False
        except Refused as refused:
            code, message = refused.args
            errors.append((index, f"{op['type']}.{code}", message))
    return current, errors


def model_op(op: dict[str, Any], current: Any, unset: bool) -> Any:
    name, path = op["type"], op.get("path")
    path = [] if path in (None, "") else [path] if isinstance(path, str) else path
    check_path(path)
    key = path[0] if path else "root"
    if name == "merge":
        return model_merge(path, op["value"], current)
    if path and not isinstance(current, dict):
        shown = f"[{', '.join(path)}]" if name == "append" else key
        raise Refused(
            "target_not_object",
            f"Cannot {name} at path '{shown}': target is {kind(current)}, expected object.",
        )
    match name:
        case "set":
            return current | {key: op.get("value")} if path else op.get("value")
        case "remove":
            return {k: v for k, v in current.items() if k != key} if path else None
        case "increment" | "decrement":
            by = op["by"] if name == "increment" else -op["by"]
            if path:
                return current | {key: model_sum(current.get(key, MISSING), by, key)}
            return model_sum(MISSING if unset else current, by, key)
        case _:
            return model_append(path, op["value"], current, unset)


def check_path(path: list[str]) -> None:
    if len(path) > 32:
        raise Refused("path.too_deep", f"Path depth {len(path)} exceeds maximum of 32")
    for segment in path:
        size = len(segment.encode())
        if segment == "":
            raise Refused("path.empty_segment", "Path contains an empty segment")
        if size > 256:
            message = f"Path segment of {size} bytes exceeds maximum of 256"
            raise Refused("path.segment_too_long", message)
        if segment in POLLUTING:
            message = f"Path segment '{segment}' is not allowed (prototype pollution)."
            raise Refused("path.proto_polluted", message)


def model_merge(path: list[str], value: Any, current: Any) -> Any:
    if not isinstance(value, dict):
        raise Refused("value.not_an_object", "Merge value must be a JSON object")
    for key in value:
        if key in POLLUTING:
            message = f'Merge value top-level key "{key}" is a prototype-pollution sink'
            raise Refused("value.proto_polluted", message)
    if depth(value) > 16:
        message = f"Merge value JSON nesting depth {depth(value)} exceeds maximum of 16"
        raise Refused("value.too_deep", message)
    if not path and not isinstance(current, dict):
        message = f"Cannot merge at path 'root': target is {kind(current)}, expected object."
        raise Refused("target_not_object", message)
    return model_merged(path, value, current)


def model_merged(path: list[str], value: Any, current: Any) -> Any:
    if not isinstance(current, dict):
        current = {}
    if not path:
        return current | value
    return current | {path[0]: model_merged(path[1:], value, current.get(path[0]))}


def model_sum(number: Any, by: float, name: str) -> Any:
    if number is MISSING:
        return by
    if kind(number) == "number":
        total = number + by if -(2**63) <= number < 2**64 or isinstance(number, float) else None
        if isinstance(total, float) and abs(total) != float("inf"):
            return total
        if isinstance(total, int) and -(2**63) <= total < 2**64:
            return total
    raise Refused("not_number", f"Expected number at path '{name}', got {kind(number)}.")


def model_append(path: list[str], value: Any, current: Any, unset: bool) -> Any:
    if not path:
        return model_appended(None if unset else current, value, "root")
    key = path[0]
    if len(path) == 1:
        return current | {key: model_appended(current.get(key), value, key)}
    parents = current
    for segment in path[:-1]:
        if not isinstance(parents.get(segment), dict):
            parents[segment] = {}
        parents = parents[segment]
    key = path[-1]
    missing = key not in parents
    parents[key] = [value] if missing else model_appended(parents[key], value, key)
    return current


def model_appended(target: Any, value: Any, name: str) -> Any:
    match target:
        case None:
            return value if isinstance(value, str) else [value]
        case list():
            return [*target, value]
        case str() if isinstance(value, str):
            return target + value
        case str():
            message = f"Expected string append value at path '{name}', got {kind(value)}."
        case _:
            message = (
                f"Cannot append at path '{name}': target is {kind(target)}, "
                "expected array, string, null, or missing field."
            )
    raise Refused("type_mismatch", message)


def text_of(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def parsed_or_error(text: bytes) -> list[Op] | InvalidRequest:
    try:
        return parse_ops(text)
    except InvalidRequest as error:
        return error


def spelled(value: Any) -> str:
    """A form in which `1` and `1.0`, `0.0` and `-0.0` differ, and the order of keys counts."""
    return repr(value)


@unhurried
@given(stored, several_ops)
def test_agrees_with_the_model(initial: Any, ops: list[dict[str, Any]]) -> None:
    current = None if initial is MISSING else text_of(initial)
    outcome = apply_ops(current, parse_ops(text_of(ops)))
    value, errors = model(initial, ops)
    assert spelled(json.loads(outcome.value)) == spelled(value)
    assert [(e.op_index, e.code, e.message) for e in outcome.errors] == errors


@unhurried
@given(stored, several_ops)
def test_canonical_form_means_the_same(initial: Any, ops: list[dict[str, Any]]) -> None:
    current = None if initial is MISSING else text_of(initial)
    parsed = parse_ops(text_of(ops))
    canonical = ops_text(parsed)
    assert apply_ops(current, parse_ops(canonical)) == apply_ops(current, parsed)
    assert ops_text(parse_ops(canonical)) == canonical


@unhurried
@given(
    values
    | st.lists(values, max_size=2)
    | st.lists(
        st.tuples(
            one_op,
            st.dictionaries(st.sampled_from(["type", "path", "value", "by"]), values, max_size=2),
        ).map(lambda parts: parts[0] | parts[1]),
        max_size=3,
    )
)
def test_any_ops_apply_or_are_refused_with_a_field(ops: Any) -> None:
    parsed = parsed_or_error(text_of(ops))
    if isinstance(parsed, InvalidRequest):
        assert parsed.code == "deserialization_error"
        assert parsed.field is not None
        assert parsed.field.startswith("ops")
        assert f": {parsed.field}: " in parsed.message
    else:
        json.loads(apply_ops(None, parsed).value)


@unhurried
@given(st.binary(max_size=40) | values.map(text_of).map(lambda text: text[:-1]))
def test_any_bytes_are_ops_or_refused(text: bytes) -> None:
    parsed = parsed_or_error(text)
    assert isinstance(parsed, list) or parsed.code == "deserialization_error"


odd_values = values.map(text_of) | st.sampled_from(
    [b"1e400", b"-0.0", b"-0", b"1.50", b"1E2", b"1" * 60, b'"\\u0061\\/"', b'{ "z":1,"z" : [ ] }']
)


@unhurried
@given(
    st.dictionaries(st.text("xyz", min_size=1, max_size=3), odd_values, max_size=5),
    st.none() | odd_values,
    st.lists(
        one_op.map(lambda op: op | {"path": "touched"} if op["type"] != "merge" else op).filter(
            lambda op: op["type"] != "merge" or op.get("path") not in (None, "", [])
        ),
        max_size=4,
    ),
)
def test_untouched_keys_keep_their_bytes_and_order(
    untouched: dict[str, bytes], touched: bytes | None, ops: list[dict[str, Any]]
) -> None:
    members = [b'"%b" : %b' % (key.encode(), text) for key, text in untouched.items()]
    if touched is not None:
        members.insert(len(members) // 2, b'"touched":%b' % touched)
    outcome = apply_ops(b"{ %b}" % b" , ".join(members), parse_ops(text_of(ops)))
    after = msgspec.json.decode(outcome.value, type=dict[str, msgspec.Raw])
    kept = {key: bytes(text) for key, text in after.items() if key in untouched}
    assert list(kept.items()) == list(untouched.items())
