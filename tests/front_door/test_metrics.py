"""What is exposed is what docs/metrics.md says, and stays small whatever the users do."""

from __future__ import annotations

import asyncio
import re
import subprocess
import time
import urllib.request

import pytest
from msgspec import structs
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from broker.config import Limits
from tests.conftest import Run
from tests.support.broker import IN_MEMORY, REPOSITORY, Broker
from tests.support.calls import LONG_S, item, result_of
from tests.support.stream_client import StreamClient, settled
from tests.support.worker import Failure, Worker

PAGE = (REPOSITORY / "docs" / "metrics.md").read_text()
NEVER = {"shard", "le"}


def urls(broker: Broker) -> list[str]:
    """The gateway's, then the shards'."""
    port = int(broker.metrics_url.rpartition(":")[2].split("/")[0])
    return [f"http://127.0.0.1:{port + n}/metrics" for n in range(1 + broker.shards)]


def text_of(url: str, accept: str = "*/*") -> str:
    request = urllib.request.Request(url, headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=10) as response:
        text: str = response.read().decode()
    return text


def rows(part: str) -> dict[str, tuple[str, set[str]]]:
    """The table of a part of the page: name to type and labels."""
    section = PAGE.partition(f"## {part}")[2].partition("\n## ")[0]
    found = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) \| .+ \|$", section, re.MULTILINE)
    return {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in found}


def exposed(url: str) -> dict[str, tuple[str, set[str]]]:
    families = text_string_to_metric_families(text_of(url))
    return {
        family.name + ("_total" if family.type == "counter" else ""): (
            family.type,
            {label for sample in family.samples for label in sample.labels} - NEVER,
        )
        for family in families
        if family.name.startswith("broker_")
    }


@pytest.mark.parametrize(("part", "number"), [("Gateway", 0), ("Shards", 1)])
def test_the_page_has_every_metric(
    part: str, number: int, disk_broker: Broker, memory_broker: Broker
) -> None:
    found = exposed(urls(disk_broker)[number]) | exposed(urls(memory_broker)[number])
    table = rows(part)
    assert found.keys() == table.keys()
    for name, (kind, labels) in found.items():
        assert kind == table[name][0], name
        assert labels <= table[name][1], name  # some have no sample yet


def test_both_formats_can_be_read(memory_broker: Broker) -> None:
    for url in urls(memory_broker):
        families = list(openmetrics(text_of(url, "application/openmetrics-text; version=1.0.0")))
        assert any(
            family.name == "broker_build_info" or "broker" in family.name for family in families
        )
        assert text_of(url).count("# HELP broker_") == text_of(url).count("# TYPE broker_")


def samples(url: str, name: str) -> dict[str, float]:
    """Labels but `shard`, as text, to the value, of the metric `name`."""
    found = {}
    for family in text_string_to_metric_families(text_of(url)):
        for sample in family.samples:
            if sample.name == name:
                labels = {k: v for k, v in sorted(sample.labels.items()) if k != "shard"}
                found[",".join(f"{k}={v}" for k, v in labels.items())] = sample.value
    return found


def total(broker: Broker, name: str) -> float:
    """The sum over shards, without their labels."""
    return sum(sum(samples(url, name).values()) for url in urls(broker)[1:])


def test_what_can_happen_is_there_before_it_happens() -> None:
    with Broker(IN_MEMORY) as broker:
        gateway, shard, _ = urls(broker)
        refused = samples(gateway, "broker_handshakes_refused_total")
        assert {"port=stream,reason=timeout", "port=worker,reason=unauthorized"} <= refused.keys()
        failures = samples(gateway, "broker_stream_call_failures_total")
        assert "code=shard_unavailable,function=stream::set" in failures
        failed = samples(shard, "broker_call_failures_total")
        assert "code=STREAM_SET_ERROR,function=Set" in failed
        for counts in (refused, failures, failed, samples(shard, "broker_calls_total")):
            assert counts
            assert set(counts.values()) == {0}


def test_limits_are_those_of_the_configuration() -> None:
    with Broker(IN_MEMORY + "broker: {limits: {connections_max: 77}}\n") as broker:
        for url in urls(broker):
            limits = samples(url, "broker_limit")
            assert limits["limit=connections_max"] == 77
            assert limits["limit=ping_interval_s"] == 20
            assert limits.keys() == {f"limit={f.name}" for f in structs.fields(Limits)}


