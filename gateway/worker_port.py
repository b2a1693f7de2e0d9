"""The worker port: workers' connections, and what each of their messages does.

Protocol sections 2 to 4.
"""

from __future__ import annotations

import hmac
import time
import unicodedata
import uuid
from collections.abc import Collection
from functools import partial
from http import HTTPStatus
from typing import Any, assert_never

import msgspec
from websockets.frames import CloseCode
from websockets.http11 import Request

from broker import logs
from broker.clock import wall_clock_ms
from broker.config import Limits
from broker.errors import BrokerError, InvalidRequest
from broker.messages import Reply, Trace
from gateway import worker_protocol as wire
from gateway.access import origin_allowed, token_given
from gateway.broker_functions import BrokerFunctions
from gateway.connection import PAUSED_BY_WORK, Connection
from gateway.engine_functions import Availability, EngineFunctions, WorkerInfo
from gateway.functions import BUILTINS, Functions
from gateway.invocations import Executor, Invocations, Result
from gateway.listener import Listener
from gateway.peers import Peers
from gateway.shard_links import Answer
from gateway.stream_calls import StreamCalls
from gateway.throttle import Throttle
from gateway.triggers import Triggers
from gateway.websocket import text_frame

STREAM_CALLS_MAX = 2048
"""`stream::*` calls of one connection under way; past it no more is read from it for now."""
NAME_CHARACTERS_MAX = 280

_TELEMETRY = (b"OTLP", b"MTRC", b"LOGS")
_REGISTER = "engine::workers::register"

_log = logs.Log("worker_port")


class WorkerPort(Listener):
    """Accepts workers and knows those that are connected."""

    def __init__(
        self,
        limits: Limits,
        *,
        allowed_origins: Collection[str],
        token: str,
        functions: Functions[Executor],
        invocations: Invocations,
        triggers: Triggers,
        stream_calls: StreamCalls,
        broker_functions: BrokerFunctions,
        peers: Peers,
    ) -> None:
        super().__init__(
            "worker",
            limits,
            limits.worker_message_bytes_max,
            limits.worker_send_queue_bytes_max,
            CloseCode.POLICY_VIOLATION,
        )
        self.allowed_origins = allowed_origins
        self.token = token
        self.functions = functions
        self.invocations = invocations
        self.triggers = triggers
        self.stream_calls = stream_calls
        self.broker_functions = broker_functions
        self.peers = peers
        self.workers: dict[str, Worker] = {}
        self.infos: dict[str, WorkerInfo] = {}
        self.engine = EngineFunctions(functions, invocations, triggers, self.infos)
        self.availability = Availability(triggers, self.engine.all_functions)
        self.undecodable_total = 0

    def reattach(self, worker_id: str, token: str) -> None:
        """Part with a worker's old connection, if the token is its."""
        if (worker := self.workers.get(worker_id)) is not None:
            worker.replaced(token)

    def request_received(self, connection: Connection, request: Request) -> None:
        path = request.path.partition("?")[0]
        if path not in ("/", "/otel"):
            self.refuse(connection, HTTPStatus.NOT_FOUND, "", "not_found")
        elif not origin_allowed(request.headers, self.allowed_origins):
            # Any web page can reach its visitor's loopback.
            self.refuse(connection, HTTPStatus.FORBIDDEN, "origin not allowed\n", "origin")
        elif path == "/" and self.token and not token_given(request.headers, self.token):
            # Not for telemetry: there is nothing to be had, and not every SDK sends it there.
            text = "send the worker token as Authorization: Bearer\n"
            self.refuse(connection, HTTPStatus.UNAUTHORIZED, text, "unauthorized")
        elif (response := connection.check_handshake(request)) is not None:
            self.count_refused("bad_request")
            connection.respond(response)
        elif not self.admit(connection, connection.remote_address):
            pass
        elif path == "/otel":
            connection.accept(_Telemetry())
        else:
            Worker(self, connection).start()


class _Telemetry:
    """A telemetry connection: accepted and discarded (section 4.8)."""

    def message_received(self, text: bytes) -> None:
        """Discard it."""

    def drained(self) -> None:
        """Nothing is ever sent."""

    def closed(self) -> None:
        """Nothing is kept."""


