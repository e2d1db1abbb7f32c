"""The readers of agent.procfs against this kernel."""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
import tempfile
import threading

import pytest

from agent.kernel import mman
from agent.kernel.libc import syscall
from agent.kernel.syscalls import NR_recvfrom, NR_signalfd4, NR_timerfd_create
from agent.procfs import fdinfo, files, maps, mountinfo, process, sched, smaps, stat, status
from agent.procfs import syscall as proc_syscall
from tests.kernel.support import PAGE, puppet, skip_or_fail, wait_for


def test_maps_and_smaps_tell_of_the_same_mappings() -> None:
    with puppet() as child:
        child.wait_idle()
        entries = maps.parse_maps(maps.read_maps(child.pid))
        flags = smaps.read_vm_flags(child.pid)
        by_start = {entry.start: entry for entry in entries if entry.path != "[vsyscall]"}
        assert {start for start, _, _ in flags if start < 1 << 63} == set(by_start)
        assert all(("wr" in f) == (by_start[s].perms[1] == "w") for s, _, f in flags if s < 1 << 63)
        assert len(smaps.read_smaps(child.pid)) == len(flags)


def test_stat_and_status_agree_with_the_process() -> None:
    with puppet() as child:
        child.wait_idle()
        found = stat.read_stat(child.pid)
        assert (found.pid, found.ppid, found.state) == (child.pid, os.getpid(), "S")
        assert found.pgrp == os.getpgrp() and found.session == os.getsid(0)
        assert 0 < found.start_code < found.end_code <= found.start_data <= found.start_brk
        assert 0 < found.arg_start < found.arg_end <= found.env_start <= found.env_end
        told = status.read_status(child.pid)
        assert (told.tgid, told.pid, told.ppid) == (child.pid, child.pid, os.getpid())
        assert told.uids == (os.getuid(), os.geteuid(), os.geteuid(), os.geteuid())
        assert told.groups == tuple(sorted(os.getgroups()))
        assert stat.read_task_stat(child.pid, child.pid).comm == found.comm
        assert stat.read_state(child.pid) == found.state
        sets = status.read_signal_sets(child.pid, child.pid)
        assert sets == (told.sig_pnd, told.shd_pnd, told.sig_blk, told.sig_ign, told.sig_cgt)
        assert status.read_task_status(child.pid, child.pid).tgid == child.pid


def test_zombie_is_told() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    try:
        wait_for(lambda: status.read_status(pid).is_zombie, "the child to exit")
        assert maps.read_maps(pid) == b""
        assert process.read_cmdline(pid) == []
    finally:
        os.waitpid(pid, 0)


def test_every_reader_says_process_lookup_error_when_it_is_gone() -> None:
    with puppet() as child:
        pid = child.pid
    for reader in (
        maps.read_maps,
        stat.read_stat,
        status.read_status,
        process.list_tids,
        process.list_fds,
        process.list_children,
        process.read_exe,
        smaps.read_vm_flags,
    ):
        with pytest.raises(ProcessLookupError):
            reader(pid)
    with pytest.raises(ProcessLookupError):
        files.read_bytes(f"/proc/{os.getpid()}/task/{pid}/stat")


def test_missing_file_of_a_live_process_is_file_not_found() -> None:
    with pytest.raises(FileNotFoundError):
        fdinfo.read_fdinfo(os.getpid(), 99999)


def test_threads_and_children_are_listed() -> None:
    with puppet() as child:
        assert process.list_tids(child.pid) == [child.pid]
        assert child.pid in process.list_children(os.getpid())
        assert child.pid in process.list_pids()
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        assert thread.native_id in process.list_tids(os.getpid())
    finally:
        done.set()
        thread.join()


