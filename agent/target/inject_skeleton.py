"""System calls made inside a skeleton, which dies with the agent: nothing has to be as it was afterwards.

The routine lives in a scratch mapping that stays for the whole restore, and threads are left parked in it.
Addresses are target addresses.
"""

from __future__ import annotations

import os
import struct
from typing import ClassVar, Final, final

from agent.errors import InjectError, TargetGone
from agent.kernel import ptrace
from agent.kernel.arch import SYSCALL_ARGUMENTS, SYSCALL_INSTRUCTION, user_regs_struct
from agent.kernel.syscalls import NR_exit, NR_mmap, NR_mremap, NR_munmap, syscall_name
from agent.procfs.maps import parse_maps, read_maps
from agent.target import routine_x86_64 as routine
from agent.target.batch import Batch
from agent.target.runner import (
    MAX_PARALLEL,
    PRELUDE_BYTES,
    U64,
    Run,
    Runner,
    align,
    round_up,
    sizes,
)
from agent.target.tail import ALL_BLOCKED
from agent.target.traced import TracedThread
from agent.target.tracer import Tracer
from agent.target.workers import Workers
from agent.types import PAGE_SIZE

_MAP_PRIVATE_ANONYMOUS: Final = 0x02 | 0x20
_MAP_FIXED_NOREPLACE: Final = 0x100000
_PROT_RWX: Final = 0x1 | 0x2 | 0x4
_MREMAP_MAYMOVE: Final = 1
_MREMAP_FIXED: Final = 2
_MIN_PERSISTENT_BYTES: Final = 1024 * 1024


