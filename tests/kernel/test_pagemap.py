"""PagemapScanner: what it returns, and how PAGEMAP_SCAN sees each kind of memory."""

from __future__ import annotations

import os
import signal
import tempfile

import pytest

from agent.kernel import mman
from agent.kernel.pagemap import (
    PAGE_IS_FILE,
    PAGE_IS_GUARD,
    PAGE_IS_PFNZERO,
    PAGE_IS_PRESENT,
    PAGE_IS_SWAPPED,
    PAGE_IS_WRITTEN,
    PM_PRESENT,
    PM_SCAN_CHECK_WPASYNC,
    PM_SCAN_WP_MATCHING,
    PagemapScanner,
    read_entries,
)
from agent.procfs.maps import parse_maps, read_maps
from tests.kernel.support import ANON, PAGE, SHARED_ANON, puppet, skip_unless, tracked_puppet

POPULATED = PAGE_IS_PRESENT | PAGE_IS_SWAPPED
GET_WRITTEN = {
    "flags": PM_SCAN_CHECK_WPASYNC,
    "category_mask": PAGE_IS_WRITTEN,
    "return_mask": PAGE_IS_WRITTEN,
}
CLEAR_WRITTEN = GET_WRITTEN | {"flags": PM_SCAN_CHECK_WPASYNC | PM_SCAN_WP_MATCHING}
ARM = CLEAR_WRITTEN | {"category_anyof_mask": POPULATED, "return_mask": 0}
DETAILS = {
    "category_anyof_mask": POPULATED,
    "return_mask": PAGE_IS_WRITTEN | PAGE_IS_FILE | POPULATED,
}
W, P, S, F = PAGE_IS_WRITTEN, PAGE_IS_PRESENT, PAGE_IS_SWAPPED, PAGE_IS_FILE


def test_scan_returns_flat_triples_of_coalesced_regions() -> None:
    skip_unless("has_pagemap_scan")
    with puppet() as child, PagemapScanner(child.pid) as scanner:
        base = child.map(8)
        child.poke(base, b"x" * 2 * PAGE)
        child.poke(base + 5 * PAGE)
        found = scanner.scan(
            base, base + 8 * PAGE, category_mask=PAGE_IS_PRESENT, return_mask=PAGE_IS_PRESENT
        )
        assert found.typecode == "Q"
        assert list(found) == [
            base, base + 2 * PAGE, P, base + 5 * PAGE, base + 6 * PAGE, P
        ]  # fmt: skip


