"""Replay of `golden/redis.json`: the Redis adapter.

`layout`: calls in order on an empty Redis, `published` what came on the channel meanwhile,
`redis_after` all keys, `fields_and_values` in turn. `update_differs`: cases whose outcome on Redis
was another one; `kv` is what is right (difference 26). `bad_json_in_redis`, `wrong_type_key`: the
answers when a field holds no JSON, or the key is no hash. `foreign_publish`: what a client joined
to stream `ext`, group `g` got when four messages were published by hand. `redis_down`: the answers
after Redis was stopped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import Run
from tests.front_door.test_golden_update_cases import expected
from tests.support.broker import Broker
from tests.support.compare import assert_refused, assert_same, assert_same_answer, recording
from tests.support.connection import PATIENCE_S
from tests.support.redis_server import IS_INSTALLED, RedisServer
from tests.support.stream_client import StreamClient, settled
from tests.support.worker import Worker

pytestmark = pytest.mark.skipif(not IS_INSTALLED, reason="redis-server is not installed")

RECORDING = recording("redis.json")
CHANNEL = "stream::events"
CONFIG = """\
workers:
  - name: iii-stream
    config:
      adapter: {name: redis, config: {redis_url: "redis://127.0.0.1:PORT"}}
"""
NAMES = {"stream_name": "s", "group_id": "g", "item_id": "i"}

# What is right instead of what was recorded: index into `layout` to the number of the allowed
# difference and the answer. `:` in a name is encoded in keys, which keeps them apart.
INSTEAD: dict[int, tuple[int, dict[str, Any]]] = {
    11: (17, {}),
    15: (
        17,
        {
            "result": {
                "count": 3,
                "stream": [
                    {"id": "a:b", "groups": ["c"]},
                    {"id": "gl*b", "groups": ["q"]},
                    {"id": "s", "groups": ["g"]},
                ],
            }
        },
    ),
}
ENCODED_KEYS = {"stream:a:b:c": "stream:a%3Ab:c"}


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def broker(server: RedisServer) -> Iterator[Broker]:
    with Broker(CONFIG.replace("PORT", str(server.port))) as broker:
        yield broker


def test_layout(server: RedisServer, broker: Broker, run: Run) -> None:
    run(replay_layout(server, broker))


async def replay_layout(server: RedisServer, broker: Broker) -> None:
    subscription = server.client.pubsub(ignore_subscribe_messages=True)
    subscription.subscribe(CHANNEL)
    subscription.get_message(timeout=PATIENCE_S)
    async with await Worker.open(broker.worker_url) as worker:
        for index, step in enumerate(RECORDING["layout"]):
            call = step["call"]
            what = f"step {index}, {call}"
            answer = await worker.call(call["function_id"], call["payload"])
            _, expected = INSTEAD.get(index, (0, step["answer"]))
            assert_same_answer(expected, answer, what)
            for published in step["published"]:
                message = subscription.get_message(timeout=PATIENCE_S)
                assert message is not None, what
                payload = json.loads(message["data"])
                assert_same(published["payload"], payload, what, more=("seq", "epoch"))
            assert_same(as_values(step["redis_after"]), stored(server.client), what)
    subscription.close()


def as_values(keys: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Recorded keys as key to field to parsed value."""
    found = {}
    for key, entry in keys.items():
        assert entry["type"] == "hash"
        flat = entry["fields_and_values"]
        pairs = zip(flat[::2], flat[1::2], strict=True)
        found[ENCODED_KEYS.get(key, key)] = {item: json.loads(text) for item, text in pairs}
    return found


def stored(client: Any) -> dict[str, dict[str, Any]]:
    """The groups in Redis; keys of other prefixes are the broker's own affair."""
    return {
        key: {item: json.loads(text) for item, text in client.hgetall(key).items()}
        for key in client.keys("stream:*")
    }


def test_update_cases(broker: Broker, run: Run) -> None:
    run(replay_updates(broker))


