"""The tables of `broker status` and `broker top`. Without I/O."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from datetime import datetime

from broker.output import Colour, printable, table
from broker.report import GatewayReport, ProcessReport, ShardReport, StatusReport, TopReport

Painted = Callable[[str, Colour], str]

NOTHING = "-"
_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def status_lines(report: StatusReport, painted: Painted, width: int) -> list[str]:
    """The whole broker: processes, shards, links and gateways, a table each."""
    ready = "ready" if report.ready else "not ready: " + "; ".join(map(printable, report.reasons))
    head = f"broker {printable(report.version)}  {_time(report.at_ms)}  {ready}"
    lines = [painted(head, Colour.GREEN if report.ready else Colour.RED), ""]
    abouts = [*(g.about for g in report.gateways), *(s.about for s in report.shards)]
    down = {k for k, about in enumerate(abouts) if about.state != "up"}
    lines += _table(
        ["PROCESS", "STATE", "PID", "UP", "RESTARTS", "CPU", "MEMORY", "LOOP LAG", "WHY"],
        [_process(about) for about in abouts],
        painted,
        width,
        red=down,
    )
    lines += ["", *_shards(report.shards, painted, width)]
    lines += ["", *_links(report, painted, width)]
    return [*lines, "", *_gateways(report.gateways, painted, width)]


def top_lines(report: TopReport, painted: Painted, width: int) -> list[str]:
    """The groups and the streams that are used most."""
    head = f"broker  {_time(report.at_ms)}"
    if report.missing:
        missing = ", ".join(map(str, report.missing))
        head = painted(f"{head}  without shard {missing}, which does not answer", Colour.RED)
    groups = [
        [
            printable(group.stream_name),
            printable(group.group_id),
            str(group.shard),
            _rate(group.operations_per_s),
            _rate(group.deliveries_per_s),
            str(group.subscriptions),
        ]
        for group in report.groups
    ]
    streams = [
        [printable(stream.stream_name), _rate(stream.operations_per_s)] for stream in report.streams
    ]
    header = ["STREAM", "GROUP", "SHARD", "CALLS/S", "DELIVERIES/S", "SUBSCRIPTIONS"]
    return [
        head,
        "",
        *_table(header, groups, painted, width),
        "",
        *_table(["STREAM", "CALLS/S"], streams, painted, width),
    ]


def _process(about: ProcessReport) -> list[str]:
    return [
        printable(about.process),
        printable(about.state),
        _number(about.pid),
        NOTHING if about.uptime_s is None else duration(about.uptime_s),
        _number(about.restarts),
        NOTHING if about.cpu_cores is None else f"{about.cpu_cores:.0%}",
        NOTHING if about.memory_bytes is None else size(about.memory_bytes),
        NOTHING if about.loop_lag_s is None else f"{about.loop_lag_s * 1000:.1f} ms",
        "" if about.reason is None else printable(about.reason),
    ]


def _shards(shards: Sequence[ShardReport], painted: Painted, width: int) -> list[str]:
    rows = []
    for shard in shards:
        rates, store = shard.about.rates, shard.store
        batches = rates.get("batches", 0.0)
        rows.append(
            [
                str(shard.shard),
                _rate(rates.get("calls")),
                _rate(rates.get("failures")),
                _rate(rates.get("events")),
                _rate(rates.get("triggers")),
                f"{rates.get('operations', 0.0) / batches:.1f}" if batches else NOTHING,
                str(shard.operations_waiting) if shard.about.state == "up" else NOTHING,
                *map(_number, (store.streams, store.groups, store.items)),
                NOTHING if store.bytes is None else size(store.bytes),
            ]
        )
    header = ["SHARD", "CALLS/S", "FAILED/S", "EVENTS/S", "TRIGGERS/S", "BATCH", "WAITING"]
    header += ["STREAMS", "GROUPS", "ITEMS", "STORED"]
    return _table(header, rows, painted, width)


def _links(report: StatusReport, painted: Painted, width: int) -> list[str]:
    back = {shard.shard: shard for shard in report.shards}
    rows: list[list[str]] = []
    down: set[int] = set()
    for gateway in report.gateways:
        for link in gateway.links:
            shard = back.get(link.shard)
            answers = shard is not None and shard.about.state == "up"
            if not link.up:
                down.add(len(rows))
            rows.append(
                [
                    f"{printable(gateway.about.process)} > shard-{link.shard}",
                    "up" if link.up else "down",
                    str(link.in_flight),
                    size(link.queue_bytes),
                    size(shard.queue_bytes) if shard is not None and answers else NOTHING,
                    str(link.links_made),
                ]
            )
    header = ["LINK", "STATE", "IN FLIGHT", "QUEUE TO", "QUEUE FROM", "MADE"]
    return _table(header, rows, painted, width, red=down)


def _gateways(gateways: Sequence[GatewayReport], painted: Painted, width: int) -> list[str]:
    rows = [
        [
            printable(gateway.about.process),
            str(gateway.clients),
            str(gateway.workers),
            str(gateway.subscriptions),
            str(gateway.groups),
            str(gateway.functions),
            str(gateway.invocations_pending),
            _rate(gateway.about.rates.get("calls")),
            _rate(gateway.about.rates.get("deliveries")),
            _rate(gateway.about.rates.get("invocations")),
        ]
        for gateway in gateways
    ]
    header = ["GATEWAY", "CLIENTS", "WORKERS", "SUBSCRIPTIONS", "GROUPS", "FUNCTIONS"]
    header += ["PENDING", "CALLS/S", "DELIVERIES/S", "INVOCATIONS/S"]
    return _table(header, rows, painted, width)


def _table(
    header: list[str],
    rows: Sequence[list[str]],
    painted: Painted,
    width: int,
    red: Collection[int] = (),
) -> list[str]:
    head, *lines = table([header, *rows], width)
    drawn = [painted(line, Colour.RED) if n in red else line for n, line in enumerate(lines)]
    return [painted(head, Colour.BOLD), *drawn]


def size(count: int) -> str:
    """Bytes, in the largest unit of which there is one."""
    value, unit = float(count), 0
    while value >= 1024 and unit < len(_BYTE_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{count} B" if not unit else f"{value:.1f} {_BYTE_UNITS[unit]}"


def duration(seconds: float) -> str:
    """The two largest units of a time."""
    whole = int(seconds)
    units = [("d", 86_400), ("h", 3600), ("m", 60), ("s", 1)]
    parts: list[str] = []
    for name, length in units:
        if whole >= length or parts or name == "s":
            parts.append(f"{whole // length}{name}")
            whole %= length
    return "".join(parts[:2])


def _rate(per_s: float | None) -> str:
    if per_s is None:
        return NOTHING
    return f"{per_s:.1f}" if per_s < 100 else f"{per_s:.0f}"


def _number(count: int | None) -> str:
    return NOTHING if count is None else str(count)


def _time(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000).strftime("%H:%M:%S")
