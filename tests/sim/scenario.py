"""One run: what a seed makes of the broker, its users and its bad luck, and what came of it."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec

from broker.config import KIB, MIB, Config, Limits
from broker.names import Group
from broker.routing import shard_of
from shards.group import Change
from tests.sim import history
from tests.sim.checker import Report, Violation, check
from tests.sim.history import Caught, Fault, Final, Record, Told
from tests.sim.loop import World
from tests.sim.network import Connection, Network
from tests.sim.peers import STREAM_PORT, WORKER_PORT, Client, Peer, Place, Script, Worker
from tests.sim.processes import GatewayProcess, Machine, Process, Shard, nothing_by_chance

REST_S_MIN, REST_S_MAX = 9.0, 150.0
"""How long the world is left in peace at the end: at least, and until it counts as stuck."""
QUIET_LOOKS = 4
"""So often in a row, a second apart, nothing is under way before a run ends: a broker may put
something off for some seconds."""
FAULT_REACH_S = 4.0
"""See `check`: slow connections and conditions hold triggers up for so long."""

_decode = msgspec.json.decode


class Result(msgspec.Struct):
    """What came of a seed. `digest`: of all that was recorded, and of how it came about."""

    seed: int
    report: Report
    records: list[Record]
    steps: int
    virtual_s: float
    digest: str

    @property
    def violations(self) -> list[Violation]:
        return self.report.violations


def run(seed: int, tell: Callable[[str], None] | None = None) -> Result:
    """Run a seed, and judge it.

    Args:
        tell: is given a line for each fault and each record, as it happens.
    """
    memory = Path("/dev/shm")
    folder = tempfile.mkdtemp(prefix="sim-", dir=memory if memory.is_dir() else None)
    logging.disable(logging.CRITICAL if tell is None else logging.NOTSET)
    try:
        return _Run(seed, Path(folder), tell).result()
    finally:
        logging.disable(logging.NOTSET)
        shutil.rmtree(folder)


class _Run:
    def __init__(self, seed: int, folder: Path, tell: Callable[[str], None] | None) -> None:
        self.seed = seed
        self.network = Network()
        self.world = World(seed, self.network.connect)
        self.rng = rng = self.world.rng
        self._tell = tell
        self.records: list[Record] = []
        self.wrong: list[Violation] = []
        self.made: dict[tuple[str, str, int], Told] = {}
        self.machine = Machine(self.world, self._made)
        self.settings = _settings(rng, folder, tight=self.machine.tight)
        self.places = tuple(
            Place(f"s{stream}", f"g{group}", ("a", "b", "c")[: rng.randint(1, 3)])
            for stream in range(rng.randint(1, 3))
            for group in range(rng.randint(1, 3))
        )
        self.script = Script(
            self.places,
            self._record,
            pause_s=rng.choice([0.02, 0.1, 0.2, 0.8]),
            padding_max=200_000 if self.machine.tight else rng.choice([10, 200, 20_000]),
        )
        self.shards = [
            Shard(self.machine, index, self.settings, folder)
            for index in range(self.settings.shards)
        ]
        self.gateway = GatewayProcess(self.machine, self.settings)
        self.processes: list[Process] = [*self.shards, self.gateway]
        for process in self.processes:
            process.ended = self._ended
        self.workers = [Worker(self.world, f"w{n}", self.script) for n in range(rng.randint(1, 4))]
        self.clients = [
            Client(self.world, f"c{n}", self.script, steady=n == 0)
            for n in range(rng.randint(1, 4))
        ]
        self.load_s = 1 + 7 * rng.random() ** 2
        self._quiet_looks = 0

    def result(self) -> Result:
        with nothing_by_chance(self.machine):
            self._begin()
            self.world.run()
            self.world.close()
        report = check(self.records, FAULT_REACH_S)
        report.violations[:0] = [
            *self.wrong,
            *(
                Violation("exception", f"{name}: {context.get('message')}: {_shown(context)}")
                for name, context in self.world.faults
            ),
        ]
        digest = blake2b(history.dump(self.records), digest_size=8)
        digest.update(f"{self.world.steps} {self.world.now!r}".encode())
        return Result(
            self.seed,
            report,
            self.records,
            self.world.steps,
            self.world.now - 1000,
            digest.hexdigest(),
        )

    # What happens.

    def _begin(self) -> None:
        rng, after = self.rng, self.world.after
        self._note(f"{self.settings.shards} shards, {self.places}, {self.settings.limits}")
        for process in self.processes:
            after(0.3 * rng.random(), process.start)
        for peer in self._peers:
            after(0.5 * rng.random(), peer.start)
        faults = rng.choice([0, 3, 6, 10, 15])
        for _ in range(faults):
            fault, weights = zip(*self._faults.items(), strict=True)
            after(0.5 + self.load_s * rng.random(), rng.choices(fault, weights)[0])
        after(0.5 + self.load_s, self._rest)

    @property
    def _peers(self) -> list[Peer]:
        return [*self.workers, *self.clients]

    @property
    def _faults(self) -> dict[Callable[[], None], int]:
        """What may go wrong, and how often one is chosen."""
        return {
            self._kill_shard: 6,
            self._kill_gateway: 3,
            self._kill_all: 1,
            self._stop: 2,
            self._cut_link: 3,
            self._slow_down: 2,
            self._pause: 2,
            self._cut_peer: 3,
            self._stall_peer: 2,
            self._kill_peer: 2,
            self._break_disk: 3,
            self._set_clock: 4,
        }

    def _kill_shard(self) -> None:
        self._kill(self.rng.choice(self.shards))

    def _kill_gateway(self) -> None:
        self._kill(self.gateway)

    def _kill_all(self) -> None:
        for process in self.processes:
            process.kill()

    def _kill(self, process: Process) -> None:
        """At once, or in the midst of one of the next things that it does."""
        if not process.lives:
            return
        assert process.loop is not None, "it lives"
        if self.rng.random() < 0.3:
            process.kill()
        else:
            process.loop.dies_in = self.rng.randint(1, 60)

    def _stop(self) -> None:
        """In order: whatever was asked is finished, within a time."""
        process = self.rng.choice(self.processes)
        self._fault(f"stop {process.name}", process)
        process.stop()

    def _ended(self, process: Process, how: str) -> None:
        self._fault(f"{how} {process.name}", process)
        if self.rng.random() < 0.4:
            self._set_clock()
        self.world.after(0.02 + 2 * self.rng.random() ** 2, process.start)

    def _cut_link(self) -> None:
        links = self._connections("/")
        if links:
            link = self.rng.choice(links)
            shard = self._shard_at(link)
            self._fault(f"cut {shard.name}", shard)
            link.cut()

    def _slow_down(self) -> None:
        connections = self.network.open()
        if connections:
            connection = self.rng.choice(connections)
            connection.slowness = 10 ** (1 + 1.5 * self.rng.random())
            self._note(f"slow {connection.client.loop.name} {connection.slowness:.0f}")
            if connection.address in (STREAM_PORT, WORKER_PORT):
                self._peer_of(connection).disturbed()
            self.world.after(3 * self.rng.random(), self._as_usual, connection)

    def _as_usual(self, connection: Connection) -> None:
        connection.slowness = 1.0

    def _pause(self) -> None:
        process = self.rng.choice(self.processes)
        if process.lives and process.loop is not None and not process.loop.paused:
            loop = process.loop
            self._fault(f"pause {process.name}", process)
            loop.pause()

            def resume() -> None:
                if loop.paused and not loop.dead:
                    self._fault(f"resume {process.name}", process)
                    loop.resume()

            self.world.after(16 * self.rng.random() ** 2, resume)

    def _cut_peer(self) -> None:
        if connections := self._connections(STREAM_PORT, WORKER_PORT):
            connection = self.rng.choice(connections)
            self._note(f"cut {connection.client.loop.name}")
            self._peer_of(connection).disturbed()
            connection.cut()

    def _stall_peer(self) -> None:
        if connections := self._connections(STREAM_PORT, WORKER_PORT):
            connection = self.rng.choice(connections)
            self._note(f"stall {connection.client.loop.name}")
            self._peer_of(connection).disturbed()
            connection.stall(True)
            self.world.after(12 * self.rng.random(), connection.stall, False)

    def _kill_peer(self) -> None:
        peer = self.rng.choice(self._peers)
        if peer.loop is not None and not peer.loop.dead:
            self._note(f"kill {peer.name}")
            peer.kill()
            self.world.after(0.1 + self.rng.random(), peer.start)

    def _break_disk(self) -> None:
        kind = self.rng.choice(["full", "failing"])
        setattr(self.machine, kind, True)
        self._note(f"disk {kind}")
        self.world.after(2 * self.rng.random(), self._mend_disk)

    def _mend_disk(self) -> None:
        self.machine.full = self.machine.failing = False

    def _set_clock(self) -> None:
        scale = self.rng.choice([0.1, 5, 6 * 3600])
        self.machine.offset_s += scale * (2 * self.rng.random() - 1)
        self._note(f"clock {self.machine.offset_s - 1.7e9:.1f}")

    def _connections(self, *addresses: str) -> list[Connection]:
        return [c for c in self.network.open() if c.address.startswith(addresses)]

    def _peer_of(self, connection: Connection) -> Peer:
        return next(p for p in self._peers if p.loop is connection.client.loop)

    def _shard_at(self, link: Connection) -> Process:
        return next(s for s in self.shards if f"shard-{s.index}.sock" in link.address)

    # The end.

    def _rest(self) -> None:
        """Nothing bad happens any more, and nobody does anything new."""
        self._note("rest")
        self._mend_disk()
        for process in self.processes:
            if process.lives and process.loop is not None:
                process.loop.dies_in = 0  # also of those that are stopping: they are started again
                process.loop.resume()
        for connection in self.network.open():
            connection.slowness = 1.0
            connection.stall(False)
        for peer in self._peers:
            peer.quiet = True
        self.world.after(REST_S_MIN, self._look, self.world.now + REST_S_MAX)

    def _look(self, until: float) -> None:
        busy = [p.name for p in self.processes if not p.lives]
        busy += [w.name for w in self.workers if not w.idle]
        busy += [c.name for c in self.clients if not c.idle]
        busy += [c.client.loop.name for c in self.network.open() if not c.quiet]
        self._quiet_looks = 0 if busy else self._quiet_looks + 1
        if self._quiet_looks < QUIET_LOOKS and self.world.now < until:
            # Not in step with the pings, which are on the way for a moment each.
            self.world.after(self.world.rng.uniform(0.5, 1.5), self._look, until)
            return
        if busy:
            self.wrong.append(Violation("stuck", f"{', '.join(busy)} after {REST_S_MAX:.0f} s"))
        auditor = _Auditor(self)
        auditor.start()
        self.world.after(REST_S_MAX, self._give_up)

    def _give_up(self) -> None:
        self.wrong.append(Violation("stuck", "the groups can't be read at the end"))
        self.world.stopped = True

    def ended(self) -> None:
        """All was read."""
        for client in self.clients:
            for subscriber in client.subscribers.values():
                self._record(Caught(subscriber=subscriber.name))
        self.world.stopped = True

    # What is recorded.

    def _record(self, record: Record) -> None:
        self.records.append(record)
        self._note(record)

    def _note(self, what: object) -> None:
        if self._tell is not None:
            self._tell(f"{self.world.now - 1000:10.6f} {what}")

    def _fault(self, what: str, process: Process) -> None:
        groups = None
        if isinstance(process, Shard):
            count = self.settings.shards
            groups = [
                (p.stream, p.group)
                for p in self.places
                if shard_of(Group(p.stream, p.group), count) == process.index
            ]
        self._record(Fault(at=self.world.now, what=what, groups=groups))

    def _made(self, stream: str, group: str, change: Change) -> None:
        """A change was made in memory. It may still come to nothing; but of those that were made
        under one seq, the last one was committed if any was."""
        told = Told(
            kind=change.kind.value,
            seq=change.seq,
            timestamp=change.timestamp_ms,
            item=change.item_id,
            data=_decode(change.data),
            name=change.event_type,
        )
        self.made[stream, group, change.seq] = told
        self._note(f"made {stream}/{group} {told}")

    def events(self, place: Place, last: int) -> list[Told]:
        """The events of a group that came to `last`."""
        keys = ((place.stream, place.group, seq) for seq in range(1, last + 1))
        return [self.made[key] for key in keys if key in self.made]


class _Auditor(Worker):
    """Reads every group when all has come to rest."""

    def __init__(self, run: _Run) -> None:
        super().__init__(run.world, "auditor", run.script)
        self._run_of = run

    def _session(self) -> list[Any]:
        return [self._read_all()]

    async def _read_all(self) -> None:
        run = self._run_of
        groups: dict[str, list[str]] = {}
        for place in run.places:
            items = await self.ask("broker::items", place.names)
            told = await self.ask("stream::history", {**place.names, "limit": 1000})
            past = told["result"]
            if items["result"]:
                groups.setdefault(place.stream, []).append(place.group)
            events = [_told(envelope) for envelope in past["events"]]
            run._record(
                Final(
                    stream=place.stream,
                    group=place.group,
                    epoch=past["epoch"],
                    seq=past["seq"],
                    items=[(entry["item_id"], entry["value"]) for entry in items["result"]],
                    events=events + run.events(place, past["seq"]),
                )
            )
        listed = (await self.ask("stream::list_all", {}))["result"]["stream"]
        if groups != {stream["id"]: stream["groups"] for stream in listed}:
            run.wrong.append(Violation("list_all", f"{listed}, not {groups}"))
        run.ended()


def _told(envelope: dict[str, Any]) -> Told:
    event = envelope["event"]
    custom = event["type"] == "event"
    return Told(
        kind=event["type"],
        seq=envelope["seq"],
        timestamp=envelope["timestamp"],
        item=envelope["id"],
        data=event["event"]["data"] if custom else event["data"],
        name=event["event"]["type"] if custom else None,
    )


def _settings(rng: Any, folder: Path, *, tight: bool) -> Config:
    return Config(
        shards=rng.randint(1, 3),
        run_dir=str(folder),
        limits=Limits(
            history_events_max=rng.choice([1000, 1000, 50, 8]),
            group_cache_bytes_max=rng.choice([256 * MIB, 64 * KIB, 8 * KIB]),
            client_send_queue_bytes_max=4 * KIB if tight else rng.choice([MIB, 64 * KIB]),
            link_queue_bytes_max=32 * KIB if tight else 64 * MIB,
            ping_interval_s=1.0,
            ping_timeout_s=4.0,
            stalled_timeout_s=4.0,
        ),
    )


def _shown(context: dict[str, Any]) -> str:
    error = context.get("exception")
    if error is None:
        return ""
    trace = error.__traceback__
    where = ""
    while trace is not None:
        code = trace.tb_frame.f_code
        where = f" in {Path(code.co_filename).name}:{trace.tb_lineno} {code.co_name}"
        trace = trace.tb_next
    return f"{error!r}{where}"
