"""Metrics of what goes in and out of a gateway, and of bounds that were hit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from broker.metrics import Metrics, Sample
from gateway.fanout import FanOut
from gateway.invocations import Invocations
from gateway.listener import Listener
from gateway.shard_links import ShardLink
from gateway.stream_port import StreamPort
from gateway.triggers import Triggers


def add_ports(metrics: Metrics, ports: Sequence[Listener]) -> None:
    """Traffic of both ports."""

    def by_port(read: Callable[[Listener], float]) -> Callable[[], list[Sample]]:
        return lambda: [({"port": port.name}, read(port)) for port in ports]

    metrics.counters("received_bytes", "Bytes received.", by_port(lambda p: p.received_bytes))
    metrics.counters("sent_bytes", "Bytes of messages sent.", by_port(lambda p: p.sent_bytes))
    metrics.counters(
        "connections_paused",
        "Times that nothing was read from a peer for a while, as what it sent waits.",
        by_port(lambda p: p.paused_total),
    )
    metrics.counters(
        "connections_closed",
        "Connections closed with a close frame, by its code.",
        lambda: [
            ({"port": port.name, **labels}, count)
            for port in ports
            for labels, count in port.closed_total.samples()
        ],
    )


def add_clients(metrics: Metrics, port: StreamPort, fanout: FanOut) -> None:
    """Messages of clients, and events to them."""
    metrics.counter(
        "client_messages", "Messages received from clients.", lambda: port.messages_total
    )
    metrics.counter(
        "resyncs", "Syncs of subscriptions that had missed events.", lambda: port.resyncs_total
    )
    metrics.histogram(
        "event_fanout_seconds",
        "Handing the events that came in one piece to all subscribers.",
        fanout.durations,
    )
    metrics.histogram(
        "event_fanout_deliveries",
        "Frames to clients of the events that came in one piece.",
        fanout.sizes,
    )
    metrics.histogram(
        "event_delay_seconds",
        "From a change's timestamp, just before its commit, to the sockets; of one per piece.",
        fanout.delays,
    )


def add_workers(metrics: Metrics, invocations: Invocations, triggers: Triggers) -> None:
    """Calls to workers that wait, or were not made."""
    metrics.counters(
        "invocations_refused",
        "Calls refused because too many wait, by where.",
        lambda: [
            ({"reason": "too_many_calls"}, invocations.too_many_total),
            ({"reason": "worker_overloaded"}, invocations.overloaded_total),
        ],
    )
    metrics.counter(
        "conditions_asked", "Conditions of triggers asked.", lambda: triggers.conditions_total
    )
    metrics.gauge(
        "trigger_events_waiting",
        "Events that wait for the condition of a trigger.",
        lambda: triggers.events_waiting,
    )
    metrics.gauge(
        "trigger_invocations_pending",
        "Calls of handlers that wait for their answer.",
        lambda: len(invocations.patience),
    )


def add_links(metrics: Metrics, links: Sequence[ShardLink]) -> None:
    """Bytes of the links, and those that were cut."""

    def by_shard(read: Callable[[ShardLink], float]) -> Callable[[], list[Sample]]:
        return lambda: [({"shard": str(link.shard)}, read(link)) for link in links]

    metrics.counters(
        "shard_link_received_bytes",
        "Bytes received from the shard.",
        by_shard(lambda link: link.received_bytes),
    )
    metrics.counters(
        "shard_link_sent_bytes", "Bytes sent to the shard.", by_shard(lambda link: link.sent_bytes)
    )
    metrics.counters(
        "shard_link_overflows",
        "Times that the link was cut as the shard left too much unread.",
        by_shard(lambda link: link.overflows_total),
    )
