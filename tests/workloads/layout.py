"""One process with every sort of mapping, each with known contents, checked again and again.

Usage: python -m tests.workloads.layout STATUS_FILE SCRATCH_DIRECTORY

The mappings lie in slots of one reservation; a note names them. Besides contents it checks what a program may do with a
mapping later: neighbours that were cut apart by mprotect must be one mapping again when the protection is the same.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import time
from pathlib import Path
from typing import Callable

from tests.workloads import libc
from tests.workloads.status import Status

_PAGE = 4096
_SLOT = 8 << 20
_NONE, _READ, _WRITE, _EXEC = 0, 1, 2, 4
_RW = _READ | _WRITE
_SHARED, _PRIVATE, _DROPPABLE, _FIXED, _ANONYMOUS = 1, 2, 8, 0x10, 0x20
_GROWSDOWN, _NORESERVE = 0x100, 0x4000
_GUARD_INSTALL = 102
_NR_prctl, _NR_mlock, _NR_mlock2, _NR_mseal = 157, 149, 325, 462
_PR_SET_VMA, _PR_SET_VMA_ANON_NAME = 0x53564D41, 0
_ADVICE = {
    "random": 1,
    "sequential": 2,
    "dontfork": 10,
    "mergeable": 12,
    "hugepage": 14,
    "nohugepage": 15,
    "dontdump": 16,
    "wipeonfork": 18,
}


class Layout:
    """The mappings and what their pages hold."""

    def __init__(self, status: Status, directory: Path) -> None:
        self.status = status
        self.directory = directory
        self.slots: dict[str, int] = {}
        self.skipped: list[str] = []
        self.words: dict[int, int] = {}
        nothing = _PRIVATE | _ANONYMOUS | _NORESERVE
        reservation = self.must(libc.NR_mmap, 0, 64 * _SLOT, _NONE, nothing, -1, 0)
        self.next = -(-reservation // _SLOT) * _SLOT

    def must(self, number: int, *arguments: int) -> int:
        result = libc.syscall(number, *arguments)
        if -4096 < result < 0:
            raise OSError(-result, f"syscall {number}: {os.strerror(-result)}", str(arguments))
        return result

    def slot(self, name: str) -> int:
        start = self.slots[name] = self.next
        self.next += _SLOT
        return start

    def map(
        self,
        name: str,
        pages: int,
        protection: int = _RW,
        flags: int = _PRIVATE | _ANONYMOUS,
        fd: int = -1,
        offset: int = 0,
    ) -> int:
        start = self.slot(name)
        self.must(libc.NR_mmap, start, pages * _PAGE, protection, flags | _FIXED, fd, offset)
        return start

    def fill(self, start: int, *pages: int) -> None:
        for page in pages:
            address = start + page * _PAGE
            self.words[address] = value = address ^ 0x5A5A
            ctypes.c_uint64.from_address(address).value = value

    def protect(self, start: int, first: int, last: int, protection: int) -> None:
        self.must(libc.NR_mprotect, start + first * _PAGE, (last - first) * _PAGE, protection)

    def advise(self, start: int, first: int, last: int, advice: int) -> None:
        self.must(libc.NR_madvise, start + first * _PAGE, (last - first) * _PAGE, advice)

    def make(self) -> None:
        """Makes everything; what this kernel does not have is noted as skipped."""
        for step in (
            self.protections,
            self.cut,
            self.flags,
            self.names,
            self.advice,
            self.locks,
            self.guards,
            self.heap,
            self.files,
            self.shared,
            self.droppable,
            self.huge,
            self.reservation,
            self.sealed,
        ):
            self.attempt(step.__name__, step)

    def attempt(self, name: str, step: Callable[[], None]) -> None:
        try:
            step()
        except OSError as err:
            self.skipped.append(f"{name}: {err}")

    def protections(self) -> None:
        for protection in range(8):
            start = self.map(f"protection {protection}", 16)
            self.fill(start, 1, 2, 9)
            self.protect(start, 0, 16, protection)
        self.map("read-only from the start", 4, _READ)
        start = self.map("read-only untouched", 4)
        self.protect(start, 0, 4, _READ)
        start = self.map("neighbours of one kind", 4)
        self.must(libc.NR_mmap, start + 4 * _PAGE, 4 * _PAGE, _RW, _PRIVATE | _ANONYMOUS | _FIXED, -1, 0)
        self.fill(start, 1, 5)

    def cut(self) -> None:
        # The middle part is touched last or never: it must not have come between the others.
        start = self.map("cut", 30)
        self.fill(start, 1)
        self.protect(start, 10, 20, _NONE)
        self.fill(start, 25)

    def flags(self) -> None:
        start = self.map("grows down", 16, flags=_PRIVATE | _ANONYMOUS | _GROWSDOWN)
        self.fill(start, 14, 15)
        start = self.map("noreserve", 64, flags=_PRIVATE | _ANONYMOUS | _NORESERVE)
        self.fill(start, 3)
        self.protect(start, 32, 48, _NONE)

    def names(self) -> None:
        start = self.map("named", 8)
        self.fill(start, 1)
        name = ctypes.create_string_buffer(b"ferry layout")
        self.must(
            _NR_prctl, _PR_SET_VMA, _PR_SET_VMA_ANON_NAME, start, 4 * _PAGE, ctypes.addressof(name)
        )

    def advice(self) -> None:
        for name, advice in _ADVICE.items():
            start = self.map(name, 16)
            self.fill(start, 1)
            self.attempt(name, lambda: self.advise(start, 0, 8, advice))

    def locks(self) -> None:
        start = self.map("mlock", 8)
        self.fill(start, 1)
        self.must(_NR_mlock, start, 4 * _PAGE)
        start = self.map("mlock on fault", 8)
        self.fill(start, 1)
        self.must(_NR_mlock2, start, 8 * _PAGE, 1)

    def guards(self) -> None:
        start = self.map("guards", 16)
        self.fill(start, 1, 8)
        self.advise(start, 4, 6, _GUARD_INSTALL)

    def heap(self) -> None:
        # By the library's own hand: it would not notice another's.
        sbrk = ctypes.CDLL(None).sbrk
        sbrk.restype, sbrk.argtypes = ctypes.c_size_t, [ctypes.c_long]
        end = sbrk(16 * _PAGE)
        self.fill(-(-end // _PAGE) * _PAGE, 1, 3)

    def files(self) -> None:
        path = self.directory / "mapped"
        path.write_bytes(b"".join(bytes([65 + page]) * _PAGE for page in range(16)))
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        start = self.map("private file", 16, _RW, _PRIVATE, fd)
        self.fill(start, 2, 3)
        self.words[start + 5 * _PAGE] = int.from_bytes(bytes([70]) * 8, "little")
        self.protect(start, 8, 12, _READ)
        self.map("private file read-only", 8, _READ, _PRIVATE, fd, 4 * _PAGE)
        start = self.map("shared file", 8, _RW, _SHARED, fd)
        self.protect(start, 2, 4, _READ)
        self.map("shared file read-only", 4, _READ, _SHARED, fd)
        os.close(fd)
        read_only = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.map("shared file never writable", 4, _READ, _SHARED, read_only)
        os.close(read_only)

    def shared(self) -> None:
        start = self.map("shared memory", 16, flags=_SHARED | _ANONYMOUS)
        self.fill(start, 1, 2)
        self.protect(start, 4, 8, _READ)
        fd = os.memfd_create("layout", os.MFD_CLOEXEC)
        os.ftruncate(fd, 16 * _PAGE)
        start = self.map("memfd", 16, _RW, _SHARED, fd)
        self.fill(start, 3)
        start = self.map("memfd private", 16, _RW, _PRIVATE, fd)
        self.fill(start, 4)
        self.map("memfd part", 4, _READ, _SHARED, fd, 8 * _PAGE)

    def droppable(self) -> None:
        start = self.slot("droppable")
        flags = _DROPPABLE | _ANONYMOUS | _FIXED
        self.must(libc.NR_mmap, start, 4 * _PAGE, _RW, flags, -1, 0)
        ctypes.c_uint64.from_address(start).value = 1

    def huge(self) -> None:
        pages = (4 << 20) // _PAGE
        start = self.map("huge", pages)
        self.advise(start, 0, pages, mmap.MADV_HUGEPAGE)
        self.fill(start, *range(0, pages, 100))

    def reservation(self) -> None:
        flags = _PRIVATE | _ANONYMOUS | _NORESERVE
        start = self.slots["reservation"] = self.must(libc.NR_mmap, 0, 64 << 30, _NONE, flags, -1, 0)
        self.protect(start, 0, 16, _RW)
        self.protect(start, 1000, 1016, _RW)
        self.fill(start, 1, 1001)

    def sealed(self) -> None:
        start = self.map("sealed", 4)
        self.fill(start, 1)
        self.protect(start, 0, 4, _READ)
        self.must(_NR_mseal, start, 4 * _PAGE, 0)

    def verify(self) -> None:
        protections = {f"protection {number}" for number in range(8) if not number & _READ}
        hidden = [self.slots[name] for name in protections]
        for start in hidden:
            self.protect(start, 0, 16, _READ)
        for address, expected in self.words.items():
            found = ctypes.c_uint64.from_address(address).value
            self.status.check(
                found == expected, f"{address:#x} holds {found:#x}, expected {expected:#x}"
            )
        for start, protection in zip(hidden, (number for number in range(8) if not number & _READ)):
            self.protect(start, 0, 16, protection)
        self.rejoin()

    def rejoin(self) -> None:
        # Parts of one mapping are one again when their protection is, which mremap depends on.
        start = self.slots["cut"]
        self.protect(start, 10, 20, _RW)
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
            pieces = [line for line in file if _start_of(line) in range(start, start + 30 * _PAGE)]
        self.status.check(len(pieces) == 1, f"a mapping cut and joined again is {pieces}")
        self.protect(start, 10, 20, _NONE)


def _start_of(line: str) -> int:
    return int(line.partition("-")[0], 16)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("status")
    parser.add_argument("directory", type=Path)
    options = parser.parse_args()
    status = Status(options.status)
    layout = Layout(status, options.directory)
    layout.make()
    slots = {name: hex(start) for name, start in layout.slots.items()}
    status.note(slots=slots, skipped=layout.skipped)
    while True:
        layout.verify()
        status.note()
        time.sleep(0.2)


if __name__ == "__main__":
    main()
