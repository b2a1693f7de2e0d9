"""`/readyz` and the log tell what keeps Redis from being used, and that it is over."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Callable

import pytest

from tests.front_door.test_redis import config
from tests.support.broker import Broker
from tests.support.connection import PATIENCE_S
from tests.support.redis_server import IS_INSTALLED, RedisServer

pytestmark = pytest.mark.skipif(not IS_INSTALLED, reason="redis-server is not installed")

Change = Callable[[RedisServer], object]


def readyz(broker: Broker) -> tuple[int, str]:
    url = broker.stream_url.replace("ws://", "http://") + "/readyz"
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def until(broker: Broker, status: int, text: str = "") -> str:
    end = time.monotonic() + PATIENCE_S
    while (found := readyz(broker))[0] != status or text not in found[1]:
        assert time.monotonic() < end, (found, broker.log_tail())
        time.sleep(0.05)
    return found[1]


@pytest.mark.parametrize(
    ("harm", "mend", "reason"),
    [
        (RedisServer.stop, RedisServer.start, "can't be reached"),
        (RedisServer.pause, RedisServer.resume, "does not answer"),
        (
            lambda s: s.client.replicaof("127.0.0.1", "1"),
            lambda s: s.client.replicaof("NO", "ONE"),
            "is read-only",
        ),
        (
            lambda s: s.client.config_set("maxmemory", 1),
            lambda s: s.client.config_set("maxmemory", 0),
            "is out of memory",
        ),
        (
            lambda s: s.client.config_set("min-replicas-to-write", 1),
            lambda s: s.client.config_set("min-replicas-to-write", 0),
            "NOREPLICAS",
        ),
    ],
    ids=["away", "paused", "read-only", "full", "without replicas"],
)
def test_trouble_shows_without_any_call(harm: Change, mend: Change, reason: str) -> None:
    """Every shard's, by name; nobody has to write for it to be seen, nor for its end."""
    with RedisServer() as server, Broker(config(server.url)) as broker:
        assert readyz(broker)[0] == 200
        harm(server)
        try:
            until(broker, 503, "shard 0: ")
            text = until(broker, 503, "shard 1: ")
        finally:
            mend(server)
        assert f"shard 0: Redis at 127.0.0.1:{server.port} " in text
        assert text.count(reason) == 2
        until(broker, 200)


def test_not_there_at_start() -> None:
    with RedisServer(started=False) as server, Broker(config(server.url)) as broker:
        text = until(broker, 503, "can't be reached")
        assert f"Redis at 127.0.0.1:{server.port}" in text
        assert "redis_not_reached" in broker.log
        server.start()
        until(broker, 200)
        assert "redis_reached" in broker.log


def test_no_secret_is_told() -> None:
    with RedisServer(password="other") as server:
        url = f"redis://someone:s3cret@127.0.0.1:{server.port}"
        with Broker(config(url)) as broker:
            text = until(broker, 503, "refuses the name or the password")
            assert "s3cret" not in text + broker.log
