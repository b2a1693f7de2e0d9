"""Draws panels of a dashboard from the results of their queries."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from deploy.grafana.svg import path, rect, text

COLOURS = [
    "#2a6f97",
    "#d1495b",
    "#3d8b40",
    "#e09f3e",
    "#7b4fa3",
    "#17a2a2",
    "#a05a2c",
    "#e377c2",
    "#7f8c1f",
    "#4d5b6a",
]
INK, PALE, GRID = "#222b33", "#66727d", "#e4e8eb"
LETTER = 5.6
"""Pixels of a letter of the font's size for legends and axes, about."""
LEGEND_LINES_MAX = 3
X_TICKS_MAX = 5
X_STEPS_S = (5, 10, 15, 20, 30, 60, 120, 300, 600, 900, 1800, 3600, 10_800, 21_600, 43_200, 86_400)
LEFT, TITLE, LINE = 62, 26, 14
"""Pixels left of the axis, above the graph, and of a line of text."""


@dataclass(frozen=True)
class Series:
    """A line of a graph: a legend, and values at times (seconds); what is no number is a gap."""

    legend: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Box:
    """A place on the picture, in pixels."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Window:
    """What time a graph shows: seconds since 1970, and between two points."""

    start: float
    end: float
    step: float


def scaled(value: float, base: float, names: Sequence[str]) -> tuple[float, str]:
    """The divisor that makes `value` short, and its name."""
    power = 0
    while abs(value) >= base ** (power + 1) and power + 1 < len(names):
        power += 1
    return base**power, names[power]


def seconds(value: float) -> tuple[float, str]:
    """As `scaled`, downwards."""
    for divisor, name in ((1.0, " s"), (1e-3, " ms"), (1e-6, " µs")):
        if value >= divisor:
            return divisor, name
    return (1e-9, " ns") if value else (1.0, " s")


DECIMAL = ("", " K", " M", " G")
UNITS: dict[str, Callable[[float], tuple[float, str]]] = {
    "short": lambda value: scaled(value, 1000, DECIMAL),
    "reqps": lambda value: scaled(value, 1000, [f"{name} req/s" for name in DECIMAL]),
    "cps": lambda value: scaled(value, 1000, [f"{name} c/s" for name in DECIMAL]),
    "Bps": lambda value: scaled(value, 1000, (" B/s", " kB/s", " MB/s", " GB/s")),
    "bytes": lambda value: scaled(value, 1024, (" B", " KiB", " MiB", " GiB")),
    "s": seconds,
    "percentunit": lambda _: (0.01, "%"),
}
"""Grafana's names of units to the divisor and the suffix that suit a value."""


def formatted(value: float, unit: str, suits: float | None = None) -> str:
    """A value with its unit, scaled as suits `suits`, or itself.

    Raises: KeyError for a unit that the dashboards do not use yet.
    """
    divisor, suffix = UNITS[unit](value if suits is None else suits)
    figure = value / divisor
    return (f"{figure:,.3g}" if figure < 1000 else f"{figure:,.0f}") + suffix


def ticks(highest: float, unit: str) -> list[float]:
    """Round values from 0 to `highest` or just above, three to six."""
    if not highest > 0:
        highest = 1.0
    divisor, _ = UNITS[unit](highest)
    rough = highest / divisor / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    count = math.ceil(highest / divisor / step - 1e-9)
    return [k * step * divisor for k in range(count + 1)]


def clock_ticks(window: Window) -> list[int]:
    """Round times within the window, X_TICKS_MAX at most for up to five days."""
    least = (window.end - window.start) / X_TICKS_MAX
    step = next((one for one in X_STEPS_S if one >= least), X_STEPS_S[-1])
    first = math.floor(window.start / step) + 1
    return [k * step for k in range(first, math.ceil(window.end / step))]


def draw(panel: dict[str, Any], series: Sequence[Series], window: Window, box: Box) -> list[str]:
    """A panel in its frame. `panel`: as the dashboard's file has it.

    Raises: KeyError when it is of a type or has a unit that is not known here.
    """
    body = DRAWERS[panel["type"]](panel, series, window, box)
    frame = rect(box.x, box.y, box.width, box.height, fill="white", stroke="#d5dade", rx=3)
    title = text(box.x + 10, box.y + 17, panel["title"], font_weight="bold", fill=INK)
    return [frame, title, *body]


def stat(panel: dict[str, Any], series: Sequence[Series], _: Window, box: Box) -> Iterator[str]:
    """One number: the last that is one."""
    values = [value for one in series for _, value in one.points if not math.isnan(value)]
    shown = formatted(values[-1], unit_of(panel)) if values else "No data"
    middle = box.x + box.width / 2
    yield text(
        middle,
        box.y + box.height * 0.68,
        shown,
        text_anchor="middle",
        font_size=26 if len(shown) < 9 else 20,
        fill=COLOURS[0] if values else PALE,
    )


