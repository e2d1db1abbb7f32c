"""Timers: the structures of timer_create(2), timer_settime(2), setitimer(2) and timerfd_settime(2).

Sources: include/uapi/linux/time_types.h, include/uapi/asm-generic/siginfo.h.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_uint64
from typing import Final

CLOCK_BOOTTIME: Final = 7
CLOCK_BOOTTIME_ALARM: Final = 9
CLOCK_MONOTONIC: Final = 1
CLOCK_PROCESS_CPUTIME_ID: Final = 2
CLOCK_REALTIME: Final = 0
CLOCK_REALTIME_ALARM: Final = 8
CLOCK_TAI: Final = 11
CLOCK_THREAD_CPUTIME_ID: Final = 3

ITIMER_PROF: Final = 2
ITIMER_REAL: Final = 0
ITIMER_VIRTUAL: Final = 1

SIGEV_NONE: Final = 1
SIGEV_SIGNAL: Final = 0
SIGEV_THREAD: Final = 2
SIGEV_THREAD_ID: Final = 4

TFD_TIMER_ABSTIME: Final = 1 << 0
TFD_TIMER_CANCEL_ON_SET: Final = 1 << 1
TIMER_ABSTIME: Final = 1

NS_PER_S: Final = 1_000_000_000


class timespec(ctypes.Structure):
    """include/uapi/linux/time_types.h, struct __kernel_timespec"""

    _fields_ = [("tv_sec", c_int64), ("tv_nsec", c_int64)]

    @classmethod
    def from_ns(cls, ns: int) -> timespec:
        """Return the structure for a time in ns."""
        return cls(*divmod(ns, NS_PER_S))

    @property
    def ns(self) -> int:
        """The time in ns."""
        total: int = self.tv_sec * NS_PER_S + self.tv_nsec
        return total


class itimerspec(ctypes.Structure):
    """include/uapi/linux/time_types.h, struct __kernel_itimerspec"""

    _fields_ = [("it_interval", timespec), ("it_value", timespec)]


class timeval(ctypes.Structure):
    """include/uapi/linux/time_types.h, struct __kernel_old_timeval"""

    _fields_ = [("tv_sec", c_int64), ("tv_usec", c_int64)]


class itimerval(ctypes.Structure):
    """include/uapi/linux/time.h"""

    _fields_ = [("it_interval", timeval), ("it_value", timeval)]


class sigevent(ctypes.Structure):
    """include/uapi/asm-generic/siginfo.h, 64 bytes; ``tid`` counts with SIGEV_THREAD_ID."""

    _fields_ = [
        ("sigev_value", c_uint64),
        ("sigev_signo", c_int32),
        ("sigev_notify", c_int32),
        ("sigev_notify_thread_id", c_int32),
        ("_pad", c_int32 * 11),
    ]
