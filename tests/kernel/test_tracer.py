"""Stopping and releasing threads: churn, signals, group-stops, holds, deaths and exec."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.errors import FreezeError, TargetGone
from agent.procfs.status import read_status
from agent.target import tracer as tracing
from agent.target.hold import Hold, release_hold
from agent.target.tracer import Tracer, pick_injection_thread
from tests.kernel.support import skip_unless_root, wait_for
from tests.kernel.test_inject import COUNTER, THREADED, running, state_of

CHURN = """
import threading, time
print("up", flush=True)
def brief():
    sum(range(2000))
def breed():
    while True:
        threads = [threading.Thread(target=brief) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
for _ in range(3):
    threading.Thread(target=breed, daemon=True).start()
time.sleep(1000)
"""

SHORT_LIVED = """
import select, threading, _thread
gate = threading.Lock()
gate.acquire()
def brief():
    with gate:
        pass
def breed():
    poller = select.epoll()
    while True:
        for _ in range(5):
            _thread.start_new_thread(brief, ())
        poller.poll(0.001)
        gate.release()
        poller.poll(0.0005)
        gate.acquire()
threading.Thread(target=breed, daemon=True).start()
print("up", flush=True)
select.epoll().poll(1000)
"""

EPOLLER = """
import select
poller = select.epoll()
import threading
threading.Thread(target=threading.Event().wait, daemon=True).start()
print("up", flush=True)
poller.poll(1000)
"""


def tids_of(pid: int) -> set[int]:
    return {int(tid) for tid in os.listdir(f"/proc/{pid}/task")}


def test_stop_all_catches_threads_that_come_and_go() -> None:
    with running(CHURN) as child:
        for _ in range(15):
            with Tracer(child.pid) as tracer:
                threads = tracer.stop_all()
                assert {thread.tid for thread in threads} == tids_of(child.pid)
                assert threads[0].tid == child.pid
                assert all(thread.stopped for thread in threads)
            time.sleep(0.01)
        assert child.poll() is None


def test_signal_taken_before_the_interrupt_is_delivered_after_detach() -> None:
    sig = signal.SIGRTMIN + 2
    with running(COUNTER) as child:
        assert child.stdout is not None
        with Tracer(child.pid) as tracer:
            thread = tracer.seize(child.pid)
            os.kill(child.pid, sig)
            tracer.wait_stopped(thread)
            assert thread.pending_stop_signal == sig
        assert os.read(child.stdout.fileno(), 100) == bytes([sig])


def test_group_stop_outlasts_the_tracer() -> None:
    with running(THREADED) as child:
        os.kill(child.pid, signal.SIGSTOP)
        wait_for(lambda: state_of(child.pid) == "T", "the child stops")
        with Tracer(child.pid) as tracer:
            assert all(thread.in_group_stop for thread in tracer.stop_all())
        wait_for(lambda: state_of(child.pid) == "T", "the child is stopped again")
        os.kill(child.pid, signal.SIGCONT)
        assert child.communicate(b"\n")[0] == b"done\n"


def test_hold_and_unhold_leave_no_trace() -> None:
    with running(THREADED) as child:
        with Tracer(child.pid) as tracer:
            threads = tracer.stop_all()
            regs = [thread.regs.copy() for thread in threads]
            hold = Hold(tracer)
            hold.take()
            hold.drop()
            assert [thread.regs for thread in threads] == regs
        time.sleep(0.05)
        assert state_of(child.pid) == "S"
        assert child.communicate(b"\n")[0] == b"done\n"


def test_held_process_stays_stopped_when_the_agent_dies() -> None:
    with running(THREADED) as child:
        agent = os.fork()
        if agent == 0:
            tracer = Tracer(child.pid)
            tracer.stop_all()
            hold = Hold(tracer)
            hold.take()
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(agent, 0)
        wait_for(lambda: state_of(child.pid) == "T", "the hold takes over")
        release_hold(child.pid)
        assert child.communicate(b"\n")[0] == b"done\n"


def test_held_threads_run_no_instruction_when_the_agent_dies() -> None:
    # Four threads count in shared memory as fast as they can.
    with spinning(4) as (child, counters):
        for _ in range(20):
            reader, writer = os.pipe()
            agent = os.fork()
            if agent == 0:
                tracer = Tracer(child)
                tracer.stop_all()
                hold = Hold(tracer)
                hold.take()
                os.write(writer, counters[:])
                os.kill(os.getpid(), signal.SIGKILL)
            os.waitpid(agent, 0)
            at_hold = os.read(reader, 4096)
            os.close(reader)
            os.close(writer)
            wait_for(lambda: state_of(child) == "T", "the hold takes over")
            assert counters[:] == at_hold
            release_hold(child)
            before = counters[:]
            wait_for(lambda: counters[:] != before, "the threads count again")


@contextlib.contextmanager
def spinning(nr_threads: int) -> Iterator[tuple[int, mmap.mmap]]:
    """A process whose threads count, in a shared mapping, how often they came round."""
    counters = mmap.mmap(-1, 4096)
    child = os.fork()
    if child == 0:

        # inc qword [rdi]; jmp back: ctypes lets go of the GIL, so that all of them run.
        code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        code.write(b"\x48\xff\x07\xeb\xfb")
        spin = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(
            ctypes.addressof(ctypes.c_char.from_buffer(code))
        )
        base = ctypes.addressof(ctypes.c_char.from_buffer(counters))
        for index in range(1, nr_threads):
            threading.Thread(target=spin, args=(base + 64 * index,)).start()
        spin(base)
    try:
        yield child, counters
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("block", [False, True])
def test_hold_that_outlived_its_agent_ends_without_a_trace(block: bool) -> None:
    program = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGCONT, lambda *a: os.write(1, b'handler'))\n"
        "signal.signal(signal.SIGUSR1, lambda *a: None)\n"
        f"if {block}: signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCONT])\n"
        "os.write(1, b'up')\n"
        "end = time.monotonic() + 0.6\n"
        "time.sleep(0.6)\n"
        "assert time.monotonic() >= end\n"
        "assert not signal.sigpending(), signal.sigpending()\n"
        "os.write(1, b' down')\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert os.read(child.stdout.fileno(), 2) == b"up"
    agent = os.fork()
    if agent == 0:
        tracer = Tracer(child.pid)
        tracer.stop_all()
        hold = Hold(tracer)
        hold.take()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(agent, 0)
    wait_for(lambda: state_of(child.pid) == "T", "the hold takes over")
    release_hold(child.pid)
    assert state_of(child.pid) in "SR"
    assert child.communicate()[0] == b" down"
    assert child.returncode == 0


def test_hold_ends_on_a_busy_cpu() -> None:
    # The thread that is to take the SIGSTOP gets no CPU for longer than the agent waits between two looks.
    skip_unless_root()
    hog = (
        "import os, time; os.sched_setaffinity(0, {0}); os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1));"
        "print('up', flush=True); end = time.monotonic() + 0.5\n"
        "while time.monotonic() < end: pass"
    )
    with running(COUNTER) as child:
        os.sched_setaffinity(child.pid, {0})
        with Tracer(child.pid) as tracer:
            tracer.stop_all()
            hold = Hold(tracer)
            hold.take()
            with subprocess.Popen([sys.executable, "-c", hog], stdout=subprocess.PIPE) as busy:
                assert busy.stdout is not None and busy.stdout.readline() == b"up\n"
                hold.drop()
        assert state_of(child.pid) != "T"
        assert not read_status(child.pid).shd_pnd


def test_hold_keeps_a_pending_sigcont() -> None:
    program = (
        "import signal\n"
        "signal.signal(signal.SIGCONT, lambda *a: None)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCONT])\n"
        "print('up', flush=True); input()\n"
        "print(signal.sigtimedwait([signal.SIGCONT], 5).si_signo == signal.SIGCONT)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"up\n"
    os.kill(child.pid, signal.SIGCONT)
    with Tracer(child.pid) as tracer:
        tracer.stop_all()
        hold = Hold(tracer)
        hold.take()
        hold.drop()
    assert child.communicate(b"\n")[0] == b"True\n"


def test_hold_that_somebody_ended_is_no_obstacle() -> None:
    with running(THREADED) as child:
        with Tracer(child.pid) as tracer:
            tracer.stop_all()
            hold = Hold(tracer)
            hold.take()
            os.kill(child.pid, signal.SIGCONT)
            hold.drop()
        assert child.communicate(b"\n")[0] == b"done\n"


def test_second_tracer_is_refused_with_its_name() -> None:
    with running(THREADED) as child, Tracer(child.pid) as tracer:
        tracer.stop_all()
        agent = os.fork()
        if agent == 0:
            try:
                Tracer(child.pid).stop(child.pid)
            except FreezeError as err:
                os._exit(0 if f"process {os.getppid()}" in str(err) else 1)
            os._exit(2)
        assert os.waitpid(agent, 0)[1] == 0


def test_death_of_the_target_is_told() -> None:
    with running(THREADED) as child, Tracer(child.pid) as tracer:
        tracer.stop_all()
        child.kill()
        with pytest.raises(TargetGone):
            tracer.wait_stop(tracer.leader)
    with pytest.raises(TargetGone):
        Tracer(child.pid)


@contextlib.contextmanager
def about_to_exec() -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], None]]]:
    """A process, and what has it call exec; the new program says so."""
    program = (
        "import os, sys; print('up', flush=True); input();"
        "os.execv(sys.executable, [sys.executable, '-c', 'print(1, flush=True); input()'])"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )

    def go() -> None:
        assert child.stdin is not None
        child.stdin.write(b"\n")
        child.stdin.flush()

    try:
        assert child.stdout is not None
        child.stdout.readline()
        yield child, go
    finally:
        child.kill()
        child.wait()


def test_exec_of_the_target_is_told() -> None:
    with about_to_exec() as (child, go), Tracer(child.pid) as tracer:
        thread = tracer.stop(child.pid)
        tracer.resume(thread)
        go()
        with pytest.raises(TargetGone, match="exec"):
            tracer.wait_stop(thread)


def test_exec_before_any_thread_is_traced_is_told() -> None:
    with about_to_exec() as (child, go), Tracer(child.pid) as tracer:
        go()
        assert child.stdout is not None and child.stdout.readline() == b"1\n"
        with pytest.raises(TargetGone, match="exec"):
            tracer.stop_one()


def test_injection_thread_avoids_calls_that_show_eintr() -> None:
    with running(EPOLLER) as child:
        tid = pick_injection_thread(child.pid)
        assert tid != child.pid


def test_injection_thread_that_ends_before_it_stops_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    pick = tracing.pick_injection_thread
    with running(THREADED) as child:
        ending = subprocess.Popen(["true"])
        wait_for(lambda: state_of(ending.pid) == "Z", "the end of a process")
        picked = [ending.pid, *[pick(child.pid)] * 2]
        monkeypatch.setattr(tracing, "pick_injection_thread", lambda pid: picked.pop(0))
        with Tracer(child.pid) as tracer:
            thread = tracer.stop_one()
            assert thread.stopped
            assert list(tracer.threads) == [thread.tid]
        assert len(picked) == 1
        assert ending.wait() == 0


def test_injection_thread_is_found_among_threads_that_come_and_go() -> None:
    # All that do not come and go wait in a call that shows EINTR, and are picked last.
    with running(SHORT_LIVED) as child:
        picked = set()
        for _ in range(500):
            with Tracer(child.pid) as tracer:
                picked.add(tracer.stop_one().tid)
        assert len(picked) > 50, "the threads did not come and go"
        assert child.poll() is None
        wait_for(lambda: len(tids_of(child.pid)) < 100, "threads that ended to go")


def test_injection_thread_is_waited_for_while_the_only_one_cannot_stop(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    # The parent sleeps (vfork, state D) until the child has opened the FIFO and called exec.
    actions = f"[(os.POSIX_SPAWN_OPEN, 5, {str(fifo)!r}, 0, 0)]"
    program = f"import os; os.posix_spawn('/bin/true', ['true'], {{}}, file_actions={actions}); input()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE) as child:
        wait_for(lambda: state_of(child.pid) == "D", "the parent to wait")
        opening = threading.Timer(0.2, lambda: os.close(os.open(fifo, os.O_WRONLY)))
        opening.start()
        with Tracer(child.pid) as tracer:
            assert tracer.stop_one().stopped
        opening.join()
        child.kill()


def test_skeleton_may_still_be_within_its_exec_when_it_is_seized() -> None:
    program = "import os, sys; print('up', flush=True); input(); os.execv('/bin/sleep', ['sleep', '1000'])"
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with child:
        assert child.stdin is not None and child.stdout is not None
        try:
            assert child.stdout.readline() == b"up\n"
            with Tracer(child.pid, kill_on_exit=True) as tracer:
                tracer.seize(child.pid)
                child.stdin.write(b"\n")
                child.stdin.flush()
                wait_for(lambda: os.readlink(f"/proc/{child.pid}/exe").endswith("sleep"), "the exec")
                assert [thread.tid for thread in tracer.stop_all()] == [child.pid]
        finally:
            child.kill()
