"""`/healthz` and `/readyz`: JSON with reasons, on the stream port and on every metrics port."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
import urllib.error
import urllib.request
from typing import Any

from tests.support.broker import IN_MEMORY, Broker
from tests.support.calls import LONG_S


def asked(url: str, method: str = "GET") -> tuple[int, str, bytes]:
    """Status, content type and body."""
    request = urllib.request.Request(url, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, response.headers["Content-Type"], response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Content-Type"], error.read()


def answer(url: str) -> tuple[int, Any]:
    status, content_type, body = asked(url)
    assert content_type == "application/json"
    return status, json.loads(body)


def ports(broker: Broker) -> list[str]:
    """The stream port, the gateway's metrics port, the shards'."""
    first = int(broker.metrics_url.rpartition(":")[2].split("/")[0])
    metrics = [f"http://127.0.0.1:{first + n}" for n in range(1 + broker.shards)]
    return [broker.stream_url.replace("ws:", "http:").rstrip("/"), *metrics]


def test_every_process_says_that_it_is_well(memory_broker: Broker) -> None:
    for url in ports(memory_broker):
        assert answer(f"{url}/healthz") == (200, {"healthy": True}), url
        assert answer(f"{url}/readyz") == (200, {"ready": True, "reasons": []}), url
    for url in ports(memory_broker)[1:]:
        status, content_type, body = asked(f"{url}/readyz", "HEAD")
        assert (status, content_type, body) == (200, "application/json", b"")
        assert asked(f"{url}/readyz", "POST")[0] == 405
        assert asked(f"{url}/other")[0] == 404


def test_readyz_names_every_reason_and_forgets_them() -> None:
    with Broker(IN_MEMORY) as broker:
        stream, gateway, *_ = ports(broker)
        stopped = [broker.children()[f"shard-{k}"] for k in range(2)]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        reasons = ["shard 0 does not answer", "shard 1 does not answer"]
        wait_for(f"{stream}/readyz", (503, {"ready": False, "reasons": reasons}))
        assert answer(f"{gateway}/readyz") == (503, {"ready": False, "reasons": reasons})
        assert answer(f"{stream}/healthz") == (200, {"healthy": True})
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):  # killed as it hung, and started again
                os.kill(pid, signal.SIGCONT)
        wait_for(f"{stream}/readyz", (200, {"ready": True, "reasons": []}))


def wait_for(url: str, expected: tuple[int, Any]) -> None:
    end = time.monotonic() + LONG_S
    while answer(url) != expected:
        assert time.monotonic() < end, answer(url)
        time.sleep(0.05)
