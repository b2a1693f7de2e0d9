"""The functions `engine::*` that list workers, functions and triggers, and availability triggers.

Protocol sections 4.5 and 4.6.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec
from msgspec import Raw, Struct

from broker.errors import BrokerError
from gateway.functions import (
    BROKER_FUNCTIONS,
    BUILTINS,
    STREAM_FUNCTIONS,
    Functions,
    Key,
    Registration,
    id_prefix,
)
from gateway.invocations import Executor, Invocations
from gateway.stream_calls import deserialization_error
from gateway.triggers import (
    BUILTIN_TYPES,
    FUNCTIONS_AVAILABLE,
    WORKERS_AVAILABLE,
    Trigger,
    Triggers,
)
from gateway.worker_protocol import RegisterFunction, present

ENGINE_WORKER = "iii-stream"
FUNCTION_IDS_MAX = 32
SUMMARY_CHARACTERS_MAX = 80
AVAILABILITY_INTERVAL_S = 1.0

_encode = msgspec.json.encode
_Fields = dict[str, Any]


class _Builtin:
    """Stands for the registration of a function of the broker's own."""

    def __init__(self, function_id: str) -> None:
        self.definition = RegisterFunction(function_id, BUILTINS[function_id])


_Entry = tuple[Key, Registration[Executor] | _Builtin]


class WorkerInfo:
    """What the listing functions tell of a worker."""

    def __init__(
        self, worker: Executor, worker_id: str, connected_at_ms: int, remote_address: str
    ) -> None:
        self.worker = worker
        self.worker_id = worker_id
        self.connected_at_ms = connected_at_ms
        self.ip_address = remote_address.rpartition(":")[0].strip("[]")
        self.fields: _Fields = {}
        self.namespace = "default"
        """Where its functions are registered."""

    @property
    def name(self) -> str | None:
        name: str | None = self.fields.get("name")
        return name

    def update(self, data: _Fields, label: Callable[[Any], str | None]) -> None:
        """Take what the worker says of itself (section 2.3)."""
        for key in ("name", "description"):
            if key in data:
                value = label(data[key])
                if value is not None:
                    self.fields[key] = value
        for key in ("os", "isolation", "pid"):
            if data.get(key) is not None:
                self.fields[key] = data[key]
        runtime = data.get("runtime")
        self.fields["runtime"] = runtime if isinstance(runtime, str) else "unknown"
        self.fields["version"] = data.get("version")
        self.fields["namespace"] = data.get("namespace") or self.fields.get("namespace")


class _List(Struct):
    search: str | None = None
    prefix: str | None = None
    worker: str | None = None
    workers: list[str] | None = None
    include_internal: bool | None = None
    runtime: str | None = None
    status: str | None = None
    trigger_type: str | None = None
    function_id: str | None = None


class _FunctionInfo(Struct):
    function_id: str | None = None
    function_ids: list[str] | None = None
    namespace: str | None = None


class _WorkerInfo(Struct):
    name: str
    namespace: str | None = None


class _Id(Struct):
    id: str
    namespace: str | None = None


_Input = TypeVar("_Input")


