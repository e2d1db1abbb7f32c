"""What the running kernel can do, found out by trying each call once.

Release strings are never compared: distributions backport, kernels are built without options, and sandboxes
filter system calls. An errno that means "not here" becomes a missing feature with a reason; any other error is a
surprise and is raised. Probing changes nothing outside this process and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

from agent.kernel import kcmp, mman, pagemap, pidfd, prctl, uffd

_PAGE: Final = 4096
# EPERM is what the system call filters of containers answer.
_UNSUPPORTED: Final = frozenset(
    (errno.ENOSYS, errno.ENOTTY, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOENT, errno.EPERM)
)


class KernelFeatures(NamedTuple):
    """What there is; ``reasons`` says, by field name, why something is missing."""

    has_guard_pages: bool
    has_kcmp: bool
    has_mseal: bool
    has_pagemap_scan: bool
    has_pidfd_getfd: bool
    has_soft_dirty: bool
    has_time_ns: bool
    has_timer_restore_ids: bool
    has_uffd: bool
    has_uffd_wp_async: bool
    has_uffd_wp_shmem: bool
    has_uffd_wp_unpopulated: bool
    uffd_features: int
    """Every UFFD_FEATURE_* of the kernel, 0 without userfaultfd."""
    reasons: Mapping[str, str] = MappingProxyType({})

    @property
    def has_scan_tracking(self) -> bool:
        """Whether written pages can be tracked by PAGEMAP_SCAN and asynchronous write protection."""
        return self.has_pagemap_scan and self.has_uffd_wp_async and self.has_uffd_wp_unpopulated


@contextlib.contextmanager
def _scratch_page() -> Iterator[int]:
    # One page that is populated.
    prot = mman.PROT_READ | mman.PROT_WRITE
    address = mman.mmap(0, _PAGE, prot, mman.MAP_PRIVATE | mman.MAP_ANONYMOUS)
    try:
        ctypes.memset(address, 1, 1)
        yield address
    finally:
        mman.munmap(address, _PAGE)


def _try_guard_pages() -> str:
    with _scratch_page() as address:
        mman.madvise(address, _PAGE, mman.MADV_GUARD_INSTALL)
    return ""


def _try_kcmp() -> str:
    pid = os.getpid()
    equal = kcmp.kcmp(pid, pid, kcmp.KCMP_VM) == 0
    return "" if equal else "a process is not equal to itself"


def _try_mseal() -> str:
    mman.mseal(0, 0)  # no bytes: nothing is sealed
    return ""


def _try_pagemap_scan() -> str:
    with _scratch_page() as address, pagemap.PagemapScanner(os.getpid(), vec_len=1) as scanner:
        present = pagemap.PAGE_IS_PRESENT
        found = scanner.scan(
            address, address + _PAGE, category_mask=present, return_mask=present
        )
    return "" if list(found) == [address, address + _PAGE, present] else f"strange answer {found}"


def _try_pidfd_getfd() -> str:
    with contextlib.ExitStack() as stack:
        own = os.pidfd_open(os.getpid())
        stack.callback(os.close, own)
        stack.callback(os.close, pidfd.pidfd_getfd(own, own))
    return ""


def _try_soft_dirty() -> str:
    # A fresh mapping counts as dirty, so clear_refs need not be touched.
    with _scratch_page() as address:
        (entry,) = pagemap.read_entries(os.getpid(), address, address + _PAGE)
    return "" if entry & pagemap.PM_SOFT_DIRTY else "kernel built without CONFIG_MEM_SOFT_DIRTY"


def _try_time_ns() -> str:
    os.stat("/proc/self/ns/time_for_children")
    return ""


def _try_timer_restore_ids() -> str:
    # Since Linux kernel commit ec2d0c04624b ("posix-timers: Provide a mechanism to allocate a given timer ID")
    # (in v6.15).
    prctl.prctl(prctl.PR_TIMER_CREATE_RESTORE_IDS, prctl.PR_TIMER_CREATE_RESTORE_IDS_GET)
    return ""


def _uffd_features() -> int:
    fd = uffd.userfaultfd(os.O_CLOEXEC | uffd.UFFD_USER_MODE_ONLY)
    try:
        return uffd.api(fd, 0)
    finally:
        os.close(fd)


@functools.cache
def kernel_features() -> KernelFeatures:
    """Probe the running kernel; the answer is kept for the life of this process."""
    reasons: dict[str, str] = {}

    def has(name: str, probe: Callable[[], str]) -> bool:
        try:
            reason = probe()
        except OSError as err:
            if err.errno not in _UNSUPPORTED:
                raise
            reason = str(err.strerror)
        if reason:
            reasons[name] = reason
        return not reason

    features = 0

    def try_uffd() -> str:
        nonlocal features
        features = _uffd_features()
        return ""

    def feature(bit: int) -> Callable[[], str]:
        return lambda: "" if features & bit else "the kernel's userfaultfd does not offer it"

    return KernelFeatures(
        has_guard_pages=has("has_guard_pages", _try_guard_pages),
        has_kcmp=has("has_kcmp", _try_kcmp),
        has_mseal=has("has_mseal", _try_mseal),
        has_pagemap_scan=has("has_pagemap_scan", _try_pagemap_scan),
        has_pidfd_getfd=has("has_pidfd_getfd", _try_pidfd_getfd),
        has_soft_dirty=has("has_soft_dirty", _try_soft_dirty),
        has_time_ns=has("has_time_ns", _try_time_ns),
        has_timer_restore_ids=has("has_timer_restore_ids", _try_timer_restore_ids),
        has_uffd=has("has_uffd", try_uffd),
        has_uffd_wp_async=has("has_uffd_wp_async", feature(uffd.UFFD_FEATURE_WP_ASYNC)),
        has_uffd_wp_shmem=has("has_uffd_wp_shmem", feature(uffd.UFFD_FEATURE_WP_HUGETLBFS_SHMEM)),
        has_uffd_wp_unpopulated=has(
            "has_uffd_wp_unpopulated", feature(uffd.UFFD_FEATURE_WP_UNPOPULATED)
        ),
        uffd_features=features,
        reasons=reasons,
    )
