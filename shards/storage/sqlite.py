"""KvStore `file_based`: an SQLite file per stream, and what is in use of it in memory.

Operations are evaluated on the loop, on cached groups; a thread loads what is not cached before
and commits what changed after. Commits go to the file's journal, and from there to its tables when
it is long enough, or a moment later. A group is cached whole, unless it is large: then only the
items that a batch touches are loaded for it. Nobody reads the cache between evaluation and commit,
as there is one batch at a time per stream; when a commit fails, what is cached of the stream is
forgotten, so that memory never holds what the disk does not.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec

from broker import logs, messages
from broker.clock import Clock
from broker.config import FILE_PATH_KEY
from broker.errors import ConfigError, LimitExceeded, StorageError
from broker.names import file_name, stream_of_file_name
from broker.tasks import Tasks
from shards.files import make_directory, remove_files
from shards.group import (
    ITEM_OVERHEAD_BYTES,
    Change,
    Done,
    GroupState,
    Head,
    Operation,
    Resumed,
    Snapshot,
    attempt,
    new_epoch,
    reads_history,
)
from shards.history import History, HistoryLimits
from shards.storage.base import Settle, Settled
from shards.storage.clock_file import ClockFile
from shards.storage.flushes import Flushes
from shards.storage.pending import Commit, GroupRow, Trim
from shards.storage.sqlite_file import (
    DRAFT,
    Connect,
    StreamFile,
    closed_groups,
    connect_file,
    failure,
    stream_name,
)
from shards.storage.threads import Threads

THREADS = 4
FLUSH_AFTER_S = 0.25
"""So long a change is in a stream's journal and not in its tables, if few streams change."""
FLUSH_PAUSE_S = 0.005
"""Between two flushes of a shard."""
OPEN_FILES_MAX = 512
"""Stream files kept open per shard, and streams in use at once. As many again may be open while
their disk fails. A file costs `DESCRIPTORS_PER_FILE`, and about 200 KB of memory."""
DESCRIPTORS_PER_FILE = 3
RELEASED_S_MAX = 1.0
"""After which a file is opened although there are as many as there may be, all of them busy."""
GROUP_OVERHEAD_BYTES = 1000
LARGE_SHARE = 16
"""A group larger than the cache's limit divided by this is not cached whole."""

TRIM_SHARE = 4
"""What is too much of a group's history is looked for when it grew by its limits over this."""

_READ_DISK = (messages.Join, messages.ReadHistory)
"""Operations that may read the history, or have their time remembered, on disk."""

T = TypeVar("T")

_log = logs.Log("storage")


