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

A batch must not contain calls that sleep for long, and on the source none with a restart block (nanosleep, poll,
futex): it would replace the thread's own. Addresses are target addresses.
"""

from __future__ import annotations

import logging
import os
import time
from typing import ClassVar, Final, final

from agent.errors import InjectError, TargetGone, TooLateError
from agent.kernel import ptrace
from agent.kernel.arch import user_regs_struct
from agent.kernel.syscalls import NR_mmap
from agent.target import restart
from agent.target import routine_x86_64 as routine
from agent.target.batch import Batch, Blob, BlobAddress, Call, Cell
from agent.target.runner import MAX_PARALLEL, RUN_TIMEOUT_S, U64, Run, Runner, round_up
from agent.target.tail import ALL_BLOCKED, Tail, find_tail
from agent.target.traced import StopKind, TracedThread
from agent.target.tracer import Tracer
from agent.target.workers import Workers, restore_exactly, way_home

__all__ = ["Batch", "Blob", "BlobAddress", "Call", "Cell", "Injector"]

log = logging.getLogger(__name__)

_MAP_PRIVATE_ANONYMOUS: Final = 0x02 | 0x20
_PROT_RW: Final = 0x1 | 0x2
_MIN_SCRATCH_BYTES: Final = 128 * 1024


@final
class Injector(Runner):
    """Runs batches in threads of ``tracer``'s process, which the caller has stopped, as if they had not."""

    _waits_for_workers: ClassVar[bool] = True

    def __init__(self, tracer: Tracer) -> None:
        super().__init__(tracer)
        self._in_use = (0, 0)  # offsets of the last batch in the scratch mapping
        self._host: TracedThread | None = None  # the thread that is in the routine
        self._tail: Tail | None = None

    # -- entering and leaving a thread -----------------------------------------------------------------------------

    def _enter(self, thread: TracedThread, nr_bytes: int) -> None:
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
            self._map_scratch(thread, max(_MIN_SCRATCH_BYTES, round_up(nr_bytes)))
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
        regs.rip, regs.orig_rax, regs.r15 = tail.map, U64, tail.block
        regs.rax, regs.rdi, regs.rsi, regs.rdx = NR_mmap, 0, nr_bytes, _PROT_RW
        regs.r10, regs.r8, regs.r9 = _MAP_PRIVATE_ANONYMOUS, U64, 0
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
        regs.rip, regs.orig_rax, regs.r15 = tail.unmap, U64, tail.block
        regs.rdi, regs.rsi = self._scratch, self._scratch_bytes
        ptrace.setregs(thread.tid, regs)
        self._finish_call(thread)
        self._scratch = self._scratch_bytes = 0
        restore_exactly(thread)
        self._host = None

    def _close(self) -> None:
        self._leave()
        if self._tail is not None:
            self._tail.restore()
            self._tail = None

    def _default_thread(self) -> TracedThread:
        return self._host if self._host is not None else super()._default_thread()

    # -- the other threads of a run --------------------------------------------------------------------------------

    def _workers(self, run: Run) -> Workers:
        assert self._tail is not None
        return Workers(self._tail, self._memory, run.threads[1:], run.blocks, self._requeue_signal)

    def _blank_blocks(self, workers: Workers | None, nr_blocks: int) -> bytes:
        assert workers is not None
        return workers.blank_blocks()

    def _chunks(self, threads: list[TracedThread]) -> list[list[TracedThread]]:
        """Split where the room for return addresses ends, and large numbers."""
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
            full = chunks and len(chunks[-1]) == MAX_PARALLEL
            if not chunks or full or (rip not in rips and len(rips) == tail.nr_stubs):
                chunks.append([])
                rips = set()
            elif chunks[-1]:
                rips.add(rip)
            chunks[-1].append(thread)
        return chunks

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

    def _stop(self, thread: TracedThread) -> None:
        """Stop a thread that may have been interrupted already."""
        stop = self.tracer.poll_stop(thread)
        if stop is None or stop.kind is not StopKind.EVENT_STOP:
            ptrace.interrupt(thread.tid)
            if stop is not None:
                self._cont(thread, self._signal_to_pass(thread, stop.sig) if stop.kind is StopKind.SIGNAL else 0)
            self._wait_event_stop(thread)

    # -- when something goes wrong ---------------------------------------------------------------------------------

    def _give_back(self, thread: TracedThread) -> None:
        restore_exactly(thread)

    def _lost_control(self, thread: TracedThread) -> TooLateError:
        if thread is self._host:
            self._host = None
            self._scratch = self._scratch_bytes = 0
        self._wait_healed(thread)
        return super()._lost_control(thread)

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

    # -- where things are ------------------------------------------------------------------------------------------

    def _code(self) -> int:
        assert self._tail is not None
        return self._tail.map - routine.MAP

    def _leader_block(self) -> int:
        assert self._tail is not None
        return self._tail.block

    def _area_start(self) -> int:
        return self._scratch + self._in_use[0]

    def _leader_regs(self, thread: TracedThread) -> user_regs_struct:
        return thread.regs.copy()

    def _stride(self, run: Run) -> int:
        # They stop only for a rare SIGSTOP, and all have to be asked.
        return max(8, len(run.threads) // 4)
