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
from protocol import codec
from protocol.messages import Message
from protocol.state import KINDS
from protocol.state.files import FILE_BODIES

URGENT_NICE = -20
"""Nice value of an agent while the target is frozen."""


def warm_up() -> None:
    """Make the first dump or restore of this agent as fast as a second one would be."""
    for message in get_args(Message):
        codec.prepare(message)
    for kind in KINDS.values():
        codec.prepare(kind.schema)
    for schema in FILE_BODIES.values():
        codec.prepare(schema)
    task.warm_up()


@contextmanager
def urgent() -> Iterator[None]:
    """Let nothing that can wait delay the body, which is somebody's downtime.

    No garbage collection, and no other process's turn on a busy host (where the agent may ask for that).
    """
    before = os.getpriority(os.PRIO_PROCESS, 0)
    gc.disable()
    try:
        set_urgent_priority(0)
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, before)
        gc.enable()


def set_urgent_priority(pid: int) -> None:
    """Let a process (0: this one) run before others, if this agent may (CAP_SYS_NICE)."""
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, pid, URGENT_NICE)
