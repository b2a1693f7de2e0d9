"""Workers and clients on different gateways: of one broker, and of brokers that share a Redis.

Each test runs with both; place 0 and place 1 are two gateways.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus

from tests.conftest import Run
from tests.support.calls import item, result_of
from tests.support.connection import Closed
from tests.support.pair import (
    Pair,
    TwoBrokers,
    TwoGateways,
    until,
    until_has,
    until_has_triggers,
    until_lacks,
)
from tests.support.redis_server import IS_INSTALLED
from tests.support.worker import Failure, Invocation, Worker

pytestmark = pytest.mark.timeout(300)

KINDS = [
    pytest.param(TwoGateways, id="gateways"),
    pytest.param(
        TwoBrokers,
        id="brokers",
        marks=pytest.mark.skipif(not IS_INSTALLED, reason="redis-server is not installed"),
    ),
]


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Shared by tests that leave nothing behind."""
    with request.param() as pair:
        yield pair


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> type[Pair]:
    """For tests that need a pair of their own."""
    kind: type[Pair] = request.param
    return kind


# Calls ---------------------------------------------------------------------------------------


def test_calls(pair: Pair, run: Run) -> None:
    """Results, errors, no result, metadata of the caller; both ways."""

    async def main() -> None:
        workers = [await pair.worker(0), await pair.worker(1)]
        for place, worker in enumerate(workers):
            await worker.register_function(f"echo-{place}", lambda i: i.data)
            await worker.register_function(f"fail-{place}", lambda _: Failure("odd", "not today"))
        for place, worker in enumerate(workers):
            other = 1 - place
            await until_has(worker, f"echo-{other}", f"fail-{other}")
            answer = await result_of(worker, f"echo-{other}", {"n": [1, None, "ü"]})
            assert answer == {"n": [1, None, "ü"], "_caller_worker_id": worker.worker_id}
            failed = await worker.call(f"fail-{other}", {})
            assert failed == {"error": {"code": "odd", "message": "not today"}}
        calls = [workers[0].call("echo-1", n) for n in range(200)]
        assert [a["result"] for a in await asyncio.gather(*calls)] == list(range(200))
        assert pair.metric(0, "broker_peer_calls_sent_total") >= 202
        assert pair.metric(1, "broker_peer_calls_received_total") >= 202
        await until(lambda: pair.metric(1, "broker_peer_calls_pending") == 0)
        for worker in workers:
            await worker.close()

    run(main())


def test_void_calls_in_order(pair: Pair, run: Run) -> None:
    async def main() -> None:
        caller, worker = await pair.worker(0), await pair.worker(1)
        await worker.register_function("take", lambda _: None)
        await until_has(caller, "take")
        for n in range(100):
            await caller.void("take", {"n": n})
        assert [i.data["n"] for i in await worker.asked(100)] == list(range(100))
        assert not [f for f in caller.waiting if isinstance(f, dict) and "error" in f]
        await caller.close()
        await worker.close()

    run(main())


def test_our_own_worker_comes_first(pair: Pair, run: Run) -> None:
    async def main() -> None:
        here, there = await pair.worker(0), await pair.worker(1)
        await there.register_function("where", lambda _: "there")
        await until_has(here, "where")
        assert await result_of(here, "where", {}) == "there"
        await here.register_function("where", lambda _: "here")
        await here.barrier()
        assert await result_of(here, "where", {}) == "here"
        assert await result_of(there, "where", {}) == "there"
        assert not here.waiting, "nobody is told of a conflict"
        await here.unregister_function("where")
        await here.barrier()
        assert await result_of(here, "where", {}) == "there"
        await here.close()
        await there.close()

    run(main())


def test_the_worker_leaves_with_a_call(pair: Pair, run: Run) -> None:
    async def main() -> None:
        caller, worker = await pair.worker(0), await pair.worker(1)
        await worker.register_function("slow", lambda _: asyncio.Event().wait())
        await until_has(caller, "slow")
        call = asyncio.create_task(caller.call("slow", {}))
        await worker.asked(1)
        await worker.close()
        answer = await call
        assert answer["error"]["code"] == "invocation_stopped"
        gone = await caller.call("slow", {})
        assert gone["error"]["code"] == "function_not_found"
        await caller.close()

    run(main())


