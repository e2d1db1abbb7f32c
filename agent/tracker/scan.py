"""The scan tracker: asynchronous userfaultfd write protection, read back by PAGEMAP_SCAN.

Runs from outside; the target never waits for the agent. Addresses are target addresses. Must never populate a page,
never write-protect an empty private reservation (page tables for 64 GiB of nothing), never leave a registration.

Theory of operation. The state "clean since the last look" is one bit per page table entry and lives in the kernel;
Ferry holds only `_sent`, a superset of the private pages the destination holds. A private page is

    clean      protected: the destination has its content;
    WRITTEN    not protected: written since, newly populated, dropped, or never populated at all.

collect() makes passes until one meets no surprise:
1. Read maps. Register what is new and lift the protection it may still carry (see below); all populated is dirty.
2. Fast scan of all spans (WRITTEN and nothing else, no clearing): R.
3. Detailed scan of windows around R, which reports and protects atomically, page by page under the page table lock:
   what is populated and WRITTEN is dirty (P). R - P that the destination holds is absent.
4. Private file mappings: what the destination holds as a copied page must still be one. (MADV_DONTNEED of a protected
   page leaves a marker there, which is not reported as WRITTEN.)
5. Shared objects: written ranges by offset, see agent.tracker.shared for what page tables do not tell.

Races with a running target, and who repairs them:
- stored to after its report: protected before it is read, so the next round reports it again;
- populated after step 2: not protected, hence WRITTEN: next round. Dropped after step 3: unpopulated, hence WRITTEN and
  not in P: absent in the next round, whatever the sender read meanwhile;
- mapping replaced, moved or grown after step 1: not registered; PM_SCAN_CHECK_WPASYNC makes the scan fail with EPERM,
  now (another pass of this round) or in the next round, and all that is populated there is dirty. mremap moves lose
  the registration, growth in place (stack, mremap) keeps it and starts unpopulated;
- EPERM in the middle of step 3 loses the report of what it has protected already: the window goes into `_suspect` and
  is scanned again without asking for WRITTEN;
- unmapped: leaves `_sent` as absent. Unmapped and mapped again at once: unregistered, as above;
- mprotect, mlock, fork, THP collapse and split: bits stay or the page becomes WRITTEN; never clean by mistake.

Stale protection. A moved mapping that mremap merges with a registered neighbour costs that neighbour its registration
but not the protection bits in its page tables (mremap_userfaultfd_prep() resets the merged VMA as a whole; before 6.13
moved pages keep theirs too). Without a registration a store makes such a page writable and leaves the bit: once the
range is registered again the page counts as clean, is skipped by PM_SCAN_WP_MATCHING, and stores to it are never seen.
Hence every newly registered range is searched for protected pages first, and their protection is lifted.
In the final round nothing races, so the answer is exact; a surprise there that repeats is an error.

Known gap: pages that the kernel has pinned (a read with O_DIRECT on its way, process_vm_writev(2)) are stored to past
any protection; a round that protects and sends such a page between the pin and the store misses the store.

Why no events. A userfaultfd may be asynchronous for stores and still tell of unmaps, moves, drops and forks. It was
measured: a MADV_DONTNEED of a tracked page then takes 18 us instead of 3 (half of them; the slowest hundredth waits for
the reader's turn on the CPU, milliseconds on a busy machine), since the target waits until each event is read. What
they would bring: a mapping that moved keeps its registration. But its pages have to be sent at their new address
anyway, and what went is in the page table already. They would not spare a single scan, nor the check of registrations
(a new mapping makes no event), but need a process whose death must not hang the target, as agent.tracker.log has.
"""

from __future__ import annotations

import contextlib
import errno
from array import array
from concurrent.futures import Executor, Future
from typing import NamedTuple

from agent.errors import TargetGone
from agent.kernel import uffd
from agent.kernel.pagemap import (
    PAGE_IS_FILE,
    PAGE_IS_GUARD,
    PAGE_IS_PRESENT,
    PAGE_IS_SWAPPED,
    PAGE_IS_WRITTEN,
    PM_SCAN_CHECK_WPASYNC,
    PM_SCAN_WP_MATCHING,
)
from agent.procfs.maps import parse_maps, read_maps
from agent.ranges import RangeSet
from agent.tracker.base import SharedKey
from agent.tracker.book import BookedTracker
from agent.tracker.regions import all_regions, select, windows
from agent.types import PAGE_SIZE

AHEAD_BYTES = 512 << 20
"""How much memory makes it worth to have another thread begin the final look."""
_POPULATED = PAGE_IS_PRESENT | PAGE_IS_SWAPPED


class _Look(NamedTuple):
    """What look_ahead() has found."""

    maps_text: bytes
    written: RangeSet
    failed: list[tuple[int, int]]


