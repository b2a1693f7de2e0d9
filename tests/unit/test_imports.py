"""Imports point one way: gateway and shards import broker, and nothing imports them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
ALLOWED = {
    "broker": {"broker"},
    "gateway": {"gateway", "broker"},
    "shards": {"shards", "broker"},
}
FILES = [path for package in ALLOWED for path in sorted((REPOSITORY / package).rglob("*.py"))]
# Whoever only computes can be tested, and reasoned about, without an event loop.
WITHOUT_IO = [
    "broker/link_protocol.py",
    "broker/names.py",
    "broker/routing.py",
    "gateway/access.py",
    "gateway/hub.py",
    "gateway/peer_protocol.py",
    "gateway/peer_sessions.py",
    "gateway/stream_protocol.py",
    "gateway/worker_protocol.py",
    "shards/group.py",
    "shards/leases.py",
    "shards/triggers.py",
    "shards/update_ops.py",
]


def imported(path: Path) -> set[str]:
    """The top-level packages that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found.add(node.module)
    return {name.partition(".")[0] for name in found}


def test_there_are_files() -> None:
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_imports_point_one_way(path: Path) -> None:
    package = path.relative_to(REPOSITORY).parts[0]
    forbidden = (ALLOWED.keys() | {"tests", "bench"}) - ALLOWED[package]
    assert not imported(path) & forbidden


@pytest.mark.parametrize("name", WITHOUT_IO)
def test_pure_parts_do_no_io(name: str) -> None:
    assert not imported(REPOSITORY / name) & {"asyncio", "socket", "uvloop", "sqlite3"}
