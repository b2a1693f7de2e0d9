"""What processes tell of themselves: the answers of `broker::status` and `broker::top`.

Fields may be added; whoever reads them passes over what it does not know.
"""

from __future__ import annotations

from msgspec import Struct, field

TOP_MAX = 100
"""Entries of each kind that one `broker::top` may ask for."""


class ProcessReport(Struct):
    """A process. `rates`: by what is counted, per second over the last ten.

    state: `up`, or `down` for one that could not be asked; then `reason` says why and the rest is
    nothing.
    """

    process: str
    state: str = "up"
    reason: str | None = None
    pid: int | None = None
    uptime_s: float | None = None
    restarts: int | None = None
    """By its supervisor, since that was started; systemd counts those of units."""
    cpu_cores: float | None = None
    memory_bytes: int | None = None
    loop_lag_s: float | None = None
    rates: dict[str, float] = field(default_factory=dict)


class LinkReport(Struct):
    """The gateway's end of a link. `in_flight`: calls that wait for the shard's answer."""

    shard: int
    up: bool
    in_flight: int
    queue_bytes: int
    links_made: int


class GatewayReport(Struct):
    """A gateway. `clients` and `workers` are connections; `groups` have subscriptions."""

    about: ProcessReport
    gateway_id: str
    clients: int = 0
    workers: int = 0
    subscriptions: int = 0
    groups: int = 0
    functions: int = 0
    invocations_pending: int = 0
    links: list[LinkReport] = field(default_factory=list)


class StoreReport(Struct):
    """What a shard stores, as of its last look; None: it does not tell, or did not look yet."""

    streams: int | None = None
    groups: int | None = None
    items: int | None = None
    bytes: int | None = None


class ShardReport(Struct):
    """A shard. `queue_bytes` wait for gateways to take them."""

    about: ProcessReport
    shard: int
    operations_waiting: int = 0
    triggers: int = 0
    links: int = 0
    queue_bytes: int = 0
    store: StoreReport = field(default_factory=StoreReport)
    gateways: list[GatewayReport] = field(default_factory=list)
    """What the gateways that are linked told last; left out of what a gateway answers."""


class StatusReport(Struct):
    """The whole broker, as the gateway `gateway_id` sees it. `at_ms`: milliseconds since 1970."""

    version: str
    at_ms: int
    gateway_id: str
    ready: bool
    reasons: list[str]
    gateways: list[GatewayReport]
    shards: list[ShardReport]


class HotGroup(Struct):
    """Rates are per second, over the last 10 to 20 s; what is seldom may count a little low."""

    stream_name: str
    group_id: str
    shard: int
    operations_per_s: float = 0.0
    deliveries_per_s: float = 0.0
    """Frames to clients of the gateway that was asked."""
    subscriptions: int = 0
    """Of clients of that gateway."""


class HotStream(Struct):
    stream_name: str
    operations_per_s: float = 0.0


class ShardTop(Struct):
    """What a shard answers."""

    groups: list[tuple[str, str, float]]
    streams: list[tuple[str, float]]


class TopReport(Struct):
    """Most used first. `missing`: shards that could not be asked."""

    at_ms: int
    gateway_id: str
    groups: list[HotGroup]
    streams: list[HotStream]
    missing: list[int] = field(default_factory=list)
