"""Dashboards and alerts: well formed, and about metrics that a broker has.

A real Prometheus scrapes real brokers under load with the shipped configuration; every query of
every dashboard and alert is then evaluated as of the end of the load. One broker has files and two
gateways, another a Redis.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from broker import config
from broker.config import Overrides
from tests.conftest import Run
from tests.support.broker import REPOSITORY, Broker, free_ports
from tests.support.calls import item, result_of
from tests.support.pair import TwoGateways, until_has
from tests.support.redis_server import IS_INSTALLED, RedisServer
from tests.support.stream_client import UPGRADE, RawHttp, StreamClient

GRAFANA = REPOSITORY / "deploy" / "grafana"
PROMETHEUS = REPOSITORY / "deploy" / "prometheus"
BINARY = Path("/usr/bin/prometheus")
PATIENCE_S = 60.0
"""Only ends what would hang."""

CONFIG = """\
workers:
  - name: iii-stream
    config:
      auth_function: access::check
      adapter: {name: kv, config: {store_method: file_based}}
"""
REDIS_CONFIG = """\
workers:
  - name: iii-stream
    config:
      adapter: {name: redis, config: {redis_url: "%s"}}
"""
SHARDS = 2
SCRAPES = 6
"""Of each process, one per second, before queries are evaluated."""
RATE_RANGE = "30s"
"""What Grafana makes of `$__rate_interval`; everything that was scraped lies in it."""

EMPTY = {
    # The other storage's; the panel has a query for each.
    ("shards: Groups and events in memory", 'broker_history_bytes{shard=~"$shard"}'),
}
"""Panels, and those of their queries, that have nothing to show here."""
if not IS_INSTALLED:
    EMPTY.add(
        (
            "clients: Heard by Redis",
            "sum by (outcome) (rate(broker_foreign_events_total[$__rate_interval]))",
        )
    )

installed = pytest.mark.skipif(not BINARY.exists(), reason="prometheus is not installed")

DASHBOARDS: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text()) for path in sorted((GRAFANA / "dashboards").iterdir())
}
PANELS = [
    (f"{name}: {panel['title']}", panel)
    for name, dashboard in DASHBOARDS.items()
    for panel in dashboard["panels"]
    if panel["type"] != "row"
]
ALERTS: list[dict[str, Any]] = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"][0][
    "rules"
]


def test_dashboards_are_what_the_script_makes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, GRAFANA / "build.py", tmp_path], check=True)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert made == {p.name: p.read_text() for p in (GRAFANA / "dashboards").iterdir()}


@pytest.mark.parametrize("name", DASHBOARDS)
def test_panels_are_uniform(name: str) -> None:
    """Each says what it shows, in which unit, and none lies on another."""
    panels = DASHBOARDS[name]["panels"]
    ids = [panel["id"] for panel in panels]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        columns = range(place["x"], place["x"] + place["w"])
        cells = {(x, y) for x in columns for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["title"], panel
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"], panel["title"]
        assert len(panel["targets"]) == 1 or all(t["legendFormat"] for t in panel["targets"])


def test_provisioning_names_what_is_there() -> None:
    provisioning = GRAFANA / "provisioning"
    sources = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())
    scraping = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    interval = sources["datasources"][0]["jsonData"]["timeInterval"]
    assert interval == scraping["global"]["scrape_interval"]
    providers = yaml.safe_load((provisioning / "dashboards" / "broker.yml").read_text())
    assert providers["providers"][0]["type"] == "file"


def test_every_process_is_scraped() -> None:
    """A gateway, and as many shards as the configuration that is installed has."""
    settings, _ = config.load(str(REPOSITORY / "deploy" / "broker.yaml"), Overrides(), {})
    scraped = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"][0]
    found = {t["labels"]["process"]: t["targets"] for t in scraped["static_configs"]}
    names = ["gateway", *(f"shard-{k}" for k in range(settings.shards))]
    first = settings.metrics.port
    assert found == {name: [f"127.0.0.1:{first + k}"] for k, name in enumerate(names)}


def test_each_alert_says_what_to_do() -> None:
    """In its annotations, and in a section of the documentation that exists."""
    path = "docs/operations.md"
    headings = re.findall(r"^#+ (.*)$", (REPOSITORY / path).read_text(), re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    for alert in ALERTS:
        assert alert["annotations"].keys() == {"summary", "description", "runbook"}
        assert alert["annotations"]["runbook"] == f"{path}#alert-{alert['alert'].lower()}"
        assert f"alert-{alert['alert'].lower()}" in anchors
    assert sum(heading.startswith("Alert Broker") for heading in headings) == len(ALERTS)


def test_each_alert_has_a_case_that_fires() -> None:
    cases = (PROMETHEUS / "alerts_test.yml").read_text()
    fired = set(re.findall(r"alertname=\"(\w+)\"", cases))
    assert fired == {alert["alert"] for alert in ALERTS}


def test_every_failure_of_the_storage_counts() -> None:
    """In the alert on calls that fail."""
    (expression,) = (a["expr"] for a in ALERTS if a["alert"] == "BrokerCallsFail")
    codes = re.search(r'code=~"([^"]+)"', expression)
    assert codes is not None
    source = (REPOSITORY / "shards" / "requests.py").read_text()
    found = re.findall(r'"(STREAM_\w+|overloaded)"', source)
    assert len(set(found)) >= 8
    assert all(re.fullmatch(codes[1], code) for code in found)


@installed
@pytest.mark.parametrize(
    "arguments",
    [("check", "config", "prometheus.yml"), ("test", "rules", "alerts_test.yml")],
    ids=" ".join,
)
def test_promtool_accepts(arguments: tuple[str, ...]) -> None:
    """The configuration with its rules, and that they fire when they should."""
    command = ["promtool", *arguments]
    done = subprocess.run(command, cwd=PROMETHEUS, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


class Prometheus:
    """A Prometheus that scrapes `brokers` every second with the shipped rules. Close it."""

    def __init__(self, directory: Path, *brokers: Broker) -> None:
        shipped = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
        shipped["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        shipped["rule_files"] = [str(PROMETHEUS / "alerts.yml")]
        targets = [target for broker in brokers for target in _targets(broker)]
        shipped["scrape_configs"][0]["static_configs"] = targets
        self._processes = len(targets)
        (directory / "prometheus.yml").write_text(yaml.safe_dump(shipped))
        port = free_ports(1)[0]
        self.url = f"http://127.0.0.1:{port}"
        self._output = directory / "output"
        command = [str(BINARY), f"--config.file={directory}/prometheus.yml", "--log.level=warn"]
        command += [
            f"--storage.tsdb.path={directory}/data",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=output, cwd=directory)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE_S)

    def query(self, expression: str, at: float) -> list[dict[str, Any]]:
        """The series of an instant query as of the time `at`; it must be valid."""
        asked = urllib.parse.urlencode({"query": expression, "time": at})
        found: list[dict[str, Any]] = self.get(f"query?{asked}")["result"]
        return found

    def get(self, path: str) -> Any:
        """`data` of an answer that must be a success."""
        try:
            url = f"{self.url}/api/v1/{path}"
            with urllib.request.urlopen(url, timeout=PATIENCE_S) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{path}: {error.read().decode()}") from None
        return answer["data"]

    def wait_for_scrapes(self) -> float:
        """Return when each process was scraped often enough; the time of that."""
        scrapes = 'count_over_time(broker_build_info{job="broker"}[1h])'
        enough = f"count({scrapes} >= {SCRAPES}) == {self._processes}"
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            assert self._process.poll() is None, self._output.read_text()
            at = time.time()
            if self._ready() and self.query(enough, at):
                return at
            time.sleep(0.2)
        raise AssertionError(f"not scraped\n{self._output.read_text()}")

    def _ready(self) -> bool:
        url = f"{self.url}/-/ready"
        try:
            urllib.request.urlopen(url, timeout=PATIENCE_S).close()
        except urllib.error.HTTPError as error:  # 503: it reads what it has stored
            error.close()
            return False
        except OSError:  # it does not listen yet
            return False
        return True


def _targets(broker: Broker) -> list[dict[str, Any]]:
    """Of a broker's processes, with labels as the shipped ones have."""
    first = int(broker.metrics_url.split("/")[2].rpartition(":")[2])
    names = ["gateway", *(f"shard-{k}" for k in range(broker.shards))]
    names += [f"gateway-{k}" for k in range(1, broker.gateways)]
    return [
        {"targets": [f"127.0.0.1:{first + k}"], "labels": {"process": name}}
        for k, name in enumerate(names)
    ]


