"""What both ports share: accepting, limits, pings, timeouts, stopping."""

from __future__ import annotations

import asyncio
import socket
import ssl
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from http import HTTPStatus

from websockets.frames import CloseCode
from websockets.http11 import Request

from broker import logs
from broker.config import Limits
from broker.label_counts import OTHER, LabelCounts
from gateway.access import host_of
from gateway.connection import CLOSE_STALLED_TIMEOUT_S, PAUSED_BY_STOP, Connection

SWEEP_INTERVAL_S = 0.5
REFUSALS = (
    "address_limit",
    "auth_unavailable",
    "bad_request",
    "connections_limit",
    "not_found",
    "not_ready",
    "origin",
    "timeout",
    "unauthorized",
)
"""Why requests are refused."""
CLOSE_CODES = ("1000", "1001", "1002", "1007", "1008", "1009", "4401", "4403", "4408")
"""Of the broker's own close frames; others are peers' and workers' choices, and counted as one."""
DRAIN_INTERVAL_S_MAX = 0.05
"""From one client to the next while a port is drained: a few clients are closed in no time."""

_log = logs.Log("listener")


class Listener(ABC):
    """A port that speaks WebSocket. Subclasses say what becomes of a request."""

    def __init__(
        self,
        name: str,
        limits: Limits,
        message_bytes_max: int,
        send_queue_bytes_max: int,
        stalled_code: int,
    ) -> None:
        self.name = name
        self.stalled_code = stalled_code
        self.message_bytes_max = message_bytes_max
        self.send_queue_bytes_max = send_queue_bytes_max
        self.limits = limits
        self.connections: dict[Connection, None] = {}
        """Those that are there, in the order in which they came."""
        self.stopping = False
        self.connections_total = 0
        self.refused_total = dict.fromkeys(REFUSALS, 0)
        self.messages_total = 0
        self.received_bytes = 0
        self.sent_bytes = 0
        self.paused_total = 0
        self.closed_total = LabelCounts(["code"], [(code,) for code in CLOSE_CODES])
        self.dead_total = 0
        self.stalled_total = 0
        self.throttled_total = 0
        self._by_address: dict[str, int] = {}
        self._loop = asyncio.get_running_loop()
        self._now: Callable[[], float] = self._loop.time
        self._unflushed: list[Connection] = []
        self._server: asyncio.Server | None = None
        self._pinged: dict[Connection, float] = {}

    async def start(self, listener: socket.socket, tls: ssl.SSLContext | None) -> None:
        """Serve on a listening socket, with TLS or without."""
        self._server = await self._loop.create_server(
            partial(Connection, self, self._now),
            sock=listener,
            ssl=tls,
            ssl_handshake_timeout=self.limits.handshake_timeout_s if tls else None,
        )

    async def watch(self) -> None:
        """Ping, and cut what is dead, stalled or never asked for anything; until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_INTERVAL_S)
            self._sweep(self._now())

    def refuse_new(self) -> None:
        """Take no more connections; those that are open go on."""
        if self._server is not None:
            self._server.close()

    async def drain(self, seconds: float, reason: str) -> None:
        """Close those that are open, one after the other in so many seconds, or sooner when they
        are few: who comes back after a fixed time then does not come at once with all others."""
        connections = [connection for connection in self.connections if connection.open]
        began_at = self._now()
        interval_s = min(DRAIN_INTERVAL_S_MAX, seconds / max(1, len(connections)))
        for number, connection in enumerate(connections):
            wait_s = began_at + number * interval_s - self._now()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            connection.close(CloseCode.GOING_AWAY, reason)

    async def stop(self, reason: str) -> None:
        """Take no more connections, close those that are, and wait until they are gone."""
        self.stop_listening()
        for connection in list(self.connections):
            if connection.open:
                connection.close(CloseCode.GOING_AWAY, reason)
            else:
                connection.abort()
        while self.connections:
            await asyncio.sleep(0.01)

    def stop_listening(self) -> None:
        """Take no more connections, and nothing more from those that are open."""
        self.stopping = True
        self.refuse_new()
        for connection in self.connections:
            connection.pause_reading(PAUSED_BY_STOP)

    def refuse(self, connection: Connection, status: int, text: str, outcome: str) -> None:
        """Answer a request with an error and count it."""
        self.count_refused(outcome)
        connection.respond_text(status, text)

    def count_refused(self, outcome: str) -> None:
        """Count a request that was not granted."""
        self.refused_total[outcome] = self.refused_total.get(outcome, 0) + 1

    def admit(self, connection: Connection, address: str) -> bool:
        """Count a connection that comes from `address`; refuse it when that has too many."""
        host = host_of(address)
        if self._by_address.get(host, 0) >= self.limits.connections_per_address_max:
            text = "too many connections from this address\n"
            self.refuse(connection, HTTPStatus.TOO_MANY_REQUESTS, text, "address_limit")
            return False
        connection.counted_address = host
        self._by_address[host] = self._by_address.get(host, 0) + 1
        return True

    @abstractmethod
    def request_received(self, connection: Connection, request: Request) -> None:
        """Answer the request: accept the connection, or refuse it."""

    # What connections call.

    def connected(self, connection: Connection) -> None:
        self.connections_total += 1
        self.connections[connection] = None
        if len(self.connections) > self.limits.connections_max:
            self.count_refused("connections_limit")
            connection.abort()
        elif self.stopping:
            connection.abort()

    def send_soon(self, connection: Connection) -> None:
        if not self._unflushed:
            self._loop.call_soon(self._flush)
        self._unflushed.append(connection)

    def _flush(self) -> None:
        unflushed, self._unflushed = self._unflushed, []
        sent = 0
        for connection in unflushed:
            sent += connection.flush()
        self.sent_bytes += sent

    def disconnected(self, connection: Connection) -> None:
        self.connections.pop(connection, None)
        if (code := connection.close_code) is not None:
            self.closed_total.add(str(code) if str(code) in CLOSE_CODES else OTHER)
        self._pinged.pop(connection, None)
        if host := connection.counted_address:
            self._by_address[host] -= 1
            if not self._by_address[host]:
                del self._by_address[host]

    def _sweep(self, now: float) -> None:
        limits = self.limits
        for connection in list(self.connections):
            silent = 0.0 if connection.read_paused else now - connection.received_at
            if connection.open:
                if silent > limits.ping_interval_s or connection.stalled_since is not None:
                    self._look_for_life(connection, now)
                    silent = min(silent, now - connection.received_at)
                stalled = connection.stalled_since
                if silent > limits.ping_timeout_s:
                    self.dead_total += 1
                    _log.info("connection_dead", port=self.name, remote=connection.remote_address)
                    connection.abort()
                elif stalled is not None and now - stalled > limits.stalled_timeout_s:
                    self.stalled_total += 1
                    _log.info(
                        "connection_stalled", port=self.name, remote=connection.remote_address
                    )
                    connection.close(self.stalled_code, "too slow", CLOSE_STALLED_TIMEOUT_S)
                elif (
                    silent > limits.ping_interval_s
                    and now - self._pinged.get(connection, 0.0) > limits.ping_interval_s
                ):
                    self._pinged[connection] = now
                    connection.ping()
            elif (
                not connection.requested
                and now - connection.connected_at > limits.handshake_timeout_s
            ):
                self.count_refused("timeout")
                connection.abort()

    def _look_for_life(self, connection: Connection, now: float) -> None:
        """What the peer takes is a sign of life, however little it sends."""
        if connection.takes_bytes():
            connection.received_at = now
            if connection.stalled_since is not None:
                connection.stalled_since = now
