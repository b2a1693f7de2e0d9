"""The gateway process: builds the parts, serves both ports, drains."""

from __future__ import annotations

import asyncio
import os
import socket
import uuid
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from pathlib import Path
from ssl import SSLContext
from typing import TYPE_CHECKING, Any

from broker import locks, logs, service
from broker.config import Config, RedisAdapter
from broker.errors import ConfigError
from broker.http import MetricsServer
from broker.messages import AddLeaveTrigger, Event, Left, Message
from broker.metrics import Metrics, by_label
from broker.names import Group
from broker.report import GatewayReport, LinkReport
from broker.service import Ready, Service
from broker.tracing import Kind, Span, Tracing
from broker.vitals import Vitals
from gateway import peer_protocol
from gateway.auth import Auth
from gateway.broker_functions import BrokerFunctions
from gateway.connection import PAUSED_BY_STOP
from gateway.custom_streams import CustomStreams, StreamCall
from gateway.fanout import FanOut
from gateway.functions import Functions
from gateway.hub import Hub
from gateway.introspection import Introspection
from gateway.invocations import Executor, Invocations
from gateway.leaves import Leaves
from gateway.metrics import add_clients, add_links, add_ports, add_workers
from gateway.peer_links import PeerLinks, broker_id
from gateway.peer_protocol import Hello
from gateway.peers import TRANSPORTS, Peers
from gateway.remote_workers import Registry, owner_of
from gateway.shard_links import Answered, ShardLinks
from gateway.stream_calls import StreamCalls
from gateway.stream_port import StreamPort
from gateway.tls import context_of, renew
from gateway.triggers import Triggers
from gateway.worker_port import Worker, WorkerPort

if TYPE_CHECKING:
    from gateway.redis_peers import RedisPeers

_READY_POLL_S = 0.01
_READY_WAIT_S = 10.0
_PEERS_WAIT_S = 3.0
_DRAIN_SLACK_S = 1.0  # of a loop that is behind; what is left is closed at once
_STOP_REASON = "the broker is stopping"

_log = logs.Log("gateway")


def main(arguments: list[str] | None = None) -> int:
    """Run `python -m gateway`; returns the exit code."""
    parser = service.options("gateway")
    parser.add_argument("--index", type=int, default=0, help="number of the gateway, from 0")
    parsed = parser.parse_args(arguments)
    return service.run("gateway", parsed, parsed.index, serve)


