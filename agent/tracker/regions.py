"""What comes back from PAGEMAP_SCAN, as sets of ranges: selecting by category, clustering for the next scan.

In pieces: there may be hundreds of thousands, and a list of numbers takes five times the memory of an array.
"""

from __future__ import annotations

import itertools
import operator
from array import array
from collections.abc import Iterable

from agent.ranges import PIECE_RANGES, RangeSet

WINDOW_GAP_BYTES = 64 * 4096
"""Clean gap that a detailed scan walks rather than start another: a scan costs about 4 us all in all, a page 70 ns."""


def windows(ranges: RangeSet, gap: int = WINDOW_GAP_BYTES) -> RangeSet:
    """Cluster ranges into fewer: neighbours closer than `gap` share one window."""
    pairs = ranges.pairs
    result = pairs[:1]
    for low in range(1, len(pairs) - 1, 2 * PIECE_RANGES):  # what lies between two ranges: end, start, ...
        between = pairs[low : min(low + 2 * PIECE_RANGES, len(pairs) - 1)]
        ends, starts = between[0::2], between[1::2]
        far = list(map(gap.__lt__, map(operator.sub, starts, ends)))
        result.extend(_interleaved(itertools.compress(ends, far), itertools.compress(starts, far)))
    result.extend(pairs[-1:])
    return RangeSet.owning(result)


def select(triples: array[int], wanted: int, mask: int) -> RangeSet:
    # The regions with (categories & mask) == wanted.
    result: array[int] = array("Q")
    for low in range(0, len(triples), 3 * PIECE_RANGES):
        piece = triples[low : low + 3 * PIECE_RANGES]
        chosen = list(map(wanted.__eq__, map(mask.__and__, piece[2::3])))
        result.extend(
            _interleaved(itertools.compress(piece[0::3], chosen), itertools.compress(piece[1::3], chosen))
        )
    return RangeSet.owning(result)


def all_regions(triples: array[int]) -> RangeSet:
    pairs = array("Q", (0,)) * (len(triples) // 3 * 2)
    pairs[0::2] = triples[0::3]
    pairs[1::2] = triples[1::3]
    return RangeSet.owning(pairs)


def _interleaved(starts: Iterable[int], ends: Iterable[int]) -> array[int]:
    return array("Q", list(itertools.chain.from_iterable(zip(starts, ends))))
