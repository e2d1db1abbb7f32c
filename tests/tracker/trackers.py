"""Every tracker there is, by name, and how to make it for a victim: the conformance suite runs against each."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from agent.kernel.features import kernel_features
from agent.tracker.base import Tracker
from agent.tracker.compare import CompareTracker
from agent.tracker.create import CREATE_FLAGS, adopt_uffd
from agent.tracker.scan import ScanTracker
from agent.tracker.softdirty import SoftDirtyTracker
from tests.tracker.emulated import EmulatedPagemap

NO_UFFD = -1


class Kind(NamedTuple):
    """How to make one. `make` gets the pid and the agent's descriptor of the target's userfaultfd."""

    make: Callable[[int, int], Tracker]
    uffd_flags: int = CREATE_FLAGS
    """What the target calls userfaultfd(2) with; NO_UFFD: it needs none."""
    adopt: Callable[[int, int], int] = adopt_uffd
    """Fetch it, from a pidfd and the target's descriptor."""
    exact: bool = True
    """A second final round finds nothing, since nothing changed."""

    def open(self, pid: int, target_fd: int) -> Tracker:
        """Make the tracker for process `pid`, whose userfaultfd `target_fd` is."""
        if self.uffd_flags == NO_UFFD:
            return self.make(pid, -1)
        pidfd = os.pidfd_open(pid)
        try:
            return self.make(pid, self.adopt(pidfd, target_fd))
        finally:
            os.close(pidfd)


def _compare(pid: int, _uffd: int) -> Tracker:
    return CompareTracker(pid)


def _soft_dirty(pid: int, _uffd: int) -> Tracker:
    return SoftDirtyTracker(pid)


def _soft_dirty_emulated(pid: int, uffd: int) -> Tracker:
    return SoftDirtyTracker(pid, source=EmulatedPagemap(pid, uffd))


TRACKERS: dict[str, Kind] = {
    "scan": Kind(ScanTracker),
    "compare": Kind(_compare, NO_UFFD),
    "soft-dirty": (
        Kind(_soft_dirty, NO_UFFD, exact=False)
        if kernel_features().has_soft_dirty
        else Kind(_soft_dirty_emulated, exact=False)
    ),
}
