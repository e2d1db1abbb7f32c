"""userfaultfd(2): creation, and the ioctls that tracking needs.

A userfaultfd belongs to the address space of the process that made it; the fd may then be used from anywhere (fetched
by pidfd_getfd). Addresses are those of that address space. Must never read events: Ferry's trackers do that.
Sources: include/uapi/linux/userfaultfd.h, ioctl_userfaultfd(2).
"""

from __future__ import annotations

import ctypes
from ctypes import addressof, c_int64, c_uint64
from typing import Final

from agent.kernel.ioctl import _IO, _IOR, _IOWR, ioctl
from agent.kernel.libc import syscall
from agent.kernel.syscalls import NR_userfaultfd

UFFD_API: Final = 0xAA

UFFD_EVENT_FORK: Final = 0x13
UFFD_EVENT_PAGEFAULT: Final = 0x12
UFFD_EVENT_REMAP: Final = 0x14
UFFD_EVENT_REMOVE: Final = 0x15
UFFD_EVENT_UNMAP: Final = 0x16

UFFD_FEATURE_EVENT_FORK: Final = 1 << 1
UFFD_FEATURE_EVENT_REMAP: Final = 1 << 2
UFFD_FEATURE_EVENT_REMOVE: Final = 1 << 3
UFFD_FEATURE_EVENT_UNMAP: Final = 1 << 6
UFFD_FEATURE_EXACT_ADDRESS: Final = 1 << 11
UFFD_FEATURE_MINOR_HUGETLBFS: Final = 1 << 9
UFFD_FEATURE_MINOR_SHMEM: Final = 1 << 10
UFFD_FEATURE_MISSING_HUGETLBFS: Final = 1 << 4
UFFD_FEATURE_MISSING_SHMEM: Final = 1 << 5
UFFD_FEATURE_MOVE: Final = 1 << 16
UFFD_FEATURE_PAGEFAULT_FLAG_WP: Final = 1 << 0
UFFD_FEATURE_POISON: Final = 1 << 14
UFFD_FEATURE_SIGBUS: Final = 1 << 7
UFFD_FEATURE_THREAD_ID: Final = 1 << 8
UFFD_FEATURE_WP_ASYNC: Final = 1 << 15
UFFD_FEATURE_WP_HUGETLBFS_SHMEM: Final = 1 << 12
UFFD_FEATURE_WP_UNPOPULATED: Final = 1 << 13

UFFD_PAGEFAULT_FLAG_MINOR: Final = 1 << 2
UFFD_PAGEFAULT_FLAG_WP: Final = 1 << 1
UFFD_PAGEFAULT_FLAG_WRITE: Final = 1 << 0

UFFD_USER_MODE_ONLY: Final = 1

UFFDIO_REGISTER_MODE_MINOR: Final = 1 << 2
UFFDIO_REGISTER_MODE_MISSING: Final = 1 << 0
UFFDIO_REGISTER_MODE_WP: Final = 1 << 1
UFFDIO_WRITEPROTECT_MODE_DONTWAKE: Final = 1 << 1
UFFDIO_WRITEPROTECT_MODE_WP: Final = 1 << 0

UFFD_FEATURES_SCAN: Final = (
    UFFD_FEATURE_PAGEFAULT_FLAG_WP
    | UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    | UFFD_FEATURE_WP_UNPOPULATED
    | UFFD_FEATURE_WP_ASYNC
)
"""What tracking by PAGEMAP_SCAN asks for."""
UFFD_FEATURES_LOG: Final = (
    UFFD_FEATURE_PAGEFAULT_FLAG_WP
    | UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    | UFFD_FEATURE_EVENT_FORK
    | UFFD_FEATURE_EVENT_REMAP
    | UFFD_FEATURE_EVENT_REMOVE
    | UFFD_FEATURE_EVENT_UNMAP
)
"""What tracking by a log asks for. Without WP_UNPOPULATED: anonymous memory that is not populated gets no markers."""


class uffdio_api(ctypes.Structure):
    """include/uapi/linux/userfaultfd.h"""

    _fields_ = [("api", c_uint64), ("features", c_uint64), ("ioctls", c_uint64)]


