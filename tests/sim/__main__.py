"""`python -m tests.sim`: runs seeds of the simulation, or one of them with its log."""

from __future__ import annotations

import argparse
import sys
import time

from tests.sim import scenario


def main() -> int:
    """Run what the command line says; 1 when a seed failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim")
    parser.add_argument("--seeds", type=int, default=200, help="how many, from --first on")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument("--verbose", action="store_true", help="print what happens")
    options = parser.parse_args()
    seeds = range(options.first, options.first + options.seeds)
    if options.seed is not None:
        seeds = range(options.seed, options.seed + 1)
    began, failed, steps = time.perf_counter(), [], 0
    totals = dict.fromkeys(("calls", "events", "frames", "fired", "resumes"), 0)
    for seed in seeds:
        result = scenario.run(seed, print if options.verbose else None)
        steps += result.steps
        for name in totals:
            totals[name] += getattr(result.report, name)
        if result.violations:
            failed.append(seed)
            print(f"seed {seed}:", *result.violations[:10], sep="\n    ")
    took_s = time.perf_counter() - began
    print(
        f"{len(seeds)} seeds, {60 * len(seeds) / took_s:.0f} a minute;",
        ", ".join(f"{count} {name}" for name, count in totals.items()),
        f"{steps} steps",
    )
    if failed:
        print("failed:", *failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
