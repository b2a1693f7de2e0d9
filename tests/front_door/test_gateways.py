"""Several gateways of one broker: their ports, their lives, and the published SDKs on them."""

from __future__ import annotations

import os
import re
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.front_door import sdk_scenarios as scenarios
from tests.front_door.sdk_programs import node_worker, python_presence, python_worker
from tests.support.broker import IN_MEMORY, Broker, StartFailed
from tests.support.calls import item, result_of
from tests.support.connection import Closed
from tests.support.pair import TwoGateways, until
from tests.support.worker import Worker

pytestmark = pytest.mark.timeout(300)

THREE = IN_MEMORY + "broker: {gateways: 3}\n"


@pytest.fixture(scope="module")
def broker() -> Iterator[Broker]:
    with Broker(THREE, gateways=3) as broker:
        yield broker


# The published SDKs, wherever their connections come out ---------------------------------------


def test_calls(broker: Broker, run: Run) -> None:
    for n in range(3):
        scenarios.check_calls(broker, run, python_worker, f"python-calls-{n}")
    scenarios.check_calls(broker, run, node_worker, "node-calls")


def test_triggers(broker: Broker) -> None:
    scenarios.check_trigger(broker, python_worker, node_worker, "python-node")
    scenarios.check_trigger(broker, node_worker, python_worker, "node-python")
    scenarios.check_trigger(broker, python_worker, python_worker, "python-python")


def test_presence(broker: Broker, run: Run) -> None:
    scenarios.check_presence(broker, run, python_presence, "python-room")


# Ports ---------------------------------------------------------------------------------------


