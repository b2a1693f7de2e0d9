"""The gateway process: builds the parts, serves both ports, drains."""

from __future__ import annotations

import asyncio
import os
import socket
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from broker import locks, logs, service
from broker.config import Config
from broker.http import MetricsServer
from broker.messages import AddLeaveTrigger, Event, Left, Message
from broker.metrics import Metrics, by_label
from broker.report import GatewayReport, LinkReport
from broker.service import Ready, Service
from broker.tracing import Kind, Span, Tracing
from broker.vitals import Vitals
from gateway.auth import Auth
from gateway.broker_functions import BrokerFunctions
from gateway.connection import PAUSED_BY_STOP
from gateway.custom_streams import CustomStreams
from gateway.fanout import FanOut
from gateway.functions import Functions
from gateway.hub import Hub
from gateway.introspection import Introspection
from gateway.invocations import Executor, Invocations
from gateway.leaves import Leaves
from gateway.metrics import add_clients, add_links, add_ports, add_workers
from gateway.shard_links import ShardLinks
from gateway.stream_calls import StreamCalls
from gateway.stream_port import StreamPort
from gateway.tls import context_of, renew
from gateway.triggers import Triggers
from gateway.worker_port import WorkerPort

_STREAM_PORT_KEY = "modules[].config.port"
_WORKER_PORT_KEY = "broker.worker.port"
_READY_POLL_S = 0.01
_READY_WAIT_S = 10.0

_log = logs.Log("gateway")


def main(arguments: list[str] | None = None) -> int:
    """Run `python -m gateway`; returns the exit code."""
    parsed = service.options("gateway").parse_args(arguments)
    return service.run("gateway", parsed, 0, serve)


class Gateway:
    """The parts, wired."""

    def __init__(self, settings: Config) -> None:
        limits, gateway_id = settings.limits, str(uuid.uuid4())
        self.links = ShardLinks(
            [service.shard_socket(settings, shard) for shard in range(settings.shards)],
            gateway_id,
            limits.link_queue_bytes_max,
            self,
        )
        self.functions = Functions[Executor]()
        self.invocations = Invocations(
            self.functions, limits.worker_calls_in_flight_max, limits.handler_timeout_s
        )
        self.triggers = Triggers(self.invocations, self._tell_shards, limits.trigger_timeout_s)
        self.custom = CustomStreams(self.functions, self.invocations, self.links)
        self.stream_calls = StreamCalls(self.links, self.custom, limits.name_bytes_max)
        self.hub = Hub()
        self.fanout = FanOut(self.hub)
        self.tracing: Tracing | None = None
        self._fanouts: list[Span] = []  # of the events of this piece
        self.auth = Auth(settings.stream.auth_function, self.invocations, limits)
        self.leaves = Leaves(self.triggers, self.links, settings.stream_access.leave_delay_s)
        self.stream_port = StreamPort(
            limits,
            settings.stream_access,
            hub=self.hub,
            auth=self.auth,
            triggers=self.triggers,
            leaves=self.leaves,
            links=self.links,
            custom=self.custom,
            not_ready=self.not_ready,
        )
        self.gateway_id = gateway_id
        self.broker_functions = BrokerFunctions(self.stream_port, gateway_id)
        self.worker_port = WorkerPort(
            limits,
            allowed_origins=settings.worker.allowed_origins,
            token=settings.worker.token or os.environ.get("III_TOKEN", "").strip(),
            functions=self.functions,
            invocations=self.invocations,
            triggers=self.triggers,
            stream_calls=self.stream_calls,
            broker_functions=self.broker_functions,
        )

    def use(self, settings: Config) -> None:
        """Take over what `broker.service.reloaded` lets a running broker take over."""
        limits = settings.limits
        self.auth.function_id = settings.stream.auth_function
        self.auth.limits = limits
        self.triggers.timeout_s = limits.trigger_timeout_s
        self.invocations.in_flight_max = limits.worker_calls_in_flight_max
        self.stream_port.use_access(settings.stream_access)
        self.worker_port.allowed_origins = settings.worker.allowed_origins
        if settings.worker.token is not None:
            self.worker_port.token = settings.worker.token
        for port in (self.stream_port, self.worker_port):
            port.limits = limits

    def not_ready(self) -> list[str]:
        """Why not everything works, a sentence each."""
        return [
            f"shard {link.shard} does not answer" for link in self.links.links if not link.ready
        ]

    # What the links call.

    def shard_linked(self, shard: int) -> None:
        link = self.links.links[shard]
        self.leaves.shard_linked(link)
        for message in self.triggers.messages_for_shard():
            link.tell(message)
        self.stream_port.shard_linked(shard)

    def use_tracing(self, tracing: Tracing | None) -> None:
        """Make spans, or none."""
        self.tracing = self.stream_calls.tracing = self.triggers.tracing = tracing

    def event_received(self, shard: int, event: Event) -> None:
        if self.tracing is not None and event.subscribed and event.trace is not None:
            self._fanouts.append(
                self.tracing.start(
                    "fan-out",
                    Kind.PRODUCER,
                    event.trace,
                    stream=event.stream,
                    subscriptions=self.hub.count((event.stream, event.group_id)),
                )
            )
        self.fanout.last = event
        self.stream_port.event_received(shard, event)
        if event.triggers:
            self.triggers.fire_stream(event)

    def left(self, left: Left) -> None:
        self.triggers.fire_left(left)

    def batch_received(self) -> None:
        self.fanout.flush()
        if self._fanouts:
            for span in self._fanouts:
                span.end()
            self._fanouts.clear()

    def _tell_shards(self, message: Message) -> None:
        if isinstance(message, AddLeaveTrigger):  # first who is here: who came back has not left
            self.leaves.lease_all(self.hub.all_subscriptions())
        for link in self.links.links:
            link.tell(message)


