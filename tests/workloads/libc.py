"""Raw system calls for workloads: no Python retry on EINTR, no hidden loops, the kernel's own result.

Numbers are those of x86_64 (asm/unistd_64.h). Independent of agent.kernel on purpose: a workload must not test
Ferry with Ferry's own tables.
"""

from __future__ import annotations

import ctypes
import errno
from typing import Any

NR_poll = 7
NR_mmap = 9
NR_mprotect = 10
NR_munmap = 11
NR_pselect6 = 270
NR_mremap = 25
NR_madvise = 28
NR_nanosleep = 35
NR_futex = 202
NR_timer_create = 222
NR_timer_settime = 223
NR_timer_gettime = 224
NR_timer_delete = 226
NR_clock_nanosleep = 230
NR_epoll_wait = 232
NR_ppoll = 271
NR_rt_sigqueueinfo = 129
NR_rt_tgsigqueueinfo = 297
NR_rt_sigtimedwait = 128
NR_sigaltstack = 131
NR_prctl = 157
NR_gettid = 186
NR_epoll_pwait2 = 441

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class timespec(ctypes.Structure):
    """struct timespec of linux/time_types.h."""

    _fields_ = [("tv_sec", ctypes.c_int64), ("tv_nsec", ctypes.c_int64)]


class itimerspec(ctypes.Structure):
    """struct itimerspec of linux/time.h."""

    _fields_ = [("it_interval", timespec), ("it_value", timespec)]


def seconds(value: float) -> timespec:
    """A timespec of so many seconds."""
    return timespec(int(value), int(round((value - int(value)) * 1e9)) % 1_000_000_000)


def syscall(number: int, *arguments: Any) -> int:
    """The system call's result; a negative errno when it fails."""
    words = [
        ctypes.c_long(word) if isinstance(word, int) else word for word in (number, *arguments)
    ]
    result: int = _libc.syscall(*words)
    return result if result != -1 else -ctypes.get_errno()


def name_of(result: int) -> str:
    """"0", "5" or "EINTR": how a result reads best."""
    return errno.errorcode.get(-result, str(result)) if result < 0 else str(result)
