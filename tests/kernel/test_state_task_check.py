"""check_task() names each kind of obstacle, all at once, and leaves the target alone."""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import threading
from typing import cast

from agent.kernel import ptrace
from agent.kernel.clone import CLONE_FILES, CLONE_NEWNET
from agent.kernel.libc import syscall
from agent.kernel.namespaces import unshare
from agent.kernel.prctl import PR_SET_NO_NEW_PRIVS, prctl
from agent.kernel.syscalls import NR_exit, NR_shmat, NR_shmctl, NR_shmget, NR_timer_create
from agent.state.check_task import check_task
from agent.state.context import DumpContext
from agent.types import Pid
from tests.kernel.support import puppet, seize_and_stop, skip_unless_root, wait_for


def obstacles_of(pid: int) -> dict[str, str]:
    """Return kind -> text of what check_task() finds."""
    ctx = cast(DumpContext, type("Ctx", (), {"pid": Pid(pid)}))
    found = check_task(ctx)
    assert all(obstacle.detail for obstacle in found)
    return {obstacle.kind: str(obstacle) for obstacle in found if obstacle.kind != "terminal"}


def test_plain_process_has_no_obstacle() -> None:
    with puppet() as child:
        assert obstacles_of(child.pid) == {}


def fork_and_wait() -> int:
    pid = os.fork()
    if pid == 0:
        signal.pause()
    return pid


def test_children_are_an_obstacle() -> None:
    with puppet() as child:
        grandchild = child.run(fork_and_wait)
        try:
            assert str(grandchild) in obstacles_of(child.pid)["process-tree"]
        finally:
            os.kill(grandchild, signal.SIGKILL)


def test_another_tracer_is_an_obstacle() -> None:
    with puppet() as child, puppet() as debugger:
        debugger.run(ptrace.seize, child.pid)
        assert str(debugger.pid) in obstacles_of(child.pid)["traced"]


def test_our_own_tracing_is_not() -> None:
    with puppet() as child:
        child.wait_idle()
        seize_and_stop(child.pid)
        assert obstacles_of(child.pid) == {}


def confine() -> None:
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    allow = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000))
    program = ctypes.create_string_buffer(struct.pack("=H6xQ", 1, ctypes.addressof(allow)))
    prctl(22, 2, ctypes.addressof(program))


def test_seccomp_filter_is_an_obstacle() -> None:
    with puppet() as child:
        child.run(confine)
        assert "1 filters" in obstacles_of(child.pid)["seccomp"]


def start_unshared_thread() -> None:
    ready = threading.Event()

    def run() -> None:
        unshare(CLONE_FILES)
        ready.set()
        signal.pause()

    threading.Thread(target=run, daemon=True).start()
    ready.wait()


def test_thread_with_its_own_descriptors_is_an_obstacle() -> None:
    with puppet() as child:
        child.run(start_unshared_thread)
        assert "descriptor table" in obstacles_of(child.pid)["unshared-thread"]


def go_to_deleted_directory(path: str) -> None:
    os.mkdir(path)
    os.chdir(path)
    os.rmdir(path)


def test_deleted_directory_and_foreign_network_are_reported_together(tmp_path: str) -> None:
    skip_unless_root()
    with puppet() as child:
        child.run(go_to_deleted_directory, os.path.join(tmp_path, "gone"))
        child.run(unshare, CLONE_NEWNET)
        found = obstacles_of(child.pid)
        assert found.keys() == {"directory", "namespace"}
        assert "was deleted" in found["directory"]
        assert "nsenter" in found["namespace"]


def attach_sysv_segment() -> None:
    segment = syscall(NR_shmget, 0, 4096, 0o600)
    syscall(NR_shmat, segment, 0, 0)
    syscall(NR_shmctl, segment, 0, 0)  # IPC_RMID: it goes with the process


def test_system_v_memory_is_an_obstacle() -> None:
    with puppet() as child:
        child.run(attach_sysv_segment)
        assert "sysv-shm" in obstacles_of(child.pid)


def make_cpu_timer_of_unknown_thread() -> None:
    event = ctypes.create_string_buffer(struct.pack("=Qii48x", 0, 34, 0))
    ident = ctypes.c_int()
    syscall(NR_timer_create, 3, ctypes.addressof(event), ctypes.addressof(ident))
    threading.Thread(target=signal.pause, daemon=True).start()


def test_thread_cpu_timer_in_a_process_with_threads_is_an_obstacle() -> None:
    with puppet() as child:
        child.run(make_cpu_timer_of_unknown_thread)
        assert "timer" in obstacles_of(child.pid)


def test_exited_leader_with_live_threads_is_an_obstacle() -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        ready = threading.Event()

        def run() -> None:
            ready.set()
            os.read(reader, 1)
            os._exit(0)

        os.close(writer)
        threading.Thread(target=run, daemon=True).start()
        ready.wait()
        syscall(NR_exit, 0)
    os.close(reader)

    def leader_is_zombie() -> bool:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2][:1] == b"Z"

    wait_for(leader_is_zombie, "the leader to exit")
    assert "main thread" in obstacles_of(pid)["task"]
    os.close(writer)
    os.waitpid(pid, 0)


def test_kernel_thread_and_the_agent_itself_are_refused() -> None:
    assert "agent" in obstacles_of(os.getpid())["task"]
    if os.path.exists("/proc/2/stat"):
        assert "kernel thread" in obstacles_of(2)["task"]


def test_checking_leaves_the_target_untraced() -> None:
    with puppet() as child:
        obstacles_of(child.pid)
        with open(f"/proc/{child.pid}/status", encoding="ascii") as file:
            assert "TracerPid:\t0\n" in file.read()
