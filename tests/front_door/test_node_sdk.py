"""Workers of the published Node SDK and the published Node client."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import Run
from tests.front_door import sdk_scenarios as scenarios
from tests.front_door.sdk_programs import (
    Program,
    node_client,
    node_presence,
    node_worker,
    python_worker,
)
from tests.front_door.sdk_scenarios import item
from tests.support.broker import Broker

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def worker(memory_broker: Broker) -> Iterator[Program]:
    with node_worker(memory_broker) as worker:
        yield worker


def test_calls(memory_broker: Broker, run: Run) -> None:
    scenarios.check_calls(memory_broker, run, node_worker, "node-calls")


def test_trigger_between_workers(memory_broker: Broker) -> None:
    scenarios.check_trigger(memory_broker, node_worker, node_worker, "node-trigger")


def test_trigger_of_a_python_worker(memory_broker: Broker) -> None:
    scenarios.check_trigger(memory_broker, node_worker, python_worker, "node-python-trigger")


def test_presence(memory_broker: Broker, run: Run) -> None:
    scenarios.check_presence(memory_broker, run, node_presence, "node-room")


def test_two_subscriptions_of_one_group_get_each_event_once(
    memory_broker: Broker, worker: Program
) -> None:
    def send(kind: str, item_id: str | None = None) -> None:
        names = {"stream_name": "node-twice", "group_id": "r1", "id": item_id}
        worker.call("stream::send", {**names, "type": kind, "data": kind})

    with node_client(memory_broker) as client:
        for name in ("a", "b"):
            client.send("group", name=name, stream="node-twice", group="r1")
            for event in ("ping", "end"):
                client.send("on", name=name, event=event)
        client.send("item", name="item", stream="node-twice", group="r1", id="m1")
        for event in ("ping", "end"):
            client.send("on", name="item", event=event)
        for name, empty in (("a", []), ("b", []), ("item", None)):
            client.wait_for_keys(changed=name, state=empty)

        send("ping")
        send("ping", "m1")
        send("end", "m1")
        for name in ("a", "b", "item"):
            client.wait_for_keys(event="end", name=name)
        pings = [report["name"] for report in client.reports if report.get("event") == "ping"]
        assert pings == ["a", "b", "item", "a", "b"]


def test_client_that_offers_subprotocols(memory_broker: Broker, worker: Program) -> None:
    worker.call("stream::set", item("node-protocols", "g", "x", data={"id": "x"}))
    with node_client(memory_broker, "Authorization", "a-token") as client:
        client.send("group", name="g", stream="node-protocols", group="g")
        client.wait_for_keys(changed="g", state=[{"id": "x"}])


def test_client_and_worker_go_on_after_a_restart_of_the_broker() -> None:
    """Both connect again by themselves; registrations and joins are made anew, once."""
    with Broker() as broker, node_worker(broker) as worker, node_client(broker) as client:
        worker.send("function", id="kept::changed", returns=None)
        config = {"stream_name": "kept"}
        worker.send("trigger", type="stream", function_id="kept::changed", config=config)
        client.send("group", name="g", stream="kept", group="g")
        client.send("item", name="i", stream="kept", group="g", id="a")
        client.wait_for_keys(changed="g", state=[])

        def write(n: int) -> None:
            worker.call("stream::set", item("kept", "g", "a", data={"id": "a", "n": n}))
            client.wait_for_keys(changed="g", state=[{"id": "a", "n": n}])
            client.wait_for_keys(changed="i", state={"id": "a", "n": n})
            called = worker.wait_for_keys(called="kept::changed")
            assert called["data"]["event"]["data"] == {"id": "a", "n": n}

        write(1)
        broker.restart()
        client.wait_for_keys(changed="g", state=[{"id": "a", "n": 1}])
        client.wait_for_keys(changed="i", state={"id": "a", "n": 1})
        write(2)
        write(3)
        calls = [report for report in worker.reports if "called" in report]
        assert len(calls) == 3


def test_client_survives_a_refused_connection() -> None:
    """With an auth function that nobody serves the client is refused; it comes in later."""
    config = """\
workers:
  - name: iii-stream
    config:
      auth_function: stream::auth
      adapter: {name: kv, config: {store_method: in_memory}}
"""
    with Broker(config) as broker, node_client(broker) as client:
        refused = client.wait_for(lambda report: "refused" in report)
        assert "503" in refused["refused"]
        client.send("group", name="g", stream="s", group="g")
        with node_worker(broker) as worker:
            worker.send("function", id="stream::auth", returns={"context": {"user": "u"}})
            client.wait_for_keys(changed="g", state=[])
            asked = worker.wait_for_keys(called="stream::auth")["data"]
            assert asked["path"] == "/"
            assert asked["headers"]["upgrade"] == "websocket"
