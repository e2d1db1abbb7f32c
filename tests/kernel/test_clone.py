"""clone3 with chosen pids, namespaces and mounts."""

from __future__ import annotations

import os
import threading

import pytest

from agent.kernel import clone, namespaces
from agent.procfs.process import read_ns
from tests.kernel.support import puppet, skip_unless_root


def _fork_and_wait(flags: int, set_tid: tuple[int, ...]) -> tuple[int, int]:
    pid = clone.fork_with(flags, set_tid=set_tid)
    if pid == 0:
        os._exit(os.getpid() & 0x7F)
    return pid, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _free_pid() -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def test_child_gets_the_chosen_pid() -> None:
    skip_unless_root()
    # Another process may take the number between the two calls: then the kernel says so.
    for _ in range(20):
        wanted = _free_pid()
        try:
            assert _fork_and_wait(0, (wanted,)) == (wanted, wanted & 0x7F)
            return
        except FileExistsError:
            continue
    pytest.fail("20 free pids were taken by others")


def test_pid_in_use_is_refused() -> None:
    skip_unless_root()
    with pytest.raises(FileExistsError, match="clone3"):
        clone.fork_with(set_tid=(os.getpid(),))


def test_child_in_a_new_pid_namespace_is_its_init() -> None:
    skip_unless_root()
    assert _fork_and_wait(clone.CLONE_NEWPID, ())[1] == 1
    assert _fork_and_wait(clone.CLONE_NEWPID, (1,))[1] == 1


def test_child_of_a_threaded_process_can_run_python() -> None:
    with puppet() as child:
        for _ in range(10):
            assert child.run(_fork_beside_busy_thread) == 42


def _fork_beside_busy_thread() -> int:
    stop = threading.Event()
    thread = threading.Thread(target=lambda: all(not stop.is_set() for _ in iter(int, 1)))
    thread.start()
    try:
        pid = clone.fork_with()
        if pid == 0:
            os._exit(sum(range(7)) * 2 if threading.active_count() == 1 else 1)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        stop.set()
        thread.join()


def test_sharing_memory_with_the_agent_is_refused() -> None:
    with pytest.raises(ValueError, match="share memory"):
        clone.fork_with(clone.CLONE_VM)


def test_unshare_and_setns_change_the_namespace_there_and_back() -> None:
    skip_unless_root()
    with puppet() as child:
        before = read_ns(child.pid, "uts")
        keep = child.run(os.open, f"/proc/{child.pid}/ns/uts", os.O_RDONLY)
        child.run(namespaces.unshare, clone.CLONE_NEWUTS)
        assert read_ns(child.pid, "uts") != before
        child.run(namespaces.setns, keep, clone.CLONE_NEWUTS)
        assert read_ns(child.pid, "uts") == before


def test_mounts_in_a_private_namespace_stay_there() -> None:
    skip_unless_root()
    with puppet() as child:
        child.run(namespaces.unshare, clone.CLONE_NEWNS)
        private = namespaces.MS_PRIVATE | namespaces.MS_REC
        child.run(namespaces.mount, "none", "/", "", private)
        child.run(namespaces.mount, "tmpfs", "/mnt", "tmpfs", 0, "size=64k")
        child.run(os.mkdir, "/mnt/only-there")
        assert not os.path.exists("/mnt/only-there")
        child.run(namespaces.umount2, "/mnt", namespaces.MNT_DETACH)
        assert not child.run(os.path.exists, "/mnt/only-there")
