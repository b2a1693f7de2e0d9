"""Writes the dashboards: `python deploy/grafana/build.py [DIR]`, by default into `dashboards/`.

What a dashboard shows stands below as rows of panels; ids, places and options are the same
everywhere and are filled in here. Queries use metrics of the gateway and the shards, and those of
their processes in the scrape job `broker`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

COLUMNS = 24
HEIGHTS = {"stat": 4, "timeseries": 8}
SCHEMA_VERSION = 39  # Grafana 10.4 and newer
RATE = "$__rate_interval"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Panel:
    """One graph, or one number.

    text: what it means, shown behind the title. unit: as Grafana names it. queries: pairs of a
    PromQL expression and a legend. width: in columns.
    """

    title: str
    text: str
    unit: str
    queries: Sequence[tuple[str, str]]
    kind: str = "timeseries"
    width: int = 8


@dataclass(frozen=True)
class Variable:
    """A choice above the dashboard: the values of `label`, some or all of them."""

    name: str
    label: str
    metric: str


@dataclass(frozen=True)
class Dashboard:
    """Titles of rows to their panels, which fill a row from the left."""

    uid: str
    title: str
    text: str
    rows: dict[str, list[Panel]]
    variables: Sequence[Variable] = ()


def rate(metric: str, by: str = "", where: str = "") -> str:
    """A counter's growth per second, summed over all but the labels `by`."""
    grouped = f" by ({by})" if by else ""
    return f"sum{grouped} (rate({metric}{f'{{{where}}}' if where else ''}[{RATE}]))"


def quantile(q: float, histogram: str, by: str = "", where: str = "") -> str:
    """A quantile of a histogram, apart for each value of the labels `by`."""
    buckets = rate(f"{histogram}_bucket", f"{by}, le" if by else "le", where)
    return f"histogram_quantile({q}, {buckets})"


def percentiles(histogram: str) -> list[tuple[str, str]]:
    """The median and what lies above it."""
    return [(quantile(q, histogram), f"p{q * 100:g}") for q in (0.5, 0.95, 0.99)]


def number(title: str, text: str, query: str, unit: str = "short") -> Panel:
    """One number, as it is now."""
    return Panel(title, text, unit, [(query, "")], kind="stat", width=4)


PROCESS = "{{instance}} {{process}}"
JOB = 'job="broker"'

