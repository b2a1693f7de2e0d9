"""What is exposed is what docs/metrics.md says, and stays small whatever the users do."""

from __future__ import annotations

import asyncio
import re
import urllib.request

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import Run
from tests.support.broker import REPOSITORY, Broker
from tests.support.calls import LONG_S, item
from tests.support.stream_client import StreamClient
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
