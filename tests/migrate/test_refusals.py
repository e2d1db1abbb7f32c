"""What cannot be moved is refused by name, before the target is touched."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.hosts import Host
from tests.migrate.crossing import (
    COMPLETED,
    REFUSED,
    USAGE,
    Receiver,
    Workload,
    agent_send,
    start_program,
    start_workload,
    traces_of,
)

PRELUDE = """
import fcntl, os, select, socket, subprocess, sys, tempfile, threading, time
sys.path.insert(0, {repository!r})
from tests.workloads.status import Status
status = Status(sys.argv[1])
"""
POSTLUDE = """
while True:
    status.note()
    time.sleep(0.02)
"""
# Name of the obstacle -> a program that has it, and a word that the refusal must contain.
OBSTACLES = {
    "child": ("child = subprocess.Popen(['sleep', '1000'], start_new_session=True)", "child"),
    "established TCP": (
        "s = socket.create_server(('127.0.0.1', 0)); c = socket.create_connection(s.getsockname()); d = s.accept()",
        "tcp",
    ),
    "pty": ("pair = os.openpty()", "pt"),
    "deleted file": ("f = tempfile.TemporaryFile(); f.write(b'x'); f.flush()", "deleted"),
    "flock": ("f = open(sys.argv[1] + '.lock', 'w'); fcntl.flock(f, fcntl.LOCK_EX)", "lock"),
    "inotify": (
        "import ctypes; n = ctypes.CDLL(None).inotify_init1(0)",
        "inotify",
    ),
    "pidfd": ("p = os.pidfd_open(os.getpid())", "pidfd"),
    "descriptor in flight": (
        # A pipe end that is open nowhere else.
        "a, b = socket.socketpair(); r, w = os.pipe(); socket.send_fds(a, [b'!'], [r]); os.close(r)",
        "pipe",
    ),
    "netlink": ("n = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)", "netlink"),
}


def start_with(source: Host, directory: Path, code: str) -> Workload:
    repository = str(Path(__file__).resolve().parents[2])
    program = directory / "program.py"
    program.write_text(PRELUDE.format(repository=repository) + code + POSTLUDE)
    status = directory / "program.status"
    return start_program(source, directory, [sys.executable, program, status], status=status)


def assert_untouched(workload: Workload, source: Host, before: dict[str, object]) -> None:
    workload.assert_healthy(source, count=3)
    assert traces_of(source, workload.pid) == before


@pytest.mark.parametrize("name", sorted(OBSTACLES))
def test_obstacle_is_named_and_target_untouched(source: Host, tmp_path: Path, name: str) -> None:
    code, word = OBSTACLES[name]
    workload = start_with(source, tmp_path, code)
    before = traces_of(source, workload.pid)
    run = agent_send(source, tmp_path, "--check", workload.pid, check=REFUSED)
    obstacles = [event for event in run.events if event["event"] == "obstacle"]
    assert obstacles, str(run)
    assert any(word in str(obstacle).lower() for obstacle in obstacles), obstacles
    assert all(obstacle["kind"] and obstacle["hint"] for obstacle in obstacles), obstacles
    assert_untouched(workload, source, before)


def test_every_obstacle_is_named_at_once(source: Host, tmp_path: Path) -> None:
    codes = [OBSTACLES[name][0] for name in ("child", "pty", "pidfd")]
    workload = start_with(source, tmp_path, "\n".join(codes))
    run = agent_send(source, tmp_path, "--check", workload.pid, check=REFUSED)
    text = run.stdout.lower()
    assert "child" in text and "pidfd" in text and "pt" in text
    assert len([event for event in run.events if event["event"] == "obstacle"]) >= 3


def test_migration_of_a_refused_process_changes_nothing(
    source: Host, destination: Host, tmp_path: Path
) -> None:
    workload = start_with(source, tmp_path, OBSTACLES["child"][0])
    before = traces_of(source, workload.pid)
    receiver = Receiver(destination, tmp_path)
    run = agent_send(source, tmp_path, workload.pid, receiver.address, check=REFUSED)
    assert run.outcome["event"] == "failed" and run.outcome["exit_code"] == REFUSED
    assert_untouched(workload, source, before)
    assert set(destination.processes().values()) <= {"python", "python3", "python3.11"}


def test_check_of_a_movable_process_passes(source: Host, tmp_path: Path) -> None:
    workload = start_workload(source, tmp_path, "storm", 1, "STATUS", "--calm")
    before = {key: traces_of(source, workload.pid)[key] for key in ("status", "exe", "fds")}
    agent_send(source, tmp_path, "--check", workload.pid, check=COMPLETED)
    workload.assert_healthy(source, count=3)
    assert {key: traces_of(source, workload.pid)[key] for key in before} == before


def test_file_missing_on_the_destination_is_named(
    source: Host, destination: Host, tmp_path: Path
) -> None:
    here = tmp_path / "only-here"
    here.mkdir()
    # A file system that only the source has mounted.
    source.run(["mount", "-t", "tmpfs", "tmpfs", here])
    code = f"f = open({str(here / 'file')!r}, 'w'); f.write('x'); f.flush()"
    workload = start_with(source, tmp_path, code)
    before = traces_of(source, workload.pid)
    receiver = Receiver(destination, tmp_path)
    run = agent_send(source, tmp_path, workload.pid, receiver.address, check=REFUSED)
    assert str(here / "file") in str(run.outcome), str(run)
    workload.assert_healthy(source, count=3)
    assert traces_of(source, workload.pid)["status"] == before["status"]


def test_pid_taken_on_the_destination_is_refused(
    source: Host, destination: Host, tmp_path: Path
) -> None:
    workload = start_workload(source, tmp_path, "storm", 1, "STATUS", "--calm")
    taken = destination.start_detached(["sleep", "1000"], tmp_path / "sleep", last_pid=workload.pid - 1)
    assert taken.inner == workload.pid
    receiver = Receiver(destination, tmp_path)
    run = agent_send(source, tmp_path, workload.pid, receiver.address)
    assert run.status == REFUSED, str(run)
    assert str(workload.pid) in str(run.outcome)
    workload.assert_healthy(source)
    assert taken.alive


@pytest.mark.parametrize(
    "arguments",
    [
        ["999999", "unix:/nonexistent"],
        ["1"],
        ["not-a-pid", "unix:/nonexistent"],
        ["--tracker=nonsense", "2", "unix:/x"],
        ["--tcp-established", "2", "unix:/x"],
    ],
)
def test_senseless_command_line_is_usage(source: Host, tmp_path: Path, arguments: list[str]) -> None:
    run = agent_send(source, tmp_path, *arguments)
    assert run.status == USAGE
    assert run.stderr.count("\n") <= 3, run.stderr
