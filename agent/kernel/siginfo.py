"""Signals as the kernel lays them out: siginfo_t, sigaction, sigaltstack, and signal sets as integers.

Raw siginfo (128 bytes) is what ptrace gives and rt_sigqueueinfo(2) takes; it is carried as it is.
Sources: include/uapi/asm-generic/siginfo.h, arch/x86/include/uapi/asm/signal.h.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable
from ctypes import c_int32, c_uint32, c_uint64
from typing import Final, NamedTuple

NSIG: Final = 64
SIGINFO_BYTES: Final = 128
SIGSET_BYTES: Final = 8
ALL_SIGNALS: Final = 2**64 - 1

SA_EXPOSE_TAGBITS: Final = 0x00000800
SA_NOCLDSTOP: Final = 0x00000001
SA_NOCLDWAIT: Final = 0x00000002
SA_NODEFER: Final = 0x40000000
SA_ONSTACK: Final = 0x08000000
SA_RESETHAND: Final = 0x80000000
SA_RESTART: Final = 0x10000000
SA_RESTORER: Final = 0x04000000
SA_SIGINFO: Final = 0x00000004
SIG_DFL: Final = 0
SIG_IGN: Final = 1

SIG_BLOCK: Final = 0
SIG_SETMASK: Final = 2
SIG_UNBLOCK: Final = 1

SI_ASYNCIO: Final = -4
SI_KERNEL: Final = 0x80
SI_MESGQ: Final = -3
SI_QUEUE: Final = -1
SI_SIGIO: Final = -5
SI_TIMER: Final = -2
SI_TKILL: Final = -6
SI_USER: Final = 0

SS_AUTODISARM: Final = 1 << 31
SS_DISABLE: Final = 2
SS_ONSTACK: Final = 1


class kernel_sigaction(ctypes.Structure):
    """arch/x86/include/uapi/asm/signal.h as rt_sigaction(2) takes it (not glibc's struct sigaction)."""

    _fields_ = [
        ("sa_handler", c_uint64),
        ("sa_flags", c_uint64),
        ("sa_restorer", c_uint64),
        ("sa_mask", c_uint64),
    ]


class stack_t(ctypes.Structure):
    """include/uapi/asm-generic/signal.h"""

    _fields_ = [
        ("ss_sp", c_uint64),
        ("ss_flags", c_int32),
        ("_pad", c_uint32),
        ("ss_size", c_uint64),
    ]


class SigInfo(NamedTuple):
    """The fields of a raw siginfo that tell its kind; which of the rest mean something depends on ``code``."""

    signo: int
    errno: int
    code: int
    pid: int
    """Sender (SI_USER, SI_QUEUE, SI_TKILL, SIGCHLD), or timer id (SI_TIMER)."""
    uid: int
    """Sender's uid, or overrun (SI_TIMER)."""
    value: int
    """sigval of SI_QUEUE and SI_TIMER."""


_SIGINFO: Final = struct.Struct("=iii4xiIQ")


def parse_siginfo(raw: bytes) -> SigInfo:
    """Split the head of a raw siginfo."""
    return SigInfo(*_SIGINFO.unpack_from(raw))


def make_siginfo(signo: int, code: int, pid: int, uid: int, value: int = 0) -> bytes:
    """Return the 128 raw bytes of a siginfo."""
    return _SIGINFO.pack(signo, 0, code, pid, uid, value).ljust(SIGINFO_BYTES, b"\0")


def sigset(signals: Iterable[int]) -> int:
    """Return the set of signal numbers as a kernel bit set: bit n-1 is signal n."""
    mask = 0
    for signo in signals:
        mask |= 1 << (signo - 1)
    return mask


def signals_of(mask: int) -> list[int]:
    """Return the signal numbers of a kernel bit set, ascending."""
    return [signo for signo in range(1, NSIG + 1) if mask >> (signo - 1) & 1]
