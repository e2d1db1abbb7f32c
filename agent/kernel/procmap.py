"""PROCMAP_QUERY: look up one mapping of a process, without the text of all of them.

Since Linux kernel commit ed5d583a88a9 ("fs/procfs: implement efficient VMA querying API for /proc/<pid>/maps") (in
v6.11). ABI: include/uapi/linux/fs.h, struct procmap_query. Addresses are target addresses.
"""

from __future__ import annotations

import ctypes
import errno
import os
from ctypes import addressof, c_uint32, c_uint64
from typing import Final

from agent.kernel.ioctl import _IOWR, ioctl


class procmap_query(ctypes.Structure):
    """struct procmap_query; `size` is that of this version."""

    _fields_ = [
        ("size", c_uint64),
        ("query_flags", c_uint64),
        ("query_addr", c_uint64),
        ("vma_start", c_uint64),
        ("vma_end", c_uint64),
        ("vma_flags", c_uint64),
        ("vma_page_size", c_uint64),
        ("vma_offset", c_uint64),
        ("inode", c_uint64),
        ("dev_major", c_uint32),
        ("dev_minor", c_uint32),
        ("vma_name_size", c_uint32),
        ("build_id_size", c_uint32),
        ("vma_name_addr", c_uint64),
        ("build_id_addr", c_uint64),
    ]


PROCMAP_QUERY_VMA_EXECUTABLE: Final = 0x04
PROCMAP_QUERY: Final = _IOWR("f", 17, procmap_query)


class ProcmapQuery:
    """Owns a descriptor of /proc/PID/maps; close() it."""

    def __init__(self, pid: int) -> None:
        self._fd = os.open(f"/proc/{pid}/maps", os.O_RDONLY | os.O_CLOEXEC)
        self._query = procmap_query(size=ctypes.sizeof(procmap_query))
        self._address = addressof(self._query)
        self._known = True

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def covering(self, vaddr: int) -> tuple[int, int] | None:
        """Return [start, end) of the mapping at ``vaddr``, or None: nothing there, or the kernel cannot tell."""
        if not self._known:
            return None
        self._query.query_addr = vaddr
        try:
            ioctl(self._fd, PROCMAP_QUERY, self._address, "ioctl(PROCMAP_QUERY)", vaddr)
        except OSError as err:
            self._known = err.errno != errno.ENOTTY  # ENOENT: nothing there
            return None
        return self._query.vma_start, self._query.vma_end

    @property
    def is_executable(self) -> bool:
        """Whether the mapping that covering() found may be executed."""
        return bool(self._query.vma_flags & PROCMAP_QUERY_VMA_EXECUTABLE)
