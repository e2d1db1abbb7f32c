"""Kinds of task state that need no ptrace: set in a child, dumped, restored in another child,
dumped again.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import resource
import signal
import struct
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import pytest

from agent.kernel.features import kernel_features
from agent.kernel.libc import syscall
from agent.kernel.prctl import prctl
from agent.kernel.syscalls import NR_timer_create, NR_timer_settime
from agent.procfs.files import read_bytes
from agent.procfs.status import read_status
from agent.procfs.timers import read_timers
from agent.state.creds import (
    creds_of,
    own_securebits,
    parse_creds,
    restore_creds_calls,
    securebits_call,
)
from agent.state.limits import dump_limits, restore_limits_calls
from agent.state.process import (
    dumpable_call,
    plan_process,
    read_process_files,
    restore_process_calls,
)
from agent.state.sched import plan_sched, restore_sched_calls
from agent.state.signals import (
    ALTSTACK_BYTES,
    altstack_call,
    pack_altstack,
    plan_actions,
    restore_actions_calls,
    restore_altstack_call,
    restore_private_pending_calls,
    restore_shared_pending_calls,
    unpack_altstack,
)
from agent.state.timers import arm_timers_calls, create_timers_calls, plan_timers
from protocol.codec import decode, encode
from protocol.state.creds import CredState
from protocol.state.limits import LimitsState
from protocol.state.process import ProcessState
from protocol.state.sched import SchedState
from protocol.state.signals import AltStack, SignalAction
from protocol.state.timers import TimersState
from tests.kernel.local_batch import LocalBatch

T = TypeVar("T")
needs_root = pytest.mark.skipif(
    os.geteuid() != 0 and os.environ.get("AGENT_TEST_FORCE") != "1", reason="needs root"
)


def in_child(function: Callable[[], T]) -> T:
    """Return what ``function`` returns in a fresh fork; its exception fails the test."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            answer: tuple[bool, object] = (True, function())
        except BaseException:
            answer = (False, traceback.format_exc())
        with os.fdopen(writer, "wb") as file:
            pickle.dump(answer, file)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        data = file.read()
    os.waitpid(pid, 0)
    assert data, "the child died"
    succeeded, result = pickle.loads(data)
    assert succeeded, result
    return result  # type: ignore[no-any-return]


def dump(plan: Callable[[LocalBatch], Callable[[], T]]) -> T:
    batch = LocalBatch()
    collect = plan(batch)
    batch.run()
    return collect()


def dump_sched() -> SchedState:
    return dump(lambda batch: plan_sched(batch.typed()))


def test_scheduling_survives() -> None:
    def source() -> SchedState:
        os.nice(7)
        os.sched_setaffinity(0, {0})
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        prctl(29, 123456)
        return dump_sched()

    state = in_child(source)
    assert (state.nice, state.policy, state.timer_slack_ns) == (7, os.SCHED_BATCH, 123456)
    assert decode(SchedState, encode(state)) == state

    def destination() -> SchedState:
        batch = LocalBatch()
        restore_sched_calls(batch.typed(), state)
        batch.run()
        return dump_sched()

    assert in_child(destination) == state


def test_unbound_thread_gets_all_cpus_though_the_agent_is_bound() -> None:
    state = in_child(dump_sched)
    assert state.affinity_all

    def destination() -> SchedState:
        os.sched_setaffinity(0, {0})
        batch = LocalBatch()
        restore_sched_calls(batch.typed(), state)
        batch.run()
        return dump_sched()

    assert in_child(destination) == state


def test_limits_survive() -> None:
    def source() -> LimitsState:
        resource.setrlimit(resource.RLIMIT_NOFILE, (321, 654))
        resource.setrlimit(resource.RLIMIT_CORE, (4096, 8192))
        return dump_limits(os.getpid())

    state = in_child(source)
    assert state.limits[resource.RLIMIT_NOFILE].soft == 321
    assert decode(LimitsState, encode(state)) == state

    def destination() -> LimitsState:
        batch = LocalBatch()
        restore_limits_calls(batch.typed(), state)
        batch.run()
        return dump_limits(os.getpid())

    assert in_child(destination) == state


def dump_actions() -> tuple[SignalAction, ...]:
    return dump(lambda batch: plan_actions(batch.typed()))


