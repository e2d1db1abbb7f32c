"""One HTML file with the charts and tables of tools/trackbench: inline SVG, no script, nothing loaded from elsewhere.

Readable in light and dark: colours come from style sheet variables, and every series has a marker of its own as well.
Lengths are SVG user units.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

from tools.trackbench_results import Chart, Results, Table, bytes_text

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 78, 16, 14, 52
"""Margins around the plot: room for tick labels and axis labels."""
ROOM = 1.3
"""Factor by which the vertical axis exceeds the data."""
GROUP_FILL = 0.8
"""Part of a group's width that its bars take."""

# Variant -> (light, dark). Told apart by lightness too.
COLOURS = {
    "none": ("#6b7280", "#9ca3af"),
    "scan": ("#1d4ed8", "#60a5fa"),
    "log-stall": ("#b91c1c", "#f87171"),
    "log-spill": ("#d97706", "#fbbf24"),
    "bitmap": ("#7e22ce", "#d8b4fe"),
    "soft-dirty": ("#0e7490", "#67e8f9"),
    "compare": ("#15803d", "#4ade80"),
}
MARKERS = {
    "none": "M-4,-1h8v2h-8z",
    "scan": "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",
    "log-stall": "M-4,-4h8v8h-8z",
    "log-spill": "M0,-5l5,9h-10z",
    "bitmap": "M0,-5l5,5l-5,5l-5,-5z",
    "soft-dirty": "M0,5l5,-9h-10z",
    "compare": "M-5,-1.5h3.5v-3.5h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5z",
}

