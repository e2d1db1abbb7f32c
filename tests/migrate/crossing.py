"""Helpers of the migration tests: start a workload, move it with the real commands, look at it afterwards.

agent-send and agent-recv run as subprocesses inside their hosts, as a user runs them; nothing of Ferry is
imported here. Everything a test needs to know about a workload comes from its status file (tests/workloads/status.py).
"""

from __future__ import annotations

import itertools
import json
import os
import re
import select
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

from tests.hosts import REPOSITORY, WAIT_S, Host, InsideProcess, wait_until

AGENT_SEND = [sys.executable, "-m", "agent.cli.send"]
AGENT_RECV = [sys.executable, "-m", "agent.cli.recv"]
SETTLE_S = 2.0
"""How long a pending signal may take to be delivered."""
COMPLETED, FAILED, USAGE, UNDECIDED, REFUSED = range(5)
_sockets = itertools.count(1)
_pids = itertools.count(1)


class Workload:
    """A workload inside a host and its status file."""

    def __init__(self, process: InsideProcess, host: Host, status: Path, output: Path) -> None:
        self.process = process
        self.pid = process.inner
        self.host = host
        self.status = status
        self.output = output

    def notes(self) -> list[dict[str, Any]]:
        """All complete lines written so far."""
        try:
            text = self.status.read_text()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.split("\n")[:-1]]

    def last(self) -> dict[str, Any]:
        """The newest note; {} before the first."""
        notes = self.notes()
        return notes[-1] if notes else {}

    def errors(self) -> list[str]:
        return [note["error"] for note in self.notes() if "error" in note]

    def wait_for_notes(self, count: int = 5, host: Optional[Host] = None) -> dict[str, Any]:
        """Waits for `count` more notes, written on `host` when given; returns the newest."""
        before = self.last().get("sequence", 0)

        def reached() -> bool:
            note = self.last()
            return note.get("sequence", 0) >= before + count and (
                host is None or note["host"] == host.name
            )

        try:
            wait_until(reached, f"{count} notes in {self.status} after {before}")
        except TimeoutError as err:
            raise AssertionError(f"{err}; last note {self.last()}; it printed: {self.printed()}") from err
        return self.last()

    def printed(self) -> str:
        return self.output.read_text(errors="replace")[-3000:] if self.output.exists() else ""

    def assert_healthy(self, host: Host, *, count: int = 10, known: int = 0) -> dict[str, Any]:
        """It goes on on `host`, under its pid, and no self-check ever failed, but for the first `known` ones."""
        note = self.wait_for_notes(count, host)
        assert note.get("pid", self.pid) == self.pid
        assert host.outer_pid(self.pid), f"no process {self.pid} on {host.name}"
        errors = self.errors()[known:]
        assert not errors, f"{len(errors)} failed self-checks: {errors[:3]} {self.printed()}"
        return note


def start_workload(
    host: Host,
    directory: Path,
    module: str,
    *arguments: Union[str, float, Path],
    status: Optional[Path] = None,
    wait: bool = True,
) -> Workload:
    """Runs `python -m tests.workloads.MODULE`; "STATUS" among the arguments is replaced by the status file."""
    status = status or directory / f"{module}.status"
    words = [str(status) if word == "STATUS" else str(word) for word in arguments]
    return start_program(
        host,
        directory,
        [sys.executable, "-m", f"tests.workloads.{module}", *words],
        status=status,
        wait=wait,
    )


def start_program(
    host: Host, directory: Path, argv: Sequence[Union[str, Path]], *, status: Path, wait: bool = True
) -> Workload:
    """Runs any program as a service; its pid is one that is free on every other host."""
    output = directory / (status.name + ".out")
    last_pid = 3000 + 200 * next(_pids) if host.name == "source" else None
    process = host.start_detached(argv, output, last_pid=last_pid)
    workload = Workload(process, host, status, output)
    if wait:
        wait_until(lambda: workload.last() or not process.alive, f"{argv} to start")
        assert process.alive, workload.printed()
        workload.wait_for_notes(2)
    return workload


@dataclass
class Run:
    """One finished agent-send or agent-recv."""

    argv: list[str]
    status: int
    stdout: str
    stderr: str
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def outcome(self) -> dict[str, Any]:
        """The last event: "completed" or "failed"."""
        assert self.events, f"no events from {self}"
        return self.events[-1]

    def __str__(self) -> str:
        return f"{' '.join(self.argv[2:])}: status {self.status}\n{self.stdout[-3000:]}\n{self.stderr[-3000:]}"


def _finish(process: InsideProcess, argv: list[str], timeout_s: float = 60.0) -> Run:
    stdout, stderr = (stream.decode(errors="replace") for stream in process.communicate(timeout_s))
    assert "Traceback" not in stderr, stderr
    events = []
    if "--json" in argv:
        events = [json.loads(line) for line in stdout.splitlines()]
    return Run(argv, process.wait(), stdout, stderr, events)


def state_directory(host: Host, directory: Path) -> Path:
    """Where the agents of a host record sessions: two hosts do not share it."""
    path = directory / f"state-{host.name}"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def agent_send(
    host: Host, directory: Path, *arguments: Union[str, int], check: Optional[int] = None
) -> Run:
    """Runs agent-send --json to its end; `check` is the exit status that it must have."""
    process, argv = start_agent_send(host, directory, *arguments)
    run = _finish(process, argv)
    assert check is None or run.status == check, str(run)
    return run


