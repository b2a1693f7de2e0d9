"""The figures as a picture: bars of broker and floor, drawn as SVG without a library."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from deploy.grafana.svg import document, path, rect, text

WIDTH, NAMES, BARS = 860, 220, 500
ROW, BAR, GAP = 26, 9, 34
COLOURS = {"broker": "#2a6f97", "floor": "#b8c4ce"}
PANELS = {
    "per_s": "{unit} a second",
    "p50_ms": "median time of {unit}, ms (less is better)",
    "kib_per_client": "KiB of memory per idle client (less is better)",
}


def svg(rows: dict[str, dict[str, Any]]) -> str:
    """A picture of all rows, in a panel for each kind of figure; axes are logarithmic."""
    panels: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for name, row in rows.items():
        title = PANELS[row["metric"]].format(unit=row["unit"])
        panels.setdefault(title, []).append((name, row))
    body: list[str] = []
    y = 30
    for title, members in panels.items():
        body += _panel(title, members, y)
        y += GAP + ROW * len(members) + 30
    legend: list[str] = []
    for k, (side, colour) in enumerate(COLOURS.items()):
        legend.append(rect(NAMES + 90 * k, 8, 10, 10, fill=colour))
        legend.append(text(NAMES + 90 * k + 14, 17, side))
    return document(WIDTH, y, legend + body)


def _panel(title: str, members: list[tuple[str, dict[str, Any]]], y: int) -> Iterator[str]:
    metric = members[0][1]["metric"]
    values = [
        row[side][metric] for _, row in members for side in COLOURS if row.get(side, {}).get(metric)
    ]
    low = math.floor(math.log10(min(values)) - 0.1)
    high = max(math.ceil(math.log10(max(values))), low + 1)
    bottom = y + GAP + ROW * len(members)
    yield text(NAMES, y + 14, title, font_weight="bold")
    for power in range(low, high + 1):
        x = NAMES + BARS * (power - low) / (high - low)
        yield path(f"M{x:.1f} {y + GAP - 6}V{bottom}", stroke="#ddd")
        yield text(x, bottom + 13, f"{10.0**power:,.10g}", text_anchor="middle")
    for number, (name, row) in enumerate(members):
        top = y + GAP + ROW * number
        yield text(NAMES - 8, top + 13, name, text_anchor="end")
        for line, (side, colour) in enumerate(COLOURS.items()):
            value = row.get(side, {}).get(metric)
            if not value:
                continue
            length = BARS * (math.log10(value) - low) / (high - low)
            at = top + line * (BAR + 1)
            figure = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
            yield rect(NAMES, at, length, BAR, fill=colour)
            yield text(NAMES + length + 4, at + BAR - 1, figure, font_size=9)
