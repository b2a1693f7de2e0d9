"""The trace of a call is passed on to what it causes; spans go to a collector when asked for."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from broker import tracing
from broker.errors import ConfigError
from tests.conftest import Run
from tests.support.broker import IN_MEMORY, Broker, StartFailed
from tests.support.calls import LONG_S, item
from tests.support.stream_client import StreamClient
from tests.support.worker import ABSENT, Failure, Worker

GROUP = {"stream_name": "chat", "group_id": "room"}
BAGGAGE = "user=ann"
TRACED = IN_MEMORY + "broker: {tracing: true}\n"


def traceparent(n: int) -> str:
    return f"00-{n + 1:032x}-{n + 1:016x}-01"


def given(frame: dict[str, Any]) -> tuple[Any, Any]:
    return frame.get("traceparent", ABSENT), frame.get("baggage", ABSENT)


def test_triggers_and_conditions_get_the_trace_of_the_call(any_broker: Broker, run: Run) -> None:
    """Each its own, also where calls share a commit; none where there was none."""

    async def main() -> None:
        worker = await Worker.open(any_broker.worker_url)
        await worker.register_function("told", lambda _: None)
        await worker.register_function("asked", lambda _: None)
        await worker.register_trigger("stream", "told", {"stream_name": "traced"})
        config = {"stream_name": "traced", "condition_function_id": "asked"}
        await worker.register_trigger("stream", "told", config)
        await worker.barrier()
        sent: dict[str, tuple[Any, Any]] = {}
        calls = []
        for n in range(60):
            fields: dict[str, Any] = {}
            if n % 3:
                fields["traceparent"] = traceparent(n)
            if n % 3 == 2:
                fields["baggage"] = BAGGAGE
            sent[f"i{n}"] = given(fields)
            data = item("traced", f"g{n % 5}", f"i{n}", data=n)
            calls.append(worker.call("stream::set", data, LONG_S, **fields))
        await asyncio.gather(*calls)
        asked = await worker.asked(3 * len(sent), LONG_S)
        found: dict[str, list[tuple[str, tuple[Any, Any]]]] = {}
        for call in asked:
            found.setdefault(call.data["id"], []).append((call.function_id, given(call.frame)))
        for item_id, trace in sent.items():
            assert sorted(found[item_id]) == [("asked", trace), ("told", trace), ("told", trace)]
        await worker.close()

    run(main())


@pytest.mark.parametrize(
    ("function", "more"),
    [
        ("stream::set", {"item_id": "i", "data": 1}),
        ("stream::update", {"item_id": "i", "ops": [{"type": "set", "path": "", "value": 2}]}),
        ("stream::delete", {"item_id": "i"}),
        ("stream::send", {"type": "ping", "data": {}, "id": "i"}),
    ],
)
def test_every_write_passes_it_on(
    function: str, more: dict[str, Any], memory_broker: Broker, run: Run
) -> None:
    async def main() -> None:
        worker = await Worker.open(memory_broker.worker_url)
        await worker.call("stream::set", item("writes", "g", "i", data=0))
        await worker.register_function("told", lambda _: None)
        await worker.register_trigger("stream", "told", {"stream_name": "writes"})
        await worker.barrier()
        data = {"stream_name": "writes", "group_id": "g", **more}
        await worker.void(function, data, traceparent=traceparent(1), baggage=BAGGAGE)
        (call,) = await worker.asked(1)
        assert given(call.frame) == (traceparent(1), BAGGAGE)
        await worker.close()

    run(main())


def test_a_worker_that_stores_a_stream_gets_it(memory_broker: Broker, run: Run) -> None:
    async def main() -> None:
        worker = await Worker.open(memory_broker.worker_url)
        stored = {"old_value": None, "new_value": 1}
        for name, answer in (("get", 1), ("set", stored), ("delete", {"old_value": 1})):
            await worker.register_function(f"stream::{name}(own)", lambda _, a=answer: a)
        await worker.register_function("told", lambda _: None)
        await worker.register_trigger("stream", "told", {"stream_name": "own"})
        await worker.barrier()
        data = item("own", "g", "i", data=1, ops=[{"type": "increment", "path": "", "by": 1}])
        for n, name in enumerate(("get", "set", "delete", "update")):
            fields = {"traceparent": traceparent(n), "baggage": BAGGAGE}
            answer = await worker.call(f"stream::{name}", data, **fields)
            assert "error" not in answer, answer
        expected = [("get", 0), ("set", 1), ("told", 1), ("delete", 2), ("told", 2)]
        expected += [("get", 3), ("set", 3), ("told", 3)]
        calls = await worker.asked(len(expected))
        found = sorted((call.function_id, *given(call.frame)) for call in calls)
        assert found == sorted(
            (name if name == "told" else f"stream::{name}(own)", traceparent(n), BAGGAGE)
            for name, n in expected
        )
        await worker.close()

    run(main())


# Spans.


class Collector:
    """Takes spans over OTLP. `spans` by name, `resources`: attributes of those who sent them."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.path == "/v1/traces"
                collector.requests.append(ExportTraceServiceRequest.FromString(body))
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def variables(self) -> dict[str, str]:
        """Of a broker that sends spans here, soon."""
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": self.url, "OTEL_BSP_SCHEDULE_DELAY": "50"}

    @property
    def spans(self) -> list[Span]:
        parts = [part for request in self.requests for part in request.resource_spans]
        return [span for part in parts for scope in part.scope_spans for span in scope.spans]

    @property
    def resources(self) -> list[dict[str, str]]:
        parts = [part for request in self.requests for part in request.resource_spans]
        return [
            {pair.key: pair.value.string_value for pair in part.resource.attributes}
            for part in parts
        ]

    def trace(self, trace_id: bytes, count: int) -> dict[str, Span]:
        """The spans of a trace by name, when there are `count`."""
        end = time.monotonic() + LONG_S
        while True:
            found = [span for span in self.spans if span.trace_id == trace_id]
            if len(found) >= count:
                assert len(found) == count
                return {span.name: span for span in found}
            assert time.monotonic() < end, found
            time.sleep(0.05)


@contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()
    try:
        yield collector
    finally:
        collector.close()


def test_spans_of_a_call_until_its_triggers(run: Run) -> None:
    async def main(broker: Broker, collector: Collector) -> None:
        worker = await Worker.open(broker.worker_url)
        await worker.register_function("told", lambda _: None)
        await worker.register_function("fails", lambda _: Failure("x", "y"))
        for function in ("told", "fails"):
            await worker.register_trigger("stream", function, GROUP)
        async with await StreamClient.open(broker.stream_url) as client:
            await client.join("chat", "room")
            fields = {"traceparent": traceparent(7), "baggage": BAGGAGE}
            await worker.call("stream::set", item("chat", "room", "i", data=1), **fields)
            calls = {call.function_id: call.frame for call in await worker.asked(2)}
        spans = await asyncio.to_thread(collector.trace, bytes.fromhex(f"{8:032x}"), 5)
        call, commit = spans["stream::set"], spans["commit"]
        fan_out, told = spans["fan-out"], spans["trigger told"]
        assert call.parent_span_id == bytes.fromhex(f"{8:016x}")
        assert commit.parent_span_id == call.span_id
        assert fan_out.parent_span_id == told.parent_span_id == commit.span_id
        assert call.start_time_unix_nano <= commit.start_time_unix_nano
        assert commit.end_time_unix_nano <= call.end_time_unix_nano
        assert call.kind == Span.SPAN_KIND_SERVER
        assert told.status.code == Status.STATUS_CODE_UNSET
        assert spans["trigger fails"].status.code == Status.STATUS_CODE_ERROR
        assert calls["told"]["traceparent"] == f"00-{8:032x}-{told.span_id.hex()}-01"
        assert calls["told"]["baggage"] == BAGGAGE
        attributes = {pair.key: pair.value for pair in commit.attributes}
        assert attributes["broker.stream"].string_value == "chat"

        # Nobody's trace, and one that is refused.
        await worker.call("stream::get", item("chat", "room", "i"))
        refused = await worker.call("stream::get", {"stream_name": 1}, traceparent=traceparent(9))
        assert "error" in refused
        spans = await asyncio.to_thread(collector.trace, bytes.fromhex(f"{10:032x}"), 1)
        assert spans["stream::get"].status.code == Status.STATUS_CODE_ERROR
        own = [s for s in collector.spans if s.name == "stream::get" and not s.parent_span_id]
        assert len(own) == 1
        await asyncio.to_thread(collector.trace, own[0].trace_id, 2)
        processes = {r["broker.process"] for r in collector.resources}
        assert {"gateway"} < processes
        assert {r["service.name"] for r in collector.resources} == {"the-name"}
        await worker.close()

    with collecting() as collector:
        env = {**collector.variables, "OTEL_SERVICE_NAME": "the-name"}
        with Broker(TRACED, env=env) as broker:
            run(main(broker, collector))


