"""Idle threads that are dumped ahead of the freeze: which, what they may not do meanwhile, and what is noticed."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import pytest

from agent.check import open_target
from agent.errors import RestoreError
from agent.kernel.libc import syscall
from agent.kernel.syscalls import NR_tgkill
from agent.procfs.process import list_tids
from agent.procfs.status import read_task_status
from agent.snapshot import TaskSender
from agent.state.task import TaskDump, TaskState
from agent.target.hold import Hold
from agent.target.inject import Injector
from agent.target.parking import interrupt_parked
from agent.target.tracer import Tracer
from agent.types import Pid
from protocol.sections import decode_section
from protocol.state import load_all
from protocol.state.thread import KeptThreadsState, ThreadsAheadState, ThreadsState, ThreadState
from tests.kernel.support import skip_unless_root, wait_for
from tests.kernel.test_inject import running
from tests.kernel.test_rounds import Recorder, options_for
from tests.kernel.test_state_task_dump import context_of

POOL = """
import json, os, signal, sys, threading, time
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
locks, tids, ends = {}, {}, os.pipe()
def work(name, limit):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    tids[name] = threading.get_native_id()
    while True:
        os.write(1, b"%s %d\\n" % (name.encode(), locks[name].acquire(True, limit)))
def add(name, limit=-1):
    locks[name] = threading.Lock()
    locks[name].acquire()
    threading.Thread(target=work, args=(name, limit), daemon=True).start()
for number in range(4):
    add(f"idle{number}")
add("timed", 600)
threading.Thread(target=os.read, args=(ends[0], 1), daemon=True).start()
time.sleep(0.1)
os.write(1, b"up\\n")
for line in sys.stdin:
    exec(line)
