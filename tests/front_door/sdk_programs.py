"""Programs written with the published SDKs and clients, driven line by line.

Each takes commands on standard input and reports on standard output, one JSON object a line; the
commands are listed in `tests/node/*.mjs`. The end of the input ends a program.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tests.support.broker import REPOSITORY, Broker

PATIENCE_S = 60.0
"""How long a test waits for something that must come. Only ends what would hang."""

NODE = REPOSITORY / "tests" / "node"
RUST_PROGRAM = REPOSITORY / ".cache" / "rust-target" / "debug" / "sdk-worker"

Report = dict[str, Any]


class Program:
    """A running program. Use it as a context manager.

    `reports` has everything that it wrote, in order; a line that is no JSON object is kept as
    `{"text": line}`.
    """

    def __init__(
        self, command: Sequence[str | Path], env: Mapping[str, str], cwd: Path = REPOSITORY
    ) -> None:
        self.command = [str(word) for word in command]
        self.reports: list[Report] = []
        self._waiting: list[Report] = []
        self._ended = False
        self._arrived = threading.Condition()
        self._tags = itertools.count(1)
        self._errors: list[str] = []
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=cwd,
            env={**os.environ, **env},
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        self._readers = [
            threading.Thread(target=reader, daemon=True)
            for reader in (self._read, self._read_errors)
        ]
        for thread in self._readers:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                report = json.loads(line)
            except ValueError:
                report = None
            if not isinstance(report, dict):
                report = {"text": line.rstrip("\n")}
            with self._arrived:
                self.reports.append(report)
                self._waiting.append(report)
                self._arrived.notify_all()
        with self._arrived:
            self._ended = True
            self._arrived.notify_all()

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        self._errors.extend(self._process.stderr)

    def send(self, do: str, **fields: Any) -> None:
        """Give a command."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **fields}) + "\n")
        self._process.stdin.flush()

    def wait_for(self, matches: Callable[[Report], bool]) -> Report:
        """Take the first report for which `matches` holds, waiting for it if need be."""
        end = time.monotonic() + PATIENCE_S
        with self._arrived:
            while True:
                for index, report in enumerate(self._waiting):
                    if matches(report):
                        return self._waiting.pop(index)
                left_s = end - time.monotonic()
                if self._ended or left_s <= 0:
                    raise AssertionError(f"not reported by {self._shown()}")
                self._arrived.wait(left_s)

    def wait_for_keys(self, **fields: Any) -> Report:
        """Take the first report that has these fields."""
        return self.wait_for(lambda report: fields.items() <= report.items())

    def call(self, function_id: str, payload: Any) -> Any:
        """Call a function through the SDK (programs of workers), return its result.

        Raises:
            CallFailed: the SDK raised.
        """
        tag = next(self._tags)
        self.send("call", tag=tag, function_id=function_id, payload=payload)
        answer = self.wait_for_keys(answer=tag)
        if "error" in answer:
            raise CallFailed(answer["error"])
        return answer["result"]

    def texts(self, selector: str) -> list[str]:
        """The text of each element that `selector` matches (the browser only)."""
        tag = next(self._tags)
        self.send("texts", tag=tag, selector=selector)
        texts: list[str] = self.wait_for_keys(answer=tag)["result"]
        return texts

    def close(self) -> None:
        """End the input, wait for the program; it must end by itself and without an error."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            exit_code = self._process.wait(PATIENCE_S)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            exit_code = None
        finally:
            self.kill()
        assert exit_code == 0, f"exit code {exit_code} of {self._shown()}"

    def kill(self) -> None:
        """SIGKILL, unless it has ended."""
        self._process.kill()
        self._process.wait()
        for thread in self._readers:
            thread.join()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _shown(self) -> str:
        errors = "".join(self._errors[-60:])
        return f"{self.command}\nreports: {self.reports[-50:]}\nstderr: {errors}"


class CallFailed(Exception):
    """A call that the SDK answered with an error; the text is `CODE: message`."""


def node_worker(broker: Broker) -> Program:
    """tests/node/worker.mjs."""
    return Program(["node", NODE / "worker.mjs"], {"III_URL": broker.worker_url})


def node_presence(broker: Broker) -> Program:
    """tests/node/presence.mjs."""
    return Program(["node", NODE / "presence.mjs"], {"III_URL": broker.worker_url})


def node_client(broker: Broker, *protocols: str) -> Program:
    """tests/node/client.mjs, which offers these subprotocols."""
    return Program(["node", NODE / "client.mjs", *protocols], {"STREAM_URL": broker.stream_url})


def browser(folder: Path = NODE) -> Program:
    """tests/node/browser.mjs, whose page can also come from `folder`."""
    return Program(["node", NODE / "browser.mjs", folder], {})


def python_worker(broker: Broker) -> Program:
    """tests/python/worker.py."""
    program = REPOSITORY / "tests" / "python" / "worker.py"
    return Program([sys.executable, program], {"III_URL": broker.worker_url})


def python_presence(broker: Broker) -> Program:
    """examples/presence.py."""
    program = REPOSITORY / "examples" / "presence.py"
    return Program([sys.executable, program], {"III_URL": broker.worker_url})


def rust_worker(broker: Broker) -> Program:
    """tests/rust, `control`."""
    return Program([RUST_PROGRAM, "control"], {"III_URL": broker.worker_url})


def rust_presence(broker: Broker) -> Program:
    """tests/rust, `presence`."""
    return Program([RUST_PROGRAM, "presence"], {"III_URL": broker.worker_url})
