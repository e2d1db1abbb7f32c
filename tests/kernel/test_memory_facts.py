"""Facts about memory beyond single wrappers: huge pages, lazy freeing, events, restoring a memory map."""

from __future__ import annotations

import ctypes
import errno
import os

import pytest

from agent.kernel import mman, prctl, uffd
from agent.kernel.libc import syscall
from agent.kernel.pagemap import (
    PAGE_IS_HUGE,
    PAGE_IS_PRESENT,
    PAGE_IS_WRITTEN,
    PM_SCAN_CHECK_WPASYNC,
    PM_SCAN_WP_MATCHING,
)
from agent.kernel.syscalls import NR_brk
from agent.procfs.maps import parse_maps, read_maps
from agent.procfs.process import parse_auxv, read_auxv
from agent.procfs.stat import read_stat
from tests.kernel.support import PAGE, blocked_in, puppet, tracked_puppet, wait_for

HUGE = 2 << 20
GET_WRITTEN = {
    "flags": PM_SCAN_CHECK_WPASYNC,
    "category_mask": PAGE_IS_WRITTEN,
    "return_mask": PAGE_IS_WRITTEN,
}
CLEAR_WRITTEN = GET_WRITTEN | {"flags": PM_SCAN_CHECK_WPASYNC | PM_SCAN_WP_MATCHING}


