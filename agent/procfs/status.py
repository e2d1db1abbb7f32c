"""/proc/PID/status and /proc/PID/task/TID/status.

Sizes are bytes, signal sets and capability sets are bit sets (bit n-1 is signal n, bit n is capability n).
Source: proc_pid_status(5).
"""

from __future__ import annotations

import os
import re
from typing import Final, NamedTuple

from agent.procfs.files import read_bytes

_SIGNAL_SETS: Final = re.compile(
    rb"^SigPnd:\t(\w+)\nShdPnd:\t(\w+)\nSigBlk:\t(\w+)\nSigIgn:\t(\w+)\nSigCgt:\t(\w+)\n", re.MULTILINE
)
_VOLUNTARY_SWITCHES: Final = re.compile(rb"^voluntary_ctxt_switches:\s*(\d+)", re.MULTILINE)
_ESCAPE: Final = re.compile(r"\\(n|\\|[0-7]{3})")


class SignalSets(NamedTuple):
    """The signal sets of a task."""

    sig_pnd: int
    shd_pnd: int
    sig_blk: int
    sig_ign: int
    sig_cgt: int


class Status(NamedTuple):
    """The fields Ferry needs, and all of them as text in ``fields``."""

    name: str
    umask: int
    state: str
    """The letter: R, S, D, T, t, Z, X, I."""
    tgid: int
    pid: int
    ppid: int
    tracer_pid: int
    uids: tuple[int, int, int, int]
    """Real, effective, saved, file system."""
    gids: tuple[int, int, int, int]
    groups: tuple[int, ...]
    ns_tgid: tuple[int, ...]
    """Ids from the reader's pid namespace down to the innermost."""
    ns_pid: tuple[int, ...]
    ns_pgid: tuple[int, ...]
    ns_sid: tuple[int, ...]
    threads: int
    sig_pnd: int
    shd_pnd: int
    sig_blk: int
    sig_ign: int
    sig_cgt: int
    cap_inh: int
    cap_prm: int
    cap_eff: int
    cap_bnd: int
    cap_amb: int
    no_new_privs: bool
    seccomp: int
    """0 none, 1 strict, 2 filter."""
    seccomp_filters: int
    thp_enabled: bool
    """False after prctl(PR_SET_THP_DISABLE)."""
    vm_rss_bytes: int
    vm_swap_bytes: int
    vm_size_bytes: int
    cpus_allowed: str
    mems_allowed: str
    x86_thread_features: tuple[str, ...]
    """"shstk" and "wrss" where shadow stacks are on."""
    x86_thread_features_locked: tuple[str, ...]
    fields: dict[str, str]

    @property
    def is_zombie(self) -> bool:
        """Whether the task is dead and waits for its parent."""
        return self.state in "ZX"


def parse_status(data: bytes) -> Status:
    """Parse the text of a status file.

    :raises ValueError: a field that every kernel has is missing.
    """
    fields: dict[str, str] = {}
    for line in os.fsdecode(data).split("\n"):
        name, colon, value = line.partition(":")
        if colon:
            fields[name] = value.strip(" \t")
    try:
        return _from_fields(fields)
    except KeyError as err:
        raise ValueError(f"Not a status file: field {err} is missing") from err


