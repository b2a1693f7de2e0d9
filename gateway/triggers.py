"""Triggers and trigger types: who registered what, who provides it, and firing the built-in ones.

Protocol sections 3.3 to 3.9, 4.6, 6.2 and 9.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from enum import Enum, auto
from functools import partial
from typing import Any, Protocol

import msgspec

from broker import logs
from broker.clock import wall_clock_ms
from broker.errors import InvalidRequest
from broker.messages import (
    AddLeaveTrigger,
    AddTrigger,
    Event,
    Left,
    Message,
    RemoveTrigger,
    Trace,
)
from broker.tasks import Tasks
from broker.tracing import Kind, Span, Tracing
from gateway.decoding import located
from gateway.invocations import Executor, Invocations, Result
from gateway.worker_protocol import (
    RegisterTrigger,
    RegisterTriggerType,
    present,
    register_trigger,
    trigger_registration_result,
    unregister_trigger,
)

STREAM, JOIN, LEAVE = "stream", "stream:join", "stream:leave"
FUNCTIONS_AVAILABLE, WORKERS_AVAILABLE = (
    "engine::functions-available",
    "engine::workers-available",
)
BUILTIN_TYPES = {
    FUNCTIONS_AVAILABLE: "Triggered when functions are registered/unregistered",
    WORKERS_AVAILABLE: "Triggered when workers connect/disconnect",
    STREAM: "Stream trigger",
    JOIN: "Stream join trigger",
    LEAVE: "Stream leave trigger",
}
CONDITIONS_WAITING_MAX = 1000
"""Events of one trigger and group that wait for its condition; later ones are dropped."""

_log = logs.Log("triggers")


_Waiting = tuple[bytes, Trace | None]
"""An event's payload, and the trace that it is part of."""


class Worker(Executor, Protocol):
    """Who registers triggers and provides types."""

    def send(self, payload: bytes) -> None: ...


class StreamConfig(msgspec.Struct, frozen=True):
    """Config of a `stream` trigger; None and "" do not filter."""

    stream_name: str
    group_id: str | None = None
    item_id: str | None = None
    condition_function_id: str | None = None


class JoinConfig(msgspec.Struct, frozen=True):
    """Config of a join or leave trigger."""

    stream_name: str | None = None
    group_id: str | None = None
    condition_function_id: str | None = None

    def matches(self, stream: str, group_id: str) -> bool:
        return (not self.stream_name or self.stream_name == stream) and (
            not self.group_id or self.group_id == group_id
        )


class Home(Enum):
    """Where the worker is that registered a trigger, or provides a type."""

    HERE = auto()
    OWN_BROKER = auto()
    """At another gateway of this broker, which has told our shards."""
    OTHER_BROKER = auto()


class Trigger:
    """One registration."""

    def __init__(
        self, worker: Worker, message: RegisterTrigger, at_ms: int, home: Home = Home.HERE
    ) -> None:
        self.worker = worker
        self.message = message
        self.at_ms = at_ms
        self.home = home
        self.guards_only = False  # its gateway does not answer; it may be asked all the same
        self.id = message.id
        self.type = message.trigger_type
        self.function_id = message.function_id
        self.namespace = message.namespace if message.namespace is not None else "default"
        self.config = _config(message)
        """JSON text."""
        self.metadata = present(message.metadata)
        self.parsed: StreamConfig | JoinConfig | None = None
        self.provider: Worker | None = None
        self.told = False  # to the shards; of a leave trigger

    @property
    def parked(self) -> bool:
        """Whether it waits for a worker that provides its type."""
        return self.type not in BUILTIN_TYPES and self.provider is None

    @property
    def likeness(self) -> str:
        """The same for the same trigger of a worker that was started again, whose ids are new."""
        return "\0".join((self.namespace, self.function_id, self.config.decode()))


class TriggerType:
    """A type that a worker provides."""

    def __init__(
        self, provider: Worker, definition: RegisterTriggerType, at_ms: int, here: bool
    ) -> None:
        self.provider = provider
        self.definition = definition
        self.at_ms = at_ms
        self.here = here  # whether the provider is connected to this gateway


