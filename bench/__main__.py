"""`python -m bench SCENARIO…` measures, `python -m bench list` says what there is, `python -m bench
report` prints the tables of what was measured as Markdown."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from typing import Any

from bench import broker, generator, report
from bench.measure import BROKER, FLOOR, Figures, Side, main_metric, measure, medians, ratio
from bench.results import RESULTS, Results, machine, revision
from bench.scenarios import SCENARIOS, Scenario


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "scenarios", nargs="*", metavar="SCENARIO", help="or its beginning and *; default: all"
    )
    parser.add_argument("--seconds", type=float, default=3, help="of each run")
    parser.add_argument("--warm-up", type=float, default=1, help="seconds before each run")
    parser.add_argument("--runs", type=int, default=3, help="of which medians are taken")
    parser.add_argument("--large", action="store_true", help="also those that take long")
    parser.add_argument("--no-floor", action="store_true", help="the broker alone")
    parser.add_argument("--broker", type=json.loads, default={}, help="JSON below `broker:`")
    parser.add_argument("--output", default=str(RESULTS / "bench.json"))
    parser.add_argument("--write", action="store_true", help="report: into bench/README.md")
    options = parser.parse_args()
    results = Results.read(options.output)
    match options.scenarios:
        case ["list"]:
            for scenario in SCENARIOS.values():
                large = " (--large)" if scenario.large else ""
                print(f"{scenario.name:<28} {scenario.title}{large}")
            return 0
        case ["report"]:
            return report.main(results, write=options.write)
    chosen = _chosen(options.scenarios, options.large)
    if not chosen:
        parser.error("no such scenario: see `python -m bench list`")
    failed = 0
    print(report.HEADER)
    for number, scenario in enumerate(chosen, 1):
        try:
            row = _run(scenario, f"[{number}/{len(chosen)}] {scenario.name}", options)
        except generator.NeedsCompiler as error:
            print(f"{scenario.name}: skipped: {error}", file=sys.stderr)
            continue
        except (generator.LoadFailed, broker.StartFailed) as error:
            print(f"{scenario.name}: FAILED: {error}", file=sys.stderr)
            failed += 1
            continue
        for line in report.lines(scenario.name, row):
            print(line, flush=True)
        results.rows[scenario.name] = row
        results.write(options.output)
    return 1 if failed else 0


def _chosen(names: list[str], large: bool) -> list[Scenario]:
    """The scenarios that are named, each of which may end with `*`."""
    if not names:
        return [s for s in SCENARIOS.values() if large or not s.large]
    return [
        s
        for s in SCENARIOS.values()
        if s.name in names
        or any(n.endswith("*") and s.name.startswith(n[:-1]) for n in names if large or not s.large)
    ]


def _run(scenario: Scenario, progress: str, options: argparse.Namespace) -> dict[str, Any]:
    """A row of the results: runs of the broker and of the floor in turn."""
    sides: list[Side] = [BROKER._replace(settings=options.broker)]
    if scenario.floor and not options.no_floor:
        sides.append(FLOOR)
    runs: dict[str, list[Figures]] = {side.name: [] for side in sides}
    for number in range(options.runs):
        for side in sides:
            print(f"{progress}, run {number + 1}/{options.runs}, {side.name}", file=sys.stderr)
            runs[side.name].append(measure(side, scenario, options.seconds, options.warm_up))
    row: dict[str, Any] = {
        "title": scenario.title,
        "unit": scenario.unit,
        "metric": main_metric(scenario),
        "broker": medians(runs["broker"]),
        "runs": runs,
        "seconds": options.seconds,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "revision": revision(),
        "machine": machine(),
    }
    if len(sides) > 1:
        row["floor"] = medians(runs["floor"])
        row["ratio"] = ratio(scenario, runs["broker"], runs["floor"])
    return row


if __name__ == "__main__":
    raise SystemExit(main())
