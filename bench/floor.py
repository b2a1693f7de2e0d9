"""The floor: what a stream broker in Python can't leave out, and nothing else.

`python -m bench.floor in_memory|file_based|redis` is one process on uvloop that speaks as much of
both protocols as the generator uses. Handshakes are the `websockets` library's (Sans-I/O); frames
are taken out by their headers, messages decoded into typed structs, answers and events made once
and written joined, once per socket and turn of the loop. Items are in a dict. With `file_based`
what came while one commit was under way is the next: one table, `synchronous=FULL`, on a thread,
and answers go out after it. There are no checks, limits, queues, metrics, shards or restarts: a
broker that promises something has to cost more, and the ratio says how much.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import cast

import msgspec
import uvloop
from msgspec import Raw, Struct
from websockets.http11 import Request
from websockets.protocol import State
from websockets.server import ServerProtocol
from websockets.speedups import apply_mask

from bench.broker import STOP_S_MAX, Running

EPOCH = b"floor"


class CallData(Struct, gc=False):
    stream_name: str = ""
    group_id: str = ""
    item_id: str = ""
    data: Raw = Raw(b"null")
    ops: Raw = Raw(b"")


class Invoke(Struct, tag_field="type", tag="invokefunction", gc=False):
    function_id: str
    data: CallData
    invocation_id: str = ""


class Result(Struct, tag_field="type", tag="invocationresult", gc=False):
    invocation_id: str
    result: Raw = Raw(b"null")


class RegisterFunction(Struct, tag_field="type", tag="registerfunction", gc=False):
    id: str


class RegisterTrigger(Struct, tag_field="type", tag="registertrigger", gc=False):
    id: str
    function_id: str


class Ping(Struct, tag_field="type", tag="ping", gc=False):
    pass


class JoinData(Struct, rename="camel", gc=False):
    stream_name: str
    group_id: str


class Join(Struct, tag_field="type", tag="join", gc=False):
    data: JoinData


class Leave(Struct, tag_field="type", tag="leave", gc=False):
    data: JoinData


_decode_worker = msgspec.json.Decoder(
    Invoke | Result | RegisterFunction | RegisterTrigger | Ping
).decode
_decode_client = msgspec.json.Decoder(Join | Leave).decode
_decode_value = msgspec.json.decode
_encode_value = msgspec.json.encode

Key = tuple[str, str]
Write = tuple["Socket", Invoke]


def frame(payload: bytes) -> bytes:
    """An unmasked text frame."""
    size = len(payload)
    if size < 126:
        return b"\x81" + bytes((size,)) + payload
    if size < 65536:
        return b"\x81\x7e" + size.to_bytes(2, "big") + payload
    return b"\x81\x7f" + size.to_bytes(8, "big") + payload


class Group:
    """Items, subscribers, and what this turn of the loop has for them."""

    def __init__(self, key: Key) -> None:
        self.names = b'"streamName":"%b","groupId":"%b"' % (key[0].encode(), key[1].encode())
        self.items: dict[str, bytes] = {}
        self.seq = 0
        self.subscribers: dict[Socket, None] = {}
        self.events: list[bytes] = []
        self.sync: bytes | None = None

    def sync_frame(self) -> bytes:
        """The snapshot, made anew only after a change."""
        if self.sync is None:
            self.sync = frame(
                b'{"type":"stream","timestamp":%d,%b,"id":null,"seq":%d,"epoch":"%b",'
                b'"event":{"type":"sync","data":[%b]}}'
                % (now_ms(), self.names, self.seq, EPOCH, b",".join(self.items.values()))
            )
        return self.sync


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class Floor:
    """All there is, shared by the sockets of both ports."""

    def __init__(self, commit: Callable[[list[Write]], None] | None, redis: Redis | None) -> None:
        self.groups: dict[Key, Group] = {}
        self.dirty_groups: list[Group] = []
        self.dirty_sockets: list[Socket] = []
        self.trigger: tuple[Socket, str] | None = None
        self.functions: dict[str, Socket] = {}
        self.pending: dict[str, Write] = {}
        self.invocations = 0
        self.writes: list[Write] = []
        self.committing = False
        self.commit = commit
        self.redis = redis
        self.loop = asyncio.get_running_loop()
        self.threads = ThreadPoolExecutor(1)

    def group(self, key: Key) -> Group:
        group = self.groups.get(key)
        if group is None:
            group = self.groups[key] = Group(key)
        return group

    def call(self, socket: Socket, call: Invoke) -> None:
        if self.functions:
            handler = self.functions.get(f"{call.function_id}({call.data.stream_name})")
            if handler is not None:
                self.invocations += 1
                number = str(self.invocations)
                self.pending[number] = socket, call
                data = _encode_value(call.data)
                handler.send(invocation(number, call.function_id, call.data.stream_name, data))
                return
        if self.redis is not None and call.function_id == "stream::set":
            self.redis.set(socket, call)
        elif self.commit is None or call.function_id in ("stream::get", "stream::send"):
            self.settle(socket, call)
        else:
            self.writes.append((socket, call))
            if not self.committing:
                self.committing = True
                self.loop.call_soon(self.begin_commit)

    def begin_commit(self) -> None:
        assert self.commit is not None
        batch, self.writes = self.writes, []
        for _, call in batch:
            if call.function_id == "stream::update":
                call.data.data = Raw(updated(self.group(key_of(call)), call.data))
        done = self.loop.run_in_executor(self.threads, self.commit, batch)
        done.add_done_callback(lambda done: self.end_commit(done, batch))

    def end_commit(self, done: asyncio.Future[None], batch: list[Write]) -> None:
        done.result()
        for socket, call in batch:
            self.settle(socket, call)
        self.flush()
        self.committing = bool(self.writes)
        if self.committing:
            self.begin_commit()

    def settle(self, socket: Socket, call: Invoke, known_old: bytes | None = None) -> None:
        """Take the change in; answer; tell subscribers and the trigger."""
        data = call.data
        group = self.group(key_of(call))
        function = call.function_id
        if function == "stream::get":
            socket.send(answer(call, group.items.get(data.item_id, b"null")))
            return
        if function == "stream::send":
            kind, value, item_id = b"event", bytes(data.data), b"null"
            socket.send(answer(call, b"null"))
            value = b'{"type":"ping","data":%b}' % value
        else:
            if function == "stream::update" and self.commit is None:
                value = updated(group, data)
            else:
                value = bytes(data.data)
            old = group.items.get(data.item_id) if known_old is None else known_old
            group.items[data.item_id] = value
            group.sync = None
            kind = b"create" if old is None else b"update"
            item_id = b'"%b"' % data.item_id.encode()
            socket.send(answer(call, b'{"old_value":%b,"new_value":%b}' % (old or b"null", value)))
        group.seq += 1
        if not group.subscribers and self.trigger is None:
            return
        event = b'{"type":"stream","timestamp":%d,%b,"id":%b,"seq":%d,"event":{"type":"%b",%b' % (
            now_ms(),
            group.names,
            item_id,
            group.seq,
            kind,
            (b'"event":%b}}' if kind == b"event" else b'"data":%b}}') % value,
        )
        if group.subscribers:
            if not group.events:
                self.dirty_groups.append(group)
            group.events.append(frame(event))
        if self.trigger is not None:
            handler, function_id = self.trigger
            self.invocations += 1
            handler.send(invocation(str(self.invocations), function_id, "", event))

    def flush(self) -> None:
        """Write what this turn made: once per socket."""
        if self.dirty_groups:
            groups, self.dirty_groups = self.dirty_groups, []
            for group in groups:
                joined = b"".join(group.events)
                group.events = []
                for socket in group.subscribers:
                    socket.transport.write(joined)
        if self.dirty_sockets:
            sockets, self.dirty_sockets = self.dirty_sockets, []
            for socket in sockets:
                frames, socket.out = socket.out, []
                socket.transport.write(b"".join(frames))


def key_of(call: Invoke) -> Key:
    return call.data.stream_name, call.data.group_id


def updated(group: Group, data: CallData) -> bytes:
    """The generator's update: one field counts, one holds the time."""
    value = _decode_value(group.items.get(data.item_id, b"{}"))
    for op in _decode_value(data.ops):
        if op["type"] == "increment":
            value[op["path"]] = value.get(op["path"], 0) + op["by"]
        else:
            value[op["path"]] = op["value"]
    return _encode_value(value)


