"""Workers of the published Rust SDK."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from tests.conftest import Run
from tests.front_door import sdk_scenarios as scenarios
from tests.front_door.sdk_programs import RUST_PROGRAM, node_worker, rust_presence, rust_worker
from tests.support.broker import REPOSITORY, Broker

BUILD_S_MAX = 1200

pytestmark = [
    # the first test builds the SDK with all that it depends on
    pytest.mark.timeout(BUILD_S_MAX + 300),
    pytest.mark.skipif(shutil.which("cargo") is None, reason="cargo is not installed"),
]


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    """Build tests/rust; quick when nothing has changed."""
    target = RUST_PROGRAM.parents[1]
    built = subprocess.run(
        ["cargo", "build", "--quiet"],
        cwd=REPOSITORY / "tests" / "rust",
        env={**os.environ, "CARGO_TARGET_DIR": str(target)},
        capture_output=True,
        text=True,
        timeout=BUILD_S_MAX,
        check=False,
    )
    assert built.returncode == 0, built.stderr


def test_calls(memory_broker: Broker, run: Run) -> None:
    scenarios.check_calls(memory_broker, run, rust_worker, "rust-calls")


def test_trigger_between_workers(memory_broker: Broker) -> None:
    scenarios.check_trigger(memory_broker, rust_worker, rust_worker, "rust-trigger")


def test_trigger_of_a_node_worker(memory_broker: Broker) -> None:
    scenarios.check_trigger(memory_broker, rust_worker, node_worker, "rust-node-trigger")


def test_presence(memory_broker: Broker, run: Run) -> None:
    scenarios.check_presence(memory_broker, run, rust_presence, "rust-room")
