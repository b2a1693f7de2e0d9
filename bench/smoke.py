"""Whether the broker became slower: `python -m bench.smoke`, a part of the tests.

CPU time per call, delivery, join or invocation of the broker, divided by that of the floor, both
measured in turn within seconds: this hardly depends on the machine or on what else runs there,
unlike calls a second. A ratio that is more than `TOLERANCE` times the one kept in
`bench/results/smoke.json`, and is so again in a second try, fails. `--renew` keeps what is
measured, after a change that is meant: faster or slower.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path

from bench.broker import REPOSITORY
from bench.measure import FLOOR, Figures, Side, prepare, run, serving
from bench.results import RESULTS
from bench.scenarios import NO_RATE_LIMIT, SCENARIOS, Scenario

KEPT = RESULTS / "smoke.json"
TOLERANCE = 1.6
METRIC = "cpu_s_per_million"
SECONDS, WARM_UP_S, ROUNDS = 0.4, 0.15, 3
RENEWAL_RUNS = 7


def _small(name: str, **load: int) -> Scenario:
    """A scenario with less to do, on a broker that several of them share."""
    scenario = SCENARIOS[name]
    return dataclasses.replace(
        scenario, load={**scenario.load, **load}, settings=NO_RATE_LIMIT, prepare=()
    )


_FILL = {"writers": 8, "in-flight": 32, "groups": 20, "items": 100, "calls": 20 * 100}
CHECKS = (
    _small("set-memory"),
    _small("fanout-100", subscribers=200, sample=20),
    _small("lone-100", subscribers=200, sample=20),
    dataclasses.replace(_small("join-100", groups=20, joiners=50), prepare=(_FILL,)),
    _small("triggers"),
    _small("set-file"),
)
"""Those with the same kind of broker follow one another."""


def ratios(checkout: Path = REPOSITORY, checks: Sequence[Scenario] = CHECKS) -> dict[str, float]:
    """What each check costs the broker, in multiples of the floor's cost."""
    found = {}
    sides = (Side("broker", checkout), FLOOR)
    for _, same in groupby(checks, lambda scenario: scenario.store):
        sharing = list(same)
        with ExitStack() as stack:
            targets = [stack.enter_context(serving(side, sharing[0])) for side in sides]
            for scenario in sharing:
                runs: list[list[Figures]] = [[], []]
                for target in targets:
                    prepare(target, scenario)
                for _ in range(ROUNDS):
                    for target, figures in zip(targets, runs, strict=True):
                        figures.append(run(target, scenario, SECONDS, WARM_UP_S))
                broker, floor = (statistics.median(f[METRIC] for f in side) for side in runs)
                found[scenario.name] = broker / floor
                seen = min(figures.get("seen_percent", 100) for figures in runs[0])
                assert seen == 100, f"{scenario.name}: {seen} % of the events seen"
    return found


def slower(found: Mapping[str, float], kept: Mapping[str, float]) -> list[str]:
    """The checks that cost clearly more than what was kept of them."""
    return [name for name, ratio in found.items() if ratio > kept[name] * TOLERANCE]


def kept_ratios() -> dict[str, float]:
    """What the checks cost when that was last said to be right."""
    kept: dict[str, float] = json.loads(KEPT.read_text())
    return kept


def check(checkout: Path = REPOSITORY) -> list[str]:
    """Measure, print, and return what became slower: a line each."""
    kept = kept_ratios()
    found = ratios(checkout)
    again = slower(found, kept)
    if again:  # a machine that stands still at the wrong time does not do so twice
        found |= ratios(checkout, [scenario for scenario in CHECKS if scenario.name in again])
    for name, ratio in found.items():
        twice = ", measured twice" if name in again else ""
        print(f"{name:<12} {ratio:>6.2f} times the floor's CPU, kept: {kept[name]:.2f}{twice}")
    return [
        f"{name}: {found[name]:.2f} times the floor's CPU, {kept[name]:.2f} when kept"
        for name in slower(found, kept)
    ]


def renew() -> None:
    """Keep what is measured now."""
    found = [ratios() for _ in range(RENEWAL_RUNS)]
    kept = {s.name: round(statistics.median(f[s.name] for f in found), 2) for s in CHECKS}
    KEPT.write_text(json.dumps(kept, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--renew", action="store_true", help="keep what is measured now")
    parser.add_argument("--checkout", type=Path, default=REPOSITORY, help="whose broker")
    options = parser.parse_args()
    if options.renew:
        renew()
        return 0
    worse = check(options.checkout)
    for line in worse:
        print(f"slower: {line}", file=sys.stderr)
    return 1 if worse else 0


if __name__ == "__main__":
    raise SystemExit(main())
