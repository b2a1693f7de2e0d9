"""What a worker that stores a stream and its shard are asked, and when; without sockets."""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

import pytest

from broker import messages
from broker.errors import BrokerError
from broker.messages import Reply, Synced
from broker.names import Group
from gateway.custom_streams import WAITING_MAX, CustomStreams, StreamCall
from gateway.functions import Functions
from gateway.invocations import Executor, Invocations
from gateway.shard_links import Answer, Answered, ShardLinks
from gateway.worker_protocol import InvocationResult, RegisterFunction, decode

GROUP = Group("s", "g")


class Shard:
    """The link to a shard that answers when it is told to."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self._answered: list[Answered] = []
        self.linked = True

    def of(self, _: Group) -> Shard:
        return self

    def next_call_id(self) -> int:
        return len(self.calls) + 1

    def call(self, message: messages.Message, _: int, answered: Answered) -> None:
        if not self.linked:
            answered(BrokerError("shard_unavailable", "not linked", retryable=True))
            return
        self.calls.append(message)
        self._answered.append(answered)

    def answer(self, answer: Answer | None = None) -> None:
        """Answer the first call that is not answered."""
        self._answered.pop(0)(answer or Reply(0, b"null"))

    @property
    def kinds(self) -> list[str]:
        """What it was asked: a change with its item, or the message's name."""
        return [
            f"{call.kind} {call.item_id}"
            if isinstance(call, messages.Publish)
            else type(call).__name__
            for call in self.calls
        ]


class StoringWorker:
    """A worker that answers when it is told to."""

    worker_id = "w"

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self._ids: list[str] = []
        self.full = False
        self.forgotten: list[str] = []

    def send_call(self, payload: bytes, invocation_id: str | None) -> bool:
        if self.full:
            return False
        assert invocation_id is not None
        self.asked.append(json.loads(payload))
        self._ids.append(invocation_id)
        return True

    def forget(self, invocation_id: str) -> None:
        self.forgotten.append(invocation_id)

    def take(self) -> str:
        return self._ids.pop(0)

    @property
    def functions(self) -> list[str]:
        return [call["function_id"] for call in self.asked]


class Scene:
    """Custom streams with one worker and one shard."""

    def __init__(self, *functions: str) -> None:
        self.functions = Functions[Executor]()
        self.invocations = Invocations(self.functions, 10_000, 30.0)
        self.worker = StoringWorker()
        self.shard = Shard()
        links = cast(ShardLinks, self.shard)
        self.custom = CustomStreams(self.functions, self.invocations, links, lambda _: None)
        for function in functions:
            self.functions.register("default", self.worker, RegisterFunction(f"stream::{function}"))
        self.answers: list[tuple[str, Any]] = []

    def call(self, name: str, call: StreamCall) -> None:
        self.custom.call(GROUP, call, lambda answer: self._answered(name, answer))

    def _answered(self, name: str, answer: Any) -> None:
        if isinstance(answer, BrokerError):
            self.answers.append((name, answer.code))
        elif isinstance(answer, Reply):
            assert answer.result is not None
            self.answers.append((name, json.loads(answer.result)))
        else:
            self.answers.append((name, type(answer).__name__))

    def set(self, item_id: str, value: int = 1) -> None:
        self.call(f"set {item_id}", messages.Set(0, *GROUP, item_id, json.dumps(value).encode()))

    def get(self, item_id: str) -> None:
        self.call(f"get {item_id}", messages.Get(0, *GROUP, item_id))

    def join(self) -> None:
        join = messages.Join(0, *GROUP, None, None)
        self.custom.join(join, lambda answer: self._answered("join", answer))

    def store(self, result: Any) -> None:
        """The worker answers the first call that it has not answered."""
        text = json.dumps({"type": "invocationresult", "invocation_id": self.worker.take()})
        message = decode(f'{text[:-1]},"result":{json.dumps(result)}}}'.encode())
        assert isinstance(message, InvocationResult)
        self.invocations.answer(self.worker, message)

    @property
    def idle(self) -> bool:
        self.functions.remove_worker(self.worker)
        return not self.custom.takes(GROUP) and not self.custom.waiting


def stored(value: int = 1, old: int | None = None) -> dict[str, Any]:
    return {"old_value": old, "new_value": value}


def run(scenario: Any) -> None:
    asyncio.run(scenario())


def test_the_worker_goes_on_while_the_shard_commits() -> None:
    """One call at a time is with the worker; who changed something waits for the shard."""

    async def scenario() -> None:
        scene = Scene("set(s)", "get(s)")
        scene.set("a")
        scene.set("b", 2)
        scene.get("a")
        assert scene.worker.functions == ["stream::set(s)"]
        assert scene.worker.asked[0]["data"] == {
            "stream_name": "s",
            "group_id": "g",
            "item_id": "a",
            "data": 1,
        }
        scene.store(stored())
        assert scene.shard.kinds == ["create a"]
        assert scene.worker.asked[1]["data"]["item_id"] == "b"
        assert scene.answers == []
        scene.store(stored(2, 0))
        assert scene.shard.kinds == ["create a", "update b"]
        scene.store(1)
        assert scene.answers == [("get a", 1)]
        scene.shard.answer()
        scene.shard.answer(BrokerError("STREAM_SEND_ERROR", "no disk"))
        assert scene.answers[1:] == [("set a", stored()), ("set b", "STREAM_SEND_ERROR")]
        assert scene.idle

    run(scenario)