class EngineFunctions:
    """Answers `engine::*` calls from what the gateway knows.

    Args:
        workers: the connected workers by their ids; read at each call.
    """

    def __init__(
        self,
        functions: Functions[Executor],
        invocations: Invocations,
        triggers: Triggers,
        workers: Mapping[str, WorkerInfo],
    ) -> None:
        self._functions = functions
        self._invocations = invocations
        self._triggers = triggers
        self._workers = workers
        self._calls: dict[str, Callable[[str, bytes], _Fields]] = {
            "engine::functions::list": self._functions_list,
            "engine::functions::info": self._functions_info,
            "engine::workers::list": self._workers_list,
            "engine::workers::info": self._workers_info,
            "engine::triggers::list": self._types_list,
            "engine::triggers::info": self._types_info,
            "engine::registered-triggers::list": self._triggers_list,
            "engine::registered-triggers::info": self._triggers_info,
        }

    def call(self, function_id: str, data: bytes) -> bytes:
        """The JSON text of the result.

        Raises:
            BrokerError: `deserialization_error`, `NOT_FOUND` or `INVALID_ARGUMENTS`.
        """
        return _encode(self._calls[function_id](function_id, data))

    def all_functions(self) -> list[_Fields]:
        """Every function, internal ones included, sorted by id."""
        return [self._function(key, r) for key, r in self._served()]

    def _functions_list(self, function_id: str, data: bytes) -> _Fields:
        query = _decode(function_id, data, _List)
        found: list[tuple[int, _Fields]] = []
        wanted = set(query.workers or ()) | ({query.worker} if query.worker else set())
        for key, registration in self._served():
            fields = self._function(key, registration)
            if not query.include_internal and _is_internal(key[1], registration.definition):
                continue
            if query.prefix and not key[1].startswith(query.prefix):
                continue
            if wanted and fields["worker_name"] not in wanted:
                continue
            rank = _rank(query.search, key[1], registration.definition.description)
            if rank is not None:
                found.append((rank, fields))
        found.sort(key=lambda entry: entry[0])
        return {"functions": [fields for _, fields in found]}

    def _functions_info(self, function_id: str, data: bytes) -> _Fields:
        query = _decode(function_id, data, _FunctionInfo)
        namespace = query.namespace or "default"
        if query.function_ids is not None:
            if not 1 <= len(query.function_ids) <= FUNCTION_IDS_MAX:
                raise BrokerError(
                    "INVALID_ARGUMENTS", f"function_ids must be 1 to {FUNCTION_IDS_MAX} ids."
                )
            return {
                "functions": [
                    self._function_info(namespace, i) or {"function_id": i, "error": "not_found"}
                    for i in query.function_ids
                ]
            }
        if query.function_id is None:
            raise BrokerError("INVALID_ARGUMENTS", "Give function_id or function_ids.")
        info = self._function_info(namespace, query.function_id)
        if info is None:
            raise _not_found(f"Function '{query.function_id}' is not registered.")
        return info

    def _workers_list(self, function_id: str, data: bytes) -> _Fields:
        query = _decode(function_id, data, _List)
        workers = [self._worker(info) for info in self._workers.values() if "pid" in info.fields]
        workers.append(_engine_worker())
        needle = (query.search or "").lower()
        return {
            "workers": sorted(
                (
                    w
                    for w in workers
                    if needle in (w["name"] or "").lower()
                    and query.runtime in (None, w["runtime"])
                    and query.status in (None, w["status"])
                ),
                key=lambda w: w["name"] or "",
            )
        }

    def _workers_info(self, function_id: str, data: bytes) -> _Fields:
        query = _decode(function_id, data, _WorkerInfo)
        for info in self._workers.values():
            if info.name == query.name:
                break
        else:
            if query.name != ENGINE_WORKER:
                raise _not_found(f"Worker '{query.name}' is not connected.")
            return {
                "worker": {**_engine_worker(), "internal": True},
                "functions": [self._function(*entry) for entry in _builtins()],
                "trigger_types": [_builtin_type(i) for i in sorted(BUILTIN_TYPES)],
                "registered_triggers": [],
            }
        worker = {**self._worker(info), "internal": False}
        if "pid" in info.fields:
            worker["pid"] = info.fields["pid"]
        return {
            "worker": worker,
            "functions": [
                self._function(key, r)
                for key, r in self._functions.served()
                if r.worker is info.worker
            ],
            "trigger_types": [t for t in self._all_types() if t["worker_name"] == info.name],
            "registered_triggers": [
                self._trigger(t) for t in self._triggers.active() if t.worker is info.worker
            ],
        }

    def _types_list(self, function_id: str, data: bytes) -> _Fields:
        query = _decode(function_id, data, _List)
        needle = (query.search or "").lower()
        return {
            "triggers": [
                t
                for t in self._all_types()
                if (query.include_internal or not t["id"].startswith("engine::"))
                and t["id"].startswith(query.prefix or "")
                and query.worker in (None, t["worker_name"])
                and (needle in t["id"].lower() or needle in (t["description"] or "").lower())
            ]
        }

    def _types_info(self, function_id: str, data: bytes) -> _Fields:
        query = _decode(function_id, data, _Id)
        info = self._type_info(query.id)
        if info is None:
            raise _not_found(
                f"Trigger type '{query.id}' is not registered in namespace"
                f" '{query.namespace or 'default'}'."
            )
        return info

    def _triggers_list(self, function_id: str, data: bytes) -> _Fields:
        query = _decode(function_id, data, _List)
        needle = (query.search or "").lower()
        found = []
        for trigger in self._triggers.active():
            fields = self._trigger(trigger)
            if (
                (query.include_internal or not trigger.function_id.startswith("engine::"))
                and query.trigger_type in (None, trigger.type)
                and query.function_id in (None, trigger.function_id)
                and query.worker in (None, fields["worker_name"])
                and any(
                    needle in t.lower() for t in (trigger.id, trigger.type, trigger.function_id)
                )
            ):
                found.append(fields)
        return {"registered_triggers": found}

    def _triggers_info(self, function_id: str, data: bytes) -> _Fields:
        query = _decode(function_id, data, _Id)
        trigger = self._triggers.find(query.id)
        if trigger is None:
            raise _not_found(f"Registered trigger '{query.id}' was not found.")
        fields = self._trigger(trigger)
        del fields["config_summary"]
        if trigger.metadata is not None:
            fields["metadata"] = Raw(trigger.metadata)
        fields["trigger"] = self._type_info(trigger.type)
        fields["function"] = self._function_info(trigger.namespace, trigger.function_id)
        return fields

    def _served(self) -> list[_Entry]:
        """The broker's own functions and the workers', sorted by id."""
        return sorted([*_builtins(), *self._functions.served()], key=lambda entry: entry[0][::-1])

    def _find(self, namespace: str, function_id: str) -> Registration[Executor] | _Builtin | None:
        if function_id in BUILTINS:
            return _Builtin(function_id)
        return self._functions.find(namespace, function_id)

    def _function(self, key: Key, registration: Registration[Executor] | _Builtin) -> _Fields:
        definition = registration.definition
        fields: _Fields = {
            "function_id": key[1],
            "namespace": key[0],
            "worker_name": self._owner_name(key[1], registration),
        }
        if definition.description is not None:
            fields["description"] = definition.description
        if (metadata := present(definition.metadata)) is not None:
            fields["metadata"] = Raw(metadata)
        return fields

    def _function_info(self, namespace: str, function_id: str) -> _Fields | None:
        registration = self._find(namespace, function_id)
        if registration is None:
            return None
        fields = self._function((namespace, function_id), registration)
        definition = registration.definition
        if (schema := present(definition.request_format)) is not None:
            fields["request_schema"] = Raw(schema)
        if (schema := present(definition.response_format)) is not None:
            fields["response_schema"] = Raw(schema)
        fields["registered_triggers"] = [
            {"id": t.id, "trigger_type": t.type, "config": Raw(t.config)}
            for t in self._triggers.active()
            if t.function_id == function_id and t.namespace == namespace
        ]
        return fields

    def _all_types(self) -> list[_Fields]:
        types = [_builtin_type(i) for i in BUILTIN_TYPES]
        for type_id, kind in self._triggers.types().items():
            types.append(
                {
                    "id": type_id,
                    "namespace": "default",
                    "worker_name": self._worker_name(kind.provider) or id_prefix(type_id),
                    "description": kind.definition.description or "",
                }
            )
        return sorted(types, key=lambda t: str(t["id"]))

    def _type_info(self, type_id: str) -> _Fields | None:
        for fields in self._all_types():
            if fields["id"] == type_id:
                break
        else:
            return None
        if (kind := self._triggers.types().get(type_id)) is not None:
            definition = kind.definition
            if (schema := present(definition.trigger_request_format)) is not None:
                fields["configuration_schema"] = Raw(schema)
            if (schema := present(definition.call_request_format)) is not None:
                fields["request_schema"] = Raw(schema)
        fields["instance_count"] = sum(t.type == type_id for t in self._triggers.active())
        return fields

    def _trigger(self, trigger: Trigger) -> _Fields:
        config = trigger.config
        summary = msgspec.json.format(config, indent=-1).decode()
        if len(summary) > SUMMARY_CHARACTERS_MAX:
            summary = summary[:SUMMARY_CHARACTERS_MAX] + "…"
        return {
            "id": trigger.id,
            "trigger_type": trigger.type,
            "function_id": trigger.function_id,
            "worker_name": self._owner_name(
                trigger.function_id, self._find(trigger.namespace, trigger.function_id)
            ),
            "config": Raw(config),
            "config_summary": summary,
        }

    def _worker(self, info: WorkerInfo) -> _Fields:
        get = info.fields.get
        return {
            "id": info.worker_id,
            "name": info.name,
            "description": get("description"),
            "version": get("version"),
            "namespace": get("namespace") or "default",
            "runtime": get("runtime"),
            "os": get("os"),
            "status": "connected",
            "function_count": self._functions.served_by(info.worker),
            "connected_at_ms": info.connected_at_ms,
            "active_invocations": self._invocations.active(info.worker),
            "isolation": get("isolation"),
            "ip_address": info.ip_address,
        }

    def _worker_name(self, worker: Executor) -> str | None:
        info = self._workers.get(worker.worker_id)
        return info.name if info is not None else None

    def _owner_name(
        self, function_id: str, registration: Registration[Executor] | _Builtin | None
    ) -> str:
        """The name of a function's worker, or the first part of its id."""
        if isinstance(registration, _Builtin):
            return ENGINE_WORKER if function_id in STREAM_FUNCTIONS else "engine"
        name = self._worker_name(registration.worker) if registration is not None else None
        return name or id_prefix(function_id)


