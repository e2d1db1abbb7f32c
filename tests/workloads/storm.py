"""Threads that map, unmap, move, drop and protect memory without pause, and know what every page must hold.

Usage: python -m tests.workloads.storm SEED STATUS_FILE [--threads N] [--pause SECONDS] [--calm]

Each thread owns its regions and models every page as one 64-bit tag (0: zero page). It checks a page at three places
whenever it comes across it, and everything now and then. A wrong tag is an "error" note with address, expected and
found; a system call that fails though the model says it must not is one too. Calls go to the kernel raw.

--calm: only writes and MADV_DONTNEED, for trackers that cannot follow remaps.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import mmap
import random
import threading
import time
from typing import Optional

from tests.workloads import libc
from tests.workloads.status import Status

_PAGE = 4096
_READ, _WRITE = 1, 2
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS = 1, 2, 0x10, 0x20
_MREMAP_MAYMOVE = 1
_PLACES = (0, 2040, 4088)
_MAX_REGIONS = 24
_MAX_PIECES = 150
"""Regions cut into pieces: so many, and one must go."""
_MAX_PAGES = 96


class Region:
    """One mapping of uniform protection; `tags` holds what each page must read as."""

    def __init__(self, start: int, tags: list[int], protection: int, *, shared: bool) -> None:
        self.start = start
        self.tags = tags
        self.protection = protection
        self.shared = shared

    @property
    def nbytes(self) -> int:
        return len(self.tags) * _PAGE

    def __str__(self) -> str:
        return f"{self.start:#x}-{self.start + self.nbytes:#x} protection {self.protection}"


class Storm:
    """One thread's regions and the operations on them."""

    def __init__(self, status: Status, seed: int, index: int, *, calm: bool) -> None:
        self.status = status
        self.chance = random.Random(seed * 1000 + index)
        self.index = index
        self.calm = calm
        self.regions: list[Region] = []
        self.nr_operations = 0
        self.nr_seams = 0
        self._tag = index << 48

    def step(self) -> None:
        """One random operation."""
        self.nr_operations += 1
        if len(self.regions) < 4:
            self.map_new()
            return
        region = self.chance.choice(self.regions)
        if self.calm:
            operations = [self.write, self.write, self.write, self.verify, self.drop]
        else:
            operations = [self.write, self.write, self.write, self.verify, self.drop, self.move]
            operations += [self.protect, self.unmap_part, self.replace, self.unmap, self.grow]
        operation = self.chance.choice(operations)
        if len(self.regions) > _MAX_PIECES:
            operation = self.unmap
        if operation is self.grow and len(self.regions) < _MAX_REGIONS:
            self.map_new()
        operation(region)

    def call(self, number: int, *arguments: int) -> Optional[int]:
        """A system call that must succeed; None, after an error note, when it does not."""
        result = libc.syscall(number, *arguments)
        if -4096 < result < 0:
            name = errno.errorcode.get(-result, result)
            self.status.error(f"syscall {number} {[hex(word) for word in arguments]} gave {name}")
            return None
        return result

    def map_new(self) -> None:
        pages = self.chance.randrange(1, _MAX_PAGES)
        shared = self.chance.random() < 0.25
        flags = (_MAP_SHARED if shared else _MAP_PRIVATE) | _MAP_ANONYMOUS
        start = self.call(libc.NR_mmap, 0, pages * _PAGE, _READ | _WRITE, flags, -1, 0)
        if start is not None:
            region = Region(start, [0] * pages, _READ | _WRITE, shared=shared)
            self.regions.append(region)
            self.write(region)

    def write(self, region: Region) -> None:
        if not region.protection & _WRITE:
            return
        for _ in range(self.chance.randrange(1, 12)):
            number = self.chance.randrange(len(region.tags))
            self.verify_page(region, number)
            self._tag += 1
            # Sometimes back to zero: a zero page must replace what the destination holds.
            tag = 0 if self.chance.random() < 0.1 else self._tag
            for place in _PLACES:
                ctypes.c_uint64.from_address(region.start + number * _PAGE + place).value = tag
            region.tags[number] = tag

    def verify_page(self, region: Region, number: int) -> None:
        expected = region.tags[number]
        address = region.start + number * _PAGE
        found = [ctypes.c_uint64.from_address(address + place).value for place in _PLACES]
        if found != [expected] * len(_PLACES):
            words = " ".join(f"{word:#x}" for word in found)
            self.status.error(f"page {address:#x} holds {words}, expected {expected:#x} ({region})")
            region.tags[number] = found[0]

    def verify(self, region: Region) -> None:
        if region.protection & _READ:
            for number in range(len(region.tags)):
                self.verify_page(region, number)

    def verify_all(self) -> None:
        """Checks every page, those without access too, which keep what they hold."""
        for region in self.regions:
            if not region.protection & _READ:
                self._set_protection(region, _READ)
            self.verify(region)

    def drop(self, region: Region) -> None:
        """MADV_DONTNEED: private anonymous pages read as zero afterwards, shared ones keep their content."""
        first, last = self._part(region)
        start = region.start + first * _PAGE
        if self.call(libc.NR_madvise, start, (last - first) * _PAGE, mmap.MADV_DONTNEED) is not None:
            if not region.shared:
                region.tags[first:last] = [0] * (last - first)

    def protect(self, region: Region) -> None:
        """Another protection for a part, which becomes a region of its own."""
        first, last = self._part(region)
        part = self._cut(region, first, last)
        self._set_protection(part, self.chance.choice([0, _READ, _READ | _WRITE]))

    def unmap(self, region: Region) -> None:
        if self.call(libc.NR_munmap, region.start, region.nbytes) is not None:
            self.regions.remove(region)

    def unmap_part(self, region: Region) -> None:
        first, last = self._part(region)
        self.unmap(self._cut(region, first, last))

    def replace(self, region: Region) -> None:
        """MAP_FIXED over a part: fresh zero pages at an old address."""
        first, last = self._part(region)
        part = self._cut(region, first, last)
        flags = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_FIXED
        protection = _READ | _WRITE
        if self.call(libc.NR_mmap, part.start, part.nbytes, protection, flags, -1, 0) is not None:
            part.tags, part.protection, part.shared = [0] * len(part.tags), protection, False

    def move(self, region: Region) -> None:
        """mremap to an address where nothing is, which is then most likely where something was."""
        self._remap(region, len(region.tags), must_move=True)

    def grow(self, region: Region) -> None:
        """mremap to another length, in place or not. A shared object cannot grow: SIGBUS."""
        pages = self.chance.randrange(1, _MAX_PAGES)
        if region.shared:
            pages = min(pages, len(region.tags))
        self._remap(region, pages, must_move=False)

    def _remap(self, region: Region, pages: int, *, must_move: bool) -> None:
        flags = _MREMAP_MAYMOVE
        arguments = [region.start, region.nbytes, pages * _PAGE, flags]
        if must_move:
            hole = self.call(
                libc.NR_mmap, 0, pages * _PAGE, 0, _MAP_PRIVATE | _MAP_ANONYMOUS, -1, 0
            )
            if hole is None:
                return
            arguments[3] |= 2  # MREMAP_FIXED
            arguments.append(hole)
        start = libc.syscall(libc.NR_mremap, *arguments)
        if start == -errno.EFAULT:
            # A tracked and a new mapping side by side do not merge into one VMA: a known cost of tracking (README.md,
            # Limitations), counted and not hidden.
            self.nr_seams += 1
            self.status.note(seam=[region.start, region.nbytes], around=_mappings_around(region))
            self.regions.remove(region)  # some of it may have been moved: nobody knows what is where
            return
        if -4096 < start < 0:
            self.status.error(f"mremap {[hex(word) for word in arguments]} gave {libc.name_of(start)}")
            return
        kept = region.tags[:pages]
        region.start, region.tags = start, kept + [0] * (pages - len(kept))

    def _set_protection(self, region: Region, protection: int) -> None:
        if self.call(libc.NR_mprotect, region.start, region.nbytes, protection) is not None:
            region.protection = protection

    def _part(self, region: Region) -> tuple[int, int]:
        first = self.chance.randrange(len(region.tags))
        return first, self.chance.randrange(first, len(region.tags)) + 1

    def _cut(self, region: Region, first: int, last: int) -> Region:
        """Splits the model so that pages [first, last) are a region of their own, which is returned."""
        pieces = []
        for begin, end in ((0, first), (first, last), (last, len(region.tags))):
            if begin < end:
                start = region.start + begin * _PAGE
                tags = region.tags[begin:end]
                piece = Region(start, tags, region.protection, shared=region.shared)
                pieces.append((begin, piece))
        self.regions.remove(region)
        self.regions.extend(piece for _, piece in pieces)
        return next(piece for begin, piece in pieces if begin == first)


