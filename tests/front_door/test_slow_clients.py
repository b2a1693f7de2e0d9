"""A client that does not read costs others nothing, and gets what it is promised when it does."""

from __future__ import annotations

import asyncio
import socket
import urllib.request
from typing import Any

import yaml

from tests.conftest import Run
from tests.support.broker import IN_MEMORY, Broker
from tests.support.calls import LONG_S, item, result_of
from tests.support.stream_client import RawHttp, StreamClient
from tests.support.worker import Worker

KIB = 1024


def with_limits(**limits: float) -> str:
    return IN_MEMORY + yaml.safe_dump({"broker": {"limits": limits}})


def metric(broker: Broker, name: str) -> float:
    with urllib.request.urlopen(broker.metrics_url, timeout=10) as response:
        for line in response.read().decode().splitlines():
            if line.startswith(name + " "):
                return float(line.rpartition(" ")[2])
    raise AssertionError(name)


class Sleeper:
    """A client with small socket buffers that reads only when it is told to."""

    def __init__(self, http: RawHttp) -> None:
        self.http = http

    @classmethod
    async def open(cls, url: str) -> Sleeper:
        host, port = url.split("/")[2].rsplit(":", 1)
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * KIB)
        raw.setblocking(False)
        await asyncio.get_running_loop().sock_connect(raw, (host, int(port)))
        reader, writer = await asyncio.open_connection(sock=raw, limit=4 * KIB)
        http = RawHttp(reader, writer)
        lines = ["GET / HTTP/1.1", "Host: x", "Connection: Upgrade", "Upgrade: websocket"]
        lines += ["Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="]
        writer.write("\r\n".join([*lines, "", ""]).encode())
        assert (await http.response()).status == 101
        return cls(http)

    async def join(self, group: str, subscription_id: str = "s1", **more: Any) -> Any:
        names = {"subscriptionId": subscription_id, "streamName": "chat", "groupId": group}
        self.http.send({"type": "join", "data": names | more})
        return await self.http.frame()

    def sleep(self) -> None:
        self.http.writer.transport.pause_reading()  # type: ignore[attr-defined]  # it reads, too

    def wake(self) -> None:
        self.http.writer.transport.resume_reading()  # type: ignore[attr-defined]  # as above


async def fill(worker: Worker, group: str, count: int, items: int, size: int = 4 * KIB) -> None:
    """Write `count` values into `items` items."""
    for start in range(0, count, 50):
        await asyncio.gather(
            *(
                result_of(
                    worker,
                    "stream::set",
                    item("chat", group, f"i{n % items}", data={"n": n, "x": "x" * size}),
                )
                for n in range(start, min(start + 50, count))
            )
        )


def test_closed_with_a_code_of_its_own(run: Run) -> None:
    """It reads the code, once it reads again, and can resume."""

    async def main(broker: Broker) -> None:
        worker = await Worker.open(broker.worker_url)
        sleeper = await Sleeper.open(broker.stream_url)
        sync = await sleeper.join("asleep")
        sleeper.sleep()
        await fill(worker, "asleep", 1000, 10)
        async with asyncio.timeout(LONG_S):
            while not metric(broker, 'broker_connections_stalled_total{port="stream"}'):
                await asyncio.sleep(0.05)
        assert metric(broker, "broker_subscriptions") == 1
        sleeper.wake()
        assert await sleeper.http.close_code(LONG_S) == 4408
        sleeper.http.writer.transport.abort()
        async with await StreamClient.open(broker.stream_url) as client:
            answer = await client.join("chat", "asleep", since=sync["seq"], epoch=sync["epoch"])
            assert answer["resumed"] is False  # too much: 1000 x 4 KiB
            past = await result_of(
                worker, "stream::history", {"stream_name": "chat", "group_id": "asleep"}
            )
            since = past["seq"] - 5
            answer = await client.join("chat", "asleep", since=since, epoch=sync["epoch"])
            assert answer["resumed"] is True
        await worker.close()

    limits = {"stalled_timeout_s": 1, "client_send_queue_bytes_max": 64 * KIB}
    with Broker(with_limits(**limits)) as broker:
        run(main(broker))


