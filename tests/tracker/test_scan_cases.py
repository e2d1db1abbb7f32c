"""Single situations of the scan tracker, each with its own small target."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from agent.errors import RefusedError, TargetGone
from agent.procfs.maps import read_maps
from agent.tracker.create import adopt_uffd
from agent.tracker.scan import ScanTracker
from tests.tracker.replica import Replica
from tests.tracker.test_mutation import stop

PAGE = 4096
BASE = 0x100000000000
PROGRAM = f"""
import ctypes, os, sys
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
B, P = {BASE}, {PAGE}
print(os.getpid(), libc.syscall(323, os.O_CLOEXEC | os.O_NONBLOCK | 1), flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""


class Target:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.pid, target_fd = map(int, self.process.stdout.readline().split())
        pidfd = os.pidfd_open(self.pid)
        self.run("import mmap, fcntl, struct")
        self.run("libc.mmap(B, 64 * P, 3, 0x32, -1, 0)")
        self.tracker = ScanTracker(self.pid, adopt_uffd(pidfd, target_fd))
        self.replica = Replica(self.pid, self.tracker)
        os.close(pidfd)

    def run(self, line: str) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(line, file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "done\n"

    def check(self) -> None:
        stop(self.pid)
        dirty = self.replica.round(final=True)
        assert self.replica.differences(dirty) == []


@pytest.fixture
def target() -> Iterator[Target]:
    made = Target()
    yield made
    made.tracker.disarm()
    made.process.kill()
    made.process.communicate()


CASES = {
    "mapped again at the same place": "libc.munmap(B, 8 * P); libc.mmap(B, 8 * P, 3, 0x32, -1, 0)",
    "dropped": "libc.madvise(B, 4 * P, 4)",
    "dropped and written": "libc.madvise(B, 4 * P, 4); ctypes.memset(B + P, 3, 5)",
    "guards": "libc.madvise(B + 2 * P, 2 * P, 102)",
    "zeroed": "ctypes.memset(B, 0, 16 * P)",
    "unmapped": "libc.munmap(B + P, 5 * P)",
    "reservation": "libc.mmap(None, 1 << 36, 0, 0x4022, -1, 0)",
    "droppable": "libc.mmap(None, 4 * P, 3, 0x28, -1, 0)",
    "memfd read-only": "m = os.memfd_create('ro'); os.write(m, b'x' * 9000); "
    "r = os.open(f'/proc/self/fd/{m}', 0); libc.mmap(None, 3 * P, 1, 1, r, 0); os.close(m)",
}


@pytest.mark.parametrize("name", CASES)
def test_change_between_rounds(target: Target, name: str) -> None:
    target.run("ctypes.memset(B, 7, 16 * P)")
    target.tracker.arm()
    target.replica.round(final=False)
    target.run(CASES[name])
    target.check()
    if name == "memfd read-only":
        assert any(b"x" * 4096 in space.values() for space in target.replica.spaces.values())


def test_stores_show_after_a_move_merged_with_a_tracked_neighbour(target: Target) -> None:
    # The merge takes the registration of the neighbour and leaves its protection bits: see agent/tracker/scan.py.
    target.run("ctypes.memset(B, 7, 16 * P); away = libc.mmap(None, 8 * P, 0, 0x22, -1, 0)")
    target.tracker.arm()
    target.replica.round(final=False)
    target.run("libc.mremap(B + 8 * P, 8 * P, 8 * P, 3, away)")
    target.replica.round(final=False)
    target.run("libc.mremap(away, 8 * P, 8 * P, 3, B + 8 * P)")
    target.run("ctypes.memset(B, 8, 16 * P)")  # without a registration: writable now, and still marked as protected
    target.replica.round(final=False)
    target.run("ctypes.memset(B + P, 9, 3 * P)")
    dirty = target.replica.round(final=False)
    assert dirty.pages.clip(BASE, BASE + 16 * PAGE).pairs.tolist() == [BASE + PAGE, BASE + 4 * PAGE]
    target.check()


def test_idle_target_has_nothing_to_send(target: Target) -> None:
    target.run("ctypes.memset(B, 7, 16 * P)")
    target.tracker.arm()
    target.replica.round(final=False)
    target.run("ctypes.memset(B + 5 * P, 9, 1)")
    dirty = target.replica.round(final=False)
    assert dirty.pages.clip(BASE, BASE + 64 * PAGE).starts.tolist() == [BASE + 5 * PAGE]


def test_private_file_page_dropped_is_absent(target: Target) -> None:
    target.run("f = os.open('/tmp', os.O_TMPFILE | os.O_RDWR); os.write(f, b'x' * 4 * P)")
    target.run("a = libc.mmap(None, 4 * P, 3, 2, f, 0); ctypes.memset(a, 1, 2 * P)")
    target.tracker.arm()
    target.replica.round(final=False)
    target.run("libc.madvise(a, P, 4)")
    target.check()


def test_disarm_leaves_no_seam(target: Target) -> None:
    before = read_maps(target.pid)
    target.tracker.arm()
    target.tracker.collect(final=False)
    target.tracker.disarm()
    target.tracker.disarm()
    assert b"uw" not in open(f"/proc/{target.pid}/smaps", "rb").read().split(b"VmFlags:")[1]
    assert read_maps(target.pid).count(b"\n") <= before.count(b"\n")


def test_own_userfaultfd_is_refused(target: Target) -> None:
    target.run("u = libc.syscall(323, 1)")
    target.run("fcntl.ioctl(u, 0xc018aa3f, bytearray(struct.pack('QQQ', 0xaa, 0, 0)))")
    target.run("fcntl.ioctl(u, 0xc020aa00, bytearray(struct.pack('QQQQ', B, 4 * P, 1, 0)))")
    with pytest.raises(RefusedError):
        target.tracker.arm()


def test_target_that_exits_is_named(target: Target) -> None:
    target.tracker.arm()
    target.process.kill()
    target.process.wait()
    with pytest.raises(TargetGone):
        target.tracker.collect(final=False)
