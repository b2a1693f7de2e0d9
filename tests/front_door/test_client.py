"""The client libraries, `broker.client` and `gateway/static/stream.js`, against real brokers."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import http.server
import itertools
import json
import os
import random
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed, InvalidURI, WebSocketException
from websockets.http11 import Request, Response

from broker.client import BlockingClient, Change, Client, Kind, Unauthorized, Watch
from broker.client_state import Watching
from broker.errors import BrokerError, InvalidRequest
from tests.conftest import Run
from tests.front_door.sdk_programs import NODE, PATIENCE_S, Program, Report, browser
from tests.support.broker import IN_MEMORY, REPOSITORY, Broker
from tests.support.calls import item, result_of
from tests.support.worker import Invocation, Worker
from tests.unit.broker.test_client_state import STEPS, Interleaving

STREAM_JS = REPOSITORY / "gateway" / "static" / "stream.js"
JSON = dict[str, Any]

pytestmark = pytest.mark.timeout(180)


def client_of(broker: Broker, **options: Any) -> Client:
    return Client(broker.stream_url, proxy=None, **options)


async def patiently(work: Any) -> Any:
    async with asyncio.timeout(PATIENCE_S):
        return await work


async def read_until(watch: Watch, holds: Callable[[Watch], bool], changes: list[Change]) -> None:
    """Take changes up to the one after which `holds`."""
    async for change in watch:
        changes.append(change)
        if holds(watch):
            return
    raise AssertionError("the watch ended")


async def taken(watch: Watch, count: int) -> list[Change]:
    """The next `count` changes."""
    changes = []
    async with asyncio.timeout(PATIENCE_S):
        for _ in range(count):
            changes.append(await anext(watch))
    return changes


def told(changes: list[Change]) -> list[tuple[str, str | None, Any]]:
    """Their kinds, items and data."""
    return [(change.kind.value, change.item_id, change.data) for change in changes]


# The page ------------------------------------------------------------------------------------


@contextlib.contextmanager
def page_of(folder: Path) -> Iterator[Program]:
    """A page in Chromium that runs tests/node/stream_page.mjs."""
    files = {"/stream.js": STREAM_JS, "/stream_page.mjs": NODE / "stream_page.mjs"}

    class Files(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(HTTPStatus.OK)
            self.send_header("content-type", "text/javascript; charset=utf-8")
            self.send_header("access-control-allow-origin", "*")
            self.end_headers()
            self.wfile.write(files[self.path].read_bytes())

        def log_message(self, *_: object) -> None:
            """Keep quiet."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            script = f"http://127.0.0.1:{server.server_port}/stream_page.mjs"
            (folder / "watch.html").write_text(
                f'<!doctype html><title>watch</title><script type="module" src="{script}"></script>'
            )
            with browser(folder) as page:
                page.send("goto", path="/watch.html")
                page.wait_for_keys(shown="/watch.html")
                yield page
        finally:
            server.shutdown()
            thread.join()


def page_changes(report: Report) -> list[Change]:
    """The changes that a page reports, as those of the Python client."""
    changes = []
    for told in report["changes"]:
        data = told["data"]
        if told["kind"] == "sync" and told["itemId"] is None:
            data = dict(map(tuple, data))
        times = told["timestampMs"]
        names = (told["seq"], told["epoch"], times, told["eventType"])
        changes.append(Change(Kind(told["kind"]), told["itemId"], data, *names))
    return changes


# Kills ---------------------------------------------------------------------------------------

LONG_HISTORY = """\
broker:
  limits: {history_events_max: 100000, history_group_bytes_max: 67108864}
"""
"""Stored on disk; a client that comes back late on a busy machine can resume all the same."""
GROUPS = [("chat", f"g{number}") for number in range(4)]  # on both shards
WATCHED_ITEM = "steady"
LAST = "last"
LAST_VALUE = -1


class Write(NamedTuple):
    """What a writer asked for; `number` is in the data of its change and counts up."""

    number: int
    acknowledged: bool


