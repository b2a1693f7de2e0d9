"""The metrics port: a small HTTP server that answers `GET` of `/metrics`, `/healthz`, `/readyz`."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from http import HTTPStatus

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics

from broker import health
from broker.health import NotReady

HEAD_BYTES_MAX = 16 * 1024
REQUEST_TIMEOUT_S = 10.0
CONNECTIONS_MAX = 64


class MetricsServer:
    """Serves a registry and the health of the process; one request per connection."""

    def __init__(self, registry: CollectorRegistry, not_ready: NotReady) -> None:
        self._registry = registry
        self._not_ready = not_ready
        self._open = 0
        self._server: asyncio.Server | None = None

    async def start(self, listener: socket.socket) -> int:
        """Serve on `listener`; returns its port."""
        self._server = await asyncio.start_server(self._serve, sock=listener, limit=HEAD_BYTES_MAX)
        port: int = listener.getsockname()[1]
        return port

    def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            if self._open <= CONNECTIONS_MAX:
                with suppress(
                    OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError
                ):
                    async with asyncio.timeout(REQUEST_TIMEOUT_S):
                        head = await reader.readuntil(b"\r\n\r\n")
                        writer.write(self._answer(head))
                        await writer.drain()
        finally:
            self._open -= 1
            writer.close()

    def _answer(self, head: bytes) -> bytes:
        request, _, rest = head.decode("latin-1").partition("\r\n")
        method, _, target = request.partition(" ")
        path = target.split(" ")[0].split("?")[0]
        if path != "/metrics" and path not in health.PATHS:
            return response(HTTPStatus.NOT_FOUND, "text/plain", b"Metrics are at /metrics.\n")
        if method not in ("GET", "HEAD"):
            return response(HTTPStatus.METHOD_NOT_ALLOWED, "text/plain", b"Use GET.\n")
        answer = self._health(path) if path in health.PATHS else self._metrics(rest)
        return answer if method == "GET" else answer.split(b"\r\n\r\n")[0] + b"\r\n\r\n"

    def _health(self, path: str) -> bytes:
        status, body = health.answer(path, self._not_ready)
        return response(status, health.CONTENT_TYPE, body)

    def _metrics(self, headers: str) -> bytes:
        accept = ""
        for line in headers.split("\r\n"):
            name, _, value = line.partition(":")
            if name.strip().lower() == "accept":
                accept = value.strip()
        if "application/openmetrics-text" in accept:
            content_type = openmetrics.CONTENT_TYPE_LATEST
            body: bytes = openmetrics.generate_latest(self._registry)  # type: ignore[no-untyped-call]  # the library types only its other half
        else:
            content_type, body = CONTENT_TYPE_LATEST, generate_latest(self._registry)
        return response(HTTPStatus.OK, content_type, body)


def response(status: HTTPStatus, content_type: str, body: bytes) -> bytes:
    """An HTTP/1.1 response after which the connection is closed."""
    return (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    ).encode() + body
