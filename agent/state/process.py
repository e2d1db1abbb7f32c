"""What a process has once for all its threads, and the order in which everything of a task is
restored.

The order on the destination (TaskRestore in task.py offers one method per step):

 0. soft limits up to the hard ones, else descriptors with high numbers, big mappings or queued
    signals are refused
 1. early: session and process group; transparent huge pages off before memory is populated
 2. clone: all other threads; choosing ids needs privileges that step 5 drops
 3. process: umask, working and root directory, XSAVE permissions (alternate stacks are measured
    against them), signal dispositions (before any queued signal); no later call names a path.
    The agent writes what only /proc offers: oom_score_adj, coredump_filter
 4. (memory and files are put in place) what concerns future mappings, and last what forbids new
    executable memory
 5. each thread (thread.py), the leader last; with its personality (READ_IMPLIES_EXEC would change
    every mapping made later). In the leader additionally, before its credentials
    are dropped: POSIX timers are made, signals of the process queued (both count against
    RLIMIT_SIGPENDING), then the final limits: raising one needs a capability. After them:
    dumpable, which every change of credentials in any thread resets
 6. the timers are started
 7. ptrace: extended registers, signal mask, general registers

Ids are the process's own. Sources: prctl(2), setsid(2), proc(5).
"""

from __future__ import annotations

import errno
import logging
import os
import re
import struct
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

from agent.errors import DumpError
from agent.kernel.arch.x86_64 import ARCH_GET_XCOMP_PERM, ARCH_REQ_XCOMP_PERM
from agent.kernel.mman import (
    MADV_DONTNEED,
    MAP_ANONYMOUS,
    MAP_PRIVATE,
    MCL_FUTURE,
    MCL_ONFAULT,
    PROT_READ,
    PROT_WRITE,
)
from agent.kernel.prctl import (
    PR_GET_CHILD_SUBREAPER,
    PR_GET_DUMPABLE,
    PR_GET_MDWE,
    PR_GET_MEMORY_MERGE,
    PR_GET_THP_DISABLE,
    PR_SET_CHILD_SUBREAPER,
    PR_SET_DUMPABLE,
    PR_SET_MDWE,
    PR_SET_MEMORY_MERGE,
    PR_SET_THP_DISABLE,
)
from agent.kernel.syscalls import (
    NR_arch_prctl,
    NR_chdir,
    NR_chroot,
    NR_clock_gettime,
    NR_getpgid,
    NR_getpid,
    NR_getsid,
    NR_madvise,
    NR_membarrier,
    NR_mincore,
    NR_mlockall,
    NR_mmap,
    NR_modify_ldt,
    NR_munmap,
    NR_prctl,
    NR_setpgid,
    NR_setsid,
    NR_umask,
)
from agent.kernel.timers import CLOCK_BOOTTIME, CLOCK_MONOTONIC, CLOCK_REALTIME, NS_PER_S
from agent.procfs.process import (
    read_coredump_filter,
    read_cwd,
    read_oom_score_adj,
    read_root,
    read_timens_offsets,
)
from agent.procfs.stat import Stat
from agent.types import PAGE_SIZE
from protocol.state.process import ProcessState

if TYPE_CHECKING:
    from agent.target.inject import Batch, Call

_LOG = logging.getLogger(__name__)
# include/uapi/linux/membarrier.h; since v6.3. Its answer is a mask of the commands that registered.
_MEMBARRIER_CMD_GET_REGISTRATIONS: Final = 1 << 9
_CLOCKS: Final = (CLOCK_MONOTONIC, CLOCK_BOOTTIME, CLOCK_REALTIME)
_UMASK: Final = re.compile(rb"\nUmask:\t([0-7]+)\n")
_TIMESPEC: Final = struct.Struct("=qq")
_SUBREAPER_AT: Final = _TIMESPEC.size * len(_CLOCKS)
_XCOMP_AT: Final = _SUBREAPER_AT + 8
_RESIDENT_AT: Final = _XCOMP_AT + 8
_LDT_AT: Final = _RESIDENT_AT + 8
_LDT_BYTES: Final = 8
_OUT_BYTES: Final = _LDT_AT + _LDT_BYTES
_RW: Final = PROT_READ | PROT_WRITE


class ProcessFiles(NamedTuple):
    """What /proc shows of a stopped process."""

    umask: int
    cwd: str
    root: str
    oom_score_adj: int
    coredump_filter: int
    timens_offsets: Mapping[str, int]


def read_process_files(pid: int, status: bytes) -> ProcessFiles:
    """Read what /proc shows of the stopped process ``pid``; ``status`` is its status file."""
    return ProcessFiles(
        umask=int(_field(status, _UMASK), 8),
        cwd=read_cwd(pid),
        root=read_root(pid),
        oom_score_adj=read_oom_score_adj(pid),
        coredump_filter=read_coredump_filter(pid),
        timens_offsets=_timens_offsets(pid),
    )