def timeseries(
    panel: dict[str, Any], series: Sequence[Series], window: Window, box: Box
) -> Iterator[str]:
    """Lines over time with axes, and their legend below."""
    legend = legend_lines(series, box.width - 20)
    bottom = box.y + box.height - 24 - LINE * len(legend)
    graph = Box(box.x + LEFT, box.y + TITLE + 6, box.width - LEFT - 14, bottom - box.y - TITLE - 6)
    values = [value for one in series for _, value in one.points if not math.isnan(value)]
    marks = ticks(max(values, default=0.0), unit_of(panel))
    top = marks[-1]

    def place(at: float, value: float) -> tuple[float, float]:
        share = (at - window.start) / (window.end - window.start)
        return graph.x + graph.width * share, bottom - graph.height * value / top

    for mark in marks:
        _, y = place(window.start, mark)
        yield path(f"M{graph.x:.1f} {y:.1f}h{graph.width:.1f}", stroke=GRID)
        label = formatted(mark, unit_of(panel), top) if mark or values else "0"
        yield text(graph.x - 6, y + 3.5, label, text_anchor="end", font_size=10, fill=PALE)
    for at in clock_ticks(window):
        x, _ = place(at, 0)
        clock = f"{datetime.fromtimestamp(at, UTC):%H:%M:%S}"
        yield path(f"M{x:.1f} {graph.y:.1f}V{bottom + 3:.1f}", stroke=GRID)
        yield text(x, bottom + 14, clock, text_anchor="middle", font_size=10, fill=PALE)
    if not values:
        middle = graph.y + graph.height / 2 + 4
        yield text(graph.x + graph.width / 2, middle, "No data", text_anchor="middle", fill=PALE)
    for k, one in enumerate(series):
        places = [(*place(at, value), at) for at, value in one.points if not math.isnan(value)]
        yield from line(places, window.step, COLOURS[k % len(COLOURS)])
    for row, entries in enumerate(legend):
        y = bottom + 24 + LINE * row + 6
        for number, x, name in entries:
            if number is not None:
                yield rect(box.x + x, y - 6, 10, 3, fill=COLOURS[number % len(COLOURS)])
            yield text(box.x + x + 14, y - 1, name, font_size=10, fill=INK)


def line(places: Sequence[tuple[float, float, float]], step: float, colour: str) -> Iterator[str]:
    """Strokes through places (x, y, time); one ends where a point is missing."""
    d: list[str] = []
    last = -math.inf
    for k, (x, y, at) in enumerate(places):
        joined = at - last <= step * 1.5
        alone = not joined and (k + 1 == len(places) or places[k + 1][2] - at > step * 1.5)
        # A round cap makes a dot of a stroke without length.
        d.append(f"{'L' if joined else 'M'}{x:.1f} {y:.1f}" + "h0" * alone)
        last = at
    if d:
        yield path(
            "".join(d),
            fill="none",
            stroke=colour,
            stroke_width=1.4,
            stroke_linecap="round",
            stroke_linejoin="round",
        )


def legend_lines(
    series: Sequence[Series], width: float
) -> list[list[tuple[int | None, float, str]]]:
    """Entries in lines: number of the series, x, text.

    When they do not all fit, those with the largest values come first, and the last entry counts
    the others.
    """
    lines, left = placed(list(enumerate(series)), width)
    if left:
        by_size = sorted(enumerate(series), key=lambda one: -largest(one[1]))
        lines, left = placed(by_size, width)
        _, x, _ = lines[-1][-1]
        lines[-1][-1] = (None, x, f"and {left + 1} more")
    return lines


def placed(
    entries: Sequence[tuple[int, Series]], width: float
) -> tuple[list[list[tuple[int | None, float, str]]], int]:
    """Entries from the left in at most LEGEND_LINES_MAX lines, and how many are left."""
    lines: list[list[tuple[int | None, float, str]]] = []
    x = math.inf
    for done, (number, one) in enumerate(entries):
        needs = 14 + LETTER * len(one.legend) + 10
        if x + needs > width + 10:
            if len(lines) == LEGEND_LINES_MAX:
                return lines, len(entries) - done
            lines.append([])
            x = 10.0
        lines[-1].append((number, x, one.legend))
        x += needs
    return lines, 0


def largest(series: Series) -> float:
    """Of its values, 0 without any."""
    return max((value for _, value in series.points if not math.isnan(value)), default=0.0)


def unit_of(panel: dict[str, Any]) -> str:
    unit: str = panel["fieldConfig"]["defaults"]["unit"]
    return unit


DRAWERS: dict[str, Callable[[dict[str, Any], Sequence[Series], Window, Box], Iterator[str]]] = {
    "stat": stat,
    "timeseries": timeseries,
}
"""Types of panels that the dashboards have."""
