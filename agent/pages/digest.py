"""A canonical digest of a process's memory, for --verify: both sides must come to the same.

Hashed are the addresses and contents of all pages that differ from what a fresh mapping would show: zero pages of
anonymous memory and pages not there are the same. Of private file mappings and shared objects the visible content
counts (again without zero pages). Not hashed: [vdso] and its kin, MAP_SHARED of regular files, MAP_DROPPABLE memory,
what `skip` names, and `masks`: bytes that differ by nature, such as a struct rseq that the kernel writes.

The process must be stopped. Reads only populated anonymous pages, and objects through their descriptor where it can be
had, so that nothing is populated. sha1 runs at 1-2 GB/s here, ahead of blake2b; it guards against bugs, not attackers.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from ctypes import memset

from agent.kernel.pagemap import (
    PAGE_IS_GUARD,
    PAGE_IS_PRESENT,
    PAGE_IS_SWAPPED,
    PagemapScanner,
)
from agent.pages.chunks import Stream
from agent.pages.sender import CHUNK_BYTES, PageReader
from agent.pages.zero import gaps, zero_runs
from agent.procfs.maps import MapsEntry
from agent.procfs.smaps import read_vm_flags
from agent.ranges import RangeSet
from agent.tracker.layout import Layout, classify
from agent.tracker.shared import open_mapped


class _Digest:
    def __init__(self, masks: Sequence[tuple[int, int]]) -> None:
        self._data = hashlib.sha1(usedforsecurity=False)
        self._where = RangeSet()
        self._masks = masks
        self.nr_bytes = 0

    def feed(self, reader: PageReader, pairs: array[int]) -> None:
        """Take the chunk in `reader`'s buffer, which holds the addresses `pairs`."""
        if not pairs:
            return
        stream = Stream(pairs)
        self._blank(reader, pairs)
        runs = zero_runs(reader.words, reader.address, stream.length)
        for low, high in gaps(runs, stream.length):
            self._data.update(reader.view[low:high])
            self._where.update(RangeSet(stream.part(low, high)))
            self.nr_bytes += high - low

    def _blank(self, reader: PageReader, pairs: array[int]) -> None:
        for address, length in self._masks:
            at = 0
            for start, end in zip(pairs[0::2], pairs[1::2]):
                low, high = max(start, address), min(end, address + length)
                if low < high:
                    memset(reader.address + at + low - start, 0, high - low)
                at += end - start

    def hexdigest(self) -> str:
        final = self._data.copy()
        final.update(self._where.pairs.tobytes())
        return final.hexdigest()


def _populated(pid: int, ranges: RangeSet) -> RangeSet:
    triples: array[int] = array("Q")
    guards: array[int] = array("Q")
    populated = PAGE_IS_PRESENT | PAGE_IS_SWAPPED
    with PagemapScanner(pid) as scanner:
        for start, end in ranges:
            triples += scanner.scan(
                start, end, category_anyof_mask=populated, return_mask=populated
            )
            try:
                guards += scanner.scan(
                    start, end, category_mask=PAGE_IS_GUARD, return_mask=PAGE_IS_GUARD
                )
            except OSError:  # the kernel does not know the category, nor report guards
                continue
    return _pairs(triples).subtract(_pairs(guards)).intersect(ranges)


def _pairs(triples: array[int]) -> RangeSet:
    pairs = array("Q", bytes(len(triples) // 3 * 16))
    pairs[0::2], pairs[1::2] = triples[0::3], triples[1::3]
    return RangeSet(pairs)


def digest_process(
    pid: int,
    maps: list[MapsEntry],
    *,
    skip: RangeSet | None = None,
    masks: Sequence[tuple[int, int]] = (),
) -> str:
    """Return the digest as hex. `skip`: page ranges left out; `masks`: (address, length) taken as zero."""
    layout: Layout = classify(maps, ())
    left_out = RangeSet.of(
        # MAP_DROPPABLE memory is not carried: it may read as zero at any time, and over there it does.
        (start, end) for start, end, flags in read_vm_flags(pid) if "dp" in flags
    )
    if skip is not None:
        left_out.update(skip)
    digest = _Digest(masks)
    reader = PageReader()
    try:
        anonymous = _populated(pid, layout.anonymous.subtract(left_out))
        whole_files = layout.private_file.subtract(left_out)
        for part in (anonymous, whole_files):
            for pairs in Stream(part.pairs).chunks(CHUNK_BYTES):
                digest.feed(reader, reader.read_process(pid, pairs, RangeSet()))
        for entry, _ in layout.shared_mappings:
            _feed_shared(digest, reader, pid, entry, left_out)
    finally:
        reader.close()
    return digest.hexdigest()


def _feed_shared(
    digest: _Digest, reader: PageReader, pid: int, entry: MapsEntry, left_out: RangeSet
) -> None:
    ranges = RangeSet((entry.start, entry.end)).subtract(left_out)
    fd = reader.adopt(open_mapped(pid, entry))
    shift = entry.offset - entry.start
    for pairs in Stream(ranges.pairs).chunks(CHUNK_BYTES):
        if fd is None:
            digest.feed(reader, reader.read_process(pid, pairs, RangeSet()))
        else:
            offsets = array("Q", map(shift.__add__, pairs))
            got = reader.read_file(fd, offsets, RangeSet())
            digest.feed(reader, array("Q", map((-shift).__add__, got)))
