"""The scan tracker under concurrent mmap, munmap, mremap, MAP_FIXED, DONTNEED, brk, mprotect, guards and shared memory.

A seeded victim changes its memory while rounds run; when it is stopped and the final round done, the replica must equal
it page by page. FERRY_SOAK=N runs N seeds instead of a few.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.tracker.create import adopt_uffd
from agent.tracker.layout import classify
from agent.tracker.scan import ScanTracker
from tests.tracker.replica import Replica

SEEDS = range(int(os.environ.get("FERRY_SOAK", "4")))
ROUNDS = 8


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + 10
    for task in Path(f"/proc/{pid}/task").iterdir():
        while ") T" not in (task / "stat").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.001)


@contextmanager
def victim(seed: int, directory: Path, nr_threads: int = 3) -> Iterator[tuple[int, int]]:
    """Yields pid and an agent-side userfaultfd."""
    program = str(Path(__file__).with_name("victim.py"))
    with subprocess.Popen(
        [sys.executable, program, str(seed), str(nr_threads), str(directory)],
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            assert child.stdout is not None
            pid, target_fd = map(int, child.stdout.readline().split())
            pidfd = os.pidfd_open(pid)
            try:
                yield pid, adopt_uffd(pidfd, target_fd)
            finally:
                os.close(pidfd)
        finally:
            child.kill()


@pytest.mark.parametrize("seed", SEEDS)
def test_replica_equals_the_stopped_victim(seed: int, tmp_path: Path) -> None:
    with victim(seed, tmp_path) as (pid, uffd):
        tracker = ScanTracker(pid, uffd)
        tracker.arm()
        replica = Replica(pid, tracker)
        for number in range(ROUNDS):
            replica.round(final=False)
            time.sleep(0.002 * (number % 4))
        stop(pid)
        dirty = replica.round(final=True)
        wrong = replica.differences(dirty)
        assert not wrong, "\n".join(wrong[:20] + [f"{len(wrong)} differences"])
        again = replica.round(final=True)
        # Markers in private file mappings were sent by content; read, they show as the file's own.
        assert not again.pages and not again.absent.subtract(classify(again.maps, ()).private_file)
        tracker.disarm()
