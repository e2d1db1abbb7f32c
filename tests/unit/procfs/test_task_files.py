"""Parsers of stat, status, limits, timers, syscall, sched and auxv on texts as kernels write them."""

from __future__ import annotations

import resource
import struct

import pytest

from agent.procfs.limits import RLIM_INFINITY, parse_limits
from agent.procfs.process import parse_auxv
from agent.procfs.sched import parse_sched
from agent.procfs.stat import Stat, parse_stat
from agent.procfs.status import parse_status
from agent.procfs.syscall import parse_syscall
from agent.procfs.timers import PosixTimer, parse_timers

STATUS = b"""\
Name:\ta\\\\b\\nc
Umask:\t0022
State:\tS (sleeping)
Tgid:\t42
Ngid:\t0
Pid:\t43
PPid:\t1
TracerPid:\t7
Uid:\t0\t1\t2\t3
Gid:\t4\t5\t6\t7
FDSize:\t64
Groups:\t10 20 
NStgid:\t42\t2
NSpid:\t43\t3
NSpgid:\t42\t2
NSsid:\t42\t2
VmRSS:\t    9116 kB
Threads:\t2
SigPnd:\t0000000000000001
ShdPnd:\t8000000000000000
SigBlk:\tfffffffe7ffbfeff
SigIgn:\t0000000000001000
SigCgt:\t0000000000000000
CapInh:\t0000000000000000
CapPrm:\t000001ffffffffff
CapEff:\t000001fffeffffff
CapBnd:\t000001ffffffffff
CapAmb:\t0000000000000000
NoNewPrivs:\t1
Seccomp:\t2
Seccomp_filters:\t3
THP_enabled:\t0
x86_Thread_features:\tshstk wrss 
Cpus_allowed_list:\t0-1
"""  # noqa: W291


def _stat_line(comm: bytes) -> bytes:
    return b"42 (" + comm + b") S " + b" ".join(b"%d" % n for n in range(4, 53)) + b"\n"


@pytest.mark.parametrize("comm", [b"cat", b"a b", b"x) R (1 2", b"", b"\xff"])
def test_stat_fields_do_not_depend_on_the_name(comm: bytes) -> None:
    stat = parse_stat(_stat_line(comm))
    assert stat.comm.encode(errors="surrogateescape") == comm
    assert stat.pid == 42 and stat.state == "S"
    # proc_pid_stat(5) numbers the fields from 1
    assert list(stat[3:]) == list(range(4, 53))
    assert (stat.starttime, stat.start_brk, stat.exit_code) == (22, 47, 52)
    assert len(Stat._fields) == 52


@pytest.mark.parametrize("text", [b"", b"42 cat S 1 2 3", b"42 (cat) S 1 2 3"])
def test_text_that_is_no_stat_file_is_a_value_error(text: bytes) -> None:
    with pytest.raises(ValueError):
        parse_stat(text)


def test_status_fields_are_parsed_in_their_bases() -> None:
    status = parse_status(STATUS)
    assert status.name == "a\\b\nc"
    assert (status.umask, status.state) == (0o022, "S")
    assert (status.tgid, status.pid, status.ppid, status.tracer_pid) == (42, 43, 1, 7)
    assert status.uids == (0, 1, 2, 3)
    assert status.gids == (4, 5, 6, 7)
    assert status.groups == (10, 20)
    assert status.ns_pid == (43, 3)
    assert status.vm_rss_bytes == 9116 * 1024
    assert (status.sig_pnd, status.shd_pnd) == (1, 1 << 63)
    assert status.sig_blk == 0xFFFFFFFE7FFBFEFF
    assert status.cap_eff == 0x1FFFEFFFFFF
    assert status.no_new_privs is True
    assert (status.seccomp, status.seccomp_filters) == (2, 3)
    assert status.thp_enabled is False
    assert status.x86_thread_features == ("shstk", "wrss")
    assert status.fields["Cpus_allowed_list"] == "0-1"
    assert not status.is_zombie


def test_status_without_a_field_that_every_kernel_has_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="TracerPid"):
        parse_status(STATUS.replace(b"TracerPid", b"Tracer"))


def test_limits_are_64_bit_numbers() -> None:
    limits = parse_limits(
        b"Limit                     Soft Limit           Hard Limit           Units     \n"
        b"Max cpu time              unlimited            unlimited            seconds   \n"
        b"Max open files            1024                 524288               files     \n"
        b"Max nice priority         0                    0                    \n"
        b"Max flux capacity         1                    1                    jigawatts \n"
    )
    assert limits == {
        resource.RLIMIT_CPU: (RLIM_INFINITY, RLIM_INFINITY),
        resource.RLIMIT_NOFILE: (1024, 524288),
        resource.RLIMIT_NICE: (0, 0),
    }


TIMERS = b"""\
ID: 1
signal: 60/00007fff86e452a8
notify: signal/pid.2634
ClockID: 0
ID: 0
signal: 0/0000000000000000
notify: none/tid.2635
ClockID: -6
"""


def test_timers_are_parsed() -> None:
    assert parse_timers(TIMERS) == [
        PosixTimer(1, 60, 0x7FFF86E452A8, "signal", False, 2634, 0),
        PosixTimer(0, 0, 0, "none", True, 2635, -6),
    ]
    assert parse_timers(b"") == []


def test_timer_that_is_not_understood_is_a_value_error() -> None:
    with pytest.raises(ValueError):
        parse_timers(TIMERS.replace(b"none/", b"none?"))


def test_syscall_tells_running_from_blocked() -> None:
    assert parse_syscall(b"running\n") is None
    info = parse_syscall(b"7 0x1 0x2 0x3 0x4 0x5 0xffffffffffffffff 0x7ffe 0x7f00\n")
    assert info == (7, (1, 2, 3, 4, 5, 2**64 - 1), 0x7FFE, 0x7F00)
    assert parse_syscall(b"-1 0x7ffe 0x7f00\n") == (-1, (), 0x7FFE, 0x7F00)


def test_sched_times_are_nanoseconds() -> None:
    values = parse_sched(
        b"head (5483, #threads: 1)\n-----\n"
        b"se.exec_start                                :       1211310.088948\n"
        b"nr_switches                                  :                    3\n"
        b"se.vruntime                                  :            -0.000001\n"
    )
    assert values == {"se.exec_start": 1211310088948, "nr_switches": 3, "se.vruntime": -1}


def test_auxv_ends_at_at_null() -> None:
    data = struct.pack("=6Q", 33, 0x7FFF0000, 0, 0, 5, 5)
    assert parse_auxv(data) == [(33, 0x7FFF0000)]