def test_signal_dispositions_survive() -> None:
    def source() -> tuple[SignalAction, ...]:
        signal.signal(signal.SIGUSR1, lambda *_: None)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup(1) ignores it
        return dump_actions()

    actions = in_child(source)
    handlers = {action.signal: action.handler for action in actions}
    assert handlers[signal.SIGUSR1] > 1
    assert handlers[signal.SIGUSR2] == 1
    assert handlers.get(signal.SIGPIPE, 0) == 0

    def destination() -> tuple[SignalAction, ...]:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        batch = LocalBatch()
        ignored = read_status(os.getpid()).sig_ign
        restore_actions_calls(batch.typed(), actions, inherited=ignored)
        batch.run()
        return dump_actions()

    restored = {action.signal: action for action in in_child(destination)}
    for action in actions:
        assert restored[action.signal] == action
    assert signal.SIGHUP not in restored or restored[signal.SIGHUP].handler == 0
    assert signal.SIGPIPE not in restored or restored[signal.SIGPIPE].handler == 0


def test_queued_signals_survive_with_kernel_siginfo() -> None:
    kernel_made = struct.pack("=iii", signal.SIGALRM, 0, 0x80).ljust(128, b"\0")
    queued = struct.pack("=iii4xiIQ", 40, 0, -1, 77, 5, 0x1234567890).ljust(128, b"\0")
    twice = struct.pack("=iii4xiIQ", 40, 0, -1, 78, 5, 2).ljust(128, b"\0")

    def destination() -> list[tuple[int, int, int]]:
        signal.pthread_sigmask(signal.SIG_SETMASK, set(range(1, 65)))
        batch = LocalBatch()
        pid = os.getpid()
        restore_shared_pending_calls(batch.typed(), pid, [kernel_made, queued])
        restore_private_pending_calls(batch.typed(), pid, pid, [twice, kernel_made])
        batch.run()
        seen = []
        while info := signal.sigtimedwait(set(range(1, 65)), 0):
            seen.append((info.si_signo, info.si_code, info.si_pid))
        return seen

    # The thread's own queue comes first.
    assert in_child(destination) == [
        (signal.SIGALRM, 0x80, 0),
        (40, -1, 78),
        (signal.SIGALRM, 0x80, 0),
        (40, -1, 77),
    ]


@pytest.mark.parametrize(
    "state",
    [
        AltStack(sp=0, flags=2, size=0),
        AltStack(sp=0x10000, flags=0, size=65536),
        AltStack(sp=0x10000, flags=1 << 31, size=65536),
    ],
)
def test_alternate_stack_survives(state: AltStack) -> None:
    def destination() -> AltStack:
        batch = LocalBatch()
        restore_altstack_call(batch.typed(), batch.typed().data(pack_altstack(state)))
        batch.run()
        batch = LocalBatch()
        out = batch.typed().buffer(ALTSTACK_BYTES)
        altstack_call(batch.typed(), out)
        batch.run()
        return unpack_altstack(*struct.unpack("=QIIQ", out.read()))

    restored = in_child(destination)
    # The field is an int with the sign bit in use; only its bits matter.
    assert (restored.sp, restored.flags, restored.size) == (state.sp, state.flags, state.size)


def dump_timers() -> TimersState:
    return dump(lambda batch: plan_timers(batch.typed(), read_timers(os.getpid()), {}))


def timers_source() -> TimersState:
    prctl(77, 1)
    for number, clock, notify in ((3, 1, 0), (70000, 0, 1), (5, 2, 0)):
        event = ctypes.create_string_buffer(struct.pack("=Qii48x", 0xABC0 + number, 34, notify))
        ident = ctypes.c_int(number)
        syscall(NR_timer_create, clock, ctypes.addressof(event), ctypes.addressof(ident))
        assert ident.value == number
    spec = ctypes.create_string_buffer(struct.pack("=qqqq", 2, 5, 100, 0))
    syscall(NR_timer_settime, 3, 0, ctypes.addressof(spec), 0)
    syscall(NR_timer_settime, 5, 0, ctypes.addressof(spec), 0)
    signal.setitimer(signal.ITIMER_REAL, 50, 3)
    signal.setitimer(signal.ITIMER_PROF, 60)
    return dump_timers()


@pytest.mark.skipif(
    not kernel_features().has_timer_restore_ids, reason="needs PR_TIMER_CREATE_RESTORE_IDS"
)
def test_timers_keep_ids_and_remaining_time() -> None:
    state = in_child(timers_source)
    assert [timer.id for timer in state.posix_timers] == [3, 5, 70000]
    assert decode(TimersState, encode(state)) == state

    def destination() -> TimersState:
        batch = LocalBatch()
        verify = create_timers_calls(batch.typed(), state.posix_timers, os.getpid())
        arm_timers_calls(batch.typed(), state, elapsed_ns=10 * 10**9)
        batch.run()
        verify()
        return dump_timers()

    restored = in_child(destination)
    for before, after in zip(state.posix_timers, restored.posix_timers, strict=True):
        assert (after.id, after.notify, after.signal) == (before.id, before.notify, before.signal)
        assert (after.sigval, after.clock_id) == (before.sigval, before.clock_id)
        assert after.interval_ns == before.interval_ns
    left = [timer.remaining_ns / 1e9 for timer in restored.posix_timers]
    assert 89 < left[0] <= 90, "a real-time clock moved on by the ten seconds"
    assert 99 < left[1] <= 100, "a CPU clock stood still"
    assert left[2] == 0
    real, prof = restored.interval_timers
    assert 39e9 < real.remaining_ns <= 40e9 + 1000
    assert real.interval_ns == 3 * 10**9
    assert 59e9 < prof.remaining_ns <= 60.1e9