OVERVIEW = Dashboard(
    "broker-overview",
    "Broker: overview",
    "Traffic, latency, saturation and errors of the whole broker.",
    {
        "Now": [
            number("Shards linked", "Shards that the gateway can ask.", "sum(broker_shard_up)"),
            number(
                "Processes down",
                "Gateway and shards that do not answer when they are scraped.",
                f"count(up{{{JOB}}} == 0) or sum(up{{{JOB}}}) * 0",
            ),
            number("Connections", "Open ones of both ports.", "sum(broker_connections)"),
            number("Subscriptions", "Standing ones of all clients.", "sum(broker_subscriptions)"),
            number("Calls", "Of stream functions.", rate("broker_stream_calls_total"), "reqps"),
            number("Deliveries", "Frames to clients.", rate("broker_deliveries_total"), "cps"),
        ],
        "Traffic": [
            Panel(
                "Calls by function",
                "Calls of stream functions that workers made.",
                "reqps",
                [(rate("broker_stream_calls_total", "function"), "{{function}}")],
            ),
            Panel(
                "Events and deliveries",
                "Events that shards sent, and the frames to clients that came of them.",
                "cps",
                [
                    (rate("broker_events_total", where='shard=""'), "events"),
                    (rate("broker_deliveries_total"), "deliveries"),
                ],
            ),
            Panel(
                "Workers",
                "Messages that came from workers, and calls and triggers that were sent to them.",
                "cps",
                [
                    (rate("broker_worker_messages_total"), "messages"),
                    (rate("broker_invocations_total"), "invocations"),
                ],
            ),
            Panel(
                "Bytes received",
                "From clients and workers, by port.",
                "Bps",
                [(rate("broker_received_bytes_total", "port"), "{{port}}")],
            ),
            Panel(
                "Bytes sent",
                "Messages to clients and workers, by port.",
                "Bps",
                [(rate("broker_sent_bytes_total", "port"), "{{port}}")],
            ),
            Panel(
                "Fan-out size",
                "Frames to clients of the events that a shard sent in one piece.",
                "short",
                percentiles("broker_event_fanout_deliveries"),
            ),
        ],
        "Latency": [
            Panel(
                "Calls",
                "From a call's arrival at the gateway to its answer, of a sample of the calls.",
                "s",
                percentiles("broker_stream_call_seconds"),
            ),
            Panel(
                "Calls by function, p99",
                "The same, for each function.",
                "s",
                [(quantile(0.99, "broker_stream_call_seconds", "function"), "{{function}}")],
            ),
            Panel(
                "Commits",
                "From the start of a batch until it is durable, on all shards.",
                "s",
                percentiles("broker_commit_seconds"),
            ),
            Panel(
                "Fan-out",
                "Handing the events that a shard sent in one piece to all subscribers.",
                "s",
                percentiles("broker_event_fanout_seconds"),
            ),
            Panel(
                "Change to socket",
                "From a change's timestamp, just before its commit, until its frames are handed "
                "to the sockets.",
                "s",
                percentiles("broker_event_delay_seconds"),
            ),
            Panel(
                "Event loop lag",
                "The most that a process was late lately: everything in it waits so long.",
                "s",
                [("broker_loop_lag_seconds", PROCESS)],
            ),
        ],
        "Saturation": [
            Panel(
                "CPU",
                "Cores that a process uses. Each can use little more than one.",
                "percentunit",
                [(f"rate(process_cpu_seconds_total{{{JOB}}}[{RATE}])", PROCESS)],
            ),
            Panel(
                "Memory",
                "Resident memory of a process.",
                "bytes",
                [(f"process_resident_memory_bytes{{{JOB}}}", PROCESS)],
            ),
            Panel(
                "File descriptors",
                "Share of the allowed ones that is in use; each connection takes one.",
                "percentunit",
                [(f"process_open_fds{{{JOB}}} / process_max_fds{{{JOB}}}", PROCESS)],
            ),
            Panel(
                "Link queues",
                "Bytes that wait between the processes. At half of link_queue_bytes_max calls to "
                "the shard fail.",
                "bytes",
                [
                    ("broker_shard_link_queue_bytes", "to shard {{shard}}"),
                    ("broker_link_queue_bytes", "from shard {{shard}}"),
                ],
            ),
            Panel(
                "In flight",
                "Calls that wait for a shard, and calls to workers that wait for their answer.",
                "short",
                [
                    ("sum(broker_shard_calls_in_flight)", "shards"),
                    ("sum(broker_invocations_pending)", "workers"),
                    ("sum(broker_custom_operations_waiting)", "workers that store streams"),
                ],
            ),
            Panel(
                "Operations waiting",
                "Operations that shards took and did not settle yet.",
                "short",
                [("broker_operations_waiting", "shard {{shard}}")],
            ),
        ],
        "Errors": [
            Panel(
                "Calls answered with an error",
                "By code, from the shards. Codes of bad input are the callers' fault.",
                "cps",
                [(rate("broker_call_failures_total", "code"), "{{code}}")],
            ),
            Panel(
                "Calls refused",
                "Calls that were not tried, as too much waits already.",
                "cps",
                [
                    (rate("broker_shard_calls_refused_total"), "for a shard"),
                    (rate("broker_invocations_refused_total"), "for workers"),
                    (rate("broker_custom_operations_refused_total"), "for custom streams"),
                ],
            ),
            Panel(
                "Requests refused",
                "Handshakes that were refused, by port and reason.",
                "cps",
                [(rate("broker_handshakes_refused_total", "port, reason"), "{{port}} {{reason}}")],
            ),
            Panel(
                "Connections cut",
                "Connections that the broker ended: the peer was silent, or took nothing.",
                "cps",
                [
                    (rate("broker_connections_dead_total", "port"), "{{port}} dead"),
                    (rate("broker_connections_stalled_total", "port"), "{{port}} stalled"),
                ],
            ),
            Panel(
                "Triggers not fired",
                "Triggers whose handler or condition failed, and events dropped as too many wait "
                "for a condition.",
                "cps",
                [
                    (
                        rate(
                            "broker_trigger_invocations_total",
                            "outcome",
                            'outcome!~"fired|skipped"',
                        ),
                        "{{outcome}}",
                    )
                ],
            ),
            Panel(
                "Bounds hit",
                "Peers that are not read from as too much of theirs waits, links that were cut as "
                "they were full, log lines left out.",
                "cps",
                [
                    (rate("broker_connections_paused_total", "port"), "{{port}} paused"),
                    (rate("broker_connections_throttled_total", "port"), "{{port}} throttled"),
                    (rate("broker_shard_link_overflows_total"), "links to shards"),
                    (rate("broker_link_overflows_total"), "links from shards"),
                    (rate("broker_log_lines_left_out_total"), "log lines"),
                ],
            ),
            Panel(
                "Connections of the limit",
                "Share of connections_max that is open; past it further ones are cut.",
                "percentunit",
                [
                    (
                        "broker_connections / on (job, instance) group_left"
                        ' broker_limit{limit="connections_max", shard=""}',
                        "{{port}}",
                    )
                ],
            ),
            Panel(
                "Restarts",
                "Starts of processes in the last 15 minutes beside the first.",
                "short",
                [(f"changes(process_start_time_seconds{{{JOB}}}[15m])", PROCESS)],
            ),
        ],
    },
)

