"""What the storage does with files beside SQLite: every change of theirs is made durable here.

All of it blocks and raises `OSError`.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
_READ_BYTES = 2**20


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make the content of a file durable, its size included; if there is one."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Make a file, or write it anew; its content is durable then, its name is not."""
    descriptor = os.open(path, _NEW_FILE, 0o666)
    try:
        while data:
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes, draft: Path) -> None:
    """Have `data` at `path`: whatever happens, there is either what was before or all of it.

    `draft` is a name in the same directory that nobody else uses.
    """
    write_file(draft, data)
    os.rename(draft, path)
    sync_directory(path.parent)


def create_file(path: Path, data: bytes, draft: Path) -> None:
    """As `replace_file`, unless there is a file already, which stays."""
    write_file(draft, data)
    try:
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        os.unlink(draft)
    sync_directory(path.parent)


def remove_files(*paths: Path) -> None:
    """Remove those files of one directory that there are, for good."""
    found = False
    for path in paths:
        with suppress(FileNotFoundError):
            os.unlink(path)
            found = True
    if found:
        sync_directory(paths[0].parent)


def write_again(path: Path) -> None:
    """Make all of a file durable that programs read of it, if there is one.

    It is written once more: after a sync that failed, the kernel takes for written what is not,
    and syncs it never again.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        offset = 0
        while data := os.pread(descriptor, _READ_BYTES, offset):
            offset += os.pwrite(descriptor, data, offset)
        if offset:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Make a directory, and those above it that are missing, with durable names.

    Where it is there already, whoever made it may have died before its name was durable.
    """
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    with suppress(PermissionError):  # a folder of somebody else's, which we made nothing in
        sync_directory(path.parent)
    for made in reversed(missing):
        with suppress(FileExistsError):  # another shard was faster
            os.mkdir(made)
        sync_directory(made.parent)
