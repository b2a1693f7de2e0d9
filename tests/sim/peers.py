"""Workers and clients of a simulated broker, each a process of its own, that record what they see.

They speak the protocols by hand, as a program without an SDK would.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import msgspec

from tests.sim.history import Call, Fired, Frame, Join, Leave, Record, Trigger
from tests.sim.loop import SimLoop, World

STREAM_PORT, WORKER_PORT = "stream port", "worker port"

_encode = msgspec.json.encode
_decode = msgspec.json.decode


class Place(msgspec.Struct, frozen=True):
    """A group that is played with, and the items in it."""

    stream: str
    group: str
    items: tuple[str, ...]

    @property
    def names(self) -> dict[str, str]:
        return {"stream_name": self.stream, "group_id": self.group}


class Socket(asyncio.Protocol):
    """A client's end of a WebSocket.

    Args:
        message: takes each text.
        lost: told when the connection is over.
    """

    def __init__(self, message: Callable[[bytes], None], lost: Callable[[], None]) -> None:
        self._message = message
        self._lost = lost
        self._received = bytearray()
        self.opened = asyncio.get_running_loop().create_future()
        self.transport: Any = None

    @classmethod
    async def connect(
        cls, address: str, path: str, message: Callable[[bytes], None], lost: Callable[[], None]
    ) -> Socket:
        """Connect and wait for the handshake.

        Raises:
            ConnectionError: it came to nothing.
        """
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimLoop)
        _, socket = await loop.connect(lambda: cls(message, lost), address)
        socket.transport.write(
            f"GET {path} HTTP/1.1\r\nHost: broker\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
        )
        try:
            async with asyncio.timeout(10):
                await socket.opened
        except TimeoutError:
            socket.transport.abort()
            raise ConnectionError("no answer to the handshake") from None
        return socket  # type: ignore[no-any-return]

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message as a masked text frame."""
        text = _encode(message)
        size = len(text)
        if size < 126:
            head = bytes((0x81, 0x80 | size))
        elif size < 65536:
            head = b"\x81\xfe" + size.to_bytes(2, "big")
        else:
            head = b"\x81\xff" + size.to_bytes(8, "big")
        self.transport.write(head + b"\0\0\0\0" + text)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        buffer = self._received
        buffer += data
        if not self.opened.done():
            end = buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            if not buffer.startswith(b"HTTP/1.1 101"):
                self.opened.set_exception(ConnectionError("the handshake was refused"))
                return
            del buffer[: end + 4]
            self.opened.set_result(None)
        position = 0
        while len(buffer) - position >= 2:
            first, size, start = buffer[position], buffer[position + 1], position + 2
            if size == 126:
                size, start = int.from_bytes(buffer[start : start + 2], "big"), start + 2
            elif size == 127:
                size, start = int.from_bytes(buffer[start : start + 8], "big"), start + 8
            if len(buffer) < start + size:
                break
            payload = bytes(buffer[start : start + size])
            position = start + size
            match first & 15:
                case 1:
                    self._message(payload)
                case 9:
                    self.transport.write(bytes((0x8A, 0x80 | size)) + b"\0\0\0\0" + payload)
                case 8:
                    self.transport.write(bytes((0x88, 0x80 | size)) + b"\0\0\0\0" + payload)
                    self.transport.close()
        del buffer[:position]

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.opened.done():
            self.opened.set_exception(exc or ConnectionError("closed"))
            self.opened.exception()  # whoever waited may be gone
        self._lost()


class Script(msgspec.Struct, frozen=True):
    """What all peers of a run have in common.

    pause_s: about how long a worker waits between two calls.
    """

    places: tuple[Place, ...]
    record: Callable[[Record], None]
    pause_s: float
    padding_max: int