def test_the_caller_leaves_with_a_call(pair: Pair, run: Run) -> None:
    """What it waited for is forgotten at the other end too."""

    async def main() -> None:
        caller, worker = await pair.worker(0), await pair.worker(1)
        await worker.register_function("slow", lambda _: asyncio.Event().wait())
        await until_has(caller, "slow")
        await caller.void("slow", {}, invocation_id="x", action=None)
        await worker.asked(1)
        await until(lambda: pair.metric(1, "broker_peer_calls_pending") == 1)
        await caller.close()
        await until(lambda: pair.metric(1, "broker_peer_calls_pending") == 0)
        await worker.close()

    run(main())


def test_lists_show_all(pair: Pair, run: Run) -> None:
    async def main() -> None:
        here, there = await pair.worker(0), await pair.worker(1)
        await there.describe("far away", description="a worker", namespace="ns")
        await there.register_function("far", lambda _: 1, description="it is far")
        await there.register_trigger("stream", "far", {"stream_name": "x"}, namespace="ns", id="t")
        await until_has(here, "far")
        await until_has_triggers(here, 1)
        found = await result_of(here, "engine::functions::list", {"search": "far"})
        assert found["functions"] == [
            {
                "function_id": "far",
                "namespace": "ns",
                "worker_name": "far away",
                "description": "it is far",
            }
        ]
        workers = await result_of(here, "engine::workers::list", {"search": "far away"})
        assert [w["id"] for w in workers["workers"]] == [there.worker_id]
        info = await result_of(here, "engine::workers::info", {"name": "far away"})
        assert [t["id"] for t in info["registered_triggers"]] == ["t"]
        answer = await here.call("far", {}, namespace="ns")
        assert answer == {"result": 1}
        await there.unregister_trigger("t")
        await there.unregister_function("far")
        await until_has_triggers(here, 0)
        await there.close()
        await until(lambda: _no_workers(here, "far away"))
        await here.close()

    async def _no_workers(worker: Worker, name: str) -> bool:
        answer = await result_of(worker, "engine::workers::list", {"search": name})
        return not answer["workers"]

    run(main())


def test_availability_triggers(pair: Pair, run: Run) -> None:
    async def main() -> None:
        watching = await pair.worker(0)
        seen: list[Any] = []
        await watching.register_function("seen", lambda i: seen.append(i.data))
        await watching.register_trigger("engine::functions-available", "seen", {})
        await watching.register_trigger("engine::workers-available", "seen", {})
        await watching.barrier()
        other = await pair.worker(1)
        await other.register_function("fresh", lambda _: 1)

        def has(event: str, **fields: Any) -> bool:
            return any(d["event"] == event and d.items() >= fields.items() for d in seen)

        def listed() -> bool:
            return any(f["function_id"] == "fresh" for d in seen for f in d.get("functions", ()))

        await until(lambda: has("worker_connected", worker_id=other.worker_id))
        await until(listed)
        await other.close()
        await until(lambda: has("worker_disconnected", worker_id=other.worker_id))
        events = [(d["event"], d["worker_id"]) for d in seen if "worker_id" in d]
        assert len(events) == len(set(events)), "each is told once"
        await watching.close()

    run(main())


