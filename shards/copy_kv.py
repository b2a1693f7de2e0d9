"""A KvStore's folder, as `broker copy` reads and makes it."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from itertools import islice
from pathlib import Path
from typing import Self

from broker.errors import ConfigError, StorageError
from broker.names import Group, file_name
from broker.routing import shard_of
from shards import folder, manifest
from shards.copy_places import PAGE, GroupHead, Item, Put, Source
from shards.files import sync_directory
from shards.folder import shard_directories, stream_files
from shards.storage.pending import GroupRow
from shards.storage.sqlite_file import StreamFile, stream_name

OPEN_FILES_MAX = 64
"""Stream files that are open at a time."""


class KvSource:
    """See `shards.copy_places.Source`. `is_draft`: a folder that is being made."""

    def __init__(self, path: Path, *, is_draft: bool = False) -> None:
        self._path = path
        self._is_draft = is_draft
        self._rows: dict[Group, tuple[Path, GroupRow]] = {}
        self._open: tuple[Path, StreamFile] | None = None
        self._held = ExitStack()

    async def __aenter__(self) -> Self:
        if not self._is_draft:
            if manifest.read(self._path) is None:
                raise ConfigError("--from", f"there is no data in {self._path}")
            if (self._path / manifest.RESHARDING / manifest.COMPLETE).exists():
                raise ConfigError("--from", f"the data in {self._path} is being resharded")
            self._held.enter_context(folder.locked(self._path))
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._open is not None:
            self._open[1].close()
        self._held.close()

    async def names(self) -> list[Group]:
        for directory in shard_directories(self._path):
            for path in stream_files(directory):
                stream = stream_name(path)
                if stream is None:
                    what = f"{path} can't be read; move it away to go on"
                    raise StorageError("storage_corrupt", what)
                for row in self._file(path, stream).all_group_rows():
                    self._rows[Group(stream, row.group_id)] = path, row
        return list(self._rows)

    async def head(self, group: Group) -> GroupHead:
        _, row = self._rows[group]
        return GroupHead(group, row.epoch, row.seq, row.timestamp_ms)

    async def items(self, group: Group) -> AsyncIterator[list[Item]]:
        path, row = self._rows[group]
        found = self._file(path, group.stream).iterate_items(row.id)
        while page := list(islice(found, PAGE)):
            yield page

    def _file(self, path: Path, stream: str) -> StreamFile:
        if self._open is None or self._open[0] != path:
            if self._open is not None:
                self._open[1].close()
            self._open = path, StreamFile(path, stream)
        return self._open[1]


class KvTarget:
    """See `shards.copy_places.Target`: a draft beside the place, which is renamed."""

    def __init__(self, path: Path, shards: int) -> None:
        self._path = path
        self._shards = shards
        self._draft = path.with_name(f"{path.name}.copying")
        self._files: OrderedDict[Path, StreamFile] = OrderedDict()
        self._held = ExitStack()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
        self._held.close()

    async def begin(self, is_replacing: bool, source: Source) -> None:
        if self._path.exists() and any(self._path.iterdir()):
            if not is_replacing:
                reason = f"{self._path} holds data already; move it away, or say --replace"
                raise ConfigError("--to", reason)
            if self._replaced.exists():
                raise ConfigError("--to", f"{self._replaced} is in the way; move it away first")
            self._held.enter_context(folder.locked(self._path))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self._draft, ignore_errors=True)
        for shard in range(self._shards):
            (self._draft / f"shard-{shard}").mkdir(parents=True)

    @property
    def _replaced(self) -> Path:
        return self._path.with_name(f"{self._path.name}.replaced")

    @asynccontextmanager
    async def group(self, head: GroupHead) -> AsyncIterator[Put]:
        stream, group_id = head.group
        shard = shard_of(head.group, self._shards)
        path = self._draft / f"shard-{shard}" / f"{file_name(stream)}.db"
        file = self._files.pop(path, None) or StreamFile(path, stream, durable=False)
        self._files[path] = file
        row = file.add_group(group_id, head.epoch, head.seq, head.timestamp_ms)

        async def put(items: list[Item]) -> None:
            file.add_items(row, items)

        yield put
        file.end_group(row)
        if len(self._files) > OPEN_FILES_MAX:
            _, oldest = self._files.popitem(last=False)
            oldest.finish_copy()
            oldest.close()

    async def written(self) -> None:
        for file in self._files.values():
            file.finish_copy()
            file.close()
        self._files.clear()

    def copy(self) -> Source:
        return KvSource(self._draft, is_draft=True)

    async def finish(self) -> None:
        manifest.write(self._draft / manifest.FILE_NAME, self._shards)
        folder.sync_tree(self._draft)
        if self._path.exists():
            if any(self._path.iterdir()):
                self._path.rename(self._replaced)
            else:
                self._path.rmdir()
        self._draft.rename(self._path)
        sync_directory(self._path.parent)