async def replay_updates(broker: Broker) -> None:
    async with await Worker.open(broker.worker_url) as worker:
        for case in map(right, RECORDING["update_differs"]):
            await worker.call("stream::delete", NAMES)
            if "initial" in case:
                await worker.call("stream::set", NAMES | {"data": case["initial"]})
            answer = await worker.call("stream::update", NAMES | {"ops": case["ops"]})
            assert_same_answer({"result": case["result"]}, answer, case["name"])
            got = await worker.call("stream::get", NAMES)
            assert_same(case["stored"], got.get("result"), case["name"])


def right(case: dict[str, Any]) -> dict[str, Any]:
    """The case with what was recorded for kv, and the differences that are allowed there too."""
    return expected({"name": case["name"], "ops": case["ops"]} | initial(case) | case["kv"])


def initial(case: dict[str, Any]) -> dict[str, Any]:
    return {"initial": case["initial"]} if "initial" in case else {}


def test_a_key_of_another_type(server: RedisServer, broker: Broker, run: Run) -> None:
    server.client.set("stream:s:g", "x")
    run(replay_refused(broker, RECORDING["wrong_type_key"]))


def test_text_that_is_no_json(server: RedisServer, broker: Broker, run: Run) -> None:
    """Everything that meets it answers with an error; set and delete have been done by then."""
    for function_id, answer in RECORDING["bad_json_in_redis"].items():
        server.client.hset("stream:s:g", "i", "oops")
        run(replay_refused(broker, {function_id: answer}))
        left = {"stream::set": "1", "stream::delete": None}.get(function_id, "oops")
        assert server.client.hget("stream:s:g", "i") == left, function_id


def test_redis_down(server: RedisServer, broker: Broker, run: Run) -> None:
    server.stop()
    answers = {name: step["answer"] for name, step in RECORDING["redis_down"].items()}
    run(replay_refused(broker, answers))


async def replay_refused(broker: Broker, answers: dict[str, Any]) -> None:
    more = {"data": 1, "ops": [], "type": "t"}
    async with await Worker.open(broker.worker_url) as worker:
        for function_id, expected in answers.items():
            answer = await worker.call(function_id, NAMES | more)
            assert_refused(expected["error"]["code"], answer, function_id)
        assert "error" not in await worker.call("engine::functions::list", {})


def test_a_group_ends_with_its_last_item(server: RedisServer, broker: Broker, run: Run) -> None:
    run(replay_last_delete(server, broker))


async def replay_last_delete(server: RedisServer, broker: Broker) -> None:
    async with await Worker.open(broker.worker_url) as worker:
        await worker.call("stream::set", NAMES | {"data": 1})
        await worker.call("stream::delete", NAMES)
        listed = await worker.call("stream::list_groups", NAMES)
    assert_same_answer(RECORDING["group_after_last_delete"]["list_groups"], listed)
    assert server.client.exists("stream:s:g") == 0


def test_foreign_publish(server: RedisServer, broker: Broker, run: Run) -> None:
    run(replay_foreign(server, broker))


async def replay_foreign(server: RedisServer, broker: Broker) -> None:
    """Messages of others on the channel are delivered; what is no envelope is skipped."""
    names = {"streamName": "ext", "groupId": "g"}
    update = {"type": "update", "data": {"id": "i"}}
    sync = {"type": "sync", "data": []}
    foreign: list[Any] = [
        {"type": "stream", "timestamp": 5, **names, "id": "i", "event": update},
        {"type": "other", "timestamp": 6, **names, "event": sync, "seq": 7},
        "garbage",
        {"type": "stream", "timestamp": "x", **names, "id": "i", "event": update},
    ]
    async with (
        await Worker.open(broker.worker_url) as worker,
        await StreamClient.open(broker.stream_url) as client,
    ):
        sync_frame = await client.join("ext", "g")
        for message in foreign:
            text = message if isinstance(message, str) else json.dumps(message)
            server.client.publish(CHANNEL, text)
        for index, expected in enumerate(RECORDING["foreign_publish"]):
            came = await client.next() if index else sync_frame
            recorded = expected["recv"] | {"timestamp": "<ts>"}  # increases, difference 2
            assert_same(recorded, came, more=("seq", "epoch"))
        await settled([client], worker)
        assert client.waiting == []
