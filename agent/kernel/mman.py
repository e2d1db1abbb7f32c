"""Memory mapping constants and calls beyond the standard library's mmap.

Sources: include/uapi/asm-generic/mman-common.h, include/uapi/asm-generic/mman.h, include/uapi/linux/mman.h,
arch/x86/include/uapi/asm/mman.h, mmap(2), madvise(2), mremap(2), mseal(2), process_madvise(2).
"""

from __future__ import annotations

import ctypes
from array import array
from ctypes import c_int, c_size_t, c_uint64, c_void_p
from typing import Final

from agent.kernel.libc import check, libc, os_error, syscall
from agent.kernel.syscalls import NR_mseal, NR_process_madvise

PROT_EXEC: Final = 0x4
PROT_NONE: Final = 0x0
PROT_READ: Final = 0x1
PROT_WRITE: Final = 0x2

MAP_ANONYMOUS: Final = 0x20
MAP_DENYWRITE: Final = 0x0800
MAP_DROPPABLE: Final = 0x08
MAP_FIXED: Final = 0x10
MAP_FIXED_NOREPLACE: Final = 0x100000
MAP_GROWSDOWN: Final = 0x0100
MAP_HUGETLB: Final = 0x40000
MAP_LOCKED: Final = 0x2000
MAP_NORESERVE: Final = 0x4000
MAP_POPULATE: Final = 0x008000
MAP_PRIVATE: Final = 0x02
MAP_SHARED: Final = 0x01
MAP_SHARED_VALIDATE: Final = 0x03
MAP_STACK: Final = 0x20000
MAP_SYNC: Final = 0x080000

MREMAP_DONTUNMAP: Final = 4
MREMAP_FIXED: Final = 2
MREMAP_MAYMOVE: Final = 1

MADV_COLLAPSE: Final = 25
MADV_DODUMP: Final = 17
MADV_DOFORK: Final = 11
MADV_DONTDUMP: Final = 16
MADV_DONTFORK: Final = 10
MADV_DONTNEED: Final = 4
MADV_FREE: Final = 8
MADV_GUARD_INSTALL: Final = 102
MADV_GUARD_REMOVE: Final = 103
MADV_HUGEPAGE: Final = 14
MADV_KEEPONFORK: Final = 19
MADV_MERGEABLE: Final = 12
MADV_NOHUGEPAGE: Final = 15
MADV_NORMAL: Final = 0
MADV_PAGEOUT: Final = 21
MADV_POPULATE_READ: Final = 22
MADV_POPULATE_WRITE: Final = 23
MADV_RANDOM: Final = 1
MADV_REMOVE: Final = 9
MADV_SEQUENTIAL: Final = 2
MADV_UNMERGEABLE: Final = 13
MADV_WILLNEED: Final = 3
MADV_WIPEONFORK: Final = 18

MLOCK_ONFAULT: Final = 0x01
MCL_FUTURE: Final = 2
MCL_ONFAULT: Final = 4

_MAP_FAILED: Final = 2**64 - 1

_mmap = libc["mmap"]
_mmap.argtypes = (c_void_p, c_size_t, c_int, c_int, c_int, c_uint64)
_mmap.restype = c_void_p
_munmap = libc["munmap"]
_munmap.argtypes = (c_void_p, c_size_t)
_mprotect = libc["mprotect"]
_mprotect.argtypes = (c_void_p, c_size_t, c_int)
_madvise = libc["madvise"]
_madvise.argtypes = (c_void_p, c_size_t, c_int)
_mremap = libc["mremap"]
_mremap.argtypes = (c_void_p, c_size_t, c_size_t, c_int, c_void_p)
_mremap.restype = c_void_p


def _mapped(address: int | None, what: str, *facts: object) -> int:
    if address == _MAP_FAILED or address is None:
        raise os_error(ctypes.get_errno(), what, *facts)
    return address


def mmap(
    address: int, length: int, prot: int, flags: int, fd: int = -1, offset: int = 0
) -> int:
    """Map memory in this process and return its address (never 0)."""
    found = _mmap(address, length, prot, flags, fd, offset)
    return _mapped(found, "mmap", address, length)


def munmap(address: int, length: int) -> None:
    """Unmap memory of this process."""
    check(_munmap(address, length), "munmap", address, length)


def mprotect(address: int, length: int, prot: int) -> None:
    """Change the protection of memory of this process."""
    check(_mprotect(address, length, prot), "mprotect", address, length, prot)


def madvise(address: int, length: int, advice: int) -> None:
    """Advise on memory of this process (MADV_*)."""
    check(_madvise(address, length, advice), "madvise", address, length, advice)


def process_madvise(pidfd: int, vectors: array[int], advice: int) -> int:
    """Advise on memory of another process: pairs (address, length), at most 1024; returns the bytes it was done for.

    MADV_COLLAPSE: since Linux kernel commit 7d8faaf15545 ("mm/madvise: introduce MADV_COLLAPSE sync
    hugepage collapse") (in v6.1).

    :raises OSError: it could be done for none: EINVAL also where the kernel does not know the advice; EPERM, ENOSYS.
    """
    return syscall(NR_process_madvise, pidfd, vectors.buffer_info()[0], len(vectors) // 2, advice, 0)


def mremap(
    old: int, old_length: int, new_length: int, flags: int = 0, new: int = 0
) -> int:
    """Grow, shrink or move memory of this process and return its address."""
    found = _mremap(old, old_length, new_length, flags, new)
    return _mapped(found, "mremap", old, old_length, new_length)


def mseal(address: int, length: int) -> None:
    """Seal mappings against unmapping, moving and changes of protection.

    Since Linux kernel commit 8be7258aad44 ("mseal: add mseal syscall") (in v6.10).
    """
    syscall(NR_mseal, address, length, 0)