def plan_process(batch: Batch, pid: int) -> Callable[[ProcessFiles, int], ProcessState]:
    """Add the calls for what /proc does not show of the process ``pid`` to its leader's batch.

    The result takes what /proc shows, and the signal that the process is stopped by, or 0.
    """
    out = batch.buffer(_OUT_BYTES)
    for index, clock in enumerate(_CLOCKS):
        at = out.at(_TIMESPEC.size * index)
        batch.call(NR_clock_gettime, clock, at, name="clock_gettime")
    own = batch.call(NR_getpid, name="getpid")
    pgid = batch.call(NR_getpgid, 0, name="getpgid")
    sid = batch.call(NR_getsid, 0, name="getsid")
    dumpable = batch.call(NR_prctl, PR_GET_DUMPABLE, name="prctl(PR_GET_DUMPABLE)")
    thp = batch.call(NR_prctl, PR_GET_THP_DISABLE, name="prctl(PR_GET_THP_DISABLE)")
    subreaper = out.at(_SUBREAPER_AT)
    batch.call(NR_prctl, PR_GET_CHILD_SUBREAPER, subreaper, name="prctl(GET_CHILD_SUBREAPER)")
    mdwe = batch.call(NR_prctl, PR_GET_MDWE, name="prctl(PR_GET_MDWE)", check=False)
    merge = batch.call(NR_prctl, PR_GET_MEMORY_MERGE, name="prctl(MEMORY_MERGE)", check=False)
    membarrier = batch.call(
        NR_membarrier, _MEMBARRIER_CMD_GET_REGISTRATIONS, 0, 0, name="membarrier", check=False
    )
    ldt = batch.call(NR_modify_ldt, 0, out.at(_LDT_AT), _LDT_BYTES, name="modify_ldt", check=False)
    # Nothing tells of mlockall(MCL_FUTURE) but what it does: pages of locked memory are not dropped.
    probe = batch.call(
        NR_mmap, 0, PAGE_SIZE, _RW, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0, name="mmap", check=False
    )
    batch.call(NR_mincore, probe, PAGE_SIZE, out.at(_RESIDENT_AT), name="mincore", check=False)
    dropped = batch.call(NR_madvise, probe, PAGE_SIZE, MADV_DONTNEED, name="madvise", check=False)
    batch.call(NR_munmap, probe, PAGE_SIZE, name="munmap", check=False)
    xcomp_at = out.at(_XCOMP_AT)
    batch.call(
        NR_arch_prctl, ARCH_GET_XCOMP_PERM, xcomp_at, name="arch_prctl(XCOMP_PERM)", check=False
    )

    def collect(files: ProcessFiles, stop_signal: int) -> ProcessState:
        raw = out.read()
        # An int, even where the call does not exist.
        if 0 < ldt.result & 0xFFFFFFFF < 1 << 17:
            raise DumpError(
                f"Cannot dump task {pid}: it has a local descriptor table (modify_ldt)",
                hint="programs that run 16-bit or 32-bit code do; they cannot be moved",
            )
        clocks = [s * NS_PER_S + ns for s, ns in _TIMESPEC.iter_unpack(raw[:_SUBREAPER_AT])]
        return ProcessState(
            pid=own.value,
            pgid=pgid.value,
            sid=sid.value,
            umask=files.umask,
            cwd=files.cwd,
            root=files.root,
            oom_score_adj=files.oom_score_adj,
            coredump_filter=files.coredump_filter,
            dumpable=dumpable.value,
            thp_disable=thp.value,
            child_subreaper=any(raw[_SUBREAPER_AT : _SUBREAPER_AT + 4]),
            memory_deny_write_exec=max(0, mdwe.result),
            memory_merge=merge.result > 0,
            xcomp_permission=int.from_bytes(raw[_XCOMP_AT : _XCOMP_AT + 8], "little"),
            mlock_future=_mlock_future(probe.result, dropped.result, raw[_RESIDENT_AT] & 1),
            stop_signal=stop_signal,
            monotonic_offset_ns=files.timens_offsets.get("monotonic", 0),
            boottime_offset_ns=files.timens_offsets.get("boottime", 0),
            clock_monotonic_ns=clocks[0],
            clock_boottime_ns=clocks[1],
            clock_realtime_ns=clocks[2],
            membarrier=max(0, membarrier.result),
        )

    return collect


def _mlock_future(mapped: int, dropped: int, resident: int) -> int:
    # The flags of mlockall(2) that say so, given what became of a new mapping.
    if mapped < 0:
        return MCL_FUTURE if mapped == -errno.EAGAIN else 0  # more than RLIMIT_MEMLOCK
    if dropped != -errno.EINVAL:
        return 0
    return MCL_FUTURE if resident else MCL_FUTURE | MCL_ONFAULT


def _field(status: bytes, pattern: re.Pattern[bytes]) -> bytes:
    match = pattern.search(status)
    if match is None:
        raise DumpError(f"Cannot dump a task whose status does not show {pattern.pattern!r}")
    return match[1]


def _timens_offsets(pid: int) -> dict[str, int]:
    try:
        return read_timens_offsets(pid)
    except FileNotFoundError:
        return {}  # kernel without time namespaces