class Peer:
    """A process that keeps a connection and makes it again."""

    address = ""

    def __init__(self, world: World, name: str, script: Script) -> None:
        self.world = world
        self.name = name
        self.script = script
        self.rng = random.Random(world.rng.random())
        self.quiet = False
        """Set at the end: do nothing more on one's own."""
        self.socket: Socket | None = None
        self.loop: SimLoop | None = None
        self.path = "/"
        self._over: asyncio.Event

    def start(self) -> None:
        """Begin a life."""
        self.loop = SimLoop(self.world, self.name)
        self.loop.call_soon(self._begin)

    def kill(self) -> None:
        """End this one."""
        assert self.loop is not None, "it was started"
        self.loop.kill()
        self.disturbed()
        self.over()

    def _begin(self) -> None:
        assert self.loop is not None, "it runs on it"
        self._over = asyncio.Event()
        self.loop.create_task(self._run())

    async def _run(self) -> None:
        while True:
            self._over.clear()
            try:
                self.socket = await Socket.connect(
                    self.address, self.path, self._message, self._over.set
                )
            except OSError:
                await asyncio.sleep(0.05 + self.rng.random())
                continue
            tasks = [self._start(work) for work in self._session()]
            await self._over.wait()
            for task in tasks:
                task.cancel()
            self.over()
            await asyncio.sleep(0.02 + self.rng.random() ** 3)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(_failed)
        return task

    def _session(self) -> list[Coroutine[Any, Any, None]]:
        """What is done on a connection, beside each other."""
        raise NotImplementedError

    def _message(self, text: bytes) -> None:
        raise NotImplementedError

    def disturbed(self) -> None:
        """What comes to the peer from now on may get lost."""

    def over(self) -> None:
        """The connection is over."""
        self.socket = None


