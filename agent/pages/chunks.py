"""Cut a range set into chunks of bounded size, and find parts of a chunk by stream offset.

Laid end to end, the ranges of a set form a stream; a chunk is a piece of it. The cumulative lengths and bisection give
each chunk by array slices. Ranges are [start, end) bytes, page aligned, as are chunk sizes.
"""

from __future__ import annotations

import itertools
import operator
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator

from agent.ranges import PIECE_RANGES


class Stream:
    """The concatenation of sorted flat pairs start, end, ..."""

    __slots__ = ("_ends", "pairs", "length")

    def __init__(self, pairs: array[int]) -> None:
        self.pairs = pairs
        ends = itertools.accumulate(map(operator.sub, pairs[1::2], pairs[0::2]))
        self._ends = array("Q")
        while piece := list(itertools.islice(ends, PIECE_RANGES)):  # never a list of all: it takes five times as much
            self._ends.extend(array("Q", piece))
        self.length = self._ends[-1] if self._ends else 0

    def part(self, low: int, high: int) -> array[int]:
        """Return the pairs that lie at stream offsets [low, high), which must not be empty."""
        first = bisect_right(self._ends, low)
        last = bisect_left(self._ends, high, first)
        piece = self.pairs[2 * first : 2 * last + 2]
        before = self._ends[first - 1] if first else 0
        piece[-1] -= self._ends[last] - high
        piece[0] += low - before
        return piece

    def chunks(self, size: int, nr_ranges: int = 1 << 62) -> Iterator[array[int]]:
        """Yield the stream in pieces of at most `size` bytes and `nr_ranges` ranges."""
        low = 0
        while low < self.length:
            high = min(low + size, self.length)
            first = bisect_right(self._ends, low)
            if first + nr_ranges - 1 < len(self._ends):
                high = min(high, self._ends[first + nr_ranges - 1])
            yield self.part(low, high)
            low = high


def to_iovecs(pairs: array[int]) -> array[int]:
    """Turn start, end pairs into address, length pairs: struct iovec's layout."""
    vectors = pairs[:]
    vectors[1::2] = array("Q", list(map(operator.sub, pairs[1::2], pairs[0::2])))
    return vectors
