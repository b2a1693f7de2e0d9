"""What counts as a change, and what as noise."""

from __future__ import annotations

import random
from pathlib import Path
from xml.etree import ElementTree

from bench import smoke
from bench.compare import paired, unpaired
from bench.report import markdown
from bench.results import Results
from bench.scenarios import SCENARIOS, Wanted


def noisy(count: int, seed: int, factor: float = 1.0) -> list[float]:
    dice = random.Random(seed)
    return [factor * 1000 * dice.lognormvariate(0, 0.05) for _ in range(count)]


def test_a_change_in_every_pair_is_found_whatever_the_machine_does_meanwhile() -> None:
    machine = [1.0, 2.0, 0.7, 1.5, 1.1, 0.6, 1.9, 1.3]
    old = [m * 1000 for m in machine]
    new = [m * n * 1.1 for m, n in zip(machine, noisy(8, 3, 1.0), strict=True)]
    verdict = paired(old, new)
    assert verdict.words("per_s") == "better"
    assert verdict.words("p50_ms") == "WORSE"
    assert verdict.low < verdict.ratio < verdict.high


def test_noise_is_rarely_taken_for_a_change() -> None:
    found = sum(
        paired(noisy(8, seed), noisy(8, seed + 10_000)).words("per_s") != "no change beyond noise"
        for seed in range(100)
    )
    assert found <= 5  # 1 in 100 is expected


def test_runs_of_different_times_are_compared_as_a_whole() -> None:
    assert unpaired(noisy(6, 1), noisy(6, 2, 1.5)).words("per_s") == "better"
    assert unpaired(noisy(6, 1), noisy(6, 2)).words("per_s") == "no change beyond noise"


def test_few_pairs_prove_nothing() -> None:
    verdict = paired([1.0] * 3, [9.0] * 3)
    assert verdict.p == 0.25
    assert verdict.words("per_s") == "no change beyond noise"


def test_twice_the_cost_fails_the_smoke_bench() -> None:
    kept = smoke.kept_ratios()
    assert set(kept) == {scenario.name for scenario in smoke.CHECKS}
    assert smoke.slower({name: 1.3 * ratio for name, ratio in kept.items()}, kept) == []
    assert smoke.slower({name: 2 * ratio for name, ratio in kept.items()}, kept) == list(kept)


def test_wanted_figures_have_a_side() -> None:
    assert Wanted("per_s", at_least=10).met(10)
    assert not Wanted("per_s", at_least=10).met(9)
    assert Wanted("p50_ms", at_most=10).met(10)
    assert not Wanted("p50_ms", at_most=10).met(11)


def test_the_report_has_what_is_wanted_and_a_picture(tmp_path: Path) -> None:
    figures = {"per_s": 50_000.0, "p50_ms": 1.0, "p99_ms": 2.0, "cpu_s_per_million": 9.0}
    row = {
        "title": SCENARIOS["set-memory"].title,
        "unit": "calls",
        "metric": "per_s",
        "broker": figures,
        "floor": figures | {"per_s": 200_000.0},
        "ratio": 0.25,
        "runs": {"broker": [figures], "floor": [figures]},
        "seconds": 1,
        "date": "2026-01-02T03:04+00:00",
        "revision": "abc",
        "machine": "2 cores",
    }
    results = Results({"set-memory": row})
    text = markdown(results)
    assert "| calls/s | ≥ 95,000 | 50,000 | 200,000 | 0.25 | **not met** |" in text

    results.write(tmp_path / "some.json")
    assert Results.read(tmp_path / "some.json") == results
    picture = ElementTree.parse(tmp_path / "some.svg").getroot()
    texts = [element.text for element in picture.iter() if element.text]
    assert {"set-memory", "50,000", "200,000"} <= set(texts)