SHARD = 'shard=~"$shard"'
BY_SHARD = "shard {{shard}}"


def on_shard(metric: str) -> list[tuple[str, str]]:
    """A gauge of each chosen shard."""
    return [(f"{metric}{{{SHARD}}}", BY_SHARD)]


def rate_on_shard(metric: str) -> list[tuple[str, str]]:
    """A counter's growth on each chosen shard."""
    return [(rate(metric, "shard", SHARD), BY_SHARD)]


SHARDS = Dashboard(
    "broker-shards",
    "Broker: shards",
    "How the work is spread, and what each shard does with it.",
    {
        "Balance": [
            Panel(
                "Operations",
                "Operations that each shard settled. Equal lines mean that groups spread well.",
                "cps",
                rate_on_shard("broker_commit_operations_total"),
            ),
            Panel(
                "Imbalance",
                "Operations of the busiest shard over the mean of all: 1 is even; one much used "
                "group makes its shard hot.",
                "short",
                [
                    (
                        f"max({rate('broker_commit_operations_total', 'shard')})"
                        f" / avg({rate('broker_commit_operations_total', 'shard')})",
                        "busiest / mean",
                    )
                ],
            ),
            Panel(
                "CPU",
                "Cores that each shard uses.",
                "percentunit",
                [
                    (
                        f"rate(process_cpu_seconds_total{{{JOB}}}[{RATE}]) * on (job, instance)"
                        f' group_left (shard) broker_build_info{{{SHARD}, shard!=""}}',
                        BY_SHARD,
                    )
                ],
            ),
            Panel(
                "Hot shards",
                "The five that do most now.",
                "cps",
                [(f"topk(5, {rate('broker_commit_operations_total', 'shard')})", BY_SHARD)],
            ),
            Panel(
                "Event loop lag",
                "The most that the shard was late lately.",
                "s",
                on_shard("broker_loop_lag_seconds"),
            ),
            Panel(
                "Linked",
                "1 while the gateway can ask the shard.",
                "short",
                on_shard("broker_shard_up"),
            ),
        ],
        "Commits": [
            Panel(
                "Duration, median",
                "From the start of a batch until it is durable.",
                "s",
                [(quantile(0.5, "broker_commit_seconds", "shard", SHARD), BY_SHARD)],
            ),
            Panel(
                "Duration, p99",
                "The slowest batch in a hundred: the disk, or the Redis server.",
                "s",
                [(quantile(0.99, "broker_commit_seconds", "shard", SHARD), BY_SHARD)],
            ),
            Panel(
                "Operations per batch",
                "The mean. It grows with load, which is what makes commits cheap.",
                "short",
                [
                    (
                        rate("broker_commit_batch_operations_sum", "shard", SHARD)
                        + " / "
                        + rate("broker_commit_batch_operations_count", "shard", SHARD),
                        BY_SHARD,
                    )
                ],
            ),
            Panel(
                "Batches",
                "Batches handed to the storage.",
                "cps",
                rate_on_shard("broker_commit_batches_total"),
            ),
            Panel(
                "Operations waiting",
                "Taken and not settled yet; when too many wait, calls fail with overloaded.",
                "short",
                on_shard("broker_operations_waiting"),
            ),
            Panel(
                "Calls answered with an error",
                "By code. Codes of bad input are the callers' fault.",
                "cps",
                [
                    (
                        rate("broker_call_failures_total", "shard, code", SHARD),
                        BY_SHARD + " {{code}}",
                    )
                ],
            ),
        ],
        "Gateways": [
            Panel(
                "Calls by kind",
                "Messages of gateways that ask for something.",
                "reqps",
                [
                    (
                        rate("broker_calls_total", "shard, function", SHARD),
                        BY_SHARD + " {{function}}",
                    )
                ],
            ),
            Panel(
                "Events",
                "Events sent to gateways: one for each gateway that has subscribers.",
                "cps",
                rate_on_shard("broker_events_total"),
            ),
            Panel(
                "Calls in flight",
                "Calls that wait for the shard's answer, seen from the gateway.",
                "short",
                on_shard("broker_shard_calls_in_flight"),
            ),
            Panel(
                "Link queues",
                "Bytes that the other side has not taken yet.",
                "bytes",
                [
                    (f"broker_shard_link_queue_bytes{{{SHARD}}}", "to " + BY_SHARD),
                    (f"broker_link_queue_bytes{{{SHARD}}}", "from " + BY_SHARD),
                ],
            ),
            Panel(
                "Links made",
                "In the last 15 minutes; each ends with clients that resume or sync.",
                "short",
                [(f"increase(broker_shard_links_made_total{{{SHARD}}}[15m])", BY_SHARD)],
            ),
            Panel(
                "Triggers fired",
                "Invocations that the shard asked its gateways for.",
                "cps",
                rate_on_shard("broker_triggers_fired_total"),
            ),
        ],
        "What it stores": [
            Panel("Items", "As of the last look.", "short", on_shard("broker_store_items")),
            Panel("Groups", "Those with items.", "short", on_shard("broker_store_groups")),
            Panel(
                "Values",
                "About the bytes of the items' values.",
                "bytes",
                on_shard("broker_store_bytes"),
            ),
            Panel(
                "On disk",
                "Bytes of the stream files, with their logs and histories.",
                "bytes",
                on_shard("broker_store_disk_bytes"),
            ),
            Panel(
                "Answered from memory",
                "Share of the operations whose data was in the cache.",
                "percentunit",
                [
                    (
                        f"{rate('broker_cache_hits_total', 'shard', SHARD)} / ("
                        + rate("broker_cache_hits_total", "shard", SHARD)
                        + " + "
                        + rate("broker_cache_misses_total", "shard", SHARD)
                        + ")",
                        BY_SHARD,
                    )
                ],
            ),
            Panel(
                "Pushed out",
                "Groups that the cache forgot, and files that were closed, as others need room.",
                "cps",
                [
                    (rate("broker_cache_evictions_total", "shard", SHARD), BY_SHARD + " groups"),
                    (rate("broker_stream_files_closed_total", "shard", SHARD), BY_SHARD + " files"),
                ],
            ),
        ],
        "What it keeps": [
            Panel(
                "Groups and events in memory",
                "Bytes of cached groups with storage on disk, of kept events with storage in "
                "memory.",
                "bytes",
                [
                    (f"broker_cache_bytes{{{SHARD}}}", BY_SHARD + " groups"),
                    (f"broker_history_bytes{{{SHARD}}}", BY_SHARD + " events"),
                ],
            ),
            Panel(
                "Groups cached",
                "With storage on disk: groups that are answered without reading.",
                "short",
                on_shard("broker_groups_cached"),
            ),
            Panel(
                "Streams open",
                "With storage on disk: files that are open.",
                "short",
                on_shard("broker_streams_open"),
            ),
            Panel(
                "Subscriptions",
                "Subscriptions whose leave the shard would tell if their gateway died.",
                "short",
                on_shard("broker_leases"),
            ),
            Panel(
                "Leaves owed",
                "Leaves of gateways that died, which wait for a worker's trigger.",
                "short",
                on_shard("broker_leaves_owed"),
            ),
            Panel(
                "Triggers",
                "Triggers that workers registered.",
                "short",
                on_shard("broker_triggers"),
            ),
        ],
    },
    [Variable("shard", "shard", "broker_commit_batches_total")],
)


