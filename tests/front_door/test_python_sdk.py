"""Workers of the published Python SDK."""

from __future__ import annotations

import pytest

from tests.conftest import Run
from tests.front_door import sdk_scenarios as scenarios
from tests.front_door.sdk_programs import node_worker, python_presence, python_worker
from tests.support.broker import Broker

pytestmark = pytest.mark.timeout(300)


def test_calls(memory_broker: Broker, run: Run) -> None:
    scenarios.check_calls(memory_broker, run, python_worker, "python-calls")


def test_trigger_between_workers(memory_broker: Broker) -> None:
    scenarios.check_trigger(memory_broker, python_worker, python_worker, "python-trigger")


def test_trigger_of_a_node_worker(memory_broker: Broker) -> None:
    scenarios.check_trigger(memory_broker, python_worker, node_worker, "python-node-trigger")


def test_presence(memory_broker: Broker, run: Run) -> None:
    scenarios.check_presence(memory_broker, run, python_presence, "python-room")
