"""A whole live task: dumped by injection, restored into another process, dumped again: both must
agree.

The destination is a fork of the source: it has the same memory, so that addresses registered with
the kernel exist, but a single thread and none of the state.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import resource
import signal
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest

from agent.kernel import ptrace
from agent.kernel.arch.x86_64 import NT_X86_XSTATE, user_regs_struct
from agent.kernel.clone import CLONE_NEWPID, fork_with
from agent.kernel.libc import syscall
from agent.kernel.prctl import (
    PR_SET_CHILD_SUBREAPER,
    PR_SET_NAME,
    PR_SET_PDEATHSIG,
    PR_SET_TIMERSLACK,
    prctl,
)
from agent.kernel.siginfo import signals_of, sigset
from agent.kernel.syscalls import (
    NR_gettid,
    NR_ioprio_set,
    NR_pause,
    NR_rseq,
    NR_rt_tgsigqueueinfo,
    NR_setfsuid,
    NR_sigaltstack,
    NR_tgkill,
    NR_timer_create,
    NR_timer_settime,
)
from agent.procfs.process import list_tids
from agent.procfs.stat import read_stat
from agent.state.context import DumpContext
from agent.state.task import (
    TaskDump,
    TaskRestore,
    TaskState,
    check_task_restore,
    clone_calls,
    host_tids,
    study_new_task,
)
from agent.target.inject import Batch, Injector
from agent.target.inject_skeleton import SkeletonInjector
from agent.target.memory import TargetMemory
from agent.target.runner import Runner
from agent.target.tracer import Tracer
from agent.types import Pid
from tests.kernel.support import Puppet, blocked_in, puppet, skip_unless_root, wait_for

WORKER_MASK = sigset([signal.SIGUSR1, signal.SIGUSR2, 40, signal.SIGTERM, signal.SIGALRM])
_kept: list[object] = []


def _name(name: bytes) -> None:
    buffer = ctypes.create_string_buffer(name)
    prctl(PR_SET_NAME, ctypes.addressof(buffer))


def _queue(tid: int, signo: int, value: int) -> None:
    info = struct.pack("=iii4xiIQ", signo, 0, -1, os.getpid(), 7, value).ljust(128, b"\0")
    buffer = ctypes.create_string_buffer(info, 128)
    syscall(NR_rt_tgsigqueueinfo, os.getpid(), tid, signo, ctypes.addressof(buffer))


def _worker(ready: threading.Event) -> None:
    tid = syscall(NR_gettid)
    _name(b"odd \xff worker")
    # Not less than the main thread: a signal of the process is taken by any thread that lets it.
    signal.pthread_sigmask(signal.SIG_SETMASK, signals_of(WORKER_MASK))
    _queue(tid, 40, 1)
    _queue(tid, 40, 2)
    signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
    stack = ctypes.create_string_buffer(65536)
    altstack = ctypes.create_string_buffer(
        struct.pack("=QIIQ", ctypes.addressof(stack), 0, 0, 65536)
    )
    syscall(NR_sigaltstack, ctypes.addressof(altstack), 0)
    _kept.extend((stack, altstack))
    os.sched_setaffinity(0, {0})
    os.setpriority(os.PRIO_PROCESS, 0, 9)
    prctl(PR_SET_TIMERSLACK, 77777)
    syscall(NR_ioprio_set, 1, 0, 3 << 13)
    if os.geteuid() == 0:
        syscall(NR_setfsuid, 1234)
    prctl(PR_SET_PDEATHSIG, signal.SIGUSR2)  # a change of credentials would reset it
    event = ctypes.create_string_buffer(struct.pack("=Qiii44x", 0xABCD, 41, 4, tid))
    ident = ctypes.c_int()
    syscall(NR_timer_create, 3, ctypes.addressof(event), ctypes.addressof(ident))
    spec = ctypes.create_string_buffer(struct.pack("=qqqq", 0, 0, 500, 0))
    syscall(NR_timer_settime, ident.value, 0, ctypes.addressof(spec), 0)
    ready.set()
    while True:
        time.sleep(1000)


def become_rich() -> None:
    """Give this process a state in which no field has the value that it would have by itself."""
    os.umask(0o031)
    os.chdir("/usr")
    os.nice(3)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, 300))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 1 << 20))
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.siginterrupt(signal.SIGUSR1, False)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGALRM})
    os.kill(os.getpid(), signal.SIGTERM)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 4)  # goes off at once and stays queued
    signal.setitimer(signal.ITIMER_VIRTUAL, 300, 2)
    while signal.SIGALRM not in signal.sigpending():
        time.sleep(0.001)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    _name(b"main")
    event = ctypes.create_string_buffer(struct.pack("=Qii48x", 0x1234, 42, 0))
    ident = ctypes.c_int()
    syscall(NR_timer_create, 1, ctypes.addressof(event), ctypes.addressof(ident))
    spec = ctypes.create_string_buffer(struct.pack("=qqqq", 7, 1, 900, 0))
    syscall(NR_timer_settime, ident.value, 0, ctypes.addressof(spec), 0)
    for _ in range(2):
        ready = threading.Event()
        threading.Thread(target=_worker, args=(ready,), daemon=True).start()
        ready.wait()


def context_of(pid: int) -> DumpContext:
    return cast(DumpContext, type("Ctx", (), {"pid": Pid(pid)}))


def dump(tracer: Tracer, *, crash_safe: bool = True) -> TaskState:
    """Dump the process of ``tracer`` while it is stopped."""
    with (Injector if crash_safe else SkeletonInjector)(tracer) as injector:
        return dump_with(tracer, injector)


def dump_with(tracer: Tracer, injector: Runner) -> TaskState:
    task = TaskDump(context_of(tracer.pid))
    injector.run_parallel(task.plan(tracer), meanwhile=task.look())
    return task.state()


@contextmanager
def rich_child() -> Iterator[Puppet]:
    with puppet() as child:
        child.run(become_rich)
        child.wait_idle()
        yield child


def test_dump_shows_what_was_set() -> None:
    with rich_child() as child:
        tids = list_tids(child.pid)
        with Tracer(child.pid) as tracer:
            tracer.stop_all()
            state = dump(tracer)
        assert state.process.pid == child.pid
        assert [thread.tid for thread in state.threads] == tids
        assert (state.process.umask, state.process.cwd) == (0o031, "/usr")
        assert state.process.child_subreaper
        nofile = state.limits.limits[resource.RLIMIT_NOFILE]
        assert (nofile.soft, nofile.hard) == (200, 300)
        actions = {action.signal: action.handler for action in state.signals.actions}
        assert actions[signal.SIGUSR1] > 1 and actions[signal.SIGHUP] == 1
        pending = [int.from_bytes(info[:4], "little") for info in state.signals.pending]
        assert sorted(pending) == [signal.SIGALRM, signal.SIGTERM]
        real, virtual = state.timers.interval_timers
        assert real.interval_ns == 4_000_000_000
        # The kernel adds a tick to the timers of CPU time.
        assert 200e9 < virtual.remaining_ns <= 300.1e9
        to_process, first, second = state.timers.posix_timers
        assert (to_process.signal, to_process.sigval, to_process.notify) == (42, 0x1234, 0)
        assert 800e9 < to_process.remaining_ns <= 900e9
        assert [first.thread_id, second.thread_id] == tids[1:]
        assert first.notify == 4

        main, worker, _ = state.threads
        assert (main.name, main.sched.nice) == (b"main", 3)
        assert main.sigmask & sigset([signal.SIGTERM, signal.SIGALRM])
        assert worker.name == b"odd \xff worker"
        assert worker.sigmask == WORKER_MASK
        queued = [int.from_bytes(info[:4], "little") for info in worker.pending]
        assert sorted(queued) == [signal.SIGUSR1, 40, 40]
        assert worker.altstack.size == 65536
        assert (worker.sched.nice, worker.sched.affinity_all) == (9, os.cpu_count() == 1)
        assert worker.sched.timer_slack_ns == 77777
        assert worker.sched.ioprio == 3 << 13
        assert worker.pdeath_signal == signal.SIGUSR2
        assert worker.clear_child_tid and worker.robust_list_head
        if os.geteuid() == 0:
            assert worker.creds.uids[3] == 1234
        assert check_task_restore(state) == []


def test_dumping_leaves_no_trace() -> None:
    with rich_child() as child:
        with Tracer(child.pid) as tracer:
            tracer.stop_all()
            first = dump(tracer)
        child.wait_idle()
        assert child.run(os.getpid) == child.pid
        child.wait_idle()
        with Tracer(child.pid) as tracer:
            tracer.stop_all()
            second = dump(tracer)
        assert same_but_times(first) == same_but_times(second)


def same_but_times(state: TaskState) -> TaskState:
    """Return ``state`` without what depends on the moment: clocks, remaining times, registers."""
    process = dataclasses.replace(
        state.process, clock_monotonic_ns=0, clock_boottime_ns=0, clock_realtime_ns=0
    )
    timers = dataclasses.replace(
        state.timers,
        interval_timers=tuple(
            dataclasses.replace(timer, remaining_ns=0) for timer in state.timers.interval_timers
        ),
        posix_timers=tuple(
            # A timer of a thread's own CPU time names the thread once it was carried.
            dataclasses.replace(
                timer, remaining_ns=0, clock_id=-2 if timer.thread_id else timer.clock_id
            )
            for timer in state.timers.posix_timers
        ),
    )
    threads = tuple(
        dataclasses.replace(thread, regs=bytes(216), xstate=bytes(576), restart=None) for thread in state.threads
    )
    return dataclasses.replace(state, process=process, timers=timers, threads=threads)


def without_sigmask(state: TaskState) -> TaskState:
    threads = tuple(dataclasses.replace(thread, sigmask=0) for thread in state.threads)
    return dataclasses.replace(state, threads=threads)


def fork_twin(flags: int) -> int:
    """Fork this process; the twin only waits."""
    pid = fork_with(flags)
    if pid == 0:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        while True:
            signal.pause()
    return pid


def in_twin(state: TaskState, pid: int) -> TaskState:
    """Return ``state`` with the twin's pid for the leader: the original may still own its own."""
    return dataclasses.replace(
        state,
        process=dataclasses.replace(state.process, pid=pid, pgid=pid, sid=pid),
        threads=(dataclasses.replace(state.leader, tid=pid), *state.threads[1:]),
    )


