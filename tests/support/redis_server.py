"""A `redis-server` of the tests' own, in a temporary directory, that keeps nothing by default."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import redis

from tests.support.broker import free_ports
from tests.support.connection import PATIENCE_S

SERVER = os.environ.get("REDIS_SERVER", "redis-server")
CLI = os.environ.get("REDIS_CLI", "redis-cli")
"""Programs, for tests on another one that speaks the protocol, such as `valkey-server`."""
IS_INSTALLED = shutil.which(SERVER) is not None


class ServerEnded(AssertionError):
    """The server ended instead of answering."""


class RedisServer:
    """Started at once, unless `started` is False. Use it as a context manager, or call `close`.

    `client` is for the tests; it answers with text. `options` are added to the command line.
    """

    def __init__(self, *options: str, started: bool = True, password: str | None = None) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="r-", dir="/tmp"))
        self.socket = self.directory / "socket"
        self.options = [*options, *(["--requirepass", password] if password else [])]
        self.process: subprocess.Popen[bytes] | None = None
        self._password = password
        self._take_port()
        for attempt in range(5 if started else 0):
            try:
                self.start()
            except (
                ServerEnded
            ):  # another one was faster on the port, or on that of the cluster's bus
                if attempt == 4:
                    raise
                self._take_port()
            else:
                break

    def _take_port(self) -> None:
        self.port = free_ports(1)[0]
        self.url = f"redis://127.0.0.1:{self.port}"
        self.client: Any = redis.Redis(
            port=self.port, password=self._password, decode_responses=True
        )

    def start(self, *options: str) -> None:
        """Start, and wait until it answers."""
        command = [SERVER, "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--unixsocket", str(self.socket), "--dir", str(self.directory)]
        command += ["--save", "", "--appendonly", "no", *self.options, *options]
        self._run(command)

    def start_sentinel(self, config: Path) -> None:
        """Start as a Sentinel, which keeps its state in `config`."""
        command = [SERVER, str(config), "--sentinel", "--port", str(self.port)]
        self._run([*command, "--bind", "127.0.0.1", "--dir", str(self.directory)])

    def _run(self, command: list[str]) -> None:
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                self.client.ping()
            except redis.ConnectionError:
                if self.process.poll() is not None:
                    raise ServerEnded(f"{SERVER} ended on port {self.port}") from None
                assert time.monotonic() < end, "redis-server does not answer"
                time.sleep(0.02)
            else:
                return

    def stop(self) -> None:
        """Stop it as an operator does."""
        self.client.close()
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            self.process.wait()
            self.process = None

    def pause(self) -> None:
        """Let it answer nobody until `resume`."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