@pytest.fixture(scope="module")
def scraped(
    tmp_path_factory: pytest.TempPathFactory, run: Run
) -> Iterator[tuple[Prometheus, float]]:
    """A Prometheus that has seen loaded brokers, and the time of that."""
    with ExitStack() as stack:
        pair = stack.enter_context(TwoGateways(config=CONFIG))
        brokers, redis = [pair.broker], None
        if IS_INSTALLED:
            redis = stack.enter_context(RedisServer())
            brokers.append(stack.enter_context(Broker(REDIS_CONFIG % redis.url, shards=1)))
        prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), *brokers)
        stack.callback(prometheus.close)
        scraping = asyncio.to_thread(prometheus.wait_for_scrapes)

        async def load_all() -> float:
            scraped = asyncio.create_task(scraping)
            async with asyncio.TaskGroup() as loads:
                loads.create_task(_load_until(scraped, pair))
                if redis is not None:
                    loads.create_task(_load_redis_until(scraped, brokers[1], redis))
            return await scraped

        yield prometheus, run(load_all())


async def _load_redis_until(
    scraped: asyncio.Task[float], broker: Broker, redis: RedisServer
) -> None:
    """What another program tells subscribers, again and again."""
    message = {"type": "stream", "timestamp": 1, "streamName": "chat", "groupId": "room"}
    text = json.dumps(message | {"event": {"type": "update", "data": 1}})
    async with await StreamClient.open(broker.stream_url) as client:
        await client.join("chat", "room")
        while not scraped.done():
            redis.client.publish("stream::events", text)
            await asyncio.sleep(0.1)


