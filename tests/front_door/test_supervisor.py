"""`broker serve` starts again what dies or hangs, and gives up what dies again and again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable

import yaml

from broker.names import Group
from broker.routing import shard_of
from tests.conftest import Run
from tests.support.broker import IN_MEMORY, Broker
from tests.support.calls import LONG_S, item, result_of
from tests.support.worker import Worker


def with_limits(**limits: float) -> str:
    return IN_MEMORY + yaml.safe_dump({"broker": {"limits": limits}})


def wait_for(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG_S
    while not holds():
        assert time.monotonic() < end, "never came"
        time.sleep(0.05)


def readyz(broker: Broker) -> tuple[int, str]:
    url = broker.stream_url.replace("ws://", "http://") + "/readyz"
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_what_hangs_is_started_again(run: Run) -> None:
    """A shard, then the gateway; who is not concerned goes on."""

    async def calls(broker: Broker, shard: int) -> None:
        worker = await Worker.open(broker.worker_url)
        group = next(g for n in range(99) if shard_of(Group("s", g := f"g{n}"), 2) == shard)
        await result_of(worker, "stream::set", item("s", group, "i", data=1))
        await worker.close()

    with Broker(with_limits(hang_timeout_s=2)) as broker:
        before = broker.children()
        os.kill(before["shard-0"], signal.SIGSTOP)
        run(calls(broker, 1))
        wait_for(lambda: broker.children().get("shard-0") not in (None, before["shard-0"]))
        wait_for(lambda: readyz(broker)[0] == 200)
        run(calls(broker, 0))
        assert "process_hung process=shard-0" in broker.log
        os.kill(broker.children()["gateway"], signal.SIGSTOP)
        wait_for(lambda: broker.children().get("gateway") not in (None, before["gateway"]))
        wait_for(lambda: broker.log.count("process_restarted") == 2)
        run(calls(broker, 0))
        now = broker.children()
        assert now["shard-1"] == before["shard-1"]


def test_a_busy_process_is_not_taken_for_hung(run: Run) -> None:
    async def main(broker: Broker) -> None:
        worker = await Worker.open(broker.worker_url)
        end = asyncio.get_running_loop().time() + 3
        while asyncio.get_running_loop().time() < end:
            calls = [worker.call("stream::list_all", {}, LONG_S) for _ in range(200)]
            await asyncio.gather(*calls)
        await worker.close()

    with Broker(with_limits(hang_timeout_s=1)) as broker:
        before = broker.children()
        run(main(broker))
        assert broker.children() == before


def test_what_dies_again_and_again_is_given_up(run: Run) -> None:
    """The rest works on, `/readyz` tells; without its gateway a broker is of no use and ends."""

    async def others_work(broker: Broker) -> None:
        worker = await Worker.open(broker.worker_url)
        answers = [
            await worker.call("stream::set", item("s", f"g{n}", "i", data=1), LONG_S)
            for n in range(8)
        ]
        assert any("result" in answer for answer in answers)
        codes = {answer["error"]["code"] for answer in answers if "error" in answer}
        assert codes == {"shard_unavailable"}
        await worker.close()

    def kill(broker: Broker, name: str) -> bool:
        with contextlib.suppress(KeyError, ProcessLookupError):
            os.kill(broker.children()[name], signal.SIGKILL)
        return f"process_given_up process={name}" in broker.log

    with Broker(with_limits(restarts_max=3)) as broker:
        wait_for(lambda: kill(broker, "shard-1"))
        assert broker.log.count("process_died process=shard-1") == 3
        status, text = readyz(broker)
        assert (status, "shard 1" in text) == (503, True)
        run(others_work(broker))
        assert broker.process is not None
        assert broker.process.poll() is None
        wait_for(lambda: kill(broker, "gateway"))
        assert broker.process.wait(LONG_S) == 1
        broker.kill()
