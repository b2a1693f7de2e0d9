"""Replay of `golden/auth.json`: the auth function of the stream port.

`cases[i]`: `request` is sent byte for byte. `auth_function_received` is the data of every
invocation of `stream::auth`, `auth_function_returned` what the worker gave back. `answer` is what
came; after a 101 a join of stream `a`, group `g`, subscription `s1` is sent, `first_frame` is what
came of it, `join_trigger_received` what a `stream:join` trigger was given.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import Run
from tests.support.broker import Broker
from tests.support.compare import assert_same, recording
from tests.support.scenes import returned
from tests.support.stream_client import RawHttp, settled
from tests.support.worker import Handler, Invocation, Worker

CASES = {case["name"]: case for case in recording("auth.json")["cases"]}
CONFIG = """\
workers:
  - name: iii-stream
    config:
      auth_function: stream::auth
      adapter: {name: kv, config: {store_method: in_memory}}
"""
JOIN = {
    "type": "join",
    "data": {"subscriptionId": "s1", "streamName": "a", "groupId": "g"},
}

PATH_SERVED = "another path is 404 before the function is asked"
WORKER_GONE = "the worker disconnects while its auth function is running"
SILENT = "a function that does not answer: no upgrade within 8 s (no timeout seen)"
SLOW = "a function that takes 1 s: the upgrade waits"
PLAIN_GET = "plain GET: 400 before the function is asked"

# What is right instead of the recorded status: name of the case to the number of the allowed
# difference and the status.
STATUS_INSTEAD: dict[str, tuple[int, int]] = {
    PATH_SERVED: (7, 101),
    "no worker has the auth function: the original accepts": (9, 503),
    WORKER_GONE: (9, 503),
    SILENT: (9, 503),
    "function returns null": (9, 401),
    "function returns nothing": (9, 401),
    "function returns false": (9, 401),
    "function returns true": (9, 401),
    "function returns a string": (9, 401),
    "function returns a number": (9, 401),
    "function returns an error": (9, 401),
    "function returns extra fields besides context": (9, 401),  # one is `unauthorized: true`
    PLAIN_GET: (10, 200),
    "function returns an array by position": (19, 401),
    "function returns an empty array": (19, 401),
}
PROTOCOL_INSTEAD: dict[str, tuple[int, str]] = {
    "subprotocols Authorization,<token> as the node client sends them": (8, "Authorization"),
    "subprotocols as a browser sends them": (8, "Authorization"),
}
ROOM = {
    "subscription_id": "<uuid>",
    "stream_name": "chat",
    "group_id": "room-1",
    "id": None,
    "context": {"u": 1},
}


@pytest.fixture(scope="module")
def broker() -> Iterator[Broker]:
    with Broker(CONFIG) as broker:
        yield broker


def test_every_difference_is_of_a_recorded_case() -> None:
    assert STATUS_INSTEAD.keys() | PROTOCOL_INSTEAD.keys() | {SLOW} <= CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_case(name: str, broker: Broker, run: Run) -> None:
    run(replay(broker, name, CASES[name]))


async def replay(broker: Broker, name: str, case: dict[str, Any]) -> None:
    worker = await Worker.open(broker.worker_url)
    try:
        if (handler := handler_of(name, case, worker)) is not None:
            await worker.register_function("stream::auth", handler)
        await worker.register_function("j", lambda _: None)
        await worker.register_trigger("stream:join", "j", {})
        await worker.barrier()
        request = case["request"].encode("latin-1")
        async with await RawHttp.request(broker.stream_url, request) as http:
            await compare_response(name, case, http)
            await compare_invocations(name, case, worker)
    finally:
        await worker.close()


def handler_of(name: str, case: dict[str, Any], worker: Worker) -> Handler | None:
    """The auth function of a case; None: no worker has it."""
    if name == PATH_SERVED:
        return lambda _: {"context": {"u": 1}}
    if case.get("auth_function_returned", "<not called>") == "<not called>":
        return None
    if name == WORKER_GONE:
        return lambda _: worker.abort()
    seconds = {SLOW: 1, SILENT: 3600}.get(name, 0)

    async def handler(_: Invocation) -> Any:
        await asyncio.sleep(seconds)
        return returned(case["auth_function_returned"])

    return handler


async def compare_response(name: str, case: dict[str, Any], http: RawHttp) -> None:
    answer = case["answer"]
    recorded = int(answer.get("status_line", "HTTP/1.1 0").split()[1])
    _, status = STATUS_INSTEAD.get(name, (0, recorded))
    response = await http.response()
    assert response.status == status, response
    if status != 101:
        return
    _, protocol = PROTOCOL_INSTEAD.get(name, (0, None))
    assert response.headers.get("sec-websocket-protocol") == protocol, response
    assert response.headers["sec-websocket-accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=", response
    if name == PATH_SERVED:  # joined by the path
        sync = await http.frame()
        assert (sync["streamName"], sync["groupId"], sync["id"]) == ("chat", "room-1", None)
        assert sync["event"] == {"type": "sync", "data": []}
        return
    http.send(JOIN)
    assert_same(answer["first_frame"], await http.frame(), name, more=("seq", "epoch"))


async def compare_invocations(name: str, case: dict[str, Any], worker: Worker) -> None:
    if name == WORKER_GONE:
        assert [invocation.function_id for invocation in worker.invocations] == ["stream::auth"]
        return
    if name != SILENT:
        await settled([], worker)
    received: dict[str, list[Any]] = {"stream::auth": [], "j": []}
    for invocation in worker.invocations:
        received[invocation.function_id].append(invocation.data)
    auth, joined = case["auth_function_received"], case.get("join_trigger_received", [])
    if name == PATH_SERVED:
        path = "/stream/chat/room-1/"
        auth, joined = (
            [CASES["context object"]["auth_function_received"][0] | {"path": path}],
            [ROOM],
        )
        auth[0] = auth[0] | {
            "headers": {k: v for k, v in auth[0]["headers"].items() if k != "authorization"}
        }
    if STATUS_INSTEAD.get(name, (0, 101))[1] != 101:
        joined = []
    assert_same(auth, received["stream::auth"], name)
    assert_same(joined, received["j"], name)
