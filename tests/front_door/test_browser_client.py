"""The published browser client and bare WebSockets in a real Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import quote

import pytest

from tests.front_door.sdk_programs import (
    Program,
    browser,
    node_client,
    node_presence,
    node_worker,
)
from tests.front_door.sdk_scenarios import has_ids, item
from tests.support.broker import IN_MEMORY, Broker

TOKEN = "a-secret-token"

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def page() -> Iterator[Program]:
    with browser() as page:
        page.wait_for(lambda report: "origin" in report)
        yield page


@pytest.fixture
def broker() -> Iterator[Broker]:
    with Broker(IN_MEMORY) as broker:
        yield broker


def test_published_client_sees_every_change(broker: Broker, page: Program) -> None:
    with node_worker(broker) as worker:
        worker.call("stream::set", item("s", "g", "old", data={"id": "old"}))
        page.send("connect", url=broker.stream_url)
        page.send("group", name="g", stream="s", group="g")
        page.send("item", name="i", stream="s", group="g", id="a")
        page.send("on", name="g", event="ping")
        page.send("on", name="i", event="ping")
        page.texts("body")  # answered when the page has done all that came before
        page.wait_for_keys(changed="g", state=[{"id": "old"}])
        page.wait_for_keys(changed="i", state=None)
        worker.call("stream::set", item("s", "g", "a", data={"id": "a", "n": 1}))
        page.wait_for_keys(changed="g", state=[{"id": "old"}, {"id": "a", "n": 1}])
        page.wait_for_keys(changed="i", state={"id": "a", "n": 1})
        increment = [{"type": "increment", "path": "n", "by": 1}]
        worker.call("stream::update", item("s", "g", "a", ops=increment))
        page.wait_for_keys(changed="g", state=[{"id": "old"}, {"id": "a", "n": 2}])
        page.wait_for_keys(changed="i", state={"id": "a", "n": 2})
        names = {"stream_name": "s", "group_id": "g", "id": "a"}
        worker.call("stream::send", {**names, "type": "ping", "data": 7})
        worker.call("stream::delete", item("s", "g", "a"))
        page.wait_for_keys(changed="g", state=[{"id": "old"}])
        page.wait_for_keys(changed="i", state=None)
        pings = [report for report in page.reports if report.get("event") == "ping"]
        assert sorted(ping["name"] for ping in pings) == ["g", "i"]


def test_presence_until_the_tab_is_closed(broker: Broker, page: Program) -> None:
    with node_presence(broker) as presence, node_client(broker) as watcher:
        presence.wait_for_keys(ready=True)
        watcher.send("group", name="w", stream="presence", group="room")
        watcher.wait_for_keys(changed="w", state=[])
        page.send("connect", url=broker.stream_url)
        page.send("group", name="presence", stream="presence", group="room")
        page.wait_for_keys(changed="presence", state=[])
        page.send("group", name="chat", stream="chat", group="room")
        online = page.wait_for(lambda report: bool(report.get("state")))["state"]
        (me,) = (item["id"] for item in online)
        watcher.wait_for(has_ids("w", {me}))
        watcher.send("group", name="chat", stream="chat", group="room")
        both = page.wait_for(lambda report: len(report.get("state", ())) == 2)["state"]
        (you,) = {item["id"] for item in both} - {me}
        watcher.wait_for(has_ids("w", {me, you}))
        page.send("leave")
        watcher.wait_for(has_ids("w", {you}))


def test_two_subscriptions_of_one_group_get_each_event_once(broker: Broker, page: Program) -> None:
    with node_worker(broker) as worker:
        page.send("connect", url=broker.stream_url)
        for name in ("a", "b"):
            page.send("group", name=name, stream="s", group="g")
            page.send("on", name=name, event="ping")
            page.send("on", name=name, event="end")
        for name in ("a", "b"):
            page.wait_for_keys(changed=name, state=[])
        for kind in ("ping", "end"):
            names = {"stream_name": "s", "group_id": "g"}
            worker.call("stream::send", {**names, "type": kind, "data": kind})
        page.wait_for_keys(event="end", name="a")
        page.wait_for_keys(event="end", name="b")
        pings = [report["name"] for report in page.reports if report.get("event") == "ping"]
        assert pings == ["a", "b"]


def test_bare_socket_on_the_documented_path(broker: Broker, page: Program) -> None:
    with node_worker(broker) as worker:
        worker.call("stream::set", item("chat", "room 1/ü", "m", data={"id": "m"}))
        group = quote("room 1/ü", safe="")
        page.send("socket", url=f"{broker.stream_url}/stream/chat/{group}/")
        page.wait_for_keys(open="")
        sync = page.wait_for(lambda report: "frame" in report)["frame"]
        assert (sync["streamName"], sync["groupId"], sync["id"]) == ("chat", "room 1/ü", None)
        assert sync["event"] == {"type": "sync", "data": [{"id": "m"}]}
        worker.call("stream::delete", item("chat", "room 1/ü", "m"))
        event = page.wait_for(lambda report: "frame" in report)["frame"]
        assert (event["id"], event["event"]) == ("m", {"type": "delete", "data": {"id": "m"}})


def test_token_as_a_subprotocol(page: Program) -> None:
    """The documented way of a browser to send a token: it opens, and only the name comes back."""
    auth_function = """\
workers:
  - name: iii-stream
    config:
      auth_function: stream::auth
      adapter: {name: kv, config: {store_method: in_memory}}
"""
    with Broker(auth_function) as broker, node_worker(broker) as worker:
        worker.send("function", id="stream::auth", returns={"context": {"user": "u"}})
        worker.call("stream::list_all", {})
        page.send("socket", url=broker.stream_url, protocols=["Authorization", TOKEN])
        page.wait_for_keys(open="Authorization")
        asked = worker.wait_for_keys(called="stream::auth")["data"]
        assert asked["headers"]["sec-websocket-protocol"] == f"Authorization, {TOKEN}"
        data = {"subscriptionId": "s1", "streamName": "s", "groupId": "g"}
        page.send("send", message={"type": "join", "data": data})
        sync = page.wait_for(lambda report: "frame" in report)["frame"]
        assert sync["event"] == {"type": "sync", "data": []}


def test_no_page_reaches_the_worker_port(broker: Broker, page: Program) -> None:
    """It is meant for programs: what a browser sends with its Origin is refused."""
    page.send("socket", url=broker.worker_url)
    page.wait_for_keys(closed=1006)
    assert not [report for report in page.reports if "open" in report]
