"""A small target that runs Python lines on demand, and a tracker with its replica."""

from __future__ import annotations

import select
import subprocess
import sys

from agent.ranges import RangeSet
from agent.tracker.base import DirtySet
from agent.tracker.softdirty import stopped
from tests.tracker.replica import Replica
from tests.tracker.trackers import Kind

PAGE = 4096
BASE = 0x100000000000
HUGE_BASE = BASE + (1 << 30)
_PROGRAM = f"""
import ctypes, fcntl, mmap, os, struct, sys, threading, time
libc = ctypes.CDLL(None)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.madvise.argtypes = libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
B, H, P = {BASE}, {HUGE_BASE}, {PAGE}
flags = int(sys.argv[1])
print(os.getpid(), libc.syscall(323, flags) if flags >= 0 else -1, flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""


class Target:
    """64 pages of anonymous memory at BASE to begin with; close() it."""

    def __init__(self, kind: Kind) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", _PROGRAM, str(kind.uffd_flags)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.pid, target_fd = map(int, self.process.stdout.readline().split())
        self.run("libc.mmap(B, 64 * P, 3, 0x32, -1, 0)")
        self.tracker = kind.open(self.pid, target_fd)
        if target_fd >= 0:
            self.run(f"os.close({target_fd})")
        self.replica = Replica(self.pid, self.tracker)

    def run(self, line: str) -> None:
        """Execute a line of Python there; returns when it is done."""
        self.begin(line)
        self.done()

    def begin(self, line: str) -> None:
        """Execute a line, but do not wait for its end: that is done()."""
        assert self.process.stdin is not None
        print(line, file=self.process.stdin, flush=True)

    def is_done(self) -> bool:
        """Whether what begin() began is over: done() then does not wait, and need not be called."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], 0)[0]:
            return False
        self.done()
        return True

    def done(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "done\n"

    def round(self, first: int = BASE, nr_pages: int = 64) -> list[int]:
        """One running round; returns the numbers of the dirty pages from `first` on."""
        dirty = self.replica.round(final=False)
        return page_numbers(dirty.pages, first, nr_pages)

    def check(self) -> DirtySet:
        """Stop it and compare it with what a destination would hold."""
        with stopped(self.pid):
            dirty = self.replica.round(final=True)
            assert self.replica.differences(dirty) == []
        return dirty

    def close(self) -> None:
        self.tracker.disarm()
        self.replica.close()
        self.process.kill()
        self.process.communicate()


def page_numbers(pages: RangeSet, first: int, nr_pages: int) -> list[int]:
    """The pages of a set within [first, first + nr_pages), counted from there."""
    inside = pages.clip(first, first + nr_pages * PAGE)
    return [page for start, end in inside for page in range((start - first) // PAGE, (end - first) // PAGE)]
