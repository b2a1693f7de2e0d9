"""Odd messages of every kind on both ports: whatever they hold, no process minds."""

from __future__ import annotations

import asyncio
import json
import random
import urllib.request

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from tests.conftest import Run
from tests.support.broker import Broker

MESSAGES = 1500

WORKER_TYPES = [
    "registerfunction",
    "unregisterfunction",
    "registertriggertype",
    "unregistertriggertype",
    "registertrigger",
    "unregistertrigger",
    "triggerregistrationresult",
    "invokefunction",
    "invocationresult",
    "reattach",
    "ping",
    "registerservice",
    "join",
    "nope",
]
WORKER_KEYS = [
    "id",
    "function_id",
    "trigger_type",
    "config",
    "metadata",
    "namespace",
    "data",
    "invocation_id",
    "action",
    "result",
    "error",
    "reattach_token",
    "previous_worker_id",
    "description",
    "request_format",
    "traceparent",
    "baggage",
    "invocation",
]
CLIENT_KEYS = ["subscriptionId", "streamName", "groupId", "id"]
FUNCTIONS = [
    "engine::functions::list",
    "engine::functions::info",
    "engine::workers::list",
    "engine::workers::info",
    "engine::triggers::list",
    "engine::triggers::info",
    "engine::registered-triggers::list",
    "engine::registered-triggers::info",
    "engine::workers::register",
    "stream::set",
    "stream::get",
    "stream::update",
    "stream::list",
    "stream::list_all",
    "stream::list_groups",
    "stream::send",
    "stream::delete",
    "f",
]
REGISTERED = ["f", "stream::set(cs)", "stream::get(cs)", "stream::list(cs)", "stream::delete(cs)"]
ITEM = '"stream_name":"%s","group_id":"g","item_id":"i"'
VALUES = [
    "1e400",
    "-1e999",
    "123456789012345678901234567890",
    "-0.0",
    "null",
    "true",
    "[]",
    "{}",
    '"x"',
    '" "',
    '"stream"',
    '"stream:join"',
    '"default"',
    '"required field"',
    '"\\ud83d\\udca1\\u0000"',
    '[1,"a"]',
    '{"a":1e400}',
    '{"internal":1e400}',
    '{"stream_name":"s"}',
    '{"stream_name":1e400}',
    '{"stream_name":"s","condition_function_id":"f"}',
    '{"type":"void"}',
    '{"type":"enqueue","queue":"q"}',
    '{"include_internal":1e400}',
    '{"function_ids":["f"]}',
    '{"name":5,"pid":1e400,"namespace":5}',
    '{"unauthorized":1e400}',
    '{"new_value":1}',
    "{%s}" % (ITEM % "s"),
    '{%s,"data":1e400}' % (ITEM % "cs"),
    '{%s,"ops":[{"type":"increment","path":"a","by":1e400}]}' % (ITEM % "s"),
    '{%s,"ops":[{"type":"merge","value":{"a":1e400}}]}' % (ITEM % "cs"),
]


class Fuzzer:
    """Makes messages; the same seed makes the same."""

    def __init__(self, seed: int) -> None:
        self.choice = random.Random(seed).choice
        self._random = random.Random(seed + 1)

    def fields(self, keys: list[str]) -> dict[str, str]:
        some = self._random.sample(keys, self._random.randint(0, min(8, len(keys))))
        return {key: self.choice(VALUES) for key in some}

    def worker_message(self) -> str:
        kind = self.choice(WORKER_TYPES)
        fields = self.fields(WORKER_KEYS)
        if kind == "registerfunction":
            fields["id"] = json.dumps(self.choice(REGISTERED))
        elif kind == "registertrigger":
            fields["function_id"] = '"f"'
            fields["trigger_type"] = self.choice(['"stream"', '"stream:join"', '"t1"'])
            fields.setdefault("id", '"U1"')
        elif kind == "invokefunction":
            fields["function_id"] = json.dumps(self.choice(FUNCTIONS))
            fields["invocation_id"] = self.choice(['"i1"', '""', "5"])
            if self._random.random() < 0.7:
                fields.pop("action", None)
        members = [f'"{key}":{value}' for key, value in fields.items()] + [f'"type":"{kind}"']
        self._random.shuffle(members)
        text = "{" + ",".join(members) + "}"
        return text if self._random.random() > 0.05 else text[: self._random.randint(0, len(text))]

    def client_message(self) -> str:
        fields = self.fields(CLIENT_KEYS)
        if self._random.random() < 0.6:
            stream = self.choice(['"s"', '"cs"'])
            fields = {"subscriptionId": '"1"', "streamName": stream, "groupId": '"g"'}
        data = "{" + ",".join(f'"{key}":{value}' for key, value in fields.items()) + "}"
        kind = self.choice(['"join"', '"leave"', '"required field"', "1e400"])
        return f'{{"type":{kind},"data":{self.choice([data, data, data, self.choice(VALUES)])}}}'

    def answer(self, invocation_id: str) -> str:
        outcome = self.choice(
            [
                f'"result":{self.choice(VALUES)}',
                f'"error":{self.choice(VALUES)}',
                '"result":{"new_value":1,"old_value":1e400}',
            ]
        )
        return (
            f'{{"type":"invocationresult","invocation_id":{json.dumps(invocation_id)},{outcome}}}'
        )


async def receive(connection: ClientConnection, fuzzer: Fuzzer) -> None:
    """Read what comes, and answer calls with anything."""
    try:
        async for text in connection:
            message = json.loads(text)
            if message["type"] == "invokefunction":
                await connection.send(fuzzer.answer(message["invocation_id"]))
    except ConnectionClosed:
        return


async def fuzz(broker: Broker, fuzzer: Fuzzer) -> None:
    async with (
        connect(broker.worker_url, max_size=None) as one,
        connect(broker.worker_url, max_size=None) as two,
        connect(broker.stream_url) as client,
    ):
        receivers = [asyncio.create_task(receive(c, fuzzer)) for c in (one, two, client)]
        for _ in range(MESSAGES):
            await fuzzer.choice([one, two]).send(fuzzer.worker_message())
            if fuzzer.choice([True, False, False]):
                await client.send(fuzzer.client_message())
        for connection in (one, two, client):
            await (await connection.ping())  # all that was sent is handled before the pong
        for receiver in receivers:
            receiver.cancel()


@pytest.mark.parametrize("seed", range(4))
def test_no_message_harms_a_process(seed: int, memory_broker: Broker, run: Run) -> None:
    before = memory_broker.children()
    run(fuzz(memory_broker, Fuzzer(seed)))
    assert memory_broker.children() == before


@pytest.mark.parametrize(
    "accept",
    ["", "text/plain", "application/openmetrics-text; version=abc", ";;;", "a" * 8000],
)
def test_any_accept_header_gets_metrics(accept: str, memory_broker: Broker) -> None:
    request = urllib.request.Request(memory_broker.metrics_url, headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert b"broker_connections" in answer.read()
