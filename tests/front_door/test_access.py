"""Who may connect to which port, for how long, and who is made to go."""

from __future__ import annotations

import asyncio
import os
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from websockets.frames import Frame, Opcode

from tests.conftest import Run
from tests.support.broker import IN_MEMORY, Broker, StartFailed
from tests.support.calls import item, result_of
from tests.support.connection import Closed
from tests.support.stream_client import RawHttp, StreamClient, settled
from tests.support.worker import Failure, Invocation, Worker

ACCEPT = {"context": {"user": "ann"}}
KEY = "dGhlIHNhbXBsZSBub25jZQ=="


def configured(auth: bool = True, **broker: Any) -> str:
    """A configuration in memory with the blocks of `broker`."""
    block: dict[str, Any] = {"adapter": {"name": "kv", "config": {"store_method": "in_memory"}}}
    if auth:
        block["auth_function"] = "stream::auth"
    workers = [{"name": "iii-stream", "config": block}]
    return yaml.safe_dump({"workers": workers, "broker": broker})


def upgrade(host: str, path: str = "/", **headers: str) -> bytes:
    """A request that upgrades to a WebSocket, with `headers`: `_` stands for `-`."""
    lines = [f"GET {path} HTTP/1.1", f"Host: {host}", "Connection: Upgrade", "Upgrade: websocket"]
    lines += ["Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {KEY}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


async def status_of(url: str, host: str = "127.0.0.1", path: str = "/", **headers: str) -> int:
    """The status of the answer to a handshake."""
    async with await RawHttp.request(url, upgrade(host, path, **headers)) as http:
        return (await http.response()).status


def metric(broker: Broker, name: str) -> float:
    """A sample of the gateway's metrics, by name with labels; 0 when it is not there."""
    with urllib.request.urlopen(broker.metrics_url, timeout=10) as response:
        for line in response.read().decode().splitlines():
            if line.startswith(name + " "):
                return float(line.rpartition(" ")[2])
    return 0.0


async def wait_for(holds: Any) -> None:
    """Return when `holds()`."""
    async with asyncio.timeout(30):
        while not holds():
            await asyncio.sleep(0.02)


async def auth_worker(broker: Broker, answer: Any) -> Worker:
    """A worker with an auth function that answers `answer`, or what it makes of the input."""
    worker = await Worker.open(broker.worker_url)
    handler = answer if callable(answer) else lambda _: answer
    await worker.register_function("stream::auth", handler)
    await worker.barrier()
    return worker


# Origins.


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("localhost:3112", "https://evil.example", 403),
        ("127.0.0.1:3112", "https://evil.example", 403),
        ("127.9.9.9", "https://evil.example", 403),
        ("[::1]:3112", "https://evil.example", 403),
        ("0.0.0.0:3112", "https://evil.example", 403),
        ("LOCALHOST.", "https://evil.example", 403),
        ("a.localhost", "https://evil.example", 403),
        ("localhost", "null", 403),
        ("localhost", "https://localhost.evil.example", 403),
        ("localhost", "https://[bad", 403),
        ("localhost:3112", "http://localhost:3000", 101),
        ("127.0.0.1:3112", "http://localhost:3000", 101),
        ("127.0.0.1:3112", "http://[::1]:3000", 101),
        ("127.0.0.1:3112", "file://", 101),
        ("live.example", "https://app.example", 101),
    ],
)
def test_without_configuration_no_page_reaches_its_visitors_own_machine(
    host: str, origin: str, status: int, memory_broker: Broker, run: Run
) -> None:
    assert run(status_of(memory_broker.stream_url, host, Origin=origin)) == status


def test_case_45_cross_site(run: Run) -> None:
    """Also a page on the broker's own machine has to be allowed once there is a list."""

    async def main(broker: Broker) -> None:
        worker = await auth_worker(broker, ACCEPT)
        for origin in ("https://evil.example", "https://app.example:444", "http://localhost"):
            assert await status_of(broker.stream_url, Origin=origin) == 403
            assert await status_of(broker.stream_url, path="/stream/a/b/", Origin=origin) == 403
        assert worker.invocations == []
        assert await status_of(broker.stream_url, Origin="https://app.example") == 101
        assert await status_of(broker.stream_url) == 101
        assert len(worker.invocations) == 2
        refused = 'broker_handshakes_refused_total{port="stream",reason="origin"}'
        assert metric(broker, refused) == 6
        await worker.close()

    config = configured(stream={"allowed_origins": ["https://app.example"]})
    with Broker(config) as broker:
        run(main(broker))