"""
"""Four threads that wait for a lock, one that does so for ten minutes at most, one that reads: six, and the leader."""


class _Pool:
    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self.child = child
        self.pid = child.pid
        self.tell("os.write(1, json.dumps(tids).encode())")
        self.tids: dict[str, int] = json.loads(self.hear())

    def tell(self, line: str) -> None:
        """Have the leader do something."""
        assert self.child.stdin is not None
        self.child.stdin.write(line.encode() + b"\n")
        self.child.stdin.flush()

    def hear(self, seconds: float = 20.0) -> bytes:
        """Return what it writes next, a line; nothing if it writes nothing."""
        assert self.child.stdout is not None
        ready, _, _ = select.select([self.child.stdout], [], [], seconds)
        return os.read(self.child.stdout.fileno(), 4096) if ready else b""

    def check_alive(self) -> None:
        """Find out that each thread goes on when it may, once."""
        for name in ("idle0", "idle3", "timed"):
            self.tell(f"locks[{name!r}].release()")
            assert self.hear() == b"%s 1\n" % name.encode()
        self.tell("os.write(ends[1], b'.')")
        wait_for(lambda: len(list_tids(self.pid)) == 6, "the reader ends")


@contextlib.contextmanager
def pool() -> Iterator[_Pool]:
    with running(POOL) as child:
        yield _Pool(child)


class _Ahead(NamedTuple):
    target: _Pool
    task: TaskDump
    tracer: Tracer
    states: Sequence[ThreadState]


@contextlib.contextmanager
def parked(first: str = "") -> Iterator[_Ahead]:
    """The pool after it did something, its five idle threads dumped ahead and parked."""
    for _ in range(20):
        # On a busy machine one may not have fallen asleep again in time, and is left for the freeze.
        with pool() as target:
            if first:
                target.tell(first + "; os.write(1, b'done')")
                assert target.hear() == b"done"
            task = TaskDump(context_of(target.pid))
            with Tracer(target.pid) as tracer:
                states = task.dump_ahead(tracer)
                if len(states) == 5:
                    yield _Ahead(target, task, tracer, states)
                    return
    pytest.fail("five idle threads were never all dumped ahead")


def _finish(task: TaskDump, tracer: Tracer) -> TaskState:
    with Injector(tracer) as injector:
        injector.run_parallel(task.plan(tracer), meanwhile=task.look())
        return task.state()


def test_who_only_waits_is_dumped_ahead_and_nobody_else() -> None:
    with parked() as (target, task, tracer, ahead):
        tracer.stop_all()
        state = _finish(task, tracer)
        tracer.detach_all()
        assert state.ahead == {thread.tid for thread in ahead}
        assert state.ahead == set(target.tids.values())
        with Tracer(target.pid) as another:
            another.stop_all()
            whole = _finish(TaskDump(context_of(target.pid)), another)
        assert not whole.ahead
        # A wait that ends at a time shows as another call once it has been interrupted.
        timed = target.tids["timed"]
        of_whole = {thread.tid: thread for thread in whole.threads if thread.tid != timed}
        assert {thread.tid: thread for thread in state.threads if thread.tid != timed} == of_whole
        target.check_alive()


def test_sections_name_who_was_sent_ahead() -> None:
    with parked() as (_target, task, tracer, ahead):
        tracer.stop_all()
        state = _finish(task, tracer)
    sections = [section for _kind, _owner, section in state.sections()]
    sent = [thread.tid for some in sections if isinstance(some, ThreadsState) for thread in some.threads()]
    kept = [tid for some in sections if isinstance(some, KeptThreadsState) for tid in some.tids]
    assert len(sent) == 2 and len(kept) == 5
    together = TaskState.from_sections([ThreadsAheadState(threads=ThreadsState.of(ahead)), *sections])
    assert sorted(t.tid for t in together.threads) == sorted(t.tid for t in state.threads)
    assert together.leader == state.leader
    with pytest.raises(RestoreError, match="was not sent ahead"):
        TaskState.from_sections([ThreadsAheadState(threads=ThreadsState.of(ahead[:4])), *sections])


def test_many_are_sent_ahead_in_several_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    load_all()
    monkeypatch.setattr("agent.state.task._THREADS_PER_SECTION", 2)
    link = Recorder()
    with pool() as child, open_target(Pid(child.pid), options_for(child.pid)) as target:
        sender = TaskSender(target)
        with Tracer(child.pid) as tracer:
            sender.send_ahead(cast(Any, link), tracer)
            ahead = list(link.sections)
            tracer.stop_all()
            assert sender.send(cast(Any, link), tracer, lambda: None)
        sender.close()
        whole = TaskState.from_sections(map(decode_section, link.sections))
        assert sorted(thread.tid for thread in whole.threads) == list_tids(child.pid)
        child.check_alive()
    assert {section.kind for section in ahead} == {"threads_ahead"}
    numbers = [len(decode_section(section).threads.tids) for section in ahead]
    assert len(numbers) > 1 and max(numbers) == 2


def test_who_wakes_before_the_freeze_runs_nothing_and_is_dumped_anew() -> None:
    with parked() as (target, task, tracer, _ahead):
        waker = target.tids["idle1"]
        began_ns = time.monotonic_ns()
        target.tell("locks['idle1'].release()")
        wait_for(lambda: read_task_status(target.pid, waker).state == "t", "the woken thread stops")
        assert target.hear(0.1) == b""
        tracer.stop_all()
        state = _finish(task, tracer)
        assert len(state.ahead) == 4 and waker not in state.ahead
        assert tracer.stopped_ns < began_ns  # it was down from then on
        tracer.detach_all()
        assert target.hear() == b"idle1 1\n"
        target.check_alive()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param("open(f'/proc/self/task/{tids[\"idle2\"]}/comm', 'w').write('other')", id="name"),
        pytest.param("os.setpriority(os.PRIO_PROCESS, tids['idle2'], 7)", id="nice"),
        pytest.param("os.sched_setscheduler(tids['idle2'], os.SCHED_BATCH, os.sched_param(0))", id="policy"),
        pytest.param("os.sched_setaffinity(tids['idle2'], {min(os.sched_getaffinity(0))})", id="cpus"),
        pytest.param("signal.pthread_kill(threading.enumerate()[3].ident, signal.SIGUSR1)", id="signal"),
    ],
)
def test_what_others_change_of_a_parked_thread_is_noticed(change: str) -> None:
    skip_unless_root()
    with parked() as (target, task, tracer, _ahead):
        target.tell(change + "; os.write(1, b'done')")
        assert target.hear() == b"done"
        tracer.stop_all()
        state = _finish(task, tracer)
        assert len(state.ahead) == 4 and target.tids["idle2"] not in state.ahead
        tracer.detach_all()
        target.check_alive()


def test_new_thread_and_ended_thread_between_are_seen() -> None:
    with parked() as (target, task, tracer, _ahead):
        before = set(list_tids(target.pid))
        target.tell("os.write(ends[1], b'.'); time.sleep(0.1); add('late'); os.write(1, b'done')")
        assert target.hear() == b"done"
        wait_for(lambda: len(list_tids(target.pid)) == 7, "one thread comes, one goes")
        tracer.stop_all()
        state = _finish(task, tracer)
        now = set(list_tids(target.pid))
        assert {thread.tid for thread in state.threads} == now != before
        assert len(state.ahead) == 5


def test_another_freeze_begins_anew() -> None:
    with parked() as (target, task, tracer, _ahead):
        tracer.detach_all()
        with Tracer(target.pid) as another:
            another.stop_all()
            state = _finish(task, another)
        assert not state.ahead and len(state.threads) == 7
        target.check_alive()


def test_hold_is_dropped_with_parked_threads() -> None:
    with parked() as (target, task, tracer, _ahead):
        tracer.stop_all()
        _finish(task, tracer)
        interrupt_parked(tracer)
        hold = Hold(tracer)
        hold.take()
        hold.drop()
        tracer.detach_all()
        target.check_alive()


def test_signal_for_a_parked_thread_comes_when_it_is_let_go() -> None:
    # Taken by a handler of Python's, which the leader runs.
    handler = "signal.signal(signal.SIGUSR2, lambda *_: os.write(1, b'signal'))"
    with parked(handler) as (target, task, tracer, _ahead):
        receiver = target.tids["idle0"]
        syscall(NR_tgkill, target.pid, receiver, signal.SIGUSR2)
        wait_for(lambda: read_task_status(target.pid, receiver).state == "t", "it stops")
        tracer.stop_all()
        state = _finish(task, tracer)
        found = {thread.tid: thread.pending for thread in state.threads}
        assert receiver not in state.ahead
        assert [int.from_bytes(info[:4], "little") for info in found[receiver]] == [signal.SIGUSR2]
        tracer.detach_all()
        target.tell("pass")
        assert target.hear() == b"signal"


@pytest.mark.parametrize("is_held", [False, True], ids=["before the freeze", "held"])
def test_agent_killed_with_parked_threads(is_held: bool) -> None:
    with pool() as target:
        read_fd, write_fd = os.pipe()
        agent = os.fork()
        if agent == 0:
            tracer = Tracer(target.pid)
            task = TaskDump(context_of(target.pid))
            number = len(task.dump_ahead(tracer))
            if is_held:
                tracer.stop_all()
                number = len(_finish(task, tracer).ahead)
                interrupt_parked(tracer)
                Hold(tracer).take()
            os.write(write_fd, bytes([number]))
            signal.pause()
        assert os.read(read_fd, 1) > b"\0"
        os.kill(agent, signal.SIGKILL)
        os.waitpid(agent, 0)
        os.close(read_fd)
        os.close(write_fd)
        if is_held:
            tids = list_tids(target.pid)
            wait_for(lambda: all(read_task_status(target.pid, tid).state == "T" for tid in tids), "all are held")
            os.kill(target.pid, signal.SIGCONT)
        target.check_alive()


def test_stopped_process_is_left_as_it_is() -> None:
    with pool() as target:
        os.kill(target.pid, signal.SIGSTOP)
        wait_for(lambda: read_task_status(target.pid, target.pid).state == "T", "it stops")
        task = TaskDump(context_of(target.pid))
        with Tracer(target.pid) as tracer:
            assert task.dump_ahead(tracer) == []
            assert not tracer.threads
        # Let go, each comes to its stop again by itself.
        tids = list_tids(target.pid)
        wait_for(lambda: all(read_task_status(target.pid, tid).state == "T" for tid in tids), "all are stopped")
        assert target.hear(0.05) == b""
        os.kill(target.pid, signal.SIGCONT)
        target.check_alive()
