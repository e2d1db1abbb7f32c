"""Signals that ask the agent to stop: they become one exception, outside of shielded stretches.

SIGINT, SIGTERM and SIGHUP raise Interrupted in the main thread, so that every ``finally`` and
context manager puts the target back as it was. Between COMMIT and the end of a migration there is
nothing to put back: there the code is ``shielded()`` and the request is remembered until the
stretch is over.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_shields = 0
_pending: list[int] = []


class Interrupted(KeyboardInterrupt):
    """A signal asked the agent to stop; ``signum`` says which."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"Interrupted by {signal.Signals(signum).name}")
        self.signum = signum


def _on_signal(signum: int, frame: FrameType | None) -> None:
    if _shields:
        _pending.append(signum)
    else:
        raise Interrupted(signum)


def install() -> None:
    """Turn the stop signals into Interrupted; one that is ignored (nohup) stays ignored."""
    for signum in STOP_SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, _on_signal)


@contextlib.contextmanager
def shielded(*, raise_after: bool = True) -> Iterator[None]:
    """Hold stop signals back until the body is done, then raise the first of them.

    Without ``raise_after`` they are dropped: for a body whose success must not look like a failure.

    If the body fails, its error is what comes out and the signals are dropped: it ends the program
    anyway.
    """
    global _shields
    _shields += 1
    try:
        yield
    finally:
        _shields -= 1
        pending = _pending[:]
        if not _shields:
            _pending.clear()
    if pending and raise_after and not _shields:
        raise Interrupted(pending[0])
