"""The auth function: what it is asked, and what its answers mean (protocol section 6.1)."""

from __future__ import annotations

import time
from enum import StrEnum

import msgspec
from websockets.http11 import Request

from broker import logs
from broker.config import Limits
from gateway.invocations import Invocations, Result

_NULL = msgspec.Raw(b"null")

_log = logs.Log("auth")


class Outcome(StrEnum):
    """Of asking; the label of the metric."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    FAILED = "failed"
    UNAVAILABLE = "unavailable"
    OVERLOADED = "overloaded"


class Verdict(msgspec.Struct, frozen=True):
    """What was decided.

    context: JSON text, `null` for none.
    expires_at_ms: when the connection has to be closed; None: never.
    """

    outcome: Outcome
    context: bytes = b"null"
    expires_at_ms: float | None = None


class Auth:
    """Asks the auth function; without one, everybody is let in."""

    def __init__(self, function_id: str | None, invocations: Invocations, limits: Limits) -> None:
        self.function_id = function_id
        self._invocations = invocations
        self.limits = limits
        self.waiting = 0
        self.outcomes_total = dict.fromkeys(Outcome, 0)

    async def ask(self, question: bytes) -> Verdict:
        """Ask with what `auth_input` or `renewal_input` made. Fails closed."""
        verdict = await self._ask(question)
        self.outcomes_total[verdict.outcome] += 1
        if verdict.outcome not in (Outcome.ACCEPTED, Outcome.REFUSED):
            _log.warning("auth_failed", function=self.function_id, outcome=verdict.outcome)
        return verdict

    async def _ask(self, question: bytes) -> Verdict:
        assert self.function_id is not None, "nobody to ask"
        limits = self.limits
        if self.waiting >= limits.auth_waiting_max:
            return Verdict(Outcome.OVERLOADED)
        self.waiting += 1
        try:
            result = await self._invocations.call(
                self.function_id, question, limits.auth_timeout_s, resend=True
            )
        finally:
            self.waiting -= 1
        return judge(result, time.time() * 1000, limits.auth_context_bytes_max)


def auth_input(request: Request, address: str) -> bytes:
    """The JSON text that the auth function is given."""
    path, _, query = request.path.partition("?")
    headers: dict[str, str] = {}
    for name, value in request.headers.raw_items():
        if all(" " <= c <= "~" or c == "\t" for c in value):
            headers[name.lower()] = value
    query_params: dict[str, list[str]] = {}
    for part in query.split("&"):
        name, _, value = part.partition("=")
        if name:
            query_params.setdefault(name, []).append(value)
    return msgspec.json.encode(
        {"headers": headers, "path": path, "query_params": query_params, "addr": address}
    )


def renewal_input(question: bytes, data: bytes) -> bytes:
    """The same for a client that sends a fresh token: its handshake's `auth_input` and `data`."""
    return question.removesuffix(b"}") + b',"data":' + data + b"}"


def judge(result: Result, now_ms: float, context_bytes_max: int) -> Verdict:
    """What the function's answer means; only an object that does not refuse lets in."""
    if result.error is not None:
        return Verdict(_outcome_of_error(result.error))
    text = (result.result or b"null").strip()
    if not text.startswith(b"{"):
        refused = text == b"null"
        return Verdict(Outcome.REFUSED if refused else Outcome.FAILED)
    answer = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    if "authorized" in answer and bytes(answer["authorized"]) != b"true":
        return Verdict(Outcome.REFUSED)
    if "unauthorized" in answer and bytes(answer["unauthorized"]) != b"false":
        return Verdict(Outcome.REFUSED)
    context = bytes(answer.get("context", _NULL))
    try:
        expires_at_ms = msgspec.json.decode(answer.get("expires_at", _NULL), type=float | None)
    except msgspec.DecodeError:
        return Verdict(Outcome.FAILED)
    if len(context) > context_bytes_max:
        return Verdict(Outcome.FAILED)
    if expires_at_ms is not None and expires_at_ms <= now_ms:
        return Verdict(Outcome.REFUSED)
    return Verdict(Outcome.ACCEPTED, context, expires_at_ms)


def _outcome_of_error(error: bytes) -> Outcome:
    """Nobody there to answer, or an answer that is a failure."""
    try:
        code = msgspec.json.decode(error, type=dict[str, object]).get("code")
    except msgspec.DecodeError:
        return Outcome.FAILED
    gone = ("function_not_found", "invocation_stopped", "timeout", "worker_overloaded")
    return Outcome.UNAVAILABLE if code in gone else Outcome.FAILED
