"""What is compared with a broker that counts: the same without the statements that only count."""

from __future__ import annotations

import ast

import pytest

from bench.without_counting import PACKAGES, stripped
from tests.support.broker import REPOSITORY


def test_what_only_counts_is_gone() -> None:
    source = """
def call(self, calls):
    calls.total += 1
    if calls.total >= calls.due:
        calls.durations.observe(calls.take())
    self.clients_total += 1
    self.position += 1
    self.hot.add("key", 1)
"""
    tree, removed = stripped(source)
    assert removed == 3
    left = [line.strip() for line in ast.unparse(tree).splitlines()[1:]]
    assert [line for line in left if line != "pass"] == [
        "self.clients_total += 1",
        "self.position += 1",
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_can_do_without(package: str) -> None:
    removed = 0
    for path in (REPOSITORY / package).rglob("*.py"):
        tree, count = stripped(path.read_text(encoding="utf-8"))
        compile(tree, path, "exec", dont_inherit=True)
        removed += count
    assert removed > 5
