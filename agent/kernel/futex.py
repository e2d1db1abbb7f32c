"""Futex operation numbers and the robust list.

Addresses are target addresses. Sources: include/uapi/linux/futex.h, get_robust_list(2).
"""

from __future__ import annotations

from ctypes import addressof, c_size_t, c_uint64
from typing import Final, NamedTuple

from agent.kernel.libc import syscall
from agent.kernel.syscalls import NR_get_robust_list

FUTEX_CLOCK_REALTIME: Final = 256
FUTEX_CMP_REQUEUE: Final = 4
FUTEX_CMP_REQUEUE_PI: Final = 12
FUTEX_LOCK_PI: Final = 6
FUTEX_LOCK_PI2: Final = 13
FUTEX_PRIVATE_FLAG: Final = 128
FUTEX_REQUEUE: Final = 3
FUTEX_TRYLOCK_PI: Final = 8
FUTEX_UNLOCK_PI: Final = 7
FUTEX_WAIT: Final = 0
FUTEX_WAIT_BITSET: Final = 9
FUTEX_WAIT_REQUEUE_PI: Final = 11
FUTEX_WAKE: Final = 1
FUTEX_WAKE_BITSET: Final = 10
FUTEX_WAKE_OP: Final = 5
FUTEX_CMD_MASK: Final = ~(FUTEX_PRIVATE_FLAG | FUTEX_CLOCK_REALTIME)

ROBUST_LIST_HEAD_BYTES: Final = 24
"""The only length that set_robust_list(2) accepts on 64-bit machines."""


class RobustList(NamedTuple):
    """Head of a thread's list of robust futexes: target address (0: none) and length of the head."""

    head: int
    length: int


def get_robust_list(tid: int) -> RobustList:
    """Return the robust list of a thread; 0 is the caller.

    :raises PermissionError: no ptrace access.
    """
    head, length = c_uint64(), c_size_t()
    syscall(NR_get_robust_list, tid, addressof(head), addressof(length))
    return RobustList(head.value, length.value)