async def serve(process: Service) -> None:
    """Serve until told to stop.

    Raises:
        ConfigError: a port can't be had.
    """
    settings = process.config
    lock = locks.take(
        Path(settings.run_dir) / "gateway.lock",
        "broker.run_dir",
        f"the run_dir {settings.run_dir}",
    )
    stream, worker, metrics_ports = settings.stream, settings.worker, settings.metrics
    stream_tls = context_of(settings.stream_access.tls, "broker.stream.tls")
    worker_tls = context_of(worker.tls, "broker.worker.tls")
    stream_socket = service.listening_socket(stream.host, stream.port, _STREAM_PORT_KEY)
    worker_socket = service.listening_socket(worker.host, worker.port, _WORKER_PORT_KEY)
    metrics_socket = service.listening_socket(
        metrics_ports.host, metrics_ports.port, "broker.metrics.port"
    )
    gateway = Gateway(settings)
    gateway.use_tracing(process.tracing)
    registry = _metrics(process, gateway)
    introspection = _introspection(process, gateway, registry)
    metrics = MetricsServer(registry.registry, gateway.not_ready)
    metrics_port = await metrics.start(metrics_socket)
    links = asyncio.create_task(gateway.links.run())
    await _wait_ready(process, gateway)
    ports = (gateway.stream_port, gateway.worker_port)
    await gateway.worker_port.start(worker_socket, worker_tls)
    await gateway.stream_port.start(stream_socket, stream_tls)
    watchers = [asyncio.create_task(port.watch()) for port in ports]
    watchers.append(asyncio.create_task(introspection.tell_shards()))

    def reload(settings: Config) -> None:
        access = settings.stream_access
        renew(
            [
                (stream_tls, access.tls, "broker.stream.tls"),
                (worker_tls, settings.worker.tls, "broker.worker.tls"),
            ]
        )
        gateway.use(settings)

    process.on_reload = reload
    if not process.stopping.is_set():
        process.ready(
            Ready(
                stream=_url("wss" if stream_tls else "ws", stream.host, _port_of(stream_socket)),
                worker=_url("wss" if worker_tls else "ws", worker.host, _port_of(worker_socket)),
                metrics=_url("http", metrics_ports.host, metrics_port) + "/metrics",
            )
        )
        _log.info("gateway_started")
    await process.stopping.wait()
    for port in ports:
        port.stop_listening()
    metrics.close()
    with suppress(TimeoutError):
        async with asyncio.timeout(settings.limits.stop_timeout_s / 2):
            while any(link.in_flight for link in gateway.links.links):
                await asyncio.sleep(_READY_POLL_S)
    for port in ports:
        try:
            async with asyncio.timeout(settings.limits.stop_timeout_s / 4):
                if port is gateway.worker_port:
                    await _tell_leaves(gateway)
                await port.stop("the broker is stopping")
        except TimeoutError:
            for connection in list(port.connections):
                connection.abort()
    for task in (links, *watchers):
        task.cancel()
    gateway.links.close()
    os.close(lock)
    _log.info("gateway_stopped")