@pytest.mark.parametrize("vec_len", [1, 2, 3, 100])
def test_scan_goes_on_where_the_vector_was_full(vec_len: int) -> None:
    skip_unless("has_pagemap_scan")
    with puppet() as child, PagemapScanner(child.pid, vec_len=vec_len) as scanner:
        base = child.map(64)
        for page in (0, 1, 2, 9, 20, 21, 40, 63):
            child.poke(base + page * PAGE)
        found = scanner.scan(
            base, base + 64 * PAGE, category_mask=PAGE_IS_PRESENT, return_mask=PAGE_IS_PRESENT
        )
        starts = [(start - base) // PAGE for start in found[0::3]]
        ends = [(end - base) // PAGE for end in found[1::3]]
        assert list(zip(starts, ends)) == [(0, 3), (9, 10), (20, 22), (40, 41), (63, 64)]


def test_scan_of_several_ranges_names_those_that_it_must_not_answer_for() -> None:
    with tracked_puppet() as tracked, PagemapScanner(tracked.child.pid) as scanner:
        base, untracked = tracked.child.map(16), tracked.child.map(4)
        for page in (0, 7, 12):
            tracked.child.poke(base + page * PAGE)
        tracked.child.poke(untracked)
        tracked.register(base, 16)
        ranges = [(base, base + 2 * PAGE), (untracked, untracked + PAGE), (base + 7 * PAGE, base + 13 * PAGE)]
        found, refused = scanner.scan_each(ranges, flags=PM_SCAN_CHECK_WPASYNC, category_mask=P, return_mask=P)
        assert [(start - base) // PAGE for start in found[0::3]] == [0, 7, 12]
        assert refused == [ranges[1]]


def test_empty_range_scans_to_nothing() -> None:
    with PagemapScanner(os.getpid()) as scanner:
        assert len(scanner.scan(PAGE, PAGE, return_mask=PAGE_IS_PRESENT)) == 0


def test_scanning_does_not_populate() -> None:
    with tracked_puppet() as tracked:
        base = tracked.child.map(16)
        tracked.register(base, 16)
        tracked.scan(base, 16, **GET_WRITTEN)
        tracked.scan(base, 16, **ARM)
        entries = read_entries(tracked.child.pid, base, base + 16 * PAGE)
        assert not any(entry & PM_PRESENT for entry in entries)


def test_fast_and_generic_path_agree() -> None:
    with tracked_puppet() as tracked:
        base = tracked.child.map(512)
        tracked.child.poke(base, b"x" * 512 * PAGE)
        tracked.register(base, 512)
        tracked.scan(base, 512, **CLEAR_WRITTEN)
        for page in (0, 7, 8, 9, 200, 511):
            tracked.child.poke(base + page * PAGE)
        fast = tracked.scan(base, 512, **GET_WRITTEN)
        generic = tracked.scan(base, 512, category_mask=W, return_mask=W | P)
        assert [region[:2] for region in fast] == [(0, 1), (7, 10), (200, 201), (511, 512)]
        assert [region[:2] for region in generic] == [region[:2] for region in fast]


def test_untracked_memory_is_an_error_with_the_check() -> None:
    with tracked_puppet() as tracked:
        base = tracked.child.map(4)
        tracked.child.poke(base)
        with pytest.raises(PermissionError, match="PAGEMAP_SCAN"):
            tracked.scan(base, 4, **GET_WRITTEN)


def test_untracked_memory_is_silently_skipped_without_the_check() -> None:
    with tracked_puppet() as tracked:
        base = tracked.child.map(4)
        tracked.child.poke(base)
        mask = {"category_mask": W, "return_mask": W}
        assert tracked.scan(base, 4, flags=PM_SCAN_WP_MATCHING, **mask) == []


def test_protecting_scan_that_meets_untracked_memory_loses_what_it_cleared() -> None:
    # Why a caller must take the whole range as written after PermissionError.
    with tracked_puppet() as tracked:
        base = tracked.child.map(8)
        tracked.child.poke(base, b"x" * 8 * PAGE)
        tracked.register(base, 4)
        with pytest.raises(PermissionError):
            tracked.scan(base, 8, **CLEAR_WRITTEN)
        assert tracked.scan(base, 4, **GET_WRITTEN) == []


def test_absent_page_reads_written_and_not_present() -> None:
    with tracked_puppet() as tracked:
        base = tracked.child.map(4)
        tracked.child.poke(base + PAGE)
        tracked.register(base, 4)
        assert tracked.scan(base, 4, **GET_WRITTEN) == [(0, 4, W)]
        every = tracked.scan(base, 4, return_mask=W | P | S, category_mask=W)
        assert every == [(0, 1, W), (1, 2, W | P), (2, 4, W)]
        assert tracked.scan(base, 4, **DETAILS) == [(1, 2, W | P)]


def test_dropped_page_reads_written_and_not_present() -> None:
    with tracked_puppet() as tracked:
        base = tracked.child.map(4)
        tracked.child.poke(base, b"x" * 4 * PAGE)
        tracked.register(base, 4)
        tracked.scan(base, 4, **CLEAR_WRITTEN)
        tracked.child.run(mman.madvise, base + PAGE, 2 * PAGE, mman.MADV_DONTNEED)
        every = tracked.scan(base, 4, return_mask=W | P | S)
        assert (1, 3, W) in every
        assert tracked.scan(base, 4, **GET_WRITTEN) == [(1, 3, W)]


def test_arming_protects_only_populated_pages() -> None:
    with tracked_puppet() as tracked:
        base = tracked.child.map(8)
        tracked.child.poke(base + 2 * PAGE, b"x" * 3 * PAGE)
        tracked.register(base, 8)
        tracked.scan(base, 8, **ARM)
        assert tracked.scan(base, 8, **GET_WRITTEN) == [(0, 2, W), (5, 8, W)]


def test_protected_unpopulated_page_shows_a_marker_as_swapped() -> None:
    with tracked_puppet() as tracked:
        base = tracked.child.map(4)
        tracked.register(base, 4)
        tracked.protect(base, 4)
        assert tracked.scan(base, 4, **GET_WRITTEN) == []
        assert tracked.scan(base, 4, return_mask=W | P | S) == [(0, 4, S)]
        tracked.child.poke(base + PAGE)
        assert tracked.scan(base, 4, **GET_WRITTEN) == [(1, 2, W)]


def test_guard_pages_report_written_and_guard() -> None:
    skip_unless("has_guard_pages")
    with tracked_puppet() as tracked:
        base = tracked.child.map(4)
        tracked.child.poke(base, b"x" * 4 * PAGE)
        tracked.child.run(mman.madvise, base + PAGE, PAGE, mman.MADV_GUARD_INSTALL)
        tracked.register(base, 4)
        masks = W | P | PAGE_IS_GUARD
        assert tracked.scan(base, 4, category_mask=PAGE_IS_GUARD, return_mask=masks) == [
            (1, 2, W | PAGE_IS_GUARD)
        ]
        tracked.scan(base, 4, **ARM)
        assert (1, 2, PAGE_IS_GUARD) in [
            (a, b, c & PAGE_IS_GUARD)
            for a, b, c in tracked.scan(base, 4, category_mask=PAGE_IS_GUARD, return_mask=masks)
        ]


def test_file_bit_goes_when_a_private_file_page_is_copied() -> None:
    with tracked_puppet() as tracked, tempfile.NamedTemporaryFile() as file:
        file.write(b"f" * 4 * PAGE)
        file.flush()
        fd = tracked.child.run(os.open, file.name, os.O_RDONLY)
        base = tracked.child.map(4, flags=mman.MAP_PRIVATE, fd=fd)
        for page in range(4):
            tracked.child.peek(base + page * PAGE)
        tracked.child.poke(base + 2 * PAGE, b"copy")
        tracked.register(base, 4)
        file_bits = [
            (first, end, categories & (F | P))
            for first, end, categories in tracked.scan(base, 4, return_mask=F | P)
        ]
        assert file_bits == [(0, 2, F | P), (2, 3, P), (3, 4, F | P)]


def test_read_fault_maps_the_zero_page_which_counts_as_present() -> None:
    with tracked_puppet() as tracked:
        base = tracked.child.map(1)
        tracked.child.run(mman.madvise, base, PAGE, mman.MADV_NOHUGEPAGE)
        tracked.child.peek(base)
        tracked.register(base, 1)
        found = tracked.scan(base, 1, return_mask=P | PAGE_IS_PFNZERO)
        assert found == [(0, 1, P | PAGE_IS_PFNZERO)]


def test_shared_memory_is_protected_per_mapping() -> None:
    with tracked_puppet() as tracked:
        child = tracked.child
        fd = child.run(os.memfd_create, "both")
        child.run(os.ftruncate, fd, 4 * PAGE)
        first = child.map(4, flags=mman.MAP_SHARED, fd=fd)
        second = child.map(4, flags=mman.MAP_SHARED, fd=fd)
        child.poke(first, b"x" * 4 * PAGE)
        for base in (first, second):
            tracked.register(base, 4)
            tracked.protect(base, 4)
        child.poke(first + PAGE)
        assert tracked.scan(first, 4, **GET_WRITTEN) == [(1, 2, W)]
        assert tracked.scan(second, 4, **GET_WRITTEN) == []
        child.run(os.pwrite, fd, b"by fd", 3 * PAGE)
        assert tracked.scan(first, 4, **GET_WRITTEN) == [(1, 2, W)]
        assert tracked.scan(second, 4, **GET_WRITTEN) == []


def test_markers_on_unpopulated_shared_memory_catch_the_first_store() -> None:
    with tracked_puppet() as tracked:
        base = tracked.child.map(8, flags=SHARED_ANON)
        tracked.register(base, 8)
        tracked.protect(base, 8)
        assert tracked.scan(base, 8, **GET_WRITTEN) == []
        tracked.child.poke(base + 3 * PAGE)
        tracked.child.peek(base + 5 * PAGE)
        assert tracked.scan(base, 8, **GET_WRITTEN) == [(3, 4, W)]


def test_new_mapping_at_an_old_address_looks_the_same_but_is_untracked() -> None:
    with tracked_puppet() as tracked:
        child = tracked.child
        base = child.map(4)
        child.poke(base)
        tracked.register(base, 4)
        tracked.scan(base, 4, **ARM)
        before = [entry for entry in parse_maps(read_maps(child.pid)) if entry.start == base]
        child.run(mman.munmap, base, 4 * PAGE)
        assert child.map(4, at=base, flags=ANON | mman.MAP_FIXED) == base
        after = [entry for entry in parse_maps(read_maps(child.pid)) if entry.start == base]
        assert len(before) == 1
        assert [(e.perms, e.path, e.inode) for e in after[:1]] == [
            (e.perms, e.path, e.inode) for e in before
        ]
        with pytest.raises(PermissionError):
            tracked.scan(base, 4, **GET_WRITTEN)


def test_map_fixed_over_tracked_memory_is_untracked() -> None:
    with tracked_puppet() as tracked:
        base = tracked.child.map(4)
        tracked.register(base, 4)
        tracked.child.map(1, at=base + PAGE, flags=ANON | mman.MAP_FIXED)
        with pytest.raises(PermissionError):
            tracked.scan(base, 4, **GET_WRITTEN)
        assert tracked.scan(base, 1, **GET_WRITTEN) == [(0, 1, W)]


def test_mremap_loses_tracking() -> None:
    with tracked_puppet() as tracked:
        child = tracked.child
        base = child.map(4)
        child.poke(base, b"x" * 4 * PAGE)
        tracked.register(base, 4)
        tracked.scan(base, 4, **CLEAR_WRITTEN)
        elsewhere = child.map(4)
        flags = mman.MREMAP_MAYMOVE | mman.MREMAP_FIXED
        assert child.run(mman.mremap, base, 4 * PAGE, 4 * PAGE, flags, elsewhere) == elsewhere
        with pytest.raises(PermissionError):
            tracked.scan(elsewhere, 4, **GET_WRITTEN)
        assert tracked.scan(base, 4, **GET_WRITTEN) == []  # a hole is no error


def test_prot_none_pages_that_are_populated_are_seen() -> None:
    with tracked_puppet() as tracked:
        base = tracked.child.map(4)
        tracked.child.poke(base + PAGE)
        tracked.child.run(mman.mprotect, base, 4 * PAGE, mman.PROT_NONE)
        tracked.register(base, 4)
        assert tracked.scan(base, 4, **DETAILS) == [(1, 2, W | P)]


def test_write_by_the_agent_is_reported_too() -> None:
    with tracked_puppet() as tracked:
        base = tracked.child.map(2)
        tracked.child.poke(base, b"x" * 2 * PAGE)
        tracked.register(base, 2)
        tracked.scan(base, 2, **CLEAR_WRITTEN)
        with open(f"/proc/{tracked.child.pid}/mem", "r+b", buffering=0) as mem:
            mem.seek(base + PAGE)
            mem.write(b"agent")
        assert tracked.scan(base, 2, **GET_WRITTEN) == [(1, 2, W)]


def test_forked_child_is_untracked() -> None:
    with tracked_puppet() as tracked:
        base = tracked.child.map(2)
        tracked.child.poke(base)
        tracked.register(base, 2)
        tracked.scan(base, 2, **ARM)
        grandchild = tracked.child.run(_fork_paused)
        try:
            with PagemapScanner(grandchild) as scanner, pytest.raises(PermissionError):
                scanner.scan(
                    base,
                    base + 2 * PAGE,
                    flags=PM_SCAN_CHECK_WPASYNC,
                    category_mask=W,
                    return_mask=W,
                )
        finally:
            tracked.child.run(_kill_and_reap, grandchild)


def _fork_paused() -> int:
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    return pid


def _kill_and_reap(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_scan_of_a_process_that_is_gone_is_a_process_lookup_error() -> None:
    skip_unless("has_pagemap_scan")
    with puppet() as child:
        base = child.map(4)
        child.poke(base)
        scanner = PagemapScanner(child.pid)
    with scanner, pytest.raises(ProcessLookupError):
        scanner.scan(base, base + 4 * PAGE, return_mask=P)


def test_scanner_of_an_unknown_process_does_not_open() -> None:
    with puppet() as child:
        pid = child.pid
    with pytest.raises(FileNotFoundError):
        PagemapScanner(pid)
