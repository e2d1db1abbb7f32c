"""Agents killed at random instants, unreachable and incompatible peers: exactly one copy runs, or none
and one is kept.

FERRY_KILL_ROUNDS: how many random instants each test tries (default 3; a soak run takes hundreds).
FERRY_KILL_SEED: where the instants start from, to repeat a failure.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.arena import give_it_time
from tests.hosts import Host, wait_until
from tests.migrate.crossing import (
    COMPLETED,
    FAILED,
    REFUSED,
    UNDECIDED,
    Receiver,
    Workload,
    agent_send,
    start_agent_send,
    start_workload,
    traces_of,
    wait_for_event,
)

ROUNDS = int(os.environ.get("FERRY_KILL_ROUNDS", "3"))
SEED = int(os.environ.get("FERRY_KILL_SEED", "1"))
# The longest a migration of the small workload takes; instants are drawn from it.
SPAN_S = 1.6
SLOW = ["--bandwidth-limit=2M", "--compress=none"]
"""With this the first round takes seconds."""


def start(source: Host, directory: Path) -> Workload:
    return start_workload(source, directory, "selfcheck", "STATUS", "--megabytes", 6)


def assert_runs_untouched(workload: Workload, source: Host, before: dict[str, object]) -> None:
    workload.assert_healthy(source, count=5)
    wait_until(
        lambda: traces_of(source, workload.pid)["status"] == before["status"],
        f"{before['status']} again; it is {traces_of(source, workload.pid)['status']}",
        timeout_s=5,
    )
    # Its own mappings come and go with what it does; what Ferry maps must not stay.
    names = (source.proc(workload.pid) / "maps").read_text()
    assert "userfaultfd" not in names


@contextlib.contextmanager
def killed_after(process_kill: object, delay_s: float) -> Iterator[None]:
    """Calls `process_kill` so long after the block began."""
    assert callable(process_kill)
    timer = threading.Timer(delay_s, process_kill)
    timer.start()
    try:
        yield
    finally:
        timer.join()


def is_stopped(host: Host, pid: int) -> bool:
    status = (host.proc(pid) / "status").read_text()
    return "\nState:\tT" in status or "\nState:\tt" in status


def assert_one_copy(workload: Workload, source: Host, destination: Host) -> str:
    """One copy that runs, or frozen copies only; returns where it is."""

    def running(host: Host) -> bool:
        return bool(host.outer_pid(workload.pid)) and not is_stopped(host, workload.pid)

    # The loser of a kill is still being reaped for a moment.
    wait_until(
        lambda: not (running(source) and running(destination)), "one of two running copies to go", timeout_s=5
    )
    if running(destination):
        workload.assert_healthy(destination, count=5)
        return "destination"
    if running(source):
        workload.assert_healthy(source, count=5)
        return "source"
    assert source.outer_pid(workload.pid) or destination.outer_pid(workload.pid), "no copy is left"
    return "frozen"


@pytest.mark.parametrize("number", range(ROUNDS))
def test_killed_sender_leaves_one_copy(
    source: Host, destination: Host, tmp_path: Path, number: int
) -> None:
    workload = start(source, tmp_path)
    before = traces_of(source, workload.pid)
    receiver = Receiver(destination, tmp_path)
    sender, _ = start_agent_send(source, tmp_path, workload.pid, receiver.address)
    delay_s = random.Random(SEED * 1000 + number).uniform(0, SPAN_S)
    time.sleep(delay_s)
    sender.kill()
    stdout, _ = sender.communicate()
    if b'"prepare"' not in stdout:
        # Killed before it connected, or before it said anything: the receiver may wait for another one.
        give_it_time(receiver.process, 1.0)
        receiver.process.kill(15)
    received = receiver.finish()
    where = assert_one_copy(workload, source, destination)
    print(f"killed after {delay_s:.3f} s: it runs on the {where}; receiver: {received.status}")
    if received.status == FAILED:
        assert where == "source"
        assert_runs_untouched(workload, source, before)
        # And it still can be moved.
        again = Receiver(destination, tmp_path)
        agent_send(source, tmp_path, workload.pid, again.address, check=COMPLETED)
        assert again.finish().status == COMPLETED
        workload.assert_healthy(destination)


@pytest.mark.parametrize("number", range(ROUNDS))
def test_killed_receiver_leaves_one_copy(
    source: Host, destination: Host, tmp_path: Path, number: int
) -> None:
    workload = start(source, tmp_path)
    before = traces_of(source, workload.pid)
    receiver = Receiver(destination, tmp_path)
    delay_s = random.Random(SEED * 2000 + number).uniform(0, SPAN_S)
    with killed_after(receiver.process.kill, delay_s):
        sent = agent_send(source, tmp_path, "--io-timeout=5", workload.pid, receiver.address)
    receiver.process.communicate()
    where = assert_one_copy(workload, source, destination)
    print(f"killed after {delay_s:.3f} s: it runs on the {where}; sender: {sent.status}")
    assert sent.status in (COMPLETED, FAILED, UNDECIDED), str(sent)
    if sent.status == FAILED:
        assert where == "source", str(sent)
        assert_runs_untouched(workload, source, before)
        assert destination.processes() == {}
    if sent.status == COMPLETED:
        assert where == "destination", str(sent)


def test_interrupted_sender_aborts_cleanly(source: Host, destination: Host, tmp_path: Path) -> None:
    workload = start(source, tmp_path)
    before = traces_of(source, workload.pid)
    receiver = Receiver(destination, tmp_path)
    sender, _ = start_agent_send(source, tmp_path, *SLOW, workload.pid, receiver.address)
    wait_for_event(sender, phase="rounds")
    sender.kill(15)
    _, stderr = sender.communicate()
    assert sender.wait() == FAILED, stderr
    assert b"Traceback" not in stderr
    assert receiver.finish().status == FAILED
    assert_runs_untouched(workload, source, before)
    assert destination.processes() == {}


def test_unreachable_destination_changes_nothing(source: Host, destination: Host, tmp_path: Path) -> None:
    workload = start(source, tmp_path)
    before = traces_of(source, workload.pid)
    for address in (
        f"unix:{tmp_path}/nobody.sock",
        f"tcp://{destination.addresses[0]}:7999",
        "tcp://10.231.255.1:7999",
    ):
        run = agent_send(source, tmp_path, "--connect-timeout=2", workload.pid, address, check=FAILED)
        assert run.outcome["event"] == "failed" and run.outcome["message"]
    assert_runs_untouched(workload, source, before)


def _serve_once(listener: socket.socket, answer: bytes) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(1 << 16)
        connection.sendall(answer)
        connection.settimeout(1)
        with contextlib.suppress(OSError):
            while connection.recv(1 << 16):
                pass


@pytest.mark.parametrize(
    "answer",
    [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\xff" * 5000, bytes(5000)],
    ids=["silence", "http", "ones", "zeros"],
)
def test_peer_that_is_no_ferry_changes_nothing(source: Host, tmp_path: Path, answer: bytes) -> None:
    workload = start(source, tmp_path)
    before = traces_of(source, workload.pid)
    path = tmp_path / "stranger.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        server = threading.Thread(target=_serve_once, args=(listener, answer))
        server.start()
        run = agent_send(source, tmp_path, "--io-timeout=3", workload.pid, f"unix:{path}")
        server.join()
    assert run.status == FAILED, str(run)
    assert_runs_untouched(workload, source, before)


def test_peer_of_another_version_is_refused(source: Host, destination: Host, tmp_path: Path) -> None:
    workload = start(source, tmp_path)
    before = traces_of(source, workload.pid)
    path = tmp_path / "future.sock"
    # A receiver from the future: it speaks version 99 only.
    program = (
        "import sys, protocol.version as v\n"
        "v.OLDEST_PROTOCOL_VERSION = v.PROTOCOL_VERSION = 99\n"
        "from agent.cli.recv import main\n"
        f"sys.exit(main(['--once', '--json', '--state-dir={tmp_path}/future', 'unix:{path}']))\n"
    )
    receiver = destination.popen([sys.executable, "-c", program])
    wait_until(lambda: destination.listens_on_unix(path) or not receiver.alive, "the receiver")
    run = agent_send(source, tmp_path, workload.pid, f"unix:{path}")
    assert run.status in (FAILED, REFUSED), str(run)
    assert "version" in str(run.outcome).lower(), str(run)
    receiver.kill()
    receiver.communicate()
    assert_runs_untouched(workload, source, before)


def test_target_that_dies_meanwhile_is_an_ordinary_failure(
    source: Host, destination: Host, tmp_path: Path
) -> None:
    workload = start(source, tmp_path)
    receiver = Receiver(destination, tmp_path)
    sender, _ = start_agent_send(source, tmp_path, *SLOW, workload.pid, receiver.address)
    wait_for_event(sender, phase="rounds")
    workload.process.kill()
    stdout, stderr = sender.communicate()
    assert sender.wait() == FAILED, stdout
    assert b"exited" in stdout and b"Traceback" not in stderr, (stdout, stderr)
    assert receiver.finish().status == FAILED
    assert destination.processes() == {}