class uffdio_range(ctypes.Structure):
    """include/uapi/linux/userfaultfd.h"""

    _fields_ = [("start", c_uint64), ("len", c_uint64)]


class uffdio_register(ctypes.Structure):
    """include/uapi/linux/userfaultfd.h"""

    _fields_ = [("range", uffdio_range), ("mode", c_uint64), ("ioctls", c_uint64)]


class uffdio_writeprotect(ctypes.Structure):
    """include/uapi/linux/userfaultfd.h"""

    _fields_ = [("range", uffdio_range), ("mode", c_uint64)]


class uffdio_zeropage(ctypes.Structure):
    """include/uapi/linux/userfaultfd.h"""

    _fields_ = [("range", uffdio_range), ("mode", c_uint64), ("zeropage", c_int64)]


class uffdio_copy(ctypes.Structure):
    """include/uapi/linux/userfaultfd.h"""

    _fields_ = [
        ("dst", c_uint64),
        ("src", c_uint64),
        ("len", c_uint64),
        ("mode", c_uint64),
        ("copy", c_int64),
    ]


UFFDIO_API: Final = _IOWR(0xAA, 0x3F, uffdio_api)
UFFDIO_COPY: Final = _IOWR(0xAA, 0x03, uffdio_copy)
UFFDIO_REGISTER: Final = _IOWR(0xAA, 0x00, uffdio_register)
UFFDIO_UNREGISTER: Final = _IOR(0xAA, 0x01, uffdio_range)
UFFDIO_WAKE: Final = _IOR(0xAA, 0x02, uffdio_range)
UFFDIO_WRITEPROTECT: Final = _IOWR(0xAA, 0x06, uffdio_writeprotect)
UFFDIO_ZEROPAGE: Final = _IOWR(0xAA, 0x04, uffdio_zeropage)
USERFAULTFD_IOC_NEW: Final = _IO(0xAA, 0x00)
"""Of /dev/userfaultfd; the argument is the flags themselves. Since Linux kernel commit 2d5de004e009 ("userfaultfd: add
/dev/userfaultfd for fine grained access control") (in v6.1)."""


def userfaultfd(flags: int) -> int:
    """Create a userfaultfd for this process; ``flags``: O_CLOEXEC, O_NONBLOCK, UFFD_USER_MODE_ONLY."""
    return syscall(NR_userfaultfd, flags)


def api(fd: int, features: int) -> int:
    """Agree on the API and return every feature the kernel has.

    Once per userfaultfd. :raises OSError: EINVAL when a wanted feature is unknown (the fd can then be tried again).
    """
    arg = uffdio_api(UFFD_API, features, 0)
    ioctl(fd, UFFDIO_API, addressof(arg), "ioctl(UFFDIO_API)", features)
    available: int = arg.features
    return available


def register(fd: int, start: int, length: int, mode: int) -> int:
    """Register a range and return the bit set of ioctls it allows (0 when unchanged).

    :raises OSError: EINVAL: a VMA that cannot be tracked; EPERM: read-only shared file mapping; EBUSY: another
        userfaultfd has part of it; ENOENT: nothing mapped at ``start`` (or ENOMEM: the target is gone).
    """
    arg = uffdio_register(uffdio_range(start, length), mode, 0)
    ioctl(fd, UFFDIO_REGISTER, addressof(arg), "ioctl(UFFDIO_REGISTER)", start, start + length)
    ioctls: int = arg.ioctls
    return ioctls


def unregister(fd: int, start: int, length: int) -> None:
    """Forget a range: protection goes, VMAs can merge again. Not registered parts are ignored."""
    arg = uffdio_range(start, length)
    ioctl(fd, UFFDIO_UNREGISTER, addressof(arg), "ioctl(UFFDIO_UNREGISTER)", start, start + length)


def writeprotect(fd: int, start: int, length: int, on: bool) -> None:
    """Protect (or release) every page of a registered range, unpopulated ones too: costs page tables there."""
    mode = UFFDIO_WRITEPROTECT_MODE_WP if on else 0
    arg = uffdio_writeprotect(uffdio_range(start, length), mode)
    what = "ioctl(UFFDIO_WRITEPROTECT)"
    ioctl(fd, UFFDIO_WRITEPROTECT, addressof(arg), what, start, start + length)
