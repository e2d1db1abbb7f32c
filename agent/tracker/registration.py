"""Which mappings of the target are registered with the userfaultfd: what scan, log and bitmap have in common.

Registers from outside while the target changes its mappings, and finds out what was lost or came new. Addresses are
target addresses. Must never register over what counts as registered, never leave a mapping cut in two, never leave a
registration behind.

A registered and an unregistered mapping do not merge, and an mremap(2) across both fails in the target where it would
have worked: hence whole mappings are registered, with the free space around them, and what was cut is healed at once.
Which kind of mapping is what: agent.tracker.layout.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right

from agent.errors import DumpError, RefusedError, TargetGone
from agent.kernel import uffd
from agent.kernel.pagemap import PagemapScanner
from agent.kernel.procmap import ProcmapQuery
from agent.procfs.maps import MapsEntry, parse_maps, read_maps
from agent.procfs.smaps import read_vm_flags
from agent.ranges import RangeSet
from agent.tracker.base import SharedKey, TrackerStats
from agent.tracker.layout import Layout, classify
from agent.types import Obstacle

MAX_REGISTRATIONS = 2
"""How often maps is read again after registering what was new, before the rest is left to the next pass."""
GONE = (errno.ESRCH, errno.ENOENT)
"""What /proc files and ioctls answer for a target that exited."""


class RegisteredMemory(ABC):
    """The mappings of one process and their registration with a userfaultfd that belongs to its address space.

    Takes over `uffd_fd` (UFFDIO_API done, see create.py) and closes it in disarm().
    """

    watches_private_files = True
    """Whether private mappings of files are registered; a synchronous userfaultfd refuses them."""

    def __init__(self, pid: int, uffd_fd: int) -> None:
        self.pid = pid
        self._uffd = uffd_fd
        self._scanner = PagemapScanner(pid)
        self._procmap = ProcmapQuery(pid)
        self._maps_text = b""
        self._maps: list[MapsEntry] = []
        self._layout: Layout = classify([], ())
        self._wanted = RangeSet()  # all of the layout that should be registered
        self._excluded: dict[MapsEntry, int] = {}  # refused by UFFDIO_REGISTER -> errno
        self._droppable: set[MapsEntry] = set()  # excluded for a good reason: MAP_DROPPABLE
        self._registered = RangeSet()
        self._fresh = RangeSet()  # registered, never looked at
        self._remapped: set[SharedKey] = set()
        self._stats = TrackerStats()

    @abstractmethod
    def _is_registered(self, vaddr: int) -> bool:
        """Say whether the mapping at `vaddr` is registered, whatever the books say."""

    @abstractmethod
    def _lift_stale(self, new: RangeSet) -> None:
        """Lift protection that `new`, registered just now, has kept from an earlier registration."""

    def arm(self) -> None:
        """Register every mapping. Protection comes with the first collect().

        :raises RefusedError: the target uses a userfaultfd itself.
        """
        self._stats = TrackerStats()
        self._refresh()

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
        self._close_uffd()
        self._scanner.close()
        self._procmap.close()

    def _close_uffd(self) -> None:
        os.close(self._uffd)
        self._uffd = -1

    def _unregister_each(self, entries: list[MapsEntry]) -> None:
        for entry in entries:
            try:
                uffd.unregister(self._uffd, entry.start, entry.end - entry.start)
            except OSError:
                continue

    # Maps

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
                if self._excluded:
                    present = set(self._maps)
                    self._excluded = {e: why for e, why in self._excluded.items() if e in present}
                self._relayout()
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
        self._layout = classify(
            self._maps, self._excluded, watch_private_files=self.watches_private_files
        )
        self._wanted = self._layout.wanted
        # What is looked at no more must be registered anew once it is again: its protection says nothing then.
        self._registered = self._registered.intersect(self._wanted)
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

    def _refused(self, entry: MapsEntry, err: OSError) -> None:
        if err.errno == errno.ENOMEM and not self._scanner.is_alive():  # else a shortage of the moment
            raise TargetGone("The target exited or called exec", pid=self.pid) from err
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
