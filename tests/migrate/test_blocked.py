"""A thread blocked in a system call notices nothing: right result, right time, no EINTR.

All calls wait at the same time, each in a thread of its own, while the process is moved.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.hosts import Host, wait_until
from tests.migrate.crossing import Workload, migrate, start_workload
from tests.workloads.blocked import MODES

CALL_S = 10.0
# The call may end late by the time the process was frozen and by a busy machine; never early.
EARLY_S, LATE_S = 0.03, 4.0


def assert_calls_ended_right(workload: Workload, destination: Host) -> None:
    """Every call ended over there, with its result and after its time."""
    wait_until(lambda: workload.last().get("state") == "idle", "all calls to end")
    ends = {note["mode"]: note for note in workload.notes() if note.get("state") == "end"}
    wrong = [
        f"{mode}: {end['result_name']} after {end['elapsed_s']:.2f} s on {end['host']}"
        for mode, end in ends.items()
        if end["host"] != destination.name
        or end["result"] != end["expected"]
        or not CALL_S - EARLY_S <= end["elapsed_s"] <= CALL_S + LATE_S
    ]
    assert not wrong, "; ".join(wrong)
    workload.assert_healthy(destination, count=3)


def begin_all(source: Host, directory: Path) -> Workload:
    workload = start_workload(source, directory, "blocked", "all", CALL_S, "STATUS", wait=False)
    begun = len(MODES)
    wait_until(
        lambda: sum(note.get("state") == "begin" for note in workload.notes()) == begun, "all calls to begin"
    )
    return workload


def test_blocked_calls_end_as_if_nothing_had_happened(
    source: Host, destination: Host, tmp_path: Path
) -> None:
    workload = begin_all(source, tmp_path)
    migrate(workload, destination, tmp_path)
    assert_calls_ended_right(workload, destination)


@pytest.mark.slow
def test_blocked_calls_survive_two_moves(source: Host, destination: Host, tmp_path: Path) -> None:
    workload = begin_all(source, tmp_path)
    migrate(workload, destination, tmp_path)
    time.sleep(0.3)
    migrate(workload, source, tmp_path)
    assert_calls_ended_right(workload, source)
