"""One sleeper that is moved back and forth between two hosts while its agents die at chosen instants.

Every move ends in a check of the promise: exactly one copy runs, with the same descriptors, mappings and signal state,
untraced, no sleep cut short and no EINTR (but one, where agent-send dies between stopping a thread and repairing its
call; see README.md); or everything is frozen, `agent-send --resolve` settles it, and then so.
Nothing that was started for the move is left behind.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from tests.hosts import Host, InsideProcess, wait_until
from tests.migrate.crossing import (
    COMPLETED,
    FAILED,
    UNDECIDED,
    Receiver,
    Run,
    Workload,
    agent_send,
    start_program,
    state_directory,
)

_numbers = itertools.count(1)
STRIKING = [sys.executable, "-m", "tests.faults.striking"]
IO_TIMEOUT = "--io-timeout=8"


@dataclass(frozen=True)
class Strike:
    """When to kill which agent: see tests/faults/striking.py."""

    agent: str
    point: str
    delay_us: int = 0
    victim: str = "self"

    def argv(self, arguments: Sequence[str]) -> list[str]:
        return [*STRIKING, self.agent, self.point, str(self.delay_us), self.victim, *arguments]

    def __str__(self) -> str:
        return f"{self.agent} at {self.point} + {self.delay_us} us"


MOST_EINTR = 2
"""How many calls a killed agent may cut short: the one that it was about to repair, rarely that of a thread which was
between two calls when the agent looked what it slept in. Three threads of the sleeper have such calls."""


def _cut_short(errors: list[str]) -> int:
    """How many of the failed self-checks, first ones, tell of at most MOST_EINTR calls that EINTR ended too soon."""
    names: set[str] = set()
    for index, error in enumerate(errors):
        name = error.split()[0]
        if " gave EINTR " in error and name not in names and len(names) < MOST_EINTR:
            names.add(name)
        elif name not in names or not error.startswith(f"{name} took only "):
            return index
    return len(errors)


class StrikingReceiver(Receiver):
    """An agent-recv that dies; without a strike, an ordinary one."""

    def __init__(
        self, host: Host, directory: Path, *arguments: str, strike: Optional[Strike] = None
    ) -> None:
        if strike is None:
            super().__init__(host, directory, *arguments)
            return
        self.host = host
        self.address = f"unix:{directory}/strike{next(_numbers)}.sock"
        state = state_directory(host, directory)
        self.argv = strike.argv(["--json", "--once", f"--state-dir={state}", *arguments, self.address])
        self.process = host.popen(self.argv)
        wait_until(lambda: self._listens() or not self.process.alive, "agent-recv to listen")


class Arena:
    """A sleeper at home on `here`; `there` is where it is sent next."""

    def __init__(self, source: Host, destination: Host, directory: Path) -> None:
        self.here, self.there = source, destination
        self.directory = directory
        status = directory / "sleepers.status"
        self.workload: Workload = start_program(
            source,
            directory,
            [sys.executable, "-m", "tests.faults.sleepers", status],
            status=status,
        )
        self.pid = self.workload.pid
        self.looks = self._settled_looks()
        self.outcomes: dict[str, int] = {}
        self.known_errors = 0
        """Self-checks that may have failed, so far."""
        self.sent: Optional[Run] = None
        """The last agent-send."""
        self.last_total_s = 1.0
        self.last_downtime_s = 0.1

    def _settled_looks(self) -> dict[str, object]:
        # The first seconds of a Python program map this and that.
        last: list[dict[str, object]] = [{}]

        def settled() -> bool:
            self.workload.wait_for_notes(4)
            previous, last[0] = last[0], looks_of(self.here, self.pid)
            return previous == last[0]

        wait_until(settled, "the sleeper to settle")
        return last[0]

    def close(self) -> None:
        """Let nsenter, which started the sleeper, reap it: it stopped itself when its child was stopped."""
        if self.workload.process.popen.poll() is None:
            os.kill(self.workload.process.popen.pid, signal.SIGCONT)

    # -- one move --------------------------------------------------------------------------------------

    def move(self, strike: Strike, *send: str) -> str:
        """Moves the sleeper and kills an agent on the way; returns what came of it, all checked."""
        receiver = StrikingReceiver(
            self.there,
            self.directory,
            IO_TIMEOUT,
            strike=strike if strike.agent == "recv" else None,
        )
        state = state_directory(self.here, self.directory)
        arguments = ["--json", f"--state-dir={state}", IO_TIMEOUT, *send]
        arguments += [str(self.pid), receiver.address]
        if strike.agent == "send":
            argv = strike.argv(arguments)
        else:
            argv = [sys.executable, "-m", "agent.cli.send", *arguments]
        sender = self.here.popen(argv)
        sent = self.sent = finish(sender, argv)
        if sent.status not in (COMPLETED, UNDECIDED) and receiver.process.alive:
            # Killed before it connected, or before it said anything: the receiver waits for another one.
            began = any(event.get("phase") == "prepare" for event in sent.events)
            give_it_time(receiver.process, 20.0 if began else 1.0)
            receiver.process.kill(15)
        received = finish(receiver.process, receiver.argv)
        story = f"{strike}\n{sent}\n{received}"
        try:
            outcome = self.judge(strike, sent, received)
        except BaseException as err:
            raise AssertionError(f"{err}\nafter {story}") from err
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        return outcome

    def judge(self, strike: Strike, sent: Run, received: Run) -> str:
        """Find out where the process is, settle what is undecided, and check everything."""
        killed = sent if strike.agent == "send" else received
        assert killed.status in (-9, COMPLETED, FAILED, UNDECIDED), killed.status
        frozen_here, frozen_there = self.is_stopped(self.here), self.is_stopped(self.there)
        runs_here = self.exists(self.here) and not frozen_here
        runs_there = self.exists(self.there) and not frozen_there
        assert not (runs_here and runs_there), "two copies run"
        assert self.exists(self.here) or self.exists(self.there), "no copy is left"
        if sent.status == COMPLETED:
            self.last_total_s = sent.outcome["total_s"]
            self.last_downtime_s = sent.outcome["downtime_s"]
            assert runs_there and not self.exists(self.here), "completed, but it does not run there"
        if sent.status == FAILED:
            assert runs_here, "failed, but the original does not run"
        undecided = self.undecided(self.here)
        outcome = "there" if runs_there else "here"
        if frozen_here or sent.status == UNDECIDED:
            assert undecided, "frozen without a record"
            outcome = f"{self.resolve(undecided)} by resolve"
        elif undecided:
            # Recorded, and killed before COMMIT or after the original had been ended.
            assert sent.status == -9
            self.resolve(undecided)
            outcome += " (record left)"
        if killed.status == -9:
            # What it was just writing; the next agents remove it once it is old.
            left = self.temporary()
            assert len(left) <= 1, left
            for path in left:
                path.unlink()
        self.check_end(eintr=strike.agent == "send" and killed.status == -9)
        return outcome

    def resolve(self, session: str) -> str:
        """Has agent-send ask a new agent-recv on the other host; returns the decision."""
        receiver = Receiver(self.there, self.directory)
        run = agent_send(
            self.here, self.directory, f"--resolve={session}", receiver.address, check=COMPLETED
        )
        receiver.process.kill(15)
        finish(receiver.process, receiver.argv)
        assert run.outcome["event"] == "resolved", str(run)
        decision: str = run.outcome["decision"]
        assert decision in ("committed", "aborted"), str(run)
        return decision

    def check_end(self, *, eintr: bool = False) -> None:
        """One copy, running and unchanged; nothing else; the next move starts where it is.

        ``eintr``: MOST_EINTR threads may have seen one call return EINTR.
        """
        wait_until(
            lambda: self.exists(self.here) != self.exists(self.there), "one copy", timeout_s=5
        )
        if self.exists(self.there):
            self.close()
            self.here, self.there = self.there, self.here
        self.workload.host = self.here
        before = self.workload.last()
        self.workload.wait_for_notes(4, self.here)
        if eintr:
            self.known_errors += _cut_short(self.workload.errors()[self.known_errors :])
        self.workload.assert_healthy(self.here, count=1, known=self.known_errors)
        wait_until(
            lambda: all(now > then for then, now in zip(progress(before), progress(self.workload.last()))),
            f"every thread to get on: {before} -> {self.workload.last()}",
            timeout_s=5,
        )
        wait_until(
            lambda: self.differences() == [],
            f"the same process again; different: {self.differences()}",
            timeout_s=5,
        )
        for host, expected in ((self.here, {self.pid}), (self.there, set())):
            wait_until(
                lambda: set(host.processes()) == expected,  # noqa: B023
                f"nothing to be left on {host.name}: {host.processes()}",
                timeout_s=5,
            )
        assert not self.undecided(self.here) and not self.undecided(self.there)
        assert not self.temporary(), f"left: {self.temporary()}"

    def temporary(self) -> list[Path]:
        return list(self.directory.glob("state-*/.*"))

    def differences(self) -> list[str]:
        """What is not as it was."""
        now = looks_of(self.here, self.pid)
        return [
            f"{name}: {self.looks[name]} -> {now[name]}" for name in now if now[name] != self.looks[name]
        ]

    # -- looking ---------------------------------------------------------------------------------------

    def exists(self, host: Host) -> bool:
        return bool(host.outer_pid(self.pid))

    def is_stopped(self, host: Host) -> bool:
        try:
            return "\nState:\tT" in (host.proc(self.pid) / "status").read_text()
        except OSError:
            return False

    def undecided(self, host: Host) -> str:
        found = [
            name.split(".")[0]
            for name in os.listdir(state_directory(host, self.directory))
            if name.endswith(".undecided.json")
        ]
        assert len(found) <= 1, found
        return found[0] if found else ""


def progress(note: dict[str, Any]) -> list[int]:
    """Counters of a note that grow for as long as their threads live."""
    return [note["turns"], note["ticks"], *note["sleeps"]]


def looks_of(host: Host, pid: int) -> dict[str, object]:
    """Everything about a process that an agent, dead or alive, must leave as it was, on whichever host it is."""
    place = host.proc(pid)
    wanted = ("Name", "TracerPid", "SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt", "Threads", "Seccomp")
    threads = {}
    for task in (place / "task").iterdir():
        lines = (task / "status").read_text().splitlines()
        inner = next(line.split()[-1] for line in lines if line.startswith("NSpid"))
        threads[inner] = [line for line in lines if line.split(":")[0] in wanted]
    return {
        "threads": threads,
        "fds": descriptors_of(place),
        "maps": mappings_of(place),
        "exe": os.readlink(place / "exe"),
    }


def descriptors_of(place: Path) -> dict[int, tuple[str, str]]:
    """Number -> what is open there, and its flags; pipes and sockets are numbered as they first occur."""
    numbers: dict[str, int] = {}
    found = {}
    for fd in sorted(int(name) for name in os.listdir(place / "fd")):
        what = os.readlink(place / "fd" / str(fd))
        kind, _, inode = what.partition(":[")
        if inode:
            what = f"{kind} {numbers.setdefault(what, len(numbers))}"
        info = (place / "fdinfo" / str(fd)).read_text().splitlines()
        found[fd] = (what, next(line for line in info if line.startswith("flags")))
    return found


def mappings_of(place: Path) -> list[str]:
    """Lines of maps; the kernel need not merge neighbours of a restored process that it had merged before, or else."""
    merged: list[list[Any]] = []
    for line in (place / "maps").read_text().splitlines():
        span, perms, offset_text, device, inode, *path = line.split(maxsplit=5)
        start, end = (int(part, 16) for part in span.split("-"))
        offset = int(offset_text, 16)
        rest = (perms, device, inode, path)
        if merged:
            last = merged[-1]
            follows = inode == "0" or last[2] + (start - last[0]) == offset
            if last[1] == start and last[3] == rest and follows:
                last[1] = end
                continue
        merged.append([start, end, offset, rest])
    return [f"{start:x}-{end:x} {offset:x} {rest}" for start, end, offset, rest in merged]


def give_it_time(process: InsideProcess, seconds: float) -> None:
    try:
        wait_until(lambda: not process.alive, "its end", timeout_s=seconds)
    except TimeoutError:
        pass


def finish(process: InsideProcess, argv: list[str]) -> Run:
    """Waits for an agent's end; a killed one may leave half a line of JSON."""
    stdout, stderr = (stream.decode(errors="replace") for stream in process.communicate(40))
    assert "Traceback" not in stderr, stderr
    events = []
    for line in stdout.splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            break
    status = process.wait()
    # nsenter dies as its command did.
    return Run(argv, status if status < 128 else 128 - status, stdout, stderr, events)
