"""Results as one self-contained HTML page: tables, curves, and for each scenario its run with the median downtime.

Nothing is loaded from anywhere and nothing is scripted: plots are inline SVG, light and dark by the reader's setting.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Any

from tools.benchmark.plot import Plot, short
from tools.benchmark.table import MS, Result, by_scenario, floor_ratio, floor_s, precopy_ratio

STYLE = """
:root { --paper:#fff; --ink:#1b1f24; --soft:#5b6470; --rule:#e3e7ec; --blue:#2f6fde; --orange:#d9731a; --green:#2a8f5c;
  --frozen:#d9731a22; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --paper:#14181d; --ink:#e4e8ed; --soft:#98a2ae; --rule:#2b323a;
  --blue:#6ea2ff; --orange:#f0a057; --green:#5cc490; --frozen:#f0a05726; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 32px 20px 80px; max-width: 1120px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 20px; margin: 44px 0 8px; }
h3 { font-size: 15px; margin: 18px 0 2px; }
p, figcaption { color: var(--soft); margin: 2px 0 10px; max-width: 80ch; } figcaption { font-size: 13px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13.5px; }
th, td { padding: 5px 10px; text-align: right; border-bottom: 1px solid var(--rule); vertical-align: bottom; }
td { white-space: nowrap; } td small { display: block; }
th:first-child, td:first-child { text-align: left; padding-left: 0; } th { color: var(--soft); font-weight: 600; }
small { color: var(--soft); } a { color: inherit; text-underline-offset: 3px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); gap: 8px 28px; }
figure { margin: 8px 0; min-width: 0; }
svg { width: 100%; height: auto; display: block; font: 11px system-ui, sans-serif; }
@media (max-width: 560px) { .pair { grid-template-columns: 1fr; } }
.grid { stroke: var(--rule); } .tick, .label { fill: var(--soft); }
.line { fill: none; stroke-width: 1.8; } .line.a { stroke: var(--blue); } .line.b { stroke: var(--orange); }
.line.c { stroke: var(--green); }
.stem { stroke-width: 1.4; } .stem.a { stroke: var(--blue); } .stem.b { stroke: var(--orange); }
.stem.c { stroke: var(--green); } rect.a, circle.a { fill: var(--blue); } rect.b, circle.b { fill: var(--orange); }
rect.c, circle.c { fill: var(--green); } rect.frozen { fill: var(--frozen); } rect.step { opacity: .45; }
"""
A, B, C = "a", "b", "c"
KNOBS = {
    "redis": "redis-server: MiB of data",
    "memory": "memory: MiB, half of it incompressible",
    "raw": "memory: MiB, incompressible",
    "rates": "dirty rate: pages written per second",
    "threads": "threads",
    "vmas": "mappings",
    "fds": "open descriptors",
}
PRECOPY_MS = 30.0
"""So much before and after the freeze is shown of its phases."""


def render(document: dict[str, Any]) -> str:
    """The whole page."""
    scenarios = by_scenario(document["results"])
    body = "".join(
        [
            _head(document),
            _table(scenarios),
            _floors(document, scenarios),
            _curves(scenarios),
            *(_scenario(name, runs) for name, runs in scenarios.items()),
            _missing(document),
        ]
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Ferry benchmark</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body>{body}</body></html>\n"
    )


# -- tables ----------------------------------------------------------------------------------------------


def _head(document: dict[str, Any]) -> str:
    about = document["about"]
    link = f", link limited to {about['link']}" if about["link"] else ""
    options = f", agent-send {' '.join(about['options'])}" if about["options"] else ""
    return (
        "<h1>Ferry benchmark</h1>"
        f"<p>{escape(about['began'])}, revision {escape(about['revision'])}, Linux {escape(about['kernel'])}, "
        f"{about['cpus']} CPUs ({escape(about['cpu'])}), {about['memory_mib']} MiB, Python {escape(about['python'])}"
        f"{escape(link + options)}. Load average {about['load_average_at_begin']:.1f} at the beginning, "
        f"{about.get('load_average_at_end', 0):.1f} at the end.</p>"
    )


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"


def _cell(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "<td>-</td>"
    text = f"{statistics.median(known):.{digits}f}"
    if len(known) > 1:
        text += f" <small>{min(known):.{digits}f}-{max(known):.{digits}f}</small>"
    return f"<td>{text}</td>"


def _table(scenarios: dict[str, list[Result]]) -> str:
    columns: tuple[tuple[str, int, Callable[[Result], float | None]], ...] = (
        ("downtime ms", 2, lambda run: run["downtime_s"] * MS),
        ("longest gap ms", 2, lambda run: run["gap_s"] * MS),
        ("gap at switchover ms", 2, lambda run: run["gaps_s"]["switchover"] * MS),
        ("gap before ms", 2, lambda run: run["gaps_s"]["before"] * MS),
        ("total s", 2, lambda run: run["total_s"]),
        ("MB sent", 0, lambda run: run["bytes_total"] / 1e6),
        ("p99 pre-copy/before", 2, lambda run: precopy_ratio(run, "p99")),
        ("writes pre-copy/before", 2, lambda run: precopy_ratio(run, "writes")),
        ("CPU s/GiB", 2, lambda run: run["cpu_s_per_gib"]),
        ("peak RSS MiB", 0, lambda run: max(run["peak_rss_kib"].values(), default=0) / 1024),
    )
    head = "".join(f"<th>{title}</th>" for title, _, _ in columns)
    rows = [
        f'<tr><td><a href="#{escape(name)}">{escape(name)}</a> <small>{_runs(len(runs))}</small></td>'
        + "".join(_cell([value(run) for run in runs], digits) for _, digits, value in columns)
        + "</tr>"
        for name, runs in scenarios.items()
    ]
    return (
        "<h2>Results</h2><p>Median of the runs, and extremes. Downtime: as agent-send reports it. Longest gap: between "
        "two answers to a client that asks every millisecond, or two wake-ups of the process itself, from the start "
        "of the migration on; beside it, the same without a migration, right before.</p>"
        f'<div class="scroll"><table><tr><th>scenario</th>{head}</tr>{"".join(rows)}</table></div>'
    )


def _floors(document: dict[str, Any], scenarios: dict[str, list[Result]]) -> str:
    rows = []
    for name, runs in scenarios.items():
        measured = [run for run in runs if floor_s(run)]
        if measured:
            ways = measured[0]["floors"]
            cells = [[run["floors"][way]["seconds"] for run in measured if "floors" in run] for way in ways]
            rows.append(
                f"<tr><td>{escape(name)}</td>"
                + "".join(_cell(cell, 2) for cell in [*cells, [run["total_s"] for run in measured]])
                + _cell([floor_ratio(run) for run in measured], 2)
                + "</tr>"
            )
    text = ""
    if rows:
        head = "".join(f"<th>{escape(way)} s</th>" for way in ways)
        text = (
            "<h2>Floors</h2><p>The same bytes of the same process over the same link without Ferry: process_vm_readv, "
            "one socket, recv, fresh memory of another process (docs/performance.md). The fastest way is the floor.</p>"
            f'<div class="scroll"><table><tr><th>scenario</th>{head}<th>Ferry s</th><th>Ferry/floor</th></tr>'
            f"{''.join(rows)}</table></div>"
        )
    startup = document.get("startup")
    if startup:
        cells_ = "".join(
            f"<tr><td>{name}</td><td>{times['median_s'] * MS:.0f}</td><td>{times['min_s'] * MS:.0f}</td></tr>"
            for name, times in startup.items()
        )
        text += (
            "<h2>Start-up</h2><table><tr><th>command</th><th>median ms</th><th>fastest ms</th></tr>"
            f"{cells_}</table><p>python: an interpreter that does nothing; help: agent-send --help; check: agent-send "
            "--check of a small process.</p>"
        )
    return text


def _missing(document: dict[str, Any]) -> str:
    entries = document["not_measured"]
    if not entries:
        return ""
    rows = "".join(f"<li>{escape(entry['scenario'])}: {escape(entry['reason'][:400])}</li>" for entry in entries)
    return f"<h2>Not measured</h2><ul>{rows}</ul>"


# -- curves ----------------------------------------------------------------------------------------------


def _families(scenarios: dict[str, list[Result]]) -> Iterator[tuple[str, str, list[tuple[float, list[Result]]]]]:
    """(title, axis, points) of what can be drawn as a curve."""
    groups: dict[tuple[str, str], list[tuple[float, list[Result]]]] = {}
    for name, runs in scenarios.items():
        first = runs[0]
        if "+" in name or first["link"]:
            continue
        kind, rate = first["kind"], first["rate"]
        label = kind if not rate else f"{kind}, {short(rate)} writes/s"
        groups.setdefault((label, KNOBS[kind]), []).append((first["number"], runs))
        if kind == "memory":
            label = f"memory of {first['megabytes']} MiB"
            groups.setdefault((label, KNOBS["rates"]), []).append((max(rate, 1), runs))
    for (label, axis), points in groups.items():
        if len(points) > 1:
            yield label, axis, sorted(points, key=lambda point: point[0])


def _curves(scenarios: dict[str, list[Result]]) -> str:
    figures = []
    for label, axis, points in _families(scenarios):
        ticks = [x for x, _ in points]
        low, high = ticks[0], ticks[-1]
        stop = Plot(
            x_range=(low / 1.3, high * 1.3), y_range=(0, 1.15 * _highest(points, "gap_s", MS)), log_x=True,
            x_label=axis, y_label="ms", x_ticks=ticks,
        )  # fmt: skip
        stop.legend((A, "longest gap"), (B, "downtime"))
        _curve(stop, points, lambda run: run["gap_s"] * MS, A, "ms")
        _curve(stop, points, lambda run: run["downtime_s"] * MS, B, "ms")
        cost = Plot(
            x_range=(low / 1.3, high * 1.3), log_x=True, x_label=axis, y_label="s", x_ticks=ticks,
            y_range=(0, 1.15 * max(max(run["total_s"], _cpu_s(run)) for _, runs in points for run in runs)),
        )  # fmt: skip
        cost.legend((C, "total time"), (A, "CPU of both agents"))
        _curve(cost, points, lambda run: run["total_s"], C, "s")
        _curve(cost, points, _cpu_s, A, "s")
        pair = _figure(stop) + _figure(cost)
        figures.append(f'<h3>{escape(label)}</h3><div class="pair">{pair}</div>')
    if not figures:
        return ""
    return "<h2>Curves</h2><p>Medians; the lines through them span the extremes of the runs.</p>" + "".join(figures)


def _cpu_s(run: Result) -> float:
    return sum(sum(side.values()) for side in run["cpu"].values())


def _highest(points: Sequence[tuple[float, list[Result]]], key: str, factor: float) -> float:
    highest: float = max(run[key] for _, runs in points for run in runs) * factor
    return highest


def _curve(
    plot: Plot,
    points: Sequence[tuple[float, list[Result]]],
    value: Callable[[Result], float],
    css: str,
    unit: str,
) -> None:
    medians = []
    for x, runs in points:
        values = [value(run) for run in runs]
        plot.whisker(x, min(values), max(values), css)
        medians.append((x, statistics.median(values)))
    plot.line(medians, css)
    for x, y in medians:
        plot.point(x, y, css, f"{short(x)}: {y:.2f} {unit}")


def _figure(plot: Plot, caption: str = "") -> str:
    text = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{plot.svg()}{text}</figure>"


# -- one scenario ----------------------------------------------------------------------------------------


def _scenario(name: str, runs: list[Result]) -> str:
    shown = sorted(runs, key=lambda run: run["downtime_s"])[(len(runs) - 1) // 2]
    return (
        f'<h2 id="{escape(name)}">{escape(name)}</h2><p>The run with the median downtime: '
        f"{shown['downtime_s'] * MS:.2f} ms of {shown['total_s']:.2f} s, longest gap {shown['gap_s'] * MS:.2f} ms, "
        f"{len(shown['rounds'])} rounds, load average {shown['load_average']}.</p><div class=\"pair\">"
        f"{_figure(_rounds(shown), 'Pages that each round found dirty (bars) and the dirty rate, pages/s (line).')}"
        f"{_figure(_harm(shown), _HARM + (' (line: writes/s, to scale of its own)' if shown['writes_per_s'] else ''))}"
        f"{_figure(_switchover(shown), 'Each answer around the switchover, when it came and how long it took.')}"
        f"{_figure(_freeze(shown), 'Where the milliseconds went, on both sides. Pale: steps of a phase.')}</div>"
    )


_HARM = "The slowest answer of each 50 ms (or longer) of the whole migration, shaded while it lasted"


def _round_times(run: Result) -> list[tuple[float, float, dict[str, Any]]]:
    """(start ms, end ms, round), 0: the freeze; a round without a span of its own ends where the next begins."""
    spans = {span["name"]: span for span in run["phases"]["send"]}
    times: list[tuple[float, float, dict[str, Any]]] = []
    next_start = 0.0
    for round_ in reversed(run["rounds"]):
        last = not times
        span = spans.get("last round" if last else f"round {round_['round']}")
        end = span["end_ms"] if span else next_start
        start = span["start_ms"] if span else end - round_["seconds"] * MS
        times.append((start, end, round_))
        next_start = start
    return times[::-1]


def _rounds(run: Result) -> Plot:
    times = _round_times(run)
    rates = [
        round_["pages_dirty"] / before["seconds"] if before["seconds"] else 0.0
        for (_, _, before), (_, _, round_) in zip(times, times[1:])
    ]
    highest = max(1, *(round_["pages_dirty"] for _, _, round_ in times), *rates)
    plot = Plot(
        x_range=(times[0][0] / MS, max(end for _, end, _ in times) / MS), y_range=(1, highest * 3), log_y=True,
        x_label="seconds, 0: the freeze begins", y_label="pages, pages/s",
    )  # fmt: skip
    for start, end, round_ in times:
        title = (
            f"round {round_['round']}: {round_['pages_dirty']} pages dirty, {round_['bytes_sent']} bytes in "
            f"{round_['seconds'] * MS:.1f} ms"
        )
        plot.bar(start / MS, end / MS, max(round_["pages_dirty"], 1), A, title)
    points = [(start / MS, max(rate, 1.0)) for (start, _, _), rate in zip(times, rates)]
    if points:
        plot.line([*points, (times[-1][1] / MS, points[-1][1])], B, step=True)
    plot.legend((A, "dirty pages"), (B, "dirty rate"))
    return plot


def _harm(run: Result) -> Plot:
    series = run["series"]
    slowest = max((row[1] for row in series), default=1.0)
    plot = Plot(
        x_range=(series[0][0] / MS, series[-1][0] / MS), y_range=(0.03, max(slowest * 1.5, 1)), log_y=True,
        x_label="seconds, 0: the freeze begins", y_label="ms",
    )  # fmt: skip
    spans = run["phases"]["send"]
    plot.band(min(span["start_ms"] for span in spans) / MS, run["downtime_s"], "the migration")
    plot.line([(row[0] / MS, max(row[1], 0.03)) for row in series], A, step=True)
    plot.legend((A, "slowest answer"))
    most = max((row[2] for row in series), default=0)
    if most:
        bottom, top = plot.y.low, plot.y.high
        # The upper quarter of the plot, on a linear scale from nothing to the most there was.
        plot.line(
            [(row[0] / MS, bottom * (top / bottom) ** (0.72 + 0.25 * row[2] / most)) for row in series], C, step=True
        )
        plot.legend((C, f"writes/s, at most {short(most)}"))
    return plot


def _switchover(run: Result) -> Plot:
    answers = run["answers"]
    down_ms = run["downtime_s"] * MS
    highest = max([2.0, down_ms, *(answer[1] for answer in answers)])
    plot = Plot(
        x_range=(-PRECOPY_MS, down_ms + PRECOPY_MS), y_range=(0, highest * 1.25),
        x_label="ms, 0: the freeze begins", y_label="ms",
    )  # fmt: skip
    plot.band(0, down_ms, f"downtime {down_ms:.2f} ms")
    of_redis = run["kind"] == "redis"
    for at, took, value in answers:
        if -PRECOPY_MS <= at <= down_ms + PRECOPY_MS:
            css = B if (value if of_redis else at >= down_ms) else A
            plot.stem(at, took, css, f"at {at:.2f} ms, after {took:.2f} ms")
            plot.point(at, took, css, f"at {at:.2f} ms, after {took:.2f} ms")
    plot.legend((A, "from the source"), (B, "from the destination"))
    return plot


def _freeze(run: Result) -> Plot:
    down_ms = run["downtime_s"] * MS
    rows = []
    for side, css in (("send", A), ("recv", B)):
        # Steps that were made ahead of the freeze cost no downtime.
        spans = [span for span in run["phases"][side] if span["frozen"] and span["end_ms"] > 0]
        spans.sort(key=lambda span: (span["start_ms"], -span["end_ms"]))
        rows += [(span, css) for span in spans]
    plot = Plot(
        x_range=(-0.15 * down_ms, 1.15 * down_ms), y_range=(0, len(rows)), height=70 + 17 * len(rows),
        x_label="ms, 0: the freeze begins", y_label="phases of the freeze", y_ticks=False, left=180,
    )  # fmt: skip
    plot.legend((A, "source"), (B, "destination"), ("frozen", f"downtime {down_ms:.2f} ms"))
    plot.band(0, down_ms, f"downtime {down_ms:.2f} ms")
    for number, (span, css) in enumerate(rows):
        took = span["end_ms"] - span["start_ms"]
        step = " step" if ": " in span["name"] else ""
        plot.row(span["start_ms"], span["end_ms"], number, f"{span['name']}  {took:.2f}", css + step, f"{took:.3f} ms")
    return plot
