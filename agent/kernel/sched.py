"""Scheduling attributes: sched_getattr(2), sched_setattr(2), and I/O priorities.

Affinity has the standard library (os.sched_getaffinity). Times are nanoseconds.
Sources: include/uapi/linux/sched.h, include/uapi/linux/sched/types.h, include/uapi/linux/ioprio.h.
"""

from __future__ import annotations

import ctypes
from ctypes import addressof, c_int32, c_uint32, c_uint64, sizeof
from typing import Final

from agent.kernel.libc import syscall
from agent.kernel.syscalls import NR_ioprio_get, NR_ioprio_set, NR_sched_getattr, NR_sched_setattr

SCHED_BATCH: Final = 3
SCHED_DEADLINE: Final = 6
SCHED_EXT: Final = 7
SCHED_FIFO: Final = 1
SCHED_IDLE: Final = 5
SCHED_NORMAL: Final = 0
SCHED_RR: Final = 2

SCHED_FLAG_DL_OVERRUN: Final = 0x04
SCHED_FLAG_KEEP_PARAMS: Final = 0x10
SCHED_FLAG_KEEP_POLICY: Final = 0x08
SCHED_FLAG_RECLAIM: Final = 0x02
SCHED_FLAG_RESET_ON_FORK: Final = 0x01
SCHED_FLAG_UTIL_CLAMP_MAX: Final = 0x40
SCHED_FLAG_UTIL_CLAMP_MIN: Final = 0x20

IOPRIO_WHO_PROCESS: Final = 1


class sched_attr(ctypes.Structure):
    """include/uapi/linux/sched/types.h (56 bytes, with the utilization clamps)."""

    _fields_ = [
        ("size", c_uint32),
        ("sched_policy", c_uint32),
        ("sched_flags", c_uint64),
        ("sched_nice", c_int32),
        ("sched_priority", c_uint32),
        ("sched_runtime", c_uint64),
        ("sched_deadline", c_uint64),
        ("sched_period", c_uint64),
        ("sched_util_min", c_uint32),
        ("sched_util_max", c_uint32),
    ]


def getattr(tid: int) -> sched_attr:  # noqa: A001  # the kernel's name for it
    """Return the attributes of a thread; 0 is the caller."""
    attr = sched_attr(sizeof(sched_attr))
    syscall(NR_sched_getattr, tid, addressof(attr), sizeof(attr), 0)
    return attr


def setattr(tid: int, attr: sched_attr) -> None:  # noqa: A001
    """Set the attributes of a thread.

    :raises PermissionError: a real-time policy or a lower nice without CAP_SYS_NICE.
    """
    attr.size = sizeof(attr)
    syscall(NR_sched_setattr, tid, addressof(attr), 0)


def ioprio_get(tid: int) -> int:
    """Return the I/O priority of a thread: class << 13 | level."""
    return syscall(NR_ioprio_get, IOPRIO_WHO_PROCESS, tid)


def ioprio_set(tid: int, ioprio: int) -> None:
    """Set the I/O priority of a thread."""
    syscall(NR_ioprio_set, IOPRIO_WHO_PROCESS, tid, ioprio)
