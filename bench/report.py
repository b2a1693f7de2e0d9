"""Tables: one line per scenario while it is measured, and Markdown of everything at the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.results import Results
from bench.scenarios import SCENARIOS, Wanted

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
HEADER = (
    f"{'scenario':<28} {'side':<7} {'per s':>10} {'p50 ms':>9} {'p99 ms':>9} {'CPU s/M':>8}"
    f"  {'ratio':>6}  CPU cores: generator, then the server's"
)
_WORDS = {
    "per_s": "{unit}/s",
    "p50_ms": "p50, ms",
    "p99_ms": "p99, ms",
    "cpu_s_per_million": "CPU s per 1 M {unit}",
    "seen_percent": "events seen, %",
    "kib_per_client": "KiB per client",
}


def lines(name: str, row: dict[str, Any]) -> Iterator[str]:
    """A scenario's lines for the terminal."""
    for side in ("broker", "floor"):
        if side not in row:
            continue
        figures = row[side]
        ratio = f"{row['ratio']:.2f}" if side == "broker" and "ratio" in row else ""
        if row["unit"] == "clients":
            yield (
                f"{name:<28} {side:<7} {figures['kib_per_client']:.1f} KiB per client, "
                f"{figures['cpu_ms_per_s_of_1000']:.2f} ms of CPU a second for 1,000 {ratio}"
            )
            continue
        cores = ", ".join(
            f"{key.removesuffix('_cpu')} {value:.2f}"
            for key, value in figures.items()
            if key.endswith("_cpu")
        )
        seen = figures.get("seen_percent", 100)
        lost = "" if seen == 100 else f"  ONLY {seen:.2f} % SEEN"
        yield (
            f"{name:<28} {side:<7} {figures['per_s']:>10,.0f} {number(figures.get('p50_ms')):>9}"
            f" {number(figures.get('p99_ms')):>9} {number(figures.get('cpu_s_per_million')):>8}"
            f"  {ratio:>6}  {cores}{lost}"
        )


def number(value: float | None) -> str:
    """With as many digits as it deserves."""
    if value is None:
        return "-"
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def markdown(results: Results) -> str:
    """The tables: what is wanted, then everything."""
    rows = {name: results.rows[name] for name in SCENARIOS if name in results.rows}
    if not rows:
        return "Nothing was measured yet.\n"
    dates = sorted(row["date"] for row in rows.values())
    last = rows[max(rows, key=lambda name: rows[name]["date"])]
    runs = len(last["runs"]["broker"])
    text = [
        f"{last['machine']}, {dates[0][:10]} to {dates[-1][:10]}, revision {last['revision']};"
        f" medians of {runs} runs of {last['seconds']:g} s, broker and floor in turn, the generator"
        f" beside them: `python -m bench --seconds {last['seconds']:g} --runs {runs}`.",
        "",
        "| wanted of | figure | wanted | broker | floor | broker/floor | |",
        "|---|---|--:|--:|--:|--:|---|",
    ]
    for name, row in rows.items():
        text += [_wanted_row(row, wanted) for wanted in SCENARIOS[name].wanted]
    text += [
        "",
        "| scenario | figure | broker | floor | broker/floor | p50, p99 ms | floor's"
        " | CPU s per 1 M, floor's | cores: generator, gateway, shards |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    text += [_row(name, row) for name, row in rows.items()]
    rates = [row for name, row in rows.items() if "rate" in SCENARIOS[name].load]
    if rates:
        names = {"p50_ms": "p50", "p90_ms": "p90", "p99_ms": "p99", "p999_ms": "p99.9"}
        names["max_ms"] = "slowest"
        head = " | ".join(f"{name}, ms" for name in names.values())
        text += ["", f"| at fixed rates, broker / floor | {head} |", "|---|" + "--:|" * len(names)]
        for row in rates:
            sides = [row[side] for side in ("broker", "floor") if side in row]
            cells = (" / ".join(number(side.get(key)) for side in sides) for key in names)
            text.append(f"| {row['title']} | {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


def _wanted_row(row: dict[str, Any], wanted: Wanted) -> str:
    value = row["broker"].get(wanted.metric)
    floor = row.get("floor", {}).get(wanted.metric)
    ratio = value / floor if value is not None and floor else None
    verdict = "met" if value is not None and wanted.met(value) else "**not met**"
    word = _WORDS[wanted.metric].format(unit=row["unit"])
    return (
        f"| {row['title']} | {word} | {wanted} | {number(value)} | {number(floor)} |"
        f" {number(ratio)} | {verdict} |"
    )


def _row(name: str, row: dict[str, Any]) -> str:
    broker, floor = row["broker"], row.get("floor", {})
    metric = row["metric"]
    word = _WORDS[metric].format(unit=row["unit"])

    def pair(figures: dict[str, float]) -> str:
        if "p50_ms" not in figures:
            return "-"
        return f"{number(figures['p50_ms'])}, {number(figures['p99_ms'])}"

    cpu = ", ".join(number(side.get("cpu_s_per_million")) for side in (broker, floor))
    cores = ", ".join(
        number(broker.get(f"{part}_cpu")) for part in ("generator", "gateway", "shards")
    )
    return (
        f"| `{name}`: {row['title']} | {word} | {number(broker[metric])} |"
        f" {number(floor.get(metric))} | {number(row.get('ratio'))} | {pair(broker)} |"
        f" {pair(floor)} | {cpu} | {cores} |"
    )


def main(results: Results, *, write: bool) -> int:
    """Print the Markdown, or put it between the marks of the README."""
    text = markdown(results)
    if not write:
        print(text, end="")
        return 0
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")
    return 0