def test_trigger_types_of_others(pair: Pair, run: Run) -> None:
    """A provider is told of a registration elsewhere, and can refuse it."""

    async def main() -> None:
        provider, worker = await pair.worker(0), await pair.worker(1)
        await provider.send({"type": "registertriggertype", "id": "cron", "description": "time"})

        async def known() -> bool:
            answer = await worker.call("engine::triggers::list", {"search": "cron"})
            return bool(answer["result"]["triggers"])

        await until(known)
        await worker.register_trigger("cron", "tick", {"every": 5}, id="c1")
        told = await provider.next(lambda f: f["type"] == "registertrigger")
        assert told["id"] == "c1"
        assert told["config"] == {"every": 5}
        await worker.unregister_trigger("c1")
        gone = await provider.next(lambda f: f["type"] == "unregistertrigger")
        assert gone["id"] == "c1"
        await worker.register_trigger("cron", "tick", {"every": 0}, id="c2")
        await provider.next(lambda f: f["type"] == "registertrigger")
        error = {"code": "bad", "message": "never"}
        await provider.send(
            {
                "type": "triggerregistrationresult",
                "id": "c2",
                "trigger_type": "cron",
                "function_id": "tick",
                "error": error,
            }
        )
        refused = await worker.next(lambda f: f["type"] == "triggerregistrationresult")
        assert (refused["id"], refused["error"]) == ("c2", error)
        await provider.close()
        await worker.close()

    run(main())


def test_reattach(pair: Pair, run: Run) -> None:
    """A worker that connects anew to another gateway parts with its old connection."""

    async def main() -> None:
        old = await pair.worker(0)
        await old.register_function("mine", lambda _: "old")
        new = await pair.worker(1)
        await until_has(new, "mine")
        await new.send(
            {
                "type": "reattach",
                "previous_worker_id": old.worker_id,
                "reattach_token": "not the token",
            }
        )
        await new.barrier()
        assert await result_of(new, "mine", {}) == "old"
        await new.send(
            {
                "type": "reattach",
                "previous_worker_id": old.worker_id,
                "reattach_token": old.reattach_token,
            }
        )
        await old.next(lambda f: isinstance(f, Closed))
        await new.register_function("mine", lambda _: "new")
        await new.barrier()
        assert await result_of(new, "mine", {}) == "new"
        await new.close()
        await old.close()

    run(main())


# Clients -------------------------------------------------------------------------------------


def test_everybody_sees_every_change_in_one_order(pair: Pair, run: Run) -> None:
    async def main() -> None:
        workers = [await pair.worker(0), await pair.worker(1)]
        clients = [await pair.client(place) for place in (0, 1)]
        syncs = [await client.join("all", "g") for client in clients]
        await asyncio.gather(
            *(
                worker.call("stream::set", item("all", "g", f"{place}", data=n))
                for n in range(50)
                for place, worker in enumerate(workers)
            )
        )
        await workers[0].call(
            "stream::send", {"stream_name": "all", "group_id": "g", "type": "x", "data": 1}
        )
        seen = []
        for client, sync in zip(clients, syncs, strict=True):
            frames = [await client.next() for _ in range(101)]
            assert [f["seq"] for f in frames] == list(range(sync["seq"] + 1, sync["seq"] + 102))
            seen.append(frames)
        assert seen[0] == seen[1]
        for connection in (*workers, *clients):
            await connection.close()

    run(main())


def test_resumes_on_the_other_gateway(pair: Pair, run: Run) -> None:
    async def main() -> None:
        worker = await pair.worker(0)
        client = await pair.client(0)
        sync = await client.join("resume", "g")
        await client.close()
        for n in range(5):
            await result_of(worker, "stream::set", item("resume", "g", "i", data=n))
        client = await pair.client(1)
        since = {"since": sync["seq"], "epoch": sync["epoch"]}
        resumed = await client.join("resume", "g", **since)
        assert resumed["resumed"] is True
        missed = [await client.next() for _ in range(5)]
        assert [f["event"]["data"] for f in missed] == list(range(5))
        there = await pair.worker(1)
        query = {"stream_name": "resume", "group_id": "g"}
        past = [await result_of(w, "stream::history", query) for w in (worker, there)]
        assert past[0] == past[1]
        assert [e["seq"] for e in past[0]["events"]] == [f["seq"] for f in missed]
        for connection in (worker, there, client):
            await connection.close()

    run(main())


# Auth ----------------------------------------------------------------------------------------