def test_two_origins_are_none(run: Run, memory_broker: Broker) -> None:
    request = upgrade("localhost", Origin="http://localhost").replace(
        b"\r\n\r\n", b"\r\nOrigin: https://evil.example\r\n\r\n"
    )

    async def main() -> int:
        async with await RawHttp.request(memory_broker.stream_url, request) as http:
            return (await http.response()).status

    assert run(main()) == 403


def test_worker_port_origins(run: Run) -> None:
    async def main(broker: Broker) -> None:
        for path in ("/", "/otel"):
            assert await status_of(broker.worker_url, path=path, Origin="http://localhost") == 403
            assert await status_of(broker.worker_url, path=path, Origin="http://tool:8") == 101

    with Broker(configured(auth=False, worker={"allowed_origins": ["http://tool:8"]})) as broker:
        run(main(broker))


# Tokens.


@pytest.mark.parametrize("from_environment", [False, True])
def test_worker_token(from_environment: bool, run: Run) -> None:
    """Demanded from workers, told to nobody."""
    token = "s3cret"

    async def main(broker: Broker) -> None:
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {token}"}):
            assert await status_of(broker.worker_url, **given) == 401
        worker = await Worker.open(broker.worker_url, {"Authorization": f"Bearer {token}"})
        assert await result_of(worker, "stream::list_all", {}) == {"stream": [], "count": 0}
        await worker.close()
        assert token not in broker.log
        refused = 'broker_handshakes_refused_total{port="worker",reason="unauthorized"}'
        assert metric(broker, refused) == 3

    if from_environment:
        with Broker(IN_MEMORY, env={"III_TOKEN": token}) as broker:
            run(main(broker))
    else:
        with Broker(configured(auth=False, worker={"token": token})) as broker:
            run(main(broker))


