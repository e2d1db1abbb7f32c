"""A whole task, dumped and restored: one process with all its threads, without its memory and
files.

TaskDump prepares batches, so that one injected run reads everything of a stopped process;
TaskRestore has one method per step of the order that process.py documents. Neither runs a batch:
the source and the destination do. ``host_tid`` and ``host_pid`` are as the agent sees them;
ids in states are the process's own.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import resource
import signal
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from agent.errors import RestoreError
from agent.kernel import ptrace, wait
from agent.kernel.arch.x86_64 import NT_X86_XSTATE
from agent.kernel.clone import (
    CLONE_FILES,
    CLONE_FS,
    CLONE_SIGHAND,
    CLONE_SYSVSEM,
    CLONE_THREAD,
    CLONE_VM,
    clone_args,
)
from agent.kernel.syscalls import NR_clone3, NR_waitid
from agent.kernel.xstate import layout_of
from agent.procfs.files import ReadAgain, read_bytes
from agent.procfs.process import list_children, list_tids
from agent.procfs.stat import Stat, read_stat
from agent.procfs.status import Status, read_status, read_task_status
from agent.procfs.timers import read_timers
from agent.state.ahead import ThreadsAhead
from agent.state.creds import check_creds_restore, creds_of, own_securebits, own_status
from agent.state.limits import (
    check_limits_restore,
    dump_limits,
    restore_limits_calls,
)
from agent.state.process import (
    NewFiles,
    dumpable_call,
    future_mappings_calls,
    plan_process,
    read_new_files,
    read_process_files,
    restore_process_calls,
    session_calls,
    thp_call,
    write_process_files,
)
from agent.state.sched import (
    check_sched_restore,
    default_slice_ns,
    online_mask,
    own_timer_slack_ns,
    plan_sched,
    set_policy,
)
from agent.state.signals import (
    block_signals_call,
    plan_actions,
    restore_actions_calls,
    restore_shared_pending_calls,
)
from agent.state.thread import (
    VARIABLES_BYTES,
    ThreadCalls,
    ThreadStudy,
    likeness,
    pack_variables,
    peek_private_pending,
    peek_shared_pending,
    restore_thread_calls,
    restore_thread_ptrace,
    study_thread,
)
from agent.state.timers import (
    arm_timers_calls,
    check_timers_restore,
    create_timers_calls,
    plan_timers,
    settle_expired,
)
from agent.target.batch import Batch, Blob, Call
from agent.target.template import Copy, Template
from agent.types import Obstacle, Tid
from protocol.state.creds import CredState
from protocol.state.limits import LimitsState
from protocol.state.process import ProcessState
from protocol.state.signals import SignalsState
from protocol.state.thread import KeptThreadsState, ThreadsAheadState, ThreadsState, ThreadState
from protocol.state.timers import TimersState

if TYPE_CHECKING:
    from agent.state.context import DumpContext
    from agent.target.inject_skeleton import SkeletonInjector
    from agent.target.tracer import Tracer

_ANY_CHILD = os.WEXITED | os.WNOHANG | os.WNOWAIT | wait.WALL
_KEPT_FDS = 256
"""How many descriptors the agent may need for all the rest."""
_MOST_FDS = 1024
_THREADS_PER_SECTION = 1024
"""A section has a limit of 64 MiB, and the extended registers of one thread may take 11 KiB."""
_LOG = logging.getLogger(__name__)
_THREAD_FLAGS = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskState:
    """Everything of one task; ``threads`` has the leader first."""

    process: ProcessState
    limits: LimitsState
    signals: SignalsState
    timers: TimersState
    threads: tuple[ThreadState, ...]
    ahead: frozenset[int] = frozenset()
    """Ids of the threads that were sent ahead."""

    def __post_init__(self) -> None:
        if not self.threads or self.threads[0].tid != self.process.pid:
            raise ValueError(f"the leader of task {self.process.pid} is missing")
        tids = [thread.tid for thread in self.threads]
        if len(set(tids)) != len(tids):
            raise ValueError(f"task {self.process.pid} has two threads of one id")

    @property
    def leader(self) -> ThreadState:
        """The first thread, whose id is the process's."""
        return self.threads[0]

    def sections(self) -> list[tuple[str, int, object]]:
        """Return kind, owner id and schema object of each section, in the order to send."""
        pid = self.process.pid
        shared: list[tuple[str, int, object]] = [
            ("process", pid, self.process),
            ("limits", pid, self.limits),
            ("signals", pid, self.signals),
            ("timers", pid, self.timers),
        ]
        if self.ahead:
            shared.append(("kept_threads", pid, KeptThreadsState(tids=tuple(sorted(self.ahead)))))
        threads = [thread for thread in self.threads if thread.tid not in self.ahead]
        shared += [("threads", pid, some) for some in in_sections(threads)]
        return shared

    @classmethod
    def from_sections(cls, objects: Iterable[object]) -> TaskState:
        """Put received schema objects together; objects of other kinds are passed over.

        :raises RestoreError: something is missing, double or inconsistent.
        """
        found: dict[type[Any], list[Any]] = {}
        for obj in objects:
            found.setdefault(type(obj), []).append(obj)

        def one(kind: type[Any]) -> Any:
            if len(matching := found.get(kind, [])) != 1:
                raise RestoreError(f"Received {len(matching)} states of {kind.__name__}, not one")
            return matching[0]

        process = one(ProcessState)
        try:
            threads = [thread for some in found.get(ThreadsState, []) for thread in some.threads()]
            early = [some.threads for some in found.get(ThreadsAheadState, [])]
            ahead = {thread.tid: thread for some in early for thread in some.threads()}
            kept = [tid for some in found.get(KeptThreadsState, []) for tid in some.tids]
            if strangers := set(kept) - ahead.keys():
                raise RestoreError(f"Thread {min(strangers)} was not sent ahead, as the source says that it was")
            threads += [ahead[tid] for tid in kept]
            return cls(
                process=process,
                limits=one(LimitsState),
                signals=one(SignalsState),
                timers=one(TimersState),
                threads=tuple(sorted(threads, key=lambda thread: thread.tid != process.pid)),
            )
        except ValueError as err:
            raise RestoreError(f"Received task state makes no sense: {err}") from err


