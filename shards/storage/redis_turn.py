"""What is asked of the script for one group, and what its answers mean. Pure: no I/O.

The script stores and numbers; here is decided what operations do and what their callers get, by
`GroupState` as everywhere else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, assert_never

import msgspec
from msgspec.structs import replace

from broker import messages
from broker.errors import InvalidRequest, StorageError
from broker.names import Group
from shards.group import (
    Change,
    Done,
    GroupState,
    Head,
    Kind,
    Operation,
    Outcome,
    attempt,
)
from shards.history import History, HistoryLimits
from shards.storage.base import Settled
from shards.storage.redis_keys import GroupKeys

CALL_BYTES_MAX = 8 * 1024 * 1024
"""Bytes that are given to one call of the script, or those of one operation if it has more."""
CALL_OPERATIONS_MAX = 256
"""Of one call, but of one group: nobody else is served meanwhile, for some milliseconds."""
WHOLE_READS_MAX = 4
"""Different states of whole groups in the reply to one call."""
EMPTY_GROUP_MS_MIN = 24 * 3600 * 1000
"""For which the numbering of a group without items is kept, at least."""

Argument = str | bytes | int
_Given = tuple[str | bytes, ...]
_Decided = Outcome | StorageError | None

# What the script says of an operation, if it is not 0: done.
_NOTHING, _TOO_LARGE, _CHANGED_MEANWHILE, _REFUSED = 1, 2, 3, 4
_SAME = 1  # instead of items: those of the answer before
_KEY_TYPES = ("string", "list", "set", "zset", "hash", "stream")

_encode = msgspec.json.encode
_skip = msgspec.json.Decoder(msgspec.Raw).decode


class _KeptCustom(msgspec.Struct):
    type: str
    data: msgspec.Raw


class _KeptEvent(msgspec.Struct):
    type: Kind
    data: msgspec.Raw = msgspec.Raw(b"null")
    event: _KeptCustom | None = None


class _Kept(msgspec.Struct):
    """Of an envelope, what is left when the names are known (protocol section 5.4)."""

    timestamp: int
    id: str | None
    seq: int
    event: _KeptEvent


_decode_kept = msgspec.json.Decoder(_Kept).decode


def change_of(envelope: bytes) -> Change:
    """The change that `envelope` tells.

    Raises:
        msgspec.DecodeError: it is none of ours.
    """
    kept = _decode_kept(envelope)
    event, event_type, data = kept.event, None, kept.event.data
    if event.event is not None:
        event_type, data = event.event.type, event.event.data
    stored = event.type is not Kind.EVENT
    # A copy: a Raw would keep the whole envelope.
    return Change(event.type, kept.id, bytes(data), kept.seq, kept.timestamp, event_type, stored)


def is_json(text: bytes) -> bool:
    """Whether `text`, which others may have written, can be handed on as a JSON value."""
    try:
        _skip(text)
        return text.isascii() or bool(text.decode())
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False


class Settings(NamedTuple):
    """What all calls of one storage have in common."""

    history: HistoryLimits
    response_bytes_max: int
    key_prefix: str = ""
    channel_prefix: str = "broker:"
    """Of the channels on which brokers tell one another of changes."""
    serves_others: bool = True
    """Whether changes are told on the original's channel too, when somebody listens there."""

    def asked(self, now_ms: int, epoch: str, publish: str) -> list[Argument]:
        """What the script needs to know besides groups and operations.

        Args:
            epoch: for groups that have none.
            publish: the command that tells other brokers of changes.
        """
        limits = self.history
        age_ms_max = int(limits.age_ms_max)
        idle_ms_max = max(EMPTY_GROUP_MS_MIN, age_ms_max)
        return [
            *(now_ms, limits.events_max, age_ms_max, limits.group_bytes_max),
            *(self.response_bytes_max, idle_ms_max, epoch, publish, self.key_prefix),
            *(self.channel_prefix, int(self.serves_others)),
        ]


