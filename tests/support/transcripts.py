"""Replay of transcripts of the worker port: `golden/worker_wire.json` and `sdk_*_trace.json`.

A transcript is a list of frames: `c` is the connection, `dir` is `>` for what the client sent and
`<` for what it got, then one of `json`, `text`, `binary` (latin-1), `close`, `abort`. What was sent
is sent; what came must come. `<uuid:N>` is learnt from the first frame that comes with it and put
into the frames that are sent.

The broker may choose the ids with which it forwards calls, so the recorded id of a forwarded call
stands for the one that came, on that connection. Answers may come in any order, and other frames
between them: a frame that came is looked up by its kind and what it is about, and those that are
alike are compared in order. At the end nothing may be left over.

Before a frame is sent on one connection, a round trip is made on the others that sent something, so
that frames of different connections take effect in the recorded order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from tests.support.compare import (
    Bindings,
    assert_same,
    assert_same_error,
    filled,
    without_doc_url,
)
from tests.support.connection import PATIENCE_S, Closed, Connection
from tests.support.worker import Worker

Frame = dict[str, Any]
Check = Callable[[Any], None]
"""Given the message that came, fails unless it is right. Stands as `check` beside `json`."""

ANY_NUMBER_OF = {"active_invocations"}  # the original does not count alike each time
ENGINE_BAGGAGE = ",iii.function.id="  # what the original adds to the baggage of a forwarded call


class Transcript:
    """One replay on a broker's worker port. `observer` is a worker that takes no part in it."""

    def __init__(self, url: str, observer: Worker, paths: dict[Any, str] | None = None) -> None:
        self.url = url.rstrip("/")
        self.observer = observer
        self.paths = paths or {}
        self.bindings = Bindings()
        self.connections: dict[Any, Connection] = {}
        self.unsettled: set[Any] = set()
        self.ending: dict[Any, int] = {}  # the code with which the client closed
        self.forwarded: dict[tuple[Any, str], list[str]] = {}
        self.worker_ids: dict[Any, str] = {}

    async def replay(self, frames: Iterable[Frame], what: str) -> None:
        """Send and compare all of `frames`. `do` is a coroutine function to run at that place."""
        for index, frame in enumerate(frames):
            if "connect" in frame:
                await self.connection(frame["c"])
            if "do" in frame:
                await self._settle_others(None)
                await frame["do"]()
            if "dir" not in frame:
                continue
            where = f"{what}, frame {index}: {str(frame)[:300]}"
            if frame["dir"] == ">":
                await self._settle_others(frame["c"])
                await self._send(frame)
            else:
                await self._receive(frame, where)

    async def finish(self, what: str, ignored: Callable[[Any], bool] | None = None) -> None:
        """Wait until nothing more comes; fail if something came that was not expected."""
        await self._settle_others(None)
        living = [c for c in self.connections.values() if not _ended(c)]
        await asyncio.gather(*(connection.quiet() for connection in living))
        for name, connection in self.connections.items():
            left = [frame for frame in connection.waiting if not isinstance(frame, Closed)]
            if ignored is not None:
                left = [frame for frame in left if not ignored(frame)]
            assert left == [], f"{what}: came besides on {name}: {left}"

    async def close(self) -> None:
        """Close every connection and wait until the broker has forgotten their workers."""
        await asyncio.gather(*(connection.close() for connection in self.connections.values()))
        for name in list(self.worker_ids):
            await self._forgotten(name)

    async def connection(self, name: Any) -> Connection:
        if name not in self.connections:
            url = self.url + self.paths.get(name, "/")
            self.connections[name] = await Connection.open(url)
        return self.connections[name]

    async def _settle_others(self, name: Any) -> None:
        for other in self.unsettled - {name}:
            connection = self.connections[other]
            if self.paths.get(other, "/") == "/":
                await connection.send({"type": "ping"})
                await connection.next(lambda frame: frame == {"type": "pong"})
            else:
                await connection.ping()
        self.unsettled &= {name}

    async def _send(self, frame: Frame) -> None:
        name = frame["c"]
        connection = await self.connection(name)
        self.unsettled.add(name)
        if "json" in frame:
            await connection.send(self._outgoing(name, frame["json"]))
        elif "text" in frame:
            await connection.send_text(frame["text"])
        elif "binary" in frame:
            await connection.send_binary(frame["binary"].encode("latin-1"))
        else:
            self.unsettled.discard(name)
            if "close" in frame:
                self.ending[name] = frame["close"]["code"]
                await connection.close(frame["close"]["code"])
            else:
                self.ending[name] = 1006
                await connection.abort()
            await self._forgotten(name)

    def _outgoing(self, name: Any, message: Any) -> Any:
        if isinstance(message, dict) and message.get("type") == "invocationresult":
            ids = self.forwarded.get((name, message["invocation_id"]), [])
            if ids:
                actual = ids.pop(0) if len(ids) > 1 else ids[0]
                message = message | {"invocation_id": actual}
        return filled(message, self.bindings)

    async def _receive(self, frame: Frame, what: str) -> None:
        name = frame["c"]
        connection = await self.connection(name)
        if "close" in frame:
            closed = await connection.next(lambda came: isinstance(came, Closed))
            expected = self.ending.get(name)
            assert expected in (None, closed.code), f"{what}: {closed}"
            return
        expected = self._expected(frame["json"])
        try:
            came = await connection.next(lambda came: _alike(expected, came, self.bindings))
        except AssertionError as error:
            raise AssertionError(f"{what}: {error}") from None
        if expected.get("type") == "workerregistered":
            self.worker_ids[name] = came["worker_id"]
        if expected.get("type") == "invokefunction":
            ids = self.forwarded.setdefault((name, expected["invocation_id"]), [])
            ids.append(came["invocation_id"])
            came = came | {"invocation_id": expected["invocation_id"]}
            expected = expected | {"invocation_id": "<uuid>"}
        if "check" in frame:
            frame["check"](came)
        else:
            self._compare(expected, came, what)

    def _expected(self, message: Any) -> Any:
        """The recorded message with what may be another value or is not needed left open."""
        if isinstance(message, dict):
            opened = {key: self._expected(value) for key, value in message.items()}
            opened |= dict.fromkeys(ANY_NUMBER_OF & opened.keys(), "<number>")
            if isinstance(baggage := opened.get("baggage"), str):
                opened["baggage"] = baggage.split(ENGINE_BAGGAGE)[0]
            return opened
        return [self._expected(one) for one in message] if isinstance(message, list) else message

    def _compare(self, expected: Any, came: Any, what: str) -> None:
        expected, came = dict(expected), dict(came)
        if "error" in expected and "error" in came:
            assert_same_error(expected.pop("error"), came.pop("error"), what)
        if expected.get("type") == "invocationresult" and "error" not in expected | came:
            for message in (expected, came):
                message["result"] = without_doc_url(message.get("result"))
        data = came.get("data")
        if isinstance(data, dict) and data.get("type") == "stream":  # an event, see protocol 5.4
            more = ("seq",)
            assert_same(expected.pop("data"), came.pop("data"), what, self.bindings, more)
        assert_same(expected, came, what, self.bindings)

    async def _forgotten(self, name: Any) -> None:
        """Wait until the worker of a connection that ended is not listed any more."""
        worker_id = self.worker_ids.pop(name, None)
        async with asyncio.timeout(PATIENCE_S):
            while worker_id is not None:
                listed = await self.observer.call("engine::workers::list", {})
                if worker_id not in {worker["id"] for worker in listed["result"]["workers"]}:
                    return
                await asyncio.sleep(0.01)


def _alike(expected: Any, came: Any, bindings: Bindings) -> bool:
    """Of the same kind, and about the same thing: a call, a function, a trigger."""
    if not isinstance(came, dict) or came.get("type") != expected["type"]:
        return False
    about = {"invocationresult": "invocation_id", "invokefunction": "function_id"}
    key = about.get(expected["type"], "id")
    wanted = expected.get(key)
    if isinstance(wanted, str) and wanted.startswith("<uuid:"):
        wanted = bindings.get(wanted.strip("<>"), came.get(key))
    return bool(wanted == came.get(key))


def _ended(connection: Connection) -> bool:
    return bool(connection.received) and isinstance(connection.received[-1], Closed)


def result_frame(c: Any, invocation_id: str, function_id: str, **answer: Any) -> Frame:
    """An expected `invocationresult`: `result=…`, `error=…` or neither."""
    message = {
        "type": "invocationresult",
        "invocation_id": invocation_id,
        "function_id": function_id,
    }
    return {"c": c, "dir": "<", "json": message | answer}
