"""Run one seed against one tracker: a victim changes its memory while rounds run, and nothing may be amiss afterwards.

Amiss is: the replica differs from the stopped victim; an idle victim is not idle to the tracker; a thread of the victim
does not get on; a count is wrong; a system call of the victim answered other than it does untracked (the same seed is
run again without a tracker and the records are compared).
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from agent.tracker.base import Tracker
from agent.tracker.layout import classify
from agent.tracker.softdirty import stopped
from tests.hosts import REPOSITORY
from tests.tracker.mutations import ACTIONS, PAGE
from tests.tracker.replica import Replica
from tests.tracker.trackers import NO_UFFD, Kind
from tests.tracker.victim import (
    COUNTER_PAGES,
    COUNTERS,
    COUNTING_THREADS,
    RECORD,
    TALLIES,
    TIMES,
)

NR_THREADS = 3
ROUNDS = 7
"""Running rounds at least; more until every thread has done STEPS."""
STEPS = 120
MOST_SEAMS = 3
"""How many calls of mremap(2) may meet a seam for good, of some hundreds: a limitation of registering, see README."""
DEADLINE_S = 60
"""No wait takes longer than a fraction of a second, unless somebody waits for ever."""


class Victim:
    """A running victim.py."""

    def __init__(self, process: subprocess.Popen[str], directory: Path, pid: int, fd: int) -> None:
        self.process = process
        self.directory = directory
        self.pid = pid
        self.target_fd = fd

    def go(self) -> None:
        """Let it begin."""
        assert self.process.stdin is not None
        print("go", file=self.process.stdin, flush=True)

    def steps(self) -> list[int]:
        """How many steps each thread has recorded."""
        paths = [self.directory / f"log-{index}" for index in range(NR_THREADS)]
        return [path.stat().st_size // RECORD.size if path.exists() else 0 for path in paths]

    def records(self) -> list[list[tuple[int, int]]]:
        """(action, result) of each step, by thread."""
        return [_read_records(self.directory / f"log-{index}") for index in range(NR_THREADS)]


@contextmanager
def victim(
    seed: int, directory: Path, mode: str, kind: Kind, steps: Sequence[int]
) -> Iterator[Victim]:
    """Start one; it waits for go(). `mode`: tracked or untracked, by `kind`."""
    uffd_flags = kind.uffd_flags if mode == "tracked" else NO_UFFD
    directory = directory / mode
    directory.mkdir()
    program = [sys.executable, "-m", "tests.tracker.victim"]
    with subprocess.Popen(
        [*program, str(seed), str(directory), mode, str(uffd_flags), ','.join(kind.unfit), *map(str, steps)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    ) as process:
        try:
            assert process.stdout is not None
            pid, target_fd = map(int, process.stdout.readline().split())
            yield Victim(process, directory, pid, target_fd)
        finally:
            process.kill()


def run_seed(kind: Kind, seed: int, directory: Path, *, untracked: bool = True) -> list[str]:
    """Run one seed; returns what was amiss. `untracked`: run it untracked as well and compare."""
    with victim(seed, directory, "tracked", kind, [0] * NR_THREADS) as tracked:
        tracker = kind.open(tracked.pid, tracked.target_fd)
        try:
            tracked.go()
            wrong = _track(tracked, tracker, exact=kind.exact)
        finally:
            tracker.disarm()
    wrong += _seams(tracked.directory, most=MOST_SEAMS if kind.uffd_for else 0)
    return wrong + (_compare_records(seed, directory, tracked, kind) if untracked else [])


def _track(tracked: Victim, tracker: Tracker, *, exact: bool) -> list[str]:
    tracker.arm()
    replica = Replica(tracked.pid, tracker)
    try:
        done = 0
        while done < ROUNDS or min(tracked.steps()) < STEPS:
            assert tracked.process.poll() is None, "the victim died"
            replica.round(final=False)
            time.sleep(0.002 * (done % 4))  # not to wait for anything: rounds at different distances
            done += 1
        before, deadline = tracked.steps(), time.monotonic() + DEADLINE_S
        while not all(a < b for a, b in zip(before, tracked.steps())):
            assert tracked.process.poll() is None, "the victim died"
            assert time.monotonic() < deadline, f"a thread does not get on: {before}, {tracked.steps()}"
            replica.round(final=False)  # a log may stall the victim until then
        with stopped(tracked.pid):
            dirty = replica.round(final=True)
            wrong = replica.differences(dirty) + _wrong_counts(tracked.pid)
            if exact:
                replica.round(final=False)  # a final round need not protect what it reports
                again = replica.round(final=True)
                # Markers in private file mappings are sent by content; read by us, they show as the file's own.
                idle = classify(again.maps, ()).private_file
                if again.pages or again.absent.subtract(idle):
                    wrong.append(f"a second final round found pages {again.pages} absent {again.absent}")
        return wrong
    finally:
        replica.close()


def _seams(directory: Path, *, most: int) -> list[str]:
    seams = (directory / "seams").read_text().splitlines()
    stay = [seam for seam in seams if seam.startswith("stays")]
    return [f"mremap met a seam that {seam}" for seam in stay] if len(stay) > most else []


def _wrong_counts(pid: int) -> list[str]:
    # Each word was counted up as often as threads say, or as they are about to say.
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as mem:
        tallies = struct.unpack(f"{COUNTING_THREADS}Q", os.pread(mem.fileno(), COUNTING_THREADS * 8, TALLIES))
        counters = [
            struct.unpack("Q", os.pread(mem.fileno(), 8, COUNTERS + page * PAGE))[0]
            for page in range(2 * COUNTER_PAGES)
        ]
    least, most = sum(tallies), sum(tallies) + COUNTING_THREADS * TIMES
    return [
        f"counter {page} is {value}, not between {least} and {most}"
        for page, value in enumerate(counters)
        if not least <= value <= most
    ]


def _read_records(path: Path) -> list[tuple[int, int]]:
    data = path.read_bytes() if path.exists() else b""
    return list(RECORD.iter_unpack(data[: len(data) // RECORD.size * RECORD.size]))


def _compare_records(seed: int, directory: Path, tracked: Victim, kind: Kind) -> list[str]:
    steps = tracked.steps()
    with victim(seed, directory, "untracked", kind, steps) as untracked:
        untracked.go()
        assert untracked.process.stdout is not None
        assert untracked.process.stdout.readline() == "done\n", "the untracked victim died"
    wrong: list[str] = []
    names = list(ACTIONS)
    for index, (there, here) in enumerate(zip(tracked.records(), untracked.records())):
        assert len(there) == len(here), "the untracked victim did fewer steps"
        for step, (got, expected) in enumerate(zip(there, here)):
            if got != expected:  # from here on all may differ
                wrong.append(
                    f"thread {index} step {step}: {names[got[0]]} answered {got[1]} tracked, "
                    f"{expected[1]} untracked"
                )
                break
    return wrong
