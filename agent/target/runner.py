"""Batches of system calls run by threads of a stopped process: what source and destination have in common.

The machine code is in routine_x86_64.py. Threads come to run it, and leave it, in two ways: agent.target.inject (the
source, safe against the agent's death) and agent.target.inject_skeleton (the destination).
Addresses are target addresses.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from types import TracebackType
from typing import ClassVar, Final, NamedTuple, TypeVar

from agent.errors import FreezeError, InjectError, TargetGone, TooLateError
from agent.kernel import ptrace
from agent.kernel.arch import user_regs_struct
from agent.kernel.syscalls import NR_madvise
from agent.target import routine_x86_64 as routine
from agent.target.batch import Batch, Packed
from agent.target.template import Copy
from agent.target.traced import StopKind, TracedThread
from agent.target.tracer import Tracer
from agent.target.waiting import Errands, pause
from agent.target.workers import Workers
from agent.types import PAGE_SIZE

log = logging.getLogger(__name__)
_RunnerT = TypeVar("_RunnerT", bound="Runner")

U64: Final = (1 << 64) - 1
_MADV_DONTFORK: Final = 10
_CONTROL: Final = struct.Struct("<QQQ16xQ16x")
PRELUDE_BYTES: Final = 8 * 8 + routine.RECORD_BYTES
"""Cells and record of Runner._prelude()."""
_ERRANDS_S: Final = routine.WAIT_S / 5
"""How long the agent may do something else at most, instead of looking whether calls are done."""
MAX_PARALLEL: Final = 256
"""How many threads run batches at the same time at most: the first must not wait too long for the agent."""
RUN_TIMEOUT_S: Final = 30.0
"""How long a batch may take before the thread is given up as stuck."""


class Run(NamedTuple):
    """What run_parallel() lays out for threads that run at the same time, the one that unmaps first; addresses."""

    threads: list[TracedThread]
    packed: list[Packed]
    controls: range
    blocks: range
    """Of all threads but the first."""
    prelude_bytes: int
    """How far the first thread begins before its own records."""


class Runner(ABC):
    """Runs batches in threads of ``tracer``'s process, which the caller has stopped."""

    _waits_for_workers: ClassVar[bool]
    """Whether the first thread of a run goes on only when all others have left the routine."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer
        self._memory = tracer.memory
        self._scratch = 0
        self._scratch_bytes = 0
        self._fresh = False  # nothing has run since it was mapped

    def __enter__(self: _RunnerT) -> _RunnerT:
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

    # -- how threads come in and leave, by source and destination --------------------------------------------------

    @abstractmethod
    def _enter(self, thread: TracedThread, nr_bytes: int) -> None:
        """Make room for so many bytes at _area_start(), and have the first thread ready to be pointed anywhere."""

    @abstractmethod
    def _area_start(self) -> int: ...

    @abstractmethod
    def _code(self) -> int:
        """Where the routine is."""

    @abstractmethod
    def _leader_block(self) -> int:
        """Where the block of the first thread is."""

    @abstractmethod
    def _leader_regs(self, thread: TracedThread) -> user_regs_struct:
        """Return a copy of the registers that the first thread begins with."""

    @abstractmethod
    def _chunks(self, threads: list[TracedThread]) -> list[list[TracedThread]]:
        """Return which threads run at the same time."""

    @abstractmethod
    def _stride(self, run: Run) -> int:
        """After how many looks at the reports it is looked whether a thread has stopped."""

    @abstractmethod
    def _blank_blocks(self, workers: Workers | None, nr_blocks: int) -> bytes:
        """Return the blocks of all threads but the first."""

    @abstractmethod
    def _close(self) -> None: ...

    def _workers(self, run: Run) -> Workers | None:
        """Return what takes the threads but the first in and out; None: they stay in."""
        return None

    def _recover(self, workers: Workers) -> None:
        """After a failure: no thread but the first may go on using the scratch mapping."""

    def _give_back(self, thread: TracedThread) -> None:
        """Injected code has failed in a thread."""

    # -- running ---------------------------------------------------------------------------------------------------

    def run(self, batch: Batch, thread: TracedThread | None = None) -> None:
        """Make the calls of ``batch`` in ``thread`` (the leader), which stays stopped.

        :raises InjectError: a checked call failed (the whole batch has run all the same), or there is no way to run
            anything. :raises TargetGone: the process died.
        """
        thread = thread or self._default_thread()
        self._run({thread.tid: batch}, [thread])
        batch.check()

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
        controls_bytes, blocks_bytes = sizes(len(threads))
        batch_bytes = [align(batches[t.tid].size_bytes()) for t in threads]
        total = routine.BLOCK_STRIDE + controls_bytes + blocks_bytes + PRELUDE_BYTES + sum(batch_bytes)
        self._enter(threads[0], total)
        base = align(self._area_start(), routine.BLOCK_STRIDE)
        fresh, self._fresh = self._fresh, False
        blocks_at = base + controls_bytes
        prelude_at = blocks_at + blocks_bytes
        starts = accumulate(batch_bytes[:-1], initial=prelude_at + PRELUDE_BYTES)
        packed = [batches[t.tid].pack(start) for t, start in zip(threads, starts)]
        run = Run(
            threads=threads,
            packed=packed,
            controls=range(base, base + len(threads) * routine.CONTROL_BYTES, routine.CONTROL_BYTES),
            blocks=range(blocks_at, prelude_at, routine.BLOCK_STRIDE),
            prelude_bytes=routine.RECORD_BYTES if fresh else 0,
        )
        workers = self._workers(run)
        parts = [
            self._controls(run).ljust(controls_bytes, b"\0"),
            self._blank_blocks(workers, nr_workers),
            self._prelude(prelude_at),
        ]
        parts += [plan.content.ljust(size, b"\0") for plan, size in zip(packed, batch_bytes)]
        self._memory.write(base, b"".join(parts))
        try:
            self._start(run, workers)
            self._finish(run, workers)
        except BaseException:
            if workers:
                self._recover(workers)
            raise
        after = memoryview(self._memory.read(packed[0].first, sum(batch_bytes)))
        for thread, plan in zip(threads, packed):
            at = plan.first - packed[0].first
            batches[thread.tid].unpack(plan.first, bytes(after[at : at + len(plan.content)]))
        if workers:
            for thread in workers.threads:
                workers.take_out(thread)

    def _controls(self, run: Run) -> bytes:
        """Return the control areas; that of the first thread names the blocks to wait for."""
        nr_waited = len(run.blocks) if self._waits_for_workers else 0
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

    def _start(self, run: Run, workers: Workers | None) -> None:
        # The leader first, but it stays stopped until all are ready: if the agent dies in between, the leader must
        # already be bound to wait for the others before it unmaps.
        addresses = (self._leader_block(), *run.blocks)
        for thread, control, plan, block in zip(run.threads, run.controls, run.packed, addresses):
            is_first = thread is run.threads[0]
            regs = self._leader_regs(thread) if is_first else thread.regs.copy()
            regs.rip = self._code() + routine.BATCH
            regs.orig_rax = U64
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

    def _finish(self, run: Run, workers: Workers | None) -> None:
        """Wait until every routine reports, then stop the threads where they wait."""
        began = time.monotonic()
        while self.tracer.errands.step() and time.monotonic() < began + _ERRANDS_S:
            pass
        looks = 0
        stride = self._stride(run)
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

    def _find_busy(self, run: Run) -> TracedThread | None:
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
                self._give_back(thread)
                raise InjectError(
                    f"Injected code failed with signal {sig} at {regs.rip:#x} in thread {thread.tid}"
                )
        return sig

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
        return TooLateError(
            f"Process {self.tracer.pid} finished the injected system calls before the agent looked at them",
            hint="the agent got no CPU time for half a second; try again",
        )

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

    def close(
        self, *, meanwhile: Iterable[object] = (), then: Callable[[], object] = lambda: None
    ) -> None:
        """Remove every trace: the scratch mapping, the code, the threads' registers and signal masks.

        A skeleton keeps its threads as they are. Closing twice is harmless. ``meanwhile``: as in run_parallel();
        ``then`` is called before what is left of that.
        """
        with self._running_errands(meanwhile):
            self._close()
            then()

    def _default_thread(self) -> TracedThread:
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

    def _is_ours(self, rip: int) -> bool:
        code = self._code()
        return code <= rip < code + len(routine.ROUTINE)


def sizes(nr_threads: int) -> tuple[int, int]:
    """Return the bytes of the control areas and of the blocks of a run by so many threads."""
    controls_bytes = align(nr_threads * routine.CONTROL_BYTES, routine.BLOCK_STRIDE)
    return controls_bytes, (nr_threads - 1) * routine.BLOCK_STRIDE


def round_up(nr_bytes: int) -> int:
    return (nr_bytes + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1)


def align(value: int, alignment: int = 64) -> int:
    return (value + alignment - 1) & -alignment
