"""The restartable sequences area that a thread has registered.

A thread stopped inside a critical section must resume at its abort handler, and injected code
hides that from the kernel: the injector moves such a thread's registers before it enters it
(agent.target.restart.leave_rseq_section), so registers read after a batch has run are right. The
area itself is memory of the process. Addresses are the target's. Sources: rseq(2), ptrace(2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent.kernel.syscalls import NR_rseq
from protocol.state.thread import RseqState

if TYPE_CHECKING:
    from agent.target.batch import Batch, Cell
    from agent.target.traced import TracedThread


def read_rseq(thread: TracedThread) -> RseqState | None:
    """Return the rseq area that a stopped thread has registered, if any."""
    config = thread.rseq
    if config is None:
        return None
    return RseqState(addr=config.addr, size=config.size, sig=config.sig, flags=config.flags)


def restore_rseq_call(batch: Batch, state: RseqState, addr: Cell) -> None:
    """Add the call that registers the area of the thread that runs ``batch``; its memory must be
    in place. ``addr`` has its address.

    The kernel then clears the pointer to a critical section, which has no meaning any more.
    """
    batch.call(NR_rseq, addr, state.size, 0, state.sig, name="rseq")
