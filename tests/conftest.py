"""Shared by all tests: one event loop per module, brokers, and their logs beside failures."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator, Iterator
from typing import Any

import pytest

from tests.support import broker as brokers
from tests.support.broker import IN_MEMORY, Broker

Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Runs a coroutine to its end, on one loop per module: connections may outlive a test."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="module")
def memory_broker() -> Iterator[Broker]:
    """A broker of the module's own that keeps everything in memory."""
    with Broker(IN_MEMORY) as broker:
        yield broker


@pytest.fixture(scope="module")
def disk_broker() -> Iterator[Broker]:
    """A broker of the module's own with `file_based` storage."""
    with Broker() as broker:
        yield broker


@pytest.fixture(params=["in_memory", "file_based"])
def any_broker(request: pytest.FixtureRequest) -> Broker:
    """The module's brokers, one with each kind of storage."""
    name = "memory_broker" if request.param == "in_memory" else "disk_broker"
    broker: Broker = request.getfixturevalue(name)
    return broker


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the log of every broker that is up when a test fails."""
    report = yield
    if report.failed:
        for broker in brokers.running:
            report.sections.append((f"broker {broker.pid}", broker.log_tail()))
    return report
