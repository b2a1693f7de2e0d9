"""Clients that come and go, also without a word, leave nothing behind in any process."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from websockets.frames import CloseCode, Frame, Opcode

from tests.conftest import Run
from tests.support.broker import IN_MEMORY, Broker
from tests.support.calls import LONG_S
from tests.support.stream_client import UPGRADE, RawHttp
from tests.support.worker import Worker

WARM_UP_CYCLES = 1_000
CYCLES = 3_000
AT_ONCE = 8
GROUPS_JOINED = 3
NAME_BYTES = 1_000
"""Long names: whatever is kept of a group or subscription is seen in the memory."""
GROWTH_BYTES_MAX = 4 * 1024 * 1024
GROWTH_SHARE_MAX = 0.1
GAUGES = (
    'broker_connections{port="stream"}',
    "broker_subscriptions",
    "broker_subscribed_groups",
    "broker_invocations_pending",
)
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing drops what waits and sends RST


def metrics(url: str) -> dict[str, float]:
    """The samples of `/metrics`: name with labels to value."""
    with urllib.request.urlopen(url, timeout=LONG_S) as response:
        lines = response.read().decode().splitlines()
    samples = (line.rpartition(" ") for line in lines if line[:1] not in ("#", ""))
    return {name: float(value) for name, _, value in samples}


def open_files(pids: Sequence[int]) -> list[int]:
    """How many descriptors each process has open."""
    return [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids]


def resident_bytes(pids: Sequence[int]) -> list[int]:
    """The memory of each process."""
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    return [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page_bytes for pid in pids]


async def until(holds: Callable[[], bool], what: Callable[[], Any]) -> None:
    """Return when `holds()`; fail with `what()` when that takes too long."""
    try:
        async with asyncio.timeout(LONG_S):
            while not holds():
                await asyncio.sleep(0.05)
    except TimeoutError:
        pytest.fail(f"left behind: {what()}")


def group_of(cycle: int, n: int) -> str:
    return f"{cycle}-{n}-".ljust(NAME_BYTES, "x")


def joins_of(cycle: int) -> bytes:
    """The frames of a client that joins groups of its own, one of them by an item."""
    frames = []
    for n in range(GROUPS_JOINED):
        group = group_of(cycle, n)
        data = {"subscriptionId": group, "streamName": "leaks", "groupId": group}
        text = json.dumps({"type": "join", "data": data | ({"id": "i"} if n == 0 else {})})
        frames.append(Frame(Opcode.TEXT, text.encode()).serialize(mask=True))
    return b"".join(frames)


async def come_and_go(url: str, cycle: int) -> None:
    """Connect, join, and end: every other time by RST, else in order.

    Half of the clients of either kind wait for their syncs, half do not.
    """
    http = await RawHttp.request(url, UPGRADE)
    try:
        assert (await http.response(LONG_S)).status == 101
        http.writer.write(joins_of(cycle))
        if waits(cycle):
            for _ in range(GROUPS_JOINED):
                assert (await http.frame(LONG_S))["event"]["type"] == "sync"
        if cycle % 2:
            tcp: socket.socket = http.writer.get_extra_info("socket")
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        else:
            close = Frame(Opcode.CLOSE, CloseCode.NORMAL_CLOSURE.to_bytes(2))
            http.writer.write(close.serialize(mask=True))
            assert await http.close_code(LONG_S) == CloseCode.NORMAL_CLOSURE
    finally:
        http.writer.transport.abort()


def waits(cycle: int) -> bool:
    return cycle % 4 < 2


async def come_and_go_all(url: str, cycles: range) -> None:
    waiting: Iterator[int] = iter(cycles)

    async def one_after_the_other() -> None:
        for cycle in waiting:
            await come_and_go(url, cycle)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(AT_ONCE):
            tasks.create_task(one_after_the_other())


async def all_gone(broker: Broker) -> None:
    def left() -> dict[str, float]:
        samples = metrics(broker.metrics_url)
        return {name: samples[name] for name in GAUGES if samples[name]}

    await until(lambda: not left(), left)


async def check_nothing_is_left(broker: Broker) -> None:
    """Measure after a first round, and again after a second one that is three times as long."""
    names, pids = zip(*broker.children().items(), strict=True)
    files = open_files(pids)
    await come_and_go_all(broker.stream_url, range(WARM_UP_CYCLES))
    await all_gone(broker)
    before = resident_bytes(pids)
    await come_and_go_all(broker.stream_url, range(WARM_UP_CYCLES, WARM_UP_CYCLES + CYCLES))
    await all_gone(broker)
    await until(lambda: open_files(pids) <= files, lambda: (names, files, open_files(pids)))
    for name, earlier, later in zip(names, before, resident_bytes(pids), strict=True):
        bytes_max = earlier * (1 + GROWTH_SHARE_MAX) + GROWTH_BYTES_MAX
        assert later < bytes_max, f"memory of {name}: {earlier} bytes, then {later}"


def test_clients_leave_nothing_behind(memory_broker: Broker, run: Run) -> None:
    run(check_nothing_is_left(memory_broker))


def test_clients_leave_nothing_behind_but_leave_triggers(run: Run) -> None:
    """The same, with a worker that is told of every subscription that ends, exactly once."""

    async def scenario(broker: Broker) -> None:
        async with await Worker.open(broker.worker_url) as worker:
            left: Counter[str] = Counter()
            await worker.register_function(
                "leaks::left", lambda invocation: left.update([invocation.data["group_id"]])
            )
            await worker.register_trigger("stream:leave", "leaks::left", {})
            await worker.barrier()
            await check_nothing_is_left(broker)
            assert set(left.values()) == {1}
            synced = {
                group_of(cycle, n)
                for cycle in range(WARM_UP_CYCLES + CYCLES)
                if waits(cycle)
                for n in range(GROUPS_JOINED)
            }
            assert synced <= set(left)

    with Broker(IN_MEMORY) as broker:
        run(scenario(broker))
