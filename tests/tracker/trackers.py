"""Every tracker there is, by name, and how to make it for a victim: the conformance suite runs against each."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from agent.kernel.features import kernel_features
from agent.tracker.base import Tracker
from agent.tracker.compare import CompareTracker
from agent.tracker.create import CREATE_FLAGS, FEATURES, adopt_uffd
from agent.tracker.log import BitmapTracker, LogTracker
from agent.tracker.scan import ScanTracker
from agent.tracker.softdirty import SoftDirtyTracker
from tests.tracker.emulated import EmulatedPagemap

NO_UFFD = -1


class Kind(NamedTuple):
    """How to make one. `make` gets the pid and the agent's descriptor of the target's userfaultfd, -1 if it needs none.
    """

    make: Callable[[int, int], Tracker]
    uffd_for: str = ""
    """The tracker whose kind of userfaultfd it takes; "": none."""
    exact: bool = True
    """A second final round finds nothing, since nothing changed."""

    unfit: frozenset[str] = frozenset()
    """Actions that the tracker is known, and documented, not to leave as they were; left out."""

    @property
    def uffd_flags(self) -> int:
        """What the target calls userfaultfd(2) with."""
        return CREATE_FLAGS[self.uffd_for] if self.uffd_for else NO_UFFD

    def open(self, pid: int, target_fd: int) -> Tracker:
        """Make the tracker for process `pid`, whose userfaultfd `target_fd` is."""
        if not self.uffd_for:
            return self.make(pid, -1)
        pidfd = os.pidfd_open(pid)
        try:
            return self.make(pid, adopt_uffd(pidfd, target_fd, FEATURES[self.uffd_for]))
        finally:
            os.close(pidfd)


def _compare(pid: int, _uffd: int) -> Tracker:
    return CompareTracker(pid)


def _soft_dirty(pid: int, _uffd: int) -> Tracker:
    return SoftDirtyTracker(pid)


def _soft_dirty_emulated(pid: int, uffd: int) -> Tracker:
    return SoftDirtyTracker(pid, source=EmulatedPagemap(pid, uffd))


def _stalling_log(pid: int, uffd: int) -> Tracker:
    return LogTracker(pid, uffd, capacity=500, when_full="stall")


def _spilling_log(pid: int, uffd: int) -> Tracker:
    return LogTracker(pid, uffd, capacity=100, when_full="spill")


UNFIT = frozenset({"store_by_mem", "store_by_debugger"})
"""Under synchronous protection writes through /proc/PID/mem fail with EIO, and between the pin and the store of
process_vm_writev(2) lies the wait for the reader: see agent/tracker/log.py, and test_log.py for what of it is sound."""

TRACKERS: dict[str, Kind] = {
    "scan": Kind(ScanTracker, "scan"),
    "log-stall": Kind(_stalling_log, "log", exact=False, unfit=UNFIT),
    "log-spill": Kind(_spilling_log, "log", exact=False, unfit=UNFIT),
    "bitmap": Kind(BitmapTracker, "bitmap", exact=False, unfit=UNFIT),
    "compare": Kind(_compare),
    "soft-dirty": (
        Kind(_soft_dirty, exact=False)
        if kernel_features().has_soft_dirty
        else Kind(_soft_dirty_emulated, "scan", exact=False)
    ),
}
SITUATED = [name for name in TRACKERS if name != "log-spill"]
"""Those that single situations are worth while for: no situation fills a log."""
