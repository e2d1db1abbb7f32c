"""userfaultfd from outside the target: creation, ownership, what can be registered, and what is left behind."""

from __future__ import annotations

import ctypes
import errno
import os
import tempfile

import pytest

from agent.kernel import mman, uffd
from agent.kernel.pagemap import PAGE_IS_WRITTEN, PM_SCAN_CHECK_WPASYNC, PagemapScanner
from agent.procfs.maps import MapsEntry, parse_maps, read_maps
from agent.procfs.process import list_fds, read_fd_link
from agent.procfs.smaps import read_vm_flags
from agent.procfs.status import read_status
from tests.kernel.support import (
    ANON,
    PAGE,
    SHARED_ANON,
    TrackedPuppet,
    become_nobody,
    fetch_fd,
    open_own_uffd,
    puppet,
    skip_unless,
    skip_unless_has_pagemap_scan,
    skip_unless_root,
    tracked_puppet,
    wait_for,
)

GET_WRITTEN = {
    "flags": PM_SCAN_CHECK_WPASYNC,
    "category_mask": PAGE_IS_WRITTEN,
    "return_mask": PAGE_IS_WRITTEN,
}


def _entry(pid: int, name: str) -> MapsEntry | None:
    return next((e for e in parse_maps(read_maps(pid)) if e.path == name), None)


def _is_registered(pid: int, address: int) -> bool:
    return any(
        start <= address < end and "uw" in flags for start, end, flags in read_vm_flags(pid)
    )


def test_api_returns_all_features_and_works_only_once() -> None:
    skip_unless("has_uffd")
    fd = uffd.userfaultfd(os.O_CLOEXEC | uffd.UFFD_USER_MODE_ONLY)
    try:
        assert uffd.api(fd, uffd.UFFD_FEATURE_PAGEFAULT_FLAG_WP) & uffd.UFFD_FEATURE_THREAD_ID
        with pytest.raises(OSError, match="UFFDIO_API"):
            uffd.api(fd, 0)
    finally:
        os.close(fd)


def test_unknown_feature_is_refused() -> None:
    skip_unless("has_uffd")
    fd = uffd.userfaultfd(os.O_CLOEXEC | uffd.UFFD_USER_MODE_ONLY)
    try:
        with pytest.raises(OSError, match="UFFDIO_API") as caught:
            uffd.api(fd, 1 << 63)
        assert caught.value.errno == errno.EINVAL
    finally:
        os.close(fd)


def test_target_keeps_no_descriptor_of_the_fetched_userfaultfd() -> None:
    with tracked_puppet() as tracked:
        links = [read_fd_link(tracked.child.pid, fd) for fd in list_fds(tracked.child.pid)]
        assert "anon_inode:[userfaultfd]" not in links


def test_fetched_userfaultfd_works_on_the_targets_memory() -> None:
    with tracked_puppet() as tracked:
        base = tracked.child.map(4)
        tracked.register(base, 4)
        tracked.protect(base, 4)
        tracked.child.poke(base + 2 * PAGE)
        assert tracked.scan(base, 4, **GET_WRITTEN) == [(2, 3, PAGE_IS_WRITTEN)]
        assert _is_registered(tracked.child.pid, base)


def test_closing_the_last_reference_unregisters_everything() -> None:
    with tracked_puppet() as tracked:
        base = tracked.child.map(4)
        tracked.register(base, 4)
        tracked.protect(base, 4)
        assert _is_registered(tracked.child.pid, base)
        os.close(tracked.uffd)
        wait_for(lambda: not _is_registered(tracked.child.pid, base), "the range to be forgotten")
        tracked.child.poke(base, b"goes on")
        assert tracked.child.peek(base, 7) == b"goes on"


def test_target_goes_on_when_the_agent_dies() -> None:
    skip_unless_has_pagemap_scan()
    with puppet() as target, puppet() as agent:
        theirs = target.run(open_own_uffd, uffd.UFFD_FEATURES_SCAN)
        base = target.map(4)
        copy = agent.run(fetch_fd, target.pid, theirs)
        target.run(os.close, theirs)
        mode = uffd.UFFDIO_REGISTER_MODE_WP
        agent.run(uffd.register, copy, base, 4 * PAGE, mode)
        agent.run(uffd.writeprotect, copy, base, 4 * PAGE, True)
        assert _is_registered(target.pid, base)
        agent.close()
        wait_for(lambda: not _is_registered(target.pid, base), "the range to be forgotten")
        target.poke(base, b"alive")
        assert target.peek(base, 5) == b"alive"