async def _wait_ready(process: Service, gateway: Gateway) -> None:
    """Wait until every shard answers, or the process is told to stop; not for ever: what the other
    shards own is served without one that is away, and `/readyz` tells."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_READY_WAIT_S):
            while not gateway.links.ready and not process.stopping.is_set():
                await asyncio.sleep(_READY_POLL_S)


async def _tell_leaves(gateway: Gateway) -> None:
    """All clients are gone: tell the workers, also those whose conditions have to be asked."""
    gateway.leaves.stop()
    for connection in gateway.worker_port.connections:
        connection.resume_reading(PAUSED_BY_STOP)
    while gateway.triggers.conditions_waiting:
        await asyncio.sleep(_READY_POLL_S)


def _port_of(listener: socket.socket) -> int:
    port: int = listener.getsockname()[1]
    return port


def _url(scheme: str, host: str, port: int) -> str:
    return f"{scheme}://{service.url_host(host)}:{port}"


def _introspection(process: Service, gateway: Gateway, registry: Metrics) -> Introspection:
    """What answers `broker::status` and `broker::top`."""
    hub = gateway.hub
    totals: dict[str, Callable[[], float]] = {
        "calls": lambda: sum(gateway.stream_calls.calls_total.values()),
        "events": lambda: hub.events_total,
        "deliveries": lambda: hub.deliveries_total,
        "invocations": lambda: gateway.invocations.invocations_total,
        "connections": lambda: gateway.stream_port.connections_total,
    }

    def each_second(now: float) -> None:
        hub.rotate(now)
        gateway.fanout.refill()

    vitals = Vitals(process.name, process.restarts, registry.lag, totals, each_second)

    def report() -> GatewayReport:
        return GatewayReport(
            vitals.report(),
            gateway.gateway_id,
            clients=len(gateway.stream_port.clients),
            workers=len(gateway.worker_port.workers),
            subscriptions=hub.subscriptions,
            groups=len(hub),
            functions=len(gateway.functions),
            invocations_pending=len(gateway.invocations),
            links=[
                LinkReport(
                    link.shard, link.ready, link.in_flight, link.queue_bytes, link.links_total
                )
                for link in gateway.links.links
            ],
        )

    introspection = Introspection(
        gateway.gateway_id,
        gateway.links,
        hub,
        report=report,
        deliveries=hub.hot,
        not_ready=gateway.not_ready,
    )
    gateway.broker_functions.extend(introspection.functions)
    return introspection


def _metrics(process: Service, gateway: Gateway) -> Metrics:
    metrics = Metrics({}, process.restarts, lambda: process.config.limits)
    ports = (gateway.stream_port, gateway.worker_port)
    triggers, hub, links = gateway.triggers, gateway.hub, gateway.links.links
    stream = gateway.stream_port
    metrics.gauges(
        "connections",
        "Open connections, by port.",
        lambda: [({"port": port.name}, len(port.connections)) for port in ports],
    )
    metrics.counters(
        "connections_accepted",
        "TCP connections accepted, by port.",
        lambda: [({"port": port.name}, port.connections_total) for port in ports],
    )
    metrics.counters(
        "handshakes_refused",
        "Requests refused, by port and reason.",
        lambda: [
            ({"port": port.name, "reason": reason}, count)
            for port in ports
            for reason, count in port.refused_total.items()
        ],
    )
    metrics.counters(
        "connections_dead",
        "Connections cut because the peer was silent, by port.",
        lambda: [({"port": port.name}, port.dead_total) for port in ports],
    )
    metrics.counters(
        "connections_stalled",
        "Connections closed because the peer took nothing of what waited, by port.",
        lambda: [({"port": port.name}, port.stalled_total) for port in ports],
    )
    metrics.counters(
        "connections_throttled",
        "Times that nothing was read from a peer for a while, as it sent too much, by port.",
        lambda: [({"port": port.name}, port.throttled_total) for port in ports],
    )
    metrics.gauge(
        "auth_waiting",
        "Handshakes and renewals that wait for the auth function.",
        lambda: gateway.auth.waiting,
    )
    metrics.counter(
        "clients_expired",
        "Clients closed because their authentication expired.",
        lambda: stream.expired_total,
    )
    metrics.gauge(
        "subscriptions_away",
        "Subscriptions whose client may still come back.",
        lambda: gateway.leaves.away,
    )
    metrics.counter(
        "subscriptions_returned",
        "Subscriptions whose client came back in time.",
        lambda: gateway.leaves.returned_total,
    )
    metrics.counters(
        "auth", "Answers of the auth function.", lambda: by_label("outcome", _auth(gateway))
    )
    metrics.gauge("workers", "Connected workers.", lambda: len(gateway.worker_port.workers))
    metrics.gauge("functions", "Registered functions.", lambda: len(gateway.functions))
    metrics.counters(
        "stream_calls",
        "Calls of stream functions.",
        lambda: by_label("function", gateway.stream_calls.calls_total),
    )
    metrics.histograms(
        "stream_call_seconds",
        "Duration of stream functions, by function; of one call in eight.",
        lambda: [
            ({"function": function}, histogram)
            for function, histogram in gateway.stream_calls.durations.items()
        ],
    )
    metrics.counter(
        "invocations",
        "Calls sent to workers.",
        lambda: gateway.invocations.invocations_total,
    )
    metrics.gauge(
        "invocations_pending",
        "Calls to workers that wait for their answer.",
        lambda: len(gateway.invocations),
    )
    metrics.gauge(
        "custom_operations_waiting",
        "Operations that wait for workers that store streams.",
        lambda: gateway.custom.waiting,
    )
    metrics.counter(
        "custom_operations_refused",
        "Operations refused because too many wait for such a worker.",
        lambda: gateway.custom.refused_total,
    )
    metrics.counter(
        "invocations_resent",
        "Calls sent again because the worker that had them left.",
        lambda: gateway.invocations.resent_total,
    )
    metrics.counter(
        "worker_messages",
        "Messages received from workers.",
        lambda: gateway.worker_port.messages_total,
    )
    metrics.counter(
        "worker_messages_undecodable",
        "Messages of workers that could not be read.",
        lambda: gateway.worker_port.undecodable_total,
    )
    metrics.counters(
        "trigger_invocations",
        "Triggers, by what became of them.",
        lambda: by_label("outcome", triggers.outcomes_total),
    )
    metrics.gauge("subscriptions", "Standing subscriptions.", lambda: hub.subscriptions)
    metrics.gauge("subscribed_groups", "Groups with subscriptions.", lambda: len(hub))
    metrics.counters("joins", "Joins, by outcome.", lambda: by_label("outcome", stream.joins_total))
    metrics.counter(
        "client_messages_bad",
        "Messages of clients answered with an error.",
        lambda: stream.bad_messages_total,
    )
    metrics.counter("events", "Events received from shards.", lambda: hub.events_total)
    metrics.counter("deliveries", "Frames of events to clients.", lambda: hub.deliveries_total)
    metrics.counter("event_gaps", "Gaps healed with a sync.", lambda: hub.gaps_total)
    metrics.counter(
        "joins_resumed", "Joins that went on from a position.", lambda: stream.resumed_total
    )
    metrics.counter(
        "frames_conflated",
        "Frames that newer ones of the same item replaced before they were sent.",
        lambda: stream.conflated_total,
    )
    metrics.counter(
        "clients_disconnected",
        "Clients closed because a worker asked for it.",
        lambda: gateway.broker_functions.disconnected_total,
    )
    metrics.counter(
        "clients_behind", "Times a slow client's backlog was dropped.", lambda: stream.behind_total
    )
    metrics.counter(
        "frames_dropped",
        "Frames dropped with those backlogs.",
        lambda: stream.frames_dropped_total,
    )
    metrics.gauges(
        "shard_up",
        "1 while the shard is linked.",
        lambda: [({"shard": str(link.shard)}, int(link.ready)) for link in links],
    )
    metrics.counters(
        "shard_links_made",
        "Times the shard was linked.",
        lambda: [({"shard": str(link.shard)}, link.links_total) for link in links],
    )
    metrics.gauges(
        "shard_calls_in_flight",
        "Calls that wait for the shard's answer.",
        lambda: [({"shard": str(link.shard)}, link.in_flight) for link in links],
    )
    metrics.gauges(
        "shard_link_queue_bytes",
        "Bytes that the shard has not taken yet.",
        lambda: [({"shard": str(link.shard)}, link.queue_bytes) for link in links],
    )
    metrics.counters(
        "shard_calls_refused",
        "Calls refused because too much waits to be sent to the shard.",
        lambda: [({"shard": str(link.shard)}, link.refused_total) for link in links],
    )
    metrics.counters(
        "stream_call_failures",
        "Calls of stream functions answered with an error, by its code.",
        gateway.stream_calls.failures_total.samples,
    )
    add_ports(metrics, ports)
    add_clients(metrics, stream, gateway.fanout)
    add_workers(metrics, gateway.invocations, triggers)
    add_links(metrics, links)
    return metrics


def _auth(gateway: Gateway) -> dict[str, float]:
    return {str(outcome): count for outcome, count in gateway.auth.outcomes_total.items()}