def test_small_write_to_a_huge_page_reports_one_page_and_splits_it() -> None:
    with tracked_puppet() as tracked:
        child = tracked.child
        base = (child.map(2 * HUGE // PAGE) + HUGE - 1) // HUGE * HUGE
        child.run(mman.madvise, base, HUGE, mman.MADV_HUGEPAGE)
        child.poke(base, b"x" * HUGE)
        nr = HUGE // PAGE
        huge = {"category_mask": PAGE_IS_HUGE, "return_mask": PAGE_IS_HUGE}
        child.run(mman.madvise, base, HUGE, mman.MADV_COLLAPSE)  # where the first touch found none
        assert tracked.scan(base, nr, **huge) == [(0, nr, PAGE_IS_HUGE)]
        tracked.register(base, nr)
        tracked.scan(base, nr, **CLEAR_WRITTEN)
        assert tracked.scan(base, nr, **GET_WRITTEN) == []
        child.poke(base + 7 * PAGE)
        assert tracked.scan(base, nr, **GET_WRITTEN) == [(7, 8, PAGE_IS_WRITTEN)]
        assert tracked.scan(base, nr, **huge) == []


def test_lazily_freed_pages_are_not_reported() -> None:
    with tracked_puppet() as tracked:
        base = tracked.child.map(4)
        tracked.child.run(mman.madvise, base, 4 * PAGE, mman.MADV_NOHUGEPAGE)
        tracked.child.poke(base, b"x" * 4 * PAGE)
        tracked.register(base, 4)
        tracked.scan(base, 4, **CLEAR_WRITTEN)
        tracked.child.run(mman.madvise, base, 4 * PAGE, mman.MADV_FREE)
        assert tracked.scan(base, 4, **GET_WRITTEN) == []


def test_grown_brk_shows_as_a_second_heap_and_is_untracked() -> None:
    with tracked_puppet() as tracked:
        child = tracked.child
        end = child.run(syscall, NR_brk, 0)
        heap = [e for e in parse_maps(read_maps(child.pid)) if e.path == "[heap]"]
        tracked.register(heap[0].start, (heap[-1].end - heap[0].start) // PAGE)
        child.run(syscall, NR_brk, end + 16 * PAGE)
        grown = [e for e in parse_maps(read_maps(child.pid)) if e.path == "[heap]"]
        assert len(grown) == len(heap) + 1
        with pytest.raises(PermissionError):
            tracked.scan(grown[-1].start, 1, **GET_WRITTEN)


def test_unmap_event_holds_the_target_until_the_agent_reads_it() -> None:
    # Why the scan tracker asks for no events.
    features = uffd.UFFD_FEATURES_SCAN | uffd.UFFD_FEATURE_EVENT_UNMAP
    with tracked_puppet(features) as tracked:
        child = tracked.child
        base = child.map(2)
        tracked.register(base, 2)
        child.start(mman.munmap, base, 2 * PAGE)
        wait_for(lambda: blocked_in(child.pid) == 11, "the target to be held in munmap")
        message = os.read(tracked.uffd, 32)
        assert message[0] == uffd.UFFD_EVENT_UNMAP
        assert int.from_bytes(message[8:16], "little") == base
        child.finish()


def test_move_that_merges_with_a_tracked_neighbour_leaves_it_untracked_with_stale_protection() -> None:
    with tracked_puppet() as tracked:
        child = tracked.child
        area = child.map(64, prot=mman.PROT_NONE)
        base, away = area + 16 * PAGE, area + 40 * PAGE
        child.map(16, at=base, flags=mman.MAP_PRIVATE | mman.MAP_ANONYMOUS | mman.MAP_FIXED)
        child.run(mman.madvise, base, 16 * PAGE, mman.MADV_NOHUGEPAGE)
        child.poke(base, b"x" * 16 * PAGE)
        tracked.register(base, 16)
        tracked.scan(base, 16, **CLEAR_WRITTEN)
        move = mman.MREMAP_MAYMOVE | mman.MREMAP_FIXED
        child.run(mman.mremap, base + 8 * PAGE, 8 * PAGE, 8 * PAGE, move, away)
        tracked.register(away, 8)
        child.run(mman.mremap, away, 8 * PAGE, 8 * PAGE, move, base + 8 * PAGE)
        with pytest.raises(PermissionError):
            tracked.scan(base, 1, **GET_WRITTEN)
        child.poke(base, b"y")  # becomes writable
        tracked.register(base, 16)
        tracked.scan(base, 16, **CLEAR_WRITTEN)
        child.poke(base, b"z")
        assert tracked.scan(base, 16, **GET_WRITTEN) == []  # the store is lost
        uffd.writeprotect(tracked.uffd, base, 16 * PAGE, False)
        assert tracked.scan(base, 16, **GET_WRITTEN) == [(0, 16, PAGE_IS_WRITTEN)]


def test_populated_pages_survive_a_protected_round_with_their_content() -> None:
    with tracked_puppet() as tracked:
        base = tracked.child.map(64)
        tracked.child.poke(base, bytes(range(256)) * 16 * 64)
        tracked.register(base, 64)
        for page in range(0, 64, 3):
            tracked.scan(base, 64, **CLEAR_WRITTEN)
            tracked.child.poke(base + page * PAGE, b"new")
            assert tracked.scan(base, 64, **GET_WRITTEN) == [(page, page + 1, PAGE_IS_WRITTEN)]
            assert tracked.child.peek(base + page * PAGE, 4) == b"new\x03"


def test_reading_a_protected_page_does_not_report_it() -> None:
    with tracked_puppet() as tracked:
        base = tracked.child.map(2)
        tracked.child.poke(base, b"x" * 2 * PAGE)
        tracked.register(base, 2)
        tracked.scan(base, 2, **CLEAR_WRITTEN)
        assert tracked.child.peek(base, 1) == b"x"
        assert tracked.scan(base, 2, **GET_WRITTEN) == []
        assert tracked.scan(base, 2, return_mask=PAGE_IS_PRESENT) == [(0, 2, PAGE_IS_PRESENT)]


def test_memory_map_can_be_set_again_but_the_program_only_after_it_is_unmapped() -> None:
    with puppet() as child:
        child.wait_idle()
        before = read_stat(child.pid)
        child.run(_set_own_memory_map, -1)
        after = read_stat(child.pid)
        assert after[25:28] == before[25:28]
        assert after[44:51] == before[44:51]
        exe = child.run(os.open, "/bin/true", os.O_RDONLY)
        with pytest.raises(OSError, match="157") as caught:
            child.run(_set_own_memory_map, exe)
        assert caught.value.errno == errno.EBUSY


def _set_own_memory_map(exe_fd: int) -> None:
    pid = os.getpid()
    stat, auxv = read_stat(pid), read_auxv(pid)
    assert parse_auxv(auxv)
    copy = ctypes.create_string_buffer(auxv, len(auxv))
    argument = prctl.prctl_mm_map(
        start_code=stat.start_code,
        end_code=stat.end_code,
        start_data=stat.start_data,
        end_data=stat.end_data,
        start_brk=stat.start_brk,
        brk=syscall(NR_brk, 0),
        start_stack=stat.start_stack,
        arg_start=stat.arg_start,
        arg_end=stat.arg_end,
        env_start=stat.env_start,
        env_end=stat.env_end,
        auxv=ctypes.addressof(copy),
        auxv_size=len(auxv),
        exe_fd=exe_fd & 0xFFFFFFFF,
    )
    size = ctypes.sizeof(argument)
    address = ctypes.addressof(argument)
    prctl.prctl(prctl.PR_SET_MM, prctl.PR_SET_MM_MAP, address, size, 0)