class Availability:
    """Fires the availability triggers; functions' at most once a second."""

    def __init__(self, triggers: Triggers, functions: Callable[[], list[_Fields]]) -> None:
        self._triggers = triggers
        self._functions = functions
        self._told: set[str] = set()
        self._timer: asyncio.TimerHandle | None = None

    def worker(self, event: str, worker_id: str) -> None:
        """A worker connected, said who it is, or left."""
        data = _encode({"event": event, "worker_id": worker_id})
        self._triggers.fire_engine(WORKERS_AVAILABLE, data)

    def functions_changed(self) -> None:
        """Functions came or went."""
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(AVAILABILITY_INTERVAL_S, self._tell)

    def _tell(self) -> None:
        self._timer = None
        functions = self._functions()
        ids = {fields["function_id"] for fields in functions}
        if ids != self._told:
            self._told = ids
            data = _encode({"event": "functions_changed", "functions": functions})
            self._triggers.fire_engine(FUNCTIONS_AVAILABLE, data)


def _decode(function_id: str, data: bytes, kind: type[_Input]) -> _Input:
    try:
        return msgspec.json.decode(b"{}" if data == b"null" else data, type=kind)
    except msgspec.DecodeError as error:
        raise deserialization_error(function_id, error) from None


def _rank(search: str | None, function_id: str, description: str | None) -> int | None:
    """0 for a good match of `search`, more for a worse one, None for none."""
    needle = (search or "").lower()
    name = function_id.lower()
    if name.startswith(needle) or needle in name.split("::"):
        return 0
    if needle in name:
        return 1
    return 2 if needle in (description or "").lower() else None