def test_auth_fails_closed(kind: type[Pair], run: Run) -> None:
    async def main(pair: Pair) -> None:
        with pytest.raises(InvalidStatus) as refused:
            await pair.client(0)
        assert refused.value.response.status_code == 503
        worker, other = await pair.worker(0), await pair.worker(1)
        await worker.register_function(
            "auth", lambda i: {"context": "yes"} if i.data["headers"].get("x") == "ok" else None
        )
        await until_has(other, "auth")
        client = await pair.client(1, headers={"x": "ok"})
        await client.join("s", "g")
        with pytest.raises(InvalidStatus) as refused:
            await pair.client(1)
        assert refused.value.response.status_code == 401
        pair.kill(0)  # with the worker
        await until_lacks(other, "auth")
        with pytest.raises(InvalidStatus) as refused:
            await pair.client(1, headers={"x": "ok"})
        assert refused.value.response.status_code == 503
        await pair.back()
        await worker.close()
        worker = await pair.worker(0)
        await worker.register_function("auth", lambda _: {"context": 1})
        await until_has(other, "auth")
        again = await pair.client(1)
        await again.join("s", "g")
        for connection in (worker, other, client, again):
            await connection.close()

    with kind(stream="auth_function: auth") as pair:
        run(main(pair))


def test_auth_that_takes_too_long(kind: type[Pair], run: Run) -> None:
    """Nobody gets in, and the call is forgotten at the other end too."""

    async def main(pair: Pair) -> None:
        worker, other = await pair.worker(0), await pair.worker(1)
        await worker.register_function("auth", lambda _: asyncio.Event().wait())
        await until_has(other, "auth")
        with pytest.raises(InvalidStatus) as refused:
            await pair.client(1)
        assert refused.value.response.status_code == 503
        assert len(worker.invocations) == 1
        await until(lambda: pair.metric(0, "broker_peer_calls_pending") == 0)
        await worker.close()
        await other.close()

    with kind("limits: {auth_timeout_s: 0.2}", "auth_function: auth") as pair:
        run(main(pair))


# Joins and leaves ----------------------------------------------------------------------------


def test_join_triggers(pair: Pair, run: Run) -> None:
    async def main() -> None:
        guard, other = await pair.worker(0), await pair.worker(1)
        await guard.register_function(
            "may", lambda i: {"unauthorized": i.data["group_id"] != "open"}
        )
        await guard.register_trigger("stream:join", "may", {"stream_name": "guarded"})
        await until_has_triggers(other, 1, "stream:join")
        for place in (0, 1):
            client = await pair.client(place)
            assert (await client.join("guarded", "open"))["event"]["type"] == "sync"
            refused = await client.join("guarded", "closed", "s2")
            assert refused["event"] == {"type": "unauthorized"}
            await client.close()
        assert len(await guard.asked(4)) == 4
        await guard.close()
        await until_has_triggers(other, 0, "stream:join")
        await other.close()

    run(main())


def test_a_guard_that_is_away_refuses(kind: type[Pair], run: Run) -> None:
    """Until its gateway is back without it, or it is registered again elsewhere."""

    async def main(pair: Pair) -> None:
        guard, other = await pair.worker(0), await pair.worker(1)
        await guard.register_function("may", lambda _: {"unauthorized": False})
        await guard.register_trigger("stream:join", "may", {"stream_name": "guarded"})
        await until_has_triggers(other, 1, "stream:join")
        client = await pair.client(1)
        assert (await client.join("guarded", "g"))["event"]["type"] == "sync"
        pair.cut(0)
        await until(lambda: pair.metric(1, "broker_peers") == 0)
        refused = await client.join("guarded", "g", "s2")
        assert refused["event"] == {"type": "unauthorized"}
        await other.register_function("may", lambda _: {"unauthorized": False})
        await other.register_trigger("stream:join", "may", {"stream_name": "guarded"})
        await other.barrier()
        assert (await client.join("guarded", "g", "s3"))["event"]["type"] == "sync"
        assert len(await other.asked(1)) == 1
        await other.quiet()
        assert not other.invocations, "the one that is away is not asked beside it"
        for connection in (guard, other, client):
            await connection.close()

    with kind() as pair:
        run(main(pair))


