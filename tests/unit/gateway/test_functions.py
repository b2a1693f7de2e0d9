"""Whose registration of a function is served, and who runs the operations on a stream."""

from __future__ import annotations

from gateway.functions import Functions
from gateway.worker_protocol import RegisterFunction


def registered(functions: Functions[str], function_id: str = "f") -> list[str]:
    return [r.worker for key, r in functions.all() if key[1] == function_id]


def test_our_own_come_before_others() -> None:
    functions = Functions[str]()
    f = RegisterFunction("f")
    functions.register("default", "there", f, remote=True)
    assert functions.register("default", "here", f) is None, "it is the one that is served"
    assert functions.register("default", "second", f) == "here"
    functions.register("default", "there 2", f, remote=True)
    assert registered(functions) == ["here", "second", "there", "there 2"]
    functions.remove_worker("here")
    found = functions.find("default", "f")
    assert found is not None
    assert found.worker == "second"
    functions.move_worker("there", "default", "other")
    assert registered(functions) == ["second", "there 2", "there"]
    functions.remove_worker("second")
    functions.remove_worker("there 2")
    assert functions.find("default", "f") is None


def test_the_first_worker_of_a_stream_runs_its_operations() -> None:
    """On all gateways alike, whichever of its functions a worker has."""

    def order(worker: str) -> str:
        return worker

    functions = Functions[str]()
    assert functions.custom_owner("s", order) is None
    functions.register("default", "late", RegisterFunction("stream::get(s)"), at_ms=7)
    functions.register("default", "b", RegisterFunction("stream::set(s)"), at_ms=5, remote=True)
    functions.register("default", "a", RegisterFunction("stream::get(s)"), at_ms=5, remote=True)
    functions.register("default", "no", RegisterFunction("stream::get(other)"), at_ms=1)
    functions.register("ns", "no", RegisterFunction("stream::get(s)"), at_ms=1)
    assert functions.custom_owner("s", order) == "a"
    functions.remove_worker("a")
    assert functions.custom_owner("s", order) == "b"
    functions.remove_worker("b")
    assert functions.custom_owner("s", order) == "late"
    assert functions.custom == {"s": 1, "other": 1}