class Call:
    """Groups that share one call of the script, as they share a place in Redis."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self._keys: list[str] = []
        self._asked: list[Argument] = []
        self._operations = self._bytes = self._whole_reads = 0

    def takes(self, asked: Asked) -> bool:
        """Whether another group fits, so that nobody else waits long for the script."""
        return not self.turns or (
            self._operations + asked.operations <= CALL_OPERATIONS_MAX
            and self._bytes + asked.bytes <= CALL_BYTES_MAX
            and self._whole_reads + asked.whole_reads <= WHOLE_READS_MAX
        )

    def add(self, turn: Turn, asked: Asked) -> None:
        keys = turn.keys
        self.turns.append(turn)
        self._keys += (keys.data, keys.head, keys.order, keys.history)
        self._asked += asked.arguments
        self._operations += asked.operations
        self._bytes += asked.bytes
        self._whole_reads += asked.whole_reads

    def arguments(self, head: list[Argument]) -> list[Argument]:
        """Of the call: the number of keys, these, and what is asked."""
        return [len(self._keys), *self._keys, *head, *self._asked]


class _Step(NamedTuple):
    """An operation of a call; `decided` is what it comes to if the script gets that far."""

    place: int
    operation: Operation
    decided: _Decided


class Asked(NamedTuple):
    """What one group asks of the script; `bytes` about, of the arguments."""

    arguments: list[Argument]
    operations: int
    bytes: int
    whole_reads: int


class Answer:
    """What the script answers, taken one after the other."""

    def __init__(self, reply: list[Any]) -> None:
        values = iter(reply)
        self.number = map(int, next(values).split()).__next__
        self.value = values.__next__


class Turn:
    """The operations of one `execute` on one group: in order, and how far they are.

    Attributes:
        waiting: with their places in the `execute`.
        settled: what came of those that are done, by place.
        known: an epoch and the last number in it that was told; the caller sets it.
        current: the texts of items that updates start from; the caller reads them before.
        steps: what the call that was made last asks.
        puts: whether these may begin the group.
        seq: of the group's last change, as far as answers told.
        conflicts: replies that said that an item had been changed meanwhile.
    """

    def __init__(self, group: Group, keys: GroupKeys, settings: Settings) -> None:
        self.key = group
        self.keys = keys
        self.group = GroupState(group.stream, group.group_id, Head(""), self.keys.names)
        self.waiting: deque[tuple[int, Operation]] = deque()
        self.settled: dict[int, Settled] = {}
        self.known = ("", 0)
        self.current: dict[str, bytes | None] = {}
        self.steps: list[_Step] = []
        self.puts = False
        self.seq: int | None = None
        self.conflicts = 0
        self._settings = settings
        self._now_ms = 0
        self._checks = 0
        self._has_updates = False
        self._whole: tuple[dict[str, bytes], int] | StorageError = {}, 0

    def add(self, index: int, operation: Operation) -> None:
        """Let `operation` wait for its turn."""
        self.waiting.append((index, operation))
        if isinstance(operation, messages.Update):
            self._has_updates = True

    def updated(self) -> list[str]:
        """The items whose text has to be read before."""
        if not self._has_updates:
            return []
        found = {o.item_id: None for _, o in self.waiting if isinstance(o, messages.Update)}
        return list(found)

    def ask(self, now_ms: int) -> Asked:
        """Make steps of what waits, as much as fits."""
        self.steps, self.puts, self._now_ms = [], False, now_ms
        asked: list[Argument] = []
        touched: set[str] = set()
        checks: list[tuple[str, bytes]] = []
        size = whole_reads = 0
        was_read = False
        while self.waiting and size < CALL_BYTES_MAX and whole_reads < WHOLE_READS_MAX:
            index, operation = self.waiting.popleft()
            if isinstance(operation, messages.Update) and operation.item_id not in touched:
                checks.append((operation.item_id, self.current.get(operation.item_id) or b""))
            if isinstance(operation, messages.Set | messages.Update | messages.Delete):
                touched.add(operation.item_id)
            decided, given = self._step(operation)
            if not given:
                assert decided is not None, "what needs no step is decided"
                self._settle(index, decided)
                continue
            self.steps.append(_Step(index, operation, decided))
            asked += given
            size += sum(map(len, given))
            reads = given[0] == "list" or given[:2] == ("join", "group")
            whole_reads += reads and not was_read
            was_read = reads
        # First of all, what updates start from: either all is done, in one run of numbers, or
        # nothing. That of a single update is checked with it.
        self._checks = len(checks) if len(self.steps) > 1 else 0
        for item_id, expected in checks[: self._checks]:
            asked[:0] = ("check", item_id, expected)
        keys, operations = self.keys, self._checks + len(self.steps)
        arguments = [keys.names, keys.channel, *self.known, operations, len(asked), *asked]
        return Asked(arguments, len(self.steps), size, whole_reads)

    def take(self, answer: Answer, refused: Callable[[str], StorageError]) -> bool:
        """Settle what the script performed; returns whether the group began.

        Args:
            refused: the error for what Redis answered with a text.
        """
        if answer.number():
            key, why = (answer.value().decode(errors="replace") for _ in range(2))
            if why in _KEY_TYPES:
                self.fail(StorageError("wrong_type", f"WRONGTYPE: key {key!r} is a {why}"))
            else:
                self.fail(refused(why))
            return False
        self.group.head.epoch, began = answer.value().decode(), answer.number()
        for _ in range(self._checks):
            if answer.number() == _CHANGED_MEANWHILE:
                self._put_back(0)
                return False
        for position, step in enumerate(self.steps):
            code = answer.number()
            if code == _CHANGED_MEANWHILE:
                self._put_back(position)
                break
            if code == _REFUSED:
                self._settle(step.place, refused(answer.value().decode(errors="replace")))
            else:
                self._settle(step.place, self._outcome(step, code, answer))
        self.group.items, self.group.history = {}, None
        self._whole = {}, 0
        return bool(began)

    def own(self) -> set[int]:
        """The numbers of the changes that were settled."""
        outcomes = (outcome for outcome, _ in self.settled.values())
        return {o.change.seq for o in outcomes if isinstance(o, Done) and o.change is not None}

    def fail(self, error: StorageError) -> None:
        """Settle the steps, and what waits, with `error`."""
        for step in self.steps:
            self.settled.setdefault(step.place, (error, None))
        for index, _ in self.waiting:
            self.settled[index] = error, None
        self.waiting.clear()

    def _put_back(self, position: int) -> None:
        """Let the steps from `position` on wait again: an item was changed meanwhile."""
        self.conflicts += 1
        left = self.steps[position:]
        self.waiting.extendleft((s.place, s.operation) for s in reversed(left))

    def _settle(self, index: int, outcome: Outcome | StorageError) -> None:
        self.settled[index] = outcome, None if isinstance(outcome, StorageError) else self.group

    # What is asked ----------------------------------------------------------------------------

    def _step(self, operation: Operation) -> tuple[_Decided, _Given]:
        """What is known already of what `operation` comes to, and what to ask the script.

        Nothing to ask: it is decided, whatever the group holds.
        """
        match operation:
            case messages.Set():
                return self._set_step(operation)
            case messages.Update():
                return self._update_step(operation)
            case messages.Delete(item_id=item_id):
                self.current[item_id] = None
                return None, ("delete", item_id, _encode(item_id))
            case messages.Send():
                event_type = _encode(operation.event_type)
                encoded_id = _encode(operation.item_id)
                return None, ("tell", "", encoded_id, operation.data, event_type)
            case messages.Publish():
                kind = Kind(operation.kind)
                return None, ("tell", kind, _encode(operation.item_id), operation.data, "")
            case messages.Get():
                return None, ("get", operation.item_id)
            case messages.List():
                return None, ("list",)
            case messages.Join():
                scope, item_id = "group", ""
                if operation.item_id is not None:
                    scope, item_id = "item", operation.item_id
                if operation.data is not None:
                    scope = "nothing"
                since = "" if operation.since is None else str(operation.since)
                return None, ("join", scope, item_id, since, operation.epoch or "")
            case messages.ReadHistory():
                return None, ("history",)
            case _:
                assert_never(operation)

    def _set_step(self, operation: messages.Set) -> tuple[_Decided, _Given]:
        item_id, data = operation.item_id, operation.data
        if len(data) > self._settings.response_bytes_max // 2:
            refusal = self._attempt(operation, {})
            if not isinstance(refusal, Done):
                return refusal, ()
        self.puts = True
        self.current[item_id] = data
        return None, ("set", item_id, _encode(item_id), data)

    def _update_step(self, operation: messages.Update) -> tuple[_Decided, _Given]:
        item_id = operation.item_id
        text = self.current.get(item_id)
        expected = text or b""
        if text is not None and not is_json(text):
            return self._no_json(item_id), ("check", item_id, expected)
        outcome = self._attempt(operation, {} if text is None else {item_id: text})
        if isinstance(outcome, InvalidRequest):
            return outcome, ()
        if not isinstance(outcome, Done):
            return outcome, ("check", item_id, expected)
        assert outcome.change is not None, "an update always changes"
        value = outcome.change.data
        self.puts = True
        self.current[item_id] = value
        return outcome, ("swap", item_id, _encode(item_id), value, expected)

    # What is answered -------------------------------------------------------------------------

    def _outcome(self, step: _Step, code: int, answer: Answer) -> Outcome | StorageError:
        operation, decided = step.operation, step.decided
        match operation:
            case messages.Get():
                text = answer.value()
                if text is not None and not is_json(text):
                    return self._no_json(operation.item_id)
                return Done(text)
            case messages.List():
                self._read_whole(code, answer)
                return self._of_whole(operation, 0)
            case messages.Join():
                return self._join_outcome(operation, code, answer)
            case messages.ReadHistory():
                return self._history_outcome(operation, answer)
        if code == _NOTHING:
            return self._attempt(operation, {})
        if decided is not None and not isinstance(decided, Done):
            return decided
        self.seq, timestamp_ms, old = answer.number(), answer.number(), answer.value()
        if decided is not None:
            assert decided.change is not None, "an update always changes"
            change = replace(decided.change, seq=self.seq, timestamp_ms=timestamp_ms)
            return Done(decided.result, change)
        items = {}
        is_readable = True
        if old is not None:
            assert operation.item_id is not None, "only custom events may be of no item"
            is_readable = is_json(old)
            items[operation.item_id] = old if is_readable else b"null"
        self._set_head(self.seq - 1, timestamp_ms)
        outcome = self._attempt(operation, items, timestamp_ms)
        if not is_readable and isinstance(outcome, Done):
            # As in the original: it has been done, which mends the item, and the caller is told.
            what = "the value that was replaced or deleted"
            failure = f"{what}, of {self._name(operation.item_id)}, was text that is no JSON"
            return replace(outcome, failure=failure)
        return outcome

    def _join_outcome(
        self, join: messages.Join, code: int, answer: Answer
    ) -> Outcome | StorageError:
        if code == _TOO_LARGE:
            self._read_whole(code, answer)
            return self._of_whole(join, 0)
        self.seq, timestamp_ms = answer.number(), answer.number()
        self._set_head(self.seq, timestamp_ms)
        whole = join.item_id is None and join.data is None
        found, places, envelopes = answer.value(), answer.value(), answer.value()
        if envelopes is not None:
            resumed = self._resumed(join, envelopes, timestamp_ms)
            if resumed is None:
                message = f"the history in {self.keys.history!r} is damaged; join without a seq"
                return StorageError("storage_corrupt", message)
            return resumed
        if whole:
            self._put_in_order(found, places)
            return self._of_whole(join, timestamp_ms)
        if found is not None and not is_json(found):
            return self._no_json(join.item_id or "")
        items = {} if found is None else {join.item_id or "": found}
        return self._attempt(join, items, timestamp_ms)

    def _history_outcome(self, call: messages.ReadHistory, answer: Answer) -> Outcome:
        self.seq = self.group.head.seq = answer.number()
        kept = []
        for envelope in reversed(answer.value()):
            try:
                kept.append(change_of(envelope))
            except msgspec.DecodeError:
                break  # what is older can't be told without a gap
        self.group.history = History(self._settings.history, kept[::-1])
        return self._attempt(call, {}, self._now_ms)

    def _no_json(self, item_id: str) -> StorageError:
        message = f"{self._name(item_id)} holds text that is no JSON; set or delete it"
        return StorageError("not_readable", message)

    def _name(self, item_id: str | None) -> str:
        return f"item_id {(item_id or '')[:100]!r} of key {self.keys.data!r}"

    def _set_head(self, seq: int, next_timestamp_ms: int) -> None:
        self.group.head.seq, self.group.head.timestamp_ms = seq, next_timestamp_ms - 1

    def _attempt(self, operation: Operation, items: dict[str, bytes], now_ms: int = 0) -> Outcome:
        self.group.items = items
        return attempt(self.group, operation, now_ms, self._settings.response_bytes_max)

    def _of_whole(self, operation: Operation, now_ms: int) -> Outcome | StorageError:
        if isinstance(self._whole, StorageError):
            return self._whole
        items, self.group.bytes = self._whole
        return self._attempt(operation, items, now_ms)

    def _read_whole(self, code: int, answer: Answer) -> None:
        if code == _TOO_LARGE:
            self._whole = {}, answer.number()
        else:
            self._put_in_order(answer.value(), answer.value())

    def _put_in_order(self, found: list[bytes] | int, places: list[bytes]) -> None:
        """Put the items in their order; those without a place come last, as Redis has them."""
        if isinstance(found, int):
            assert found == _SAME
            return
        texts = dict(zip(found[::2], found[1::2], strict=True))
        size = sum(len(text) + 1 for text in texts.values())
        order = dict.fromkeys(place for place in places if place in texts) | dict.fromkeys(texts)
        items: dict[str, bytes] = {}
        for field in order:
            text = texts[field]
            try:
                items[field.decode()] = text
            except UnicodeDecodeError:
                message = f"key {self.keys.data!r} has a field {field!r}, which is not UTF-8"
                self._whole = StorageError("not_readable", message)
                return
            if not is_json(text):
                self._whole = self._no_json(field.decode())
                return
        self._whole = items, size

    def _resumed(self, join: messages.Join, envelopes: list[bytes], now_ms: int) -> Outcome | None:
        try:
            changes = [change_of(envelope) for envelope in envelopes]
        except msgspec.DecodeError:
            return None
        self.group.history = History(self._settings.history, changes)
        return self.group.resume(join, now_ms)
