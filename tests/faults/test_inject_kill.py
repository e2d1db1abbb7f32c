"""An agent killed with SIGKILL at any instant of arming and injecting leaves its target as if never touched.

The number of kills is scaled for a quick run; FERRY_KILL_ROUNDS asks for more.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from agent.kernel import ptrace
from agent.kernel.syscalls import NR_close, NR_getppid, NR_gettid, NR_memfd_create
from agent.target.inject import Batch, Injector
from agent.target.memory import TargetMemory
from agent.target.tracer import Tracer, pick_injection_thread

ROUNDS = int(os.environ.get("FERRY_KILL_ROUNDS", "30"))
pytestmark = pytest.mark.timeout(120 + 5 * ROUNDS)

SLEEPER = """
import ctypes, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
class timespec(ctypes.Structure):
    _fields_ = [("s", ctypes.c_long), ("n", ctypes.c_long)]
stop = threading.Event()
for _ in range(3):
    threading.Thread(target=stop.wait, daemon=True).start()
def spin():
    while True:
        sum(range(100))
threading.Thread(target=spin, daemon=True).start()
three_s = timespec(3, 0)
print("up", flush=True)
while True:
    began = time.clock_gettime(time.CLOCK_MONOTONIC)
    result = libc.nanosleep(ctypes.byref(three_s), None)
    print(result, time.clock_gettime(time.CLOCK_MONOTONIC) - began, flush=True)
"""

COUNTER = """
import os, signal, sys, threading
signal.signal(signal.SIGRTMIN + 2, lambda *_: None)
signal.siginterrupt(signal.SIGRTMIN + 2, False)
os.set_blocking(1, False)
signal.set_wakeup_fd(1, warn_on_full_buffer=False)
os.write(1, b"u")
while True:
    os.read(0, 1)
