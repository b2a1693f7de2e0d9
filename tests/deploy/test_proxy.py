"""The proxies' configurations, and those for containers as far as they can be read without one."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from broker import config
from broker.config import Limits, Overrides
from tests.conftest import Run
from tests.support.broker import IN_MEMORY, REPOSITORY, Broker, free_ports
from tests.support.calls import item, result_of
from tests.support.stream_client import StreamClient
from tests.support.worker import Worker

DEPLOY = REPOSITORY / "deploy"
NGINX = "/usr/sbin/nginx"

TRUSTING = IN_MEMORY + "broker: {stream: {trusted_proxies: [127.0.0.1]}}\n"


@pytest.fixture(scope="module")
def broker() -> Iterator[Broker]:
    with Broker(TRUSTING) as broker:
        yield broker


@pytest.fixture
def nginx(tmp_path: Path, broker: Broker) -> list[str]:
    """The command that runs nginx with the snippet, on `tls_port`, in front of `broker`."""
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    made = ["-keyout", "key.pem", "-out", "cert.pem"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    subprocess.run([*command, *made, *names], cwd=tmp_path, check=True, capture_output=True)
    snippet = (DEPLOY / "proxy" / "nginx.conf").read_text()
    snippet = snippet.replace("/etc/ssl/broker", str(tmp_path))
    snippet = snippet.replace("listen 443", "listen 127.0.0.1:443")
    snippet = snippet.replace("127.0.0.1:3112", broker.stream_url.removeprefix("ws://"))
    (tmp_path / "port").write_text(str(free_ports(1)[0]))
    snippet = snippet.replace(":443", f":{(tmp_path / 'port').read_text()}")
    (tmp_path / "broker.conf").write_text(snippet)
    folders = "".join(
        f"{kind}_temp_path {tmp_path}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {tmp_path}/pid; error_log {tmp_path}/errors;\n"
        "events {}\n"
        f"http {{ access_log off; {folders} include {tmp_path}/broker.conf; }}\n"
    )
    return [NGINX, "-p", str(tmp_path), "-e", str(tmp_path / "errors"), "-c", "nginx.conf"]


@pytest.mark.skipif(not Path(NGINX).exists(), reason="nginx is not installed")
def test_nginx(nginx: list[str], broker: Broker, tmp_path: Path, run: Run) -> None:
    """Its configuration is valid, and what a client says of its address is left out."""
    checked = subprocess.run(
        [*nginx, "-t"], cwd=tmp_path, check=False, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr
    assert "warn" not in checked.stderr
    port = int((tmp_path / "port").read_text())

    async def main() -> None:
        trusting = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
        url = f"wss://127.0.0.1:{port}"
        worker = await Worker.open(broker.worker_url)
        headers = {"X-Forwarded-For": "203.0.113.9"}
        async with await StreamClient.open(url, headers=headers, tls=trusting) as client:
            await client.join("chat", "r1")
            await result_of(worker, "stream::set", item("chat", "r1", "m", data=1))
            assert (await client.next())["event"]["data"] == 1
            connections = await result_of(worker, "broker::connections", {})
            assert "203.0.113.9" not in str(connections)
        await worker.close()

    process = subprocess.Popen(nginx, cwd=tmp_path)
    try:
        _wait_until_it_listens(port)
        run(asyncio.wait_for(main(), 60))
    finally:
        process.terminate()
        process.wait(60)


def _wait_until_it_listens(port: int) -> None:
    end = time.monotonic() + 60
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert time.monotonic() < end, "nginx does not listen"
        time.sleep(0.05)


def test_the_proxy_waits_longer_than_the_broker() -> None:
    text = (DEPLOY / "proxy" / "nginx.conf").read_text()
    limits = Limits()
    for name in ("proxy_read_timeout", "proxy_send_timeout"):
        found = re.search(rf"{name} (\d+)s;", text)
        assert found is not None
        assert int(found[1]) > max(limits.ping_timeout_s, limits.stalled_timeout_s)


@pytest.mark.parametrize("path", ["broker.yaml", "container/broker.yaml"])
def test_sample_configurations_are_valid(path: str) -> None:
    settings, warnings = config.load(str(DEPLOY / path), Overrides(), {})
    assert not warnings
    assert settings.run_dir == "/run/broker"


def test_the_container_scrapes_every_process() -> None:
    """A gateway, and as many shards as the container's configuration has."""
    settings, _ = config.load(str(DEPLOY / "container" / "broker.yaml"), Overrides(), {})
    scraped = yaml.safe_load((DEPLOY / "container" / "prometheus.yml").read_text())
    (job,) = scraped["scrape_configs"]
    targets = [target for group in job["static_configs"] for target in group["targets"]]
    first = settings.metrics.port
    assert targets == [f"broker:{first + k}" for k in range(1 + settings.shards)]
    services = yaml.safe_load((DEPLOY / "container" / "compose.yaml").read_text())["services"]
    assert services.keys() == {"broker", "redis", "prometheus", "grafana"}
    assert "HEALTHCHECK" in (DEPLOY / "container" / "Dockerfile").read_text()