class Triggers:
    """All triggers and trigger types of a gateway, and those that its peers told of.

    Args:
        tell_shards: sends a message to every shard that is linked.
        timeout_s: for a condition, and for a join handler.
    """

    def __init__(
        self,
        invocations: Invocations,
        tell_shards: Callable[[Message], None],
        timeout_s: float,
    ) -> None:
        self._invocations = invocations
        self._tell_shards = tell_shards
        self.timeout_s = timeout_s
        self._triggers: dict[str, Trigger] = {}
        self._by_type: dict[str, dict[str, Trigger]] = {}
        self._types: dict[str, TriggerType] = {}
        self._waiting: dict[tuple[str, str, str], deque[_Waiting]] = {}
        self.tracing: Tracing | None = None
        self.conditions_total = 0
        self._known = asyncio.Event()
        self._known.set()
        self._tasks = Tasks()
        self.on_leave_trigger: Callable[[], None] = _nothing
        """Told when leaves are wanted by a worker of another gateway."""
        self.outcomes_total = {
            "fired": 0,
            "failed": 0,
            "skipped": 0,
            "condition_failed": 0,
            "dropped": 0,
        }

    # What workers do.

    def register(self, worker: Worker, message: RegisterTrigger) -> Trigger | None:
        """Enter a trigger, in place of an earlier one with its id; an error is told to `worker`,
        and None returned."""
        trigger = Trigger(worker, message, wall_clock_ms())
        try:
            if message.namespace is not None and not message.namespace.strip():
                raise InvalidRequest("INVALID_NAMESPACE", "namespace is blank", "namespace")
            trigger.parsed = _parse(trigger)
        except InvalidRequest as error:
            _log.warning("trigger_refused", id=trigger.id, type=trigger.type, reason=error.message)
            fields = {"code": error.code, "message": error.message}
            worker.send(
                trigger_registration_result(trigger.id, trigger.type, trigger.function_id, fields)
            )
            return None
        self._enter(trigger)
        return trigger

    def mirror(
        self, worker: Worker, message: RegisterTrigger, *, at_ms: int, own_broker: bool
    ) -> None:
        """Enter a trigger of a worker of another gateway. Of two with one id, as of a worker that
        connected anew to another gateway, the later one stays, here as there."""
        home = Home.OWN_BROKER if own_broker else Home.OTHER_BROKER
        trigger = Trigger(worker, message, at_ms, home)
        earlier = self._triggers.get(trigger.id)
        if earlier is not None and (earlier.at_ms, earlier.worker.worker_id) > (
            at_ms,
            worker.worker_id,
        ):
            return
        try:
            trigger.parsed = _parse(trigger)
        except InvalidRequest as error:
            _log.error("trigger_unreadable", id=trigger.id, reason=error.message)
            return
        self._enter(trigger)

    def _enter(self, trigger: Trigger) -> None:
        if (earlier := self._triggers.get(trigger.id)) is not None:
            self._remove(earlier, successor=trigger)
        self._triggers[trigger.id] = trigger
        self._by_type.setdefault(trigger.type, {})[trigger.id] = trigger
        if trigger.type == STREAM:
            if trigger.home is Home.HERE:
                self._tell_shards(_to_shard(trigger))
        elif trigger.type == LEAVE:
            if trigger.home is not Home.HERE:
                self.on_leave_trigger()
            self.functions_changed()
        elif trigger.type == JOIN:
            for guard in self._of_type(JOIN):
                if guard.guards_only and guard.likeness == trigger.likeness:
                    self._remove(guard)  # it is back
        elif trigger.type not in BUILTIN_TYPES:
            if (kind := self._types.get(trigger.type)) is not None:
                self._provide(trigger, kind)
            else:
                _log.warning("trigger_parked", id=trigger.id, type=trigger.type)

    def unregister(self, worker: Worker, trigger_id: str) -> None:
        """Take the worker's own trigger out."""
        trigger = self._triggers.get(trigger_id)
        if trigger is not None and trigger.worker is worker:
            self._remove(trigger)

    def register_type(
        self, worker: Worker, definition: RegisterTriggerType, at_ms: int | None = None
    ) -> TriggerType | None:
        """From now on `worker` provides the type; `at_ms`: it is a worker of another gateway, and
        registered it then. None is returned when it does not."""
        if definition.id in BUILTIN_TYPES:
            _log.warning("trigger_type_refused", id=definition.id, reason="it is built in")
            return None
        here = at_ms is None
        kind = TriggerType(worker, definition, wall_clock_ms() if at_ms is None else at_ms, here)
        earlier = self._types.get(definition.id)
        if not here and earlier is not None:
            mine = (earlier.at_ms, earlier.provider.worker_id)
            if mine > (kind.at_ms, worker.worker_id):
                return None
        self._types[definition.id] = kind
        for trigger in self._of_type(definition.id):
            self._provide(trigger, kind)
        return kind

    def unregister_type(self, worker: Worker, type_id: str) -> None:
        """The worker provides the type no more; its triggers are parked."""
        kind = self._types.get(type_id)
        if kind is None or kind.provider is not worker:
            return
        del self._types[type_id]
        for trigger in self._of_type(type_id):
            trigger.provider = None

    def functions_changed(self) -> None:
        """Leave triggers whose function is there can tell what a dead gateway left untold."""
        for trigger in self._of_type(LEAVE):
            if (
                not trigger.told
                and trigger.home is not Home.OWN_BROKER
                and self._invocations.serves(trigger.namespace, trigger.function_id)
            ):
                trigger.told = True
                self._tell_shards(_leave_to_shard(trigger))

    def provider_answered(self, worker: Worker, trigger_id: str, error: bytes | None) -> None:
        """The provider's answer to a forwarded registration; an error parks the trigger."""
        trigger = self._triggers.get(trigger_id)
        if trigger is None or trigger.provider is not worker or error is None:
            return
        trigger.provider = None
        trigger.worker.send(
            trigger_registration_result(trigger.id, trigger.type, trigger.function_id, error)
        )

    def remove_worker(self, worker: Worker, *, keep_guards: bool = False) -> bool:
        """The worker left: its triggers go, then the types that it provided. With `keep_guards` its
        join triggers stay; returns whether there are some."""
        kept = False
        for trigger in [t for t in self._triggers.values() if t.worker is worker]:
            if keep_guards and trigger.type == JOIN:
                kept = trigger.guards_only = True
            else:
                self._remove(trigger)
        for type_id in [i for i, kind in self._types.items() if kind.provider is worker]:
            self.unregister_type(worker, type_id)
        return kept

    def all(self) -> list[Trigger]:
        """Every trigger, also one whose type nobody provides."""
        return list(self._triggers.values())

    def wait_for(self, known: Coroutine[Any, Any, None]) -> None:
        """Before `known` ends, nobody joins: join triggers of others may not be known yet."""
        self._known.clear()

        async def wait() -> None:
            await known
            self._known.set()

        self._tasks.start(wait())

    # What the listing functions show.

    def active(self) -> list[Trigger]:
        """Triggers that can fire, sorted by id."""
        return sorted((t for t in self._triggers.values() if not t.parked), key=lambda t: t.id)

    def find(self, trigger_id: str) -> Trigger | None:
        trigger = self._triggers.get(trigger_id)
        return None if trigger is None or trigger.parked else trigger

    def types(self) -> dict[str, TriggerType]:
        """The types that workers provide."""
        return self._types

    # Firing.

    @property
    def conditions_waiting(self) -> bool:
        """Whether events wait for conditions."""
        return bool(self._waiting)

    @property
    def events_waiting(self) -> int:
        """How many."""
        return sum(map(len, self._waiting.values()))

    def messages_for_shard(self) -> list[AddTrigger | AddLeaveTrigger]:
        """All that a shard has to know, in order of registration."""
        return [
            *(_to_shard(t) for t in self._of_type(STREAM) if t.home is Home.HERE),
            *(_leave_to_shard(t) for t in self._of_type(LEAVE) if t.told),
        ]

    def fire_stream(self, event: Event) -> None:
        """Invoke the triggers that the shard matched, in their order."""
        for trigger_id in event.triggers:
            trigger = self._triggers.get(trigger_id)
            if trigger is not None:
                self._fire(trigger, event.stream, event.group_id, event.payload, event.trace)

    def fire_engine(self, trigger_type: str, data: bytes) -> None:
        """Invoke every trigger of an `engine::` type of our own workers."""
        for trigger in self._of_type(trigger_type):
            if trigger.home is Home.HERE:
                self._invoke(trigger, data)

    def fire_leave(self, stream: str, group_id: str, payload: bytes) -> None:
        """Tell that a subscription ended; results are ignored."""
        for trigger in self._of_group(LEAVE, stream, group_id):
            self._fire(trigger, stream, group_id, payload)

    def fire_left(self, left: Left) -> None:
        """Tell one trigger of a subscription that ended with the gateway that held it."""
        trigger = self._triggers.get(left.trigger_id)
        if trigger is not None and trigger.type == LEAVE:
            self._fire(trigger, left.stream, left.group_id, left.payload)

    @property
    def has_leave(self) -> bool:
        """Whether anybody wants to be told of leaves."""
        return LEAVE in self._by_type

    def has_join(self, stream: str, group_id: str) -> bool:
        """Whether anybody has to be asked about a join, or that is not known yet."""
        return not self._known.is_set() or bool(self._of_group(JOIN, stream, group_id))

    async def may_join(self, stream: str, group_id: str, payload: bytes) -> bool:
        """Ask all join triggers, in order of registration; one refusal or failure refuses."""
        await self._known.wait()
        allowed = True
        for trigger in self._of_group(JOIN, stream, group_id):
            allowed &= await self._asked(trigger, payload)
        return allowed

    async def _asked(self, trigger: Trigger, payload: bytes) -> bool:
        condition = trigger.parsed.condition_function_id if trigger.parsed else None
        if condition is not None:
            self.conditions_total += 1
            answer = await self._call(condition, trigger.namespace, payload, None)
            if answer.error is not None:
                self.outcomes_total["condition_failed"] += 1
                _log.warning("condition_failed", id=trigger.id, function=condition)
                return False
            if answer.result == b"false":
                self.outcomes_total["skipped"] += 1
                return True
        self.outcomes_total["fired"] += 1
        answer = await self._call(trigger.function_id, trigger.namespace, payload, trigger.metadata)
        if answer.error is not None:
            self.outcomes_total["failed"] += 1
            _log.warning("join_trigger_failed", id=trigger.id, function=trigger.function_id)
            return False
        refused = _unauthorized(answer.result)
        if refused not in (b"false", b"true", None):
            _log.warning("join_result_odd", id=trigger.id, unauthorized=refused)
        return refused in (b"false", None)

    async def _call(
        self, function_id: str, namespace: str, data: bytes, metadata: bytes | None
    ) -> Result:
        return await self._invocations.call(
            function_id,
            data,
            self.timeout_s,
            namespace=namespace,
            metadata=metadata,
            resend=True,
        )

    def _fire(
        self,
        trigger: Trigger,
        stream: str,
        group_id: str,
        payload: bytes,
        trace: Trace | None = None,
    ) -> None:
        condition = trigger.parsed.condition_function_id if trigger.parsed else None
        if condition is None:
            self._invoke(trigger, payload, trace)
            return
        key = (trigger.id, stream, group_id)
        waiting = self._waiting.setdefault(key, deque())
        if len(waiting) >= CONDITIONS_WAITING_MAX:
            self.outcomes_total["dropped"] += 1
            return
        waiting.append((payload, trace))
        if len(waiting) == 1:
            self._ask_condition(trigger, condition, key)

    def _ask_condition(self, trigger: Trigger, condition: str, key: tuple[str, str, str]) -> None:
        """Ask about the first event that waits; the others wait for its answer, to keep order."""
        payload, trace = self._waiting[key][0]
        self.conditions_total += 1
        self._invocations.call_within(
            self.timeout_s,
            condition,
            payload,
            partial(self._condition_answered, trigger, condition, key),
            namespace=trigger.namespace,
            resend=True,
            trace=trace,
        )

    def _condition_answered(
        self, trigger: Trigger, condition: str, key: tuple[str, str, str], answer: Result
    ) -> None:
        waiting = self._waiting[key]
        payload, trace = waiting.popleft()
        if answer.error is not None:
            self.outcomes_total["condition_failed"] += 1
            _log.warning("condition_failed", id=trigger.id, function=condition)
        elif answer.result == b"false":
            self.outcomes_total["skipped"] += 1
        elif trigger.type == LEAVE or self._triggers.get(trigger.id) is trigger:
            self._invoke(trigger, payload, trace)
        if not waiting:
            del self._waiting[key]
        else:  # not from here: answers that come at once would nest
            asyncio.get_running_loop().call_soon(self._ask_condition, trigger, condition, key)

    def _invoke(self, trigger: Trigger, data: bytes, trace: Trace | None = None) -> None:
        self.outcomes_total["fired"] += 1
        handled: Callable[[Result], None] = partial(self._handled, trigger)
        if self.tracing is not None and trace is not None:
            span = self.tracing.start(
                f"trigger {trigger.function_id}", Kind.PRODUCER, trace, trigger=trigger.id
            )
            trace, handled = span.trace, partial(_traced, span, handled)
        self._invocations.invoke(
            trigger.function_id,
            data,
            handled,
            namespace=trigger.namespace,
            caller=None if trigger.type == LEAVE else trigger,  # each leave is told
            trace=trace,
            metadata=trigger.metadata,
            resend=True,
            deadlines=self._invocations.patience,
        )

    def _handled(self, trigger: Trigger, result: Result) -> None:
        if result.error is not None:
            self.outcomes_total["failed"] += 1
            _log.debug("trigger_failed", id=trigger.id, function=trigger.function_id)

    def _of_group(self, trigger_type: str, stream: str, group_id: str) -> list[Trigger]:
        if trigger_type not in self._by_type:
            return []
        return [
            t
            for t in self._by_type[trigger_type].values()
            if isinstance(t.parsed, JoinConfig) and t.parsed.matches(stream, group_id)
        ]

    def _of_type(self, trigger_type: str) -> list[Trigger]:
        return list(self._by_type.get(trigger_type, {}).values())

    def _provide(self, trigger: Trigger, kind: TriggerType) -> None:
        trigger.provider = kind.provider
        if kind.here:  # else its own gateway tells it
            kind.provider.send(register_trigger(trigger.message))

    def _remove(self, trigger: Trigger, successor: Trigger | None = None) -> None:
        """Take a trigger out; whoever serves it learns of a `successor` of its type by that."""
        del self._triggers[trigger.id]
        alike = self._by_type[trigger.type]
        del alike[trigger.id]
        if not alike:
            del self._by_type[trigger.type]
        if trigger.told:
            self._tell_shards(RemoveTrigger(trigger.id))
        if successor is not None and successor.type == trigger.type:
            if trigger.type == STREAM and trigger.home is Home.HERE is not successor.home:
                self._tell_shards(RemoveTrigger(trigger.id))
            return
        if trigger.type == STREAM:
            if trigger.home is Home.HERE:
                self._tell_shards(RemoveTrigger(trigger.id))
        elif trigger.provider is not None:
            kind = self._types.get(trigger.type)
            if kind is not None and kind.here and kind.provider is trigger.provider:
                trigger.provider.send(unregister_trigger(trigger.id, trigger.type))


