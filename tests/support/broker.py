"""The broker as real processes, on ports and in a directory of its own."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Self

REPOSITORY = Path(__file__).resolve().parents[2]
READY_S_MAX = 60.0
STOP_S_MAX = 60.0
LOG_LINES_SHOWN = 60

IN_MEMORY = """\
workers:
  - name: iii-stream
    config:
      adapter: {name: kv, config: {store_method: in_memory}}
"""
"""A configuration that keeps nothing on disk."""

_READY = re.compile(
    r"^ready stream=(\S+) worker=(\S+) metrics=(\S+) shards=(\d+)( gateways=\d+)?$", re.MULTILINE
)
_MARK = "BROKER_TEST_MARK"  # in the environment of every process of one broker
_PORT_FIRST, _PORT_LAST = 10_000, 32_000  # below those that systems give to outgoing connections

running: list[Broker] = []
"""The brokers that are up; their logs are shown when a test fails."""


class StartFailed(AssertionError):
    """The broker ended before it was ready, or did not get ready.

    Attributes: `exit_code` (None when it was still running and had to be killed), `stdout`,
    `stderr`.
    """

    def __init__(self, exit_code: int | None, stdout: str, stderr: str) -> None:
        super().__init__(f"not ready, exit code {exit_code}\n{stdout}\n{stderr}")
        self.exit_code = exit_code
        self.stdout = stdout
        self.stderr = stderr


class Broker:
    """`broker serve`, started at once. Use it as a context manager, or call `close`.

    `config` is the text of a YAML file; None starts without one: KvStore, `file_based`, in
    `data_dir`. `args` come last on the command line; `{directory}` in `config` stands for the
    broker's own temporary directory. `gateways` is what it sets.

    Attributes: `stream_url`, `worker_url`, `metrics_url`, `shards`, `pid`, `directory`,
    `data_dir`.

    Raises:
        StartFailed: it did not get ready.
    """

    stream_url: str
    worker_url: str
    metrics_url: str

    def __init__(
        self,
        config: str | None = None,
        shards: int = 2,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        gateways: int = 1,
    ) -> None:
        # short: the path of a Unix socket has at most 108 bytes
        self.directory = Path(tempfile.mkdtemp(prefix="b-", dir="/tmp"))
        self.data_dir = self.directory / "data"
        self.log_file = self.directory / "log"
        self.shards = shards
        self.gateways = gateways
        self.args = list(args)
        self.mark = str(uuid.uuid4())
        self.env = {**os.environ, "PYTHONPATH": str(REPOSITORY), **(env or {}), _MARK: self.mark}
        self.config_file: Path | None = None
        self.process: subprocess.Popen[bytes] | None = None
        if config is not None:
            self.config_file = self.directory / "broker.yaml"
            self.config_file.write_text(config.replace("{directory}", str(self.directory)))
        try:
            self._start_on_free_ports()
        except BaseException:
            self.close()
            raise

    def _start_on_free_ports(self) -> None:
        for attempt in range(5):
            self.ports = free_ports(2 + self.shards + self.gateways)
            try:
                self.start()
            except StartFailed as failure:
                taken = re.search(r"in use|EADDRINUSE", failure.stderr)
                if attempt == 4 or not taken:
                    raise
            else:
                return

    @property
    def command(self) -> list[str]:
        stream, worker, metrics = (str(port) for port in self.ports[:3])
        command = [sys.executable, "-m", "broker", "serve", "--shards", str(self.shards)]
        if self.config_file:
            command += ["--config", str(self.config_file)]
        command += ["--data-dir", str(self.data_dir), "--host", "127.0.0.1", "--port", stream]
        command += ["--worker-host", "127.0.0.1", "--worker-port", worker]
        return [*command, "--metrics-port", metrics, *self.args]

    @property
    def pid(self) -> int:
        assert self.process is not None, "not running"
        return self.process.pid

    @property
    def log(self) -> str:
        """Everything that the processes wrote to stderr so far."""
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def start(self) -> None:
        """Start and wait for the line `ready …`. The ports are those of the last time.

        Raises:
            StartFailed: it did not get ready.
        """
        output = self.directory / "stdout"
        with output.open("wb") as stdout, self.log_file.open("ab") as stderr:
            log_start = stderr.tell()
            self.process = self._spawn(stdout, stderr)
        end = time.monotonic() + READY_S_MAX
        while not (ready := _READY.search(output.read_text(errors="replace"))):
            exit_code = self.process.poll()
            if exit_code is not None or time.monotonic() > end:
                self.kill()
                stderr_text = self.log_file.read_bytes()[log_start:].decode(errors="replace")
                raise StartFailed(exit_code, output.read_text(errors="replace"), stderr_text)
            time.sleep(0.02)
        self.stream_url = ready[1].replace("0.0.0.0", "127.0.0.1")
        self.worker_url = ready[2].replace("0.0.0.0", "127.0.0.1")
        self.metrics_url = ready[3].replace("0.0.0.0", "127.0.0.1")
        running.append(self)

    def _spawn(self, stdout: IO[bytes], stderr: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            cwd=self.directory,
            env=self.env,
        )

    def stop(self) -> int:
        """SIGTERM, wait; returns the exit code. No process of the broker may be left."""
        assert self.process is not None, "not running"
        self._forget()
        self.process.send_signal(signal.SIGTERM)
        try:
            exit_code = self.process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after SIGTERM\n{self.log_tail()}") from None
        self.process = None
        left = self._pids()
        self._kill_all()
        assert not left, f"processes left behind: {left}\n{self.log_tail()}"
        return exit_code

    def kill(self) -> None:
        """SIGKILL the supervisor and everything that it started."""
        self._forget()
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
        self._kill_all()

    def restart(self) -> None:
        """Stop if running, and start again on the same data and ports."""
        if self.process is not None:
            assert self.stop() == 0, self.log_tail()
        self.start()

    def close(self) -> None:
        """Stop (by force if need be) and remove the directory."""
        try:
            if self.process is not None:
                self.stop()
        finally:
            self.kill()
            shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def children(self) -> dict[str, int]:
        """The broker's processes but the supervisor: `gateway` (or `gateway-0`, …), `shard-0`, … to
        their pids."""
        found = {}
        for pid in self._pids():
            try:
                words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            except OSError:
                continue
            module = words[words.index("-m") + 1] if "-m" in words else ""
            number = words[words.index("--index") + 1] if "--index" in words else None
            if module == "gateway":
                found["gateway" if number is None else f"gateway-{number}"] = pid
            elif module == "shards":
                found[f"shard-{number}"] = pid
        return found

    def log_tail(self) -> str:
        return "\n".join(self.log.splitlines()[-LOG_LINES_SHOWN:])

    def _forget(self) -> None:
        if self in running:
            running.remove(self)

    def _pids(self) -> list[int]:
        """Every living process with this broker's mark, whoever its parent is by now."""
        mark = f"{_MARK}={self.mark}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:  # ended, or not ours
                continue
        return found

    def _kill_all(self) -> None:
        end = time.monotonic() + STOP_S_MAX
        while pids := self._pids():
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            assert time.monotonic() < end, f"cannot be killed: {pids}"
            time.sleep(0.01)


def free_ports(count: int) -> list[int]:
    """`count` ports in a row on which nothing listens."""
    while True:
        first = random.randrange(_PORT_FIRST, _PORT_LAST)
        ports = list(range(first, first + count))
        if all(_is_free(port) for port in ports):
            return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
