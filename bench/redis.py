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
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from bench import broker as brokers
from bench import load
from bench.broker import Running, free_port
from bench.set_throughput import RESULTS, cpu_seconds

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
            with running_on(redis, options.shards) as broker:
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
    before = {pid: cpu_seconds(pid) for pid in broker.roles}
    redis_before = cpu_seconds(redis_pid) if redis_pid else 0.0
    command = [sys.executable, "-m", "bench.redis", "--load", str(groups), "127.0.0.1"]
    command += [str(broker.worker_port), "--connections", str(CONNECTIONS), "--in-flight"]
    command += [str(IN_FLIGHT), "--seconds", str(seconds), "--warm-up", "0.5"]
    output = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    calls = output["calls_per_s"] * (seconds + 0.5)  # about: the warm-up counts as the rest
    figures = {"per_s": output["calls_per_s"], "p50_ms": output["p50_ms"]}
    figures |= {"gateway_us": 0.0, "shards_us": 0.0}
    for pid, role in broker.roles.items():
        used = (cpu_seconds(pid) - before[pid]) / calls * 1e6
        figures["gateway_us" if role == "gateway" else "shards_us"] += used
    redis_used = cpu_seconds(redis_pid) - redis_before if redis_pid else 0.0
    return figures | {"redis_us": redis_used / calls * 1e6}


@contextmanager
def running_on(redis: Redis, shards: int) -> Iterator[Running]:
    """`broker serve` on a Redis."""
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    config = folder / "broker.yaml"
    config.write_text(
        "workers:\n- name: iii-stream\n  config:\n    adapter:\n      name: redis\n"
        f"      config: {{redis_url: 'redis://127.0.0.1:{redis.port}'}}\n"
    )
    port, worker_port = free_port(), free_port()
    process = subprocess.Popen(
        f"{sys.executable} -m broker serve --config {config} --data-dir {folder / 'data'}"
        f" --shards {shards} --host 127.0.0.1 --port {port} --worker-port {worker_port}"
        " --metrics-port 0 --log-level error".split(),
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        ready = process.stdout.readline()
        assert ready.startswith(b"ready "), ready
        yield Running(port, worker_port, brokers._roles(process.pid))
    finally:
        process.terminate()
        process.wait(30)
        shutil.rmtree(folder)


def set_call(groups: int, connection: int, number: int, value: bytes) -> bytes:
    """As the generator's, over `groups` groups."""
    return load.masked_text_frame(
        b'{"type":"invokefunction","invocation_id":"00000000-0000-4000-8000-%012d",'
        b'"function_id":"stream::set","data":{"stream_name":"bench","group_id":"group-%d",'
        b'"item_id":"item-%d","data":%b}}'
        % (number, (connection * 251 + number) % groups, number % 1000, value)
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        load.set_call = partial(set_call, int(sys.argv[2]))
        del sys.argv[1:3]
        load.main()
    raise SystemExit(main())
