"""Waiting for traced threads: waitpid(2) with __WALL, and what a status means.

Sources: wait(2), ptrace(2) "Stopped states".
"""

from __future__ import annotations

import os
import signal
from typing import Final

WALL: Final = 0x40000000

"""Wait for children of every kind, threads included (the kernel's __WALL)."""
WNOHANG: Final = os.WNOHANG
WNOTHREAD: Final = 0x20000000
"""Only children of the calling thread (the kernel's __WNOTHREAD)."""

SYSCALL_STOP: Final = signal.SIGTRAP | 0x80
"""What stop_signal() gives for a system call stop under PTRACE_O_TRACESYSGOOD."""

_STOPPING_SIGNALS: Final = frozenset(
    (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
)


def waitpid4(tid: int, flags: int = 0) -> tuple[int, int] | None:
    """Wait for a state change of ``tid`` (-1: any) and return (tid, status).

    ``flags`` (WNOHANG, WNOTHREAD) are added to __WALL. None: WNOHANG and nothing happened.

    :raises ChildProcessError: there is nothing to wait for: ``tid`` is gone or not ours.
    """
    found, status = os.waitpid(tid, flags | WALL)
    return (found, status) if found else None


def stop_signal(status: int) -> int | None:
    """Return the signal of a stop (SYSCALL_STOP for a system call), or None when it is not a stop."""
    return (status >> 8) & 0xFF if status & 0xFF == 0x7F else None


def ptrace_event(status: int) -> int:
    """Return the PTRACE_EVENT_* of an event stop, or 0."""
    return status >> 16 if status & 0xFF == 0x7F else 0


def is_syscall_stop(status: int) -> bool:
    """Tell whether this is a system call entry or exit stop (needs PTRACE_O_TRACESYSGOOD)."""
    return status >> 8 == SYSCALL_STOP and status & 0xFF == 0x7F


def is_group_stop(status: int) -> bool:
    """Tell whether a seized thread stopped because its process was (SIGSTOP, SIGTSTP, ...)."""
    return ptrace_event(status) == 128 and stop_signal(status) in _STOPPING_SIGNALS


def exited(status: int) -> bool:
    """Tell whether the thread is gone: exited or killed by a signal."""
    return status & 0xFF != 0x7F and status != 0xFFFF
