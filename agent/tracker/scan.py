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
"""

from __future__ import annotations

import errno
import itertools
import operator
import os
import time
from array import array
from bisect import bisect_left, bisect_right

from agent.errors import DumpError, RefusedError, TargetGone
from agent.kernel import uffd
from agent.kernel.pagemap import (
    PAGE_IS_FILE,
    PAGE_IS_GUARD,
    PAGE_IS_PRESENT,
    PAGE_IS_SWAPPED,
    PAGE_IS_WRITTEN,
    PM_SCAN_CHECK_WPASYNC,
    PM_SCAN_WP_MATCHING,
    PagemapScanner,
)
from agent.kernel.procmap import ProcmapQuery
from agent.procfs.maps import MapsEntry, parse_maps, read_maps
from agent.procfs.smaps import read_vm_flags
from agent.ranges import RangeSet
from agent.tracker.base import DirtySet, SharedKey, TrackerStats
from agent.tracker.layout import Layout, classify
from agent.tracker.shared import SharedWatch
from agent.types import PAGE_SIZE, Obstacle

MAX_PASSES = 2
"""Passes in a running round before a surprise is left to the next round."""
MAX_REGISTRATIONS = 2
"""How often maps is read again after registering what was new, before the rest is left to the next pass."""
MAX_FINAL_PASSES = 8
"""Nothing changes under a final round: registering what is new takes one more pass; beyond that it is an error."""
WINDOW_GAP_BYTES = 160 * 4096
"""Clean gap that a detailed scan walks rather than start another: a scan costs about 12 us all in all, a page 70 ns."""

_POPULATED = PAGE_IS_PRESENT | PAGE_IS_SWAPPED
_GONE = (errno.ESRCH, errno.ENOENT)


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


def _select(triples: array[int], wanted: int, mask: int) -> RangeSet:
    # The regions with (categories & mask) == wanted.
    if not triples:
        return RangeSet()
    chosen = list(map(wanted.__eq__, map(mask.__and__, triples[2::3])))
    pairs = zip(itertools.compress(triples[0::3], chosen), itertools.compress(triples[1::3], chosen))
    return RangeSet(array("Q", list(itertools.chain.from_iterable(pairs))))


def _all_regions(triples: array[int]) -> RangeSet:
    pairs = array("Q", bytes(len(triples) // 3 * 16))
    pairs[0::2] = triples[0::3]
    pairs[1::2] = triples[1::3]
    return RangeSet(pairs)


def _knows_guards(scanner: PagemapScanner) -> bool:
    # Since Linux kernel commit a516403787e0 ("fs/proc: extend the PAGEMAP_SCAN ioctl to report guard regions")
    # (in v6.15). Before, unknown categories are EINVAL.
    try:
        scanner.scan(0, 4096, category_mask=PAGE_IS_GUARD, return_mask=PAGE_IS_GUARD)
    except OSError:
        return False
    return True


class ScanTracker:
    """Tracks one process through an agent-side descriptor of a userfaultfd that belongs to its address space.

    Takes over `uffd_fd` (UFFDIO_API done, see create.py) and closes it in disarm().
    """

    def __init__(self, pid: int, uffd_fd: int) -> None:
        self.pid = pid
        self._uffd = uffd_fd
        self._scanner = PagemapScanner(pid)
        self._procmap = ProcmapQuery(pid)
        self._knows_guards = _knows_guards(self._scanner)
        self._shared_watch = SharedWatch(pid)
        self._maps_text = b""
        self._maps: list[MapsEntry] = []
        self._layout: Layout = classify([], ())
        self._wanted = RangeSet()  # all of the layout that should be registered
        self._excluded: dict[MapsEntry, int] = {}  # refused by UFFDIO_REGISTER -> errno
        self._droppable: set[MapsEntry] = set()  # excluded for a good reason: MAP_DROPPABLE
        self._registered = RangeSet()
        self._fresh = RangeSet()  # registered, never scanned
        self._suspect = RangeSet()  # a report was lost
        self._sent = RangeSet()
        self._last_written = RangeSet()
        self._remapped: set[SharedKey] = set()
        self._stats = TrackerStats()

    @property
    def name(self) -> str:
        return "scan"

    @property
    def shared_watch(self) -> SharedWatch:
        return self._shared_watch

    @property
    def sent(self) -> RangeSet:
        """A superset of the private pages the destination holds."""
        return self._sent

    def arm(self) -> None:
        """Register every mapping. Protection comes with the first collect().

        :raises RefusedError: the target uses a userfaultfd itself.
        """
        self._stats = TrackerStats()
        self._refresh()

    def forget(self, ranges: RangeSet) -> None:
        """Count `ranges` as not delivered: what is populated there is dirty in the next round."""
        self._suspect.update(ranges)

    def disarm(self) -> None:
        if self._uffd < 0:
            return
        # Closing the last reference unregisters every range; the target's own copy was closed after arming, but do not
        # depend on it.
        for (start, end), span in zip(self._layout.rooms, self._layout.spans):
            try:
                uffd.unregister(self._uffd, start, end - start)
            except OSError:
                self._unregister_each(span[2])
        os.close(self._uffd)
        self._uffd = -1
        self._scanner.close()
        self._procmap.close()
        self._shared_watch.close()

    def _unregister_each(self, entries: list[MapsEntry]) -> None:
        for entry in entries:
            try:
                uffd.unregister(self._uffd, entry.start, entry.end - entry.start)
            except OSError:
                continue

    # Maps and registration

    def _refresh(self) -> None:
        # Until maps is quiet: a mapping that changed while it was being registered is two VMAs from then on, one
        # registered and one not. Healed at once, the kernel merges them again; after the target's next page fault in
        # each it never would, and an mremap(2) across fails.
        for _ in range(MAX_REGISTRATIONS):
            text = self._read_maps()
            if text == self._maps_text and self._registered == self._wanted:
                return
            if text != self._maps_text:
                self._maps = parse_maps(text)
                self._maps_text = text
                self._stats.maps_changed = True
                present = set(self._maps)
                self._excluded = {e: why for e, why in self._excluded.items() if e in present}
                self._relayout()
            self._registered = self._registered.intersect(self._wanted)
            if self._registered == self._wanted:
                return
            self._distrust_changed()
            self._register_new()
            for entry, key in self._layout.shared_mappings:
                if self._fresh.touches(entry.start, entry.end):
                    self._remapped.add(key)

    def _read_maps(self) -> bytes:
        try:
            text = read_maps(self.pid)
        except (ProcessLookupError, FileNotFoundError) as err:
            raise TargetGone("The target exited", pid=self.pid) from err
        if not text:
            raise TargetGone("The target exited", pid=self.pid)
        return text

    def _relayout(self) -> None:
        self._layout = classify(self._maps, self._excluded)
        self._wanted = self._layout.private.union(self._layout.shared)
        self._stats.nr_vmas = len(self._layout.watched)

    def _distrust_changed(self) -> None:
        # A mapping partly known has either grown, and then is registered as a whole, or stands where another was.
        # Registering the rest of the latter would cut it in two.
        changed: set[tuple[int, int]] = set()
        watched = self._layout.watched
        for start, end in self._wanted.subtract(self._registered):
            # Only the first and the last can reach out of what is missing.
            for position in (bisect_right(watched, (start, end)) - 1, bisect_left(watched, (end,)) - 1):
                entry = watched[position]
                known = self._registered.clip(entry.start, entry.end).pairs
                if known and not self._is_registered(known[0]):
                    changed.add((entry.start, entry.end))
        if changed:
            self._registered = self._registered.subtract(RangeSet.of(changed))

    def _is_registered(self, vaddr: int) -> bool:
        vaddr -= vaddr % PAGE_SIZE
        try:
            self._fast_scan(vaddr, vaddr + PAGE_SIZE, 0)
        except PermissionError:
            return False
        return True

    def _register_new(self) -> None:
        # With the free space around what is new: whatever the target puts or grows there meanwhile is not cut by the
        # end of the range. Never over what counts as registered: a mapping that lost its registration must be found
        # out by the next scan, since the protection bits it still has say nothing (see _take).
        refused = False
        for (start, end), span in zip(list(self._layout.rooms), list(self._layout.spans)):
            missing = self._wanted.clip(start, end).subtract(self._registered)
            if not missing:
                continue
            for gap in RangeSet((start, end)).subtract(self._registered):
                new = missing.clip(*gap)
                if not new or self._cuts(gap.start) or self._cuts(gap.end):
                    continue  # a mapping came to stand there just now: look at maps again
                if self._register(gap.start, gap.end, new) is None:
                    self._heal(gap.start - 1)
                    self._heal(gap.end)
                else:
                    refused |= self._register_each(span[2], new)
        self._registered = self._registered.copy()
        if refused:
            self._relayout()

    def _cuts(self, edge: int) -> bool:
        # One that has grown across the edge is registered as a whole, and stays in one piece.
        around = self._procmap.covering(edge)
        return around is not None and around[0] < edge and not self._is_registered(edge)

    def _heal(self, vaddr: int) -> None:
        # What is next to a range that was registered just now must be registered too, or may have been cut by it.
        # Within microseconds: before the target faults in both parts, which then never become one again.
        beside = self._procmap.covering(vaddr)
        if beside is None or not self._wanted.touches(*beside) or self._is_registered(vaddr):
            return
        self._registered = self._registered.subtract(RangeSet(beside))
        self._register(*beside, self._wanted.clip(*beside))

    def _register_each(self, entries: list[MapsEntry], new: RangeSet) -> bool:
        # Something in the range cannot be registered: find out which mapping, keep the others.
        refused = False
        first = bisect_left(entries, (new.pairs[0],))
        last = bisect_left(entries, (new.pairs[-1],))
        for run in _adjacent(entries[first:last]):
            if self._register_exactly(run, new) is None:
                continue
            for entry in run:
                err = self._register_exactly([entry], new)
                if err is not None:
                    self._refused(entry, err)
                    refused = True
        return refused

    def _register_exactly(self, run: list[MapsEntry], new: RangeSet) -> OSError | None:
        start, end = run[0].start, run[-1].end
        if self._cuts(start) or self._cuts(end):
            return None
        err = self._register(start, end, new.clip(start, end))
        if err is None:
            self._heal(start - 1)
            self._heal(end)
        return err

    def _register(self, start: int, end: int, new: RangeSet) -> OSError | None:
        # `new`: the part of it that is mapped and not registered yet.
        try:
            uffd.register(self._uffd, start, end - start, uffd.UFFDIO_REGISTER_MODE_WP)
        except OSError as err:
            if err.errno == errno.ESRCH:
                raise TargetGone("The target exited or called exec", pid=self.pid) from err
            return err
        self._registered.update(new)
        self._fresh.update(new)
        self._stats.nr_registered += 1
        self._lift_stale(new)
        return None

    def _lift_stale(self, new: RangeSet) -> None:
        # Nothing of `new` was protected by us since it was registered: what is, is left from an earlier registration.
        # A resolved range costs no page tables, and the fast scan little.
        for start, end in new:
            try:
                written = self._fast_scan(start, end, 0)
                for stale in RangeSet((start, end)).subtract(_all_regions(written)):
                    uffd.writeprotect(self._uffd, stale.start, stale.nr_bytes, False)
            except OSError as err:
                if err.errno == errno.ESRCH:
                    raise TargetGone("The target exited or called exec", pid=self.pid) from err
                # EPERM, ENOENT: part of it lost its registration again. EAGAIN: mappings change at this moment.
                self._registered = self._registered.subtract(RangeSet((start, end)))

    def _refused(self, entry: MapsEntry, err: OSError) -> None:
        if err.errno == errno.ENOMEM:
            self._read_maps()  # raises when the address space is gone; else a shortage of the moment
        if err.errno == errno.EBUSY:
            where = f"{entry.start:#x}-{entry.end:#x}"
            raise RefusedError(
                f"Cannot track memory {where} of process {self.pid}: it has a userfaultfd of its own",
                [
                    Obstacle(
                        kind="userfaultfd",
                        what=f"address {where}",
                        detail="the range is registered with the target's own userfaultfd",
                        hint="close it in the target before the migration",
                    )
                ],
                hint="a process that handles its own page faults cannot be tracked",
            ) from err
        # EINVAL: MAP_DROPPABLE and other special mappings, or it went away just now. EPERM: shared and never
        # writable. In both cases the entry no longer counts until maps shows another one there.
        self._excluded[entry] = err.errno or errno.EINVAL

    # One round

    def collect(self, *, final: bool) -> DirtySet:
        began = time.perf_counter()
        self._stats = TrackerStats()
        pages, absent, guards = RangeSet(), RangeSet(), RangeSet()
        stored: dict[SharedKey, RangeSet] = {}
        try:
            self._retry_excluded()
            for _ in range(MAX_FINAL_PASSES if final else MAX_PASSES):
                self._stats.nr_passes += 1
                self._refresh()
                if self._pass(pages, absent, stored):
                    break
            else:
                if final:
                    raise DumpError("Cannot track the memory of the stopped target", pid=self.pid)
            if final:
                self._check_excluded()
                guards = self._guards()
        except OSError as err:
            if err.errno in _GONE:
                raise TargetGone("The target exited or called exec", pid=self.pid) from err
            raise
        # What an earlier pass found may be unmapped by now; the destination follows these maps.
        pages = pages.intersect(self._layout.private)
        held_nowhere = self._sent.subtract(self._layout.private)
        absent = absent.intersect(self._sent).union(held_nowhere).subtract(pages)
        self._sent = self._sent.subtract(absent).union(pages)
        shared = self._collect_shared(stored)
        self._stats.seconds = time.perf_counter() - began
        return DirtySet(
            maps_text=self._maps_text,
            maps=self._maps,
            pages=pages,
            absent=absent,
            guards=guards,
            shared=shared,
            stats=self._stats,
        )

    def _pass(
        self, pages: RangeSet, absent: RangeSet, stored: dict[SharedKey, RangeSet]
    ) -> bool:
        # Returns False when something was not registered and another pass is needed.
        layout = self._layout
        settled = True
        new = self._fresh.union(self._suspect)
        self._fresh, self._suspect = RangeSet(), RangeSet()
        written, complete = self._written()
        self._last_written = written
        settled &= complete
        for part, of_file in ((layout.anonymous, False), (layout.private_file, True)):
            for again, ranges in ((False, new.intersect(part)), (True, written.intersect(part))):
                if ranges:
                    dirty, complete = self._take(ranges, part, of_file=of_file, written=again)
                    settled &= complete
                    absent.update(ranges.subtract(dirty))
                    pages.update(dirty)
        held = self._sent.intersect(layout.private_file)
        if held:
            self._check_copied(held, pages, absent)
        if layout.shared_mappings:
            settled &= self._take_shared(written.intersect(layout.shared), stored)
        return settled

    def _written(self) -> tuple[RangeSet, bool]:
        # Step 2. Nothing is cleared, so a failure loses nothing.
        found: array[int] = array("Q")
        failed: list[tuple[int, int]] = []
        for start, end, _ in self._layout.spans:
            try:
                found += self._fast_scan(start, end, 0)
            except PermissionError:
                failed.append((start, end))
        if failed:
            found += self._probe(RangeSet.of(failed))
        return _all_regions(found), not failed

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
        self, ranges: RangeSet, part: RangeSet, *, of_file: bool, written: bool
    ) -> tuple[RangeSet, bool]:
        # Step 3: report and protect the populated pages in windows around `ranges`, within `part`.
        near = RangeSet.of(windows(ranges)).intersect(part)
        guard = PAGE_IS_GUARD if self._knows_guards else 0
        found: array[int] = array("Q")
        settled = True
        for start, end in near:
            self._stats.nr_scans += 1
            try:
                found += self._scanner.scan(
                    start,
                    end,
                    flags=PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
                    category_mask=guard | (PAGE_IS_WRITTEN if written else 0),
                    category_inverted=guard,
                    category_anyof_mask=_POPULATED,
                    return_mask=_POPULATED | (PAGE_IS_FILE if of_file else 0),
                )
            except PermissionError:
                self._suspect.add(start, end)
                settled = False  # the next fast scan meets the same mapping and finds out which
        return _select(found, 0, PAGE_IS_FILE) if of_file else _all_regions(found), settled

    def _check_copied(self, held: RangeSet, pages: RangeSet, absent: RangeSet) -> None:
        # Step 4. A marker cannot be told from a swapped-out copy: read it, which gives the visible content.
        found: array[int] = array("Q")
        guard = PAGE_IS_GUARD if self._knows_guards else 0
        for start, end in RangeSet.of(windows(held)).intersect(self._layout.private_file):
            self._stats.nr_scans += 1
            found += self._scanner.scan(
                start,
                end,
                category_anyof_mask=_POPULATED,
                return_mask=_POPULATED | PAGE_IS_FILE | guard,
            )
        copied = _select(found, PAGE_IS_PRESENT, PAGE_IS_PRESENT | PAGE_IS_FILE)
        marked = _select(found, PAGE_IS_SWAPPED, _POPULATED | guard).intersect(held)
        pages.update(marked)
        absent.update(held.subtract(copied).subtract(marked))

    def _guards(self) -> RangeSet:
        # Guard markers stay WRITTEN (step 3 leaves them out), so they are among what a fast scan returns.
        found: array[int] = array("Q")
        if self._knows_guards:
            unpopulated = self._last_written.intersect(self._layout.private)
            for start, end in RangeSet.of(windows(unpopulated)):
                self._stats.nr_scans += 1
                found += self._scanner.scan(
                    start, end, category_mask=PAGE_IS_GUARD, return_mask=PAGE_IS_GUARD
                )
        return _all_regions(found).intersect(self._layout.private)

    def _take_shared(self, written: RangeSet, stored: dict[SharedKey, RangeSet]) -> bool:
        # Step 5, the page table part: report and protect, unpopulated pages too (markers), since another mapping or
        # a later fault may bring in pages that exist already.
        settled = True
        found: array[int] = array("Q")
        for start, end in RangeSet.of(windows(written)).intersect(self._layout.shared):
            try:
                found += self._fast_scan(start, end, PM_SCAN_WP_MATCHING)
            except PermissionError:
                settled = False
                self._remapped.update(
                    key
                    for entry, key in self._layout.shared_mappings
                    if entry.start < end and start < entry.end
                )
        dirty = _all_regions(found)
        if dirty:
            for entry, key in self._layout.shared_mappings:
                inside = dirty.clip(entry.start, entry.end)
                if inside:
                    shift = entry.offset - entry.start
                    offsets = RangeSet(map(shift.__add__, inside.pairs))
                    stored.setdefault(key, RangeSet()).update(offsets)
        return settled

    def _collect_shared(
        self, stored: dict[SharedKey, RangeSet]
    ) -> dict[SharedKey, RangeSet | None]:
        whole = self._shared_watch.changed(
            self._layout.object_mappings, stored=set(stored), remapped=self._remapped
        )
        self._remapped = set()
        result: dict[SharedKey, RangeSet | None] = dict(stored)
        result.update(dict.fromkeys(whole))
        return result

    # Mappings that userfaultfd refuses

    def _retry_excluded(self) -> None:
        # A refusal may only have met a mapping on its way out, or a shortage. EPERM is for good: never writable.
        again = [e for e, why in self._excluded.items() if why != errno.EPERM and e not in self._droppable]
        for entry in again:
            del self._excluded[entry]
            self._maps_text = b""  # classify anew

    def _check_excluded(self) -> None:
        doubtful = [e for e in self._excluded if e.perms[3] == "p" and e not in self._droppable]
        if not doubtful:
            return
        flags = {(start, end): names for start, end, names in read_vm_flags(self.pid)}
        for entry in doubtful:
            if "dp" not in flags.get((entry.start, entry.end), frozenset()):
                raise DumpError(
                    f"Cannot track memory {entry.start:#x}-{entry.end:#x} of process {self.pid}: "
                    f"{os.strerror(self._excluded[entry])}",
                    pid=self.pid,
                    vaddr=entry.start,
                )
            self._droppable.add(entry)


def _adjacent(entries: list[MapsEntry]) -> list[list[MapsEntry]]:
    # Runs without holes: one UFFDIO_REGISTER each.
    runs: list[list[MapsEntry]] = []
    for entry in entries:
        if runs and runs[-1][-1].end == entry.start:
            runs[-1].append(entry)
        else:
            runs.append([entry])
    return runs
