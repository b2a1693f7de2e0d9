"""`stream::set`, pipelined and one at a time, on each KvStore: `make bench`.

Prints a table of medians and writes `bench/results/set_throughput.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench.broker import running

SCENARIOS = {"pipelined, 8 x 32": (8, 32), "one at a time": (1, 1)}
STORES = ("in_memory", "file_based")
RESULTS = Path(__file__).parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3, help="of each run")
    parser.add_argument("--runs", type=int, default=3, help="of which the median is taken")
    parser.add_argument("--store", choices=STORES, action="append")
    parser.add_argument("--shards", type=int, default=2)
    options = parser.parse_args()
    rows = []
    for store in options.store or STORES:
        for scenario, (connections, in_flight) in SCENARIOS.items():
            runs = [
                measure(store, options.shards, connections, in_flight, options.seconds)
                for _ in range(options.runs)
            ]
            row = {"store": store, "scenario": scenario}
            row |= {key: statistics.median(r[key] for r in runs) for key in runs[0]}
            rows.append(row)
            print_row(row, header=len(rows) == 1)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "set_throughput.json").write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def print_row(row: dict[str, float | str], *, header: bool) -> None:
    if header:
        print(
            f"{'store':<11} {'scenario':<18} {'calls/s':>9} {'p50 ms':>8} {'p99 ms':>8}"
            "   CPU: generator gateway shards"
        )
    print(
        f"{row['store']:<11} {row['scenario']:<18} {row['calls_per_s']:>9,.0f} "
        f"{row['p50_ms']:>8.3f} {row['p99_ms']:>8.3f}   {row['generator_cpu']:>14.2f}"
        f" {row['gateway_cpu']:>7.2f} {row['shards_cpu']:>6.2f}",
        flush=True,
    )


def measure(
    store: str, shards: int, connections: int, in_flight: int, seconds: float
) -> dict[str, float]:
    """One run against a broker of its own."""
    with running(store, shards) as broker:
        before = {pid: cpu_seconds(pid) for pid in broker.roles}
        started = time.perf_counter()
        load = [sys.executable, "-m", "bench.load", "127.0.0.1", str(broker.worker_port)]
        load += ["--connections", str(connections), "--in-flight", str(in_flight)]
        load += ["--seconds", str(seconds)]
        output = subprocess.run(load, check=True, stdout=subprocess.PIPE).stdout
        took = time.perf_counter() - started
        used = {pid: (cpu_seconds(pid) - before[pid]) / took for pid in broker.roles}
        result: dict[str, float] = json.loads(output)
        for name in ("gateway", "shards"):
            cores = (value for pid, value in used.items() if broker.roles[pid] == name)
            result[f"{name}_cpu"] = sum(cores)
        return result


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    raise SystemExit(main())
