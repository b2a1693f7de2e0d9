"""The pictures of the dashboards, drawn from results that are made up here."""

from __future__ import annotations

import json
import math
import re
from typing import Any
from xml.etree import ElementTree

import pytest

from deploy.grafana import charts, pictures
from deploy.grafana.charts import Box, Series, Window
from tests.support.broker import REPOSITORY

DASHBOARDS: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text()) for path in sorted(pictures.DASHBOARDS.glob("*.json"))
}
WINDOW = Window(1000.0, 1090.0, 1.0)
BOX = Box(0, 0, 330, 190)


def panels(name: str) -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARDS[name]["panels"] if panel["type"] != "row"]


def texts(svg: str) -> list[str]:
    return [e.text or "" for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("text")]


def panel_of(kind: str, unit: str) -> dict[str, Any]:
    return {"type": kind, "title": "A", "fieldConfig": {"defaults": {"unit": unit}}}


def drawn(kind: str, unit: str, *series: Series) -> str:
    body = charts.draw(panel_of(kind, unit), series, WINDOW, BOX)
    return f"<svg>{''.join(body)}</svg>"


def lines(svg: str) -> list[str]:
    """What the lines of a graph's series are drawn with."""
    return re.findall(r'<path d="([^"]+)" fill="none"', svg)


@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_panel_is_drawn(name: str) -> None:
    """With its title, its legends and a line for each series; what is asked has no variable."""
    asked = []

    def ask(query: str, window: Window) -> list[dict[str, Any]]:
        asked.append(query)
        metric = {label: f"<{label}>" for label in ("shard", "instance", "port", "code")}
        return [{"metric": metric, "values": [[window.start, "1"], [window.end, "NaN"]]}]

    svg = pictures.picture(DASHBOARDS[name], None, ask, WINDOW, 1.0)
    found = texts(svg)
    for panel in panels(name):
        assert panel["title"] in found
    graphs = [panel for panel in panels(name) if panel["type"] == "timeseries"]
    assert len(lines(svg)) == sum(len(panel["targets"]) for panel in graphs)
    assert "No data" not in found
    assert len(asked) == sum(len(panel["targets"]) for panel in panels(name))
    assert not any("$" in query for query in asked)
    assert any("[4s]" in query for query in asked)


@pytest.mark.parametrize("name", DASHBOARDS)
def test_main_rows_are_those_of_the_dashboard(name: str) -> None:
    """Without the others, and without the room that they would take."""
    main = pictures.MAIN[name]
    titles = [p["title"] for p in DASHBOARDS[name]["panels"] if p["type"] == "row"]
    assert set(main) < set(titles)
    part = pictures.picture(DASHBOARDS[name], main, lambda *_: [], WINDOW, 1.0)
    assert [title for title in texts(part) if title in titles and title in main]
    for left_out in set(titles) - set(main):
        assert left_out not in texts(part)
    whole = pictures.picture(DASHBOARDS[name], None, lambda *_: [], WINDOW, 1.0)
    heights = [int(ElementTree.fromstring(svg).attrib["height"]) for svg in (part, whole)]
    assert heights[0] < heights[1]
    ys = [int(y) for y in re.findall(r'<text x="10" y="(\d+)" font-size="14"', part)]
    assert ys[0] == pictures.HEAD + 17
    assert len(ys) == len(main)


def test_every_kind_and_unit_of_panel_is_known() -> None:
    for name in DASHBOARDS:
        for panel in panels(name):
            assert panel["type"] in charts.DRAWERS
            assert charts.unit_of(panel) in charts.UNITS


def test_a_number_is_the_last_that_is_one() -> None:
    series = Series("", [(1000, 2.0), (1001, 12_345.0), (1002, math.nan)])
    assert "12.3 K" in texts(drawn("stat", "short", series))
    assert "No data" in texts(drawn("stat", "short"))


def test_a_graph_says_unit_time_and_legend() -> None:
    found = texts(drawn("timeseries", "s", Series("p<99>", [(1000, 0.0), (1001, 0.0041)])))
    assert "p<99>" in found
    assert {"0 ms", "2 ms", "4 ms", "6 ms"} <= set(found)
    assert {"00:17:00", "00:17:20", "00:17:40", "00:18:00"} <= set(found)


def test_a_gap_is_left_where_there_is_no_number() -> None:
    points = [(1000.0 + k, math.nan if k == 3 else 1.0) for k in range(6)]
    (line,) = lines(drawn("timeseries", "short", Series("a", points)))
    assert line.count("M") == 2
    (dot,) = lines(drawn("timeseries", "short", Series("a", points[2:4])))
    assert dot.endswith("h0")


def test_what_does_not_fit_into_the_legend_is_counted() -> None:
    """And what is largest is named."""
    series = [Series(f"a long name number {k}", [(1000, k)]) for k in range(20)]
    found = texts(drawn("timeseries", "short", *series))
    assert "a long name number 19" in found
    shown = sum(text.startswith("a long name") for text in found)
    assert f"and {20 - shown} more" in found


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (0.0, "s", "0 s"),
        (2.5e-5, "s", "25 µs"),
        (1536, "bytes", "1.5 KiB"),
        (1500, "Bps", "1.5 kB/s"),
        (0.25, "percentunit", "25%"),
        (999, "reqps", "999 req/s"),
        (1e6, "cps", "1 M c/s"),
    ],
)
def test_units(value: float, unit: str, shown: str) -> None:
    assert charts.formatted(value, unit) == shown


@pytest.mark.parametrize("largest", [0.0, math.nan, 1e-9, 0.37, 1.0, 60, 99.9, 1001, 3 << 20])
@pytest.mark.parametrize("unit", charts.UNITS)
def test_an_axis_ends_above_the_largest_value(largest: float, unit: str) -> None:
    marks = charts.ticks(largest, unit)
    assert marks[0] == 0
    assert 3 <= len(marks) <= 6
    assert not marks[-1] < largest * (1 - 1e-6)


def test_the_documentation_shows_each_dashboard() -> None:
    folder = REPOSITORY / "docs" / "pictures"
    shown = (REPOSITORY / "docs" / "operations.md").read_text()
    for name, dashboard in DASHBOARDS.items():
        assert f"](pictures/{name}.svg)" in shown
        assert dashboard["title"] in texts((folder / f"{name}.svg").read_text())