def test_leaves_are_told_once(pair: Pair, run: Run) -> None:
    async def main() -> None:
        worker, other = await pair.worker(0), await pair.worker(1)
        await worker.register_function("left", lambda _: None)
        await worker.register_trigger("stream:leave", "left", {"stream_name": "rooms"})
        await until_has_triggers(other, 1, "stream:leave")
        clients = [await pair.client(place) for place in (0, 1)]
        for place, client in enumerate(clients):
            await client.join("rooms", "g", f"stays-{place}")
            await client.join("rooms", "g", f"leaves-{place}")
            await client.send_leave("rooms", "g", f"leaves-{place}")
        for client in clients:
            await client.ping()
            await client.close()
        told = [i.data["subscription_id"] for i in await worker.asked(4)]
        assert sorted(told) == ["leaves-0", "leaves-1", "stays-0", "stays-1"]
        await worker.quiet()
        assert not worker.invocations
        await worker.close()
        await until_has_triggers(other, 0, "stream:leave")
        await other.close()

    run(main())


def test_leaves_of_a_killed_gateway_are_told_once(kind: type[Pair], run: Run) -> None:
    """By whom the leases that the shards keep are given to; the worker is on the other gateway."""

    async def main(pair: Pair) -> None:
        worker, other = await pair.worker(0), await pair.worker(1)
        left: list[str] = []
        await worker.register_function("left", lambda i: left.append(i.data["subscription_id"]))
        await worker.register_trigger("stream:leave", "left", {})
        await until_has_triggers(other, 1, "stream:leave")
        clients = [await pair.client(1) for _ in range(3)]
        for n, client in enumerate(clients):
            for group in ("a", "b", "c"):
                await client.join("rooms", group, f"{n}-{group}")
        stays = await pair.client(0)
        await stays.join("rooms", "a", "stays")
        await clients[0].close()
        await until(lambda: len(left) == 3)
        pair.kill(1)
        expected = [f"{n}-{group}" for n in range(3) for group in ("a", "b", "c")]
        await until(lambda: set(left) == set(expected))
        await pair.back()
        await worker.quiet(0.3)
        assert sorted(left) == expected
        await stays.close()
        await until(lambda: len(left) == 10)
        for connection in (worker, other, *clients):
            await connection.close()

    with kind() as pair:
        run(main(pair))


def test_leaves_when_all_is_stopped(kind: type[Pair], run: Run) -> None:
    """The worker on one gateway hears of the clients of the other before it is parted with."""

    async def main(pair: Pair) -> None:
        worker = await pair.worker(0)
        left: list[str] = []
        await worker.register_function("left", lambda i: left.append(i.data["subscription_id"]))
        await worker.register_trigger("stream:leave", "left", {})
        other = await pair.worker(1)
        await until_has_triggers(other, 1, "stream:leave")
        clients = [await pair.client(n % 2) for n in range(4)]
        for n, client in enumerate(clients):
            await client.join("rooms", "g", str(n))
        broker = pair.brokers[-1]
        stopping = asyncio.get_running_loop().run_in_executor(None, broker.stop)
        expected = ["0", "1", "2", "3"] if len(pair.brokers) == 1 else ["1", "3"]
        await until(lambda: sorted(left) == expected)
        assert await stopping == 0
        await worker.quiet()
        assert sorted(left) == expected
        for connection in (worker, other, *clients):
            await connection.close()

    with kind() as pair:
        run(main(pair))


def test_a_client_that_comes_back_elsewhere_has_not_left(kind: type[Pair], run: Run) -> None:
    async def main(pair: Pair) -> None:
        worker, other = await pair.worker(0), await pair.worker(1)
        left: list[str] = []
        await worker.register_function("left", lambda i: left.append(i.data["subscription_id"]))
        await worker.register_trigger("stream:leave", "left", {})
        await until_has_triggers(other, 1, "stream:leave")
        client, goes = await pair.client(0), await pair.client(0)
        await client.join("rooms", "g", "back")
        await goes.join("rooms", "g", "goes")
        await client.close()
        await goes.close()
        await until(lambda: pair.metric(0, "broker_subscriptions_away") == 2)
        client = await pair.client(1)
        await client.join("rooms", "g", "back")
        await until(lambda: left == ["goes"])
        await worker.quiet(0.3)
        assert left == ["goes"]
        for connection in (worker, other, client):
            await connection.close()

    with kind("stream: {leave_delay_s: 1.5}") as pair:
        run(main(pair))