def make_bare(injector: Runner, state: TaskState) -> None:
    """Undo what a fork, other than a new skeleton, inherits: the rseq registration."""
    rseq = state.leader.rseq
    if rseq is not None:
        batch = Batch()
        batch.call(NR_rseq, rseq.addr, rseq.size, 1, rseq.sig, name="rseq")
        injector.run(batch)


def restore(tracer: Tracer, injector: SkeletonInjector, state: TaskState) -> TaskRestore:
    """All steps but the last one."""
    task = TaskRestore(state, tracer.pid, study_new_task(tracer.pid), keep_pdeath_signal=True)
    for step in (task.early_calls, task.process_calls, task.future_mappings_calls):
        batch = Batch()
        step(batch)
        if len(batch):
            injector.run(batch, tracer.leader)
    task.write_files()
    batch = Batch()
    clone_calls(batch, [thread.tid for thread in state.threads[1:]])
    injector.run(batch, tracer.leader)
    for tid in list(tracer.new_children):
        tracer.adopt(tid)
    tids = host_tids(tracer.pid)
    if len(tids) > 1:
        injector.run_parallel(task.thread_copies(tids))
    for step in (task.leader_calls, task.timers_calls):
        batch = Batch()
        step(batch)
        if len(batch):
            injector.run(batch, tracer.leader)
    task.verify()
    return task


