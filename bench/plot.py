"""The figures as a picture: bars of broker and floor, drawn as SVG without a library."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape
from typing import Any

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
    legend = "".join(
        f'<rect x="{NAMES + 90 * k}" y="8" width="10" height="10" fill="{colour}"/>'
        f'<text x="{NAMES + 90 * k + 14}" y="17">{side}</text>'
        for k, (side, colour) in enumerate(COLOURS.items())
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}"'
        ' font-family="sans-serif" font-size="11">\n'
        f'<rect width="{WIDTH}" height="{y}" fill="white"/>\n{legend}\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def _panel(title: str, members: list[tuple[str, dict[str, Any]]], y: int) -> Iterator[str]:
    metric = members[0][1]["metric"]
    values = [
        row[side][metric] for _, row in members for side in COLOURS if row.get(side, {}).get(metric)
    ]
    low = math.floor(math.log10(min(values)) - 0.1)
    high = max(math.ceil(math.log10(max(values))), low + 1)
    bottom = y + GAP + ROW * len(members)
    yield f'<text x="{NAMES}" y="{y + 14}" font-weight="bold">{escape(title)}</text>'
    for power in range(low, high + 1):
        x = NAMES + BARS * (power - low) / (high - low)
        yield f'<path d="M{x:.1f} {y + GAP - 6}V{bottom}" stroke="#ddd"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 13}" text-anchor="middle">{10.0**power:,.10g}</text>'
    for number, (name, row) in enumerate(members):
        top = y + GAP + ROW * number
        yield f'<text x="{NAMES - 8}" y="{top + 13}" text-anchor="end">{escape(name)}</text>'
        for line, (side, colour) in enumerate(COLOURS.items()):
            value = row.get(side, {}).get(metric)
            if not value:
                continue
            length = BARS * (math.log10(value) - low) / (high - low)
            at = top + line * (BAR + 1)
            text = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
            yield (
                f'<rect x="{NAMES}" y="{at}" width="{length:.1f}" height="{BAR}" fill="{colour}"/>'
                f'<text x="{NAMES + length + 4:.1f}" y="{at + BAR - 1}" font-size="9">{text}</text>'
            )
