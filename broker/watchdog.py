"""Hears the signs of life of one child process, as systemd hears those of a service.

A child sends them from its event loop (`broker.notify`): one that hangs sends none.
"""

from __future__ import annotations

import asyncio
import socket

_DATAGRAM_BYTES = 4096


class Watchdog:
    """A socket that a child is told of by its environment."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("")  # an abstract name of the kernel's choice: no file is left behind
        self._socket.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket, self._heard)
        self._heard_at = self._loop.time()

    def environment(self) -> dict[str, str]:
        """What the child is started with."""
        name: bytes = self._socket.getsockname()
        address = "@" + name.removeprefix(b"\0").decode()
        return {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": str(int(self.timeout_s * 1_000_000 / 2))}

    def restart(self) -> None:
        """The child has just said that it serves."""
        self._heard_at = self._loop.time()

    @property
    def silent_s(self) -> float:
        """Seconds since the last sign of life."""
        return self._loop.time() - self._heard_at

    def close(self) -> None:
        """Hear no more."""
        self._loop.remove_reader(self._socket)
        self._socket.close()

    def _heard(self) -> None:
        try:
            while self._socket.recv(_DATAGRAM_BYTES):
                self._heard_at = self._loop.time()
        except BlockingIOError:
            return
