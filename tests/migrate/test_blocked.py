"""A thread blocked in a system call notices nothing: right result, right time, no EINTR.

Two crossings would double the suite's time: each mode moves once, in the middle of its call.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hosts import Host, wait_until
from tests.migrate.crossing import migrate, start_workload
from tests.workloads.blocked import MODES

CALL_S = 5.0
# The call may end late by the time the process was frozen and by a busy machine; never early.
EARLY_S, LATE_S = 0.03, 4.0


@pytest.mark.parametrize("mode", sorted(MODES))
def test_blocked_call_ends_as_if_nothing_had_happened(
    source: Host, destination: Host, tmp_path: Path, mode: str
) -> None:
    workload = start_workload(source, tmp_path, "blocked", mode, CALL_S, "STATUS", wait=False)
    wait_until(workload.last, "the call to begin")
    assert workload.last()["state"] == "begin"
    migrate(workload, destination, tmp_path)
    wait_until(lambda: workload.last().get("state") == "idle", "the call to end")
    end = next(note for note in workload.notes() if note.get("state") == "end")
    assert end["host"] == destination.name, "the call ended before the process had moved"
    assert end["result"] == end["expected"], f"{mode} gave {end['result_name']}"
    assert CALL_S - EARLY_S <= end["elapsed_s"] <= CALL_S + LATE_S
    workload.assert_healthy(destination, count=3)
