"""One episode: a broker with many workers and clients, faults as planned, and the judgement."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.actors import GROUPS, STREAMS, Log, Subscriber, Watcher, Writer, now
from tests.chaos.plan import ALL, SUPERVISOR, Fault, plan
from tests.chaos.proxy import Proxy
from tests.sim import history
from tests.sim.checker import Report, check
from tests.sim.history import Caught, Final, Told
from tests.support.broker import Broker
from tests.support.calls import LONG_S, result_of
from tests.support.worker import Worker

SHARDS = 2
WRITERS, SUBSCRIBERS, WATCHERS = 6, 20, 3
HANG_S = 2.0
"""Configured: a process that is paused for longer is killed by the supervisor."""
RECOVERY_S = 60.0
"""How long the broker may take to serve again."""
QUIET_S = 3.0
"""Of writing after all is well again."""

CONFIG = f"""
workers:
  - name: iii-stream
    config:
      adapter: {{name: kv, config: {{store_method: file_based}}}}
broker:
  limits:
    hang_timeout_s: {HANG_S}
    restarts_max: 1000000
    history_events_max: 100000
    history_group_bytes_max: 1000000000
"""


@dataclass
class Outcome:
    """What came of an episode."""

    report: Report
    records: list[history.Record]
    killed: int = 0
    paused: int = 0
    connections_cut: int = 0
    restarted: int = 0
    answered: int = 0
    broken: list[str] = field(default_factory=list)
    """What was wrong beside what the checker judges."""

    @property
    def ok(self) -> bool:
        return not self.report.violations and not self.broken


async def run(seed: int, faults: int, say: Callable[[str], None] = lambda _: None) -> Outcome:
    """Live through the episode that `seed` tells."""
    with await asyncio.to_thread(Broker, CONFIG, SHARDS) as broker:
        return await _Episode(broker, seed, say).run(plan(seed, SHARDS, faults))


class _Episode:
    def __init__(self, broker: Broker, seed: int, say: Callable[[str], None]) -> None:
        self._broker = broker
        self._rng = random.Random(f"actors {seed}")
        self._say = say
        self._log = Log()
        self._outcome = Outcome(Report(), self._log.records)
        self._began = now()

    async def run(self, faults: list[Fault]) -> Outcome:
        broker, log, outcome = self._broker, self._log, self._outcome
        async with AsyncExitStack() as stack:
            self._proxies = [Proxy(*_address(u)) for u in (broker.worker_url, broker.stream_url)]
            worker_url, stream_url = [await proxy.open() for proxy in self._proxies]
            for proxy in self._proxies:
                stack.push_async_callback(proxy.close)
            writers = [Writer(f"w{n}", worker_url, log, self._own(n)) for n in range(WRITERS)]
            clients = [
                Subscriber(f"s{n}", stream_url, log, self._own(n)) for n in range(SUBSCRIBERS)
            ]
            watchers = [Watcher(f"t{n}", worker_url, log, self._own(n)) for n in range(WATCHERS)]
            writing = [asyncio.create_task(writer.run()) for writer in writers]
            others = [asyncio.create_task(one.run()) for one in (*clients, *watchers)]
            await asyncio.sleep(0.5)
            for fault in faults:
                await asyncio.sleep(fault.after_s)
                await self._do(fault)
            await self._recovered()
            await asyncio.sleep(QUIET_S)
            log.stopping.set()
            await _done(writing)
            await self._recovered()
            worker = await Worker.open(broker.worker_url)
            finals = [await _final(worker, s, g) for s in STREAMS for g in GROUPS]
            await worker.close()
            await _caught_up(clients, {(f.stream, f.group): f.seq for f in finals})
            for client in clients:
                log.add(Caught(subscriber=client.name))
            await asyncio.sleep(0.2)  # whatever comes twice comes now
            for final in finals:
                log.add(final)
            log.over = True
            for task in others:
                task.cancel()
            await _done(others)
        outcome.answered = sum(writer.answered for writer in writers)
        outcome.report = await asyncio.to_thread(check, log.records)
        return outcome

    def _own(self, number: int) -> random.Random:
        return random.Random(f"{self._rng.random()} {number}")

    async def _do(self, fault: Fault) -> None:
        self._say(f"{now() - self._began:6.2f} {fault}")
        self._note(str(fault))
        match fault.kind:
            case "kill":
                await self._kill(fault.targets)
            case "pause":
                await self._pause(fault.targets[0], fault.lasts_s)
            case "cut":
                for proxy in self._proxies:
                    self._outcome.connections_cut += proxy.cut(fault.share, self._rng)
            case "restart":
                await self._recovered()
                code = await asyncio.to_thread(self._broker.stop)
                if code != 0:
                    self._outcome.broken.append(f"{fault}: exit code {code}")
                await asyncio.to_thread(self._broker.start)
                self._outcome.restarted += 1
        self._note(f"{fault}: over")

    def _note(self, what: str) -> None:
        self._log.add(history.Fault(at=now(), what=what))

    async def _kill(self, targets: tuple[str, ...]) -> None:
        children = await asyncio.to_thread(self._broker.children)
        names = [*children, SUPERVISOR] if targets == (ALL,) else targets
        if SUPERVISOR in names:
            assert self._broker.process is not None
            pids = {**children, SUPERVISOR: self._broker.process.pid}
        else:
            pids = children
        for name in names:
            if name in pids:  # else it is dead just now
                with suppress(ProcessLookupError):
                    os.kill(pids[name], signal.SIGKILL)
                    self._outcome.killed += 1
        if SUPERVISOR in names:
            await self._orphans_end()
            await asyncio.to_thread(self._broker.kill)  # forgets the process
            await asyncio.to_thread(self._broker.start)

    async def _orphans_end(self) -> None:
        """Who has lost its supervisor ends by itself."""
        end = now() + RECOVERY_S
        while children := await asyncio.to_thread(self._broker.children):
            if now() > end:
                self._outcome.broken.append(f"orphans: {children}")
                return
            await asyncio.sleep(0.05)

    async def _pause(self, target: str, lasts_s: float) -> None:
        pid = (await asyncio.to_thread(self._broker.children)).get(target)
        if pid is None:
            return
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            self._outcome.paused += 1
        end = now() + lasts_s
        while now() < end:
            self._note(f"{target} is paused")
            await asyncio.sleep(min(0.5, max(0.0, end - now())))
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    async def _recovered(self) -> None:
        """Wait until every part serves."""
        end = now() + RECOVERY_S
        url = self._broker.stream_url.replace("ws://", "http://") + "/readyz"
        while not await asyncio.to_thread(_is_ready, url):
            process = self._broker.process
            if process is None or process.poll() is not None:
                raise AssertionError(f"the broker has ended\n{self._broker.log_tail()}")
            if now() > end:
                raise AssertionError(f"not ready again\n{self._broker.log_tail()}")
            await asyncio.sleep(0.1)
        self._note("recovered")


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return int(response.status) == 200
    except OSError:
        return False


def _address(url: str) -> tuple[str, int]:
    host, port = url.split("/")[2].rsplit(":", 1)
    return host, int(port)


async def _done(tasks: Iterable[asyncio.Task[None]]) -> None:
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Exception):
            raise outcome


async def _final(worker: Worker, stream: str, group: str) -> Final:
    names = {"stream_name": stream, "group_id": group}
    items = await result_of(worker, "broker::items", names)
    events: list[Told] = []
    while True:
        since = events[-1].seq if events else 0
        ask = {**names, "since": since, "limit": 1000}
        page: dict[str, Any] = await result_of(worker, "stream::history", ask)
        assert page["complete"], page["seq"]
        events += [_told(frame) for frame in page["events"]]
        if not page["events"]:
            break
    return Final(
        stream=stream,
        group=group,
        epoch=page["epoch"],
        seq=page["seq"],
        items=[(entry["item_id"], entry["value"]) for entry in items],
        events=events,
    )


def _told(frame: dict[str, Any]) -> Told:
    event = frame["event"]
    custom = event["event"] if event["type"] == "event" else {}
    return Told(
        kind=event["type"],
        seq=frame["seq"],
        timestamp=frame["timestamp"],
        item=frame["id"],
        data=custom.get("data") if custom else event.get("data"),
        name=custom.get("type"),
    )


async def _caught_up(clients: list[Subscriber], ends: dict[tuple[str, str], int]) -> None:
    """Wait until all have the last event that concerns them; not for ever: the checker tells."""
    with suppress(TimeoutError):
        async with asyncio.timeout(LONG_S / 4):
            while not all(c.live and _has_all(c, ends) for c in clients):
                await asyncio.sleep(0.05)


def _has_all(client: Subscriber, ends: dict[tuple[str, str], int]) -> bool:
    # what is of other items does not come to who watches one
    return client.item is not None or client.seq == ends[client.stream, client.group]
