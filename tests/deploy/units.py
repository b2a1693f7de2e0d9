"""What systemd does for a unit: the socket that it listens on, and processes that it starts."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from tests.support.broker import REPOSITORY, free_ports

PATIENCE_S = 60.0
"""Only ends what would hang."""


class NotifySocket:
    """Takes what a service tells. `address` is what `NOTIFY_SOCKET` holds; one that begins with
    `@` is abstract."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(f"\0{address[1:]}" if address.startswith("@") else address)

    def next(self, patience_s: float = PATIENCE_S) -> dict[str, str]:
        """The next message as a mapping; TimeoutError when none comes."""
        self._socket.settimeout(patience_s)
        lines = self._socket.recv(65536).decode().splitlines()
        return dict(line.split("=", 1) for line in lines)

    def wait_for(self, key: str) -> dict[str, str]:
        """The next message that has `key`; those before it are dropped."""
        while key not in (message := self.next()):
            pass
        return message

    def drain(self) -> None:
        """Drop what came."""
        self._socket.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                self._socket.recv(65536)

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Unit:
    """One process, `broker` with `arguments`; use it as a context manager.

    Attributes: `notify`, `process`, `log`.
    """

    def __init__(self, folder: Path, name: str, *arguments: str, env: Mapping[str, str]) -> None:
        self.notify = NotifySocket(str(folder / f"{name}.notify"))
        self._log_file = folder / f"{name}.log"
        with self._log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "broker", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY), **env}
                | {"NOTIFY_SOCKET": self.notify.address},
            )

    @property
    def log(self) -> str:
        return self._log_file.read_text(errors="replace")

    def reload(self) -> None:
        """SIGHUP; returns when the reload is done."""
        self.process.send_signal(signal.SIGHUP)
        self.notify.wait_for("RELOADING")
        self.notify.wait_for("READY")

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.notify.close()


class Target:
    """A gateway and one shard, each a unit; use it as a context manager.

    `config` is the text of the configuration, in which `{folder}` stands for the target's own
    folder and `{stream}`, `{worker}`, `{metrics}` for free ports.
    """

    def __init__(self, config: str, env: Mapping[str, str] | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="b-", dir="/tmp"))  # short, for its sockets
        self.ports = dict(zip(("stream", "worker", "metrics"), free_ports(5), strict=False))
        self.config_file = self.folder / "broker.yaml"
        self.configure(config)
        self._env = env or {}
        try:
            self.shard = self._start("shard", "--index", "0")
            self.gateway = self._start("gateway")
        except BaseException:
            self.close()
            raise
        self.stream_url = f"ws://127.0.0.1:{self.ports['stream']}"
        self.worker_url = f"ws://127.0.0.1:{self.ports['worker']}"

    shard: Unit
    gateway: Unit
    further: Unit

    def configure(self, config: str) -> None:
        """Write another configuration."""
        for name, value in {"folder": self.folder, **self.ports}.items():
            config = config.replace(f"{{{name}}}", str(value))
        self.config_file.write_text(config)

    def further_gateway(self) -> Unit:
        """Gateway 1, beside the first; the caller closes it."""
        return self._start("gateway", "--index", "1", name="further")

    def _start(self, command: str, *more: str, name: str | None = None) -> Unit:
        options = (command, "--config", str(self.config_file), *more)
        unit = Unit(self.folder, name or command, *options, env=self._env)
        setattr(self, name or command, unit)
        try:
            unit.notify.wait_for("READY")
        except TimeoutError:
            raise AssertionError(f"{command} is not ready\n{unit.log}") from None
        return unit

    def close(self) -> None:
        for command in ("further", "gateway", "shard"):
            if (unit := getattr(self, command, None)) is not None:
                unit.__exit__()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
