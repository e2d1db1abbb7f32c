"""The pure parts of task state: schemas, what is decided from what was read."""

from __future__ import annotations

import dataclasses
import os
import struct
from typing import Any

import pytest

from agent.errors import RestoreError
from agent.procfs.files import read_bytes
from agent.procfs.limits import RLIM_INFINITY
from agent.procfs.status import parse_status
from agent.procfs.timers import PosixTimer as MadeTimer
from agent.state.creds import check_creds_restore, creds_of, parse_creds
from agent.state.limits import check_limits_restore
from agent.state.sched import check_sched_restore
from agent.state.signals import without_stops
from agent.state.task import TaskRestore, TaskState, study_new_task
from agent.state.thread import fit_xstate, likeness, pack_variables
from agent.state.timers import check_timers, settle_expired
from protocol.codec import decode, encode
from protocol.errors import RemoteProtocolError
from protocol.sections import decode_section, encode_section
from protocol.state import KINDS
from protocol.state.creds import CredState
from protocol.state.limits import NR_LIMITS, LimitsState, ResourceLimit
from protocol.state.process import ProcessState
from protocol.state.restart import RestartState
from protocol.state.sched import SchedState
from protocol.state.signals import AltStack, SignalAction, SignalsState
from protocol.state.thread import REGS_BYTES, RseqState, ThreadsState, ThreadState
from protocol.state.timers import IntervalTimer, PosixTimer, TimersState

SCHED = SchedState(
    policy=0,
    flags=0,
    nice=-5,
    priority=0,
    runtime_ns=0,
    deadline_ns=0,
    period_ns=0,
    util_min=0,
    util_max=1024,
    affinity=b"\x03" + bytes(7),
    affinity_all=True,
    ioprio=0,
    timer_slack_ns=50000,
)
CREDS = CredState(
    uids=(0, 1, 2, 3),
    gids=(4, 5, 6, 7),
    groups=(8, 0xFFFFFFFE),
    cap_inheritable=1,
    cap_permitted=3,
    cap_effective=2,
    cap_bounding=(1 << 64) - 1,
    cap_ambient=1,
    securebits=0xFF,
    no_new_privs=True,
)


def siginfo(signo: int, code: int, first: int = 0) -> bytes:
    return struct.pack("=iii4xi", signo, 0, code, first).ljust(128, b"\0")


def thread(tid: int) -> ThreadState:
    return ThreadState(
        tid=tid,
        name=b"worker\xff",
        regs=bytes(REGS_BYTES),
        restart=RestartState(nr=35, args=(1, 2, 3, 4, 5, 6), remaining_ns=5),
        xstate=bytes(832),
        sigmask=(1 << 64) - 1,
        altstack=AltStack(sp=1 << 40, flags=1 << 31, size=65536),
        pending=(siginfo(40, -1),),
        robust_list_head=1 << 46,
        robust_list_length=24,
        clear_child_tid=1 << 46,
        rseq=RseqState(addr=1 << 46, size=32, sig=0x53053053, flags=0),
        pdeath_signal=15,
        personality=0x0040000,
        mce_kill=2,
        tsc_mode=1,
        cpuid_enabled=True,
        io_flusher=False,
        sched=SCHED,
        creds=CREDS,
    )


def process(pid: int = 7) -> ProcessState:
    return ProcessState(
        pid=pid,
        pgid=0,
        sid=0,
        umask=0o22,
        cwd="/",
        root="/",
        oom_score_adj=0,
        coredump_filter=0x33,
        dumpable=1,
        thp_disable=0,
        child_subreaper=False,
        memory_deny_write_exec=0,
        memory_merge=False,
        xcomp_permission=0x2E7,
        stop_signal=0,
        monotonic_offset_ns=-5,
        boottime_offset_ns=0,
        clock_monotonic_ns=1,
        clock_boottime_ns=2,
        clock_realtime_ns=3,
    )