def test_unprivileged_target_may_have_a_user_mode_only_one() -> None:
    skip_unless_root()
    skip_unless_has_pagemap_scan()
    with puppet() as child:
        child.run(become_nobody)
        with open("/proc/sys/vm/unprivileged_userfaultfd", "rb") as file:
            if file.read().strip() == b"0":
                with pytest.raises(PermissionError):
                    child.run(uffd.userfaultfd, os.O_CLOEXEC)
        theirs = child.run(open_own_uffd, uffd.UFFD_FEATURES_SCAN)
        fd = fetch_fd(child.pid, theirs)
        try:
            base = child.map(2)
            child.poke(base, b"x" * 2 * PAGE)
            uffd.register(fd, base, 2 * PAGE, uffd.UFFDIO_REGISTER_MODE_WP)
            uffd.writeprotect(fd, base, 2 * PAGE, True)
            # The kernel's own store into a protected page is resolved and reported as well.
            assert child.run(_read_into, base + PAGE) == 4
            with PagemapScanner(child.pid) as scanner:
                found = scanner.scan(base, base + 2 * PAGE, **GET_WRITTEN)
            assert list(found) == [base + PAGE, base + 2 * PAGE, PAGE_IS_WRITTEN]
        finally:
            os.close(fd)


def _read_into(address: int) -> int:
    ours, theirs = os.pipe()
    os.write(theirs, b"data")
    nr: int = ctypes.CDLL(None).read(ours, ctypes.c_void_p(address), 4)
    return nr


