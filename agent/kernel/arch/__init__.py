"""Selects the machine: ``arch.user_regs_struct``, ``arch.SYSCALL_INSTRUCTION``, ``arch.MACHINE``, ...

Only x86_64 so far. The names can be imported on any machine, so that pure code and ``--help`` work there; what really
touches a process (agent.kernel.libc.syscall, agent.kernel.ptrace) calls require_supported_machine() first.
"""

from __future__ import annotations

import os
import sys

from agent.kernel.arch.x86_64 import (
    MACHINE,
    NT_PRFPREG,
    NT_PRSTATUS,
    NT_X86_XSTATE,
    RED_ZONE_BYTES,
    SYSCALL_ARGUMENTS,
    SYSCALL_INSTRUCTION,
    user_regs_struct,
)

__all__ = [
    "MACHINE",
    "NT_PRFPREG",
    "NT_PRSTATUS",
    "NT_X86_XSTATE",
    "RED_ZONE_BYTES",
    "SYSCALL_ARGUMENTS",
    "SYSCALL_INSTRUCTION",
    "is_supported_machine",
    "require_supported_machine",
    "user_regs_struct",
]


def is_supported_machine() -> bool:
    """Tell whether this interpreter is a 64-bit one on a machine whose registers we know."""
    return os.uname().machine == MACHINE and sys.maxsize > 2**32


def require_supported_machine() -> None:
    """Check the machine.

    :raises NotImplementedError: on any machine but x86_64, naming it.
    """
    if not is_supported_machine():
        raise NotImplementedError(f"Ferry supports {MACHINE} only, this is {os.uname().machine}")
