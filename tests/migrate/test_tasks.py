"""Timers, signals and shared memory go on across a migration."""

from __future__ import annotations

from pathlib import Path

from tests.hosts import Host
from tests.migrate.crossing import migrate, start_workload


def test_timers_go_on_counting(source: Host, destination: Host, tmp_path: Path) -> None:
    workload = start_workload(source, tmp_path, "timers", "STATUS")
    before = migrated = workload.last()
    migrate(workload, destination, tmp_path)
    migrated = workload.wait_for_notes(2, destination)
    after = workload.assert_healthy(destination, count=15)
    for counter in ("alarms", "by_process", "by_thread"):
        assert after[counter] > migrated[counter] >= before[counter], f"{counter} stands still"


def test_pending_signals_keep_order_and_values(source: Host, destination: Host, tmp_path: Path) -> None:
    workload = start_workload(source, tmp_path, "signals", "STATUS")
    before = workload.last()
    migrate(workload, destination, tmp_path)
    after = workload.assert_healthy(destination, count=5)
    assert after["thread_turns"] > before["thread_turns"]


def test_threads_that_come_and_go_are_those_of_the_freeze(
    source: Host, destination: Host, tmp_path: Path
) -> None:
    # The destination makes threads ahead of the freeze: by then some have ended and others are new.
    workload = start_workload(source, tmp_path, "threadchurn", "STATUS")
    for here in (destination, source, destination):
        before = workload.last()["born"]
        migrate(workload, here, tmp_path)
        after = workload.assert_healthy(here, count=10)["born"]
        assert all(now > then for now, then in zip(after, before, strict=True)), (before, after)


def test_shared_memory_is_one_memory(source: Host, destination: Host, tmp_path: Path) -> None:
    data = tmp_path / "data"
    workload = start_workload(source, tmp_path, "sharedmem", "STATUS", data)
    migrate(workload, destination, tmp_path, send=["--verify", "--bandwidth-limit=50M"])
    workload.assert_healthy(destination, count=60)


def test_vector_registers_keep_their_values(source: Host, destination: Host, tmp_path: Path) -> None:
    workload = start_workload(source, tmp_path, "vectors", "STATUS")
    migrate(workload, destination, tmp_path, send=["--max-rounds=1"])
    workload.assert_healthy(destination, count=3)
