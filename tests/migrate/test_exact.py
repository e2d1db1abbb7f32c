"""What is restored is exactly what there was: seen from outside (inspect_process.py) and from inside (exact.py)."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import Host, host_pair, wait_until
from tests.migrate.crossing import (
    COMPLETED,
    Receiver,
    Workload,
    agent_send,
    migrate,
    start_program,
    start_workload,
)
from tests.migrate.inspect_process import Picture, differences, take_picture
from tests.prerequisites import require_namespaces

NR_THREADS = 5
MANY_CROSSINGS = 6

EXPECTED = (
    # Read-only memory that was writable once stays accounted (VM_ACCOUNT) at the source; the limit on committed
    # memory is all that shows it.
    re.compile(r"^map \S+ VmFlags: '(.*)ac (.*)' -> '\1\2'$"),
    # The parent is another one, which would soon exit (see --wait).
    re.compile(r"^thread \d prctl pdeathsig: "),
)


def unexpected(before: Picture, after: Picture) -> list[str]:
    return [line for line in differences(before, after) if not any(p.match(line) for p in EXPECTED)]


def state_of(host: Host, pid: int) -> str:
    found = re.search(r"^State:\t(\w)", (host.proc(pid) / "status").read_text(errors="replace"), re.MULTILINE)
    assert found
    return found[1]


@contextlib.contextmanager
def stopped(workload: Workload, host: Host) -> Iterator[None]:
    """The workload is stopped by a SIGSTOP while the body runs, wherever it is by then."""
    os.kill(host.outer_pid(workload.pid), signal.SIGSTOP)
    wait_until(lambda: state_of(host, workload.pid) == "T", "the process to stop")
    try:
        yield
        os.kill(workload.host.outer_pid(workload.pid), signal.SIGCONT)
    finally:
        # nsenter stopped itself together with its child, and would never end.
        os.kill(workload.process.popen.pid, signal.SIGCONT)


def seen_inside(workload: Workload, host: Host) -> Picture:
    """What all threads see now, on ``host``, as flat as the picture from outside."""
    start = workload.last().get("sequence", 0)
    newest: dict[str, dict[str, Any]] = {}

    def all_noted() -> bool:
        for note in workload.notes():
            if note["sequence"] > start and "thread" in note and note["host"] == host.name:
                newest[note["thread"]] = note["picture"]
        return len(newest) == NR_THREADS

    wait_until(all_noted, f"notes of {NR_THREADS} threads: {workload.errors()}")
    return {f"{thread} {key}": str(value) for thread, seen in newest.items() for key, value in seen.items()}


def test_a_process_full_of_unusual_settings_is_the_same_everywhere(
    source: Host, destination: Host, tmp_path: Path
) -> None:
    status = tmp_path / "exact.status"
    argv: list[str | Path] = ["env", f"HUGE={'e' * 100_000}", sys.executable, "-m", "tests.workloads.exact"]
    argv += [status, "a" * 100_000, "b" * 100_000, os.fsdecode(b"\xff\n")]
    workload = start_program(source, tmp_path, argv, status=status)
    before = seen_inside(workload, source)
    crossing = migrate(workload, destination, tmp_path, send=["--verify"])
    assert unexpected(before, seen_inside(workload, destination)) == []
    (note,) = crossing.recv.outcome["notes"]
    assert note.startswith("Threads ") and "lost the parent death signal" in note
    # What runs maps memory as it likes; what is stopped stays as it is, to the last mapping and descriptor.
    with stopped(workload, destination):
        outside = take_picture(destination.proc(workload.pid))
        for number in range(1, MANY_CROSSINGS):
            migrate(workload, (destination, source)[number % 2], tmp_path)
            wait_until(lambda: state_of(workload.host, workload.pid) == "T", "the copy to stop")
            assert unexpected(outside, take_picture(workload.host.proc(workload.pid))) == []
    assert unexpected(before, seen_inside(workload, workload.host)) == []
    assert not workload.errors()


@pytest.mark.parametrize(
    "privileges",
    [
        ["--reuid=65534", "--regid=65534", "--clear-groups"],
        ["--reuid=65534", "--regid=65534", "--groups=7,1000", "--inh-caps=+net_bind_service"]
        + ["--ambient-caps=+net_bind_service", "--bounding-set=-all,+net_bind_service,+chown"],
    ],
    ids=["nobody", "nobody with a capability"],
)
def test_a_process_without_privileges_gets_none(
    source: Host, destination: Host, tmp_path: Path, privileges: Sequence[str]
) -> None:
    argv: list[str | Path] = ["setpriv", *privileges, sys.executable, "-m", "tests.workloads.exact"]
    if source.run([*argv[:-2], "-c", "import tests.workloads.exact"], check=False).returncode:
        pytest.skip("this clone, or this Python, cannot be read by other users")
    # Nobody may look into the directories of pytest.
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o777)
        status = Path(directory, "exact.status")
        workload = start_program(source, tmp_path, [*argv, status, "plain"], status=status)
        before = seen_inside(workload, source)
        assert before["thread 1 uids"] == "[[65534, 65534, 65534], 65534]"
        migrate(workload, destination, tmp_path)
        assert unexpected(before, seen_inside(workload, destination)) == []


def test_a_stopped_process_stays_stopped(source: Host, destination: Host, tmp_path: Path) -> None:
    workload = start_workload(source, tmp_path, "exact", "STATUS", "plain")
    with stopped(workload, source):
        notes = workload.last()["sequence"]
        before = take_picture(source.proc(workload.pid))
        migrate(workload, destination, tmp_path)
        wait_until(lambda: state_of(destination, workload.pid) == "T", "the copy to stop")
        assert workload.last()["sequence"] == notes, "it ran before it stopped"
        assert unexpected(before, take_picture(destination.proc(workload.pid))) == []
    workload.assert_healthy(destination)


def test_clocks_never_jump_between_machines_with_other_clocks(tmp_path: Path) -> None:
    require_namespaces()
    with host_pair(monotonic_offset_s=50_000) as (source, destination):
        workload = start_workload(source, tmp_path, "timers", "STATUS")
        for host in (destination, source):
            migrate(workload, host, tmp_path)
            workload.assert_healthy(host, count=5)
        notes = workload.notes()
        assert {note["host"] for note in notes} == {"source", "destination"}
        # How far one clock is from the other may change by what a message takes, and never the other way.
        for earlier, later in zip(notes, notes[1:]):
            passed = later["monotonic_ns"] - earlier["monotonic_ns"]
            assert passed >= 0, "the monotonic clock went back"
            assert passed - (later["realtime_ns"] - earlier["realtime_ns"]) < 2e9, "it jumped"
            assert passed - (later["realtime_ns"] - earlier["realtime_ns"]) > -2e9, "it stood still"


@pytest.mark.parametrize(
    ("ending", "status"), [("exit 3", 3), ("kill -TERM $$", 143)], ids=["exit", "signal"]
)
@pytest.mark.parametrize("recv", [[], ["--new-pidns"]], ids=["same pid", "new namespace"])
def test_agent_recv_waits_and_exits_as_the_process_does(
    source: Host, destination: Host, tmp_path: Path, recv: list[str], ending: str, status: int
) -> None:
    fifo, pidfile = tmp_path / "fifo", tmp_path / "pid"
    os.mkfifo(fifo)
    script = f'exec 3<>"{fifo}"; read -u 3 -t 100 x; {ending}'
    workload = start_program(source, tmp_path, ["bash", "-c", script], status=tmp_path / "none", wait=False)
    wait_until(lambda: (source.proc(workload.pid) / "fd/3").exists(), "the fifo to be opened")
    receiver = Receiver(destination, tmp_path, "--wait", f"--pidfile={pidfile}", *recv)
    agent_send(source, tmp_path, workload.pid, receiver.address, check=COMPLETED)
    wait_until(pidfile.exists, "the pid file")
    copy = destination.proc(int(pidfile.read_text()))
    assert (copy / "comm").read_text() == "bash\n"
    assert receiver.process.alive
    fifo.write_text("go\n")
    assert receiver.finish().status == status
    assert not copy.exists()