def start_agent_send(
    host: Host, directory: Path, *arguments: Union[str, int], launcher: Sequence[str] = ()
) -> tuple[InsideProcess, list[str]]:
    state = state_directory(host, directory)
    argv = [*launcher, *AGENT_SEND, "--json", f"--state-dir={state}", *map(str, arguments)]
    return host.popen(argv), argv


def wait_for_event(process: InsideProcess, **fields: str) -> None:
    """Reads what an agent with --json writes up to the first event that has all `fields`; the rest is left unread."""
    stream = process.popen.stdout
    assert stream is not None
    line, seen = b"", b""
    deadline = time.monotonic() + WAIT_S
    while True:
        remaining = max(0.0, deadline - time.monotonic())
        assert select.select([stream], [], [], remaining)[0], f"no event with {fields} after {seen!r}"
        byte = os.read(stream.fileno(), 1)
        assert byte, f"it ended without an event with {fields}: {seen!r}"
        line += byte
        if byte == b"\n":
            if fields.items() <= json.loads(line).items():
                return
            seen, line = seen + line, b""


class Receiver:
    """A listening agent-recv on a host; ends with the host."""

    def __init__(
        self,
        host: Host,
        directory: Path,
        *arguments: str,
        address: str = "",
        launcher: Sequence[str] = (),
    ) -> None:
        self.host = host
        self.address = address or f"unix:{directory}/ferry{next(_sockets)}.sock"
        state = state_directory(host, directory)
        self.argv = [*launcher, *AGENT_RECV, "--json", "--once", f"--state-dir={state}", *arguments, self.address]
        self.process = host.popen(self.argv)
        if not self.address.startswith("file:"):
            try:
                wait_until(lambda: self._listens() or not self.process.alive, "agent-recv to listen")
            except TimeoutError as err:
                self.process.kill()
                raise AssertionError(str(self.finish())) from err
            assert self.process.alive, str(self.finish())

    def _listens(self) -> bool:
        kind, _, rest = self.address.partition(":")
        if kind == "unix":
            return self.host.listens_on_unix(Path(rest))
        return self.host.listens_on_tcp(int(rest.rpartition(":")[2]))

    def finish(self, timeout_s: float = 60.0) -> Run:
        """Waits for its end."""
        return _finish(self.process, self.argv, timeout_s)


@dataclass
class Crossing:
    """Both sides of a migration."""

    send: Run
    recv: Run

    @property
    def completed(self) -> dict[str, Any]:
        return self.send.outcome


def migrate(
    workload: Workload,
    destination: Host,
    directory: Path,
    *,
    send: Sequence[str] = (),
    recv: Sequence[str] = (),
    address: str = "",
) -> Crossing:
    """Moves a workload and checks what every migration must leave: both statuses, the report, one copy."""
    receiver = Receiver(destination, directory, *recv, address=address)
    source = workload.host
    sent = agent_send(source, directory, *send, workload.pid, receiver.address)
    received = receiver.finish() if sent.status == COMPLETED else _after_failure(receiver)
    crossing = Crossing(sent, received)
    assert sent.status == COMPLETED, f"{sent}\n{received}"
    assert received.status == COMPLETED, f"{sent}\n{received}"
    report = crossing.completed
    assert report["event"] == "completed"
    assert report["pid"] == workload.pid
    assert re.fullmatch(r"[0-9a-f]{32}", report["session"])
    assert 0 < report["downtime_s"] < report["total_s"] < 100
    assert report["rounds"] and report["bytes_total"] > 0 and report["pages_total"] > 0
    assert not source.outer_pid(workload.pid), "the original still runs"
    assert destination.outer_pid(workload.pid), "there is no copy on the destination"
    workload.host = destination
    return crossing


def _after_failure(receiver: Receiver) -> Run:
    try:
        return receiver.finish(timeout_s=10)
    except Exception:
        receiver.process.kill()
        return receiver.finish()


def traces_of(host: Host, pid: int) -> dict[str, object]:
    """What a failed or refused migration must not change about a process."""
    return {
        "status": _settled_status(host.proc(pid) / "status"),
        "fds": sorted(os.listdir(host.proc(pid) / "fd")),
        "maps": (host.proc(pid) / "maps").read_bytes(),
        "exe": os.readlink(host.proc(pid) / "exe"),
    }


def _settled_status(status: Path) -> list[str]:
    # A timer's signal is pending for a moment; one that stays pending is the process's, or was left there.
    kept = ("TracerPid", "SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt", "Threads", "Seccomp")
    deadline = time.monotonic() + SETTLE_S
    while True:
        lines = [line for line in status.read_text().splitlines() if line.startswith(kept)]
        pending = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd", "ShdPnd"))]
        if not any(pending) or time.monotonic() > deadline:
            return lines
        time.sleep(0.001)


__all__ = [
    "AGENT_RECV",
    "AGENT_SEND",
    "COMPLETED",
    "FAILED",
    "REFUSED",
    "REPOSITORY",
    "UNDECIDED",
    "USAGE",
    "Crossing",
    "Receiver",
    "Run",
    "Workload",
    "agent_send",
    "migrate",
    "start_agent_send",
    "start_program",
    "start_workload",
    "state_directory",
    "traces_of",
    "wait_for_event",
]
