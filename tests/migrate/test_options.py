"""Options that change what a crossing does: stdio:, --wait, --pidfile, --external, --inherit-fd, --new-pidns."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path

import pytest

from tests.hosts import Host, wait_until
from tests.migrate.crossing import (
    AGENT_RECV,
    AGENT_SEND,
    COMPLETED,
    REFUSED,
    Receiver,
    Workload,
    agent_send,
    migrate,
    start_program,
    start_workload,
    state_directory,
)


@pytest.fixture
def calm(source: Host, tmp_path: Path) -> Workload:
    return start_workload(source, tmp_path, "storm", 1, "STATUS", "--calm")


def test_process_crosses_standard_input_and_output(
    calm: Workload, source: Host, destination: Host, tmp_path: Path
) -> None:
    left, right = socket.socketpair()
    with left, right:
        send = [*AGENT_SEND, "--json", f"--state-dir={state_directory(source, tmp_path)}"]
        recv = [*AGENT_RECV, "--once", f"--state-dir={state_directory(destination, tmp_path)}", "stdio:"]
        receiver = destination.popen(recv, stdin=right.fileno(), stdout=right.fileno())
        sender = source.popen(
            [*send, str(calm.pid), "stdio:"], stdin=left.fileno(), stdout=left.fileno()
        )
    _, stderr = sender.communicate()
    _, received = receiver.communicate()
    assert sender.wait() == COMPLETED, stderr + received
    # Standard output belongs to the stream: the events are on stderr.
    events = [json.loads(line) for line in stderr.splitlines() if line.startswith(b"{")]
    assert events[-1]["event"] == "completed"
    assert receiver.wait() == COMPLETED, received
    calm.assert_healthy(destination)


def test_waiting_receiver_exits_as_the_process_does(
    calm: Workload, source: Host, destination: Host, tmp_path: Path
) -> None:
    pidfile = tmp_path / "pid"
    receiver = Receiver(destination, tmp_path, "--wait", f"--pidfile={pidfile}")
    agent_send(source, tmp_path, calm.pid, receiver.address, check=COMPLETED)
    calm.assert_healthy(destination)
    assert pidfile.read_text().strip() == str(calm.pid)
    status = (destination.proc(calm.pid) / "status").read_text()
    assert f"\nPPid:\t{receiver.process.inner}\n" in status
    os.kill(destination.outer_pid(calm.pid), signal.SIGTERM)
    assert receiver.finish().status == 128 + signal.SIGTERM


def test_waiting_receiver_is_the_parent_whose_death_is_signalled(
    source: Host, destination: Host, tmp_path: Path
) -> None:
    status = tmp_path / "storm.status"
    argv: list[str | Path] = ["setpriv", "--pdeathsig=TERM", sys.executable, "-m", "tests.workloads.storm"]
    argv += ["1", status, "--calm"]
    workload = start_program(source, tmp_path, argv, status=status)
    receiver = Receiver(destination, tmp_path, "--wait")
    agent_send(source, tmp_path, workload.pid, receiver.address, check=COMPLETED)
    workload.assert_healthy(destination, count=3)
    receiver.process.kill()
    receiver.process.communicate()
    wait_until(lambda: not destination.outer_pid(workload.pid), "the process to end with its parent")


def test_receiver_serves_one_migration_after_another(
    source: Host, destination: Host, tmp_path: Path
) -> None:
    address = f"unix:{tmp_path}/serving.sock"
    state = state_directory(destination, tmp_path)
    serving = destination.popen([*AGENT_RECV, f"--state-dir={state}", address], stdout=None, stderr=None)
    wait_until(lambda: destination.listens_on_unix(tmp_path / "serving.sock"), "agent-recv to listen")
    for number in range(2):
        status = tmp_path / f"storm{number}"
        workload = start_workload(source, tmp_path, "storm", number, "STATUS", "--calm", status=status)
        agent_send(source, tmp_path, workload.pid, address, check=COMPLETED)
        workload.assert_healthy(destination)
    serving.kill(signal.SIGTERM)
    serving.wait()
    wait_until(lambda: not destination.listens_on_unix(tmp_path / "serving.sock"), "it to end")
    workload.assert_healthy(destination)


def test_new_pid_namespace_makes_room_for_a_taken_pid(
    calm: Workload, source: Host, destination: Host, tmp_path: Path
) -> None:
    taken = destination.start_detached(["sleep", "1000"], tmp_path / "sleep", last_pid=calm.pid - 1)
    assert taken.inner == calm.pid
    receiver = Receiver(destination, tmp_path, "--new-pidns")
    agent_send(source, tmp_path, calm.pid, receiver.address, check=COMPLETED)
    note = calm.wait_for_notes(10, destination)
    assert note["pid"] == calm.pid
    assert calm.errors() == []
    assert taken.alive


def test_external_descriptor_is_replaced_by_an_inherited_one(
    source: Host, destination: Host, tmp_path: Path
) -> None:
    """Standard output goes to a file on the source and to another one on the destination."""
    workload = start_workload(source, tmp_path, "storm", 1, "STATUS", "--calm")
    other = tmp_path / "other-output"
    state = state_directory(destination, tmp_path)
    address = f"unix:{tmp_path}/inherit.sock"
    with open(other, "wb") as stream:
        inherit = ["--inherit-fd", f"fd[{stream.fileno()}]:fd[1]"]
        receiver = destination.popen(
            [*AGENT_RECV, "--once", f"--state-dir={state}", *inherit, address], pass_fds=[stream.fileno()]
        )
    path = tmp_path / "inherit.sock"
    wait_until(lambda: destination.listens_on_unix(path) or not receiver.alive, "agent-recv to listen")
    agent_send(source, tmp_path, "--external", "fd[1]", workload.pid, address, check=COMPLETED)
    receiver.communicate()
    workload.assert_healthy(destination)
    assert (destination.proc(workload.pid) / "fd" / "1").readlink() == other


def test_external_descriptor_without_a_replacement_is_refused(
    calm: Workload, source: Host, destination: Host, tmp_path: Path
) -> None:
    receiver = Receiver(destination, tmp_path)
    run = agent_send(source, tmp_path, "--external", "fd[1]", calm.pid, receiver.address, check=REFUSED)
    assert "fd" in str(run.outcome["obstacles"])
    calm.assert_healthy(source)


def test_json_events_tell_the_whole_story(calm: Workload, destination: Host, tmp_path: Path) -> None:
    events = migrate(calm, destination, tmp_path).send.events
    assert all(next(iter(event)) == "event" for event in events)
    rounds = events[-1]["rounds"]
    for row in rounds:
        assert {"pages_dirty", "pages_sent", "bytes_sent", "seconds"} <= row.keys()
    assert sum(row["bytes_sent"] for row in rounds) <= events[-1]["bytes_total"]
    assert events[-1]["tracker"] == "scan"


@pytest.mark.parametrize("tracker, verified", [("scan", True), ("compare", None)])
def test_direct_reads_are_verified_unless_nothing_can_be_missed(
    source: Host, destination: Host, tmp_path: Path, tracker: str, verified: bool | None
) -> None:
    (tmp_path / "data").write_bytes(b"d" * 8192)
    program = (
        f"import mmap, os, time; fd = os.open({str(tmp_path / 'data')!r}, os.O_RDONLY | os.O_DIRECT)\n"
        "buffer = mmap.mmap(-1, 8192); print('up', flush=True)\n"
        "while True: os.preadv(fd, [buffer], 0); time.sleep(0.001)"
    )
    reader = start_program(
        source, tmp_path, [sys.executable, "-c", program], status=tmp_path / "reader", wait=False
    )
    wait_until(lambda: "up" in reader.printed(), "the reader")
    crossing = migrate(reader, destination, tmp_path, send=[f"--tracker={tracker}"])
    assert crossing.completed["verified"] is verified