@pytest.mark.parametrize("own_pid", [None, 1], ids=["same-pid-namespace", "new-pid-namespace"])
def test_restored_task_dumps_as_the_original(own_pid: int | None) -> None:
    skip_unless_root()
    with rich_child() as child:
        twin = child.run(fork_twin, CLONE_NEWPID if own_pid else 0)
        try:
            child.wait_idle()
            with Tracer(child.pid) as tracer:
                tracer.stop_all()
                original = in_twin(dump(tracer), own_pid or twin)
            child.close()  # its thread ids are needed now
            wait_for(lambda: not os.path.exists(f"/proc/{child.pid}"), "the source to be gone")
            with Tracer(twin, kill_on_exit=True) as tracer:
                tracer.stop_all()
                injector = SkeletonInjector(tracer)
                make_bare(injector, original)
                task = restore(tracer, injector, original)
                again = dump_with(tracer, injector)
                assert without_sigmask(same_but_times(again)) == without_sigmask(
                    same_but_times(original)
                )
                task.finish_ptrace(tracer, injector, host_tids(twin))
                for thread in original.threads:
                    tid = host_tids(twin)[thread.tid]
                    regs = ptrace.getregs(tid)
                    assert regs == user_regs_struct.from_buffer_copy(thread.regs)
                    assert ptrace.getregset(tid, NT_X86_XSTATE) == thread.xstate
                    assert ptrace.getsigmask(tid) == thread.sigmask
                os.kill(twin, signal.SIGKILL)
        finally:
            try:
                os.kill(twin, signal.SIGKILL)
            except ProcessLookupError:
                pass


