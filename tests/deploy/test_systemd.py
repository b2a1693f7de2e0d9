"""The units as systemd's own tools see them, and what the processes tell it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.notify import Notifier
from tests.deploy.units import NotifySocket, Target
from tests.support.broker import IN_MEMORY, REPOSITORY, Broker

UNITS = REPOSITORY / "deploy" / "systemd"
SERVICES = [
    "broker.service",
    "broker-gateway.service",
    "broker-gateway@.service",
    "broker-shard@.service",
]
EXPOSURE_MAX = 20
"""Tenths of `systemd-analyze security`."""
WATCHDOG = {"WATCHDOG_USEC": "200000"}

TARGET = """\
modules:
  - class: modules::stream::StreamModule
    config:
      host: 127.0.0.1
      port: {stream}
      adapter:
        class: modules::stream::adapters::KvStore
        config: {store_method: in_memory}
broker:
  shards: 1
  run_dir: "{folder}/run"
  worker: {port: {worker}}
  metrics: {port: {metrics}}
"""

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd is not installed"
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the units, whose program is one that exists."""
    folder = tmp_path_factory.mktemp("units")
    for unit in UNITS.iterdir():
        text = unit.read_text().replace("/opt/broker/bin/broker", sys.executable)
        (folder / unit.name).write_text(text)
    return folder


def analyze(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["systemd-analyze", *arguments],
        cwd=folder,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@needs_systemd
def test_units_are_correct(installed: Path) -> None:
    units = ["broker.service", "broker-gateway.service", "broker.target"]
    for template, number in (("broker-shard", 0), ("broker-gateway", 1)):
        units.append(f"{template}@{number}.service")
        shutil.copy(installed / f"{template}@.service", installed / units[-1])
    said = analyze(installed, "verify", "--man=no", *(f"./{unit}" for unit in units))
    assert not [line for line in said.splitlines() if "broker" in line], said


@needs_systemd
@pytest.mark.parametrize("unit", SERVICES)
def test_units_are_closed_in(unit: str, installed: Path) -> None:
    name = unit.replace("@", "@0")
    shutil.copy(installed / unit, installed / f"checked-{name}")
    limit = f"--threshold={EXPOSURE_MAX}"
    analyze(installed, "security", "--offline=true", "--no-pager", limit, f"./checked-{name}")


@pytest.mark.parametrize("unit", SERVICES)
def test_units_wait_longer_than_the_broker_takes_to_stop(unit: str) -> None:
    lines = (UNITS / unit).read_text().splitlines()
    settings = dict(line.split("=", 1) for line in lines if "=" in line and line[0] != "#")
    assert settings["Type"] == "notify"
    assert int(settings["TimeoutStopSec"]) > 10
    assert settings["RestartPreventExitStatus"] == "2"


def test_the_units_of_gateways_are_alike() -> None:
    """But for the number."""
    first, further = (
        (UNITS / name).read_text().partition("[Unit]")[2]
        for name in ("broker-gateway.service", "broker-gateway@.service")
    )
    assert further.replace(" --index %i", "").replace(", gateway %i", ", gateway") == first


# What the processes tell.


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    with Target(TARGET, WATCHDOG) as target:
        yield target


@pytest.mark.parametrize("name", ["shard", "gateway"])
def test_a_unit_feeds_the_watchdog_and_tells_of_a_reload(name: str, target: Target) -> None:
    unit = getattr(target, name)
    for _ in range(3):
        assert unit.notify.wait_for("WATCHDOG") == {"WATCHDOG": "1"}
    before_us = time.monotonic_ns() // 1000
    unit.process.send_signal(signal.SIGHUP)
    reloading = unit.notify.wait_for("RELOADING")
    assert reloading["RELOADING"] == "1"
    assert before_us <= int(reloading["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
    ready = unit.notify.wait_for("READY")
    assert ready["READY"] == "1"
    assert f":{target.ports['metrics'] + (name == 'shard')}/metrics" in ready["STATUS"]
    unit.notify.wait_for("WATCHDOG")


@pytest.mark.parametrize("name", ["shard", "gateway"])
def test_a_hung_unit_is_noticed(name: str, target: Target) -> None:
    """Stopped, its event loop does nothing, like one that hangs."""
    unit = getattr(target, name)
    unit.process.send_signal(signal.SIGSTOP)
    try:
        unit.notify.drain()  # what was under way
        with pytest.raises(TimeoutError):
            unit.notify.next(patience_s=1)
    finally:
        unit.process.send_signal(signal.SIGCONT)
    unit.notify.wait_for("WATCHDOG")


@pytest.mark.parametrize("name", ["gateway", "shard"])
def test_a_unit_tells_that_it_stops(name: str) -> None:
    with Target(TARGET) as target:
        unit = getattr(target, name)
        unit.process.send_signal(signal.SIGTERM)
        assert unit.notify.wait_for("STOPPING") == {"STOPPING": "1"}
        assert unit.process.wait(60) == 0


def test_units_of_two_gateways() -> None:
    """They share the ports, and each stops and starts by itself."""
    with Target(TARGET.replace("shards: 1", "shards: 1\n  gateways: 2")) as target:
        target.further_gateway()
        first, further = (f"http://127.0.0.1:{target.ports['metrics'] + n}/metrics" for n in (0, 2))
        for url in (first, further):
            with urllib.request.urlopen(url, timeout=10) as response:
                assert b'broker_peers{transport="socket"} 1.0' in response.read()
        assert target.gateway.stop() == 0
        with socket.create_connection(("127.0.0.1", target.ports["stream"])):
            pass
        assert target.further.stop() == 0


def test_the_supervisor_alone_speaks_for_the_broker() -> None:
    address = f"@broker-test-{uuid.uuid4()}"
    env = {"NOTIFY_SOCKET": address, **WATCHDOG}
    with NotifySocket(address) as notify, Broker(IN_MEMORY, env=env) as broker:
        ready = notify.wait_for("READY")
        assert ready["STATUS"].startswith(f"ready stream={broker.stream_url} ")
        for pid in broker.children().values():
            inherited = Path(f"/proc/{pid}/environ").read_bytes()
            assert address.encode() not in inherited  # they have one of the supervisor's
            assert b"WATCHDOG_USEC=200000\0" not in inherited
        notify.wait_for("WATCHDOG")
        os.kill(broker.pid, signal.SIGHUP)
        notify.wait_for("RELOADING")
        notify.wait_for("READY")
        assert broker.stop() == 0
        assert notify.wait_for("STOPPING") == {"STOPPING": "1"}


def test_the_variables_are_taken(tmp_path: Path) -> None:
    notify = NotifySocket(str(tmp_path / "notify"))
    environ = {"NOTIFY_SOCKET": notify.address, "WATCHDOG_PID": "1", "HOME": "/", **WATCHDOG}
    notifier = Notifier(environ)
    assert environ == {"HOME": "/"}
    notifier.ready("here")
    assert notify.next() == {"READY": "1", "STATUS": "here"}

    async def another_processs_watchdog() -> None:
        notifier.watch(asyncio.get_running_loop())

    asyncio.run(another_processs_watchdog())
    with pytest.raises(TimeoutError):
        notify.next(patience_s=0.1)
    notify.close()


def test_nobody_listens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Notifier({}).ready("here")
    assert not caplog.messages
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "none")}).ready("here")
    Notifier({"NOTIFY_SOCKET": "vsock:2:1"}).ready("here")
    assert caplog.messages == ["notify_failed", "notify_socket_unknown"]
