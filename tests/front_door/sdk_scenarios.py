"""What a worker of each published SDK must be able to do, once for all of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

from tests.conftest import Run
from tests.front_door.sdk_programs import PATIENCE_S, CallFailed, Program, Report, node_client
from tests.support.broker import Broker
from tests.support.stream_client import StreamClient

Start = Callable[[Broker], Program]


def until(condition: Callable[[], bool], what: str) -> None:
    """Return when `condition` holds; asks again and again."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.05)


def has_ids(name: str, ids: set[str]) -> Callable[[Report], bool]:
    """Matches the report of a published group client's state that holds just these items."""

    def matches(report: Report) -> bool:
        return report.get("changed") == name and {item["id"] for item in report["state"]} == ids

    return matches


def is_ready(report: Report) -> bool:
    """Matches what a presence program reports, or prints, when it serves."""
    return report in ({"ready": True}, {"text": "ready"})


def item(stream: str, group: str, item_id: str, **more: Any) -> dict[str, Any]:
    """The payload of a `stream::*` function on one item."""
    return {"stream_name": stream, "group_id": group, "item_id": item_id, **more}


def is_refused(worker: Program, function_id: str, payload: Any) -> str:
    """The text of the error with which a call is answered."""
    try:
        result = worker.call(function_id, payload)
    except CallFailed as failure:
        return str(failure)
    raise AssertionError(f"{function_id} was answered with {result}")


def check_calls(broker: Broker, run: Run, start: Start, stream: str) -> None:
    """Every `stream::*` function through the SDK, and what a bare client and the published Node
    client see of it. `stream` is not used elsewhere."""

    async def joined() -> StreamClient:
        client = await StreamClient.open(broker.stream_url)
        assert (await client.join(stream, "g"))["event"] == {"type": "sync", "data": []}
        return client

    async def events_of(client: StreamClient, count: int) -> list[dict[str, Any]]:
        async with client:
            return [await client.next() for _ in range(count)]

    client = run(joined())
    with start(broker) as worker, node_client(broker) as published:
        published.send("group", name="all", stream=stream, group="g")
        published.send("item", name="one", stream=stream, group="g", id="a")
        published.send("on", name="all", event="typing")
        published.wait_for_keys(changed="all", state=[])
        published.wait_for_keys(changed="one", state=None)

        first = {"id": "a", "n": 1, "text": "Grüße 😀", "list": [1.5, None, True]}
        second = {"id": "b", "n": -2}
        assert worker.call("stream::set", item(stream, "g", "a", data=first)) == {
            "old_value": None,
            "new_value": first,
        }
        assert worker.call("stream::get", item(stream, "g", "a")) == first
        assert worker.call("stream::get", item(stream, "g", "nobody")) is None
        worker.call("stream::set", item(stream, "g", "b", data={"id": "b", "n": 0}))
        answer = worker.call("stream::set", item(stream, "g", "b", data=second))
        assert answer == {"old_value": {"id": "b", "n": 0}, "new_value": second}
        assert worker.call("stream::list", {"stream_name": stream, "group_id": "g"}) == [
            first,
            second,
        ]

        ops = [
            {"type": "increment", "path": "n", "by": 41},
            {"type": "set", "path": "text", "value": "hello"},
            {"type": "append", "path": "list", "value": 2},
            {"type": "merge", "path": ["deep", "down"], "value": {"x": 1}},
        ]
        updated = {"id": "a", "n": 42, "text": "hello", "list": [1.5, None, True, 2]}
        updated["deep"] = {"down": {"x": 1}}
        answer = worker.call("stream::update", item(stream, "g", "a", ops=ops))
        assert answer == {"old_value": first, "new_value": updated}
        worker.call("stream::set", item(stream, "other", "c", data=3))
        assert worker.call("stream::list_groups", {"stream_name": stream}) == ["g", "other"]
        assert {"id": stream, "groups": ["g", "other"]} in worker.call("stream::list_all", {})[
            "stream"
        ]

        typing = {"stream_name": stream, "group_id": "g", "type": "typing", "data": {"who": "me"}}
        assert worker.call("stream::send", typing) is None
        assert worker.call("stream::delete", item(stream, "g", "b")) == {"old_value": second}
        assert worker.call("stream::delete", item(stream, "g", "b")) == {"old_value": None}
        assert worker.call("stream::get", item(stream, "g", "b")) is None

        # Not asked for an answer, and yet in order with the call that follows.
        last = {"id": "a", "n": 100}
        worker.send("void", function_id="stream::set", payload=item(stream, "g", "a", data=last))
        assert worker.call("stream::get", item(stream, "g", "a")) == last

        check_refusals(worker, stream)

        published.wait_for_keys(event="typing", data={"who": "me"})
        published.wait_for_keys(changed="all", state=[last])
        published.wait_for_keys(changed="one", state=last)
        states = [report for report in published.reports if "changed" in report]
        assert [report["state"] for report in states if report["changed"] == "one"] == [
            None,
            first,
            updated,
            last,
        ]

    frames = run(events_of(client, 7))
    assert [(frame["id"], frame["event"]) for frame in frames] == [
        ("a", {"type": "create", "data": first}),
        ("b", {"type": "create", "data": {"id": "b", "n": 0}}),
        ("b", {"type": "update", "data": second}),
        ("a", {"type": "update", "data": updated}),
        (None, {"type": "event", "event": {"type": "typing", "data": {"who": "me"}}}),
        ("b", {"type": "delete", "data": second}),
        ("a", {"type": "update", "data": last}),
    ]
    seqs = [frame["seq"] for frame in frames]
    assert seqs == list(range(seqs[0], seqs[0] + len(seqs)))


