"""What gateways ask of the shard, and what they are told."""

from __future__ import annotations

import asyncio
from copy import copy
from typing import NamedTuple, Protocol, assert_never, get_args

import msgspec

from broker import logs, messages
from broker.config import MIB
from broker.errors import BrokerError, LimitExceeded, StorageError
from broker.label_counts import LabelCounts
from broker.link import Link
from broker.messages import Event, Failure, Reply, Synced, ToShard, Trace, Welcome
from broker.names import Group
from broker.sync_bodies import SentBodies
from broker.tasks import Tasks
from broker.tracing import Kind as SpanKind
from broker.tracing import Span, Tracing
from shards import update_ops
from shards.committer import Committer
from shards.events import event_payload, foreign_payload, past_payload, resume_head, sync_parts
from shards.group import (
    Change,
    Done,
    GroupState,
    Head,
    Kind,
    Operation,
    Outcome,
    Past,
    Resumed,
    Snapshot,
)
from shards.leases import Leases
from shards.storage.base import Settled, Storage
from shards.storage.redis_foreign import Foreign
from shards.triggers import Triggers

_log = logs.Log("requests")

_TIMER_SLACK_S = 0.01  # the loop may run a timer a moment early

WAITING_MAX = 200_000
"""Operations that wait in the shard; past it calls are refused with `overloaded`."""

_FAILURES: dict[type[Operation], tuple[str, str]] = {
    messages.Set: ("STREAM_SET_ERROR", "Failed to set value"),
    messages.Get: ("STREAM_GET_ERROR", "Failed to get value"),
    messages.Delete: ("STREAM_DELETE_ERROR", "Failed to delete value"),
    messages.Update: ("STREAM_UPDATE_ERROR", "Failed to update value"),
    messages.Send: ("STREAM_SEND_ERROR", "Failed to send event"),
    messages.List: ("STREAM_GET_GROUP_ERROR", "Failed to get group"),
    messages.Join: ("STREAM_GET_GROUP_ERROR", "Failed to get group"),
    messages.Publish: ("STREAM_SEND_ERROR", "Failed to send event"),
    messages.ReadHistory: ("STREAM_GET_GROUP_ERROR", "Failed to get group"),
}
"""Code and beginning of the message when storage fails (protocol section 7.1)."""

_Call = Operation | messages.ListGroups | messages.ListAll | messages.CheckOps | messages.ApplyOps
_SPANNING = (messages.ListGroups, messages.ListAll)

_READS = (messages.Get, messages.List, messages.Join, messages.ReadHistory)

GatewayLink = Link[ToShard]


class Lost(NamedTuple):
    """Asks for a look at a group: an epoch of which changes were told that may be lost."""

    epoch: str


_Asker = GatewayLink | Foreign | Lost
"""What `Requests` asks an operation for."""


class Reporter(Protocol):
    """What tells of the shard, and hears how gateways are."""

    def status(self) -> bytes: ...

    def top(self, limit: int) -> bytes: ...

    def told(self, link: GatewayLink, payload: bytes) -> None: ...


