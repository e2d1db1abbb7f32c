"""Two result files side by side: what became better or worse, by more than the runs differ among themselves."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tools.benchmark.table import Result, by_scenario, floor_ratio, precopy_ratio

MEASURES: tuple[tuple[str, str, float, Callable[[Result], float | None]], ...] = (
    ("downtime", "ms", 1e3, lambda run: run["downtime_s"]),
    ("gap", "ms", 1e3, lambda run: run["gap_s"]),
    ("total", "s", 1, lambda run: run["total_s"]),
    ("by floor", "x", 1, floor_ratio),
    ("bytes", "MB", 1e-6, lambda run: run["bytes_total"]),
    ("p99 pre-copy", "x", 1, lambda run: precopy_ratio(run, "p99")),
    ("CPU", "s/GiB", 1, lambda run: run["cpu_s_per_gib"]),
    ("RSS", "MiB", 1 / 1024, lambda run: max(run["peak_rss_kib"].values(), default=None)),
)
HEADER = f"{'scenario':<26} {'measure':<13} {'old':>10} {'new':>10} {'new/old':>8}  verdict"


def verdict(old: Sequence[float], new: Sequence[float]) -> str:
    """Better or worse only when no run of one reaches the runs of the other; less is better for every measure."""
    if max(new) < min(old):
        return "better"
    if min(new) > max(old):
        return "worse"
    return "within the spread"


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The lines of the comparison: scenarios that both files have, measure by measure."""
    lines = [
        f"old: {old['about']['revision']}, {old['about']['began']}; new: {new['about']['revision']}, "
        f"{new['about']['began']}",
        HEADER,
    ]
    before, after = by_scenario(old["results"]), by_scenario(new["results"])
    for name in [name for name in after if name in before]:
        for measure, unit, factor, value in MEASURES:
            olds = [found * factor for found in map(value, before[name]) if found is not None]
            news = [found * factor for found in map(value, after[name]) if found is not None]
            if olds and news:
                a, b = statistics.median(olds), statistics.median(news)
                ratio = f"{b / a:.2f}" if a else "-"
                text = f"{name:<26} {measure:<13} {a:>10.2f} {b:>10.2f} {ratio:>8}  {verdict(olds, news)}"
                lines.append(f"{text} ({unit}, {len(olds)} and {len(news)} runs)")
    for title, names in (("old", before.keys() - after.keys()), ("new", after.keys() - before.keys())):
        if names:
            lines.append(f"only in the {title} one: {', '.join(sorted(names))}")
    return lines


def load(path: Path) -> dict[str, Any]:
    """:raises ValueError: the file is not a result of tools/bench."""
    document: dict[str, Any] = json.loads(path.read_text())
    if not isinstance(document, dict) or not {"about", "results"} <= document.keys():
        raise ValueError(f"{path} is no result of tools/bench")
    return document
