"""The C library, and the one funnel that turns errno into OSError.

Every wrapper of agent.kernel takes its function by ``libc["name"]``: that gives a fresh function object, so that
each wrapper sets its own prototype and none can spoil another's. Calls made through ``libc`` release the GIL.

Must never decide anything: a failed call is an OSError with the kernel's errno, nothing is retried here. All integers
are passed as 64-bit values; unsigned ones may be given as they are. Sources: syscall(2), errno(3).
"""

from __future__ import annotations

import ctypes
import os
import sys
from ctypes import c_long
from typing import Final

libc: Final = ctypes.CDLL(None, use_errno=True)
"""The process's own C library; take functions as ``libc["name"]``."""

_MACHINE: Final = os.uname().machine
_SUPPORTED: Final = _MACHINE == "x86_64" and sys.maxsize > 2**32

_syscall = libc["syscall"]
_syscall.argtypes = (c_long,) * 7
_syscall.restype = c_long


def describe(what: str, facts: tuple[object, ...]) -> str:
    """Return the text "what fact fact" that names a failed call; big integers in hex."""
    words = [hex(f) if isinstance(f, int) and abs(f) > 0xFFFFFF else str(f) for f in facts]
    return " ".join((what, *words))


def check(result: int, what: str, *facts: object) -> int:
    """Return ``result`` unless it is negative.

    :raises OSError: the subclass that fits errno, when ``result`` is negative; the text names ``what`` and ``facts``.
    """
    if result < 0:
        raise os_error(ctypes.get_errno(), what, *facts)
    return result


def os_error(errno: int, what: str, *facts: object) -> OSError:
    """Return the OSError (subclass by errno) of a failed call named by ``what`` and ``facts``."""
    return OSError(errno, f"{describe(what, facts)}: {os.strerror(errno)}")


def syscall(nr: int, *args: int) -> int:
    """Make the system call ``nr`` in this process and return its result; at most six arguments.

    :raises OSError: when the call fails.
    """
    if not _SUPPORTED:
        raise NotImplementedError(f"Ferry knows no system call numbers for machine {_MACHINE}")
    result: int = _syscall(nr, *args, *(0,) * (6 - len(args)))
    if result < 0:
        raise os_error(ctypes.get_errno(), f"system call {nr}", *args)
    return result
