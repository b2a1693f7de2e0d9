"""Replay of the scenes of `golden/stream_wire.json` and `golden/triggers.json`.

A scene's `steps` are of two kinds. Some are done: a client connects, sends, pings, closes; a worker
registers, unregisters or calls. The others came of it: frames (`recv`, `pong`, `closed`) and
`invoked` functions. After every step that is done the replay waits for what came of it, and where
nothing did, until it is certain that nothing comes. The frames of one client are compared in order,
and so are the invocations of the worker; the order between them is not promised.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.support.broker import Broker
from tests.support.compare import (
    assert_in_order,
    assert_same,
    assert_same_answer,
    assert_same_error,
)
from tests.support.connection import Closed
from tests.support.stream_client import StreamClient, settled
from tests.support.worker import ABSENT, NOTHING, Failure, Handler, Worker

Step = dict[str, Any]
Check = Callable[[Any], None]
"""Given a frame, fails unless it is right. In a scene it stands as `{"client", "check"}`."""

_CAME = {"recv", "check", "pong", "closed", "invoked"}
CLOSED_IN_ORDER = 1000


@dataclass
class Scene:
    """One replay: its connections, and what was registered."""

    broker: Broker
    caller: Worker  # calls the stream functions
    server: Worker  # registers functions and triggers
    clients: dict[str, StreamClient] = field(default_factory=dict)
    pongs: dict[str, list[str]] = field(default_factory=dict)
    groups: set[tuple[str, str]] = field(default_factory=set)
    any_order: bool = False  # of the invocations that come of one step
    trigger_id: str = ""
    trigger_ids: list[str] = field(default_factory=list)

    async def replay(self, name: str, steps: Sequence[Step], same_trigger_id: bool = False) -> None:
        """Do the steps and compare. `same_trigger_id`: every trigger is registered with one id."""
        done: Step | None = None
        came: list[Step] = []
        for step in [*steps, {"end": True}]:
            if step.keys() & _CAME:
                came.append(step)
                continue
            if done is not None:
                await self._do(done, same_trigger_id)
                if came or not _goes_on(done, step):
                    await self._compare(came, f"{name}, after {repr(done)[:200]}")
            done, came = step, []
        await settled(self._open(), self.server, self.groups)
        for client in self.clients.values():
            left = [frame for frame in client.waiting if not isinstance(frame, Closed)]
            assert left == [], f"{name}: came besides: {left}"
            assert_in_order(client.frames, name)
        assert self.server.invocations == [], f"{name}: {self.server.invocations}"

    def _open(self) -> list[StreamClient]:
        return [client for client in self.clients.values() if not _ended(client)]

    async def _do(self, step: Step, same_trigger_id: bool) -> None:
        if "call" in step:
            await self._call(step)
        elif "register_trigger" in step:
            await self._register(step, same_trigger_id)
        elif "unregister_trigger" in step:
            await self.server.unregister_trigger(self.trigger_id, **step["unregister_trigger"])
            await self.server.barrier()
        elif "connect" in step:
            url = self.broker.stream_url.rstrip("/") + step["connect"]
            self.clients[step["client"]] = await StreamClient.open(url)
        elif "client" in step:
            await self._send(step)
        else:
            assert step.keys() <= {"note"}, f"unknown step {step}"

    async def _send(self, step: Step) -> None:
        client = self.clients[step["client"]]
        if "send" in step:
            await client.send(step["send"])
            self._remember(step["send"])
        elif "send_text" in step:
            await client.send_text(step["send_text"])
        elif "send_binary" in step:
            await client.send_binary(step["send_binary"])
        elif "ping" in step:
            await client.ping(step["ping"])
            self.pongs.setdefault(step["client"], []).append(step["ping"])
        else:
            await client.close(step["close"], step.get("reason", ""))

    def _remember(self, message: Any) -> None:
        data = message.get("data") if isinstance(message, dict) else None
        if isinstance(data, dict):
            stream, group = data.get("streamName"), data.get("groupId")
            if isinstance(stream, str) and isinstance(group, str):
                self.groups.add((stream, group))

    async def _call(self, step: Step) -> None:
        call = step["call"]
        self.groups.add((call["payload"]["stream_name"], call["payload"]["group_id"]))
        answer = await self.caller.call(call["function_id"], call["payload"])
        if "answer" not in step:  # the original did not answer any more
            assert "error" not in answer, answer
        else:
            assert_same_answer(step["answer"], answer, repr(call)[:200])

    async def _register(self, step: Step, same_trigger_id: bool) -> None:
        trigger = step["register_trigger"]
        fields = {key: trigger[key] for key in ("metadata",) if key in trigger}
        if same_trigger_id and self.trigger_id:
            fields["id"] = self.trigger_id
        self.trigger_id = await self.server.register_trigger(
            trigger["trigger_type"], trigger["function_id"], trigger.get("config", ABSENT), **fields
        )
        self.trigger_ids.append(self.trigger_id)
        await self.server.barrier()
        if not step["answered"]:
            assert self.server.waiting == [], self.server.waiting
            return
        result = await self.server.next()
        assert result.keys() == {"type", "id", "trigger_type", "function_id", "error"}, result
        assert result["type"] == "triggerregistrationresult"
        assert result["id"] == self.trigger_id
        assert result["function_id"] == trigger["function_id"]
        assert_same_error(step["registration_error"], result["error"])
        if named := step.get("naming"):
            assert named in result["error"]["message"], result

    async def _compare(self, came: list[Step], what: str) -> None:
        if not came:
            await settled(self._open(), self.server, self.groups)
        for step in came:
            if "invoked" in step:
                continue
            client = self.clients[step["client"]]
            if "pong" in step:
                assert self.pongs[step["client"]].pop(0) == step["pong"], what
            elif "check" in step:
                step["check"](await client.next())
            elif "closed" in step:
                closed = await client.next()
                assert isinstance(closed, Closed), f"{what}: {closed}"
                assert closed.code == step["closed"]["code"], f"{what}: {closed}"
            else:
                assert_same(step["recv"], await client.next(), what, more=("seq", "epoch"))
        invoked = [step["invoked"] for step in came if "invoked" in step]
        asked = await self.server.asked(len(invoked))
        if self.any_order:
            asked.sort(key=lambda invocation: invocation.data["group_id"])
        for expected, invocation in zip(invoked, asked, strict=True):
            assert invocation.function_id == expected["function_id"], f"{what}: {asked}"
            assert_same(expected["data"], invocation.data, what, more=("seq",))
            assert_same(expected.get("metadata"), invocation.frame.get("metadata"), what)

    async def clean(self, function_ids: Sequence[str]) -> None:
        """Remove what the scene registered, end its clients."""
        for trigger_id in self.trigger_ids:
            await self.server.unregister_trigger(trigger_id)
        await self.server.barrier()
        await asyncio.gather(*(client.close() for client in self.clients.values()))
        for function_id in function_ids:
            await self.server.unregister_function(function_id)
        await self.server.barrier()
        await self.server.idle()
        self.server.handlers.clear()
        self.server.invocations.clear()
        self.server.log.clear()
        self.server.waiting.clear()


def _goes_on(done: Step, following: Step) -> bool:
    """Both are frames of one client: the broker takes them in order, nothing to wait for."""
    return "send" in done and "send" in following and done["client"] == following["client"]


def _ended(client: StreamClient) -> bool:
    return bool(client.received) and isinstance(client.received[-1], Closed)


def returned(value: Any) -> Any:
    """What a handler returns for a recorded `returns`."""
    if value == "<nothing>":
        return NOTHING
    return Failure(**value["error"]) if "error" in value else value["result"]


def handlers_of(steps: Sequence[Step], more: Mapping[str, Any]) -> dict[str, Handler]:
    """The functions that a scene's worker serves: what it returned, in order, then null.

    `more` gives functions that the recording does not show being asked, and what they return.
    Functions whose id begins with `no::` are those that do not exist.
    """
    answers: dict[str, list[Any]] = {name: [value] for name, value in more.items()}
    for step in steps:
        if "register_trigger" in step:
            trigger = step["register_trigger"]
            answers.setdefault(trigger["function_id"], [])
            config = trigger.get("config")
            if isinstance(config, dict) and (condition := config.get("condition_function_id")):
                answers.setdefault(condition, [])
    for step in steps:
        if "invoked" in step and (name := step["invoked"]["function_id"]) not in more:
            answers.setdefault(name, []).append(returned(step["returns"]))
    return {
        name: one_after_the_other(left)
        for name, left in answers.items()
        if not name.startswith("no::")
    }


def one_after_the_other(answers: list[Any]) -> Handler:
    """A handler that returns these, and null when there are none left."""
    return lambda _: answers.pop(0) if answers else None
