"""The frame of a round that scan, log and bitmap share: passes until nothing surprises, and the book of what was sent.

`_sent` is a superset of the private pages that the destination holds. A tracker says what is dirty and what is gone in
one pass (`_pass`); the rest, shared objects, guards and what is no longer mapped, is the same for all of them.
Addresses are target addresses. Must never populate a page.
"""

from __future__ import annotations

import time
from abc import abstractmethod

from agent.errors import DumpError, TargetGone
from agent.kernel.pagemap import PAGE_IS_GUARD, PagemapScanner
from agent.ranges import RangeSet
from agent.tracker.base import DirtySet, SharedKey, TrackerStats
from agent.tracker.registration import GONE, RegisteredMemory
from agent.tracker.shared import SharedWatch

MAX_PASSES = 2
"""Passes in a running round before a surprise is left to the next round."""
MAX_FINAL_PASSES = 8
"""Nothing changes under a final round: registering what is new takes one more pass; beyond that it is an error."""


def _knows_guards(scanner: PagemapScanner) -> bool:
    # Since Linux kernel commit a516403787e0 ("fs/proc: extend the PAGEMAP_SCAN ioctl to report guard regions")
    # (in v6.15). Before, unknown categories are EINVAL.
    try:
        scanner.scan(0, 4096, category_mask=PAGE_IS_GUARD, return_mask=PAGE_IS_GUARD)
    except OSError:
        return False
    return True


class BookedTracker(RegisteredMemory):
    """A tracker that looks at page tables and keeps the book of what the destination holds."""

    def __init__(self, pid: int, uffd_fd: int) -> None:
        super().__init__(pid, uffd_fd)
        self._knows_guards = _knows_guards(self._scanner)
        self._shared_watch = SharedWatch(pid)
        self._suspect = RangeSet()  # a report was lost
        self._sent = RangeSet()

    @abstractmethod
    def _pass(
        self, pages: RangeSet, absent: RangeSet, stored: dict[SharedKey, RangeSet], *, final: bool
    ) -> bool:
        """Look once and add what is dirty, gone, and stored to shared objects; False asks for another pass."""

    @abstractmethod
    def _guards(self) -> RangeSet:
        """Return the guard pages of private mappings, after the last pass of a final round."""

    @property
    def shared_watch(self) -> SharedWatch:
        return self._shared_watch

    @property
    def sent(self) -> RangeSet:
        """A superset of the private pages the destination holds."""
        return self._sent

    def forget(self, ranges: RangeSet) -> None:
        """Count `ranges` as not delivered: what is populated there is dirty in the next round."""
        self._suspect.update(ranges)

    def disarm(self) -> None:
        super().disarm()
        self._shared_watch.close()

    def _relayout(self) -> None:
        # A mapping may take the place of a shared one that these maps still show, without losing its registration (it
        # grew) or before it got one: then its pages were protected and reported as the object's.
        shared = self._layout.shared
        super()._relayout()
        self._suspect.update(shared.intersect(self._layout.private))

    def collect(self, *, final: bool) -> DirtySet:
        began = time.perf_counter()
        self._stats = TrackerStats()
        pages, absent, guards = RangeSet(), RangeSet(), RangeSet()
        stored: dict[SharedKey, RangeSet] = {}
        try:
            self._retry_excluded()
            for _ in range(MAX_FINAL_PASSES if final else MAX_PASSES):
                self._stats.nr_passes += 1
                if self._pass(pages, absent, stored, final=final):
                    break
            else:
                if final:
                    raise DumpError("Cannot track the memory of the stopped target", pid=self.pid)
            if final:
                self._check_excluded()
                guards = self._guards()
        except OSError as err:
            if err.errno in GONE:
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

    def _add_stored(self, dirty: RangeSet, stored: dict[SharedKey, RangeSet]) -> None:
        # Addresses in shared mappings -> offsets in their objects.
        for entry, key in self._layout.shared_mappings if dirty else ():
            inside = dirty.clip(entry.start, entry.end)
            if inside:
                shift = entry.offset - entry.start
                offsets = RangeSet(map(shift.__add__, inside.pairs))
                stored.setdefault(key, RangeSet()).update(offsets)

    def _collect_shared(
        self, stored: dict[SharedKey, RangeSet]
    ) -> dict[SharedKey, RangeSet | None]:
        whole = self._shared_watch.changed(
            self._layout.object_mappings, stored=set(stored), remapped=self._remapped
        )
        self._remapped = set()
        watch = self._shared_watch  # what it could not find was unmapped since maps was read
        result: dict[SharedKey, RangeSet | None] = {k: v for k, v in stored.items() if watch.knows(k)}
        result.update(dict.fromkeys(whole))
        return result
