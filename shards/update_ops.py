"""The operations of `stream::update` on one item's value: pure, on JSON text (protocol section 8).

Only the levels that a path walks are decoded, into `dict[str, Raw]`. What an op does not touch is
carried as the bytes that were stored, so it keeps its numbers of any size and spelling.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import isfinite
from typing import Annotated, assert_never

import msgspec
from msgspec import Meta, Raw, Struct

from broker import json_text
from broker.errors import InvalidRequest

OPS_MAX = 1024
"""Ops that one call may hold."""
SEGMENTS_MAX = 32
"""Segments that a path may have."""
SEGMENT_BYTES_MAX = 256
"""Bytes of UTF-8 that a segment of a path may have."""
MERGE_KEYS_MAX = 1024
"""Keys that the value of a merge may have at its top level."""
MERGE_DEPTH_MAX = 16
"""Levels of arrays and objects that the value of a merge may nest."""

_I64_MIN, _I64_MAX, _U64_MAX = -(2**63), 2**63 - 1, 2**64 - 1
_INTEGER_TEXT_MAX = 20  # characters of the longest integers of 64 bits
_POLLUTING = frozenset({"__proto__", "constructor", "prototype"})
_NULL = Raw(b"null")

By = Annotated[int, Meta(ge=_I64_MIN, le=_I64_MAX)] | float


class _Op(Struct, frozen=True, tag_field="type", tag=str.lower):
    """An op; `type` on the wire is the name of its class in lower case."""


class Set(_Op, frozen=True):
    """Replace the root, or one key of it."""

    path: str
    value: Raw = _NULL


class Merge(_Op, frozen=True, kw_only=True, omit_defaults=True):
    """Put the keys of an object into the object at the path."""

    path: str | list[str] | None = None
    value: Raw


class Increment(_Op, frozen=True):
    """Add to a number."""

    path: str
    by: By


class Decrement(_Op, frozen=True):
    """Subtract from a number."""

    path: str
    by: By


class Append(_Op, frozen=True, kw_only=True, omit_defaults=True):
    """Add an element to an array, or text to a string."""

    path: str | list[str] | None = None
    value: Raw


class Remove(_Op, frozen=True):
    """Make the root null, or remove one key of it."""

    path: str


Op = Set | Merge | Increment | Decrement | Append | Remove


class OpError(Struct, frozen=True):
    """Why one op was skipped, in the form that goes over the wire (protocol section 8.4)."""

    op_index: int
    code: str
    message: str


class Outcome(Struct, frozen=True):
    """What to store, as JSON text, and the ops that failed, in their order."""

    value: bytes
    errors: list[OpError]


class _Growing:
    """An array or string that is being appended to, as JSON text that grows in place.

    With it, many appends in one call cost no copy of the whole value each.
    """

    __slots__ = ("text",)

    def __init__(self, text: Raw) -> None:
        self.text = bytearray(text)

    def add_element(self, element: Raw) -> None:
        """Add the JSON text `element` to the array."""
        del self.text[-1]
        while self.text[-1] in b" \t\r\n":
            del self.text[-1]
        if len(self.text) > 1:
            self.text += b","
        self.text += memoryview(element)
        self.text += b"]"

    def add_text(self, string: Raw) -> None:
        """Add what the JSON string `string` holds to the string."""
        self.text[-1:] = memoryview(string)[1:]


_Node = Raw | dict[str, "_Node"] | _Growing  # not decoded; decoded; appended to
_Object = dict[str, _Node]


class _Refused(Exception):
    """An op that does not apply; `reason` is the code's part after the op's name."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


def _raw_of(node: object) -> Raw:
    assert isinstance(node, _Growing)
    return Raw(bytes(node.text))


_OPS = msgspec.json.Decoder(list[Op])
_OBJECT: msgspec.json.Decoder[_Object] = msgspec.json.Decoder(dict[str, Raw])
_ENCODER = msgspec.json.Encoder(enc_hook=_raw_of)
_encode = _ENCODER.encode

_PLACE = re.compile(r"(?P<reason>.*) - at `\$(?P<place>.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>\w+)`")


def parse_ops(ops: bytes) -> list[Op]:
    """The ops of a call.

    Args:
        ops: the JSON text of the field `ops`, UTF-8.

    Raises:
        InvalidRequest: `deserialization_error`, the message names the field (`ops[1].by`) and
            the reason; `limit_exceeded` when there are more than `OPS_MAX`.
    """
    try:
        parsed: list[Op] = _OPS.decode(ops)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _shape_error(str(error)) from error
    if len(parsed) > OPS_MAX:
        raise InvalidRequest(
            "limit_exceeded", f"ops has {len(parsed)} elements, the limit is {OPS_MAX}", "ops"
        )
    return parsed