def rates(*metrics: tuple[str, str], by: str = "") -> list[tuple[str, str]]:
    """Growth of counters with their legends."""
    return [(rate(metric, by), legend) for metric, legend in metrics]


CLIENTS = Dashboard(
    "broker-clients",
    "Broker: clients and workers",
    "Who is connected, what they ask for, and who can't keep up.",
    {
        "Connections": [
            Panel(
                "Open",
                "Open connections, by port.",
                "short",
                [("sum by (port) (broker_connections)", "{{port}}")],
            ),
            Panel(
                "Accepted",
                "TCP connections that were accepted, by port.",
                "cps",
                [(rate("broker_connections_accepted_total", "port"), "{{port}}")],
            ),
            Panel(
                "Refused",
                "Requests that were refused, by port and reason.",
                "cps",
                [(rate("broker_handshakes_refused_total", "port, reason"), "{{port}} {{reason}}")],
            ),
            Panel(
                "Throttled",
                "Times that nothing was read from a peer for a while, as it sent too much.",
                "cps",
                [(rate("broker_connections_throttled_total", "port"), "{{port}}")],
            ),
            Panel(
                "Closed by the broker",
                "Clients whose authentication expired, or that a worker wanted closed.",
                "cps",
                rates(
                    ("broker_clients_expired_total", "expired"),
                    ("broker_clients_disconnected_total", "disconnected"),
                ),
            ),
            Panel(
                "Cut",
                "Peers that were silent, and peers that took nothing of what waited for them.",
                "cps",
                [
                    (rate("broker_connections_dead_total", "port"), "{{port}} dead"),
                    (rate("broker_connections_stalled_total", "port"), "{{port}} stalled"),
                ],
            ),
        ],
        "Authentication": [
            Panel(
                "Answers",
                "Of the auth function. failed: no usable answer; unavailable: no worker answered; "
                "overloaded: too many wait.",
                "cps",
                [(rate("broker_auth_total", "outcome"), "{{outcome}}")],
                width=12,
            ),
            Panel(
                "Waiting",
                "Handshakes and renewals that wait for the auth function.",
                "short",
                [("sum(broker_auth_waiting)", "waiting")],
                width=12,
            ),
        ],
        "Subscriptions": [
            Panel(
                "Standing",
                "Subscriptions, the groups that they are of, and those whose client is away and "
                "may come back.",
                "short",
                [
                    ("sum(broker_subscriptions)", "subscriptions"),
                    ("sum(broker_subscribed_groups)", "groups"),
                    ("sum(broker_subscriptions_away)", "away"),
                ],
            ),
            Panel(
                "Joins",
                "By outcome.",
                "cps",
                [(rate("broker_joins_total", "outcome"), "{{outcome}}")],
            ),
            Panel(
                "Came back",
                "Joins that went on from a position, and subscriptions of clients that were away.",
                "cps",
                rates(
                    ("broker_joins_resumed_total", "resumed"),
                    ("broker_subscriptions_returned_total", "returned"),
                ),
            ),
            Panel(
                "Deliveries per event",
                "Frames to clients for each event that came from a shard.",
                "short",
                [
                    (
                        f"{rate('broker_deliveries_total')} / "
                        + rate("broker_events_total", where='shard=""'),
                        "deliveries / event",
                    )
                ],
            ),
            Panel(
                "Slow clients",
                "Times that a client's backlog was dropped: it gets a fresh sync.",
                "cps",
                rates(("broker_clients_behind_total", "behind")),
            ),
            Panel(
                "Frames saved and dropped",
                "Frames that newer ones of the same item replaced, and those of dropped backlogs.",
                "cps",
                rates(
                    ("broker_frames_conflated_total", "conflated"),
                    ("broker_frames_dropped_total", "dropped"),
                ),
            ),
            Panel(
                "Bad messages",
                "Messages of clients that were answered with an error.",
                "cps",
                rates(("broker_client_messages_bad_total", "bad")),
            ),
            Panel(
                "Gaps",
                "Gaps in the events of a group, each healed with a sync.",
                "cps",
                rates(("broker_event_gaps_total", "gaps")),
            ),
        ],
        "Workers": [
            Panel(
                "Connected",
                "Workers, and the functions that they serve.",
                "short",
                [("sum(broker_workers)", "workers"), ("sum(broker_functions)", "functions")],
            ),
            Panel(
                "Messages",
                "Messages of workers, and those that could not be read.",
                "cps",
                rates(
                    ("broker_worker_messages_total", "messages"),
                    ("broker_worker_messages_undecodable_total", "undecodable"),
                ),
            ),
            Panel(
                "Invocations",
                "Calls sent to workers; resent as the worker that had them left; refused as too "
                "many wait.",
                "cps",
                rates(
                    ("broker_invocations_total", "sent"),
                    ("broker_invocations_resent_total", "resent"),
                    ("broker_invocations_refused_total", "refused"),
                ),
            ),
            Panel(
                "Invocations pending",
                "Calls to workers that wait for their answer.",
                "short",
                [("sum(broker_invocations_pending)", "pending")],
            ),
            Panel(
                "Triggers",
                "By what became of them. failed: the handler gave an error or could not be asked; "
                "dropped: too many events wait for the trigger's condition.",
                "cps",
                [(rate("broker_trigger_invocations_total", "outcome"), "{{outcome}}")],
            ),
            Panel(
                "Custom streams",
                "Operations that wait for workers that store streams, and those refused.",
                "short",
                [
                    ("sum(broker_custom_operations_waiting)", "waiting"),
                    (rate("broker_custom_operations_refused_total"), "refused per second"),
                ],
            ),
        ],
        "Other gateways": [
            Panel(
                "Linked",
                "Other gateways that each is linked with, so that its workers are shared: by a "
                "socket those of its own broker, by Redis those of other brokers.",
                "short",
                [("broker_peers", f"{PROCESS} {{{{transport}}}}")],
            ),
            Panel(
                "Links made",
                "In the last 15 minutes, by each end; more than one for each gateway that was "
                "started means that links are lost.",
                "short",
                [("increase(broker_peer_links_made_total[15m])", PROCESS)],
            ),
            Panel(
                "Queues",
                "Bytes that other gateways have not taken yet. At half of link_queue_bytes_max "
                "calls to the workers of that one fail.",
                "bytes",
                [("broker_peer_queue_bytes", f"{PROCESS} {{{{transport}}}}")],
            ),
            Panel(
                "Calls",
                "Calls sent to workers of other gateways; received from there for workers here; "
                "refused as too much waits for their gateway.",
                "cps",
                rates(
                    ("broker_peer_calls_sent_total", "sent"),
                    ("broker_peer_calls_received_total", "received"),
                    ("broker_peer_calls_refused_total", "refused"),
                ),
            ),
            Panel(
                "Calls pending",
                "Calls of other gateways that workers here have not answered.",
                "short",
                [("broker_peer_calls_pending", PROCESS)],
            ),
            Panel(
                "Heard by Redis",
                "With Redis: what engines and other programs told subscribers, by outcome, and "
                "changes of other brokers that could not be told, as they were not kept.",
                "cps",
                [
                    (rate("broker_foreign_events_total", "outcome"), "told {{outcome}}"),
                    (rate("broker_changes_lost_total"), "changes lost"),
                ],
            ),
        ],
    },
)