def become_nobody_with_threads() -> None:
    os.setgroups([5])
    os.setresgid(1000, 1000, 1000)
    os.setresuid(1000, 1000, 1000)
    threading.Thread(target=signal.pause, daemon=True).start()


@pytest.mark.parametrize("rounds", [3])
def test_unprivileged_process_can_be_dumped(rounds: int) -> None:
    skip_unless_root()
    with puppet() as child:
        child.run(become_nobody_with_threads)
        for _ in range(rounds):
            with Tracer(child.pid) as tracer:
                tracer.stop_all()
                state = dump(tracer)
            for thread in state.threads:
                assert thread.creds.uids == (1000,) * 4
                assert thread.creds.cap_permitted == 0
            assert state.process.dumpable in (0, 2)
            assert child.run(os.getuid) == 1000


def test_ids_are_those_the_process_itself_sees() -> None:
    skip_unless_root()
    with rich_child() as child:
        inner = child.run(fork_rich_init)
        try:
            wait_for(lambda: len(list_tids(inner)) == 3, "the threads")
            wait_for(lambda: blocked_in(inner) == NR_pause, "the init to pause")
            with Tracer(inner) as tracer:
                tracer.stop_all()
                state = dump(tracer)
        finally:
            os.kill(inner, signal.SIGKILL)
        assert [thread.tid for thread in state.threads] == [1, 2, 3]
        assert state.process.pid == 1
        assert [timer.thread_id for timer in state.timers.posix_timers] == [0, 2, 3]


def fork_rich_init() -> int:
    pid = fork_with(CLONE_NEWPID)
    if pid == 0:
        become_rich()
        while True:
            signal.pause()
    return pid


def test_stopped_process_is_dumped_as_stopped() -> None:
    with puppet() as child:
        os.kill(child.pid, signal.SIGSTOP)
        wait_for(lambda: read_stat(child.pid).state == "T", "the stop")
        with Tracer(child.pid) as tracer:
            tracer.stop_all()
            state = dump(tracer)
        assert state.process.stop_signal == signal.SIGSTOP
        assert state.leader.pending == ()
        wait_for(lambda: read_stat(child.pid).state == "T", "the stop to go on")
        os.kill(child.pid, signal.SIGCONT)
        assert child.run(os.getpid) == child.pid


def block_alarm() -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 0)  # pytest-timeout may have set it
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])


def wait_for_alarm() -> None:
    signal.sigwait([signal.SIGALRM])


def test_timer_keeps_running_while_it_is_dumped() -> None:
    with puppet() as child:
        child.run(block_alarm)
        for _ in range(20):
            child.run(signal.setitimer, signal.ITIMER_REAL, 0.0015)
            with Tracer(child.pid) as tracer:
                tracer.stop_all()
                state = dump(tracer)
            fired = signal.SIGALRM in [int.from_bytes(i[:4], "little") for i in state.signals.pending]
            armed = any(timer.remaining_ns for timer in state.timers.interval_timers)
            assert fired != armed, "the alarm must be carried exactly once"
            child.run(wait_for_alarm)


def change_what_was_prepared() -> None:
    """Make a timer, lower a limit, rename a thread, start another, change directory."""
    event = ctypes.create_string_buffer(struct.pack("=Qii48x", 0x77, 43, 0))
    ident = ctypes.c_int()
    syscall(NR_timer_create, 1, ctypes.addressof(event), ctypes.addressof(ident))
    resource.setrlimit(resource.RLIMIT_NOFILE, (150, 300))
    _name(b"renamed")
    os.chdir("/tmp")
    ready = threading.Event()
    threading.Thread(target=_worker, args=(ready,), daemon=True).start()
    ready.wait()


def test_what_changes_after_the_preparation_is_dumped_as_it_is() -> None:
    with rich_child() as child:
        task = TaskDump(context_of(child.pid))
        child.run(change_what_was_prepared)
        child.wait_idle()
        with Tracer(child.pid) as tracer:
            tracer.stop_all()
            with Injector(tracer) as injector:
                injector.run_parallel(task.plan(tracer), meanwhile=task.look())
                state = task.state()
            fresh = dump(tracer)
        assert same_but_times(state) == same_but_times(fresh)
        assert len(state.threads) == 4 and state.leader.name == b"renamed"
        assert state.process.cwd == "/tmp"
        assert state.limits.limits[resource.RLIMIT_NOFILE].soft == 150
        assert len(state.timers.posix_timers) == 5 and state.timers.posix_timers[3].sigval == 0x77