def answer(call: Invoke, result: bytes) -> bytes:
    return frame(
        b'{"type":"invocationresult","invocation_id":"%b","function_id":"%b","result":%b}'
        % (call.invocation_id.encode(), call.function_id.encode(), result)
    )


def invocation(number: str, function_id: str, stream: str, data: bytes) -> bytes:
    name = f"{function_id}({stream})" if stream else function_id
    return frame(
        b'{"type":"invokefunction","invocation_id":"%b","function_id":"%b","data":%b}'
        % (number.encode(), name.encode(), data)
    )


class Socket(asyncio.Protocol):
    """One connection; `is_worker` says of which port."""

    def __init__(self, floor: Floor, is_worker: bool) -> None:
        self.floor = floor
        self.is_worker = is_worker
        self.handshake: ServerProtocol | None = ServerProtocol()
        self.rest = b""
        self.out: list[bytes] = []
        self.joined: Group | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.joined is not None:
            self.joined.subscribers.pop(self, None)
        if self.floor.trigger is not None and self.floor.trigger[0] is self:
            self.floor.trigger = None

    def send(self, data: bytes) -> None:
        """With what else this turn sends."""
        if not self.out:
            self.floor.dirty_sockets.append(self)
        self.out.append(data)

    def data_received(self, data: bytes) -> None:
        if self.handshake is not None:
            self.handshake.receive_data(data)
            for request in self.handshake.events_received():
                assert isinstance(request, Request)
                self.handshake.send_response(self.handshake.accept(request))
                self.transport.write(b"".join(self.handshake.data_to_send()))
            if self.handshake.state is State.OPEN:
                self.handshake = None
            return
        if self.rest:
            data = self.rest + data
        position, size = 0, len(data)
        received = self.worker_message if self.is_worker else self.client_message
        while size - position >= 6:
            length, start = data[position + 1] & 0x7F, position + 6
            if length == 126:
                length, start = int.from_bytes(data[position + 2 : position + 4], "big"), start + 2
            elif length == 127:
                length, start = int.from_bytes(data[position + 2 : position + 10], "big"), start + 8
            end = start + length
            if end > size:
                break
            if data[position] == 0x81:
                received(apply_mask(data[start:end], data[start - 4 : start]))
            position = end
        self.rest = data[position:]
        self.floor.flush()

    def client_message(self, text: bytes) -> None:
        message = _decode_client(text)
        group = self.floor.group((message.data.stream_name, message.data.group_id))
        if type(message) is Leave:
            group.subscribers.pop(self, None)
            return
        group.subscribers[self] = None
        self.joined = group
        self.send(group.sync_frame())

    def worker_message(self, text: bytes) -> None:
        message = _decode_worker(text)
        floor = self.floor
        match message:
            case Invoke():
                floor.call(self, message)
            case Result():
                waiting = floor.pending.pop(message.invocation_id, None)
                if waiting is not None:
                    socket, call = waiting
                    socket.send(answer(call, bytes(message.result)))
            case RegisterFunction():
                if message.id.startswith("stream::"):
                    floor.functions[message.id] = self
            case RegisterTrigger():
                floor.trigger = self, message.function_id
            case Ping():
                self.send(frame(b'{"type":"pong"}'))


