"""Draws the dashboards: `python -m deploy.grafana.pictures PROMETHEUS [--into DIR]`.

Asks a Prometheus what the panels of `dashboards/` ask, and draws the answers about as Grafana
would: the same panels in the same places, with their titles, units and legends. Prometheus's
scrape job has to be called `broker`.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deploy.grafana.charts import PALE, Box, Series, Window, draw
from deploy.grafana.svg import document, text

DASHBOARDS = Path(__file__).parent / "dashboards"
MAIN = {
    "overview": ("Now", "Traffic", "Latency", "Saturation"),
    "shards": ("Balance", "Commits", "What it stores"),
    "clients": ("Connections", "Subscriptions", "Workers"),
}
"""The rows of each dashboard that are drawn unless `--all` is given."""
COLUMN, LINE, GAP = 41, 24, 6
"""Pixels of Grafana's columns and lines, and between panels."""
HEAD = 44
POINTS_MAX = 300
"""Of a line; Grafana takes about one for each pixel."""
PATIENCE_S = 30.0

Ask = Callable[[str, Window], list[dict[str, Any]]]
"""A query over a window of time to Prometheus's series: `metric`, and `values` as they come."""


class Prometheus:
    """One at a URL, over HTTP."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/") + "/api/v1/query_range?"

    def ask(self, query: str, window: Window) -> list[dict[str, Any]]:
        """Raises: OSError when it does not answer, or the query is not valid."""
        asked = {"query": query, "start": window.start, "end": window.end, "step": window.step}
        url = self._url + urllib.parse.urlencode(asked)
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as response:
            found: list[dict[str, Any]] = json.load(response)["data"]["result"]
        return found


def window_of(end: float, range_s: float, scrape_interval_s: float) -> Window:
    """The last `range_s` seconds before `end`; no point is closer than scrapes are."""
    step = max(scrape_interval_s, math.ceil(range_s / POINTS_MAX))
    return Window(end - range_s, end, step)


def expression(query: str, variables: dict[str, str], window: Window, scrape_s: float) -> str:
    """The query with its variables filled in, and `$__rate_interval` as Grafana makes it."""
    rate_s = max(window.step + scrape_s, 4 * scrape_s)
    filled = query.replace("$__rate_interval", f"{rate_s:g}s")
    for name, value in variables.items():
        filled = filled.replace(f"${name}", value)
    return filled


def legend(pattern: str, labels: dict[str, str]) -> str:
    """The legend of a series; a label that it lacks is empty."""
    return re.sub(r"{{\s*(\w+)\s*}}", lambda found: labels.get(found[1], ""), pattern)


def panel_series(
    panel: dict[str, Any], variables: dict[str, str], ask: Ask, window: Window, scrape_s: float
) -> list[Series]:
    """What the panel's queries give, in their order."""
    return [
        Series(
            legend(target["legendFormat"], found["metric"]),
            [(float(at), float(value)) for at, value in found["values"]],
        )
        for target in panel["targets"]
        for found in ask(expression(target["expr"], variables, window, scrape_s), window)
    ]


def picture(
    dashboard: dict[str, Any],
    rows: Sequence[str] | None,
    ask: Ask,
    window: Window,
    scrape_interval_s: float,
) -> str:
    """A dashboard as SVG: the rows with these titles, all when None."""
    variables = {
        one["name"]: one["allValue"]
        for one in dashboard["templating"]["list"]
        if one["type"] == "query"
    }
    body = [
        text(10, 27, dashboard["title"], font_size=18, font_weight="bold"),
        text(
            24 * COLUMN - 4,
            27,
            f"last {window.end - window.start:g} s, UTC",
            text_anchor="end",
            fill=PALE,
        ),
    ]
    skipped, shown, bottom, row_y = 0, False, 0, 0
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        if panel["type"] == "row":
            if not shown:
                skipped += place["y"] - row_y  # the lines of the row before
            row_y = place["y"]
            shown = rows is None or panel["title"] in rows
        if not shown:
            continue
        y = HEAD + LINE * (place["y"] - skipped)
        bottom = max(bottom, y + LINE * place["h"])
        if panel["type"] == "row":
            body.append(text(10, y + 17, panel["title"], font_size=14, fill="#222b33"))
            continue
        x, width, height = COLUMN * place["x"], COLUMN * place["w"], LINE * place["h"]
        box = Box(x + GAP / 2, y + GAP / 2, width - GAP, height - GAP)
        series = panel_series(panel, variables, ask, window, scrape_interval_s)
        body += draw(panel, series, window, box)
    return document(24 * COLUMN, bottom + GAP, body, background="#f4f5f5")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.grafana.pictures",
        description="Draws the dashboards from what a Prometheus has.",
    )
    add = parser.add_argument
    add("prometheus", help="URL, for example http://127.0.0.1:9090")
    add("--into", type=Path, default=Path("."), metavar="DIR", help="folder for the SVG files")
    add("--range", type=float, default=3600, metavar="SECONDS", help="before --end (3600)")
    add("--end", type=float, default=None, metavar="TIME", help="seconds since 1970 (now)")
    add("--scrape-interval", type=float, default=15, metavar="SECONDS", help="(15)")
    add("--all", action="store_true", help="all rows, not only the main ones")
    given = parser.parse_args()
    end = time.time() if given.end is None else given.end
    window = window_of(end, given.range, given.scrape_interval)
    prometheus = Prometheus(given.prometheus)
    given.into.mkdir(parents=True, exist_ok=True)
    for file in sorted(DASHBOARDS.glob("*.json")):
        rows = None if given.all else MAIN[file.stem]
        dashboard = json.loads(file.read_text())
        try:
            drawn = picture(dashboard, rows, prometheus.ask, window, given.scrape_interval)
        except OSError as error:
            parser.exit(1, f"{given.prometheus}: {error}\n")
        (given.into / f"{file.stem}.svg").write_text(drawn)


if __name__ == "__main__":
    main()