class ScanTracker(BookedTracker):
    """Tracks one process by asynchronous write protection; `uffd_fd` as RegisteredMemory says."""

    def __init__(self, pid: int, uffd_fd: int) -> None:
        super().__init__(pid, uffd_fd)
        self._final_guards = RangeSet()
        self._ahead: Future[_Look] | None = None

    @property
    def name(self) -> str:
        return "scan"

    def look_ahead(self, executor: Executor) -> None:
        # Step 2, half a millisecond per GiB, which is the same whatever is done meanwhile. Little is sooner done than
        # another thread gets the interpreter.
        if self._sent.nr_bytes > AHEAD_BYTES:
            self._ahead = executor.submit(self._look)

    def _look(self) -> _Look:
        text = self._read_maps()
        return _Look(text, *self._scan_spans())

    def _take_look(self) -> _Look | None:
        """Return what look_ahead() has found, if it holds."""
        ahead, self._ahead = self._ahead, None
        look = None if ahead is None else ahead.result()
        as_known = look is not None and look.maps_text == self._maps_text and self._registered == self._wanted
        return look if as_known else None

    def _pass(
        self, pages: RangeSet, absent: RangeSet, stored: dict[SharedKey, RangeSet], *, final: bool
    ) -> bool:
        # Returns False when something was not registered and another pass is needed.
        look = self._take_look()
        if look is None:
            self._refresh()
        layout = self._layout
        settled = True
        if not final and self._knows_guards:
            self._lift_markers()
        new = self._fresh.union(self._suspect)
        self._fresh, self._suspect = RangeSet(), RangeSet()
        written, complete = self._written(look)
        settled &= complete
        self._final_guards = RangeSet()
        # Telling copied pages of files from others takes time where there are hundreds of thousands of ranges; in the
        # final round, mostly short, what takes time is another pass.
        separate = [(layout.anonymous, False), (layout.private_file, True)]
        for part, of_file in [(layout.private, True)] if final else separate:
            for again, ranges in ((False, new.intersect(part)), (True, written.intersect(part))):
                if ranges:
                    dirty, complete = self._take(ranges, part, of_file=of_file, written=again, final=final)
                    settled &= complete
                    absent.update(ranges.subtract(dirty))
                    pages.update(dirty)
        held = self._sent.intersect(layout.private_file)
        if held:
            self._check_copied(held, pages, absent)
        if layout.shared_mappings:
            settled &= self._take_shared(written.intersect(layout.shared), stored)
        return settled

    def _written(self, look: _Look | None = None) -> tuple[RangeSet, bool]:
        # Step 2. Nothing is cleared, so a failure loses nothing.
        written, failed = look[1:] if look is not None else self._scan_spans()
        if failed:
            written.update(all_regions(self._probe(RangeSet.of(failed))))
        return written, not failed

    def _scan_spans(self) -> tuple[RangeSet, list[tuple[int, int]]]:
        spans = self._layout.spans
        self._stats.nr_scans += len(spans)
        written = RangeSet()

        def add(found: array[int]) -> None:
            written.update(all_regions(found))

        found, failed = self._scanner.scan_each(
            ((start, end) for start, end, _ in spans),
            flags=PM_SCAN_CHECK_WPASYNC,
            category_mask=PAGE_IS_WRITTEN,
            return_mask=PAGE_IS_WRITTEN,
            into=add,
        )
        add(found)
        return written, failed

    def _fast_scan(self, start: int, end: int, flags: int) -> array[int]:
        self._stats.nr_scans += 1
        return self._scanner.scan(
            start,
            end,
            flags=flags | PM_SCAN_CHECK_WPASYNC,
            category_mask=PAGE_IS_WRITTEN,
            return_mask=PAGE_IS_WRITTEN,
        )

    def _probe(self, failed: RangeSet) -> array[int]:
        # Find which mappings are not registered (with maps of now, not of the start of the round: else a large
        # mapping would be taken for new because something landed inside it); return what the others have.
        found: array[int] = array("Q")
        lost: list[tuple[int, int]] = []
        parts = [
            part
            for entry in parse_maps(read_maps(self.pid))
            if failed.touches(entry.start, entry.end)
            for part in failed.clip(entry.start, entry.end)
        ]
        waiting = [(0, len(parts))] if parts else []
        while waiting:  # by halves: most are registered
            low, high = waiting.pop()
            try:
                found += self._fast_scan(parts[low].start, parts[high - 1].end, 0)
            except PermissionError:
                if high - low == 1:
                    lost.append(parts[low])
                else:
                    middle = (low + high) // 2
                    waiting += [(middle, high), (low, middle)]
        self._registered = self._registered.subtract(RangeSet.of(lost))
        return found

    def _take(
        self, ranges: RangeSet, part: RangeSet, *, of_file: bool, written: bool, final: bool
    ) -> tuple[RangeSet, bool]:
        # Step 3: report and protect the populated pages in windows around `ranges`, within `part`. In the final round,
        # after which nobody asks again, nothing is protected, and guard pages, which must not be, are found on the way.
        guard = PAGE_IS_GUARD if self._knows_guards else 0
        left_out = 0 if final else guard
        without = (PAGE_IS_FILE if of_file else 0) | (guard if final else 0)
        dirty = RangeSet()

        def add(found: array[int]) -> None:
            dirty.update(select(found, 0, without) if without else all_regions(found))
            if final and guard:
                self._final_guards.update(select(found, guard, guard))

        near = windows(ranges).intersect(part)
        self._stats.nr_scans += len(near)
        found, refused = self._scanner.scan_each(
            near,
            flags=PM_SCAN_CHECK_WPASYNC | (0 if final else PM_SCAN_WP_MATCHING),
            category_mask=left_out | (PAGE_IS_WRITTEN if written else 0),
            category_inverted=left_out,
            category_anyof_mask=_POPULATED,
            return_mask=_POPULATED | (PAGE_IS_FILE if of_file else 0) | (guard if final else 0),
            into=add,
        )
        add(found)
        for start, end in refused:  # the next fast scan meets the same mapping and finds out which
            self._suspect.add(start, end)
        return dirty, not refused

    def _guards(self) -> RangeSet:
        return self._final_guards.intersect(self._layout.private)

    def _check_copied(self, held: RangeSet, pages: RangeSet, absent: RangeSet) -> None:
        # Step 4. A marker cannot be told from a swapped-out copy: read it, which gives the visible content.
        guard = PAGE_IS_GUARD if self._knows_guards else 0
        near = windows(held).intersect(self._layout.private_file)
        self._stats.nr_scans += len(near)
        found, _ = self._scanner.scan_each(
            near, category_anyof_mask=_POPULATED, return_mask=_POPULATED | PAGE_IS_FILE | guard
        )
        copied = select(found, PAGE_IS_PRESENT, PAGE_IS_PRESENT | PAGE_IS_FILE)
        marked = select(found, PAGE_IS_SWAPPED, _POPULATED | guard).intersect(held)
        pages.update(marked)
        absent.update(held.subtract(copied).subtract(marked))

    def _lift_markers(self) -> None:
        # Where a protected page of a private file mapping is dropped, a marker stays. madvise(MADV_GUARD_INSTALL),
        # which drops pages, tries again until there is none: whoever calls it goes on with the next round.
        self._stats.nr_scans += len(self._layout.private_file)
        found, _ = self._scanner.scan_each(
            self._layout.private_file,
            category_mask=PAGE_IS_SWAPPED | PAGE_IS_GUARD,
            category_inverted=PAGE_IS_GUARD,
            return_mask=PAGE_IS_SWAPPED,
        )
        for marked in all_regions(found):
            with contextlib.suppress(OSError):  # changed just now
                uffd.writeprotect(self._uffd, marked.start, marked.nr_bytes, False)

    def _take_shared(self, written: RangeSet, stored: dict[SharedKey, RangeSet]) -> bool:
        # Step 5, the page table part: report and protect, unpopulated pages too (markers), since another mapping or
        # a later fault may bring in pages that exist already.
        settled = True
        found: array[int] = array("Q")
        for start, end in windows(written).intersect(self._layout.shared):
            try:
                found += self._fast_scan(start, end, PM_SCAN_WP_MATCHING)
            except PermissionError:
                settled = False
                self._remapped.update(
                    key
                    for entry, key in self._layout.shared_mappings
                    if entry.start < end and start < entry.end
                )
        self._add_stored(all_regions(found), stored)
        return settled

    # Registration

    def _is_registered(self, vaddr: int) -> bool:
        vaddr -= vaddr % PAGE_SIZE
        try:
            self._fast_scan(vaddr, vaddr + PAGE_SIZE, 0)
        except PermissionError:
            return False
        return True

    def _lift_stale(self, new: RangeSet) -> None:
        # Nothing of `new` was protected by us since it was registered: what is, is left from an earlier registration.
        # A resolved range costs no page tables, and the fast scan little.
        for start, end in new:
            try:
                written = self._fast_scan(start, end, 0)
                for stale in RangeSet((start, end)).subtract(all_regions(written)):
                    uffd.writeprotect(self._uffd, stale.start, stale.nr_bytes, False)
            except OSError as err:
                if err.errno == errno.ESRCH:
                    raise TargetGone("The target exited or called exec", pid=self.pid) from err
                # EPERM, ENOENT: part of it lost its registration again. EAGAIN: mappings change at this moment.
                self._registered = self._registered.subtract(RangeSet((start, end)))
