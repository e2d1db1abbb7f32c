"""The ptrace and waitpid wrappers against a real child."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time

import pytest

from agent.kernel import ptrace, siginfo, wait
from agent.kernel.arch import NT_X86_XSTATE
from agent.kernel.libc import syscall
from agent.kernel.syscalls import (
    NR_clock_nanosleep,
    NR_nanosleep,
    NR_recvfrom,
    NR_restart_syscall,
    NR_rt_sigqueueinfo,
)
from agent.procfs.status import read_status
from tests.kernel.support import (
    blocked_in,
    puppet,
    seize_and_stop,
    stopped_child,
    wait_for,
    wait_stop,
)


def test_seized_child_stops_in_its_system_call() -> None:
    with stopped_child() as child:
        regs = ptrace.getregs(child.pid)
        assert regs.orig_rax == NR_recvfrom
        assert regs.result == -512  # ERESTARTSYS
        assert read_status(child.pid).tracer_pid == os.getpid()
        ptrace.detach(child.pid)
        assert child.run(os.getpid) == child.pid
        assert read_status(child.pid).tracer_pid == 0


def test_registers_carry_all_64_bits() -> None:
    with stopped_child() as child:
        regs = ptrace.getregs(child.pid)
        changed = regs.copy()
        changed.r15 = 0xFFFF_0123_4567_89AB
        changed.rax = 2**64 - 514
        ptrace.setregs(child.pid, changed)
        assert ptrace.getregs(child.pid) == changed
        assert changed.result == -514
        ptrace.setregs(child.pid, regs)
        ptrace.detach(child.pid)
        assert child.run(os.getpid) == child.pid


def test_register_copy_is_independent() -> None:
    with stopped_child() as child:
        regs = ptrace.getregs(child.pid)
        other = regs.copy()
        other.rip += 2
        assert regs != other
        assert len(regs.to_bytes()) == 216


def test_xstate_survives_a_round_trip() -> None:
    with stopped_child() as child:
        xstate = ptrace.getregset(child.pid, NT_X86_XSTATE)
        assert len(xstate) >= 576
        ptrace.setregset(child.pid, NT_X86_XSTATE, bytearray(xstate))
        assert ptrace.getregset(child.pid, NT_X86_XSTATE) == xstate


def test_signal_mask_carries_all_64_bits() -> None:
    with stopped_child() as child:
        ptrace.setsigmask(child.pid, siginfo.ALL_SIGNALS)
        unblockable = siginfo.sigset((signal.SIGKILL, signal.SIGSTOP))
        assert ptrace.getsigmask(child.pid) == siginfo.ALL_SIGNALS & ~unblockable
        assert read_status(child.pid).sig_blk == siginfo.ALL_SIGNALS & ~unblockable
        ptrace.setsigmask(child.pid, 0)
        assert ptrace.getsigmask(child.pid) == 0


def test_queued_signals_are_peeked_in_order_and_stay() -> None:
    with puppet() as child:
        realtime = signal.SIGRTMIN
        child.run(signal.pthread_sigmask, signal.SIG_BLOCK, {realtime, signal.SIGUSR1})
        for value in range(70):  # more than one call's worth
            raw = siginfo.make_siginfo(realtime, siginfo.SI_QUEUE, os.getpid(), 0, value)
            _queue(child.pid, realtime, raw)
        seize_and_stop(child.pid)
        for _ in range(2):
            queued = ptrace.peeksiginfo(child.pid, shared=True)
            assert [siginfo.parse_siginfo(raw).value for raw in queued] == list(range(70))
            assert {len(raw) for raw in queued} == {128}
        assert ptrace.peeksiginfo(child.pid, shared=False) == []


def _queue(pid: int, signo: int, raw: bytes) -> None:
    buffer = ctypes.create_string_buffer(raw, len(raw))
    syscall(NR_rt_sigqueueinfo, pid, signo, ctypes.addressof(buffer))


def test_signal_delivery_stop_shows_the_signal_and_can_swallow_it() -> None:
    with puppet() as child:
        child.wait_idle()
        ptrace.seize(child.pid, 0)
        os.kill(child.pid, signal.SIGTERM)
        status = wait_stop(child.pid)
        assert wait.stop_signal(status) == signal.SIGTERM
        assert wait.ptrace_event(status) == 0
        info = siginfo.parse_siginfo(ptrace.getsiginfo(child.pid))
        assert (info.signo, info.pid) == (signal.SIGTERM, os.getpid())
        ptrace.setsiginfo(child.pid, ptrace.getsiginfo(child.pid))
        ptrace.cont(child.pid)
        assert child.run(os.getpid) == child.pid


def test_setsiginfo_refuses_a_wrong_length() -> None:
    with pytest.raises(ValueError, match="127"):
        ptrace.setsiginfo(1, bytes(127))


def test_system_call_stops_are_marked_at_entry_and_exit() -> None:
    with stopped_child() as child:
        ptrace.cont_to_syscall(child.pid)
        status = wait_stop(child.pid)  # the interrupted read is entered again
        assert wait.is_syscall_stop(status)
        assert ptrace.getregs(child.pid).orig_rax == NR_recvfrom
        assert ptrace.getregs(child.pid).result == -38  # ENOSYS stands there until the call is made


def test_group_stop_is_told_from_an_interrupt() -> None:
    with puppet() as child:
        child.wait_idle()
        ptrace.seize(child.pid, 0)
        os.kill(child.pid, signal.SIGSTOP)
        status = wait_stop(child.pid)
        assert wait.stop_signal(status) == signal.SIGSTOP and not wait.is_group_stop(status)
        ptrace.cont(child.pid, signal.SIGSTOP)
        status = wait_stop(child.pid)
        assert wait.is_group_stop(status)
        ptrace.listen(child.pid)
        os.kill(child.pid, signal.SIGCONT)
        assert wait.ptrace_event(wait_stop(child.pid)) == ptrace.PTRACE_EVENT_STOP
        ptrace.cont(child.pid)
        status = wait_stop(child.pid)
        assert wait.stop_signal(status) == signal.SIGCONT
        ptrace.detach(child.pid, signal.SIGCONT)
        assert child.run(os.getpid) == child.pid


def test_clone_event_names_the_new_thread() -> None:
    with stopped_child(ptrace.PTRACE_O_TRACECLONE | ptrace.PTRACE_O_TRACEFORK) as child:
        child.start(_fork_and_reap)
        ptrace.cont(child.pid)
        status = wait_stop(child.pid)
        assert wait.ptrace_event(status) in (ptrace.PTRACE_EVENT_FORK, ptrace.PTRACE_EVENT_CLONE)
        new = ptrace.geteventmsg(child.pid)
        assert wait.ptrace_event(wait_stop(new)) == ptrace.PTRACE_EVENT_STOP
        ptrace.detach(new)
        ptrace.detach(child.pid)
        assert child.finish() == new


def _fork_and_reap() -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    return os.waitpid(pid, 0)[0]


def test_rseq_configuration_is_that_of_glibc_or_none() -> None:
    with stopped_child() as child:
        config = ptrace.get_rseq_configuration(child.pid)
        if config is not None:
            assert config.addr % 32 == 0
            assert config.size >= 20
            assert config.sig == 0x53053053


def test_request_on_a_thread_that_is_gone_is_a_process_lookup_error() -> None:
    with puppet() as child:
        pid = child.pid
    with pytest.raises(ProcessLookupError, match=f"PTRACE_GETREGS.* {pid}"):
        ptrace.getregs(pid)
    with pytest.raises(ChildProcessError):
        wait.waitpid4(pid)


def test_waiting_without_hanging_returns_none_while_nothing_happened() -> None:
    with puppet() as child:
        child.wait_idle()
        assert wait.waitpid4(child.pid, wait.WNOHANG) is None


def test_exit_and_kill_are_told_from_stops() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(3)
    _, status = os.waitpid(pid, 0)
    assert wait.exited(status) and wait.stop_signal(status) is None
    assert wait.exited(signal.SIGKILL)
    assert not wait.exited(0xFFFF)


def test_detached_sleep_keeps_its_deadline() -> None:
    # The kernel keeps the remaining time itself when the registers are left alone.
    with puppet() as child:
        child.start(_timed_sleep, 0.3)
        wait_for(lambda: _sleeps(child.pid), "the child to sleep")
        seize_and_stop(child.pid)
        assert ptrace.getregs(child.pid).result == -516  # ERESTART_RESTARTBLOCK
        ptrace.detach(child.pid)
        slept = child.finish()
        assert 0.3 <= slept < 0.6


def _timed_sleep(seconds: float) -> float:
    begin = time.monotonic()
    ctypes.CDLL(None).usleep(int(seconds * 1e6))
    return time.monotonic() - begin


def _sleeps(pid: int) -> bool:
    return blocked_in(pid) in (NR_nanosleep, NR_clock_nanosleep, NR_restart_syscall)


def test_stopped_target_goes_on_when_its_tracer_dies() -> None:
    with puppet() as target, puppet() as tracer:
        target.wait_idle()
        tracer.run(seize_and_stop, target.pid, ptrace.PTRACE_O_TRACESYSGOOD)
        assert read_status(target.pid).state == "t"
        tracer.close()
        assert target.run(os.getpid) == target.pid
        assert read_status(target.pid).tracer_pid == 0


def test_armed_system_call_stop_is_harmless_when_the_tracer_dies() -> None:
    with puppet() as target, puppet() as tracer:
        target.wait_idle()
        tracer.run(seize_and_stop, target.pid, ptrace.PTRACE_O_TRACESYSGOOD)
        tracer.run(ptrace.cont_to_syscall, target.pid)
        tracer.close()
        assert target.run(os.getpid) == target.pid
        assert read_status(target.pid).tracer_pid == 0


def test_exitkill_takes_the_target_along() -> None:
    with puppet() as target, puppet() as tracer:
        target.wait_idle()
        tracer.run(seize_and_stop, target.pid, ptrace.PTRACE_O_EXITKILL)
        tracer.close()
        wait_for(lambda: read_status(target.pid).is_zombie, "the target to be killed")


def test_request_from_another_thread_than_the_tracers_is_refused() -> None:
    with stopped_child() as child:
        errors: list[OSError] = []

        def ask() -> None:
            try:
                ptrace.getregs(child.pid)
            except OSError as err:
                errors.append(err)

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        assert [type(err) for err in errors] == [ProcessLookupError]