def _is_internal(function_id: str, definition: RegisterFunction) -> bool:
    if function_id.startswith("engine::") or function_id in BROKER_FUNCTIONS:
        return True
    metadata = present(definition.metadata)
    if metadata is None or not metadata.startswith(b"{"):
        return False
    fields = msgspec.json.decode(metadata, type=dict[str, Raw])
    return bytes(fields.get("internal", Raw())) == b"true"


def _builtin_type(type_id: str) -> _Fields:
    return {
        "id": type_id,
        "namespace": "default",
        "worker_name": "engine" if type_id.startswith("engine::") else ENGINE_WORKER,
        "description": BUILTIN_TYPES[type_id],
    }


def _engine_worker() -> _Fields:
    return {
        "id": ENGINE_WORKER,
        "name": ENGINE_WORKER,
        "description": "Build durable streams for real-time data subscriptions.",
        "version": None,
        "namespace": "default",
        "runtime": "engine",
        "os": None,
        "status": "available",
        "function_count": len(STREAM_FUNCTIONS),
        "connected_at_ms": 0,
        "active_invocations": 0,
        "isolation": "in-process",
        "ip_address": None,
    }


def _builtins() -> list[_Entry]:
    return [(("default", function_id), _Builtin(function_id)) for function_id in BUILTINS]


def _not_found(message: str) -> BrokerError:
    return BrokerError("NOT_FOUND", message)