def test_a_caller_that_is_not_sampled_makes_no_spans(run: Run) -> None:
    async def main(broker: Broker) -> None:
        worker = await Worker.open(broker.worker_url)
        await worker.register_function("told", lambda _: None)
        await worker.register_trigger("stream", "told", GROUP)
        quiet = traceparent(3)[:-1] + "0"
        await worker.call("stream::set", item("chat", "room", "i", data=1), traceparent=quiet)
        (call,) = await worker.asked(1)
        assert call.frame["traceparent"].startswith(quiet[:36])
        assert call.frame["traceparent"].endswith("-00")
        await worker.close()

    with collecting() as collector:
        with Broker(TRACED, env=collector.variables) as broker:
            run(main(broker))
            assert broker.stop() == 0
        assert collector.spans == []


def test_a_collector_that_is_away_or_hangs_disturbs_nobody(run: Run) -> None:
    """Spans are lost, one line says so, and a stop is not held up."""

    async def main(broker: Broker) -> None:
        worker = await Worker.open(broker.worker_url)
        for n in range(20):
            data = item("chat", "room", "i", data=n)
            assert "result" in await worker.call("stream::set", data, traceparent=traceparent(n))
        await worker.close()

    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_BSP_SCHEDULE_DELAY": "50"}
    with Broker(TRACED, env=env) as broker:
        run(main(broker))
        end = time.monotonic() + LONG_S
        while "spans_not_exported" not in broker.log:
            assert time.monotonic() < end, broker.log
            time.sleep(0.1)
        assert "Traceback" not in broker.log
        began_at = time.monotonic()
        assert broker.stop() == 0
        assert time.monotonic() - began_at < 15, "three processes, each with its last spans"


def test_nothing_is_sent_unless_asked_for(run: Run) -> None:
    async def main(broker: Broker) -> None:
        worker = await Worker.open(broker.worker_url)
        data = item("chat", "room", "i", data=1)
        await worker.call("stream::set", data, traceparent=traceparent(1))
        await worker.close()

    with collecting() as collector:
        with Broker(IN_MEMORY, env=collector.variables) as broker:
            run(main(broker))
            assert broker.stop() == 0
        assert collector.requests == []


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL"),
    ],
)
def test_what_is_not_offered(variables: dict[str, str], named: str) -> None:
    with pytest.raises(StartFailed) as failed:
        Broker(TRACED, env=variables)
    assert failed.value.exit_code == 2
    assert named in failed.value.stderr


def test_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"stream-broker\[otel\]"):
        tracing.start(True, "gateway", {})
    assert tracing.start(False, "gateway", {}) is None
