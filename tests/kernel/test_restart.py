"""Interrupted system calls go on as if nothing had happened: no EINTR, not early, not much late."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from agent.kernel.syscalls import (
    NR_clock_nanosleep,
    NR_futex,
    NR_getpid,
    NR_nanosleep,
    NR_poll,
)
from agent.target import restart
from agent.target.inject import Batch, Injector
from agent.target.inject_skeleton import SkeletonInjector
from agent.target.sleepers import guess_restarted
from agent.target.tracer import Tracer
from protocol.state.restart import RestartState
from tests.kernel.support import wait_for
from tests.kernel.test_inject import state_of

PRELUDE = """
import ctypes, os, signal, sys, time
libc = ctypes.CDLL(None, use_errno=True)
class timespec(ctypes.Structure):
    _fields_ = [("s", ctypes.c_long), ("n", ctypes.c_long)]
def ts(s):
    return ctypes.byref(timespec(int(s), int(s % 1 * 1e9)))
word = ctypes.c_int(0)
cell = ctypes.byref(word)
reader, writer = os.pipe()
epfd = libc.epoll_create1(0)
buf = ctypes.create_string_buffer(256)
mask = ctypes.create_string_buffer(128)
mask[0:8] = (1 << 11).to_bytes(8, "little")
class pollfd(ctypes.Structure):
    _fields_ = [("fd", ctypes.c_int), ("events", ctypes.c_short), ("revents", ctypes.c_short)]
