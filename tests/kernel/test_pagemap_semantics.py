"""What trackers build on in PAGEMAP_SCAN with asynchronous write protection: looking and protecting is one step.

The questions are those of the kernel's own self-test of the ioctl; the tests are our own.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time

import pytest

from agent.kernel import mman, uffd
from agent.kernel.pagemap import (
    PAGE_IS_HUGE,
    PAGE_IS_PRESENT,
    PAGE_IS_WRITTEN,
    PM_SCAN_CHECK_WPASYNC,
    PM_SCAN_WP_MATCHING,
    PagemapScanner,
)
from agent.procfs.process import list_tids
from agent.procfs.stat import read_stat, read_task_stat
from tests.kernel.support import ANON, PAGE, SHARED_ANON, skip_unless, tracked_puppet, wait_for
from tests.tracker import calls

HUGE = 512
NR_THREADS = 6
NR_PASSES = 1000
GET_WRITTEN = {
    "flags": PM_SCAN_CHECK_WPASYNC,
    "category_mask": PAGE_IS_WRITTEN,
    "return_mask": PAGE_IS_WRITTEN,
}
CLEAR_WRITTEN = GET_WRITTEN | {"flags": PM_SCAN_CHECK_WPASYNC | PM_SCAN_WP_MATCHING}
GENERIC = GET_WRITTEN | {"return_mask": PAGE_IS_WRITTEN | PAGE_IS_PRESENT}


@pytest.mark.parametrize("vec_len", [1, 3, 7])
def test_protecting_scan_with_a_small_vector_protects_what_it_has_returned(vec_len: int) -> None:
    with tracked_puppet() as tracked, PagemapScanner(tracked.child.pid, vec_len=vec_len) as scanner:
        base = tracked.child.map(64)
        tracked.child.run(mman.madvise, base, 64 * PAGE, mman.MADV_NOHUGEPAGE)
        tracked.child.poke(base, b"x" * 64 * PAGE)
        tracked.register(base, 64)
        tracked.scan(base, 64, **CLEAR_WRITTEN)
        for page in range(0, 64, 2):
            tracked.child.poke(base + page * PAGE)
        found = scanner.scan(base, base + 64 * PAGE, **CLEAR_WRITTEN)
        assert found[0::3].tolist() == [base + page * PAGE for page in range(0, 64, 2)]
        assert tracked.scan(base, 64, **GET_WRITTEN) == []


DEADLINE_S = 20


def _count_for_ever(base: int) -> None:
    def count(index: int) -> None:
        while True:
            calls.hammer(base + 2 * index * PAGE, PAGE, 2, 1)

    for index in range(NR_THREADS):
        threading.Thread(target=count, args=(index,), daemon=True).start()


@pytest.mark.parametrize("flags", [ANON, SHARED_ANON], ids=["anonymous", "shared"])
def test_no_store_is_lost_between_looks(flags: int) -> None:
    nr_pages = 2 * NR_THREADS
    with tracked_puppet() as tracked:
        pid = tracked.child.pid
        base = tracked.child.map(nr_pages, flags=flags)
        tracked.child.poke(base, bytes(nr_pages * PAGE))
        tracked.register(base, nr_pages)
        tracked.child.run(_count_for_ever, base)
        mem = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
        copy = bytearray(nr_pages * PAGE)
        nr_reported = 0

        def take() -> None:
            nonlocal nr_reported
            for start, end, _ in tracked.scan(base, nr_pages, **CLEAR_WRITTEN):
                copy[start * PAGE : end * PAGE] = os.pread(mem, (end - start) * PAGE, base + start * PAGE)
                nr_reported += end - start

        for _ in range(NR_PASSES):
            take()
        # On a busy host the threads may not have had a CPU by then.
        deadline = time.monotonic() + DEADLINE_S
        while nr_reported <= nr_pages and time.monotonic() < deadline:
            take()
        os.kill(pid, signal.SIGSTOP)
        wait_for(
            lambda: all(read_task_stat(pid, tid).state == "T" for tid in list_tids(pid)),
            "every thread of the target to stop",
        )
        take()
        assert os.pread(mem, nr_pages * PAGE, base) == bytes(copy)
        assert any(copy) and nr_reported > nr_pages  # they did count meanwhile
        os.close(mem)


@pytest.mark.parametrize("kind", ["anonymous", "shared", "private file"])
def test_fast_and_generic_path_agree_after_a_drop(kind: str) -> None:
    nr_pages = 2 * HUGE  # at least one page table of its own goes
    with tracked_puppet() as tracked:
        child = tracked.child
        if kind == "private file":
            with tempfile.TemporaryFile() as file:
                os.pwrite(file.fileno(), b"f" * nr_pages * PAGE, 0)
                base = child.run(
                    mman.mmap, 0, nr_pages * PAGE, mman.PROT_READ | mman.PROT_WRITE, mman.MAP_PRIVATE,
                    child.run(os.open, f"/proc/{os.getpid()}/fd/{file.fileno()}", os.O_RDWR), 0,
                )  # fmt: skip
        else:
            base = child.map(nr_pages, flags=ANON if kind == "anonymous" else SHARED_ANON)
        child.poke(base, b"x" * nr_pages * PAGE)
        tracked.register(base, nr_pages)
        tracked.scan(base, nr_pages, **CLEAR_WRITTEN)
        child.run(mman.madvise, base + 10 * PAGE, 20 * PAGE, mman.MADV_DONTNEED)
        child.run(mman.madvise, base + HUGE * PAGE, 300 * PAGE, mman.MADV_DONTNEED)
        child.poke(base + 5 * PAGE)
        fast = tracked.scan(base, nr_pages, **GET_WRITTEN)
        generic = tracked.scan(base, nr_pages, **GENERIC)
        pages = [{p for start, end, _ in found for p in range(start, end)} for found in (fast, generic)]
        assert pages[0] == pages[1] and 5 in pages[0]


def test_half_of_a_huge_page_can_be_protected() -> None:
    with tracked_puppet() as tracked:
        child = tracked.child
        base = (child.map(2 * HUGE) + HUGE * PAGE - 1) // (HUGE * PAGE) * (HUGE * PAGE)
        child.run(mman.madvise, base, HUGE * PAGE, mman.MADV_HUGEPAGE)
        child.poke(base, b"x" * HUGE * PAGE)
        huge = {"category_mask": PAGE_IS_HUGE, "return_mask": PAGE_IS_HUGE}
        child.run(mman.madvise, base, HUGE * PAGE, mman.MADV_COLLAPSE)  # where the first touch found none
        assert tracked.scan(base, HUGE, **huge) == [(0, HUGE, PAGE_IS_HUGE)]
        tracked.register(base, HUGE)
        assert tracked.scan(base, HUGE // 2, **CLEAR_WRITTEN) == [(0, HUGE // 2, PAGE_IS_WRITTEN)]
        assert tracked.scan(base, HUGE, **GET_WRITTEN) == [(HUGE // 2, HUGE, PAGE_IS_WRITTEN)]
        child.poke(base + 3 * PAGE)
        assert tracked.scan(base, HUGE // 2, **GET_WRITTEN) == [(3, 4, PAGE_IS_WRITTEN)]


def test_guard_pages_over_protected_pages_of_a_file_keep_their_caller_busy_until_the_marker_is_lifted() -> None:
    # madvise(MADV_GUARD_INSTALL) zaps what is there, which leaves a marker for the protection, and wants nothing to
    # be there: it tries again for ever. Anonymous memory gets no markers.
    skip_unless("has_guard_pages")
    with tracked_puppet() as tracked, tempfile.TemporaryFile() as file:
        child = tracked.child
        os.pwrite(file.fileno(), b"f" * 4 * PAGE, 0)
        fd = child.run(os.open, f"/proc/{os.getpid()}/fd/{file.fileno()}", os.O_RDWR)
        base = child.run(mman.mmap, 0, 4 * PAGE, mman.PROT_READ | mman.PROT_WRITE, mman.MAP_PRIVATE, fd, 0)
        child.poke(base, b"x" * 4 * PAGE)
        tracked.register(base, 4)
        tracked.scan(base, 4, **CLEAR_WRITTEN)
        child.start(mman.madvise, base, PAGE, mman.MADV_GUARD_INSTALL)
        before = read_stat(child.pid).utime + read_stat(child.pid).stime
        wait_for(
            lambda: read_stat(child.pid).utime + read_stat(child.pid).stime > before + 3,
            "the target to have spent some ticks",
        )
        assert read_stat(child.pid).state == "R"
        uffd.writeprotect(tracked.uffd, base, PAGE, False)
        child.finish()