def test_a_killed_gateways_calls_go_to_a_worker_that_is_left(kind: type[Pair], run: Run) -> None:
    """Calls of the broker's own, here of a join trigger: not to another worker that died too."""

    async def main(pair: Pair) -> None:
        dying = [await pair.worker(0) for _ in range(3)]
        here = await pair.worker(1)
        for worker in dying:
            await worker.register_function("may", lambda _: asyncio.Event().wait())
        await until_has(here, "may")
        await here.register_trigger("stream:join", "may", {"stream_name": "guarded"})
        await here.barrier()
        client = await pair.client(1)
        await client.send_join("guarded", "g")
        await dying[0].asked(1)
        await here.register_function("may", lambda _: {"unauthorized": False})
        await here.barrier()
        pair.kill(0)
        assert (await client.next(patience_s=20))["event"]["type"] == "sync"
        assert len(await here.asked(1)) == 1
        for connection in (*dying, here, client):
            await connection.close()

    with kind("limits: {trigger_timeout_s: 20}") as pair:
        run(main(pair))


# Stream triggers -----------------------------------------------------------------------------


def test_stream_triggers_fire_once_and_in_order(pair: Pair, run: Run) -> None:
    """Wherever the write is made, for triggers at both places, one of them with a condition."""

    async def main() -> None:
        workers = [await pair.worker(0), await pair.worker(1)]
        for place, worker in enumerate(workers):
            await worker.register_function(f"take-{place}", lambda _: None)
            await worker.register_trigger("stream", f"take-{place}", {"stream_name": "fired"})
        await workers[1].register_function("odd", lambda i: i.data["event"]["data"] % 2 == 1)
        await workers[0].register_function("odds", lambda _: None)
        await workers[0].register_trigger(
            "stream", "odds", {"stream_name": "fired", "condition_function_id": "odd"}
        )
        for worker in workers:
            await until_has(worker, "take-0", "take-1", "odd", "odds")
            await until_has_triggers(worker, 3, "stream")
        await fires_everywhere(workers, "fired")
        for worker in workers:
            worker.invocations.clear()
        await asyncio.gather(
            *(
                worker.call("stream::set", item("fired", f"g{n % 3}", f"{place}", data=n))
                for n in range(30)
                for place, worker in enumerate(workers)
            )
        )
        await workers[1].call(
            "stream::send", {"stream_name": "fired", "group_id": "g0", "type": "x", "data": 0}
        )

        def of(place: int, function_id: str) -> list[Invocation]:
            return [i for i in workers[place].invocations if i.function_id == function_id]

        for place in (0, 1):
            await until(lambda place=place: len(of(place, f"take-{place}")) >= 61)
        await until(lambda: len(of(0, "odds")) >= 30)
        for worker in workers:
            await worker.quiet()
        for place in (0, 1):
            _in_order(of(place, f"take-{place}"), 61)
        _in_order(of(0, "odds"), 30)
        for worker in workers:
            await worker.close()

    run(main())


async def fires_everywhere(workers: list[Worker], stream: str) -> None:
    """Return when a change made at either place fires the triggers at both."""
    for writer in workers:
        for n, worker in enumerate(workers):
            group = f"warm-{workers.index(writer)}-{n}"

            async def fired(
                writer: Worker = writer, worker: Worker = worker, group: str = group
            ) -> bool:
                await result_of(writer, "stream::set", item(stream, group, "i", data=2))
                await asyncio.sleep(0.05)
                return any(i.data.get("groupId") == group for i in worker.invocations)

            await until(fired)
    for worker in workers:
        await worker.quiet()