class Gateway:
    """The parts, wired."""

    def __init__(self, settings: Config, index: int) -> None:
        limits, gateway_id = settings.limits, str(uuid.uuid4())
        run_dir = Path(settings.run_dir)
        self.peers = Peers(Hello(peer_protocol.VERSION, gateway_id, broker_id(run_dir), index))
        self.peer_links = PeerLinks(
            [service.gateway_socket(settings, number) for number in range(settings.gateways)],
            index,
            limits.link_queue_bytes_max,
            self.peers,
        )
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
        self.custom = CustomStreams(self.functions, self.invocations, self.links, owner_of)
        self.stream_calls = StreamCalls(self.links, self.custom, limits.name_bytes_max)
        self.hub = Hub()
        self.fanout = FanOut(self.hub)
        self.tracing: Tracing | None = None
        self._fanouts: list[Span] = []  # of the events of this piece
        self.auth = Auth(settings.stream.auth_function, self.invocations, limits)
        self.leaves = Leaves(
            self.triggers, self.links, self.peers, settings.stream_access.leave_delay_s
        )
        self.triggers.on_leave_trigger = self._leaves_wanted
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
        self.broker_functions = BrokerFunctions(
            self.stream_port, gateway_id, self.peers, settings.gateways
        )
        self.worker_port = WorkerPort(
            limits,
            allowed_origins=settings.worker.allowed_origins,
            token=settings.worker.token or os.environ.get("III_TOKEN", "").strip(),
            functions=self.functions,
            invocations=self.invocations,
            triggers=self.triggers,
            stream_calls=self.stream_calls,
            broker_functions=self.broker_functions,
            peers=self.peers,
        )
        registry = Registry(
            self.functions,
            self.invocations,
            self.triggers,
            self.worker_port.infos,
            self.worker_port.availability,
        )
        self.peers.serve(registry, self)

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
        links = self.links.links
        return [
            *(f"shard {link.shard} does not answer" for link in links if not link.ready),
            *(f"shard {link.shard}: {link.trouble}" for link in links if link.trouble),
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

    # What peers ask for.

    def local_worker(self, worker_id: str) -> Worker | None:
        return self.worker_port.workers.get(worker_id)

    def reattach(self, worker_id: str, token: str) -> None:
        self.worker_port.reattach(worker_id, token)

    def client_returned(self, head: bytes) -> None:
        self.leaves.returned(head)

    def operate(self, group: Group, call: StreamCall, answered: Answered) -> None:
        self.custom.call_here(group, call, answered)

    def read(
        self, group: Group, item_id: str | None, answered: Answered, released: asyncio.Event
    ) -> None:
        self.custom.read_here(group, item_id, answered, released)

    def ask(self, function_id: str, data: bytes, answered: Answered) -> None:
        self.broker_functions.call_here(function_id, data, answered)

    def _leaves_wanted(self) -> None:
        self.leaves.lease_all(self.hub.all_subscriptions())

    def _tell_shards(self, message: Message) -> None:
        if isinstance(message, AddLeaveTrigger):  # first who is here: who came back has not left
            self._leaves_wanted()
        for link in self.links.links:
            link.tell(message)


async def serve(process: Service) -> None:
    """Serve until told to stop.

    Raises:
        ConfigError: a port can't be had.
    """
    settings, index = process.config, process.index
    if index >= settings.gateways:
        raise ConfigError("broker.gateways", f"is {settings.gateways}: there is no gateway {index}")
    lock = locks.take(
        Path(settings.run_dir) / (f"gateway-{index}.lock" if index else "gateway.lock"),
        "broker.run_dir",
        f"the run_dir {settings.run_dir}",
    )
    stream, worker, metrics_ports = settings.stream, settings.worker, settings.metrics
    stream_tls = context_of(settings.stream_access.tls, "broker.stream.tls")
    worker_tls = context_of(worker.tls, "broker.worker.tls")
    stream_socket, worker_socket = _port_sockets(settings)
    metrics_socket = service.listening_socket(
        metrics_ports.host, service.gateway_metrics_port(settings, index), "broker.metrics.port"
    )
    gateway = Gateway(settings, index)
    gateway.use_tracing(process.tracing)
    peer_links = gateway.peer_links
    await peer_links.start()
    registry = _metrics(process, gateway)
    introspection = _introspection(process, gateway, registry)
    metrics = MetricsServer(registry.registry, gateway.not_ready)
    metrics_port = await metrics.start(metrics_socket)
    redis_peers = _redis_peers(settings, gateway)
    runs = [gateway.links.run(), peer_links.run(), *([redis_peers.run()] if redis_peers else [])]
    background = [asyncio.create_task(run) for run in runs]
    await _wait_ready(process, gateway, redis_peers)
    ports = (gateway.stream_port, gateway.worker_port)
    await gateway.worker_port.start(worker_socket, worker_tls)
    await gateway.stream_port.start(stream_socket, stream_tls)
    watchers = [asyncio.create_task(port.watch()) for port in ports]
    watchers.append(asyncio.create_task(introspection.tell_shards()))

    process.on_reload = partial(_reload, gateway, stream_tls, worker_tls)
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
    gateway.peers.stopping(clients_gone=False)
    await _drain_clients(gateway, settings.limits.drain_seconds, process.hurried)
    for port in ports:
        port.stop_listening()
    metrics.close()
    with suppress(TimeoutError):
        async with asyncio.timeout(settings.limits.stop_timeout_s / 2):
            while any(link.in_flight for link in gateway.links.links):
                await asyncio.sleep(_READY_POLL_S)
    await _stop_ports(gateway, settings.limits.stop_timeout_s / 4)
    for task in (*background, *watchers):
        task.cancel()
    peer_links.close()
    if redis_peers is not None:
        await redis_peers.close()
    gateway.links.close()
    os.close(lock)
    _log.info("gateway_stopped")


def _reload(
    gateway: Gateway,
    stream_tls: SSLContext | None,
    worker_tls: SSLContext | None,
    settings: Config,
) -> None:
    renew(
        [
            (stream_tls, settings.stream_access.tls, "broker.stream.tls"),
            (worker_tls, settings.worker.tls, "broker.worker.tls"),
        ]
    )
    gateway.use(settings)


async def _drain_clients(gateway: Gateway, seconds: float, hurried: asyncio.Event) -> None:
    """Close clients one after the other, unless there is no time for it."""
    for port in (gateway.stream_port, gateway.worker_port):
        port.refuse_new()
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds + _DRAIN_SLACK_S):
            await _unless(hurried, gateway.stream_port.drain(seconds, _STOP_REASON))