@pytest.mark.parametrize("config", [IN_MEMORY, None], ids=["in_memory", "file_based"])
def test_what_is_stored_is_counted(config: str | None, run: Run) -> None:
    async def fill(broker: Broker) -> None:
        worker = await Worker.open(broker.worker_url)
        for n in range(30):
            data = item(f"s{n % 3}", f"g{n % 10}", f"i{n}", data="x" * 100)
            await result_of(worker, "stream::set", data)
        for n in range(5):
            await result_of(worker, "stream::delete", item(f"s{n % 3}", f"g{n % 10}", f"i{n}"))
        names = {"stream_name": "none", "group_id": "g"}
        await result_of(worker, "stream::list", names)
        await worker.close()

    def stored(broker: Broker) -> list[float]:
        return [total(broker, f"broker_store_{name}") for name in ("groups", "items")]

    with Broker(config) as broker:
        run(fill(broker))
        if config is None:  # the first survey may have come too early
            broker.restart()
            end = time.monotonic() + LONG_S
            while stored(broker) != [25, 25]:
                assert time.monotonic() < end, stored(broker)
                time.sleep(0.2)
            assert total(broker, "broker_store_disk_bytes") > 25 * 100
            assert total(broker, "broker_store_files_unreadable") == 0
        assert stored(broker) == [25, 25]
        assert 25 * 100 <= total(broker, "broker_store_bytes") <= 25 * 110
        streams = [sum(samples(url, "broker_store_streams").values()) for url in urls(broker)[1:]]
        assert max(streams) == 3
        assert broker.log.count("file_not_counted") == 0


def test_a_damaged_file_is_told_of(run: Run) -> None:
    async def store(broker: Broker) -> None:
        worker = await Worker.open(broker.worker_url)
        await result_of(worker, "stream::set", item("s", "g", "i", data=1))
        await worker.close()

    with Broker() as broker:
        run(store(broker))
        assert broker.stop() == 0
        (path,) = broker.data_dir.rglob("s.db")
        path.write_bytes(b"nonsense" * 1000)
        broker.start()
        end = time.monotonic() + LONG_S
        while total(broker, "broker_store_files_unreadable") != 1:
            assert time.monotonic() < end
            time.sleep(0.2)
        assert "file_not_counted" in broker.log


def test_hits_misses_and_failures(run: Run) -> None:
    async def use(broker: Broker) -> None:
        worker = await Worker.open(broker.worker_url)
        for _ in range(10):
            await result_of(worker, "stream::get", item("s", "g", "i"))
        assert "error" in await worker.call("stream::get", {"stream_name": "s"})
        bad = item("s", "g", "i", ops=[{"type": "no such"}])
        assert "error" in await worker.call("stream::update", bad)
        await worker.close()

    with Broker() as broker:

        async def store() -> None:
            worker = await Worker.open(broker.worker_url)
            await result_of(worker, "stream::set", item("s", "g", "i", data=1))
            await worker.close()

        run(store())
        broker.restart()
        run(use(broker))
        assert total(broker, "broker_cache_misses_total") == 1
        assert total(broker, "broker_cache_hits_total") == 10
        failed = samples(urls(broker)[0], "broker_stream_call_failures_total")
        assert failed["code=deserialization_error,function=stream::get"] == 1
        assert sum(failed.values()) == 2
        assert total(broker, "broker_call_failures_total") == 1


