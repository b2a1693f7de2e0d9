"""SIGHUP: what a running broker takes over from its configuration file, and what it does not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import ssl
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from msgspec import structs
from websockets.exceptions import InvalidStatus

from broker.config import Config, Limits, RedisAdapter, StreamPort, Tls
from broker.service import reloaded
from tests.conftest import Run
from tests.deploy.units import NotifySocket, Target
from tests.support.broker import Broker
from tests.support.connection import PATIENCE_S
from tests.support.stream_client import StreamClient
from tests.support.worker import Worker

MEMORY = {"name": "kv", "config": {"store_method": "in_memory"}}


def configured(folder: Path | str, auth: str | None = "auth::one", **broker: Any) -> dict[str, Any]:
    """A configuration in memory, with TLS on both ports from `folder`."""
    tls = {"certificate": f"{folder}/cert.pem", "key": f"{folder}/key.pem"}
    block: dict[str, Any] = {"adapter": MEMORY}
    if auth is not None:
        block["auth_function"] = auth
    own = {"stream": {"tls": tls}, "worker": {"tls": tls}, **broker}
    return {"workers": [{"name": "iii-stream", "config": block}], "broker": own}


class Certificates:
    """`a` and `b`, each with its key, and a folder in which one of them is in use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "used"
        self.folder.mkdir()
        for name in ("a", "b"):
            (folder / name).mkdir()
            names = ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"]
            files = ["-keyout", "key.pem", "-out", "cert.pem"]
            command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
            subprocess.run(
                [*command, *files, *names], cwd=folder / name, check=True, capture_output=True
            )

    def use(self, cert: str, key: str | None = None) -> None:
        shutil.copy(self.folder.parent / cert / "cert.pem", self.folder)
        shutil.copy(self.folder.parent / (key or cert) / "key.pem", self.folder)

    def pem(self, name: str) -> str:
        return (self.folder.parent / name / "cert.pem").read_text()

    @property
    def trusting(self) -> ssl.SSLContext:
        """A client's context that trusts both."""
        return ssl.create_default_context(cadata=self.pem("a") + self.pem("b"))


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    certificates = Certificates(tmp_path)
    certificates.use("a")
    return certificates


def served(url: str) -> str:
    """The certificate of a port, as PEM."""
    host, port = url.partition("://")[2].split(":")
    return ssl.get_server_certificate((host, int(port)), timeout=PATIENCE_S)


def events_of(log: str, event: str) -> list[str]:
    """The lines of a log with this event, from `key=` or `reason=` on."""
    return [line.partition(f" {event}")[2].strip() for line in log.splitlines() if event in line]


class Reloading:
    """A broker of either kind: as units of its own, or below its supervisor."""

    def __init__(
        self, stream_url: str, worker_url: str, write: Callable[[str], object], reload: Any
    ) -> None:
        self.stream_url = stream_url
        self.worker_url = worker_url
        self.write = write
        self.reload: Callable[[], str] = reload
        """Makes it reload, waits for it and returns what it logged."""


@pytest.fixture(params=["units", "supervisor"])
def broker(request: pytest.FixtureRequest, certificates: Certificates) -> Iterator[Reloading]:
    kind = as_units if request.param == "units" else as_one
    yield from kind(configured(certificates.folder))


def as_units(config: dict[str, Any]) -> Iterator[Reloading]:
    fixed = {"shards": 1, "run_dir": "{folder}/run"}

    def text(config: dict[str, Any]) -> str:
        own = fixed | config["broker"]
        own["worker"] = {**own["worker"], "port": "{worker}"}
        own["metrics"] = {"port": "{metrics}"}
        stream = config["workers"][0]
        block = {"host": "127.0.0.1", "port": "{stream}", **stream["config"]}
        written = yaml.safe_dump({"workers": [{**stream, "config": block}], "broker": own})
        for port in ("worker", "metrics", "stream"):
            written = written.replace(f"'{{{port}}}'", f"{{{port}}}")
        return written

    with Target(text(config)) as target:

        def reload() -> str:
            before = len(target.gateway.log)
            target.gateway.reload()
            return target.gateway.log[before:]

        def write(content: str) -> None:
            is_whole = content.startswith("{") and "workers" in json.loads(content)
            target.configure(text(json.loads(content)) if is_whole else content)

        stream, worker = (
            url.replace("ws:", "wss:") for url in (target.stream_url, target.worker_url)
        )
        yield Reloading(stream, worker, write, reload)