def test_prepared_dump_can_be_made_again() -> None:
    # A freeze that comes at the wrong moment is made anew.
    with rich_child() as child:
        task = TaskDump(context_of(child.pid))
        states = []
        for _ in range(2):
            with Tracer(child.pid) as tracer:
                tracer.stop_all()
                with Injector(tracer) as injector:
                    injector.run_parallel(task.plan(tracer), meanwhile=task.look())
                    states.append(task.state())
        assert same_but_times(states[0]) == same_but_times(states[1])


def test_signal_of_a_timer_that_goes_off_after_the_calls_is_not_lost() -> None:
    with rich_child() as child:
        task = TaskDump(context_of(child.pid))
        with Tracer(child.pid) as tracer:
            worker = tracer.stop_all()[1].tid
            with Injector(tracer) as injector:
                injector.run_parallel(task.plan(tracer), meanwhile=task.look())
                os.kill(child.pid, signal.SIGTERM)  # merged with the one that waits
                os.kill(child.pid, signal.SIGUSR2)
                syscall(NR_tgkill, child.pid, worker, 40)
                state = task.state()
        shared = [int.from_bytes(info[:4], "little") for info in state.signals.pending]
        private = [int.from_bytes(info[:4], "little") for info in state.threads[1].pending]
        assert sorted(shared) == [signal.SIGUSR2, signal.SIGALRM, signal.SIGTERM]
        assert private.count(40) == 3


def have_child(ends: bool) -> int:
    pid = os.fork()
    if not pid:
        if not ends:
            signal.pause()
        os._exit(0)
    if ends:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return pid


def trace(pid: int) -> None:
    ptrace.seize(pid)


def has_children(pid: int) -> bool:
    task = TaskDump(context_of(pid))
    with Tracer(pid) as tracer:
        tracer.stop_all()
        with Injector(tracer) as injector:
            injector.run_parallel(task.plan(tracer), meanwhile=task.look())
            return task.has_children()


@pytest.mark.parametrize("ends", [False, True])
def test_children_are_told_zombies_too(ends: bool) -> None:
    with rich_child() as child:
        assert not has_children(child.pid)
        pid = child.run(have_child, ends)
        child.wait_idle()
        assert has_children(child.pid)
        os.kill(pid, signal.SIGKILL)
        child.run(os.waitpid, pid, 0)
        child.wait_idle()
        assert not has_children(child.pid)


def test_somebody_that_the_process_traces_is_no_child() -> None:
    with puppet() as other, puppet() as child:  # the tracer ends first
        child.run(trace, other.pid)
        child.wait_idle()
        assert not has_children(child.pid)


def start_sleepers(count: int) -> None:
    for _ in range(count):
        threading.Thread(target=signal.pause, daemon=True).start()


def requests_of_a_dump(nr_threads: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Return how many ptrace requests, and how many writes to its memory, freeze and dump a process."""
    requests = writes = 0
    request, write = ptrace._ptrace, TargetMemory.write

    def counted_request(*args: Any) -> int:
        nonlocal requests
        requests += 1
        result: int = request(*args)
        return result

    def counted_write(*args: Any) -> None:
        nonlocal writes
        writes += 1
        write(*args)

    with puppet() as child:
        child.run(start_sleepers, nr_threads - 1)
        child.wait_idle()
        wait_for(lambda: all(blocked_in(tid) is not None for tid in list_tids(child.pid)), "the threads to sleep")
        task = TaskDump(context_of(child.pid))
        with Tracer(child.pid) as tracer, monkeypatch.context() as patch:
            patch.setattr(ptrace, "_ptrace", counted_request)
            patch.setattr(TargetMemory, "write", counted_write)
            assert len(tracer.stop_all()) == nr_threads
            with Injector(tracer) as injector:
                injector.run_parallel(task.plan(tracer), meanwhile=task.look())
                task.state()
    return requests, writes


def test_each_thread_costs_a_freeze_so_many_requests_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (requests_of_a_dump(count, monkeypatch) for count in (2, 12))
    # Frozen: seize, interrupt, registers. Asked: dispatch, rseq, extended registers, mask. In: registers, mask, go.
    # Fetched: interrupt, registers, mask, registers. A thread that is slow to stop costs no more.
    assert (many[0] - few[0]) / 10 <= 14
    assert (many[1] - few[1]) / 10 <= 4
    # All that a process takes, however few threads it has: the leader's own, two round trips, the queue of signals.
    assert few[0] <= 2 * 14 + 18
