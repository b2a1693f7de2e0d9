"""Faults that users of comparable systems reported, each kept as a test through the front door.

`test_case_NN_kind`: NN is the fault's number in the project's collection.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import urllib.request
import uuid
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml
from websockets.frames import Frame, Opcode

from tests.conftest import Run
from tests.support.broker import IN_MEMORY, REPOSITORY, Broker, StartFailed, free_ports
from tests.support.calls import LONG_S, item, result_of
from tests.support.connection import Closed
from tests.support.stream_client import UPGRADE, RawHttp, StreamClient, settled
from tests.support.worker import ABSENT, Worker

KIB, MIB = 1024, 1024 * 1024
AUTH = """\
workers:
  - name: iii-stream
    config:
      auth_function: stream::auth
      adapter: {name: kv, config: {store_method: in_memory}}
"""


def with_limits(**limits: float) -> str:
    """A configuration in memory with `broker.limits`."""
    return IN_MEMORY + yaml.safe_dump({"broker": {"limits": limits}})


def group_of(stream: str, group: str, **more: Any) -> dict[str, Any]:
    """The payload of a call on one group."""
    return {"stream_name": stream, "group_id": group, **more}


async def put(worker: Worker, stream: str, group: str, item_id: str, data: Any) -> None:
    """Set an item; it must succeed."""
    answer = await worker.call("stream::set", item(stream, group, item_id, data=data), LONG_S)
    assert "result" in answer, answer


async def error_of(worker: Worker, function_id: str, data: Any = ABSENT) -> dict[str, Any]:
    """The error of a call that must fail."""
    answer = await worker.call(function_id, data, LONG_S)
    assert set(answer) == {"error"}, answer
    error: dict[str, Any] = answer["error"]
    return error


def event_of(frame: Any, *types: str) -> bool:
    """Whether `frame` is a stream frame with an event of one of `types`."""
    return isinstance(frame, dict) and "event" in frame and frame["event"]["type"] in types


def metrics(url: str) -> dict[str, float]:
    """The samples of `/metrics`: name with labels to value."""
    with urllib.request.urlopen(url, timeout=10) as response:
        lines = response.read().decode().splitlines()
    return {
        name: float(value)
        for name, _, value in (line.rpartition(" ") for line in lines if line[:1] not in ("#", ""))
    }


def open_files(pid: int) -> int:
    """Descriptors that a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident_bytes(pid: int) -> int:
    """Memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def send_raw(http: RawHttp, payload: bytes, opcode: Opcode = Opcode.TEXT) -> None:
    """Send a frame with any bytes (after a 101)."""
    http.writer.write(Frame(opcode, payload).serialize(mask=True))


# Order and snapshots -------------------------------------------------------------------------


def test_case_01_join_sync_race(any_broker: Broker, run: Run) -> None:
    async def rounds() -> None:
        async with (
            await Worker.open(any_broker.worker_url) as worker,
            await StreamClient.open(any_broker.stream_url) as client,
        ):
            for i in range(100):
                sync = await client.join("chat1", f"r{i}", "s")
                await put(worker, "chat1", f"r{i}", "m", {"id": "m"})
                create = await client.next()
                assert sync["event"] == {"type": "sync", "data": []}
                assert create["event"] == {"type": "create", "data": {"id": "m"}}
                assert (create["groupId"], create["seq"]) == (f"r{i}", sync["seq"] + 1)
            await client.quiet()
            assert len(client.frames) == 200

    run(rounds())


@pytest.mark.timeout(180)
def test_case_02_lost_update(any_broker: Broker, run: Run) -> None:
    workers_count, calls = 32, 200
    total = workers_count * calls
    call = item("s2", "g", "n", ops=[{"type": "increment", "path": "c", "by": 1}])

    async def count() -> None:
        async with await StreamClient.open(any_broker.stream_url) as client:
            sync = await client.join("s2", "g")
            workers = [await Worker.open(any_broker.worker_url) for _ in range(workers_count)]
            answers = await asyncio.gather(
                *(w.call("stream::update", call, 120) for w in workers for _ in range(calls))
            )
            values = [answer["result"]["new_value"]["c"] for answer in answers]
            assert sorted(values) == list(range(1, total + 1))
            assert await result_of(workers[0], "stream::get", item("s2", "g", "n")) == {"c": total}
            while len(client.received) < total + 1:
                await client.next(patience_s=LONG_S)
            events = client.frames[1:]
            assert [e["event"]["data"]["c"] for e in events] == list(range(1, total + 1))
            assert [e["seq"] - sync["seq"] for e in events] == list(range(1, total + 1))
            await asyncio.gather(*(worker.close() for worker in workers))

    run(count())


@pytest.mark.timeout(180)
def test_case_06_timestamp_order(any_broker: Broker, run: Run) -> None:
    count = 5000

    async def pipeline() -> None:
        async with (
            await Worker.open(any_broker.worker_url) as worker,
            await StreamClient.open(any_broker.stream_url) as group,
            await StreamClient.open(any_broker.stream_url) as one,
        ):
            await group.join("s6", "g", "whole")
            await one.join("s6", "g", "one", id="x")
            for i in range(0, count, 2):
                await worker.void("stream::set", item("s6", "g", "x", data={"id": "x", "n": i}))
                send = group_of("s6", "g", id="x", type="tick", data=i + 1)
                await worker.void("stream::send", send)
                if i % 500 == 0:  # syncs count in the same clock
                    await group.send_join("s6", "g", f"whole {i}")
                    await one.send_join("s6", "g", f"one {i}", id="x")
            for client in (group, one):  # the last write comes after all of them
                for _ in range(0, count, 500):
                    await client.next(lambda frame: event_of(frame, "sync"), LONG_S)
            last = {"id": "x", "n": "last"}
            await put(worker, "s6", "g", "x", last)
            for client in (group, one):
                while client.received[-1].get("event", {}).get("data") != last:
                    await client.next(patience_s=LONG_S)
                await client.quiet()
                stamps = [frame["timestamp"] for frame in client.frames]
                assert all(a < b for a, b in pairwise(stamps))
                assert client.frames[-1]["event"] == {"type": "update", "data": last}
                types = Counter(frame["event"]["type"] for frame in client.frames)
                assert (types["create"], types["update"], types["event"]) == (1, 2500, 2500)

    run(pipeline())


def test_case_07_two_subscriptions_one_socket(memory_broker: Broker, run: Run) -> None:
    async def twice() -> None:
        async with (
            await Worker.open(memory_broker.worker_url) as worker,
            await StreamClient.open(memory_broker.stream_url) as client,
        ):
            await client.join("chat7", "r1", "a")
            await client.join("chat7", "r1", "b")
            await client.join("chat7", "r1", "c", id="m")
            send = group_of("chat7", "r1", type="ping", data=1)
            await result_of(worker, "stream::send", send)
            await result_of(worker, "stream::send", send | {"id": "m"})
            await put(worker, "chat7", "r1", "m", {"id": "m"})
            await settled([client], worker, [("chat7", "r1")])
            types = [frame["event"]["type"] for frame in client.frames[3:]]
            assert types == ["event", "event", "create"]
            await client.send_leave("chat7", "r1", "a")
            await put(worker, "chat7", "r1", "m", {"id": "m"})
            await settled([client], worker, [("chat7", "r1")])
            assert len(client.frames) == 7

    run(twice())


# Handshakes ----------------------------------------------------------------------------------


def test_case_08_auth_fail_open(run: Run) -> None:
    def request(path: str) -> bytes:
        return UPGRADE.replace(b"GET / ", b"GET %s " % path.encode())

    async def knock() -> None:
        for path in ("/", "/stream/chat/r1/"):
            async with await RawHttp.request(broker.stream_url, request(path)) as http:
                assert (await http.response()).status in (401, 503)
        values = metrics(broker.metrics_url)
        refused = [v for name, v in values.items() if name.startswith("broker_handshakes_refused")]
        assert sum(refused) == 2, values
        async with await Worker.open(broker.worker_url) as worker:
            await worker.register_function("stream::auth", lambda _: {"context": None})
            await worker.barrier()
            for path in ("/", "/stream/chat/r1/"):
                async with await RawHttp.request(broker.stream_url, request(path)) as http:
                    assert (await http.response()).status == 101

    with Broker(AUTH) as broker:
        run(knock())


def test_case_10_header_handling(run: Run) -> None:
    request = (
        b"GET /?a=b HTTP/1.1\r\nHOST: x\r\nUPGRADE: WebSocket\r\n"
        b"connection: keep-alive, Upgrade\r\n"
        b"SEC-WEBSOCKET-KEY: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n"
        b"AUTHORIZATION: Bearer  T\r\n\r\n"
    )

    async def shout() -> None:
        async with await Worker.open(broker.worker_url) as worker:
            await worker.register_function("stream::auth", lambda _: {"context": None})
            await worker.barrier()
            async with await RawHttp.request(broker.stream_url, request) as http:
                response = await http.response()
                assert response.status == 101
                assert response.headers["sec-websocket-accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
            (asked,) = await worker.asked(1)
            assert asked.data["headers"]["authorization"] == "Bearer  T"
            assert all(name == name.lower() for name in asked.data["headers"])

    with Broker(AUTH) as broker:
        run(shout())


def test_case_12_percent_encoding(memory_broker: Broker, run: Run) -> None:
    group = "r[] \u00e9"

    async def by_path() -> None:
        url = f"{memory_broker.stream_url}/stream/chat12/r%5B%5D%20%C3%A9/"
        async with (
            await Worker.open(memory_broker.worker_url) as worker,
            await StreamClient.open(url) as client,
        ):
            sync = await client.next()
            await put(worker, "chat12", group, "m", {"id": "m"})
            create = await client.next()
            for frame in (sync, create):
                assert (frame["streamName"], frame["groupId"]) == ("chat12", group)
            assert (sync["event"]["type"], create["event"]["type"]) == ("sync", "create")
            assert create["seq"] == sync["seq"] + 1

    run(by_path())


def test_case_20_half_open(run: Run) -> None:
    starts = [b"", b"GET / HTTP/1.1\r\nHost: x", b"G"]

    async def linger(url: str, start: bytes) -> None:
        """Send `start`, then nothing, or for the last a byte now and then, until it is closed."""
        host, port = url.split("/")[2].rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(start)

        async def drip() -> None:
            for byte in b"ET / HTTP/1.1\r\nX: " + b"y" * 1000:
                writer.write(bytes([byte]))
                await asyncio.sleep(0.2)

        dripping = asyncio.create_task(drip()) if start == starts[2] else None
        with contextlib.suppress(ConnectionError):
            await reader.read()
        if dripping is not None:
            dripping.cancel()
        writer.transport.abort()

    async def crowd() -> None:
        gateway = broker.children()["gateway"]
        before = open_files(gateway)
        urls = (broker.stream_url, broker.worker_url)
        lingering = [asyncio.create_task(linger(urls[i % 2], starts[i % 3])) for i in range(200)]
        async with await StreamClient.open(broker.stream_url) as client:
            await client.join("s", "g")
        async with asyncio.timeout(30):
            await asyncio.gather(*lingering)
            while open_files(gateway) > before:
                await asyncio.sleep(0.02)

    with Broker(with_limits(handshake_timeout_s=1)) as broker:
        run(crowd())


# Names and values ----------------------------------------------------------------------------

STREAM, GROUP, ITEM = "d\u00e9j\u00e0-\U0001f4a1", "\u90e8\u5c4b 1", "\u05d0"


def test_case_13_unicode_names(any_broker: Broker, run: Run) -> None:
    value = {"id": ITEM, "t": STREAM}

    async def round_trip() -> None:
        async with (
            await Worker.open(any_broker.worker_url) as worker,
            await StreamClient.open(any_broker.stream_url) as client,
        ):
            await client.join(STREAM, GROUP)
            await put(worker, STREAM, GROUP, ITEM, value)
            create = await client.next()
            assert (create["streamName"], create["groupId"], create["id"]) == (STREAM, GROUP, ITEM)
            assert create["event"]["data"] == value
            assert await result_of(worker, "stream::get", item(STREAM, GROUP, ITEM)) == value
            assert await result_of(worker, "stream::list", group_of(STREAM, GROUP)) == [value]
            groups = await result_of(worker, "stream::list_groups", {"stream_name": STREAM})
            assert groups == [GROUP]
            listed = await result_of(worker, "stream::list_all", {})
            assert {"id": STREAM, "groups": [GROUP]} in listed["stream"]
            ops = [{"type": "set", "path": GROUP, "value": 1}]
            updated = await result_of(worker, "stream::update", item(STREAM, GROUP, ITEM, ops=ops))
            assert updated["new_value"] == value | {GROUP: 1}
            send = group_of(STREAM, GROUP, id=ITEM, type=STREAM, data=GROUP)
            await result_of(worker, "stream::send", send)
            event = await client.next(lambda frame: event_of(frame, "event"))
            assert event["event"]["event"] == {"type": STREAM, "data": GROUP}
            parts = [quote(name, safe="") for name in (STREAM, GROUP, ITEM)]
            for path, expected in (
                (parts[:2], [value | {GROUP: 1}]),
                (parts, value | {GROUP: 1}),
            ):
                url = "/".join([any_broker.stream_url, "stream", *path, ""])
                async with await StreamClient.open(url) as other:
                    sync = await other.next()
                    assert sync["event"] == {"type": "sync", "data": expected}
                    assert (sync["streamName"], sync["groupId"]) == (STREAM, GROUP)
            deleted = await result_of(worker, "stream::delete", item(STREAM, GROUP, ITEM))
            assert deleted == {"old_value": value | {GROUP: 1}}

    run(round_trip())


def test_case_13_name_one_byte_too_long(memory_broker: Broker, run: Run) -> None:
    longest = "\u00e9" * 512
    too_long = "x" + longest

    async def measure() -> None:
        async with (
            await Worker.open(memory_broker.worker_url) as worker,
            await StreamClient.open(memory_broker.stream_url) as client,
        ):
            await put(worker, longest, longest, longest, 1)
            assert await result_of(worker, "stream::get", item(*[longest] * 3)) == 1
            for field in ("stream_name", "group_id", "item_id"):
                data = item("s", "g", "i", data=1) | {field: too_long}
                message = (await error_of(worker, "stream::set", data))["message"]
                assert all(text in message for text in (field, "1024", "1025")), message
            error = (await client.join(too_long, "g"))["event"]
            assert error["type"] == "error"
            assert all(t in error["message"] for t in ("streamName", "1024", "1025")), error

    run(measure())


def test_case_14_invalid_utf8(any_broker: Broker, run: Run) -> None:
    call_id = str(uuid.uuid4())
    call = (
        b'{"type":"invokefunction","invocation_id":"%s","function_id":"stream::set","data":'
        b'{"stream_name":"s14","group_id":"g","item_id":"i","data":{"t":"\xff"}}}'
    ) % call_id.encode()

    async def corrupt() -> None:
        async with (
            await Worker.open(any_broker.worker_url) as worker,
            await StreamClient.open(any_broker.stream_url) as client,
        ):
            await client.join("s14", "g")
            async with await RawHttp.request(any_broker.worker_url, UPGRADE) as bad:
                assert (await bad.response()).status == 101
                assert (await bad.frame())["type"] == "workerregistered"
                send_raw(bad, call)
                try:
                    answer = await bad.frame()
                    assert answer["invocation_id"] == call_id
                    assert "error" in answer
                except asyncio.IncompleteReadError:
                    pass  # closed: right too
            assert await worker.call("stream::get", item("s14", "g", "i")) in ({}, {"result": None})
            await settled([client], worker, [("s14", "g")])
            assert len(client.received) == 1

    run(corrupt())


NUMBERS = (
    '{"id":"n","a":9007199254740993,"b":18446744073709551616,"c":1.0,"d":1e2,"e":-0.0,'
    '"f":0.1234567890123456}'
)


def test_case_15_numbers(any_broker: Broker, run: Run) -> None:
    def same(value: Any, expected: dict[str, Any]) -> None:
        """Equal numbers of equal sign; an integer that counts must have been kept exactly."""
        assert value == expected
        assert str(value["e"]) == "-0.0"
        assert isinstance(value["a"], int)

    first = json.loads(NUMBERS)
    last = first | {"a": 9007199254740994, "g": 1}
    ops = [
        {"type": "increment", "path": "a", "by": 1},
        {"type": "merge", "value": {"g": 1}},
    ]

    async def count() -> None:
        async with (
            await Worker.open(any_broker.worker_url) as worker,
            await StreamClient.open(any_broker.stream_url) as client,
        ):
            await client.join("s15", "g")
            call_id = str(uuid.uuid4())
            await worker.send_text(
                f'{{"type":"invokefunction","invocation_id":"{call_id}",'
                '"function_id":"stream::set","data":{"stream_name":"s15","group_id":"g",'
                f'"item_id":"n","data":{NUMBERS}}}}}'
            )
            answer = await worker.next(lambda frame: frame.get("invocation_id") == call_id)
            same(answer["result"]["new_value"], first)
            same((await client.next())["event"]["data"], first)
            updated = await result_of(worker, "stream::update", item("s15", "g", "n", ops=ops))
            same(updated["old_value"], first)
            same(updated["new_value"], last)
            same((await client.next())["event"]["data"], last)
            same(await result_of(worker, "stream::get", item("s15", "g", "n")), last)
            same((await result_of(worker, "stream::list", group_of("s15", "g")))[0], last)
            same((await client.join("s15", "g", "again"))["event"]["data"][0], last)

    run(count())


# Bad input -----------------------------------------------------------------------------------


def test_case_16_json_depth(memory_broker: Broker, run: Run) -> None:
    deep_list = "[" * 200_000
    deep_join = '{"type":"join","data":' + '{"a":' * 40_000  # below the limit of one message
    call_id = str(uuid.uuid4())
    deep_set = (
        f'{{"type":"invokefunction","invocation_id":"{call_id}","function_id":"stream::set",'
        '"data":{"stream_name":"s16","group_id":"g","item_id":"i","data":'
        + "[" * 5000
        + "]" * 5000
        + "}}"
    )

    async def bad(kind: type[StreamClient] | type[Worker], url: str, text: str) -> None:
        """Send `text`: an error may come, or the connection may be closed."""
        peer = await kind.open(url)
        try:
            await peer.send_text(text)
            with contextlib.suppress(Exception):  # closed meanwhile
                await peer.quiet()
            closes = [frame for frame in peer.received if isinstance(frame, Closed)]
            assert all(close.code in (1007, 1008) for close in closes), closes
        finally:
            await peer.close()

    async def dig() -> None:
        pids = memory_broker.children()
        async with (
            await StreamClient.open(memory_broker.stream_url) as other,
            await Worker.open(memory_broker.worker_url) as worker,
        ):
            await other.join("s16", "g")
            for text in (deep_list, deep_join):
                await bad(StreamClient, memory_broker.stream_url, text)
                await bad(Worker, memory_broker.worker_url, text)
                await other.ping()
            await worker.send_text(deep_set)
            answer = await worker.next(lambda frame: frame.get("invocation_id") == call_id)
            assert answer["error"]["code"] == "invalid_message", answer
            await other.ping()
            assert await worker.call("stream::list", group_of("s16", "g")) == {"result": []}
            await settled([other], worker, [("s16", "g")])
            assert len(other.received) == 1
        assert memory_broker.children() == pids

    run(dig())


def test_case_17_malformed_frames(memory_broker: Broker, run: Run) -> None:
    bad = [
        '442["x"]',
        "[]",
        "null",
        '{"type":"join"}',
        '{"type":"join","data":null}',
        '{"type":"join","data":{"subscriptionId":1,"streamName":[],"groupId":{}}}',
        '{"type":"nope"}',
    ]
    join = {"subscriptionId": "bin", "streamName": "s17", "groupId": "g"}

    async def stumble() -> None:
        async with (
            await StreamClient.open(memory_broker.stream_url) as other,
            await StreamClient.open(memory_broker.stream_url) as client,
        ):
            await other.join("s17", "g")
            for text in bad:
                await client.send_text(text)
                frame = await client.next()
                assert frame["type"] == "stream"
                assert frame["event"]["type"] == "error"
                assert frame["event"]["message"]
            await client.send_text("")
            await client.send_binary(b"\xff\x00")
            assert (await client.next())["event"]["type"] == "error"
            await client.send_binary(json.dumps({"type": "join", "data": join}).encode())
            assert (await client.next())["event"] == {"type": "sync", "data": []}
            assert (await client.join("s17", "g", "text"))["event"]["type"] == "sync"
            await other.quiet()
            assert len(other.received) == 1

    run(stumble())


def test_case_48_prototype_keys(any_broker: Broker, run: Run) -> None:
    ops = [
        {"type": "merge", "path": ["__proto__", "x"], "value": {"a": 1}},
        {"type": "merge", "value": {"constructor": {"p": 1}}},
        {"type": "set", "path": "prototype", "value": 1},
    ]

    async def pollute() -> None:
        async with await Worker.open(any_broker.worker_url) as worker:
            await put(worker, "s48", "g", "i", {"n": 1})
            updated = await result_of(worker, "stream::update", item("s48", "g", "i", ops=ops))
            assert [(e["op_index"], e["code"]) for e in updated["errors"]] == [
                (0, "merge.path.proto_polluted"),
                (1, "merge.value.proto_polluted"),
                (2, "set.path.proto_polluted"),
            ]
            assert updated["new_value"] == {"n": 1}
            assert await result_of(worker, "stream::get", item("s48", "g", "i")) == {"n": 1}

    run(pollute())


GOOD = item("s54", "g", "i", data=1)
BAD_CALLS: list[tuple[str, Any, str]] = [
    ("set", {k: v for k, v in GOOD.items() if k != "stream_name"}, "stream_name"),
    ("set", GOOD | {"stream_name": None}, "stream_name"),
    ("set", GOOD | {"stream_name": 5}, "stream_name"),
    ("set", {k: v for k, v in GOOD.items() if k != "item_id"}, "item_id"),
    ("set", {k: v for k, v in GOOD.items() if k != "data"}, "data"),
    ("set", list(GOOD.values()), "array"),
    ("update", item("s54", "g", "i", ops={}), "ops"),
    ("update", item("s54", "g", "i", ops="x"), "ops"),
    ("update", item("s54", "g", "i", ops=[{"type": "nope", "path": "a"}]), "ops[0].type"),
    ("update", item("s54", "g", "i"), "ops"),
]


def test_case_54_input_validation(memory_broker: Broker, run: Run) -> None:
    async def validate() -> None:
        async with (
            await Worker.open(memory_broker.worker_url) as worker,
            await StreamClient.open(memory_broker.stream_url) as client,
        ):
            await client.join("s54", "g")
            for function, data, word in BAD_CALLS:
                error = await error_of(worker, f"stream::{function}", data)
                assert error["code"] == "deserialization_error", (function, data, error)
                assert word in error["message"], (function, data, error)
            assert await worker.call("stream::list", group_of("s54", "g")) == {"result": []}
            await settled([client], worker, [("s54", "g")])
            assert len(client.received) == 1
            # Any text is a name, also the empty one; unknown fields are ignored.
            for data in (GOOD | {"stream_name": "", "data": 2}, GOOD | {"extra": {}}):
                answer = await result_of(worker, "stream::set", data)
                assert answer["new_value"] == data["data"]
            assert await result_of(worker, "stream::get", item("", "g", "i")) == 2

    run(validate())


# Sizes and slow peers ------------------------------------------------------------------------


def test_case_19_huge_payload_at_the_limit(run: Run) -> None:
    value = "x" * (15 * KIB)  # 4 of them with quotes and commas are just below 64 KiB

    async def fill() -> None:
        async with (
            await Worker.open(broker.worker_url) as worker,
            await StreamClient.open(broker.stream_url) as client,
        ):
            for i in range(4):
                await put(worker, "s", "g", str(i), value)
            assert await result_of(worker, "stream::list", group_of("s", "g")) == [value] * 4
            assert (await client.join("s", "g"))["event"]["data"] == [value] * 4
            await put(worker, "s", "g", "5", value)
            await check_refused(worker, client, "s", "g", str(64 * KIB))
            await result_of(worker, "stream::delete", item("s", "g", "5"))
            assert len(await result_of(worker, "stream::list", group_of("s", "g"))) == 4

    with Broker(with_limits(response_bytes_max=64 * KIB)) as broker:
        run(fill())


async def check_refused(
    worker: Worker, client: StreamClient, stream: str, group: str, limit: str
) -> None:
    """`stream::list` and a join of the group fail with an error that says why."""
    error = await error_of(worker, "stream::list", group_of(stream, group))
    assert error["code"] == "response_too_large", error
    assert limit in error["message"], error
    await client.send_join(stream, group, "too large")
    frame = await client.next(lambda frame: event_of(frame, "error"), LONG_S)
    assert frame["event"]["code"] == "response_too_large", frame
    assert frame["event"]["subscriptionId"] == "too large"
    assert limit in frame["event"]["message"], frame


def test_case_19_huge_payload(any_broker: Broker, run: Run) -> None:
    value = "x" * MIB

    async def fill() -> None:
        async with (
            await Worker.open(any_broker.worker_url) as worker,
            await StreamClient.open(any_broker.stream_url) as client,
        ):
            for i in range(70):
                await put(worker, "s19", "g", str(i), value)
            await put(worker, "s19", "small", "i", 1)
            listing = asyncio.create_task(error_of(worker, "stream::list", group_of("s19", "g")))
            small = group_of("s19", "small")
            answers = await asyncio.gather(
                *(worker.call("stream::list", small, LONG_S) for _ in range(20))
            )
            assert answers == [{"result": [1]}] * 20
            error = await listing
            assert error["code"] == "response_too_large", error
            await check_refused(worker, client, "s19", "g", str(48 * MIB))
            assert await result_of(worker, "stream::get", item("s19", "g", "7")) == value
            assert (await client.join("s19", "small"))["event"]["data"] == [1]

    run(fill())


class Counting(StreamClient):
    """A client that keeps of each frame its type and number only."""

    def _take(self, frame: Any) -> None:
        if isinstance(frame, dict):
            frame = (frame["event"]["type"], frame["seq"])
        super()._take(frame)


def small_window_socket(url: str) -> socket.socket:
    """A connected TCP socket whose kernel buffer takes little."""
    host, port = url.split("/")[2].rsplit(":", 1)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 * KIB)
    sock.connect((host, int(port)))
    sock.setblocking(False)
    return sock


@pytest.mark.timeout(180)
def test_case_21_slow_consumer(run: Run) -> None:
    events, at_once = 2000, 50
    value = {"id": "i", "t": "x" * 10 * KIB}

    async def stall() -> None:
        gateway = broker.children()["gateway"]
        worker = await Worker.open(broker.worker_url)
        healthy = [await Counting.open(broker.stream_url) for _ in range(10)]
        stalled = RawHttp(
            *await asyncio.open_connection(sock=small_window_socket(broker.stream_url))
        )
        stalled.writer.write(UPGRADE)
        assert (await stalled.response()).status == 101
        for client in healthy:
            await client.send_join("s", "g")
        stalled.send({"type": "join", "data": group_join("s", "g")})
        assert (await stalled.frame())["seq"] == 0
        before = resident_bytes(gateway)
        for first in range(0, events, at_once):
            calls = [
                worker.call("stream::set", item("s", "g", f"i{i % 20}", data=value), LONG_S)
                for i in range(first, first + at_once)
            ]
            await asyncio.gather(*calls)
            for client in healthy:  # what they have read so far, the next events come after
                while len(client.received) < 1 + first + at_once:
                    await client.next(patience_s=LONG_S)
        for client in healthy:
            assert [seq for _, seq in client.received] == list(range(events + 1))
            await client.close()
        assert resident_bytes(gateway) - before < (1 + 20) * MIB
        assert metrics(broker.metrics_url)["broker_clients_behind_total"] >= 1
        await check_catches_up(stalled, events)
        stalled.writer.transport.abort()
        await worker.close()

    with Broker(IN_MEMORY) as broker:
        run(stall())


def group_join(stream: str, group: str) -> dict[str, str]:
    return {"subscriptionId": "s", "streamName": stream, "groupId": group}


async def check_catches_up(stalled: RawHttp, seq_last: int) -> None:
    """What a client that fell behind reads: events in a row, then a sync as of now."""
    seq, synced = 0, False
    while seq < seq_last:
        frame = await stalled.frame(LONG_S)
        if frame["event"]["type"] == "sync":
            assert frame["seq"] >= seq
            assert len(frame["event"]["data"]) == 20
            synced = True
        else:
            assert frame["seq"] == seq + 1
        seq = frame["seq"]
    assert synced


# Keys, files and routes ----------------------------------------------------------------------


async def check_kept_apart(worker: Worker) -> None:
    assert await result_of(worker, "stream::list", group_of("a:b", "c")) == [1]
    assert await result_of(worker, "stream::list", group_of("a", "b:c")) == [2]
    assert await result_of(worker, "stream::list_groups", {"stream_name": "a"}) == ["b:c"]
    assert await result_of(worker, "stream::list_groups", {"stream_name": "a:b"}) == ["c"]
    listed = await result_of(worker, "stream::list_all", {})
    named = [entry for entry in listed["stream"] if entry["id"] in ("a", "a:b")]
    assert named == [{"id": "a", "groups": ["b:c"]}, {"id": "a:b", "groups": ["c"]}]


def test_case_31_key_collision_in_memory(memory_broker: Broker, run: Run) -> None:
    async def collide() -> None:
        async with await Worker.open(memory_broker.worker_url) as worker:
            await put(worker, "a:b", "c", "x", 1)
            await put(worker, "a", "b:c", "x", 2)
            await check_kept_apart(worker)

    run(collide())


def test_case_31_key_collision_file_based(run: Run) -> None:
    async def collide() -> None:
        async with await Worker.open(broker.worker_url) as worker:
            await put(worker, "a:b", "c", "x", 1)
            await put(worker, "a", "b:c", "x", 2)
            await check_kept_apart(worker)

    async def check() -> None:
        async with await Worker.open(broker.worker_url) as worker:
            await check_kept_apart(worker)

    with Broker() as broker:
        run(collide())
        broker.restart()
        run(check())


def test_case_46_path_traversal(run: Run) -> None:
    names = [
        "../../x", "..", ".", "", "/etc/x", "a/b", "a\\b", "%2e%2e%2f", "a\nb", "a\0b", ".hidden",
        "lock", "x" * 1000, "\u00e9" * 500, "CON", "a.db", "a.db-wal", "A", "a", "%", "%~",
    ]  # fmt: skip

    async def fill() -> None:
        async with await Worker.open(broker.worker_url) as worker:
            for number, name in enumerate(names):
                await put(worker, name, name, name, number)

    async def check() -> None:
        async with await Worker.open(broker.worker_url) as worker:
            listed = await result_of(worker, "stream::list_all", {})
            expected = [{"id": name, "groups": [name]} for name in sorted(names)]
            assert listed == {"count": len(names), "stream": expected}
            for number, name in enumerate(names):
                assert await result_of(worker, "stream::get", item(name, name, name)) == number

    with Broker() as broker:
        around = {path for path in broker.directory.parent.iterdir() if path.name == "x"}
        run(fill())
        run(check())
        broker.restart()
        run(check())
        databases = list(broker.directory.rglob("*.db"))
        assert len(databases) >= len(names)
        shards = [broker.data_dir / "stream_store" / f"shard-{k}" for k in range(broker.shards)]
        assert all(path.parent in shards for path in databases), databases
        strays = [path for path in broker.directory.iterdir() if path != broker.data_dir]
        assert {path.name for path in strays} <= {"stdout", "log", "broker.yaml"}, strays
        assert not list(Path("/etc").glob("x*.db*"))
        assert around == {path for path in broker.directory.parent.iterdir() if path.name == "x"}


def test_case_51_misrouting(memory_broker: Broker, run: Run) -> None:
    sets, clients_count = 1000, 200
    stems = ["a", "a/", "a:b", "ab", "a%2F", "a b", "\u00e1", "A", "a\u0301", ""]
    groups = [f"{stem}{tail}" for stem in stems for tail in ("", "/", ":", "b", "x")]
    rng = random.Random(51)

    async def scatter() -> None:
        clients: list[tuple[StreamClient, str, str]] = []
        for number in range(clients_count):
            client = await StreamClient.open(memory_broker.stream_url)
            group, item_id = groups[number % len(groups)], str(number // len(groups))
            sync = await client.join("s51", group, id=item_id)
            assert (sync["groupId"], sync["id"]) == (group, item_id)
            clients.append((client, group, item_id))
        counts: Counter[tuple[str, str]] = Counter()
        async with await Worker.open(memory_broker.worker_url) as worker:
            calls = []
            for _ in range(sets):
                key = (rng.choice(groups), str(rng.randrange(6)))
                counts[key] += 1
                data = item("s51", *key, data=list(key))
                calls.append(worker.call("stream::set", data, LONG_S))
            await asyncio.gather(*calls)
            await settled([c for c, _, _ in clients], worker, [("s51", g) for g in set(groups)])
        for client, group, item_id in clients:
            events = client.frames[1:]
            assert len(events) == counts[group, item_id], (group, item_id)
            for event in events:
                assert (event["streamName"], event["groupId"]) == ("s51", group)
                assert event["id"] == item_id
                assert event["event"]["data"] == [group, item_id]
            await client.close()

    assert len(set(groups)) >= 45
    run(scatter())


# Processes -----------------------------------------------------------------------------------


def test_case_36_durability(run: Run) -> None:
    async def write() -> None:
        async with await Worker.open(broker.worker_url) as worker:
            await asyncio.gather(*(put(worker, "s", f"g{i % 5}", str(i), i) for i in range(1000)))
            deletes = (item("s", f"g{i % 5}", str(i)) for i in range(0, 1000, 5))
            await asyncio.gather(*(result_of(worker, "stream::delete", d) for d in deletes))

    async def check() -> None:
        async with await Worker.open(broker.worker_url) as worker:
            for group in range(5):
                listed = await result_of(worker, "stream::list", group_of("s", f"g{group}"))
                expected = [i for i in range(1000) if i % 5 == group and i % 5 != 0]
                assert sorted(listed) == expected

    with Broker() as broker:
        run(write())
        broker.restart()
        run(check())


def test_case_38_stale_unix_socket(run: Run) -> None:
    async def check() -> None:
        async with await Worker.open(broker.worker_url) as worker:
            for group in "abcdef":  # on both shards
                await put(worker, "s", group, "i", 1)

    with Broker() as broker:
        run(check())
        broker.kill()
        broker.start()
        run(check())
        os.kill(broker.pid, 9)  # the supervisor alone: what it started must not stay in the way
        assert broker.process is not None
        broker.process.wait()
        broker.start()
        run(check())


@pytest.mark.parametrize(
    ("offset", "key"),
    [(0, "modules[].config.port"), (1, "worker.port"), (4, "metrics.port")],
)
def test_case_39_port_in_use(offset: int, key: str) -> None:
    ports = free_ports(5)  # stream, worker, metrics of the gateway, of shard 0, of shard 1
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", ports[offset]))
        taken.listen()
        broker = Occupied(ports)
        try:
            with pytest.raises(StartFailed) as failed:
                broker.start()
            assert failed.value.exit_code not in (0, None)
            assert failed.value.stdout == ""
            lines = [line for line in failed.value.stderr.splitlines() if key in line]
            assert len(lines) == 1, failed.value.stderr
            assert f"127.0.0.1:{ports[offset]}" in lines[0]
            assert broker.left == []
        finally:
            broker.close()


class Occupied(Broker):
    """A broker on given ports that is expected not to start."""

    def __init__(self, ports: list[int]) -> None:
        self._given = ports
        self.left: list[int] = []
        super().__init__(IN_MEMORY)

    def _start_on_free_ports(self) -> None:
        self.ports = self._given  # not started yet

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is not None:
            self.left = self._pids()
        super().kill()


BOTH_SPELLINGS = {
    "class": """\