class _Stream:
    """What is in memory of a stream: its file once one is open, and cached groups."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path
        self.file: StreamFile | None = None
        self.groups: dict[str, GroupState] = {}
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.in_use = False
        """Whether somebody works with it: it stays in memory meanwhile."""

    def use_now(self) -> bool:
        """Have it for oneself until `release`, if nobody has it."""
        free = not self.in_use
        self.in_use = True
        return free

    async def use(self) -> None:
        """The same, waiting in line."""
        if not self.use_now():
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            await turn

    def release(self) -> None:
        """Hand it to the next in line."""
        if self._waiting:
            self._waiting.popleft().set_result(None)
        else:
            self.in_use = False


class _Changes:
    """What a batch changes, by group."""

    def __init__(self, limits: HistoryLimits) -> None:
        self.groups: dict[str, GroupState] = {}
        self._limits = limits
        self._changes: dict[str, list[Change]] = {}

    def add(self, group: GroupState, change: Change) -> None:
        changes = self._changes.get(group.group_id)
        if changes is None:
            self.groups[group.group_id] = group
            changes = self._changes[group.group_id] = []
        changes.append(change)

    def commit(self) -> Commit:
        """The same in terms of rows; every group must have its row."""
        groups = self.groups
        return Commit(
            [_group_row(group) for group in groups.values()],
            [(groups[group_id].row, changes) for group_id, changes in self._changes.items()],
        )

    def trims(self) -> list[Trim]:
        """The groups whose history may be too large by now."""
        limits, trims = self._limits, []
        step = limits.events_max // TRIM_SHARE + 1
        for group_id, changes in self._changes.items():
            group = self.groups[group_id]
            if limits.events_max:
                group.untrimmed += sum(len(change.data) for change in changes)
            if (
                group.untrimmed > limits.group_bytes_max // TRIM_SHARE
                or (changes[0].seq - 1) // step != group.head.seq // step
            ):
                group.untrimmed = 0
                seq = group.head.seq - limits.events_max
                trims.append(Trim(group.row, seq, limits.group_bytes_max))
        return trims


class SqliteStorage:
    """See `shards.storage.base.Storage`."""

    def __init__(
        self,
        directory: Path,
        clock: Clock,
        history_limits: HistoryLimits,
        *,
        response_bytes_max: int,
        cache_bytes_max: int,
        open_files_max: int = OPEN_FILES_MAX,
        connect: Connect = connect_file,
    ) -> None:
        self.directory = directory
        self._open_files_max = open_files_max
        self._connect = connect
        self._history_limits = history_limits
        self._clock = clock
        self._response_bytes_max = response_bytes_max
        self._cache_bytes_max = cache_bytes_max
        self._large_bytes = cache_bytes_max // LARGE_SHARE
        self._streams: dict[str, _Stream] = {}
        self._open_files: OrderedDict[str, _Stream] = OrderedDict()
        self._cached: OrderedDict[tuple[str, str], int] = (
            OrderedDict()
        )  # size, longest unused first
        self.cached_bytes = 0
        self.hits_total = 0
        self.misses_total = 0
        self.evictions_total = 0
        self.closed_total = 0
        self._epoch = new_epoch()  # of groups that were never written
        self._forgotten_timestamp_ms = 0  # that a client may remember of a group we do not
        self._clock_file = ClockFile(directory)
        self._in_use = asyncio.Semaphore(open_files_max)
        self._flushes = Flushes(self._flush_soon, FLUSH_AFTER_S, FLUSH_PAUSE_S)
        self._reserved = 0  # places of files that are being opened, or closed for others
        self._wanting_place: deque[asyncio.Future[None]] = deque()
        self._threads = Threads(THREADS, "storage")
        self._tasks = Tasks()

    async def open(self) -> None:
        try:
            await self._threads.run(self._prepare_directory)
        except OSError as error:
            raise ConfigError(
                FILE_PATH_KEY,
                f"{self.directory} can't be made: {error.strerror}",
            ) from None
        self._forgotten_timestamp_ms = await self._in_thread(self._clock_file.read)

    def _prepare_directory(self) -> None:
        make_directory(self.directory)
        drafts = list(self.directory.glob(f"*.db{DRAFT}"))  # of a process that was killed
        if drafts:
            remove_files(*drafts)

    async def close(self) -> None:
        self._flushes.close()  # nobody else may flush a file from now on
        await self._tasks.wait()
        with suppress(StorageError):  # then the next life begins a little later than it had to
            await self._in_thread(self._clock_file.close)
        for stream in list(self._streams.values()):
            await stream.use()
            await self._flush(stream)
            if stream.file is not None:
                await self._in_thread(stream.file.close)
        self._threads.close()

    @property
    def cached_groups(self) -> int:
        """Groups in memory."""
        return len(self._cached)

    @property
    def open_files(self) -> int:
        """Stream files that are open."""
        return len(self._open_files)

    @property
    def suspect_files(self) -> int:
        """Those of them that stay open until their disk works again."""
        files = (stream.file for stream in self._open_files.values())
        return sum(file is not None and file.suspect for file in files)

    def execute(self, stream: str, operations: Sequence[Operation], settle: Settle) -> None:
        state = self._streams.get(stream)
        if state is not None and _in_memory(state, operations) and state.use_now():
            self._execute_now(state, operations, settle)
        else:
            self._tasks.start(self._execute(stream, operations, settle))

    def interest(self, stream: str, group_id: str, wanted: bool) -> None:
        """Nothing to do: nobody else changes it."""

    def interest_stream(self, stream: str, wanted: bool) -> None:
        """Nobody else changes anything."""

    async def streams(self) -> list[str]:
        known = [name for name, stream in self._streams.items() if stream.groups]
        return list(dict.fromkeys([*known, *await self._in_thread(self._streams_on_disk)]))

    def _streams_on_disk(self) -> list[str]:
        names = []
        for path in sorted(self.directory.glob("*.db")):
            name = stream_of_file_name(path.stem)
            if name is None:
                name = stream_name(path)
            if name is not None:
                names.append(name)
        return names

    async def groups(self, stream: str) -> list[str]:
        async with self._use(stream) as state:
            if state.file is None:  # whoever lists all would open and close all files otherwise
                found = await self._in_thread(partial(closed_groups, state.path, stream))
                if found is not None:
                    return found
            file = await self._file(state, create=False)
            return [] if file is None else await self._in_thread(file.groups)

    def _execute_now(self, state: _Stream, operations: Sequence[Operation], settle: Settle) -> None:
        """`_execute` for what needs nothing from the disk, which is nearly all: no task for it."""
        settled, changes = self._evaluate(state, operations)
        file = state.file
        assert file is not None, "checked before"

        def done(_: None, error: Exception | None) -> None:
            if error is None:
                outcome = settled
                self._account(state, dict.fromkeys(o.group_id for o in operations))
            elif isinstance(error, StorageError):
                outcome = [(error, None)] * len(operations)
                self._forget(state)
            else:
                raise error
            if state.file is not None and state.file.pending.is_large(len(self._flushes)):
                self._tasks.start(self._flush_and_release(state))
            else:
                self._flush_later(state)
                self._release(state)
            settle(outcome)

        self.hits_total += len(operations)
        self._open_files.move_to_end(state.name)
        if changes.groups:
            self._threads.submit(self._commit_work(file, changes), done)
        else:
            done(None, None)

    async def _execute(self, stream: str, operations: Sequence[Operation], settle: Settle) -> None:
        settled: list[Settled] = []
        async with self._use(stream) as state:
            for segment in self._segments(state, operations):
                try:
                    settled += await self._perform(state, segment)
                except StorageError as error:
                    self._forget(state)
                    settled += [(error, None)] * len(segment)
        settle(settled)

    def _segments(
        self, state: _Stream, operations: Sequence[Operation]
    ) -> Iterator[Sequence[Operation]]:
        """Cut `operations` around reads of whole groups that are too large to be cached, and of
        their history, which is on disk only."""
        start = 0
        for end, operation in enumerate(operations):
            reads_history_ = reads_history(operation)
            if not _reads_whole(operation) and not reads_history_:
                continue
            group = state.groups.get(operation.group_id)
            if reads_history_ or group is None or not group.complete:  # may turn out to be large
                if start < end:
                    yield operations[start:end]
                yield operations[end : end + 1]
                start = end + 1
        if start < len(operations):
            yield operations[start:]

    async def _perform(self, state: _Stream, operations: Sequence[Operation]) -> list[Settled]:
        await self._load(state, operations)
        if len(operations) == 1 and reads_history(operations[0]):
            await self._load_history(state, operations[0])
        if len(operations) == 1 and _reads_whole(operations[0]):
            group = state.groups[operations[0].group_id]
            if not group.complete:
                settled = [await self._read_large(state, group, operations[0])]
                await self._reserve(settled)
                return settled
        settled, changes = self._evaluate(state, operations)
        if changes.groups:
            file = await self._file(state, create=True)
            assert file is not None, "made when it is missing"
            await self._in_thread(self._commit_work(file, changes))
            if file.pending.is_large(len(self._flushes)):
                await self._flush(state)
            self._flush_later(state)
        await self._reserve(settled)
        self._account(state, dict.fromkeys(operation.group_id for operation in operations))
        return settled

    def _evaluate(
        self, state: _Stream, operations: Sequence[Operation]
    ) -> tuple[list[Settled], _Changes]:
        """Perform `operations` in memory, where all that they need is."""
        now_ms, bytes_max, groups = self._clock(), self._response_bytes_max, state.groups
        changes = _Changes(self._history_limits)
        settled: list[Settled] = []
        for operation in operations:
            group = groups[operation.group_id]
            outcome = attempt(group, operation, now_ms, bytes_max)
            settled.append((outcome, group))
            if type(outcome) is Done and outcome.change is not None:
                changes.add(group, outcome.change)
        return settled, changes

    def _commit_work(self, file: StreamFile, changes: _Changes) -> Callable[[], None]:
        """What a thread has to do to make `changes` durable."""
        for group in changes.groups.values():
            if not group.row:
                group.row = file.next_row
                file.next_row += 1
        return partial(file.commit, changes.commit(), changes.trims())

    async def _load(self, state: _Stream, operations: Sequence[Operation]) -> None:
        """Bring in the groups and items that `operations` need."""
        unknown = dict.fromkeys(o.group_id for o in operations if o.group_id not in state.groups)
        wanted: dict[str, set[str]] = {}
        for operation in operations:
            item_id = getattr(operation, "item_id", None)
            group = state.groups.get(operation.group_id)
            if item_id is not None and (group is None or not group.complete):
                wanted.setdefault(operation.group_id, set()).add(item_id)
        if not unknown and not wanted:
            self.hits_total += len(operations)
            return
        misses = sum(o.group_id in unknown or o.group_id in wanted for o in operations)
        self.misses_total += misses
        self.hits_total += len(operations) - misses
        file = await self._file(state, create=False)  # a read makes no file
        rows = await self._in_thread(lambda: file.group_rows(list(unknown))) if file else []
        for row in rows:
            state.groups[row.group_id] = self._group_of(state, row)
        for group_id in unknown:
            if group_id in state.groups:
                continue
            head = Head(self._epoch, 0, self._forgotten_timestamp_ms)
            state.groups[group_id] = GroupState(state.name, group_id, head)
        if file is None:
            return
        loads: list[tuple[GroupState, Callable[[], list[tuple[str, bytes]]]]] = []
        for row in rows:
            group = state.groups[row.group_id]
            if group.complete:
                loads.append((group, partial(file.all_items, row.id)))
        for group_id, item_ids in wanted.items():
            group = state.groups[group_id]
            if not group.complete:
                loads.append((group, partial(file.some_items, group.row, list(item_ids))))
        if loads:
            found = await self._in_thread(lambda: [load() for _, load in loads])
            for (group, _), items in zip(loads, found, strict=True):
                group.items = dict(items)
                group.id_bytes = sum(map(len, group.items))

    async def _read_large(self, state: _Stream, group: GroupState, operation: Operation) -> Settled:
        now_ms = self._clock()
        if isinstance(operation, messages.Join) and (resumed := group.resume(operation, now_ms)):
            return resumed, group
        try:
            group.check_size(self._response_bytes_max)
        except LimitExceeded as refusal:
            return refusal, group
        file = await self._file(state, create=False)
        assert file is not None, "a large group is in a file"
        entries = isinstance(operation, messages.List) and operation.with_ids
        ids = isinstance(operation, messages.Join) and operation.with_ids
        read = partial(file.whole_group, entries=entries, ids=ids)
        found = await self._in_thread(lambda: read(group.row, self._response_bytes_max))
        if found is None:
            return group.too_large(self._response_bytes_max), group
        data, ids_text = found
        if not isinstance(operation, messages.Join):
            return Done(data), group
        with_data = msgspec.structs.replace(operation, data=data)
        outcome = attempt(group, with_data, now_ms, self._response_bytes_max)
        assert isinstance(outcome, Snapshot), "nothing is left that could be refused, or resumed"
        return msgspec.structs.replace(outcome, ids=ids_text), group

    def _group_of(self, state: _Stream, row: GroupRow) -> GroupState:
        timestamp_ms = max(row.timestamp_ms, self._forgotten_timestamp_ms)
        group = GroupState(state.name, row.group_id, Head(row.epoch, row.seq, timestamp_ms))
        group.row, group.count, group.bytes = row.id, row.items, row.bytes
        group.complete = self._size(group) <= self._large_bytes
        group.untrimmed = self._history_limits.group_bytes_max  # nobody knows
        return group

    async def _reserve(self, settled: list[Settled]) -> None:
        """Have the timestamps of syncs and resumes, which no commit holds, remembered past a
        crash."""
        answers = (o for o, _ in settled if isinstance(o, Snapshot | Resumed))
        latest = max((answer.timestamp_ms for answer in answers), default=0)
        clock_file = self._clock_file
        clock_file.latest_ms = max(clock_file.latest_ms, latest)
        if latest > clock_file.reserved_ms:
            try:
                await self._in_thread(lambda: clock_file.reserve(latest))
            except (
                StorageError
            ) as error:  # a full disk: reads go on, at a risk that needs two faults
                _log.warning("clock_not_reserved", reason=error.message)

    async def _load_history(self, state: _Stream, operation: Operation) -> None:
        """Give the group as much of its history as `operation` may need."""
        assert isinstance(operation, messages.Join | messages.ReadHistory), "those that read it"
        group, limits = state.groups[operation.group_id], self._history_limits
        group.history = History(limits)
        since = group.head.seq - limits.events_max
        if isinstance(operation, messages.Join) and (
            operation.epoch != group.head.epoch
            or operation.since is None
            or operation.since < since
        ):
            return
        since = max(since, operation.since or 0)
        file = await self._file(state, create=False)
        if file is None or not limits.events_max or since >= group.head.seq:
            return
        changes = await self._in_thread(lambda: file.history(group.row, since))
        group.history = History(limits, changes)

    async def _file(self, state: _Stream, *, create: bool) -> StreamFile | None:
        """The stream's open file; None when there is none and `create` is False."""
        if state.file is None:
            if not create and not await self._in_thread(state.path.exists):
                return None
            await self._reserve_place()
            try:
                state.file = await self._in_thread(
                    lambda: StreamFile(
                        state.path, state.name, self._history_limits, connect=self._connect
                    )
                )
            finally:
                self._reserved -= 1
            self._flush_later(state)
        self._open_files[state.name] = state
        self._open_files.move_to_end(state.name)
        return state.file

    async def _reserve_place(self) -> None:
        """Have a place for one more open file, that of the longest unused one if there are as many
        as there may be; whoever opens it counts it in `_reserved` until it is open.

        Files of streams that are busy just now stay, and those that are the only ones to know
        what was committed, as long as the disk fails.
        """
        kept: set[str] = set()
        while len(self._open_files) + self._reserved >= self._open_files_max:
            unused = (s for s in self._open_files.values() if not s.in_use and s.name not in kept)
            state = next(unused, None)
            if state is None:
                if not await self._released_soon():
                    break
                continue
            state.use_now()
            del self._open_files[state.name]
            self._reserved += 1
            try:
                if await self._close_file(state):
                    return  # its place is ours
                kept.add(state.name)
                self._open_files[state.name] = state
                self._reserved -= 1
            finally:
                self._release(state)
        if len(self._open_files) + self._reserved >= 2 * self._open_files_max:
            raise StorageError(
                "storage_failed",
                f"the disk of {self.directory} fails: too many files wait for it",
                retryable=True,
            )
        self._reserved += 1

    async def _released_soon(self) -> bool:
        """Wait until a stream is not busy any more; False when that takes too long."""
        if not any(state.in_use for state in self._open_files.values()):
            return False
        released: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._wanting_place.append(released)
        try:
            async with asyncio.timeout(RELEASED_S_MAX):
                await released
        except TimeoutError:
            return False
        return True

    async def _close_file(self, state: _Stream) -> bool:
        """Close a stream's file, its tables up to date; False if it alone knows what counts."""
        await self._flush(state)
        file = state.file
        if file is None:
            return True
        if file.suspect:
            try:
                await self._in_thread(file.clear_log)
            except StorageError as error:
                _log.warning("log_not_cleared", stream=state.name, reason=error.message)
                return False
        state.file = None
        self.closed_total += 1
        await self._in_thread(file.close)
        return True

    def _flush_later(self, state: _Stream) -> None:
        """Have what is in the journal written to the tables before long."""
        if state.file is not None and state.file.pending:
            self._flushes.add(state)

    def _flush_soon(self, state: _Stream) -> bool:
        if state.file is None or not state.file.pending:
            return False
        self._tasks.start(self._flush_now(state.name))
        return True

    async def _flush_now(self, name: str) -> None:
        async with self._use(name) as state:
            await self._flush(state)

    async def _flush_and_release(self, state: _Stream) -> None:
        try:
            await self._flush(state)
        finally:
            self._release(state)

    async def _flush(self, state: _Stream) -> None:
        """Write what is in the journal to the tables; when that fails it is in the journal still,
        and is read again from there."""
        file, expired_ms = state.file, self._clock() - self._history_limits.age_ms_max
        if file is None or not file.pending:
            return
        try:
            await self._in_thread(lambda: file.flush(expired_ms))
        except StorageError as error:
            _log.warning("journal_not_flushed", stream=state.name, reason=error.message)
            self._drop_file(state)

    @asynccontextmanager
    async def _use(self, name: str) -> AsyncIterator[_Stream]:
        """A stream whose file stays open and whose groups stay cached meanwhile."""
        async with self._in_use:
            state = self._streams.get(name)
            if state is None:
                path = self.directory / f"{file_name(name)}.db"
                state = self._streams[name] = _Stream(name, path)
            await state.use()
            try:
                yield state
            finally:
                self._release(state)

    def _release(self, state: _Stream) -> None:
        state.release()
        while self._wanting_place:
            if not (released := self._wanting_place.popleft()).done():
                released.set_result(None)
        self._drop_if_unused(state)
        self._trim()

    def _forget(self, state: _Stream) -> None:
        """Drop what memory holds of the stream; the next operation reads the disk, through another
        connection unless this one alone knows what was committed."""
        for group_id, group in state.groups.items():
            self._note_forgotten(group)
            self.cached_bytes -= self._cached.pop((state.name, group_id), 0)
        state.groups.clear()
        self._drop_file(state)

    def _drop_file(self, state: _Stream) -> None:
        """Close a file that failed, unless it is to be kept; the next operation opens it again."""
        if state.file is not None and not state.file.suspect:
            self._open_files.pop(state.name, None)
            file, state.file = state.file, None
            self._threads.submit(file.close, _closed)

    def _size(self, group: GroupState) -> int:
        items = group.bytes + group.id_bytes + group.count * ITEM_OVERHEAD_BYTES
        return GROUP_OVERHEAD_BYTES + items

    def _account(self, state: _Stream, group_ids: Iterable[str]) -> None:
        """Count what the groups hold now, in the order of their use."""
        for group_id in group_ids:
            group = state.groups[group_id]
            if not group.row:  # only ever looked at
                self._note_forgotten(state.groups.pop(group_id))
                continue
            size = self._size(group)
            if group.complete and group.count and size > self._large_bytes:
                group.complete = False
            group.history = None
            if not group.complete:
                group.items = {}
                size = GROUP_OVERHEAD_BYTES
            key = (state.name, group_id)
            self.cached_bytes += size - self._cached.get(key, 0)
            self._cached[key] = size
            self._cached.move_to_end(key)

    def _trim(self) -> None:
        """Forget the longest unused groups beyond the limit, but for those in use."""
        for _ in range(len(self._cached)):
            if self.cached_bytes <= self._cache_bytes_max:
                return
            key = next(iter(self._cached))
            other = self._streams[key[0]]
            if other.in_use:
                self._cached.move_to_end(key)
                continue
            self.evictions_total += 1
            self.cached_bytes -= self._cached.pop(key)
            self._note_forgotten(other.groups.pop(key[1]))
            self._drop_if_unused(other)

    def _note_forgotten(self, group: GroupState) -> None:
        self._forgotten_timestamp_ms = max(self._forgotten_timestamp_ms, group.head.timestamp_ms)

    def _drop_if_unused(self, state: _Stream) -> None:
        if not state.in_use and not state.groups and state.file is None:
            self._streams.pop(state.name, None)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        try:
            return await self._threads.run(work)
        except OSError as error:
            raise failure(self.directory, error) from error


def _in_memory(state: _Stream, operations: Sequence[Operation]) -> bool:
    """Whether `operations` need nothing from the disk."""
    if state.file is None:
        return False
    groups = state.groups
    for operation in operations:
        group = groups.get(operation.group_id)
        if group is None or not group.complete or type(operation) in _READ_DISK:
            return False
    return True


def _closed(_: None, error: Exception | None) -> None:
    if error is not None:
        raise error


def _group_row(group: GroupState) -> GroupRow:
    head = group.head
    return GroupRow(
        group.row,
        group.group_id,
        head.epoch,
        head.seq,
        head.timestamp_ms,
        group.count,
        group.bytes,
    )


def _reads_whole(operation: Operation) -> bool:
    kind = type(operation)
    return kind is messages.List or (
        isinstance(operation, messages.Join)
        and operation.item_id is None
        and operation.data is None
    )