class Writer:
    """Writes into one group, one call after the other, until it is told to stop."""

    def __init__(self, broker: Broker, stream: str, group_id: str, seed: str) -> None:
        self.broker = broker
        self.names = {"stream_name": stream, "group_id": group_id}
        self.rng = random.Random(f"{seed}-{group_id}")
        self.writes: list[Write] = []
        self.deletes: dict[int, int] = {}  # number of the value that was deleted -> of the write
        self.items: dict[str, int] = {}  # that are surely there, and the number of their value
        self.fresh = itertools.count(1)
        self.stopping = False

    async def run(self) -> None:
        """Write; connect again whenever the connection is lost."""
        for number in itertools.count(1):
            if self.stopping:
                return
            await self._write(number)

    async def open(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    self.worker = await Worker.open(self.broker.worker_url)
                except (OSError, WebSocketException, TypeError):  # the last: closed, not greeted
                    await asyncio.sleep(0.05)
                else:
                    return

    async def close(self) -> None:
        await self.worker.close()

    async def _write(self, number: int) -> None:
        item_id, function_id, payload = self._choose(number)
        acknowledged = await self._call(function_id, self.names | payload)
        self.writes.append(Write(number, acknowledged))
        if item_id is None:
            return
        before = self.items.pop(item_id, None)
        if function_id == "stream::delete":
            assert before is not None
            self.deletes[before] = number
        elif acknowledged:
            self.items[item_id] = number

    def _choose(self, number: int) -> tuple[str | None, str, JSON]:
        known = [name for name in self.items if name != WATCHED_ITEM]
        match self.rng.randrange(8):
            case 0 | 1:
                item_id = f"i{next(self.fresh)}"
            case 2 | 3 if known:
                item_id = self.rng.choice(known)
            case 4 | 5 if known:
                item_id = self.rng.choice(known)
                return item_id, "stream::delete", {"item_id": item_id}
            case 6:
                return None, "stream::send", {"type": "note", "data": {"n": number}}
            case _:
                item_id = WATCHED_ITEM
        return item_id, "stream::set", {"item_id": item_id, "data": {"n": number}}

    async def _call(self, function_id: str, payload: JSON) -> bool:
        """Whether it was acknowledged; if not, whether it took effect is not known."""
        call = asyncio.create_task(self.worker.call(function_id, payload, PATIENCE_S))
        closed = asyncio.create_task(self.worker.socket.wait_closed())
        await asyncio.wait([call, closed], return_when=asyncio.FIRST_COMPLETED)
        lost = not call.done() or isinstance(call.exception(), ConnectionClosed)
        if lost:
            call.cancel()
            await self.worker.close()
            await self.open()
            return False
        closed.cancel()
        answer = call.result()
        if "error" in answer:
            assert answer["error"]["code"] == "shard_unavailable", answer
            await asyncio.sleep(0.05)
        return "error" not in answer

    async def finish(self) -> list[list[Any]]:
        """Write what ends a watch; what the group holds then, as pairs in order."""
        for item_id in (WATCHED_ITEM, LAST):
            names = self.names | {"item_id": item_id, "data": LAST_VALUE}
            while not await self._call("stream::set", names):
                pass
        items = await result_of(self.worker, "broker::items", self.names)
        return [[each["item_id"], each["value"]] for each in items]

    def number_of(self, change: Change) -> int:
        """Of the write that made a change; `LAST_VALUE` for what `finish` wrote."""
        number: int = LAST_VALUE if change.data == LAST_VALUE else change.data["n"]
        return self.deletes[number] if change.kind is Kind.DELETE else number

    def check(self, changes: list[Change]) -> None:
        """Every acknowledged write was told once and in order, of a whole group."""
        assert changes[0].kind is Kind.SYNC
        first = changes[0]
        assert [c for c in changes[1:] if c.kind is Kind.SYNC] == [], "all of it could be resumed"
        seqs = [change.seq for change in changes]
        assert seqs == list(range(first.seq, first.seq + len(changes)))
        assert {change.epoch for change in changes} == {first.epoch}
        told = [self.number_of(change) for change in changes[1:]]
        told = [number for number in told if number != LAST_VALUE]
        assert len(set(told)) == len(told)
        acknowledged = [write.number for write in self.writes if write.acknowledged]
        unknown = {write.number for write in self.writes if not write.acknowledged}
        assert [number for number in told if number not in unknown] == acknowledged

    def check_item(self, changes: list[Change], whole: list[Change]) -> None:
        """What was told of the watched item is what was told of it in the whole group."""
        assert [change.kind for change in changes if change.kind is Kind.SYNC] == [Kind.SYNC]
        assert changes[1:] == [change for change in whole if change.item_id == WATCHED_ITEM]


def kill(broker: Broker, names: list[str]) -> None:
    """SIGKILL those of the broker's processes that run; the supervisor starts them again."""
    children = broker.children()
    for name in names:
        if name in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(children[name], signal.SIGKILL)


async def kill_some(broker: Broker, rng: random.Random) -> None:
    """Each process twice, all of them together, and at last the supervisor as well."""
    everything = ["gateway", "shard-0", "shard-1"]
    kills = [[name] for name in everything] * 2 + [everything]
    rng.shuffle(kills)
    for names in kills:
        await asyncio.sleep(rng.uniform(0.3, 1.5))
        await asyncio.to_thread(kill, broker, names)
    await asyncio.sleep(rng.uniform(0.3, 1.5))
    await asyncio.to_thread(broker.kill)
    await asyncio.to_thread(broker.start)
    await asyncio.sleep(rng.uniform(0.3, 1.0))


class Blocking:
    """Watches a group from a thread of its own."""

    def __init__(self, broker: Broker, stream: str, group_id: str) -> None:
        self.changes: list[Change] = []
        self.state: JSON = {}
        self._broker = broker
        self._names = (stream, group_id)
        self.begun = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with BlockingClient(self._broker.stream_url, proxy=None) as client:
            watch = client.watch(*self._names)
            for change in watch:
                self.changes.append(change)
                self.begun.set()
                if LAST in watch.state:
                    self.state = dict(watch.state)
                    return

    def join(self) -> None:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()


@pytest.mark.parametrize("seed", ["1"])
def test_every_change_once_whatever_is_killed(seed: str, run: Run, tmp_path: Path) -> None:
    def has_last(watch: Watch) -> bool:
        return LAST in watch.state

    def is_last(watch: Watch) -> bool:
        return bool(watch.state == LAST_VALUE)

    async def scenario(broker: Broker, page: Program) -> None:
        writers = [Writer(broker, *group, seed) for group in GROUPS]
        await asyncio.gather(*(writer.open() for writer in writers))
        blocking = Blocking(broker, *GROUPS[0])
        page.send("connect", url=broker.stream_url)
        for stream, group in GROUPS:
            page.send("watch", name=group, stream=stream, group=group)
        page.send("watch", name="item", stream="chat", group="g0", item=WATCHED_ITEM)
        async with client_of(broker) as client, client_of(broker) as other:
            watches = [client.watch(*group) for group in GROUPS]
            watches.append(client.watch(*GROUPS[0]))  # of what is watched already
            watches.append(other.watch(*GROUPS[1]))
            items = [each.watch(*GROUPS[0], WATCHED_ITEM) for each in (client, other)]
            seen: list[list[Change]] = [[] for _ in (*watches, *items)]
            ends = [has_last] * len(watches) + [is_last] * len(items)
            reading = [
                asyncio.create_task(read_until(*each))
                for each in zip((*watches, *items), ends, seen, strict=True)
            ]
            while not all(seen):
                await asyncio.sleep(0.01)
            await asyncio.to_thread(blocking.begun.wait, PATIENCE_S)
            for name in (*(group for _, group in GROUPS), "item"):
                await asyncio.to_thread(page.wait_for_keys, begun=name)
            writing = [asyncio.create_task(writer.run()) for writer in writers]
            await kill_some(broker, random.Random(seed))
            for writer in writers:
                writer.stopping = True
            await asyncio.gather(*writing)
            stored = [await writer.finish() for writer in writers]
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.gather(*reading)
            await asyncio.to_thread(blocking.join)

            for writer, changes in zip([*writers, writers[0], writers[1]], seen, strict=False):
                writer.check(changes)
            for watch, index in zip(watches, (0, 1, 2, 3, 0, 1), strict=True):
                assert [list(pair) for pair in watch.state.items()] == stored[index]
            for changes in seen[-2:]:
                writers[0].check_item(changes, seen[0])
            writers[0].check(blocking.changes)
            assert [list(pair) for pair in blocking.state.items()] == stored[0]

            for writer, (_, group), items_stored in zip(writers, GROUPS, stored, strict=True):
                page.send("until", name=group, last=LAST)
                report = await asyncio.to_thread(page.wait_for_keys, ended=group)
                writer.check(page_changes(report))
                assert report["state"] == items_stored
            page.send("until", name="item", last=LAST_VALUE)
            report = await asyncio.to_thread(page.wait_for_keys, ended="item")
            writers[0].check_item(page_changes(report), seen[0])
            page.send("end")
        for writer in writers:
            await writer.close()

    with Broker(LONG_HISTORY) as broker, page_of(tmp_path) as page:
        run(scenario(broker, page))


# The browser's module by itself ---------------------------------------------------------------


class JsClient:
    """`stream.js` in tests/node/stream_client.mjs, used like a `ClientState`."""

    program: subprocess.Popen[str]

    def __init__(self) -> None:
        self._watches: dict[int, Watching] = {}
        self._names = itertools.count(1)
        self._run("begin")

    def _run(self, do: str, **fields: Any) -> list[str]:
        """Give a command, deliver what watches are told, return the frames that are sent."""
        assert self.program.stdin is not None
        assert self.program.stdout is not None
        self.program.stdin.write(json.dumps({"do": do, **fields}) + "\n")
        self.program.stdin.flush()
        answer = json.loads(self.program.stdout.readline())
        for each in answer["told"]:
            watching = self._watches[each["name"]]
            (change,) = page_changes({"changes": [each["change"]]})
            watching.deliver(change)
            state = watching.latest()
            assert each["state"] == (
                list(map(list, state.items())) if is_group(watching) else state
            )
        return list(map(json.dumps, answer["sent"]))

    def watch(self, watching: Watching) -> list[str]:
        name = next(self._names)
        self._watches[name] = watching
        (stream, group), item_id = watching.target
        names = {"stream": stream, "group": group}
        if item_id is not None:
            names["item"] = item_id
        return self._run("watch", name=name, **names)

    def unwatch(self, watching: Watching) -> list[str]:
        (name,) = (name for name, each in self._watches.items() if each is watching)
        sent = self._run("unwatch", name=name)
        del self._watches[name]
        return sent

    def connect(self) -> list[str]:
        return self._run("connect")

    def disconnect(self) -> None:
        assert self._run("disconnect") == []

    def receive(self, text: bytes) -> list[str]:
        return self._run("receive", frame=json.loads(text))


def is_group(watching: Watching) -> bool:
    return watching.target.item_id is None


def test_browser_module_in_any_interleaving() -> None:
    @settings(max_examples=40, deadline=None)
    @given(extended=st.booleans(), lossy=st.booleans(), steps=STEPS)
    def check(extended: bool, lossy: bool, steps: bytes) -> None:
        Interleaving(JsClient(), extended, lossy).run(steps)

    command = ["node", str(NODE / "stream_client.mjs")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as JsClient.program:
        check()


# One thing each ------------------------------------------------------------------------------


def test_kinds_of_changes_and_states(memory_broker: Broker, run: Run) -> None:
    async def scenario() -> None:
        async with (
            await Worker.open(memory_broker.worker_url) as worker,
            client_of(memory_broker) as client,
        ):
            await result_of(worker, "stream::set", item("kinds", "g", "a", data=1))
            group, one = client.watch("kinds", "g"), client.watch("kinds", "g", "b")
            assert told(await taken(group, 1)) == [("sync", None, {"a": 1})]
            assert told(await taken(one, 1)) == [("sync", "b", None)]
            assert (group.state, one.state) == ({"a": 1}, None)
            await result_of(worker, "stream::set", item("kinds", "g", "b", data=2))
            await result_of(worker, "stream::set", item("kinds", "g", "a", data=3))
            note = {"stream_name": "kinds", "group_id": "g", "type": "note", "data": 4}
            await result_of(worker, "stream::send", note)
            await result_of(worker, "stream::delete", item("kinds", "g", "b"))
            changes = await taken(group, 4)
            assert told(changes) == [
                ("create", "b", 2),
                ("update", "a", 3),
                ("event", None, 4),
                ("delete", "b", 2),
            ]
            assert [change.event_type for change in changes] == [None, None, "note", None]
            assert [change.seq for change in changes] == [2, 3, 4, 5]
            assert told(await taken(one, 2)) == [("create", "b", 2), ("delete", "b", 2)]
            assert (group.state, one.state) == ({"a": 3}, None)
            later = client.watch("kinds", "g")
            assert told(await taken(later, 1)) == [("sync", None, {"a": 3})]

    run(scenario())


def test_watch_ends_when_it_is_let_go_of_or_closed(memory_broker: Broker, run: Run) -> None:
    async def scenario() -> None:
        async with (
            await Worker.open(memory_broker.worker_url) as worker,
            client_of(memory_broker) as client,
        ):
            async for _ in client.watch("ends", "let-go"):
                break
            gc.collect()
            closed, open_, ended = (client.watch("ends", name) for name in ("closed", "open", "x"))
            await taken(closed, 1)
            closed.close()
            assert await patiently(closed.next()) is None
            assert [change async for change in closed] == []
            await taken(open_, 1)
            for name, count in (("let-go", 0), ("closed", 0), ("open", 1)):
                group = {"stream_name": "ends", "group_id": name}
                async with asyncio.timeout(PATIENCE_S):
                    while (await result_of(worker, "broker::members", group))["count"] != count:
                        await asyncio.sleep(0.01)
            waits = asyncio.create_task(ended.next())
            await client.close()
            for watch in (open_, ended):
                assert await patiently(watch.next()) is None
            await patiently(waits)
            with pytest.raises(RuntimeError):
                client.watch("ends", "late")
            await client.close()

    run(scenario())


def test_refused_join(memory_broker: Broker, run: Run) -> None:
    async def scenario() -> None:
        async with (
            await Worker.open(memory_broker.worker_url) as worker,
            client_of(memory_broker) as client,
        ):

            def may_join(asked: Invocation) -> JSON:
                return {"unauthorized": asked.data["group_id"] == "closed"}

            await worker.register_function("client::may_join", may_join)
            config = {"stream_name": "refusing"}
            await worker.register_trigger("stream:join", "client::may_join", config)
            await worker.barrier()
            refused, joined = client.watch("refusing", "closed"), client.watch("refusing", "open")
            with pytest.raises(Unauthorized, match="refusing/closed"):
                await patiently(refused.next())
            await taken(joined, 1)
            long = client.watch("refusing", "n" * 2000)
            with pytest.raises(InvalidRequest) as caught:
                await patiently(long.next())
            assert caught.value.code == "name_too_long"
            await result_of(worker, "stream::set", item("refusing", "open", "a", data=1))
            assert told(await taken(joined, 1)) == [("create", "a", 1)]

    run(scenario())


AUTH = """\
workers:
  - name: iii-stream
    config:
      auth_function: stream::auth
      adapter: {name: kv, config: {store_method: in_memory}}
"""


@pytest.fixture(scope="module")
def auth_broker() -> Iterator[Broker]:
    with Broker(AUTH) as broker:
        yield broker


async def auth_worker(broker: Broker) -> Worker:
    """Lets the tokens `good-1`, `good-2`, … connect, wherever they are in the handshake."""
    worker = await Worker.open(broker.worker_url)

    def authenticate(asked: Invocation) -> JSON:
        headers, query = asked.data["headers"], asked.data["query_params"]
        token = headers.get("authorization") or headers.get("sec-websocket-protocol", "")
        token = token.removeprefix("Bearer ").removeprefix("Authorization, ")
        token = token or unquote(query.get("token", [""])[0])
        return {"context": {"token": token}, "unauthorized": not token.startswith("good")}

    await worker.register_function("stream::auth", authenticate)
    await worker.barrier()
    return worker


def test_tokens(auth_broker: Broker, run: Run) -> None:
    """A new one for each connection; the client tells when none is good any more."""
    numbers = itertools.count(1)

    async def token() -> str:
        number = next(numbers)
        return f"good-{number}" if number <= 2 else "bad"

    async def connected(worker: Worker) -> list[JSON]:
        found = await result_of(worker, "broker::connections", {})
        return [each["context"] for each in found["connections"]]

    async def scenario() -> None:
        async with (
            await auth_worker(auth_broker) as worker,
            client_of(auth_broker, token=token) as client,
            client_of(auth_broker, token="bad") as refused,
        ):
            with pytest.raises(Unauthorized):
                await patiently(refused.watch("s", "g").next())
            watch = client.watch("s", "g")
            await taken(watch, 1)
            for number in (1, 2):
                context = {"token": f"good-{number}"}
                async with asyncio.timeout(PATIENCE_S):
                    while await connected(worker) != [context]:
                        await asyncio.sleep(0.01)
                await result_of(worker, "stream::set", item("s", "g", "a", data=number))
                (change,) = await taken(watch, 1)
                assert (change.data, change.kind is Kind.SYNC) == (number, False)
                await result_of(worker, "broker::disconnect", {"context": context})
            with pytest.raises(Unauthorized):
                await patiently(watch.next())

    run(scenario())


def test_handshakes_that_fail(run: Run) -> None:
    """Without an auth function the answer may be another one later; there is no use in others."""
    answers = [503, 429, 0, 101]

    async def answer(connection: ServerConnection, _: Request) -> Response | None:
        status = answers.pop(0) if len(answers) > 1 else answers[0]
        if status == 0:
            connection.transport.abort()
        return None if status == 101 else connection.respond(status or 500, "")

    async def sync(connection: ServerConnection) -> None:
        await connection.recv()
        names = {"type": "stream", "streamName": "s", "groupId": "g", "id": None}
        event = {"type": "sync", "data": [1], "ids": ["a"]}
        frame = {**names, "timestamp": 1, "seq": 1, "epoch": "e", "event": event}
        await connection.send(json.dumps(frame))

    async def scenario() -> None:
        async with serve(sync, "127.0.0.1", 0, process_request=answer) as server:
            port = server.sockets[0].getsockname()[1]
            async with Client(f"ws://127.0.0.1:{port}", proxy=None) as client:
                watch = client.watch("s", "g")
                assert told(await taken(watch, 1)) == [("sync", None, {"a": 1})]
                answers[:] = [404]
                with pytest.raises(BrokerError, match="404"):
                    await patiently(watch.next())
                answers[:] = [101]
                assert told(await taken(client.watch("s", "g"), 1)) == [("sync", None, {"a": 1})]

    run(scenario())


def test_address_that_is_none() -> None:
    with pytest.raises(InvalidURI):
        Client("http://localhost:3112")


def test_slow_reader_holds_back_the_broker_and_ends_up_right(
    memory_broker: Broker, run: Run
) -> None:
    """What is not taken stays in the socket, then the broker drops it and sends a sync."""

    async def scenario() -> None:
        async with (
            await Worker.open(memory_broker.worker_url) as worker,
            client_of(memory_broker, waiting_max=10) as client,
        ):
            watch = client.watch("slow", "g")
            await taken(watch, 1)
            for number in range(3000):
                data = {"n": number, "text": "x" * 10_000}
                await worker.void("stream::set", item("slow", "g", str(number % 50), data=data))
                if number % 100 == 0:
                    await worker.barrier()
            group = {"stream_name": "slow", "group_id": "g"}
            items = await result_of(worker, "broker::items", group)
            changes = []
            while watch.state.get("49", {}).get("n") != 2999:
                changes += await taken(watch, 1)
            seqs = [change.seq for change in changes]
            assert seqs == sorted(set(seqs))
            assert any(change.kind is Kind.SYNC for change in changes)
            for before, after in pairwise(changes):
                assert after.kind is Kind.SYNC or after.seq == before.seq + 1
            assert dict(watch.state) == {each["item_id"]: each["value"] for each in items}

    run(scenario())


def test_another_numbering_after_storage_in_memory_is_lost(run: Run) -> None:
    async def scenario(broker: Broker) -> None:
        async with client_of(broker) as client:
            async with await Worker.open(broker.worker_url) as worker:
                for name in "ab":
                    await result_of(worker, "stream::set", item("lost", "g", name, data=1))
                group, one = client.watch("lost", "g"), client.watch("lost", "g", "a")
                (first,) = await taken(group, 1)
                await taken(one, 1)
                await asyncio.to_thread(kill, broker, ["shard-0", "shard-1"])
                (second,) = await taken(group, 1)
                assert told([second]) == [("sync", None, {})]
                assert second.epoch != first.epoch
                assert told(await taken(one, 1)) == [("sync", "a", None)]
                await result_of(worker, "stream::set", item("lost", "g", "a", data=2))
            assert told(await taken(group, 1)) == [("create", "a", 2)]
            changes: list[Change] = []
            async with asyncio.timeout(PATIENCE_S):
                await read_until(one, lambda watch: watch.state == 2, changes)
            # An item may be synced twice: by the broker, and because the group's sync told of it.
            assert {change.epoch for change in changes} == {second.epoch}
            assert (dict(group.state), one.state) == ({"a": 2}, 2)

    with Broker(IN_MEMORY) as broker:
        run(scenario(broker))


def test_blocking_client(memory_broker: Broker, run: Run) -> None:
    with BlockingClient(memory_broker.stream_url, proxy=None) as client:
        watch = client.watch("blocking", "g")
        first = next(watch)
        assert (first.kind, first.data, watch.state) == (Kind.SYNC, {}, {})

        async def scenario() -> None:
            async with await Worker.open(memory_broker.worker_url) as worker:
                await result_of(worker, "stream::set", item("blocking", "g", "a", data=1))

        run(scenario())
        for change in watch:
            assert (change.kind, change.item_id, change.data) == (Kind.CREATE, "a", 1)
            break
        assert watch.state == {"a": 1}
        one = client.watch("blocking", "g", "a")
        assert next(one).data == 1
        one.close()
        assert one.next() is None
        closing = threading.Timer(0.1, client.close)
        closing.start()
        assert list(watch) == []  # waits until the client is closed
        closing.join()
        assert watch.next() is None
        with pytest.raises(RuntimeError):
            client.watch("blocking", "g")


GROUP_OF_PAGE = {"stream_name": "page", "group_id": "g"}


def test_page(auth_broker: Broker, run: Run, tmp_path: Path) -> None:
    """Tokens, refusals, watches that come later or end, in a browser."""

    async def last_of(page: Program, name: str, last: Any) -> Report:
        page.send("until", name=name, last=last)
        return await asyncio.to_thread(page.wait_for_keys, ended=name)

    async def visit(page: Program, worker: Worker, token: str) -> None:
        page.send("connect", url=auth_broker.stream_url, token=token)
        for name in ("g", "closed"):
            page.send("watch", name=name, stream="page", group=name)
        page.send("watch", name="item", stream="page", group="g", item="a")
        assert (await last_of(page, "g", "a"))["state"] == [["a", 1]]
        assert (await last_of(page, "item", 1))["states"] == 1
        error = await asyncio.to_thread(page.wait_for_keys, name="closed")
        assert error == {"error": "unauthorized", "name": "closed", "final": True}
        (connection,) = (await result_of(worker, "broker::connections", {}))["connections"]
        assert connection["context"] == {"token": token}
        page.send("watch", name="later", stream="page", group="g")
        later = await last_of(page, "later", "a")
        assert told(page_changes(later)) == [("sync", None, {"a": 1})]
        page.send("close", name="later")
        page.send("close", name="item")
        await result_of(worker, "stream::set", item("page", "g", "b", data=2))
        group = await last_of(page, "g", "b")
        assert told(page_changes(group)) == [("sync", None, {"a": 1}), ("create", "b", 2)]
        members = await result_of(worker, "broker::members", GROUP_OF_PAGE)
        assert members["count"] == 1
        page.send("end")
        async with asyncio.timeout(PATIENCE_S):
            while (await result_of(worker, "broker::connections", {}))["count"]:
                await asyncio.sleep(0.01)
        await result_of(worker, "stream::delete", item("page", "g", "b"))
        assert [report for report in page.reports if "page_error" in report] == []

    async def scenario() -> None:
        async with await auth_worker(auth_broker) as worker:

            def may_join(asked: Invocation) -> JSON:
                return {"unauthorized": asked.data["group_id"] == "closed"}

            await worker.register_function("page::may_join", may_join)
            await worker.register_trigger("stream:join", "page::may_join", {"stream_name": "page"})
            await result_of(worker, "stream::set", item("page", "g", "a", data=1))
            with page_of(tmp_path) as page:
                for token in ("good-as-a-subprotocol", "good, with=others"):
                    await visit(page, worker, token)

    run(scenario())