class Redis(asyncio.Protocol):
    """HGET, HSET and PUBLISH of every set, those of one turn in one write."""

    floor: Floor

    def __init__(self) -> None:
        self.waiting: deque[Write] = deque()
        self.commands: list[bytes] = []
        self.replies: list[bytes | None] = []
        self.rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def set(self, socket: Socket, call: Invoke) -> None:
        data = call.data
        key = f"stream:{data.stream_name}:{data.group_id}".encode()
        item, value = data.item_id.encode(), bytes(data.data)
        if not self.commands:
            self.floor.loop.call_soon(self.flush)
        self.commands += (
            command(b"HGET", key, item),
            command(b"HSET", key, item, value),
            command(b"PUBLISH", b"stream::events", value),
        )
        self.waiting.append((socket, call))

    def flush(self) -> None:
        self.transport.write(b"".join(self.commands))
        self.commands.clear()

    def data_received(self, data: bytes) -> None:
        data = self.rest + data
        position = 0
        while (end := data.find(b"\r\n", position)) >= 0:
            reply: bytes | None = None
            after = end + 2
            if data[position] == ord("$") and data[position + 1] != ord("-"):
                length = int(data[position + 1 : end])
                if len(data) < after + length + 2:
                    break
                reply = data[after : after + length]
                after += length + 2
            self.replies.append(reply)
            position = after
            if len(self.replies) == 3:
                socket, call = self.waiting.popleft()
                self.floor.settle(socket, call, self.replies[0])
                self.replies.clear()
        self.rest = data[position:]
        self.floor.flush()


