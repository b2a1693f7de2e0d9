"""install.sh and uninstall.sh, below a folder instead of `/`."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.broker import REPOSITORY

DEPLOY = REPOSITORY / "deploy"
SCRIPTS = [DEPLOY / "install.sh", DEPLOY / "uninstall.sh"]
UNITS = {
    "broker.service",
    "broker-gateway.service",
    "broker-gateway@.service",
    "broker-shard@.service",
    "broker.target",
}


def script(root: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [DEPLOY / name, *arguments],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "DESTDIR": str(root), "PYTHON": sys.executable},
        timeout=300,
    )


def files(root: Path) -> set[str]:
    """Every file but those of the venv."""
    found = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return {str(path) for path in found if path.parts[0] != "opt"}


@pytest.mark.timeout(600)
def test_installed_twice_and_removed_twice(tmp_path: Path) -> None:
    config = tmp_path / "etc/broker/broker.yaml"
    program = tmp_path / "opt/broker/bin/broker"
    units = {f"etc/systemd/system/{unit}" for unit in UNITS}
    for _ in range(2):
        done = script(tmp_path, "install.sh")
        assert done.returncode == 0, done.stdout + done.stderr
        assert files(tmp_path) == {"etc/broker/broker.yaml", *units}
        checked = subprocess.run([program, "check", config], check=False, capture_output=True)
        assert checked.returncode == 0, checked.stderr
        with config.open("a") as text:
            text.write("# mine\n")
    assert config.read_text().count("# mine\n") == 2, "the second installation kept the file"
    assert stat.S_IMODE((tmp_path / "var/lib/broker").stat().st_mode) == 0o750
    assert not (REPOSITORY / "build").exists(), "nothing is built in the checkout"
    data = tmp_path / "var/lib/broker/item"
    data.write_text("kept")

    for _ in range(2):
        done = script(tmp_path, "uninstall.sh")
        assert done.returncode == 0, done.stderr
        assert files(tmp_path) == {"etc/broker/broker.yaml", "var/lib/broker/item"}
        assert not program.parent.parent.exists()
    assert script(tmp_path, "uninstall.sh", "--purge").returncode == 0
    assert not files(tmp_path)
    assert not data.parent.exists()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_unknown_options_change_nothing(path: Path, tmp_path: Path) -> None:
    done = script(tmp_path, path.name, "--purge-all")
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")
    assert not list(tmp_path.iterdir())


def test_a_python_that_does_not_do(tmp_path: Path) -> None:
    env = {**os.environ, "DESTDIR": str(tmp_path), "PYTHON": "/nowhere/python3"}
    done = subprocess.run([SCRIPTS[0]], check=False, capture_output=True, text=True, env=env)
    assert done.returncode == 1
    assert "/nowhere/python3" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck() -> None:
    done = subprocess.run(
        ["shellcheck", *SCRIPTS], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout
