"""The load generator as a process: `bench/c`, compiled on first use, or `bench/load.py`."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.broker import REPOSITORY, Running

SOURCES = Path(__file__).with_name("c")
FLAGS = ("-O2", "-std=c11", "-Wall", "-Wextra", "-Werror")
Options = Mapping[str, int | float | str]
"""Options of the generator without their dashes; `python -m bench.generator` lists them."""


class LoadFailed(Exception):
    """The generator ended with an error: something came that should not, or did not come."""


class NeedsCompiler(Exception):
    """The Python generator can't do what is asked of it."""


@functools.cache
def program() -> list[str]:
    """The command of the generator."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        print(
            "bench: no C compiler (cc, or CC): the generator in Python takes its place. It does"
            " pipelined sets only and may be slower than what it measures.",
            file=sys.stderr,
        )
        return [sys.executable, "-m", "bench.load"]
    return [str(build(compiler))]


def build(compiler: str) -> Path:
    """The program, compiled unless that was done for this very source."""
    text = b"".join(path.read_bytes() for path in sorted(SOURCES.glob("*.[ch]")))
    mark = hashlib.sha256(text + repr((compiler, FLAGS)).encode()).hexdigest()[:16]
    built = REPOSITORY / ".cache" / f"bench-load-{mark}"
    if not built.exists():
        built.parent.mkdir(exist_ok=True)
        unfinished = built.with_name(f"{built.name}.{os.getpid()}")
        files = [str(path) for path in sorted(SOURCES.glob("*.c"))]
        subprocess.run([compiler, *FLAGS, "-o", str(unfinished), *files], check=True)
        unfinished.rename(built)
    return built


def command(target: Running, options: Options, watched: Iterable[int] = ()) -> list[str]:
    """The generator's command line against `target`, with the CPU time of `watched` told."""
    ports = {"worker-port": target.worker_port, "stream-port": target.stream_port}
    pids = {"watch": ",".join(map(str, [*target.roles, *watched]))}
    line = program()[:]
    for name, value in (ports | pids | dict(options)).items():
        line += [f"--{name}", str(value)]
    return line


def run(target: Running, options: Options, watched: Iterable[int] = ()) -> dict[str, Any]:
    """One run; what the generator tells.

    Raises:
        LoadFailed: with what it said.
        NeedsCompiler
    """
    done = subprocess.run(
        command(target, options, watched), capture_output=True, text=True, check=False
    )
    return _told(done.returncode, done.stdout, done.stderr)


def _told(code: int, output: str, errors: str) -> dict[str, Any]:
    if code == 3:
        raise NeedsCompiler(errors.strip())
    if code != 0:
        raise LoadFailed(errors.strip() or f"exit code {code}")
    told: dict[str, Any] = json.loads(output)
    return told


@contextmanager
def held(target: Running, options: Options) -> Iterator[None]:
    """Connections that are open and joined, and do nothing until the end.

    Raises:
        LoadFailed, NeedsCompiler
    """
    line = command(target, {**options, "hold": 1})
    with subprocess.Popen(
        line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as generator:
        assert generator.stdout is not None
        if generator.stdout.readline() != "ready\n":
            output, errors = generator.communicate()
            _told(generator.returncode or 1, output, errors)
        try:
            yield
        finally:
            generator.communicate()  # it ends with its standard input


if __name__ == "__main__":
    raise SystemExit(subprocess.run([*program(), "--help"], check=False).returncode)