def test_a_sync_is_as_of_its_place() -> None:
    """It is read after the change before it was stored, and joined after that was told; the
    change behind it is made when it was read, and told after the join."""

    async def scenario() -> None:
        scene = Scene("set(s)", "list(s)")
        scene.set("a")
        scene.join()
        scene.set("b")
        scene.store(stored())
        assert scene.worker.functions == ["stream::set(s)", "stream::list(s)"]
        assert scene.shard.kinds == ["create a"]
        scene.store([1])
        assert scene.shard.kinds == ["create a", "Join"]
        assert scene.shard.calls[1].data == b"[1]"
        assert scene.worker.functions[2:] == ["stream::set(s)"]
        scene.store(stored())
        assert scene.shard.kinds == ["create a", "Join", "create b"]
        scene.shard.answer()
        scene.shard.answer(Synced(0, 1, "e", b"{}"))
        scene.shard.answer()
        assert [name for name, _ in scene.answers] == ["set a", "join", "set b"]
        assert scene.idle

    run(scenario)


def test_another_gateway_reads_what_the_shard_has() -> None:
    """It joins over its own link: what was told over ours has to be with the shard before."""

    async def scenario() -> None:
        scene = Scene("set(s)", "list(s)")
        released = asyncio.Event()
        scene.set("a")
        scene.custom.read_here(
            GROUP, None, lambda answer: scene._answered("read", answer), released
        )
        scene.set("b")
        scene.store(stored())
        assert scene.worker.functions == ["stream::set(s)"]
        scene.shard.answer()
        assert scene.worker.functions == ["stream::set(s)", "stream::list(s)"]
        scene.store([1])
        assert scene.answers[1:] == [("read", [1])]
        for _ in range(5):
            await asyncio.sleep(0)
        assert len(scene.worker.asked) == 2  # held
        released.set()
        while len(scene.worker.asked) == 2:
            await asyncio.sleep(0)
        scene.store(stored())
        scene.shard.answer()
        assert scene.answers[2:] == [("set b", stored())]
        assert scene.idle

    run(scenario)


def test_a_group_is_done_here_until_the_shard_answered() -> None:
    """Whoever stores the stream from now on, also elsewhere, comes after what is under way."""

    async def scenario() -> None:
        scene = Scene("set(s)")
        scene.set("a")
        scene.store(stored())
        scene.functions.remove_worker(scene.worker)
        assert scene.custom.takes(GROUP)
        assert scene.custom.waiting == 0
        scene.set("b")  # in the built-in storage, behind what was told
        assert scene.shard.kinds == ["create a", "Set"]
        scene.shard.answer()
        assert scene.custom.takes(GROUP)
        scene.shard.answer(Reply(0, b'{"old_value":null,"new_value":1}'))
        assert not scene.custom.takes(GROUP)
        assert scene.answers == [("set a", stored()), ("set b", stored())]

    run(scenario)


@pytest.mark.parametrize("fault", ["full", "gone"])
def test_all_that_waits_may_fail_at_once(fault: str) -> None:
    """The longest queue there can be: its operations end one after the other, not nested."""

    async def scenario() -> None:
        scene = Scene("set(s)")
        for number in range(WAITING_MAX):
            scene.set(str(number))
        assert scene.custom.waiting == WAITING_MAX
        scene.set("one too many")
        assert scene.answers == [("set one too many", "overloaded")]
        assert scene.custom.refused_total == 1
        if fault == "full":
            scene.worker.full = True
            scene.store(stored())
            scene.shard.answer()
            assert scene.answers[-1] == ("set 0", stored())
            assert {code for _, code in scene.answers[1:-1]} == {"STREAM_SET_ERROR"}
        else:
            scene.shard.linked = False
            scene.functions.remove_worker(scene.worker)
            scene.invocations.remove_worker(scene.worker)
            codes = [code for _, code in scene.answers[1:]]
            assert codes == ["STREAM_SET_ERROR"] + ["shard_unavailable"] * (WAITING_MAX - 1)
        told = [int(name.split()[1]) for name, _ in scene.answers[1:]]
        assert sorted(told) == list(range(WAITING_MAX))
        assert scene.idle

    run(scenario)


def test_a_worker_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its call ends with an error, and the next one begins."""
    monkeypatch.setattr("gateway.custom_streams.TIMEOUT_S", 0.01)

    async def scenario() -> None:
        scene = Scene("get(s)", "set(s)")
        scene.get("a")
        scene.set("b")
        while not scene.answers:
            await asyncio.sleep(0.005)
        assert scene.answers == [("get a", "timeout")]
        assert len(scene.worker.forgotten) == 1
        assert len(scene.worker.asked) == 2
        scene.worker.take()
        scene.store(stored())
        scene.shard.answer()
        while not scene.idle:
            await asyncio.sleep(0.005)

    run(scenario)
