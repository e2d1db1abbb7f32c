"""agent-send or agent-recv that dies at a chosen point: what a kill -9 from outside would have to be lucky to hit.

Usage: python -m tests.faults.striking send|recv POINT DELAY_US VICTIM ARGUMENTS...

POINT is MODULE:QUALNAME:before or :after; the first call of that function sends VICTIM a signal DELAY_US later, from
a kernel timer for the agent itself (VICTIM "self"), or at once for another process (VICTIM "PID" or "PID/SIGNAL").
With VICTIM "error/ERRNO" nobody gets a signal: that call fails so, before or after it has done its work; with "late" it
fails as if the agent had got no CPU time.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from agent.errors import TooLateError
from tests.workloads import libc


class sigevent(ctypes.Structure):
    """struct sigevent of asm-generic/siginfo.h."""

    _fields_ = [
        ("sigev_value", ctypes.c_uint64),
        ("sigev_signo", ctypes.c_int32),
        ("sigev_notify", ctypes.c_int32),
        ("padding", ctypes.c_uint8 * 48),
    ]


def kill_self_in(delay_us: int) -> None:
    """SIGKILL by a timer of the kernel: no thread, no chance to clean up."""
    if not delay_us:
        os.kill(os.getpid(), signal.SIGKILL)
    timer = ctypes.c_int32()
    event = sigevent(0, signal.SIGKILL, 0)
    libc.syscall(libc.NR_timer_create, 1, ctypes.byref(event), ctypes.byref(timer))
    value = libc.itimerspec(libc.timespec(), libc.seconds(delay_us / 1e6))
    libc.syscall(libc.NR_timer_settime, timer.value, 0, ctypes.byref(value), None)


def strike(victim: str, delay_us: int) -> None:
    if victim == "self":
        kill_self_in(delay_us)
        return
    if victim == "late":
        raise TooLateError("struck")
    pid, _, signum = victim.partition("/")
    if pid == "error":
        raise OSError(int(signum), os.strerror(int(signum)))
    os.kill(int(pid) or os.getpid(), int(signum or signal.SIGKILL))


def arm(point: str, action: Callable[[], None]) -> None:
    """Have the first call of a function carry out `action`."""
    module, qualname, when = point.split(":")
    *path, name = qualname.split(".")
    owner: Any = importlib.import_module(module)
    for part in path:
        owner = getattr(owner, part)
    original = getattr(owner, name)
    left = [action]

    def wrapper(*args: Any, **keywords: Any) -> Any:
        if when == "before" and left:
            left.pop()()
        result = original(*args, **keywords)
        if when == "after" and left:
            left.pop()()
        return result

    setattr(owner, name, wrapper)


def main() -> int:
    command, point, delay_us, victim, *arguments = sys.argv[1:]
    cli = importlib.import_module(f"agent.cli.{command}")
    if point != "start":
        arm(point, lambda: strike(victim, int(delay_us)))
    else:
        strike(victim, int(delay_us))
    status: int = cli.main(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
