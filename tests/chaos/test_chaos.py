"""Processes die, hang and lose their connections; the checker of recorded runs judges.

`make chaos MINUTES=10` runs longer, `python -m tests.chaos --seed N` one episode again.
"""

from __future__ import annotations

import asyncio

import pytest

from tests.chaos import episode
from tests.chaos.plan import plan

SEED, FAULTS = 416, 5


def test_the_seed_has_a_bit_of_all() -> None:
    faults = plan(SEED, episode.SHARDS, FAULTS)
    killed = {target for fault in faults if fault.kind == "kill" for target in fault.targets}
    assert {"supervisor", "gateway"} < killed
    assert {"pause", "cut"} <= {fault.kind for fault in faults}
    assert max(fault.lasts_s for fault in faults) > episode.HANG_S


@pytest.mark.timeout(180)
def test_an_episode() -> None:
    outcome = asyncio.run(episode.run(SEED, FAULTS))
    assert outcome.ok, f"{outcome.broken}\n{outcome.report}"
    assert outcome.killed >= 3
    report = outcome.report
    assert min(outcome.answered, report.resumes, report.fired, report.events) > 10, report
    assert not report.undecided
