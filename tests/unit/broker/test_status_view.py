"""Tables of `broker status` and `broker top`."""

from __future__ import annotations

import pytest

from broker.output import Colour, columns
from broker.report import (
    GatewayReport,
    HotGroup,
    HotStream,
    LinkReport,
    ProcessReport,
    ShardReport,
    StatusReport,
    TopReport,
)
from broker.status_view import duration, size, status_lines, top_lines

EVIL = "a\x1b[31m\u202eb\n"


def plain(text: str, _colour: Colour) -> str:
    return text


def marked(text: str, colour: Colour) -> str:
    return f"<{colour.name}>{text}"


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 * 2**40, "5.0 TiB")]
)
def test_sizes(count: int, shown: str) -> None:
    assert size(count) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0s"), (61, "1m1s"), (7325, "2h2m"), (90_000, "1d1h")]
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def report() -> StatusReport:
    about = ProcessReport("gateway", pid=7, uptime_s=61.0, restarts=2, cpu_cores=0.5)
    links = [LinkReport(0, True, 3, 2048, 1), LinkReport(1, False, 0, 0, 4)]
    down = ProcessReport("shard-1", "down", EVIL)
    rates = {"operations": 40.0, "batches": 10.0, "calls": 40.0}
    return StatusReport(
        "1.2",
        0,
        "id",
        False,
        ["shard 1 does not answer"],
        [GatewayReport(about, "id", clients=5, links=links)],
        [
            ShardReport(ProcessReport("shard-0", rates=rates), 0, queue_bytes=4096),
            ShardReport(down, 1),
        ],
    )


def test_what_is_down_is_red_and_says_why() -> None:
    lines = status_lines(report(), marked, 140)
    assert lines[0].startswith("<RED>broker 1.2")
    assert lines[0].endswith("not ready: shard 1 does not answer")
    red = [line for line in lines[1:] if line.startswith("<RED>")]
    assert [line.split()[0] for line in red] == ["<RED>shard-1", "<RED>gateway"]
    assert "\\x1b" in red[0]
    (link,) = (line for line in lines if line.startswith("gateway > shard-0"))
    assert link.split()[3:] == ["up", "3", "2.0", "KiB", "4.0", "KiB", "1"]
    (shard,) = (line for line in lines if line.startswith("0 "))
    assert shard.split()[:6] == ["0", "40.0", "-", "-", "-", "4.0"]


@pytest.mark.parametrize("width", [20, 80])
def test_lines_fit_and_hold_nothing_harmful(width: int) -> None:
    groups = [HotGroup(EVIL, EVIL * 30, 0, 1234.5, 0.25, 3)]
    top = TopReport(0, "id", groups, [HotStream(EVIL, 1.0)], [1])
    for line in [*status_lines(report(), plain, width)[1:], *top_lines(top, plain, width)[1:]]:
        assert columns(line) <= width
        assert line.isprintable()
    assert "without shard 1" in top_lines(top, plain, 80)[0]
