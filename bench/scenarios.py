"""What is measured: each scenario is a load, a kind of broker, and what is wanted of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from bench.generator import Options

Unit = Literal["calls", "deliveries", "joins", "invocations", "connections", "clients"]
Store = Literal["in_memory", "file_based", "redis"]


class Wanted(NamedTuple):
    """A figure that the broker should reach: of which metric, and from which side."""

    metric: str
    at_least: float | None = None
    at_most: float | None = None

    def __str__(self) -> str:
        if self.at_least is not None:
            return f"≥ {self.at_least:,.10g}"
        return f"≤ {self.at_most:,.10g}"

    def met(self, value: float) -> bool:
        if self.at_least is not None:
            return value >= self.at_least
        return self.at_most is None or value <= self.at_most


@dataclass(frozen=True)
class Scenario:
    """One row of the table.

    Attributes:
        unit: what is counted; `clients` measures memory and CPU of clients that do nothing.
        load: options of the generator.
        prepare: loads that run before, such as one that fills the store.
        settings: what stands below `broker:` in the configuration.
        floor: whether the floor does the same.
        large: only with `--large`: takes minutes or much memory.
    """

    name: str
    title: str
    unit: Unit
    load: Options
    store: Store = "in_memory"
    shards: int = 2
    prepare: tuple[Options, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    wanted: tuple[Wanted, ...] = ()
    floor: bool = True
    large: bool = False


STORES: dict[Store, str] = {"in_memory": "memory", "file_based": "file", "redis": "redis"}
PIPELINED: Options = {"writers": 8, "in-flight": 32, "groups": 16, "items": 63}
ALONE: Options = {"writers": 1, "in-flight": 1, "groups": 16, "items": 63}
WINDOW = 64
"""Events under way at once in a saturated fan-out."""
NO_RATE_LIMIT = {"limits": {"client_messages_per_s_max": 0}}


def _at_least(per_s: float) -> tuple[Wanted, ...]:
    return (Wanted("per_s", at_least=per_s),)


def _sets() -> list[Scenario]:
    wanted = {
        "in_memory": _at_least(95_000),
        "file_based": _at_least(60_000),
        "redis": _at_least(40_000),
    }
    found = [
        Scenario(
            f"set-{short}",
            f"set, 8 x 32 in flight, {short}",
            "calls",
            PIPELINED,
            store,
            wanted=wanted[store],
        )
        for store, short in STORES.items()
    ]
    found += [
        Scenario(
            f"one-{short}",
            f"set, one at a time, {short}",
            "calls",
            ALONE,
            store,
            wanted=(Wanted("p50_ms", at_most=0.45),) if store == "file_based" else (),
        )
        for store, short in STORES.items()
    ]
    found += [
        Scenario(
            f"mixed-{short}",
            f"5 get, 4 set, 1 update, 8 x 32 in flight, {short}",
            "calls",
            {**PIPELINED, "operation": "mixed"},
            store,
            prepare=({**PIPELINED, "calls": 16 * 63},),
            floor=store != "redis",
        )
        for store, short in STORES.items()
    ]
    found += [
        Scenario(
            f"set-{STORES[store]}-{shards}-shard{'s' * (shards > 1)}",
            f"set, 8 x 32 in flight, {STORES[store]}, shards: {shards}",
            "calls",
            PIPELINED,
            store,
            shards=shards,
            floor=False,
        )
        for store in ("in_memory", "file_based")
        for shards in (1, 4)
    ]
    found.append(
        Scenario(
            "send",
            "custom events of nobody, 8 x 32 in flight",
            "calls",
            {**PIPELINED, "operation": "send"},
        )
    )
    return found


def _rates() -> list[Scenario]:
    return [
        Scenario(
            f"rate-{rate}-{STORES[store]}",
            f"set, {rate:,} a second whatever comes back, {STORES[store]}",
            "calls",
            {**PIPELINED, "in-flight": 4096, "rate": rate},
            store,
        )
        for store in ("in_memory", "file_based")
        for rate in (1_000, 5_000, 20_000, 40_000)
    ]


def _fan_out() -> list[Scenario]:
    found = []
    for count in (10, 100, 1_000, 5_000):
        group = {"subscribers": count, "items": 100, "sample": max(1, count // 20)}
        thousand = count == 1_000
        found += [
            Scenario(
                f"fanout-{count}",
                f"1 → {count:,}, {WINDOW} events under way",
                "deliveries",
                {**group, "writers": 1, "in-flight": 4 * WINDOW, "window": WINDOW},
                wanted=(
                    Wanted("per_s", at_least=2_500_000),
                    Wanted("cpu_s_per_million", at_most=0.5),
                )
                if thousand
                else (),
            ),
            Scenario(
                f"lone-{count}",
                f"1 → {count:,}, one event at a time",
                "deliveries",
                {**group, "writers": 1, "in-flight": 4, "window": 1},
                wanted=_at_least(230_000) if thousand else (),
            ),
            Scenario(
                f"paced-{count}",
                f"1 → {count:,}, 50 events a second",
                "deliveries",
                {**group, "sample": 1, "writers": 1, "in-flight": 4096, "rate": 50},
                wanted=(Wanted("p50_ms", at_most=6.5),) if thousand else (),
            ),
        ]
    found += [
        Scenario(
            "seen",
            "1 → 10, 8 writers x 32 in flight",
            "deliveries",
            {"writers": 8, "in-flight": 32, "subscribers": 10, "items": 100},
            wanted=(Wanted("seen_percent", at_least=100),),
        ),
        Scenario(
            "custom-events",
            f"1 → 100 custom events, {WINDOW} under way",
            "deliveries",
            {
                "subscribers": 100,
                "sample": 5,
                "writers": 1,
                "in-flight": 4 * WINDOW,
                "window": WINDOW,
                "operation": "send",
            },
        ),
        Scenario(
            "small-groups",
            "1,000 groups of 3 clients, 8 x 32 in flight",
            "deliveries",
            {
                **PIPELINED,
                "subscribers": 3_000,
                "groups": 1_000,
                "items": 10,
                "sample": 10,
            },
        ),
    ]
    found += [
        Scenario(
            f"streams-{STORES[store]}",
            f"1,000 streams with a client each, 8 x 32 in flight, {STORES[store]}",
            "deliveries",
            {
                **PIPELINED,
                "subscribers": 1_000,
                "streams": 1_000,
                "groups": 1_000,
                "items": 10,
                "sample": 10,
            },
            store,
            prepare=({**PIPELINED, "streams": 1_000, "groups": 1_000, "items": 1, "calls": 1_000},),
        )
        for store in ("in_memory", "file_based")
    ]
    return found


def _gateways() -> list[Scenario]:
    """Loads that one gateway is the bottleneck of, with several."""
    one = {s.name: s for s in (*_sets(), *_fan_out())}
    return [
        replace(
            one[name],
            name=f"{name}-{gateways}-gateways",
            title=f"{one[name].title}, gateways: {gateways}",
            settings={"gateways": gateways},
            wanted=(),
            floor=False,
        )
        for name in ("set-memory", "fanout-1000", "lone-1000")
        for gateways in (2, 4)
    ]


def _joins() -> list[Scenario]:
    found = []
    for count, groups in ((10, 100), (100, 100), (1_000, 20), (10_000, 4)):
        fill = {"writers": 8, "in-flight": 32, "groups": groups, "items": count}
        found.append(
            Scenario(
                f"join-{count}",
                f"100 clients join and leave, {count:,} items in the sync",
                "joins",
                {"joiners": 100, "groups": groups, "items": count},
                prepare=({**fill, "calls": groups * count},),
                settings=NO_RATE_LIMIT,
                wanted=_at_least(25_000) if count == 100 else (),
            )
        )
    return found


def _growth() -> list[Scenario]:
    sizes = [(1, 1_000), (1, 100_000), (1, 1_000_000), (1_000, 10), (100_000, 1)]
    found = []
    for groups, items in sizes:
        total = groups * items
        load = {"writers": 8, "in-flight": 32, "groups": groups, "items": items}
        what = f"{groups:,} groups" if groups > 1 else f"a group of {items:,} items"
        short = f"{groups}-groups" if groups > 1 else f"{items}-items"
        found += [
            Scenario(
                f"growth-{short}-{STORES[store]}",
                f"set anywhere in {what}, 8 x 32 in flight, {STORES[store]}",
                "calls",
                {**load, "shuffled": 1},
                store,
                prepare=({**load, "calls": total},),
                large=total > 100_000,
            )
            for store in ("in_memory", "file_based")
        ]
    return found


def _others() -> list[Scenario]:
    return [
        Scenario(
            "triggers",
            "a stream trigger, 256 calls under way",
            "invocations",
            {
                "writers": 1,
                "in-flight": 1024,
                "window": 256,
                "window-by": "invocations",
                "handlers": 1,
                "groups": 16,
                "items": 63,
            },
            wanted=_at_least(30_000),
        ),
        Scenario(
            "custom-stream",
            "set on a stream that a worker serves, 8 x 32 in flight",
            "calls",
            {**PIPELINED, "handlers": 1, "serve": "served"},
        ),
        Scenario(
            "connect",
            "2,000 clients connect and join, 64 at a time",
            "connections",
            {"subscribers": 2_000, "connecting": 1},
        ),
        Scenario(
            "idle",
            "clients that joined and do nothing",
            "clients",
            {"subscribers": 4_000, "groups": 1, "items": 1},
            wanted=(Wanted("kib_per_client", at_most=10),),
        ),
    ]


SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        *_sets(),
        *_rates(),
        *_fan_out(),
        *_gateways(),
        *_joins(),
        *_others(),
        *_growth(),
    )
}
