"""Where a reader of userfaultfd messages puts them: a bounded log in order, and what takes over when it is full.

A record is one store to a protected page, or one change of mappings. The log is allocated once, in memory that the
reader (a process of its own) and the rounds share; it has two halves, so that one is filled while the other is
consumed. Every record has a sequence number: stores are kept apart from events, which say after how many stores they
came, so that neither needs parsing. The bitmap has one bit for each page, 1/32768 of the memory that is written to,
and never fills.

Pure data, no system calls beyond the shared mapping. Addresses are target addresses; stores are page addresses.
"""

from __future__ import annotations

import mmap
import re
import struct
from array import array
from dataclasses import dataclass, field

from agent.kernel.uffd import UFFD_EVENT_FORK, UFFD_EVENT_REMAP, UFFD_EVENT_REMOVE
from agent.ranges import RangeSet
from agent.tracker.regions import windows
from agent.types import PAGE_SIZE

EVENT_WORDS = 5
"""Of an event: the number of stores before it in this half, its kind, and three arguments."""
REGION_PAGES = 1 << 15
"""Pages of one piece of the bitmap: 128 MiB in 4 KiB of bits, made when the first of them is set."""
MAX_EVENT_RANGES = 1 << 14
"""Ranges of events that are kept beside a bitmap; beyond, neighbours are joined, which names too much, never too
little."""

_REGION_BYTES = REGION_PAGES // 8
_COUNTS = struct.Struct("<QQQ")
_RUN = re.compile("1+")


def page_ranges(pages: array[int]) -> RangeSet:
    """Turn page addresses, in any order, into ranges."""
    starts = array("Q", sorted(set(pages)))
    pairs = array("Q", bytes(16 * len(starts)))
    pairs[0::2] = starts
    pairs[1::2] = array("Q", list(map(PAGE_SIZE.__add__, starts)))
    return RangeSet(pairs)