def _in_order(invocations: list[Invocation], count: int) -> None:
    assert len(invocations) == count, len(invocations)
    seqs: dict[str, list[int]] = {}
    for invocation in invocations:
        seqs.setdefault(invocation.data["groupId"], []).append(invocation.data["seq"])
    for group, numbers in seqs.items():
        assert numbers == sorted(set(numbers)), (group, numbers)


# Streams that workers store ------------------------------------------------------------------


class Store:
    """The functions of a stream that this stores, on one worker."""

    def __init__(self, stream: str) -> None:
        self.stream = stream
        self.items: dict[str, dict[str, Any]] = {}

    async def serve(self, worker: Worker, *functions: str) -> None:
        for name in functions:
            handler = getattr(self, name)
            await worker.register_function(f"stream::{name}({self.stream})", handler)

    async def get(self, i: Invocation) -> Any:
        await asyncio.sleep(0)
        return self.items.get(i.data["group_id"], {}).get(i.data["item_id"])

    async def set(self, i: Invocation) -> Any:
        group = self.items.setdefault(i.data["group_id"], {})
        old = group.get(i.data["item_id"])
        await asyncio.sleep(0.001)
        group[i.data["item_id"]] = i.data["data"]
        return {"old_value": old, "new_value": i.data["data"]}

    async def delete(self, i: Invocation) -> Any:
        return {"old_value": self.items.get(i.data["group_id"], {}).pop(i.data["item_id"], None)}

    async def list(self, i: Invocation) -> Any:
        return list(self.items.get(i.data["group_id"], {}).values())

    async def list_groups(self, i: Invocation) -> Any:
        return list(self.items)


ALL = ("get", "set", "delete", "list", "list_groups")


def test_custom_streams(pair: Pair, run: Run) -> None:
    """Everything works from both places; updates through get and set are atomic."""

    async def main() -> None:
        workers = [await pair.worker(0), await pair.worker(1)]
        store = Store("own")
        await store.serve(workers[0], *ALL)
        await until_has(workers[1], *(f"stream::{name}(own)" for name in ALL))
        clients = [await pair.client(place) for place in (0, 1)]
        syncs = [await client.join("own", "g") for client in clients]
        assert [sync["event"]["data"] for sync in syncs] == [[], []]
        await result_of(workers[0], "stream::set", item("own", "g", "n", data={"count": 0}))
        ops = [{"type": "increment", "path": "count", "by": 1}]
        await asyncio.gather(
            *(
                result_of(worker, "stream::update", item("own", "g", "n", ops=ops))
                for _ in range(25)
                for worker in workers
            )
        )
        for worker in workers:
            assert await result_of(worker, "stream::get", item("own", "g", "n")) == {"count": 50}
            group = {"stream_name": "own", "group_id": "g"}
            assert await result_of(worker, "stream::list", group) == [{"count": 50}]
            assert await result_of(worker, "stream::list_groups", group) == ["g"]
        counts = []
        for client in clients:
            frames = [await client.next() for _ in range(51)]
            counts.append([f["event"]["data"]["count"] for f in frames])
            assert [f["seq"] for f in frames] == list(
                range(frames[0]["seq"], frames[0]["seq"] + 51)
            )
        assert counts == [list(range(51))] * 2
        late = await pair.client(1)
        assert (await late.join("own", "g"))["event"]["data"] == [{"count": 50}]
        deleted = await result_of(workers[1], "stream::delete", item("own", "g", "n"))
        assert deleted == {"old_value": {"count": 50}}
        assert (await late.next())["event"]["type"] == "delete"
        for connection in (*workers, *clients, late):
            await connection.close()

    run(main())


