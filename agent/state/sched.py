"""Scheduling of one thread: dumped and restored by calls made inside the thread itself.

Must never raise a thread above what it had. The mask of CPUs that the source agent sees online
counts as "all", and a destination gives such a thread all of its own. Times are nanoseconds.
Sources: sched_setattr(2), ioprio_set(2).
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from agent.errors import RestoreError
from agent.kernel import sched
from agent.kernel.libc import syscall
from agent.kernel.prctl import PR_GET_TIMERSLACK, PR_SET_TIMERSLACK, prctl
from agent.kernel.sched import (
    IOPRIO_WHO_PROCESS,
    SCHED_DEADLINE,
    SCHED_FLAG_DL_OVERRUN,
    SCHED_FLAG_RECLAIM,
    SCHED_FLAG_RESET_ON_FORK,
    SCHED_FLAG_UTIL_CLAMP_MAX,
    SCHED_FLAG_UTIL_CLAMP_MIN,
)
from agent.kernel.syscalls import (
    NR_get_mempolicy,
    NR_getpriority,
    NR_ioprio_get,
    NR_ioprio_set,
    NR_prctl,
    NR_sched_getaffinity,
    NR_sched_getattr,
    NR_sched_setaffinity,
    NR_sched_setattr,
    NR_set_mempolicy,
    NR_setpriority,
)
from agent.procfs.status import Status
from agent.state.mempolicy import NODES_BITS
from agent.types import Obstacle
from protocol.state.sched import MAX_NODES_BYTES, SchedState

if TYPE_CHECKING:
    from agent.target.inject import Batch

PRIO_PROCESS: Final = 0
SCHED_CAPACITY_SCALE: Final = 1024
_KEPT_FLAGS: Final = SCHED_FLAG_RESET_ON_FORK | SCHED_FLAG_RECLAIM | SCHED_FLAG_DL_OVERRUN

# struct sched_attr, include/uapi/linux/sched/types.h (SCHED_ATTR_SIZE_VER1).
_SCHED_ATTR: Final = struct.Struct("=IIQiIQQQII")
_MASK_ALIGN: Final = 8


def _parse_cpu_list(text: str) -> set[int]:
    cpus: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def _read_cpus(kind: str) -> set[int]:
    try:
        with open(f"/sys/devices/system/cpu/{kind}", encoding="ascii") as file:
            return _parse_cpu_list(file.read())
    except OSError:
        return set(range(os.cpu_count() or 1))


def _mask_of(cpus: set[int]) -> int:
    return functools.reduce(lambda mask, cpu: mask | 1 << cpu, cpus, 0)


@functools.cache
def online_mask() -> int:
    """Return the bit mask of this host's online CPUs."""
    return _mask_of(_read_cpus("online"))


