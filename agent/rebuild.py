"""The copy on the destination, from skeleton to running process.

    start            the skeleton, with the vdso where the target has it and nothing else mapped
    follow_layout    mappings as the source has them, again and again
    place            pages as they come
    prepare_threads, prepare_files  the source is about to freeze: what will most likely be needed
    begin_task       the source is frozen: what is common to the threads, new threads; its files are being dumped
    restore_files    open files; the last pages are on their way
    finish_memory    dropped pages, advice, locks
    finish_task      the insides of the threads
    finish_threads   all stand at their final registers, and nothing of this agent's is left in them
    release          they run

Every step may fail, and abandon() then leaves no trace. All ptrace requests come from the thread that made
the object. Order of the last steps: agent/state/process.py.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from agent.errors import RestoreError, TargetGone, TransferError
from agent.kernel import ptrace
from agent.kernel import syscalls as nr
from agent.kernel.mman import MADV_DONTNEED, MREMAP_FIXED, MREMAP_MAYMOVE
from agent.kernel.prctl import PR_SET_PDEATHSIG
from agent.options import RecvOptions
from agent.pages.digest import digest_process
from agent.pages.place import PagePlacer
from agent.preflight import only
from agent.procfs.maps import parse_maps, read_maps
from agent.ranges import RangeSet
from agent.report import PhaseClock
from agent.skeleton import FIRST_FREE_FD, Skeleton, create_skeleton
from agent.spaces import PROCESS_SPACE
from agent.state.clocks import (
    Clocks,
    ahead_at_restore,
    enter_calls,
    has_reached,
    is_own_clock,
    make_time_namespace,
    read_clocks,
)
from agent.state.context import RestoreContext
from agent.state.filerestore import FileRestorer
from agent.state.limits import raise_limits_calls
from agent.state.mirror import LayoutMirror
from agent.state.mm import open_exe, restore_mm
from agent.state.shmem import discard_shared, finish_shared, resize_shared, restore_shared
from agent.state.task import TaskRestore, TaskState, clone_calls, host_tids, study_new_task
from agent.state.vma import find_gap, plain, special_mappings
from agent.target.batch import Batch
from agent.target.hold import Hold
from agent.target.inject_skeleton import SkeletonInjector
from agent.target.template import Copy
from agent.target.tracer import Tracer
from agent.types import Pid, Tid
from agent.warmup import make_ordinary, make_urgent
from protocol.messages import Hello
from protocol.pages import PageBatch, PageEncoding
from protocol.state.files import FilesChange, FilesState
from protocol.state.guards import GuardsState
from protocol.state.mm import MmState
from protocol.state.plan import PlanState
from protocol.state.predump import PreDumpState
from protocol.state.shmem import SharedObject
from protocol.state.vma import BackingFile, LayoutState, VmaKind, VmaState

_log = logging.getLogger(__name__)

WORK_BYTES = 64 << 20
"""Address space that the restore needs for itself: the skeleton's program, room to move the vdso, scratch."""
ALL_SIGNALS = (1 << 64) - 1
"""A signal mask that blocks everything that can be blocked."""


