"""A checkpoint image is the recorded stream of a migration; restoring plays it."""

from __future__ import annotations

from pathlib import Path

from tests.hosts import Host
from tests.migrate.crossing import (
    COMPLETED,
    FAILED,
    Receiver,
    Workload,
    agent_send,
    start_workload,
    traces_of,
)


def start(source: Host, directory: Path) -> Workload:
    return start_workload(source, directory, "selfcheck", "STATUS", "--megabytes", 6)


def test_process_is_restored_from_an_image(source: Host, destination: Host, tmp_path: Path) -> None:
    workload = start(source, tmp_path)
    image = tmp_path / "image.ferry"
    sent = agent_send(source, tmp_path, "--verify", workload.pid, f"file:{image}", check=COMPLETED)
    assert sent.outcome["event"] == "completed"
    assert not source.outer_pid(workload.pid), "the original still runs"
    assert image.stat().st_size > 1_000_000
    received = Receiver(destination, tmp_path, address=f"file:{image}").finish()
    assert received.status == COMPLETED, str(received)
    workload.assert_healthy(destination)


def test_original_goes_on_with_leave_running(source: Host, tmp_path: Path) -> None:
    workload = start(source, tmp_path)
    before = traces_of(source, workload.pid)["status"]
    image = tmp_path / "image.ferry"
    agent_send(source, tmp_path, "--leave-running", workload.pid, f"file:{image}", check=COMPLETED)
    assert image.exists()
    workload.assert_healthy(source)
    assert traces_of(source, workload.pid)["status"] == before


def test_truncated_image_is_refused_and_nothing_is_left(
    source: Host, destination: Host, tmp_path: Path
) -> None:
    workload = start(source, tmp_path)
    image = tmp_path / "image.ferry"
    agent_send(source, tmp_path, "--leave-running", workload.pid, f"file:{image}", check=COMPLETED)
    whole = image.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        image.write_bytes(whole[:length])
        received = Receiver(destination, tmp_path, address=f"file:{image}").finish()
        assert received.status == FAILED, str(received)
        assert received.outcome["event"] == "failed"
        assert destination.processes() == {}


def test_no_image_is_left_by_a_failed_checkpoint(source: Host, tmp_path: Path) -> None:
    workload = start(source, tmp_path)
    image = tmp_path / "missing" / "image.ferry"
    sent = agent_send(source, tmp_path, workload.pid, f"file:{image}")
    assert sent.status in (FAILED, 2)
    assert not image.parent.exists()
    workload.assert_healthy(source)
