"""Sets of address ranges, the currency of tracker and pages.

A range is `[start, end)` in bytes, page aligned by convention (nothing here depends on it). A `RangeSet` is a flat
`array('Q')` of starts and ends, sorted and coalesced. There is no Python loop per range: every operation is a sort
of two already sorted runs (linear in timsort) and a few C-level passes, so that 100,000 ranges take milliseconds.

Theory of operation. Let S be all starts and E all ends of some ranges, each sorted on its own. The number of ranges
that cover x is (starts <= x) - (ends <= x). Hence:
- union: a gap lies between E[i] and S[i+1] exactly where E[i] < S[i+1];
- intersection of two sets (no point is covered more than twice): exactly the non-empty [S[i+1], E[i]);
- difference: the intersection with the complement.

This module must never import another part of Ferry. Values are unsigned 64-bit.
"""

from __future__ import annotations

import itertools
import operator
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple

PAGE_SIZE = 4096
_TOP = (1 << 64) - 1
PIECE_RANGES = 1 << 13
"""Sets are worked on in pieces of so many ranges: what is in Python objects at a time stays below a few megabytes."""
_FEW = 16
"""So many times smaller than the other set, a set is intersected range by range."""


class AddressRange(NamedTuple):
    """`[start, end)`."""

    start: int
    end: int

    @property
    def nr_bytes(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.start:#x}-{self.end:#x}"


def _interleave(starts: Iterable[int], ends: Iterable[int]) -> array[int]:
    # array(iterable) is slower than array(list) by half.
    return array("Q", list(itertools.chain.from_iterable(zip(starts, ends))))


def _normalized(pairs: array[int]) -> array[int]:
    """Sort and coalesce; what is so already comes back itself."""
    if _is_rising(pairs):
        return pairs
    starts, ends = pairs[0::2], pairs[1::2]
    if len(starts) > PIECE_RANGES:
        return _normalized_by_halves(pairs)
    if not all(map(operator.le, starts, ends)):
        raise ValueError("a range ends before it starts")
    keep = list(map(operator.lt, starts, ends))  # empty ranges would break the counting argument
    first = sorted(itertools.compress(starts, keep))
    last = sorted(itertools.compress(ends, keep))
    return _union_sorted(first, last)


def _is_rising(pairs: array[int]) -> bool:
    for low in range(0, len(pairs), 2 * PIECE_RANGES):
        piece = pairs[low : low + 2 * PIECE_RANGES + 1]
        if not all(map(operator.lt, piece, piece[1:])):
            return False
    return True


def _normalized_by_halves(pairs: array[int]) -> array[int]:
    middle = len(pairs) // 4 * 2
    return _union(_normalized(pairs[:middle]), _normalized(pairs[middle:]))


def _union_sorted(starts: list[int], ends: list[int]) -> array[int]:
    if not starts:
        return array("Q")
    gaps = list(map(operator.lt, ends, itertools.islice(starts, 1, None)))
    return _interleave(
        itertools.chain(starts[:1], itertools.compress(starts[1:], gaps)),
        itertools.chain(itertools.compress(ends, gaps), ends[-1:]),
    )


def _clipped(pairs: array[int], start: int, end: int) -> array[int]:
    low = bisect_right(pairs, start)
    if low == len(pairs) or start >= end:
        return array("Q")
    high = bisect_left(pairs, end)
    inside = pairs[low:high]
    if low % 2:  # start lies in a range
        inside.insert(0, start)
    if high % 2:
        inside.append(end)
    return inside


def _pieces(left: array[int], right: array[int]) -> Iterator[tuple[array[int], array[int]]]:
    # Both sets, cut at the same addresses into pieces of at most PIECE_RANGES of the larger one. A list of numbers
    # takes five times the memory of an array: none is made of a whole set.
    larger = left if len(left) >= len(right) else right
    low = 0
    for index in range(2 * PIECE_RANGES, len(larger), 2 * PIECE_RANGES):
        yield _clipped(left, low, larger[index]), _clipped(right, low, larger[index])
        low = larger[index]
    yield (_clipped(left, low, _TOP), _clipped(right, low, _TOP)) if low else (left, right)


def _append(result: array[int], piece: array[int]) -> None:
    # What was cut in two grows together.
    if result and piece and result[-1] == piece[0]:
        result.pop()
        result.extend(piece[1:])
    else:
        result.extend(piece)


def _union(left: array[int], right: array[int]) -> array[int]:
    """Of two normalized ones. Costs no more than copies outside of where the smaller one lies."""
    if len(left) < len(right):
        left, right = right, left
    if not right:
        return left[:]
    # Ranges of `left` that end before, or start behind all of `right`; those that touch it are not among them.
    first = bisect_left(left, right[0]) // 2 * 2
    last = (bisect_right(left, right[-1]) + 1) // 2 * 2
    result = left[:first]
    for mine, other in _pieces(left[first:last], right):
        pairs = mine + other
        starts, ends = sorted(pairs[0::2]), sorted(pairs[1::2])
        _append(result, _union_sorted(starts, ends))
    result.extend(left[last:])
    return result


def _intersection(left: array[int], right: array[int]) -> array[int]:
    if not left or not right or left[-1] <= right[0] or right[-1] <= left[0]:
        return array("Q")
    if len(left) < len(right):
        left, right = right, left
    result = array("Q")
    if len(right) * _FEW <= len(left):  # slices of the large set
        for start, end in zip(right[0::2], right[1::2]):
            result += _clipped(left, start, end)
        return result
    for mine, other in _pieces(left, right):
        pairs = mine + other
        starts, ends = sorted(pairs[0::2])[1:], sorted(pairs[1::2])
        both = list(map(operator.lt, starts, ends))
        _append(result, _interleave(itertools.compress(starts, both), itertools.compress(ends, both)))
    return result


def _complement(pairs: array[int]) -> array[int]:
    if not pairs:
        return array("Q", (0, _TOP))
    first = 1 if pairs[0] == 0 else 0
    if first:
        inverted = pairs[1:]
    else:
        inverted = array("Q", (0,)) + pairs
    if inverted[-1] == _TOP:
        return inverted[:-1]
    inverted.append(_TOP)
    return inverted


class RangeSet:
    """A set of ranges; `add` and `update` change it, everything else makes a new one.

    The constructor takes a flat sequence start, end, start, end... in any order, overlapping or not.
    """

    __slots__ = ("_pairs", "_pending")

    def __init__(self, pairs: Iterable[int] = ()) -> None:
        flat = pairs if isinstance(pairs, array) and pairs.typecode == "Q" else array("Q", pairs)
        if len(flat) % 2:
            raise ValueError("an odd number of range bounds")
        self._pairs: array[int] = _normalized(flat[:])
        self._pending: array[int] = array("Q")  # added, not yet merged

    @classmethod
    def _of(cls, pairs: array[int]) -> RangeSet:
        made = cls.__new__(cls)
        made._pairs = pairs
        made._pending = array("Q")
        return made

    @classmethod
    def owning(cls, pairs: array[int]) -> RangeSet:
        """Make one from what the constructor takes, without a copy: the array is the set's from now on."""
        return cls._of(_normalized(pairs))

    @classmethod
    def of(cls, ranges: Iterable[tuple[int, int]]) -> RangeSet:
        """Make one from (start, end) tuples."""
        return cls.owning(array("Q", itertools.chain.from_iterable(ranges)))

    @property
    def pairs(self) -> array[int]:
        """Flat start, end, ... sorted and coalesced. Not to be changed by the caller."""
        if self._pending:
            pending, self._pending = self._pending, array("Q")
            self._pairs = _union(self._pairs, _normalized(pending))
        return self._pairs

    @property
    def starts(self) -> array[int]:
        return self.pairs[0::2]

    @property
    def ends(self) -> array[int]:
        return self.pairs[1::2]

    def lengths(self) -> list[int]:
        """Bytes in each range, in order."""
        pairs = self.pairs
        return list(map(operator.sub, pairs[1::2], pairs[0::2]))

    def add(self, start: int, end: int) -> None:
        if end < start:
            raise ValueError("a range ends before it starts")
        self._pending.append(start)
        self._pending.append(end)
        self._settle()

    def update(self, other: RangeSet) -> None:
        pairs = other.pairs
        if not self._pending and pairs and (not self._pairs or self._pairs[-1] <= pairs[0]):
            _append(self._pairs, pairs)
            return
        self._pending.extend(pairs)
        self._settle()

    def _settle(self) -> None:
        # What comes in the order of addresses, as it mostly does, is merged for the cost of a copy.
        if len(self._pending) > 2 * PIECE_RANGES:
            self.pairs  # noqa: B018  # merges

    def union(self, other: RangeSet) -> RangeSet:
        if not other:
            return self.copy()
        if not self:
            return other.copy()
        return RangeSet._of(_union(self.pairs, other.pairs))

    def intersect(self, other: RangeSet) -> RangeSet:
        return RangeSet._of(_intersection(self.pairs, other.pairs))

    def subtract(self, other: RangeSet) -> RangeSet:
        if not other or not self:
            return self.copy()
        return RangeSet._of(_intersection(self.pairs, _complement(other.pairs)))

    def clip(self, start: int, end: int) -> RangeSet:
        """Return the part within [start, end), by bisection."""
        return RangeSet._of(_clipped(self.pairs, start, end))

    def covers(self, start: int, end: int) -> bool:
        """Say whether all of [start, end) is in one range of the set."""
        pairs = self.pairs
        position = bisect_right(pairs, start)
        return start >= end or (position % 2 == 1 and pairs[position] >= end)

    def touches(self, start: int, end: int) -> bool:
        """Say whether any of [start, end) is in the set, by bisection."""
        pairs = self.pairs
        position = bisect_right(pairs, start)
        return start < end and (position % 2 == 1 or (position < len(pairs) and pairs[position] < end))

    def copy(self) -> RangeSet:
        return RangeSet._of(self.pairs[:])

    @property
    def nr_bytes(self) -> int:
        pairs = self.pairs
        return sum(pairs[1::2]) - sum(pairs[0::2])

    @property
    def nr_pages(self) -> int:
        return self.nr_bytes // PAGE_SIZE

    @property
    def nr_ranges(self) -> int:
        return len(self.pairs) // 2

    def __bool__(self) -> bool:
        return bool(self.pairs)

    def __len__(self) -> int:
        return len(self.pairs) // 2

    def __contains__(self, vaddr: int) -> bool:
        return bisect_right(self.pairs, vaddr) % 2 == 1

    def __iter__(self) -> Iterator[AddressRange]:
        pairs = self.pairs
        return map(AddressRange, pairs[0::2], pairs[1::2])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RangeSet) and self.pairs == other.pairs

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = ", ".join(map(str, itertools.islice(self, 8)))
        return f"RangeSet({shown}{', ...' if len(self) > 8 else ''})"
