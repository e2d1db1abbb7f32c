"""The soft-dirty tracker: for kernels without PAGEMAP_SCAN that were built with CONFIG_MEM_SOFT_DIRTY.

Writing 4 to /proc/PID/clear_refs clears a bit of every page table entry and write-protects the page; bit 55 of
/proc/PID/pagemap tells where a store set it again, and shows all of a new mapping. Addresses are target addresses.

Theory of operation. There is no atomic look-and-clear: what is stored between the two would be lost. So the target is
stopped for both (by ptrace, unseen; as long as reading eight bytes a page takes), and goes on before anything is read.
What the bit does not tell:
- dropped pages: what was sent and is not there now is absent. Dropped and read again, a page is the kernel's zero page,
  and not soft-dirty: pages that are not this process's alone (bit 56, not exclusively mapped: the zero page, and pages
  that a child still shares) count as changed, which is more often than needed and never too seldom;
- shared objects: a dropped page table entry takes the bit along, and other mappings and descriptors have none. They are
  compared by content (agent.tracker.objects).

clear_refs is the process's only set of bits: nobody else may use them meanwhile (CRIU with --track-mem, say).
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from agent.errors import SetupError
from agent.kernel.features import KernelFeatures, kernel_features
from agent.pages.sender import PageReader
from agent.ranges import RangeSet
from agent.target.tracer import Tracer
from agent.tracker.base import DirtySet, SharedKey, TrackerStats
from agent.tracker.objects import ObjectBooks
from agent.tracker.populated import Look, Mappings, PagemapSource, ProcPagemap
from agent.tracker.shared import SharedWatch

Pause = Callable[[int], AbstractContextManager[None]]
"""Stops all threads of a process for as long as the body runs."""


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Hold a process by ptrace."""
    with Tracer(pid) as tracer:
        tracer.stop_all()
        yield


def require_soft_dirty(features: KernelFeatures) -> None:
    """See that the kernel has what is needed.

    :raises SetupError: it does not.
    """
    if not features.has_soft_dirty:
        reason = features.reasons.get("has_soft_dirty", "not supported")
        raise SetupError(
            f"Cannot track memory by soft-dirty: {reason}",
            hint="use --tracker scan, or compare, which works on any kernel",
        )


class SoftDirtyTracker:
    """Tracks one process by soft-dirty bits; a Witness for the sake of shared objects.

    `source` and `pause` are the seams: what else is there to take bits from, and to stop the target by.

    :raises SetupError: no `source`, and the kernel has no soft-dirty bits.
    """

    def __init__(self, pid: int, *, source: PagemapSource | None = None, pause: Pause = stopped) -> None:
        if source is None:
            require_soft_dirty(kernel_features())
        self.pid = pid
        self._source = source if source is not None else ProcPagemap(pid)
        self._pause = pause
        self._mappings = Mappings(pid)
        self._reader = PageReader()
        self._shared_watch = SharedWatch(pid)
        self._objects = ObjectBooks(self._shared_watch, self._reader)
        self._held = RangeSet()
        self._undelivered = RangeSet()

    @property
    def name(self) -> str:
        return "soft-dirty"

    @property
    def shared_watch(self) -> SharedWatch:
        return self._shared_watch

    def arm(self) -> None:
        """Nothing to prepare: the first round takes all there is."""

    def collect(self, *, final: bool) -> DirtySet:
        """See Tracker."""
        began = time.perf_counter()
        with nullcontext() if final else self._pause(self.pid):
            changed_maps = self._mappings.read(final=final)
            layout = self._mappings.layout
            anonymous = Look(self._source, layout.anonymous)
            of_file = Look(self._source, layout.private_file)
            if not final:
                self._source.clear()
        copied = anonymous.copied.union(of_file.copied)
        changed = anonymous.changed.union(of_file.changed).union(copied.subtract(self._held))
        changed.update(copied.intersect(self._undelivered))
        absent = self._held.subtract(copied)
        self._held, self._undelivered = copied, RangeSet()
        dirty = DirtySet(
            maps_text=self._mappings.text,
            maps=self._mappings.entries,
            pages=changed,
            absent=absent,
            guards=anonymous.guards.union(of_file.guards) if final else RangeSet(),
            shared=self._objects.changed(layout.object_mappings),
        )
        dirty.stats = TrackerStats(
            seconds=time.perf_counter() - began,
            nr_passes=1,
            nr_vmas=len(layout.watched),
            maps_changed=changed_maps,
        )
        return dirty

    def forget(self, ranges: RangeSet) -> None:
        """See Tracker."""
        self._undelivered.update(ranges)

    def delivered(self, key: SharedKey | None, pairs: array[int], content: memoryview) -> None:
        """See Witness."""
        if key is not None:
            self._objects.deliver(key, pairs, content)

    def dropped(self, key: SharedKey, absent: RangeSet) -> None:
        """See Witness."""
        self._objects.drop(key, absent)

    def disarm(self) -> None:
        """See Tracker. Soft-dirty bits stay as they are: they are invisible to the target."""
        self._source.close()
        self._reader.close()
        self._shared_watch.close()
