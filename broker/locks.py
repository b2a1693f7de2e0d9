"""Locks on files, so that two processes never own the same thing; they end with their holder."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from broker.errors import ConfigError

WAIT_S = 3.0
"""How long a process that is just ending is waited for."""


def take(path: Path, key: str, what: str) -> int:
    """Lock the file at `path`, which is made; returns the descriptor that holds the lock.

    Blocks for up to `WAIT_S`.

    Raises:
        ConfigError: under `key`: another process has `what`, or the file can't be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(key, f"{path} can't be made: {error.strerror}") from None
    until = time.monotonic() + WAIT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                os.close(descriptor)
                raise ConfigError(
                    key, f"{what} is in use by another broker (locked: {path})"
                ) from None
            time.sleep(0.05)
        else:
            return descriptor