def check_refusals(worker: Program, stream: str) -> None:
    """Errors reach the application with their code."""
    missing = is_refused(worker, "stream::set", item(stream, "g", "a"))
    assert missing.startswith("deserialization_error: ")
    assert "data" in missing
    unknown = is_refused(worker, "stream::nothing", {})
    assert unknown.startswith("function_not_found: ")


def check_trigger(broker: Broker, start: Start, start_other: Start, stream: str) -> None:
    """A `stream` trigger of one worker runs the function of another, in the order of the changes;
    and workers call each other's functions."""
    function_id = f"{stream}::changed"
    with start(broker) as owner, start_other(broker) as other:
        owner.send("function", id=function_id, returns={"taken": True})

        def is_registered() -> bool:
            listed = other.call("engine::functions::list", {"prefix": function_id})
            return bool(listed["functions"])

        until(is_registered, f"{function_id} listed")
        assert other.call(function_id, {"direct": 1}) == {"taken": True}
        called = owner.wait_for_keys(called=function_id)
        assert called["data"]["direct"] == 1

        config = {"stream_name": stream, "group_id": "g"}
        other.send("trigger", type="stream", function_id=function_id, config=config)

        def is_armed() -> bool:
            query = {"function_id": function_id}
            listed = other.call("engine::registered-triggers::list", query)
            return bool(listed["registered_triggers"])

        until(is_armed, f"the trigger of {function_id} listed")
        other.call("stream::set", item(stream, "another group", "x", data=0))
        for n in range(20):
            other.call("stream::set", item(stream, "g", "x", data={"n": n}))
        event = {"stream_name": stream, "group_id": "g", "type": "ping", "data": 1, "id": "x"}
        other.call("stream::send", event)
        other.call("stream::delete", item(stream, "g", "x"))

        events = [owner.wait_for_keys(called=function_id)["data"] for _ in range(22)]
        for envelope in events:
            names = [envelope[key] for key in ("type", "streamName", "groupId", "id")]
            assert names == ["stream", stream, "g", "x"]
        create, *updates = ({"n": n} for n in range(20))
        assert [envelope["event"] for envelope in events] == [
            {"type": "create", "data": create},
            *({"type": "update", "data": data} for data in updates),
            {"type": "event", "event": {"type": "ping", "data": 1}},
            {"type": "delete", "data": {"n": 19}},
        ]


def check_presence(broker: Broker, run: Run, start: Start, group: str) -> None:
    """The presence example: who joins `group` of "chat" is shown to those who watch the same
    group of "presence", until it leaves, closes, or is gone. `group` is not used elsewhere."""

    async def scene(published: Program) -> None:
        async with AsyncExitStack() as stack:

            async def connect() -> StreamClient:
                return await stack.enter_async_context(await StreamClient.open(broker.stream_url))

            watcher = await connect()
            sync = await watcher.join("presence", group)
            assert sync["event"] == {"type": "sync", "data": []}

            async def seen(kind: str, who: str) -> None:
                frame = await watcher.next()
                data = {"id": who, "status": "online"}
                assert (frame["id"], frame["event"]) == (who, {"type": kind, "data": data})

            alice, bob, carol = await connect(), await connect(), await connect()
            for client, who in ((alice, "alice"), (bob, "bob"), (carol, "carol")):
                sync = await client.join("chat", group, who)
                assert sync["event"] == {"type": "sync", "data": []}
                await seen("create", who)
            await alice.send_leave("chat", group, "alice")
            await seen("delete", "alice")
            await bob.close()
            await seen("delete", "bob")
            await carol.abort()
            await seen("delete", "carol")

            # The published client makes its own subscription ids, a UUID each.
            published.send("group", name="chat", stream="chat", group=group)
            joined = (await watcher.next())["event"]
            assert joined["type"] == "create"
            published.wait_for(has_ids("presence", {joined["data"]["id"]}))
            published.send("close", name="chat")
            assert (await watcher.next())["event"] == joined | {"type": "delete"}
            published.wait_for(has_ids("presence", set()))

    with start(broker) as worker, node_client(broker) as published:
        worker.wait_for(is_ready)
        published.send("group", name="presence", stream="presence", group=group)
        published.wait_for_keys(changed="presence", state=[])
        run(scene(published))
