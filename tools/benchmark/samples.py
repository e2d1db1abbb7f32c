"""Instants at which a process answered, or was awake: written by the loads, read and summed up by the benchmark.

A sample is three 64-bit integers: when it was asked for, when it was answered (CLOCK_MONOTONIC, nanoseconds), and a
count or place that the load defines. Appended to a file in batches of FLUSH_SAMPLES, so a reader lags a little.
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

SAMPLE_BYTES = 24
FLUSH_SAMPLES = 32


class Sample(NamedTuple):
    """One answer."""

    asked_ns: int
    answered_ns: int
    value: int


class SampleWriter:
    """Appends samples to a file; the descriptor is one that migrates."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._kept = array("q")

    def add(self, asked_ns: int, answered_ns: int, value: int) -> None:
        self._kept.extend((asked_ns, answered_ns, value))
        if len(self._kept) >= 3 * FLUSH_SAMPLES:
            os.write(self._fd, self._kept)
            del self._kept[:]


def read_samples(path: Path) -> list[Sample]:
    """All samples that are in the file by now."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    numbers = array("q", content[: len(content) // SAMPLE_BYTES * SAMPLE_BYTES])
    return [Sample(*three) for three in zip(numbers[0::3], numbers[1::3], numbers[2::3])]


def count_samples(path: Path) -> int:
    try:
        return path.stat().st_size // SAMPLE_BYTES
    except FileNotFoundError:
        return 0


@dataclass(frozen=True)
class Window:
    """A stretch of time, `[start_ns, end_ns)`."""

    start_ns: int
    end_ns: int

    @property
    def seconds(self) -> float:
        return max(self.end_ns - self.start_ns, 1) / 1e9

    def of(self, samples: list[Sample]) -> list[Sample]:
        """The samples answered within."""
        return [sample for sample in samples if self.start_ns <= sample.answered_ns < self.end_ns]


def percentile(ordered: list[float], share: float) -> float:
    """The value that `share` of the ordered values do not exceed (nearest rank)."""
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


def latencies(samples: list[Sample], window: Window) -> dict[str, float]:
    """Count and percentiles, in milliseconds, of the answers in a window; {} where there were none."""
    took = sorted((sample.answered_ns - sample.asked_ns) / 1e6 for sample in window.of(samples))
    if not took:
        return {}
    named = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}
    return {
        "count": len(took),
        **{name: round(percentile(took, share), 4) for name, share in named.items()},
        "max": round(took[-1], 4),
    }


def longest_gap_s(samples: list[Sample], window: Window) -> float:
    """The longest time between two answers that lies in the window, be it in part."""
    longest = 0
    for before, after in zip(samples, samples[1:]):
        if before.answered_ns < window.end_ns and window.start_ns <= after.answered_ns:
            longest = max(longest, after.answered_ns - before.answered_ns)
    return longest / 1e9


def around(samples: list[Sample], window: Window) -> list[Sample]:
    """The samples of a window with the last one before it and the first one after it."""
    answered = [sample.answered_ns for sample in samples]
    first, last = bisect_left(answered, window.start_ns), bisect_left(answered, window.end_ns)
    return samples[max(first - 1, 0) : last + 1]


def rate_per_s(samples: list[Sample], window: Window) -> float:
    """The sum of the values in a window per second."""
    return sum(sample.value for sample in window.of(samples)) / window.seconds