def in_sections(threads: Sequence[ThreadState]) -> Iterator[ThreadsState]:
    """Put threads together, as many at a time as a section has room for."""
    for first in range(0, len(threads), _THREADS_PER_SECTION):
        yield ThreadsState.of(threads[first : first + _THREADS_PER_SECTION])


def warm_up() -> None:
    """Fill what a dump asks the system for only once, so that the first one finds it while the
    target is frozen.
    """
    own = Batch()
    plan_sched(own)
    default_slice_ns()
    own_timer_slack_ns()
    online_mask()


class TaskDump:
    """The dump of one process. Prepared while it runs; once all its threads are stopped: plan(), run the batches,
    with the steps of look() meanwhile or afterwards, then state(), or by steps peek(), states(), put_together().
    Before they are stopped, dump_ahead() takes those that are idle.

    ``also`` adds further calls to the leader's batch. It is called again when those that are prepared do not fit.
    """

    def __init__(self, ctx: DumpContext, also: Callable[[Batch], object] = lambda batch: None) -> None:
        self._pid = ctx.pid
        self._also = also
        self._host_tids: dict[int, int] = {}
        self._planned_ns = 0
        self._studies: list[ThreadStudy] = []
        self._copies: dict[int, Copy] = {}
        self._proc: ReadAgain | None = None
        self._statuses: dict[int, bytes] = {}
        self._shared: tuple[bytes, ...] = ()
        self._private: list[tuple[bytes, ...]] = []
        self._window_ns = 0
        self._prepare()
        self._ahead = ThreadsAhead(self._pid, list_tids(self._pid), self._read_status)

    def _prepare(self) -> None:
        """Lay out the calls of the leader and those of each other thread."""
        leader, others = Batch(), Batch()
        self._of_leader, self._of_others = ThreadCalls(leader), ThreadCalls(others)
        self._made_timers = read_timers(self._pid)
        self._timers = plan_timers(leader, self._made_timers, self._host_tids)
        self._process = plan_process(leader, self._pid)
        self._children = leader.call(NR_waitid, os.P_ALL, 0, 0, _ANY_CHILD, 0, name="waitid", check=False)
        self._actions = plan_actions(leader)
        self._also(leader)
        self._leader, self._others = Template(leader), Template(others)
        self.close()
        room = min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _KEPT_FDS, _MOST_FDS)
        tids = list_tids(self._pid)
        self._proc = ReadAgain(map(self._status_path, tids), limit=max(room, 0))

    def _status_path(self, tid: int) -> str:
        return f"/proc/{self._pid}/task/{tid}/status"

    def _read_status(self, tid: int) -> bytes:
        read = read_bytes if self._proc is None else self._proc.read_bytes
        return read(self._status_path(tid))

    def close(self) -> None:
        """Close what is open for a dump; closing twice is harmless."""
        if self._proc is not None:
            self._proc.close()

    def dump_ahead(self, tracer: Tracer) -> Sequence[ThreadState]:
        """Dump the threads that have been idle since this was made, and park them; the process runs.

        :raises MigrationError: something cannot be dumped. The caller lets go of all threads.
        """
        self._ahead.dump(tracer, self._of_others, self._others, self._named())
        for tid, state in self._ahead.states.items():
            self._host_tids[tid] = state.tid
        return list(self._ahead.states.values())

    def _named(self) -> set[int]:
        """Return the tids of the threads that timers send signals to."""
        return {timer.target for timer in self._made_timers if timer.is_tid}

    def plan(self, tracer: Tracer, *, anew: bool = False) -> Mapping[int, Copy]:
        """Ask ptrace about the stopped threads; return the batches to run, by host tid, the leader's first.

        ``anew``: what ``also`` adds may be another thing by now.
        """
        if anew or read_timers(self._pid) != self._made_timers:
            self._prepare()
        self._ahead.recheck(tracer, self._named())
        self._planned_ns = time.monotonic_ns()
        asked = [thread for thread in tracer.threads.values() if not thread.parked]
        threads = sorted(asked, key=lambda t: (t.tid != self._pid, t.tid))
        # Which of the stopping signals it was makes no difference any more: SIGCONT ends each.
        stopped = any(thread.in_group_stop for thread in threads)
        self._stop_signal = int(signal.SIGSTOP) if stopped else 0
        # What remains of a thread's sleep is measured from the clock, so before anything else takes time.
        self._studies = [study_thread(thread, tracer.memory) for thread in threads]
        self._copies = {
            thread.tid: (self._leader if thread.tid == self._pid else self._others).copy() for thread in threads
        }
        return self._copies

    def look(self) -> Iterator[object]:
        """Read what /proc shows, step by step."""
        for study in self._studies:
            tid = study.thread.tid
            self._statuses[tid] = self._read_status(tid)
            yield tid
        self._files = read_process_files(self._pid, self._statuses[self._pid])
        yield self._files
        self._limits = dump_limits(self._pid)

    def has_children(self) -> bool:
        """Tell whether there are child processes, once the batches have run."""
        result = self._leader.results(self._copies[self._pid].content)[self._children.index]
        # The call counts those that the process traces, too.
        return result != -errno.ECHILD and bool(list_children(self._pid))

    def peek(self) -> None:
        """Look at the queued signals, after the batches have run: the last thing that all threads must be stopped for.

        After the timers were read, as settle_expired() wants it. A timer that went off in between has queued its signal
        for the process, or for the thread it names, behind the back of the calls.
        """
        named = self._named()
        self._shared = peek_shared_pending(self._pid)
        self._private = [
            peek_private_pending(thread, queued=thread.tid in named or self._had_pending(thread.tid))
            for thread in (study.thread for study in self._studies)
        ]
        self._window_ns = time.monotonic_ns() - self._planned_ns

    def _had_pending(self, tid: int) -> bool:
        return self._calls_of(tid).had_pending(self._copies[tid])

    def _calls_of(self, tid: int) -> ThreadCalls:
        return self._of_leader if tid == self._pid else self._of_others

    def states(self) -> Iterator[ThreadState]:
        """Make the state of each thread, the leader first, after peek()."""
        for study, queue in zip(self._studies, self._private, strict=True):
            tid = study.thread.tid
            copy = self._copies[tid]
            if tid == self._pid:
                copy.load()  # for what else the leader was asked
            state = self._calls_of(tid).collect(copy, study, self._statuses[tid], queue)
            self._host_tids[tid] = state.tid
            yield state

    def state(self) -> TaskState:
        """Return everything, given that the batches have run; the threads must still be stopped."""
        self.peek()
        return self.put_together(list(self.states()))

    def put_together(self, threads: Iterable[ThreadState]) -> TaskState:
        """Return everything, given all that states() makes."""
        everything = [info for queue in (self._shared, *self._private) for info in queue]
        ahead = self._ahead.states
        return TaskState(
            process=self._process(self._files, self._stop_signal),
            limits=self._limits,
            signals=SignalsState(actions=self._actions(), pending=self._shared),
            timers=settle_expired(self._timers(), everything, self._window_ns),
            threads=(*threads, *ahead.values()),
            ahead=frozenset(state.tid for state in ahead.values()),
        )


