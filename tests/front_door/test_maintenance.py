"""`broker reshard`, `broker backup` and `broker restore` on the data of real brokers."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from broker.names import Group
from broker.routing import shard_of
from tests.conftest import Run
from tests.support.broker import REPOSITORY, Broker, StartFailed
from tests.support.calls import item, result_of
from tests.support.stream_client import StreamClient
from tests.support.worker import Worker

STREAMS = ["chat", "a/b:c", "%~", "x" * 300, "", "é\n"]


def command(*words: str | Path, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "broker", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **(env or {})},
    )


def done(*words: str | Path) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    process = command(*words)
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


async def fill(broker: Broker) -> None:
    worker = await Worker.open(broker.worker_url)
    for stream in STREAMS:
        for number in range(8):
            group = f"g{number}"
            for name in ("b", "a", "c"):
                data = {"id": name, "n": number, "stream": stream}
                await result_of(worker, "stream::set", item(stream, group, name, data=data))
            await result_of(worker, "stream::delete", item(stream, group, "c"))
    await result_of(worker, "stream::set", item("chat", "empty", "x", data=1))
    await result_of(worker, "stream::delete", item("chat", "empty", "x"))
    await worker.close()


async def contents(broker: Broker) -> Any:
    """Everything that can be seen: items in their order, numbering, history."""
    worker = await Worker.open(broker.worker_url)
    found = {}
    everything = await result_of(worker, "stream::list_all", {})
    groups = [(s["id"], g) for s in everything["stream"] for g in s["groups"]]
    for stream, group in [*groups, ("chat", "empty")]:
        names = {"stream_name": stream, "group_id": group}
        found[stream, group] = (
            await result_of(worker, "broker::items", names),
            await result_of(worker, "stream::history", names),
        )
    await worker.close()
    return found


def test_reshard(run: Run) -> None:
    """All of it, there and back; clients resume, and each group lies where the routing looks."""
    with Broker() as broker:
        run(fill(broker))
        before = run(contents(broker))
        assert len(before) == len(STREAMS) * 8 + 1

        async def position() -> tuple[int, str]:
            async with await StreamClient.open(broker.stream_url) as client:
                sync = await client.join("chat", "g1")
                return sync["seq"], sync["epoch"]

        seq, epoch = run(position())
        code, _, errors = done("reshard", "--data-dir", broker.data_dir, "--shards", "3")
        assert code == 2, errors
        assert "in use by another broker" in errors
        for shards in (5, 1, 2):
            assert broker.stop() == 0
            code, output, errors = done(
                "reshard", "--data-dir", broker.data_dir, "--shards", str(shards)
            )
            assert code == 0, errors
            assert f"over {shards} shards" in output
            assert "100%" in errors
            folder = broker.data_dir / "stream_store"
            names = sorted(p.name for p in folder.iterdir() if p.is_dir())
            assert names == [f"shard-{k}" for k in range(shards)]
            broker.shards = shards
            broker.ports = broker.ports[:3] + [0] * shards
            broker._start_on_free_ports()
            assert run(contents(broker)) == before
            chat = folder / f"shard-{shard_of(Group('chat', 'g1'), shards)}" / "chat.db"
            assert chat.exists()

        async def resume() -> None:
            async with await StreamClient.open(broker.stream_url) as client:
                answer = await client.join("chat", "g1", since=seq - 2, epoch=epoch)
                assert answer["resumed"] is True
                assert [(await client.next())["seq"] for _ in range(2)] == [seq - 1, seq]

        run(resume())
        code, output, _ = done("reshard", "--data-dir", broker.data_dir, "--shards", "2")
        assert code == 2  # it runs
        assert broker.stop() == 0
        code, output, _ = done("reshard", "--data-dir", broker.data_dir, "--shards", "2")
        assert (code, "already" in output) == (0, True)


def started_or_refused(broker: Broker) -> StartFailed | None:
    try:
        broker._start_on_free_ports()
    except StartFailed as failure:
        return failure
    return None


def test_reshard_may_be_killed_at_any_moment(run: Run) -> None:
    """Run again it ends well; until then the old data serves, or no broker starts."""
    with Broker() as broker:
        run(fill(broker))
        before = run(contents(broker))
        assert broker.stop() == 0
        rng = random.Random(7)
        words = ("reshard", "--data-dir", broker.data_dir, "--shards", "4")
        started = time.monotonic()
        code, _, errors = done(*words)
        assert code == 0, errors
        whole_s = time.monotonic() - started
        shards = 4
        for attempt in range(6):
            shards = 3 if shards == 4 else 4
            words = ("reshard", "--data-dir", broker.data_dir, "--shards", str(shards))
            process = command(*words)
            time.sleep(whole_s * rng.uniform(0.3, 1.05))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            if attempt % 2 == 0:
                broker.shards = 7 - shards  # what it was before
                refusal = started_or_refused(broker)
                if refusal is None:
                    assert run(contents(broker)) == before
                    assert broker.stop() == 0
                else:
                    assert (refusal.exit_code, "broker reshard" in refusal.stderr) == (2, True)
            code, _, errors = done(*words)
            assert code == 0, errors
        broker.shards = shards
        broker._start_on_free_ports()
        assert run(contents(broker)) == before


def test_reshard_goes_on_after_every_step(run: Run, tmp_path: Path) -> None:
    """Killed between any two renames once the new files count."""
    with Broker() as broker:
        run(fill(broker))
        before = run(contents(broker))
        assert broker.stop() == 0
        original = tmp_path / "original"
        shutil.copytree(broker.data_dir, original)
        program = (
            "import os, sys, pathlib\n"
            "from shards import reshard, manifest\n"
            "left = int(sys.argv[1])\n"
            "def counted(real):\n"
            "    def call(self, *a, **k):\n"
            "        global left\n"
            "        left -= 1\n"
            "        if left < 0: os._exit(9)\n"
            "        return real(self, *a, **k)\n"
            "    return call\n"
            "pathlib.Path.rename = counted(pathlib.Path.rename)\n"
            "pathlib.Path.unlink = counted(pathlib.Path.unlink)\n"
            "reshard.reshard(pathlib.Path(sys.argv[2]), 3)\n"
        )
        step, ended = 0, False
        while not ended:
            shutil.rmtree(broker.data_dir)
            shutil.copytree(original, broker.data_dir)
            folder = broker.data_dir / "stream_store"
            process = subprocess.run(
                [sys.executable, "-c", program, str(step), str(folder)],
                cwd=REPOSITORY,
                capture_output=True,
                check=False,
            )
            ended = process.returncode == 0
            assert process.returncode in (0, 9), process.stderr
            code, _, errors = done("reshard", "--data-dir", broker.data_dir, "--shards", "3")
            assert code == 0, (step, errors)
            step += 1
        assert step > 5
        broker.shards = 3
        broker._start_on_free_ports()
        assert run(contents(broker)) == before


def test_backup_while_it_runs_and_restore(run: Run, tmp_path: Path) -> None:
    async def write(broker: Broker, count: int) -> None:
        worker = await Worker.open(broker.worker_url)
        for number in range(count):
            await result_of(worker, "stream::set", item("busy", "g", f"i{number}", data=number))
        await worker.close()

    with Broker() as broker:
        run(fill(broker))
        before = run(contents(broker))
        run(write(broker, 50))
        target = tmp_path / "backup"
        process = command("backup", "--data-dir", broker.data_dir, target)
        while process.poll() is None:
            run(write(broker, 20))
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        assert "groups" in output
        code, _, errors = done("backup", "--data-dir", broker.data_dir, target)
        assert (code, "exists" in errors) == (2, True)
        run(write(broker, 200))
        code, _, errors = done("restore", "--data-dir", broker.data_dir, target)
        assert (code, "holds data" in errors) == (2, True)
        assert broker.stop() == 0
        shutil.rmtree(broker.data_dir / "stream_store")
        code, output, errors = done("restore", "--data-dir", broker.data_dir, target)
        assert code == 0, errors
        broker.start()
        after = run(contents(broker))
        busy = after.pop(("busy", "g"))
        epochs = [{history.pop("epoch") for _, history in c.values()} for c in (before, after)]
        assert epochs[0].isdisjoint(epochs[1])
        assert after == before
        assert 50 <= len(busy[0]) <= 200  # some moment of the backup


def test_who_has_seen_more_than_the_backup_gets_a_sync(run: Run, tmp_path: Path) -> None:
    """Numbers that were given before are given again, to other changes: nobody may go on there."""
    target = tmp_path / "backup"

    async def write(broker: Broker, values: range) -> None:
        worker = await Worker.open(broker.worker_url)
        for n in values:
            await result_of(worker, "stream::set", item("chat", "g", "i", data=n))
        await worker.close()

    async def joined(broker: Broker, **since: Any) -> dict[str, Any]:
        async with await StreamClient.open(broker.stream_url) as client:
            return await client.join("chat", "g", **since)

    with Broker() as broker:
        run(write(broker, range(5)))
        assert done("backup", "--data-dir", broker.data_dir, target)[0] == 0
        run(write(broker, range(5, 10)))
        seen = run(joined(broker))
        assert seen["seq"] == 10
        assert broker.stop() == 0
        shutil.rmtree(broker.data_dir / "stream_store")
        assert done("restore", "--data-dir", broker.data_dir, target)[0] == 0
        broker.start()
        run(write(broker, range(100, 110)))
        answer = run(joined(broker, since=seen["seq"], epoch=seen["epoch"]))
        assert answer["event"]["type"] == "sync", answer
        assert answer["resumed"] is False
        assert answer["event"]["data"] == [109]
        now = run(joined(broker, since=answer["seq"], epoch=answer["epoch"]))
        assert now["resumed"] is True


@pytest.mark.parametrize("words", [("backup", "x"), ("restore", "x"), ("reshard", "--shards", "2")])
def test_nothing_to_work_on(words: tuple[str, ...], tmp_path: Path) -> None:
    code, _, errors = done(words[0], "--data-dir", tmp_path / "none", *words[1:])
    assert code == 2
    assert errors.startswith("broker: ")
    assert len(errors.splitlines()) == 1


def test_a_damaged_file_is_named_and_nothing_moved(run: Run) -> None:
    with Broker() as broker:
        run(fill(broker))
        assert broker.stop() == 0
        folder = broker.data_dir / "stream_store"
        damaged = next(folder.glob("shard-*/chat.db"))
        damaged.write_bytes(b"\0" * 5000)
        names = sorted(str(path) for path in folder.rglob("*.db"))
        code, _, errors = done("reshard", "--data-dir", broker.data_dir, "--shards", "3")
        assert code == 1
        assert str(damaged) in errors
        assert sorted(str(p) for p in folder.glob("shard-*/*.db")) == names
