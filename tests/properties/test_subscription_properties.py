"""Joins, leaves, lost connections and writes in any order, against a plain model of who gets what.

Protocol sections 5.3, 5.5 and 6.2, promises 3, 5 and 13; through the front door of a real broker.
"""

from __future__ import annotations

import asyncio
import contextlib
import urllib.request
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.conftest import Run
from tests.support.broker import Broker
from tests.support.calls import result_of
from tests.support.connection import PATIENCE_S, Closed
from tests.support.stream_client import StreamClient, settled
from tests.support.worker import Invocation, Worker

MAY_JOIN, LEFT = "subscriptions::may_join", "subscriptions::left"
CLIENTS = range(3)
SUBSCRIPTION_IDS = ("s0", "s1", "s2")  # the same for all clients: they are a connection's own
GROUPS = ("g0", "g1", "closed-0")
ITEMS = ("a", "b")
STEPS_MAX = 40
CONNECTIONS = 'broker_connections{port="stream"}'

JSON = dict[str, Any]


# What is done --------------------------------------------------------------------------------


class Ask(NamedTuple):
    """A frame of a client, `kind` join or leave; `item_id` None: the whole group."""

    kind: str
    subscription_id: str
    group: str
    item_id: str | None


class Send(NamedTuple):
    """A client sends frames, one right after the other."""

    client: int
    asks: list[Ask]


class End(NamedTuple):
    """A client's connection ends, in order or without a close frame, and it connects again.

    `asks` are sent right before the end: the broker may have handled any number of them.
    """

    client: int
    abort: bool
    asks: list[Ask]


class Write(NamedTuple):
    """A call of the worker, `kind` set, delete or send; `item_id` None only for send."""

    kind: str
    group: str
    item_id: str | None


Step = Send | End | Write

clients = st.sampled_from(CLIENTS)
groups = st.sampled_from(["g0", "g0", "g0", "g1", "closed-0"])
items = st.sampled_from(ITEMS)
asks = st.builds(
    Ask,
    st.sampled_from(["join", "join", "join", "leave"]),
    st.sampled_from(SUBSCRIPTION_IDS),
    groups,
    st.sampled_from([None, *ITEMS]),
)
sends = st.builds(Send, clients, st.lists(asks, min_size=1, max_size=4))
ends = st.builds(End, clients, st.booleans(), st.just([]))
ends_in_the_middle = st.builds(End, clients, st.booleans(), st.lists(asks, min_size=1, max_size=3))
item_writes = st.builds(Write, st.sampled_from(["set", "set", "delete"]), groups, items)
custom_events = st.builds(Write, st.just("send"), groups, st.sampled_from([None, *ITEMS]))
kinds = [*[sends] * 6, *[item_writes] * 4, *[custom_events] * 2, ends, ends_in_the_middle]
step_lists = st.lists(
    st.sampled_from(kinds).flatmap(lambda kind: kind), min_size=20, max_size=STEPS_MAX
)


# What must come of it ------------------------------------------------------------------------


class Target(NamedTuple):
    """What a subscription is for; `item_id` None: the whole group."""

    group: str
    item_id: str | None


class Due(NamedTuple):
    """What asks must bring: frames to their client, invocations of the two functions."""

    frames: list[JSON]
    joins: list[JSON]
    leaves: list[JSON]


def is_open(group: str) -> bool:
    """Whether the join function lets clients in."""
    return not group.startswith("closed")


