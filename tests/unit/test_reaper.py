"""agent.reaper: adopted children are reaped when they exit, others are left to their own waiters."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from agent import reaper


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGCHLD)
    reaper.install()
    yield
    signal.signal(signal.SIGCHLD, before)


def child_that_waits() -> tuple[int, int]:
    """A forked child that exits when the returned descriptor is closed."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writing)
        os.read(reading, 1)
        os._exit(7)
    os.close(reading)
    return pid, writing


def exists(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


def wait_gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while exists(pid) and time.monotonic() < deadline:
        time.sleep(0.005)
    return not exists(pid)


def test_adopted_child_is_reaped_when_it_exits() -> None:
    pid, gate = child_that_waits()
    reaper.adopt(pid)
    assert exists(pid)
    os.close(gate)
    assert wait_gone(pid)


def test_child_that_has_exited_before_is_reaped_at_once() -> None:
    pid, gate = child_that_waits()
    os.close(gate)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    reaper.adopt(pid)
    assert not exists(pid)


def test_other_children_keep_their_status() -> None:
    pid, gate = child_that_waits()
    os.close(gate)
    assert os.waitpid(pid, 0) == (pid, 7 << 8)
