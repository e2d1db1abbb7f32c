"""Results as text: one row for each scenario, the median of its runs (and the extremes of what matters most)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Result = dict[str, Any]
MS = 1e3
COLUMNS = (
    ("scenario", 26), ("runs", 4), ("down ms", 7), ("min-max", 11), ("gap ms", 7), ("min-max", 11),
    ("switch", 6), ("quiet", 6), ("total s", 8), ("rounds", 6), ("MB sent", 8),
    ("p99 x", 6), ("thru %", 6), ("CPU s/GiB", 9), ("RSS MiB", 8),
)  # fmt: skip
LEGEND = """\
down: Ferry's own downtime; gap: longest silence that the client, or the process itself, saw; switch: the same
around the switchover; quiet: before the migration began; p99 x: latency p99 during pre-copy by that before; thru:
writes/s during pre-copy by those before; CPU: both agents; RSS: largest of agent-send/agent-recv. Medians.
"""


def by_scenario(results: Iterable[Result]) -> dict[str, list[Result]]:
    """The runs of each scenario, in the order in which they came."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result["scenario"], []).append(result)
    return found


def median(runs: Sequence[Result], value: Callable[[Result], float | None]) -> float | None:
    """The median of what the runs know of a value; None: none does."""
    known = [found for found in map(value, runs) if found is not None]
    return statistics.median(known) if known else None


def precopy_ratio(result: Result, kind: str) -> float | None:
    """p99 latency ("p99") or writes/s ("writes") during pre-copy, by the same before."""
    if kind == "writes":
        before, during = (result["writes_per_s"].get(name) for name in ("before", "precopy"))
    else:
        before, during = (result["latency_ms"][name].get("p99") for name in ("before", "precopy"))
    return during / before if during is not None and before else None


def floor_s(result: Result) -> float | None:
    """The fastest way the same bytes went without Ferry."""
    floors = result.get("floors")
    return min(floor["seconds"] for floor in floors.values()) if floors else None


def floor_ratio(result: Result) -> float | None:
    floor = floor_s(result)
    return result["total_s"] / floor if floor else None


def _line(cells: Sequence[str]) -> str:
    widths = [width for _, width in COLUMNS]
    aligned = [f"{cell:>{width}}" for cell, width in zip(cells[1:], widths[1:])]
    return " ".join([f"{cells[0]:<{widths[0]}}", *aligned])


def header() -> str:
    return _line([name for name, _ in COLUMNS])


def row(name: str, runs: Sequence[Result]) -> str:
    """One line for the runs of a scenario."""

    def number(value: Callable[[Result], float | None], digits: int, factor: float = 1.0) -> str:
        found = median(runs, value)
        return "-" if found is None else f"{found * factor:.{digits}f}"

    def extremes(key: str) -> str:
        values = [run[key] * MS for run in runs]
        return f"{min(values):.1f}-{max(values):.1f}"

    peaks = "/".join(str(max(run["peak_rss_kib"].get(side, 0) for run in runs) >> 10) for side in ("send", "recv"))
    cells = (
        name,
        str(len(runs)),
        number(lambda run: run["downtime_s"], 2, MS),
        extremes("downtime_s"),
        number(lambda run: run["gap_s"], 2, MS),
        extremes("gap_s"),
        number(lambda run: run["gaps_s"]["switchover"], 1, MS),
        number(lambda run: run["gaps_s"]["before"], 1, MS),
        number(lambda run: run["total_s"], 3),
        number(lambda run: len(run["rounds"]), 0),
        number(lambda run: run["bytes_total"] / 1e6, 1),
        number(lambda run: precopy_ratio(run, "p99"), 2),
        number(lambda run: precopy_ratio(run, "writes"), 0, 100),
        number(lambda run: run["cpu_s_per_gib"], 2),
        peaks,
    )
    text = _line(cells)
    ratio = median(runs, floor_ratio)
    if ratio is not None:
        text += f"  {ratio:.2f} x the floor ({median(runs, floor_s):.2f} s)"
    return text


def phases_text(result: Result) -> list[str]:
    """What the freeze of one run consisted of, on both sides."""
    lines = []
    for side, label in (("send", "source"), ("recv", "destination")):
        steps = [f"{step['phase']} {step['microseconds'] / MS:.2f}" for step in result["freeze"][side]]
        lines.append(f"    {label} (ms): {', '.join(steps)}")
    return lines