def command(*parts: bytes) -> bytes:
    return b"*%d\r\n%b" % (len(parts), b"".join(b"$%d\r\n%b\r\n" % (len(p), p) for p in parts))


def sqlite_commits(path: Path) -> Callable[[list[Write]], None]:
    """What makes a batch durable: one transaction, one fsync."""
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    database.execute(
        "CREATE TABLE items (stream TEXT, group_id TEXT, item_id TEXT, value TEXT,"
        " PRIMARY KEY (stream, group_id, item_id)) WITHOUT ROWID"
    )

    def commit(batch: list[Write]) -> None:
        rows = [
            (d.stream_name, d.group_id, d.item_id, bytes(d.data))
            for d in (call.data for _, call in batch)
        ]
        database.execute("BEGIN IMMEDIATE")
        database.executemany("INSERT OR REPLACE INTO items VALUES (?, ?, ?, ?)", rows)
        database.execute("COMMIT")

    return commit


async def serve(store: str, folder: Path) -> None:
    """Listen on free ports, say which, until the end of standard input."""
    loop = asyncio.get_running_loop()
    commit = sqlite_commits(folder / "floor.db") if store == "file_based" else None
    redis = None
    if store.startswith("redis:"):
        _, redis = await loop.create_connection(Redis, "127.0.0.1", int(store.split(":")[1]))
    floor = Floor(commit, redis)
    if redis is not None:
        redis.floor = floor
    ports = []
    for is_worker in (False, True):
        server = await loop.create_server(
            partial(Socket, floor, is_worker), "127.0.0.1", 0, backlog=1024
        )
        ports.append(server.sockets[0].getsockname()[1])
    print("ready", *ports, flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


@contextmanager
def running(store: str) -> Iterator[Running]:
    """The floor as a process of its own. `store`: in_memory, file_based or redis:PORT."""
    command = [sys.executable, "-m", "bench.floor", store]
    floor = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert floor.stdin is not None
    assert floor.stdout is not None
    try:
        stream_port, worker_port = floor.stdout.readline().split()[1:]
        yield Running(int(stream_port), int(worker_port), {floor.pid: "floor"})
    finally:
        floor.stdin.close()
        try:
            floor.wait(STOP_S_MAX)
        finally:
            floor.kill()
            floor.stdout.close()


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="floor-") as folder:
        uvloop.run(serve(sys.argv[1], Path(folder)))
    os._exit(0)


if __name__ == "__main__":
    main()