async def _unless(event: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Do `work`, and give it up when `event` is set."""
    task, over = asyncio.create_task(work), asyncio.create_task(event.wait())
    try:
        await asyncio.wait((task, over), return_when=asyncio.FIRST_COMPLETED)
    finally:
        over.cancel()
        if not task.cancel():
            task.result()


def _redis_peers(settings: Config, gateway: Gateway) -> RedisPeers | None:
    """Links to the gateways of other brokers, where there may be some."""
    adapter = settings.adapter
    if not isinstance(adapter, RedisAdapter):
        return None
    # Who has no Redis does without the memory that the library takes.
    from gateway.redis_peers import RedisPeers  # noqa: PLC0415

    redis_peers = RedisPeers(
        adapter.redis_url,
        gateway.peers,
        settings.limits.link_queue_bytes_max,
        key_prefix=adapter.key_prefix,
    )
    gateway.peers.is_blind = lambda: redis_peers.is_blind
    gateway.triggers.wait_for(redis_peers.known())
    return redis_peers


async def _wait_ready(process: Service, gateway: Gateway, redis_peers: RedisPeers | None) -> None:
    """Wait until every shard answers, or the process is told to stop; not for ever: what the other
    shards own is served without one that is away, and `/readyz` tells."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_READY_WAIT_S):
            while not gateway.links.ready and not process.stopping.is_set():
                await asyncio.sleep(_READY_POLL_S)
    with suppress(TimeoutError):
        async with asyncio.timeout(_PEERS_WAIT_S):
            while not (
                process.stopping.is_set()
                or (gateway.peer_links.complete and (redis_peers is None or redis_peers.settled))
            ):
                await asyncio.sleep(_READY_POLL_S)


def _port_sockets(settings: Config) -> tuple[socket.socket, socket.socket]:
    """Sockets that listen on the stream port and on the worker port.

    Raises:
        ConfigError: an address can't be had.
    """
    shared = settings.gateways > 1
    found: list[socket.socket] = []
    for port, key in (
        (settings.stream, service.STREAM_PORT_KEY),
        (settings.worker, service.WORKER_PORT_KEY),
    ):
        if shared and not port.port:
            raise ConfigError(key, "holds 0, may hold a port that all gateways share")
        found.append(service.listening_socket(port.host, port.port, key, shared=shared))
    return found[0], found[1]


async def _stop_ports(gateway: Gateway, timeout_s: float) -> None:
    """Close all connections: clients', then, when workers were told who has left, theirs."""
    for port in (gateway.stream_port, gateway.worker_port):
        try:
            async with asyncio.timeout(timeout_s):
                if port is gateway.worker_port:
                    await _tell_leaves(gateway)
                await port.stop(_STOP_REASON)
        except TimeoutError:
            for connection in list(port.connections):
                connection.abort()


async def _tell_leaves(gateway: Gateway) -> None:
    """All clients are gone: tell the workers, also those whose conditions have to be asked."""
    gateway.leaves.stop()
    gateway.peers.stopping(clients_gone=True)
    while not gateway.peers.clients_told:  # theirs may have to be told to our workers
        await asyncio.sleep(_READY_POLL_S)
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
        "events": lambda: gateway.links.events_total,
        "deliveries": lambda: hub.deliveries_total,
        "invocations": lambda: gateway.invocations.invocations_total,
        "connections": lambda: gateway.stream_port.connections_total,
    }

    def each_second(now: float) -> None:
        hub.rotate(now)
        gateway.fanout.refill()
        gateway.stream_calls.refill()

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
        "Duration of stream functions, of the first 200 calls of a second, then of one in 64.",
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
    metrics.counter("events", "Events received from shards.", lambda: gateway.links.events_total)
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
    _add_peers(metrics, gateway)
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


def _add_peers(metrics: Metrics, gateway: Gateway) -> None:
    peers = gateway.peers
    metrics.gauges(
        "peers",
        "Other gateways that are linked, by transport.",
        lambda: [({"transport": name}, peers.count(name)) for name in TRANSPORTS],
    )
    metrics.counter(
        "peer_links_made", "Times another gateway was linked.", lambda: peers.links_made_total
    )
    metrics.gauges(
        "peer_queue_bytes",
        "Bytes that other gateways have not taken yet, by transport.",
        lambda: [({"transport": name}, peers.queue_bytes(name)) for name in TRANSPORTS],
    )
    metrics.counter(
        "peer_calls_sent",
        "Calls sent to workers of other gateways.",
        lambda: peers.calls_sent_total,
    )
    metrics.counter(
        "peer_calls_refused",
        "Calls not sent to workers of other gateways, as too much waits for their gateway.",
        lambda: peers.calls_refused_total,
    )
    metrics.counter(
        "peer_calls_received",
        "Calls of other gateways to workers here.",
        lambda: peers.calls_received_total,
    )
    metrics.gauge(
        "peer_calls_pending",
        "Calls of other gateways that workers here have not answered.",
        lambda: peers.calls_pending,
    )


def _auth(gateway: Gateway) -> dict[str, float]:
    return {str(outcome): count for outcome, count in gateway.auth.outcomes_total.items()}
