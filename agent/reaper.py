"""Restored processes are children of agent-recv for as long as it serves: someone must reap them.

Only pids that were adopted are waited for, since every other child (a skeleton, a probe) has its own waiter.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

_adopted: set[int] = set()


def adopt(pid: int) -> None:
    """Reap ``pid`` as soon as it exits."""
    _adopted.add(pid)
    _reap()


def install() -> None:
    """Start to reap; to be called once, in the main thread."""
    signal.signal(signal.SIGCHLD, _on_child)


def _on_child(signum: int, frame: FrameType | None) -> None:
    _reap()


def _reap() -> None:
    for pid in list(_adopted):
        try:
            found, _status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            found = pid
        if found:
            _adopted.discard(pid)
