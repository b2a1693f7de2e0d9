"""Checks on JSON texts that are carried without being decoded."""

from __future__ import annotations

import re

DEPTH_MAX = 128
"""Levels of arrays and objects that a message may nest (protocol section 1, Limits)."""

_STRINGS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"')
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_ALIKE = bytes.maketrans(b"{}", b"[]")


def is_deeper_than(text: bytes, depth_max: int = DEPTH_MAX) -> bool:
    """Whether the JSON text `text`, already known to be well formed, nests deeper than allowed."""
    # A level takes two bytes as an array, and five as an object: most texts are too short.
    if len(text) <= (2 if b"[" in text else 5) * depth_max:
        return False
    if text.count(b"[") + text.count(b"{") <= depth_max:
        return False
    return _folds(text, depth_max) is None


def depth(text: bytes) -> int:
    """Levels of arrays and objects in the well-formed JSON text `text`; 0 for a scalar."""
    folds = _folds(text, len(text))
    assert folds is not None, "not well-formed JSON"
    return folds


def _folds(text: bytes, depth_max: int) -> int | None:
    """Rounds of removing innermost pairs until nothing is left; None if more than allowed."""
    brackets = _STRINGS.sub(b"", text).translate(_ALIKE, _NOT_BRACKETS)
    for rounds in range(depth_max + 1):
        if not brackets:
            return rounds
        brackets = brackets.replace(b"[]", b"")
    return None
