"""What gateways ask of the shard, and what they are told."""

from __future__ import annotations

import asyncio
from typing import NamedTuple, assert_never

import msgspec

from broker import logs, messages
from broker.errors import BrokerError, StorageError
from broker.link import Link
from broker.messages import Event, Failure, Reply, Synced, ToShard, Welcome
from broker.names import Group
from broker.tasks import Tasks
from shards import update_ops
from shards.committer import Committer
from shards.events import event_payload, foreign_payload, past_payload, resume_payload, sync_payload
from shards.group import Change, GroupState, Head, Kind, Operation, Past, Resumed, Snapshot
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

GatewayLink = Link[ToShard]


class Lost(NamedTuple):
    """Asks for a look at a group: an epoch of which changes were told that may be lost."""

    epoch: str


_Asker = GatewayLink | Foreign | Lost
"""What `Requests` asks an operation for."""


class Requests:
    """The shard's side of all links: takes messages, answers, and tells who is interested."""

    def __init__(
        self, shard: int, shards: int, storage: Storage, leases: Leases[GatewayLink]
    ) -> None:
        self._shard = shard
        self._shards = shards
        self._storage = storage
        self.committer = Committer[_Asker](storage, self._settle)
        self.triggers = Triggers[GatewayLink]()
        self.leases = leases
        self._interested: dict[tuple[str, str], list[GatewayLink]] = {}
        self._links: dict[GatewayLink, set[tuple[str, str]]] = {}
        self._tasks = Tasks()
        self._trouble: str | None = None
        self.events_total = 0
        self.foreign_total: dict[str, int] = {}
        self.triggers_fired_total = 0
        self.failures_total: dict[str, int] = {}
        self.calls_total: dict[str, int] = {}

    @property
    def links(self) -> list[GatewayLink]:
        """The links that are made."""
        return list(self._links)

    def link_made(self, link: GatewayLink) -> None:
        self._links[link] = set()

    def link_lost(self, link: GatewayLink, reason: str) -> None:
        for group in self._links.pop(link, ()):
            self._not_interested(link, group)
        self.triggers.remove_all(link)
        loop = asyncio.get_running_loop()
        for due_at in self.leases.gateway_lost(link, loop.time()):
            loop.call_at(due_at + _TIMER_SLACK_S, self._leaves_due)

    def _leaves_due(self) -> None:
        for link, left in self.leases.due(asyncio.get_running_loop().time()):
            link.send(left)

    def messages_received(self, link: GatewayLink, received: list[ToShard]) -> None:
        """Take what came in one piece; operations of it on one stream share a commit."""
        for message in received:
            self._receive(link, message)
        self.committer.start()

    def _receive(self, link: GatewayLink, message: ToShard) -> None:
        match message:
            case (
                messages.Set()
                | messages.Get()
                | messages.Update()
                | messages.Delete()
                | messages.Send()
                | messages.List()
                | messages.Join()
                | messages.Publish()
                | messages.ReadHistory()
            ):
                self._count_call(message)
                if self.committer.waiting >= WAITING_MAX:
                    self._fail(link, message.call_id, _overloaded())
                else:
                    self.committer.add(message, link)
            case messages.Leave():
                group = Group(message.stream, message.group_id)
                if group in self._links.get(link, ()):
                    self._links[link].discard(group)
                    self._not_interested(link, group)
            case messages.ListGroups():
                self._count_call(message)
                self._tasks.start(self._list_groups(link, message))
            case messages.ListAll():
                self._count_call(message)
                self._tasks.start(self._list_all(link, message))
            case messages.CheckOps():
                self._check_ops(link, message)
            case messages.ApplyOps():
                self._apply_ops(link, message)
            case messages.AddTrigger():
                self.triggers.add(link, message)
            case messages.RemoveTrigger():
                self.triggers.remove(link, message.trigger_id)
                self.leases.remove_trigger(link, message.trigger_id)
            case messages.Lease():
                self.leases.add(link, message, asyncio.get_running_loop().time())
            case messages.EndLease():
                self.leases.end(link, message.lease_id)
            case messages.AddLeaveTrigger():
                now = asyncio.get_running_loop().time()
                for left in self.leases.add_trigger(link, message, now):
                    link.send(left)
            case messages.Heartbeat():
                link.send(message)
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

    def _settle(self, operation: Operation, asker: _Asker, settled: Settled) -> None:
        if isinstance(asker, Foreign):
            self._tell_foreign(asker, settled)
        elif isinstance(asker, Lost):
            self._show_lost(operation, asker, settled)
        else:
            self._answer(operation, asker, settled)

    def _answer(self, operation: Operation, link: GatewayLink, settled: Settled) -> None:
        outcome, group = settled
        if isinstance(outcome, BrokerError):
            if isinstance(outcome, StorageError):
                outcome = _storage_failure(operation, outcome.message, outcome.retryable)
            self._fail(link, operation.call_id, outcome)
            return
        assert group is not None, "a group comes with every outcome but a StorageError"
        if isinstance(outcome, Snapshot | Resumed):
            assert isinstance(operation, messages.Join)
            self._joined(link, operation, group, outcome)
            return
        if isinstance(outcome, Past):
            link.send(Reply(operation.call_id, past_payload(group, outcome)))
            return
        if outcome.failure is None:
            link.send(Reply(operation.call_id, outcome.result))
        else:
            self._fail(link, operation.call_id, _storage_failure(operation, outcome.failure))
        if outcome.change is not None:
            self._publish(operation.stream, group, outcome.change)

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
            payload = sync_payload(group, join.item_id, outcome)
            link.send(Synced(join.call_id, outcome.seq, outcome.epoch, payload))
        else:
            payload = resume_payload(group, join.item_id, outcome)
            missed = [event_payload(group, change) for change in outcome.missed]
            link.send(Synced(join.call_id, outcome.seq, outcome.epoch, payload, missed))

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

    def _publish(self, stream: str, group: GroupState, change: Change) -> None:
        """Tell `change` once to each gateway that wants the group or has a trigger on it."""
        group_id = group.group_id
        interested = self._interested.get((stream, group_id), ())
        fired = self.triggers.matching(stream, group_id, change.item_id)
        if not interested and not fired:
            return
        payload = event_payload(group, change)
        for link in {**dict.fromkeys(interested), **dict.fromkeys(fired)}:
            triggers = fired.get(link, [])
            self.events_total += 1
            self.triggers_fired_total += len(triggers)
            link.send(
                Event(
                    stream,
                    group_id,
                    change.item_id,
                    change.seq,
                    payload,
                    link in interested,
                    triggers,
                    change.kind is Kind.EVENT,
                )
            )

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
            self._fail(link, call.call_id, _spanning_failure("STREAM_LIST_GROUPS_ERROR", error))
        else:
            link.send(Reply(call.call_id, msgspec.json.encode(groups)))

    async def _list_all(self, link: GatewayLink, call: messages.ListAll) -> None:
        found: dict[str, list[str]] = {}
        try:
            for stream in await self._storage.streams():
                if groups := await self.committer.groups(stream):
                    found[stream] = groups
        except StorageError as error:
            self._fail(link, call.call_id, _spanning_failure("STREAM_LIST_ALL_ERROR", error))
        else:
            link.send(Reply(call.call_id, msgspec.json.encode(found)))

    def _check_ops(self, link: GatewayLink, call: messages.CheckOps) -> None:
        try:
            ops = update_ops.parse_ops(call.ops)
        except BrokerError as error:
            self._fail(link, call.call_id, error)
        else:
            link.send(Reply(call.call_id, update_ops.ops_text(ops)))

    def _apply_ops(self, link: GatewayLink, call: messages.ApplyOps) -> None:
        try:
            outcome = update_ops.apply_ops(call.current, update_ops.parse_ops(call.ops))
        except BrokerError as error:
            self._fail(link, call.call_id, error)
        else:
            result: dict[str, object] = {"new_value": msgspec.Raw(outcome.value)}
            if outcome.errors:
                result["errors"] = outcome.errors
            link.send(Reply(call.call_id, msgspec.json.encode(result)))

    def _fail(self, link: GatewayLink, call_id: int, error: BrokerError) -> None:
        self.failures_total[error.code] = self.failures_total.get(error.code, 0) + 1
        link.send(Failure(call_id, error.code, error.message, error.field, error.retryable))

    def _count_call(self, call: ToShard) -> None:
        name = type(call).__name__
        self.calls_total[name] = self.calls_total.get(name, 0) + 1


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
