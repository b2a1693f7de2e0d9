"""Brokers with different key prefixes or databases on one Redis: each pair has its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import redis

from tests.conftest import Run
from tests.support.calls import item, result_of
from tests.support.pair import TwoBrokers, until, until_has, until_has_triggers
from tests.support.redis_server import IS_INSTALLED
from tests.support.worker import Worker

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not IS_INSTALLED, reason="redis-server is not installed"),
]

FIRST, SECOND = "team:", "team:chat:"
GATEWAYS = "broker:gateways"


async def fires(writer: Worker, taker: Worker, data: Any) -> None:
    """Return when the taker's stream trigger hears what the writer writes."""

    async def is_taken() -> bool:
        await result_of(writer, "stream::set", item("s", "probe", "i", data=data))
        return any(i.function_id == "take" for i in taker.invocations)

    await until(is_taken)


def see_apart(
    run: Run,
    pairs: list[TwoBrokers],
    *,
    strange: Callable[[], list[str]],
    gateways: Callable[[], list[int]],
) -> None:
    """Use the pairs for the same names, and see that each has its own.

    Args:
        strange: keys and channels in Redis that no pair should have.
        gateways: how many of each pair are entered in Redis.
    """

    async def main() -> None:
        for pair in pairs:
            await pair.back()
        workers = [[await pair.worker(0), await pair.worker(1)] for pair in pairs]

        # Workers, their functions and triggers.
        for n, (here, there) in enumerate(workers):
            await here.register_function("who", lambda _, n=n: n)
            await here.register_function(f"only-{n}", lambda _: None)
            await here.register_function("take", lambda _: None)
            await here.register_trigger("stream", "take", {"stream_name": "s"})
            await until_has(there, "who", f"only-{n}", "take")
            await until_has_triggers(there, 1, "stream")
        for n, (here, there) in enumerate(workers):
            assert await result_of(there, "who", {}) == n
            for worker in (here, there):
                absent = await worker.call(f"only-{1 - n}", {})
                assert absent["error"]["code"] == "function_not_found"
        guard = workers[0][0]
        await guard.register_function("refuse", lambda _: {"unauthorized": True})
        await guard.register_trigger("stream:join", "refuse", {"stream_name": "guarded"})
        await until_has_triggers(workers[0][1], 1, "stream:join")

        # Joins, data, events, triggers on streams.
        clients = [[await pair.client(0), await pair.client(1)] for pair in pairs]
        kinds = [(await there.join("guarded", "g"))["event"]["type"] for _, there in clients]
        assert kinds == ["unauthorized", "sync"]
        for _, there in clients:
            assert (await there.join("s", "g", "s2"))["event"]["data"] == []
        for here, there in workers:
            await fires(there, here, 0)
        for n, (here, there) in enumerate(workers):
            for count in range(n + 2):
                writer = there if count % 2 else here
                await result_of(writer, "stream::set", item("s", "g", f"i{n}", data=count))
            assert await result_of(
                there, "stream::list", {"stream_name": "s", "group_id": "g"}
            ) == [n + 1]
        for n, (_, there) in enumerate(clients):
            frames = [await there.next() for _ in range(n + 2)]
            assert [frame["seq"] for frame in frames] == list(range(1, n + 3))
            assert [frame["event"]["data"] for frame in frames] == list(range(n + 2))
            assert {frame["id"] for frame in frames} == {f"i{n}"}
        for n, (here, _) in enumerate(workers):

            def fired(worker: Worker = here) -> list[Any]:
                found = [i.data for i in worker.invocations if i.function_id == "take"]
                return [data["id"] for data in found if data["groupId"] == "g"]

            await until(lambda n=n, fired=fired: len(fired()) >= n + 2)
            await here.quiet()
            assert fired() == [f"i{n}"] * (n + 2)

        # What is in Redis, and who is left when one pair goes.
        async with asyncio.timeout(10):  # whatever may be there for a moment
            for _ in range(20):
                assert strange() == []
                await asyncio.sleep(0.05)
        assert gateways() == [2, 2]
        assert [pair.metric(place, "broker_peers") for pair in pairs for place in (0, 1)] == [1] * 4
        for pair in (workers, clients):
            for one in (*pair[0], *pair[1]):
                await one.close()

    run(main())
    for broker in pairs[1].brokers:
        assert broker.stop() == 0
    assert gateways() == [2, 0]


def test_two_deployments_on_one_redis(run: Run) -> None:
    with (
        TwoBrokers(key_prefix=FIRST) as one,
        TwoBrokers(shared=one, key_prefix=SECOND) as other,
    ):
        client = one.server.client

        def strange() -> list[str]:
            names = {*client.scan_iter(), *client.pubsub_channels()}
            return [name for name in names if not name.startswith(FIRST)]

        def gateways() -> list[int]:
            return [client.hlen(f"{prefix}{GATEWAYS}") for prefix in (FIRST, SECOND)]

        see_apart(run, [one, other], strange=strange, gateways=gateways)


def test_two_deployments_on_databases_of_one_redis(run: Run) -> None:
    with TwoBrokers(database=1) as one, TwoBrokers(shared=one, database=2) as other:
        server = one.server
        clients: list[Any] = [redis.Redis(port=server.port, db=database) for database in (1, 2)]

        def strange() -> list[str]:
            """Keys of no database, and channels that do not say of which they are."""
            common = {"stream::events", "broker:listeners"}
            begins = ("broker:db1:", "broker:db2:")
            channels = set(server.client.pubsub_channels()) - common
            names = {*server.client.scan_iter(), *channels}
            return [name for name in names if not name.startswith(begins)]

        def gateways() -> list[int]:
            return [client.hlen(GATEWAYS) for client in clients]

        try:
            see_apart(run, [one, other], strange=strange, gateways=gateways)
        finally:
            for client in clients:
                client.close()
