"""/proc/PID/pagemap and ioctl(PAGEMAP_SCAN).

Addresses are target addresses, page aligned, ranges [start, end). Must never populate a page or change content; with
PM_SCAN_WP_MATCHING a scan write-protects what it returns.
Since Linux kernel commit 52526ca7fdb9 ("fs/proc/task_mmu: implement IOCTL to get and optionally clear info about
PTEs") (in v6.7). Sources: include/uapi/linux/fs.h, Documentation/admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

import ctypes
import errno
import os
from array import array
from collections.abc import Callable, Iterable
from ctypes import addressof, c_int, c_uint64, c_ulong, c_void_p, sizeof
from types import TracebackType
from typing import Final

from agent.kernel.ioctl import _IOWR
from agent.kernel.libc import libc, os_error

PAGE_IS_FILE: Final = 1 << 2
PAGE_IS_GUARD: Final = 1 << 8
PAGE_IS_HUGE: Final = 1 << 6
PAGE_IS_PFNZERO: Final = 1 << 5
PAGE_IS_PRESENT: Final = 1 << 3
PAGE_IS_SOFT_DIRTY: Final = 1 << 7
PAGE_IS_SWAPPED: Final = 1 << 4
PAGE_IS_WPALLOWED: Final = 1 << 0
PAGE_IS_WRITTEN: Final = 1 << 1

PM_SCAN_CHECK_WPASYNC: Final = 1 << 1
PM_SCAN_WP_MATCHING: Final = 1 << 0

# Documentation/admin-guide/mm/pagemap.rst: bits of a 64-bit pagemap entry
PM_FILE: Final = 1 << 61
PM_MMAP_EXCLUSIVE: Final = 1 << 56
PM_PRESENT: Final = 1 << 63
PM_SOFT_DIRTY: Final = 1 << 55
PM_SWAP: Final = 1 << 62
PM_UFFD_WP: Final = 1 << 57

DEFAULT_VEC_LEN: Final = 8192
"""Regions a scan can return per ioctl (192 KiB): few calls for scattered memory, still warm in L2."""
MUCH: Final = 3 * DEFAULT_VEC_LEN
"""Words of what was found that are handed over at once."""


class page_region(ctypes.Structure):
    """include/uapi/linux/fs.h"""

    _fields_ = [("start", c_uint64), ("end", c_uint64), ("categories", c_uint64)]


class pm_scan_arg(ctypes.Structure):
    """include/uapi/linux/fs.h"""

    size: int
    flags: int
    start: int
    end: int
    walk_end: int
    vec: int
    vec_len: int
    max_pages: int
    category_inverted: int
    category_mask: int
    category_anyof_mask: int
    return_mask: int

    _fields_ = [
        ("size", c_uint64),
        ("flags", c_uint64),
        ("start", c_uint64),
        ("end", c_uint64),
        ("walk_end", c_uint64),
        ("vec", c_uint64),
        ("vec_len", c_uint64),
        ("max_pages", c_uint64),
        ("category_inverted", c_uint64),
        ("category_mask", c_uint64),
        ("category_anyof_mask", c_uint64),
        ("return_mask", c_uint64),
    ]


PAGEMAP_SCAN: Final = _IOWR("f", 16, pm_scan_arg)

_ioctl = libc["ioctl"]
_ioctl.argtypes = (c_int, c_ulong, c_void_p)
_ioctl.restype = c_int


class PagemapScanner:
    """Scans the page tables of one process. Owns its fd of /proc/PID/pagemap and a warm vector; not thread safe.

    The fd pins the address space that was there at open: it does not follow an exec of the target.
    """

    def __init__(self, pid: int, *, vec_len: int = DEFAULT_VEC_LEN) -> None:
        self.pid = pid
        self.fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self._vec = bytearray(vec_len * sizeof(page_region))
        self._pin = (ctypes.c_char * len(self._vec)).from_buffer(self._vec)
        self._view = memoryview(self._vec)
        self._arg = pm_scan_arg(
            size=sizeof(pm_scan_arg), vec=addressof(self._pin), vec_len=vec_len
        )
        self._address = addressof(self._arg)

    def __enter__(self) -> PagemapScanner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the fd; closing twice is harmless."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def is_alive(self) -> bool:
        """Say whether the address space is still somebody's: False once the process exited or called exec."""
        return bool(os.pread(self.fd, 8, 8))

    def scan(
        self,
        start: int,
        end: int,
        *,
        flags: int = 0,
        category_mask: int = 0,
        category_inverted: int = 0,
        category_anyof_mask: int = 0,
        return_mask: int,
    ) -> array[int]:
        """Return the matching regions of [start, end) as flat triples start, end, categories.

        Sorted, and coalesced where neighbours have equal categories (of ``return_mask``); holes are skipped. The
        kernel's fast path needs category_mask == return_mask == PAGE_IS_WRITTEN and nothing else (flags are free).

        :raises PermissionError: under PM_SCAN_CHECK_WPASYNC a VMA in the range is not registered with an asynchronous
            userfaultfd. With PM_SCAN_WP_MATCHING what lies before it may already be protected and its report is lost:
            the caller must take all of [start, end) as written.
        :raises ProcessLookupError: the address space is gone (kernels may also find nothing instead).
        """
        found, refused = self.scan_each(
            ((start, end),),
            flags=flags,
            category_mask=category_mask,
            category_inverted=category_inverted,
            category_anyof_mask=category_anyof_mask,
            return_mask=return_mask,
        )
        if refused:
            raise os_error(errno.EPERM, "ioctl(PAGEMAP_SCAN)", self.pid, start, end)
        return found

    def scan_each(
        self,
        ranges: Iterable[tuple[int, int]],
        *,
        flags: int = 0,
        category_mask: int = 0,
        category_inverted: int = 0,
        category_anyof_mask: int = 0,
        return_mask: int,
        into: Callable[[array[int]], object] | None = None,
    ) -> tuple[array[int], list[tuple[int, int]]]:
        """Scan several ranges, in order, with little between the system calls.

        Returns what scan() does, and those of the ranges that it would raise PermissionError for. `into` is given what
        has been found whenever that is much, and it is not returned then; a region may be cut in two there.
        """
        arg, fd, address = self._arg, self.fd, self._address
        arg.flags = flags
        arg.category_inverted = category_inverted
        arg.category_mask = category_mask
        arg.category_anyof_mask = category_anyof_mask
        arg.return_mask = return_mask
        found: array[int] = array("Q")
        refused: list[tuple[int, int]] = []
        for start, end in ranges:
            arg.end = end
            while start < end:
                arg.start = start
                nr = _ioctl(fd, PAGEMAP_SCAN, address)
                if nr < 0:
                    if (err := ctypes.get_errno()) != errno.EPERM:
                        raise os_error(err, "ioctl(PAGEMAP_SCAN)", self.pid, start, end)
                    refused.append((start, end))
                    break
                if nr:
                    self._append(found, nr)
                    if into is not None and len(found) >= MUCH:
                        into(found)
                        found = array("Q")
                start = arg.walk_end
        return found, refused

    def _append(self, found: array[int], nr: int) -> None:
        nr_before = len(found)
        found.frombytes(self._view[: nr * 24])
        # A full vector may cut a region in two: join the halves.
        if (
            nr_before
            and found[nr_before] == found[nr_before - 2]
            and found[nr_before + 2] == found[nr_before - 1]
        ):
            found[nr_before - 2] = found[nr_before + 1]
            del found[nr_before : nr_before + 3]


def read_entries(pid: int, start: int, end: int) -> array[int]:
    """Return the 64-bit pagemap entries (PM_*) of the pages of [start, end); slow, for tests and diagnosis."""
    page = os.sysconf("SC_PAGE_SIZE")
    entries: array[int] = array("Q")
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        offset, last = start // page * 8, end // page * 8
        while offset < last:
            data = os.pread(fd, last - offset, offset)
            if not data:
                break
            entries.frombytes(data)
            offset += len(data)
    finally:
        os.close(fd)
    return entries
