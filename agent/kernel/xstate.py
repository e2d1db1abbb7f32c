"""The extended processor state (NT_X86_XSTATE): which components it has and how long it is.

No CPUID instruction can be run from Python: the kernel tells through the register set of a stopped child. ``mask``
is XCR0, ``size`` the bytes of the register set. Restoring needs every component of the source on the destination.
Sources: arch/x86/include/uapi/asm/sigcontext.h, arch/x86/include/asm/user.h (struct user_xstateregs).
"""

from __future__ import annotations

import functools
import os
import struct
from typing import Final, NamedTuple

from agent.kernel import ptrace, wait
from agent.kernel.arch.x86_64 import NT_X86_XSTATE

XFEATURE_MASK_FPSSE: Final = 0x3
XFEATURE_MASK_XTILE_DATA: Final = 1 << 18

# struct user_xstateregs: 512 bytes of fxsave with XCR0 in its software area, then the xsave header.
_XCR0_OFFSET: Final = 464
_XSTATE_BV_OFFSET: Final = 512
LEGACY_AND_HEADER_BYTES: Final = 576


class XstateLayout(NamedTuple):
    """XCR0 and the length of the register set in bytes."""

    mask: int
    size: int


def layout_of(xstate: bytes) -> XstateLayout:
    """Return the layout of a register set as PTRACE_GETREGSET gave it."""
    (mask,) = struct.unpack_from("=Q", xstate, _XCR0_OFFSET)
    return XstateLayout(mask, len(xstate))


def components_in_use(xstate: bytes) -> int:
    """Return XSTATE_BV: the components that are not in their initial state."""
    (in_use,) = struct.unpack_from("=Q", xstate, _XSTATE_BV_OFFSET)
    return int(in_use)


@functools.cache
def host_layout() -> XstateLayout:
    """Return the layout of this host, found once by looking at a child."""
    ours, childs = os.pipe()
    pid = os.fork()
    if pid == 0:  # only async-signal-safe things: other threads may have held any lock
        try:
            os.close(childs)
            os.read(ours, 1)
        finally:
            os._exit(0)
    try:
        ptrace.seize(pid, ptrace.PTRACE_O_EXITKILL)
        ptrace.interrupt(pid)
        wait.waitpid4(pid)
        xstate = ptrace.getregset(pid, NT_X86_XSTATE)
        ptrace.detach(pid)
    finally:
        os.close(ours)
        os.close(childs)
        os.waitpid(pid, 0)
    return layout_of(xstate)
