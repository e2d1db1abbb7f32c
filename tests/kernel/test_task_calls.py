"""Scheduling, futex, timer and prctl wrappers, and the restoring facts about limits and timers."""

from __future__ import annotations

import ctypes
import os
import resource
import signal

import pytest

from agent.kernel import futex, prctl, sched, siginfo, timers
from agent.kernel.libc import syscall
from agent.kernel.syscalls import NR_rt_sigaction, NR_timer_create, NR_timer_settime
from agent.procfs.limits import RLIM_INFINITY, read_limits
from agent.procfs.status import read_status
from agent.procfs.timers import PosixTimer, read_timers
from tests.kernel.support import become_nobody, puppet, skip_unless, skip_unless_root


def test_scheduling_attributes_survive_a_round_trip() -> None:
    with puppet() as child:
        attr = sched.getattr(child.pid)
        assert attr.size >= 48
        attr.sched_policy, attr.sched_nice = sched.SCHED_BATCH, 5
        sched.setattr(child.pid, attr)
        again = sched.getattr(child.pid)
        assert (again.sched_policy, again.sched_nice) == (sched.SCHED_BATCH, 5)


def test_io_priority_survives_a_round_trip() -> None:
    with puppet() as child:
        best_effort_six = 2 << 13 | 6
        sched.ioprio_set(child.pid, best_effort_six)
        assert sched.ioprio_get(child.pid) == best_effort_six


def test_robust_list_is_the_one_glibc_registered() -> None:
    with puppet() as child:
        theirs = futex.get_robust_list(child.pid)
        assert theirs == child.run(futex.get_robust_list, 0)
        assert theirs.length == 24


def test_robust_list_of_a_missing_thread_is_a_process_lookup_error() -> None:
    with puppet() as child:
        pid = child.pid
    with pytest.raises(ProcessLookupError):
        futex.get_robust_list(pid)


def test_prctl_reads_and_writes() -> None:
    with puppet() as child:
        child.run(prctl.prctl, prctl.PR_SET_TIMERSLACK, 123456)
        assert child.run(prctl.prctl, prctl.PR_GET_TIMERSLACK) == 123456
        with pytest.raises(OSError, match="system call 157"):
            child.run(prctl.prctl, 99999)


def test_sigaction_has_the_kernels_layout() -> None:
    with puppet() as child:
        child.run(signal.signal, signal.SIGUSR1, signal.SIG_IGN)
        assert child.run(_handler_of, signal.SIGUSR1) == siginfo.SIG_IGN
        assert child.run(_handler_of, signal.SIGUSR2) == siginfo.SIG_DFL


def _handler_of(signo: int) -> int:
    action = siginfo.kernel_sigaction()
    syscall(NR_rt_sigaction, signo, 0, ctypes.addressof(action), siginfo.SIGSET_BYTES)
    handler: int = action.sa_handler
    return handler


def test_timer_ids_can_be_chosen() -> None:
    skip_unless("has_timer_restore_ids")
    with puppet() as child:
        child.run(prctl.prctl, prctl.PR_TIMER_CREATE_RESTORE_IDS, 1)
        assert child.run(_create_timer, 4711) == 4711
        child.run(prctl.prctl, prctl.PR_TIMER_CREATE_RESTORE_IDS, 0)
        assert child.run(_create_timer, 0) != 0
        first = min(read_timers(child.pid), key=lambda timer: timer.id != 4711)
        assert first == PosixTimer(
            4711, signal.SIGUSR1, 0x1234, "signal", False, child.pid, timers.CLOCK_MONOTONIC
        )


def _create_timer(wanted: int) -> int:
    event = timers.sigevent(0x1234, signal.SIGUSR1, timers.SIGEV_SIGNAL)
    number = ctypes.c_int(wanted)
    clock = timers.CLOCK_MONOTONIC
    syscall(NR_timer_create, clock, ctypes.addressof(event), ctypes.addressof(number))
    spec = timers.itimerspec(timers.timespec.from_ns(0), timers.timespec.from_ns(10**12))
    assert spec.it_value.ns == 10**12
    syscall(NR_timer_settime, number.value, 0, ctypes.addressof(spec), 0)
    return number.value


def test_limits_of_another_user_are_readable_by_proc() -> None:
    skip_unless_root()
    with puppet() as child:
        child.run(resource.setrlimit, resource.RLIMIT_NOFILE, (77, 99))
        child.run(become_nobody)
        limits = read_limits(child.pid)
        assert limits[resource.RLIMIT_NOFILE] == (77, 99)
        assert len(limits) == 16
        assert limits[resource.RLIMIT_FSIZE].hard == RLIM_INFINITY


def test_setting_limits_of_another_user_needs_cap_sys_resource() -> None:
    skip_unless_root()
    with puppet() as child:
        child.run(become_nobody)
        has_cap = _effective_capabilities() >> 24 & 1
        try:
            resource.prlimit(child.pid, resource.RLIMIT_NOFILE)
        except PermissionError:
            assert not has_cap
        else:
            assert has_cap


def _effective_capabilities() -> int:
    return read_status(os.getpid()).cap_eff


def test_signal_sets_are_kernel_bit_sets() -> None:
    assert siginfo.sigset((1, 64)) == 1 | 1 << 63
    assert siginfo.signals_of(1 | 1 << 63) == [1, 64]


def test_siginfo_survives_making_and_parsing() -> None:
    raw = siginfo.make_siginfo(34, siginfo.SI_QUEUE, 12, 1000, 2**64 - 1)
    assert len(raw) == 128
    assert siginfo.parse_siginfo(raw) == (34, 0, -1, 12, 1000, 2**64 - 1)
