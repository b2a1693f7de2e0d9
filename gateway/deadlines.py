"""Until when answers are waited for, all of them equally long: one timer serves them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


class Deadlines:
    """Calls by their ids, in the order in which they are due: that in which they were made.

    The timer runs until the call is due that was the first when it was set, so that a call which
    is answered in time costs an entry of a dict, and one timer serves all that are made meanwhile.

    Args:
        wait_s: for one answer.
        late: told the id of a call that was not answered within it; takes the call out, too.
    """

    def __init__(self, wait_s: float, late: Callable[[str], None]) -> None:
        self.wait_s = wait_s
        self._late = late
        self._due: dict[str, float] = {}
        self._timer_set = False

    def __len__(self) -> int:
        return len(self._due)

    def add(self, call_id: str) -> None:
        """A call was made."""
        self._due[call_id] = time.monotonic() + self.wait_s
        if not self._timer_set:
            self._set_timer(self.wait_s)

    def discard(self, call_id: str) -> None:
        """Nobody waits for the answer any more, or it came."""
        self._due.pop(call_id, None)

    def _set_timer(self, wait_s: float) -> None:
        self._timer_set = True
        asyncio.get_running_loop().call_later(wait_s, self._look)

    def _look(self) -> None:
        self._timer_set = False
        now = time.monotonic()
        while self._due:
            call_id, due = next(iter(self._due.items()))
            if due > now:
                self._set_timer(due - now)
                return
            del self._due[call_id]
            self._late(call_id)
