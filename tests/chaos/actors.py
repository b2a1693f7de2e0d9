"""Writers, subscribers and trigger workers, which go on whatever happens and record all of it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from websockets.exceptions import ConnectionClosed, WebSocketException

from tests.sim.history import Call, Fired, Frame, Function, Join, Leave, Record, Trigger
from tests.support.calls import item
from tests.support.connection import Closed
from tests.support.stream_client import StreamClient
from tests.support.worker import Invocation, Worker

STREAMS = ("chat", "a/../ü")
GROUPS = tuple(f"g{n}" for n in range(5))
ITEMS = ("a", "b", "c", "d")
NOT_APPLIED = ("overloaded", "too_many_calls", "worker_overloaded")
"""Codes of errors that say that nothing was done, beside `STREAM_…_ERROR`."""

_CALLS_AT_ONCE = 4
_AWAY = (OSError, WebSocketException, AssertionError, TimeoutError, EOFError)
"""What connecting and sending raise while the other end is gone, AssertionError of `next`."""

now = time.monotonic


class Lost(Exception):
    """The connection ended before the answer."""


class Session(Worker):
    """A worker whose calls fail at once when its connection is lost."""

    def _keep(self, frame: Any) -> None:
        if isinstance(frame, Closed):
            for waiter in self._calls.values():
                if not waiter.done():
                    waiter.set_exception(Lost)
                    waiter.exception()  # seen: whoever sent it may have failed to
        super()._keep(frame)

    @property
    def lost(self) -> bool:
        return any(isinstance(frame, Closed) for frame in self.waiting)


class Log:
    """The records of a run, and when everybody is to stop."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.stopping = asyncio.Event()
        self.over = False
        """Whether nothing counts any more."""

    def add(self, record: Record) -> None:
        if not self.over:
            self.records.append(record)

    async def pause(self, seconds: float) -> None:
        """Sleep, unless everybody is to stop."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.stopping.wait()


class Writer:
    """Calls everything that there is, some at once, over one connection after the other."""

    def __init__(self, name: str, url: str, log: Log, rng: random.Random) -> None:
        self._name, self._url, self._log, self._rng = name, url, log, rng
        self._sessions = self._calls = 0
        self.answered = 0

    async def run(self) -> None:
        while not self._log.stopping.is_set():
            try:
                session = await Session.open(self._url)
            except _AWAY:
                await self._log.pause(0.1)
                continue
            self._sessions += 1
            try:
                await self._use(session)
            finally:
                with suppress(*_AWAY):
                    await session.abort()

    async def _use(self, session: Session) -> None:
        name, order = f"{self._name}.{self._sessions}", 0
        waiting: set[asyncio.Task[None]] = set()
        while not self._log.stopping.is_set() and not session.lost:
            order += 1
            call, data = self._call(name, order)
            self._log.add(call)
            call.began = now()
            if call.function in ("set", "delete", "send") and self._rng.random() < 0.1:
                with suppress(ConnectionClosed):
                    await session.void(f"stream::{call.function}", data)
            else:
                task = asyncio.create_task(self._answer(session, call, data))
                waiting.add(task)
                task.add_done_callback(waiting.discard)
                if len(waiting) >= _CALLS_AT_ONCE:
                    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            await self._log.pause(self._rng.choice((0, 0.005, 0.02)))
        if waiting:
            await asyncio.wait(waiting)

    async def _answer(self, session: Session, call: Call, data: Any) -> None:
        with suppress(Lost, ConnectionClosed):
            answer = await session.call(f"stream::{call.function}", data, patience_s=60.0)
            call.ended = now()
            if "error" not in answer:
                call.outcome, call.result = "ok", answer.get("result")
                self.answered += 1
                return
            code = answer["error"]["code"]
            if code in NOT_APPLIED or code.startswith("STREAM_"):
                call.outcome = "refused"
            else:
                assert code == "shard_unavailable", answer

    def _call(self, session: str, order: int) -> tuple[Call, Any]:
        rng = self._rng
        self._calls += 1
        stream, group, item_id = rng.choice(STREAMS), rng.choice(GROUPS), rng.choice(ITEMS)
        functions: tuple[Function, ...] = ("set", "update", "delete", "get", "list", "send")
        (function,) = rng.choices(functions, (30, 30, 15, 10, 5, 10))
        call = Call(
            id=f"{self._name}-{self._calls}",
            session=session,
            order=order,
            stream=stream,
            group=group,
            function=function,
            item=None if function in ("list", "send") else item_id,
            began=0.0,
        )
        names = {"stream_name": stream, "group_id": group}
        match function:
            case "list":
                return call, names
            case "send":
                call.data = {"by": call.id}
                return call, {**names, "type": "t", "data": call.data}
            case "set":
                call.data = {"by": call.id, "n": order, "x": "x" * rng.choice((0, 100, 5000))}
                return call, item(stream, group, item_id, data=call.data)
            case "update":
                call.ops = [
                    {"type": "set", "path": "by", "value": call.id},
                    {"type": "increment", "path": "n", "by": 1},
                ]
                return call, item(stream, group, item_id, ops=call.ops)
        return call, item(stream, group, item_id)


class Subscriber:
    """Watches one group or item over all its reconnects, and goes on where it was, or not."""

    def __init__(self, name: str, url: str, log: Log, rng: random.Random) -> None:
        self.name, self._url, self._log, self._rng = name, url, log, rng
        self.stream, self.group = rng.choice(STREAMS), rng.choice(GROUPS)
        self.item = rng.choice((None, None, rng.choice(ITEMS)))
        self._resumes = rng.random() < 0.7
        self.seq: int | None = None
        self._epoch: str | None = None
        self.live = False

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            try:
                async with await StreamClient.open(self._url) as client:
                    await self._watch(client)
            except _AWAY:
                pass
            finally:
                self._log.add(Leave(subscriber=self.name, at=now()))
                self.live = False
            await asyncio.sleep(self._rng.choice((0.05, 0.3)))

    async def _watch(self, client: StreamClient) -> None:
        since, epoch = (self.seq, self._epoch) if self._resumes else (None, None)
        join = Join(
            subscriber=self.name,
            at=now(),
            stream=self.stream,
            group=self.group,
            item=self.item,
            since=since,
            epoch=epoch,
        )
        self._log.add(join)
        given = {"since": since, "epoch": epoch, "id": self.item}
        fields = {name: value for name, value in given.items() if value is not None}
        await client.send_join(self.stream, self.group, self.name, **fields)
        end = now() + self._rng.choice((2.0, 10.0, 1e9))
        while (left := end - now()) > 0 or self._log.stopping.is_set():
            frame = await self._next(client, left if left > 0 else 1e9)
            if frame is None:
                continue
            if isinstance(frame, Closed):
                return
            event = frame["event"]
            if event["type"] == "error":
                if not self.live:
                    return  # the join was refused: again
                continue  # the sync that takes the place of what was missed comes later
            self._take(frame, event)

    async def _next(self, client: StreamClient, left_s: float) -> Any:
        with suppress(TimeoutError):
            async with asyncio.timeout(left_s):
                return await client.next(patience_s=1e9)
        return None

    def _take(self, frame: dict[str, Any], event: dict[str, Any]) -> None:
        kind = event["type"]
        custom = event["event"] if kind == "event" else {}
        self._log.add(
            Frame(
                subscriber=self.name,
                at=now(),
                kind=kind,
                seq=frame["seq"],
                timestamp=frame["timestamp"],
                item=frame["id"],
                epoch=frame.get("epoch"),
                data=custom.get("data") if custom else event.get("data"),
                ids=event.get("ids"),
                name=custom.get("type"),
            )
        )
        self.seq, self.live = frame["seq"], True
        self._epoch = frame.get("epoch", self._epoch)


class Watcher:
    """A worker with a function that a `stream` trigger calls."""

    def __init__(self, name: str, url: str, log: Log, rng: random.Random) -> None:
        self._name, self._url, self._log = name, url, log
        self._stream = rng.choice(STREAMS)
        self._group = rng.choice((None, rng.choice(GROUPS)))
        self.item = rng.choice((None, None, rng.choice(ITEMS)))
        self._sessions = 0

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            with suppress(*_AWAY, Lost):
                await self._serve()
            await asyncio.sleep(0.1)

    async def _serve(self) -> None:
        async with await Session.open(self._url) as session:
            self._sessions += 1
            name = f"{self._name}.{self._sessions}"
            await session.register_function(name, lambda i: self._fired(name, i))
            config = {"stream_name": self._stream, "group_id": self._group, "item_id": self.item}
            given = {key: value for key, value in config.items() if value is not None}
            await session.register_trigger("stream", name, given)
            if "error" in await session.call("stream::list_all", {}):  # a shard is away
                return
            stands = Trigger(
                trigger=name,
                at=now(),
                stream=self._stream,
                group=self._group,
                item=self.item,
            )
            self._log.add(stands)
            try:
                await session.next(lambda frame: isinstance(frame, Closed), 1e9)
                stands.until = now()
            finally:
                await session.abort()

    def _fired(self, name: str, invocation: Invocation) -> None:
        frame = invocation.data
        event = frame["event"]
        custom = event["event"] if event["type"] == "event" else {}
        self._log.add(
            Fired(
                trigger=name,
                at=now(),
                stream=frame["streamName"],
                group=frame["groupId"],
                kind=event["type"],
                seq=frame["seq"],
                timestamp=frame["timestamp"],
                item=frame["id"],
                data=custom.get("data") if custom else event.get("data"),
                name=custom.get("type"),
            )
        )


Actor = Writer | Subscriber | Watcher
Make = Callable[[str, str, Log, random.Random], Actor]
