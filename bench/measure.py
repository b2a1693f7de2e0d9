"""Runs of a scenario against the broker and the floor, and what they come to."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from bench import broker, floor, generator
from bench.broker import REPOSITORY, Running, cpu_seconds, resident_kib
from bench.generator import Options
from bench.scenarios import Scenario

WARM_UP_CLIENTS = 500
"""Clients that come before the memory of idle ones is looked at."""
SETTLE_S = 1.5
Figures = dict[str, float]


class Side(NamedTuple):
    """What is measured: the broker of a checkout, or the floor (`checkout` None)."""

    name: str
    checkout: Path | None = REPOSITORY
    settings: Mapping[str, Any] = {}


BROKER = Side("broker")
FLOOR = Side("floor", None)


@contextmanager
def serving(side: Side, scenario: Scenario) -> Iterator[Running]:
    """A server of the kind that `scenario` wants."""
    with ExitStack() as stack:
        store: str = scenario.store
        roles: dict[int, str] = {}
        if store == "redis":
            port, pid = stack.enter_context(broker.redis_server())
            store, roles = f"redis:{port}", {pid: "redis"}
        if side.checkout is None:
            target = stack.enter_context(floor.running(store))
        else:
            settings = {**scenario.settings, **side.settings}
            target = stack.enter_context(
                broker.running(store, scenario.shards, settings=settings, checkout=side.checkout)
            )
        yield target._replace(roles=target.roles | roles)


def measure(side: Side, scenario: Scenario, seconds: float, warm_up_s: float = 1) -> Figures:
    """One run on a server of its own.

    Figures: `per_s` of the scenario's unit; `p50_ms`, `p90_ms`, `p99_ms`, `p999_ms`, `max_ms`; CPU
    in cores, `…_cpu`, of the generator and of each kind of process; `cpu_s_per_million` of all but
    the generator; with subscribers `seen_percent`, of the events that they should have got.

    Raises:
        broker.StartFailed, generator.LoadFailed, generator.NeedsCompiler
    """
    with serving(side, scenario) as target:
        prepare(target, scenario)
        if scenario.unit == "clients":
            return _idle(target, scenario, seconds)
        return run(target, scenario, seconds, warm_up_s)


def prepare(target: Running, scenario: Scenario) -> None:
    """Run the loads that come before the measured one."""
    for load in scenario.prepare:
        generator.run(target, load)


def run(target: Running, scenario: Scenario, seconds: float, warm_up_s: float) -> Figures:
    """One run on a server that is prepared; figures and errors as of `measure`."""
    load = {**scenario.load, "seconds": seconds, "warm-up": warm_up_s}
    return _figures(generator.run(target, load), scenario, target)


def _figures(told: dict[str, Any], scenario: Scenario, target: Running) -> Figures:
    unit, took = scenario.unit, told["seconds"]
    timed = unit.removesuffix("ies") + "y" if unit == "deliveries" else unit.removesuffix("s")
    figures = {"per_s": told[f"{unit}_per_s"], "generator_cpu": told["generator_cpu_s"] / took}
    for name in ("p50_ms", "p90_ms", "p99_ms", "p999_ms", "max_ms"):
        if f"{timed}_{name}" in told:
            figures[name] = told[f"{timed}_{name}"]
    total = 0.0
    for pid, used in told["cpu_s"].items():
        role = f"{target.roles[int(pid)]}_cpu"
        figures[role] = figures.get(role, 0) + used / took
        total += used
    if told[unit]:
        figures["cpu_s_per_million"] = total / told[unit] * 1e6
    if scenario.load.get("subscribers") and told["issued_total"]:
        lost = told["missed"] + told["undelivered"] + told["repeated"]
        figures["seen_percent"] = 100 * (
            told["delivered_total"] / max(1, told["delivered_total"] + lost)
        )
        figures["resyncs"] = told["resyncs"]
    if told["unanswered"]:
        raise generator.LoadFailed(f"{told['unanswered']} calls were not answered")
    return figures


def _idle(target: Running, scenario: Scenario, seconds: float) -> Figures:
    """What clients cost in memory and CPU after the first ones came."""
    few: Options = {**scenario.load, "subscribers": WARM_UP_CLIENTS}
    clients = int(scenario.load["subscribers"])
    with generator.held(target, few):
        time.sleep(SETTLE_S)
        before = sum(map(resident_kib, target.roles))
        with generator.held(target, scenario.load):
            time.sleep(SETTLE_S)
            grew = sum(map(resident_kib, target.roles)) - before
            cpu, started = sum(map(cpu_seconds, target.roles)), time.monotonic()
            time.sleep(seconds)
            used = sum(map(cpu_seconds, target.roles)) - cpu
            cores = used / (time.monotonic() - started)
    return {
        "kib_per_client": grew / clients,
        "cpu_ms_per_s_of_1000": cores * 1000 / (clients + WARM_UP_CLIENTS) * 1000,
    }


def medians(runs: list[Figures]) -> Figures:
    """Of each figure that every run has."""
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def main_metric(scenario: Scenario) -> str:
    """The figure that says how well a scenario went, for ratios."""
    if scenario.unit == "clients":
        return "kib_per_client"
    if "rate" in scenario.load or scenario.load.get("in-flight") == 1:
        return "p50_ms"
    return "per_s"


def ratio(scenario: Scenario, broker_runs: list[Figures], floor_runs: list[Figures]) -> float:
    """Median of broker/floor over pairs of runs made in turn."""
    metric = main_metric(scenario)
    pairs = zip(broker_runs, floor_runs, strict=False)
    found = [b[metric] / f[metric] for b, f in pairs if f.get(metric)]
    return statistics.median(found) if found else math.nan
