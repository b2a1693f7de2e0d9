"""Seeds of the simulation; and that it finds what is broken, and repeats itself exactly."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import count
from typing import Any
from unittest import mock

import pytest

from broker import messages
from broker.errors import ShardUnavailable
from gateway.shard_links import ShardLink
from tests.sim import scenario
from tests.sim.checker import Report
from tests.sim.faulty import FAULTY

SEEDS, BLOCK = 200, 20
"""How many seeds are run here, and in one test; `make sim SEEDS=10000` runs others."""
PATIENCE = 40
"""Within so many seeds a fault has to be found."""


@pytest.mark.parametrize("first", range(0, SEEDS, BLOCK))
def test_seeds(first: int) -> None:
    done = Report()
    for seed in range(first, first + BLOCK):
        result = scenario.run(seed)
        assert not result.violations, f"python -m tests.sim --seed {seed}\n{result.report}"
        for name in ("calls", "events", "frames", "fired", "resumes"):
            setattr(done, name, getattr(done, name) + getattr(result.report, name))
    assert min(done.calls, done.events, done.frames) > 500, "or it proves nothing"
    assert min(done.fired, done.resumes) > 5, "or it proves nothing"


@pytest.mark.parametrize(
    ("faulty", "rules"), FAULTY, ids=lambda value: getattr(value, "__name__", "")
)
def test_what_is_broken_is_found(
    faulty: Callable[[], AbstractContextManager[None]], rules: set[str]
) -> None:
    for seed in range(PATIENCE):
        with faulty():
            result = scenario.run(seed)
        if {violation.rule for violation in result.violations} & rules:
            return
    pytest.fail(f"{PATIENCE} seeds did not find {faulty.__name__}: {faulty.__doc__}")


@pytest.mark.parametrize("seed", [39])
def test_syncs_that_do_not_fit_together_come_one_after_the_other(seed: int) -> None:
    """They took one another's place for ever."""
    result = scenario.run(seed)
    assert not result.violations, result.report


def test_a_sync_that_the_link_had_no_room_for_is_asked_for_again() -> None:
    """Found by a seed whose links take little: the shard is linked and stays so."""
    call, number = ShardLink.call, count(1)

    def call_if_room(self: ShardLink, message: Any, call_id: int, answered: Any) -> None:
        if self.ready and isinstance(message, messages.Join) and not next(number) % 10:
            answered(ShardUnavailable(self.shard, "too much waits to be sent to it"))
        else:
            call(self, message, call_id, answered)

    with mock.patch.object(ShardLink, "call", call_if_room):
        for seed in range(6):
            result = scenario.run(seed)
            assert not result.violations, f"seed {seed}: {result.report}"


def test_a_seed_repeats_itself_exactly() -> None:
    """Here, with its log, and in another process that hashes texts otherwise."""
    seeds = (3, 7, 14)
    lines: list[str] = []
    digests = [scenario.run(seed).digest for seed in seeds]
    for seed, digest in zip(seeds, digests, strict=True):
        assert scenario.run(seed, lines.append).digest == digest
    assert len(set(digests)) == len(seeds)
    assert any("kill" in line for line in lines)
    code = (
        f"from tests.sim import scenario\nprint(*(scenario.run(seed).digest for seed in {seeds}))"
    )
    other = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONHASHSEED": "12345"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    assert other.stdout.split() == digests