class Worker:
    """A connected worker."""

    def __init__(self, port: WorkerPort, connection: Connection) -> None:
        self._port = port
        self._connection = connection
        self.worker_id = str(uuid.uuid4())
        self._token = str(uuid.uuid4())
        self._namespace = "default"
        self._stream_calls = 0
        self._reading_paused = False
        self._gone = False
        per_s = port.limits.worker_messages_per_s_max
        self._throttle = Throttle(connection, per_s, self._read_on) if per_s else None
        self.info = WorkerInfo(
            self, self.worker_id, int(time.time() * 1000), connection.remote_address
        )

    def start(self) -> None:
        """Greet the worker: it may send from now on."""
        if not self._connection.accept(self):
            return
        self._port.workers[self.worker_id] = self
        self._port.infos[self.worker_id] = self.info
        self.send(wire.worker_registered(self.worker_id, self._token))
        self._port.availability.worker("worker_connected", self.worker_id)
        self._port.peers.worker_is(self.info, "worker_connected")
        _log.info("worker_connected", id=self.worker_id, remote=self._connection.remote_address)

    # Sending.

    def send_call(self, payload: bytes, invocation_id: str | None) -> bool:
        """Send a call; False when too much waits for the worker already."""
        return self._connection.send(text_frame(payload))

    def forget(self, invocation_id: str) -> None:
        """The answer is ignored when it comes."""

    def send(self, payload: bytes) -> None:
        """Send what must not be lost; a worker that leaves too much unread is cut off."""
        if not self._connection.send(text_frame(payload)):
            _log.warning("worker_too_slow", id=self.worker_id)
            self._connection.abort()

    def _answer_result(self, call: wire.InvokeFunction, result: bytes | None) -> None:
        if call.answered:
            self.send(wire.invocation_result(call, result))

    def _answer_error(self, call: wire.InvokeFunction, error: bytes) -> None:
        if call.answered:
            self.send(wire.invocation_error(call, error))

    # What the connection calls.

    def drained(self) -> None:
        self._read_on()

    def closed(self) -> None:
        self._retire()

    def message_received(self, text: bytes) -> None:
        if self._gone or text.startswith(_TELEMETRY):
            return
        if self._throttle is not None:
            self._port.throttled_total += self._throttle.count()
        try:
            message = wire.decode(text)
        except InvalidRequest as error:
            self._undecodable(text, error)
            return
        match message:
            case wire.InvokeFunction():
                self._invoke(message)
            case wire.InvocationResult():
                self._port.invocations.answer(self, message)
            case wire.RegisterFunction():
                self._register_function(message)
            case wire.UnregisterFunction():
                self._port.functions.unregister(self._namespace, self, message.id)
                self._port.availability.functions_changed()
                self._port.peers.registered(self, message)
            case wire.RegisterTriggerType():
                if (kind := self._port.triggers.register_type(self, message)) is not None:
                    self._port.peers.type_registered(kind)
            case wire.UnregisterTriggerType():
                self._port.triggers.unregister_type(self, message.id)
                self._port.peers.registered(self, message)
            case wire.RegisterTrigger():
                if (trigger := self._port.triggers.register(self, message)) is not None:
                    self._port.peers.trigger_registered(trigger)
            case wire.UnregisterTrigger():
                self._port.triggers.unregister(self, message.id)
                self._port.peers.registered(self, message)
            case wire.TriggerRegistrationResult():
                fault = wire.present(message.error)
                self._port.triggers.provider_answered(self, message.id, fault)
            case wire.Reattach():
                self._reattach(message)
            case wire.Ping():
                self.send(wire.PONG)
            case None:
                pass
            case _:
                assert_never(message)

    # What the messages do.

    def _undecodable(self, text: bytes, error: InvalidRequest) -> None:
        self._port.undecodable_total += 1
        _log.debug("message_undecodable", id=self.worker_id, reason=error.message)
        found = wire.look_into(text)
        if found.invocation_id is None:
            return
        if found.is_result:
            self._port.invocations.answer_undecodable(
                self, found.invocation_id, wire.error_text(error)
            )
            return
        call = wire.InvokeFunction(found.function_id, invocation_id=found.invocation_id)
        self._answer_error(call, wire.error_text(error))

    def _register_function(self, message: wire.RegisterFunction) -> None:
        owner_id: str | None = None
        if wire.present(message.invocation) is not None:
            _log.warning("function_refused", id=message.id, reason="http functions are not offered")
            return
        if message.id in BUILTINS:
            owner_id = ""
        else:
            at_ms = wall_clock_ms()
            owner = self._port.functions.register(self._namespace, self, message, at_ms=at_ms)
            self._port.peers.registered(self, message, at_ms)
            self._port.availability.functions_changed()
            self._port.triggers.functions_changed()
            if owner is not None:
                owner_id = owner.worker_id
        if owner_id is not None:
            self.send(wire.registration_rejected(self._namespace, message.id, owner_id))

    def _invoke(self, call: wire.InvokeFunction) -> None:
        refusal = _refusal(call)
        if refusal is not None:
            self._answer_error(call, wire.error_text(refusal))
            return
        self._stream_calls += 1
        if self._port.stream_calls.call(
            call.function_id,
            bytes(call.data),
            partial(self._stream_answered, call),
            _trace_of(call),
        ):
            if self._stream_calls >= STREAM_CALLS_MAX and not self._reading_paused:
                self._reading_paused = True
                self._port.paused_total += 1
                self._connection.pause_reading(PAUSED_BY_WORK)
            return
        self._stream_calls -= 1
        data, answered = bytes(call.data), partial(self._answered, call)
        if self._port.broker_functions.call(call.function_id, data, answered):
            return
        if call.function_id == _REGISTER:
            self._register_worker(call)
        elif call.function_id in BUILTINS:
            self._engine_call(call)
        else:
            self._forward(call)

    def _stream_answered(self, call: wire.InvokeFunction, answer: Answer) -> None:
        self._stream_calls -= 1
        self._answered(call, answer)
        if self._reading_paused:
            self._read_on()

    def _answered(self, call: wire.InvokeFunction, answer: Answer) -> None:
        if isinstance(answer, Reply):
            self._answer_result(call, answer.result)
        else:
            assert isinstance(answer, BrokerError), "only joins are answered with a sync"
            self._port.stream_calls.count_failure(call.function_id, answer.code)
            self._answer_error(call, wire.error_text(answer))

    def _read_on(self) -> None:
        if self._reading_paused and self._stream_calls <= STREAM_CALLS_MAX // 2:
            self._reading_paused = False
            self._connection.resume_reading(PAUSED_BY_WORK)

    def _engine_call(self, call: wire.InvokeFunction) -> None:
        try:
            result = self._port.engine.call(call.function_id, bytes(call.data))
        except BrokerError as error:
            self._answer_error(call, wire.error_text(error))
        else:
            self._answer_result(call, result)

    def _forward(self, call: wire.InvokeFunction) -> None:
        answered = partial(self._forward_answered, call) if call.answered else None
        self._port.invocations.invoke(
            call.function_id,
            wire.with_caller(bytes(call.data), self.worker_id),
            answered,
            namespace=call.namespace if call.namespace is not None else "default",
            caller=self,
            trace=_trace_of(call),
            metadata=wire.present(call.metadata),
        )

    def _forward_answered(self, call: wire.InvokeFunction, result: Result) -> None:
        if result.error is not None:
            self._answer_error(call, result.error)
        else:
            self._answer_result(call, result.result)

    def _register_worker(self, call: wire.InvokeFunction) -> None:
        try:
            data = msgspec.json.decode(bytes(call.data))
        except (msgspec.DecodeError, RecursionError):
            data = None
        if data is None:
            data = {}
        if not isinstance(data, dict):
            error = InvalidRequest(
                "deserialization_error",
                f"Failed to deserialize input for {_REGISTER}: invalid type, expected an object",
            )
            self._answer_error(call, wire.error_text(error))
            return
        namespace = data.get("namespace")
        if isinstance(namespace, str) and not namespace.strip():
            blank = InvalidRequest("INVALID_NAMESPACE", "namespace is blank", "namespace")
            self._answer_error(call, wire.error_text(blank))
            return
        self.info.update(data, _label)
        if isinstance(namespace, str) and namespace != self._namespace:
            self._port.functions.move_worker(self, self._namespace, namespace)
            self._namespace = self.info.namespace = namespace
            self._port.triggers.functions_changed()
        self._port.availability.worker("worker_metadata_updated", self.worker_id)
        self._port.peers.worker_is(self.info, "worker_metadata_updated")
        self._answer_result(call, b'{"success":true}')

    def _reattach(self, message: wire.Reattach) -> None:
        previous, token = message.previous_worker_id, message.reattach_token
        if token is None or previous == self.worker_id:
            return
        self._port.reattach(previous, token)
        self._port.peers.reattach(previous, token)

    def replaced(self, token: str) -> None:
        """The worker has another connection now, if the token is the one that it was given."""
        if hmac.compare_digest(self._token.encode(), token.encode()):
            self._retire()
            self._connection.close(CloseCode.NORMAL_CLOSURE, "replaced by a new connection")

    def _retire(self) -> None:
        """Take all that is the worker's out (section 2.5)."""
        if self._gone:
            return
        self._gone = True
        port = self._port
        del port.workers[self.worker_id]
        del port.infos[self.worker_id]
        port.functions.remove_worker(self)
        port.invocations.remove_worker(self)
        port.triggers.remove_worker(self)
        port.availability.functions_changed()
        port.availability.worker("worker_disconnected", self.worker_id)
        port.peers.worker_gone(self)
        _log.info("worker_disconnected", id=self.worker_id)


def _trace_of(call: wire.InvokeFunction) -> Trace | None:
    if call.traceparent is None and call.baggage is None:
        return None
    return Trace(call.traceparent, call.baggage)


def _refusal(call: wire.InvokeFunction) -> BrokerError | None:
    """Why a call is not made at all."""
    action = call.action
    if action is not None and action.type != "void":
        if action.type == "enqueue" and action.queue is not None:
            return BrokerError(
                "enqueue_error", "No queue provider is installed: enqueue is not offered", "action"
            )
        return InvalidRequest(
            "invalid_message",
            "action: type must be void, or enqueue with a queue",
            "action",
        )
    if call.namespace is not None and not call.namespace.strip():
        return InvalidRequest("INVALID_NAMESPACE", "namespace is blank", "namespace")
    return None


def _label(value: Any) -> str | None:
    """A name or description as it is shown: no control or direction characters, cut (2.3)."""
    if not isinstance(value, str):
        return None
    kept = "".join(c for c in value if unicodedata.category(c) not in ("Cc", "Cf"))
    return kept[:NAME_CHARACTERS_MAX].strip() or None