def _shape_error(error: str) -> InvalidRequest:
    """What the decoder found, told by field."""
    found = _PLACE.fullmatch(error)
    field, reason = ("ops" + found["place"], found["reason"]) if found else ("ops", error)
    if missing := _MISSING.fullmatch(reason):
        field, reason = f"{field}.{missing['name']}", f"missing field `{missing['name']}`"
    elif field.endswith(".type"):  # the decoder's words repeat what was sent, of any length
        reason = "expected one of `set`, `merge`, `increment`, `decrement`, `append`, `remove`"
    elif field.endswith(".by"):
        reason += "; expected an integer of 64 bits or a finite number"
    return InvalidRequest(
        "deserialization_error",
        f"Failed to deserialize input for stream::update: {field}: {reason}",
        field,
    )


def ops_text(ops: Sequence[Op]) -> bytes:
    """The ops as JSON text in canonical form (protocol section 10.4).

    A set without value has `"value": null`; paths that are absent or null are left out.
    """
    return _encode(ops)


def apply_ops(current: bytes | None, ops: Sequence[Op]) -> Outcome:
    """Apply the ops in order; one that fails changes nothing and is skipped.

    Args:
        current: the stored value, JSON text in UTF-8; None when the item is missing.
        ops: from `parse_ops`.

    Returns:
        What to store, also when nothing changed, and the errors. If no op applied, the value is
        `current` to the byte, or `{}` for a missing item.
    """
    document = _Document(current)
    errors: list[OpError] = []
    for index, op in enumerate(ops):
        try:
            document.apply(op)
        except _Refused as refused:
            code = f"{op.__struct_config__.tag}.{refused.reason}"
            errors.append(OpError(index, code, refused.message))
    if len(errors) == len(ops):
        return Outcome(b"{}" if current is None else current, errors)
    return Outcome(document.encode(), errors)


class _Document:
    """A value between two ops.

    The root is kept under the key `""` of `holder`, so that it has a parent like all else.
    """

    __slots__ = ("holder", "unset")

    def __init__(self, current: bytes | None) -> None:
        self.unset = current is None
        root: _Node = {} if current is None else Raw(current.strip())
        self.holder: _Object = {"": root}

    def encode(self) -> bytes:
        """The value as JSON text."""
        return _encode(self.holder[""])

    def apply(self, op: Op) -> None:
        """Apply one op.

        Raises:
            _Refused: it does not apply; the value is what it was.
        """
        segments = _segments(op.path)
        match op:
            case Set():
                self._set(segments, op.value)
            case Merge():
                self._merge(segments, op.value)
            case Increment():
                self._add("increment", segments, op.by)
            case Decrement():
                self._add("decrement", segments, -op.by)
            case Append():
                self._append(segments, op.value)
            case Remove():
                self._remove(segments)
            case _:
                assert_never(op)
        self.unset = False

    def _set(self, segments: list[str], value: Raw) -> None:
        if segments:
            self._root("set", segments[0])[segments[0]] = value
        else:
            self.holder[""] = value

    def _merge(self, segments: list[str], value: Raw) -> None:
        members = _merge_members(value)
        if segments:
            target = _enter(self.holder, "")
            for segment in segments:
                target = _enter(target, segment)
        else:
            target = self._root("merge", "root")
        target.update(members)

    def _add(self, verb: str, segments: list[str], by: int | float) -> None:
        parent, key, name, missing = self._place(verb, segments)
        parent[key] = Raw(_encode(by)) if missing else _sum(parent[key], by, name)

    def _append(self, segments: list[str], value: Raw) -> None:
        if len(segments) > 1:
            parent = self._root("append", f"[{', '.join(segments)}]")
            for segment in segments[:-1]:
                # Replacing a parent is safe: then the last key is missing, and nothing can fail.
                parent = _enter(parent, segment)
            key = name = segments[-1]
            if key not in parent:  # a list also for strings, unlike elsewhere
                parent[key] = _list_of(value)
                return
            missing = False
        else:
            parent, key, name, missing = self._place("append", segments, "[{}]")
        node = _NULL if missing else parent[key]
        kind, value_kind = _kind(node), _kind(value)
        if kind == "null":
            parent[key] = value if value_kind == "string" else _list_of(value)
        elif kind == "array":
            _growing(parent, key).add_element(value)
        elif kind != "string":
            raise _Refused(
                "type_mismatch",
                f"Cannot append at path '{name}': target is {kind}, "
                "expected array, string, null, or missing field.",
            )
        elif value_kind == "string":
            _growing(parent, key).add_text(value)
        else:
            raise _Refused(
                "type_mismatch",
                f"Expected string append value at path '{name}', got {value_kind}.",
            )

    def _remove(self, segments: list[str]) -> None:
        if segments:
            self._root("remove", segments[0]).pop(segments[0], None)
        else:
            self.holder[""] = _NULL

    def _place(
        self, verb: str, segments: list[str], shown: str = "{}"
    ) -> tuple[_Object, str, str, bool]:
        """Parent, key, name in messages, and whether it is missing, of the root or a key of it."""
        if not segments:
            return self.holder, "", "root", self.unset
        key = segments[0]
        root = self._root(verb, shown.format(key))
        return root, key, key, key not in root

    def _root(self, verb: str, path: str) -> _Object:
        """The members of the root; `path` is for the message.

        Raises:
            _Refused: the root is no object.
        """
        root = _members(self.holder, "")
        if root is None:
            kind = _kind(self.holder[""])
            raise _Refused(
                "target_not_object",
                f"Cannot {verb} at path '{path}': target is {kind}, expected object.",
            )
        return root


