"""How an agent gets ready for a freeze: what can be paid earlier or later is not paid then.

Converters of the wire schemas are built on first use and facts about the host are asked for once; together
that takes longer than all the rest of a freeze. Must never touch the target.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import get_args

from agent.state import task
from agent.state.registry import FILE_KINDS
from protocol import codec
from protocol.messages import Message
from protocol.state import KINDS
from protocol.state.bodies import FILE_BODIES

URGENT_PRIORITY = 2
"""Real-time priority of an agent while the target is frozen: nearly the lowest, above all ordinary processes."""
AHEAD_PRIORITY = 1
"""Of its threads that work ahead: where CPUs are scarce, whoever the other agent waits for comes first."""
_CPU_LATENCY = "/dev/cpu_dma_latency"
"""What is written there holds until it is closed: how many microseconds a CPU may take to wake up, a 32-bit integer."""
_NO_LATENCY = bytes(4)


def warm_up() -> None:
    """Make the first dump or restore of this agent as fast as a second one would be."""
    for message in get_args(Message):
        codec.prepare(message)
    for kind in KINDS.values():
        codec.prepare(kind.wire)
    for schema in FILE_BODIES.values():
        codec.prepare(schema)
    list(FILE_KINDS.values())  # Imports them.
    task.warm_up()


@contextmanager
def urgent() -> Iterator[None]:
    """Let nothing that can wait delay the body, which is somebody's downtime.

    No garbage collection, no other process's turn on a busy host, no CPU asleep on an idle one. Nice values would not
    do: they count only within a session (sched(7), autogroup) or cgroup.
    """
    policy, param = os.sched_getscheduler(0), os.sched_getparam(0)
    gc.disable()
    try:
        make_urgent(0)
        with cpus_awake():
            yield
    finally:
        os.sched_setscheduler(0, policy, param)
        gc.enable()


@contextmanager
def cpus_awake() -> Iterator[None]:
    """Keep idle CPUs from a sleep that takes time to wake from, if this agent may: also ends when the agent does.

    A freeze waits some twenty times for a thread or for the other agent, each time for a CPU that has fallen asleep
    meanwhile: 10 microseconds of waking on a machine, 40 and more in a virtual one.
    Source: Documentation/power/pm_qos_interface.rst
    """
    try:
        fd = os.open(_CPU_LATENCY, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:  # no right to, or no such device in a container
        yield
        return
    try:
        with suppress(OSError):
            os.write(fd, _NO_LATENCY)
        yield
    finally:
        os.close(fd)


def make_urgent(pid: int, priority: int = URGENT_PRIORITY) -> bool:
    """Let a thread (0: this one) run before ordinary ones, if this agent may (CAP_SYS_NICE); return whether it may.

    Threads that it makes from then on are urgent too.
    """
    with suppress(PermissionError):
        os.sched_setscheduler(pid, os.SCHED_RR, os.sched_param(priority))
        return True
    return False


def make_ordinary(pid: int) -> None:
    """Take back make_urgent()."""
    os.sched_setscheduler(pid, os.SCHED_OTHER, os.sched_param(0))
