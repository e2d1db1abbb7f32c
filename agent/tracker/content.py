"""A book of digests: what was delivered of an address space or object, eight bytes a page.

Compared is what is there now with what the destination was given, not with what an earlier look found: a page may
change between the look and the read that delivers it, and change back before the next look.

The digest is Python's own hash of bytes: SipHash with a secret of this process, 64 bits, taken by a C-level pass over
a chunk (3 GB/s here; hashlib needs a call per page and is half as fast). One change in 2^64 goes unnoticed, and nobody
outside can aim for it. Offsets and addresses in bytes, page aligned.
"""

from __future__ import annotations

import operator
import re
import struct
from array import array
from collections.abc import Iterator
from typing import Final

from agent.ranges import RangeSet
from agent.types import PAGE_SIZE

BLOCK_PAGES = 64
"""Pages whose digests are kept together: half a KiB, so that scattered pages do not cost much more than dense ones."""

_BLOCK = BLOCK_PAGES * PAGE_SIZE
_NONE: Final = array("q", bytes(8 * BLOCK_PAGES))
_PAGE: Final = struct.Struct(f"{PAGE_SIZE}s")
_ONES: Final = re.compile(b"\x01+")


def page_digests(content: memoryview) -> array[int]:
    """Return one signed 64-bit number for each page."""
    return array("q", map(hash, _PAGE.iter_unpack(content)))


def _in_blocks(pairs: array[int]) -> Iterator[tuple[int, int, int]]:
    # Cut ranges at the blocks' edges: (block number, first page in it, end page in it).
    for start, end in zip(pairs[0::2], pairs[1::2]):
        while start < end:
            block, within = divmod(start, _BLOCK)
            stop = min(end, start - within + _BLOCK)
            yield block, within // PAGE_SIZE, (within + stop - start) // PAGE_SIZE
            start = stop


class Book:
    """What the destination holds: where, and by digest what."""

    def __init__(self) -> None:
        self._blocks: dict[int, array[int]] = {}  # 0: not known (a digest of 0 only costs a page sent again)
        self.held = RangeSet()

    def deliver(self, pairs: array[int], content: memoryview) -> None:
        """Note that the ranges `pairs` were delivered with `content`."""
        digests = page_digests(content)
        at = 0
        for number, low, high in _in_blocks(pairs):
            block = self._blocks.get(number)
            if block is None:
                block = self._blocks[number] = _NONE[:]
            block[low:high] = digests[at : at + high - low]
            at += high - low
        self.held.update(RangeSet(pairs))

    def differing(self, pairs: array[int], content: memoryview) -> RangeSet:
        """Return the part of `pairs`, which now hold `content`, that was not delivered like this."""
        digests = page_digests(content)
        found: array[int] = array("Q")
        at = 0
        for number, low, high in _in_blocks(pairs):
            now = digests[at : at + high - low]
            at += high - low
            known = self._blocks.get(number, _NONE)[low:high]
            if now == known:
                continue
            base = number * _BLOCK + low * PAGE_SIZE
            for run in _ONES.finditer(bytes(map(operator.ne, now, known))):
                found.append(base + run.start() * PAGE_SIZE)
                found.append(base + run.end() * PAGE_SIZE)
        return RangeSet(found)

    def distrust(self, ranges: RangeSet) -> None:
        """Forget what was delivered there, not that something was."""
        for number, low, high in _in_blocks(ranges.intersect(self.held).pairs):
            block = self._blocks.get(number)
            if block is not None:
                block[low:high] = _NONE[low:high]

    def drop(self, ranges: RangeSet) -> None:
        """Note that the destination was told to drop `ranges`."""
        self.distrust(ranges)
        gone = ranges.intersect(self.held)
        self.held = self.held.subtract(gone)
        for number in {number for number, _, _ in _in_blocks(gone.pairs)}:
            if not self.held.touches(number * _BLOCK, (number + 1) * _BLOCK):
                self._blocks.pop(number, None)