def check_task_restore(state: TaskState) -> list[Obstacle]:
    """Say what of ``state`` this host and this agent cannot restore, all at once; nothing is
    touched.
    """
    here = own_status()
    found = check_limits_restore(state.limits, capabilities=here.cap_eff)
    found += check_timers_restore(state.timers)
    seen: set[Any] = set()
    for thread in state.threads:
        if thread.creds not in seen:  # one report for all threads with equal credentials
            seen.add(thread.creds)
            found += check_creds_restore(thread.tid, thread.creds, here)
        found += check_sched_restore(thread.tid, thread.sched)
    return found


def clone_calls(batch: Batch, tids: Iterable[int]) -> None:
    """Step 2, in the leader: other threads; each is traced and stops before it runs anything."""
    block_signals_call(batch)
    for tid in tids:
        set_tid = batch.data(struct.pack("=iI", tid, 0))
        args = batch.data(bytes(clone_args(flags=_THREAD_FLAGS, set_tid_size=1)))
        args.patch_address(clone_args.set_tid.offset, set_tid)
        batch.call(NR_clone3, args, ctypes.sizeof(clone_args), name=f"clone3({tid})")


def host_tids(host_pid: int) -> dict[int, Tid]:
    """Return the host tid of every thread by its own id."""
    if len(read_status(host_pid).ns_pid) == 1:
        return {tid: tid for tid in list_tids(host_pid)}
    return {read_task_status(host_pid, tid).ns_pid[-1]: tid for tid in list_tids(host_pid)}