def test_periodic_alarm_with_queued_signal_keeps_its_period() -> None:
    def source() -> TimersState:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        signal.setitimer(signal.ITIMER_REAL, 0.001, 5)
        while not signal.sigpending():
            time.sleep(0.001)
        return dump_timers()

    state = in_child(source)
    assert state.interval_timers[0].remaining_ns == 0

    def destination() -> TimersState:
        batch = LocalBatch()
        arm_timers_calls(batch.typed(), state)
        batch.run()
        return dump_timers()

    assert in_child(destination).interval_timers[0].interval_ns == 5 * 10**9


def dump_creds() -> CredState:
    def plan(batch: LocalBatch) -> Callable[[], CredState]:
        bits = securebits_call(batch.typed())
        return lambda: parse_creds(read_bytes("/proc/self/status"), bits.value)

    return dump(plan)


def restored_creds(state: CredState) -> CredState:
    def destination() -> CredState:
        batch = LocalBatch()
        now = creds_of(read_status(os.getpid()), own_securebits())
        restore_creds_calls(batch.typed(), state, now)
        batch.run()
        return dump_creds()

    return in_child(destination)


@needs_root
def test_unprivileged_credentials_survive() -> None:
    def source() -> CredState:
        os.setgroups([7, 1000, 40])
        os.setresgid(1000, 1001, 1002)
        os.setresuid(1000, 1001, 1002)
        prctl(38, 1)
        return dump_creds()

    state = in_child(source)
    assert state.uids == (1000, 1001, 1002, 1001)
    assert state.cap_permitted == 0
    assert state.no_new_privs
    assert decode(CredState, encode(state)) == state
    assert restored_creds(state) == state


@needs_root
def test_capabilities_beyond_the_bounding_set_and_locked_securebits_survive() -> None:
    net_bind, kill, chown = 10, 5, 0

    def source() -> CredState:
        batch = LocalBatch()
        now = dump_creds()
        wanted = CredState(
            uids=(33, 33, 33, 34),
            gids=(33, 33, 33, 35),
            groups=(),
            cap_inheritable=1 << net_bind | 1 << kill,
            cap_permitted=1 << net_bind | 1 << chown,
            cap_effective=1 << chown,
            cap_bounding=1 << chown,
            cap_ambient=1 << net_bind,
            securebits=0b11 | 1 << 6,
            no_new_privs=False,
        )
        restore_creds_calls(batch.typed(), wanted, now)
        batch.run()
        state = dump_creds()
        assert state == wanted, state
        return state

    state = in_child(source)
    assert restored_creds(state) == state


def test_equal_credentials_need_no_call() -> None:
    batch = LocalBatch()
    now = creds_of(read_status(os.getpid()), own_securebits())
    restore_creds_calls(batch.typed(), now, now)
    assert batch.calls == []


def dump_process() -> ProcessState:
    pid = os.getpid()
    files = read_process_files(pid, read_bytes("/proc/self/status"))
    return dump(lambda batch: partial(plan_process(batch.typed(), pid), files, 0))


def test_process_attributes_survive() -> None:
    def source() -> ProcessState:
        os.setsid()
        os.umask(0o027)
        os.chdir("/usr/lib")
        prctl(36, 1)
        prctl(4, 0)
        return dump_process()

    state = in_child(source)
    assert (state.umask, state.cwd, state.dumpable, state.child_subreaper) == (
        0o027,
        "/usr/lib",
        0,
        True,
    )
    assert state.sid == state.pgid == state.pid
    assert decode(ProcessState, encode(state)) == state

    def destination() -> ProcessState:
        batch = LocalBatch()
        restore_process_calls(batch.typed(), state)
        dumpable_call(batch.typed(), state)
        batch.run()
        return dump_process()

    restored = in_child(destination)
    for name in ("umask", "cwd", "root", "dumpable", "child_subreaper"):
        assert getattr(restored, name) == getattr(state, name), name
