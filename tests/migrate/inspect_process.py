"""A full picture of a process from outside, to be compared before and after a migration.

Everything that /proc shows and that a restored process must have in common with the original, as flat text: key to
value, so that a difference reads by itself. Reads procfs and looks at descriptors through a pidfd; changes nothing.
What may differ for good reasons (times, counters, what the kernel hands out) is listed below with the reason.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
from pathlib import Path

Picture = dict[str, str]

_SYS_PIDFD_GETFD = 438
_F_GETSIG, _F_GETPIPE_SZ, _F_GET_SEALS = 11, 1032, 1034

STATUS_DIFFERS = frozenset(
    (
        # Who watches or made it.
        "TracerPid", "PPid", "NSpgid", "NSsid", "Ngid",
        # A descriptor table never shrinks, and the one of the restore had to hold a high number.
        "FDSize",
        # Depends on the moment.
        "State", "voluntary_ctxt_switches", "nonvoluntary_ctxt_switches", "SigQ",
        # How much of the memory is in place by now, and page tables for it.
        "VmPeak", "VmHWM", "VmRSS", "RssAnon", "RssFile", "RssShmem", "VmPTE", "VmSwap", "HugetlbPages",
    )
)  # fmt: skip
"""Lines of a status file that need not match."""

STAT_FIELDS = {
    # Field number in proc_pid_stat(5): name; the first three are split off.
    7: "tty_nr", 9: "flags", 18: "priority", 19: "nice", 20: "num_threads", 23: "vsize", 26: "start_code",
    27: "end_code", 28: "start_stack", 31: "signal", 32: "blocked", 33: "sigignore", 34: "sigcatch",
    38: "exit_signal", 40: "rt_priority", 41: "policy", 45: "start_data", 46: "end_data", 47: "start_brk",
    48: "arg_start", 49: "arg_end", 50: "env_start", 51: "env_end",
}  # fmt: skip

# Task flags that tell a history or a moment, not a property (include/linux/sched.h): PF_SUPERPRIV, PF_RANDOMIZE,
# PF_FORKNOEXEC, PF_SIGNALED, PF_MCE_PROCESS, PF_USED_MATH..., PF_NO_SETAFFINITY is kept.
PF_DIFFERS = 0x00400000 | 0x00000100 | 0x00000040 | 0x00000400 | 0x00000080 | 0x00002000

WHOLE_FILES = (
    "auxv", "cmdline", "environ", "limits", "oom_score_adj", "coredump_filter", "timers", "cgroup",
)  # fmt: skip
LINKS = ("exe", "cwd", "root")
# Inodes of pipes, sockets and memfds are the kernel's to choose, and so are numbers of the mounts they are on.
FDINFO_DIFFERS = re.compile(r"^(mnt_id|ino|scm_fds|eventfd-id):.*\n", re.MULTILINE)
EPOLL_DIFFERS = re.compile(r" (ino|sdev):[0-9a-f]+")
TIMERFD_DIFFERS = re.compile(r"^(it_value): .*\n", re.MULTILINE)
INODE = re.compile(r"\[\d+\]$")
# Huge pages and residency come and go.
SMAPS_KEPT = ("VmFlags", "Size", "KernelPageSize", "MMUPageSize", "Locked", "THPeligible")
SMAPS_HEAD = re.compile(r"^[0-9a-f]+-[0-9a-f]+ ")


def take_picture(proc: Path) -> Picture:
    """Return everything about the process behind ``proc`` (a /proc/PID directory) that should survive.

    :raises OSError: the process ended meanwhile.
    """
    picture: Picture = {}
    for name in WHOLE_FILES:
        picture[name] = _read(proc / name).replace("\0", " ")
    for name in LINKS:
        picture[name] = os.readlink(proc / name)
    picture |= _status(proc / "status", "")
    picture |= _stat(proc / "stat", "")
    for task in sorted((proc / "task").iterdir(), key=lambda path: int(path.name)):
        picture |= _thread(task)
    picture |= _mappings(proc)
    picture |= _descriptors(proc)
    return picture


def differences(before: Picture, after: Picture) -> list[str]:
    """Return one line for each thing that is not the same."""
    found = []
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if old != new:
            found.append(f"{key}: {_short(old)} -> {_short(new)}")
    return found


def _short(text: str | None) -> str:
    return "missing" if text is None else repr(text if len(text) < 300 else text[:297] + "...")


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8", "backslashreplace")
    except (FileNotFoundError, PermissionError, OSError) as err:
        return f"<{type(err).__name__}>"


def _status(path: Path, prefix: str) -> Picture:
    picture = {}
    for line in _read(path).splitlines():
        name, _, value = line.partition(":")
        if name not in STATUS_DIFFERS:
            picture[f"{prefix}status.{name}"] = value.strip()
    return picture


def _stat(path: Path, prefix: str) -> Picture:
    fields = _read(path).rpartition(") ")[2].split()
    picture = {}
    for number, name in STAT_FIELDS.items():
        value = fields[number - 3]
        if name == "flags":
            value = hex(int(value) & ~PF_DIFFERS)
        picture[f"{prefix}stat.{name}"] = value
    return picture


def _thread(task: Path) -> Picture:
    prefix = f"thread {task.name} "
    picture = _status(task / "status", prefix) | _stat(task / "stat", prefix)
    picture[prefix + "comm"] = _read(task / "comm")
    picture[prefix + "personality"] = _read(task / "personality")
    # Of another thread than the leader the file is found under its own number only (root sees it there).
    picture[prefix + "timerslack_ns"] = _read(task.parent.parent.parent / task.name / "timerslack_ns")
    for line in _read(task / "sched").splitlines():
        name, _, value = (word.strip() for word in line.partition(":"))
        if name in ("policy", "prio", "se.slice", "uclamp.min", "uclamp.max", "dl.runtime", "dl.deadline"):
            picture[f"{prefix}sched.{name}"] = value
    return picture


def _mappings(proc: Path) -> Picture:
    picture: Picture = {}
    key = ""
    for line in _read(proc / "smaps").splitlines():
        if SMAPS_HEAD.match(line):
            start_end, perms, offset, _device, inode, *path = line.split(None, 5)
            name = path[0] if path else ""
            # A memfd has a new inode; a file on disk must be the same one.
            shown = "" if name.startswith(("/memfd:", "/dev/zero", "/dev/shm", "/SYSV")) else inode
            key = f"map {start_end}"
            picture[key] = f"{perms} {offset} {shown} {name}"
        else:
            name, _, value = line.partition(":")
            if name in SMAPS_KEPT:
                picture[f"{key} {name}"] = value.strip()
    return picture


def _descriptors(proc: Path) -> Picture:
    picture: Picture = {}
    pid = _pid_to_open(proc)
    pidfd = os.pidfd_open(pid) if pid else -1
    try:
        for number in sorted(map(int, os.listdir(proc / "fd"))):
            link = os.readlink(proc / "fd" / str(number))
            info = FDINFO_DIFFERS.sub("", _read(proc / "fdinfo" / str(number)))
            info = TIMERFD_DIFFERS.sub("", EPOLL_DIFFERS.sub("", info))
            picture[f"fd {number} link"] = INODE.sub("[]", link)
            # The kernel lists what an epoll watches by addresses of its own.
            picture[f"fd {number} info"] = "\n".join(sorted(info.splitlines()))
            if pidfd >= 0:
                picture |= _description(pidfd, number)
    finally:
        if pidfd >= 0:
            os.close(pidfd)
    return picture


def _pid_to_open(proc: Path) -> int:
    """The pid that system calls of ours need for the process behind ``proc``; 0 when it cannot be found."""
    inner, number = (proc / "ns" / "pid").readlink(), _innermost(proc)
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if (entry / "ns" / "pid").readlink() == inner and _innermost(entry) == number:
                return int(entry.name)
        except OSError:
            continue
    return 0


def _innermost(proc: Path) -> str:
    found = re.search(r"^NSpid:.*\t(\d+)$", _read(proc / "status"), re.MULTILINE)
    return found[1] if found else ""


def _description(pidfd: int, number: int) -> Picture:
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(_SYS_PIDFD_GETFD, pidfd, number, 0)
    if fd < 0:
        return {f"fd {number} got": os.strerror(ctypes.get_errno())}
    picture = {}
    try:
        info = os.fstat(fd)
        picture[f"fd {number} mode"] = oct(info.st_mode)
        for name, command in (
            ("flags", fcntl.F_GETFL),
            ("signal", _F_GETSIG),
            ("pipe size", _F_GETPIPE_SZ),
            ("seals", _F_GET_SEALS),
            ("lease", fcntl.F_GETLEASE),
        ):
            try:
                picture[f"fd {number} {name}"] = hex(fcntl.fcntl(fd, command))
            except OSError as err:
                picture[f"fd {number} {name}"] = str(err.errno)
    finally:
        os.close(fd)
    return picture
