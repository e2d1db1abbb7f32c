"""Which parts of a memory object are populated, by lseek(2) SEEK_DATA and SEEK_HOLE. Byte offsets, page aligned."""

from __future__ import annotations

import contextlib
import os

from agent.ranges import RangeSet
from agent.types import PAGE_SIZE


def shared_extents(fd: int) -> RangeSet:
    """Return the page ranges of an object that are populated; the others read as zero."""
    extents = RangeSet()
    offset = 0
    with contextlib.suppress(OSError):  # ENXIO: nothing but a hole from here on
        while True:
            start = os.lseek(fd, offset, os.SEEK_DATA)
            offset = os.lseek(fd, start, os.SEEK_HOLE)
            extents.add(start - start % PAGE_SIZE, offset + -offset % PAGE_SIZE)
    return extents