def limits(hard: int = RLIM_INFINITY) -> LimitsState:
    return LimitsState(
        limits=tuple(
            ResourceLimit(resource=number, soft=0, hard=hard) for number in range(NR_LIMITS)
        )
    )


def posix_timer(number: int, remaining_ns: int, interval_ns: int = 0) -> PosixTimer:
    return PosixTimer(
        id=number,
        clock_id=1,
        notify=0,
        signal=34,
        sigval=(1 << 64) - 1,
        thread_id=0,
        remaining_ns=remaining_ns,
        interval_ns=interval_ns,
        overrun=0,
    )


def task() -> TaskState:
    action = SignalAction(
        signal=64, handler=1 << 46, flags=0xFFFFFFFFD8000004, restorer=1 << 46, mask=1
    )
    return TaskState(
        process=process(),
        limits=limits(),
        signals=SignalsState(actions=(action,), pending=(siginfo(1, 0),)),
        timers=TimersState(
            interval_timers=(IntervalTimer(which=0, remaining_ns=0, interval_ns=1000),),
            posix_timers=(posix_timer(0, 5), posix_timer(9, 0)),
        ),
        threads=(thread(7), thread(3)),
    )


def test_task_survives_its_sections() -> None:
    sections = [encode_section(kind, owner, obj) for kind, owner, obj in task().sections()]
    assert [section.kind for section in sections] == [
        "process", "limits", "signals", "timers", "threads"
    ]
    # Whatever the order: the leader comes first again.
    assert TaskState.from_sections(map(decode_section, reversed(sections))) == task()


def test_each_kind_is_registered() -> None:
    assert KINDS.keys() >= {"process", "limits", "signals", "timers", "threads"}


def test_task_without_leader_is_rejected() -> None:
    objects = [obj for kind, _, obj in task().sections() if kind != "threads"]
    objects.append(ThreadsState.of([thread(3)]))
    with pytest.raises(RestoreError, match="leader"):
        TaskState.from_sections(objects)


def test_what_a_process_does_without_is_noted() -> None:
    pid = os.getpid()
    new = study_new_task(pid)
    state = dataclasses.replace(task(), threads=(thread(7), dataclasses.replace(thread(8), pdeath_signal=0)))
    lost, session = TaskRestore(state, pid, new).notes
    assert lost.startswith("Thread 7 lost the parent death signal")
    assert session.startswith("Session 0 and process group 0 stay behind")
    kept = TaskRestore(state, pid, new, keep_pdeath_signal=True).notes
    assert kept == [session]
    leader = dataclasses.replace(state, process=dataclasses.replace(state.process, sid=7, pgid=7))
    assert TaskRestore(leader, pid, new, keep_pdeath_signal=True).notes == []


def test_missing_section_is_named() -> None:
    with pytest.raises(RestoreError, match="LimitsState"):
        TaskState.from_sections([process(), thread(7)])


@pytest.mark.parametrize(
    ("obj", "change"),
    [
        (CREDS, {"uids": [1, 2, 3]}),
        (CREDS, {"cap_effective": 1 << 40}),
        (SCHED, {"affinity": b""}),
        (SCHED, {"affinity": bytes(8)}),
        (SCHED, {"nice": 20}),
        (thread(7), {"regs": bytes(8)}),
        (thread(7), {"pending": [b"x"]}),
        (thread(7), {"pending": [bytes(128)]}),
        (thread(7), {"name": b"sixteen bytes!!!"}),
        (ThreadsState.of([thread(7)]), {"tids": [7, 8]}),
        (ThreadsState.of([thread(7)]), {"regs": bytes(8)}),
        (ThreadsState.of([thread(7)]), {"altstacks": [1]}),
        (ThreadsState.of([thread(7)]), {"kind_of": [1]}),
        (ThreadsState.of([thread(7)]), {"xstate_sizes": [1 << 40]}),
        (ThreadsState.of([thread(7)]), {"pending": {9: [siginfo(40, -1)]}}),
        (process(), {"cwd": "relative"}),
        (process(), {"pid": 0}),
    ],
)
def test_impossible_state_is_rejected(obj: object, change: dict[str, object]) -> None:
    assert dataclasses.is_dataclass(obj) and not isinstance(obj, type)
    import msgpack

    good = msgpack.unpackb(encode(obj), strict_map_key=False)
    with pytest.raises(RemoteProtocolError):
        decode(type(obj), msgpack.packb({**good, **change}))