def as_one(config: dict[str, Any]) -> Iterator[Reloading]:
    with (
        NotifySocket(f"@broker-test-{uuid.uuid4()}") as notify,
        Broker(yaml.safe_dump(config), env={"NOTIFY_SOCKET": notify.address}) as broker,
    ):
        assert broker.config_file is not None
        notify.wait_for("READY")

        def reload() -> str:
            before = len(broker.log)
            os.kill(broker.pid, signal.SIGHUP)
            notify.wait_for("RELOADING")
            notify.wait_for("READY")
            return broker.log[before:]

        yield Reloading(broker.stream_url, broker.worker_url, broker.config_file.write_text, reload)


def test_new_connections_get_a_new_certificate(
    broker: Reloading, certificates: Certificates, run: Run
) -> None:
    """The old ones go on."""

    async def main() -> None:
        worker = await Worker.open(broker.worker_url, tls=certificates.trusting)
        await worker.register_function("auth::one", lambda _: {})
        await worker.barrier()
        url = broker.stream_url
        async with await StreamClient.open(url, tls=certificates.trusting) as client:
            assert served(broker.stream_url) == served(broker.worker_url) == certificates.pem("a")
            certificates.use("b")
            assert served(broker.stream_url) == certificates.pem("a")
            log = broker.reload()
            assert served(broker.stream_url) == served(broker.worker_url) == certificates.pem("b")
            assert events_of(log, "config_reloaded")
            assert not events_of(log, "config_key_needs_restart")
            await client.ping()
            await worker.ping()
        await worker.close()

    run(main())


def test_what_can_not_be_used_changes_nothing(
    broker: Reloading, certificates: Certificates
) -> None:
    good = json.dumps(configured(certificates.folder, auth="auth::two"))
    for cert, key, text, reason in (
        ("b", "a", good, "broker.stream.tls: "),
        ("b", "b", json.dumps({"broker": {"shard": 3}}), "broker.shard: "),
        ("b", "b", "[broken", "YAML"),
    ):
        certificates.use(cert, key)
        broker.write(text)
        log = broker.reload()
        (said,) = events_of(log, "config_not_reloaded")
        assert reason in said
        assert not events_of(log, "config_reloaded")
        assert served(broker.stream_url) == served(broker.worker_url) == certificates.pem("a")


def test_auth_function_and_limits(broker: Reloading, certificates: Certificates, run: Run) -> None:
    async def main() -> None:
        worker = await Worker.open(broker.worker_url, tls=certificates.trusting)
        for name in ("auth::one", "auth::two"):
            await worker.register_function(name, lambda _: {})
        await worker.barrier()

        async def connect() -> StreamClient:
            return await StreamClient.open(broker.stream_url, tls=certificates.trusting)

        async with await connect() as client:
            await client.join("chat", "r1", "s1")
            limits = {"subscriptions_per_connection_max": 1}
            broker.write(json.dumps(configured(certificates.folder, "auth::two", limits=limits)))
            assert events_of(broker.reload(), "config_reloaded")
            refused = await client.join("chat", "r2", "s2")
            assert refused["event"]["code"] == "too_many_subscriptions", refused
            async with await connect():
                pass
        assert [call.function_id for call in worker.invocations] == ["auth::one", "auth::two"]
        await worker.close()

    run(main())


def test_what_needs_a_restart_is_named_once_each_time(
    broker: Reloading, certificates: Certificates
) -> None:
    changed = configured(certificates.folder, auth=None, limits={"name_bytes_max": 99})
    changed["broker"]["worker"]["token"] = "secret-secret"
    changed["broker"]["stream"]["tls"] = None
    broker.write(json.dumps(changed))
    for _ in range(2):
        log = broker.reload()
        assert sorted(events_of(log, "config_key_needs_restart")) == [
            "key=broker.limits.name_bytes_max",
            "key=broker.stream.tls",
            "key=broker.worker.token",
            "key=modules[].config.auth_function",
        ]
        assert events_of(log, "config_reloaded")
        assert "secret-secret" not in log
    assert served(broker.stream_url) == certificates.pem("a")


