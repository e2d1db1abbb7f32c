"""What a process has once for all its threads and that is neither memory, files, signals, timers
nor limits.

Ids are those that the process itself sees (its own pid namespace). Clock readings are the
process's own clocks at the freeze, in nanoseconds: its time namespace's offsets are included.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.state import register

MAX_PATH_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessState:
    """One process.

    ``membarrier`` are the registration commands of membarrier(2) that were given, as a bit mask.
    ``mlock_future`` are the flags of mlockall(2) that say so of mappings to come, 0 without.
    ``cwd`` and ``root`` are as the agent's root directory shows them. ``xcomp_permission`` are the
    dynamically enabled XSAVE features (arch_prctl ARCH_REQ_XCOMP_PERM). ``stop_signal`` is the
    signal that had stopped the whole process when Ferry came (SIGSTOP, SIGTSTP...), 0 when it ran.
    """

    pid: int
    pgid: int
    sid: int
    umask: int
    cwd: str
    root: str
    oom_score_adj: int
    coredump_filter: int
    dumpable: int
    thp_disable: int
    child_subreaper: bool
    memory_deny_write_exec: int
    memory_merge: bool
    xcomp_permission: int
    stop_signal: int
    monotonic_offset_ns: int
    boottime_offset_ns: int
    clock_monotonic_ns: int
    clock_boottime_ns: int
    clock_realtime_ns: int
    membarrier: int = 0
    mlock_future: int = 0

    def __post_init__(self) -> None:
        if self.pid <= 0:
            raise ValueError(f"process id {self.pid} is not positive")
        for name, path in (("cwd", self.cwd), ("root", self.root)):
            if not path.startswith("/") or "\0" in path or len(path) > MAX_PATH_BYTES:
                raise ValueError(f"{name} {path[:80]!r} is not an absolute path")
        if not 0 <= self.umask <= 0o777:
            raise ValueError(f"umask {self.umask:#o} is out of range")
        if not -1000 <= self.oom_score_adj <= 1000:
            raise ValueError(f"oom_score_adj {self.oom_score_adj} is out of range")
        if self.dumpable not in (0, 1, 2):
            raise ValueError(f"dumpable {self.dumpable} is unknown")
        if self.mlock_future not in (0, 2, 6):
            raise ValueError(f"flags {self.mlock_future:#x} of mlockall are unknown")


register("process", ProcessState, version_id=1, minimum_version_id=1)