def test_traffic_and_fan_out(run: Run) -> None:
    async def main(broker: Broker) -> None:
        worker = await Worker.open(broker.worker_url)
        clients = [await StreamClient.open(broker.stream_url) for _ in range(5)]
        for client in clients:
            await client.join("s", "g")
        for n in range(20):
            await result_of(worker, "stream::set", item("s", "g", "i", data=f"{n}" * 500))
        for client in clients:
            await client.next(lambda frame: frame.get("seq") == 20)
        await settled(clients)
        for connection in (*clients, worker):
            await connection.close()

    with Broker(IN_MEMORY) as broker:
        run(main(broker))
        gateway = urls(broker)[0]
        sent = samples(gateway, "broker_sent_bytes_total")
        assert sent["port=stream"] > 5 * 20 * 500
        assert samples(gateway, "broker_received_bytes_total")["port=worker"] > 20 * 500
        assert samples(gateway, "broker_client_messages_total")[""] == 5
        count = samples(gateway, "broker_event_fanout_deliveries_count")[""]
        assert 1 <= count <= 20
        assert samples(gateway, "broker_event_fanout_deliveries_sum")[""] == 100
        assert samples(gateway, "broker_event_delay_seconds_count")[""] == count
        assert samples(gateway, "broker_event_delay_seconds_sum")[""] < LONG_S
        assert samples(gateway, "broker_connections_closed_total")["code=1000,port=stream"] == 5
        pattern = r"^broker_shard_link_received_bytes_total\{.*\} (\S+)"
        received = map(float, re.findall(pattern, text_of(gateway), re.MULTILINE))
        assert 20 * 500 < sum(received) <= total(broker, "broker_link_sent_bytes_total")


def test_the_top_streams_are_exposed_by_name_when_asked_for(run: Run) -> None:
    """So many, whatever they are called."""
    evil = 'a"b\\c\nd\x1b\r\u2028{}'

    async def main(broker: Broker) -> None:
        worker = await Worker.open(broker.worker_url)
        calls = [item(f"s{n}", "g", "i", data=n) for n in range(200)]
        calls += [item(evil, "g", "i", data=n) for n in range(50)]
        answers = [worker.call("stream::set", data, LONG_S) for data in calls]
        assert all("result" in answer for answer in await asyncio.gather(*answers))
        await worker.close()

    with Broker(IN_MEMORY + "broker: {metrics: {top_streams: 3}}\n") as broker:
        run(main(broker))
        found = [samples(url, "broker_top_stream_operations_per_second") for url in urls(broker)]
        assert [len(part) for part in found] == [0, 3, 3]
        rates = found[1] | found[2]
        assert max(rates, key=lambda stream: rates[stream]) == f"stream={evil}"
        for url in urls(broker):
            assert list(openmetrics(text_of(url, "application/openmetrics-text; version=1.0.0")))
            done = subprocess.run(
                ["promtool", "check", "metrics"], input=text_of(url).encode(), check=False
            )
            assert done.returncode in (0, 3), "3: only matters of style"


def test_durations_are_counted(memory_broker: Broker, run: Run) -> None:
    async def main() -> None:
        worker = await Worker.open(memory_broker.worker_url)
        for n in range(80):
            await worker.call("stream::set", item("s", "g", "i", data=n))
        await worker.close()

    run(main())
    gateway, *shards = map(text_of, urls(memory_broker))
    calls = r'^broker_stream_call_seconds_count\{.*"stream::set"\} (\S+)'
    assert float(re.findall(calls, gateway, re.MULTILINE)[0]) >= 10
    count = re.compile(r"^broker_commit_seconds_count\S* (\S+)", re.MULTILINE)
    batches = [float(n) for text in shards for n in count.findall(text)]
    assert sum(batches) >= 80


def test_case_41_metrics(memory_broker: Broker, run: Run) -> None:
    """Names and texts of users make no series."""

    async def main() -> None:
        worker = await Worker.open(memory_broker.worker_url)

        async def fails(_: object) -> Failure:
            return Failure(f"code-{len(worker.invocations)}", f"text {len(worker.invocations)}")

        for start in range(0, 2000, 100):
            calls = []
            for n in range(start, start + 100):
                await worker.register_function(f"function-{n}", fails)
                calls.append(worker.call(f"function-{n}", {}, LONG_S))
                calls.append(
                    worker.call("stream::set", item(f"s{n}", f"g{n}", f"i{n}", data=n), LONG_S)
                )
                calls.append(worker.call(f"nothing-{n}", {}, LONG_S))
            await asyncio.gather(*calls)
        async with await StreamClient.open(memory_broker.stream_url) as client:
            for n in range(200):
                await client.join(f"s{n}", f"g{n}", f"id-{n}")
                await client.send({"type": f"odd-{n}"})
                await client.next()
        await worker.close()

    def lines() -> int:
        return sum(len(text_of(url).splitlines()) for url in urls(memory_broker))

    before = lines()
    run(main())
    assert lines() - before < 100