class Rebuild:
    """One process being rebuilt; ``pid`` is as the agent sees it, ``ns_pid`` as the process itself does."""

    def __init__(
        self, options: RecvOptions, hello: Hello, clock: PhaseClock, *, recorded: bool
    ) -> None:
        self.options = options
        self._clock = clock
        self.hello = hello
        self.recorded = recorded
        self.notes: list[str] = []
        self.pages_total = 0
        self.pages_zero = 0
        self._cleanup = contextlib.ExitStack()
        self._placer = PagePlacer()
        self._cleanup.callback(self._placer.close)
        self._objects: dict[int, SharedObject] = {}
        self._object_fds: dict[int, int] = {}
        self._skeleton: Skeleton | None = None
        self._released = False
        self._asked_at = read_clocks()
        self._ahead = Clocks(0, 0)
        """How far the clocks of the process are ahead of the agent's."""
        self._knows_clocks = False
        """Whether the process has its clocks already."""
        self._host_tids: dict[int, Tid] = {}
        """Threads that are there, leader included, by their own ids."""
        self._urgent: set[Tid] = set()
        """Those that run before ordinary ones, by their ids as the agent sees them."""
        self._open_files: dict[tuple[BackingFile, bool], int] = {}
        self._restorer: FileRestorer | None = None
        self._memory_calls = Batch()
        """What is still to be called to finish memory."""
        self._leader_calls = Batch()
        """What is to be called by the leader after that."""
        self._last_calls = Batch()
        """Both of them, laid out ahead; as long as the layout is this:"""
        self._laid_out_for: LayoutState | None = None

    @property
    def skeleton(self) -> Skeleton:
        """The process; start() has made it."""
        assert self._skeleton is not None
        return self._skeleton

    @property
    def pid(self) -> Pid:
        """Pid as the agent sees it."""
        return self.skeleton.pid

    # -- the skeleton ----------------------------------------------------------------------------------

    def start(self, sections: Mapping[str, Sequence[object]]) -> None:
        """Make the skeleton and give it the source's layout as it was known then.

        :raises RestoreError: the process cannot be made.
        """
        plan = only(sections, "plan", PlanState)
        layout = only(sections, "layout", LayoutState)
        self.ns_pid = plan.pid
        self._ahead = Clocks(plan.monotonic_ns, plan.boottime_ns).minus(self._asked_at)
        self._work = find_gap([layout], WORK_BYTES, above=1 << 32)
        self._skeleton = create_skeleton(
            ns_pid=plan.pid,
            code_address=self._work,
            agent_pidfd=max(FIRST_FREE_FD, plan.highest_fd + 1),
            new_pidns=self.options.new_pidns,
        )
        self._cleanup.callback(self._skeleton.close)
        self.tracer = Tracer(self.pid, kill_on_exit=True)
        self._hold = Hold(self.tracer)
        self._cleanup.callback(self.tracer.memory.close)
        self.tracer.stop_all()
        self.injector = SkeletonInjector(self.tracer, scratch_hint=self._work + (32 << 20))
        self._mirror = LayoutMirror(
            self.pid,
            self.skeleton.agent_pidfd,
            self._backing_fd,
            self.injector.run,
            self.tracer.memory.fd,
        )
        self._host_tids = {plan.pid: Tid(self.pid)}
        self._placer.add_process_space(PROCESS_SPACE, self.pid)
        self._new_task = study_new_task(self.pid)
        self._clear_address_space(layout)
        # Shared objects are described with the first round only.
        known = tuple(vma for vma in layout.vmas if vma.kind is not VmaKind.OBJECT)
        self.follow_layout(replace(layout, vmas=known))

    def _clear_address_space(self, layout: LayoutState) -> None:
        """Move the kernel's own mappings where the target has them and unmap the rest of the skeleton."""
        wanted = special_mappings(layout)
        here = {e.path: e for e in parse_maps(read_maps(self.pid))}
        aside = self._work + (16 << 20)
        batch = Batch()
        raise_limits_calls(batch, self.pid)
        moves: list[tuple[int, int, int]] = []
        for name, vma in wanted.items():
            entry = here.get(name)
            size = vma.end - vma.start
            if entry is None or entry.end - entry.start != size:
                raise RestoreError(f"Cannot place {name}: this kernel has another one")
            flags = MREMAP_MAYMOVE | MREMAP_FIXED
            batch.call(nr.NR_mremap, entry.start, size, size, flags, aside, name=f"mremap({name})")
            moves.append((aside, size, vma.start))
            aside += size
        for name, entry in here.items():
            if name in ("[stack]", "[heap]") or name.startswith("/memfd:ferry-skeleton"):
                batch.call(nr.NR_munmap, entry.start, entry.end - entry.start, name="munmap")
        for source, size, target in moves:
            flags = MREMAP_MAYMOVE | MREMAP_FIXED
            batch.call(nr.NR_mremap, source, size, size, flags, target, name="mremap")
        self.injector.run(batch)

    # -- memory ----------------------------------------------------------------------------------------

    def follow_layout(self, layout: LayoutState) -> None:
        """Map what the source has mapped now."""
        self._move_out_of_the_way(layout)
        self._mirror.follow(layout)
        anonymous = RangeSet.of(
            (vma.start, vma.end)
            for vma in layout.vmas
            if vma.kind is VmaKind.ANON and not vma.shared
        )
        self._placer.set_anonymous(PROCESS_SPACE, anonymous)

    def _move_out_of_the_way(self, layout: LayoutState) -> None:
        scratch = self.injector.scratch_range or (0, 0)
        if any(vma.start < scratch[1] and scratch[0] < vma.end for vma in layout.vmas):
            self.injector.move(find_gap([layout, self._mirror.layout], WORK_BYTES, above=1 << 32))

    def _backing_fd(self, vma: VmaState, backing: BackingFile | None) -> int:
        if vma.kind is VmaKind.OBJECT:
            return self._object_fd(vma.object_id)
        assert backing is not None
        # Shared and writable mappings need a descriptor that may write. One for all mappings of a file, else the
        # kernel would not merge neighbours.
        writable = vma.shared and "mw" in vma.flags
        fd = self._open_files.get((backing, writable))
        if fd is None:
            try:
                fd = os.open(backing.path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
            except OSError as err:
                raise RestoreError(
                    f"Cannot map {backing.path} at {vma.start:#x}: {err.strerror}"
                ) from err
            self._cleanup.callback(os.close, fd)
            self._open_files[backing, writable] = fd
        return fd

    def describe_object(self, state: SharedObject) -> None:
        """Make a shared memory object, still empty, or follow a newer description of one."""
        known = self._objects.get(state.id)
        if known is None:
            fd = restore_shared(state)
            self._cleanup.callback(os.close, fd)
            self._placer.add_file_space(state.id, fd)
            self._object_fds[state.id] = fd
        elif known.size != state.size:
            resize_shared(self._object_fds[state.id], state.size)
        self._objects[state.id] = state

    def _object_fd(self, object_id: int) -> int:
        try:
            return self._object_fds[object_id]
        except KeyError:
            raise TransferError(f"The source did not describe object {object_id}") from None

    def place(self, batch: PageBatch) -> None:
        """Land one batch of pages."""
        self._placer.place(batch)
        if batch.encoding not in (PageEncoding.ABSENT, PageEncoding.EXPECT):
            self.pages_total += batch.nr_pages
        if batch.encoding is PageEncoding.ZERO:
            self.pages_zero += batch.nr_pages

    def settle(self) -> None:
        """A round has ended and the source still runs: do what would otherwise be done in the freeze."""
        self._placer.settle()

    def finish_memory(self, guards: GuardsState) -> None:
        """All pages and mappings are here: drop what is gone, then what must follow the last of them.

        The calls are made with those of digest() or finish_task().
        """
        absent = self._placer.take_absent(PROCESS_SPACE)
        if absent or guards.ranges or self._mirror.layout is not self._laid_out_for:
            self._memory_calls = self._plan_memory(absent, guards)
            self._last_calls = Batch.joined(self._memory_calls, self._leader_calls)

    def _plan_memory(self, absent: RangeSet, guards: GuardsState) -> Batch:
        batch = Batch()
        if absent:
            mapped = RangeSet.of((vma.start, vma.end) for vma in plain(self._mirror.layout.vmas))
            for start, end in absent.intersect(mapped):
                batch.call(nr.NR_madvise, start, end - start, MADV_DONTNEED, name="madvise(DONTNEED)")
        self._mirror.finish(batch, zip(guards.ranges[0::2], guards.ranges[1::2], strict=True))
        self._task.future_mappings_calls(batch)
        return batch

    def digest(self) -> str:
        """Digest of all memory, which is finished, as the source computes it."""
        # Alone: what threads do to be restored changes memory.
        if len(self._memory_calls):
            self.injector.run(self._memory_calls)
            self._last_calls = Batch.joined(self._leader_calls)
        scratch = self.injector.scratch_range or (0, 0)
        entries = [
            entry
            for entry in parse_maps(read_maps(self.pid))
            if not (scratch[0] <= entry.start < scratch[1])
        ]
        return digest_process(self.pid, entries)

    # -- everything else -------------------------------------------------------------------------------

    def prepare_threads(self, state: PreDumpState) -> None:
        """Make the threads that the source has now; those it has in the end are made of them.

        :raises InjectError: a thread cannot be made.
        """
        with self._step("prepare threads"):
            batch = Batch()
            seen = Clocks(state.monotonic_ns, state.boottime_ns)
            self._enter_clocks(batch, seen.minus(read_clocks()).best(self._ahead))
            self._clone_threads(batch, [tid for tid in state.tids if tid != self.ns_pid])
            # The leader still works for a target that runs.
            self._make_urgent({*self._host_tids.values()} - {Tid(self.pid)})

    def prepare_files(self, state: FilesState) -> None:
        """Make the open files that the source has now, as far as nobody notices.

        :raises InjectError: a call in the skeleton fails.
        """
        with self._step("prepare files"):
            self._file_restorer().prepare(state)

    def begin_task(self, sections: Mapping[str, Sequence[object]]) -> None:
        """Make the task as far as it needs no files; those, pages and mappings may still come."""
        states = [state for kind in sections.values() for state in kind]
        self._mm = only(sections, "mm", MmState)
        self._task = TaskRestore(
            TaskState.from_sections(states),
            self.pid,
            self._new_task,
            keep_pdeath_signal=self.options.wait,
            urgent=self._make_urgent(self._host_tids.values()),
        )
        batch = Batch()
        self._task.early_calls(batch)
        self._task.process_calls(batch)
        with self._step("memory map"):
            exe_fd = open_exe(self._mm)
            try:
                restore_mm(batch, self._mm, agent_pidfd=self.skeleton.agent_pidfd, exe_fd=exe_fd)
                self.injector.run(batch)
            finally:
                os.close(exe_fd)
        with self._step("make threads"):
            self._make_threads(self._task)
            self._make_urgent(self._host_tids.values())
        with self._step("lay out calls"):
            self._task.write_files()
            self._thread_copies = self._task.thread_copies(self._host_tids)
            leader = Batch()
            leader.call(nr.NR_prctl, PR_SET_PDEATHSIG, 0, name="prctl(PR_SET_PDEATHSIG)")
            self._task.leader_calls(leader)
            self._leader_calls = leader

    def restore_files(self, sections: Mapping[str, Sequence[object]]) -> None:
        """Restore the open files of the task, which completes what the leader has to call in the end."""
        files: FilesState | FilesChange
        if "files_change" in sections:
            files = only(sections, "files_change", FilesChange)
        else:
            files = only(sections, "files", FilesState)
        self._files_ns = files.clock_monotonic_ns
        with self._step("open files"):
            self._file_restorer().open_all(files)
        with self._step("install files"):
            self._file_restorer().install()
        with self._step("lay out calls"):
            leader = self._leader_calls
            self._file_restorer().last_calls(leader)
            leader.call(nr.NR_close, self.skeleton.agent_pidfd, name="close")
            # Most likely neither mappings nor guard pages change any more.
            self._laid_out_for = self._mirror.layout
            self._memory_calls = self._plan_memory(RangeSet(), GuardsState(ranges=()))
            self._last_calls = Batch.joined(self._memory_calls, leader)
            self.injector.lay_out(self._last_calls, len(self._host_tids) if self._task.is_order_free else 1)

    def _make_urgent(self, tids: Collection[Tid]) -> bool:
        """Have no thread wait for a CPU to make injected calls; their own scheduling comes at the end.

        A thread born of an urgent one would have no timer slack by default, so each is made urgent by itself.
        """
        self._urgent.update([tid for tid in tids if tid not in self._urgent and make_urgent(tid)])
        return self._urgent.issuperset(tids)

    def _step(self, name: str) -> contextlib.AbstractContextManager[None]:
        return self._clock.phase(f"restore: {name}", frozen=True)

    def finish_task(self) -> None:
        """Restore all that begin_task() left, but for what the threads stand at."""
        self._restore_threads(self._task)

    def finish_threads(self) -> None:
        """Have every thread stand at its final registers; no calls can be made in them any more."""
        with self._clock.phase("commit: registers", frozen=True):
            self._finish_threads(self._task)

    def _file_restorer(self) -> FileRestorer:
        if self._restorer is None:
            context = RestoreContext(
                pid=self.pid,
                injector=self.injector,
                options=self.options,
                agent_pidfd=self.skeleton.agent_pidfd,
                reserved_fds=frozenset({self.skeleton.agent_pidfd}),
                shared_fd=self._object_fd,
            )
            self._restorer = FileRestorer(context)
            self._cleanup.callback(self._restorer.close)
        return self._restorer

    def _make_threads(self, restore: TaskRestore) -> None:
        process = restore.state.process
        wanted = {thread.tid for thread in restore.state.threads}
        batch = Batch()
        if not self._knows_clocks or not has_reached(self._ahead, process):
            # Entered alone only, so those made ahead go; rare: the message of then took longer than the freeze.
            self._end_threads(self._host_tids.keys() - {process.pid})
            self._enter_clocks(batch, ahead_at_restore(process, self._ahead, recorded=self.recorded))
        self._end_threads(self._host_tids.keys() - wanted)
        missing = [thread.tid for thread in restore.state.threads if thread.tid not in self._host_tids]
        if len(batch) or missing:
            self._clone_threads(batch, missing)
        if self._host_tids.keys() != wanted:
            raise RestoreError(
                f"Task {self.pid} has threads {sorted(self._host_tids)} instead of {sorted(wanted)}"
            )

    def _clone_threads(self, batch: Batch, tids: Sequence[int]) -> None:
        clone_calls(batch, tids)
        if tids:
            make_ordinary(self.pid)  # see _make_urgent()
            self._urgent.discard(Tid(self.pid))
        self.injector.run(batch)
        self._host_tids = host_tids(self.pid)
        for tid in tids:
            self.tracer.adopt(self._host_tids[tid])

    def _end_threads(self, tids: Iterable[int]) -> None:
        for tid in tids:
            host_tid = self._host_tids.pop(tid)
            self.injector.end_thread(self.tracer.threads[host_tid])
            self._urgent.discard(host_tid)

    def _enter_clocks(self, batch: Batch, ahead: Clocks) -> None:
        """Have the process's clocks go on where they stood; nothing is added where they do so by themselves."""
        self._knows_clocks = True
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            same_boot = file.read().strip() == self.hello.host.boot_id
        if is_own_clock(ahead, same_boot=same_boot):
            self._ahead = Clocks(0, 0)
            return
        self._ahead = ahead
        fd = make_time_namespace(ahead)
        self._cleanup.callback(os.close, fd)
        enter_calls(batch, fd, agent_pidfd=self.skeleton.agent_pidfd)

    def _restore_threads(self, restore: TaskRestore) -> None:
        # In one stop, if it can be.
        last: dict[int, Batch | Copy] = {self.pid: self._last_calls}
        if restore.is_order_free:
            last.update(self._thread_copies)
        else:
            with self._step("threads"):
                self.injector.run_parallel(self._thread_copies)
        # The files were read a little later than the task.
        self._file_restorer().start(elapsed_ns=self._elapsed_ns(self._files_ns))
        for object_id, state in self._objects.items():
            finish_shared(self._object_fds[object_id], state)
        with self._step("leader"):
            self.injector.run_parallel(last)
            restore.verify()
            self.notes += restore.notes
        timers = Batch()
        restore.timers_calls(
            timers, elapsed_ns=self._elapsed_ns(restore.state.process.clock_monotonic_ns)
        )
        if len(timers):
            with self._step("timers"):
                self.injector.run(timers)

    def _elapsed_ns(self, since_ns: int) -> int:
        """How long ago the process's own clock showed ``since_ns``."""
        if self.recorded:
            return 0  # Time stands still in an image.
        now_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC) + self._ahead.monotonic_ns
        return max(0, now_ns - since_ns)

    def _finish_threads(self, restore: TaskRestore) -> None:
        restore.finish_ptrace(self.tracer, self.injector, self._host_tids)
        # Removing the scratch mapping lets the leader run for one call: no signal may come in between.
        ptrace.setsigmask(self.pid, ALL_SIGNALS)
        self.injector.close()
        ptrace.setsigmask(self.pid, restore.state.leader.sigmask)
        restore.calm_down(self._host_tids)

    # -- the end ---------------------------------------------------------------------------------------

    def prepare_hold(self) -> None:
        """Do what hold() can have done ahead: the copy still dies with this agent.

        :raises TargetGone: somebody has killed it.
        """
        self._hold.take()

    def hold(self) -> None:
        """Keep the copy stopped whatever happens to this agent; it no longer dies with it.

        :raises TargetGone: somebody has killed it.
        """
        self._hold.take()
        self.tracer.spare_on_exit()
        if not self.tracer.still_stopped():
            raise TargetGone(f"Process {self.pid} was killed")

    def leave_held(self) -> None:
        """Let go of a copy that hold() keeps stopped: whoever learns what it is will end it or set it free."""
        self._released = True
        self.tracer.detach_all()
        self._cleanup.close()

    def release(self) -> int:
        """Let the copy run; returns the CLOCK_MONOTONIC time of the last thread's release in ns."""
        self._released = True
        try:
            self._hold.drop()
            if self._task.state.process.stop_signal:
                # Queued before the first thread is let go: each finds it before it runs an instruction.
                os.kill(self.pid, self._task.state.process.stop_signal)
            self.tracer.detach_all()
        except TargetGone as err:
            # Killed by somebody, or by a signal that was waiting for it: that it may do, as a running process.
            _log.warning("Process %d ended as it was released: %s", self.pid, err)
        released_ns = time.monotonic_ns()
        self._cleanup.close()
        return released_ns

    def abandon(self) -> None:
        """End the copy for good and let go of everything; it must not have been released."""
        if self._released:
            return
        if self._skeleton is not None:
            self._skeleton.kill(self._reap_threads)
        for state in self._objects.values():
            discard_shared(state)
        self._cleanup.close()

    def _reap_threads(self) -> None:
        # The kernel keeps the leader's end back until the tracer has taken that of every other thread.
        if "tracer" in vars(self):
            self.tracer.forget_all()

    def write_pidfile(self) -> None:
        """Write the pid where --pidfile says."""
        if self.options.pidfile:
            with open(self.options.pidfile, "w", encoding="ascii") as file:
                file.write(f"{self.pid}\n")

    def wait_exit(self) -> int:
        """Wait for the restored process to exit and return its exit status, as a shell gives it."""
        _pid, status = os.waitpid(self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        return code if code >= 0 else 128 - code
