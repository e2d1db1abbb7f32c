"""What is mapped, and which pages are there, from /proc/PID/maps and pagemap: what kernels without PAGEMAP_SCAN tell.

Never populates a page. Addresses are target addresses. There is no Python loop per page: an entry's flags are its two
highest bytes, bytes.translate() makes one class byte of each, and a regular expression finds the runs.
Source: Documentation/admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

import operator
import os
import re
from array import array
from collections.abc import Callable
from typing import Final, Protocol

from agent.errors import TargetGone
from agent.procfs.maps import MapsEntry, parse_maps, read_maps
from agent.procfs.smaps import read_vm_flags
from agent.ranges import RangeSet
from agent.tracker.layout import Layout, classify
from agent.types import PAGE_SIZE

CHUNK_PAGES = 1 << 15
"""Pages looked at in one go: 256 KiB of entries."""

_ENTRY: Final = 8
# Bits of the highest byte of an entry (63..56) and of the next one (55..48).
_PRESENT, _SWAP, _FILE, _GUARD, _EXCLUSIVE = 0x80, 0x40, 0x20, 0x04, 0x01
_SOFT_DIRTY = 0x80

# Class bytes.
POPULATED: Final = 1
"""Present or swapped out, and no guard."""
COPIED: Final = 2
"""Populated and not the file's own page: all of anonymous memory is, and what was copied of a private file."""
GUARD: Final = 4
"""A guard page. Kernels before v6.15 have no bit for them: they look swapped out, and reading them fails."""
SHARED: Final = 8
"""Populated, and not by a page of this process alone: the zero page, or copy on write after a fork."""
DIRTY: Final = 16
"""Soft-dirty."""


def _classify(high: int) -> int:
    if high & _GUARD:
        return GUARD
    if not high & (_PRESENT | _SWAP):
        return 0
    copied = 0 if high & _FILE else COPIED
    shared = 0 if high & (_EXCLUSIVE | _SWAP) else SHARED
    return POPULATED | copied | shared


_CLASSES: Final = bytes(map(_classify, range(256)))
_SOFT: Final = bytes(DIRTY if byte & _SOFT_DIRTY else 0 for byte in range(256))
_ONES: Final = re.compile(b"\x01+")


def _chooser(test: Callable[[int], object]) -> bytes:
    return bytes(1 if test(code) else 0 for code in range(256))


_CHOOSE_COPIED: Final = _chooser(lambda code: code & COPIED)
_CHOOSE_GUARD: Final = _chooser(lambda code: code & GUARD)
_CHOOSE_CHANGED: Final = _chooser(lambda code: code & COPIED and code & (DIRTY | SHARED))


class PagemapSource(Protocol):
    """The seam: where entries come from, and what makes the kernel forget soft-dirty bits."""

    def read(self, start: int, end: int) -> bytes:
        """Return the entries of [start, end), eight bytes a page."""

    def clear(self) -> None:
        """Clear the soft-dirty bits of all pages."""

    def close(self) -> None:
        """Idempotent."""


class ProcPagemap:
    """A process's own: /proc/PID/pagemap, pinned to the address space at the time of opening, and clear_refs."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)

    def read(self, start: int, end: int) -> bytes:
        """See PagemapSource.

        :raises TargetGone: the process exited or called exec.
        """
        length = (end - start) // PAGE_SIZE * _ENTRY
        offset = start // PAGE_SIZE * _ENTRY
        data = os.pread(self._fd, length, offset)
        while len(data) < length:
            more = os.pread(self._fd, length - len(data), offset + len(data))
            if not more:
                raise TargetGone("The target exited or called exec", pid=self.pid)
            data += more
        return data

    def clear(self) -> None:
        with open(f"/proc/{self.pid}/clear_refs", "wb", buffering=0) as file:
            file.write(b"4")

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class Look:
    """One look at private memory."""

    __slots__ = ("changed", "copied", "guards")

    def __init__(self, source: PagemapSource, ranges: RangeSet) -> None:
        """Look at all of `ranges`: private mappings."""
        found: tuple[array[int], array[int], array[int]] = (array("Q"), array("Q"), array("Q"))
        choosers = (_CHOOSE_COPIED, _CHOOSE_GUARD, _CHOOSE_CHANGED)
        for start, end in ranges:
            for low in range(start, end, CHUNK_PAGES * PAGE_SIZE):
                entries = source.read(low, min(end, low + CHUNK_PAGES * PAGE_SIZE))
                if entries.count(0) == len(entries):
                    continue  # a reservation
                high = entries[7::_ENTRY].translate(_CLASSES)
                codes = bytes(map(operator.or_, high, entries[6::_ENTRY].translate(_SOFT)))
                for chooser, pairs in zip(choosers, found):
                    for run in _ONES.finditer(codes.translate(chooser)):
                        pairs.append(low + run.start() * PAGE_SIZE)
                        pairs.append(low + run.end() * PAGE_SIZE)
        self.copied, self.guards, self.changed = map(RangeSet, found)
        """What has content of its own; guard pages; the part of `copied` that may have changed by soft-dirty bits."""


class Mappings:
    """The current mappings of a process without MAP_DROPPABLE ones, which nobody carries."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.text = b""
        self.entries: list[MapsEntry] = []
        self.layout: Layout = classify([], ())

    def read(self, *, final: bool) -> bool:
        """Look again; says whether the text changed. The same text may hide another kind of memory: `final` looks.

        :raises TargetGone: the target exited.
        """
        try:
            text = read_maps(self.pid)
            if not text:
                raise TargetGone("The target exited", pid=self.pid)
            changed = text != self.text
            if changed or final:
                entries = parse_maps(text)
                droppable = {(start, end) for start, end, flags in read_vm_flags(self.pid) if "dp" in flags}
                self.layout = classify(entries, {e for e in entries if (e.start, e.end) in droppable})
                self.entries, self.text = entries, text
        except (ProcessLookupError, FileNotFoundError) as err:
            raise TargetGone("The target exited", pid=self.pid) from err
        return changed
