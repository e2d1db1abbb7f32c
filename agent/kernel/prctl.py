"""prctl(2) and arch_prctl(2): constants, the memory map structure, and the calls on this process.

Inside a target the same numbers are used by injected calls. Addresses are those of the process that calls.
Sources: include/uapi/linux/prctl.h, include/uapi/linux/securebits.h, prctl(2).
"""

from __future__ import annotations

import ctypes
from ctypes import c_uint32, c_uint64
from typing import Final

from agent.kernel.libc import syscall
from agent.kernel.syscalls import NR_arch_prctl, NR_prctl

PR_CAPBSET_DROP: Final = 24
PR_CAPBSET_READ: Final = 23
PR_CAP_AMBIENT: Final = 47
PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
PR_CAP_AMBIENT_IS_SET: Final = 1
PR_CAP_AMBIENT_LOWER: Final = 3
PR_CAP_AMBIENT_RAISE: Final = 2
PR_GET_CHILD_SUBREAPER: Final = 37
PR_GET_DUMPABLE: Final = 3
PR_GET_IO_FLUSHER: Final = 58
PR_GET_KEEPCAPS: Final = 7
PR_GET_MDWE: Final = 66
PR_GET_MEMORY_MERGE: Final = 68
PR_GET_NAME: Final = 16
PR_GET_NO_NEW_PRIVS: Final = 39
PR_GET_PDEATHSIG: Final = 2
PR_GET_SECCOMP: Final = 21
PR_GET_SECUREBITS: Final = 27
PR_GET_SPECULATION_CTRL: Final = 52
PR_GET_THP_DISABLE: Final = 42
PR_GET_TID_ADDRESS: Final = 40
PR_GET_TIMERSLACK: Final = 30
PR_GET_TIMING: Final = 13
PR_GET_TSC: Final = 25
PR_GET_UNALIGN: Final = 5
PR_MCE_KILL: Final = 33
PR_MCE_KILL_CLEAR: Final = 0
PR_MCE_KILL_DEFAULT: Final = 2
PR_MCE_KILL_EARLY: Final = 1
PR_MCE_KILL_GET: Final = 34
PR_MCE_KILL_LATE: Final = 0
PR_MCE_KILL_SET: Final = 1
PR_SET_CHILD_SUBREAPER: Final = 36
PR_SET_DUMPABLE: Final = 4
PR_SET_IO_FLUSHER: Final = 57
PR_SET_KEEPCAPS: Final = 8
PR_SET_MDWE: Final = 65
PR_SET_MEMORY_MERGE: Final = 67
PR_SET_MM: Final = 35
PR_SET_MM_MAP: Final = 14
PR_SET_MM_MAP_SIZE: Final = 15
PR_SET_NAME: Final = 15
PR_SET_NO_NEW_PRIVS: Final = 38
PR_SET_PDEATHSIG: Final = 1
PR_SET_PTRACER: Final = 0x59616D61
PR_SET_SECUREBITS: Final = 28
PR_SET_SPECULATION_CTRL: Final = 53
PR_SET_SYSCALL_USER_DISPATCH: Final = 59
PR_SET_THP_DISABLE: Final = 41
PR_SET_TIMERSLACK: Final = 29
PR_SET_TSC: Final = 26
PR_SET_VMA: Final = 0x53564D41
PR_SET_VMA_ANON_NAME: Final = 0
PR_TIMER_CREATE_RESTORE_IDS: Final = 77
PR_TIMER_CREATE_RESTORE_IDS_GET: Final = 2
PR_TIMER_CREATE_RESTORE_IDS_OFF: Final = 0
PR_TIMER_CREATE_RESTORE_IDS_ON: Final = 1

SECBIT_KEEP_CAPS: Final = 1 << 4
SECBIT_KEEP_CAPS_LOCKED: Final = 1 << 5
SECBIT_NOROOT: Final = 1 << 0
SECBIT_NOROOT_LOCKED: Final = 1 << 1
SECBIT_NO_CAP_AMBIENT_RAISE: Final = 1 << 6
SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED: Final = 1 << 7
SECBIT_NO_SETUID_FIXUP: Final = 1 << 2
SECBIT_NO_SETUID_FIXUP_LOCKED: Final = 1 << 3


class prctl_mm_map(ctypes.Structure):
    """include/uapi/linux/prctl.h, PR_SET_MM_MAP. ``auxv`` is the address of a copy, ``exe_fd`` -1 for unchanged.

    The kernel refuses (EBUSY) to change the exe file while a mapping of the old one exists.
    """

    _fields_ = [
        ("start_code", c_uint64),
        ("end_code", c_uint64),
        ("start_data", c_uint64),
        ("end_data", c_uint64),
        ("start_brk", c_uint64),
        ("brk", c_uint64),
        ("start_stack", c_uint64),
        ("arg_start", c_uint64),
        ("arg_end", c_uint64),
        ("env_start", c_uint64),
        ("env_end", c_uint64),
        ("auxv", c_uint64),
        ("auxv_size", c_uint32),
        ("exe_fd", c_uint32),
    ]


def prctl(option: int, arg2: int = 0, arg3: int = 0, arg4: int = 0, arg5: int = 0) -> int:
    """Call prctl(2) on this thread."""
    return syscall(NR_prctl, option, arg2, arg3, arg4, arg5)


def arch_prctl(option: int, arg: int) -> int:
    """Call arch_prctl(2) on this thread (x86_64 only)."""
    return syscall(NR_arch_prctl, option, arg)
