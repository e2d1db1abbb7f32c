"""The other threads of a parallel batch on the source: how they come into the routine, and out of it again.

The first thread unmaps the scratch mapping when the others have left it, so it must know of each that enters or is
taken out: yet the agent may die between two requests. So a worker is sent in by pointing it at code that looks for its
ticket in the mapping first, and goes home when there is none; only then is the ticket written, by the same write that
makes the first thread wait. It is taken out in the same way: pointed at that code again, then the ticket is withdrawn,
then it is restored. (agent.target.inject has the whole theory.)

The way home of a worker that finds no ticket lies in the tail, where there is room for one: workers pass one by one.
Addresses are target addresses.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Final, final

from agent.kernel import ptrace
from agent.kernel.arch import user_regs_struct
from agent.kernel.futex import FUTEX_CMP_REQUEUE, FUTEX_PRIVATE_FLAG
from agent.kernel.syscalls import NR_futex
from agent.target import restart
from agent.target import routine_x86_64 as routine
from agent.target.memory import TargetMemory
from agent.target.tail import ALL_BLOCKED, Tail
from agent.target.traced import TracedThread

_U64: Final = (1 << 64) - 1
_block_regs: Final = attrgetter(*routine.BLOCK_REGS)
_BLOCK: Final = struct.Struct("<22Q")
_WORD: Final = struct.Struct("<Q")


def way_home(thread: TracedThread, stub: int, extra: int, leave: int) -> bytes:
    """Return what a thread needs to find back by itself, as routine_x86_64 reads it; ``extra``: size or ticket."""
    return _pack_block(thread, _block_regs(restart.healing_regs(thread.regs)), stub, extra, leave)


def restore_exactly(thread: TracedThread) -> None:
    """Give a thread in the routine its own mask and registers again."""
    # The mask first: as long as the registers are ours the thread restores both by itself.
    ptrace.setsigmask(thread.tid, thread.sigmask)
    ptrace.setregs(thread.tid, restart.resuming_regs(thread.regs))


@final
class Workers:
    """``threads``, each with the block at the same place of ``blocks`` in the scratch mapping.

    ``requeue`` puts the signal that a thread was stopped at back into its queue; it lets the thread run for that.
    """

    def __init__(
        self,
        tail: Tail,
        memory: TargetMemory,
        threads: Sequence[TracedThread],
        blocks: range,
        requeue: Callable[[TracedThread], None],
    ) -> None:
        self._tail = tail
        self._memory = memory
        self.threads = threads
        self._blocks = {thread.tid: block for thread, block in zip(threads, blocks)}
        self._homes = {thread.tid: restart.healing_regs(thread.regs) for thread in threads}
        self._stubs = tail.write_stubs(list(dict.fromkeys(regs.rip for regs in self._homes.values())))
        self._withdrawn = {block: _withdrawn(block) for block in blocks}
        self._slots: dict[int, bytes] = {}
        self._entries: dict[int, user_regs_struct] = {}
        self._ticket = random.getrandbits(32) | 1
        self._requeue = requeue

    def blank_blocks(self) -> bytes:
        """Return the blocks of workers that nobody waits for, one after another."""
        return b"".join(self._withdrawn.values())

    def find_lost(self) -> TracedThread | None:
        """Return a worker that has gone its way, all being stopped: the last thing it did was to leave a sign."""
        if not self._blocks:
            return None
        first, stride = next(iter(self._blocks.values())), routine.BLOCK_STRIDE
        blocks = memoryview(self._memory.read(first, stride * len(self._blocks))).cast("Q")
        signs = blocks[routine.BLOCK_R15 // 8 :: stride // 8].tolist()
        return next((t for t, sign in zip(self.threads, signs) if sign == self._blocks[t.tid]), None)

    def send_in(self, thread: TracedThread, regs: user_regs_struct) -> None:
        """Point a stopped worker at the routine, to begin with ``regs`` (rbx, rbp, r12-r14), its signals blocked."""
        tail, tid, home = self._tail, thread.tid, self._homes[thread.tid]
        block = self._blocks[tid]
        words = _block_regs(home)
        way_back = _pack_block(thread, words, tail.stub_of(tail.passing), 0, tail.heal)
        self._slots[tid] = tail.make_slot(way_back, home.rip)
        regs.rip, regs.orig_rax, regs.r15 = tail.join, _U64, tail.passing
        regs.rax, regs.rsi, regs.r9 = NR_futex, FUTEX_CMP_REQUEUE | FUTEX_PRIVATE_FLAG, self._ticket
        regs.rdi = regs.r8 = block + routine.BLOCK_TICKET
        regs.rdx = regs.r10 = 0
        self._entries[tid] = regs
        self._point_at_join(tid)
        ptrace.setsigmask(tid, ALL_BLOCKED)
        # Now it can be let run for a moment, should a signal have to go back to its queue.
        self._requeue(thread)
        self._memory.write(block, _pack_block(thread, words, self._stubs[home.rip], self._ticket, tail.heal))

    def take_out(self, thread: TracedThread) -> None:
        """Have a worker that is stopped in the routine stand where it was, as it was."""
        tid = thread.tid
        regs = self._entries.get(tid)
        if regs is None:
            return  # never sent in
        regs.rbx = regs.rbp = regs.r13 = 0  # no calls to make: should it find its ticket it leaves at once
        self._point_at_join(tid)
        block = self._blocks[tid]
        self._memory.write(block, self._withdrawn[block][: routine.BLOCK_BYTES])
        restore_exactly(thread)

    def _point_at_join(self, tid: int) -> None:
        """Point a thread at the code that goes on with its registers (rbx, rbp, r12-r14) if its ticket is there."""
        self._memory.write(self._tail.passing, self._slots[tid])
        ptrace.setregs(tid, self._entries[tid])


def _pack_block(
    thread: TracedThread, words: tuple[int, ...], stub: int, extra: int, leave: int
) -> bytes:
    return _BLOCK.pack(*words, stub, thread.sigmask, ALL_BLOCKED, extra, leave)


def _withdrawn(block: int) -> bytes:
    """Return a block that has the first thread wait for nobody: it counts as read to the end."""
    gone = bytearray(routine.BLOCK_STRIDE)
    _WORD.pack_into(gone, routine.BLOCK_R15, block)
    return bytes(gone)