def _lost_pdeath_signals(threads: Iterable[ThreadState]) -> list[str]:
    tids = [str(thread.tid) for thread in threads if thread.pdeath_signal]
    if not tids:
        return []
    return [
        f"Thread{'s' if len(tids) > 1 else ''} {', '.join(tids)} lost the parent death signal: the parent stays"
        " behind (agent-recv --wait is a parent to the process and keeps it)"
    ]


class NewTask(NamedTuple):
    """What a new process has before anything is restored."""

    status: Status
    stat: Stat
    creds: CredState
    files: NewFiles


def study_new_task(host_pid: int) -> NewTask:
    """Read what the process ``host_pid``, made by this agent just now, has."""
    status = read_status(host_pid)
    return NewTask(
        status, read_stat(host_pid), creds_of(status, own_securebits()), read_new_files(host_pid)
    )


class TaskRestore:
    """The restore of one task into the process ``host_pid``, ``new`` before, step by step as process.py says.

    ``detach``: a process from somebody else's session gets its own. ``keep_pdeath_signal``: the
    agent stays its parent. ``urgent``: its threads run before ordinary ones until calm_down().
    """

    def __init__(
        self,
        state: TaskState,
        host_pid: int,
        new: NewTask,
        *,
        detach: bool = True,
        keep_pdeath_signal: bool = False,
        urgent: bool = False,
    ) -> None:
        self.state = state
        self.host_pid = host_pid
        self._detach = detach
        self._keep_pdeath_signal = keep_pdeath_signal
        self._urgent = urgent
        self._new = new
        self._verify: Callable[[], None] | None = None
        self._merge: Call | None = None
        self.notes = [] if keep_pdeath_signal else _lost_pdeath_signals(state.threads)
        if state.process.sid != state.process.pid:
            self.notes.append(
                f"Session {state.process.sid} and process group {state.process.pgid} stay behind:"
                " the process leads its own"
            )
        """What the process did not get back, for the user."""

    def early_calls(self, batch: Batch) -> None:
        """Step 1, in the leader: session, huge pages."""
        session_calls(batch, self.state.process, self._new.stat, detach=self._detach)
        thp_call(batch, self.state.process)

    def process_calls(self, batch: Batch) -> None:
        """Step 3, in the leader."""
        actions = self.state.signals.actions
        restore_actions_calls(batch, actions, inherited=self._new.status.sig_ign)
        restore_process_calls(batch, self.state.process)

    def write_files(self) -> None:
        """Step 3, by the agent."""
        self.notes += write_process_files(self.state.process, self.host_pid, self._new.files)

    def future_mappings_calls(self, batch: Batch) -> None:
        """Step 4, in the leader, after the last mapping was made."""
        self._merge = future_mappings_calls(batch, self.state.process)

    @property
    def is_order_free(self) -> bool:
        """Whether the leader may make its calls of step 5 while the other threads make theirs.

        They must neither need what its limits could forbid, nor reset the flag that comes after them.
        """
        return self._urgent and not any(
            thread.pending or thread.creds != self._new.creds for thread in self.state.threads[1:]
        )

    def thread_copies(self, host_tids: Mapping[int, int]) -> dict[int, Copy]:
        """Step 5, in all threads but the leader, by host tid; ``host_tids`` are by the threads' own ids."""
        templates: dict[object, tuple[Template, Blob]] = {}
        copies = {}
        for thread in self.state.threads[1:]:
            kind = likeness(thread)
            if kind not in templates:
                batch = Batch()
                variables = batch.buffer(VARIABLES_BYTES)
                self._thread_calls(batch, thread, variables)
                templates[kind] = Template(batch), variables
            template, variables = templates[kind]
            copies[host_tids[thread.tid]] = template.copy(pack_variables(thread), into=variables)
        return copies

    def leader_calls(self, batch: Batch) -> None:
        """Step 5, in the leader, when the other threads have made theirs, or together with them (is_order_free)."""
        state, leader = self.state, self.state.leader
        self._verify = create_timers_calls(batch, state.timers.posix_timers, leader.tid)
        restore_shared_pending_calls(batch, leader.tid, state.signals.pending)
        restore_limits_calls(batch, state.limits)
        self._thread_calls(batch, leader, batch.data(pack_variables(leader)))
        dumpable_call(batch, state.process)

    def timers_calls(self, batch: Batch, *, elapsed_ns: int = 0) -> None:
        """Step 6, in the leader; real-time timers are moved on by ``elapsed_ns``, the time since the freeze."""
        arm_timers_calls(batch, self.state.timers, elapsed_ns=elapsed_ns)

    def _thread_calls(self, batch: Batch, thread: ThreadState, variables: Blob) -> None:
        restore_thread_calls(
            batch,
            thread,
            variables,
            self.state.process.pid,
            self._new.creds,
            keep_pdeath_signal=self._keep_pdeath_signal,
            with_policy=not self._urgent,
        )

    def verify(self) -> None:
        """Check, after the leader's calls have run, what no result of a call says, and complete the notes.

        :raises RestoreError: a timer has another id than it must have.
        """
        if self._verify is not None:
            self._verify()
        if self._merge is not None and self._merge.result < 0:
            self.notes.append("Equal pages are not merged (PR_SET_MEMORY_MERGE): CAP_SYS_RESOURCE is missing")
        for note in self.notes:
            _LOG.warning("%s", note)

    def calm_down(self, host_tids: Mapping[int, int]) -> None:
        """After the last step: give urgent threads their own scheduling.

        :raises RestoreError: the kernel refuses one.
        """
        if self._urgent:
            for state in self.state.threads:
                set_policy(host_tids[state.tid], state.sched)

    def finish_ptrace(
        self, tracer: Tracer, injector: SkeletonInjector, host_tids: Mapping[int, int]
    ) -> None:
        """Step 7: every thread gets its registers and stays stopped; no batch may run any more.

        ``host_tids``: by the threads' own ids.
        """
        layout = layout_of(ptrace.getregset(self.host_pid, NT_X86_XSTATE))
        for state in self.state.threads:
            thread = tracer.threads[host_tids[state.tid]]
            restore_thread_ptrace(tracer, injector, thread, state, layout)
