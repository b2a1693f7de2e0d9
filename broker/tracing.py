"""Spans for OpenTelemetry, where `broker.tracing` asks for them.

The trace of a call, its `traceparent` and `baggage`, is passed on with and without this. Exporter,
sampler and limits are what the `OTEL_*` variables say. Spans are exported by a thread of the SDK,
from a queue that is bounded and drops.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Mapping
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from broker import logs
from broker.errors import ConfigError
from broker.messages import Trace

if TYPE_CHECKING:  # an extra: imported where it is used
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span as OtelSpan

KEY = "broker.tracing"
SERVICE = "stream-broker"
CLOSE_S_MAX = 2.0
"""A process that ends gives its last spans so long."""

_PROTOCOLS = ("", "http/protobuf")


_log = logs.Log("tracing")


class Kind(Enum):
    """Of a span; the values are OpenTelemetry's."""

    INTERNAL = 0
    SERVER = 1
    CLIENT = 2
    PRODUCER = 3


class Span(Protocol):
    """One step of a trace, under way. `trace`: what the steps that it causes are given."""

    trace: Trace

    def end(self, error: str | None = None) -> None:
        """The step is over; `error` is the code of what went wrong."""


class Tracing(Protocol):
    """Makes spans."""

    def start(
        self, name: str, kind: Kind, parent: Trace | None, **attributes: str | int
    ) -> Span: ...

    def close(self) -> None:
        """Export what is left. Blocks, for `CLOSE_S_MAX` at most."""


def start(is_on: bool, process: str, environ: Mapping[str, str]) -> Tracing | None:
    """What makes the spans of this process; None when nobody asked for any.

    Raises:
        ConfigError: the packages are missing, or a variable asks for what is not offered.
    """
    if not is_on:
        return None
    try:
        return _open_telemetry(process, environ)
    except ImportError as error:
        reason = f"needs packages: pip install 'stream-broker[otel]' ({error})"
        raise ConfigError(KEY, reason) from None


# What OpenTelemetry has is imported where it is used: it is an extra, and who makes no spans does
# without it and the memory that it takes.


def _open_telemetry(process: str, environ: Mapping[str, str]) -> Tracing:
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    attributes = {"broker.process": process}
    if "service.name" not in environ.get("OTEL_RESOURCE_ATTRIBUTES", ""):
        attributes["service.name"] = environ.get("OTEL_SERVICE_NAME", "") or SERVICE
    provider = TracerProvider(resource=Resource.create(attributes), shutdown_on_exit=False)
    told = logging.getLogger("opentelemetry")
    told.handlers[:] = [_ToLog()]
    told.propagate = False
    exporter = _exporter(environ)
    if exporter is not None:
        provider.add_span_processor(BatchSpanProcessor(exporter))
    return _OpenTelemetry(provider)


def _exporter(environ: Mapping[str, str]) -> SpanExporter | None:
    match environ.get("OTEL_TRACES_EXPORTER", "") or "otlp":
        case "none":
            return None
        case "console":
            from opentelemetry.sdk.trace.export import ConsoleSpanExporter  # noqa: PLC0415

            # Standard output is the supervisor's.
            return ConsoleSpanExporter(out=sys.stderr, formatter=lambda s: s.to_json(None) + "\n")
        case "otlp":
            protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "") or environ.get(
                "OTEL_EXPORTER_OTLP_PROTOCOL", ""
            )
            if protocol not in _PROTOCOLS:
                reason = f"OTEL_EXPORTER_OTLP_PROTOCOL holds {protocol!r}, may hold http/protobuf"
                raise ConfigError(KEY, reason)
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
                OTLPSpanExporter,
            )

            return OTLPSpanExporter()
        case other:
            reason = f"OTEL_TRACES_EXPORTER holds {other!r}, may hold one of otlp, console, none"
            raise ConfigError(KEY, reason)


class _ToLog(logging.Handler):
    """What the SDK has to say, in our form: a collector that is away is told of now and again."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            _log.warning("spans_not_exported", reason=record.getMessage())


class _OpenTelemetry:
    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import trace  # noqa: PLC0415
        from opentelemetry.trace.propagation.tracecontext import (  # noqa: PLC0415
            TraceContextTextMapPropagator,
        )

        self._provider = provider
        self._tracer = provider.get_tracer("stream-broker")
        self._contexts = TraceContextTextMapPropagator()
        self._trace = trace
        self._kinds = {kind: trace.SpanKind(kind.value) for kind in Kind}

    def start(
        self, name: str, kind: Kind, parent: Trace | None, **attributes: str | int
    ) -> _OpenTelemetrySpan:
        given = parent.traceparent if parent is not None else None
        carrier = {} if given is None else {"traceparent": given}
        span = self._tracer.start_span(
            name,
            self._contexts.extract(carrier),
            self._kinds[kind],
            {f"broker.{key}": value for key, value in attributes.items()},
        )
        written: dict[str, str] = {}
        self._contexts.inject(written, self._trace.set_span_in_context(span))
        baggage = parent.baggage if parent is not None else None
        return _OpenTelemetrySpan(span, Trace(written.get("traceparent", given), baggage))

    def close(self) -> None:
        # The SDK's own limits on this are none: a collector that hangs must not hold us up.
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_S_MAX)


class _OpenTelemetrySpan:
    def __init__(self, span: OtelSpan, trace: Trace) -> None:
        self._span = span
        self.trace = trace

    def end(self, error: str | None = None) -> None:
        if error is not None:
            from opentelemetry.trace import Status, StatusCode  # noqa: PLC0415

            self._span.set_status(Status(StatusCode.ERROR, error))
            self._span.set_attribute("error.type", error)
        self._span.end()
