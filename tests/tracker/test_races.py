"""Races that a tracker with page tables and a book must survive, made to happen."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

import pytest

from agent.errors import RefusedError
from agent.tracker import registration
from agent.tracker.book import BookedTracker
from tests.tracker.target import BASE, Target
from tests.tracker.trackers import TRACKERS


@pytest.fixture
def target() -> Iterator[Target]:
    made = Target(TRACKERS["scan"])
    yield made
    made.close()


def in_next_round(target: Target, method: str, action: Callable[[BookedTracker], object]) -> None:
    """Do something right after the tracker's next call of `method`: what a race does now and then."""
    tracker = target.tracker
    assert isinstance(tracker, BookedTracker)
    original = getattr(tracker, method)

    def once(*args: object, **named: object) -> object:
        setattr(tracker, method, original)
        result = original(*args, **named)
        action(tracker)
        return result

    setattr(tracker, method, once)


def test_mapping_that_grew_over_a_shared_one_during_the_look(target: Target) -> None:
    # It stays registered, so the scan for the object's pages meets, reports and protects those of the other mapping.
    target.run("libc.mmap(B + 64 * P, 8 * P, 3, 0x31, -1, 0); ctypes.memset(B, 1, 72 * P)")
    target.tracker.arm()
    target.round()
    target.run("ctypes.memset(B + 64 * P, 2, 8 * P)")
    grow = (
        "libc.munmap(B + 64 * P, 8 * P); libc.mremap(B, 64 * P, 72 * P, 0, None); "
        "ctypes.memset(B + 64 * P, 3, 8 * P)"
    )
    in_next_round(target, "_refresh", lambda tracker: target.run(grow))
    target.round()
    target.round()
    target.check()


@pytest.mark.parametrize("name", ["scan", "log-stall", "bitmap"])
def test_private_mapping_that_replaced_a_shared_one_before_it_was_registered(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registration, "MAX_REGISTRATIONS", 1)  # there is always a last time
    target = Target(TRACKERS[name])
    target.tracker.arm()
    target.round()
    target.run("libc.mmap(B + 64 * P, 8 * P, 3, 0x31, -1, 0); ctypes.memset(B, 1, 72 * P)")
    over = "libc.mmap(B + 64 * P, 8 * P, 3, 0x32, -1, 0); ctypes.memset(B + 64 * P, 3, 8 * P)"
    in_next_round(target, "_read_maps", lambda tracker: target.run(over))
    target.round()
    target.round()
    target.check()
    target.close()


def test_mapping_refused_for_a_moment_after_it_was_looked_at(target: Target) -> None:
    target.run("ctypes.memset(B, 1, 16 * P)")
    target.tracker.arm()
    target.round()
    target.run("ctypes.memset(B, 2, 16 * P)")

    def refuse(tracker: BookedTracker) -> None:
        (entry,) = [entry for entry in tracker._maps if entry.start == BASE]
        tracker._excluded[entry] = errno.EINVAL
        tracker._relayout()

    in_next_round(target, "_pass", refuse)
    target.round()
    target.round()
    target.check()


def test_mapped_over_while_its_window_is_scanned(target: Target) -> None:
    # The scan fails half way, after it has protected what it found, and its report is lost.
    target.run("ctypes.memset(B, 1, 16 * P)")
    target.tracker.arm()
    target.round()
    target.run("ctypes.memset(B, 2, 16 * P)")
    over = "libc.mmap(B + 8 * P, 4 * P, 3, 0x32, -1, 0); ctypes.memset(B + 8 * P, 3, 4 * P)"
    in_next_round(target, "_written", lambda tracker: target.run(over))
    target.round()
    target.check()


def test_own_userfaultfd_is_refused(target: Target) -> None:
    target.run("u = libc.syscall(323, 1)")
    target.run("fcntl.ioctl(u, 0xc018aa3f, bytearray(struct.pack('QQQ', 0xaa, 0, 0)))")
    target.run("fcntl.ioctl(u, 0xc020aa00, bytearray(struct.pack('QQQQ', B, 4 * P, 1, 0)))")
    with pytest.raises(RefusedError):
        target.tracker.arm()
