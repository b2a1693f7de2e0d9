"""How far a long command is, on standard error."""

from __future__ import annotations

import sys

_WIDTH = 40


class Progress:
    """A bar on a terminal, a line for each tenth elsewhere."""

    def __init__(self, what: str, total: int) -> None:
        self._what = what
        self._total = max(total, 1)
        self._done = 0
        self._shown = -1
        self._is_terminal = sys.stderr.isatty()
        self.add(0)

    def add(self, count: int) -> None:
        """So much more is done."""
        self._done += count
        share = min(self._done / self._total, 1.0)
        step = int(share * (100 if self._is_terminal else 10))
        if step == self._shown:
            return
        self._shown = step
        text = f"{self._what} {share:4.0%}"
        if self._is_terminal:
            filled = int(share * _WIDTH)
            end = "\n" if share == 1.0 else ""
            print(f"\r{text} [{'#' * filled}{'.' * (_WIDTH - filled)}]", end=end, file=sys.stderr)
        else:
            print(text, file=sys.stderr)
        sys.stderr.flush()
