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

Batches in several threads at once share the scratch mapping. The first thread unmaps it when the others have left:
agent.target.workers says how it knows of each that enters or is taken out, whenever the agent dies.

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

import contextlib
import logging
import os
import signal
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from types import TracebackType
from typing import Final, NamedTuple, final

from agent.errors import FreezeError, InjectError, TargetGone, TooLateError
from agent.kernel import ptrace
from agent.kernel.arch import SYSCALL_ARGUMENTS, SYSCALL_INSTRUCTION, user_regs_struct
from agent.kernel.syscalls import (
    NR_exit,
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
from agent.target.template import Copy
from agent.target.traced import StopKind, TracedThread
from agent.target.tracer import Tracer
from agent.target.waiting import Errands, pause
from agent.target.workers import Workers, restore_exactly, way_home
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
_CONTROL: Final = struct.Struct("<QQQ16xQ16x")
_PRELUDE_BYTES: Final = 8 * 8 + routine.RECORD_BYTES
"""Cells and record of _prelude()."""
_ERRANDS_S: Final = routine.WAIT_S / 5
"""How long the agent may do something else at most, instead of looking whether calls are done."""
_MAX_PARALLEL: Final = 256
"""How many threads run batches at the same time at most: the first must not wait too long for the agent."""
RUN_TIMEOUT_S: Final = 30.0
"""How long a batch may take before the thread is given up as stuck."""


class _Run(NamedTuple):
    """What run_parallel() lays out for threads that run at the same time, the one that unmaps first; addresses."""

    threads: list[TracedThread]
    packed: list[Packed]
    controls: range
    blocks: range
    """Of all threads but the first."""
    prelude_bytes: int
    """How far the first thread begins before its own records."""


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

    def lay_out(self, batch: Batch, nr_threads: int) -> None:
        """Do what can be done ahead for the first batch of a run by so many threads of a skeleton."""
        base = _align(self._area_start(), routine.BLOCK_STRIDE)
        controls_bytes, blocks_bytes = _sizes(nr_threads)
        batch.pack(base + controls_bytes + blocks_bytes + _PRELUDE_BYTES)

    def run_parallel(
        self, batches: Mapping[int, Batch | Copy], *, meanwhile: Iterable[object] = ()
    ) -> None:
        """Make the calls of several batches, each in the thread of that tid, at the same time.

        Instead of waiting, the agent takes the steps of ``meanwhile``, and what is left of them afterwards.

        :raises InjectError: as run(), for the first failure in order, when all batches have run.
        """
        threads = [self.tracer.threads[tid] for tid in batches]
        with self._running_errands(meanwhile):
            for chunk in self._chunks(threads):
                self._run(batches, chunk)
        for batch in batches.values():
            batch.check()

    @contextlib.contextmanager
    def _running_errands(self, steps: Iterable[object]) -> Iterator[None]:
        errands = self.tracer.errands = Errands(steps)
        try:
            yield
        finally:
            self.tracer.errands = Errands()
        errands.finish()

    def _run(self, batches: Mapping[int, Batch | Copy], threads: list[TracedThread]) -> None:
        # In the scratch mapping: control areas, blocks of the workers, what keeps it from children, the batches.
        nr_workers = len(threads) - 1
        controls_bytes, blocks_bytes = _sizes(len(threads))
        sizes = [_align(batches[t.tid].size_bytes()) for t in threads]
        total = routine.BLOCK_STRIDE + controls_bytes + blocks_bytes + _PRELUDE_BYTES + sum(sizes)
        self._enter(threads[0], total)
        base = _align(self._area_start(), routine.BLOCK_STRIDE)
        fresh, self._fresh = self._fresh, False
        blocks_at = base + controls_bytes
        prelude_at = blocks_at + blocks_bytes
        starts = accumulate(sizes[:-1], initial=prelude_at + _PRELUDE_BYTES)
        packed = [batches[t.tid].pack(start) for t, start in zip(threads, starts)]
        run = _Run(
            threads=threads,
            packed=packed,
            controls=range(base, base + len(threads) * routine.CONTROL_BYTES, routine.CONTROL_BYTES),
            blocks=range(blocks_at, prelude_at, routine.BLOCK_STRIDE),
            prelude_bytes=routine.RECORD_BYTES if fresh else 0,
        )
        workers = self._workers(run)
        parts = [
            self._controls(run).ljust(controls_bytes, b"\0"),
            workers.blank_blocks() if workers else self._parking_block(routine.BLOCK_STRIDE) * nr_workers,
            self._prelude(prelude_at),
        ]
        parts += [plan.content.ljust(size, b"\0") for plan, size in zip(packed, sizes)]
        self._memory.write(base, b"".join(parts))
        try:
            self._start(run, workers)
            self._finish(run, workers)
        except BaseException:
            if workers:
                self._recover(workers)
            raise
        after = memoryview(self._memory.read(packed[0].first, sum(sizes)))
        for thread, plan in zip(threads, packed):
            at = plan.first - packed[0].first
            batches[thread.tid].unpack(plan.first, bytes(after[at : at + len(plan.content)]))
        if workers:
            for thread in workers.threads:
                workers.take_out(thread)

    def _workers(self, run: _Run) -> Workers | None:
        """Return what takes the threads but the first in and out; None for a skeleton, whose threads stay in."""
        if not self.crash_safe:
            return None
        assert self._tail is not None
        return Workers(self._tail, self._memory, run.threads[1:], run.blocks, self._requeue_signal)

    def _controls(self, run: _Run) -> bytes:
        """Return the control areas; that of the first thread names the blocks to wait for."""
        nr_waited = len(run.blocks) if self.crash_safe else 0
        first_block = run.blocks[0] if run.blocks else 0
        first = _CONTROL.pack(0, nr_waited, first_block, self._scratch)
        return first + _CONTROL.pack(0, 0, 0, self._scratch) * len(run.blocks)

    def _prelude(self, at: int) -> bytes:
        """Return a record, to be made first in a fresh scratch mapping, that keeps it from children forked meanwhile.

        Cells come first, the record right before the batch's own records.
        """
        values = (NR_madvise, self._scratch, self._scratch_bytes, _MADV_DONTFORK, 0, 0, 0, 0)
        pointers = [at + 8 * index for index in range(7)]
        return struct.pack("<8Q8Q", *values, *pointers, 0)

    def _start(self, run: _Run, workers: Workers | None) -> None:
        # The leader first, but it stays stopped until all are ready: if the agent dies in between, the leader must
        # already be bound to wait for the others before it unmaps.
        addresses = (self._leader_block(), *run.blocks)
        for thread, control, plan, block in zip(run.threads, run.controls, run.packed, addresses):
            is_first = thread is run.threads[0]
            # The leader's of a skeleton may have been changed by what it ran (arch_prctl): taken as they are.
            regs = thread.regs.copy() if self.crash_safe or not is_first else ptrace.getregs(thread.tid)
            regs.rip = self._code() + routine.BATCH
            regs.orig_rax = _U64
            regs.r15, regs.r12 = block, control
            regs.rbx, regs.rbp = plan.first - run.prelude_bytes * is_first, plan.undo
            regs.r13, regs.r14 = plan.undo, plan.end
            if workers and not is_first:
                workers.send_in(thread, regs)
            else:
                ptrace.setregs(thread.tid, regs)
            if not is_first:
                self._cont(thread)  # it finds work while the next is made ready
        self._cont(run.threads[0])

    def _finish(self, run: _Run, workers: Workers | None) -> None:
        """Wait until every routine reports, then stop the threads where they wait."""
        began = time.monotonic()
        while self.tracer.errands.step() and time.monotonic() < began + _ERRANDS_S:
            pass
        looks = 0
        # A skeleton's leader stops at every thread that it makes, others only for a rare SIGSTOP; all have to be asked.
        stride = max(8, len(run.threads) // 4) if self.crash_safe or run.blocks else 2
        while (busy := self._find_busy(run)) is not None:
            looks += 1
            if looks % stride == 0:
                self._serve_stops(run.threads)
            waited = time.monotonic() - began
            pause(waited)
            if waited > RUN_TIMEOUT_S:
                raise FreezeError(
                    f"System calls injected into thread {busy.tid} of process {self.tracer.pid} do not end"
                )
        running = [thread for thread in run.threads if not thread.stopped]
        for thread in running:
            ptrace.interrupt(thread.tid)
        for thread in running:
            self._wait_event_stop(thread)
        # Only the first thread can be anywhere else without having left a sign.
        lost = workers.find_lost() if workers else None
        if lost is not None or not self._is_ours(ptrace.getregs(run.threads[0].tid).rip):
            raise self._lost_control(lost or run.threads[0])

    def _find_busy(self, run: _Run) -> TracedThread | None:
        """Return a thread that does not report yet."""
        try:
            controls = self._memory.read(run.controls[0], routine.CONTROL_BYTES * len(run.controls))
        except OSError as err:
            raise self._lost_control(run.threads[0]) from err
        done = memoryview(controls).cast("Q")[:: routine.CONTROL_BYTES // 8].tolist()
        return run.threads[done.index(0)] if 0 in done else None

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
                    restore_exactly(thread)
                raise InjectError(
                    f"Injected code failed with signal {sig} at {regs.rip:#x} in thread {thread.tid}"
                )
        return sig

    def _stop(self, thread: TracedThread) -> None:
        """Stop a thread that may have been interrupted already."""
        stop = self.tracer.poll_stop(thread)
        if stop is None or stop.kind is not StopKind.EVENT_STOP:
            ptrace.interrupt(thread.tid)
            if stop is not None:
                self._cont(thread, self._signal_to_pass(thread, stop.sig) if stop.kind is StopKind.SIGNAL else 0)
            self._wait_event_stop(thread)

    def _wait_event_stop(self, thread: TracedThread) -> None:
        """Wait for the stop of an interrupted thread; hand on a SIGSTOP that comes first."""
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

    def _recover(self, workers: Workers) -> None:
        """After a failure: no thread but the host may go on using the scratch mapping."""
        for thread in workers.threads:
            try:
                if not thread.stopped:
                    self._stop(thread)
                if self._is_ours(ptrace.getregs(thread.tid).rip):
                    workers.take_out(thread)
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
            tail.block, way_home(thread, tail.stub_of(tail.block), nr_bytes, tail.gather), healing.rip
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
            restore_exactly(thread)
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
            self._tail = Tail(self._memory, find_tail(self._memory, self.tracer.tail))
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
        restore_exactly(thread)
        self._host = None

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

    def _parking_block(self, nr_bytes: int = routine.BLOCK_BYTES) -> bytes:
        block = bytearray(nr_bytes)
        struct.pack_into("<Q", block, 168, self._scratch + routine.PARK)
        return bytes(block)

    # -- both ------------------------------------------------------------------------------------------------------

    def close(self, *, meanwhile: Iterable[object] = ()) -> None:
        """Remove every trace: the scratch mapping, the code, the threads' registers and signal masks.

        A skeleton keeps its threads as they are. Closing twice is harmless. ``meanwhile``: as in run_parallel().
        """
        with self._running_errands(meanwhile):
            self._close()

    def _close(self) -> None:
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
        """Split where the room for return addresses ends, and large numbers."""
        if not self.crash_safe:
            return [threads[i : i + _MAX_PARALLEL] for i in range(0, len(threads), _MAX_PARALLEL)]
        if not threads:
            return []
        tail = self._ensure_tail()
        leader = self._default_thread() if self._host is not None else threads[0]
        chunks: list[list[TracedThread]] = []
        rips: set[int] = set()
        if leader in threads:
            threads = [leader, *(t for t in threads if t is not leader)]
        for thread in threads:
            self._study(thread)
            rip = restart.healing_regs(thread.regs).rip
            full = chunks and len(chunks[-1]) == _MAX_PARALLEL
            if not chunks or full or (rip not in rips and len(rips) == tail.nr_stubs):
                chunks.append([])
                rips = set()
            elif chunks[-1]:
                rips.add(rip)
            chunks[-1].append(thread)
        return chunks


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


def _sizes(nr_threads: int) -> tuple[int, int]:
    """Return the bytes of the control areas and of the blocks of a run by so many threads."""
    controls_bytes = _align(nr_threads * routine.CONTROL_BYTES, routine.BLOCK_STRIDE)
    return controls_bytes, (nr_threads - 1) * routine.BLOCK_STRIDE


def _round_up(nr_bytes: int) -> int:
    return (nr_bytes + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1)


def _align(value: int, alignment: int = 64) -> int:
    return (value + alignment - 1) & -alignment