async def _load_until(scraped: asyncio.Task[float], pair: TwoGateways) -> None:
    """Something of everything that a broker does, and faults of callers, again and again."""
    broker = pair.broker
    await pair.back()
    worker, other = await pair.worker(0), await pair.worker(1)
    await other.register_function("elsewhere::where", lambda _: "there")
    await until_has(worker, "elsewhere::where")
    await worker.register_function("access::check", lambda _: {"context": {"user": 1}})
    await worker.register_function("audit::changed", lambda _: None)
    await worker.register_trigger("stream", "audit::changed", {"stream_name": "chat"})
    await worker.barrier()
    staying = [await StreamClient.open(broker.stream_url) for _ in range(3)]
    for client in staying:
        for group in range(8):
            await client.join("chat", f"room-{group}", f"s{group}")
    turn = 0
    while not scraped.done():
        turn += 1
        calls = [
            worker.call(f"stream::{name}", item("chat", f"room-{group}", "m", data=turn))
            for group in range(8)
            for name in ("set", "get")
        ]
        await asyncio.gather(*calls)
        await result_of(worker, "stream::list", {"stream_name": "chat", "group_id": "room-1"})
        assert await result_of(worker, "elsewhere::where", {}) == "there"
        refused = {"ops": [{"type": "no such operation"}]}
        await worker.call("stream::update", item("chat", "room-1", "m", **refused))
        async with await StreamClient.open(broker.stream_url) as passing:
            await passing.join("chat", "room-1")
        async with await RawHttp.request(broker.stream_url, UPGRADE.replace(b"/ ", b"/no ")) as raw:
            assert (await raw.response()).status == 404
        await asyncio.sleep(0.02)
    for connection in (*staying, worker, other):
        await connection.close()


def _has_data(series: list[dict[str, Any]]) -> bool:
    """Whether there is a value that is a number: quantiles of nothing are none."""
    return any(not math.isnan(float(one["value"][1])) for one in series)


@installed
def test_every_panel_shows_something(scraped: tuple[Prometheus, float]) -> None:
    """Each query of each has series with what their legend names; the broker has no faults."""
    prometheus, at = scraped
    empty = set()
    for name, panel in PANELS:
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", RATE_RANGE)
            expression = expression.replace("$shard", ".+")
            assert "$" not in expression, name
            found = prometheus.query(expression, at)
            if not _has_data(found):
                empty.add((name, target["expr"]))
            shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert all(shown <= series["metric"].keys() for series in found), name
    assert empty == EMPTY


@installed
def test_every_alert_can_be_evaluated(scraped: tuple[Prometheus, float]) -> None:
    """It asks for metrics that are there, and does not fire by itself."""
    prometheus, at = scraped
    known = set(prometheus.get("label/__name__/values"))
    rules = {r["name"]: r for r in prometheus.get("rules")["groups"][0]["rules"]}
    assert rules.keys() == {alert["alert"] for alert in ALERTS}
    for alert in ALERTS:
        prometheus.query(alert["expr"], at)
        metrics = set(re.findall(r"\b(?:broker|process)_\w+\b|\bup\b", alert["expr"]))
        assert metrics, alert["expr"]
        assert metrics <= known, metrics - known
        rule = rules[alert["alert"]]
        assert rule["health"] == "ok", rule
        assert rule["state"] != "firing", rule
