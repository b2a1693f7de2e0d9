"""Brokers that share a Redis: its faults, several gateways each, and what is left of a dead one."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.conftest import Run
from tests.front_door import sdk_scenarios as scenarios
from tests.front_door.sdk_programs import Program, node_worker, python_presence, python_worker
from tests.support.broker import Broker
from tests.support.calls import item, result_of
from tests.support.pair import (
    TwoBrokers,
    until,
    until_has,
    until_has_triggers,
    until_lacks,
)
from tests.support.redis_server import IS_INSTALLED
from tests.support.worker import Worker

pytestmark = [
    pytest.mark.skipif(not IS_INSTALLED, reason="redis-server is not installed"),
    pytest.mark.timeout(300),
]


async def stored(worker: Worker, group: str, n: int) -> bool:
    answer = await worker.call("stream::set", item("s", group, "i", data=n))
    return "result" in answer


def test_redis_is_restarted(run: Run) -> None:
    """Calls to the other broker fail meanwhile; then all is as before, and nothing is twice."""

    async def main(pair: TwoBrokers) -> None:
        here, there = await pair.worker(0), await pair.worker(1)
        await here.register_function("take", lambda _: "taken")
        await here.register_trigger("stream", "take", {"stream_name": "s"})
        await until_has(there, "take")
        await until_has_triggers(there, 1, "stream")
        await until_fires(here, there)
        assert await result_of(there, "take", 1) == "taken"
        pair.server.stop()
        await until_lacks(there, "take")
        gone = await there.call("take", 1)
        assert gone["error"]["code"] == "function_not_found"
        pair.server.start()
        await until_has(there, "take")
        assert await result_of(there, "take", 1) == "taken"
        here.invocations.clear()
        for n in range(20):
            await until(lambda n=n: stored(there, f"g{n % 4}", n))
        await until(lambda: len(here.invocations) >= 20)
        await here.quiet(0.2)
        values = [i.data["event"]["data"] for i in here.invocations]
        assert sorted(values) == list(range(20))
        for group in range(4):
            assert [v for v in values if v % 4 == group] == list(range(group, 20, 4))
        await here.close()
        await there.close()

    with TwoBrokers() as pair:
        run(main(pair))


async def until_fires(taker: Worker, writer: Worker) -> None:
    """Return when a trigger of `taker` is fired by what `writer` changes."""

    async def fires() -> bool:
        await stored(writer, "warm", 0)
        await asyncio.sleep(0.05)
        return bool(taker.invocations)

    await until(fires)
    await taker.quiet()
    taker.invocations.clear()


def test_lost_messages_are_made_up_for(run: Run) -> None:
    """The connections for changes are cut again and again; each change is fired for."""

    async def main(pair: TwoBrokers) -> None:
        here, there = await pair.worker(0), await pair.worker(1)
        await here.register_function("take", lambda _: None)
        await here.register_trigger("stream", "take", {"stream_name": "s"})
        await until_has_triggers(there, 1, "stream")
        await until_fires(here, there)
        for n in range(60):
            if n % 10 == 0:
                pair.server.client.client_kill_filter(_type="pubsub")
            await result_of(
                (here, there)[n % 2], "stream::set", item("s", f"g{n % 3}", "i", data=n)
            )
        await until(lambda: len(here.invocations) >= 60)
        await here.quiet(0.2)
        assert len(here.invocations) == 60
        for group in range(3):
            seqs = [i.data["seq"] for i in here.invocations if i.data["groupId"] == f"g{group}"]
            assert seqs == list(range(1, 21))
        await here.close()
        await there.close()

    with TwoBrokers() as pair:
        run(main(pair))


def test_everything_in_redis_is_lost(run: Run) -> None:
    """The gateways find one another again."""

    async def main(pair: TwoBrokers) -> None:
        here, there = await pair.worker(0), await pair.worker(1)
        await here.register_function("echo", lambda i: i.data)
        await until_has(there, "echo")
        pair.server.client.flushall()
        await until(lambda: pair.metric(1, "broker_peer_links_made_total") == 2)
        await until_has(there, "echo")
        assert await result_of(there, "echo", 1) == 1
        await here.close()
        await there.close()

    with TwoBrokers() as pair:
        run(main(pair))


def test_a_stopped_broker_leaves_nothing(run: Run) -> None:
    async def main(pair: TwoBrokers) -> None:
        there = await pair.worker(1)
        keys = set(pair.server.client.scan_iter("broker:*"))
        assert len([key for key in keys if key.startswith("broker:inbox:")]) == 2
        assert pair.brokers[0].stop() == 0
        await until(lambda: pair.metric(1, "broker_peers") == 0)
        left = set(pair.server.client.scan_iter("broker:*"))
        assert len([key for key in left if key.startswith("broker:inbox:")]) == 1
        assert len(pair.server.client.hgetall("broker:gateways")) == 1
        ttl_ms = pair.server.client.pttl(next(k for k in left if k.startswith("broker:inbox:")))
        assert 0 < ttl_ms <= 60_000, "also of one that dies"
        await there.close()

    with TwoBrokers() as pair:
        run(main(pair))


def test_read_mail_is_not_kept(run: Run) -> None:
    async def main(pair: TwoBrokers) -> None:
        here, there = await pair.worker(0), await pair.worker(1)
        await here.register_function("echo", lambda i: i.data)
        await until_has(there, "echo")
        for n in range(300):
            assert await result_of(there, "echo", n) == n
        client = pair.server.client
        await until(
            lambda: all(client.xlen(key) < 50 for key in client.scan_iter("broker:inbox:*"))
        )
        await here.close()
        await there.close()

    with TwoBrokers() as pair:
        run(main(pair))


def test_two_brokers_with_two_gateways(run: Run) -> None:
    """Wherever a worker is, it is found; what is to be done once is done once."""

    async def main(pair: TwoBrokers) -> None:
        workers = [await Worker.open(pair.brokers[n % 2].worker_url) for n in range(8)]
        left: list[str] = []
        for n, worker in enumerate(workers):
            await worker.register_function(f"f{n}", lambda i: i.data)
        await workers[0].register_function("left", lambda i: left.append(i.data["subscription_id"]))
        await workers[0].register_trigger("stream:leave", "left", {})
        await workers[1].register_function("take", lambda _: None)
        await workers[1].register_trigger("stream", "take", {"stream_name": "s"})
        for worker in workers:
            await until_has(worker, "left", "take", *(f"f{n}" for n in range(8)))
            await until_has_triggers(worker, 2)
        await until_fires(workers[1], workers[0])
        for worker in workers:
            results = await asyncio.gather(*(worker.call(f"f{n}", n) for n in range(8)))
            assert [r["result"] for r in results] == list(range(8))
        workers[1].invocations.clear()
        clients = [await pair.client(n % 2) for n in range(8)]
        for n, client in enumerate(clients):
            await client.join("s", "g", str(n))
        await asyncio.gather(
            *(w.call("stream::set", item("s", "g", f"{n}", data=n)) for n, w in enumerate(workers))
        )
        taken = await workers[1].asked(8)
        assert [i.data["seq"] for i in taken] == list(range(1, 9))
        for client in clients:
            seqs = [(await client.next())["seq"] for _ in range(8)]
            assert seqs == list(range(1, 9))
            await client.close()
        await until(lambda: len(left) == 8)
        await workers[0].quiet(0.2)
        assert sorted(left) == [str(n) for n in range(8)]
        assert not workers[1].invocations
        for worker in workers:
            await worker.close()

    with TwoBrokers(gateways=2) as pair:
        run(main(pair))


def test_others_in_the_hash(run: Run) -> None:
    """Nobody trips over gateways that are dead, of another release, or no gateways at all."""

    async def main(pair: TwoBrokers) -> None:
        place = json.dumps({"broker_id": "dead", "index": 0, "version": 1})
        pair.server.client.hset("broker:gateways", "0-dead", place)
        pair.server.client.hset("broker:gateways", "odd", "not json")
        other = json.dumps({"broker_id": "new", "index": 0, "version": 99})
        pair.server.client.hset("broker:gateways", "0-other", other)
        await until(lambda: "peer_mismatched peer=0-other version=99" in pair.broker.log)
        here, there = await pair.worker(0), await pair.worker(1)
        await here.register_function("echo", lambda i: i.data)
        await until_has(there, "echo")
        assert pair.broker.log.count("peer_mismatched") == 1
        await here.close()
        await there.close()

    with TwoBrokers() as pair:
        run(main(pair))


def test_joins_wait_until_all_guards_are_known(run: Run) -> None:
    """A broker that starts without Redis lets nobody past the join triggers of others."""

    async def main(pair: TwoBrokers) -> None:
        guard = await pair.worker(0)
        await guard.register_function("may", lambda _: {"unauthorized": True})
        await guard.register_trigger("stream:join", "may", {"stream_name": "guarded"})
        await guard.barrier()
        pair.brokers[1].stop()
        pair.server.pause()
        pair.brokers[1].start()
        client = await pair.client(1)
        await client.send_join("guarded", "g")
        await client.quiet(0.2)
        assert not client.waiting
        pair.server.resume()
        assert (await client.next(patience_s=30))["event"] == {"type": "unauthorized"}
        assert (await client.join("open", "g", "s2"))["event"]["type"] == "sync"
        await guard.close()
        await client.close()

    with TwoBrokers() as pair:
        run(main(pair))


def test_the_published_sdks_on_two_brokers(run: Run) -> None:
    """Workers on one broker, clients and other workers on the other."""
    with TwoBrokers() as pair:
        here, there = pair.brokers

        def python_there(_: Broker) -> Program:
            return python_worker(there)

        def node_there(_: Broker) -> Program:
            return node_worker(there)

        def presence_there(_: Broker) -> Program:
            return python_presence(there)

        scenarios.check_calls(here, run, python_there, "python-calls")
        scenarios.check_trigger(here, python_worker, node_there, "python-node")
        scenarios.check_trigger(here, node_there, python_worker, "node-python")
        scenarios.check_presence(here, run, presence_there, "room")
