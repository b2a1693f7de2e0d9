"""The README's snippets and commands, as they stand there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest

from tests.support.broker import Broker

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def block(language: str, number: int = 0) -> str:
    """The text of a block of a language, counted from 0."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    text: str = found[number]
    return text


def test_the_first_worker_runs(tmp_path: Path) -> None:
    with Broker() as broker:
        program = tmp_path / "worker.py"
        program.write_text(block("python").replace("ws://localhost:49134", broker.worker_url))
        output = subprocess.run(
            [sys.executable, "-W", "ignore", str(program)],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
    assert "stored: {" in output, output
    assert "changed: msg-1 {'type': 'create'" in output, output


def test_the_client_runs(tmp_path: Path) -> None:
    with Broker() as broker:
        program = tmp_path / "client.py"
        program.write_text(block("python", 1).replace("ws://localhost:3112", broker.stream_url))
        output = subprocess.run(
            [sys.executable, str(program)],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
            cwd=ROOT,
        ).stdout
        with urlopen(broker.stream_url.replace("ws:", "http:") + "/client.js") as response:
            module = response.read().decode()
            assert response.headers["Content-Type"] == "text/javascript; charset=utf-8"
            assert response.headers["Access-Control-Allow-Origin"] == "*"
    assert output == "sync None {}\n"
    assert re.search(r"^export class Client", module, re.MULTILINE)


def test_the_configuration_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "broker.yaml"
    path.write_text(block("yaml"))
    checked = subprocess.run(
        [sys.executable, "-m", "broker", "check", str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert "store_method: file_based" in checked.stdout
    assert checked.stderr == ""


@pytest.mark.parametrize("path", re.findall(r"\]\(([\w./-]+)\)", README))
def test_links_lead_somewhere(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("target", re.findall(r"^    make (\w+)$", README, re.MULTILINE))
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
