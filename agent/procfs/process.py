"""The small files and directories of /proc/PID: threads, children, descriptors, command line, auxv, links.

Lists are snapshots: the target may change them at once. Source: proc(5).
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

from agent.procfs.files import raise_if_gone, read_bytes, read_link, read_text
from agent.types import Pid, Tid


def _list_numbers(path: str) -> list[int]:
    try:
        return sorted(map(int, os.listdir(path)))
    except FileNotFoundError:
        raise_if_gone(path)
        raise


def list_pids() -> list[Pid]:
    """Return every process of this pid namespace."""
    return [Pid(int(name)) for name in os.listdir("/proc") if name.isdecimal()]


def list_tids(pid: int) -> list[Tid]:
    """Return the threads of ``pid`` in ascending order.

    :raises ProcessLookupError: the process is gone.
    """
    return [Tid(tid) for tid in _list_numbers(f"/proc/{pid}/task")]


def list_fds(pid: int) -> list[int]:
    """Return the open descriptors in ascending order."""
    return _list_numbers(f"/proc/{pid}/fd")


def list_children(pid: int) -> list[Pid]:
    """Return the children of all threads of ``pid``, zombies included.

    Exact only while the children are stopped. :raises FileNotFoundError: kernel without CONFIG_PROC_CHILDREN.
    """
    children: list[Pid] = []
    for tid in list_tids(pid):
        try:
            text = read_bytes(f"/proc/{pid}/task/{tid}/children")
        except ProcessLookupError:
            continue  # the thread ended; its children went to another
        children += [Pid(int(word)) for word in text.split()]
    return sorted(children)


class AuxvEntry(NamedTuple):
    """One pair of the auxiliary vector: AT_* and its value."""

    kind: int
    value: int


def read_auxv(pid: int) -> bytes:
    """Return the raw auxiliary vector, up to and with AT_NULL."""
    return read_bytes(f"/proc/{pid}/auxv")


def parse_auxv(data: bytes) -> list[AuxvEntry]:
    """Split a raw auxiliary vector; AT_NULL (0) ends it and is not returned."""
    entries = []
    for kind, value in struct.iter_unpack("=QQ", data[: len(data) // 16 * 16]):
        if kind == 0:
            break
        entries.append(AuxvEntry(kind, value))
    return entries


def read_cmdline(pid: int) -> list[bytes]:
    """Return the arguments; empty for a zombie or a kernel thread."""
    data = read_bytes(f"/proc/{pid}/cmdline")
    return data.removesuffix(b"\0").split(b"\0") if data else []


def read_environ(pid: int) -> list[bytes]:
    """Return the initial environment, one NAME=value each."""
    data = read_bytes(f"/proc/{pid}/environ")
    return data.removesuffix(b"\0").split(b"\0") if data else []


def read_exe(pid: int) -> str:
    """Return the path of the program, with " (deleted)" after it if it was unlinked."""
    return read_link(f"/proc/{pid}/exe")


def read_cwd(pid: int) -> str:
    """Return the working directory."""
    return read_link(f"/proc/{pid}/cwd")


def read_root(pid: int) -> str:
    """Return the root directory."""
    return read_link(f"/proc/{pid}/root")


def read_fd_link(pid: int, fd: int) -> str:
    """Return what /proc/PID/fd/FD points to: a path, "pipe:[inode]", "anon_inode:[eventfd]", ..."""
    return read_link(f"/proc/{pid}/fd/{fd}")


def read_ns(pid: int, kind: str) -> str:
    """Return the identity of a namespace ("pid", "mnt", "time", ...), as in "pid:[4026531836]"."""
    return read_link(f"/proc/{pid}/ns/{kind}")


def read_comm(pid: int, tid: int) -> bytes:
    """Return the name of a thread, at most 15 bytes."""
    return read_bytes(f"/proc/{pid}/task/{tid}/comm").removesuffix(b"\n")


def read_wchan(pid: int, tid: int) -> str:
    """Return the kernel function a thread sleeps in, or "0"."""
    return read_text(f"/proc/{pid}/task/{tid}/wchan")


def read_oom_score_adj(pid: int) -> int:
    """Return the out-of-memory adjustment, -1000 to 1000."""
    return int(read_bytes(f"/proc/{pid}/oom_score_adj"))


def read_personality(pid: int) -> int:
    """Return the personality(2) bits."""
    return int(read_bytes(f"/proc/{pid}/personality"), 16)


def read_coredump_filter(pid: int) -> int:
    """Return the core dump filter bits, core(5)."""
    return int(read_bytes(f"/proc/{pid}/coredump_filter") or b"0", 16)


def read_timerslack_ns(pid: int) -> int:
    """Return the timer slack of a thread (named by its tid), in ns."""
    return int(read_bytes(f"/proc/{pid}/timerslack_ns"))


def read_timens_offsets(pid: int) -> dict[str, int]:
    """Return the offsets in ns of the time namespace for children, by "monotonic" and "boottime"."""
    offsets = {}
    for line in read_text(f"/proc/{pid}/timens_offsets").splitlines():
        clock, seconds, nanoseconds = line.split()
        offsets[clock] = int(seconds) * 1_000_000_000 + int(nanoseconds)
    return offsets