def session_calls(batch: Batch, state: ProcessState, now: Stat, *, detach: bool) -> None:
    """Add the calls that give a new process its session and group, as far as they can exist
    without their leaders.

    A process of somebody else's session gets one of its own if ``detach``: staying in the agent's
    would tie it to the agent's terminal and its ^C. ``now`` is what the new process has.
    """
    leads_session, leads_group = now.session == now.pid, now.pgrp == now.pid
    if (state.sid == state.pid or detach) and not leads_session:
        if leads_group:
            _LOG.warning("Task %d leads a process group and cannot get its own session", state.pid)
            return
        batch.call(NR_setsid, name="setsid")
    elif state.pgid == state.pid and not leads_group:
        batch.call(NR_setpgid, 0, 0, name="setpgid")


def thp_call(batch: Batch, state: ProcessState) -> None:
    """Add the call that switches transparent huge pages off or on, before memory is populated."""
    # Since Linux kernel commit 9dc21bbd62ed ("prctl: extend PR_SET_THP_DISABLE to optionally
    # exclude VM_HUGEPAGE") (in v6.18), bit 1 of the answer is a flag given as the third argument.
    disable, flags = state.thp_disable & 1, state.thp_disable & ~1
    batch.call(NR_prctl, PR_SET_THP_DISABLE, disable, flags, name="prctl(PR_SET_THP_DISABLE)")


def restore_process_calls(batch: Batch, state: ProcessState) -> None:
    """Add the calls of step 3 of the module's order, but the signal dispositions, to the leader's batch."""
    batch.call(NR_umask, state.umask, name="umask")
    cwd = batch.data(os.fsencode(state.cwd) + b"\0")
    batch.call(NR_chdir, cwd, name=f"chdir({state.cwd})")
    if state.root != "/":
        root = batch.data(os.fsencode(state.root) + b"\0")
        batch.call(NR_chroot, root, name=f"chroot({state.root})")
    if state.child_subreaper:
        batch.call(NR_prctl, PR_SET_CHILD_SUBREAPER, 1, name="prctl(PR_SET_CHILD_SUBREAPER)")
    for feature in range(state.xcomp_permission.bit_length()):
        # Only the features above the classic ones are asked for by name; AMX tile data is 18.
        if feature >= 18 and state.xcomp_permission >> feature & 1:
            batch.call(NR_arch_prctl, ARCH_REQ_XCOMP_PERM, feature, name="arch_prctl(REQ_XCOMP)")
    for bit in range(state.membarrier.bit_length()):
        # Without its registration membarrier(2) fails, which no program that made it expects.
        if state.membarrier >> bit & 1:
            batch.call(NR_membarrier, 1 << bit, 0, 0, name="membarrier(register)")


def future_mappings_calls(batch: Batch, state: ProcessState) -> Call | None:
    """Add the calls of step 4 of the module's order to the leader's batch.

    Returns the one that may fail, if it is made: that for memory_merge.
    """
    merge = None
    if state.memory_merge:
        # Merely a hint to merge equal pages; it needs CAP_SYS_RESOURCE.
        merge = batch.call(NR_prctl, PR_SET_MEMORY_MERGE, 1, name="prctl(MEMORY_MERGE)", check=False)
    if state.mlock_future:
        batch.call(NR_mlockall, state.mlock_future, name="mlockall")
    if state.memory_deny_write_exec:
        batch.call(NR_prctl, PR_SET_MDWE, state.memory_deny_write_exec, name="prctl(PR_SET_MDWE)")
    return merge


def dumpable_call(batch: Batch, state: ProcessState) -> None:
    """Add the call that sets the dumpable flag, after the last change of credentials in any
    thread.
    """
    # 2 (readable by root only) comes from the kernel alone; 0 is the stricter of what can be set.
    batch.call(NR_prctl, PR_SET_DUMPABLE, int(state.dumpable == 1), name="prctl(PR_SET_DUMPABLE)")


class NewFiles(NamedTuple):
    """What a new process has of what only /proc can set."""

    oom_score_adj: int
    coredump_filter: int


def read_new_files(host_pid: int) -> NewFiles:
    """Read it before anything is restored."""
    return NewFiles(read_oom_score_adj(host_pid), read_coredump_filter(host_pid))


def write_process_files(state: ProcessState, host_pid: int, now_has: NewFiles) -> list[str]:
    """Write oom_score_adj and coredump_filter where they differ; returns what was refused."""
    refused = []
    for name, value, now in (
        ("oom_score_adj", str(state.oom_score_adj), now_has.oom_score_adj),
        ("coredump_filter", hex(state.coredump_filter), now_has.coredump_filter),
    ):
        if int(value, 0) == now:
            continue
        try:
            with open(f"/proc/{host_pid}/{name}", "w", encoding="ascii") as file:
                file.write(value)
        except OSError as err:
            refused.append(f"Cannot set {name} to {value}: {err.strerror}")
    return refused


def elapsed_since_freeze_ns(state: ProcessState) -> int:
    """Return how much later than at the freeze it is, by the real-time clocks of the two hosts;
    never negative.

    Only as good as both clocks agree: for hosts kept in step, where timers must keep their
    wall-clock deadlines.
    """
    return max(0, time.time_ns() - state.clock_realtime_ns)
