"""kcmp and pidfd wrappers against real descriptors."""

from __future__ import annotations

import os
import select
import signal

import pytest

from agent.kernel import kcmp, pidfd
from tests.kernel.support import fetch_fd, puppet, skip_unless


def test_duplicates_are_the_same_file_and_others_have_an_order() -> None:
    skip_unless("has_kcmp")
    pid = os.getpid()
    first, second = os.pipe()
    copy = os.dup(first)
    try:
        assert kcmp.kcmp_file(pid, pid, first, copy) == 0
        forth, back = kcmp.kcmp_file(pid, pid, first, second), kcmp.kcmp_file(pid, pid, second, first)
        assert {forth, back} == {1, 2}
    finally:
        for fd in (first, second, copy):
            os.close(fd)


def test_fetched_descriptor_is_the_targets_own_open_file() -> None:
    skip_unless("has_pidfd_getfd")
    with puppet() as child:
        theirs = child.run(os.memfd_create, "shared")
        child.run(os.write, theirs, b"12345")
        fd = fetch_fd(child.pid, theirs)
        try:
            assert kcmp.kcmp_file(child.pid, os.getpid(), theirs, fd) == 0
            assert os.lseek(fd, 0, os.SEEK_CUR) == 5
            assert not os.get_inheritable(fd)
        finally:
            os.close(fd)


def test_missing_descriptor_is_ebadf() -> None:
    with puppet() as child:
        with pytest.raises(OSError, match="Bad file descriptor"):
            fetch_fd(child.pid, 999)
        with pytest.raises(OSError, match="Bad file descriptor"):
            kcmp.kcmp_file(child.pid, child.pid, 999, 0)


def test_processes_share_nothing_after_fork() -> None:
    skip_unless("has_kcmp")
    with puppet() as child:
        kinds = (kcmp.KCMP_VM, kcmp.KCMP_FILES, kcmp.KCMP_FS, kcmp.KCMP_SIGHAND)
        for kind in kinds:
            assert kcmp.kcmp(child.pid, child.pid, kind) == 0
            assert kcmp.kcmp(child.pid, os.getpid(), kind) in (1, 2)


def test_epoll_target_is_identified_though_its_number_was_reused() -> None:
    skip_unless("has_kcmp")
    pid = os.getpid()
    first, second = os.pipe()
    epoll = select.epoll()
    keep = os.dup(first)
    try:
        epoll.register(first, select.EPOLLIN)
        assert kcmp.kcmp_epoll_tfd(pid, pid, first, epoll.fileno(), first) == 0
        os.dup2(second, first)
        assert kcmp.kcmp_epoll_tfd(pid, pid, first, epoll.fileno(), first) != 0
        assert kcmp.kcmp_epoll_tfd(pid, pid, keep, epoll.fileno(), first) == 0
        with pytest.raises(FileNotFoundError):
            kcmp.kcmp_epoll_tfd(pid, pid, keep, epoll.fileno(), first, 1)
    finally:
        epoll.close()
        for fd in (first, second, keep):
            os.close(fd)


def test_signal_by_pidfd_reaches_the_process() -> None:
    with puppet() as child:
        handle = os.pidfd_open(child.pid)
        try:
            pidfd.pidfd_send_signal(handle, 0)
            child.run(signal.pthread_sigmask, signal.SIG_BLOCK, {signal.SIGUSR2})
            pidfd.pidfd_send_signal(handle, signal.SIGUSR2)
            assert child.run(signal.sigpending) == {signal.SIGUSR2}
            child.close()
            with pytest.raises(ProcessLookupError):
                pidfd.pidfd_send_signal(handle, 0)
        finally:
            os.close(handle)
