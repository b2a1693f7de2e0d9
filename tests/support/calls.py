"""Calls of `stream::*` functions by a raw worker, and their payloads."""

from __future__ import annotations

from typing import Any

from tests.support.worker import Worker

LONG_S = 60.0
"""Patience with what moves much data, or has to be started again."""


def item(stream: str, group: str, item_id: str, **more: Any) -> dict[str, Any]:
    """The payload of a call on one item."""
    return {"stream_name": stream, "group_id": group, "item_id": item_id, **more}


async def result_of(worker: Worker, function_id: str, data: Any) -> Any:
    """The result of a call that must succeed; None when it has none."""
    answer = await worker.call(function_id, data, LONG_S)
    assert "error" not in answer, answer
    return answer.get("result")