def _mappings_around(region: Region) -> list[str]:
    # What the kernel has there, with one neighbour on either side: to tell whose seam it is.
    with open("/proc/self/smaps", encoding="ascii", errors="replace") as file:
        text = file.read()
    found: list[tuple[int, int, str]] = []
    for line in text.splitlines():
        word = line.partition(" ")[0]
        if line.startswith("VmFlags:") and found:
            start, end, head = found[-1]
            found[-1] = start, end, f"{head} {line[8:].strip()}"
        elif not word.endswith(":"):
            start, end = (int(part, 16) for part in word.split("-"))
            found.append((start, end, " ".join(line.split())))
    last = region.start + region.nbytes
    return [head for start, end, head in found if start <= last and region.start <= end]


def run(storm: Storm, pause_s: float) -> None:
    while True:
        storm.step()
        if storm.nr_operations % 200 == 0:
            storm.verify_all()
        time.sleep(pause_s)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("seed", type=int)
    parser.add_argument("status")
    parser.add_argument("--threads", type=int, default=3)
    parser.add_argument("--pause", type=float, default=0.001)
    parser.add_argument("--calm", action="store_true")
    options = parser.parse_args()
    status = Status(options.status)
    storms = [
        Storm(status, options.seed, index + 1, calm=options.calm) for index in range(options.threads)
    ]
    threads = [
        threading.Thread(target=run, args=(storm, options.pause), daemon=True) for storm in storms
    ]
    for thread in threads:
        thread.start()
    while True:
        if not all(thread.is_alive() for thread in threads):
            status.error("a storm thread ended")
        seams = sum(storm.nr_seams for storm in storms)
        status.note(operations=[storm.nr_operations for storm in storms], seams=seams)
        time.sleep(0.05)


if __name__ == "__main__":
    main()