class Model:
    """The items of one stream, and each client's standing subscriptions by their ids."""

    def __init__(self, stream: str) -> None:
        self.stream = stream
        self.items: dict[str, JSON] = {group: {} for group in GROUPS}
        self.seqs = dict.fromkeys(GROUPS, 0)
        self.standing: list[dict[str, Target]] = [{} for _ in CLIENTS]
        self.writes = 0

    def ask(self, client: int, asks: list[Ask]) -> Due:
        """The client's frames are handled, one after the other."""
        due = Due([], [], [])
        standing = self.standing[client]
        for ask in asks:
            target = Target(ask.group, ask.item_id)
            if ask.kind == "leave":  # by the subscription's id alone
                if (left := standing.pop(ask.subscription_id, None)) is not None:
                    due.leaves.append(self._payload(ask.subscription_id, left))
                continue
            due.joins.append(self._payload(ask.subscription_id, target))
            if is_open(ask.group):  # an earlier one with this id is replaced and never left
                standing[ask.subscription_id] = target
                due.frames.append(
                    self._numbered(target, {"type": "sync", "data": self._of(target)})
                )
            else:
                due.frames.append(self._frame(target, {"type": "unauthorized"}))
        return due

    def end(self, client: int, asks: list[Ask]) -> list[Due]:
        """The connection ends after any number of `asks` was handled: what is due in each case.

        It may also end while the worker is asked about a join. What stood is left then; the worker,
        when it allows the join, takes the client for joined, and may be told that this is over too.
        """
        before = self.standing[client]
        cases = []
        for count in range(len(asks) + 1):
            self.standing[client] = dict(before)
            due = self.ask(client, asks[:count])
            left = self.standing[client].items()
            due = due._replace(leaves=due.leaves + [self._payload(*one) for one in left])
            cases.append(due)
            for ask in asks[count : count + 1]:
                target = Target(ask.group, ask.item_id)
                stood = self.standing[client].get(ask.subscription_id) == target
                if ask.kind == "join" and is_open(ask.group) and not stood:
                    asked = [self._payload(ask.subscription_id, target)]
                    cases.append(Due(due.frames, due.joins + asked, due.leaves + asked))
        self.standing[client] = {}
        return cases

    def write(self, write: Write) -> tuple[JSON, JSON | None, JSON | None]:
        """The fields that the call needs besides its names, its result, the event if any."""
        self.writes += 1
        items, target = self.items[write.group], Target(write.group, write.item_id)
        data = {"id": write.item_id, "n": self.writes}
        if write.kind == "send":
            self.seqs[write.group] += 1
            event = {"type": "event", "event": {"type": "note", "data": data}}
            return {"type": "note", "data": data}, None, self._numbered(target, event)
        assert write.item_id is not None
        existed, old = write.item_id in items, items.get(write.item_id)
        if write.kind == "set":
            items[write.item_id] = data
            self.seqs[write.group] += 1
            event = {"type": "update" if existed else "create", "data": data}
            result = {"old_value": old, "new_value": data}
            return {"data": data}, result, self._numbered(target, event)
        if not existed:
            return {}, {"old_value": None}, None
        del items[write.item_id]
        self.seqs[write.group] += 1
        deleted = self._numbered(target, {"type": "delete", "data": old})
        return {}, {"old_value": old}, deleted

    def receivers(self, write: Write) -> list[int]:
        """The clients of which at least one subscription matches."""
        matching = {Target(write.group, None), Target(write.group, write.item_id)}
        return [n for n, standing in enumerate(self.standing) if matching & set(standing.values())]

    def _of(self, target: Target) -> Any:
        items = self.items[target.group]
        return list(items.values()) if target.item_id is None else items.get(target.item_id)

    def _frame(self, target: Target, event: JSON) -> JSON:
        names = {"streamName": self.stream, "groupId": target.group, "id": target.item_id}
        return {"type": "stream", **names, "event": event}

    def _numbered(self, target: Target, event: JSON) -> JSON:
        return {**self._frame(target, event), "seq": self.seqs[target.group]}

    def _payload(self, subscription_id: str, target: Target) -> JSON:
        names = {"stream_name": self.stream, "group_id": target.group, "id": target.item_id}
        return {"subscription_id": subscription_id, **names, "context": None}


# The broker is held against the model --------------------------------------------------------


def gauge(broker: Broker, name: str) -> float:
    """A gauge of the gateway, `name` with its labels."""
    with urllib.request.urlopen(broker.metrics_url, timeout=PATIENCE_S) as response:
        lines = response.read().decode().splitlines()
    return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} "))


