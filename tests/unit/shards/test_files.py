"""Directories are made durable, whoever owns those above them."""

from __future__ import annotations

from pathlib import Path

import pytest

from shards import files


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The directories that were synced, in order."""
    found: list[Path] = []
    monkeypatch.setattr(files, "sync_directory", found.append)
    return found


def test_each_name_is_durable_before_the_next_is_made(tmp_path: Path, synced: list[Path]) -> None:
    files.make_directory(tmp_path / "a" / "b")
    assert synced == [tmp_path.parent, tmp_path, tmp_path / "a"]
    synced.clear()
    files.make_directory(tmp_path / "a" / "b")  # whoever made it may have died before its sync
    assert synced == [tmp_path / "a"]


def test_what_is_above_may_be_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sync(path: Path) -> None:
        if path == tmp_path.parent:
            raise PermissionError

    monkeypatch.setattr(files, "sync_directory", sync)
    files.make_directory(tmp_path / "a")
    assert (tmp_path / "a").is_dir()
