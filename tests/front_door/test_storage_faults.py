"""Disks that are full, files that are damaged, processes that stop: what was acknowledged stays.

`test_case_NN_kind`: as in test_cases.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import WebSocketException

from tests.conftest import Run
from tests.support.broker import Broker, StartFailed
from tests.support.calls import LONG_S, item, result_of
from tests.support.connection import Closed
from tests.support.stream_client import StreamClient, settled
from tests.support.worker import Worker

KIB = 1024


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of its own at `folder`; skips the test where none can be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


class DiskBroker:
    """A broker whose data lies on a disk of 20 MB."""

    def __init__(self) -> None:
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> Broker:
        broker = self.stack.enter_context(Broker())
        assert broker.stop() == 0
        self.stack.enter_context(small_disk(broker.data_dir / "stream_store", "20m"))
        broker.start()
        self.stack.callback(broker.kill)  # before the disk goes
        return broker

    def __exit__(self, *_: object) -> None:
        self.stack.close()


def test_case_35_disk_full(run: Run) -> None:
    async def main(broker: Broker) -> None:
        ballast = broker.data_dir / "stream_store" / "ballast"
        ballast.write_bytes(b"\0" * 4_000_000)
        worker = await Worker.open(broker.worker_url)
        client = await StreamClient.open(broker.stream_url)
        await client.join("chat", "r")
        kept: dict[str, Any] = {}
        refused: list[str] = []
        for number in range(5000):
            name = f"i{number}"
            data = {"id": name, "x": "x" * 10 * KIB}
            answer = await worker.call("stream::set", item("chat", "r", name, data=data), LONG_S)
            if "result" in answer:
                kept[name] = data
                continue
            error = answer["error"]
            assert (error["code"], error["retryable"]) == ("STREAM_SET_ERROR", True)
            assert "full" in error["message"], error
            refused.append(name)
            if len(refused) == 3:
                break
        assert refused, "the disk was never full"
        await settled([client], worker)
        told = {f["id"] for f in client.frames if f["event"]["type"] == "create"}
        assert told == kept.keys()
        broker.kill()
        broker.start()  # while it is full
        await worker.close()
        worker = await Worker.open(broker.worker_url)
        names = {"stream_name": "chat", "group_id": "r"}
        listed = await result_of(worker, "broker::items", names)
        assert {i["item_id"]: i["value"] for i in listed} == kept
        async with await StreamClient.open(broker.stream_url) as late:
            sync = await late.join("chat", "r")
            assert len(sync["event"]["data"]) == len(kept)
        ballast.unlink()
        for name in refused:
            await result_of(worker, "stream::set", item("chat", "r", name, data={"id": name}))
        listed = await result_of(worker, "broker::items", names)
        assert [i["item_id"] for i in listed] == [*kept, *refused]
        await client.close()
        await worker.close()

    with DiskBroker() as broker:
        run(main(broker))


def test_case_37_corruption(run: Run) -> None:
    async def write(broker: Broker) -> None:
        worker = await Worker.open(broker.worker_url)
        for stream in ("nulls", "half", "fine"):
            for number in range(200):
                data = {"n": number, "x": "x" * 100}
                await result_of(worker, "stream::set", item(stream, "g", f"i{number}", data=data))
        await worker.close()

    async def read(broker: Broker) -> None:
        worker = await Worker.open(broker.worker_url)
        client = await StreamClient.open(broker.stream_url)
        for stream in ("nulls", "half"):
            for function_id, data in (
                ("stream::get", item(stream, "g", "i1")),
                ("stream::set", item(stream, "g", "i1", data=1)),
                ("stream::list", {"stream_name": stream, "group_id": "g"}),
            ):
                error = (await worker.call(function_id, data, LONG_S))["error"]
                assert error["code"].startswith("STREAM_"), error
                assert f"{stream}.db" in error["message"], error
            await client.send_join(stream, "g", stream)
            event = (await client.next())["event"]
            assert event["type"] == "error", event
            assert f"{stream}.db" in event["message"]
        assert len(
            await result_of(worker, "stream::list", {"stream_name": "fine", "group_id": "g"})
        )
        assert (await client.join("fine", "g", "fine"))["event"]["type"] == "sync"
        await result_of(worker, "stream::set", item("fine", "g", "new", data=1))
        assert (await client.next())["event"]["type"] == "create"
        await client.close()
        await worker.close()

    with Broker() as broker:
        run(write(broker))
        pids = broker.children()
        assert broker.stop() == 0
        files = {
            stream: next((broker.data_dir / "stream_store").glob(f"*/{stream}.db"))
            for stream in ("nulls", "half")
        }
        files["nulls"].write_bytes(b"\0" * files["nulls"].stat().st_size)
        os.truncate(files["half"], files["half"].stat().st_size // 2)
        left = {stream: file.read_bytes() for stream, file in files.items()}
        broker.start()
        pids = broker.children()
        run(read(broker))
        assert broker.children() == pids
        assert broker.stop() == 0
        assert {stream: file.read_bytes() for stream, file in files.items()} == left


def test_a_file_of_a_later_release_is_left_alone(run: Run) -> None:
    async def main(broker: Broker) -> None:
        worker = await Worker.open(broker.worker_url)
        await result_of(worker, "stream::set", item("new", "g", "i", data=1))
        await worker.close()
        assert broker.stop() == 0
        file = next((broker.data_dir / "stream_store").glob("*/new.db"))
        connection = sqlite3.connect(file)
        connection.execute("PRAGMA user_version = 99")
        connection.close()
        broker.start()
        worker = await Worker.open(broker.worker_url)
        error = (await worker.call("stream::get", item("new", "g", "i")))["error"]
        assert "layout 99" in error["message"]
        await result_of(worker, "stream::set", item("other", "g", "i", data=1))
        await worker.close()

    with Broker() as broker:
        run(main(broker))


def test_a_folder_that_cannot_be_written_to() -> None:
    with Broker() as broker:
        assert broker.stop() == 0
        folder = broker.data_dir / "stream_store"
        for path in folder.iterdir():
            if path.is_dir():
                (path / "lock").unlink()
                path.rename(path.with_name(f"was-{path.name}"))
        (folder / "shard-0").write_text("no folder")
        with pytest.raises(StartFailed) as failure:
            broker.start()
        assert failure.value.exit_code == 2
        assert "shard-0" in failure.value.stderr


def test_case_40_shutdown(run: Run) -> None:
    """Idle clients, one that does not read, a worker whose function hangs: it stops anyway."""

    async def main(broker: Broker) -> None:
        worker = await Worker.open(broker.worker_url)
        await worker.register_function("hangs", lambda _: asyncio.sleep(3600))
        caller = await Worker.open(broker.worker_url)
        hung = asyncio.create_task(caller.call("hangs", {}, LONG_S))
        clients = [await StreamClient.open(broker.stream_url) for _ in range(100)]
        for client in clients:
            await client.join("chat", "r")
        host, port = broker.stream_url.split("/")[2].rsplit(":", 1)
        full = socket.create_connection((host, int(port)))
        full.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * KIB)
        full.sendall(
            b"GET /stream/chat/r/ HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n"
            b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        for number in range(300):
            data = {"id": "m", "n": number, "x": "x" * 20 * KIB}
            await result_of(caller, "stream::set", item("chat", "r", f"i{number % 50}", data=data))
        stopped = asyncio.get_running_loop().run_in_executor(None, broker.stop)
        codes = await asyncio.gather(
            *(c.next(lambda f: isinstance(f, Closed), LONG_S) for c in clients)
        )
        assert {closed.code for closed in codes} == {1001}
        assert await stopped == 0
        hung.cancel()
        full.close()
        broker.start()
        again = await Worker.open(broker.worker_url)
        listed = await result_of(again, "stream::list", {"stream_name": "chat", "group_id": "r"})
        assert sorted(value["n"] for value in listed) == list(range(250, 300))
        for end in (again, worker, caller, *clients):
            await end.close()

    with Broker() as broker:
        run(main(broker))


def test_case_44_reconnect_storm(run: Run) -> None:
    """All at once, with an auth function that takes its time, beside a worker that goes on."""
    count = 300

    async def client_life(url: str, rounds: list[int]) -> None:
        """As a published client: 2 s after a loss it connects again, and joins."""
        refused = 0
        while True:
            try:
                client = await StreamClient.open(url)
            except (OSError, WebSocketException):
                refused += 1
                await asyncio.sleep(2)
                continue
            for group in ("a", "b"):
                sync = await client.join("storm", group, group)
                assert len(sync["event"]["data"]) == 100
            rounds.append(refused)
            await client.close()
            return

    async def main(broker: Broker) -> None:
        async def auth(_: Any) -> Any:
            await asyncio.sleep(0.02)
            return {}

        worker = await Worker.open(broker.worker_url)
        await worker.register_function("stream::auth", auth)
        for group in ("a", "b"):
            for number in range(100):
                await result_of(
                    worker, "stream::set", item("storm", group, f"i{number}", data={"n": number})
                )
        clients = [await StreamClient.open(broker.stream_url) for _ in range(count)]
        os.kill(broker.children()["gateway"], signal.SIGKILL)
        for client in clients:
            await client.next(lambda f: isinstance(f, Closed), LONG_S)
        async with asyncio.timeout(LONG_S):
            while True:
                try:
                    worker = await Worker.open(broker.worker_url)
                    break
                except (OSError, WebSocketException):
                    await asyncio.sleep(0.05)
        await worker.register_function("stream::auth", auth)
        rounds: list[int] = []
        lives = asyncio.gather(*(client_life(broker.stream_url, rounds) for _ in range(count)))
        calls = 0
        while not lives.done():
            await result_of(worker, "stream::set", item("other", "g", "i", data=calls))
            calls += 1
            await asyncio.sleep(0.01)
        await lives
        assert len(rounds) == count
        assert max(rounds) <= 3
        assert calls > 1
        await worker.close()

    config = (
        "workers:\n  - name: iii-stream\n    config:\n      auth_function: stream::auth\n"
        "      adapter: {name: kv, config: {store_method: file_based}}\n"
    )
    with Broker(config) as broker:
        run(main(broker))


def test_readyz_tells_of_a_shard_that_is_gone(run: Run) -> None:
    def readyz(broker: Broker) -> int:
        url = broker.stream_url.replace("ws://", "http://") + "/readyz"
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code

    async def main(broker: Broker) -> None:
        assert readyz(broker) == 200
        pid = broker.children()["shard-1"]
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(LONG_S):
            while readyz(broker) != 503:
                await asyncio.sleep(0.01)
            while readyz(broker) != 200:
                await asyncio.sleep(0.01)

    with Broker() as broker:
        run(main(broker))