def test_conflate(run: Run) -> None:
    """Of what it was too slow for it gets the newest state of each item only, in order."""

    async def main(broker: Broker) -> None:
        worker = await Worker.open(broker.worker_url)
        sleeper = await Sleeper.open(broker.stream_url)
        await sleeper.join("newest", conflate=True)
        await fill(worker, "newest", 5, 5)
        awake = [await sleeper.http.frame() for _ in range(5)]
        assert [f["event"]["data"]["n"] for f in awake] == [0, 1, 2, 3, 4]
        sleeper.sleep()
        await fill(worker, "newest", 4000, 20)
        send = {"stream_name": "chat", "group_id": "newest", "type": "t", "data": 1}
        await result_of(worker, "stream::send", send)
        await result_of(worker, "stream::delete", item("chat", "newest", "i3"))
        sleeper.wake()
        frames = [await sleeper.http.frame(LONG_S)]
        while frames[-1]["event"]["type"] != "delete":
            frames.append(await sleeper.http.frame(LONG_S))
        seqs = [frame["seq"] for frame in frames]
        assert seqs == sorted(set(seqs))
        assert len(frames) < 3000  # most were never sent
        assert all(frame["event"]["type"] in ("create", "update", "delete") for frame in frames)
        newest = {frame["id"]: frame["event"]["data"]["n"] for frame in frames}
        assert newest == {f"i{n}": 3980 + n for n in range(20)}
        assert metric(broker, "broker_frames_conflated_total") > 1000
        await result_of(worker, "stream::set", item("chat", "newest", "i3", data={"n": "last"}))
        assert (await sleeper.http.frame())["event"]["type"] == "create"
        sleeper.http.writer.transport.abort()
        await worker.close()

    with Broker(with_limits(client_send_queue_bytes_max=256 * KIB)) as broker:
        run(main(broker))


def test_conflated_past_its_bound_is_a_sync(run: Run) -> None:
    async def main(broker: Broker) -> None:
        worker = await Worker.open(broker.worker_url)
        sleeper = await Sleeper.open(broker.stream_url)
        await sleeper.join("many", conflate=True)
        sleeper.sleep()
        await fill(worker, "many", 3000, 3000)
        sleeper.wake()
        while True:
            frame = await sleeper.http.frame(LONG_S)
            if frame["event"]["type"] == "sync":
                break
        assert len(frame["event"]["data"]) == 3000
        sleeper.http.writer.transport.abort()
        await worker.close()

    with Broker(with_limits(client_send_queue_bytes_max=64 * KIB)) as broker:
        run(main(broker))


def test_a_client_that_sends_too_fast_waits(run: Run) -> None:
    """Nothing of it is lost, and it costs a neighbour nothing."""

    async def main(broker: Broker) -> None:
        fast = await StreamClient.open(broker.stream_url)
        other = await StreamClient.open(broker.stream_url)
        started = asyncio.get_running_loop().time()
        for n in range(300):
            await fast.send_join("chat", f"g{n}", f"s{n}")
        assert (await other.join("chat", "x"))["event"]["type"] == "sync"
        assert len(fast.received) < 300
        names = [(await fast.next(patience_s=LONG_S))["groupId"] for _ in range(300)]
        assert names == [f"g{n}" for n in range(300)]
        assert asyncio.get_running_loop().time() - started > 0.7  # 200 at once, then 100 a second
        assert metric(broker, 'broker_connections_throttled_total{port="stream"}') >= 1
        await fast.close()
        await other.close()

    with Broker(with_limits(client_messages_per_s_max=100)) as broker:
        run(main(broker))


def test_workers_may_be_throttled_too(run: Run) -> None:
    async def main(broker: Broker) -> None:
        worker = await Worker.open(broker.worker_url)
        calls = [worker.call("stream::list_all", {}, LONG_S) for _ in range(120)]
        assert all("result" in answer for answer in await asyncio.gather(*calls))
        assert metric(broker, 'broker_connections_throttled_total{port="worker"}') >= 1
        await worker.close()

    with Broker(with_limits(worker_messages_per_s_max=50)) as broker:
        run(main(broker))


def test_connections_of_one_address_are_bounded(run: Run) -> None:
    async def main(broker: Broker) -> None:
        clients = [await StreamClient.open(broker.stream_url) for _ in range(3)]
        request = (
            "GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{}\r\n"
        )

        async def status(header: str = "") -> int:
            asked = request.format(header).encode()
            async with await RawHttp.request(broker.stream_url, asked) as http:
                return (await http.response()).status

        assert await status() == 429
        assert await status("X-Forwarded-For: 203.0.113.9\r\n") == 101
        await clients.pop().close()
        async with asyncio.timeout(LONG_S):
            while await status() != 101:
                await asyncio.sleep(0.02)
        for client in clients:
            await client.close()

    config = yaml.safe_load(with_limits(connections_per_address_max=3))
    config["broker"]["stream"] = {"trusted_proxies": ["127.0.0.1"]}
    with Broker(yaml.safe_dump(config)) as broker:
        run(main(broker))
