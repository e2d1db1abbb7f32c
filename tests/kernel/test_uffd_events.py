"""A synchronous userfaultfd with events: what the log tracker builds on, and what it must work around."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from array import array
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from agent.kernel import mman, process_vm, ptrace, uffd
from agent.kernel.pagemap import (
    PAGE_IS_PRESENT,
    PAGE_IS_WRITTEN,
    PM_SCAN_WP_MATCHING,
    PagemapScanner,
)
from agent.kernel.syscalls import NR_madvise, NR_munmap, NR_recvfrom, NR_set_tid_address
from agent.procfs.stat import read_task_stat
from tests.kernel.support import (
    PAGE,
    TrackedPuppet,
    blocked_in,
    fetch_fd,
    peek,
    poke,
    puppet,
    seize_and_stop,
    skip_unless,
    skip_unless_root,
    tracked_puppet,
    wait_for,
)

WRITTEN = {"category_mask": PAGE_IS_WRITTEN, "return_mask": PAGE_IS_WRITTEN}


def _open(features: int, flags: int) -> int:
    fd = uffd.userfaultfd(os.O_CLOEXEC | os.O_NONBLOCK | flags)
    uffd.api(fd, features)
    return fd


@contextmanager
def synchronous_puppet(flags: int = 0) -> Iterator[TrackedPuppet]:
    """A puppet whose userfaultfd is synchronous; nobody reads it but the test."""
    skip_unless("has_uffd_wp_shmem")
    skip_unless_root()
    with puppet() as child:
        theirs = child.run(_open, uffd.UFFD_FEATURES_LOG, flags)
        fd = fetch_fd(child.pid, theirs)
        child.run(os.close, theirs)
        try:
            with PagemapScanner(child.pid) as scanner:
                yield TrackedPuppet(child, fd, scanner)
        finally:
            os.close(fd)


def protected(tracked: TrackedPuppet, nr_pages: int) -> int:
    """Pages with content, protected."""
    base = tracked.child.map(nr_pages)
    tracked.child.run(mman.madvise, base, nr_pages * PAGE, mman.MADV_NOHUGEPAGE)
    tracked.child.poke(base, b"x" * nr_pages * PAGE)
    tracked.register(base, nr_pages)
    tracked.protect(base, nr_pages)
    return base


def in_threads(functions: list[tuple[object, ...]]) -> None:
    """Run functions in threads of a puppet and go on; they may block."""
    for function, *args in functions:
        threading.Thread(target=function, args=args, daemon=True).start()  # type: ignore[arg-type]


def messages(fd: int, nr: int) -> list[tuple[int, int]]:
    """Read up to `nr` messages: (event, address or start)."""
    found = os.read(fd, 32 * nr)
    words = array("Q")
    words.frombytes(found)
    return [
        (kind, address if kind == uffd.UFFD_EVENT_PAGEFAULT else first)
        for kind, first, address in zip(words[0::4], words[1::4], words[2::4])
    ]


def _read_until_idle(tracked: TrackedPuppet, found: list[tuple[int, int]]) -> bool:
    try:
        found += messages(tracked.uffd, 4)
    except BlockingIOError:
        return blocked_in(tracked.child.pid) == NR_recvfrom
    return False


def others_blocked_in(tracked: TrackedPuppet) -> set[int | None]:
    """What threads other than the leader are blocked in; -1: in no system call, so in a fault."""
    pid = tracked.child.pid
    tids = map(int, os.listdir(f"/proc/{pid}/task"))
    return {blocked_in(tid) for tid in tids if tid != pid}


def test_stores_are_read_before_events_that_came_earlier() -> None:
    with synchronous_puppet() as tracked:
        base = protected(tracked, 2)
        tracked.child.run(in_threads, [(mman.munmap, base + PAGE, PAGE)])
        wait_for(lambda: others_blocked_in(tracked) == {NR_munmap}, "a thread to wait in munmap")
        tracked.child.run(in_threads, [(poke, base, b"y")])
        wait_for(lambda: others_blocked_in(tracked) == {NR_munmap, -1}, "another to wait in a fault")
        assert messages(tracked.uffd, 8) == [
            (uffd.UFFD_EVENT_PAGEFAULT, base),
            (uffd.UFFD_EVENT_UNMAP, base + PAGE),
        ]


def test_a_drop_is_told_before_it_happens() -> None:
    with synchronous_puppet() as tracked:
        base = protected(tracked, 1)
        tracked.child.start(mman.madvise, base, PAGE, mman.MADV_DONTNEED)
        wait_for(lambda: blocked_in(tracked.child.pid) == NR_madvise, "the target to be held in madvise")
        assert tracked.scan(base, 1, return_mask=PAGE_IS_PRESENT) == [(0, 1, PAGE_IS_PRESENT)]
        assert messages(tracked.uffd, 1) == [(uffd.UFFD_EVENT_REMOVE, base)]
        tracked.child.finish()
        assert tracked.scan(base, 1, category_mask=PAGE_IS_PRESENT, return_mask=PAGE_IS_PRESENT) == []


def test_pending_event_refuses_write_protection_until_it_is_read() -> None:
    with synchronous_puppet() as tracked:
        base = protected(tracked, 2)
        tracked.child.start(mman.munmap, base + PAGE, PAGE)
        wait_for(lambda: blocked_in(tracked.child.pid) == NR_munmap, "the target to be held in munmap")
        with pytest.raises(OSError, match="UFFDIO_WRITEPROTECT") as caught:
            tracked.protect(base, 1)
        assert caught.value.errno == errno.EAGAIN
        messages(tracked.uffd, 1)
        tracked.child.finish()
        tracked.protect(base, 1)


def test_moved_pages_keep_registration_and_protection() -> None:
    with synchronous_puppet() as tracked:
        base = protected(tracked, 2)
        away = tracked.child.map(2)
        move = mman.MREMAP_MAYMOVE | mman.MREMAP_FIXED
        tracked.child.start(mman.mremap, base, 2 * PAGE, 2 * PAGE, move, away)
        found: list[tuple[int, int]] = []
        wait_for(lambda: _read_until_idle(tracked, found), "the move to be over")
        tracked.child.finish()
        assert found == [(uffd.UFFD_EVENT_REMAP, base), (uffd.UFFD_EVENT_UNMAP, base)]
        assert tracked.scan(away, 2, **WRITTEN) == []
        tracked.protect(away, 2)


def test_guard_over_a_page_is_not_told() -> None:
    with synchronous_puppet() as tracked:
        base = protected(tracked, 2)
        try:
            tracked.child.run(mman.madvise, base, PAGE, mman.MADV_GUARD_INSTALL)
        except OSError:
            pytest.skip("this kernel has no guard pages (Linux 6.13)")
        with pytest.raises(BlockingIOError):
            os.read(tracked.uffd, 32)
        assert tracked.scan(base, 2, **WRITTEN) == [(0, 1, PAGE_IS_WRITTEN)]


def test_private_file_mapping_is_refused(tmp_path: os.PathLike[str]) -> None:
    path = os.path.join(tmp_path, "file")
    with open(path, "wb") as file:
        file.write(bytes(PAGE))
    with synchronous_puppet() as tracked:
        fd = tracked.child.run(os.open, path, os.O_RDWR)
        base = tracked.child.map(1, flags=mman.MAP_PRIVATE, fd=fd)
        with pytest.raises(OSError, match="UFFDIO_REGISTER") as caught:
            tracked.register(base, 1)
        assert caught.value.errno == errno.EINVAL


def test_scan_does_not_protect_for_a_synchronous_userfaultfd() -> None:
    with synchronous_puppet() as tracked:
        base = tracked.child.map(1)
        tracked.child.poke(base)
        tracked.register(base, 1)
        assert tracked.scan(base, 1, flags=PM_SCAN_WP_MATCHING, **WRITTEN) == []
        assert tracked.scan(base, 1, **WRITTEN) == [(0, 1, PAGE_IS_WRITTEN)]


def test_write_protecting_anonymous_memory_leaves_holes_alone() -> None:
    with synchronous_puppet() as tracked:
        base = tracked.child.map(4)
        tracked.register(base, 4)
        tracked.protect(base, 4)
        assert tracked.scan(base, 4, **WRITTEN) == [(0, 4, PAGE_IS_WRITTEN)]
        tracked.child.poke(base)  # asks nobody


def test_system_call_fails_under_user_mode_only() -> None:
    with synchronous_puppet(uffd.UFFD_USER_MODE_ONLY) as tracked:
        base = protected(tracked, 1)
        assert tracked.child.run(_read_into, base) == -errno.EFAULT


def _read_into(address: int) -> int:
    ours, theirs = os.pipe()
    os.write(theirs, b"data")
    libc = ctypes.CDLL(None, use_errno=True)
    nr: int = libc.read(ours, ctypes.c_void_p(address), 4)
    return nr if nr >= 0 else -ctypes.get_errno()


def test_proc_mem_cannot_write_a_protected_page() -> None:
    # process_vm_writev waits for the reader instead.
    with synchronous_puppet() as tracked:
        base = protected(tracked, 1)
        mem = os.open(f"/proc/{tracked.child.pid}/mem", os.O_RDWR)
        try:
            with pytest.raises(OSError, match="Input/output error"):
                os.pwrite(mem, b"y", base)
        finally:
            os.close(mem)
        content = ctypes.create_string_buffer(b"z")
        remote = array("Q", (base, 1))
        writer = threading.Thread(
            target=process_vm.writev, args=(tracked.child.pid, ctypes.addressof(content), 1, remote, 0, 1)
        )
        writer.start()
        wait_for(lambda: _lift_next(tracked), "the store to be reported")
        writer.join()
        assert tracked.child.peek(base) == b"z"


def _lift_next(tracked: TrackedPuppet) -> bool:
    try:
        ((_, address),) = messages(tracked.uffd, 1)
    except BlockingIOError:
        return False
    uffd.writeprotect(tracked.uffd, address, PAGE, False)
    return True


def test_pinned_page_is_stored_to_in_spite_of_its_protection() -> None:
    # process_vm_writev pins all pages, then stores; so does a read with O_DIRECT. No tracker by page tables sees that.
    with synchronous_puppet() as tracked:
        base = protected(tracked, 2)
        content = ctypes.create_string_buffer(b"z" * 2 * PAGE)
        remote = array("Q", (base, 2 * PAGE))
        writer = threading.Thread(
            target=process_vm.writev,
            args=(tracked.child.pid, ctypes.addressof(content), 2 * PAGE, remote, 0, 1),
        )
        writer.start()
        wait_for(lambda: _lift_next(tracked), "the first page to be reported")
        found: list[tuple[int, int]] = []
        wait_for(lambda: _read_some(tracked, found), "the second page to be reported: the first is pinned by now")
        assert found == [(uffd.UFFD_EVENT_PAGEFAULT, base + PAGE)]
        tracked.protect(base, 1)
        assert tracked.child.peek(base) == b"x"
        uffd.writeprotect(tracked.uffd, base + PAGE, PAGE, False)
        writer.join()
        assert tracked.child.peek(base) == b"z"
        assert tracked.scan(base, 2, **WRITTEN) == [(1, 2, PAGE_IS_WRITTEN)]


def _read_some(tracked: TrackedPuppet, found: list[tuple[int, int]]) -> bool:
    try:
        found += messages(tracked.uffd, 1)
    except BlockingIOError:
        return False
    return True


@pytest.mark.parametrize("synchronous", [True, False])
def test_exiting_thread_cannot_clear_its_tid_word_on_a_protected_page(synchronous: bool) -> None:
    # Why pages of robust lists are never protected by the log tracker.
    with synchronous_puppet() if synchronous else tracked_puppet() as tracked:
        base = protected(tracked, 1)
        tracked.child.run(_end_a_thread, base)
        assert tracked.child.peek(base) == (b"x" if synchronous else b"\0")


def _end_a_thread(address: int) -> None:
    # The kernel clears the word when the thread ends, and pthread_join() would wait for that.
    libc = ctypes.CDLL(None)
    before = set(os.listdir("/proc/self/task"))
    thread = threading.Thread(
        target=libc.syscall, args=(NR_set_tid_address, ctypes.c_void_p(address)), daemon=True
    )
    thread.start()
    thread.join()
    wait_for(lambda: set(os.listdir("/proc/self/task")) <= before, "the thread to end")


def test_thread_that_waits_for_the_reader_stops_as_if_before_the_store() -> None:
    with synchronous_puppet() as tracked:
        base = protected(tracked, 1)
        child = tracked.child
        child.start(poke, base, b"y")
        wait_for(lambda: read_task_stat(child.pid, child.pid).state == "S", "the target to wait")
        seize_and_stop(child.pid)
        regs = ptrace.getregs(child.pid)
        assert regs.orig_rax == 2**64 - 1  # in no system call
        assert base in (regs.rdi, regs.rax)  # memmove is about to store there
        ptrace.detach(child.pid)
        wait_for(lambda: _lift_next(tracked), "the store to be reported")
        child.finish()
        assert child.run(peek, base, 1) == b"y"
