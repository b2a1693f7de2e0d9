"""A raw client of the worker port (protocol sections 2 to 4)."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import ssl
import uuid
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

from websockets.exceptions import ConnectionClosed

from tests.support.connection import PATIENCE_S, Closed, Connection

ABSENT = object()
"""As `data`: the field is left out of the frame."""

NOTHING = object()
"""As what a handler returns: the result frame has neither `result` nor `error`."""


class Failure(NamedTuple):
    """As what a handler returns: an error with this code and message."""

    code: str
    message: str
    stacktrace: str | None = None


class Invocation(NamedTuple):
    """What the broker asked this worker to run; `frame` is the whole message."""

    function_id: str
    data: Any
    frame: dict[str, Any]

    @property
    def metadata(self) -> Any:
        """The message's `metadata`, `ABSENT` when it had none."""
        return self.frame.get("metadata", ABSENT)


Handler = Callable[[Invocation], Any]
"""Returns, or is a coroutine function that returns, the result, `NOTHING` or a `Failure`."""


class Worker(Connection):
    """A worker: calls functions, serves functions and triggers.

    `answers` to its own calls and the invocations of functions that it registered with a handler
    are dealt with; everything else waits for `next`. `invocations` and `log` keep what the
    handlers were asked, in order; `log` holds `("asked", id)` and `("answered", id)`.
    """

    worker_id: str
    reattach_token: str

    @classmethod
    async def open(
        cls,
        url: str,
        headers: Mapping[str, str] | None = None,
        subprotocols: list[str] | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> Self:
        """Connect and take the greeting. Raises ConnectionResetError when it is cut before that."""
        worker = await super().open(url, headers, subprotocols, tls)
        worker.handlers = {}
        worker.invocations = []
        worker.log = []
        worker._calls = {}
        worker._running = set()
        greeting = await worker.next()
        if isinstance(greeting, Closed):
            raise ConnectionResetError(greeting)
        assert greeting["type"] == "workerregistered", greeting
        worker.worker_id = greeting["worker_id"]
        worker.reattach_token = greeting["reattach_token"]
        return worker

    handlers: dict[str, Handler]
    invocations: list[Invocation]
    log: list[tuple[str, str]]
    _calls: dict[str, asyncio.Future[dict[str, Any]]]
    _running: set[asyncio.Task[None]]

    def _keep(self, frame: Any) -> None:
        if isinstance(frame, dict):
            kind = frame.get("type")
            if kind == "invocationresult":
                waiter = self._calls.pop(frame["invocation_id"], None)
                if waiter is not None and not waiter.done():
                    waiter.set_result(frame)
                    return
            if kind == "invokefunction" and frame["function_id"] in self.handlers:
                invocation = Invocation(frame["function_id"], frame["data"], frame)
                self.invocations.append(invocation)
                self.log.append(("asked", invocation.function_id))
                task = asyncio.create_task(self._serve(invocation))
                self._running.add(task)
                task.add_done_callback(self._running.discard)
                self._arrived.set()
                return
        super()._keep(frame)

    async def _serve(self, invocation: Invocation) -> None:
        returned = self.handlers[invocation.function_id](invocation)
        if inspect.isawaitable(returned):
            returned = await returned
        answer = {
            "type": "invocationresult",
            "invocation_id": invocation.frame["invocation_id"],
            "function_id": invocation.function_id,
        }
        if isinstance(returned, Failure):
            error = returned._asdict()
            answer["error"] = {key: value for key, value in error.items() if value is not None}
        elif returned is not NOTHING:
            answer["result"] = returned
        self.log.append(("answered", invocation.function_id))
        with contextlib.suppress(ConnectionClosed):
            await self.send(answer)

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """As of any connection; handlers that did not answer yet are given up."""
        for task in self._running:
            task.cancel()
        await super().close(code, reason)

    async def call(
        self, function_id: str, data: Any = ABSENT, patience_s: float = PATIENCE_S, **fields: Any
    ) -> dict[str, Any]:
        """Call a function: `{"result": …}`, `{"error": …}`, or `{}` when it had neither.

        `fields` are further fields of the message, such as `namespace`.
        """
        frame = await self.call_frame(function_id, data, patience_s, **fields)
        assert frame["function_id"] == function_id, frame
        return {key: frame[key] for key in ("result", "error") if key in frame}

    async def call_frame(
        self, function_id: str, data: Any = ABSENT, patience_s: float = PATIENCE_S, **fields: Any
    ) -> dict[str, Any]:
        """As `call`, returns the whole `invocationresult`."""
        invocation_id = fields.pop("invocation_id", None) or str(uuid.uuid4())
        waiter = asyncio.get_running_loop().create_future()
        self._calls[invocation_id] = waiter
        await self.void(
            function_id, data, invocation_id=invocation_id, **{"action": None, **fields}
        )
        try:
            async with asyncio.timeout(patience_s):
                frame: dict[str, Any] = await waiter
        except TimeoutError:
            raise AssertionError(f"{function_id} was not answered") from None
        return frame

    async def void(self, function_id: str, data: Any = ABSENT, **fields: Any) -> None:
        """Call a function without an answer."""
        message = {"type": "invokefunction", "function_id": function_id, "action": {"type": "void"}}
        message |= fields
        if data is not ABSENT:
            message["data"] = data
        await self.send({key: value for key, value in message.items() if key != "action" or value})

    async def describe(self, name: str, **fields: Any) -> None:
        """Send the metadata of this worker (protocol section 2.3)."""
        data = {"name": name, "runtime": "test", "version": "1.0", "os": "x", "pid": 1} | fields
        assert await self.call("engine::workers::register", data) == {"result": {"success": True}}

    async def register_function(self, function_id: str, handler: Handler, **fields: Any) -> None:
        self.handlers[function_id] = handler
        await self.send({"type": "registerfunction", "id": function_id, **fields})

    async def unregister_function(self, function_id: str) -> None:
        await self.send({"type": "unregisterfunction", "id": function_id})

    async def register_trigger(
        self, trigger_type: str, function_id: str, config: Any = ABSENT, **fields: Any
    ) -> str:
        """Ask for a trigger, return its id. A refusal comes as a frame of its own."""
        trigger_id = fields.pop("id", None) or str(uuid.uuid4())
        message = {
            "type": "registertrigger",
            "id": trigger_id,
            "trigger_type": trigger_type,
            "function_id": function_id,
            **fields,
        }
        if config is not ABSENT:
            message["config"] = config
        await self.send(message)
        return trigger_id

    async def unregister_trigger(self, trigger_id: str, **fields: Any) -> None:
        await self.send({"type": "unregistertrigger", "id": trigger_id, **fields})

    async def barrier(self) -> None:
        """Return when the broker has dealt with every message that was sent before."""
        await self.send({"type": "ping"})
        await self.next(lambda frame: frame == {"type": "pong"})

    async def until(self, holds: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
        """Return when `holds()`, which is looked at again whenever something came."""
        async with asyncio.timeout(patience_s):
            while not holds():
                self._arrived.clear()
                await self._arrived.wait()

    async def asked(self, count: int, patience_s: float = PATIENCE_S) -> list[Invocation]:
        """Take the first `count` invocations that handlers were asked, waiting for them."""
        try:
            await self.until(lambda: len(self.invocations) >= count, patience_s)
        except TimeoutError:
            raise AssertionError(f"{count} invocations expected: {self.invocations}") from None
        taken, self.invocations = self.invocations[:count], self.invocations[count:]
        return taken

    async def idle(self) -> None:
        """Return when every running handler has answered."""
        while self._running:
            await asyncio.gather(*self._running)
