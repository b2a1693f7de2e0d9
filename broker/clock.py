"""The clocks, as functions that are handed to whoever needs one."""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], int]
"""Milliseconds since 1970 of the wall clock; may step back."""


def wall_clock_ms() -> int:
    """The system's wall clock."""
    return time.time_ns() // 1_000_000
