"""The log tracker: synchronous userfaultfd write protection, with every store and every event in a bounded log.

Runs from outside, but the target waits for it: for the reader (agent.tracker.reader) at the first store to a page in
a round and at each unmap, move, drop and fork. Addresses are target addresses. Must never populate a page, never
protect an empty reservation, never leave a registration or a waiter behind.

Theory of operation. `_clean` is the set of pages of which nothing more is to be done: the destination has their content
(or they are file pages or holes of shared objects), they are protected, and no record has named them since. A page
enters `_clean` only when a round reports it, after it was protected; whatever a record names leaves. collect():
1. Take the log. Stores, and the ranges of all events, leave `_clean`; what was unmapped or moved must be registered
   again (harmless where it still is).
2. Read maps and register what is new.
3. Anonymous memory outside of `_clean` is asked for what is populated (PAGEMAP_SCAN, no look at clean memory): that is
   dirty, and is protected; the rest is absent. So a page moved by mremap(2) is sent at its new address, a dropped
   one becomes absent, an unmapped one vanishes.
4. Shared mappings outside of `_clean` are dirty and protected as a whole, holes too (markers in the page table).
5. Private mappings of files, which userfaultfd takes in asynchronous mode only: what was copied and not sent yet.

Only what is populated is protected, so a reservation of any size costs nothing, and the first touch of a page asks
nobody: it is outside of `_clean`, where step 3 finds it. The walk over what is not populated is cheap (the kernel skips
empty tables) and complete. UFFDIO_REGISTER_MODE_MISSING would report each first touch instead, and make it ten times as
dear. (PM_SCAN_WP_MATCHING protects in asynchronous mode only, so protecting is a call of its own.)

Order. Records are taken in the kernel's order, but that order says less than it seems: read(2) hands out stores before
events, the events of unmap, move and fork are queued when the change is done and the lock is released, that of
MADV_DONTNEED before it begins. So a range may be dropped after its record was consumed, or moved to before its old
content's unmapping is told. Therefore no record ever adds to `_clean`: all only take away, in any order with the same
result, and what is true is asked of the page table.

The final round. Some changes have no record at all: MADV_GUARD_INSTALL over a page, a merge by KSM, the reclaim of a
page after MADV_FREE, holes punched into shared objects, and a drop that follows its record (above). Each leaves a page
unprotected. So the final round, which must look for guards anyway, has the fast scan name what of `_clean` is not
protected (0.6 ms per GiB), and counts it (`pages_unlogged`): 0 is what the log promises without those.

Exiting threads. The kernel does not wait for a reader when a thread on its way out stores to user memory: the store
fails. A thread whose tid word (set_tid_address(2)) is protected then would exit without telling pthread_join(3). So the
page of each thread's robust list, where the C libraries keep that word, is never protected and sent in every round.
Not covered: a thread that is made and exits between the look at the threads and the protection, and a robust mutex
held by a thread that dies. Asynchronous protection has neither problem; nor does it stop debuggers that write through
/proc/PID/mem, which fails with EIO on a protected page.

Pinned pages. process_vm_writev(2) and reads with O_DIRECT pin all pages first, with a fault for each, and store later,
past any protection: a round that protects and sends a page in between misses the store. That is so for every tracker by
page tables (agent.tracker.scan too); here the time between grows with each fault's wait, above all in a stall.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from array import array
from ctypes import addressof

from agent.errors import DumpError, TargetGone
from agent.kernel import uffd
from agent.kernel.futex import get_robust_list
from agent.kernel.ioctl import raw_ioctl
from agent.kernel.pagemap import (
    PAGE_IS_FILE,
    PAGE_IS_GUARD,
    PAGE_IS_PRESENT,
    PAGE_IS_SWAPPED,
    PAGE_IS_WRITTEN,
)
from agent.options import DEFAULT_LOG_CAPACITY, LOG_WHEN_FULL
from agent.procfs.process import list_tids
from agent.ranges import RangeSet
from agent.tracker.base import SharedKey
from agent.tracker.book import BookedTracker
from agent.tracker.reader import Reader
from agent.tracker.regions import all_regions, select, windows
from agent.types import PAGE_SIZE

MAX_REFUSALS = 1000
"""How often a page may not be protected because an event waits to be read, before it is left to the next pass."""

_POPULATED = PAGE_IS_PRESENT | PAGE_IS_SWAPPED
_TID_WORD_BYTES = 256
"""glibc and musl keep the thread's tid so close to its robust list, or closer."""

_log = logging.getLogger(__name__)


