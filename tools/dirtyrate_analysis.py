"""What a series of looks at a process's dirty pages says: rates, working set, hot ranges, and a migration foretold.

Pure functions of what was seen; no clock, no process. Ranges are target addresses, [start, end) in bytes; seconds.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from agent.policy import FIXED_DOWNTIME_S, Action, PolicyLimits, RoundStats, decide
from agent.procfs.maps import MapsEntry
from agent.ranges import RangeSet
from agent.types import PAGE_SIZE

BLOCKS_PER_MAPPING = 256
"""Resolution of the hot ranges: enough to see a hot tenth, few enough for the density of a block to mean something."""
SAME_DENSITY = 4.0
"""Neighbouring blocks whose densities differ by no more than this factor are one range."""
ANONYMOUS = "anonymous"


@dataclass(frozen=True, slots=True)
class Look:
    """What was written in the `seconds` before a look. `pages` of private and shared mappings alike."""

    at_s: float
    seconds: float
    pages: RangeSet


@dataclass(frozen=True, slots=True)
class WorkingSet:
    """How many different pages are written within `seconds`: mean and maximum over the windows of that length."""

    seconds: float
    pages_mean: float
    pages_max: int


@dataclass(frozen=True, slots=True)
class HotRange:
    """A range that is written evenly. `share` of all page writes seen; `density`: part of it dirty in one look."""

    start: int
    end: int
    name: str
    share: float
    density: float


@dataclass(slots=True)
class Prediction:
    """A migration that did not happen. `extrapolated`: it has rounds longer than the measurement."""

    bandwidth_bytes_per_s: float
    rounds: list[RoundStats] = field(default_factory=list)
    downtime_s: float = 0.0
    total_s: float = 0.0
    bytes_total: int = 0
    action: str = ""
    reason: str = ""
    extrapolated: bool = False


def working_sets(looks: Sequence[Look]) -> list[WorkingSet]:
    """Return the working set over 1, 2, 4... intervals, and over all of them."""
    found: list[WorkingSet] = []
    length = 1
    while looks:
        length = min(length, len(looks))
        windows = [looks[i : i + length] for i in range(0, len(looks) - length + 1, length)]
        pages = [_union(window).nr_pages for window in windows]
        seconds = sum(look.seconds for window in windows for look in window) / len(windows)
        found.append(WorkingSet(seconds, sum(pages) / len(pages), max(pages)))
        if length == len(looks):
            break
        length *= 2
    return found


def _union(looks: Sequence[Look]) -> RangeSet:
    union = RangeSet()
    for look in looks:
        union.update(look.pages)
    return union


class WorkingSetCurve:
    """Pages written within any time: linear between what was measured, and on with the last slope beyond."""

    def __init__(self, measured: Sequence[WorkingSet], nr_pages: int) -> None:
        self._points = [(0.0, 0.0), *((point.seconds, point.pages_mean) for point in measured)]
        self._nr_pages = nr_pages
        self.longest_s = self._points[-1][0]

    def pages(self, seconds: float) -> float:
        points = self._points
        if len(points) == 1:
            return 0.0
        index = min(max(bisect_left(points, (seconds,)), 1), len(points) - 1)
        (x0, y0), (x1, y1) = points[index - 1], points[index]
        slope = (y1 - y0) / (x1 - x0) if x1 > x0 else 0.0
        value = y0 + max(slope, 0.0) * (seconds - x0)
        return min(value, float(self._nr_pages)) if seconds > self.longest_s else value


def predict(curve: WorkingSetCurve, nr_pages: int, bandwidth: float, limits: PolicyLimits) -> Prediction:
    """Go through the rounds of a migration of `nr_pages` populated pages, with agent-send's own policy.

    Counts every page as PAGE_SIZE bytes: zero pages and compression only make it better.
    """
    made = Prediction(bandwidth)
    pages = float(nr_pages)
    while limits.max_rounds:
        nr_bytes = round(pages) * PAGE_SIZE
        made.rounds.append(
            RoundStats(
                pages_dirty=round(pages),
                pages_sent=round(pages),
                bytes_sent=nr_bytes,
                seconds=nr_bytes / bandwidth,
            )
        )
        decision = decide(made.rounds, limits)
        made.action, made.reason = decision.action.value, decision.reason
        seconds = made.rounds[-1].seconds
        made.extrapolated |= seconds > curve.longest_s
        pages = curve.pages(seconds)
        if decision.action is not Action.CONTINUE:
            break
    # Not the policy's own estimate, which knows only the rounds: the curve says what the last one would find.
    made.downtime_s = FIXED_DOWNTIME_S + round(pages) * PAGE_SIZE / bandwidth
    made.total_s = sum(r.seconds for r in made.rounds) + made.downtime_s
    made.bytes_total = sum(r.bytes_sent for r in made.rounds) + round(pages) * PAGE_SIZE
    return made


def coverage(looks: Sequence[Look]) -> Iterator[tuple[int, int, int]]:
    """Yield (start, end, number of looks that found it dirty), in address order, without the clean parts."""
    change: dict[int, int] = {}
    for look in looks:
        for start, end in zip(look.pages.starts, look.pages.ends):
            change[start] = change.get(start, 0) + 1
            change[end] = change.get(end, 0) - 1
    edges = sorted(change)
    counts = itertools.accumulate(map(change.__getitem__, edges))
    for (start, end), count in zip(zip(edges, edges[1:]), counts):
        if count:
            yield start, end, count


def hot_ranges(looks: Sequence[Look], maps: Sequence[MapsEntry], limit: int) -> list[HotRange]:
    """Return the `limit` ranges with most page writes, hottest first."""
    segments = list(coverage(looks))
    total = sum((end - start) * count for start, end, count in segments)
    starts = [start for start, _, _ in segments]
    found: list[HotRange] = []
    for entry in maps:
        low = max(bisect_right(starts, entry.start) - 1, 0)
        inside = segments[low : bisect_left(starts, entry.end)]
        for start, end, weight in _evenly_written(entry, inside):
            found.append(
                HotRange(
                    start,
                    end,
                    entry.path or ANONYMOUS,
                    weight / total,
                    weight / ((end - start) * len(looks)),
                )
            )
    return sorted(found, key=lambda hot: -hot.share)[:limit]


def _evenly_written(
    entry: MapsEntry, segments: Sequence[tuple[int, int, int]]
) -> Iterator[tuple[int, int, int]]:
    # Blocks of a mapping, joined to ranges of about the same density: (start, end, bytes x looks).
    block = max(math.ceil((entry.end - entry.start) / PAGE_SIZE / BLOCKS_PER_MAPPING), 1) * PAGE_SIZE
    weights: dict[int, int] = {}
    for start, end, count in segments:
        start, end = max(start, entry.start), min(end, entry.end)
        while start < end:
            number = (start - entry.start) // block
            stop = min(end, entry.start + (number + 1) * block)
            weights[number] = weights.get(number, 0) + (stop - start) * count
            start = stop
    run: tuple[int, int, int] | None = None
    for number in sorted(weights):
        start = entry.start + number * block
        end = min(start + block, entry.end)
        weight = weights[number]
        if run is not None:
            density = run[2] / (run[1] - run[0]) / (weight / (end - start))
            if run[1] == start and 1 / SAME_DENSITY <= density <= SAME_DENSITY:
                run = run[0], end, run[2] + weight
                continue
            yield run
        run = start, end, weight
    if run is not None:
        yield run
