"""Plots as inline SVG: axes, and marks on them. Colours are the page's CSS classes, so that they follow its theme.

Every mark has a <title>, which a browser shows under the pointer. Values outside the axes are drawn at their edge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH = 760
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 26, 40
CHARACTER = 6.2
"""About the width of one, in the 11px font of labels."""


def short(value: float) -> str:
    """``12000`` -> ``12k``; no more digits than a label needs."""
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


@dataclass
class Scale:
    """Values to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __post_init__(self) -> None:
        if self.log:
            self.low = max(self.low, 1e-3)
            self.high = max(self.high, self.low * 10)
        elif self.high <= self.low:
            self.high = self.low + 1

    def at(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int = 6) -> list[float]:
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            step = max(1, (last - first + count - 1) // count)
            return [10.0**power for power in range(first, last + 1, step)]
        raw = (self.high - self.low) / count
        magnitude = 10 ** math.floor(math.log10(raw))
        step_ = next(size * magnitude for size in (1, 2, 5, 10) if size * magnitude >= raw)
        first = math.ceil(self.low / step_ - 1e-9)
        return [number * step_ for number in range(first, math.floor(self.high / step_ + 1e-9) + 1)]


@dataclass
class Plot:
    """One pair of axes."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    x_label: str
    y_label: str
    height: int = 234
    log_x: bool = False
    log_y: bool = False
    y_ticks: bool = True
    left: int = LEFT
    x_ticks: Sequence[float] = ()
    """Where the x axis has labels; empty: round numbers."""
    _marks: list[str] = field(default_factory=list)
    _legend: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bottom = self.height - BOTTOM
        self.x = Scale(*self.x_range, start=self.left, end=WIDTH - RIGHT, log=self.log_x)
        self.y = Scale(*self.y_range, start=self.bottom, end=TOP, log=self.log_y)

    # -- marks -------------------------------------------------------------------------------------------

    def band(self, start: float, end: float, title: str, css: str = "frozen") -> None:
        """A stretch of x, behind everything."""
        left, right = self.x.at(start), self.x.at(end)
        self._marks.insert(0, self._rectangle(left, TOP, right - left, self.bottom - TOP, css, title))

    def bar(self, start: float, end: float, value: float, css: str, title: str) -> None:
        left, right, top = self.x.at(start), self.x.at(end), self.y.at(value)
        self._marks.append(self._rectangle(left, top, max(right - left, 1.5), self.bottom - top, css, title))

    def row(self, start: float, end: float, number: int, label: str, css: str, title: str) -> None:
        """A horizontal bar in row `number` (from 0 at the top) of `y_range[1]` rows, its label on the left."""
        tall = (self.bottom - TOP) / self.y_range[1]
        top = TOP + number * tall
        left, right = self.x.at(start), self.x.at(end)
        self._marks.append(self._rectangle(left, top + 2, max(right - left, 1.5), tall - 4, css, title))
        self._marks.append(self._text(self.left - 8, top + tall / 2 + 4, label, "end", "label"))

    def line(self, points: Sequence[tuple[float, float]], css: str, *, step: bool = False) -> None:
        path, last = "", 0.0
        for number, (x, y) in enumerate(points):
            at_x, at_y = self.x.at(x), self.y.at(y)
            if number and step:
                path += f"L{at_x:.1f} {last:.1f}"
            path += f"{'L' if number else 'M'}{at_x:.1f} {at_y:.1f}"
            last = at_y
        self._marks.append(f'<path class="line {css}" d="{path}"/>')

    def point(self, x: float, y: float, css: str, title: str) -> None:
        self._marks.append(
            f'<circle class="point {css}" cx="{self.x.at(x):.1f}" cy="{self.y.at(y):.1f}" r="3.5">'
            f"<title>{escape(title)}</title></circle>"
        )

    def stem(self, x: float, y: float, css: str, title: str) -> None:
        """A thin line from the x axis up to the value."""
        at = self.x.at(x)
        self._marks.append(
            f'<line class="stem {css}" x1="{at:.1f}" x2="{at:.1f}" y1="{self.bottom}" y2="{self.y.at(y):.1f}">'
            f"<title>{escape(title)}</title></line>"
        )

    def whisker(self, x: float, low: float, high: float, css: str) -> None:
        at = self.x.at(x)
        self._marks.append(
            f'<line class="stem {css}" x1="{at:.1f}" x2="{at:.1f}" '
            f'y1="{self.y.at(low):.1f}" y2="{self.y.at(high):.1f}"/>'
        )

    def legend(self, *entries: tuple[str, str]) -> None:
        """(CSS class, text) pairs."""
        self._legend.extend(entries)

    # -- the whole ---------------------------------------------------------------------------------------

    def svg(self) -> str:
        parts = [
            f'<svg viewBox="0 0 {WIDTH} {self.height}" role="img" aria-label="{escape(self.y_label)}">',
            *self._axes(),
            *self._marks,
            *self._legend_marks(),
            "</svg>",
        ]
        return "".join(parts)

    def _axes(self) -> list[str]:
        parts = []
        for tick in self.x_ticks or self.x.ticks(8):
            at = self.x.at(tick)
            parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{self.bottom}"/>')
            text = f"{tick:,.0f}" if self.x_ticks else short(tick)
            parts.append(self._text(at, self.bottom + 15, text, "middle", "tick"))
        for tick in self.y.ticks(5) if self.y_ticks else ():
            at = self.y.at(tick)
            parts.append(f'<line class="grid" x1="{self.left}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
            parts.append(self._text(self.left - 8, at + 4, short(tick), "end", "tick"))
        middle = (self.left + WIDTH - RIGHT) / 2
        parts.append(self._text(middle, self.height - 6, self.x_label, "middle", "label"))
        if self.y_ticks:
            height = (TOP + self.bottom) / 2
            turned = f'transform="rotate(-90 14 {height:.0f})"'
            parts.append(f'<text class="label" x="14" y="{height:.0f}" text-anchor="middle" {turned}>')
            parts.append(f"{escape(self.y_label)}</text>")
        return parts

    def _legend_marks(self) -> list[str]:
        parts, at = [], float(self.left)
        for css, text in self._legend:
            parts.append(f'<rect class="key {css}" x="{at:.0f}" y="{TOP - 18}" width="10" height="10" rx="2"/>')
            parts.append(self._text(at + 15, TOP - 9, text, "start", "label"))
            at += 34 + CHARACTER * len(text)
        return parts

    @staticmethod
    def _rectangle(x: float, y: float, width: float, height: float, css: str, title: str) -> str:
        return (
            f'<rect class="{css}" x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" '
            f'height="{max(height, 0):.1f}"><title>{escape(title)}</title></rect>'
        )

    @staticmethod
    def _text(x: float, y: float, text: str, anchor: str, css: str) -> str:
        return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