def _segments(path: str | list[str] | None) -> list[str]:
    """The keys that a path names from the root, checked; empty for the root itself.

    Raises:
        _Refused: protocol section 8.2.
    """
    if not path:
        return []
    segments = [path] if isinstance(path, str) else path
    if len(segments) > SEGMENTS_MAX:
        raise _Refused(
            "path.too_deep", f"Path depth {len(segments)} exceeds maximum of {SEGMENTS_MAX}"
        )
    for segment in segments:
        if not segment:
            raise _Refused("path.empty_segment", "Path contains an empty segment")
        if (size := len(segment.encode())) > SEGMENT_BYTES_MAX:
            raise _Refused(
                "path.segment_too_long",
                f"Path segment of {size} bytes exceeds maximum of {SEGMENT_BYTES_MAX}",
            )
        if segment in _POLLUTING:
            raise _Refused(
                "path.proto_polluted",
                f"Path segment '{segment}' is not allowed (prototype pollution).",
            )
    return segments


def _merge_members(value: Raw) -> _Object:
    """What a merge puts into its target.

    Raises:
        _Refused: not an object, too many keys, a key that is not allowed, or too deep.
    """
    if _kind(value) != "object":
        raise _Refused("value.not_an_object", "Merge value must be a JSON object")
    members = _OBJECT.decode(value)
    if len(members) > MERGE_KEYS_MAX:
        raise _Refused(
            "value.too_many_keys",
            f"Merge value has {len(members)} top-level keys, exceeds maximum of {MERGE_KEYS_MAX}",
        )
    for key in members:
        if key in _POLLUTING:
            raise _Refused(
                "value.proto_polluted",
                f'Merge value top-level key "{key}" is a prototype-pollution sink',
            )
    text = bytes(value)
    brackets = text.count(b"[") + text.count(b"{")  # few can't nest deep, and counting is cheap
    if brackets > MERGE_DEPTH_MAX and (depth := json_text.depth(text)) > MERGE_DEPTH_MAX:
        raise _Refused(
            "value.too_deep",
            f"Merge value JSON nesting depth {depth} exceeds maximum of {MERGE_DEPTH_MAX}",
        )
    return members


_KINDS = {
    ord("{"): "object",
    ord("["): "array",
    ord('"'): "string",
    ord("t"): "boolean",
    ord("f"): "boolean",
    ord("n"): "null",
}


def _kind(node: _Node) -> str:
    """The JSON type of a node, by its first byte."""
    if isinstance(node, dict):
        return "object"
    text = node.text if isinstance(node, _Growing) else memoryview(node)
    return _KINDS.get(text[0], "number")


def _members(parent: _Object, key: str) -> _Object | None:
    """The members of the object under the key, decoded in place; None if it is no object."""
    node = parent[key]
    if isinstance(node, dict):
        return node
    if _kind(node) != "object":
        return None
    assert isinstance(node, Raw)
    members = _OBJECT.decode(node)
    parent[key] = members
    return members


def _enter(parent: _Object, key: str) -> _Object:
    """The members of the object under the key; what is missing or no object becomes `{}`."""
    members = _members(parent, key) if key in parent else None
    if members is None:
        members = {}
        parent[key] = members
    return members


def _growing(parent: _Object, key: str) -> _Growing:
    """The array or string under the key, ready to be appended to."""
    node = parent[key]
    if not isinstance(node, _Growing):
        assert isinstance(node, Raw)
        node = _Growing(node)
        parent[key] = node
    return node


def _list_of(value: Raw) -> Raw:
    return Raw(b"[%b]" % value)


def _sum(node: _Node, by: int | float, name: str) -> Raw:
    """The number `node` plus `by`: exact for integers; a float once one of the two is a float.

    Raises:
        _Refused: no number, or an integer beyond 64 bits or a sum that is not finite.
    """
    kind = _kind(node)
    if kind == "number":
        assert isinstance(node, Raw)
        stored = _number(bytes(node))
        total = None if stored is None else stored + by
        if total is not None and _fits(total):
            return Raw(_encode(total))
    raise _Refused("not_number", f"Expected number at path '{name}', got {kind}.")


def _number(text: bytes) -> int | float | None:
    """The number of a JSON text; None for an integer beyond 64 bits."""
    if not text.lstrip(b"-").isdigit():
        return float(text)
    if len(text) > _INTEGER_TEXT_MAX:
        return None
    number = int(text)
    return number if _fits(number) else None


def _fits(number: int | float) -> bool:
    return _I64_MIN <= number <= _U64_MAX if isinstance(number, int) else isfinite(number)
