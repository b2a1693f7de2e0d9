"""Up to which time syncs may have been stamped: what the next life of the shard begins after.

A sync's timestamp counts in its group's clock (protocol section 5.6), but joins write nothing. So a
time a little ahead is written down before syncs are stamped with what is up to it.
"""

from __future__ import annotations

from pathlib import Path

from shards.files import replace_file

AHEAD_MS = 2000
"""How far ahead is reserved: as far the clock may jump when the shard was killed."""


class ClockFile:
    """The file `clock` in a shard's folder. Blocking; raises `OSError`."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "clock"
        self.reserved_ms = 0
        self.latest_ms = 0
        """The last timestamp that was used; to be kept up to date."""

    def read(self) -> int:
        """What earlier lives reserved; 0 when there is nothing, or nothing that makes sense."""
        try:
            text = self._path.read_text(encoding="ascii").strip()
        except (FileNotFoundError, UnicodeDecodeError):
            return 0
        return int(text) if text.isdecimal() and len(text) < 16 else 0

    def reserve(self, timestamp_ms: int) -> None:
        """Timestamps up to this one, and a little beyond, may be used when this returns."""
        self.reserved_ms = timestamp_ms + AHEAD_MS  # also when it fails: tried again beyond it
        self._write(self.reserved_ms)

    def close(self) -> None:
        """Give back what was reserved and not used."""
        if self.reserved_ms:
            self._write(self.latest_ms)

    def _write(self, timestamp_ms: int) -> None:
        draft = self._path.with_name("clock.draft")
        replace_file(self._path, b"%d\n" % timestamp_ms, draft)
