"""Every kind of load runs, and none costs twice of what it did."""

from __future__ import annotations

import shutil

import pytest

from bench import measure, smoke
from bench.measure import FLOOR
from bench.scenarios import SCENARIOS

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.mark.parametrize(
    "name",
    [
        "mixed-memory",
        "mixed-file",
        "rate-1000-memory",
        "paced-10",
        "seen",
        "custom-events",
        "small-groups",
        "streams-memory",
        "custom-stream",
        "idle",
    ],
)
def test_the_floor_takes_every_load(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SETTLE_S", 0.1)
    scenario = SCENARIOS[name]
    figures = measure.measure(FLOOR, scenario, 0.2, 0.1)
    assert figures[measure.main_metric(scenario)] > 0
    assert figures.get("seen_percent", 100) == 100


@pytest.mark.timeout(300)
def test_nothing_became_much_slower() -> None:
    assert smoke.check() == []