def _nothing() -> None:
    """Where nobody has to be told."""


def _traced(span: Span, handled: Callable[[Result], None], result: Result) -> None:
    span.end(None if result.error is None else "handler_failed")
    handled(result)


def _parse(trigger: Trigger) -> StreamConfig | JoinConfig | None:
    kind: type[StreamConfig] | type[JoinConfig]
    if trigger.type == STREAM:
        kind = StreamConfig
    elif trigger.type in (JOIN, LEAVE):
        kind = JoinConfig
    else:
        return None
    if kind is JoinConfig and not trigger.config.startswith(b"{"):
        return JoinConfig()  # a guard without filters rather than none
    try:
        return msgspec.json.decode(trigger.config, type=kind)
    except msgspec.DecodeError as error:
        reason, field = located(error)
        field = field or "config"
        raise InvalidRequest(
            "trigger_registration_failed",
            f"Failed to deserialize stream trigger: {field}: {reason}",
            field,
        ) from None


def _config(message: RegisterTrigger) -> bytes:
    """The config as JSON text; what is absent is null, and `{}` for a built-in type (3.5)."""
    text = bytes(message.config).strip()
    if text:
        return text
    return b"{}" if message.trigger_type in BUILTIN_TYPES else b"null"


def _to_shard(trigger: Trigger) -> AddTrigger:
    config = trigger.parsed
    assert isinstance(config, StreamConfig)
    return AddTrigger(trigger.id, config.stream_name, config.group_id, config.item_id)


def _leave_to_shard(trigger: Trigger) -> AddLeaveTrigger:
    config = trigger.parsed
    assert isinstance(config, JoinConfig)
    return AddLeaveTrigger(trigger.id, trigger.likeness, config.stream_name, config.group_id)


def _unauthorized(result: bytes | None) -> bytes | None:
    """JSON text of the field `unauthorized` of a join handler's result."""
    if result is None or not result.lstrip().startswith(b"{"):
        return None
    value = msgspec.json.decode(result, type=dict[str, msgspec.Raw]).get("unauthorized")
    return None if value is None else bytes(value)
