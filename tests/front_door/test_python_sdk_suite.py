"""The Python SDK's own integration tests, as it ships them, against the broker."""

from __future__ import annotations

import os
import re
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.support.broker import IN_MEMORY, REPOSITORY, Broker

SUITE = REPOSITORY / ".cache" / "iii_sdk-0.25.0"
PYTHON = REPOSITORY / ".cache" / "sdk-venv" / "bin" / "python"
MODULES = (
    "streams",
    "bridge",
    "trigger_type_lifecycle",
    "trigger_registration_error",
    "invocation_metadata",
    "worker_metadata",
    "iii_registration_dedup",
    "reconnect_sends_reattach",
    "reconnect_survives_handshake_eof",
    "sync_api",
    "async_api",
)
TESTS = 83
SUITE_S_MAX = 540


@pytest.mark.timeout(SUITE_S_MAX + 60)
def test_suite_passes(tmp_path: Path) -> None:
    """Needs tests/setup/python_sdk_tests.sh to have run."""
    assert SUITE.is_dir(), "run tests/setup/python_sdk_tests.sh"
    assert PYTHON.exists(), "run tests/setup/python_sdk_tests.sh"
    results = tmp_path / "results.xml"
    command = [str(PYTHON), "-m", "pytest", "-q", f"--junitxml={results}"]
    # Without its own options, which measure coverage; and nothing is written beside the tests.
    command += ["-o", "addopts=", "-p", "no:cacheprovider"]
    command += [f"tests/test_{module}.py" for module in MODULES]
    with Broker(IN_MEMORY) as broker:
        env = {
            **{
                key: value for key, value in os.environ.items() if not re.match("PYTEST_|III_", key)
            },
            "III_URL": broker.worker_url,
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        ran = subprocess.run(
            command,
            cwd=SUITE,
            env=env,
            capture_output=True,
            text=True,
            timeout=SUITE_S_MAX,
            check=False,
        )
        shown = ran.stdout[-20_000:] + ran.stderr[-5_000:]
        assert results.exists(), shown
        suites = list(ET.parse(results).getroot().iter("testsuite"))
        counts = {
            outcome: sum(int(suite.attrib[outcome]) for suite in suites)
            for outcome in ("tests", "failures", "errors", "skipped")
        }
        assert counts == {"tests": TESTS, "failures": 0, "errors": 0, "skipped": 0}, shown
        assert ran.returncode == 0, shown
