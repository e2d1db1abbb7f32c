"""Blocking system calls: what a stop does to each, and which of its arguments is the time limit or another signal mask.

Sources: signal(7), kernel/signal.c, fs/select.c, fs/eventpoll.c, ipc/sem.c, kernel/futex/waitwake.c.
"""

from __future__ import annotations

import errno
import time
from typing import Final

from agent.kernel import syscalls as nr
from agent.kernel.futex import (
    FUTEX_CLOCK_REALTIME,
    FUTEX_CMD_MASK,
    FUTEX_PRIVATE_FLAG,
    FUTEX_WAIT,
    FUTEX_WAIT_BITSET,
)

_TIMER_ABSTIME: Final = 1

EINTR_CALLS: Final = frozenset(
    (
        nr.NR_accept, nr.NR_accept4, nr.NR_connect, nr.NR_epoll_pwait, nr.NR_epoll_pwait2, nr.NR_epoll_wait,
        nr.NR_io_getevents, nr.NR_io_pgetevents, nr.NR_read, nr.NR_readv, nr.NR_recvfrom, nr.NR_recvmmsg,
        nr.NR_recvmsg, nr.NR_rt_sigtimedwait, nr.NR_semop, nr.NR_semtimedop, nr.NR_sendmmsg, nr.NR_sendmsg,
        nr.NR_sendto, nr.NR_write, nr.NR_writev,
    )
)  # fmt: skip
"""Calls that may return EINTR after a stop and that did nothing when they do, so that calling again is right."""

EINTR_PRONE: Final = EINTR_CALLS - {nr.NR_read, nr.NR_readv, nr.NR_write, nr.NR_writev}
RESTARTS_WELL: Final = frozenset(
    (nr.NR_futex, nr.NR_read, nr.NR_readv, nr.NR_wait4, nr.NR_waitid, nr.NR_nanosleep, nr.NR_clock_nanosleep)
)
MASK_ARGUMENT: Final = {
    nr.NR_epoll_pwait: 4,
    nr.NR_epoll_pwait2: 4,
    nr.NR_io_pgetevents: 5,
    nr.NR_ppoll: 3,
    nr.NR_pselect6: 5,
    nr.NR_rt_sigsuspend: 0,
}
"""Calls that swap the signal mask while they sleep: which argument points to the other mask."""

MILLISECONDS_ARGUMENT: Final = {nr.NR_epoll_wait: 3, nr.NR_epoll_pwait: 3, nr.NR_poll: 2}
TIMESPEC_ARGUMENT: Final = {
    nr.NR_nanosleep: 0,
    nr.NR_clock_nanosleep: 2,
    nr.NR_futex: 3,
    nr.NR_semtimedop: 3,
    nr.NR_rt_sigtimedwait: 2,
    nr.NR_epoll_pwait2: 3,
}
TIMEOUT_RESULT: Final = {
    nr.NR_epoll_wait: 0,
    nr.NR_epoll_pwait: 0,
    nr.NR_epoll_pwait2: 0,
    nr.NR_semtimedop: -errno.EAGAIN,
    nr.NR_rt_sigtimedwait: -errno.EAGAIN,
}
REMAINDER_ARGUMENT: Final = {nr.NR_nanosleep: 1, nr.NR_clock_nanosleep: 3}
RESTART_BLOCK_CALLS: Final = (nr.NR_nanosleep, nr.NR_clock_nanosleep, nr.NR_poll, nr.NR_futex)
TIMED_CALLS: Final = frozenset((*MILLISECONDS_ARGUMENT, *TIMESPEC_ARGUMENT))

LOWEST_ADDRESS: Final = 4096
"""No pointer is below, and above no clock number but the negative ones of CPU clocks."""
CPU_CLOCKS: Final = (time.CLOCK_PROCESS_CPUTIME_ID, time.CLOCK_THREAD_CPUTIME_ID)


def has_limit(number: int, args: tuple[int, ...]) -> bool:
    """Tell whether a call of TIMED_CALLS was given a time limit that ends at a time to be known."""
    if number in MILLISECONDS_ARGUMENT:
        return signed_int(args[MILLISECONDS_ARGUMENT[number]]) > 0
    if number == nr.NR_clock_nanosleep:
        # Nobody knows when a sleep by CPU time ends: it begins anew.
        clock = signed_int(args[0])
        if args[1] & _TIMER_ABSTIME or clock < 0 or clock in CPU_CLOCKS:
            return False
    if number == nr.NR_futex and signed_int(args[1]) & FUTEX_CMD_MASK != FUTEX_WAIT:
        return False
    return args[TIMESPEC_ARGUMENT[number]] != 0


def has_time_limit(number: int, args: tuple[int, ...]) -> bool:
    """The same of any call."""
    return number in TIMED_CALLS and has_limit(number, args)


def takes_nothing(number: int, args: tuple[int, ...]) -> bool:
    """Tell whether a call does nothing but wait, for a time on a clock or for a thread of the same process.

    Whoever leaves it by itself has taken nothing that others could miss, and written nothing.
    """
    if number == nr.NR_futex:
        operation = signed_int(args[1]) & ~FUTEX_CLOCK_REALTIME
        waits = operation in (FUTEX_WAIT | FUTEX_PRIVATE_FLAG, FUTEX_WAIT_BITSET | FUTEX_PRIVATE_FLAG)
        return waits and not has_limit(number, args)
    if number != nr.NR_clock_nanosleep or not args[1] & _TIMER_ABSTIME:
        return False
    clock = signed_int(args[0])
    return clock >= 0 and clock not in CPU_CLOCKS


def end_of(number: int, args: tuple[int, ...]) -> tuple[int, int] | None:
    """Return the clock, and the address of the time on it, at which a call that takes_nothing() ends; None: never."""
    if number == nr.NR_clock_nanosleep:
        return signed_int(args[0]), args[2]
    if not args[3]:
        return None
    return time.CLOCK_REALTIME if args[1] & FUTEX_CLOCK_REALTIME else time.CLOCK_MONOTONIC, args[3]


def signed_int(value: int) -> int:
    """Return an argument that the kernel takes as a C int."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value