@functools.cache
def affinity_bytes() -> int:
    """Return how long a CPU mask must be for this kernel to accept the buffer."""
    highest = max(_read_cpus("possible"), default=0)
    return max(128, -(-(highest + 1) // 64) * _MASK_ALIGN)


@functools.cache
def default_slice_ns() -> int:
    """Return the time slice of an ordinary thread of this host, 0 where the kernel does not tell."""
    # Since Linux kernel commit 857b158dc5e8 ("sched/eevdf: Use sched_attr::sched_runtime to set
    # request/slice suggestion") (in v6.12), an ordinary thread reports its slice as sched_runtime.
    # Setting the default explicitly would turn it into a custom one.
    attr = sched.getattr(0)
    return 0 if attr.sched_policy == SCHED_DEADLINE else int(attr.sched_runtime)


def plan_sched(batch: Batch) -> Callable[[], SchedState]:
    """Add the calls that read the scheduling of the thread that runs ``batch``."""
    attr = batch.buffer(_SCHED_ATTR.size)
    mask = batch.buffer(affinity_bytes())
    batch.call(NR_sched_getattr, 0, attr, _SCHED_ATTR.size, 0, name="sched_getattr")
    batch.call(NR_sched_getaffinity, 0, affinity_bytes(), mask, name="sched_getaffinity")
    nice = batch.call(NR_getpriority, PRIO_PROCESS, 0, name="getpriority")
    ioprio = batch.call(NR_ioprio_get, IOPRIO_WHO_PROCESS, 0, name="ioprio_get")
    slack = batch.call(NR_prctl, PR_GET_TIMERSLACK, name="prctl(PR_GET_TIMERSLACK)")
    memory = batch.buffer(8 + MAX_NODES_BYTES)
    # Fails without CONFIG_NUMA and leaves zeros: the default policy.
    batch.call(
        NR_get_mempolicy, memory, memory.at(8), NODES_BITS, 0, 0, name="get_mempolicy", check=False
    )

    # Threads are mostly alike: what was read decides what it means, once.
    return lambda: _parse_sched(
        attr.read(), mask.read(), memory.read(), nice.value, ioprio.value, slack.value
    )


@functools.lru_cache(maxsize=64)
def _parse_sched(
    attr: bytes, mask: bytes, numa: bytes, nice: int, ioprio: int, slack: int
) -> SchedState:
    _, policy, flags, _, priority, runtime, deadline, period, low, high = _SCHED_ATTR.unpack(attr)
    bits = int.from_bytes(mask, "little")
    if policy != SCHED_DEADLINE:
        runtime = 0 if runtime == default_slice_ns() else runtime
    return SchedState(
        policy=policy,
        flags=flags & _KEPT_FLAGS,
        nice=20 - nice,  # the raw call answers 1..40, so that no error looks like it
        priority=priority,
        runtime_ns=runtime,
        deadline_ns=deadline,
        period_ns=period,
        util_min=low,
        util_max=high,
        affinity=bits.to_bytes(max(8, -(-bits.bit_length() // 64) * _MASK_ALIGN), "little"),
        affinity_all=bits & online_mask() == online_mask(),
        ioprio=ioprio,
        timer_slack_ns=slack,
        memory_policy=int.from_bytes(numa[:4], "little"),
        memory_nodes=numa[8:].rstrip(b"\0"),
    )


def restore_sched_calls(batch: Batch, state: SchedState, *, with_policy: bool = True) -> None:
    """Add the calls that give the thread that runs ``batch`` the scheduling in ``state``.

    Needs CAP_SYS_NICE for a better nice value or a real-time policy, so it comes before the
    credentials. ``with_policy`` False leaves out what set_policy() does later.
    """
    # The CPUs first: a deadline policy is refused to a thread that is bound to some of them.
    if state.affinity_all:
        mask = b"\xff" * affinity_bytes()
    else:
        mask = state.affinity
    batch.call(
        NR_sched_setaffinity, 0, len(mask), batch.data(mask), name="sched_setaffinity"
    )
    # The nice value by itself: sched_setattr leaves it out for real-time policies.
    batch.call(NR_setpriority, PRIO_PROCESS, 0, state.nice, name="setpriority")
    if with_policy:
        batch.call(NR_sched_setattr, 0, batch.data(_policy(state)), 0, name="sched_setattr")
        batch.call(
            NR_prctl, PR_SET_TIMERSLACK, state.timer_slack_ns, name="prctl(PR_SET_TIMERSLACK)"
        )
    batch.call(NR_ioprio_set, IOPRIO_WHO_PROCESS, 0, state.ioprio, name="ioprio_set")
    if state.memory_policy:
        nodes = batch.data(state.memory_nodes.ljust(MAX_NODES_BYTES, b"\0")) if state.memory_nodes else 0
        bits = NODES_BITS if state.memory_nodes else 0
        batch.call(NR_set_mempolicy, state.memory_policy, nodes, bits, name="set_mempolicy")


def set_policy(host_tid: int, state: SchedState) -> None:
    """Give a stopped thread its scheduling policy, from outside: until then it may run as an urgent one.

    Its timer slack too: the kernel lets real-time threads have none, and gives one that is no longer
    real-time what it was born with.

    :raises RestoreError: the kernel refuses.
    """
    try:
        syscall(NR_sched_setattr, host_tid, ctypes.addressof(_policy_attr(state)), 0)
        if state.timer_slack_ns not in (0, own_timer_slack_ns()):
            with open(f"/proc/{host_tid}/timerslack_ns", "w", encoding="ascii") as file:
                file.write(str(state.timer_slack_ns))
    except OSError as err:
        raise RestoreError(
            f"Cannot give thread {host_tid} scheduling policy {state.policy}: {err.strerror}"
        ) from err


@functools.cache
def own_timer_slack_ns() -> int:
    """Timer slack of this agent, and of threads born from it; first asked before it is urgent, and has none."""
    return prctl(PR_GET_TIMERSLACK)


@functools.lru_cache(maxsize=16)
def _policy_attr(state: SchedState) -> ctypes.Array[ctypes.c_char]:
    # Threads are mostly alike.
    return ctypes.create_string_buffer(_policy(state), _SCHED_ATTR.size)


def _policy(state: SchedState) -> bytes:
    flags = state.flags
    if state.util_min > 0:
        flags |= SCHED_FLAG_UTIL_CLAMP_MIN
    if 0 < state.util_max < SCHED_CAPACITY_SCALE:
        flags |= SCHED_FLAG_UTIL_CLAMP_MAX
    return _SCHED_ATTR.pack(
        _SCHED_ATTR.size,
        state.policy,
        flags,
        state.nice,
        state.priority,
        state.runtime_ns,
        state.deadline_ns,
        state.period_ns,
        state.util_min,
        state.util_max,
    )


def bound_cpus(status: Status) -> bytes:
    """Return the CPU mask in a thread's status, little-endian; empty when it may use every CPU of this host."""
    bits = int(status.cpus_allowed.replace(",", "") or "0", 16)
    if bits & online_mask() == online_mask():
        return b""
    return bits.to_bytes(-(-bits.bit_length() // 8), "little")


def check_sched_restore(tid: int, state: SchedState) -> list[Obstacle]:
    """Say what of ``state`` this host cannot give a thread; nothing is touched."""
    return check_affinity(tid, b"" if state.affinity_all else state.affinity)


def check_affinity(tid: int, affinity: bytes) -> list[Obstacle]:
    """Say so if this host has none of the CPUs of a mask; an empty one stands for all."""
    if not affinity or int.from_bytes(affinity, "little") & online_mask():
        return []
    return [
        Obstacle(
            kind="affinity",
            what=f"thread {tid}",
            detail="it is bound to CPUs that this host does not have online",
            hint="widen it on the source with taskset -p, or choose a host with more CPUs",
        )
    ]