DASHBOARDS = (OVERVIEW, SHARDS, CLIENTS)


def panel_model(panel: Panel, panel_id: int, x: int, y: int) -> dict[str, Any]:
    """A panel as Grafana stores it, at column `x` and line `y`."""
    stat = panel.kind == "stat"
    legend = {"displayMode": "list", "placement": "bottom", "showLegend": True}
    targets = [
        {"refId": chr(ord("A") + index), "expr": query, "legendFormat": name, "instant": stat}
        for index, (query, name) in enumerate(panel.queries)
    ]
    return {
        "id": panel_id,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": HEIGHTS[panel.kind]},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"reduceOptions": {"calcs": ["lastNotNull"]}}
        if stat
        else {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}},
        "targets": targets,
    }


def panel_models(rows: dict[str, list[Panel]]) -> list[dict[str, Any]]:
    """The panels one after the other, each row below its title."""
    ids, y = count(1), 0
    models: list[dict[str, Any]] = []
    for title, panels in rows.items():
        place = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
        models.append({"id": next(ids), "type": "row", "title": title, "gridPos": place})
        x, y, height = 0, y + 1, 0
        for panel in panels:
            if x + panel.width > COLUMNS:
                x, y, height = 0, y + height, 0
            models.append(panel_model(panel, next(ids), x, y))
            x, height = x + panel.width, max(height, HEIGHTS[panel.kind])
        y += height
    return models


