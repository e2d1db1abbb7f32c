"""Situations of the scan tracker alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from agent.errors import RefusedError
from tests.tracker.target import Target
from tests.tracker.trackers import TRACKERS


@pytest.fixture
def target() -> Iterator[Target]:
    made = Target(TRACKERS["scan"])
    yield made
    made.close()


def test_stores_show_after_a_move_merged_with_a_tracked_neighbour(target: Target) -> None:
    # The merge takes the registration of the neighbour and leaves its protection bits: see agent/tracker/scan.py.
    target.run("ctypes.memset(B, 7, 16 * P); away = libc.mmap(None, 8 * P, 0, 0x22, -1, 0)")
    target.tracker.arm()
    target.round()
    target.run("libc.mremap(B + 8 * P, 8 * P, 8 * P, 3, away)")
    target.round()
    target.run("libc.mremap(away, 8 * P, 8 * P, 3, B + 8 * P)")
    target.run("ctypes.memset(B, 8, 16 * P)")  # without a registration: writable now, and still marked as protected
    target.round()
    target.run("ctypes.memset(B + P, 9, 3 * P)")
    assert target.round() == [1, 2, 3]
    target.check()


def test_own_userfaultfd_is_refused(target: Target) -> None:
    target.run("u = libc.syscall(323, 1)")
    target.run("fcntl.ioctl(u, 0xc018aa3f, bytearray(struct.pack('QQQ', 0xaa, 0, 0)))")
    target.run("fcntl.ioctl(u, 0xc020aa00, bytearray(struct.pack('QQQQ', B, 4 * P, 1, 0)))")
    with pytest.raises(RefusedError):
        target.tracker.arm()
