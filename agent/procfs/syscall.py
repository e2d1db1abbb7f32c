"""/proc/PID/task/TID/syscall: the system call that a thread is blocked in.

Addresses are target addresses. Source: proc_pid_syscall(5).
"""

from __future__ import annotations

from typing import NamedTuple

from agent.procfs.files import read_bytes


class SyscallInfo(NamedTuple):
    """A blocked thread: call number (-1: blocked, but not in a call), six arguments, stack pointer, program counter."""

    nr: int
    args: tuple[int, ...]
    sp: int
    pc: int


def parse_syscall(data: bytes) -> SyscallInfo | None:
    """Parse the line; None for a running thread."""
    words = data.split()
    if not words or words[0] == b"running":
        return None
    numbers = [int(word, 16) for word in words[1:]]
    return SyscallInfo(int(words[0]), tuple(numbers[:-2]), numbers[-2], numbers[-1])


def read_syscall(pid: int, tid: int) -> SyscallInfo | None:
    """Return what a thread is blocked in, or None if it runs.

    :raises ProcessLookupError: it is gone. :raises PermissionError: no ptrace access.
    """
    return parse_syscall(read_bytes(f"/proc/{pid}/task/{tid}/syscall"))