def variable_model(variable: Variable) -> dict[str, Any]:
    """A variable as Grafana stores it."""
    query = f"label_values({variable.metric}, {variable.label})"
    return {
        "name": variable.name,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": variable.name},
        "refresh": 2,  # whenever the time range changes
        "sort": 3,  # by number
        "multi": True,
        "includeAll": True,
        "allValue": ".+",  # not what has no such label: the gateway
        "current": {"text": "All", "value": "$__all"},
    }


def dashboard_model(dashboard: Dashboard) -> dict[str, Any]:
    """A dashboard as Grafana stores it."""
    datasource = {"name": "datasource", "type": "datasource", "query": "prometheus"}
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.text,
        "tags": ["broker"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "links": [
            {"title": "Broker", "type": "dashboards", "tags": ["broker"], "asDropdown": True}
        ],
        "templating": {"list": [datasource, *map(variable_model, dashboard.variables)]},
        "panels": panel_models(dashboard.rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the dashboards as JSON files.")
    default = Path(__file__).parent / "dashboards"
    parser.add_argument("directory", nargs="?", type=Path, default=default)
    directory: Path = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    for dashboard in DASHBOARDS:
        text = json.dumps(dashboard_model(dashboard), indent=1) + "\n"
        (directory / f"{dashboard.uid.removeprefix('broker-')}.json").write_text(text)


if __name__ == "__main__":
    main()
