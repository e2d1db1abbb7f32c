"""What comes back from PAGEMAP_SCAN, as sets of ranges: selecting by category, clustering for the next scan."""

from __future__ import annotations

import itertools
import operator
from array import array

from agent.ranges import RangeSet

WINDOW_GAP_BYTES = 64 * 4096
"""Clean gap that a detailed scan walks rather than start another: a scan costs about 4 us all in all, a page 70 ns."""


def windows(ranges: RangeSet, gap: int = WINDOW_GAP_BYTES) -> list[tuple[int, int]]:
    """Cluster ranges into fewer: neighbours closer than `gap` share one window."""
    starts, ends = ranges.starts, ranges.ends
    if not starts:
        return []
    far = list(map(gap.__lt__, map(operator.sub, starts[1:], ends)))
    return list(
        zip(
            itertools.chain(starts[:1], itertools.compress(starts[1:], far)),
            itertools.chain(itertools.compress(ends, far), ends[-1:]),
        )
    )


def select(triples: array[int], wanted: int, mask: int) -> RangeSet:
    # The regions with (categories & mask) == wanted.
    if not triples:
        return RangeSet()
    chosen = list(map(wanted.__eq__, map(mask.__and__, triples[2::3])))
    pairs = zip(itertools.compress(triples[0::3], chosen), itertools.compress(triples[1::3], chosen))
    return RangeSet(array("Q", list(itertools.chain.from_iterable(pairs))))


def all_regions(triples: array[int]) -> RangeSet:
    pairs = array("Q", bytes(len(triples) // 3 * 16))
    pairs[0::2] = triples[0::3]
    pairs[1::2] = triples[1::3]
    return RangeSet(pairs)
