"""Making a tracker for a process while the agent gets hardly any CPU time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from agent.errors import TooLateError
from agent.target.inject import Injector
from agent.tracker.create import LATE_ATTEMPTS, create_tracker

PROGRAM = "import time\nprint('ready', flush=True)\nwhile True: time.sleep(0.001)"


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def make_late(monkeypatch: pytest.MonkeyPatch, runs: int) -> list[int]:
    """Have the agent come too late to the first ``runs`` injected runs; the list grows by one for each run."""
    finish, seen = Injector._finish, [0]

    def late(*args: object) -> None:
        seen.append(0)
        if len(seen) - 1 <= runs:
            time.sleep(0.8)  # the thread waits half a second
        finish(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(Injector, "_finish", late)
    return seen


def open_fds(pid: int) -> list[str]:
    return sorted(os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd"))


def test_an_agent_that_was_late_tries_again(child: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before, pidfd = open_fds(child.pid), os.pidfd_open(child.pid)
    make_late(monkeypatch, 1)
    try:
        tracker = create_tracker("scan", child.pid, pidfd)
        tracker.arm()
        assert tracker.collect(final=False).pages
        tracker.disarm()
        assert open_fds(child.pid) == before
    finally:
        os.close(pidfd)


def test_an_agent_that_is_always_late_gives_up_and_leaves_nothing(
    child: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, pidfd = open_fds(child.pid), os.pidfd_open(child.pid)
    mine = len(os.listdir("/proc/self/fd"))
    seen = make_late(monkeypatch, 1000)
    try:
        with pytest.raises(TooLateError, match="before the agent looked"):
            create_tracker("scan", child.pid, pidfd)
        assert len(seen) - 1 >= LATE_ATTEMPTS
        assert open_fds(child.pid) == before
        assert len(os.listdir("/proc/self/fd")) == mine
    finally:
        os.close(pidfd)
