"""Set the contents of some ranges aside while their mapping is made anew.

Used on the destination's skeleton, which must be stopped: a mapping that came out different from the source's is
replaced, with what it held already. Only pages that a fresh mapping would not show are kept. Addresses are target
addresses, ranges [start, end) in bytes.
"""

from __future__ import annotations

import os
from array import array

from agent.errors import RestoreError
from agent.kernel.pagemap import PAGE_IS_FILE, PAGE_IS_PRESENT, PAGE_IS_SWAPPED, PagemapScanner
from agent.pages.chunks import Stream
from agent.pages.sender import CHUNK_BYTES, PageReader
from agent.ranges import RangeSet
from agent.types import Pid

_POPULATED = PAGE_IS_PRESENT | PAGE_IS_SWAPPED


class KeptPages:
    """Contents of ranges of one stopped process, held by the agent."""

    def __init__(self, pid: Pid) -> None:
        self._pid = pid
        self._kept: list[tuple[array[int], bytes]] = []

    def save(self, ranges: RangeSet) -> None:
        """Read what is populated there; pages that are still a mapped file's are not."""
        populated = RangeSet()
        with PagemapScanner(self._pid) as scanner:
            for start, end in ranges:
                found = scanner.scan(
                    start,
                    end,
                    category_mask=PAGE_IS_FILE,
                    category_inverted=PAGE_IS_FILE,
                    category_anyof_mask=_POPULATED,
                    return_mask=_POPULATED,
                )
                populated.update(RangeSet.of(zip(found[0::3], found[1::3])))
        if not populated:
            return
        reader = PageReader()
        try:
            for pairs in Stream(populated.pairs).chunks(CHUNK_BYTES):
                lost = RangeSet()
                got = reader.read_process(self._pid, pairs, lost)
                if lost:
                    raise RestoreError(f"Cannot read {next(iter(lost))} of process {self._pid}")
                self._kept.append((got, bytes(reader.view[: Stream(got).length])))
        finally:
            reader.close()

    def put(self) -> None:
        """Write everything back, whatever the protection is."""
        if not self._kept:
            return
        fd = os.open(f"/proc/{self._pid}/mem", os.O_WRONLY | os.O_CLOEXEC)
        try:
            for pairs, data in self._kept:
                at = 0
                for start, end in zip(pairs[0::2], pairs[1::2]):
                    _write(fd, data[at : at + end - start], start)
                    at += end - start
        finally:
            os.close(fd)
        self._kept.clear()


def _write(fd: int, data: bytes, vaddr: int) -> None:
    done = 0
    while done < len(data):
        try:
            done += os.pwrite(fd, data[done:], vaddr + done)
        except OSError as err:
            raise RestoreError(f"Cannot put back the page at {vaddr + done:#x}") from err
