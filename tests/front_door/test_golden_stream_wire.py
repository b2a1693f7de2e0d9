"""Replay of `golden/stream_wire.json`: what a stream client sends and gets, and raw HTTP.

`scenes[i].steps` as in `tests/support/scenes.py`: `send` is a JSON text frame, `send_text` any text
frame, `send_binary_utf8` a binary one (`\\\\xff` in it is a byte), `send_note` one that is too long
for the recording. `http[i]` is a request sent byte for byte and what was answered.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import Run
from tests.support.broker import IN_MEMORY, Broker
from tests.support.compare import assert_same, recording
from tests.support.connection import Closed
from tests.support.scenes import Scene, Step
from tests.support.stream_client import UPGRADE, RawHttp, Response
from tests.support.worker import Worker

RECORDING = recording("stream_wire.json")
SCENES: dict[str, Any] = {scene["name"]: scene for scene in RECORDING["scenes"]}
REQUESTS = {entry["name"]: entry for entry in RECORDING["http"]}

SERVER_STOPS = "the server stops while a client is connected"
GOING_AWAY = 1001
TOO_BIG = 1009
MIB = 1024 * 1024


# Scenes -------------------------------------------------------------------------------------


def _once(steps: list[Step]) -> list[Step]:
    """Difference 3: of equal frames of one event in a row only the first comes."""
    kept: list[Step] = []
    for step in steps:
        is_sync = "recv" in step and step["recv"]["event"]["type"] == "sync"
        if is_sync or not kept or "recv" not in step or step != kept[-1]:
            kept.append(step)
    return kept


def _own_code(steps: list[Step]) -> list[Step]:
    """Difference 4: the closing handshake is completed, the client sees the code that it sent."""
    code = next(step["close"] for step in steps if "close" in step)
    return [step | {"closed": {"code": code}} if "closed" in step else step for step in steps]


def _told(steps: list[Step]) -> list[Step]:
    """Difference 6: a bad frame is answered with an `error` event; the next join works."""
    bad = next(step for step in steps if step.keys() & {"send", "send_text", "send_binary"})
    index = steps.index(bad)
    return [*steps[: index + 1], {"client": "a", "check": _is_error_for(bad)}, *steps[index + 1 :]]


def _told_instead_of_sync(steps: list[Step]) -> list[Step]:
    return [step for step in _told(steps) if "recv" not in step]


def _is_error_for(bad: Step) -> Any:
    """A check that a frame is the `error` event that tells of the bad frame `bad`."""
    try:
        message = bad["send"] if "send" in bad else json.loads(bad["send_text"])
    except (ValueError, KeyError):
        message = None
    data = message.get("data") if isinstance(message, dict) else None
    fields = data if isinstance(data, dict) else {}

    def text(name: str) -> Any:
        return fields[name] if isinstance(fields.get(name), str) else ""

    def check(frame: Any) -> None:
        envelope = {
            "type": "stream",
            "timestamp": "<ts>",
            "streamName": text("streamName"),
            "groupId": text("groupId"),
            "id": None,
        }
        event = frame["event"]
        rest = {key: value for key, value in frame.items() if key != "event"}
        assert_same(envelope, rest, f"envelope of the error for {bad}", more=("seq", "epoch"))
        assert event["type"] == "error", event
        assert event.keys() <= {"type", "code", "message", "field", "subscriptionId"}, event
        assert isinstance(event["code"], str), event
        assert event["code"], event
        assert isinstance(event["message"], str), event
        assert event["message"], event
        if text("subscriptionId"):
            assert event["subscriptionId"] == text("subscriptionId"), event
        if name := BAD_FIELD.get(_scene_of(bad)):
            assert event["field"].split(".")[-1] == name, event

    return check


def _scene_of(bad: Step) -> str:
    return next(name for name, scene in SCENES.items() if bad in _bytes(scene["steps"]))


# Bad frames of which it is known which field is wrong.
BAD_FIELD = {
    "ignored frame: unknown type": "type",
    "ignored frame: type in capitals": "type",
    "ignored frame: ping as JSON": "type",
    "ignored frame: empty object": "type",
    "ignored frame: join without data": "data",
    "ignored frame: data null": "data",
    "accepted frame: data as an array by position": "data",
    "ignored frame: without subscriptionId": "subscriptionId",
    "ignored frame: without streamName": "streamName",
    "ignored frame: without groupId": "groupId",
    "ignored frame: id is a number": "id",
    "ignored frame: groupId is a number": "groupId",
    "ignored frame: groupId null": "groupId",
}
REALLY_IGNORED = {  # blank frames are not bad
    "ignored frame: empty text",
    "ignored frame: blank text",
    "ignored frame: binary, empty",
}

# What is right instead of what was recorded: name of the scene to the number of the allowed
# difference and what becomes of its steps.
INSTEAD: dict[str, tuple[int, Any]] = {
    "item: id null is a group join, id '' is an item join": (3, _once),
    "group and item subscription of one connection: each event comes once per matching "
    "subscription": (3, _once),
    "two group subscriptions of one connection with different ids": (3, _once),
    "client closes with 1000": (4, _own_code),
    "client closes with 1001": (4, _own_code),
    "client closes with 4000": (4, _own_code),
    "accepted frame: data as an array by position": (6, _told_instead_of_sync),
} | {
    name: (6, _told)
    for name in SCENES
    if name.startswith("ignored frame: ") and name not in REALLY_IGNORED
}
# Difference 5: name of the scene to the padding of the join that it sends.
TOO_LONG = {
    "client frame of 15 MiB is read (and ignored: unknown extra field)": 15 * MIB,
    "client frame over 16 MiB ends the connection": 17 * MIB,
}


def _bytes(steps: list[Step]) -> list[Step]:
    """The steps with binary frames as bytes."""
    return [
        {"client": step["client"], "send_binary": _unescaped(step["send_binary_utf8"])}
        if "send_binary_utf8" in step
        else step
        for step in steps
    ]


def _unescaped(text: str) -> bytes:
    pieces = re.split(r"\\x([0-9a-f]{2})", text)  # texts and the digits of bytes in turn
    return b"".join(
        bytes.fromhex(piece) if index % 2 else piece.encode() for index, piece in enumerate(pieces)
    )


def steps_of(name: str) -> list[Step]:
    """The steps of a scene, with what is right instead."""
    steps = _bytes(SCENES[name]["steps"])
    _, change = INSTEAD.get(name, (0, None))
    changed: list[Step] = change(steps) if change else steps
    return changed


@pytest.fixture(scope="module")
def worker(memory_broker: Broker, run: Run) -> Iterator[Worker]:
    worker = run(Worker.open(memory_broker.worker_url))
    yield worker
    run(worker.close())


def test_every_difference_is_of_a_recorded_scene() -> None:
    assert INSTEAD.keys() | REALLY_IGNORED | BAD_FIELD.keys() | TOO_LONG.keys() <= SCENES.keys()


@pytest.mark.parametrize("name", sorted(SCENES.keys() - TOO_LONG.keys() - {SERVER_STOPS}))
def test_scene(name: str, memory_broker: Broker, worker: Worker, run: Run) -> None:
    run(replay(name, memory_broker, worker))


async def replay(name: str, broker: Broker, worker: Worker) -> None:
    scene = Scene(broker, worker, worker)
    try:
        await scene.replay(name, steps_of(name))
    finally:
        await scene.clean([])


@pytest.mark.parametrize("name", TOO_LONG)
def test_too_long_frame(name: str, memory_broker: Broker, run: Run) -> None:
    """Difference 5: closed with 1009, however it was read before."""
    run(send_padded_join(memory_broker, TOO_LONG[name]))


async def send_padded_join(broker: Broker, padding: int) -> None:
    data = {"subscriptionId": "s1", "streamName": "w59", "groupId": "g", "pad": "x" * padding}
    async with await RawHttp.request(broker.stream_url, UPGRADE) as client:
        assert (await client.response()).status == 101
        client.send({"type": "join", "data": data})
        assert await client.close_code() == TOO_BIG


def test_the_server_stops(run: Run) -> None:
    """Difference 4: clients and workers see 1001, the broker exits 0."""
    with Broker(IN_MEMORY) as broker:
        run(stop_while_joined(broker))


async def stop_while_joined(broker: Broker) -> None:
    *steps, sigterm, closed = SCENES[SERVER_STOPS]["steps"]
    assert sigterm["server"] == "SIGTERM"
    assert "closed" in closed
    worker = await Worker.open(broker.worker_url)
    scene = Scene(broker, worker, worker)
    await scene.replay(SERVER_STOPS, steps)
    assert await asyncio.to_thread(broker.stop) == 0, broker.log_tail()
    for connection in (scene.clients["a"], worker):
        end = await connection.next()
        assert isinstance(end, Closed), end
        assert end.code == GOING_AWAY, end
        await connection.close()


# HTTP ---------------------------------------------------------------------------------------

UPGRADED = {
    "upgrade": "websocket",
    "connection": "upgrade",
    "sec-websocket-accept": "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=",
}
REFUSED = set(range(400, 500))

# What is right instead of the recorded status: name of the request to the number of the allowed
# difference and the statuses that will do.
STATUS_INSTEAD: dict[str, tuple[int, set[int]]] = {
    "upgrade on the documented path": (7, {101}),
    "upgrade on the documented path without slash": (7, {101}),
    "plain GET /": (10, {200}),
    "plain GET /healthz": (10, {200}),
    "POST /": (10, REFUSED),
    "HEAD /": (10, REFUSED),
    "OPTIONS /": (10, REFUSED),
    "upgrade with version 8": (10, REFUSED),
    "upgrade without key": (10, REFUSED),
    "upgrade to something else": (10, REFUSED),
    "upgrade with HTTP/1.0": (10, {400, 426, 505}),
    "not HTTP at all": (10, REFUSED),
}
PROTOCOL_INSTEAD: dict[str, tuple[int, str]] = {
    "with one subprotocol": (8, "chat"),
    "with Authorization,<token> as subprotocols": (8, "Authorization"),
}
# "with a line that says why"
EXPLAINED = {"upgrade with version 8", "upgrade without key", "upgrade to something else"}


@pytest.mark.parametrize("name", REQUESTS)
def test_http(name: str, memory_broker: Broker, run: Run) -> None:
    entry = REQUESTS[name]
    response = run(requested(memory_broker, entry["request"].encode("latin-1")))
    recorded = int(entry["answer"]["status_line"].split()[1])
    _, statuses = STATUS_INSTEAD.get(name, (0, {recorded}))
    assert response.status in statuses, response
    if response.status == 101:
        for header, value in UPGRADED.items():
            assert response.headers[header].lower() == value.lower(), response
        _, protocol = PROTOCOL_INSTEAD.get(name, (0, None))
        assert response.headers.get("sec-websocket-protocol") == protocol, response
        assert "sec-websocket-extensions" not in response.headers, response
        assert "tok123" not in str(response.headers), response
    elif response.status == 404:
        assert response.body == "", response
    elif name == "plain GET /":
        assert response.headers["content-type"].startswith("text/plain"), response
        assert response.body, response
    elif name in EXPLAINED:
        assert response.body.strip(), response


async def requested(broker: Broker, request: bytes) -> Response:
    async with await RawHttp.request(broker.stream_url, request) as http:
        return await http.response()
