"""The auth function: what it is asked, and what its answers mean (protocol section 6.1)."""

from __future__ import annotations

from enum import StrEnum

import msgspec
from websockets.http11 import Request

from broker import logs
from gateway.invocations import Invocations, Result

_log = logs.Log("auth")


class Outcome(StrEnum):
    """Of asking; the label of the metric."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    FAILED = "failed"
    UNAVAILABLE = "unavailable"


class Verdict(msgspec.Struct, frozen=True):
    """What was decided; `context` is JSON text, `null` for none."""

    outcome: Outcome
    context: bytes = b"null"


class Auth:
    """Asks the auth function; without one, everybody is let in."""

    def __init__(self, function_id: str | None, invocations: Invocations, timeout_s: float) -> None:
        self.function_id = function_id
        self._invocations = invocations
        self._timeout_s = timeout_s
        self.outcomes_total = dict.fromkeys(Outcome, 0)

    async def ask(self, request: Request, address: str) -> Verdict:
        """Whether the handshake may go on. Fails closed."""
        assert self.function_id is not None, "nobody to ask"
        result = await self._invocations.call(
            self.function_id, auth_input(request, address), self._timeout_s
        )
        verdict = judge(result)
        self.outcomes_total[verdict.outcome] += 1
        if verdict.outcome not in (Outcome.ACCEPTED, Outcome.REFUSED):
            _log.warning("auth_failed", function=self.function_id, outcome=verdict.outcome)
        return verdict


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


def judge(result: Result) -> Verdict:
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
    return Verdict(Outcome.ACCEPTED, bytes(answer.get("context", msgspec.Raw(b"null"))))


def _outcome_of_error(error: bytes) -> Outcome:
    """Nobody there to answer, or an answer that is a failure."""
    try:
        code = msgspec.json.decode(error, type=dict[str, object]).get("code")
    except msgspec.DecodeError:
        return Outcome.FAILED
    gone = ("function_not_found", "invocation_stopped", "timeout", "worker_overloaded")
    return Outcome.UNAVAILABLE if code in gone else Outcome.FAILED