def test_a_gateway_that_is_started_again_has_what_was_reloaded(
    certificates: Certificates, run: Run
) -> None:
    """And the signal, sent to one of the supervised, does nothing."""
    config = configured(certificates.folder, auth=None)
    with (
        NotifySocket(f"@broker-test-{uuid.uuid4()}") as notify,
        Broker(yaml.safe_dump(config), env={"NOTIFY_SOCKET": notify.address}) as broker,
    ):
        assert broker.config_file is not None
        notify.wait_for("READY")
        children = broker.children()
        for pid in children.values():
            os.kill(pid, signal.SIGHUP)
        limits = {"subscriptions_per_connection_max": 1, "name_bytes_max": 2}
        broker.config_file.write_text(
            json.dumps(configured(certificates.folder, auth=None, limits=limits))
        )
        os.kill(broker.pid, signal.SIGHUP)
        notify.wait_for("RELOADING")
        notify.wait_for("READY")
        assert broker.children() == children
        os.kill(children["gateway"], signal.SIGKILL)
        end = time.monotonic() + 60
        while "process_restarted process=gateway" not in broker.log:
            assert time.monotonic() < end, broker.log
            time.sleep(0.05)

        async def main() -> None:
            url = broker.stream_url
            async with await StreamClient.open(url, tls=certificates.trusting) as client:
                joined = await client.join("chat", "room", "s1")
                assert joined["event"]["type"] == "sync", "its name is longer than 2 bytes"
                refused = await client.join("chat", "r2", "s2")
                assert refused["event"]["code"] == "too_many_subscriptions"

        run(main())


def hang_up(broker: Broker, notify: NotifySocket) -> str:
    """Make a broker reload; what it logged since."""
    before = len(broker.log)
    os.kill(broker.pid, signal.SIGHUP)
    notify.wait_for("RELOADING")
    notify.wait_for("READY")
    return broker.log[before:]


def test_log_level_and_format_of_every_process(run: Run) -> None:
    async def nonsense(broker: Broker) -> None:
        worker = await Worker.open(broker.worker_url)
        await worker.send({"type": "nonsense"})
        await worker.barrier()
        await worker.close()

    def text(**keys: str) -> str:
        config = {"workers": [{"name": "iii-stream", "config": {"adapter": MEMORY}}]}
        return json.dumps({**config, "broker": keys})

    with (
        NotifySocket(f"@broker-test-{uuid.uuid4()}") as notify,
        Broker(text(log_level="warning"), env={"NOTIFY_SOCKET": notify.address}) as broker,
    ):
        assert broker.config_file is not None
        notify.wait_for("READY")
        run(nonsense(broker))
        assert broker.log == ""
        broker.config_file.write_text(text(log_level="debug", log_format="json"))
        lines = [json.loads(line) for line in hang_up(broker, notify).splitlines()]
        processes = {line["process"] for line in lines if line["event"] == "config_reloaded"}
        assert processes == {"supervisor", "gateway", "shard-0", "shard-1"}
        assert not any(line["event"] == "config_key_needs_restart" for line in lines)
        before = len(broker.log)
        run(nonsense(broker))
        assert '"event":"message_undecodable"' in broker.log[before:]
        broker.config_file.write_text(text(log_level="loud"))
        refused = hang_up(broker, notify)
        assert "config_not_reloaded" in refused
        assert "broker.log_level" in refused
        broker.config_file.write_text(text(log_level="error"))
        assert hang_up(broker, notify) == ""


def test_an_option_wins_over_the_level_in_the_file() -> None:
    with (
        NotifySocket(f"@broker-test-{uuid.uuid4()}") as notify,
        Broker(
            json.dumps({"broker": {"log_level": "error"}}),
            args=["--log-level", "info"],
            env={"NOTIFY_SOCKET": notify.address},
        ) as broker,
    ):
        notify.wait_for("READY")
        assert "INFO gateway gateway_started" in broker.log
        assert broker.log.count("config_reloaded") == 0
        assert hang_up(broker, notify).count("config_reloaded") == 4


