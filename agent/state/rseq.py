"""Restartable sequences: the registration of a thread, and a thread stopped inside a critical
section.

A thread that is preempted inside the active critical section must go on at its abort handler; the
kernel sees to that when the thread returns to user space. It decides by the instruction pointer it
finds then, and clears the descriptor. A tracer that points the thread at code of its own therefore
hides the critical section: the thread would later resume in the middle of one, maybe on another
CPU. So settle_rseq() does the kernel's work first, on the registers that the tracer will put back.
It must run after every stop before the first injection.

Addresses are the target's. Sources: rseq(2), kernel/rseq.c, ptrace(2)
PTRACE_GET_RSEQ_CONFIGURATION.
"""

from __future__ import annotations

import logging
import struct
from typing import TYPE_CHECKING, Final

from agent.kernel import ptrace
from agent.kernel.syscalls import NR_rseq
from protocol.state.thread import RseqState

if TYPE_CHECKING:
    from agent.target.inject import Batch
    from agent.target.memory import TargetMemory
    from agent.target.tracer import TracedThread

_LOG = logging.getLogger(__name__)
_RSEQ_CS_OFFSET: Final = 8
# struct rseq_cs: version, flags, start_ip, post_commit_offset, abort_ip.
_RSEQ_CS: Final = struct.Struct("=IIQQQ")


def read_rseq(tid: int) -> RseqState | None:
    """Return the rseq area that a stopped thread has registered, if any."""
    config = ptrace.get_rseq_configuration(tid)
    if config is None:
        return None
    return RseqState(addr=config.addr, size=config.size, sig=config.sig, flags=config.flags)


def abort_address(rip: int, descriptor: bytes) -> int | None:
    """Return where a thread at ``rip`` must go on if the raw rseq_cs ``descriptor`` covers it,
    else None.
    """
    _, _, start, length, abort = _RSEQ_CS.unpack(descriptor)
    return abort if (rip - start) % (1 << 64) < length else None


def settle_rseq(memory: TargetMemory, thread: TracedThread, state: RseqState | None) -> None:
    """Move a stopped thread to the abort handler if it is inside a critical section.

    Before any injection into the thread, which would make the kernel clear the descriptor.
    """
    # A system call inside a critical section is forbidden: a thread in one need not be looked at.
    if state is None or thread.regs.orig_rax < 1 << 63:
        return
    try:
        pointer = int.from_bytes(memory.read(state.addr + _RSEQ_CS_OFFSET, 8), "little")
        if pointer == 0:
            return
        abort = abort_address(thread.regs.rip, memory.read(pointer, _RSEQ_CS.size))
    except OSError:
        # The kernel kills a thread whose descriptor cannot be read, but only where it looks.
        return
    if abort is not None:
        _LOG.debug("rseq critical section at %#x is aborted to %#x", thread.regs.rip, abort)
        regs = thread.regs.copy()
        regs.rip = abort
        thread.change_regs(regs)


def restore_rseq_call(batch: Batch, state: RseqState | None) -> None:
    """Add the call that registers the area of the thread that runs ``batch``; its memory must be
    in place.

    The kernel then clears the descriptor pointer, which settle_rseq() has made meaningless.
    """
    if state is not None:
        batch.call(NR_rseq, state.addr, state.size, 0, state.sig, name="rseq")