def _failed(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        task.get_loop().call_exception_handler({"message": "a task failed", "exception": error})


class Worker(Peer):
    """Makes calls, and serves triggers. Its calls in flight overlap."""

    address = WORKER_PORT

    def __init__(self, world: World, name: str, script: Script) -> None:
        super().__init__(world, name, script)
        self.calls = 0
        self._session_number = 0
        self._order = 0
        self._pending: dict[str, Call | asyncio.Future[Any]] = {}
        self._standing: list[Trigger] = []
        self._configs = self._choose_triggers()

    def _choose_triggers(self) -> list[tuple[dict[str, Any], bool]]:
        """Configs of `stream` triggers, and whether each has a condition."""
        rng, chosen = self.rng, []
        for _ in range(rng.choice([0, 1, 1, 2])):
            place = rng.choice(self.script.places)
            config: dict[str, Any] = {"stream_name": place.stream}
            if rng.random() < 0.7:
                config["group_id"] = place.group
                if rng.random() < 0.3:
                    config["item_id"] = rng.choice(place.items)
            chosen.append((config, rng.random() < 0.3))
        return chosen

    @property
    def idle(self) -> bool:
        """Whether it is connected and waits for nothing."""
        return self.socket is not None and not self._pending

    def _session(self) -> list[Coroutine[Any, Any, None]]:
        self._session_number += 1
        self._order = 0
        return [self._serve(), self._play()]

    async def _serve(self) -> None:
        """Register functions and triggers, and note when every shard knows them."""
        socket = self.socket
        assert socket is not None, "a session has one"
        configs: dict[str, dict[str, Any]] = {}
        for number, (config, has_condition) in enumerate(self._configs):
            # Of this session alone, so that no call is sent to another one again.
            function = f"{self.name}/{self._session_number}/changed{number}"
            socket.send({"type": "registerfunction", "id": function})
            if has_condition:
                config = config | {"condition_function_id": f"{function}?"}  # noqa: PLW2901
                socket.send({"type": "registerfunction", "id": f"{function}?"})
            configs[function] = config
            socket.send(
                {
                    "type": "registertrigger",
                    "id": f"{function}!",
                    "trigger_type": "stream",
                    "function_id": function,
                    "config": config,
                }
            )
        while "error" in await self.ask("stream::list_all", {}):  # some shard is not linked
            await asyncio.sleep(0.2)
        for function, config in configs.items():
            trigger = Trigger(
                trigger=function,
                at=self.world.now,
                stream=config["stream_name"],
                group=config.get("group_id"),
                item=config.get("item_id"),
            )
            self._standing.append(trigger)
            self.script.record(trigger)

    async def ask(self, function_id: str, data: dict[str, Any]) -> dict[str, Any]:
        """Call a function; the whole answer."""
        assert self.socket is not None, "there is a connection"
        self.calls += 1
        invocation_id = f"{self.name}?{self.calls}"
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._pending[invocation_id] = future
        self.socket.send(
            {
                "type": "invokefunction",
                "function_id": function_id,
                "invocation_id": invocation_id,
                "data": data,
            }
        )
        return await future

    async def _play(self) -> None:
        rng = self.rng
        while not self.quiet:
            for _ in range(rng.choice([1, 1, 1, 2, 5])):
                if len(self._pending) < 16:
                    self._call()
            await asyncio.sleep(2 * self.script.pause_s * rng.random())

    def _call(self) -> None:
        assert self.socket is not None, "there is a connection"
        rng = self.rng
        place = rng.choice(self.script.places)
        function: Any = rng.choices(
            ["set", "update", "delete", "get", "list", "send"], [6, 6, 2, 3, 2, 1]
        )[0]
        self.calls += 1
        self._order += 1
        call = Call(
            id=f"{self.name}.{self.calls}",
            session=f"{self.name}/{self._session_number}",
            order=self._order,
            stream=place.stream,
            group=place.group,
            function=function,
            began=self.world.now,
        )
        payload: dict[str, Any] = dict(place.names)
        if function not in ("list", "send"):
            payload["item_id"] = call.item = rng.choice(place.items)
        if function in ("set", "send"):
            call.data = payload["data"] = {"by": call.id, "n": 0, "pad": self._padding()}
        if function == "send":
            payload["type"] = "ping"
        if function == "update":
            by = {"type": "set", "path": "by", "value": call.id}
            call.ops = [{"type": "increment", "path": "n", "by": 1}, by]
            if rng.random() < 0.3:
                call.ops.append({"type": "append", "path": "log", "value": call.id})
            if rng.random() < 0.3:
                call.ops.append({"type": "remove", "path": "log"})
            payload["ops"] = call.ops
        message: dict[str, Any] = {
            "type": "invokefunction",
            "function_id": f"stream::{function}",
            "invocation_id": call.id,
            "data": payload,
        }
        if function not in ("get", "list") and rng.random() < 0.15:
            message["action"] = {"type": "void"}
        else:
            self._pending[call.id] = call
        self.script.record(call)
        self.socket.send(message)

    def _padding(self) -> str:
        return "x" * int(self.script.padding_max * self.rng.random() ** 6)

    def _message(self, text: bytes) -> None:
        message = _decode(text)
        match message["type"]:
            case "invocationresult":
                self._answered(message)
            case "invokefunction":
                self._invoked(message)

    def _answered(self, message: dict[str, Any]) -> None:
        waiting = self._pending.pop(message["invocation_id"])
        if isinstance(waiting, asyncio.Future):
            if not waiting.done():
                waiting.set_result(message)
            return
        waiting.ended = self.world.now
        if "error" not in message:
            waiting.outcome, waiting.result = "ok", message.get("result")
        elif message["error"]["code"].startswith("STREAM_"):  # it was not stored
            waiting.outcome = "refused"
        else:
            assert message["error"]["code"] in ("shard_unavailable", "overloaded"), message

    def _invoked(self, message: dict[str, Any]) -> None:
        function = message["function_id"]
        if not function.endswith("?"):
            event = message["data"]
            told = event["event"]
            custom = told["type"] == "event"
            self.script.record(
                Fired(
                    trigger=function,
                    at=self.world.now,
                    stream=event["streamName"],
                    group=event["groupId"],
                    kind=told["type"],
                    seq=event["seq"],
                    timestamp=event["timestamp"],
                    item=event["id"],
                    data=told["event"]["data"] if custom else told["data"],
                    name=told["event"]["type"] if custom else None,
                )
            )
        chance = self.rng.random()
        if chance < 0.5:
            self._answer(self.socket, message)
        elif chance < 0.95 or function.endswith("?"):
            # Conditions are asked about one event after the other: not so long.
            delay_s = (0.01 if function.endswith("?") else 0.5) * self.rng.random()
            loop = asyncio.get_running_loop()
            loop.call_later(delay_s, self._answer, self.socket, message)

    def _answer(self, socket: Socket | None, message: dict[str, Any]) -> None:
        if socket is not None and socket is self.socket:
            result = {"invocation_id": message["invocation_id"], "result": True}
            socket.send({"type": "invocationresult", **result})

    def disturbed(self) -> None:
        for trigger in self._standing:
            if trigger.until is None:
                trigger.until = self.world.now

    def over(self) -> None:
        super().over()
        self.disturbed()
        self._standing.clear()
        self._pending.clear()


class Subscriber(msgspec.Struct):
    """A subscription of a client over all its connections."""

    name: str
    place: Place
    item: str | None
    conflate: bool
    joined: bool = False
    synced: bool = False
    seq: int | None = None
    epoch: str | None = None


class Client(Peer):
    """Joins groups and items, at times reads nothing, goes away and comes back."""

    address = STREAM_PORT

    def __init__(self, world: World, name: str, script: Script, *, steady: bool) -> None:
        super().__init__(world, name, script)
        self._steady = steady
        count = self.rng.randint(1, len(script.places))
        self.subscribers = {
            (place.stream, place.group): Subscriber(
                f"{name}/{place.stream}/{place.group}",
                place,
                self.rng.choice(place.items) if self.rng.random() < 0.3 else None,
                self.rng.random() < 0.2,
            )
            for place in self.rng.sample(script.places, count)
        }

    def _session(self) -> list[Coroutine[Any, Any, None]]:
        return [self._play()]

    async def _play(self) -> None:
        socket, rng = self.socket, self.rng
        assert socket is not None, "a session has one"
        for subscriber in self.subscribers.values():
            if self._steady or self.quiet or rng.random() < 0.9:
                self._join(socket, subscriber)
        while not self.quiet:
            await asyncio.sleep(0.1 + 2 * rng.random())
            if self._steady or self.quiet:
                continue
            chance = rng.random()
            if chance < 0.25:
                socket.transport.pause_reading()
                await asyncio.sleep(8 * rng.random() ** 3)
                socket.transport.resume_reading()
            elif chance < 0.4:
                socket.transport.close() if rng.random() < 0.5 else socket.transport.abort()
            elif chance < 0.55:
                self._leave(socket, rng.choice(list(self.subscribers.values())))
        await asyncio.sleep(0.1)
        for subscriber in self.subscribers.values():
            if not subscriber.joined:
                socket.transport.close()  # comes back with all of them

    def _join(self, socket: Socket, subscriber: Subscriber) -> None:
        rng, place = self.rng, subscriber.place
        data: dict[str, Any] = {
            "subscriptionId": subscriber.name,
            "streamName": place.stream,
            "groupId": place.group,
            "ids": True,
        }
        if subscriber.item is not None:
            data["id"] = subscriber.item
        if subscriber.conflate:
            data["conflate"] = True
        if subscriber.seq is not None and rng.random() < 0.8:
            data["since"], data["epoch"] = subscriber.seq, subscriber.epoch
        subscriber.joined, subscriber.synced = True, False
        self.script.record(
            Join(
                subscriber=subscriber.name,
                at=self.world.now,
                stream=place.stream,
                group=place.group,
                item=subscriber.item,
                since=data.get("since"),
                epoch=data.get("epoch"),
                conflate=subscriber.conflate,
            )
        )
        socket.send({"type": "join", "data": data})

    def _leave(self, socket: Socket, subscriber: Subscriber) -> None:
        if subscriber.joined:
            self._left(subscriber)
            names = {"streamName": subscriber.place.stream, "groupId": subscriber.place.group}
            socket.send({"type": "leave", "data": {"subscriptionId": subscriber.name, **names}})

    def _left(self, subscriber: Subscriber) -> None:
        subscriber.joined = False
        self.script.record(Leave(subscriber=subscriber.name, at=self.world.now))

    def _message(self, text: bytes) -> None:
        envelope = _decode(text)
        event = envelope["event"]
        if event["type"] == "error":
            return
        subscriber = self.subscribers[envelope["streamName"], envelope["groupId"]]
        if not subscriber.joined:
            return  # it has left, and what was on the way is nobody's
        custom = event["type"] == "event"
        frame = Frame(
            subscriber=subscriber.name,
            at=self.world.now,
            kind=event["type"],
            seq=envelope["seq"],
            timestamp=envelope["timestamp"],
            item=envelope["id"],
            epoch=envelope.get("epoch"),
            data=event["event"]["data"] if custom else event.get("data"),
            ids=event.get("ids"),
            name=event["event"]["type"] if custom else None,
        )
        self.script.record(frame)
        subscriber.seq = frame.seq
        if frame.epoch is not None:
            subscriber.epoch, subscriber.synced = frame.epoch, True

    @property
    def idle(self) -> bool:
        """Whether it is connected and has joined all that it wants."""
        return self.socket is not None and all(s.synced for s in self.subscribers.values())

    def over(self) -> None:
        super().over()
        for subscriber in self.subscribers.values():
            if subscriber.joined:
                self._left(subscriber)
            subscriber.synced = False
