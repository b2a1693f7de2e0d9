"""Judges what happened in a run: `check(records)` of `tests.sim.history` returns a `Report`.

Pure: no I/O, no clock; the simulation and the harness with real processes both use it.

    from tests.sim import checker, history
    report = checker.check(history.load(Path("run.jsonl").read_bytes()))
    assert not report.violations, report

What it decides, by the name of the rule that a `Violation` has:

- `conflict`: two were told different things under one seq of a group.
- `timestamp`: the times of a group's events do not grow with their seq, a sync's is not between
  those of the events around it or is not its own, or a subscriber's times do not grow.
- `early`, `gap`, `double`, `inversion`: a subscriber got an event before its sync, missed one, got
  one twice, or an older one after a newer one; also over reconnects.
- `sync`, `resume`: the answer to a join is not the state as of its seq, goes back, or does not go
  on from where it was asked to.
- `behind`: a subscriber that had all the time it needed does not have the last events, or what it
  was told makes another state than that of the end (where its syncs name their items).
- `lost`: what was acknowledged, or shown to anyone, is not there at the end.
- `phantom`: an event that no call made, that a refused call made, or one call twice.
- `result`: an answer, or a written value, that does not follow from the state before it.
- `order`: no order of a group's calls explains them (linearizability): a call stands behind one
  that began after its end, or behind one that the same session sent later; a stale read.
- `trigger missed`, `trigger double`, `trigger inversion`, `trigger unasked`.
- `epoch`: a group's numbering began anew though it had events.

Where some event of a group was seen by nobody, the calls on each item are searched for an order.
A search that takes too long decides nothing and is counted (`Report.undecided`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cached_property
from math import inf
from typing import Any

import msgspec

from tests.sim.history import (
    Call,
    Caught,
    Fault,
    Final,
    Fired,
    Frame,
    Join,
    Leave,
    Record,
    Told,
    Trigger,
)
from tests.sim.order import Impossible, Placed, Searched, explained, placed_wrongly

FAULT_REACH_S = 10.0
"""A fault may have taken the triggers of calls that ended so long before it at most, unless `check`
is told otherwise."""

GroupKey = tuple[str, str]

_ABSENT = "absent"  # no JSON text


class Violation(msgspec.Struct, frozen=True):
    """A promise that was broken: which, and how in one line."""

    rule: str
    text: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.text}"


class Report(msgspec.Struct):
    """What `check` found, and how much it looked at."""

    violations: list[Violation] = []
    calls: int = 0
    events: int = 0
    frames: int = 0
    fired: int = 0
    resumes: int = 0
    syncs_for_events: int = 0
    """Syncs that took the place of events that the subscriber did not get."""
    incomplete_groups: int = 0
    undecided: int = 0

    def __str__(self) -> str:
        return "\n".join(map(str, self.violations)) or "nothing wrong"


def check(records: Iterable[Record], fault_reach_s: float = FAULT_REACH_S) -> Report:
    """Judge a run.

    Args:
        fault_reach_s: how long after its answer a change may be on the way to its triggers.
    """
    return _Check(records, fault_reach_s).report


class _Group:
    """All that is known of one group."""

    def __init__(self, key: GroupKey) -> None:
        self.key = key
        self.name = "/".join(key)
        self.told: dict[int, Told] = {}
        self.calls: list[Call] = []
        self.syncs: list[Frame] = []
        self.final: Final | None = None
        self.epochs: dict[str, int] = {}  # and the highest seq under it

    @property
    def last(self) -> int:
        return max(self.told, default=0)

    def made_by(self, told: Told) -> Call | None:
        """The call that an event is of; None where no answer says so."""
        if told.kind == "delete":
            return self._deletes.get(_identity(told.data))
        return self._by_id.get(_by(told.data))

    @cached_property
    def _by_id(self) -> dict[str, Call]:
        return {call.id: call for call in self.calls}

    @cached_property
    def _deletes(self) -> dict[str, Call]:
        found = ((call, _old_value(call)) for call in self.calls if call.function == "delete")
        return {_identity(old): call for call, old in found if old is not None}

    @property
    def complete(self) -> bool:
        """Whether every event is known."""
        last = self.last if self.final is None else self.final.seq
        return len(self.told) >= last and all(seq in self.told for seq in range(1, last + 1))


class _Check:
    def __init__(self, records: Iterable[Record], fault_reach_s: float) -> None:
        self.report = Report()
        self._fault_reach_s = fault_reach_s
        self._groups: dict[GroupKey, _Group] = {}
        self._subscribers: dict[str, list[Join | Frame | Leave]] = {}
        self._caught: set[str] = set()
        self._triggers: dict[str, list[Trigger]] = {}
        self._fired: dict[str, list[Fired]] = {}
        self._faults: list[Fault] = []
        self._sort(records)
        for name, seen in self._subscribers.items():
            self._collect(name, seen)
        for group in self._groups.values():
            _GroupCheck(group, self.report, self._wrong).run()
        for name, seen in self._subscribers.items():
            self._judge_subscriber(name, seen)
        for trigger in {**self._triggers, **self._fired}:
            self._judge_trigger(trigger)

    def _wrong(self, rule: str, text: str) -> None:
        self.report.violations.append(Violation(rule, text))

    def _group(self, stream: str, group: str) -> _Group:
        key = (stream, group)
        if key not in self._groups:
            self._groups[key] = _Group(key)
        return self._groups[key]

    def _sort(self, records: Iterable[Record]) -> None:
        for record in records:
            match record:
                case Call():
                    self.report.calls += 1
                    self._group(record.stream, record.group).calls.append(record)
                case Join() | Frame() | Leave():
                    self._subscribers.setdefault(record.subscriber, []).append(record)
                case Caught():
                    self._caught.add(record.subscriber)
                case Trigger():
                    self._triggers.setdefault(record.trigger, []).append(record)
                case Fired():
                    self.report.fired += 1
                    self._fired.setdefault(record.trigger, []).append(record)
                    told = Told(
                        kind=record.kind,
                        seq=record.seq,
                        timestamp=record.timestamp,
                        item=record.item,
                        data=record.data,
                        name=record.name,
                    )
                    self._tell(self._group(record.stream, record.group), told, record.trigger)
                case Fault():
                    self._faults.append(record)
                case Final():
                    group = self._group(record.stream, record.group)
                    group.final = record
                    for told in record.events:
                        self._tell(group, told, "the history")
        for group in self._groups.values():
            if group.final is not None:
                _epoch(group, group.final.epoch, group.final.seq)

    def _tell(self, group: _Group, told: Told, to: str) -> None:
        known = group.told.setdefault(told.seq, told)
        if known != told:
            self._wrong("conflict", f"{group.name} seq {told.seq}: {to} got {told}, not {known}")

    def _collect(self, name: str, seen: list[Join | Frame | Leave]) -> None:
        """Take what a subscriber was told into what is known of its group."""
        group: _Group | None = None
        for record in seen:
            if isinstance(record, Join):
                group = self._group(record.stream, record.group)
            if not isinstance(record, Frame) or group is None:
                continue
            self.report.frames += 1
            if record.epoch is not None:
                _epoch(group, record.epoch, record.seq)
            if record.kind == "sync":
                group.syncs.append(record)
            elif record.kind != "resume":
                told = Told(
                    kind=record.kind,
                    seq=record.seq,
                    timestamp=record.timestamp,
                    item=record.item,
                    data=record.data,
                    name=record.name,
                )
                self._tell(group, told, name)

    # Subscribers.

    def _judge_subscriber(self, name: str, seen: list[Join | Frame | Leave]) -> None:
        join: Join | None = None
        last: Frame | None = None  # of all its sessions
        state: dict[str, str] | None = None  # what it knows: identities by item
        live = joined = False
        for record in seen:
            match record:
                case Join():
                    join, live, joined = record, False, True
                case Leave():
                    live = joined = False
                case Frame():
                    where = f"{name} at {record.at:.3f}, {record.kind} {record.seq}"
                    if join is None or not joined:
                        self._wrong("early", f"{where}: it has not joined")
                        continue
                    if last is not None:
                        self._judge_time(where, last, record)
                    if record.kind in ("sync", "resume"):
                        self._judge_answer(where, join, record, last, first=not live)
                        live = True
                    elif not live:
                        self._wrong("early", f"{where}: before its sync")
                    else:
                        assert last is not None, "its sync, at least"
                        self._judge_next(where, join, last, record)
                    last = record
                    state = _told_state(state, join, record)
        if name not in self._caught:
            return
        assert join is not None, "who has caught up has joined"
        group = self._group(join.stream, join.group)
        end = group.last if group.final is None else group.final.seq
        if last is None or not live:
            self._wrong("behind", f"{name} was never synced")
        elif missing := self._missing(join, last.seq, end + 1):
            self._wrong("behind", f"{name} ends at {last.seq}, misses {missing} of {group.name}")
        if group.final is None or state is None:
            return
        items = {i: _identity(v) for i, v in group.final.items if join.item in (None, i)}
        if state != items:
            self._wrong("behind", f"{name} was told {state}, {group.name} ends as {items}")

    def _judge_time(self, where: str, last: Frame, frame: Frame) -> None:
        # A resume has no event of its own, and what follows it has a time of its own.
        is_later = frame.timestamp > last.timestamp or (
            frame.kind == "resume" and frame.timestamp == last.timestamp
        )
        if not is_later:
            self._wrong(
                "timestamp",
                f"{where}: {frame.timestamp} after {last.timestamp} ({last.kind} {last.seq})",
            )

    def _judge_answer(
        self, where: str, join: Join, frame: Frame, last: Frame | None, *, first: bool
    ) -> None:
        if frame.kind == "resume":
            self.report.resumes += 1
            if not first or (join.since, join.epoch) != (frame.seq, frame.epoch):
                self._wrong(
                    "resume",
                    f"{where} {frame.epoch}: it asked for {join.since} {join.epoch}",
                )
        elif last is not None and frame.seq < last.seq:
            self._wrong("sync", f"{where}: it had {last.seq} already")
        elif last is not None and frame.seq > last.seq:
            self.report.syncs_for_events += 1

    def _judge_next(self, where: str, join: Join, last: Frame, frame: Frame) -> None:
        if join.item is not None and frame.item != join.item:
            self._wrong("early", f"{where}: of item {frame.item!r}, it joined {join.item!r}")
        if frame.seq == last.seq:
            self._wrong("double", f"{where}: it had that already")
        elif frame.seq < last.seq:
            self._wrong("inversion", f"{where}: after {last.seq}")
        elif missing := self._missing(join, last.seq, frame.seq):
            self._wrong("gap", f"{where}: misses {missing} after {last.seq}")

    def _missing(self, join: Join, after: int, before: int) -> list[int]:
        """The events between two that concern the subscription; unknown ones do when it is of a
        whole group."""
        told = self._group(join.stream, join.group).told
        if join.conflate:  # what it ends with has to be right
            return []
        return [
            seq
            for seq in range(after + 1, before)
            if join.item is None or (seq in told and told[seq].item == join.item)
        ]

    # Triggers.

    def _judge_trigger(self, trigger: str) -> None:
        sessions = self._triggers.get(trigger, [])
        last: dict[GroupKey, int] = {}
        fired: dict[GroupKey, set[int]] = {}
        for call in self._fired.get(trigger, ()):
            key = (call.stream, call.group)
            where = f"{trigger} at {call.at:.3f}, {'/'.join(key)} {call.seq}"
            if sessions and not any(_matches(s, key, call.item) for s in sessions):
                self._wrong("trigger unasked", f"{where}, item {call.item!r}")
            if call.seq in fired.setdefault(key, set()):
                self._wrong("trigger double", f"{where}: fired before")
            elif call.seq < last.get(key, 0):
                self._wrong("trigger inversion", f"{where}: after {last[key]}")
            fired[key].add(call.seq)
            last[key] = max(call.seq, last.get(key, 0))
        for session in sessions:
            for key, group in self._groups.items():
                if key[0] == session.stream:
                    self._judge_missed(session, group, fired.get(key, set()))

    def _judge_missed(self, session: Trigger, group: _Group, fired: set[int]) -> None:
        for seq, told in group.told.items():
            if seq in fired or not _matches(session, group.key, told.item):
                continue
            call = group.made_by(told)
            if call is None or call.outcome != "ok" or call.ended is None:
                continue
            if call.began < session.at or call.ended + self._fault_reach_s > (session.until or inf):
                continue
            if not any(
                call.began <= fault.at <= call.ended + self._fault_reach_s
                and (fault.groups is None or group.key in fault.groups)
                for fault in self._faults
            ):
                self._wrong(
                    "trigger missed",
                    f"{session.trigger}: {group.name} seq {seq}, call {call.id} ended at"
                    f" {call.ended:.3f}",
                )


class _GroupCheck:
    """What a group's events, calls, syncs and end say of one another."""

    def __init__(self, group: _Group, report: Report, wrong: Callable[[str, str], None]) -> None:
        self._group = group
        self._report = report
        self._wrong = wrong
        self._seq_of: dict[str, int] = {}  # by identity of a value that was written there
        self._deleted_at: dict[str, int] = {}  # by identity of the value that was deleted
        self._versions: dict[str, list[tuple[int, str]]] = {}  # by item: from which seq on what
        self._before: dict[int, Any] = {}  # the value that an event found
        self._states: dict[str, list[tuple[int, int]]] = {}  # JSON text of all values: seqs

    def run(self) -> None:
        group = self._group
        self._report.events += len(group.told)
        begun = [epoch for epoch, seq in group.epochs.items() if seq]
        if len(begun) > 1:
            self._wrong("epoch", f"{group.name}: {begun}")
            return
        self._judge_times()
        if group.final is not None and group.last > group.final.seq:
            seqs = [seq for seq in group.told if seq > group.final.seq]
            self._wrong("lost", f"{group.name}: {seqs} were shown, the end is {group.final.seq}")
            return
        if group.complete:
            self._replay()
            self._judge_syncs()
            self._judge_calls()
        else:
            self._report.incomplete_groups += 1
            self._search()

    def _judge_times(self) -> None:
        group = self._group
        last: Told | None = None
        for seq in sorted(group.told):
            told = group.told[seq]
            if last is not None and told.timestamp <= last.timestamp:
                self._wrong(
                    "timestamp",
                    f"{group.name} seq {seq}: {told.timestamp}, seq {last.seq}: {last.timestamp}",
                )
            last = told
        taken = {told.timestamp: f"seq {seq}" for seq, told in group.told.items()}
        for sync in group.syncs:
            before, after = group.told.get(sync.seq), group.told.get(sync.seq + 1)
            where = f"{group.name}, a sync as of {sync.seq} for {sync.subscriber}"
            if before is not None and sync.timestamp <= before.timestamp:
                self._wrong("timestamp", f"{where}: {sync.timestamp}, not after {before.timestamp}")
            elif after is not None and sync.timestamp >= after.timestamp:
                self._wrong("timestamp", f"{where}: {sync.timestamp}, not before {after.timestamp}")
            elif sync.timestamp in taken:
                self._wrong("timestamp", f"{where}: {sync.timestamp} is {taken[sync.timestamp]}'s")
            taken[sync.timestamp] = where

    # With every event known.

    def _replay(self) -> None:
        """Make the states from the events."""
        group = self._group
        items: dict[str, Any] = {}
        text, since = _text([]), 0
        for seq in range(1, group.last + 1):
            told = group.told[seq]
            if told.kind == "event":
                self._written(told)
                continue
            assert told.item is not None, "changes are of items"
            found = items.get(told.item, _ABSENT)
            self._before[seq] = found
            expected = "create" if found is _ABSENT else "update"
            if told.kind == "delete":
                if _text(found) != _text(told.data):
                    self._wrong(
                        "result", f"{group.name} seq {seq}: deletes {told.data}, not {found}"
                    )
                items.pop(told.item, None)
                self._deleted_at[_identity(told.data)] = seq
            else:
                if told.kind != expected:
                    self._wrong("result", f"{group.name} seq {seq}: {told.kind}, not {expected}")
                items[told.item] = told.data
                self._written(told)
            identity = _identity(items.get(told.item, _ABSENT))
            self._versions.setdefault(told.item, []).append((seq, identity))
            self._states.setdefault(text, []).append((since, seq - 1))
            text, since = _text(list(items.values())), seq
        self._states.setdefault(text, []).append((since, group.last))
        final = group.final
        if final is not None and [(k, _text(v)) for k, v in final.items] != [
            (k, _text(v)) for k, v in items.items()
        ]:
            self._wrong("lost", f"{group.name}: at the end {final.items}, by its events {items}")

    def _written(self, told: Told) -> None:
        identity = _identity(told.data)
        if identity in self._seq_of:
            self._wrong(
                "phantom",
                f"{self._group.name}: {identity} made {self._seq_of[identity]} and {told.seq}",
            )
        self._seq_of[identity] = told.seq

    def _values_at(self, seq: int) -> dict[str, str]:
        """Identities by item as of `seq`."""
        found = {}
        for item, versions in self._versions.items():
            count = bisect_right(versions, seq, key=lambda version: version[0])
            if count and (identity := versions[count - 1][1]) != _ABSENT:
                found[item] = identity
        return found

    def _judge_syncs(self) -> None:
        for sync in self._group.syncs:
            where = f"{self._group.name}, {sync.subscriber} at {sync.at:.3f}, as of {sync.seq}"
            if sync.seq > self._group.last:
                self._wrong("sync", f"{where}: there is nothing newer than {self._group.last}")
                continue
            if sync.item is not None:
                identity = self._values_at(sync.seq).get(sync.item, _ABSENT)
                given = _ABSENT if sync.data is None else _identity(sync.data)
                if identity != given:
                    self._wrong("sync", f"{where}: item {sync.item!r} is {given}, not {identity}")
                continue
            stands = self._states.get(_text(sync.data), [])
            if not any(a <= sync.seq <= b for a, b in stands):
                self._wrong("sync", f"{where}: {sync.data} is not the state, but that of {stands}")
            if sync.ids is not None:
                values = self._values_at(sync.seq)
                given_ids = {i: _identity(v) for i, v in zip(sync.ids, sync.data, strict=False)}
                if given_ids != values:
                    self._wrong("sync", f"{where}: {given_ids}, not {values}")

    def _judge_calls(self) -> None:
        placed: list[Placed] = []
        explained_seqs: set[int] = set()
        unsure_deletes = Counter(
            c.item for c in self._group.calls if c.function == "delete" and c.outcome == "unknown"
        )
        for call in self._group.calls:
            places = self._places(call)
            if places is None:
                continue
            if len(places) == 1 and places[0][0] == places[0][1] and places[0][0] % 2 == 0:
                explained_seqs.add(places[0][0] // 2)
            ended = inf if call.ended is None or call.outcome != "ok" else call.ended
            placed.append(Placed(call.id, call.began, ended, call.session, call.order, places))
        for first, second in placed_wrongly(placed):
            if second is None or first is second:
                self._wrong("order", f"{self._group.name}: {_shown(first)} fits nowhere")
            else:
                self._wrong(
                    "order",
                    f"{self._group.name}: {_shown(first)} was before {_shown(second)}",
                )
        for seq, told in self._group.told.items():
            if seq in explained_seqs:
                continue
            if told.kind == "delete" and unsure_deletes[told.item] > 0:
                unsure_deletes[told.item] -= 1
            else:
                self._wrong("phantom", f"{self._group.name} seq {seq}: made by no call: {told}")

    def _places(self, call: Call) -> list[tuple[int, int]] | None:
        """Where a call can stand; None: anywhere, or it was found wrong already."""
        if call.function in ("set", "update", "send"):
            return self._place_of_write(call)
        if call.outcome != "ok":
            return None
        if call.function == "delete":
            old = _old_value(call)
            if old is None:
                return self._places_of(call.item, _ABSENT, call)
            seq = self._deleted_at.get(_identity(old))
            if seq is None:
                self._wrong("lost", f"{self._group.name}: {call.id} deleted {old}, no event did")
                return None
            return [(2 * seq, 2 * seq)]
        if call.function == "get":
            identity = _ABSENT if call.result is None else _identity(call.result)
            return self._places_of(call.item, identity, call)
        stands = self._states.get(_text(call.result))
        if stands is None:
            self._wrong("result", f"{self._group.name}: {call.id} listed {call.result}, never so")
            return None
        return [(2 * a + 1, 2 * b + 1) for a, b in stands]

    def _place_of_write(self, call: Call) -> list[tuple[int, int]] | None:
        group = self._group
        seq = self._seq_of.get(call.id)
        if seq is None:
            if call.outcome == "ok":
                self._wrong("lost", f"{group.name}: {call.id} ({call.function}) has no event")
            return None
        told = group.told[seq]
        if call.outcome == "refused":
            self._wrong("phantom", f"{group.name} seq {seq}: {call.id} was refused")
        if call.function == "send":
            if told.kind != "event" or _text(told.data) != _text(call.data):
                self._wrong("result", f"{group.name} seq {seq}: {told}, sent {call.data}")
        else:
            found = self._before.get(seq, _ABSENT)
            expected = _after(call, found)
            if told.item != call.item or _text(told.data) != _text(expected):
                self._wrong("result", f"{group.name} seq {seq}: {told}, {call.id} on {found}")
            if call.outcome == "ok":
                answer = {"old_value": None if found is _ABSENT else found, "new_value": expected}
                if _text(call.result) != _text(answer):
                    self._wrong(
                        "result", f"{group.name}: {call.id} got {call.result}, not {answer}"
                    )
        return [(2 * seq, 2 * seq)]

    def _places_of(self, item: str | None, identity: str, call: Call) -> list[tuple[int, int]]:
        """Where an item was seen in a state."""
        assert item is not None, "the call is of an item"
        versions = [(0, _ABSENT), *self._versions.get(item, [])]
        ends = [seq for seq, _ in versions[1:]] + [self._group.last + 1]
        places = [
            (2 * seq + 1, 2 * end - 1)
            for (seq, version), end in zip(versions, ends, strict=True)
            if version == identity
        ]
        if not places:
            self._wrong("result", f"{self._group.name}: {call.id} saw {identity} in {item!r}")
            return [(0, 2 * self._group.last + 1)]
        return places

    # With events that nobody saw.

    def _search(self) -> None:
        group = self._group
        seqs = {
            _identity(told.data): seq for seq, told in group.told.items() if told.kind != "delete"
        }
        calls: dict[str, list[Searched]] = {}
        for call in group.calls:
            if call.item is None or call.function == "send" or call.outcome == "refused":
                continue
            certain = call.outcome == "ok"
            if not certain and call.function == "get":
                continue
            ended = call.ended if certain and call.ended is not None else inf
            seq = seqs.get(call.id)
            step = _Step(call)
            found = calls.setdefault(call.item, [])
            found.append(Searched(call.began, ended, step, certain or seq is not None, seq))
        if group.final is not None:
            values = dict(group.final.items)
            for item, searched in calls.items():
                read = _Reads(values.get(item, _ABSENT))
                searched.append(Searched(inf, inf, read, True))
        for item, searched in calls.items():
            decided = explained(searched, _ABSENT)
            if decided is None:
                self._report.undecided += 1
            elif not decided:
                self._wrong("order", f"{group.name} {item}: no order explains its calls")


class _Step:
    """A call as a step of a search; states are JSON texts."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def __call__(self, state: Any) -> Any:
        call = self._call
        found = _ABSENT if state == _ABSENT else msgspec.json.decode(state)
        ok = call.outcome == "ok"
        if call.function == "get":
            if _text(call.result) != _text(None if found == _ABSENT else found):
                raise Impossible
            return state
        if ok and _text(_old_value(call)) != _text(None if found == _ABSENT else found):
            raise Impossible
        after = _ABSENT if call.function == "delete" else _text(_after(call, found))
        if ok and call.function != "delete" and after != _text(call.result["new_value"]):
            raise Impossible
        return after


class _Reads:
    """The state at the end."""

    def __init__(self, value: Any) -> None:
        self._text = _ABSENT if value is _ABSENT else _text(value)

    def __call__(self, state: Any) -> Any:
        if state != self._text:
            raise Impossible
        return state


def _after(call: Call, found: Any) -> Any:
    """What a `set` or `update` makes of what it found."""
    if call.function == "set":
        return call.data
    value = {} if found is _ABSENT else dict(found)
    for op in call.ops:
        path = op["path"]
        match op["type"]:
            case "set":
                value[path] = op["value"]
            case "increment":
                value[path] = value.get(path, 0) + op["by"]
            case "append":
                value[path] = _appended(value.get(path), op["value"])
            case "remove":
                value.pop(path, None)
            case other:
                raise ValueError(f"the checker does not know the op {other}")
    return value


def _appended(target: Any, added: Any) -> Any:
    if isinstance(target, list):
        return [*target, added]
    if target is None:
        return added if isinstance(added, str) else [added]
    return target + added


def _told_state(state: dict[str, str] | None, join: Join, frame: Frame) -> dict[str, str] | None:
    """What a subscriber knows after a frame; None where it can't be told."""
    match frame.kind:
        case "sync" if join.item is not None:
            return {} if frame.data is None else {join.item: _identity(frame.data)}
        case "sync":
            if frame.ids is None:
                return None
            return {i: _identity(value) for i, value in zip(frame.ids, frame.data, strict=False)}
        case "create" | "update" | "delete" if state is not None:
            assert frame.item is not None, "changes are of items"
            known = {i: value for i, value in state.items() if i != frame.item}
            return known if frame.kind == "delete" else known | {frame.item: _identity(frame.data)}
        case _:
            return state


def _epoch(group: _Group, epoch: str, seq: int) -> None:
    group.epochs[epoch] = max(seq, group.epochs.get(epoch, 0))


def _matches(trigger: Trigger, group: GroupKey, item: str | None) -> bool:
    return (
        trigger.stream == group[0]
        and trigger.group in (None, group[1])
        and trigger.item in (None, item)
    )


def _old_value(call: Call) -> Any:
    return call.result["old_value"] if isinstance(call.result, dict) else None


def _by(value: Any) -> str:
    return str(value.get("by", "")) if isinstance(value, dict) else ""


def _identity(value: Any) -> str:
    """What tells this version of an item from all others."""
    return _by(value) or _text(value)


def _text(value: Any) -> str:
    return value if value is _ABSENT else msgspec.json.encode(value, order="sorted").decode()


def _shown(call: Placed) -> str:
    return f"{call.id} ({call.began:.3f} to {call.ended:.3f}, places {list(call.places)[:3]})"
