"""`broker copy` between a KvStore and Redis, on the data of real brokers."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run
from tests.front_door.test_maintenance import command, done, fill
from tests.front_door.test_redis import config
from tests.support.broker import Broker
from tests.support.calls import item, result_of
from tests.support.redis_cluster import RedisClusterServers
from tests.support.redis_server import IS_INSTALLED, RedisServer
from tests.support.stream_client import StreamClient
from tests.support.worker import Worker

pytestmark = pytest.mark.skipif(not IS_INSTALLED, reason="redis-server is not installed")

TEXTS = ["18446744073709551616", "1.0", "1e2", '{"b": 1,  "a": [ ] }', '"\\u00e9\\ud83d\\udca1"']


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


def kv_broker(path: Path, shards: int = 2) -> Broker:
    """On the folder that `kv_config` names."""
    return Broker(kv_config(path), shards, ["--data-dir", str(path)])


def kv_config(path: Path) -> str:
    adapter = (
        f'{{name: kv, config: {{store_method: file_based, file_path: "{path}/stream_store"}}}}'
    )
    return f"workers:\n  - name: iii-stream\n    config:\n      adapter: {adapter}\n"


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


async def fill_exactly(broker: Broker) -> None:
    await fill(broker)
    async with await Worker.open(broker.worker_url) as worker:
        for n, text in enumerate(TEXTS):
            await result_of(
                worker, "stream::set", item("texts", "g", f"i{n}", data=json.loads(text))
            )
        numbers = random.Random(1).sample(range(1200), 1200)
        payloads = [item("large", "g", f"i{n}", data={"n": n}) for n in numbers]
        await asyncio.gather(*(result_of(worker, "stream::set", one) for one in payloads))


async def contents(broker: Broker) -> Any:
    """Items in their order and where each numbering is."""
    found = {}
    async with (
        await Worker.open(broker.worker_url) as worker,
        await StreamClient.open(broker.stream_url) as client,
    ):
        everything = await result_of(worker, "stream::list_all", {})
        groups = [(s["id"], g) for s in everything["stream"] for g in s["groups"]]
        for n, (stream, group) in enumerate([*groups, ("chat", "empty")]):
            names = {"stream_name": stream, "group_id": group}
            sync = await client.join(stream, group, f"s{n}")
            found[stream, group] = (
                json.dumps(await result_of(worker, "broker::items", names)),
                sync["seq"],
                sync["epoch"],
            )
    return found


def test_there_and_back(run: Run, server: RedisServer, tmp_path: Path) -> None:
    """Everything as it was, numbering included, which goes on; over other shards too."""
    first, second = tmp_path / "first", tmp_path / "second"
    kv = written(tmp_path / "kv.yaml", kv_config(first))
    redis = written(tmp_path / "redis.yaml", config(server.url))
    back = written(tmp_path / "back.yaml", kv_config(second) + "broker: {shards: 3}\n")
    with kv_broker(first) as broker:
        run(fill_exactly(broker))
        before = run(contents(broker))
        code, _, errors = done("copy", "--from", kv, "--to", redis)
        assert (code, "in use by another broker" in errors) == (2, True), errors
    code, output, errors = done("copy", "--from", kv, "--to", redis)
    assert code == 0, errors
    assert "history of changes was left behind" in output
    assert "100%" in errors
    checked = errors.split("checked: ")[1].split("\n")[0]
    assert checked in output
    with Broker(config(server.url)) as broker:
        assert run(contents(broker)) == before
        code, _, errors = done("copy", "--from", redis, "--to", back)
        assert (code, "in use by a broker" in errors) == (2, True), errors

        async def goes_on() -> None:
            async with (
                await Worker.open(broker.worker_url) as worker,
                await StreamClient.open(broker.stream_url) as client,
            ):
                sync = await client.join("texts", "g")
                await result_of(worker, "stream::set", item("texts", "g", "last", data=1))
                frame = await client.next()
                assert frame["seq"] == sync["seq"] + 1
                assert frame["timestamp"] > sync["timestamp"]
                await result_of(worker, "stream::delete", item("texts", "g", "last"))

        run(goes_on())
        after = run(contents(broker))
    code, _, errors = done("copy", "--from", redis, "--to", back)
    assert code == 0, errors
    with kv_broker(second, 3) as broker:
        assert run(contents(broker)) == after


def test_what_is_refused(server: RedisServer, tmp_path: Path) -> None:
    kv = written(tmp_path / "kv.yaml", kv_config(tmp_path / "data"))
    redis = written(tmp_path / "redis.yaml", config(server.url))
    memory = written(tmp_path / "memory.yaml", "workers: []\n")
    memory.write_text(kv_config(tmp_path).replace("file_based", "in_memory"))

    def refusal(*words: Path | str) -> str:
        code, _, errors = done("copy", *words)
        assert code == 2, errors
        assert len(errors.strip().splitlines()) == 1, errors
        return errors

    assert "there is no data" in refusal("--from", kv, "--to", redis)
    assert "in memory" in refusal("--from", memory, "--to", redis)
    server.client.hset("stream:s:g", "i", '{"a": 1.0}')
    assert "names the place" in refusal("--from", redis, "--to", redis, "--replace")
    code, _, errors = done("copy", "--from", redis, "--to", kv)
    assert code == 0, errors
    assert "holds data already" in refusal("--from", redis, "--to", kv)
    assert "holds data already" in refusal("--from", kv, "--to", redis)
    server.client.hset("stream:s:g", "other", "2")
    code, _, errors = done("copy", "--from", redis, "--to", kv, "--replace")
    assert code == 0, errors
    assert (tmp_path / "data" / "stream_store.replaced").is_dir()
    server.client.hset("stream:gone:g", "i", "1")
    server.client.set("else", "kept")
    code, _, errors = done("copy", "--from", kv, "--to", redis, "--replace")
    assert code == 0, errors
    assert server.client.hgetall("stream:s:g") == {"i": '{"a": 1.0}', "other": "2"}
    assert server.client.exists("stream:gone:g") == 0
    assert server.client.get("else") == "kept"
    server.client.hset("stream:s:g", "bad", "oops")
    code, _, errors = done("copy", "--from", redis, "--to", kv, "--replace")
    assert code != 0
    server.stop()
    code, _, errors = done("copy", "--from", kv, "--to", redis)
    assert (code, "can't be reached" in errors) == (1, True), errors


def test_between_prefixes_of_one_redis(run: Run, server: RedisServer, tmp_path: Path) -> None:
    """What has another prefix is neither read, nor counted, nor deleted, nor in the way."""
    bystander, first, second = "", "a:", "a:b:"
    paths = {
        prefix: written(tmp_path / f"{n}.yaml", config(server.url, prefix))
        for n, prefix in enumerate((bystander, first, second))
    }

    def keys(*prefixes: str) -> dict[str, bytes | None]:
        """All that is kept under a prefix, and under none that is longer."""

        def owner(key: str) -> str:
            return max((one for one in paths if key.startswith(one)), key=len)

        found = server.client.scan_iter()
        return {key: server.client.type(key) for key in found if owner(key) in prefixes}

    with Broker(config(server.url, first)) as broker:
        run(fill_exactly(broker))
        before = run(contents(broker))
    with Broker(config(server.url)) as broker:  # also goes on meanwhile

        async def write(data: Any) -> None:
            async with await Worker.open(broker.worker_url) as worker:
                await result_of(worker, "stream::set", item("s", "g", "i", data=data))
                everything = await result_of(worker, "stream::list_all", {})
                assert everything["count"] == 1

        run(write(1))
        code, _, errors = done("copy", "--from", paths[first], "--to", paths[bystander])
        assert (code, "in use by a broker" in errors) == (2, True), errors
        others = keys(bystander).keys() - {"broker:probe"}
        source = keys(first)
        assert others >= {"stream:s:g", "broker:streams", "broker:gateways"}
        server.client.set("a:broker:copying", "as if one had been killed")
        code, _, errors = done("copy", "--from", paths[first], "--to", paths[second])
        assert (code, "not finished" in errors) == (2, True), errors
        server.client.delete("a:broker:copying")
        code, _, errors = done("copy", "--from", paths[first], "--to", paths[second])
        assert code == 0, errors
        code, _, errors = done("copy", "--from", paths[first], "--to", paths[second])
        assert (code, "prefix 'a:b:' holds data already" in errors) == (2, True), errors
        server.client.hset("a:b:stream:gone:g", "i", "1")
        code, _, errors = done("copy", "--from", paths[first], "--to", paths[second], "--replace")
        assert code == 0, errors
        assert server.client.exists("a:b:stream:gone:g") == 0
        assert keys(first) == source
        assert keys(bystander).keys() >= others
        run(write(2))
    with Broker(config(server.url, second)) as broker:
        assert run(contents(broker)) == before
    with Broker(config(server.url)) as broker:
        run(write(3))
    # And away again, from under the others.
    code, _, errors = done("copy", "--from", paths[bystander], "--to", paths[first], "--replace")
    assert code == 0, errors
    assert {key for key in keys(first) if ":stream:" in key} == {"a:stream:s:g"}
    with Broker(config(server.url, second)) as broker:
        assert run(contents(broker)) == before


def test_between_databases_of_one_redis(run: Run, server: RedisServer, tmp_path: Path) -> None:
    """A broker of one database is in the way there alone."""
    paths = [
        written(tmp_path / f"{n}.yaml", config(f"{server.url}/{n}" if n else server.url))
        for n in range(3)
    ]
    with Broker(config(f"{server.url}/1")) as broker:
        run(fill_exactly(broker))
        before = run(contents(broker))
        code, _, errors = done("copy", "--from", paths[1], "--to", paths[2])
        refused = f"database 1 of the Redis at 127.0.0.1:{server.port} is in use by a broker"
        assert (code, refused in errors) == (2, True), errors
    with Broker(config(server.url)):
        code, _, errors = done("copy", "--from", paths[1], "--to", paths[0])
        assert (code, "in use by a broker" in errors) == (2, True), errors
        code, _, errors = done("copy", "--from", paths[1], "--to", paths[2])
        assert code == 0, errors
    with Broker(config(f"{server.url}/2")) as broker:
        assert run(contents(broker)) == before


def test_killed_at_any_moment(run: Run, server: RedisServer, tmp_path: Path) -> None:
    """The source stays as it is, no broker serves what is half there, the next run does it all."""
    kv = written(tmp_path / "kv.yaml", kv_config(tmp_path / "data"))
    again = written(tmp_path / "again.yaml", kv_config(tmp_path / "again"))
    redis = written(tmp_path / "redis.yaml", config(server.url))
    with kv_broker(tmp_path / "data") as broker:
        run(fill_exactly(broker))
        before = run(contents(broker))
    words = ("copy", "--from", kv, "--to", redis)
    half_done = 0
    for chance in range(6):
        process = command(*words)
        end = time.monotonic() + 30
        while not server.client.dbsize() and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(0.01 + chance * 0.02)
        process.kill()
        process.communicate()
        half_done += server.client.exists("broker:copying")
    assert half_done
    server.client.set("broker:copying", "as if it had been killed")
    with Broker(config(server.url)) as broker:

        async def is_refused() -> None:
            async with await Worker.open(broker.worker_url) as worker:
                answer = await worker.call("stream::list_all", {})
                assert "broker copy" in answer["error"]["message"]

        run(is_refused())
    code, _, errors = done(*words)
    assert code == 0, errors
    with Broker(config(server.url)) as broker:
        assert run(contents(broker)) == before
    back = ("copy", "--from", redis, "--to", again)
    for chance in range(4):
        process = command(*back)
        time.sleep(0.4 + chance * 0.1)
        process.kill()
        process.communicate()
        if (tmp_path / "again" / "stream_store").exists():
            break
    if not (tmp_path / "again" / "stream_store").exists():
        code, _, errors = done(*back)
        assert code == 0, errors
    with kv_broker(tmp_path / "again") as broker:
        assert run(contents(broker)) == before


def test_into_a_cluster(run: Run, tmp_path: Path) -> None:
    kv = written(tmp_path / "kv.yaml", kv_config(tmp_path / "data"))
    with kv_broker(tmp_path / "data") as broker:
        run(fill_exactly(broker))
        before = run(contents(broker))
    with RedisClusterServers() as servers:
        cluster = written(tmp_path / "cluster.yaml", config(servers.url))
        code, _, errors = done("copy", "--from", kv, "--to", cluster)
        assert code == 0, errors
        with Broker(config(servers.url)) as broker:
            assert run(contents(broker)) == before
