"""Decoding what peers send: one way to be refused, naming the field where it is known."""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec

from broker.errors import InvalidRequest
from broker.json_text import is_deeper_than

T = TypeVar("T")

_MISSING = re.compile(r"Object missing required field `([^`]+)`")


def decode(decoder: msgspec.json.Decoder[T], text: bytes) -> T | None:
    """The message in a frame; None for a blank one.

    Raises:
        InvalidRequest: `invalid_message`, with the reason, and the field where it is known.
    """
    try:
        if not text.isascii():
            text.decode()  # the decoder does not look at what it skips, and that is passed on
        message = decoder.decode(text)
    except UnicodeDecodeError as error:
        raise _invalid(f"not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise _invalid("the message is nested too deep") from None
    except msgspec.ValidationError as error:
        reason, field = located(error)
        raise _invalid(reason if field is None else f"{field}: {reason}", field) from None
    except msgspec.DecodeError as error:
        if not text.strip():
            return None
        raise _invalid(str(error)) from None
    if is_deeper_than(text):
        raise _invalid("the message is nested too deep")
    return message


def located(error: msgspec.DecodeError) -> tuple[str, str | None]:
    """The reason that `error` gives, and the path of the field that it is about, such as
    `data.groupId`; a missing field is part of the path."""
    reason, _, path = str(error).partition(" - at `$")
    names = [path.strip("`.")] if path.strip("`.") else []
    if missing := _MISSING.fullmatch(reason):
        names.append(missing.group(1))
    return reason, ".".join(names) or None


def _invalid(message: str, field: str | None = None) -> InvalidRequest:
    return InvalidRequest("invalid_message", message, field)