pfd = ctypes.byref(pollfd(reader, 1, 0))
syscall = libc.syscall
syscall.restype = ctypes.c_long
L = ctypes.c_long
print("up", flush=True)
began = time.monotonic()
result = {call}
took = time.monotonic() - began
print(result, ctypes.get_errno() if result == -1 else 0, took, flush=True)
"""

# name: (expression, expected result, expected errno, seconds it lasts by itself; 0: until something is done)
TIMED = {
    "nanosleep": ("libc.nanosleep(ts(1), None)", 0, 0),
    "nanosleep_with_rest": ("libc.nanosleep(ts(1), ts(0))", 0, 0),
    "clock_nanosleep": ("libc.clock_nanosleep(1, 0, ts(1), None)", 0, 0),
    "clock_nanosleep_absolute": ("libc.clock_nanosleep(1, 1, ts(time.monotonic() + 1), None)", 0, 0),
    "poll": ("libc.poll(pfd, 1, 1000)", 0, 0),
    "ppoll_with_mask": ("libc.ppoll(pfd, 1, ts(1), mask)", 0, 0),
    "select": ("libc.select(0, None, None, None, ts(1))", 0, 0),
    "futex": ("syscall(L(202), cell, L(0), L(0), ts(1), None, L(0))", -1, errno.ETIMEDOUT),
    "futex_absolute": (
        "syscall(L(202), cell, L(9), L(0), ts(time.monotonic() + 1), None, L(0xffffffff))",
        -1,
        errno.ETIMEDOUT,
    ),
    "epoll_wait": ("libc.epoll_wait(epfd, buf, 1, 1000)", 0, 0),
}
ENDLESS = {
    "read": ("len(os.read(reader, 1))", 0),
    "epoll_wait": ("libc.epoll_wait(epfd, buf, 1, -1)", -1),
    "futex": ("syscall(L(202), cell, L(0), L(0), None, None, L(0))", -1),
    "sigwait": ("libc.sigwait(mask, buf)", 0),
    "pause": ("libc.pause()", -1),
    "sigsuspend": ("libc.sigsuspend(mask)", -1),
    "poll": ("libc.poll(pfd, 1, -1)", -1),
}


def start(call: str) -> subprocess.Popen[bytes]:
    program = PRELUDE.replace("{call}", call)
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"up\n"
    time.sleep(0.05)
    wait_for(lambda: state_of(child.pid) == "S", "the child sleeps")
    return child


def visit(pid: int, *, inject: bool) -> None:
    with Tracer(pid) as tracer:
        tracer.stop_all()
        if inject:
            with Injector(tracer) as injector:
                batch = Batch()
                batch.call(NR_getpid)
                injector.run(batch)


@pytest.mark.parametrize("inject", [False, True])
@pytest.mark.parametrize("name", TIMED)
def test_time_limit_survives_stops(name: str, inject: bool) -> None:
    call, result, error = TIMED[name]
    child = start(call)
    try:
        for _ in range(3):
            time.sleep(0.15)
            visit(child.pid, inject=inject)
        out, _ = child.communicate()
        words = out.split()
        assert [int(words[0]), int(words[1])] == [result, error]
        assert 0.999 <= float(words[2]) < 1.4
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize("inject", [False, True])
@pytest.mark.parametrize("name", ENDLESS)
def test_endless_call_does_not_return(name: str, inject: bool) -> None:
    call, _result = ENDLESS[name]
    child = start(call)
    try:
        for _ in range(3):
            visit(child.pid, inject=inject)
            time.sleep(0.02)
            assert child.poll() is None
            assert state_of(child.pid) == "S"
        assert child.stdout is not None
        os.set_blocking(child.stdout.fileno(), False)
        assert not child.stdout.read()
    finally:
        child.kill()
        child.wait()


def test_signal_that_arrives_while_stopped_ends_pause_with_eintr() -> None:
    child = start("(signal.signal(signal.SIGUSR1, lambda *_: None), libc.pause())[1]")
    try:
        with Tracer(child.pid) as tracer:
            tracer.stop(child.pid)
            with Injector(tracer) as injector:
                batch = Batch()
                batch.call(NR_getpid)
                injector.run(batch)
                os.kill(child.pid, signal.SIGUSR1)
        out, _ = child.communicate(timeout=10)
        assert out.split()[:2] == [b"-1", str(errno.EINTR).encode()]
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize("name", ["nanosleep", "clock_nanosleep", "poll", "futex"])
def test_restart_block_can_be_built_anew(name: str) -> None:
    """As on a destination: the restart block is thrown away and built again from what was dumped."""
    call, result, error = TIMED[name]
    child = start(call)
    number = {
        "nanosleep": NR_nanosleep,
        "clock_nanosleep": NR_clock_nanosleep,
        "poll": NR_poll,
        "futex": NR_futex,
    }[name]
    try:
        time.sleep(0.2)
        visit(child.pid, inject=False)  # the second stop sees restart_syscall only
        time.sleep(0.2)
        with Tracer(child.pid, kill_on_exit=True) as tracer:
            thread = tracer.stop(child.pid)
            sigmask = thread.sigmask
            regs, state = restart.dump_restart(thread, tracer.memory)
            regs = regs.copy()
            assert state is not None and state.nr in (number, NR_clock_nanosleep)
            assert 0.1e9 < state.remaining_ns < 0.7e9
            injector = SkeletonInjector(tracer)
            batch = Batch()
            batch.call(NR_getpid)
            injector.run(batch)
            answer = restart.rearm_restart_block(tracer, injector, thread, state)
            assert answer == -restart.ERESTART_RESTARTBLOCK
            thread.set_regs_now(restart.apply_restart(regs, answer), sigmask)
            tracer.detach_all()
        out, _ = child.communicate(timeout=10)
        words = out.split()
        assert [int(words[0]), int(words[1])] == [result, error]
        assert 0.999 <= float(words[2]) < 1.4
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize(
    ("call", "number", "seconds_left"),
    [
        ("syscall(L(35), ts(2), None)", NR_nanosleep, 2.0),
        ("syscall(L(35), ts(2), ts(0))", NR_nanosleep, 1.6),
        ("syscall(L(230), L(1), L(0), ts(2), None)", NR_clock_nanosleep, 2.0),
        ("syscall(L(230), L(1), L(0), ts(2), ts(0))", NR_clock_nanosleep, 1.6),
        ("syscall(L(7), pfd, L(1), L(2000))", NR_poll, 2.0),
        (TIMED["futex"][0].replace("ts(1)", "ts(2)"), NR_futex, 2.0),
    ],
)
def test_call_stopped_by_somebody_else_before_is_found_out(
    call: str, number: int, seconds_left: float
) -> None:
    """Nobody has noted it and no instruction tells it; what remains is the remainder, or unknown and thus all."""
    child = start(call)
    try:
        time.sleep(0.4)
        os.kill(child.pid, signal.SIGSTOP)
        wait_for(lambda: state_of(child.pid) == "T", "the child stops")
        os.kill(child.pid, signal.SIGCONT)
        wait_for(lambda: state_of(child.pid) == "S", "the child sleeps again")
        with Tracer(child.pid) as tracer:
            _regs, state = restart.dump_restart(tracer.stop(child.pid), tracer.memory)
        assert state is not None and state.nr == number
        assert seconds_left - 1.0 < state.remaining_ns / 1e9 <= seconds_left
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize(
    ("wchan", "first", "number"),
    [
        ("futex_wait_queue_me", 1 << 40, NR_futex),
        ("do_sys_poll", 1 << 40, NR_poll),
        ("hrtimer_nanosleep_restart", 1 << 40, NR_nanosleep),
        ("do_syscall_64", 1, NR_clock_nanosleep),
        ("do_cpu_nanosleep", 0xFFFFFFFA, NR_clock_nanosleep),
        ("0", 1, None),
        ("pipe_read", 1, None),
    ],
)
def test_restarted_call_is_told_by_where_it_sleeps(wchan: str, first: int, number: int | None) -> None:
    assert guess_restarted(wchan, (first, 0, 0, 0, 0, 0)) == number


def test_rearmed_call_that_returns_at_once_gives_its_result() -> None:
    child = start(TIMED["futex"][0])
    try:
        with Tracer(child.pid, kill_on_exit=True) as tracer:
            thread = tracer.stop(child.pid)
            regs = thread.regs
            args = (regs.rdi, 0, 12345, regs.r10, 0, 0)  # the word does not have this value
            state = RestartState(nr=NR_futex, args=args, remaining_ns=10**9)
            injector = SkeletonInjector(tracer)
            answer = restart.rearm_restart_block(tracer, injector, thread, state)
            assert answer == -errno.EAGAIN
            final = restart.apply_restart(regs, answer)
            assert final.result == -errno.EAGAIN and final.orig_rax == (1 << 64) - 1
    finally:
        child.kill()
        child.wait()


def test_restart_state_refuses_nonsense() -> None:
    with pytest.raises(ValueError):
        RestartState(nr=35, args=(1, 2), remaining_ns=0)
    with pytest.raises(ValueError):
        RestartState(nr=35, args=(0,) * 6, remaining_ns=-1)