def test_a_shard_that_is_a_unit_reloads_its_level() -> None:
    own = "shards: 1, run_dir: '{folder}/run', worker: {port: {worker}}"
    own += ", metrics: {port: {metrics}}, log_level: "
    stream = "workers: [{name: iii-stream, config: {host: 127.0.0.1, port: {stream},"
    stream += " adapter: {name: kv, config: {store_method: in_memory}}}}]"
    with Target(f"{stream}\nbroker: {{{own}error}}") as target:
        assert target.shard.log == ""
        target.configure(f"{stream}\nbroker: {{{own}info}}")
        target.shard.reload()
        assert "INFO shard-0 config_reloaded" in target.shard.log


def test_origins_of_pages(broker: Reloading, certificates: Certificates, run: Run) -> None:
    """For new connections; those that are open go on."""

    async def main() -> None:
        tls = certificates.trusting

        async def opens(url: str, **headers: str) -> bool:
            kind = Worker if url == broker.worker_url else StreamClient
            try:
                connection = await kind.open(url, headers, tls=tls)
            except InvalidStatus:
                return False
            await connection.close()
            return True

        page = {"Origin": "https://app.example"}
        stays = await Worker.open(broker.worker_url, tls=tls)
        await stays.register_function("auth::one", lambda _: {})
        await stays.barrier()
        assert not await opens(broker.stream_url, **page)
        assert not await opens(broker.worker_url, **page)
        config = configured(certificates.folder)
        config["broker"]["stream"]["allowed_origins"] = ["https://app.example"]
        config["broker"]["worker"]["allowed_origins"] = ["https://app.example"]
        broker.write(json.dumps(config))
        assert not events_of(broker.reload(), "config_key_needs_restart")
        assert await opens(broker.stream_url, **page)
        assert not await opens(broker.stream_url, Origin="https://other.example")
        assert await opens(broker.worker_url, **page)
        await stays.ping()
        await stays.close()

    run(main())


def test_a_worker_token_is_exchanged(run: Run) -> None:
    async def opens(broker: Broker, token: str) -> bool:
        try:
            worker = await Worker.open(broker.worker_url, {"Authorization": f"Bearer {token}"})
        except InvalidStatus:
            return False
        await worker.close()
        return True

    def text(token: str) -> str:
        return json.dumps({"broker": {"worker": {"token": token}}})

    with (
        NotifySocket(f"@broker-test-{uuid.uuid4()}") as notify,
        Broker(text("first"), env={"NOTIFY_SOCKET": notify.address}) as broker,
    ):
        assert broker.config_file is not None
        notify.wait_for("READY")
        assert run(opens(broker, "first"))
        broker.config_file.write_text(text("second"))
        log = hang_up(broker, notify)
        assert "config_key_needs_restart" not in log
        assert "second" not in log
        assert not run(opens(broker, "first"))
        assert run(opens(broker, "second"))


def test_what_is_taken_over() -> None:
    old = Config(shards=2)
    assert reloaded(old, old) == (old, [])
    limits = Limits(ping_interval_s=3, stop_timeout_s=4, connections_max=5)
    stream = StreamPort(auth_function="f", port=1)
    tls = Tls("c", "k")
    access = structs.replace(old.stream_access, tls=tls)
    new = Config(
        shards=3,
        run_dir="/r",
        limits=limits,
        stream=stream,
        stream_access=access,
        adapter=RedisAdapter(),
    )
    used, left = reloaded(old, new)
    assert used == structs.replace(old, limits=Limits(ping_interval_s=3, connections_max=5))
    assert left == [
        "modules[].config.port",
        "modules[].config.auth_function",
        "broker.stream.tls",
        "broker.limits.stop_timeout_s",
        "modules[].config.adapter",
        "broker.shards",
        "broker.run_dir",
    ]
    old = Config(stream=StreamPort(auth_function="e"), stream_access=access, shards=2)
    renewed = structs.replace(access, tls=Tls("d", "k"))
    new = structs.replace(old, stream=StreamPort(auth_function="f"), stream_access=renewed)
    assert reloaded(old, new) == (new, [])
