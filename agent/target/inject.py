"""System calls made inside the target, safe against the agent's death at any instant.

Theory of operation (design.md, section 4; the machine code is in routine_x86_64.py, its place in tail.py). To run a
batch, a stopped thread is

1. given, in the unused tail of the vdso, the routine and its own registers as constants;
2. pointed (SETREGS) at code there that ends by restoring those registers and the signal mask; its rsp stays its own;
3. told to block all signals (SETSIGMASK; this order, because only from 2. on the mask heals by itself);
4. let go up to the return of its first call, mmap of a scratch mapping, into which the agent writes the batch;
5. pointed at the routine that makes the calls, reports in the scratch mapping and waits half a second for the agent,
   who reads the report, stops the thread there, and has the results.

Closing runs munmap in the same way, stops the thread right behind it, restores the mask, then the exact registers
(again this order) with orig_rax, so that the kernel itself restarts the interrupted system call, then the tail.

Batches in several threads at once share the scratch mapping. The first thread unmaps it when the others have left, so
it must know of each that enters or is taken out: yet an agent may die between two requests. So a thread is sent in
(_send_in) by pointing it at code that looks for its ticket in the mapping first, and goes home when there is none; only
then is the ticket written, by the same write that makes the first thread wait. It is taken out (_take_out) in the same
way: pointed at that code again, then the ticket is withdrawn, then it is restored.

At every instant the thread is either untouched, or in code that ends with its registers and mask restored and the
scratch mapping gone. No single-stepping, no breakpoints: both kill a target whose tracer died. Signals that arrive
stay in their queues; a signal that had left its queue already is put back first (_requeue_signal). SIGSTOP cannot be
blocked: it is handed on and the thread runs on as a tracer may let it; the group-stop returns with the detach.

With crash_safe=False (a skeleton that dies with the agent) the routine lives in a scratch mapping that stays for the
whole restore, nothing is restored, and threads are left parked in it.

A batch must not contain calls that sleep for long, and on the source none with a restart block (nanosleep, poll,
futex): it would replace the thread's own. Addresses are target addresses.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import struct
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Final, final

from agent.errors import FreezeError, InjectError, TargetGone, TooLateError
from agent.kernel import ptrace
from agent.kernel.arch import SYSCALL_ARGUMENTS, SYSCALL_INSTRUCTION, user_regs_struct
from agent.kernel.futex import FUTEX_CMP_REQUEUE, FUTEX_PRIVATE_FLAG
from agent.kernel.syscalls import (
    NR_exit,
    NR_futex,
    NR_madvise,
    NR_mmap,
    NR_mremap,
    NR_munmap,
    syscall_name,
)
from agent.procfs.maps import parse_maps, read_maps
from agent.target import restart
from agent.target import routine_x86_64 as routine
from agent.target.batch import Batch, Blob, BlobAddress, Call, Cell, Packed
from agent.target.tail import ALL_BLOCKED, Tail, find_tail
from agent.target.tracer import StopKind, TracedThread, Tracer, pause
from agent.types import PAGE_SIZE

__all__ = ["Batch", "Blob", "BlobAddress", "Call", "Cell", "Injector"]

log = logging.getLogger(__name__)

_U64: Final = (1 << 64) - 1
_MAP_PRIVATE_ANONYMOUS: Final = 0x02 | 0x20
_MAP_FIXED_NOREPLACE: Final = 0x100000
_PROT_RW: Final = 0x1 | 0x2
_PROT_RWX: Final = _PROT_RW | 0x4
_MADV_DONTFORK: Final = 10
_MREMAP_MAYMOVE: Final = 1
_MREMAP_FIXED: Final = 2
_MIN_SCRATCH_BYTES: Final = 128 * 1024
_MIN_PERSISTENT_BYTES: Final = 1024 * 1024
_HEAD_BYTES: Final = routine.CONTROL_BYTES + 8 * 8 + routine.RECORD_BYTES
"""Before each batch: control area, and the cells and record of _prelude()."""
RUN_TIMEOUT_S: Final = 30.0
"""How long a batch may take before the thread is given up as stuck."""


@final
class Injector:
    """Runs batches in threads of ``tracer``'s process, which the caller has stopped.

    :param crash_safe: False only for a skeleton whose tracer was made with kill_on_exit.
    :param scratch_hint: where to put the scratch mapping (crash_safe=False).
    """

    def __init__(
        self,
        tracer: Tracer,
        *,
        crash_safe: bool = True,
        scratch_hint: int | None = None,
    ) -> None:
        self.tracer = tracer
        self.crash_safe = crash_safe
        self._memory = tracer.memory
        self._hint = scratch_hint or 0
        self._scratch = 0
        self._scratch_bytes = 0
        self._in_use = (0, 0)  # offsets of the last batch in the scratch mapping
        self._fresh = False  # nothing has run since it was mapped
        self._host: TracedThread | None = None  # the thread that is in the routine (crash_safe)
        self._tail: Tail | None = None
        self._stubs: dict[int, int] = {}  # return address -> stub for blocks in the scratch mapping
        self._ticket = 0

    def __enter__(self) -> Injector:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except (TargetGone, OSError, FreezeError):
            if kind is None:
                raise
            log.debug("closing the injector of process %d", self.tracer.pid, exc_info=True)

    @property
    def scratch_range(self) -> tuple[int, int] | None:
        """[start, end) of the scratch mapping, or None when there is none now."""
        return (self._scratch, self._scratch + self._scratch_bytes) if self._scratch else None

    # -- running ---------------------------------------------------------------------------------------------------

    def run(self, batch: Batch, thread: TracedThread | None = None) -> None:
        """Make the calls of ``batch`` in ``thread`` (the leader), which stays stopped.

        :raises InjectError: a checked call failed (the whole batch has run all the same), or there is no way to run
            anything. :raises TargetGone: the process died.
        """
        thread = thread or self._default_thread()
        self._run({thread.tid: batch}, [thread])
        batch.check()

    def run_parallel(self, batches: Mapping[int, Batch]) -> None:
        """Make the calls of several batches, each in the thread of that tid, at the same time.

        :raises InjectError: as run(), for the first failure in order, when all batches have run.
        """
        threads = [self.tracer.threads[tid] for tid in batches]
        for chunk in self._chunks(threads):
            self._run(batches, chunk)
        for batch in batches.values():
            batch.check()

    def _run(self, batches: Mapping[int, Batch], threads: list[TracedThread]) -> None:
        sizes = [_control_and_batch_bytes(batches[t.tid]) for t in threads]
        nr_workers = len(threads) - 1
        total = _align(sum(sizes)) + (nr_workers + 1) * routine.BLOCK_STRIDE
        self._enter(threads[0], total)
        base = self._area_start()
        fresh, self._fresh = self._fresh, False
        controls = []
        packed: list[Packed] = []
        for thread, size in zip(threads, sizes):
            controls.append(base)
            packed.append(batches[thread.tid].pack(base + _HEAD_BYTES))
            base += size
        base = (base + routine.BLOCK_STRIDE - 1) & -routine.BLOCK_STRIDE
        blocks = [base + i * routine.BLOCK_STRIDE for i in range(nr_workers)]
        self._write_batches(threads, controls, packed, blocks)
        try:
            self._start(threads, controls, packed, blocks, fresh=fresh)
            self._finish(threads, controls)
        except BaseException:
            self._recover_workers(threads[1:], blocks)
            raise
        for thread, plan in zip(threads, packed):
            after = self._memory.read(plan.first, len(plan.content))
            batches[thread.tid].unpack(plan.first, after)
        if self.crash_safe:
            for thread, block in zip(threads[1:], blocks):
                self._take_out(thread, block)

    def _write_batches(
        self,
        threads: list[TracedThread],
        controls: list[int],
        packed: list[Packed],
        blocks: list[int],
    ) -> None:
        nr_waited = len(blocks) if self.crash_safe else 0
        for index, (control, plan) in enumerate(zip(controls, packed)):
            head = struct.pack(
                "<QQQ16xQ",
                0,
                0 if index else nr_waited,
                blocks[0] if blocks and not index else 0,
                self._scratch,
            )
            head = head.ljust(routine.CONTROL_BYTES, b"\0")
            self._memory.write(control, head + self._prelude(control) + plan.content)
        if not blocks:
            return
        if not self.crash_safe:
            for block in blocks:
                self._memory.write(block, self._parking_block())
            return
        assert self._tail is not None
        rips = [restart.healing_regs(thread.regs).rip for thread in threads[1:]]
        self._stubs = self._tail.write_stubs(list(dict.fromkeys(rips)))
        self._ticket = random.getrandbits(32) | 1
        for block in blocks:
            self._withdraw_ticket(block)

    def _prelude(self, control: int) -> bytes:
        """Return a record, to be made first in a fresh scratch mapping, that keeps it from children forked meanwhile.

        Cells come first, the record right before the batch's own records.
        """
        cells = control + routine.CONTROL_BYTES
        values = (NR_madvise, self._scratch, self._scratch_bytes, _MADV_DONTFORK, 0, 0, 0, 0)
        pointers = [cells + 8 * index for index in range(7)]
        return struct.pack("<8Q8Q", *values, *pointers, 0)

    def _start(
        self,
        threads: list[TracedThread],
        controls: list[int],
        packed: list[Packed],
        blocks: list[int],
        *,
        fresh: bool,
    ) -> None:
        # The leader first, but it stays stopped until all are ready: if the agent dies in between, the leader must
        # already be bound to wait for the others before it unmaps.
        addresses = [self._leader_block(), *blocks]
        for index, (thread, control, plan, block) in enumerate(
            zip(threads, controls, packed, addresses)
        ):
            # A skeleton's registers may have been changed by what it ran (arch_prctl): take them as they are.
            regs = thread.regs.copy() if self.crash_safe else ptrace.getregs(thread.tid)
            regs.rip = self._code() + routine.BATCH
            regs.orig_rax = _U64
            regs.r15, regs.r12 = block, control
            prelude = routine.RECORD_BYTES if fresh and not index else 0
            regs.rbx, regs.rbp = plan.first - prelude, plan.undo
            regs.r13, regs.r14 = plan.undo, plan.end
            if self.crash_safe and index:
                self._send_in(thread, block, regs)
            else:
                ptrace.setregs(thread.tid, regs)
        for thread in threads:
            self._cont(thread)

    def _send_in(self, thread: TracedThread, block: int, regs: user_regs_struct) -> None:
        assert self._tail is not None
        healing = restart.healing_regs(thread.regs)
        self._point_at_join(thread, block, regs)
        ptrace.setsigmask(thread.tid, ALL_BLOCKED)
        self._requeue_signal(thread)
        content = _block(thread, self._stubs[healing.rip], self._ticket, self._tail.heal)
        self._memory.write(block, content)

    def _take_out(self, thread: TracedThread, block: int) -> None:
        regs = thread.regs.copy()
        regs.rbx = regs.rbp = regs.r13 = 0  # no calls to make: should it find its ticket it leaves at once
        self._point_at_join(thread, block, regs)
        self._withdraw_ticket(block)
        self._restore_exactly(thread)

    def _point_at_join(self, thread: TracedThread, block: int, regs: user_regs_struct) -> None:
        """Point a thread at the code that goes on with ``regs`` (rbx, rbp, r12-r14) if its ticket is there."""
        assert self._tail is not None
        tail, rip = self._tail, restart.healing_regs(thread.regs).rip
        way_back = _block(thread, tail.stub_of(tail.passing), 0, tail.heal)
        tail.write_slot(tail.passing, way_back, rip)
        regs.rip, regs.orig_rax, regs.r15 = tail.join, _U64, tail.passing
        regs.rax, regs.rsi, regs.r9 = NR_futex, FUTEX_CMP_REQUEUE | FUTEX_PRIVATE_FLAG, self._ticket
        regs.rdi = regs.r8 = block + routine.BLOCK_TICKET
        regs.rdx = regs.r10 = 0
        ptrace.setregs(thread.tid, regs)

    def _withdraw_ticket(self, block: int) -> None:
        """Have the first thread wait for the thread of this block no more: the block counts as read to the end."""
        gone = bytearray(routine.BLOCK_BYTES)
        struct.pack_into("<Q", gone, routine.BLOCK_R15, block)
        self._memory.write(block, bytes(gone))

    def _finish(self, threads: list[TracedThread], controls: list[int]) -> None:
        """Wait until every routine reports, then stop the threads where they wait."""
        began = time.monotonic()
        looks = 0
        # A skeleton stops at every thread that it makes, a source only for a rare SIGSTOP.
        stride = 8 if self.crash_safe else 2
        for thread, control in zip(threads, controls):
            while not self._is_done(thread, control):
                looks += 1
                if looks % stride == 0:
                    self._serve_stops(threads)
                waited = time.monotonic() - began
                pause(waited)
                if waited > RUN_TIMEOUT_S:
                    raise FreezeError(
                        f"System calls injected into thread {thread.tid} of process {self.tracer.pid} do not end"
                    )
        for thread in threads:
            self._stop_in_routine(thread)

    def _is_done(self, thread: TracedThread, control: int) -> bool:
        try:
            return self._memory.read_u64(control + routine.CONTROL_DONE) != 0
        except OSError as err:
            raise self._lost_control(thread) from err

    def _serve_stops(self, threads: list[TracedThread]) -> None:
        for thread in threads:
            if thread.stopped:
                continue
            stop = self.tracer.poll_stop(thread)
            if stop is None:
                continue
            sig = self._signal_to_pass(thread, stop.sig) if stop.kind is StopKind.SIGNAL else 0
            self._cont(thread, sig)

    def _signal_to_pass(self, thread: TracedThread, sig: int) -> int:
        """Return what to continue a signal-delivery-stop with, inside the routine.

        Only SIGSTOP (not blockable) can come here, and what our own mistakes cause.
        """
        if sig in (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP):
            regs = ptrace.getregs(thread.tid)
            info = ptrace.getsiginfo(thread.tid)
            if struct.unpack_from("<i", info, 8)[0] > 0:  # si_code: from the kernel
                if self.crash_safe:
                    self._restore_exactly(thread)
                raise InjectError(
                    f"Injected code failed with signal {sig} at {regs.rip:#x} in thread {thread.tid}"
                )
        return sig

    def _stop_in_routine(self, thread: TracedThread) -> None:
        """Interrupt the thread and wait for the stop; hand on a SIGSTOP that comes first."""
        if thread.stopped:
            return
        ptrace.interrupt(thread.tid)
        self._wait_event_stop(thread)
        if not self._is_ours(ptrace.getregs(thread.tid).rip):
            raise self._lost_control(thread)

    def _wait_event_stop(self, thread: TracedThread) -> None:
        while True:
            stop = self.tracer.wait_stop(thread)
            if stop.kind is StopKind.EVENT_STOP:
                return
            sig = self._signal_to_pass(thread, stop.sig) if stop.kind is StopKind.SIGNAL else 0
            ptrace.interrupt(thread.tid)  # the stop that was taken used the last one up
            self._cont(thread, sig)

    def _lost_control(self, thread: TracedThread) -> TooLateError:
        """The agent was too slow: the thread went its way, as it would have without an agent."""
        if thread is self._host:
            self._host = None
            self._scratch = self._scratch_bytes = 0
        if self.crash_safe:
            self._wait_healed(thread)
        return TooLateError(
            f"Process {self.tracer.pid} finished the injected system calls before the agent looked at them",
            hint="the agent got no CPU time for half a second; try again",
        )

    def _wait_healed(self, thread: TracedThread) -> None:
        """Leave a thread that is on its way back alone until it is there, then stop it anew."""
        deadline = time.monotonic() + RUN_TIMEOUT_S
        while True:
            if not thread.stopped:
                ptrace.interrupt(thread.tid)
                stop = self.tracer.wait_stop(thread)
            else:
                stop = None
            sig = stop.sig if stop is not None and stop.kind is StopKind.SIGNAL else 0
            if not self._is_ours(ptrace.getregs(thread.tid).rip) or time.monotonic() > deadline:
                thread.forget()
                thread.pending_stop_signal = sig
                return
            self._cont(thread, sig)
            time.sleep(0.001)

    def _recover_workers(self, workers: list[TracedThread], blocks: list[int]) -> None:
        """After a failure: no thread but the host may go on using the scratch mapping."""
        if not self.crash_safe:
            return
        for thread, block in zip(workers, blocks):
            try:
                if not thread.stopped:
                    ptrace.interrupt(thread.tid)
                    self._wait_event_stop(thread)
                if self._is_ours(ptrace.getregs(thread.tid).rip):
                    self._take_out(thread, block)
                else:
                    thread.forget()
            except (ProcessLookupError, TargetGone):
                log.debug("thread %d died in the routine", thread.tid)

    # -- entering and leaving a thread (crash_safe) ----------------------------------------------------------------

    def _enter(self, thread: TracedThread, nr_bytes: int) -> None:
        if not self.crash_safe:
            self._ensure_persistent(thread, nr_bytes)
            return
        # A new batch must not overwrite the last one: its undo records count until the thread is pointed elsewhere.
        first, end = self._in_use
        if end + nr_bytes <= self._scratch_bytes:
            self._in_use = (end, end + nr_bytes)
        elif nr_bytes <= first:
            self._in_use = (0, nr_bytes)
        elif self._host is not None:
            self._leave()
        if self._host is not None and self._host is not thread:
            self._leave()
        if self._host is None:
            self._map_scratch(thread, max(_MIN_SCRATCH_BYTES, _round_up(nr_bytes)))
            self._in_use = (0, nr_bytes)

    def _map_scratch(self, thread: TracedThread, nr_bytes: int) -> None:
        self._study(thread)
        tail = self._ensure_tail()
        healing = restart.healing_regs(thread.regs)
        tail.write()
        tail.write_slot(
            tail.block, _block(thread, tail.stub_of(tail.block), nr_bytes, tail.gather), healing.rip
        )
        regs = thread.regs.copy()
        regs.rip, regs.orig_rax, regs.r15 = tail.map, _U64, tail.block
        regs.rax, regs.rdi, regs.rsi, regs.rdx = NR_mmap, 0, nr_bytes, _PROT_RW
        regs.r10, regs.r8, regs.r9 = _MAP_PRIVATE_ANONYMOUS, _U64, 0
        # From here on the thread heals by itself.
        ptrace.setregs(thread.tid, regs)
        ptrace.setsigmask(thread.tid, ALL_BLOCKED)
        self._host = thread
        self._requeue_signal(thread)
        result = self._finish_call(thread).result
        if result < 0:
            self._restore_exactly(thread)
            self._host = None
            raise InjectError(
                f"Cannot map {nr_bytes} bytes in process {self.tracer.pid}: {os.strerror(-result)}",
                errno=-result,
            )
        self._scratch, self._scratch_bytes, self._fresh = result, nr_bytes, True

    def _study(self, thread: TracedThread) -> None:
        """Learn everything about the stop that is lost when the thread runs: registers, mask, interrupted call."""
        restart.settle(thread, self._memory)
        restart.leave_rseq_section(thread, self._memory)
        thread.sigmask  # noqa: B018  # reads it

    def _ensure_tail(self) -> Tail:
        if self._tail is None:
            self._tail = Tail(self._memory, find_tail(self._memory))
        return self._tail

    def _finish_call(self, thread: TracedThread) -> user_regs_struct:
        """Let the thread make the call it is set up for; return the registers right behind it."""
        while True:
            thread.stopped = False
            ptrace.cont_to_syscall(thread.tid)
            stop = self.tracer.wait_stop(thread)
            if stop.kind is StopKind.SYSCALL:
                break
            if stop.kind is StopKind.SIGNAL:
                ptrace.interrupt(thread.tid)
                self._cont(thread, self._signal_to_pass(thread, stop.sig))
                self._wait_event_stop(thread)
        # In the call. An interrupt now takes effect on its way out: mmap, munmap and mremap do not mind it, and it is
        # an ordinary stop, where the kernel honours orig_rax.
        ptrace.interrupt(thread.tid)
        self._cont(thread)
        self._wait_event_stop(thread)
        return ptrace.getregs(thread.tid)

    def _requeue_signal(self, thread: TracedThread) -> None:
        """Put the signal of a signal-delivery-stop back into its queue: the kernel does that when it is blocked."""
        if not thread.pending_stop_signal:
            return
        ptrace.interrupt(thread.tid)
        sig, thread.pending_stop_signal = thread.pending_stop_signal, 0
        thread._siginfo = None
        self._cont(thread, sig)
        self._wait_event_stop(thread)

    def _leave(self) -> None:
        """Unmap the scratch mapping and give the host thread back its exact state."""
        thread, tail = self._host, self._tail
        if thread is None or tail is None:
            return
        regs = thread.regs.copy()
        regs.rip, regs.orig_rax, regs.r15 = tail.unmap, _U64, tail.block
        regs.rdi, regs.rsi = self._scratch, self._scratch_bytes
        ptrace.setregs(thread.tid, regs)
        self._finish_call(thread)
        self._scratch = self._scratch_bytes = 0
        self._restore_exactly(thread)
        self._host = None

    def _restore_exactly(self, thread: TracedThread) -> None:
        # The mask first: as long as the registers are ours the thread restores both by itself.
        ptrace.setsigmask(thread.tid, thread.sigmask)
        ptrace.setregs(thread.tid, restart.resuming_regs(thread.regs))

    # -- the destination (not crash_safe) --------------------------------------------------------------------------

    def remote_syscall(self, thread: TracedThread, nr: int, *args: int) -> int:
        """Make one call in ``thread`` with a ``syscall`` instruction of the target; return its value.

        Only for a skeleton, and for calls that do not sleep. The thread's registers are as before afterwards.

        :raises InjectError: the call failed.
        """
        if self.crash_safe:
            raise ValueError("remote_syscall() is not safe against the agent's death")
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
        regs.rip, regs.orig_rax, regs.rax = self._syscall_instruction(), _U64, nr
        for name, value in zip(SYSCALL_ARGUMENTS, (*args, *(0,) * 6)):
            setattr(regs, name, value & _U64)
        ptrace.setregs(thread.tid, regs)
        return self._finish_call(thread).result

    def place(self, thread: TracedThread, content: bytes) -> int:
        """Write bytes into the persistent scratch mapping and return their address, valid until the next run()."""
        if self.crash_safe:
            raise ValueError("Only a skeleton has a persistent scratch mapping")
        self._ensure_persistent(thread, len(content) + PAGE_SIZE)
        self._memory.write(self._area_start(), content)
        return self._area_start()

    def end_thread(self, thread: TracedThread) -> None:
        """Have a thread of a skeleton exit(2), and wait until it is gone."""
        if self.crash_safe:
            raise ValueError("Threads of the source are not Ferry's to end")
        regs = ptrace.getregs(thread.tid)
        regs.rip, regs.orig_rax, regs.rax, regs.rdi = self._syscall_instruction(), _U64, NR_exit, 0
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
        if self.crash_safe:
            raise ValueError("interrupted_syscall() is not safe against the agent's death")
        ptrace.setsigmask(thread.tid, ALL_BLOCKED)
        return self._call_at_instruction(thread, nr, args)

    def move(self, new_addr: int, thread: TracedThread | None = None) -> None:
        """Move the scratch mapping to ``new_addr`` (nothing may be mapped there); all threads must be stopped."""
        if self.crash_safe or not self._scratch:
            raise ValueError("There is no persistent scratch mapping to move")
        thread = thread or self._default_thread()
        nr_bytes = self._scratch_bytes
        self._relocate(thread, nr_bytes, _MREMAP_MAYMOVE | _MREMAP_FIXED, new_addr)

    def _ensure_persistent(self, thread: TracedThread, nr_bytes: int) -> None:
        nr_bytes = _round_up(nr_bytes + PAGE_SIZE)
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

    def _parking_block(self) -> bytes:
        block = bytearray(routine.BLOCK_BYTES)
        struct.pack_into("<Q", block, 168, self._scratch + routine.PARK)
        return bytes(block)

    # -- both ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Remove every trace: the scratch mapping, the code, the threads' registers and signal masks.

        A skeleton keeps its threads as they are. Closing twice is harmless.
        """
        if not self.crash_safe:
            if self._scratch:
                thread = self._default_thread()
                nr_bytes, address = self._scratch_bytes, self._scratch
                self._unmap_persistent(thread, address, nr_bytes)
            return
        self._leave()
        if self._tail is not None:
            self._tail.restore()
            self._tail = None

    def _unmap_persistent(self, thread: TracedThread, address: int, nr_bytes: int) -> None:
        # The instruction goes with the mapping; the thread does not come back to it.
        self.remote_syscall(thread, NR_munmap, address, nr_bytes)
        self._scratch = self._scratch_bytes = 0

    def _default_thread(self) -> TracedThread:
        if self._host is not None:
            return self._host
        leader = self.tracer.threads.get(self.tracer.pid)
        if leader is not None and leader.stopped:
            return leader
        for thread in self.tracer.threads.values():
            if thread.stopped:
                return thread
        raise FreezeError(f"No thread of process {self.tracer.pid} is stopped")

    def _cont(self, thread: TracedThread, sig: int = 0) -> None:
        thread.stopped = False
        ptrace.cont(thread.tid, sig)

    def _code(self) -> int:
        if not self.crash_safe:
            return self._scratch
        assert self._tail is not None
        return self._tail.map - routine.MAP

    def _is_ours(self, rip: int) -> bool:
        code = self._code()
        return code <= rip < code + len(routine.ROUTINE)

    def _leader_block(self) -> int:
        if not self.crash_safe:
            return self._scratch + _align(len(routine.ROUTINE))
        assert self._tail is not None
        return self._tail.block

    def _area_start(self) -> int:
        return self._scratch + (self._in_use[0] if self.crash_safe else PAGE_SIZE)

    def _chunks(self, threads: list[TracedThread]) -> list[list[TracedThread]]:
        """Split where the room for return addresses ends."""
        if not self.crash_safe or not threads:
            return [threads] if threads else []
        tail = self._ensure_tail()
        leader = self._default_thread() if self._host is not None else threads[0]
        chunks: list[list[TracedThread]] = []
        rips: set[int] = set()
        if leader in threads:
            threads = [leader, *(t for t in threads if t is not leader)]
        for thread in threads:
            self._study(thread)
            rip = restart.healing_regs(thread.regs).rip
            if not chunks or (rip not in rips and len(rips) == tail.nr_stubs):
                chunks.append([])
                rips = set()
            elif chunks[-1]:
                rips.add(rip)
            chunks[-1].append(thread)
        return chunks


def _block(thread: TracedThread, stub: int, extra: int, leave: int) -> bytes:
    """Return what a thread needs to find back by itself, as routine_x86_64 reads it; ``extra``: size or ticket."""
    regs = restart.healing_regs(thread.regs)
    words = [getattr(regs, name) for name in routine.BLOCK_REGS]
    words += [stub, thread.sigmask, ALL_BLOCKED, extra, leave]
    return struct.pack("<22Q", *words)


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


def _control_and_batch_bytes(batch: Batch) -> int:
    return _align(_HEAD_BYTES + batch.size_bytes())


def _round_up(nr_bytes: int) -> int:
    return (nr_bytes + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1)


def _align(value: int) -> int:
    return (value + 63) & ~63
