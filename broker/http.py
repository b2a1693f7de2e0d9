"""The metrics port: a small HTTP server that answers `GET /metrics`, `/healthz` and `/readyz`."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics

HEAD_BYTES_MAX = 16 * 1024
REQUEST_TIMEOUT_S = 10.0
CONNECTIONS_MAX = 64


class MetricsServer:
    """Serves a registry; one request per connection.

    Args:
        not_ready: why the process can't do its work just now, or None.
    """

    def __init__(
        self, registry: CollectorRegistry, not_ready: Callable[[], str | None] = lambda: None
    ) -> None:
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
        if path in ("/healthz", "/readyz") and method in ("GET", "HEAD"):
            if path == "/readyz" and (reason := self._not_ready()) is not None:
                text = f"not ready: {reason}\n".encode()
                return response("503 Service Unavailable", "text/plain", text)
            return response("200 OK", "text/plain", b"ok\n")
        if path != "/metrics":
            return response("404 Not Found", "text/plain", b"Metrics are at /metrics.\n")
        if method not in ("GET", "HEAD"):
            return response("405 Method Not Allowed", "text/plain", b"Use GET.\n")
        accept = ""
        for line in rest.split("\r\n"):
            name, _, value = line.partition(":")
            if name.strip().lower() == "accept":
                accept = value.strip()
        if "application/openmetrics-text" in accept:
            content_type = openmetrics.CONTENT_TYPE_LATEST
            body: bytes = openmetrics.generate_latest(self._registry)  # type: ignore[no-untyped-call]  # the library types only its other half
        else:
            content_type, body = CONTENT_TYPE_LATEST, generate_latest(self._registry)
        answer = response("200 OK", content_type, body)
        return answer if method == "GET" else answer.split(b"\r\n\r\n")[0] + b"\r\n\r\n"


def response(status: str, content_type: str, body: bytes) -> bytes:
    """An HTTP/1.1 response after which the connection is closed."""
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    ).encode() + body