def test_threads_of_all_kinds_survive_together() -> None:
    plain = dataclasses.replace(thread(1), restart=None, pending=(), rseq=None, robust_list_length=0)
    odd = dataclasses.replace(thread(2), xstate=bytes(700) + b"x" + bytes(99), name=b"")
    odd = dataclasses.replace(odd, creds=dataclasses.replace(CREDS))
    threads = [thread(7), plain, odd, dataclasses.replace(plain, tid=9, io_flusher=True)]
    wire = ThreadsState.of(threads)
    assert len(wire.kinds) == 4
    again: ThreadsState = decode(ThreadsState, encode(wire))
    assert again.threads() == threads


def test_alike_threads_differ_only_in_what_their_calls_are_given() -> None:
    # Whatever a thread has shows in how it is restored: a field that is forgotten there would not be.
    set_by_ptrace = {"tid", "regs", "restart", "xstate", "sigmask"}
    before = dataclasses.replace(thread(7), pending=())
    changes: dict[str, object] = {
        "name": b"other",
        "altstack": AltStack(sp=1, flags=2, size=3),
        "pending": (siginfo(40, -1),),
        "rseq": RseqState(addr=1 << 46, size=33, sig=1, flags=0),
        "cpuid_enabled": False,
        "io_flusher": True,
        "sched": dataclasses.replace(SCHED, nice=1),
        "creds": dataclasses.replace(CREDS, securebits=0),
        "speculation": (4, 0),
    }
    for field in dataclasses.fields(ThreadState):
        if field.name in set_by_ptrace:
            continue
        value: Any = changes.get(field.name, getattr(before, field.name))
        after = dataclasses.replace(before, **{field.name: value if field.name in changes else value + 1})
        seen = (likeness(before), pack_variables(before)), (likeness(after), pack_variables(after))
        assert seen[0] != seen[1], field.name


@pytest.mark.parametrize("size", [576, 832, 2696, 4096, 5000, 11008])
@pytest.mark.parametrize("zeros", [0, 1, 63, 64, 65, 255, 256, 257, 520, 576])
def test_extended_registers_travel_without_the_zeros_at_their_end(size: int, zeros: int) -> None:
    xstate = bytes([1] * (size - zeros)) + bytes(zeros)
    packed = ThreadsState.of([dataclasses.replace(thread(7), xstate=xstate)])
    assert packed.xstates == (bytes([1] * (size - zeros)),) and packed.xstate_sizes == (size,)
    assert packed.threads()[0].xstate == xstate


def test_timer_that_fired_while_it_was_read_is_not_carried_twice() -> None:
    state = TimersState(
        interval_timers=(IntervalTimer(which=0, remaining_ns=100, interval_ns=0),),
        posix_timers=(
            posix_timer(1, 100),
            posix_timer(2, 100),
            posix_timer(3, 100, 5000),
            posix_timer(4, 99_000_000),
        ),
    )
    pending = [siginfo(34, -2, 1), siginfo(34, -2, 3), siginfo(34, -2, 4), siginfo(14, 0x80)]
    settled = settle_expired(state, pending, window_ns=1_000_000)
    assert [timer.remaining_ns for timer in settled.posix_timers] == [0, 100, 5000, 99_000_000]
    assert settled.interval_timers[0].remaining_ns == 0


