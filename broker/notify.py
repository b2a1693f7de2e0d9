"""Tells systemd how the process is: the notify protocol, sd_notify(3).

A message is one datagram of lines `KEY=value` to the Unix socket that `NOTIFY_SOCKET` names.
Without that variable nobody is told and nothing is sent.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import MutableMapping

from broker import logs

_SEND_TIMEOUT_S = 0.05  # its buffer is large; a process must not hang with whoever reads it

_log = logs.Log("notify")


class Notifier:
    """Takes `NOTIFY_SOCKET`, `WATCHDOG_USEC` and `WATCHDOG_PID` out of `environ`, so that no child
    has them: only this process is to speak for the service."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        address = environ.pop("NOTIFY_SOCKET", "")
        interval = environ.pop("WATCHDOG_USEC", "")
        pid = environ.pop("WATCHDOG_PID", "") or str(os.getpid())
        self._address = ""
        self._watchdog_s = 0.0
        if not address:
            return
        if address[0] not in "/@":
            _log.warning("notify_socket_unknown", address=address)
            return
        # An abstract socket is written with @ and has a NUL byte there.
        self._address = f"\0{address[1:]}" if address[0] == "@" else address
        if pid == str(os.getpid()) and interval.isascii() and interval.isdigit():
            self._watchdog_s = int(interval) / 1_000_000

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Feed the watchdog, if there is one, from `loop`: one that hangs does not."""
        if self._watchdog_s:
            self._send("WATCHDOG=1")
            loop.call_later(self._watchdog_s / 2, self.watch, loop)

    def ready(self, status: str) -> None:
        """The process serves, or has finished reloading. `status` is one line for people."""
        self._send(f"READY=1\nSTATUS={status}")

    def reloading(self) -> None:
        """The process begins to reload; `ready` has to follow."""
        # systemd tells by the time whether this answers the reload that it asked for.
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """The process begins to stop."""
        self._send("STOPPING=1")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.settimeout(_SEND_TIMEOUT_S)
                sender.sendto(message.encode(), self._address)
        except OSError as error:  # also a timeout: the service goes on without being watched
            _log.warning("notify_failed", message=message, reason=error)