class EventLog:
    """The bounded log. The reader adds and flips, the consumer reads the half that was flipped away.

    A half must have been read before the next flip() comes back to it.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        nr_words = capacity * (1 + EVENT_WORDS)
        # Shared with the process that is forked off; untouched pages of it cost nothing.
        self._memory = mmap.mmap(-1, max(2 * 8 * nr_words, PAGE_SIZE))
        words = memoryview(self._memory).cast("Q")
        halves = words[:nr_words], words[nr_words : 2 * nr_words]
        self._halves = [(half[:capacity], half[capacity:]) for half in halves]
        self._half = 0
        self._first = 0
        self.nr_stores = self.nr_events = 0

    @property
    def room(self) -> int:
        """How many more records fit."""
        return self.capacity - self.nr_stores - self.nr_events

    def add_stores(self, pages: list[int]) -> None:
        end = self.nr_stores + len(pages)
        self._halves[self._half][0][self.nr_stores : end] = array("Q", pages)
        self.nr_stores = end

    def add_event(self, kind: int, first: int, second: int, third: int) -> None:
        at = self.nr_events * EVENT_WORDS
        record = array("Q", (self.nr_stores, kind, first, second, third))
        self._halves[self._half][1][at : at + EVENT_WORDS] = record
        self.nr_events += 1

    def flip(self) -> tuple[int, int, int, int]:
        """Begin the other half, empty; return the number, first sequence number, stores and events of this one."""
        flipped = self._half, self._first, self.nr_stores, self.nr_events
        self._first += self.nr_stores + self.nr_events
        self._half = 1 - self._half
        self.nr_stores = self.nr_events = 0
        return flipped

    def read(self, half: int, nr_stores: int, nr_events: int) -> tuple[array[int], array[int]]:
        """Return copies of the stores and of the events (flat, EVENT_WORDS each) of a half."""
        stores, events = self._halves[half]
        copies = array("Q"), array("Q")
        copies[0].frombytes(stores[:nr_stores].tobytes())
        copies[1].frombytes(events[: nr_events * EVENT_WORDS].tobytes())
        return copies


class PageBitmap:
    """One bit for each page, in pieces that exist where a bit was set."""

    def __init__(self) -> None:
        self.regions: dict[int, bytearray] = {}

    def add(self, pages: list[int]) -> None:
        regions = self.regions
        for page in pages:
            number = page // PAGE_SIZE
            region = regions.get(number // REGION_PAGES)
            if region is None:
                region = regions[number // REGION_PAGES] = bytearray(_REGION_BYTES)
            bit = number % REGION_PAGES
            region[bit >> 3] |= 1 << (bit & 7)

    def ranges(self) -> RangeSet:
        pairs: array[int] = array("Q")
        for number, region in self.regions.items():
            base = number * REGION_PAGES * PAGE_SIZE
            text = f"{int.from_bytes(region, 'little'):b}"[::-1]
            for run in _RUN.finditer(text):
                pairs.extend((base + run.start() * PAGE_SIZE, base + run.end() * PAGE_SIZE))
        return RangeSet(pairs)


@dataclass(slots=True)
class Touched:
    """What events have touched. `dropped`: memory that stays mapped; `replaced`: unmapped, or moved from or to."""

    dropped: RangeSet = field(default_factory=RangeSet)
    replaced: RangeSet = field(default_factory=RangeSet)

    def add_event(self, kind: int, first: int, second: int, third: int) -> None:
        if kind == UFFD_EVENT_REMAP:
            self.replaced.add(first, first + third)
            self.replaced.add(second, second + third)
        elif kind == UFFD_EVENT_REMOVE:
            self.dropped.add(first, second)
        elif kind != UFFD_EVENT_FORK:
            self.replaced.add(first, second)

    def bound(self) -> None:
        """Join neighbours until there are few enough ranges."""
        for name in ("dropped", "replaced"):
            ranges: RangeSet = getattr(self, name)
            gap = PAGE_SIZE
            while ranges.nr_ranges > MAX_EVENT_RANGES:
                gap *= 16
                ranges = windows(ranges, gap)
            setattr(self, name, ranges)


class Overflow:
    """What takes records when the log is full, or when there is none: without order, and without an end."""

    def __init__(self) -> None:
        self.bitmap = PageBitmap()
        self.touched = Touched()
        self._unbounded = 0
        self.used = False

    def add_stores(self, pages: list[int]) -> None:
        self.used = True
        self.bitmap.add(pages)

    def add_event(self, kind: int, first: int, second: int, third: int) -> None:
        self.used = True
        self.touched.add_event(kind, first, second, third)
        self._unbounded += 1
        if self._unbounded >= MAX_EVENT_RANGES:
            self.touched.bound()
            self._unbounded = 0

    def dump(self) -> bytes:
        """Return all of it for load()."""
        regions = self.bitmap.regions
        dropped, replaced = self.touched.dropped.pairs, self.touched.replaced.pairs
        parts = [_COUNTS.pack(len(regions), len(dropped), len(replaced)), array("Q", regions).tobytes()]
        return b"".join([*parts, dropped.tobytes(), replaced.tobytes(), *regions.values()])

    @classmethod
    def load(cls, content: bytes) -> Overflow:
        made = cls()
        nr_regions, nr_dropped, nr_replaced = _COUNTS.unpack_from(content)
        words: array[int] = array("Q")
        at = _COUNTS.size + 8 * (nr_regions + nr_dropped + nr_replaced)
        words.frombytes(content[_COUNTS.size : at])
        for index, number in enumerate(words[:nr_regions]):
            begin = at + index * _REGION_BYTES
            made.bitmap.regions[number] = bytearray(content[begin : begin + _REGION_BYTES])
        made.touched.dropped = RangeSet(words[nr_regions : nr_regions + nr_dropped])
        made.touched.replaced = RangeSet(words[nr_regions + nr_dropped :])
        made.used = True
        return made
