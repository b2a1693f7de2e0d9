"""Comparison of JSON by value with the placeholders of the recordings.

A recording holds `<name>` where a value varies from run to run:

| placeholder | stands for |
|---|---|
| `<ts>` | an integer, milliseconds since 1970 |
| `<number>` | any number |
| `<port>` | digits, inside a longer text |
| `<uuid>` | any text |
| `<uuid:N>` | any text, the same one wherever N is the same |
| `<os>`, `<version>`, `<traceparent>`, `<stacktrace>`, `<project>`, `<key>` | any text |

Everything else must be equal: `1`, `1.0` and `true` are three different values, the order of the
keys of an object does not matter.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent.parent / "golden"

_PLACEHOLDER = re.compile(
    r"<(ts|number|port|uuid(?::\d+)?|os|version|traceparent|stacktrace|project|key)>"
)
_SENT = {  # what is put in the place of a placeholder that a recording sends
    "number": 4711,
    "os": "Linux 6.1 (x86_64)",
    "version": "1.2.3",
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "stacktrace": "Traceback (most recent call last):\n  nowhere",
    "project": "project",
}
_CHANGES = ("create", "update", "delete", "event")
_FREE_WORDING = {  # of these only the code is compared, and what `named` says
    "deserialization_error",
    "enqueue_error",
    "INVALID_NAMESPACE",
    "INVALID_ARGUMENTS",
    "trigger_registration_failed",
    "JSON_ERROR",
}


class Bindings(dict[str, str]):
    """What `<uuid:N>` stood for so far: `uuid:N` to the text."""


def recording(name: str) -> Any:
    """The parsed content of `tests/golden/<name>`."""
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def differences(
    expected: Any,
    actual: Any,
    bindings: Bindings | None = None,
    more: Iterable[str] = (),
    path: str = "$",
) -> list[str]:
    """Where `actual` differs from the recorded `expected`, one line for each; [] when it is equal.

    `bindings` is extended by what `<uuid:N>` is seen to stand for. `more` names keys that the
    object `actual` may have beside the expected ones (at the top level only).
    """
    bindings = Bindings() if bindings is None else bindings
    if isinstance(expected, str):
        return _text_differences(expected, actual, bindings, path)
    if type(expected) is not type(actual):
        return [f"{path}: expected {_short(expected)}, got {_short(actual)}"]
    found: list[str] = []
    if isinstance(expected, dict):
        found += [f"{path}.{key}: missing" for key in expected.keys() - actual.keys()]
        surplus = actual.keys() - expected.keys() - set(more)
        found += [f"{path}.{key}: not expected: {_short(actual[key])}" for key in surplus]
        for key in expected.keys() & actual.keys():
            found += differences(expected[key], actual[key], bindings, (), f"{path}.{key}")
    elif isinstance(expected, list):
        if len(expected) != len(actual):
            found.append(f"{path}: expected {_short(expected)}, got {_short(actual)}")
        for index, (one, other) in enumerate(zip(expected, actual, strict=False)):
            found += differences(one, other, bindings, (), f"{path}[{index}]")
    elif repr(expected) != repr(actual):  # repr: -0.0 is not 0.0
        found.append(f"{path}: expected {_short(expected)}, got {_short(actual)}")
    return found


def _text_differences(expected: str, actual: Any, bindings: Bindings, path: str) -> list[str]:
    whole = _PLACEHOLDER.fullmatch(expected)
    wrong = [f"{path}: expected {_short(expected)}, got {_short(actual)}"]
    if whole and whole[1] in ("ts", "number"):
        is_number = isinstance(actual, int | float) and not isinstance(actual, bool)
        return [] if is_number and (whole[1] == "number" or isinstance(actual, int)) else wrong
    if not isinstance(actual, str):
        return wrong
    if whole and whole[1].startswith("uuid:"):
        known = bindings.setdefault(whole[1], actual)
        return [] if known == actual else [*wrong, f"{path}: {expected} was {known!r} before"]
    pattern = ""
    position = 0
    for part in _PLACEHOLDER.finditer(expected):
        pattern += re.escape(expected[position : part.start()])
        pattern += r"\d+" if part[1] == "port" else ".*"
        position = part.end()
    pattern += re.escape(expected[position:])
    return [] if re.fullmatch(pattern, actual, re.DOTALL) else wrong


def assert_same(
    expected: Any,
    actual: Any,
    what: str = "",
    bindings: Bindings | None = None,
    more: Iterable[str] = (),
) -> None:
    """Fail with every difference, unless `actual` is what was recorded as `expected`."""
    found = differences(expected, actual, bindings, more)
    if found:
        raise AssertionError(
            "\n".join(
                [f"differs from the recording: {what}", *found, f"got: {_short(actual, 2000)}"]
            )
        )


def filled(message: Any, bindings: Bindings) -> Any:
    """A recorded message that is to be sent, with values in the place of its placeholders.

    A `<uuid:N>` that was not seen yet is made up.
    """
    if isinstance(message, dict):
        return {key: filled(value, bindings) for key, value in message.items()}
    if isinstance(message, list):
        return [filled(value, bindings) for value in message]
    if not isinstance(message, str):
        return message
    whole = _PLACEHOLDER.fullmatch(message)
    if not whole:
        return message
    if whole[1].startswith("uuid"):
        return bindings.setdefault(whole[1], str(uuid.uuid4()))
    return _SENT[whole[1]]


def assert_same_answer(expected: dict[str, Any], actual: dict[str, Any], what: str = "") -> None:
    """Compare what a result frame held: `{}`, `{"result": …}` or `{"error": {code, message}}`.

    No `result` and a `result` of null are the same to every SDK. `doc_url` is not compared. The
    wording of some errors is free: then the message must name the field in backticks, if any.
    """
    if "error" in expected:
        assert "error" in actual, f"{what}: expected {expected}, got {_short(actual)}"
        assert_same_error(expected["error"], actual["error"], what)
        return
    assert_same(
        without_doc_url(expected.get("result")),
        without_doc_url(actual.get("result")) if "error" not in actual else actual,
        what,
    )


def assert_same_error(expected: dict[str, Any], actual: dict[str, Any], what: str = "") -> None:
    """Compare the `error` of two results; see `assert_same_answer`."""
    code, message = expected["code"], expected["message"]
    if code == "function_not_found":  # where else it is registered need not be told
        sentences = [
            text["message"].split(" It is registered in")[0] for text in (expected, actual)
        ]
        expected, actual = (
            error | {"message": text}
            for error, text in zip((expected, actual), sentences, strict=True)
        )
    if code not in _FREE_WORDING:
        assert_same(expected, actual, what)
        return
    assert actual.get("code") == code, f"{what}: expected {expected}, got {actual}"
    assert isinstance(actual["message"], str), what
    assert actual["message"], what
    assert actual.keys() <= {"code", "message", "stacktrace"}, what
    if field := re.search(r"missing field `(\w+)`", message):
        assert_names(field[1], actual, what)


def assert_names(field: str, error: dict[str, Any], what: str = "") -> None:
    """The message of `error` names `field`."""
    assert re.search(rf"\b{re.escape(field)}\b", error["message"]), f"{what}: no {field}: {error}"


def assert_refused(code: str, actual: dict[str, Any], what: str = "", naming: str = "") -> None:
    """`actual` is an error answer with this code, whose message names the field `naming`."""
    assert actual.keys() == {"error"}, f"{what}: expected {code}, got {_short(actual)}"
    assert actual["error"]["code"] == code, f"{what}: {actual}"
    assert actual["error"]["message"], f"{what}: {actual}"
    if naming:
        assert_names(naming, actual["error"], what)


def without_doc_url(value: Any) -> Any:
    """The result of an update without the `doc_url`s of its errors, which need not be there."""
    if not (isinstance(value, dict) and isinstance(value.get("errors"), list)):
        return value
    errors = [{k: v for k, v in error.items() if k != "doc_url"} for error in value["errors"]]
    return {**value, "errors": errors}


def assert_in_order(frames: Iterable[Any], what: str = "") -> None:
    """What one client got is in order: for each group timestamps increase and `seq` counts up.

    `seq` of an event is greater than that of whatever came before it; `seq` of a `sync` is that of
    the last event that it holds, so it may be equal. Refusals and errors carry no position.
    """
    last: dict[tuple[str, str], dict[str, Any]] = {}
    for frame in frames:
        if not isinstance(frame, dict) or frame.get("type") != "stream":
            continue
        kind = frame["event"]["type"]
        if kind != "sync" and kind not in _CHANGES:
            continue
        assert type(frame.get("seq")) is int, f"{what}: no seq: {frame}"
        assert kind != "sync" or frame.get("epoch") is not None, f"{what}: no epoch: {frame}"
        group = (frame["streamName"], frame["groupId"])
        before = last.get(group)
        last[group] = frame
        if before is None:
            continue
        assert frame["timestamp"] > before["timestamp"], f"{what}: time: {before} then {frame}"
        least = before["seq"] + (kind in _CHANGES)
        assert frame["seq"] >= least, f"{what}: seq: {before} then {frame}"


def _short(value: Any, length: int = 300) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= length else f"{text[:length]}… ({len(text)} characters)"