class LogTracker(BookedTracker):
    """Tracks one process by a log of its stores; `uffd_fd` as RegisteredMemory says, with UFFD_FEATURES_LOG.

    :param capacity: records that the log holds. :param when_full: "stall": the target waits for the next round;
        "spill": a bitmap takes over until then.
    """

    watches_private_files = False

    def __init__(
        self, pid: int, uffd_fd: int, *, capacity: int = DEFAULT_LOG_CAPACITY, when_full: str = "spill"
    ) -> None:
        super().__init__(pid, uffd_fd)
        if when_full not in LOG_WHEN_FULL or capacity < (when_full == "stall"):
            raise ValueError(f"no log of {capacity} records that can {when_full}")
        self._capacity = capacity
        self._when_full = when_full
        self._reader: Reader | None = None
        self._clean = RangeSet()
        self._named = RangeSet()  # by records since this pass began
        self._last_written = RangeSet()

    @property
    def name(self) -> str:
        return "log"

    def arm(self) -> None:
        self._reader = Reader(
            self.pid, self._uffd, capacity=self._capacity, when_full=self._when_full
        )
        super().arm()

    def _close_uffd(self) -> None:
        # Only now: unregistering, like everything else, may have to wait for the reader.
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        super()._close_uffd()

    # One pass

    def _pass(
        self, pages: RangeSet, absent: RangeSet, stored: dict[SharedKey, RangeSet], *, final: bool
    ) -> bool:
        self._take_log()
        # From here on, maps not yet read: what a record names now may have happened after anything seen below.
        self._named = RangeSet()
        self._refresh()
        layout = self._layout
        distrusted = self._fresh.union(self._suspect)
        self._fresh, self._suspect = RangeSet(), RangeSet()
        watched = layout.anonymous.union(layout.shared)
        self._clean = self._clean.intersect(watched).subtract(distrusted)
        if final:
            self._verify()
        spared = self._tid_words()
        clean, settled = self._anonymous(spared, pages, absent)
        shared_clean, complete = self._shared(stored)
        self._private_files(distrusted, pages, absent, final=final)
        # A page that was stored to since it was protected is not clean.
        self._clean = self._clean.union(clean.union(shared_clean).subtract(self._named))
        return settled and complete

    def _take_log(self) -> None:
        # Step 1.
        if self._reader is None:
            raise DumpError("The tracker is not armed", pid=self.pid)
        taken = self._reader.take()
        named = taken.stored.union(taken.dropped).union(taken.replaced)
        self._clean = self._clean.subtract(named)
        self._named = self._named.union(named)
        self._registered = self._registered.subtract(taken.replaced)
        stats = self._stats
        stats.nr_records += taken.nr_logged
        stats.nr_forks += taken.nr_forks
        stats.nr_stalls += taken.nr_stalls
        stats.stall_s += taken.stall_s
        stats.nr_spills += taken.spilled and self._capacity > 0
        if taken.nr_forks:
            _log.info(
                "Process %d forked %d times while tracked; its children are not", self.pid, taken.nr_forks
            )

    def _anonymous(
        self, spared: RangeSet, pages: RangeSet, absent: RangeSet
    ) -> tuple[RangeSet, bool]:
        # Step 3. Returns what is clean from now on.
        open_ranges = self._layout.anonymous.subtract(self._clean)
        near = windows(open_ranges).intersect(self._layout.anonymous)
        dirty = all_regions(self._populated(near, 0)).subtract(self._clean)
        pages.update(dirty)
        absent.update(open_ranges.subtract(dirty))
        # What is not populated between neighbours stays so. Clean pages are left alone: if one is not protected, that
        # is how the final round knows that it changed without a record.
        around = windows(dirty).intersect(near).subtract(spared)
        protected, settled = self._protect_all(around.subtract(self._clean))
        return dirty.intersect(protected), settled

    def _shared(self, stored: dict[SharedKey, RangeSet]) -> tuple[RangeSet, bool]:
        # Step 4.
        dirty = self._layout.shared.subtract(self._clean)
        protected, settled = self._protect_all(dirty)
        self._add_stored(dirty, stored)
        return dirty.intersect(protected), settled

    def _private_files(
        self, distrusted: RangeSet, pages: RangeSet, absent: RangeSet, *, final: bool
    ) -> None:
        # Step 5. In the final round all copies: nobody tells which were stored to since they were sent.
        part = self._layout.private_file
        copied = select(self._populated(part, PAGE_IS_FILE), 0, PAGE_IS_FILE)
        known = RangeSet() if final else self._sent.subtract(distrusted)
        pages.update(copied.subtract(known))
        absent.update(self._sent.intersect(part).subtract(copied))

    def _populated(self, ranges: RangeSet, extra: int) -> array[int]:
        guard = PAGE_IS_GUARD if self._knows_guards else 0
        found: array[int] = array("Q")
        for start, end in ranges:
            self._stats.nr_scans += 1
            found += self._scanner.scan(
                start,
                end,
                category_mask=guard,
                category_inverted=guard,
                category_anyof_mask=_POPULATED,
                return_mask=_POPULATED | extra,
            )
        return found

    def _verify(self) -> None:
        # What changed without a record.
        found: array[int] = array("Q")
        for start, end, _ in self._layout.spans:
            self._stats.nr_scans += 1
            found += self._scanner.scan(
                start, end, category_mask=PAGE_IS_WRITTEN, return_mask=PAGE_IS_WRITTEN
            )
        written = all_regions(found)
        self._last_written = written.union(self._layout.private_file)
        unlogged = written.intersect(self._clean)
        self._stats.pages_unlogged += unlogged.nr_pages
        self._clean = self._clean.subtract(unlogged)

    def _guards(self) -> RangeSet:
        # Guard markers stay WRITTEN (they are never protected), so they are among what a fast scan returns.
        found: array[int] = array("Q")
        if self._knows_guards:
            unpopulated = self._last_written.intersect(self._layout.private)
            for start, end in windows(unpopulated):
                self._stats.nr_scans += 1
                found += self._scanner.scan(
                    start, end, category_mask=PAGE_IS_GUARD, return_mask=PAGE_IS_GUARD
                )
        return all_regions(found).intersect(self._layout.private)

    def _tid_words(self) -> RangeSet:
        words = RangeSet()
        with contextlib.suppress(OSError):
            for tid in list_tids(self.pid):
                with contextlib.suppress(OSError):
                    head = get_robust_list(tid).head
                    first = max(head - _TID_WORD_BYTES, 0) // PAGE_SIZE * PAGE_SIZE
                    last = (head + _TID_WORD_BYTES) // PAGE_SIZE * PAGE_SIZE
                    if head:
                        words.add(first, last + PAGE_SIZE)
        return words

    # Protection

    def _protect_all(self, ranges: RangeSet) -> tuple[RangeSet, bool]:
        pairs = ranges.pairs
        arg = uffd.uffdio_writeprotect(uffd.uffdio_range(0, 0), uffd.UFFDIO_WRITEPROTECT_MODE_WP)
        span, address = arg.range, addressof(arg)
        failed = RangeSet()
        for start, end in zip(pairs[0::2], pairs[1::2]):
            span.start, span.len = start, end - start
            if raw_ioctl(self._uffd, uffd.UFFDIO_WRITEPROTECT, address) and not self._protect(start, end):
                failed.add(start, end)
        if failed:
            self._registered = self._registered.subtract(failed)
        return ranges.subtract(failed), not failed

    def _protect(self, start: int, end: int) -> bool:
        # False: a part of it is not registered.
        for _ in range(MAX_REFUSALS):
            try:
                uffd.writeprotect(self._uffd, start, end - start, True)
            except OSError as err:
                if err.errno == errno.EAGAIN:
                    self._take_log()  # an event waits; the reader may have no room to take it
                    continue
                if err.errno == errno.ENOENT:
                    return False
                if err.errno == errno.ENOTTY:
                    raise DumpError("The reader of page faults is gone", pid=self.pid) from err
                if err.errno == errno.ESRCH:
                    raise TargetGone("The target exited or called exec", pid=self.pid) from err
                raise
            return True
        return False

    # Registration

    def _is_registered(self, vaddr: int) -> bool:
        # Protecting one page more does no harm, as long as it does not count as clean: this pass looks at it anew.
        vaddr -= vaddr % PAGE_SIZE
        self._clean = self._clean.subtract(RangeSet((vaddr, vaddr + PAGE_SIZE)))
        return self._protect(vaddr, vaddr + PAGE_SIZE)

    def _lift_stale(self, new: RangeSet) -> None:
        # There is none: with the event of moves, a mapping that moves or merges keeps its registration.
        pass


class BitmapTracker(LogTracker):
    """The log that never fills: one bit for each page, set at a store; ranges of events are kept apart.

    Without capacity there is no order, and none is needed: see above. An event moves no bits, since a page that moved
    is dirty as a whole. Memory: 1/32768 of what is stored to in a round.
    """

    def __init__(self, pid: int, uffd_fd: int) -> None:
        super().__init__(pid, uffd_fd, capacity=0, when_full="spill")

    @property
    def name(self) -> str:
        return "bitmap"