@final
class SkeletonInjector(Runner):
    """Runs batches in threads of a skeleton, whose ``tracer`` was made with kill_on_exit.

    :param scratch_hint: where to put the scratch mapping.
    """

    _waits_for_workers: ClassVar[bool] = False

    def __init__(self, tracer: Tracer, *, scratch_hint: int = 0) -> None:
        super().__init__(tracer)
        self._hint = scratch_hint

    def lay_out(self, batch: Batch, nr_threads: int) -> None:
        """Do what can be done ahead for the first batch of a run by so many threads of a skeleton."""
        base = align(self._area_start(), routine.BLOCK_STRIDE)
        controls_bytes, blocks_bytes = sizes(nr_threads)
        batch.pack(base + controls_bytes + blocks_bytes + PRELUDE_BYTES)

    def remote_syscall(self, thread: TracedThread, nr: int, *args: int) -> int:
        """Make one call in ``thread`` with a ``syscall`` instruction of the target; return its value.

        Only for calls that do not sleep. The thread's registers are as before afterwards.

        :raises InjectError: the call failed.
        """
        before = ptrace.getregs(thread.tid)
        result = self._call_at_instruction(thread, nr, args)
        ptrace.setregs(thread.tid, before)
        if -4096 < result < 0:
            raise InjectError(
                f"Cannot {syscall_name(nr)} in process {self.tracer.pid}: {os.strerror(-result)}",
                errno=-result,
            )
        return result

    def _call_at_instruction(self, thread: TracedThread, nr: int, args: tuple[int, ...]) -> int:
        regs = ptrace.getregs(thread.tid)
        regs.rip, regs.orig_rax, regs.rax = self._syscall_instruction(), U64, nr
        for name, value in zip(SYSCALL_ARGUMENTS, (*args, *(0,) * 6)):
            setattr(regs, name, value & U64)
        ptrace.setregs(thread.tid, regs)
        return self._finish_call(thread).result

    def place(self, thread: TracedThread, content: bytes) -> int:
        """Write bytes into the persistent scratch mapping and return their address, valid until the next run()."""
        self._enter(thread, len(content) + PAGE_SIZE)
        self._memory.write(self._area_start(), content)
        return self._area_start()

    def end_thread(self, thread: TracedThread) -> None:
        """Have a thread of a skeleton exit(2), and wait until it is gone."""
        regs = ptrace.getregs(thread.tid)
        regs.rip, regs.orig_rax, regs.rax, regs.rdi = self._syscall_instruction(), U64, NR_exit, 0
        ptrace.setregs(thread.tid, regs)
        self._cont(thread)
        try:
            self.tracer.wait_stop(thread)
        except TargetGone:
            return
        raise InjectError(f"Thread {thread.tid} of process {self.tracer.pid} does not exit")

    def interrupted_syscall(self, thread: TracedThread, nr: int, *args: int) -> int:
        """Make one call in ``thread`` with an interrupt waiting, all signals blocked; return the raw result.

        A call that sleeps returns at once and leaves its restart block. Registers are not put back.
        """
        ptrace.setsigmask(thread.tid, ALL_BLOCKED)
        return self._call_at_instruction(thread, nr, args)

    def move(self, new_addr: int, thread: TracedThread | None = None) -> None:
        """Move the scratch mapping to ``new_addr`` (nothing may be mapped there); all threads must be stopped."""
        if not self._scratch:
            raise ValueError("There is no persistent scratch mapping to move")
        thread = thread or self._default_thread()
        nr_bytes = self._scratch_bytes
        self._relocate(thread, nr_bytes, _MREMAP_MAYMOVE | _MREMAP_FIXED, new_addr)

    # -- the scratch mapping ---------------------------------------------------------------------------------------

    def _enter(self, thread: TracedThread, nr_bytes: int) -> None:
        nr_bytes = round_up(nr_bytes + PAGE_SIZE)
        if not self._scratch:
            nr_bytes = max(nr_bytes, _MIN_PERSISTENT_BYTES)
            flags = _MAP_PRIVATE_ANONYMOUS | (_MAP_FIXED_NOREPLACE if self._hint else 0)
            self._scratch = self.remote_syscall(
                thread, NR_mmap, self._hint, nr_bytes, _PROT_RWX, flags, -1, 0
            )
            self._scratch_bytes = nr_bytes
            self._memory.write(self._scratch, routine.ROUTINE)
            self._memory.write(self._leader_block(), self._parking_block())
        elif nr_bytes > self._scratch_bytes:
            self._relocate(thread, 2 * nr_bytes, _MREMAP_MAYMOVE, 0)

    def _relocate(self, thread: TracedThread, nr_bytes: int, flags: int, new_addr: int) -> None:
        old = self._scratch
        address = self.remote_syscall(
            thread, NR_mremap, old, self._scratch_bytes, nr_bytes, flags, new_addr
        )
        self._scratch, self._scratch_bytes = address, nr_bytes
        self._memory.write(self._leader_block(), self._parking_block())
        # Threads parked in the old place have their rip there; they are pointed elsewhere before they run again.

    def _syscall_instruction(self) -> int:
        if self._scratch:
            return self._scratch + routine.ROUTINE.index(SYSCALL_INSTRUCTION)
        return find_syscall_instruction(self.tracer)

    def _parking_block(self, nr_bytes: int = routine.BLOCK_BYTES) -> bytes:
        block = bytearray(nr_bytes)
        struct.pack_into("<Q", block, 168, self._scratch + routine.PARK)
        return bytes(block)

    def _close(self) -> None:
        if self._scratch:
            # The instruction goes with the mapping; the thread does not come back to it.
            self.remote_syscall(self._default_thread(), NR_munmap, self._scratch, self._scratch_bytes)
            self._scratch = self._scratch_bytes = 0

    # -- threads and places of a run -------------------------------------------------------------------------------

    def _chunks(self, threads: list[TracedThread]) -> list[list[TracedThread]]:
        return [threads[i : i + MAX_PARALLEL] for i in range(0, len(threads), MAX_PARALLEL)]

    def _blank_blocks(self, workers: Workers | None, nr_blocks: int) -> bytes:
        return self._parking_block(routine.BLOCK_STRIDE) * nr_blocks

    def _leader_regs(self, thread: TracedThread) -> user_regs_struct:
        # They may have been changed by what it ran (arch_prctl): taken as they are.
        return ptrace.getregs(thread.tid)

    def _stride(self, run: Run) -> int:
        # The leader stops at every thread that it makes.
        return max(8, len(run.threads) // 4) if run.blocks else 2

    def _code(self) -> int:
        return self._scratch

    def _leader_block(self) -> int:
        return self._scratch + align(len(routine.ROUTINE))

    def _area_start(self) -> int:
        return self._scratch + PAGE_SIZE


def find_syscall_instruction(tracer: Tracer) -> int:
    """Return the address of a ``syscall`` instruction in the target."""
    for entry in parse_maps(read_maps(tracer.pid)):
        if "x" not in entry.perms or entry.path == "[vsyscall]":
            continue
        try:
            at = tracer.memory.read(entry.start, entry.end - entry.start).find(SYSCALL_INSTRUCTION)
        except OSError:
            continue
        if at >= 0:
            return entry.start + at
    raise InjectError(f"Process {tracer.pid} has no system call instruction")