def test_custom_streams_of_a_killed_gateway(kind: type[Pair], run: Run) -> None:
    async def main(pair: Pair) -> None:
        worker, other = await pair.worker(0), await pair.worker(1)
        store = Store("own")
        hold = asyncio.Event()

        async def get(_: Invocation) -> Any:
            await hold.wait()

        await worker.register_function("stream::get(own)", get)
        await until_has(other, "stream::get(own)")
        call = asyncio.create_task(other.call("stream::get", item("own", "g", "i")))
        await worker.asked(1)
        pair.kill(0)
        answer = await call
        assert answer["error"]["code"] in ("gateway_unavailable", "invocation_stopped"), answer
        await store.serve(other, *ALL)
        await other.barrier()
        await result_of(other, "stream::set", item("own", "g", "i", data=1))
        assert await result_of(other, "stream::get", item("own", "g", "i")) == 1
        await pair.back()
        worker = await pair.worker(0)
        await until_has(worker, "stream::get(own)")
        assert await result_of(worker, "stream::get", item("own", "g", "i")) == 1
        await worker.close()
        await other.close()

    with kind() as pair:
        run(main(pair))


# The gateways themselves ---------------------------------------------------------------------


def test_broker_functions_cover_all_gateways(run: Run) -> None:
    async def main(pair: Pair) -> None:
        worker = await pair.worker(1)
        clients = [await pair.client(n % 2) for n in range(7)]
        for n, client in enumerate(clients):
            await client.join("s", "g", f"sub-{n}")
        for function_id, key in (
            ("broker::connections", "connections"),
            ("broker::members", "members"),
        ):
            seen: list[Any] = []
            cursor = None
            for _ in range(20):
                query = {"limit": 2, "cursor": cursor, "stream_name": "s", "group_id": "g"}
                page = await result_of(worker, function_id, query)
                assert page["count"] == 7
                assert len(page[key]) <= 2
                seen += page[key]
                cursor = page["cursor"]
                if cursor is None:
                    break
            assert len({c["connection_id"] for c in seen}) == len(seen) == 7
            bad = await worker.call(function_id, {**query, "cursor": "x"})
            assert bad["error"]["code"] == "INVALID_ARGUMENTS"
        for client in clients:
            await client.ping()
        answer = await result_of(worker, "broker::disconnect", {"addr": "127.0.0.1"})
        assert answer == {"disconnected": 7}
        for client in clients:
            assert (await client.next(lambda f: isinstance(f, Closed))).code == 4403
            await client.close()
        await worker.close()

    with TwoGateways() as pair:
        run(main(pair))


def test_the_last_gateway_serves_alone(run: Run) -> None:
    """While the other one hangs, or is started again."""

    async def main(pair: Pair) -> None:
        client = await pair.client(1)
        worker = await pair.worker(1)
        await client.join("s", "g")
        pair.kill(0)
        await result_of(worker, "stream::set", item("s", "g", "i", data=1))
        assert (await client.next())["event"]["data"] == 1
        await pair.back()
        fresh = await pair.client(0)
        assert (await fresh.join("s", "g"))["event"]["data"] == [1]
        for connection in (client, worker, fresh):
            await connection.close()

    with TwoGateways() as pair:
        run(main(pair))
        log = pair.broker.log
        assert "process_restarted process=gateway-0" in log, log


def test_json_is_passed_on_as_it_is(pair: Pair, run: Run) -> None:
    """Numbers keep their text on the way to another gateway and back."""

    async def main() -> None:
        caller, worker = await pair.worker(0), await pair.worker(1)
        await worker.send({"type": "registerfunction", "id": "raw"})
        await until_has(caller, "raw")
        await caller.send_text(
            '{"type":"invokefunction","function_id":"raw","invocation_id":"i1",'
            '"data":[1.10,1e400,123456789012345678901234567890]}'
        )
        asked = await worker.next(lambda f: f.get("type") == "invokefunction")
        assert asked["data"][2] == 123456789012345678901234567890
        await worker.send_text(
            json.dumps(
                {"type": "invocationresult", "invocation_id": asked["invocation_id"]}
            ).removesuffix("}")
            + ',"function_id":"raw","result":123456789012345678901234567890}'
        )
        answer = await caller.next(lambda f: f.get("invocation_id") == "i1")
        assert answer["result"] == 123456789012345678901234567890
        await caller.close()
        await worker.close()

    run(main())