modules:
  - class: modules::stream::StreamModule
    config:
      port: ${STREAM_PORT:3112}
      adapter:
        class: modules::stream::adapters::KvStore
        config: {store_method: in_memory}
""",
    "name": """\
workers:
  - name: iii-stream
    config:
      port: ${STREAM_PORT:3112}
      adapter: {name: kv, config: {store_method: in_memory}}
""",
}


def check_config(path: Path, port: str | None) -> subprocess.CompletedProcess[str]:
    """`broker check` with STREAM_PORT set to `port`, or unset."""
    environ = {k: v for k, v in os.environ.items() if k != "STREAM_PORT"}
    environ |= {"PYTHONPATH": str(REPOSITORY)}
    if port is not None:
        environ["STREAM_PORT"] = port
    command = [sys.executable, "-m", "broker", "check", str(path)]
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False)


def test_case_53_config(tmp_path: Path) -> None:
    files = {}
    for spelling, text in BOTH_SPELLINGS.items():
        files[spelling] = tmp_path / f"{spelling}.yaml"
        files[spelling].write_text(text)
    for port, expected in ((None, 3112), ("4321", 4321)):
        results = [check_config(path, port) for path in files.values()]
        assert [result.returncode for result in results] == [0, 0], results
        printed = [yaml.safe_load(result.stdout) for result in results]
        assert printed[0] == printed[1]
        assert printed[0]["modules"][0]["config"]["port"] == expected
    for port in ("", "abc", "65536", "1.5"):
        for spelling, path in files.items():
            result = check_config(path, port)
            assert (result.returncode, result.stdout) == (2, ""), result
            assert len(result.stderr.splitlines()) == 1, result
            key = "modules" if spelling == "class" else "workers"
            assert re.search(rf"{key}\[0\]\.config\.port\b", result.stderr), result
