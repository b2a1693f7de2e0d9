"""Calls to functions of workers: who waits for which answer (protocol section 4)."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import msgspec

from broker.errors import BrokerError, LimitExceeded
from broker.messages import Trace
from gateway.deadlines import Deadlines
from gateway.functions import Functions
from gateway.worker_protocol import InvocationResult, error_text, invoke_function, present


class Result(msgspec.Struct, frozen=True, gc=False):
    """How a call ended: `error` (JSON text of the error object) or `result` (JSON text or None)."""

    result: bytes | None = None
    error: bytes | None = None


K = TypeVar("K")

Answered = Callable[[Result], None]


class Executor(Protocol):
    """A worker that functions can be called on."""

    worker_id: str

    def send_call(self, payload: bytes, invocation_id: str | None) -> bool:
        """Send a call, with its id if anybody waits for the answer; False when too much waits for
        the worker already."""

    def forget(self, invocation_id: str) -> None:
        """Nobody waits for the answer any more."""


class Invocation:
    """A call that waits for its answer.

    `again`: namespace and payload of a call that another worker is sent when the one that got it
    leaves without an answer. `deadlines`: where it stands, if it is not waited for without end.
    """

    __slots__ = ("again", "answered", "caller", "deadlines", "executor", "function_id")

    def __init__(
        self,
        function_id: str,
        executor: Executor,
        caller: object,
        answered: Answered,
        *,
        again: tuple[str, bytes] | None,
        deadlines: Deadlines | None,
    ) -> None:
        self.function_id = function_id
        self.executor = executor
        self.caller = caller
        self.answered = answered
        self.again = again
        self.deadlines = deadlines


class Invocations:
    """Calls under way, by ids of the broker's own.

    Args:
        in_flight_max: of the calls of one caller.
        patience_s: for an answer that nobody waits for; see `patience`.
    """

    def __init__(
        self, functions: Functions[Executor], in_flight_max: int, patience_s: float
    ) -> None:
        self._functions = functions
        self.in_flight_max = in_flight_max
        self.patience = Deadlines(patience_s, self._settle_late)
        """Of calls to triggers' handlers."""
        self._within: dict[float, Deadlines] = {}  # by seconds: the few that are configured
        self._ids = _new_ids()
        self._pending: dict[str, Invocation] = {}
        self._by_executor: dict[Executor, dict[str, None]] = {}
        self._by_caller: dict[object, dict[str, None]] = {}
        self.invocations_total = 0
        self.too_many_total = 0
        self.overloaded_total = 0
        self.resent_total = 0
        self.on_foreign_answer: Callable[[Executor, str, Result], None] = _ignored
        """Takes an answer to a call that was not made here."""

    def __len__(self) -> int:
        return len(self._pending)

    def active(self, worker: Executor) -> int:
        """Calls that the worker made or executes, and that are not answered."""
        made = len(self._by_caller.get(worker, ()))
        return made + len(self._by_executor.get(worker, ()))

    def serves(self, namespace: str, function_id: str) -> bool:
        """Whether a worker has the function."""
        return self._functions.find(namespace, function_id) is not None

    def invoke(
        self,
        function_id: str,
        data: bytes,
        answered: Answered | None,
        *,
        namespace: str = "default",
        caller: object = None,
        trace: Trace | None = None,
        metadata: bytes | None = None,
        resend: bool = False,
        deadlines: Deadlines | None = None,
    ) -> None:
        """Call a function; `answered` is told how it ended, possibly at once.

        With `resend` a call whose worker leaves without an answer goes to the worker that takes
        the function over, if there is one. With `deadlines` it ends, with an error, when there
        is no answer within these.
        """
        registration = self._functions.find(namespace, function_id)
        if registration is None:
            _ended(answered, not_found(function_id, namespace))
            return
        made = self._by_caller.get(caller, ()) if caller is not None else ()
        if len(made) >= self.in_flight_max:
            self.too_many_total += 1
            _ended(
                answered,
                LimitExceeded(
                    "too_many_calls",
                    f"{self.in_flight_max} calls of this connection wait for an answer",
                    retryable=True,
                ),
            )
            return
        executor = registration.worker
        invocation_id = next(self._ids)
        payload = invoke_function(
            invocation_id,
            function_id,
            data,
            traceparent=None if trace is None else trace.traceparent,
            baggage=None if trace is None else trace.baggage,
            metadata=metadata,
        )
        if not executor.send_call(payload, None if answered is None else invocation_id):
            self.overloaded_total += 1
            _ended(
                answered,
                LimitExceeded(
                    "worker_overloaded",
                    f"the worker that serves {function_id} does not take its calls",
                    retryable=True,
                ),
            )
            return
        self.invocations_total += 1
        if answered is None:
            return
        self._pending[invocation_id] = Invocation(
            function_id,
            executor,
            caller,
            answered,
            again=(namespace, payload) if resend else None,
            deadlines=deadlines,
        )
        self._by_executor.setdefault(executor, {})[invocation_id] = None
        if caller is not None:
            self._by_caller.setdefault(caller, {})[invocation_id] = None
        if deadlines is not None:
            deadlines.add(invocation_id)

    def deadlines(self, wait_s: float) -> Deadlines:
        """Those of calls that are given `wait_s` each."""
        deadlines = self._within.get(wait_s)
        if deadlines is None:
            deadlines = self._within[wait_s] = Deadlines(wait_s, self._settle_late)
        return deadlines

    def call_within(
        self,
        timeout_s: float,
        function_id: str,
        data: bytes,
        answered: Answered,
        *,
        namespace: str = "default",
        metadata: bytes | None = None,
        resend: bool = False,
        trace: Trace | None = None,
    ) -> None:
        """`invoke` for the broker itself, with a limit on the wait for the answer."""
        self.invoke(
            function_id,
            data,
            answered,
            namespace=namespace,
            trace=trace,
            metadata=metadata,
            resend=resend,
            deadlines=self.deadlines(timeout_s),
        )

    async def call(
        self,
        function_id: str,
        data: bytes,
        timeout_s: float,
        *,
        namespace: str = "default",
        metadata: bytes | None = None,
        resend: bool = False,
        trace: Trace | None = None,
    ) -> Result:
        """`call_within`, awaited."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()

        def answered(result: Result) -> None:
            if not future.done():
                future.set_result(result)

        self.call_within(
            timeout_s,
            function_id,
            data,
            answered,
            namespace=namespace,
            metadata=metadata,
            resend=resend,
            trace=trace,
        )
        return await future

    def answer(self, executor: Executor, message: InvocationResult) -> None:
        """An answer came; ignored unless it is of a call that `executor` was sent."""
        result = Result(present(message.result), present(message.error))
        self._answered(executor, message.invocation_id, result)

    def answer_undecodable(self, executor: Executor, invocation_id: str, error: bytes) -> None:
        """An answer came that can't be read: the caller is told so."""
        self._answered(executor, invocation_id, Result(error=error))

    def answered_elsewhere(self, invocation_id: str, result: Result) -> None:
        """A worker of another gateway answered."""
        if invocation_id in self._pending:
            self._settle(invocation_id, result)

    def _answered(self, executor: Executor, invocation_id: str, result: Result) -> None:
        invocation = self._pending.get(invocation_id)
        if invocation is None:
            self.on_foreign_answer(executor, invocation_id, result)
        elif invocation.executor is executor:
            self._settle(invocation_id, result)

    def remove_worker(self, worker: Executor) -> None:
        """The worker left, its functions are gone already: calls to it go to the next worker or
        fail, its own are forgotten."""
        for invocation_id in list(self._by_caller.get(worker, ())):
            self._remove(invocation_id).executor.forget(invocation_id)
        stopped = Result(error=error_text(BrokerError("invocation_stopped", "Invocation stopped")))
        for invocation_id in list(self._by_executor.get(worker, ())):
            if not self._resend(invocation_id):
                self._settle(invocation_id, stopped)

    def _resend(self, invocation_id: str) -> bool:
        """Send the call to the worker that serves its function now; False when it can't be."""
        invocation = self._pending[invocation_id]
        if invocation.again is None:
            return False
        namespace, payload = invocation.again
        registration = self._functions.find(namespace, invocation.function_id)
        if registration is None or not registration.worker.send_call(payload, invocation_id):
            return False
        self.resent_total += 1
        _discard(self._by_executor, invocation.executor, invocation_id)
        invocation.executor = registration.worker
        self._by_executor.setdefault(registration.worker, {})[invocation_id] = None
        return True

    def _settle_late(self, invocation_id: str) -> None:
        invocation = self._pending[invocation_id]
        deadlines = invocation.deadlines
        assert deadlines is not None, "it was late for one of them"
        error = BrokerError(
            "timeout", f"{invocation.function_id} did not answer within {deadlines.wait_s:g} s"
        )
        invocation.executor.forget(invocation_id)
        self._settle(invocation_id, Result(error=error_text(error)))

    def _settle(self, invocation_id: str, result: Result) -> None:
        self._remove(invocation_id).answered(result)

    def _remove(self, invocation_id: str) -> Invocation:
        invocation = self._pending.pop(invocation_id)
        if invocation.deadlines is not None:
            invocation.deadlines.discard(invocation_id)
        _discard(self._by_executor, invocation.executor, invocation_id)
        if invocation.caller is not None:
            _discard(self._by_caller, invocation.caller, invocation_id)
        return invocation


def _ignored(executor: Executor, invocation_id: str, result: Result) -> None:
    """Where no other gateway calls our workers."""


def _ended(answered: Answered | None, error: BrokerError) -> None:
    """Tell that a call ended before it began."""
    if answered is not None:
        answered(Result(error=error_text(error)))


def not_found(function_id: str, namespace: str) -> BrokerError:
    """No worker serves the function."""
    return BrokerError(
        "function_not_found", f"Function {function_id} not found in namespace {namespace}."
    )


def _new_ids() -> Iterator[str]:
    """Ids of calls: UUIDs, which SDKs take them for. Nobody has to guess them, as only the worker
    that was called can answer, so one random half does for all."""
    first = str(uuid.uuid4())[:24]
    return (f"{first}{number:012x}" for number in itertools.count())


def _discard(index: dict[K, dict[str, None]], key: K, invocation_id: str) -> None:
    ids = index[key]
    ids.pop(invocation_id, None)
    if not ids:
        del index[key]
