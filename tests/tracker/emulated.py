"""Soft-dirty bits for kernels without: real pagemap entries, with bit 55 from asynchronous write protection.

The two mean the same to a tracker that stops the target around look and clear: a page is dirty that was stored to
since, and all of a mapping that is new. As with the real bits, the zero page that a mere read maps is not dirty.
"""

from __future__ import annotations

import contextlib
import os
from array import array

from agent.kernel import uffd
from agent.kernel.pagemap import (
    PAGE_IS_PFNZERO,
    PAGE_IS_PRESENT,
    PAGE_IS_SWAPPED,
    PAGE_IS_WRITTEN,
    PM_PRESENT,
    PM_SCAN_CHECK_WPASYNC,
    PM_SCAN_WP_MATCHING,
    PM_SOFT_DIRTY,
    PM_SWAP,
    PM_UFFD_WP,
    PagemapScanner,
)
from agent.procfs.maps import parse_maps, read_maps
from agent.tracker.populated import ProcPagemap

PAGE = 4096
_MARKER = PM_SWAP | PM_UFFD_WP | PM_PRESENT | 1 << 58
"""Bits that tell a marker: set are the first two, and not the bit of guard pages."""
POPULATED = PAGE_IS_PRESENT | PAGE_IS_SWAPPED


class EmulatedPagemap(ProcPagemap):
    """What a SoftDirtyTracker takes for its source; owns the userfaultfd."""

    def __init__(self, pid: int, uffd_fd: int) -> None:
        super().__init__(pid)
        self._uffd = uffd_fd
        self._scanner = PagemapScanner(pid)

    def read(self, start: int, end: int) -> bytes:
        """See PagemapSource."""
        data = super().read(start, end)
        if data.count(0) == len(data):
            return data
        entries = array("Q", data)
        markers = {entry for entry in entries if entry & _MARKER == PM_SWAP | PM_UFFD_WP}
        if markers:  # of our own: such a page is not there (nothing is swapped out in these tests)
            entries = array("Q", [0 if entry in markers else entry for entry in entries])
        for entry in parse_maps(read_maps(self.pid)):
            low, high = max(start, entry.start), min(end, entry.end)
            if low < high:
                for first, last in self._written(low, high):
                    for index in range((first - start) // PAGE, (last - start) // PAGE):
                        if entries[index] & (PM_PRESENT | PM_SWAP):
                            entries[index] |= PM_SOFT_DIRTY
        return entries.tobytes()

    def _written(self, start: int, end: int) -> list[tuple[int, int]]:
        try:
            found = self._scanner.scan(
                start, end, flags=PM_SCAN_CHECK_WPASYNC, category_mask=PAGE_IS_WRITTEN,
                category_anyof_mask=POPULATED, return_mask=PAGE_IS_PFNZERO,
            )
        except PermissionError:  # a new mapping
            return [(start, end)]
        return [
            (first, last)
            for first, last, categories in zip(found[0::3], found[1::3], found[2::3])
            if not categories & PAGE_IS_PFNZERO
        ]

    def clear(self) -> None:
        """See PagemapSource."""
        for entry in parse_maps(read_maps(self.pid)):
            with contextlib.suppress(OSError):  # [vdso] and its kin
                length = entry.end - entry.start
                uffd.register(self._uffd, entry.start, length, uffd.UFFDIO_REGISTER_MODE_WP)
                uffd.writeprotect(self._uffd, entry.start, length, False)  # see "Stale protection" of scan.py
                self._scanner.scan(
                    entry.start, entry.end, flags=PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
                    category_anyof_mask=POPULATED, return_mask=PAGE_IS_PRESENT,
                )

    def close(self) -> None:
        """See PagemapSource."""
        if self._uffd >= 0:
            os.close(self._uffd)
            self._uffd = -1
            self._scanner.close()
        super().close()
