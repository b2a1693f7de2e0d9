"""`stream::set` on Redis, beside the KvStore and `redis-benchmark`: `python -m bench.redis`.

All of them run in turn, round after round, so that the figures of one run can be compared. Prints
medians and writes `bench/results/redis.json`. With `--load` it is the generator (`bench.load`)
over another number of groups, a process of its own.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench import broker as brokers
from bench import generator
from bench.broker import Running, cpu_seconds, free_port
from bench.results import RESULTS

CONNECTIONS, IN_FLIGHT = 8, 32
VALUE_BYTES = 128
GROUPS = (1, 16, 512)
FSYNCS = ("no", "everysec", "always")
START_S_MAX = 10.0


class Redis:
    """A `redis-server` of the measurement's own."""

    def __init__(self, appendfsync: str) -> None:
        self.port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="bench-redis-"))
        is_kept = "no" if appendfsync == "no" else "yes"
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--dir", str(self.folder), "--save", "", "--logfile", "log"]
        command += ["--appendonly", is_kept, "--appendfsync", appendfsync]
        self.process = subprocess.Popen(command)
        end = time.monotonic() + START_S_MAX
        while self.cli("ping") != "PONG":
            assert time.monotonic() < end, "redis-server does not answer"
            time.sleep(0.05)

    def cli(self, *words: str) -> str:
        command = ["redis-cli", "-p", str(self.port), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        shutil.rmtree(self.folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3, help="of each measurement")
    parser.add_argument("--runs", type=int, default=3, help="rounds, of which the median is taken")
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--appendfsync", choices=FSYNCS, default="everysec")
    parser.add_argument("--only-redis", action="store_true", help="leave the KvStores out")
    options = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(options.runs):
        for name, figures in one_round(options):
            found.setdefault(name, []).append(figures)
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    rows = []
    print(f"{'':<28}{'sets/s':>9}   us of CPU per set: {'gateway':>8}{'shards':>8}{'redis':>8}")
    for name, runs in found.items():
        row = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        rows.append({"name": name, **row})
        cells = (f"{row[key]:>8.1f}" for key in ("gateway_us", "shards_us", "redis_us"))
        print(f"{name:<28}{row['per_s']:>9,.0f}{'':22}{''.join(cells)}")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "redis.json").write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def one_round(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, float]]]:
    """Everything that is compared, once."""
    redis = Redis(options.appendfsync)
    try:
        for name, pipeline in (
            ("redis-benchmark HSET, P 1", 1),
            ("redis-benchmark HSET, P 32", 32),
        ):
            yield name, benchmark(redis, pipeline)
        for groups in GROUPS:
            redis.cli("flushall")
            with brokers.running(f"redis:{redis.port}", options.shards) as broker:
                figures = measure(broker, groups, options.seconds, redis.process.pid)
                yield f"Redis, {groups} groups", figures
    finally:
        redis.close()
    for store in () if options.only_redis else ("in_memory", "file_based"):
        for groups in GROUPS:
            with brokers.running(store, options.shards) as broker:
                yield f"KvStore {store}, {groups} groups", measure(broker, groups, options.seconds)


def benchmark(redis: Redis, pipeline: int) -> dict[str, float]:
    """What Redis does of plain HSETs, without a broker."""
    count = 200_000 if pipeline > 1 else 50_000
    before = cpu_seconds(redis.process.pid)
    command = ["redis-benchmark", "-p", str(redis.port), "-c", str(CONNECTIONS), "--csv"]
    command += ["-P", str(pipeline), "-n", str(count), "-r", "1000"]
    command += ["HSET", "stream:bench:group", "item-__rand_int__", "x" * VALUE_BYTES]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = list(csv.DictReader(io.StringIO(output)))
    used = cpu_seconds(redis.process.pid) - before
    per_s = float(rows[0]["rps"])
    return {"per_s": per_s, "gateway_us": 0, "shards_us": 0, "redis_us": used / count * 1e6}


def measure(
    broker: Running, groups: int, seconds: float, redis_pid: int | None = None
) -> dict[str, float]:
    """The generator against a broker."""
    load = {"writers": CONNECTIONS, "in-flight": IN_FLIGHT, "groups": groups, "items": 1000}
    options = {**load, "value-bytes": VALUE_BYTES, "seconds": seconds, "warm-up": 0.5}
    told = generator.run(broker, options, [redis_pid] if redis_pid else [])
    figures = {"per_s": told["calls_per_s"], "p50_ms": told["call_p50_ms"]}
    figures |= {"gateway_us": 0.0, "shards_us": 0.0, "redis_us": 0.0}
    for pid, used_s in told["cpu_s"].items():
        role = "redis" if int(pid) == redis_pid else broker.roles[int(pid)]
        figures[f"{role}_us"] += used_s / told["calls"] * 1e6
    return figures


if __name__ == "__main__":
    raise SystemExit(main())