async def until_gauge(broker: Broker, name: str, value: int) -> None:
    """Return when a gauge has this value."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(PATIENCE_S):
            while gauge(broker, name) != value:
                await asyncio.sleep(0.005)
    assert gauge(broker, name) == value, name


def in_one_order(payloads: list[JSON]) -> list[JSON]:
    return sorted(payloads, key=repr)


class Scene:
    """The clients of one example, on a stream of its own."""

    def __init__(self, broker: Broker, worker: Worker) -> None:
        self.broker = broker
        self.worker = worker
        self.model = Model(str(uuid.uuid4()))
        self.connections: list[StreamClient] = []
        self.joins: list[JSON] = []  # the invocations of earlier steps
        self.leaves: list[JSON] = []
        self.times = dict.fromkeys(GROUPS, 0)  # the last timestamp of each group, ms

    async def play(self, steps: list[Step]) -> None:
        """Take the steps, end all connections; at last nothing may be left of them."""
        self.worker.invocations.clear()
        await until_gauge(self.broker, CONNECTIONS, 0)
        try:
            for _ in CLIENTS:
                self.connections.append(await StreamClient.open(self.broker.stream_url))
            for step in steps:
                await self.take(step)
            await settled(
                self.connections, self.worker, [(self.model.stream, group) for group in GROUPS]
            )
            assert [connection.waiting for connection in self.connections] == [[] for _ in CLIENTS]
            for client in CLIENTS:
                await self.end(End(client, abort=client == 0, asks=[]))
        finally:
            for connection in self.connections:
                await connection.close()
        for name in (CONNECTIONS, "broker_subscriptions", "broker_subscribed_groups"):
            await until_gauge(self.broker, name, 0)
        await settled((), self.worker)
        await self.invoked([], [])

    async def take(self, step: Step) -> None:
        match step:
            case Send():
                await self.send(step)
            case End():
                await self.end(step)
                self.connections[step.client] = await StreamClient.open(self.broker.stream_url)
            case Write():
                await self.write(step)

    async def send(self, step: Send) -> None:
        due = self.model.ask(step.client, step.asks)
        await self.send_asks(step)
        for frame in due.frames:
            self.check(await self.connections[step.client].next(), frame)
        await self.invoked(due.joins, due.leaves)

    async def write(self, step: Write) -> None:
        fields, result, event = self.model.write(step)
        names = {"stream_name": self.model.stream, "group_id": step.group}
        if step.item_id is not None:
            names["id" if step.kind == "send" else "item_id"] = step.item_id
        assert await result_of(self.worker, f"stream::{step.kind}", names | fields) == result
        if event is not None:
            frames = [await self.connections[n].next() for n in self.model.receivers(step)]
            assert all(frame == frames[0] for frame in frames)  # also the timestamps
            for frame in frames[:1]:
                self.check(frame, event)

    async def end(self, step: End) -> None:
        cases = self.model.end(step.client, step.asks)
        connection = self.connections[step.client]
        await self.send_asks(step)
        await (connection.abort() if step.abort else connection.close())
        *frames, closed = connection.waiting
        assert closed == (Closed(1006, "") if step.abort else Closed(1000, ""))
        if not step.asks:
            assert frames == []
            await self.invoked([], cases[0].leaves)
            return
        await until_gauge(self.broker, CONNECTIONS, len(CLIENTS) - 1)
        await settled((), self.worker)
        for frame, expected in zip(frames, cases[-1].frames, strict=False):
            self.check(frame, expected)
        joins = self.invocations(MAY_JOIN)[len(self.joins) :]
        leaves = in_one_order(self.invocations(LEFT))
        assert joins == cases[-1].joins[: len(joins)]
        fitting = [
            case.leaves
            for case in cases
            if len(case.frames) >= len(frames)  # the last ones need not have arrived
            and len(case.joins) in (len(joins), len(joins) - 1)  # one may be without an answer
            and in_one_order(self.leaves + case.leaves) == leaves
        ]
        assert fitting, f"{frames}, {joins} and {leaves} fit none of {cases}"
        await self.invoked(joins, fitting[0])

    async def send_asks(self, step: Send | End) -> None:
        connection = self.connections[step.client]
        for ask in step.asks:
            send = connection.send_join if ask.kind == "join" else connection.send_leave
            fields = {} if ask.item_id is None else {"id": ask.item_id}
            await send(self.model.stream, ask.group, ask.subscription_id, **fields)

    def check(self, frame: JSON, expected: JSON) -> None:
        """Compare a frame, but for what the model does not know; note the time of its group."""
        assert {key: frame[key] for key in frame if key not in ("timestamp", "epoch")} == expected
        if "seq" in expected:
            assert frame["timestamp"] > self.times[frame["groupId"]]
            self.times[frame["groupId"]] = frame["timestamp"]

    def invocations(self, function_id: str) -> list[JSON]:
        """What the worker was asked on behalf of this stream so far."""
        of_function = [i.data for i in self.worker.invocations if i.function_id == function_id]
        return [data for data in of_function if data["stream_name"] == self.model.stream]

    async def invoked(self, joins: list[JSON], leaves: list[JSON]) -> None:
        """These invocations come, and no others, besides those of earlier steps."""
        self.joins += joins
        self.leaves += leaves
        with contextlib.suppress(TimeoutError):
            await self.worker.until(
                lambda: (
                    len(self.invocations(MAY_JOIN)) >= len(self.joins)
                    and len(self.invocations(LEFT)) >= len(self.leaves)
                )
            )
        assert self.invocations(MAY_JOIN) == self.joins
        assert in_one_order(self.invocations(LEFT)) == in_one_order(self.leaves)


def may_join(invocation: Invocation) -> JSON | None:
    return None if is_open(invocation.data["group_id"]) else {"unauthorized": True}


async def connected_worker(url: str) -> Worker:
    """A worker with both triggers for all streams."""
    worker = await Worker.open(url)
    await worker.register_function(MAY_JOIN, may_join)
    await worker.register_function(LEFT, lambda _: None)
    await worker.register_trigger("stream:join", MAY_JOIN, {})
    await worker.register_trigger("stream:leave", LEFT, {})
    await worker.barrier()
    return worker


@pytest.fixture(scope="module")
def worker(memory_broker: Broker, run: Run) -> Iterator[Worker]:
    worker: Worker = run(connected_worker(memory_broker.worker_url))
    yield worker
    run(worker.close())


@pytest.mark.timeout(600)  # only a failure takes long, while the shortest one is looked for
@settings(
    max_examples=40,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow],
)
@given(steps=step_lists)
def test_who_gets_what_and_who_left(
    steps: list[Step], memory_broker: Broker, worker: Worker, run: Run
) -> None:
    run(Scene(memory_broker, worker).play(steps))
