"""Huge pages for memory that is about to be filled: one fault and one clearing instead of 512.

Faulting in small pages one by one takes more than half of a receiver's time. Where the source has every page of a range
(PageEncoding.EXPECT), process_madvise(MADV_COLLAPSE) makes huge pages of the areas in it, right before the first of
their pages are written: the copy gets no more memory than the source has, and the flags of its mappings stay as they
are. An area needs a page to be collapsed: its first one is touched, with the zero that it reads as anyway.

What cannot be done (no huge page free, memory not writable, VM_NOHUGEPAGE, an older kernel) is left: small pages do.
So is what is not worth it: where memory must be compacted first, or a hypervisor must back it, which keeps whole huge
pages that were free for a while from its guest, 512 small pages are faster. Both show in the time that a page takes.
A host that says "never" (transparent_hugepage/enabled) gets none, though the kernel would make them.
Must be told of memory only in which nothing lies yet. Addresses are target addresses.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from array import array
from ctypes import addressof, c_char

from agent.errors import RestoreError
from agent.kernel import process_vm
from agent.kernel.mman import MADV_COLLAPSE, process_madvise
from agent.ranges import RangeSet

_log = logging.getLogger(__name__)

MAX_AREAS = 512
"""Areas made at once; batches have only a few."""
SLOW_S = 1e-3
"""CPU time for one that is not worth it: 512 faults of 1.3 microseconds take less. Clearing 2 MiB takes 0.2 ms."""
MIN_PAUSE = 4
MAX_PAUSE = 256
"""Areas left alone after one that was not made, or not worth it; doubled each time."""

_DIRECTORY = "/sys/kernel/mm/transparent_hugepage"
_ZEROS = (c_char * MAX_AREAS)()


def huge_page_bytes() -> int:
    """Return the size of a transparent huge page, 0 where there are to be none."""
    try:
        with open(f"{_DIRECTORY}/enabled", encoding="ascii") as file:
            if "[never]" in file.read():
                return 0
        with open(f"{_DIRECTORY}/hpage_pmd_size", encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 0


class HugePages:
    """Makes huge pages in process ``pid``; close() it."""

    def __init__(self, pid: int) -> None:
        self.nr_made = 0
        self._pid = pid
        self._pidfd = os.pidfd_open(pid)
        self._size = huge_page_bytes()
        self._expected = RangeSet()
        self._next = 0  # areas below have had their turn
        self._pause = 0
        self._left_alone = 0

    def close(self) -> None:
        """Close the descriptor."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
            _log.debug("%d huge pages made ahead", self.nr_made)

    def expect(self, ranges: RangeSet) -> None:
        """All of this is about to be written, in the order of addresses, and nothing lies there yet."""
        size = self._size
        if size:
            aligned = ((-(-start // size) * size, end // size * size) for start, end in ranges)
            self._expected.update(RangeSet.of(area for area in aligned if area[0] < area[1]))
            self._next = 0

    def prepare(self, pairs: array[int]) -> None:
        """Make the pages that a write to these ranges is the first one to need.

        :raises RestoreError: the process is gone.
        """
        size = self._size
        if not size or not self._expected:
            return
        low, high = max(self._next, pairs[0] // size * size), -(-pairs[-1] // size) * size
        if low < high:
            self._next = high
            inside = self._expected.clip(low, high)
            areas = [area for start, end in inside for area in range(start, end, size)]
            self._left_alone -= len(areas)
            if areas and self._left_alone <= 0:
                self._try(areas[:MAX_AREAS])

    def _try(self, areas: list[int]) -> None:
        began = time.thread_time()
        made = self._make(areas)
        self.nr_made += made
        if made == len(areas) and time.thread_time() - began < SLOW_S * made:
            self._pause = 0
        else:
            self._pause = min(max(2 * self._pause, MIN_PAUSE), MAX_PAUSE)
        self._left_alone = self._pause

    def _make(self, areas: list[int]) -> int:
        vectors = array("Q", bytes(16 * len(areas)))
        vectors[0::2] = array("Q", areas)
        vectors[1::2] = array("Q", [1]) * len(areas)
        try:
            process_vm.writev(self._pid, addressof(_ZEROS), len(areas), vectors, 0, len(areas))
            vectors[1::2] = array("Q", [self._size]) * len(areas)
            return process_madvise(self._pidfd, vectors, MADV_COLLAPSE) // self._size
        except OSError as err:
            if err.errno == errno.ESRCH:
                raise RestoreError(f"Process {self._pid} is gone", pid=self._pid) from err
            _log.debug("Cannot make huge pages at %#x: %s", areas[0], err)
            return 0