_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1f2328; --faint: #59636e; --grid: #d1d9e0; %s }
@media (prefers-color-scheme: dark) {
  :root { --paper: #0d1117; --ink: #e6edf3; --faint: #9198a1; --grid: #30363d; %s }
}
body { background: var(--paper); color: var(--ink); font: 15px/1.45 system-ui, sans-serif; margin: 2em auto;
  max-width: 1000px; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin: 2em 0 0.2em; }
p { margin: 0.3em 0; } .note { color: var(--faint); font-size: 0.9em; }
figure { margin: 0 0 1em; } svg { max-width: 100%%; height: auto; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; } svg .faint { fill: var(--faint); }
svg .grid { stroke: var(--grid); stroke-width: 1; } svg .frame { stroke: var(--faint); fill: none; }
svg .line { fill: none; stroke-width: 2; }
.legend { display: flex; flex-wrap: wrap; gap: 0.3em 1.2em; font-size: 0.9em; } .legend svg { vertical-align: -2px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.88em; margin: 0.4em 0 1em; }
th, td { padding: 0.25em 0.7em; text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
"""


def page(heading: Iterable[str], results: Results) -> str:
    """Return the whole document."""
    light, dark = (
        " ".join(f"--{name}: {colours[index]};" for name, colours in COLOURS.items()) for index in (0, 1)
    )
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8"><title>Ferry: the trackers compared</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{_STYLE % (light, dark)}</style></head><body>",
        "<h1>Ferry: the trackers compared</h1>",
        *(f'<p class="note">{html.escape(line)}</p>' for line in heading),
        "<h2>What the figures say</h2>",
        *(f"<p>{html.escape(line)}</p>" for line in results.findings()),
        *(_figure(chart) for chart in results.charts()),
        *(_table(table) for table in results.tables()),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.columns)
    rows = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    return (
        f'<h2>{html.escape(table.title)}</h2><p class="note">{html.escape(table.note)}</p>'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'
    )


def _figure(chart: Chart) -> str:
    legend = "".join(
        f'<span><svg width="14" height="12" viewBox="-7 -6 14 12" aria-hidden="true">'
        f'<path d="{MARKERS[name]}" fill="var(--{name})"/></svg> {html.escape(name)}</span>'
        for name, points in chart.series.items()
        if points
    )
    return (
        f'<h2>{html.escape(chart.title)}</h2><p class="note">{html.escape(chart.note)}</p>'
        f'<figure><div class="legend">{legend}</div>{svg(chart)}</figure>'
    )


def svg(chart: Chart) -> str:
    """Draw one chart."""
    ys = [y for points in chart.series.values() for _, y in points]
    # Room for the markers, and for the lowest bar to be seen.
    y_axis = Axis(min(ys) / ROOM, max(ys) * ROOM, HEIGHT - BOTTOM, TOP)
    if chart.groups:
        body = _bars(chart, y_axis)
    else:
        xs = sorted({x for points in chart.series.values() for x, _ in points})
        x_axis = Axis(xs[0], xs[-1], LEFT, WIDTH - RIGHT, exact=True)
        body = _x_ticks(x_axis, xs if chart.x_bytes or len(xs) <= 8 else x_axis.ticks(), chart.x_bytes)
        body += [part for name, points in chart.series.items() for part in _curve(name, points, x_axis, y_axis)]
    middle, centre = (HEIGHT - BOTTOM + TOP) / 2, (LEFT + WIDTH - RIGHT) / 2
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    x_label, y_label = html.escape(chart.x_label), html.escape(chart.y_label)
    return "\n".join(
        [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
            f'aria-label="{html.escape(chart.title)}">',
            *_y_ticks(y_axis),
            *body,
            f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{width}" height="{height}"/>',
            f'<text x="{centre}" y="{HEIGHT - 8}" text-anchor="middle">{x_label}</text>',
            f'<text transform="translate(16,{middle}) rotate(-90)" text-anchor="middle">{y_label}</text>',
            "</svg>",
        ]
    )


class Axis:
    """A logarithmic axis from `start` to `end` on the page; widened to round numbers unless `exact`."""

    def __init__(self, low: float, high: float, start: float, end: float, *, exact: bool = False) -> None:
        if not exact:
            low, high = _round_down(low), _round_up(high)
        if high <= low:
            low, high = low / 2, high * 2
        self.low, self.high = low, high
        self._start, self._scale = start, (end - start) / math.log(high / low)
        # Away from the frame where the data themselves are the limits.
        self._shift = 12.0 if exact else 0.0
        if exact:
            self._scale *= 1 - 24 / (end - start)

    def at(self, value: float) -> float:
        return self._start + self._shift + math.log(value / self.low) * self._scale

    def ticks(self) -> list[float]:
        """Decades; 1, 2 and 5 where there are few."""
        steps = (1, 2, 5) if self.high / self.low < 1000 else (1,)
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
        return [tick for tick in ticks if self.low * 0.999 <= tick <= self.high * 1.001]


def _round_down(value: float) -> float:
    power = 10.0 ** math.floor(math.log10(value))
    return max(step for step in (1, 2, 5) if step * power <= value * 1.0001) * power


def _round_up(value: float) -> float:
    power = 10.0 ** math.floor(math.log10(value))
    return min((step for step in (1, 2, 5, 10) if step * power >= value * 0.9999)) * power


def _y_ticks(axis: Axis) -> list[str]:
    return [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{axis.at(tick):.1f}" y2="{axis.at(tick):.1f}"/>'
        f'<text class="faint" x="{LEFT - 8}" y="{axis.at(tick) + 4:.1f}" text-anchor="end">{tick:.10g}</text>'
        for tick in axis.ticks()
    ]


def _x_ticks(axis: Axis, ticks: Sequence[float], in_bytes: bool) -> list[str]:
    base = HEIGHT - BOTTOM
    return [
        f'<line class="grid" y1="{TOP}" y2="{base}" x1="{axis.at(tick):.1f}" x2="{axis.at(tick):.1f}"/>'
        f'<text class="faint" x="{axis.at(tick):.1f}" y="{base + 17}" text-anchor="middle">'
        f"{bytes_text(tick) if in_bytes else f'{tick:.10g}'}</text>"
        for tick in ticks
    ]


def _curve(name: str, points: Sequence[tuple[float, float]], x_axis: Axis, y_axis: Axis) -> list[str]:
    if not points:
        return []
    places = [(x_axis.at(x), y_axis.at(y)) for x, y in sorted(points)]
    path = "L".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dashes = ' stroke-dasharray="5 4"' if name in ("none", "log-spill") else ""
    return [
        f'<path class="line" stroke="var(--{name})"{dashes} d="M{path}"/>',
        *(
            f'<path d="{MARKERS[name]}" fill="var(--{name})" transform="translate({x:.1f},{y:.1f})"/>'
            for x, y in places
        ),
    ]


def _bars(chart: Chart, y_axis: Axis) -> list[str]:
    shown = [name for name, points in chart.series.items() if points]
    group = (WIDTH - LEFT - RIGHT) / len(chart.groups)
    width = group * GROUP_FILL / len(shown)
    base = HEIGHT - BOTTOM
    parts = [
        f'<text x="{LEFT + (index + 0.5) * group:.1f}" y="{base + 17}" text-anchor="middle">{html.escape(label)}</text>'
        for index, label in enumerate(chart.groups)
    ]
    for place, name in enumerate(shown):
        for x, y in chart.series[name]:
            left = LEFT + (x + (1 - GROUP_FILL) / 2) * group + place * width
            top = y_axis.at(y)
            parts.append(
                f'<rect x="{left:.1f}" y="{top:.1f}" width="{width * 0.92:.1f}" height="{max(base - top, 1):.1f}" '
                f'fill="var(--{name})"><title>{html.escape(name)}: {y:.4g}</title></rect>'
            )
            parts.append(
                f'<path d="{MARKERS[name]}" fill="var(--{name})" '
                f'transform="translate({left + width * 0.46:.1f},{top - 8:.1f}) scale(0.8)"/>'
            )
    return parts
