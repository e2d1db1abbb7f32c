"""What the running kernel can do, found out by trying each call once.

Release strings are never compared: distributions backport, and kernels are built without options. An errno that means
"unsupported" becomes a missing feature with a reason; any other error is a surprise and is raised. Probing changes
nothing outside this process and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from agent.kernel import kcmp, mman, pagemap, pidfd, prctl, uffd

_PAGE: Final = 4096
_UNSUPPORTED: Final = frozenset(
    (errno.ENOSYS, errno.ENOTTY, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOENT)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFeatures:
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
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def has_scan_tracking(self) -> bool:
        """Whether written pages can be tracked by PAGEMAP_SCAN and asynchronous write protection."""
        return self.has_pagemap_scan and self.has_uffd_wp_async and self.has_uffd_wp_unpopulated


@contextlib.contextmanager
def _scratch_pages(nr: int, touched: int) -> _Scratch:
    flags = mman.MAP_PRIVATE | mman.MAP_ANONYMOUS
    prot = mman.PROT_READ | mman.PROT_WRITE
    address = mman.mmap(0, nr * _PAGE, prot, flags)
    try:
        if touched:
            mman.madvise(address, touched * _PAGE, mman.MADV_POPULATE_WRITE)
        yield address
    finally:
        mman.munmap(address, nr * _PAGE)