"""


@contextlib.contextmanager
def running(program: str) -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(
        [sys.executable, "-u", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        child.stdout.read(1)
        yield child
    finally:
        child.kill()
        child.wait()


def appearance(pid: int) -> dict[str, object]:
    """Everything about the target that an agent might leave changed."""
    threads = {}
    for tid in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{tid}/status", encoding="ascii") as file:
            lines = [line.strip() for line in file]
        wanted = ("SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt", "TracerPid")
        threads[tid] = [line for line in lines if line.startswith(wanted)]
    with open(f"/proc/{pid}/maps", encoding="ascii") as file:
        maps = file.read()
    fds = {fd: os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
    return {"threads": threads, "maps": maps, "fds": fds}


def arm_for_ever(pid: int, seed: int) -> None:
    """What the agent process does: short visits as when arming, and full stops as when freezing."""
    turn = seed
    while True:
        turn += 1
        with Tracer(pid) as tracer:
            if turn % 3:
                tid = pid if turn % 2 else pick_injection_thread(pid)
                arm_once(tracer, tid)
            else:
                freeze_once(tracer)


def arm_once(tracer: Tracer, tid: int) -> None:
    thread = tracer.stop(tid)
    with Injector(tracer) as injector:
        first = Batch()
        fd = first.call(NR_memfd_create, first.string("ferry"), 0)
        first.undo(NR_close, fd)
        for _ in range(50):
            first.call(NR_getppid)
        injector.run(first, thread)
        second = Batch()
        second.call(NR_close, fd.value)
        injector.run(second, thread)


def freeze_once(tracer: Tracer) -> None:
    batches = {thread.tid: Batch() for thread in tracer.stop_all()}
    for batch in batches.values():
        batch.call(NR_gettid)
    with Injector(tracer) as injector:
        injector.run_parallel(batches)


def kill_an_agent(work: Callable[[], None], after_s: float) -> None:
    """Run `work` in a process of its own and kill that at an instant `after_s` after it began."""
    ready, tell = os.pipe()
    agent = os.fork()
    if agent == 0:
        try:
            os.write(tell, b"x")
            work()
        except BaseException as err:  # noqa: BLE001  # an error is not what this test waits for
            os.write(2, f"agent failed: {err!r}\n".encode())
        os._exit(1)
    os.close(tell)
    os.read(ready, 1)
    os.close(ready)
    until = time.perf_counter() + after_s
    while time.perf_counter() < until:
        pass
    os.kill(agent, signal.SIGKILL)
    _pid, status = os.waitpid(agent, 0)
    assert os.WIFSIGNALED(status), "the agent failed before it was killed"


def killed_at_request(work: Callable[[], None], number: int) -> Callable[[], None]:
    """Return `work` with the agent killing itself right after its ptrace request or memory write `number`."""

    def counted() -> None:
        left = number

        def count() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        request, write = ptrace._request, TargetMemory.write

        def counted_request(*args: Any) -> int:
            result = request(*args)
            count()
            return result

        def counted_write(*args: Any) -> None:
            write(*args)
            count()

        setattr(ptrace, "_request", counted_request)  # noqa: B010  # mypy
        setattr(TargetMemory, "write", counted_write)  # noqa: B010  # mypy
        work()
        os._exit(0)

    return counted


def outcome_of(work: Callable[[], None]) -> int:
    """Run `work` in a process of its own; return its wait status."""
    agent = os.fork()
    if agent == 0:
        try:
            work()
        except BaseException as err:  # noqa: BLE001  # the process ends here
            os.write(2, f"agent failed: {err!r}\n".encode())
        os._exit(1)
    return os.waitpid(agent, 0)[1]


def wait_until_as(pid: int, before: dict[str, object], *, limit_s: float = 6.0) -> None:
    """Wait until the target looks as before; a thread in the routine may need half a second."""
    deadline = time.monotonic() + limit_s
    while (now := appearance(pid)) != before:
        assert time.monotonic() < deadline, f"{before} -> {now}"
        time.sleep(0.02)


@pytest.mark.parametrize("seed", [1])
def test_killed_agent_leaves_sleeper_as_it_was(seed: int) -> None:
    instants = random.Random(seed)
    with running(SLEEPER) as child:
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(0.1)
        before = appearance(child.pid)
        for turn in range(ROUNDS):
            work = functools.partial(arm_for_ever, child.pid, turn)
            kill_an_agent(work, instants.uniform(0.0, 0.03))
            assert child.poll() is None
            wait_until_as(child.pid, before)
        # The sleeps that began meanwhile, and the one that is under way.
        sleeps = 0
        os.set_blocking(child.stdout.fileno(), False)
        text = b""
        deadline = time.monotonic() + 8
        while sleeps < 1 + text.count(b"\n") and time.monotonic() < deadline:
            part = child.stdout.read()
            if part:
                text += part
                sleeps = text.count(b"\n")
                if sleeps and time.monotonic() > deadline - 4.5:
                    break
            time.sleep(0.05)
        assert sleeps
        for line in text.decode().splitlines():
            result, slept = line.split()
            assert result == "0", "EINTR reached the program"
            assert 3.0 <= float(slept) < 4.5


def test_killed_agent_loses_and_doubles_no_signal() -> None:
    instants = random.Random(2)
    sig = signal.SIGRTMIN + 2
    with running(COUNTER) as child:
        assert child.stdout is not None
        time.sleep(0.1)
        before = appearance(child.pid)
        sent = 0

        def visit_and_signal() -> None:
            turn = 0
            while True:
                turn += 1
                with Tracer(child.pid) as tracer:
                    arm_once(tracer, child.pid)

        for _ in range(max(ROUNDS // 3, 5)):
            signaller = os.fork()
            if signaller == 0:
                for _ in range(40):
                    os.kill(child.pid, sig)
                    time.sleep(0.0003)
                os._exit(0)
            kill_an_agent(visit_and_signal, instants.uniform(0.0, 0.03))
            os.waitpid(signaller, 0)
            sent += 40
        wait_until_as(child.pid, before)
        os.set_blocking(child.stdout.fileno(), False)
        received = 0
        while part := child.stdout.read():
            received += len(part)
        assert received == sent


@pytest.mark.parametrize("visit", ["arm", "freeze"])
def test_agent_killed_after_each_ptrace_request(visit: str) -> None:
    """Deterministic counterpart: no boundary between two requests is left to chance."""
    step = 1 if ROUNDS >= 100 else 5

    def arm() -> None:
        with Tracer(child.pid) as tracer:
            arm_once(tracer, child.pid)

    def freeze() -> None:
        with Tracer(child.pid) as tracer:
            freeze_once(tracer)

    with running(SLEEPER) as child:
        time.sleep(0.2)
        before = appearance(child.pid)
        number = 1
        while True:
            work = killed_at_request(arm if visit == "arm" else freeze, number)
            status = outcome_of(work)
            if status == 0:
                break  # the visit ended before that many requests
            assert os.WIFSIGNALED(status)
            wait_until_as(child.pid, before)
            number += step
        assert number > 10
        assert child.stdout is not None
        os.set_blocking(child.stdout.fileno(), False)
        for line in (child.stdout.read() or b"").decode().splitlines()[1:]:
            result, slept = line.split()
            assert result == "0"
            assert 3.0 <= float(slept) < 4.5
