"""The reference tracker: read everything in every round and compare it with what the destination was given.

Slow, always right, and works on any kernel with /proc/PID/pagemap: no userfaultfd, nothing in the target changes, no
mapping is cut, the target never waits. Addresses are target addresses.

It remembers a digest of each page as it was *delivered* (see agent.tracker.content), about eleven bytes a page, so its
caller must let it see what is sent (Witness). Then there are no races to speak of:
- whatever happens between collect() and the read that delivers, the book says what the destination holds, and the next
  round reports the difference. A page that went away before it could be read was never delivered;
- populated is what /proc/PID/pagemap shows right before the read. A page that is dropped between the two is read as
  zero, which maps the zero page in the target (as any sender would), and shows as populated from then on: harmless.
The answer is exact in running rounds too: only what differs is reported.

Must never read where nothing is populated, nor guard pages, nor a file's own pages.
"""

from __future__ import annotations

import time
from array import array

from agent.errors import DumpError
from agent.pages.chunks import Stream
from agent.pages.sender import CHUNK_BYTES, PageReader
from agent.ranges import RangeSet
from agent.tracker.base import DirtySet, SharedKey, TrackerStats
from agent.tracker.content import Book
from agent.tracker.objects import ObjectBooks
from agent.tracker.populated import Look, Mappings, ProcPagemap
from agent.tracker.shared import SharedWatch


class CompareTracker:
    """Tracks one process by comparing contents; see Witness for what it needs from its caller."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pagemap = ProcPagemap(pid)
        self._mappings = Mappings(pid)
        self._reader = PageReader()
        self._book = Book()
        self._shared_watch = SharedWatch(pid)
        self._objects = ObjectBooks(self._shared_watch, self._reader)

    @property
    def name(self) -> str:
        return "compare"

    @property
    def shared_watch(self) -> SharedWatch:
        return self._shared_watch

    def arm(self) -> None:
        """Nothing to prepare."""

    def collect(self, *, final: bool) -> DirtySet:
        """See Tracker."""
        began = time.perf_counter()
        changed = self._mappings.read(final=final)
        layout = self._mappings.layout
        anonymous = Look(self._pagemap, layout.anonymous)
        of_file = Look(self._pagemap, layout.private_file)
        populated = anonymous.copied.union(of_file.copied)
        pages = self._differing(populated, final=final)
        absent = self._book.held.subtract(populated)
        self._book.drop(absent)
        dirty = DirtySet(
            maps_text=self._mappings.text,
            maps=self._mappings.entries,
            pages=pages,
            absent=absent,
            guards=anonymous.guards.union(of_file.guards) if final else RangeSet(),
            shared=self._objects.changed(layout.object_mappings),
        )
        dirty.stats = TrackerStats(
            seconds=time.perf_counter() - began,
            nr_passes=1,
            nr_vmas=len(layout.watched),
            maps_changed=changed,
        )
        return dirty

    def _differing(self, populated: RangeSet, *, final: bool) -> RangeSet:
        pages, gone = RangeSet(), RangeSet()
        for pairs in Stream(populated.pairs).chunks(CHUNK_BYTES):
            got = self._reader.read_process(self.pid, pairs, gone)
            length = sum(got[1::2]) - sum(got[0::2])
            pages.update(self._book.differing(got, self._reader.view[:length]))
        if final and gone:
            where = next(iter(gone))
            raise DumpError(f"Cannot read memory {where} of stopped process {self.pid}", pid=self.pid)
        return pages

    def forget(self, ranges: RangeSet) -> None:
        """See Tracker. What was not read was not delivered: the book knows already, this makes sure."""
        self._book.distrust(ranges)

    def delivered(self, key: SharedKey | None, pairs: array[int], content: memoryview) -> None:
        """See Witness."""
        if key is None:
            self._book.deliver(pairs, content)
        else:
            self._objects.deliver(key, pairs, content)

    def dropped(self, key: SharedKey, absent: RangeSet) -> None:
        """See Witness."""
        self._objects.drop(key, absent)

    def disarm(self) -> None:
        """See Tracker."""
        self._pagemap.close()
        self._reader.close()
        self._shared_watch.close()
