"""Single situations that every tracker must get right; each gets a small target of its own, and asserts."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable

import pytest

from agent.errors import TargetGone
from agent.procfs.maps import read_maps
from agent.tracker.log import LogTracker
from tests.tracker.target import BASE, HUGE_BASE, PAGE, Target

SITUATIONS: dict[str, Callable[[Target], None]] = {}


def situation(function: Callable[[Target], None]) -> Callable[[Target], None]:
    """Adds one."""
    SITUATIONS[function.__name__.replace("_", " ")] = function
    return function


CHANGES = {
    "mapped again at the same place": "libc.munmap(B, 8 * P); libc.mmap(B, 8 * P, 3, 0x32, -1, 0)",
    "mapped over": "libc.mmap(B, 8 * P, 3, 0x32, -1, 0); ctypes.memset(B + P, 3, P)",
    "dropped": "libc.madvise(B, 4 * P, 4)",
    "dropped and read": "libc.madvise(B, 4 * P, 4); ctypes.string_at(B + P, 3 * P)",
    "dropped and written": "libc.madvise(B, 4 * P, 4); ctypes.memset(B + P, 3, 5)",
    "guards": "libc.madvise(B + 2 * P, 2 * P, 102)",
    "zeroed": "ctypes.memset(B, 0, 16 * P)",
    "unmapped": "libc.munmap(B + P, 5 * P)",
    "moved": "libc.mremap(B + P, 5 * P, 5 * P, 3, B + 80 * P)",
    "moved, and the source kept": "libc.mremap(B + P, 5 * P, 5 * P, 7, B + 80 * P)",
    "moved over": "libc.mremap(B + P, 5 * P, 5 * P, 3, B + 9 * P); ctypes.memset(B + 10 * P, 3, 5)",
    "grown": "libc.mremap(B, 64 * P, 80 * P, 0, 0); ctypes.memset(B + 70 * P, 3, P)",
    "shrunk": "libc.mremap(B, 64 * P, 8 * P, 0, 0)",
    "exchanged": "libc.mremap(B, P, P, 3, B + 80 * P); libc.mremap(B + P, P, P, 3, B); "
    "libc.mremap(B + 80 * P, P, P, 3, B + P)",
    "unreadable": "ctypes.memset(B, 3, P); libc.mprotect(B, 4 * P, 0)",
    "read-only": "ctypes.memset(B, 3, P); libc.mprotect(B, 4 * P, 1)",
    "reservation": "libc.mmap(None, 1 << 36, 0, 0x4022, -1, 0)",
    "droppable": "libc.mmap(None, 4 * P, 3, 0x28, -1, 0)",
    "written to by a call": "os.readv(os.open('/dev/zero', 0), [(ctypes.c_char * (3 * P)).from_address(B + P)])",
    "forked, and written to": "c = os.fork() or (time.sleep(0.05), os._exit(0)); ctypes.memset(B, 9, 3 * P)",
    "forked, and the child wrote": "c = os.fork() or (ctypes.memset(B, 9, 3 * P), os._exit(0)); os.waitpid(c, 0)",
    "memfd read-only": "m = os.memfd_create('ro'); os.write(m, b'x' * 9000); "
    "r = os.open(f'/proc/self/fd/{m}', 0); libc.mmap(None, 3 * P, 1, 1, r, 0); os.close(m)",
}


def change_between_rounds(target: Target, name: str) -> None:
    # Every other page is not what it looks like: pages of one content would hide a move by a page.
    target.run("for i in range(16): ctypes.memset(B + i * P, i + 1, P)")
    target.tracker.arm()
    target.round()
    target.run(CHANGES[name])
    dirty = target.check()
    if not name.startswith(("guards", "droppable")):
        assert not dirty.stats.pages_unlogged, "a change without a record"
    if name == "memfd read-only":
        assert any(b"x" * 4096 in space.values() for space in target.replica.spaces.values())


for _name in CHANGES:
    SITUATIONS[f"change: {_name}"] = functools.partial(change_between_rounds, name=_name)

MEMORY = {
    "anonymous": "a = libc.mmap(None, 8 * P, 3, 0x22, -1, 0)",
    "shared anonymous": "a = libc.mmap(None, 8 * P, 3, 0x21, -1, 0)",
    "memfd": "m = os.memfd_create('m'); os.ftruncate(m, 8 * P); a = libc.mmap(None, 8 * P, 3, 1, m, 0)",
    "memfd, private": "m = os.memfd_create('m'); os.write(m, b'x' * 8 * P); a = libc.mmap(None, 8 * P, 3, 2, m, 0)",
    "file, private": "f = os.open('/tmp', os.O_TMPFILE | os.O_RDWR); os.write(f, b'x' * 8 * P); "
    "a = libc.mmap(None, 8 * P, 3, 2, f, 0)",
    "grows down": "a = libc.mmap(None, 8 * P, 3, 0x122, -1, 0)",
    "locked": "a = libc.mmap(None, 8 * P, 3, 0x2022, -1, 0)",
    "huge": "a = H; libc.mmap(H, 1 << 21, 3, 0x32, -1, 0); libc.madvise(H, 1 << 21, 14)",
    "heap": "libc.sbrk.restype = ctypes.c_void_p; a = libc.sbrk(9 * P); a += -a % P",
}


def store_is_noticed(target: Target, name: str) -> None:
    target.run(MEMORY[name])
    target.run("ctypes.memset(a, 1, 3 * P)")
    target.tracker.arm()
    target.round()
    target.run("ctypes.memset(a + P, 2, 3 * P)")  # two pages that were there, and one that was not
    target.round()
    target.run("ctypes.memset(a + 2 * P, 3, 1)")
    target.check()


for _name in MEMORY:
    SITUATIONS[f"store: {_name}"] = functools.partial(store_is_noticed, name=_name)


@situation
def stores_show_after_a_move_merged_with_a_tracked_neighbour(target: Target) -> None:
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
    assert {1, 2, 3} <= set(target.round())
    target.check()


@situation
def what_is_mapped_over_is_reported_by_the_next_round(target: Target) -> None:
    target.run("ctypes.memset(B, 7, 16 * P)")
    target.tracker.arm()
    target.round()
    target.run(CHANGES["mapped over"])
    assert 1 in target.round()
    target.check()


@situation
def changed_while_it_was_delivered_and_back(target: Target) -> None:
    # What counts is what was delivered, not what was there when the tracker looked.
    target.run("ctypes.memset(B, 7, 16 * P)")
    target.tracker.arm()
    dirty = target.tracker.collect(final=False)
    target.run("ctypes.memset(B + 3 * P, 8, P)")
    target.replica.take_round(dirty, final=False)
    target.run("ctypes.memset(B + 3 * P, 7, P)")
    target.check()


@situation
def object_punched_while_it_was_delivered_and_back(target: Target) -> None:
    target.run("m = os.memfd_create('m'); os.write(m, b'x' * 8 * P); a = libc.mmap(None, 8 * P, 3, 1, m, 0)")
    target.tracker.arm()
    target.round()
    target.run("ctypes.memset(a, 2, P)")
    dirty = target.tracker.collect(final=False)
    target.run("libc.madvise(a + 2 * P, P, 9)")
    target.replica.take_round(dirty, final=False)
    target.run("os.pwrite(m, b'x' * P, 2 * P)")
    target.check()


@situation
def dropped_and_later_written_as_it_was(target: Target) -> None:
    target.run("ctypes.memset(B, 7, 16 * P)")
    target.tracker.arm()
    target.round()
    target.run("libc.madvise(B, 4 * P, 4)")
    target.round()
    target.run("ctypes.memset(B, 7, 4 * P)")
    target.check()


@situation
def object_loses_a_page(target: Target) -> None:
    target.run("m = os.memfd_create('m'); os.write(m, b'x' * 8 * P); a = libc.mmap(None, 8 * P, 3, 1, m, 0)")
    target.tracker.arm()
    target.round()
    target.run("libc.madvise(a + 2 * P, P, 9)")
    target.check()


@situation
def object_written_by_descriptor(target: Target) -> None:
    target.run("m = os.memfd_create('m'); os.write(m, b'x' * 8 * P); a = libc.mmap(None, 8 * P, 3, 1, m, 0)")
    target.tracker.arm()
    target.round()
    target.run("os.pwrite(m, b'y', 3 * P); ctypes.memset(a, 1, 1)")
    target.check()


@situation
def object_written_through_a_mapping_that_came_and_went(target: Target) -> None:
    target.run("a = libc.mmap(None, 8 * P, 3, 0x21, -1, 0); ctypes.memset(a, 1, 8 * P)")
    target.tracker.arm()
    target.round()
    target.run("b = libc.mremap(a, 0, 8 * P, 1, None); ctypes.memset(b + P, 2, P); libc.munmap(b, 8 * P)")
    target.check()


@situation
def nothing_changed_is_nothing_to_send(target: Target) -> None:
    target.run("ctypes.memset(B, 7, 16 * P)")
    target.tracker.arm()
    target.round()
    target.run("ctypes.memset(B + 5 * P, 9, 1)")
    assert target.round() == [5]
    assert target.round() == []


@situation
def what_could_not_be_delivered_comes_again(target: Target) -> None:
    target.run("ctypes.memset(B, 7, 16 * P)")
    target.tracker.arm()
    dirty = target.tracker.collect(final=False)
    lost = dirty.pages.clip(BASE + 3 * PAGE, BASE + 5 * PAGE)
    target.replica.sender.send_process_pages(
        1, target.pid, dirty.pages.subtract(lost), on_read=target.replica.on_read(None)
    )
    target.tracker.forget(lost)
    assert target.round() == [3, 4]
    target.check()


@situation
def private_file_page_dropped_is_absent(target: Target) -> None:
    target.run("f = os.open('/tmp', os.O_TMPFILE | os.O_RDWR); os.write(f, b'x' * 4 * P)")
    target.run("a = libc.mmap(None, 4 * P, 3, 2, f, 0); ctypes.memset(a, 1, 2 * P)")
    target.tracker.arm()
    target.round()
    target.run("libc.madvise(a, P, 4)")
    target.check()


@situation
def guards_over_pages_of_a_private_file(target: Target) -> None:
    # See tests/kernel/test_pagemap_semantics.py: the caller may have to wait for a round.
    target.run("f = os.open('/tmp', os.O_TMPFILE | os.O_RDWR); os.write(f, b'x' * 8 * P)")
    target.run("a = libc.mmap(None, 8 * P, 3, 2, f, 0); ctypes.memset(a, 1, 2 * P); ctypes.string_at(a, 6 * P)")
    target.tracker.arm()
    target.round()
    target.begin("libc.madvise(a + P, 3 * P, 102)")
    while not target.is_done():
        target.round()
    target.check()


@situation
def guards_of_a_private_file(target: Target) -> None:
    target.run("f = os.open('/tmp', os.O_TMPFILE | os.O_RDWR); os.write(f, b'x' * 4 * P)")
    target.run("a = libc.mmap(None, 4 * P, 3, 2, f, 0); libc.madvise(a + P, P, 102)")
    target.tracker.arm()
    target.round()
    assert target.check().guards.nr_pages >= 1


@situation
def half_of_a_huge_page_dropped(target: Target) -> None:
    target.run("libc.mmap(H, 1 << 22, 3, 0x32, -1, 0); libc.madvise(H, 1 << 22, 14); ctypes.memset(H, 1, 1 << 22)")
    target.tracker.arm()
    assert target.round(HUGE_BASE, 1024) == list(range(1024))
    target.run("libc.madvise(H + (1 << 20), 1 << 20, 4); ctypes.memset(H + (1 << 21), 2, 1)")
    assert 512 in target.round(HUGE_BASE, 1024)
    target.check()


@situation
def write_into_a_huge_page_is_not_reported_as_all_of_it(target: Target) -> None:
    target.run("libc.mmap(H, 1 << 21, 3, 0x32, -1, 0); libc.madvise(H, 1 << 21, 14); ctypes.memset(H, 1, 1 << 21)")
    target.tracker.arm()
    target.round()
    target.run("ctypes.memset(H + 77 * P, 2, 1)")
    assert target.round(HUGE_BASE, 512) == [77]
    target.check()


@situation
def disarm_leaves_no_trace(target: Target) -> None:
    before = read_maps(target.pid)
    target.tracker.arm()
    target.tracker.collect(final=False)
    target.tracker.disarm()
    target.tracker.disarm()
    flags = [line.split() for line in open(f"/proc/{target.pid}/smaps") if line.startswith("VmFlags:")]
    assert flags and not [line for line in flags if "uw" in line]
    assert read_maps(target.pid).count(b"\n") <= before.count(b"\n")


@situation
def empty_reservation_costs_no_page_tables(target: Target) -> None:
    target.run("libc.mmap(None, 1 << 36, 3, 0x4022, -1, 0)")
    before = page_table_kib(target.pid)
    target.tracker.arm()
    target.round()
    target.round()
    assert page_table_kib(target.pid) < before + 1000


def page_table_kib(pid: int) -> int:
    with open(f"/proc/{pid}/status") as status:
        (line,) = [line for line in status if line.startswith("VmPTE:")]
    return int(line.split()[1])


@situation
def nothing_is_populated_by_looking(target: Target) -> None:
    target.run("libc.mmap(B + 100 * P, 8 * P, 3, 0x21 | 0x10, -1, 0)")
    target.tracker.arm()
    target.round()
    target.run("open('/proc/self/clear_refs', 'w').write('5')")  # lets the peak be what it is now
    resident = rss_pages(target.pid)
    for _ in range(3):
        assert target.round(nr_pages=108) == []
    assert rss_pages(target.pid) <= resident + 2  # its interpreter goes on breathing


def rss_pages(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1])


@situation
def forks_are_counted_where_there_are_events(target: Target) -> None:
    target.tracker.arm()
    target.round()
    target.run("for i in range(3): c = os.fork() or os._exit(0); os.waitpid(c, 0)")
    forks = target.check().stats.nr_forks
    assert forks == (3 if isinstance(target.tracker, LogTracker) else 0)


@situation
def target_that_exits_is_named(target: Target) -> None:
    target.tracker.arm()
    target.process.kill()
    target.process.wait()
    with pytest.raises(TargetGone):
        target.tracker.collect(final=False)


@situation
def target_that_calls_exec_is_named(target: Target) -> None:
    target.tracker.arm()
    target.round()
    target.begin("os.execv('/bin/cat', ['cat'])")
    while not os.readlink(f"/proc/{target.pid}/exe").endswith("/cat"):  # before it could read what is meant for cat
        time.sleep(0.001)
    target.begin("done")
    target.done()
    with pytest.raises(TargetGone):
        target.tracker.collect(final=False)
