"""The load generator tells what went wrong: seen against servers that do it."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve

from bench import generator
from bench.broker import Running
from bench.generator import Options
from bench.load import main as python_generator
from tests.conftest import Run

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")

Serve = Callable[[ServerConnection], Awaitable[None]]
SYNC = '{"type":"stream","id":null,"seq":%d,"epoch":"e","event":{"type":"sync","data":[]}}'
EVENT = '{"type":"stream","id":"i","seq":%d,"event":{"type":"update","data":{"at":%d}}}'
STAMP_BASE = 10**18


async def loaded(handler: Serve, options: Options) -> dict[str, Any]:
    """What the generator tells of a server whose connections `handler` serves."""
    async with serve(handler, "127.0.0.1", 0, max_size=None) as server:
        port = server.sockets[0].getsockname()[1]
        target = Running(port, port, {})
        return await asyncio.to_thread(generator.run, target, {"warm-up": 0, **options})


def answer(call: str, result: str = '"result":null') -> str:
    invocation = json.loads(call)["invocation_id"]
    return (
        f'{{"type":"invocationresult","invocation_id":"{invocation}","function_id":"stream::set",'
        f"{result}}}"
    )


async def answer_all(connection: ServerConnection) -> None:
    async for call in connection:
        await connection.send(answer(str(call)))


@pytest.mark.parametrize(
    ("numbers", "missed", "repeated"),
    [([6, 7, 8, 9], 0, 0), ([6, 8, 9], 1, 0), ([6, 7, 7, 8, 6], 0, 2)],
    ids=["all", "gap", "repeats"],
)
def test_every_seq_is_looked_at(run: Run, numbers: list[int], missed: int, repeated: int) -> None:
    async def handler(connection: ServerConnection) -> None:
        await connection.recv()
        await connection.send(SYNC % 5)
        for number in numbers:
            await connection.send(EVENT % (number, STAMP_BASE + 1))
        await connection.wait_closed()

    told = run(loaded(handler, {"subscribers": 1, "seconds": 0.3}))
    assert (told["missed"], told["repeated"]) == (missed, repeated)
    assert told["delivered_total"] == len(numbers)


def test_a_sync_in_between_tells_of_events_that_did_not_come(run: Run) -> None:
    async def handler(connection: ServerConnection) -> None:
        await connection.recv()
        for frame in (SYNC % 0, EVENT % (1, STAMP_BASE + 1), SYNC % 4, EVENT % (5, STAMP_BASE + 1)):
            await connection.send(frame)
        await connection.wait_closed()

    told = run(loaded(handler, {"subscribers": 1, "seconds": 0.3}))
    assert (told["resyncs"], told["missed"], told["delivered_total"]) == (1, 3, 2)


def test_an_event_that_never_comes_is_missed(run: Run) -> None:
    """Of three answered sets the subscriber gets two events."""
    clients: list[ServerConnection] = []

    async def handler(connection: ServerConnection) -> None:
        count = 0
        async for text in connection:
            if json.loads(str(text))["type"] == "join":
                clients.append(connection)
                await connection.send(SYNC % 0)
                continue
            count += 1
            await connection.send(answer(str(text)))
            if count < 3:
                await clients[0].send(EVENT % (count, STAMP_BASE + 1))

    options: Options = {"writers": 1, "subscribers": 1, "calls": 3, "drain": 0.3}
    told = run(loaded(handler, options))
    assert (told["delivered_total"], told["missed"], told["undelivered"]) == (2, 0, 1)


def test_calls_are_timed_by_their_id(run: Run) -> None:
    """The first of two calls is answered long after the second, and only then."""

    async def handler(connection: ServerConnection) -> None:
        first = str(await connection.recv())
        await connection.send(answer(str(await connection.recv())))
        await asyncio.sleep(0.2)
        await connection.send(answer(first))
        await connection.wait_closed()

    told = run(loaded(handler, {"writers": 1, "in-flight": 2, "calls": 2}))
    assert told["calls"] == 2
    assert told["call_p50_ms"] > 200
    assert told["unanswered"] == 0


def test_a_stall_counts_for_every_call_that_it_held_up(run: Run) -> None:
    async def handler(connection: ServerConnection) -> None:
        count = 0
        async for call in connection:
            count += 1
            if count == 50:
                await asyncio.sleep(0.5)
            await connection.send(answer(str(call)))

    options: Options = {"writers": 1, "in-flight": 1, "rate": 200, "seconds": 1}
    told = run(loaded(handler, options))
    # With one call under way the stall is one long call of some 150. It held up a hundred.
    assert told["call_p90_ms"] > 200


@pytest.mark.parametrize(
    "wrong",
    [
        lambda call: answer(call, '"error":{"code":"storage_failed","message":"no"}'),
        lambda call: answer(call).replace("-0000-4000-8000-00", "-0000-4000-8000-99"),
    ],
    ids=["an error", "of no call"],
)
def test_a_wrong_answer_fails_the_run(run: Run, wrong: Callable[[str], str]) -> None:
    async def handler(connection: ServerConnection) -> None:
        async for call in connection:
            await connection.send(wrong(str(call)))

    with pytest.raises(generator.LoadFailed, match=r"a call failed|an answer to no call"):
        run(loaded(handler, {"writers": 1, "calls": 1}))


def test_a_connection_that_ends_fails_the_run(run: Run) -> None:
    async def handler(connection: ServerConnection) -> None:
        await connection.recv()
        await connection.close(1011, "out of order")

    with pytest.raises(generator.LoadFailed, match="closed by the server: out of order"):
        run(loaded(handler, {"writers": 1}))


def test_messages_may_be_cut_anywhere_and_be_large(run: Run) -> None:
    """Syncs larger than what is read at once, joined again and again."""
    sync = SYNC % 0
    large = sync.replace("[]", "[" + ",".join(['"%s"' % ("x" * 1000)] * 700) + "]")

    async def handler(connection: ServerConnection) -> None:
        async for message in connection:
            if json.loads(message)["type"] == "join":
                await connection.send(large)

    told = run(loaded(handler, {"joiners": 3, "seconds": 0.5}))
    assert told["joins"] > 3
    assert told["received_bytes"] > 2 * len(large)


def test_the_generator_in_python_says_what_it_can_not_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["load", "--worker-port", "1", "--writers", "1", "--subscribers", "3"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as exit_:
        python_generator()
    assert exit_.value.code == 3
    assert "needs a C compiler" in capsys.readouterr().err