def test_alarm_still_to_come_is_kept() -> None:
    state = TimersState(
        interval_timers=(IntervalTimer(which=0, remaining_ns=100, interval_ns=0),), posix_timers=()
    )
    kill_by_user = siginfo(14, 0)
    assert settle_expired(state, [kill_by_user], window_ns=1_000_000) == state


def xstate(size: int, mask: int, in_use: int) -> bytes:
    raw = bytearray(size)
    struct.pack_into("=Q", raw, 464, mask)
    struct.pack_into("=Q", raw, 512, in_use)
    return bytes(raw)


def test_extended_registers_are_padded_for_a_larger_host() -> None:
    fitted = fit_xstate(xstate(832, 7, 7), 2696, 0xE7)
    assert len(fitted) == 2696
    assert fitted == xstate(2696, 0xE7, 7)


def test_extended_registers_not_in_use_may_be_missing_on_the_destination() -> None:
    assert fit_xstate(xstate(2696, 0xE7, 3), 832, 7) == xstate(832, 7, 3)


def test_extended_registers_in_use_must_exist_on_the_destination() -> None:
    with pytest.raises(RestoreError, match="0xe0"):
        fit_xstate(xstate(2696, 0xE7, 0xE7), 832, 7)


def test_quick_parse_of_credentials_agrees_with_the_full_one() -> None:
    text = read_bytes("/proc/self/status")
    assert parse_creds(text, 5) == creds_of(parse_status(text), 5)
    with_groups = text.replace(b"\nGroups:\t", b"\nGroups:\t4 24 1000 ", 1)
    assert parse_creds(with_groups, 0).groups[:3] == (4, 24, 1000)


def test_credentials_like_the_agents_own_are_no_obstacle() -> None:
    text = read_bytes(f"/proc/{os.getpid()}/status")
    here = parse_status(text)
    assert check_creds_restore(1, creds_of(here, 0), here) == []


def test_unprivileged_agent_cannot_restore_another_user() -> None:
    here = parse_status(read_bytes("/proc/self/status"))._replace(
        uids=(1000,) * 4,
        cap_eff=0,
        cap_prm=0,
        no_new_privs=True,
    )
    wanted = dataclasses.replace(CREDS, no_new_privs=False)
    kinds = {obstacle.kind for obstacle in check_creds_restore(1, wanted, here)}
    assert kinds == {"capabilities", "credentials", "no_new_privs"}


def test_hard_limit_out_of_reach_is_an_obstacle_only_without_the_capability() -> None:
    found = check_limits_restore(limits(), capabilities=0)
    assert any("agent-recv" in obstacle.hint for obstacle in found)
    assert check_limits_restore(limits(), capabilities=1 << 24) == []
    assert check_limits_restore(limits(0), capabilities=0) == []


def test_thread_bound_to_cpus_that_do_not_exist_is_an_obstacle() -> None:
    bound = dataclasses.replace(SCHED, affinity=bytes(127) + b"\x80", affinity_all=False)
    assert [obstacle.kind for obstacle in check_sched_restore(5, bound)] == ["affinity"]
    assert check_sched_restore(5, SCHED) == []


def test_stops_are_never_queued_again() -> None:
    assert without_stops([siginfo(19, 0), siginfo(18, 0), siginfo(9, 0)]) == (siginfo(18, 0),)


def test_timer_whose_owner_is_unknown_is_an_obstacle() -> None:
    own_cpu_time = MadeTimer(1, 34, 0, "signal", False, 7, -2)
    to_thread = MadeTimer(2, 34, 0, "signal", True, 7, -2)
    of_device = MadeTimer(3, 34, 0, "signal", False, 7, (~5 << 3) | 3)
    assert check_timers([own_cpu_time], nr_threads=1) == []
    found = check_timers([own_cpu_time, to_thread, of_device], nr_threads=2)
    assert [obstacle.what for obstacle in found] == ["timer 1", "timer 3"]
