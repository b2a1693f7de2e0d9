"""A disk as a model: what programs see of it, and what a power cut leaves of it.

The rules are those of POSIX, at their worst. Of what was written to a file after its last
successful `fsync` any part may be there: whole writes, sectors of them, pieces of sectors, zeros
where the file only grew. Of the names that were made, removed or changed in a directory after its
last `fsync` any may be as before. After an `fsync` that failed, what was not written by then is
not written by a later one either, though programs still read it. What a write does not cover it
does not harm (SQLite's `powersafe overwrite`, which it counts on by itself).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

Write = tuple[int, bytes]
"""Offset and data."""
Pending = Write | int
"""A write, or the size that a file was cut to."""

DIRECTORY = -1
"""In place of a file's number: the name is one of a directory."""


@dataclass
class File:
    """`cache` is what programs read, `disk` what was synced, `pending` what lies between."""

    cache: bytearray = field(default_factory=bytearray)
    disk: bytearray = field(default_factory=bytearray)
    pending: list[Pending] = field(default_factory=list)

    def write(self, offset: int, data: bytes) -> None:
        _put(self.cache, offset, data)
        self.pending.append((offset, data))

    def truncate(self, size: int) -> None:
        _cut(self.cache, size)
        self.pending.append(size)

    def sync(self) -> None:
        for operation in self.pending:
            if isinstance(operation, int):
                _cut(self.disk, operation)
            else:
                _put(self.disk, *operation)
        self.pending.clear()

    def fail_to_sync(self, rng: random.Random) -> None:
        """What is not on the disk now counts as written: nobody tries again."""
        self.disk = self.after_power_cut(rng)
        self.pending.clear()

    def after_power_cut(self, rng: random.Random) -> bytearray:
        """What may be on the disk."""
        data, share = bytearray(self.disk), rng.choice((0.0, 0.3, 0.7, 0.95, 1.0))
        in_order = rng.random() < 0.4
        if in_order:
            kept = rng.randint(0, len(self.pending))
        sector = rng.choice((512, 4096))
        for number, operation in enumerate(self.pending):
            if in_order:
                share = 1.0 if number < kept else 0.5 if number == kept else 0.0
            if isinstance(operation, int):
                if rng.random() < share:
                    _cut(data, operation)
                continue
            offset, text = operation
            for start, piece in _sectors(offset, text, sector):
                if rng.random() < share:
                    torn = rng.randrange(len(piece)) if rng.random() < 0.02 else len(piece)
                    _put(data, start, piece[:torn])
                elif rng.random() < share / 3:  # the file grew, and its new blocks are empty
                    _put(data, max(start + len(piece), len(data)), b"")
        return data


@dataclass
class Directory:
    """Names of files and directories, as programs see them and as they were synced."""

    cache: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)
    pending: list[dict[str, int | None]] = field(default_factory=list)
    """Changes: names, and what they name then; None: they are gone."""

    def change(self, names: dict[str, int | None]) -> None:
        _rename(self.cache, names)
        self.pending.append(names)

    def sync(self) -> None:
        for names in self.pending:
            _rename(self.disk, names)
        self.pending.clear()

    def after_power_cut(self, rng: random.Random) -> dict[str, int]:
        """What the directory may hold."""
        entries, share = dict(self.disk), rng.choice((0.0, 0.5, 1.0))
        in_order = rng.random() < 0.6
        if in_order:
            kept = rng.randint(0, len(self.pending))
        for number, names in enumerate(self.pending):
            if number < kept if in_order else rng.random() < share:
                _rename(entries, names)
        return entries


class State:
    """Directories by their path below the root, which is `""`, and files by number."""

    def __init__(self) -> None:
        self.directories = {"": Directory()}
        self.files: dict[int, File] = {}

    def apply(self, entry: tuple[object, ...]) -> None:
        """One entry of a recorder's log."""
        kind, *rest = entry
        getattr(self, f"_{kind}")(*rest)

    def _create(self, directory: str, name: str, number: int) -> None:
        self.files[number] = File()
        self.directories[directory].change({name: number})

    def _write(self, number: int, offset: int, data: bytes) -> None:
        self.files[number].write(offset, data)

    def _truncate(self, number: int, size: int) -> None:
        self.files[number].truncate(size)

    def _sync(self, number: int) -> None:
        self.files[number].sync()

    def _sync_failed(self, number: int, seed: int) -> None:
        self.files[number].fail_to_sync(random.Random(seed))

    def _change(self, directory: str, names: dict[str, int | None]) -> None:
        self.directories[directory].change(names)

    def _mkdir(self, directory: str, name: str) -> None:
        self.directories[directory].change({name: DIRECTORY})
        self.directories[f"{directory}/{name}".lstrip("/")] = Directory()

    def _sync_directory(self, directory: str) -> None:
        self.directories[directory].sync()

    def copy(self) -> State:
        """Another one of the same, to go on with."""
        other = State()
        other.files = {
            number: File(bytearray(file.cache), bytearray(file.disk), list(file.pending))
            for number, file in self.files.items()
        }
        other.directories = {
            path: Directory(dict(found.cache), dict(found.disk), list(found.pending))
            for path, found in self.directories.items()
        }
        return other

    def after_power_cut(self, rng: random.Random) -> State:
        """What a disk may hold whose power is cut now; all of it is durable."""
        after = State()
        self._keep("", after, rng)
        return after

    def _keep(self, path: str, after: State, rng: random.Random) -> None:
        entries = self.directories[path].after_power_cut(rng)
        after.directories[path] = Directory(dict(entries), dict(entries))
        for name, number in entries.items():
            if number == DIRECTORY:
                self._keep(f"{path}/{name}".lstrip("/"), after, rng)
            elif number not in after.files:
                data = self.files[number].after_power_cut(rng)
                after.files[number] = File(bytearray(data), data)

    def materialize(self, root: Path) -> None:
        """Make real files below `root` of what programs see."""
        for path, directory in self.directories.items():
            if not self._is_there(path):
                continue
            folder = root / path
            folder.mkdir(exist_ok=True)
            for name, number in directory.cache.items():
                if number != DIRECTORY:
                    (folder / name).write_bytes(self.files[number].cache)

    def _is_there(self, path: str) -> bool:
        if not path:
            return True
        above, _, name = path.rpartition("/")
        return self._is_there(above) and name in self.directories[above].cache


def _put(target: bytearray, offset: int, data: bytes) -> None:
    if offset > len(target):
        target.extend(bytes(offset - len(target)))
    target[offset : offset + len(data)] = data


def _cut(target: bytearray, size: int) -> None:
    if size < len(target):
        del target[size:]
    else:
        target.extend(bytes(size - len(target)))


def _rename(entries: dict[str, int], names: dict[str, int | None]) -> None:
    for name, number in names.items():
        if number is None:
            entries.pop(name, None)
        else:
            entries[name] = number


def _sectors(offset: int, data: bytes, size: int) -> list[Write]:
    """`data` in pieces that each lie in one sector."""
    pieces, at = [], 0
    while at < len(data):
        end = min(len(data), at + size - (offset + at) % size)
        pieces.append((offset + at, data[at:end]))
        at = end
    return pieces