def test_links_and_small_files_are_read() -> None:
    pid = os.getpid()
    assert os.path.samefile(process.read_exe(pid), "/proc/self/exe")
    assert process.read_cwd(pid) == os.getcwd()
    assert process.read_root(pid) == "/"
    assert process.read_ns(pid, "pid").startswith("pid:[")
    assert -1000 <= process.read_oom_score_adj(pid) <= 1000
    assert process.read_timerslack_ns(pid) >= 0
    assert process.read_personality(pid) >= 0
    assert process.read_cmdline(pid)
    kinds = dict(process.parse_auxv(process.read_auxv(pid)))
    assert kinds[6] == PAGE  # AT_PAGESZ


def test_timens_offsets_are_nanoseconds() -> None:
    offsets = process.read_timens_offsets(os.getpid())
    assert set(offsets) <= {"monotonic", "boottime"}


def test_blocked_call_is_told_with_its_arguments() -> None:
    with puppet() as child:
        child.wait_idle()
        info = proc_syscall.read_syscall(child.pid, child.pid)
        assert info is not None and info.nr == NR_recvfrom
        assert len(info.args) == 6


def test_sleeper_tells_when_it_fell_asleep() -> None:
    with puppet() as child:
        child.wait_idle()
        first = sched.exec_start_ns(child.pid, child.pid)
        if first is None:
            skip_or_fail("kernel without CONFIG_SCHED_DEBUG")
        assert sched.exec_start_ns(child.pid, child.pid) == first
        child.run(os.getpid)
        child.wait_idle()
        second = sched.exec_start_ns(child.pid, child.pid)
        assert second is not None and second > first


def test_mountinfo_knows_proc() -> None:
    mounts = mountinfo.read_mountinfo(os.getpid())
    assert any(mount.mount_point == "/proc" and mount.fstype == "proc" for mount in mounts)


def test_fdinfo_of_an_epoll_names_its_targets() -> None:
    ours, theirs = os.pipe()
    with select.epoll() as epoll:
        epoll.register(ours, select.EPOLLIN | select.EPOLLET)
        (target,) = fdinfo.epoll(fdinfo.read_fdinfo(os.getpid(), epoll.fileno()))
        assert (target.tfd, target.ino) == (ours, os.fstat(ours).st_ino)
        assert target.events & select.EPOLLET
    os.close(ours)
    os.close(theirs)


def test_fdinfo_of_a_timerfd_has_its_clock() -> None:
    fd = syscall(NR_timerfd_create, 1, os.O_CLOEXEC)
    try:
        info = fdinfo.read_fdinfo(os.getpid(), fd)
        assert fdinfo.timerfd(info) == (1, 0, 0, 0, 0)
        assert info.cloexec
    finally:
        os.close(fd)


def test_fdinfo_has_locks_and_position() -> None:
    with tempfile.TemporaryFile() as file:
        file.write(b"12345")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        info = fdinfo.read_fdinfo(os.getpid(), file.fileno())
        assert info.pos == 5
        (lock,) = fdinfo.locks(info)
        assert (lock.kind, lock.access, lock.pid, lock.end) == ("FLOCK", "WRITE", os.getpid(), -1)
        assert lock.ino == os.fstat(file.fileno()).st_ino


def test_fdinfo_of_a_signalfd_has_its_mask() -> None:
    mask = ctypes.c_uint64(1 << (signal.SIGUSR1 - 1))
    fd = syscall(NR_signalfd4, 2**64 - 1, ctypes.addressof(mask), 8, 0)
    try:
        assert fdinfo.signalfd(fdinfo.read_fdinfo(os.getpid(), fd)) == mask.value
    finally:
        os.close(fd)


def test_large_maps_are_read_whole() -> None:
    with puppet() as child:
        base = child.map(2000)
        for page in range(0, 2000, 2):
            child.run(_protect, base + page * PAGE)
        entries = maps.parse_maps(maps.read_maps(child.pid))
        inside = [e for e in entries if base <= e.start < base + 2000 * PAGE]
        assert len(inside) >= 1999
        assert all(a.end <= b.start for a, b in zip(entries, entries[1:]))


def _protect(address: int) -> None:
    mman.mprotect(address, PAGE, mman.PROT_READ)
