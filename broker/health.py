"""What `/healthz` and `/readyz` answer, on whichever port they are asked: JSON with reasons."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus

import msgspec

NotReady = Callable[[], list[str]]
"""Why a process can't do all that it is there for, a sentence each; nothing when it can."""

PATHS = ("/healthz", "/readyz")
CONTENT_TYPE = "application/json"


def answer(path: str, not_ready: NotReady) -> tuple[HTTPStatus, bytes]:
    """Status and JSON text for one of `PATHS`.

    `/healthz`: 200, `{"healthy": true}`; a process that answers lives. `/readyz`: 200 or 503,
    `{"ready": …, "reasons": […]}`.
    """
    if path == "/healthz":
        return HTTPStatus.OK, msgspec.json.encode({"healthy": True}) + b"\n"
    reasons = not_ready()
    body = msgspec.json.encode({"ready": not reasons, "reasons": reasons}) + b"\n"
    return HTTPStatus.SERVICE_UNAVAILABLE if reasons else HTTPStatus.OK, body
