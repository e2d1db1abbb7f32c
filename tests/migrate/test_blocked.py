"""A thread blocked in a system call notices nothing: right result, right time, no EINTR.

All calls wait at the same time, each in a thread of its own, while the process is moved.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.hosts import WAIT_S, Host, wait_until
from tests.migrate.crossing import COMPLETED, Workload, agent_send, migrate, start_workload
from tests.workloads.blocked import MODES

CALL_S = 6.0
CALL_IN_CHECKS = 10
"""How many times as long as an `agent-send --check` the calls last: on a busy machine a migration too takes longer."""
# The call may end late by the time the process was frozen and by a busy machine; never early.
EARLY_S, LATE_S = 0.03, 5.0
# Their time limit is in memory, or the socket's: they begin it anew when the process goes on.
BEGIN_ANEW = {"epoll_pwait2", "recv_timeout", "sigtimedwait"}


def assert_calls_ended_right(
    workload: Workload, destination: Host, seconds: float, moves: int = 1
) -> None:
    """Every call ended over there, with its result and after its time."""
    wait_until(
        lambda: workload.last().get("state") == "idle", "all calls to end", 2 * seconds + WAIT_S
    )
    ends = {note["mode"]: note for note in workload.notes() if note.get("state") == "end"}
    wrong = [
        f"{mode}: {end['result_name']} after {end['elapsed_s']:.2f} s on {end['host']}"
        for mode, end in ends.items()
        if end["host"] != destination.name
        or end["result"] != end["expected"]
        or not seconds - EARLY_S <= end["elapsed_s"] <= seconds * (1 + moves * (mode in BEGIN_ANEW)) + LATE_S
    ]
    assert not wrong, "; ".join(wrong)
    workload.assert_healthy(destination, count=3)


def begin_all(source: Host, directory: Path, moves: int = 1) -> tuple[Workload, float]:
    """The workload in the middle of all its calls, and how long they last."""
    began = time.monotonic()
    agent_send(source, directory, "--check", 1)
    seconds = max(CALL_S, moves * CALL_IN_CHECKS * (time.monotonic() - began))
    workload = start_workload(source, directory, "blocked", "all", seconds, "STATUS", wait=False)
    begun = len(MODES)
    wait_until(
        lambda: sum(note.get("state") == "begin" for note in workload.notes()) == begun, "all calls to begin"
    )
    return workload, seconds


def test_blocked_calls_end_as_if_nothing_had_happened(
    source: Host, destination: Host, tmp_path: Path
) -> None:
    workload, seconds = begin_all(source, tmp_path)
    migrate(workload, destination, tmp_path)
    assert_calls_ended_right(workload, destination, seconds)


@pytest.mark.slow
def test_blocked_calls_survive_two_moves(source: Host, destination: Host, tmp_path: Path) -> None:
    workload, seconds = begin_all(source, tmp_path, moves=2)
    migrate(workload, destination, tmp_path)
    time.sleep(0.3)
    migrate(workload, source, tmp_path)
    assert_calls_ended_right(workload, source, seconds, moves=2)


@pytest.mark.slow
def test_blocked_calls_survive_an_agent_that_lets_them_go_on(
    source: Host, destination: Host, tmp_path: Path
) -> None:
    workload, seconds = begin_all(source, tmp_path, moves=2)
    image = tmp_path / "image"
    agent_send(source, tmp_path, "--leave-running", workload.pid, f"file:{image}", check=COMPLETED)
    assert b"kept_threads" in image.read_bytes()  # Some of them were dumped ahead, and slept on.
    migrate(workload, destination, tmp_path)
    assert_calls_ended_right(workload, destination, seconds, moves=2)
