"""`broker status` and `broker top`, and the functions behind them, against real processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from broker.names import Group
from broker.routing import shard_of
from tests.conftest import Run
from tests.front_door.test_command_line import Terminal, command, error_of, output_of, values_of
from tests.support.broker import IN_MEMORY, Broker
from tests.support.calls import LONG_S, item, result_of
from tests.support.stream_client import StreamClient
from tests.support.worker import Worker

EVIL = "e\x1b[31m\u202evil"


def wait_for(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG_S
    while not holds():
        assert time.monotonic() < end, "never came"
        time.sleep(0.1)


def status(broker: Broker) -> Any:
    (report,) = values_of(broker, "status")
    return report


def test_the_whole_broker_in_one_document(memory_broker: Broker, run: Run) -> None:
    async def main() -> Any:
        worker = await Worker.open(memory_broker.worker_url)
        await worker.register_function("f", lambda _: None)
        await worker.register_trigger("stream", "f", {"stream_name": "chat"})
        async with await StreamClient.open(memory_broker.stream_url) as client:
            await client.join("chat", "room")
            for n in range(50):
                await result_of(worker, "stream::set", item("chat", "room", "i", data=n))
            report = await asyncio.to_thread(status, memory_broker)
        await worker.close()
        return report

    report = run(main())
    children = memory_broker.children()
    assert report["ready"]
    assert report["reasons"] == []
    (gateway,) = report["gateways"]
    assert gateway["gateway_id"] == report["gateway_id"]
    assert (gateway["clients"], gateway["subscriptions"], gateway["groups"]) == (1, 1, 1)
    assert (gateway["workers"], gateway["functions"]) == (2, 1), "the command is one"
    assert [link["up"] for link in gateway["links"]] == [True, True]
    abouts = [gateway["about"], *(shard["about"] for shard in report["shards"])]
    assert {about["process"]: about["pid"] for about in abouts} == children
    for about in abouts:
        assert about["state"] == "up"
        assert about["restarts"] == 0
        assert about["memory_bytes"] > 1_000_000
        assert about["uptime_s"] > 0
    shard = report["shards"][shard_of(Group("chat", "room"), 2)]
    assert shard["about"]["rates"]["operations"] > 0
    assert shard["about"]["rates"]["events"] > 0
    assert shard["triggers"] == 1
    assert gateway["about"]["rates"]["deliveries"] > 0


def test_a_shard_that_hangs_and_one_that_was_started_again() -> None:
    with Broker(IN_MEMORY) as broker:
        pid = broker.children()["shard-1"]
        os.kill(pid, signal.SIGSTOP)
        first, second = status(broker)["shards"]
        assert first["about"]["state"] == "up"
        assert second["about"]["state"] == "down"
        assert second["about"]["reason"] == "no answer within 2 s"
        shown = command(broker, "top", "--json")
        assert shown.returncode == 0
        assert "shard 1 does not answer" in shown.stderr
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: status(broker)["shards"][1]["about"]["state"] == "up")
        about = status(broker)["shards"][1]["about"]
        assert (about["pid"], about["restarts"]) == (broker.children()["shard-1"], 1)
        assert status(broker)["gateways"][0]["links"][1]["links_made"] == 2


def test_a_shard_that_is_given_up() -> None:
    config = IN_MEMORY + "broker: {limits: {restarts_max: 1}}\n"
    with Broker(config) as broker:

        def given_up() -> bool:
            if (pid := broker.children().get("shard-0")) is not None:
                os.kill(pid, signal.SIGKILL)
            return "process_given_up process=shard-0" in broker.log

        wait_for(given_up)
        report = status(broker)
        assert report["reasons"] == ["shard 0 does not answer"]
        assert report["shards"][0]["about"]["state"] == "down"
        assert "not linked" in report["shards"][0]["about"]["reason"]
        assert report["shards"][1]["about"]["state"] == "up"
        assert not report["gateways"][0]["links"][0]["up"]


def test_top_finds_what_is_hot_among_many(memory_broker: Broker, run: Run) -> None:
    async def main() -> tuple[list[Any], list[Any]]:
        worker = await Worker.open(memory_broker.worker_url)
        async with await StreamClient.open(memory_broker.stream_url) as client:
            await client.join(EVIL, "watched")
            for turn in range(20):
                calls = [item(f"s{n % 10}", f"{turn}-{n}", "i", data=n) for n in range(100)]
                calls += [item(EVIL, "hot", "i", data=turn)] * 40
                calls += [item("second", "warm", "i", data=turn)] * 20
                calls += [item(EVIL, "watched", "i", data=turn)] * 5
                answers = [worker.call("stream::set", data, LONG_S) for data in calls]
                assert all("error" not in answer for answer in await asyncio.gather(*answers))
                await asyncio.sleep(0.15)  # so many batches a second that all are looked at
            found = await asyncio.to_thread(values_of, memory_broker, "top", "--limit", "3")
            refused = await worker.call("broker::top", {"limit": 101})
            assert refused["error"]["code"] == "deserialization_error"
        await worker.close()
        return found, await asyncio.to_thread(output_of, memory_broker, "top", "--once")

    found, _ = run(main())
    groups = [line for line in found if line["kind"] == "group"]
    streams = [line for line in found if line["kind"] == "stream"]
    assert [(g["stream_name"], g["group_id"]) for g in groups] == [
        (EVIL, "hot"),
        ("second", "warm"),
        (EVIL, "watched"),
    ]
    assert [s["stream_name"] for s in streams][:2] == [EVIL, "second"]
    assert len(streams) == 3
    hot, warm, watched = groups
    assert hot["operations_per_s"] == pytest.approx(2 * warm["operations_per_s"], rel=0.5)
    assert watched["deliveries_per_s"] > 0
    assert watched["subscriptions"] == 1
    assert hot["shard"] == shard_of(Group(EVIL, "hot"), 2)
    with Terminal(memory_broker, "top", "--once", width=100) as terminal:
        shown = terminal.all()
    assert any("hot" in line and "e\\x1b[31m\\u202evil" in line for line in shown)


@pytest.mark.parametrize("name", ["status", "top"])
def test_on_a_terminal_it_is_drawn_again_and_again(name: str, memory_broker: Broker) -> None:
    with Terminal(memory_broker, name, "--interval", "0.2", width=120) as terminal:
        terminal.until(lambda shown: shown.count("\x1b[H") >= 3)
        terminal.process.send_signal(signal.SIGINT)
        terminal.all()
    shown = terminal.shown
    assert shown.startswith("\x1b[?1049h\x1b[?25l")
    assert shown.endswith("\x1b[?25h\x1b[?1049l")
    assert "SHARD" in shown


def test_what_is_drawn_survives_a_gateway_that_dies() -> None:
    with (
        Broker(IN_MEMORY) as broker,
        Terminal(broker, "status", "--interval", "0.2", width=120) as terminal,
    ):
        terminal.until(lambda shown: "ready" in shown)
        os.kill(broker.children()["gateway"], signal.SIGKILL)
        terminal.until(lambda shown: "connection_lost" in shown or "unreachable" in shown)
        seen = len(terminal.shown)
        terminal.until(lambda shown: "  ready" in shown[seen:])
        terminal.process.send_signal(signal.SIGINT)
        terminal.all()


def test_lines_come_at_intervals_in_a_pipe(memory_broker: Broker) -> None:
    with Terminal(memory_broker, "status", "--json", "--interval", "0.2") as terminal:
        terminal.until(lambda shown: shown.count("\n") >= 3)
        terminal.process.send_signal(signal.SIGINT)
        lines = terminal.all()
    assert all(json.loads(line)["ready"] for line in lines)


@pytest.mark.parametrize(
    "arguments", [["top", "--limit", "0"], ["top", "--limit", "x"], ["status", "--interval", "0"]]
)
def test_a_wrong_option(arguments: list[str], memory_broker: Broker) -> None:
    assert error_of(command(memory_broker, *arguments)) == (2, "usage")


def test_nobody_is_there() -> None:
    for name in ("status", "top"):
        done = command(None, name, "--url", "ws://127.0.0.1:1", "--once")
        assert error_of(done) == (3, "unreachable")


def test_they_are_listed_with_the_broker_s_own(memory_broker: Broker, run: Run) -> None:
    async def main() -> list[str]:
        worker = await Worker.open(memory_broker.worker_url)
        listed = await result_of(worker, "engine::functions::list", {"include_internal": True})
        plain = await result_of(worker, "engine::functions::list", {})
        await worker.close()
        assert not any(f["function_id"].startswith("broker::") for f in plain["functions"])
        return [function["function_id"] for function in listed["functions"]]

    assert {"broker::status", "broker::top"} <= set(run(main()))