def answer(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_each_process_has_its_metrics_port(broker: Broker) -> None:
    """The first gateway, the shards, the other gateways."""
    first = broker.ports[2]
    for n in range(5):
        text = answer(f"http://127.0.0.1:{first + n}/metrics")[1]
        assert ("broker_peers{" in text) == (n not in (1, 2)), n
        if n not in (1, 2):
            assert 'broker_peers{transport="socket"} 2.0' in text
    (line,) = (broker.directory / "stdout").read_text().splitlines()
    assert line == (
        f"ready stream={broker.stream_url} worker={broker.worker_url}"
        f" metrics={broker.metrics_url} shards=2 gateways=3"
    )
    assert set(broker.children()) == {
        *("gateway-0", "gateway-1", "gateway-2"),
        *("shard-0", "shard-1"),
    }


def test_each_gateway_tells_whether_it_is_ready() -> None:
    config = IN_MEMORY + "broker: {gateways: 2, limits: {hang_timeout_s: 60}}\n"
    with Broker(config, gateways=2) as broker:
        first = broker.ports[2]
        urls = [f"http://127.0.0.1:{first + n}" for n in (0, 3)]
        for url in urls:
            assert answer(f"{url}/readyz")[0] == answer(f"{url}/healthz")[0] == 200
        pid = broker.children()["shard-1"]
        os.kill(pid, signal.SIGSTOP)
        for url in urls:
            while answer(f"{url}/readyz")[0] == 200:
                pass
            status, text = answer(f"{url}/readyz")
            assert status == 503
            assert "shard 1" in text
            assert answer(f"{url}/healthz")[0] == 200
        os.kill(pid, signal.SIGCONT)


def test_a_free_port_is_shared() -> None:
    config = IN_MEMORY + "broker: {gateways: 2}\n"

    class Free(Broker):
        @property
        def command(self) -> list[str]:
            return [*super().command, "--port", "0", "--worker-port", "0", "--metrics-port", "0"]

    with Free(config, gateways=2) as broker:
        ports = [int(url.rpartition(":")[2]) for url in (broker.stream_url, broker.worker_url)]
        assert all(ports)
        table = Path("/proc/net/tcp").read_text()
        for port in ports:  # state 0A: listens
            assert len(re.findall(rf":{port:04X} \S+ 0A", table)) == 2


@pytest.mark.parametrize(("place", "key"), [(0, "modules[].config.port"), (1, "worker.port")])
def test_a_port_that_others_share_is_taken(broker: Broker, place: int, key: str) -> None:
    """Two brokers would not notice otherwise, and each would get some of the connections."""

    class Second(Broker):
        @property
        def command(self) -> list[str]:
            flag = ("--port", "--worker-port")[place]
            return [*super().command, flag, str(broker.ports[place])]

    with pytest.raises(StartFailed) as failed:
        Second(IN_MEMORY + "broker: {gateways: 2}\n", gateways=2)
    assert failed.value.exit_code == 2
    assert key in failed.value.stderr
    assert "in use" in failed.value.stderr


def test_a_gateway_that_is_none_too_many() -> None:
    class Third(Broker):
        @property
        def command(self) -> list[str]:
            command = super().command
            start = command.index("serve")
            config = command[command.index("--config") + 1]
            return [*command[:start], "gateway", "--config", config, "--index", "2"]

    with pytest.raises(StartFailed) as failed:
        Third(IN_MEMORY + "broker: {gateways: 2}\n", gateways=2)
    assert failed.value.exit_code == 2
    assert failed.value.stderr == "broker: broker.gateways: is 2: there is no gateway 2\n"


def test_one_port_that_is_free_for_each_is_refused() -> None:
    """Without a supervisor nobody could tell the gateways which one it is."""

    class Lone(Broker):
        @property
        def command(self) -> list[str]:
            command = super().command
            start = command.index("serve")
            config = command[command.index("--config") + 1]
            return [*command[:start], "gateway", "--config", config]

    config = (
        "workers:\n  - {name: iii-stream, config: {port: 0}}\nbroker: {gateways: 2, run_dir: run}\n"
    )
    with pytest.raises(StartFailed) as failed:
        Lone(config, gateways=2)
    assert "modules[].config.port: holds 0" in failed.value.stderr


# Lives ---------------------------------------------------------------------------------------


def test_all_stop_in_order(run: Run) -> None:
    async def main(pair: TwoGateways) -> None:
        clients = [await pair.client(place) for place in (0, 1)]
        worker = await pair.worker(0)
        for client in clients:
            await client.join("s", "g")
        await result_of(worker, "stream::set", item("s", "g", "i", data=1))
        assert pair.broker.stop() == 0
        for connection in (*clients, worker):
            assert (await connection.next(lambda f: isinstance(f, Closed))).code == 1001
        for client in clients:
            assert client.frames[-1]["event"] == {"type": "create", "data": 1}

    with TwoGateways() as pair:
        run(main(pair))


def test_the_broker_lives_as_long_as_a_gateway_does(run: Run) -> None:
    async def main(pair: TwoGateways) -> None:
        for _ in range(2):
            before = pair.gateway_pid(1)
            pair.kill(1)
            await until(lambda before=before: _other(pair, before))
        await until(lambda: "process_given_up process=gateway-1" in pair.broker.log)
        async with await Worker.open(pair.broker.worker_url) as worker:
            await result_of(worker, "stream::set", item("s", "g", "i", data=1))
        before = pair.gateway_pid(0)
        pair.kill(0)
        await until(lambda: _other(pair, before, 0))
        pair.kill(0)
        assert pair.broker.process is not None
        assert pair.broker.process.wait(60) == 1

    def _other(pair: TwoGateways, before: int, place: int = 1) -> bool:
        children = pair.broker.children()
        given_up = f"process_given_up process=gateway-{place}" in pair.broker.log
        return given_up or children.get(f"gateway-{place}", before) != before

    with TwoGateways("limits: {restarts_max: 1}") as pair:
        run(main(pair))
        pair.broker.kill()


def test_all_are_reloaded(run: Run) -> None:
    async def main(pair: TwoGateways) -> None:
        broker = pair.broker
        assert broker.config_file is not None
        text = broker.config_file.read_text()
        less = "limits: {subscriptions_per_connection_max: 1}"
        broker.config_file.write_text(text.replace("gateways: 2", f"gateways: 2, {less}"))
        os.kill(broker.pid, signal.SIGHUP)
        await until(lambda: broker.log.count("config_reloaded") >= 3)
        for place in (0, 1):
            client = await pair.client(place)
            await client.join("s", "g", "1")
            refused = await client.join("s", "g", "2")
            assert refused["event"]["code"] == "too_many_subscriptions"
            await client.close()

    with TwoGateways() as pair:
        run(main(pair))


def test_the_socket_of_a_killed_broker_is_no_obstacle() -> None:
    config = IN_MEMORY + "broker: {gateways: 2}\n"
    with Broker(config, gateways=2) as broker:
        broker.kill()
        assert (broker.data_dir / "run" / "gateway-1.sock").is_socket()
        broker.start()
        with socket.create_connection(("127.0.0.1", broker.ports[0])):
            pass