def test_every_ordinary_kind_of_memory_can_be_registered() -> None:
    with tracked_puppet() as tracked, tempfile.NamedTemporaryFile() as file:
        child = tracked.child
        file.write(bytes(2 * PAGE))
        file.flush()
        fd = child.run(os.open, file.name, os.O_RDWR)
        memfd = child.run(os.memfd_create, "m")
        child.run(os.ftruncate, memfd, 2 * PAGE)
        kinds = {
            "anonymous": child.map(2),
            "prot none": child.map(2, prot=mman.PROT_NONE),
            "shared anonymous": child.map(2, flags=SHARED_ANON),
            "private file": child.map(2, flags=mman.MAP_PRIVATE, fd=fd),
            "read-only private file": child.map(
                2, flags=mman.MAP_PRIVATE, fd=fd, prot=mman.PROT_READ
            ),
            "memfd": child.map(2, flags=mman.MAP_SHARED, fd=memfd),
        }
        for kind, base in kinds.items():
            tracked.register(base, 2)
            tracked.protect(base, 2)
            assert tracked.scan(base, 2, **GET_WRITTEN) == [], kind
        for name in ("[heap]", "[stack]"):
            entry = _entry(child.pid, name)
            assert entry is not None
            tracked.register(entry.start, (entry.end - entry.start) // PAGE)


def test_sealed_memory_can_be_registered() -> None:
    skip_unless("has_mseal")
    with tracked_puppet() as tracked:
        base = tracked.child.map(2)
        tracked.child.run(mman.mseal, base, 2 * PAGE)
        tracked.register(base, 2)
        assert _is_registered(tracked.child.pid, base)


@pytest.mark.parametrize("name", ["[vdso]", "[vvar]", "[vvar_vclock]"])
def test_kernel_pages_are_refused(name: str) -> None:
    with tracked_puppet() as tracked:
        entry = _entry(tracked.child.pid, name)
        if entry is None:
            pytest.skip(f"this kernel has no {name}")
        _assert_refused(tracked, entry.start, 1, errno.EINVAL)


def _assert_refused(tracked: TrackedPuppet, start: int, nr_pages: int, code: int) -> None:
    with pytest.raises(OSError, match="UFFDIO_REGISTER") as caught:
        tracked.register(start, nr_pages)
    assert caught.value.errno == code


def test_droppable_memory_is_refused() -> None:
    with tracked_puppet() as tracked:
        try:
            base = tracked.child.map(2, flags=mman.MAP_DROPPABLE | mman.MAP_ANONYMOUS)
        except OSError:
            pytest.skip("this kernel has no MAP_DROPPABLE (Linux 6.11)")
        _assert_refused(tracked, base, 2, errno.EINVAL)


def test_read_only_shared_file_is_refused() -> None:
    with tracked_puppet() as tracked, tempfile.NamedTemporaryFile() as file:
        file.write(bytes(PAGE))
        file.flush()
        fd = tracked.child.run(os.open, file.name, os.O_RDONLY)
        base = tracked.child.map(1, flags=mman.MAP_SHARED, prot=mman.PROT_READ, fd=fd)
        _assert_refused(tracked, base, 1, errno.EPERM)


def test_range_of_the_targets_own_userfaultfd_is_refused() -> None:
    with tracked_puppet() as tracked:
        base = tracked.child.map(1)
        own = tracked.child.run(open_own_uffd, 0)
        tracked.child.run(
            uffd.register, own, base, PAGE, uffd.UFFDIO_REGISTER_MODE_MISSING
        )
        _assert_refused(tracked, base, 1, errno.EBUSY)


def test_unmapped_range_is_refused() -> None:
    with tracked_puppet() as tracked:
        base = tracked.child.map(1)
        tracked.child.run(mman.munmap, base, PAGE)
        with pytest.raises(OSError, match="UFFDIO_REGISTER"):
            tracked.register(base, 1)


def test_registering_twice_is_harmless_and_keeps_the_protection() -> None:
    with tracked_puppet() as tracked:
        base = tracked.child.map(2)
        tracked.register(base, 2)
        tracked.protect(base, 2)
        tracked.register(base, 2)
        assert tracked.scan(base, 2, **GET_WRITTEN) == []


def _vma_count(pid: int, start: int, end: int) -> int:
    return sum(1 for e in parse_maps(read_maps(pid)) if e.start < end and e.end > start)


def test_registered_neighbours_merge_again_once_unregistered() -> None:
    with tracked_puppet() as tracked:
        child = tracked.child
        base = child.map(8)
        child.run(mman.mprotect, base, PAGE, mman.PROT_NONE)
        child.run(mman.mprotect, base + 7 * PAGE, PAGE, mman.PROT_NONE)
        tracked.register(base + PAGE, 3)
        assert _vma_count(child.pid, base + PAGE, base + 7 * PAGE) == 2
        uffd.unregister(tracked.uffd, base + PAGE, 3 * PAGE)
        assert _vma_count(child.pid, base + PAGE, base + 7 * PAGE) == 1


def test_mremap_across_the_seam_fails_in_the_target() -> None:
    with tracked_puppet() as tracked:
        child = tracked.child
        base = child.map(8)
        tracked.register(base, 4)
        with pytest.raises(OSError, match="mremap") as caught:
            child.run(mman.mremap, base, 8 * PAGE, 16 * PAGE, mman.MREMAP_MAYMOVE)
        assert caught.value.errno == errno.EFAULT
        uffd.unregister(tracked.uffd, base, 4 * PAGE)
        assert child.run(mman.mremap, base, 8 * PAGE, 16 * PAGE, mman.MREMAP_MAYMOVE)


def test_arming_a_sparse_reservation_by_writeprotect_makes_page_tables() -> None:
    # Why trackers arm with PAGEMAP_SCAN and a PRESENT|SWAPPED filter instead.
    with tracked_puppet() as tracked:
        child = tracked.child
        nr = (1 << 30) // PAGE
        base = child.map(nr, flags=ANON | mman.MAP_NORESERVE, prot=mman.PROT_NONE)
        tracked.register(base, nr)
        before = _page_table_bytes(child.pid)
        tracked.scan(
            base,
            nr,
            flags=PM_SCAN_CHECK_WPASYNC | 1,
            category_mask=PAGE_IS_WRITTEN,
            category_anyof_mask=0x18,
            return_mask=PAGE_IS_WRITTEN,
        )
        assert _page_table_bytes(child.pid) - before < 64 * 1024
        tracked.protect(base, nr)
        assert _page_table_bytes(child.pid) - before > 1 << 20


def _page_table_bytes(pid: int) -> int:
    return int(read_status(pid).fields["VmPTE"].split()[0]) * 1024