def test_python_sdk_sends_the_token_by_itself(tmp_path: Path) -> None:
    program = tmp_path / "worker.py"
    program.write_text(
        "import sys\n"
        "from iii import register_worker\n"
        "worker = register_worker(sys.argv[1])\n"
        "print(worker.trigger({'function_id': 'stream::list_all', 'payload': {}}))\n"
        "worker.shutdown()\n"
    )
    with Broker(configured(auth=False, worker={"token": "s3cret"})) as broker:
        done = subprocess.run(
            [sys.executable, program, broker.worker_url],
            env={**os.environ, "III_TOKEN": "s3cret"},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    assert "'count': 0" in done.stdout


# Proxies.


def test_addr_behind_a_trusted_proxy(run: Run) -> None:
    async def main(broker: Broker) -> None:
        worker = await auth_worker(broker, ACCEPT)
        cases = [
            ({}, "127.0.0.1:"),
            ({"X_Forwarded_For": "203.0.113.9"}, "203.0.113.9"),
            ({"X_Forwarded_For": "6.6.6.6, 203.0.113.9, 10.1.2.3"}, "203.0.113.9"),
            ({"X_Forwarded_For": "203.0.113.9:4711"}, "203.0.113.9:4711"),
            ({"X_Forwarded_For": "2001:db8::7, ::ffff:10.0.0.1"}, "2001:db8::7"),
            ({"X_Forwarded_For": "6.6.6.6, unknown"}, "127.0.0.1:"),
            ({"X_Forwarded_For": "10.0.0.1"}, "10.0.0.1"),
        ]
        for headers, expected in cases:
            assert await status_of(broker.stream_url, **headers) == 101
            address = worker.invocations[-1].data["addr"]
            assert address.startswith(expected) if expected.endswith(":") else address == expected
        await worker.close()

    proxies = ["127.0.0.0/8", "10.0.0.0/8"]
    with Broker(configured(stream={"trusted_proxies": proxies})) as broker:
        run(main(broker))


def test_nobody_is_believed_without_trust(run: Run, broker: Broker) -> None:
    async def main() -> None:
        worker = await auth_worker(broker, ACCEPT)
        assert await status_of(broker.stream_url, X_Forwarded_For="203.0.113.9") == 101
        assert worker.invocations[-1].data["addr"].startswith("127.0.0.1:")
        await worker.close()

    run(main())


# TLS.


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `cert.pem` and `key.pem` for 127.0.0.1."""
    folder = tmp_path_factory.mktemp("tls")
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", "key.pem", "-out", "cert.pem"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    subprocess.run([*command, *files, *names], cwd=folder, check=True, capture_output=True)
    return folder


def test_tls_on_both_ports(run: Run, certificate: Path) -> None:
    trusting = ssl.create_default_context(cafile=str(certificate / "cert.pem"))

    async def main(broker: Broker) -> None:
        assert broker.stream_url.startswith("wss://127.0.0.1:")
        worker = await Worker.open(broker.worker_url, tls=trusting)
        url = broker.stream_url + "/stream/chat/r1/"
        async with await StreamClient.open(url, tls=trusting) as client:
            assert (await client.next())["event"] == {"type": "sync", "data": []}
            big = {"id": "m", "text": "x" * 3_000_000}
            await result_of(worker, "stream::set", item("chat", "r1", "m", data=big))
            assert (await client.next())["event"]["data"] == big
        await worker.close()
        async with await RawHttp.request(broker.stream_url, upgrade("127.0.0.1")) as http:
            assert (await http.response()).status == 0  # no TLS, no answer

    tls = {"certificate": str(certificate / "cert.pem"), "key": str(certificate / "key.pem")}
    with Broker(configured(auth=False, stream={"tls": tls}, worker={"tls": tls})) as broker:
        run(main(broker))


def test_silent_tls_handshakes_end(run: Run, certificate: Path) -> None:
    """A peer that opens a connection and says nothing, or half a record, is cut."""

    async def main(broker: Broker) -> None:
        host, port = broker.stream_url.split("/")[2].rsplit(":", 1)
        for beginning in (b"", b"\x16\x03\x01\x02"):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(beginning)
            async with asyncio.timeout(30):
                while await reader.read(4096):
                    pass
            writer.close()

    tls = {"certificate": str(certificate / "cert.pem"), "key": str(certificate / "key.pem")}
    limits = {"handshake_timeout_s": 0.5}
    with Broker(configured(auth=False, stream={"tls": tls}, limits=limits)) as broker:
        run(main(broker))


def test_files_that_are_no_certificate(certificate: Path) -> None:
    cert, key = str(certificate / "cert.pem"), str(certificate / "key.pem")
    for tls, path in (
        ({"certificate": "/nowhere", "key": key}, "broker.stream.tls.certificate: /nowhere"),
        ({"certificate": cert, "key": cert}, "broker.stream.tls: "),
    ):
        with pytest.raises(StartFailed) as failure:
            Broker(configured(auth=False, stream={"tls": tls}))
        assert failure.value.exit_code == 2
        assert path in failure.value.stderr
        assert not failure.value.stdout


# Expiry and renewal.


@pytest.fixture(scope="module")
def broker() -> Iterator[Broker]:
    limits = {"auth_timeout_s": 2, "auth_waiting_max": 3, "auth_context_bytes_max": 2048}
    with Broker(configured(limits=limits)) as broker:
        yield broker


def test_a_connection_ends_when_its_authentication_does(run: Run, broker: Broker) -> None:
    async def main() -> None:
        def answer(_: Invocation) -> Any:
            return {"context": {"user": "ann"}, "expires_at": int(time.time() * 1000) + 400}

        worker = await auth_worker(broker, answer)
        await worker.register_function("left", lambda _: None)
        trigger = await worker.register_trigger("stream:leave", "left", {"stream_name": "expiry"})
        async with await StreamClient.open(broker.stream_url) as client:
            await client.join("expiry", "r1")
            before = metric(broker, "broker_clients_expired_total")
            assert await client.next() == Closed(4401, "the authentication has expired")
        await wait_for(lambda: any(i.function_id == "left" for i in worker.invocations))
        await worker.quiet()
        left = [i.data for i in worker.invocations if i.function_id == "left"]
        assert [(data["subscription_id"], data["context"]) for data in left] == [
            ("s1", {"user": "ann"})
        ]
        assert metric(broker, "broker_clients_expired_total") == before + 1
        await worker.unregister_trigger(trigger)
        await worker.close()

    run(main())


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        ({"expires_at": 1000}, 401),
        ({"expires_at": "soon"}, 401),
        ({"expires_at": True}, 401),
        ({"expires_at": {}}, 401),
        ({"context": "x" * 3000}, 401),
        ({"context": "x" * 2000}, 101),
        ({"expires_at": None}, 101),
        ({"expires_at": 1e15}, 101),
    ],
)
def test_odd_expiries_and_contexts(answer: Any, status: int, run: Run, broker: Broker) -> None:
    async def main() -> None:
        worker = await auth_worker(broker, answer)
        assert await status_of(broker.stream_url) == status
        await worker.close()

    run(main())


def test_a_fresh_token_renews_context_and_expiry(run: Run, broker: Broker) -> None:
    """The same function gets the handshake again and the token as `data`."""

    async def main() -> None:
        def answer(invocation: Invocation) -> Any:
            now_ms = int(time.time() * 1000)
            if "data" not in invocation.data:
                return {"context": {"v": 1}, "expires_at": now_ms + 1500}
            match invocation.data["data"]["token"]:
                case "good":
                    return {"context": {"v": 2}, "expires_at": now_ms + 3_600_000}
                case "bad":
                    return {"unauthorized": True}
            return Failure("down", "no database")

        worker = await auth_worker(broker, answer)
        await worker.register_function("joined", lambda _: None)
        await worker.register_function("left", lambda _: None)
        triggers = [
            await worker.register_trigger(kind, function, {"stream_name": "renewal"})
            for kind, function in (("stream:join", "joined"), ("stream:leave", "left"))
        ]
        async with await StreamClient.open(broker.stream_url + "/?room=1") as client:
            await client.join("renewal", "r1", "a")
            for token in ("bad", "odd"):
                await client.send({"type": "auth", "data": {"token": token}})
                event = (await client.next())["event"]
                assert (event["type"], event["code"]) == ("error", "unauthorized")
            await client.send({"type": "auth", "data": {"token": "good"}})
            await client.send_join("renewal", "r1", "b")
            event = (await client.next())["event"]
            assert event["type"] == "authenticated"
            assert event["expiresAt"] > time.time() * 1000 + 3_000_000
            assert (await client.next())["event"]["type"] == "sync"
            await asyncio.sleep(1.6)  # the first expiry passes
            await client.ping()
        await settled([], worker)
        asked = [i.data for i in worker.invocations if i.function_id == "stream::auth"]
        first = asked[0]
        assert first["query_params"] == {"room": ["1"]}
        assert asked[1:] == [first | {"data": {"token": t}} for t in ("bad", "odd", "good")]
        joined = [i.data for i in worker.invocations if i.function_id == "joined"]
        assert [data["context"] for data in joined] == [{"v": 1}, {"v": 2}]
        left = [i.data for i in worker.invocations if i.function_id == "left"]
        assert sorted(data["subscription_id"] for data in left) == ["a", "b"]
        assert [data["context"] for data in left] == [{"v": 2}, {"v": 2}]
        assert "good" not in broker.log
        for trigger in triggers:
            await worker.unregister_trigger(trigger)
        await worker.close()

    run(main())


def test_nothing_to_renew_without_an_auth_function(run: Run, memory_broker: Broker) -> None:
    async def main() -> None:
        async with await StreamClient.open(memory_broker.stream_url) as client:
            await client.send({"type": "auth", "data": {}})
            event = (await client.next())["event"]
            assert (event["type"], event["code"]) == ("error", "auth_not_configured")
            assert (await client.join("s", "g"))["event"]["type"] == "sync"

    run(main())


def test_handshakes_that_wait_are_bounded(run: Run, broker: Broker) -> None:
    async def main() -> None:
        go_on = asyncio.Event()

        async def answer(_: Invocation) -> Any:
            await go_on.wait()
            return {}

        worker = await auth_worker(broker, answer)
        waiting = [asyncio.create_task(status_of(broker.stream_url)) for _ in range(3)]
        await worker.until(lambda: len(worker.invocations) == 3)
        assert metric(broker, "broker_auth_waiting") == 3
        assert await status_of(broker.stream_url) == 503
        assert metric(broker, 'broker_auth_total{outcome="overloaded"}') >= 1
        go_on.set()
        assert await asyncio.gather(*waiting) == [101] * 3
        await worker.close()

    run(main())


def test_frames_right_behind_the_request_are_not_lost(run: Run, broker: Broker) -> None:
    async def main() -> None:
        async def answer(_: Invocation) -> Any:
            await asyncio.sleep(0.1)
            return {}

        worker = await auth_worker(broker, answer)
        join = b'{"type":"join","data":{"subscriptionId":"%d","streamName":"s","groupId":"early"}}'
        frames = [Frame(Opcode.TEXT, join % n).serialize(mask=True) for n in range(3)]
        request = upgrade("x") + b"".join(frames)
        async with await RawHttp.request(broker.stream_url, request) as http:
            assert (await http.response()).status == 101
            for _ in frames:
                assert (await http.frame())["groupId"] == "early"
        await worker.close()

    run(main())


# Made to go, and shown.


class People:
    """Ann, Bob and Cid, each with a subscription of a group and one of an item in it."""

    def __init__(self, worker: Worker, clients: dict[str, StreamClient]) -> None:
        self.worker = worker
        self.clients = clients

    @classmethod
    async def connect(cls, broker: Broker, stream: str) -> People:
        def answer(invocation: Invocation) -> Any:
            user = invocation.data["query_params"]["u"][0]
            return {"context": {"user": user, "admin": True, "n": 1}}

        worker = await auth_worker(broker, answer)
        clients = {}
        for user in ("ann", "bob", "cid"):
            client = await StreamClient.open(f"{broker.stream_url}/?u={user}")
            await client.join(stream, "r1", f"{user}-1")
            await client.join(stream, "r1", f"{user}-2", id="m")
            clients[user] = client
        return cls(worker, clients)

    async def listed(self, function_id: str, **query: Any) -> list[dict[str, Any]]:
        """All pages of a listing, each of two."""
        key = function_id.rpartition(":")[2]
        found: list[dict[str, Any]] = []
        cursor = None
        while True:
            data = query | {"cursor": cursor, "limit": 2}
            page = await result_of(self.worker, function_id, data)
            assert len(page[key]) <= 2
            found += page[key]
            if (cursor := page["cursor"]) is None:
                return found

    async def disconnect(self, **query: Any) -> int:
        answer = await result_of(self.worker, "broker::disconnect", query)
        count: int = answer["disconnected"]
        return count

    async def close(self) -> None:
        for client in self.clients.values():
            await client.close()
        await self.worker.close()


def test_connections_and_members(run: Run, broker: Broker) -> None:
    async def main() -> None:
        people = await People.connect(broker, "listed")
        group = {"stream_name": "listed", "group_id": "r1"}
        members = await people.listed("broker::members", **group)
        assert [(m["subscription_id"], m["id"], m["context"]["user"]) for m in members] == [
            (f"{user}-{n}", i, user) for user in people.clients for n, i in ((1, None), (2, "m"))
        ]
        of_item = await people.listed("broker::members", **group, id="m")
        assert [m["subscription_id"] for m in of_item] == ["ann-2", "bob-2", "cid-2"]
        answer = await result_of(people.worker, "broker::members", group | {"group_id": "r2"})
        assert answer == {"members": [], "cursor": None, "count": 0}
        connections = [
            c
            for c in await people.listed("broker::connections")
            if any(s["stream_name"] == "listed" for s in c["subscriptions"])
        ]
        assert [c["context"]["user"] for c in connections] == ["ann", "bob", "cid"]
        assert [s["id"] for s in connections[0]["subscriptions"]] == [None, "m"]
        assert {m["connection_id"] for m in members} == {c["connection_id"] for c in connections}
        bob = await people.listed("broker::connections", context={"user": "bob"})
        assert [c["connection_id"] for c in bob] == [connections[1]["connection_id"]]
        await people.close()

    run(main())


def test_disconnect(run: Run, broker: Broker) -> None:
    async def main() -> None:
        people = await People.connect(broker, "cut")
        worker, clients = people.worker, people.clients
        await worker.register_function("left", lambda _: None)
        await worker.register_trigger("stream:leave", "left", {"stream_name": "cut"})
        group = {"stream_name": "cut", "group_id": "r1"}
        members = await people.listed("broker::members", **group)
        for context in ({"admin": False}, {"admin": 1}, {"n": True}, {"other": None}):
            assert await people.disconnect(context=context) == 0
        assert await people.disconnect(addr="127.0.0.2") == 0
        assert await people.disconnect(context={"user": "ann", "n": 1}) == 1
        assert await clients["ann"].next() == Closed(4403, "disconnected")
        await wait_for(lambda: sum(i.function_id == "left" for i in worker.invocations) == 2)
        left = [i.data for i in worker.invocations if i.function_id == "left"]
        assert {data["subscription_id"] for data in left} == {"ann-1", "ann-2"}
        bob, cid = members[2], members[4]
        query = {"connection_id": bob["connection_id"], "code": 4999, "reason": "bye"}
        assert await people.disconnect(**query) == 1
        assert await clients["bob"].next() == Closed(4999, "bye")
        assert await people.disconnect(addr=cid["addr"]) == 1
        assert await clients["cid"].next() == Closed(4403, "disconnected")
        assert await people.listed("broker::members", **group) == []
        await people.close()

    run(main())


@pytest.mark.parametrize(
    ("function_id", "data", "word"),
    [
        ("broker::disconnect", {}, "context"),
        ("broker::disconnect", {"context": {}}, "context"),
        ("broker::disconnect", {"context": None}, "context"),
        ("broker::disconnect", {"addr": 5}, "addr"),
        ("broker::disconnect", {"addr": "::1", "code": 1000}, "code"),
        ("broker::connections", {"limit": 0}, "limit"),
        ("broker::connections", {"cursor": "x"}, "cursor"),
        ("broker::connections", {"cursor": "9" * 400}, "cursor"),
        ("broker::members", {"stream_name": "s"}, "group_id"),
        ("broker::items", {"stream_name": "s"}, "group_id"),
    ],
)
def test_bad_input(function_id: str, data: Any, word: str, run: Run, memory_broker: Broker) -> None:
    async def main() -> None:
        worker = await Worker.open(memory_broker.worker_url)
        error = (await worker.call(function_id, data))["error"]
        assert error["code"] in ("INVALID_ARGUMENTS", "deserialization_error")
        assert word in error["message"]
        await worker.close()

    run(main())


def test_a_client_that_does_not_answer_is_gone_all_the_same(
    run: Run, memory_broker: Broker
) -> None:
    """Nothing is delivered to it, and nobody lists it, from the moment of the call."""

    async def main() -> None:
        worker = await Worker.open(memory_broker.worker_url)
        async with await RawHttp.request(
            memory_broker.stream_url, upgrade("x", "/stream/stuck/r1/")
        ) as http:
            assert (await http.response()).status == 101
            assert (await http.frame())["event"]["type"] == "sync"
            members = {"stream_name": "stuck", "group_id": "r1"}
            found = await result_of(worker, "broker::members", members)
            connection_id = found["members"][0]["connection_id"]
            answer = await result_of(worker, "broker::disconnect", {"connection_id": connection_id})
            assert answer == {"disconnected": 1}
            assert (await result_of(worker, "broker::members", members))["count"] == 0
            await result_of(worker, "stream::set", item("stuck", "r1", "m", data=1))
            assert await http.close_code() == 4403
        await worker.close()

    run(main())


def test_items_with_their_ids(any_broker: Broker, run: Run) -> None:
    async def main() -> None:
        worker = await Worker.open(any_broker.worker_url)
        for name, value in (("b", {"n": 1}), ('a"\n', None), ("", [2])):
            await result_of(worker, "stream::set", item("ids", "g", name, data=value))
        group = {"stream_name": "ids", "group_id": "g"}
        assert await result_of(worker, "broker::items", group) == [
            {"item_id": "b", "value": {"n": 1}},
            {"item_id": 'a"\n', "value": None},
            {"item_id": "", "value": [2]},
        ]
        assert await result_of(worker, "stream::list", group) == [{"n": 1}, None, [2]]
        await worker.close()

    run(main())