class Requests:
    """The shard's side of all links: takes messages, answers, and tells who is interested."""

    def __init__(
        self,
        shard: int,
        shards: int,
        storage: Storage,
        leases: Leases[GatewayLink],
        response_bytes_max: int = 48 * MIB,
    ) -> None:
        self._response_bytes_max = response_bytes_max
        self._shard = shard
        self._shards = shards
        self._storage = storage
        self.committer = Committer[_Asker](storage, self._settle)
        self.triggers = Triggers[GatewayLink]()
        self.leases = leases
        self._interested: dict[tuple[str, str], list[GatewayLink]] = {}
        self._links: dict[GatewayLink, set[tuple[str, str]]] = {}
        self._bodies: dict[GatewayLink, SentBodies] = {}
        self._syncs_shared_before = 0
        self._tasks = Tasks()
        self.reporter: Reporter | None = None
        self.tracing: Tracing | None = None
        self._spans: dict[Trace, Span] = {}
        self._trouble: str | None = None
        self.events_total = 0
        self.foreign_total: dict[str, int] = {}
        self.triggers_fired_total = 0
        self.failures_total = LabelCounts(
            ["function", "code"],
            [(kind.__name__, code) for kind, (code, _) in _FAILURES.items()]
            + [(kind.__name__, "overloaded") for kind in _FAILURES],
        )
        self._received_total: dict[type[ToShard], int] = dict.fromkeys(get_args(ToShard), 0)
        self.overflows_total = 0
        self._before = [0, 0]  # bytes of links that are over

    @property
    def links(self) -> list[GatewayLink]:
        """The links that are made."""
        return list(self._links)

    @property
    def calls_total(self) -> dict[str, int]:
        """By kind."""
        return {kind.__name__: self._received_total[kind] for kind in (*_FAILURES, *_SPANNING)}

    @property
    def received_bytes(self) -> int:
        """From gateways, over all links so far."""
        return self._before[0] + sum(link.received_bytes for link in self._links)

    @property
    def sent_bytes(self) -> int:
        """To gateways, likewise."""
        return self._before[1] + sum(link.sent_bytes for link in self._links)

    @property
    def sync_bodies_bytes(self) -> int:
        """Of what gateways keep."""
        return sum(bodies.bytes for bodies in self._bodies.values())

    @property
    def syncs_shared_total(self) -> int:
        """Syncs whose body the gateway had, over all links so far."""
        now = sum(bodies.shared_total for bodies in self._bodies.values())
        return self._syncs_shared_before + now

    def not_ready(self) -> list[str]:
        """Why not every call can be taken, a sentence each."""
        if self.committer.waiting < WAITING_MAX:
            return []
        return [f"{WAITING_MAX} operations wait, further ones are refused"]

    def link_made(self, link: GatewayLink) -> None:
        self._links[link] = set()
        self._bodies[link] = SentBodies()

    def link_lost(self, link: GatewayLink, reason: str) -> None:
        for group in self._links.pop(link, ()):
            self._not_interested(link, group)
        self._syncs_shared_before += self._bodies.pop(link).shared_total
        self._before[0] += link.received_bytes
        self._before[1] += link.sent_bytes
        self.overflows_total += link.overflowed
        for stream in self.triggers.remove_all(link):
            self._storage.interest_stream(stream, False)
        loop = asyncio.get_running_loop()
        for due_at in self.leases.gateway_lost(link, loop.time()):
            loop.call_at(due_at + _TIMER_SLACK_S, self._leaves_due)

    def _leaves_due(self) -> None:
        for link, left in self.leases.due(asyncio.get_running_loop().time()):
            link.send(left)

    def messages_received(self, link: GatewayLink, received: list[ToShard]) -> None:
        """Take what came in one piece; operations of it on one stream share a commit."""
        received_total = self._received_total
        for message in received:
            received_total[type(message)] += 1
            self._receive(link, message)
        self.committer.start()

    def _receive(self, link: GatewayLink, message: ToShard) -> None:
        match message:
            case messages.GroupCall():
                if self.tracing is not None:
                    self._begin_span(message)
                if self.committer.waiting >= WAITING_MAX:
                    self._fail(link, message, _overloaded())
                else:
                    self.committer.add(message, link)
            case messages.Leave():
                group = Group(message.stream, message.group_id)
                if group in self._links.get(link, ()):
                    self._links[link].discard(group)
                    self._not_interested(link, group)
            case messages.ListGroups():
                self._tasks.start(self._list_groups(link, message))
            case messages.ListAll():
                self._tasks.start(self._list_all(link, message))
            case messages.CheckOps():
                self._check_ops(link, message)
            case messages.ApplyOps():
                self._apply_ops(link, message)
            case messages.AddTrigger() | messages.RemoveTrigger() | messages.AddLeaveTrigger():
                self._keep_trigger(link, message)
            case messages.Lease():
                self.leases.add(link, message, asyncio.get_running_loop().time())
            case messages.EndLease():
                self.leases.end(link, message.lease_id)
            case messages.Heartbeat():
                link.send(message)
            case messages.AskStatus() | messages.AskTop() | messages.GatewayTells():
                self._report(link, message)
            case messages.Hello():
                if message.version != messages.VERSION:
                    link.cut(f"the gateway speaks version {message.version} of the link")
                else:
                    self.leases.gateway_linked(link, message.gateway_id)
                    link.send(Welcome(messages.VERSION, self._shard, self._shards))
                    if self._trouble is not None:
                        link.send(messages.StorageState(self._trouble))
            case _:
                assert_never(message)

    def _keep_trigger(
        self,
        link: GatewayLink,
        message: messages.AddTrigger | messages.RemoveTrigger | messages.AddLeaveTrigger,
    ) -> None:
        match message:
            case messages.AddTrigger():
                if (stream := self.triggers.add(link, message)) is not None:
                    self._storage.interest_stream(stream, False)
                self._storage.interest_stream(message.stream, True)
            case messages.RemoveTrigger():
                if (stream := self.triggers.remove(link, message.trigger_id)) is not None:
                    self._storage.interest_stream(stream, False)
                self.leases.remove_trigger(link, message.trigger_id)
            case messages.AddLeaveTrigger():
                now = asyncio.get_running_loop().time()
                for left in self.leases.add_trigger(link, message, now):
                    link.send(left)
            case _:
                assert_never(message)

    def _settle(self, operation: Operation, asker: _Asker, settled: Settled) -> None:
        if isinstance(asker, Link):
            self._answer(operation, asker, settled)
        elif isinstance(asker, Foreign):
            self._tell_foreign(asker, settled)
        else:
            self._show_lost(operation, asker, settled)

    def _answer(self, operation: Operation, link: GatewayLink, settled: Settled) -> None:
        outcome, group = settled
        if self._spans:
            self._end_span(operation, outcome)
        if group is None:
            assert isinstance(outcome, StorageError), "a group comes with every other outcome"
            outcome = _storage_failure(operation, outcome.message, outcome.retryable)
            self._fail(link, operation, outcome)
            return
        match outcome:
            case Done():
                if outcome.failure is None:
                    link.send(Reply(operation.call_id, outcome.result))
                else:
                    self._fail(link, operation, _storage_failure(operation, outcome.failure))
                if outcome.change is not None:
                    self._publish(operation.stream, group, outcome.change, operation.trace)
            case Snapshot() | Resumed():
                assert isinstance(operation, messages.Join)
                self._joined(link, operation, group, outcome)
            case Past():
                link.send(Reply(operation.call_id, past_payload(group, outcome)))
            case StorageError():
                outcome = _storage_failure(operation, outcome.message, outcome.retryable)
                self._fail(link, operation, outcome)
            case BrokerError():
                self._fail(link, operation, outcome)
            case _:
                assert_never(outcome)

    def _joined(
        self,
        link: GatewayLink,
        join: messages.Join,
        group: GroupState,
        outcome: Snapshot | Resumed,
    ) -> None:
        groups = self._links.get(link)
        if groups is None:
            return  # the link was lost meanwhile
        key = Group(join.stream, join.group_id)
        if key not in groups:
            groups.add(key)
            if key not in self._interested:
                self._storage.interest(*key, True)
            self._interested.setdefault(key, []).append(link)
        if isinstance(outcome, Snapshot):
            head, body = sync_parts(group, join.item_id, outcome)
            synced = Synced(join.call_id, outcome.seq, outcome.epoch, head, body)
            if join.item_id is None:
                self._bodies[link].shorten((key, join.with_ids), synced)
        else:
            head = resume_head(group, join.item_id, outcome)
            missed = [event_payload(group, change) for change in outcome.missed]
            synced = Synced(join.call_id, outcome.seq, outcome.epoch, head, missed=missed)
        link.send(synced)

    def storage_state(self, trouble: str | None) -> None:
        """Tell all gateways what keeps the storage from working, or that it works again."""
        self._trouble = trouble
        for link in self._links:
            link.send(messages.StorageState(trouble))

    def changed_elsewhere(self, stream: str, group_id: str, change: Change) -> None:
        """Tell a change that another broker made on the same storage."""
        self._publish(stream, GroupState(stream, group_id, Head("")), change)

    def foreign_received(self, message: Foreign) -> None:
        """Tell what another program says in a group, at its place among the group's changes.

        It is stamped as a sync would be, and has no number: it is not kept.
        """
        if self.committer.waiting >= WAITING_MAX:
            self._count_foreign("overloaded")
            return
        place = messages.Join(0, message.stream, message.group_id, None, b"null")
        self.committer.add(place, message)
        self.committer.start()

    def _tell_foreign(self, message: Foreign, settled: Settled) -> None:
        snapshot, group = settled
        if group is None or not isinstance(snapshot, Snapshot):
            self._count_foreign("failed")
            return
        self._count_foreign("told")
        payload = foreign_payload(group, message, snapshot.timestamp_ms)
        stream, group_id = message.stream, message.group_id
        event = Event(stream, group_id, message.item_id, 0, payload, True, [], True)
        for link in self._interested.get((stream, group_id), ()):
            link.send(event)

    def changes_lost(self, stream: str, group_id: str, epoch: str) -> None:
        """Storage seems to have lost changes that were told: make sure, and show it to everybody.

        Args:
            epoch: of the numbering that they were in.
        """
        self.committer.add(messages.Join(0, stream, group_id, None, b"null"), Lost(epoch))
        self.committer.start()

    def _show_lost(self, join: Operation, lost: Lost, settled: Settled) -> None:
        snapshot, _ = settled
        if not isinstance(snapshot, Snapshot) or snapshot.epoch == lost.epoch:
            return  # a false alarm; or nothing can be had now, and it is noticed again
        # A number that can't be the next one: gateways ask for new syncs, and deliver nothing.
        seq = snapshot.seq + 2
        gap = Event(join.stream, join.group_id, None, seq, b"", True, [], True)
        for link in self._interested.get((join.stream, join.group_id), ()):
            link.send(gap)

    def _count_foreign(self, outcome: str) -> None:
        self.foreign_total[outcome] = self.foreign_total.get(outcome, 0) + 1

    def _publish(
        self, stream: str, group: GroupState, change: Change, trace: Trace | None = None
    ) -> None:
        """Tell `change` once to each gateway that wants the group or has a trigger on it."""
        group_id = group.group_id
        interested = self._interested.get((stream, group_id), ())
        fired = self.triggers.matching(stream, group_id, change.item_id)
        if not interested and not fired:
            return
        event = Event(
            stream,
            group_id,
            change.item_id,
            change.seq,
            event_payload(group, change),
            True,
            [],
            change.kind is Kind.EVENT,
            trace=trace,
        )
        for link in interested:
            if link not in fired:
                self.events_total += 1
                link.send(event)
        for link, triggers in fired.items():
            self.events_total += 1
            self.triggers_fired_total += len(triggers)
            told = copy(event)
            told.subscribed, told.triggers = link in interested, triggers
            link.send(told)

    def _not_interested(self, link: GatewayLink, group: tuple[str, str]) -> None:
        links = self._interested[group]
        links.remove(link)
        if not links:
            del self._interested[group]
            self._storage.interest(*group, False)

    async def _list_groups(self, link: GatewayLink, call: messages.ListGroups) -> None:
        try:
            groups = await self.committer.groups(call.stream)
        except StorageError as error:
            self._fail(link, call, _spanning_failure("STREAM_LIST_GROUPS_ERROR", error))
        else:
            self._send_names(link, call, msgspec.json.encode(groups))

    async def _list_all(self, link: GatewayLink, call: messages.ListAll) -> None:
        found: dict[str, list[str]] = {}
        try:
            for stream in await self._storage.streams():
                if groups := await self.committer.groups(stream):
                    found[stream] = groups
        except StorageError as error:
            self._fail(link, call, _spanning_failure("STREAM_LIST_ALL_ERROR", error))
        else:
            self._send_names(link, call, msgspec.json.encode(found))

    def _send_names(
        self, link: GatewayLink, call: messages.ListGroups | messages.ListAll, text: bytes
    ) -> None:
        if len(text) > self._response_bytes_max:
            message = (
                f"the names have {len(text)} bytes in shard {self._shard},"
                f" the limit of one answer is {self._response_bytes_max}"
            )
            self._fail(link, call, LimitExceeded("response_too_large", message))
        else:
            link.send(Reply(call.call_id, text))

    def _check_ops(self, link: GatewayLink, call: messages.CheckOps) -> None:
        try:
            ops = update_ops.parse_ops(call.ops)
        except BrokerError as error:
            self._fail(link, call, error)
        else:
            link.send(Reply(call.call_id, update_ops.ops_text(ops)))

    def _apply_ops(self, link: GatewayLink, call: messages.ApplyOps) -> None:
        try:
            outcome = update_ops.apply_ops(call.current, update_ops.parse_ops(call.ops))
        except BrokerError as error:
            self._fail(link, call, error)
        else:
            result: dict[str, object] = {"new_value": msgspec.Raw(outcome.value)}
            if outcome.errors:
                result["errors"] = outcome.errors
            link.send(Reply(call.call_id, msgspec.json.encode(result)))

    def _report(
        self, link: GatewayLink, asked: messages.AskStatus | messages.AskTop | messages.GatewayTells
    ) -> None:
        assert self.reporter is not None, "set before the shard listens"
        match asked:
            case messages.AskStatus():
                link.send(Reply(asked.call_id, self.reporter.status()))
            case messages.AskTop():
                link.send(Reply(asked.call_id, self.reporter.top(asked.limit)))
            case messages.GatewayTells():
                self.reporter.told(link, asked.report)
            case _:
                assert_never(asked)

    # Spans, of calls that are part of a trace.

    def _begin_span(self, operation: Operation) -> None:
        assert self.tracing is not None, "the caller looked"
        if operation.trace is not None and self.committer.waiting < WAITING_MAX:
            name = "read" if isinstance(operation, _READS) else "commit"
            span = self.tracing.start(
                name, SpanKind.INTERNAL, operation.trace, shard=self._shard, stream=operation.stream
            )
            operation.trace = span.trace  # what it causes hangs below
            self._spans[span.trace] = span

    def _end_span(self, operation: Operation, outcome: Outcome | StorageError) -> None:
        if operation.trace is not None and (span := self._spans.pop(operation.trace, None)):
            span.end(outcome.code if isinstance(outcome, BrokerError) else None)

    def _fail(self, link: GatewayLink, call: _Call, error: BrokerError) -> None:
        self.failures_total.add(type(call).__name__, error.code)
        link.send(Failure(call.call_id, error.code, error.message, error.field, error.retryable))


def _storage_failure(operation: Operation, reason: str, retryable: bool = False) -> StorageError:
    code, what = _FAILURES[type(operation)]
    _log.warning("storage_failed", stream=operation.stream, reason=reason)
    return StorageError(code, f"{what}: {reason}", retryable=retryable)


def _overloaded() -> BrokerError:
    return BrokerError(
        "overloaded", f"{WAITING_MAX} operations wait in the shard; retry later", retryable=True
    )


def _spanning_failure(code: str, error: StorageError) -> StorageError:
    what = "list groups" if code == "STREAM_LIST_GROUPS_ERROR" else "list stream"
    return StorageError(code, f"Failed to {what}: {error.message}", retryable=error.retryable)
