"""What a change did to the speed: `python -m bench.compare OLD NEW [SCENARIO…]`.

OLD and NEW are git revisions or folders with a checkout; their brokers are run in pairs, in turn,
with the generator and the scenarios of this checkout. Two JSON files of `python -m bench` can be
compared as well, of which runs are not paired. A difference counts when a permutation test finds it
in less than one of a hundred shuffles of what was measured: 8 pairs are needed for it to find any.
"""

from __future__ import annotations

import argparse
import io
import itertools
import math
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from bench.broker import REPOSITORY
from bench.measure import Side, main_metric, measure
from bench.results import Results
from bench.scenarios import SCENARIOS, Scenario

DEFAULT = ("set-memory", "set-file", "one-file", "fanout-1000", "lone-1000", "join-100", "triggers")
P_MAX = 0.01
SHUFFLES_MAX = 4096
HIGHER_IS_BETTER = {"per_s"}


class Verdict(NamedTuple):
    """What is said of one figure: the typical new/old, its likely range, and how it is judged."""

    ratio: float
    low: float
    high: float
    p: float

    def words(self, metric: str) -> str:
        """better, worse, or nothing beyond noise."""
        if self.p >= P_MAX:
            return "no change beyond noise"
        return "better" if (self.ratio > 1) == (metric in HIGHER_IS_BETTER) else "WORSE"


def paired(old: Sequence[float], new: Sequence[float]) -> Verdict:
    """Compare figures that were measured in pairs.

    The test flips the signs of the pairs' differences: with no change, each sign is as likely.
    """
    logs = [math.log(n / o) for o, n in zip(old, new, strict=True)]
    found = abs(statistics.fmean(logs))
    count = len(logs)
    if 2**count <= SHUFFLES_MAX:
        signs = list(itertools.product((1, -1), repeat=count))
    else:
        dice = random.Random(1)
        signs = [tuple(dice.choices((1, -1), k=count)) for _ in range(SHUFFLES_MAX)]
    means = [
        abs(math.fsum(s * x for s, x in zip(sign, logs, strict=True)) / count) for sign in signs
    ]
    p = sum(mean >= found - 1e-12 for mean in means) / len(means)
    low, high = _range(lambda dice: statistics.fmean(dice.choices(logs, k=count)))
    return Verdict(math.exp(statistics.fmean(logs)), low, high, p)


def unpaired(old: Sequence[float], new: Sequence[float]) -> Verdict:
    """Compare figures of runs at different times: the test shuffles which run is whose."""
    logs = [math.log(x) for x in (*old, *new)]

    def difference(chosen: Sequence[int]) -> float:
        ours = set(chosen)
        rest = [x for k, x in enumerate(logs) if k not in ours]
        return statistics.fmean(logs[k] for k in chosen) - statistics.fmean(rest)

    found = difference(range(len(old), len(logs)))
    if math.comb(len(logs), len(new)) <= SHUFFLES_MAX:
        choices = list(itertools.combinations(range(len(logs)), len(new)))
    else:
        dice = random.Random(1)
        choices = [tuple(dice.sample(range(len(logs)), len(new))) for _ in range(SHUFFLES_MAX)]
    p = sum(abs(difference(c)) >= abs(found) - 1e-12 for c in choices) / len(choices)
    before, after = logs[: len(old)], logs[len(old) :]
    low, high = _range(
        lambda dice: (
            statistics.fmean(dice.choices(after, k=len(after)))
            - statistics.fmean(dice.choices(before, k=len(before)))
        )
    )
    return Verdict(math.exp(found), low, high, p)


def _range(resampled: Callable[[random.Random], float]) -> tuple[float, float]:
    """95 % of a bootstrap, of the logarithm of a ratio."""
    dice = random.Random(1)
    found = sorted(resampled(dice) for _ in range(2000))
    return math.exp(found[50]), math.exp(found[-51])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("scenarios", nargs="*", default=DEFAULT, metavar="SCENARIO")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=2, help="of each run")
    parser.add_argument("--warm-up", type=float, default=0.5)
    options = parser.parse_args()
    unknown = [name for name in options.scenarios if name not in SCENARIOS]
    if unknown:
        parser.error(f"no such scenario: {', '.join(unknown)}")
    print(f"{'scenario':<22} {'figure':<18} {'old':>10} {'new':>10} {'new/old':>8} {'95 %':>13} p")
    if options.old.endswith(".json") and options.new.endswith(".json"):
        return _compare_files(options.old, options.new)
    worse = False
    with ExitStack() as stack:
        sides = [Side(name, _checkout(name, stack)) for name in (options.old, options.new)]
        for name in options.scenarios:
            worse |= _compare(SCENARIOS[name], sides, options)
    return 1 if worse else 0


def _checkout(name: str, stack: ExitStack) -> Path:
    """A folder with the code of a revision, or the folder itself."""
    if Path(name).is_dir():
        return Path(name).resolve()
    archive = subprocess.check_output(["git", "-C", str(REPOSITORY), "archive", name])
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return Path(folder)


def _compare(scenario: Scenario, sides: list[Side], options: argparse.Namespace) -> bool:
    """Run pairs, print what they say; True when something became worse."""
    runs: list[list[dict[str, float]]] = [[], []]
    for pair in range(options.pairs):
        print(f"{scenario.name}, pair {pair + 1}/{options.pairs}", file=sys.stderr)
        for side in (0, 1) if pair % 2 == 0 else (1, 0):  # neither is always first
            figures = measure(sides[side], scenario, options.seconds, options.warm_up)
            runs[side].append(figures)
    return _print(scenario.name, main_metric(scenario), runs[0], runs[1], paired)


def _compare_files(old: str, new: str) -> int:
    before, after = Results.read(old).rows, Results.read(new).rows
    worse = False
    for name in [name for name in before if name in after]:
        runs = [rows[name]["runs"]["broker"] for rows in (before, after)]
        worse |= _print(name, before[name]["metric"], runs[0], runs[1], unpaired)
    return 1 if worse else 0


def _print(
    name: str,
    metric: str,
    old: list[dict[str, float]],
    new: list[dict[str, float]],
    judge: Callable[[Sequence[float], Sequence[float]], Verdict],
) -> bool:
    worse = False
    for figure in dict.fromkeys((metric, "cpu_s_per_million")):
        if not all(run.get(figure) for run in (*old, *new)):
            continue
        before, after = [run[figure] for run in old], [run[figure] for run in new]
        verdict = judge(before, after)
        words = verdict.words(figure)
        worse |= words == "WORSE"
        print(
            f"{name:<22} {figure:<18} {statistics.median(before):>10,.6g}"
            f" {statistics.median(after):>10,.6g} {verdict.ratio:>8.3f}"
            f" {f'{verdict.low:.3f}-{verdict.high:.3f}':>13} {verdict.p:.3f} {words}",
            flush=True,
        )
    return worse


if __name__ == "__main__":
    raise SystemExit(main())