def _from_fields(fields: dict[str, str]) -> Status:
    def integers(name: str, default: str = "") -> tuple[int, ...]:
        return tuple(map(int, fields.get(name, default).split()))

    def number(name: str, default: str = "0") -> int:
        return int(fields.get(name, default))

    def bits(name: str) -> int:
        return int(fields.get(name, "0"), 16)

    def size_bytes(name: str) -> int:
        return int(fields.get(name, "0 kB").split()[0]) * 1024

    uid, euid, suid, fsuid = integers("Uid")
    gid, egid, sgid, fsgid = integers("Gid")
    pid = int(fields["Pid"])
    tgid = int(fields["Tgid"])
    return Status(
        name=_ESCAPE.sub(_unescape, fields["Name"]),
        umask=int(fields.get("Umask", "0"), 8),
        state=fields["State"][:1],
        tgid=tgid,
        pid=pid,
        ppid=int(fields["PPid"]),
        tracer_pid=int(fields["TracerPid"]),
        uids=(uid, euid, suid, fsuid),
        gids=(gid, egid, sgid, fsgid),
        groups=integers("Groups"),
        ns_tgid=integers("NStgid", str(tgid)),
        ns_pid=integers("NSpid", str(pid)),
        ns_pgid=integers("NSpgid"),
        ns_sid=integers("NSsid"),
        threads=number("Threads", "1"),
        sig_pnd=bits("SigPnd"),
        shd_pnd=bits("ShdPnd"),
        sig_blk=bits("SigBlk"),
        sig_ign=bits("SigIgn"),
        sig_cgt=bits("SigCgt"),
        cap_inh=bits("CapInh"),
        cap_prm=bits("CapPrm"),
        cap_eff=bits("CapEff"),
        cap_bnd=bits("CapBnd"),
        cap_amb=bits("CapAmb"),
        no_new_privs=number("NoNewPrivs") != 0,
        seccomp=number("Seccomp"),
        seccomp_filters=number("Seccomp_filters"),
        thp_enabled=number("THP_enabled", "1") != 0,
        vm_rss_bytes=size_bytes("VmRSS"),
        vm_swap_bytes=size_bytes("VmSwap"),
        vm_size_bytes=size_bytes("VmSize"),
        cpus_allowed=fields.get("Cpus_allowed", ""),
        mems_allowed=fields.get("Mems_allowed", ""),
        x86_thread_features=tuple(fields.get("x86_Thread_features", "").split()),
        x86_thread_features_locked=tuple(fields.get("x86_Thread_features_locked", "").split()),
        fields=fields,
    )


def _unescape(match: re.Match[str]) -> str:
    code = match.group(1)
    if code == "n":
        return "\n"
    return "\\" if code == "\\" else chr(int(code, 8))


def read_status(pid: int) -> Status:
    """Return the status of a process.

    :raises ProcessLookupError: it is gone.
    """
    return parse_status(read_bytes(f"/proc/{pid}/status"))


def read_signal_sets(pid: int, tid: int) -> SignalSets:
    """Return the signal sets of one thread; a fraction of what its whole status costs.

    :raises ProcessLookupError: it is gone.
    :raises ValueError: the file says something else.
    """
    return parse_signal_sets(read_task_status_text(pid, tid))


def parse_signal_sets(data: bytes) -> SignalSets:
    """Return the signal sets of a status file.

    :raises ValueError: it is none.
    """
    match = _SIGNAL_SETS.search(data)
    if match is None:
        raise ValueError(f"Not a status file: {data[:80]!r}")
    return SignalSets(*[int(bits, 16) for bits in match.groups()])


def read_voluntary_switches(pid: int, tid: int) -> int:
    """Return how often a thread has gone to sleep; -1 where the kernel does not tell.

    :raises ProcessLookupError: it is gone.
    """
    return parse_voluntary_switches(read_task_status_text(pid, tid))


def parse_voluntary_switches(data: bytes) -> int:
    """Return how often the thread of a status file has gone to sleep; -1 where the kernel does not tell."""
    match = _VOLUNTARY_SWITCHES.search(data)
    return int(match.group(1)) if match else -1


def read_task_status_text(pid: int, tid: int) -> bytes:
    """Return the status of one thread as it stands there, for one of the above.

    :raises ProcessLookupError: it is gone.
    """
    return read_bytes(f"/proc/{pid}/task/{tid}/status")


def read_task_status(pid: int, tid: int) -> Status:
    """Return the status of one thread: signals, credentials and affinity are its own."""
    return parse_status(read_task_status_text(pid, tid))
